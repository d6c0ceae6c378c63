"""Tell whether the ranks of a run must call the model together, because each has only a part of it."""

from __future__ import annotations

import mlx.nn as nn

from mlx_lora.training.base_shards import is_shared
from mlx_lora.training.tensor_parallel import is_cut


def called_together(model: nn.Module) -> bool:
    """Return whether every rank must call the model equally often: its weights or its layers are in parts."""
    return is_shared(model) or is_cut(model)
