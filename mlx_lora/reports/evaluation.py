"""Keep what `evaluate` measured in a run's folder, and show it: losses, and question, expected, base and adapter side by side.

evaluation.json has what `evaluate --json` prints, and `date`, `held_out` (the rows are those that the run held out) and
`adapter` (the SHA-256 of the weights that were measured). A run that trains further has another adapter, and the results of
the earlier one are shown no more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_lora.data.duplicates import SeenRows
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE
from mlx_lora.reports.charts import COMMON, render_page
from mlx_lora.reports.diagnosis import change_words
from mlx_lora.trainer.evaluate import Change
from mlx_lora.utils.console import finite_values
from mlx_lora.utils.files import replace_text, sha256_of
from mlx_lora.utils.parsing import parse_json
from mlx_lora.utils.text import counted

EVALUATION_FILE = "evaluation.json"
MODELS = ("base", "adapter")
SHORT_WORDS = 8  # an expected answer of at most so many words can be given exactly


def keep_evaluation(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write evaluation.json; a measurement without questions does not replace one of the same adapter that asked some.

    Args:
        folder: of the run.
        facts: what `evaluate --json` prints, and `held_out`.

    Raises:
        OSError: it cannot be written.
    """
    earlier = read_evaluation(folder)
    if earlier and earlier.get("examples") and not facts.get("examples"):
        return
    date, adapter = datetime.now().astimezone().isoformat(timespec="seconds"), sha256_of(folder / WEIGHTS_FILE)
    text = json.dumps(finite_values({**facts, "date": date, "adapter": adapter}), indent=1, ensure_ascii=False)
    replace_text(folder / EVALUATION_FILE, text + "\n")


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return what evaluation.json says of a run's adapter; None: nothing, or it is about another adapter."""
    try:
        facts = parse_json((folder / EVALUATION_FILE).read_bytes())
        if not isinstance(facts, dict) or facts.get("adapter") != sha256_of(folder / WEIGHTS_FILE):
            return None
        shown_evaluation(facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts


def shown_evaluation(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what pages show of an evaluation: texts, and a list of the questions with what each model said.

    Args:
        facts: what `evaluate --json` prints; `held_out` and `date` where they are known.

    Returns:
        `source`, `date`, `loss`, `exact` and `seen` (sentences, empty where there is nothing to say), `models`, and `rows`:
        `question`, `expected` and `said`: (text, whether it is right, or None where no text can be called exact) of each.
    """
    examples = facts.get("examples") or []
    models = [
        name for name in MODELS if (name in examples[0] if examples else name == MODELS[0] or "base_loss" in facts)
    ]
    rows = [
        {
            "question": str(one["question"]),
            "expected": str(one["expected"]),
            "said": [(str(one[name]), one["exact"][name] if one["exact"] else None) for name in models],
        }
        for one in examples
    ]
    whose = "that the run held out of" if facts.get("held_out") else "of"
    exact = exact_words(examples, models)
    return {
        "source": f"{counted(facts['rows'], 'row')} {whose} {facts['data']}",
        "date": str(facts.get("date") or "")[:10],
        "loss": loss_words(facts).replace("->", "→").capitalize(),
        "exact": exact.capitalize(),
        "seen": SeenRows(**facts["near_training"]).words() if facts.get("near_training") else "",
        "models": models,
        "rows": rows,
    }


def loss_words(facts: Mapping[str, Any]) -> str:
    """Return the losses of base and adapter as text; that of the base alone where nothing is compared."""
    if "base_loss" not in facts:
        return f"base {facts['loss']:.4f}"
    change: dict[str, Any] = {name: math.nan if value is None else value for name, value in facts["change"].items()}
    return f"base {facts['base_loss']:.4f} -> adapter {facts['loss']:.4f}, perplexity {change_words(Change(**change))}"


def exact_words(examples: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    """Return how many answers of each model are exact; empty if no question expects a short answer."""
    exact = [one["exact"] for one in examples if one["exact"] is not None]
    if not exact:
        return ""
    counts = ", ".join(f"{name} {sum(one[name] for one in exact)}" for name in models)
    return f"exact answers to the {counted(len(exact), 'question')} that expect at most {SHORT_WORDS} words: {counts}"


def write_evaluation_page(path: Path, facts: Mapping[str, Any], command: str, device: str) -> None:
    """Write an evaluation as a page of its own, without network or script.

    Args:
        path: its file; replaced atomically.
        facts: as for `shown_evaluation`, and `model`, `adapter_path` and `partial`.
        command: the command that measured it.
        device: a line about the machine.
    """
    page = render_page(
        COMMON, "evaluation.html", facts=facts, evaluation=shown_evaluation(facts), command=command, device=device
    )
    replace_text(path, page)
