"""What several ranks agree on: that they are one run, the same parameters everywhere, and after which step they stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from mlx_lora import __version__
from mlx_lora.settings.config import ROWS, TrainSettings
from mlx_lora.system import device
from mlx_lora.system.distributed import Ranks
from mlx_lora.system.errors import InputError
from mlx_lora.training.state import restore_arrays, run_arrays
from mlx_lora.training.step import Step, StepResult


def check_one_run(ranks: Ranks, settings: TrainSettings, identity: dict[str, Any]) -> None:
    """Refuse ranks with another model, other data, other settings or another version than rank 0.

    Args:
        ranks: all of them.
        settings: of this rank.
        identity: of its run, fingerprints included.

    Raises:
        InputError: on every rank, with everything that differs between rank 0 and the first rank unlike it.
    """
    versions = {"mlx": mx.__version__, "mlx_lm": version("mlx-lm"), "mlx_lora": __version__}
    facts = {**versions, "compute dtype": str(device.compute_dtype(settings.model.dtype))}
    facts |= {name: value for name, value in identity.items() if name not in ROWS}
    facts |= {name: value for name, value in settings.to_flat().items() if not ROWS[name].per_machine}
    first, *others = ranks.everyone(facts)
    for rank, other in enumerate(others, start=1):
        differ = [f"{name} is {first.get(name)!r} on rank 0, {other.get(name)!r} there" for name in {**first, **other}
                  if first.get(name) != other.get(name)]  # fmt: skip
        if differ:
            raise InputError(
                f"rank {rank} is not in the same run: {'; '.join(differ)}; give every machine the same model, data, "
                "settings and versions"
            )


def take_first_ranks(ranks: Ranks, step: Step, say: Callable[[str], None] = lambda line: None) -> None:
    """Give every rank the arrays of rank 0's run, unless all have the same already.

    They start equal and stay so, since all apply the same sums: where a backend adds in another order on each rank,
    or initial factors were computed by different processors, rounding may part them.

    Args:
        ranks, step: of this run.
        say: takes a line when there was something to do.
    """
    arrays = run_arrays(step)
    if ranks.same_bits({name: value for name, value in arrays.items() if name != "random"}):  # each rank's own
        return
    say("The ranks' parameters were not the same to the last bit; all go on with rank 0's")
    first = ranks.arrays_from_first(arrays)
    if not ranks.leads:
        restore_arrays(step, first)


@dataclass
class Agreement:
    """Whether the run stops: at once for a single process, for several when all have heard that one was asked to.

    Ranks hear of it with the sums of a step, so they all stop after the same one, and nobody waits for an answer.

    Attributes:
        asked: whether this process was asked to stop.
        ranks: who must agree.
        heard: whether a rank was asked that all have heard of.
    """

    asked: Callable[[], bool]
    ranks: Ranks
    heard: bool = False

    def __call__(self) -> bool:
        return self.heard or (self.ranks.size == 1 and self.asked())

    def hear(self, result: StepResult | None) -> None:
        """Take note of what the ranks said with a step."""
        if result is not None and result.asked is not None:
            self.heard = self.heard or result.asked.item() > 0

    def ask_all(self) -> None:
        """Ask every rank now, outside of a step."""
        self.heard = self.ranks.any(self.heard or self.asked())
