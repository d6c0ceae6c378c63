"""What every side's child process shares: its job, the encoded rows, the log of its steps, its main function. numpy only.

A side that trains is `prepare` (load), `steps` (its own loop, which ends when the log has had enough) and `figures` (what it
took and computed in); on rows also `check` (the loss of the check rows).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# Without a second step there is nothing to count: the first compiles.
MIN_STEPS = 2
NEVER = 10**9
# What unsloth-zoo and TRL log of a step on pairs.
REPORTS = {"chosen_logps": "logps/chosen", "rejected_logps": "logps/rejected", "accuracy": "rewards/accuracies"}


class Rows:
    """Encoded rows as `prepare.py` wrote them: token ids and, by our encoder, which of them are trained."""

    def __init__(self, path: Path):
        with np.load(path) as arrays:
            self._tokens, self._mask, self._offsets = arrays["tokens"], arrays["mask"], arrays["offsets"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def tokens(self, row: int) -> np.ndarray:
        """(n,) token ids."""
        return self._tokens[self._offsets[row] : self._offsets[row + 1]]

    def mask(self, row: int) -> np.ndarray:
        """(n,) bool, True: this token is a trained target."""
        return self._mask[self._offsets[row] : self._offsets[row + 1]]

    def lengths(self) -> np.ndarray:
        """(R,) tokens of each row."""
        return np.diff(self._offsets)

    def spans(self, row: int) -> list[tuple[int, int]]:
        """Runs [start, stop) of trained tokens."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], self.mask(row), [False]])))
        return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]

    def pairs(self) -> int:
        """Return the number of preference pairs: rows 2n and 2n + 1 answer one prompt."""
        return len(self) // 2

    def parts(self, pair: int) -> tuple[list[int], list[int], list[int]]:
        """Return the token ids of prompt, chosen and rejected answer; what follows an answer is left out."""
        found = []
        for row in (2 * pair, 2 * pair + 1):
            trained = np.flatnonzero(self.mask(row))
            found.append((self.tokens(row)[: trained[0]], self.tokens(row)[trained[0] : trained[-1] + 1]))
        (prompt, chosen), (_, rejected) = found
        return prompt.tolist(), chosen.tolist(), rejected.tolist()

    def number_of(self) -> dict[tuple[tuple[int, ...], tuple[int, ...]], int]:
        """Return the pair's number by the token ids of both whole rows."""
        each = ((pair, self.parts(pair)) for pair in range(self.pairs()))
        return {(tuple(prompt + chosen), tuple(prompt + rejected)): pair for pair, (prompt, chosen, rejected) in each}


class StepLog:
    """Records each step's end and what it held; knows when the run has had enough: after steps, seconds, or passes."""

    def __init__(self, rows: Rows, job: dict[str, Any]):
        self._rows, self._limit, self._seconds = rows, job["steps"], job["seconds"]
        self._most_pairs = None if job["passes"] is None else job["passes"] * rows.pairs()
        self._steps: list[dict[str, Any]] = []
        self._drawn: list[int] = []
        self._started_s = time.perf_counter()
        self._first_step_unix_s = 0.0

    def begin(self) -> None:
        """Start the clock: the training loop begins, with the making of its first batch."""
        self._started_s = time.perf_counter()

    def end_step(self, rows: Sequence[int], shape: Sequence[int], loss: float) -> bool:
        """Record a step that has ended; True: stop now.

        Args:
            rows: numbers of the rows it trained on.
            shape: (rows, width) of its inputs.
            loss: its mean loss, as the side computes it.
        """
        end_s = time.perf_counter() - self._started_s
        if not self._steps:
            self._first_step_unix_s = time.time()
        counts = {
            "supervised": int(sum(self._rows.mask(row)[1:].sum() for row in rows)),
            "real": int(sum(len(self._rows.tokens(row)) - 1 for row in rows)),
        }
        shape = [int(size) for size in shape]
        clocks = {"end_s": round(end_s, 4), "cpu_s": time.process_time()}
        self._steps.append({**clocks, "loss": loss, **counts, "positions": int(np.prod(shape)), "shape": shape})
        if self._limit is not None:
            return len(self._steps) >= self._limit
        if self._seconds is None:
            return False
        return len(self._steps) >= MIN_STEPS and end_s - self._steps[0]["end_s"] >= self._seconds

    def end_pairs(self, pairs: Sequence[int], width: int, loss: float, reports: dict[str, float]) -> bool:
        """Record a step on preference pairs; True: stop now.

        Args:
            pairs: numbers of the pairs it trained on.
            width: of its inputs, of which each pair has two rows.
            loss: its mean loss, as the side computes it.
            reports: the means that the side itself reports: `chosen_logps`, `rejected_logps`, `accuracy`.
        """
        rows = [row for pair in pairs for row in (2 * pair, 2 * pair + 1)]
        enough = self.end_step(rows, (len(rows), width), loss)
        self._steps[-1] |= {"pairs": len(pairs), "reports": reports}
        self._drawn += pairs
        if self._most_pairs is None:
            return enough
        return len(self._steps) >= MIN_STEPS and len(self._drawn) >= self._most_pairs

    def result(self) -> dict[str, Any]:
        """The steps, the wall clock at the end of the first, and how many pairs were drawn and how many differ."""
        drawn = {"drawn": len(self._drawn), "different": len(set(self._drawn))} if self._drawn else {}
        return {"steps": self._steps, "first_step_unix_s": self._first_step_unix_s, **drawn}


class StepTimes:
    """Wall clock and processor seconds of each step, from the end of the one before, with what else is noted of it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.begin()

    def begin(self) -> None:
        """Start the clocks; what came before is no step."""
        self._before = time.perf_counter(), time.process_time()

    def end(self, **noted: float) -> None:
        """Note the end of a step."""
        now = time.perf_counter(), time.process_time()
        self.steps.append({"wall_s": now[0] - self._before[0], "cpu_s": now[1] - self._before[1], **noted})
        self._before = now


class Enough(Exception):
    """Leaves another trainer's loop when the run has had enough."""


class Stopwatch:
    """A function that also adds up the time that it takes."""

    def __init__(self, function: Callable[..., Any]):
        self._function, self._spent_s = function, 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        found = self._function(*arguments, **named)
        self._spent_s += time.perf_counter() - begun
        return found

    def read(self) -> float:
        """Return the seconds since the last look."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s


class Side(Protocol):
    """A trainer of versus.py."""

    def prepare(self, job: dict[str, Any], rows: Rows) -> None:
        """Load the model with the job's factors."""
        ...

    def check(self) -> dict[str, Any]:
        """On rows: return `loss_sum` and `count` of the check rows, `same_ids`, `notes` and `facts`."""
        ...

    def steps(self, log: StepLog) -> None:
        """Begin the log, and train until it has had enough."""
        ...

    def figures(self) -> dict[str, Any]:
        """Return `peak_allocator_bytes` and `facts`; on pairs also `reference_s` and `notes`."""
        ...


def run(side: Side) -> None:
    """Do the job of a side that trains."""
    job = read_job()
    rows = Rows(Path(job["rows"]))
    side.prepare(job, rows)
    if job["mode"] == "check":
        write_result(job, side.check())
        return
    log = StepLog(rows, job)
    side.steps(log)
    write_result(job, {**log.result(), **side.figures()})


def read_job() -> dict[str, Any]:
    """Read the JSON job file named on the command line."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def write_result(job: dict[str, Any], result: dict[str, Any]) -> None:
    """Write the child's result where the job wants it."""
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
