"""Kernels for training, their table and their measured choice."""
