"""A training run from its settings to its results: building it, the loop, the step, validation and checkpoints."""
