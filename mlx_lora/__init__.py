"""LoRA and QLoRA training on MLX, for Apple silicon."""

from mlx_lora.system.blas import load_fast_blas

__version__ = "0.1.0"

# Before anything imports mlx.core: see blas.py.
BLAS = load_fast_blas()
