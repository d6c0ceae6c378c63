"""The only door to mlx-lm's architectures: loading, heads, quantised weights."""
