"""Loads and converts models: the only door to mlx-lm's architectures, with heads and quantized weights."""
