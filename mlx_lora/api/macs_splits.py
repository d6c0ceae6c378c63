"""Predict what the other ways to divide a run on several Macs would do, beside a shared base."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mlx_lora.models.kernel_choice import KernelChoice
from mlx_lora.models.outline import outline_for
from mlx_lora.planner.macs_plan import Link, Mac, MacsPlan
from mlx_lora.planner.shapes import ModelShape, Run
from mlx_lora.planner.tensor_plan import (
    TENSOR,
    Split,
    best,
    cut_problem,
    split_by_rows,
    split_by_tensor,
    split_with_shared_base,
)
from mlx_lora.settings.checks import whole_base_reasons
from mlx_lora.settings.config import TrainSettings
from mlx_lora.system import device
from mlx_lora.training.run_fit import outlined_shape


def predicted_splits(
    settings: TrainSettings, shape: ModelShape, batch: Run, macs: Sequence[Mac], link: Link, shared: MacsPlan
) -> list[dict[str, Any]]:
    """Return each way to divide a run and what is predicted of it, as JSON values; one of them is `best`.

    Args:
        settings: of the run.
        shape: of the whole adapted model.
        batch: of all Macs.
        macs, link: what it runs on.
        shared: the plan with a shared base.
    """
    splits = [
        split_with_shared_base(shared, batch.positions),
        split_by_rows(shape, batch, macs, link),
        _by_tensor(settings, batch, macs, link),
    ]
    chosen = best(splits)
    return [
        {
            "name": split.words,
            "fits": not split.problem and split.fits,
            "tokens_per_s": split.tokens_per_s,
            "needed_bytes": split.most_needed_bytes,
            "verdict": split.verdict,
            "best": split is chosen,
        }
        for split in splits
    ]


def _by_tensor(settings: TrainSettings, batch: Run, macs: Sequence[Mac], link: Link) -> Split:
    part = _part_of_layers(settings, len(macs))
    if isinstance(part, str):
        return Split(TENSOR, problem=part)
    return split_by_tensor(part, batch, macs, link, macs[0].machine.number_bytes)


@lru_cache(maxsize=8)
def _part_of_layers(settings: TrainSettings, count: int) -> ModelShape | str:
    """Return the shape of one Mac's part of each layer, or why there is none."""
    dtype = settings.model.dtype if settings.model.dtype != "auto" else "bfloat16"
    outline = outline_for(settings.model, device.compute_dtype(dtype))
    architecture = type(outline.model).__module__.rpartition(".")[2]
    reasons = [f"{setting}: {reason}" for setting, reason in whole_base_reasons(settings.to_flat())]
    problem = cut_problem(architecture, outline.config, count) or next(iter(reasons), "")
    return problem or outlined_shape(outline, settings, KernelChoice(settings.loop.kernels), cut_by=count)


def splits_line(splits: Sequence[dict[str, Any]]) -> str:
    """Return the ways to divide a run in a line of text, the best one last."""
    told = "; ".join(f"{split['name']} {split['verdict']}" for split in splits)
    chosen = next(split["name"] for split in splits if split["best"])
    return f"Ways to divide it (--parallel): {told}. Best: {chosen}"
