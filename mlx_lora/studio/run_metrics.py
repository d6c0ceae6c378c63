"""The numbers of a run as they grow: the curves, the last values, the time, and the lines that are new.

metrics.jsonl has a line for each report and each validation. A resumed run cuts it to the step that it continues from, and
appends; each process of a run counts its time from zero.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

MOST_POINTS = 2000  # of a curve
TAIL_BYTES = 64 << 10
MOST_AT_ONCE = 1 << 20  # bytes of new lines that are read at a time
NOT_CURVES = ("shapes",)
STEP, ELAPSED = re.compile(rb'"step":\s*(\d+)'), re.compile(rb'"elapsed_s":\s*([\d.eE+-]+)')
MARK_BYTES = 200  # of the last line, by which it is seen whether a file was replaced


def read_columns(path: Path, most: int = MOST_POINTS) -> dict[str, list[Any]]:
    """Return metrics.jsonl by columns of equal length, thinned evenly to `most` rows; validations are kept."""
    rows: list[dict[str, Any]] = []
    kept_of, count = 1, 0
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if (record := parsed(line)) is None:
                continue
            held_out = record.get("loss") is None
            if held_out or count % kept_of == 0:
                rows.append(record)
            count += not held_out
            if len(rows) > 2 * most:  # memory stays the same however long the file is
                rows, kept_of = thinned(rows, most), kept_of * 2
    rows = thinned(rows, most) if len(rows) > most else rows
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_CURVES)
    return {name: [row.get(name) for row in rows] for name in names}


def thinned(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Return at most `most` rows: the validations first, and others at even distances, the first and last among them."""

    def even(places: list[int], most: int) -> list[int]:
        last = (len(places) - 1) / max(1, most - 1)
        return places if len(places) <= most else [places[int(i * last)] for i in range(most)]

    held = even([i for i, row in enumerate(rows) if row.get("val_loss") is not None], most // 2)
    others = even([i for i, row in enumerate(rows) if row.get("val_loss") is None], most - len(held))
    return [rows[i] for i in sorted({*held, *others})]


def parsed(line: str) -> dict[str, Any] | None:
    """Return a line's record; None if it is incomplete, or none of ours."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def last_values(path: Path) -> dict[str, Any]:
    """Return the last step, losses, speed and the largest peak in the end of metrics.jsonl.

    The validation before the first step is of the base, and no result of the run: it is left out.
    """
    found: dict[str, Any] = {}
    for line in tail_lines(path, TAIL_BYTES):
        record = parsed(line)
        if record is None:
            continue
        found["step"] = record["step"]
        if record.get("val_loss") is not None and record["step"] > 0:
            found["val_loss"], found["val_step"] = record["val_loss"], record["step"]
        for name in ("loss", "tokens_per_s", "epoch", "reward", "accuracy"):
            if record.get(name) is not None and (record.get("loss") is not None or name != "tokens_per_s"):
                found[name] = record[name]
        peak = record.get("peak_memory_bytes")
        found["peak_bytes"] = max(found.get("peak_bytes") or 0, peak if isinstance(peak, int) else 0) or None
    return found


def tail_lines(path: Path, size: int, most: int | None = None, end: int | None = None) -> list[str]:
    """Return the last whole lines of a text file, from at most `size` bytes before position `end`; none without a file."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2) if end is None else end
            start = max(0, end - size)
            file.seek(start)
            text = file.read(end - start).decode("utf-8", "replace")
    except OSError:
        return []
    lines = text.splitlines()
    lines = lines[1:] if start and len(lines) > 1 else lines
    return lines[-most:] if most else lines


class RunClock:
    """The time of a run over all its processes; reads each line once."""

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._at, self._end = 0, b""  # what was read, and its last bytes
        self._earlier_s = 0.0  # of the processes before the last one
        self._step_s: float | None = None
        # Step and time of the last process's first line, and of its last one.
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def read(self) -> tuple[float | None, float | None]:
        """Return the seconds of the whole run so far, and those of a step in its last process; None: not known."""
        with self._lock, contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(max(0, self._at - len(self._end)))
            if file.read(len(self._end)) != self._end:  # it was cut or replaced
                self._begin()
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # it is being written
                self._at, self._end = self._at + len(line), line[-MARK_BYTES:]
                if not (found := STEP.search(line)) or not (elapsed := ELAPSED.search(line)):
                    continue
                step, elapsed_s = int(found[1]), float(elapsed[1])
                if self._last is not None and elapsed_s < self._last[1]:
                    self._earlier_s += self._last[1]
                    self._first = None
                self._first, self._last = self._first or (step, elapsed_s), (step, elapsed_s)
                # Where a process began is not told, so steps are counted from its first line; until it has a second one, those
                # of the process before tell more.
                if steps := step - self._first[0]:
                    self._step_s = (elapsed_s - self._first[1]) / steps
                elif self._step_s is None and step:
                    self._step_s = elapsed_s / step
        return (None if self._last is None else self._earlier_s + self._last[1]), self._step_s


class Tail:
    """Gives the lines that are added to a file; holds a position and nothing else."""

    def __init__(self, path: Path):
        self._path, self._at, self._inode = path, 0, None
        with contextlib.suppress(OSError), path.open("rb") as file:
            stat = os.fstat(file.fileno())
            start = max(0, stat.st_size - TAIL_BYTES)
            file.seek(start)
            whole = file.read(stat.st_size - start).rfind(b"\n") + 1  # a line that is being written comes later
            self._at, self._inode = start + whole if whole else stat.st_size, stat.st_ino

    def earlier_lines(self, size: int) -> list[str]:
        """Return the last lines before this position, of at most `size` bytes; `new_lines` gives none of them again."""
        return tail_lines(self._path, size, end=self._at)

    def new_lines(self) -> list[str]:
        """Return the complete lines since the last call; a file that was replaced or cut is read from its start."""
        try:
            stat = self._path.stat()
            if stat.st_size < self._at or (self._inode is not None and stat.st_ino != self._inode):
                self._at = 0
            self._inode = stat.st_ino
            if stat.st_size == self._at:
                return []
            with self._path.open("rb") as file:
                file.seek(self._at)
                data = file.read(MOST_AT_ONCE)
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        if not end and len(data) == MOST_AT_ONCE:
            end = len(data)  # one line longer than that is cut
        self._at += end
        return data[:end].decode("utf-8", "replace").splitlines()
