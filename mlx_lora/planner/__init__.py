"""The planner: will a run fit, and how fast is it? Arithmetic, no MLX arrays."""
