"""The page of `evaluate --tasks`: scores by task, what is shown of each adapter against the base, and the answers that changed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from mlx_lora.reports.charts import COMMON, render_page
from mlx_lora.utils.files import replace_text

BASE = "base"
MOST_ROWS = 50  # of a task whose answers are shown
TONES = {"better": "good", "worse": "bad"}


def write_task_page(path: Path, facts: Mapping[str, Any], command: str, device: str) -> None:
    """Write the page.

    Args:
        path: its file; replaced atomically.
        facts: TaskResults.to_dict(), with `model`.
        command: the command that measured it.
        device: a line about the machine.
    """
    page = render_page(
        COMMON, "tasks.html", facts=facts, scores=score_rows(facts), badges=badges(facts),
        answers=[changed_answers(task, rows) for task, rows in facts["answers"].items()], command=command, device=device,
        date=date.today().isoformat(),
    )  # fmt: skip
    replace_text(path, page)


def badges(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each adapter a sentence, and a word with its tone for each task and metric."""
    names = dict.fromkeys(name for one in facts["tasks"] for name in one["compared"])
    found = []
    for name in names:
        compared = [
            (one["task"], one["metric"], one["compared"][name]) for one in facts["tasks"] if one["compared"].get(name)
        ]
        verdicts = [verdict["verdict"] for _, _, verdict in compared]
        better, worse = verdicts.count("better"), verdicts.count("worse")
        parts = [f"better on {better}" if better else "", f"worse on {worse}" if worse else ""]
        words = " and ".join(filter(None, parts)) or "no difference shown on any"
        found.append({
            "adapter": name, "sentence": f"{words} of {len(verdicts)} scores",
            "badges": [(task, metric, one["verdict"], TONES.get(one["verdict"], "")) for task, metric, one in compared],
        })  # fmt: skip
    return found


def score_rows(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each task, metric and model."""
    rows = []
    for one in facts["tasks"]:
        for place, (name, score) in enumerate(one["models"].items()):
            compared = one["compared"].get(name)
            rows.append({
                "task": one["task"] if place == 0 else "", "first": place == 0,
                "metric": (one["metric"] + ("" if one["higher_is_better"] else ", lower is better")) if place == 0 else "",
                "rows": one["rows"] if place == 0 else "", "model": name, "score": _number(score["score"]),
                "error": _number(score["standard_error"]), "words": compared["words"] if compared else "",
                "tone": TONES.get(compared["verdict"], "") if compared else "",
            })  # fmt: skip
    return rows


def changed_answers(task: str, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rows of a task whose value an adapter changed, or the first ones if there are none."""
    changed = [row for row in rows if row["changed"]]
    shown = (changed or rows)[:MOST_ROWS]
    models = list(shown[0]["answers"]) if shown else []
    return {
        "task": task, "models": models, "changed": len(changed), "rows": len(rows),
        "shown": [
            {
                "question": row["question"], "expected": row["expected"],
                "said": [(row["answers"][name], _values(row, name)) for name in models],
            }
            for row in shown
        ],
    }  # fmt: skip


def _values(row: Mapping[str, Any], model: str) -> list[tuple[str, str, str]]:
    """Return metric, value and tone of a model's answer."""
    found = []
    for metric, own in row["values"].items():
        value, base = own.get(model), own.get(BASE)
        if value is None:
            continue
        found.append((metric, _number(value), "" if base is None or value == base else "changed"))
    return found


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"
