"""Training runs: how the stages are combined, by a run's settings, for the train command."""
