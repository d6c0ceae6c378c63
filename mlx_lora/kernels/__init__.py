"""Faster functions for training, and the choice among them by measurement on this machine."""
