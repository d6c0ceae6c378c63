"""Describe this machine with the planner's types."""

from __future__ import annotations

from mlx_lora.planner.shapes import Machine
from mlx_lora.system.device import compiles_from_steps, compute_dtype, current_device


def this_machine(dtype: str = "auto") -> Machine:
    """Return the planner's description of this device.

    Args:
        dtype: --dtype of the run.
    """
    here = current_device()
    return Machine(
        here.name,
        here.backend,
        here.memory_bytes,
        here.working_set_bytes,
        compute_dtype(dtype).size,
        compiles_from=compiles_from_steps(),
    )


def loss_tile_bytes() -> int:
    """Return the bytes that one tile of the fused loss's logits may take."""
    return this_machine().tile_bytes


def dense_experts_bytes() -> int:
    """Return the bytes that one layer's experts may take as floats during their product."""
    return this_machine().dense_experts_bytes
