"""`mlx-lora doctor --full`, called the kit: what it checks on one machine, its result file and its page."""
