"""Tell how the ranks of a run compute a step: whether they call the model together, and what each of them computes."""

from __future__ import annotations

import mlx.nn as nn

from mlx_lora.system.distributed import Ranks
from mlx_lora.training.base_shards import is_shared
from mlx_lora.training.sharing import SameRows, Sharing
from mlx_lora.training.tensor_parallel import in_branches, is_cut


def called_together(model: nn.Module) -> bool:
    """Return whether every rank must call the model equally often: its weights or its layers are in parts."""
    return is_shared(model) or is_cut(model)


def sharing_of(model: nn.Module, ranks: Ranks, seed: int) -> Sharing | SameRows | None:
    """Return how ranks divide each step: not at all, by rows, or by parts of the layers."""
    if ranks.size == 1:
        return None
    return SameRows(ranks, seed, in_branches(model)) if is_cut(model) else Sharing(ranks, seed, is_shared(model))
