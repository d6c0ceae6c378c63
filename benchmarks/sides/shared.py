"""What every side's child shares: its job, the encoded rows, the log of its steps. numpy only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Without a second step there is nothing to count: the first compiles.
MIN_STEPS = 2


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


class PairRows(Rows):
    """Encoded preference pairs as `prepare_pairs.py` wrote them: rows 2n and 2n + 1 answer one prompt."""

    def pairs(self) -> int:
        """Return the number of pairs."""
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
        numbers = {}
        for pair in range(self.pairs()):
            prompt, chosen, rejected = self.parts(pair)
            numbers[tuple(prompt + chosen), tuple(prompt + rejected)] = pair
        return numbers


class StepLog:
    """Records each step's end and what it held; knows when the run has had enough."""

    def __init__(self, rows: Rows, steps: int | None, seconds: float | None):
        self._rows, self._limit, self._seconds = rows, steps, seconds
        self._steps: list[dict[str, Any]] = []
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
        self._steps.append(
            {
                "end_s": round(end_s, 4),
                "cpu_s": time.process_time(),
                "loss": loss,
                "supervised": int(sum(self._rows.mask(row)[1:].sum() for row in rows)),
                "real": int(sum(len(self._rows.tokens(row)) - 1 for row in rows)),
                "positions": int(np.prod(shape)),
                "shape": [int(size) for size in shape],
            }
        )
        if self._limit is not None:
            return len(self._steps) >= self._limit
        if self._seconds is None:
            return False
        return len(self._steps) >= MIN_STEPS and end_s - self._steps[0]["end_s"] >= self._seconds

    def result(self) -> dict[str, Any]:
        """The steps, and the wall clock at the end of the first."""
        return {"steps": self._steps, "first_step_unix_s": self._first_step_unix_s}


class PairLog(StepLog):
    """The log of a run on preference pairs, which may also end after some passes over them."""

    def __init__(self, rows: PairRows, job: dict[str, Any]):
        super().__init__(rows, job["steps"], job["seconds"])
        self._most_pairs = None if job["passes"] is None else job["passes"] * rows.pairs()
        self._drawn: list[int] = []

    def end_pairs(self, pairs: Sequence[int], width: int, loss: float, reports: dict[str, float]) -> bool:
        """Record a step that has ended; True: stop now.

        Args:
            pairs: numbers of the pairs it trained on.
            width: of its inputs, of which each pair has two rows.
            loss: its mean loss, as the side computes it.
            reports: the means that the side itself reports: `chosen_logps`, `rejected_logps`, `accuracy`.
        """
        shape = (2 * len(pairs), width)
        enough = self.end_step([row for pair in pairs for row in (2 * pair, 2 * pair + 1)], shape, loss)
        self._steps[-1] |= {"pairs": len(pairs), "reports": reports}
        self._drawn += pairs
        if self._most_pairs is None:
            return enough
        return len(self._steps) >= MIN_STEPS and len(self._drawn) >= self._most_pairs

    def result(self) -> dict[str, Any]:
        """The steps, the wall clock at the end of the first, and how many pairs were drawn and how many differ."""
        return {**super().result(), "drawn": len(self._drawn), "different": len(set(self._drawn))}


def read_job() -> dict[str, Any]:
    """Read the JSON job file named on the command line."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def write_result(job: dict[str, Any], result: dict[str, Any]) -> None:
    """Write the child's result where the job wants it."""
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
