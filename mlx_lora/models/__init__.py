"""The only door to mlx-lm's architectures: loading, heads, quantized weights."""
