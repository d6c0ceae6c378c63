"""What `mlx_lora` offers to Python, and the commands to a terminal: load, train, generate, evaluate, plan, export."""
