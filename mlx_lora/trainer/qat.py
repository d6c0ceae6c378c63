"""Begin quantization-aware training (adapters/qat.py) at its step of a run: from the start, or for the last share of the steps.

The run is planned and checked as it is in these steps, which take the most memory. A compiled step is traced again when they
begin, because the layers' arrays differ then.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.nn as nn

from mlx_lora.adapters.qat import begin_qat, end_qat
from mlx_lora.config.settings import AdapterSettings


def first_qat_step(settings: AdapterSettings, steps: int) -> int | None:
    """Return how many of a run's steps are without it, from 0; None: all are."""
    return steps - math.ceil(settings.qat * steps) if settings.qat else None


def qat_from(
    settings: AdapterSettings, model: nn.Module, steps: int, taken: int, on_step: Callable[[int], None]
) -> Callable[[int], None]:
    """Set an adapted model to what its next step needs, and return what is to be called after each step.

    Args:
        settings: of the adapter.
        model: that is trained.
        steps: of the whole run.
        taken: steps that are done.
        on_step: is called with the number of steps done, after the change.
    """
    first = first_qat_step(settings, steps)
    if first is None or taken >= first:
        return on_step
    end_qat(model)

    def after(step: int) -> None:
        if step == first:
            begin_qat(model)
        on_step(step)

    return after
