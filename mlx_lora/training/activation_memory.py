"""Which checkpointing a run gets: the choice, and the estimate of activations that `auto` makes it by.

Estimated from the widths of a block's linear layers alone: what a position leaves behind grows with them in
every architecture. Measured on SmolLM2-135M and Gemma 3 270M in docs/performance.md.

Source: arXiv 2205.05198, section 4 (activation memory of a transformer block).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.parts import LINEAR, SWITCH, base_dims
from mlx_lora.config_checks import checkpoint_every
from mlx_lora.training.checkpointing import Tape, checkpoint_blocks

# Numbers kept per position without checkpointing, as a multiple of the widths into and out of the linear
# layers: norms, rotations and activations keep copies of the same widths between them.
ALL_KEPT = 1.4
# Of the memory a run may use, what activations, gradients and the loss may be planned to take; the rest is
# the cache and what the estimate leaves out.
SHARE = 0.8


def activation_bytes(model: nn.Module, positions: int, dtype: mx.Dtype, mode: str) -> int:
    """Return the bytes that the blocks keep for the backward pass of one batch.

    Args:
        model: an mlx-lm model, adapters in place.
        positions: of the largest batch, padding included.
        dtype: of the activations.
        mode: `none`, `selective`, `block`, or n: every n-th block.
    """
    every = checkpoint_every(mode)
    # mlx-lm's mixtures all take this name from config.json; a model without it has no experts.
    active = model.args.num_experts_per_tok if hasattr(model.args, "num_experts_per_tok") else 1
    kept, most = 0.0, 0.0
    for index, block in enumerate(model.layers):
        everything, selective, ends = _kept_numbers(block, active)
        again = every is not None and index % every == 0
        # When a block runs again, those after it are done and gone.
        kept += (selective if mode == "selective" else ends) if again else everything
        most = max(most, kept + (everything if again else 0.0))
    return int(most * positions * dtype.size)


def _kept_numbers(block: nn.Module, active: int) -> tuple[float, float, float]:
    """Return the numbers that a block keeps per position: everything, selective, its ends alone.

    Args:
        block: a block of the model.
        active: experts that a position goes through, each with rows of its own.
    """
    dims = [base_dims(layer) for layer in block.modules() if isinstance(layer, LINEAR)]
    dims += [base_dims(layer) for layer in block.modules() if isinstance(layer, SWITCH)] * (active or 1)
    if not dims:
        return 0.0, 0.0, 0.0
    width = dims[0][0]
    return ALL_KEPT * sum(i + o for i, o in dims), sum(o for _, o in dims) + 2.0 * width, 2.0 * width


def apply_checkpointing(model: nn.Module, mode: str) -> Tape | None:
    """Checkpoint the model's blocks by `mode` (`none`, `selective`, `block` or n) and return their tape."""
    if mode == "none":
        return None
    return checkpoint_blocks(model.layers[:: checkpoint_every(mode)], products=mode == "selective")


def choose_checkpointing(setting: str, model: nn.Module, positions: int, dtype: mx.Dtype, free_bytes: int) -> str:
    """Return the setting, or for `auto` the fastest mode whose activations fit.

    Args:
        setting: --grad-checkpoint.
        model, positions, dtype: as in `activation_bytes`.
        free_bytes: what the run may use beside the model itself.
    """
    if setting != "auto":
        return setting
    fits = (m for m in ("none", "selective") if activation_bytes(model, positions, dtype, m) <= SHARE * free_bytes)
    return next(fits, "block")
