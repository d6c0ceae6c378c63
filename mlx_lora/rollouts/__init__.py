"""Sampling during training: answers, environments and rewards."""
