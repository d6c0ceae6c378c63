"""A training run, put together from its settings: what stands between the stages and the train command."""
