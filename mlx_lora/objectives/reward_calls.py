"""Call a user's reward as TRL does: `async def` functions too, with the trainer's state where the function takes it."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

STATE = "trainer_state"


@dataclass
class TrainerState:
    """Where a run is, under the names of transformers' TrainerState.

    Attributes:
        global_step: Optimizer steps that are done.
        max_steps: Of the run; 0 for a measurement.
        epoch: Passes over the data that are done.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0


def call_reward(function: Callable[..., Any], arguments: dict[str, Any], state: TrainerState) -> list[Any]:
    """Return a reward's values.

    Args:
        function: Plain or `async def`.
        arguments: By name.
        state: Passed as `trainer_state` if the function has such a parameter, or takes any.
    """
    if STATE not in arguments and _takes_state(function):
        arguments = {**arguments, STATE: state}
    values = function(**arguments)
    return list(_awaited(values) if inspect.isawaitable(values) else values)


def _takes_state(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some callables written in C
        return False
    return STATE in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _awaited(values: Any) -> Any:
    """Wait for an `async def` reward; a notebook has an event loop of its own, which cannot run another's."""

    async def wait() -> Any:
        return await values

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, wait()).result()


class SilentRewards:
    """Counts the batches to which a reward gave nothing, and says so at the first, the 10th, the 100th ..."""

    def __init__(self) -> None:
        """Begin to count."""
        self.batches: Counter[str] = Counter()

    def watch(self, names: Sequence[str], found: np.ndarray, say: Callable[[str], None]) -> None:
        """Count a batch.

        Args:
            names: Of the rewards, (F,).
            found: (A, F), NaN where a reward gave none.
            say: Takes a note.
        """
        gave_none: Any = np.isnan(found).all(axis=0)
        for name, silent in zip(names, gave_none, strict=True):
            if not silent or not len(found):
                continue
            self.batches[name] += 1
            count = self.batches[name]
            if str(count).strip("0") == "1":
                times = "a batch" if count == 1 else f"{count:,} batches so far"
                say(f"Note: --reward {name} gave None to every answer of {times}; it changes nothing there")
