"""The checks of `mlx-lora doctor --full`: what one machine computes and how fast, with a result file and a page."""
