"""One tiny random model per architecture module of mlx-lm, and the sweep that tries each of them in every stage."""
