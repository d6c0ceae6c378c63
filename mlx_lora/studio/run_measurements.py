"""What `evaluate` measured of a finished run, kept in its folder: answers side by side, and what was forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lora.api.forgetting import badges
from mlx_lora.reports.evaluation import read_evaluation, shown_evaluation
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import read_json
from mlx_lora.utils.text import command_line

FACTS = "studio/forgetting.json"
ASKED = 20  # questions
MOST_TEXT = 2000  # characters of one
OF_MODEL = ("model", "revision", "bits")


def words_of_asking(
    folder: Path, settings: dict[str, Any], report: dict[str, Any] | None, data: str | None = None
) -> list[str]:
    """Return the words of the command that puts base and adapter side by side.

    Args:
        folder: of the run.
        settings: of the run.
        report: of its data, as in report.json.
        data: to measure; None: what the run held out.
    """
    given = [word for name in OF_MODEL if settings.get(name) for word in (f"--{name}", str(settings[name]))]
    words = ["evaluate", *given, *(("--data", data) if data else ()), "--adapter-path", str(folder)]
    return words if data is None and not _has_questions(report) else [*words, "--show", str(ASKED)]


def _has_questions(report: dict[str, Any] | None) -> bool:
    """Tell whether rows have prompts: of plain text, every token but the first is trained."""
    train = ((report or {}).get("splits") or {}).get("train") or {}
    return train.get("supervised_tokens", 0) < train.get("tokens", 1) - train.get("rows", 0)


def side_by_side(folder: Path, settings: dict[str, Any], report: dict[str, Any] | None) -> dict[str, Any]:
    """Return `evaluation`, as the page shows it, or None; and the command that measures it on held-out rows."""
    facts = read_evaluation(folder)
    found = None if facts is None else shown_evaluation(facts)
    for row in found["rows"] if found else ():
        row["said"] = [{"text": text[:MOST_TEXT], "right": right} for text, right in row["said"]]
        row |= {name: row[name][:MOST_TEXT] for name in ("question", "expected")}
    return {"evaluation": found, "evaluation_command": command_line(words_of_asking(folder, settings, report))}


def words_of_measuring(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Return the words of the command that measures what a run's adapter forgot."""
    given = [word for name in ("model", "data") if settings.get(name) for word in (f"--{name}", str(settings[name]))]
    return ["evaluate", *given, "--adapter-path", str(folder), "--forgetting", "--json"]


def what_was_forgotten(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return `forgetting`, as the page shows it, or None; and the command that measures it."""
    command = command_line(words_of_measuring(folder, settings))
    try:
        facts = read_json(folder / FACTS, "measure it again")
        [about] = badges(facts)
        drifts = [(name, *one["adapters"].values()) for name, one in facts["sets"].items()]
    except (InputError, OSError, KeyError, TypeError, ValueError):
        return {"forgetting": None, "forgetting_command": command}
    rows = [
        {
            "set": name,
            "base": one["base_loss"],
            "adapter": one["loss"],
            "change": one["change"],
            "verdict": one["verdict"],
        }
        for name, one in drifts
    ]
    right = facts["probes"]["right"]
    probes = {"right": right[about["adapter"]], "base_right": right["base"], "of": facts["probes"]["questions"]}
    found = {"sentence": f"It {about['sentence']}.", "rows": rows, "probes": probes}
    return {"forgetting": found, "forgetting_command": command}
