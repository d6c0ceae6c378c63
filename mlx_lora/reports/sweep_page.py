"""The page of a sweep: curves, loss against what varied with its spread over seeds, all candidates, and one sentence of advice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora.config.fields import flag_of
from mlx_lora.config.sweep import words
from mlx_lora.reports.charts import COMMON, WIDE, Series, line_chart, number, render_page
from mlx_lora.utils.files import replace_text
from mlx_lora.utils.text import counted

WHOLE = "winner"  # the curve of its own run
MOST_CURVES = 6  # that can be told apart
AS_GOOD = 0.01  # candidates within this share of the least loss are called as good


@dataclass(frozen=True)
class SweepResults:
    """What a sweep has found so far.

    Attributes:
        candidates: the settings of each.
        rounds: of each that is done, an entry for each trial: `name`, `candidate`, `seed`, `step`, `loss`; None: it diverged.
        winner: number of the best candidate; None: not known yet.
        val_loss: of its own run; None: not there yet.
        total: steps of a whole run.
        curves: trial, or WHOLE -> steps and held-out losses.
    """

    candidates: Sequence[dict[str, Any]]
    rounds: Sequence[Sequence[Mapping[str, Any]]]
    winner: int | None
    val_loss: float | None
    total: int
    curves: Mapping[str, list[tuple[int, float]]]

    def losses(self, number: int) -> dict[int, list[float]]:
        """Return the losses of each candidate of a round, one for each seed; infinite where it diverged."""
        found: dict[int, list[float]] = {}
        for trial in self.rounds[number]:
            found.setdefault(trial["candidate"], []).append(math.inf if trial["loss"] is None else float(trial["loss"]))
        return found

    def last(self) -> dict[int, tuple[int, list[float]]]:
        """Return each candidate's last round and its losses there, the best first."""
        found = {of: (at, losses) for at in range(len(self.rounds)) for of, losses in self.losses(at).items()}
        return dict(sorted(found.items(), key=lambda item: (-item[1][0], _mean(item[1][1]), item[0])))

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each candidate, the best first: its settings, and `step` and `loss` where it was last measured."""
        steps = [trials[0]["step"] for trials in self.rounds]
        return [
            {**self.candidates[of], "step": steps[at], "loss": _mean(losses)}
            for of, (at, losses) in self.last().items()
        ]

    def work(self) -> float:
        """Return the work of all trials in whole runs."""
        last = {trial["name"]: trial["step"] for trials in self.rounds for trial in trials}
        return sum(last.values()) / self.total if self.total else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def advice(found: SweepResults) -> str:
    """Return one sentence: what to use, what is as good, and whether it is worth looking further."""
    if not found.rounds:
        return "Nothing has been measured yet."
    last = len(found.rounds) - 1
    means = {of: _mean(losses) for of, losses in found.losses(last).items()}
    best = found.winner if found.winner is not None else min(means, key=lambda of: (means[of], of))
    loss = found.val_loss if found.val_loss is not None else means[best]
    at = "after its whole run" if found.val_loss is not None else f"at step {found.rounds[last][0]['step']}"
    sentence = f"Use {words(found.candidates[best])}: held-out loss {loss:.4f} {at}"
    if near := _as_good(found, best):
        sentence += f"; {near}"
    if edge := _at_edge(found, best):
        sentence += f"; {edge}"
    return sentence + "."


def _as_good(found: SweepResults, best: int) -> str:
    """Say which values of a single setting were as good, in the first round, which all candidates took part in."""
    names = list(found.candidates[best])
    if len(names) != 1:
        return ""
    means = {of: _mean(losses) for of, losses in found.losses(0).items()}
    near = [found.candidates[of][names[0]] for of, mean in means.items() if mean <= means[best] * (1 + AS_GOOD)]
    if len(near) < 2 or not all(isinstance(value, (int, float)) for value in near):
        return ""
    return f"from {min(near):g} to {max(near):g}, the loss was within {AS_GOOD:.0%} of it in the first round"


def _at_edge(found: SweepResults, best: int) -> str:
    """Say that the best value is the least or the most that was tried, so that a better one may lie beyond."""
    for name, value in found.candidates[best].items():
        tried = sorted({one[name] for one in found.candidates if isinstance(one[name], (int, float))})
        if len(tried) > 2 and value in (tried[0], tried[-1]):
            side, way = ("lowest", "lower") if value == tried[0] else ("highest", "higher")
            return f"it is the {side} {flag_of(name)} that was tried, so try {way} ones as well"
    return ""


# The page


def write_page(path: Path, found: SweepResults) -> None:
    """Write the page."""
    varied = list(found.candidates[0])
    numeric = [
        name
        for name in varied
        if len({one[name] for one in found.candidates}) > 2
        and all(isinstance(one[name], (int, float)) and one[name] > 0 for one in found.candidates)
    ]
    charts = [_curves(found)] + [_against(found, name) for name in numeric]
    rows = []
    for of, (at, losses) in found.last().items():
        row = {"settings": words(found.candidates[of])}
        for place, trials in enumerate(found.rounds):
            mean = found.losses(place).get(of)
            row[f"loss at step {trials[0]['step']}"] = "" if mean is None else _shown(_mean(mean))
        seeds = f"{_shown(min(losses))} to {_shown(max(losses))}" if len(losses) > 1 else ""
        rows.append({**row, "between seeds": seeds, "best": of == found.winner and at == len(found.rounds) - 1})
    page = render_page(
        COMMON,
        "sweep.html",
        title=", ".join(flag_of(name) for name in varied),
        advice=advice(found),
        rows=rows,
        charts=charts,
        count=counted(len(found.candidates), "candidate"),
        work=f"{found.work():.1f}",
        total=found.total,
        winner=found.val_loss is not None,
    )
    replace_text(path, page)


def _shown(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def _curves(found: SweepResults) -> dict[str, Any]:
    """Return the chart of held-out loss by step, of the best candidates."""
    best = list(found.last())[:MOST_CURVES]
    first = {trial["candidate"]: trial["name"] for trials in reversed(found.rounds) for trial in reversed(trials)}
    names = {of: WHOLE if of == found.winner and found.curves.get(WHOLE) else first[of] for of in best}
    series = [Series(words(found.candidates[of]), found.curves.get(names[of], [])) for of in best]
    title = "Held-out loss"
    return {
        "title": f"{title} of the best {len(series)}" + (", and of the winner’s whole run" if WHOLE in names.values() else ""), "legend": [one.name for one in series], "wide": True,
        "svg": line_chart(title, series, size=WIDE),
    }  # fmt: skip


def _against(found: SweepResults, name: str) -> dict[str, Any]:
    """Return the chart of loss against a setting: a line through the means of each round, and a dot for each seed."""
    series = []
    for place, trials in enumerate(found.rounds):
        points = {
            float(found.candidates[of][name]): _mean(losses)
            for of, losses in sorted(found.losses(place).items(), key=lambda item: -_mean(item[1]))
        }  # of several candidates with a value, the best
        line = [(math.log10(x), y) for x, y in sorted(points.items())]
        series.append(Series(f"step {trials[0]['step']}", line))
    shown = series[-MOST_CURVES:]
    seeds = [
        (math.log10(found.candidates[of][name]), loss)
        for of, losses in found.losses(len(found.rounds) - 1).items()
        for loss in losses
    ]
    if len(found.losses(len(found.rounds) - 1)) < len(seeds):
        apart = [point for one in sorted(seeds) for point in (one, (one[0], math.nan))]  # dots without a line
        shown = [*shown[-MOST_CURVES + 1 :], Series("each seed", apart, markers=True)]
    title = f"Held-out loss against {flag_of(name)}"
    chart = line_chart(title, shown, along="", label=lambda x: number(float(f"{10**x:.1e}")))
    return {"title": title, "legend": [one.name for one in shown], "wide": False, "svg": chart}
