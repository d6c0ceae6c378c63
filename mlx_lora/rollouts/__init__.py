"""Samples answers during training, in episodes of one or several turns, and rewards them."""
