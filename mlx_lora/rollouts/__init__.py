"""Samples answers during training, and rewards them."""
