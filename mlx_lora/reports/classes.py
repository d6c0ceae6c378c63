"""Show what a classifier gets right: a table of its labels, and which label is taken for which.

classes.jsonl in a run folder has a line for each validation: `step`, `classes` (label -> precision, recall, f1, texts, predicted), and either
`confusion` (rows: the labels that texts have, columns: those that they get) or `thresholds` (label -> probability).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_lora.utils.text import counted

CLASSES_FILE = "classes.jsonl"
MOST_NAMED = 5  # labels in a sentence
MOST_IN_TABLE = 24  # labels of a confusion matrix that a page or a terminal has room for


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file such as metrics.jsonl, without an incomplete line after a kill; none without the file."""
    records = []
    # Not splitlines(), which also splits at characters that JSON strings may hold.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def begin_lines(file: Path, resumed_at: int | None) -> None:
    """Begin a run's file of lines with steps; of a resumed one keep the lines up to its step."""
    records = [] if resumed_at is None else [one for one in read_records(file) if type(one.get("step")) is int]
    file.unlink(missing_ok=True)
    add_lines(file, [one for one in records if one["step"] <= (resumed_at or 0)])


def add_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a run's file of lines."""
    lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
    if lines:
        with file.open("a", encoding="utf-8", errors="replace") as out:
            out.writelines(lines)


def add_classes(file: Path, step: int, details: Mapping[str, Any]) -> None:
    """Append what a validation found; nothing if it found no labels."""
    add_lines(file, [{"step": step, **details}] if "classes" in details else [])


def read_classes(file: Path, step: int | None) -> dict[str, Any] | None:
    """Return what the validation after a step found; None if it is not known."""
    of_step = [one for one in read_records(file) if one.get("step") == step and isinstance(one.get("classes"), dict)]
    return of_step[-1] if of_step else None


def class_rows(details: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row of cells for each label, those with the lowest F1 first; labels that no text has come last, without figures."""
    thresholds = details.get("thresholds") or {}
    rows = []
    for name, one in sorted(
        details["classes"].items(), key=lambda item: (not item[1]["texts"], item[1]["f1"], item[0])
    ):
        row = {"label": name, "texts": str(one["texts"]), "predicted": str(one["predicted"])}
        row |= {measure: f"{one[measure]:.3f}" if one["texts"] else "–" for measure in ("precision", "recall", "f1")}
        rows.append(row | ({"threshold": f"{thresholds[name]:.3f}"} if name in thresholds else {}))
    return rows


def measured_words(details: Mapping[str, Any] | None) -> str:
    """Return on how many texts a validation measured, and which labels none of them has, as a sentence; empty: not known."""
    if details is None:
        return ""
    texts = sum(map(sum, details.get("confusion") or []))
    without = [name for name, one in details["classes"].items() if not one["texts"]]
    words = f"Measured on {counted(texts, 'held-out text')}" if texts else ""
    if without:
        named = ", ".join(without[:MOST_NAMED]) + (" and others" if len(without) > MOST_NAMED else "")
        labels = f"the {'label' if len(without) == 1 else 'labels'} {named}"
        words += f", none of them with {labels}" if words else f"No held-out text that was measured has {labels}"
    return f"{words}; `evaluate` with a labeled file measures more." if words else ""


def confusion_rows(details: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row for each label that texts have, with a column for each that they get; none for many labels."""
    names, counts = list(details["classes"]), details.get("confusion") or []
    if not counts or len(names) > MOST_IN_TABLE:
        return []
    return [
        {"is, taken for": name, **dict(zip(names, map(str, row), strict=True))}
        for name, row in zip(names, counts, strict=True)
    ]


def classes_page(details: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what a page shows of a validation; None: nothing is known."""
    if details is None:
        return None
    return {
        "step": details["step"],
        "tables": [rows for rows in (class_rows(details), confusion_rows(details)) if rows],
    }
