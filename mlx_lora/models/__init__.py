"""Loads and converts models: the only door to mlx-lm's architectures, with heads, quantized weights and generation."""
