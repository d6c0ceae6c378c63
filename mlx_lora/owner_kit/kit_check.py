"""The types of the owner's kit: a check, what it is given, and what it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mlx_lora.system.device import Device

Status = Literal["ok", "warning", "failed", "skipped"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "failed", "skipped")
# Group -> what it asks, in the order in which the groups run.
GROUPS = {
    "machine": "Is this machine ready: versions, memory, arithmetic, disk, power?",
    "kernels": "Does every kernel and its gradient give the numbers of a float32 reference on the CPU?",
    "formats": "Do the quantized formats give the numbers of their dequantized weights, forward and backward?",
    "adapters": "Does every adapter layer give the numbers of the CPU, forward and in every gradient?",
    "losses": "Does every loss give the numbers of the CPU, forward and backward?",
    "objectives": "Does a training step of each objective run, and give the numbers of the CPU?",
    "resume": "Does a run that was stopped and resumed end with the same bytes?",
    "decode": "Does a batch write what each of its rows writes alone, with and without an adapter?",
    "memory": "Does a run need the memory that the plan says?",
    "speed": "How fast is training, beside mlx_lm.lora and torch on the same rows, and after some minutes?",
}
LARGEST = 1e30  # what an infinite error is written as, because JSON has no infinity


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    Attributes:
        name: what was looked at, unique within its check.
        status: `failed` for what is wrong, `warning` for what an owner should know, `skipped` for what cannot run here.
        words: what was found; for `skipped`, why.
        found: the number that was measured; None if the words say all.
        wanted: its bound, or the number that was expected; None without one.
        unit: of both.
        advice: what to do; empty if nothing.
        values: further numbers by name, which the page draws.
    """

    name: str
    status: Status
    words: str
    found: float | None = None
    wanted: float | None = None
    unit: str = ""
    advice: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Kit:
    """What a check is given.

    Attributes:
        here: the device.
        quick: take the small share of about a minute.
        work: a folder for models, data and runs, which is removed at the end.
        minutes: length of the steady load.
        say: takes a line of progress.
    """

    here: Device
    quick: bool
    work: Path
    minutes: float
    say: Callable[[str], None]

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU, so that the CPU can judge it."""
        return self.here.backend != "cpu"


@dataclass(frozen=True)
class KitCheck:
    """One check.

    Attributes:
        group: a key of GROUPS.
        name: unique within the kit.
        run: yields what it finds; if it raises, that is a finding too.
        quick: whether `--quick` includes it.
        needs: returns why it cannot run here, or an empty text.
    """

    group: str
    name: str
    run: Callable[[Kit], Iterable[Finding]]
    quick: bool = True
    needs: Callable[[Kit], str] = lambda kit: ""


def bounded(
    name: str, error: float, bound: float, what: str, advice: str = "", unit: str = "relative error"
) -> Finding:
    """Return a finding that is ok if an error is within its bound; one that is not finite never is.

    Args:
        name: of the finding.
        error, bound: the error and the largest allowed one.
        what: what was compared with what.
        advice: if it is not.
        unit: of both.
    """
    good = math.isfinite(error) and error <= bound
    found = error if math.isfinite(error) else LARGEST
    return Finding(name, "ok" if good else "failed", what, found, bound, unit, "" if good else advice)
