"""The page of a task's scores, and that of a sweep: curves, what decides against what varied with its spread over seeds, all candidates, and one sentence of advice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlx_lora.config.fields import flag_of
from mlx_lora.config.objectives import METRICS
from mlx_lora.config.sweep import order_of, words
from mlx_lora.reports.charts import COMMON, WIDE, Series, line_chart, number, render_page
from mlx_lora.utils.files import replace_text
from mlx_lora.utils.text import counted

WHOLE = "winner"  # the curve of its own run
MOST_CURVES = 6  # that can be told apart
AS_GOOD = 0.01  # candidates whose loss is within this share of the best one's are called as good
MOST_NAMED = 3  # equal candidates that the advice names
LOSS = "loss"
# What decides -> what a reader calls it, short and long; of all but the loss, the highest is the best.
MEASURES = {
    LOSS: ("loss", "held-out loss"),
    **{name: (words, f"held-out {words}") for name, words in METRICS.items()},
    "task": ("score", "score of --eval-tasks"),
}


@dataclass(frozen=True)
class SweepResults:
    """What a sweep has found so far.

    Attributes:
        candidates: the settings of each.
        rounds: of each that is done, an entry for each trial: `name`, `candidate`, `seed`, `step`, `loss`, `error` (as of `Score`
            in trainer/sweep.py); loss None: it diverged.
        winner: number of the best candidate; None: not known yet.
        val_loss: of its own run; None: not there yet.
        total: steps of a whole run.
        curves: trial, or WHOLE -> steps, and what decides at each.
        metric: what decides (--metric-for-best-model).
        val_score: of the winner's own run, if it is not the loss that decides; None: not there yet.
    """

    candidates: Sequence[dict[str, Any]]
    rounds: Sequence[Sequence[Mapping[str, Any]]]
    winner: int | None
    val_loss: float | None
    total: int
    curves: Mapping[str, list[tuple[int, float]]]
    metric: str = LOSS
    val_score: float | None = None

    @property
    def measure(self) -> str:
        """What decides, in words."""
        return MEASURES[self.metric][1]

    @property
    def best_is(self) -> str:
        """Which number is the best."""
        return "lowest" if self.metric == LOSS else "highest"

    @property
    def value(self) -> float | None:
        """What decides, of the winner's own run; None: not there yet."""
        return self.val_loss if self.metric == LOSS else self.val_score

    def _numbers(self, number: int, name: str) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for trial in self.rounds[number]:
            found.setdefault(trial["candidate"], []).append(math.inf if trial[name] is None else float(trial[name]))
        return found

    def losses(self, number: int) -> dict[int, list[float]]:
        """Return the losses of each candidate of a round, one for each seed; infinite where it diverged."""
        return self._numbers(number, "loss")

    def values(self, number: int) -> dict[int, list[float]]:
        """Return what decides, of each candidate of a round, one for each seed, the best candidate first.

        Infinite (of a loss) or minus infinite where there is none.
        """
        losses, errors = self.losses(number), self._numbers(number, "error")
        orders = {of: order_of(_mean(errors[of]), _mean(losses[of]), self.candidates) for of in losses}
        best_first = sorted(orders, key=lambda of: (orders[of], of))
        if self.metric == LOSS:
            return {of: losses[of] for of in best_first}
        return {of: [round(1 - error, 9) for error in errors[of]] for of in best_first}

    def last(self) -> dict[int, tuple[int, list[float]]]:
        """Return each candidate's last round and what decides there, the best first."""
        found: dict[int, tuple[int, list[float]]] = {}
        for at in reversed(range(len(self.rounds))):
            found |= {of: (at, values) for of, values in self.values(at).items() if of not in found}
        return found

    def round_words(self, number: int) -> Iterator[str]:
        """Yield each candidate of a round with what decides, the best first."""
        for of, values in self.values(number).items():
            yield f"{words(self.candidates[of])}: {_shown(_mean(values))}"

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each candidate, the best first: its settings, and `step`, `loss` and what decides where it was last measured."""
        steps = [trials[0]["step"] for trials in self.rounds]
        return [
            {**self.candidates[of], "step": steps[at], "loss": _mean(self.losses(at)[of]), self.metric: _mean(values)}
            for of, (at, values) in self.last().items()
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
    values = found.values(last)
    best = found.winner if found.winner is not None else next(iter(values))
    value = found.value if found.value is not None else _mean(values[best])
    at = "after its whole run" if found.value is not None else f"at step {found.rounds[last][0]['step']}"
    sentence = f"Use {words(found.candidates[best])}: {found.measure} {value:.4f} {at}"
    edge = ""  # a better value may lie beyond the least or the most that was tried
    for name, own in found.candidates[best].items():
        tried = sorted({one[name] for one in found.candidates if isinstance(one[name], (int, float))})
        if not edge and len(tried) > 2 and own in (tried[0], tried[-1]):
            side, way = ("lowest", "lower") if own == tried[0] else ("highest", "higher")
            edge = f"it is the {side} {flag_of(name)} that was tried, so try {way} ones as well"
    return "; ".join([sentence, *filter(None, (_equal(found, best), _as_good(found, best), edge))]) + "."


def _equal(found: SweepResults, best: int) -> str:
    """Say which candidates had the same number as the best one where they were last compared, and what decided between them."""
    if found.metric == LOSS:
        return ""
    ties = {
        of: at
        for of, (at, values) in found.last().items()
        if of != best and math.isclose(_mean(values), _mean(found.values(at)[best]), abs_tol=1e-9)
    }
    if not ties:
        return ""
    who = ", ".join(words(found.candidates[of]) for of in ties)
    who = who if len(ties) <= MOST_NAMED else counted(len(ties), "other candidate")
    means = {
        of: [order_of(0, _mean(found.losses(at)[one]), found.candidates) for one in (of, best)]
        for of, at in ties.items()
    }
    why = (
        "and a higher loss"
        if all(other > own for other, own in means.values())
        else "so the one that was given first was taken"
    )
    return f"{who} had the same {MEASURES[found.metric][0]}, {why}"


def _as_good(found: SweepResults, best: int) -> str:
    """Say from which to which value of a single setting the loss was about the same, in the first round, which had all candidates."""
    names = list(found.candidates[best])
    if len(names) != 1 or found.metric != LOSS:
        return ""
    tried = {found.candidates[of][names[0]]: _mean(losses) for of, losses in found.losses(0).items()}
    if not all(isinstance(value, (int, float)) for value in tried):
        return ""
    own, loss = found.candidates[best][names[0]], tried[found.candidates[best][names[0]]]
    alike = lambda value: abs(tried[value] - loss) <= AS_GOOD * abs(loss)  # noqa: E731
    # Outward from the best one, up to the first that was better or worse.
    near = [*takewhile(alike, sorted(value for value in tried if value >= own))]
    near += takewhile(alike, sorted((value for value in tried if value < own), reverse=True))
    if len(near) < 2:
        return ""
    return f"from {min(near):g} to {max(near):g}, the loss was within {AS_GOOD:.0%} of it in the first round"


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
    rounds = [found.values(place) for place in range(len(found.rounds))]
    for of, (at, values) in found.last().items():
        row = {"settings": words(found.candidates[of])}
        for trials, measured in zip(found.rounds, rounds, strict=True):
            told = _shown(_mean(measured[of])) if of in measured else ""
            row[f"{MEASURES[found.metric][0]} at step {trials[0]['step']}"] = told
        seeds = f"{_shown(min(values))} to {_shown(max(values))}" if len(values) > 1 else ""
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
        measure=found.measure,
        winner=found.val_loss is not None,
    )
    replace_text(path, page)


def _shown(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "diverged" if value > 0 else "none"


def _curves(found: SweepResults) -> dict[str, Any]:
    """Return the chart of what decides by step, of the best candidates."""
    best = list(found.last())[:MOST_CURVES]
    first = {trial["candidate"]: trial["name"] for trials in reversed(found.rounds) for trial in reversed(trials)}
    names = {of: WHOLE if of == found.winner and found.curves.get(WHOLE) else first[of] for of in best}
    series = [Series(words(found.candidates[of]), found.curves.get(names[of], [])) for of in best]
    title = found.measure[0].upper() + found.measure[1:]
    return {
        "title": f"{title} of the best {len(series)}" + (", and of the winner’s whole run" if WHOLE in names.values() else ""), "legend": [one.name for one in series], "wide": True,
        "svg": line_chart(title, series, size=WIDE),
    }  # fmt: skip


def _against(found: SweepResults, name: str) -> dict[str, Any]:
    """Return the chart of what decides against a setting: a line through the means of each round, and a dot for each seed."""
    series = []
    for place, trials in enumerate(found.rounds):
        points = {
            float(found.candidates[of][name]): _mean(values) for of, values in reversed(found.values(place).items())
        }  # of several candidates with a value, the best
        line = [(math.log10(x), y) for x, y in sorted(points.items())]
        series.append(Series(f"step {trials[0]['step']}", line))
    shown = series[-MOST_CURVES:]
    seeds = [
        (math.log10(found.candidates[of][name]), value)
        for of, values in found.values(len(found.rounds) - 1).items()
        for value in values
    ]
    if len(found.losses(len(found.rounds) - 1)) < len(seeds):
        apart = [point for one in sorted(seeds) for point in (one, (one[0], math.nan))]  # dots without a line
        shown = [*shown[-MOST_CURVES + 1 :], Series("each seed", apart, markers=True)]
    title = f"{found.measure[0].upper()}{found.measure[1:]} against {flag_of(name)}"
    chart = line_chart(title, shown, along="", label=lambda x: number(float(f"{10**x:.1e}")))
    return {"title": title, "legend": [one.name for one in shown], "wide": False, "svg": chart}


# The page of `evaluate --tasks`: scores by task, what is shown of each adapter against the base, and the answers that changed

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
