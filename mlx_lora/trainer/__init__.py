"""Train a model as a run's settings say: build the run, take its steps, save and report its results."""
