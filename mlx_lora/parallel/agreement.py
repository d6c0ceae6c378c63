"""Make all ranks agree: that they belong to one run, that their parameters are equal, and after which step they stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from mlx_lora import __version__
from mlx_lora.config.settings import ROWS, TrainSettings
from mlx_lora.parallel.ranks import Ranks
from mlx_lora.trainer.checkpoint import restore_arrays, run_arrays
from mlx_lora.trainer.step import Step, StepResult
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

log = logging.getLogger(__name__)


def check_one_run(ranks: Ranks, settings: TrainSettings, identity: dict[str, Any]) -> None:
    """Refuse ranks whose model, data, settings or versions differ from rank 0's.

    Args:
        ranks: all ranks of the run.
        settings: this rank's settings.
        identity: everything that this rank's run depends on, with fingerprints.

    Raises:
        InputError: on every rank, with all differences between rank 0 and the first rank that differs.
    """
    versions = {"mlx": mx.__version__, "mlx_lm": version("mlx-lm"), "mlx_lora": __version__}
    facts = {**versions, "compute dtype": str(device.compute_dtype(settings.model.dtype))}
    facts |= {name: value for name, value in identity.items() if name not in ROWS}
    facts |= {name: value for name, value in settings.to_flat().items() if not ROWS[name].per_machine}
    first, *others = ranks.everyone(facts)
    for rank, other in enumerate(others, start=1):
        differ = [f"{name} is {first.get(name)!r} on rank 0, {other.get(name)!r} on rank {rank}" for name in {**first, **other}
                  if first.get(name) != other.get(name)]  # fmt: skip
        if differ:
            raise InputError(
                f"rank {rank} is not in the same run: {'; '.join(differ)}; give every machine the same model, data, "
                "settings and versions"
            )


def take_first_ranks(ranks: Ranks, step: Step) -> None:
    """Copy the arrays of rank 0's run to every rank, unless they are already equal.

    Ranks start equal and apply the same sums, so they stay equal, except for rounding: if a backend adds in a different
    order on each rank, or different processors computed the initial factors.

    Args:
        ranks, step: of this run.
    """
    arrays = run_arrays(step)
    if ranks.same_bits({name: value for name, value in arrays.items() if name != "random"}):  # each rank has its own
        return
    log.info("The ranks' parameters were not exactly equal; all ranks continue with those of rank 0")
    first = ranks.arrays_from_first(arrays)
    if not ranks.leads:
        restore_arrays(step, first)


@dataclass
class Agreement:
    """Tells whether the run stops: a single process at once, several processes when all know that one was asked to.

    The request is sent with a step's sums, so all ranks stop after the same step, and no rank waits for an answer.

    Attributes:
        asked: whether this process was asked to stop.
        ranks: the ranks that must agree.
        heard: whether all ranks know that one was asked to stop.
    """

    asked: Callable[[], bool]
    ranks: Ranks
    heard: bool = False

    def __call__(self) -> bool:
        return self.heard or (self.ranks.size == 1 and self.asked())

    def hear(self, result: StepResult | None) -> None:
        """Read from a step's result whether a rank was asked to stop."""
        if result is not None and result.asked is not None:
            self.heard = self.heard or result.asked.item() > 0

    def ask_all(self) -> None:
        """Exchange the requests to stop now, outside of a step."""
        self.heard = self.ranks.any(self.heard or self.asked())
