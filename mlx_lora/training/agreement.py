"""What several ranks agree on: that they are one run, the same parameters everywhere, and after which step they stop."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import __version__
from mlx_lora.settings.config import ROWS, TrainSettings
from mlx_lora.system import device
from mlx_lora.system.distributed import Ranks, check_same
from mlx_lora.training.state import restore_arrays, run_arrays
from mlx_lora.training.step import Step, StepResult


def check_one_run(ranks: Ranks, settings: TrainSettings, identity: dict[str, Any]) -> None:
    """Refuse ranks with another model, other data, other settings or another version than rank 0.

    Args:
        ranks: all of them.
        settings: of this rank.
        identity: of its run, fingerprints included.

    Raises:
        InputError: on every rank, with what differs.
    """
    own = {name: value for name, value in settings.to_flat().items() if not ROWS[name].per_machine}
    facts = {name: value for name, value in identity.items() if name not in ROWS}
    versions = {"mlx": mx.__version__, "mlx_lm": version("mlx-lm"), "mlx_lora": __version__}
    check_same(ranks, {**versions, "compute dtype": str(device.compute_dtype(settings.model.dtype)), **facts, **own})


def take_first_ranks(
    ranks: Ranks | None, step: Step, model: nn.Module, say: Callable[[str], None] = lambda line: None
) -> None:
    """Give every rank the arrays of rank 0's run, unless all have the same already.

    They start equal and stay so, since all apply the same sums: where a backend adds in another order on each rank,
    or initial factors were computed by different processors, rounding may part them.

    Args:
        ranks, step, model: of this run; None for a single process, which agrees with itself.
        say: takes a line when there was something to do.
    """
    if ranks is None:
        return
    arrays = run_arrays(step, model)
    del arrays["random"]  # each rank's own
    if ranks.same_bits(arrays):
        return
    say("The ranks' parameters were not the same to the last bit; all go on with rank 0's")
    first = ranks.arrays_from_first(run_arrays(step, model))
    if not ranks.leads:
        restore_arrays(step, model, first)


class Agreement:
    """Whether the run stops: at once for a single process, for several when all have heard that one was asked to.

    Ranks hear of it with the sums of a step, so they all stop after the same one, and nobody waits for an answer.
    """

    def __init__(self, asked: Callable[[], bool], ranks: Ranks | None):
        """Set up.

        Args:
            asked: whether this process was asked to stop.
            ranks: who must agree; None for a single process.
        """
        self._asked, self._ranks, self._agreed = asked, ranks, False

    def __call__(self) -> bool:
        return self._asked() if self._ranks is None else self._agreed

    def hear(self, result: StepResult | None) -> None:
        """Take note of what the ranks said with a step."""
        if result is not None and result.asked is not None:
            self._agreed = self._agreed or result.asked.item() > 0

    def ask_all(self) -> None:
        """Ask every rank now, outside of a step."""
        if self._ranks is not None:
            self._agreed = self._ranks.any(self._agreed or self._asked())
