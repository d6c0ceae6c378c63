"""The loss, the optimizer, the compiled step and the training loop."""
