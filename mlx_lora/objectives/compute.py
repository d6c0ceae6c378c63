"""Choose what computes a run's numbers: the loss of tokens, and the kernels of the model's layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.kernels.table import AUTO, OURS, KernelChoice, choose_model_kernels
from mlx_lora.losses.check import check_kernels, choose_loss
from mlx_lora.losses.cross_entropy import Loss
from mlx_lora.models.load import Base
from mlx_lora.parallel.strategy import Strategy
from mlx_lora.planner.shapes import KernelTerms
from mlx_lora.utils import device


@dataclass(frozen=True)
class Compute:
    """What computes a run's numbers.

    Attributes:
        loss: of the supervised positions.
        kernels: of the model's layers; None: its own.
        terms: their memory, for the planner.
        words: on the kernels, for the run header.
    """

    loss: Loss
    kernels: KernelChoice | None
    terms: KernelTerms
    words: str


def choose_compute(
    settings: TrainSettings, base: Base, rows: EncodedSet, strategy: Strategy, joined_too: EncodedSet | None = None
) -> Compute:
    """Choose loss and kernels: the best that were measured here, and that agree with the model's own on this model.

    Args:
        settings: of the run.
        base: adapted.
        rows: training data, whose lengths the kernels are chosen for.
        strategy: how ranks divide the run.
        joined_too: the same rows joined, if some batches will be.
    """
    asked = settings.loop.kernels
    loss = choose_loss(base.model, base.config, asked, measure=True, strategy=strategy)
    dtype = device.compute_dtype(settings.model.dtype)
    if asked == AUTO and strategy.lockstep:
        asked = OURS  # what one rank measures, another might not
    rows_of = {one.starts is not None: one for one in (rows, joined_too) if one is not None}
    lengths = {shared: sorted({max(1, int(n) - 1) for n in one.lengths}) for shared, one in rows_of.items()}
    choice = choose_model_kernels(base.model, lengths.get(False, []), asked, dtype, lengths.get(True, []))
    kernels, words = check_kernels(base.model, base.config, loss, choice, strategy)
    terms = replace((kernels or choice.of_mlx()).terms(), loss=loss.kernel)
    return Compute(loss, kernels, terms, words)
