"""The owner's kit: what `mlx-lora doctor --full` checks on one machine, its result file and its page."""
