"""The results of `evaluate --forgetting` as one page, with bars, verdicts and all answers, without network or script."""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path
from typing import Any

from mlx_lora.artifacts.bars import Bar, bar_chart
from mlx_lora.artifacts.page_template import COMMON, render_page
from mlx_lora.artifacts.plots import perplexity
from mlx_lora.system.files import replacing_file


def verdict_rows(facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return the table's rows (column -> cell), one per set and adapter, with the probes last.

    Args:
        facts: Forgetting.to_dict().
    """
    rows = []
    for where, one in facts["sets"].items():
        for name, drift in one["adapters"].items():
            rows.append(
                {
                    "set": where,
                    "adapter": name,
                    "verdict": drift["verdict"],
                    "tokens": f"{drift['tokens']:,}",
                    "base perplexity": perplexity(drift["base_loss"]),
                    "perplexity": perplexity(drift["loss"]),
                    "change": f"{drift['change']:+.4f}{_error(drift['change_error'])}",
                    "KL": f"{drift['kl']:.4f}{_error(drift['kl_error'])}",
                    "same top token": f"{drift['same_top']:.1%}",
                }
            )
    right, asked = facts["probes"]["right"], facts["probes"]["questions"]
    for name in facts["adapters"] if rows and asked else ():
        counts = {"base perplexity": f"{right['base']} right", "perplexity": f"{right[name]} right"}
        rows.append(
            {**dict.fromkeys(rows[0], ""), "set": "probes", "adapter": name, "tokens": f"{asked} asked", **counts}
        )
    return rows


def _error(value: float | None) -> str:
    """Return a standard error as text; nothing for a set of one row, which has none."""
    return "" if value is None or math.isnan(value) else f" ± {value:.4f}"


TONES = {
    "kept": "good", "learned": "good", "better than the base": "good", "slightly forgotten": "plain", "not learned": "plain",
    "unclear, too few rows": "plain", "forgotten": "bad", "worse than the base": "bad",
}  # fmt: skip


def badges(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the page's beginning: for each adapter a sentence, and (set, verdict, tone) of each set.

    Args:
        facts: Forgetting.to_dict().
    """
    found = []
    for name in facts["adapters"]:
        verdicts = {where: one["adapters"][name]["verdict"] for where, one in facts["sets"].items()}
        found.append(
            {
                "adapter": name,
                "sentence": _sentence(verdicts),
                "badges": [(where, words, TONES[words]) for where, words in verdicts.items()],
                "right": f"{facts['probes']['right'][name]} of {facts['probes']['questions']}",
                "base_right": facts["probes"]["right"]["base"],
            }
        )
    return found


def _sentence(verdicts: dict[str, str]) -> str:
    """Return what an adapter learned and forgot as one sentence."""
    task, *general = verdicts.values()
    learned = {
        "learned": "learned the task",
        "not learned": "did not measurably learn the task",
        "worse than the base": "made the task worse",
    }[task]
    lost = [where for where, words in verdicts.items() if words in ("forgotten", "slightly forgotten")]
    slightly = "slightly " if "forgotten" not in general else ""
    if lost:
        return f"{learned}, and {slightly}forgot {' and '.join(lost)}"
    if any(words.startswith("unclear") for words in general):
        return f"{learned}; the general sets have too few rows to tell what it forgot"
    return f"{learned}, and kept what the base knew" if task == "learned" else f"{learned}; it kept what the base knew"


def charts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the page's charts, with a bar for each model: perplexity and KL of each set, and the probes.

    Args:
        facts: Forgetting.to_dict().
    """
    names = list(facts["adapters"])
    drawn = []
    for where, one in facts["sets"].items():
        drifts = one["adapters"]
        base_loss = drifts[names[0]]["base_loss"]
        bars = [Bar("base", _capped(base_loss), words=perplexity(base_loss), color=2)]
        for index, name in enumerate(names):
            loss = drifts[name]["loss"]
            bars.append(Bar(name, _capped(loss), words=perplexity(loss), color=index % 2, note=drifts[name]["verdict"]))
        drawn.append((f"Perplexity, {where}", bars))
    for where, one in facts["sets"].items():
        bars = []
        for index, name in enumerate(names):
            drift = one["adapters"][name]
            kl, error = max(drift["kl"], 0.0), drift["kl_error"] if math.isfinite(drift["kl_error"]) else 0.0
            bars.append(Bar(name, kl, low=max(kl - error, 0.0), high=kl + error, color=index % 2))
        drawn.append((f"KL from the base, {where}", bars))
    right = facts["probes"]["right"]
    answers = [Bar(name, right[name], color=2 if name == "base" else names.index(name) % 2) for name in right]
    drawn.append((f"Right answers to {facts['probes']['questions']} probes", answers))
    return [{"title": title, "svg": bar_chart(title, bars)} for title, bars in drawn]


def write_page(path: Path, facts: dict[str, Any], thresholds: tuple[float, float], command: str, device: str) -> None:
    """Write the page.

    Args:
        path: its file; replaced atomically.
        facts: Forgetting.to_dict().
        thresholds: the largest rises in loss for the verdicts kept, and slightly forgotten.
        command: the command that measured it.
        device: a line about the machine.
    """
    names = list(facts["adapters"])
    page = render_page(
        COMMON,
        "forgetting.html",
        facts=facts,
        names=names,
        badges=badges(facts),
        charts=charts(facts),
        rows=verdict_rows(facts),
        small=thresholds,
        sources={where: one["source"] for where, one in facts["sets"].items()},
        probes=[
            {"question": probe["question"], "said": [(probe["said"][n], probe["right"][n]) for n in ("base", *names)]}
            for probe in facts["probes"]["texts"]
        ],
        command=command,
        device=device,
        date=date.today().isoformat(),
    )
    with replacing_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _capped(loss: float) -> float:
    """Return the perplexity as a bar's length, which is finite even for a diverged adapter."""
    return math.exp(min(loss, 30.0))
