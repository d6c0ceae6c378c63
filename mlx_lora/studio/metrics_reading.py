"""Read metrics.jsonl for the page: thinned columns, the last values, and new lines as a run writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_POINTS = 2000  # of a curve
TAIL_BYTES = 64 << 10
MOST_AT_ONCE = 1 << 20  # bytes of new lines that are read at a time
NOT_CURVES = ("shapes",)


def read_columns(path: Path, most: int = MOST_POINTS) -> dict[str, list[Any]]:
    """Return metrics.jsonl by columns of equal length, thinned evenly; validations are kept.

    Args:
        path: of the file; without one, all is empty.
        most: rows at most.
    """
    rows: list[dict[str, Any]] = []
    kept_of, count = 1, 0
    for record in records(path):
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
    held = [i for i, row in enumerate(rows) if row.get("val_loss") is not None]
    held = held if len(held) <= most // 2 else [held[int(i)] for i in _even(len(held), most // 2)]
    others = [i for i in range(len(rows)) if rows[i].get("val_loss") is None]
    room = most - len(held)
    chosen = others if len(others) <= room else [others[int(i)] for i in _even(len(others), room)]
    return [rows[i] for i in sorted({*held, *chosen})]


def _even(count: int, most: int) -> Iterator[float]:
    """Yield `most` positions from the first to the last of `count`."""
    return (i * (count - 1) / max(1, most - 1) for i in range(most))


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of metrics.jsonl one at a time, without incomplete lines."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if (record := parsed(line)) is not None:
                    yield record
    except OSError:
        return


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
        for name in ("loss", "tokens_per_s", "elapsed_s", "epoch", "reward", "accuracy"):
            if record.get(name) is not None and (record.get("loss") is not None or name != "tokens_per_s"):
                found[name] = record[name]
        peak = record.get("peak_memory_bytes")
        found["peak_bytes"] = max(found.get("peak_bytes") or 0, peak if isinstance(peak, int) else 0) or None
    return found


def tail_lines(path: Path, size: int, most: int | None = None, end: int | None = None) -> list[str]:
    """Return the last whole lines of a text file; empty if there is no such file.

    Args:
        path: of the file.
        size: bytes that are read at most.
        most: lines at most.
        end: position in bytes up to which the file is read; None: all of it.
    """
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


class Tail:
    """Gives the lines that are added to a file; holds a position and nothing else."""

    def __init__(self, path: Path, from_end: bool = True):
        self._path, self._at, self._inode = path, 0, None
        if from_end:
            try:
                with path.open("rb") as file:
                    stat = os.fstat(file.fileno())
                    start = max(0, stat.st_size - TAIL_BYTES)
                    file.seek(start)
                    whole = file.read(stat.st_size - start).rfind(b"\n") + 1  # a line that is being written comes later
                self._at, self._inode = start + whole if whole else stat.st_size, stat.st_ino
            except OSError:
                pass

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
