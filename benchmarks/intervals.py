"""How often does the 95% interval of a run hold, and how often is a run that changed nothing called better?

    PYTHONPATH=. python benchmarks/intervals.py --picture intervals.png
    PYTHONPATH=. python benchmarks/intervals.py --rows my-adapter/held_out_rows.jsonl

Rows are drawn again and again from a population whose true change is known. A row has tokens (lognormal around 80) and a change per token:
its own, which is normal, has heavy tails, is skewed, or is larger for short rows, plus the noise of each token. The first part compares
ways to compute the interval of one change. The second draws several validations of the same rows, takes the lowest, and compares
ways to judge it. Validations differ from the first one independently, or as the steps of a random walk; `auto` also chooses among five
learning rates at two of them. With --rows, the population of the first part is also the rows of a real run, from its first validation to
its last. Needs only numpy, takes less than a minute, and ends with one line of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from _harness import options, table

from mlx_lora.utils.statistics import CONFIDENCE, ratio_error, student_quantile

ROWS = (5, 8, 20, 60)
LENGTHS = (
    0.3,
    0.8,
    1.2,
)  # of the logarithm of a row's tokens; from the 10th to the 90th of 100 rows, tokens grow by 2, 8 and 22
KINDS = ("normal", "heavy tails", "skewed", "short rows more")
VALIDATIONS = (2, 4, 8, 16)
RATES = 5  # that --learning-rate auto tries
FALL = 0.5  # nats per token, a true change that should be found
OWN = 0.15  # standard deviation of a row's own change, in nats per token
OPTIONS = (
    ("--draws", 3000, "Samples of each cell; the ways that draw again themselves have an eighth."),
    ("--rows", Path, "held_out_rows.jsonl of a run, whose rows are a population as well."),
    ("--picture", str, "PNG of both parts; needs matplotlib."),
)
Interval = tuple[np.ndarray, np.ndarray, np.ndarray]  # (S,) low, high, and the change itself

# Populations. Shapes: S samples, V validations, R rows.


def tokens_of(rng: np.random.Generator, shape: tuple[int, ...], spread: float) -> np.ndarray:
    """Return how many tokens rows have."""
    return np.maximum(1, np.round(80 * np.exp(rng.normal(0, spread, shape))))


def draw(rng: np.random.Generator, samples: int, rows: int, spread: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and summed changes of rows, (S, R) each."""
    tokens = tokens_of(rng, (samples, rows), spread)
    own = {
        "normal": lambda: rng.normal(0, OWN, tokens.shape),
        "heavy tails": lambda: OWN / np.sqrt(3) * rng.standard_t(3, tokens.shape),
        "skewed": lambda: -OWN * (rng.standard_exponential(tokens.shape) - 1),
        "short rows more": lambda: rng.normal(0, OWN, tokens.shape) - 0.2 * np.sqrt(80 / tokens),
    }[kind]()
    return tokens, tokens * own + np.sqrt(tokens) * rng.normal(size=tokens.shape)


@cache
def truth(spread: float, kind: str) -> float:
    """Return the change of a whole population."""
    if kind != "short rows more":
        return 0.0
    tokens, sums = draw(np.random.default_rng(1), 1000, 2000, spread, kind)
    return float(sums.sum() / tokens.sum())


# Ways to compute an interval


@cache
def _quantiles(choices: int) -> tuple[np.ndarray, np.ndarray]:
    freedom = np.geomspace(1, 100, 200)
    return freedom, np.array([student_quantile(one, 1 - (1 - CONFIDENCE) / choices) for one in freedom])


def quantile(freedom: np.ndarray | float, choices: int = 1) -> np.ndarray:
    """Return Student's quantiles of many degrees of freedom."""
    return np.asarray(np.interp(freedom, *_quantiles(choices)))


def linearized(tokens: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the change and its standard error by the first derivatives of the ratio, as until November 2026."""
    rows, total = tokens.shape[-1], tokens.sum(-1)
    change = sums.sum(-1) / total
    rest = sums - change[..., None] * tokens
    return change, np.sqrt((rest**2).sum(-1) * rows / (rows - 1)) / total


def jackknife(tokens: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the change and its standard error by leaving out each row."""
    total, whole = tokens.sum(-1), sums.sum(-1)
    without = (whole[..., None] - sums) / (total[..., None] - tokens)
    return whole / total, np.sqrt((tokens.shape[-1] - 1) * without.var(-1))


def effective(tokens: np.ndarray) -> np.ndarray:
    """Return the degrees of freedom of as many equal rows as weigh the same."""
    return np.maximum(1.0, tokens.sum(-1) ** 2 / (tokens**2).sum(-1) - 1)


def symmetric(change: np.ndarray, half: np.ndarray) -> Interval:
    """Return an interval around the change."""
    return change - half, change + half, change


def shipped(tokens: np.ndarray, sums: np.ndarray, choices: int = 1) -> Interval:
    """Return what `ratio_error` does, for many samples at once."""
    change, error = jackknife(tokens, sums)
    return symmetric(change, quantile(effective(tokens), choices) * error)


def sandwich(tokens: np.ndarray, sums: np.ndarray) -> Interval:
    """Return the interval of Bell and McCaffrey (2002): residuals by leverage (HC2), and degrees of freedom of their sum."""
    share = tokens / tokens.sum(-1, keepdims=True)
    change, all_shares = sums.sum(-1) / tokens.sum(-1), (share**2).sum(-1, keepdims=True)
    weight = share**2 / (1 - 2 * share + all_shares)
    error = np.sqrt((weight * (sums / tokens - change[:, None]) ** 2).sum(-1))
    half = all_shares / 2 - share
    traces = 2 * weight.sum(-1) * (weight * half**2).sum(-1) + 2 * (weight * half).sum(-1) ** 2
    traces += (weight**2 * (1 + 4 * half)).sum(-1)
    return symmetric(change, quantile(np.maximum(1, all_shares[:, 0] ** 2 / traces)) * error)


def bootstrap_t(tokens: np.ndarray, sums: np.ndarray, again: int = 199) -> Interval:
    """Return the interval of the studentized bootstrap."""
    rng = np.random.default_rng(2)
    change, error = linearized(tokens, sums)
    picked = rng.integers(0, tokens.shape[1], (again, *tokens.shape))
    changes, errors = linearized(*(np.take_along_axis(one[None], picked, -1) for one in (tokens, sums)))
    low, high = np.quantile((changes - change) / np.maximum(errors, 1e-12), (0.025, 0.975), axis=0)
    return change - high * error, change - low * error, change


def bootstrap_bca(tokens: np.ndarray, sums: np.ndarray, again: int = 399) -> Interval:
    """Return the interval of the bootstrap that is corrected for bias and acceleration (Efron 1987)."""
    from statistics import NormalDist

    rng, normal = np.random.default_rng(3), NormalDist()
    change = sums.sum(-1) / tokens.sum(-1)
    picked = rng.integers(0, tokens.shape[1], (again, *tokens.shape))
    parts = [np.take_along_axis(one[None], picked, -1).sum(-1) for one in (tokens, sums)]
    changes = np.sort(parts[1] / parts[0], axis=0)
    without = (sums.sum(-1, keepdims=True) - sums) / (tokens.sum(-1, keepdims=True) - tokens)
    rest = without.mean(-1, keepdims=True) - without
    faster = (rest**3).sum(-1) / (6 * (rest**2).sum(-1) ** 1.5)
    below = np.clip((changes < change).mean(0), 1 / again, 1 - 1 / again)
    ends = []
    for z in (-1.96, 1.96):
        at = [
            normal.cdf(b + (b + z) / (1 - a * (b + z))) for b, a in zip(map(normal.inv_cdf, below), faster, strict=True)
        ]
        ends.append(changes[np.minimum(again - 1, (np.array(at) * again).astype(int)), np.arange(len(change))])
    return ends[0], ends[1], change


def student(of: Callable[..., tuple[np.ndarray, np.ndarray]]) -> Callable[[np.ndarray, np.ndarray], Interval]:
    """Return the interval with the degrees of freedom of the number of rows."""

    def interval(tokens: np.ndarray, sums: np.ndarray) -> Interval:
        change, error = of(tokens, sums)
        return symmetric(change, quantile(tokens.shape[-1] - 1) * error)

    return interval


OURS = "jackknife, t of the effective rows (ours)"
WAYS: dict[str, Callable[[np.ndarray, np.ndarray], Interval]] = {
    "linearized, t of the rows (before)": student(linearized),
    "jackknife, t of the rows": student(jackknife),
    OURS: shipped,
    "sandwich, Bell and McCaffrey": sandwich,
    "bootstrap, studentized": bootstrap_t,
    "bootstrap, BCa": bootstrap_bca,
}


def coverage(draws: int) -> dict[str, dict[float, list[list[float]]]]:
    """Return way -> lengths -> for each number of rows the coverage of each kind."""
    found: dict[str, dict[float, list[list[float]]]] = {way: {spread: [] for spread in LENGTHS} for way in WAYS}
    for spread in LENGTHS:
        for rows in ROWS:
            samples = [
                draw(np.random.default_rng([rows, n]), draws, rows, spread, kind) for n, kind in enumerate(KINDS)
            ]
            for way, interval in WAYS.items():
                few = draws // 8 if way.startswith("bootstrap") else draws
                cells = []
                for kind, (tokens, sums) in zip(KINDS, samples, strict=True):
                    low, high, _ = interval(tokens[:few], sums[:few])
                    cells.append(float(((low <= truth(spread, kind)) & (truth(spread, kind) <= high)).mean()))
                found[way][spread].append(cells)
    return found


def coverage_of_run(file: Path, draws: int) -> dict[str, list[float]]:
    """Return way -> coverage for each number of rows, of rows drawn from a run's."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    tokens, sums = np.array(lines[0]["tokens"]), np.array(lines[-1]["loss_sums"]) - np.array(lines[0]["loss_sums"])
    true, found = sums.sum() / tokens.sum(), {}
    for way, interval in WAYS.items():
        few = draws // 8 if way.startswith("bootstrap") else draws
        found[way] = []
        for rows in ROWS:
            picked = np.random.default_rng(rows).integers(0, len(tokens), (few, rows))
            low, high, _ = interval(tokens[picked].astype(float), sums[picked])
            found[way].append(float(((low <= true) & (true <= high)).mean()))
    return found


# Choosing, and judging what was chosen


def validations(rng: np.random.Generator, tokens: np.ndarray, count: int, walk: bool) -> np.ndarray:
    """Return the summed changes of the rows from the first validation to each later one, (S, V, R)."""
    size = np.sqrt(OWN**2 + 1 / tokens)[:, None]
    changes = rng.normal(size=(len(tokens), count, tokens.shape[1])) * size * tokens[:, None]
    return changes.cumsum(1) if walk else changes


def lowest(sums: np.ndarray) -> np.ndarray:
    """Return those of the validation with the lowest loss, (S, R)."""
    return sums[np.arange(len(sums)), sums.sum(-1).argmin(1)]


def halves(tokens: np.ndarray, sums: np.ndarray) -> Interval:
    """Choose on one half of the rows, and judge on the other."""
    half = tokens.shape[1] // 2
    chosen = sums[np.arange(len(sums)), sums[:, :, :half].sum(-1).argmin(1)]
    return shipped(tokens[:, half:], chosen[:, half:])


def effective_choices(tokens: np.ndarray, sums: np.ndarray) -> Interval:
    """Widen for the effective number of validations by their correlations (Galwey 2009)."""
    rest = sums - (sums.sum(-1) / tokens.sum(-1)[:, None])[..., None] * tokens[:, None]
    values = np.linalg.svd(rest / np.linalg.norm(rest, axis=-1, keepdims=True), compute_uv=False)
    numbers = np.rint(values.sum(-1) ** 2 / sums.shape[1]).astype(int)
    low, high = np.empty(len(tokens)), np.empty(len(tokens))
    change = lowest(sums).sum(-1) / tokens.sum(-1)
    for number in np.unique(numbers):
        of = numbers == number
        low[of], high[of], _ = shipped(tokens[of], lowest(sums[of]), int(number))
    return low, high, change


WIDER = "widened for their number (ours)"
JUDGED: dict[str, Callable[[np.ndarray, np.ndarray], Interval]] = {
    "as if it were the only one (before)": lambda tokens, sums: student(linearized)(tokens, lowest(sums)),
    "chosen on one half, judged on the other": halves,
    "widened for their effective number": effective_choices,
    WIDER: lambda tokens, sums: shipped(tokens, lowest(sums), sums.shape[1]),
}


def called_better(draws: int) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Return way -> `walk`, `apart` and, for a true fall, `found` -> validations -> a share for each number of rows."""
    found: dict[str, Any] = {way: {what: {} for what in ("walk", "apart", "found")} for way in JUDGED}
    for count in VALIDATIONS:
        for what in ("walk", "apart", "found"):
            for rows in ROWS:
                rng = np.random.default_rng([count, rows, len(what)])
                tokens = tokens_of(rng, (draws, rows), 0.8)
                sums = validations(rng, tokens, count, what != "apart")
                sums -= FALL * tokens[:, None] * (what == "found")
                for way, judge in JUDGED.items():
                    found[way][what].setdefault(count, []).append(float((judge(tokens, sums)[1] < 0).mean()))
    return found


def called_better_auto(draws: int) -> dict[str, list[float]]:
    """Return `walk` and `apart` -> the share of runs of --learning-rate auto that are called better, for each number of rows."""
    found: dict[str, list[float]] = {"walk": [], "apart": []}
    for what, shares in found.items():
        for rows in ROWS:
            rng = np.random.default_rng([rows, len(what)])
            tokens, every = tokens_of(rng, (draws, rows), 0.8), np.arange(draws)
            sums = np.stack([validations(rng, tokens, 10, what == "walk") for _ in range(RATES)], 1)  # (S, rates, V, R)
            losses = sums.sum(-1)
            two = losses[:, :, 0].argsort(1)[:, :2]  # the rates of the second round
            rate = two[every, np.take_along_axis(losses[:, :, 1], two, 1).argmin(1)]
            high = shipped(tokens, lowest(sums[every, rate]), 10 + RATES - 1)[1]
            shares.append(float((high < 0).mean()))
    return found


# What is printed


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.1f}"


def rows_of_table(result: dict[str, Any]) -> list[list[str]]:
    """Return the table: what, way, and a cell for each number of rows."""
    lines = []
    for spread in LENGTHS:
        for way in WAYS:
            cells = [f"{percent(float(np.mean(one)))} ({percent(min(one))})" for one in result["coverage"][way][spread]]
            lines.append([f"holds, lengths {spread}", way, *cells])
    for way, cells in (result["run"] or {}).items():
        lines.append(["holds, rows of a run", way, *map(percent, cells)])
    titles = {"walk": "better, random walk", "apart": "better, independent", "found": "a true fall is found"}
    for what, title in titles.items():
        for count in VALIDATIONS:
            lines += [[f"{title}, {count}", way, *map(percent, result["better"][way][what][count])] for way in JUDGED]
    for what, cells in result["auto"].items():
        lines.append([f"{titles[what]}, 10 and {RATES} rates", WIDER, *map(percent, cells)])
    return lines


def picture(result: dict[str, Any], file: str) -> None:
    """Draw coverage, the share that is wrongly called better, and the share of true falls that are found."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    covers, better, power = figure.subplots(1, 3)
    at = range(len(ROWS))
    for way, color in zip(WAYS, ("C3", "C1", "C0", "C2", "C4", "C5"), strict=True):
        cells = [100 * float(np.mean(one)) for one in result["coverage"][way][1.2]]
        covers.plot(at, cells, marker="o", color=color, label=way, linewidth=2.5 if way == OURS else 1.2)
    covers.axhline(95, color="gray", linestyle=":")
    covers.set(title="The interval holds, row lengths vary (1.2)", ylabel="% of samples", ylim=(66, 100))
    for way, color in zip(JUDGED, ("C3", "C1", "C2", "C0"), strict=True):
        for what, line in (("walk", "-"), ("apart", "--")):
            cells = [100 * share for share in result["better"][way][what][8]]
            better.plot(at, cells, line, marker="o", color=color, label=way if line == "-" else None)
        power.plot(at, [100 * share for share in result["better"][way]["found"][8]], marker="o", color=color, label=way)
    better.axhline(3, color="gray", linestyle=":")
    better.set(
        title="Called better, nothing changed, 8 validations", ylim=(-1, 30), ylabel="% of runs (dashed: independent)"
    )
    power.set(title=f"A true fall of {FALL} is found, 8 validations, walk", ylabel="% of runs")
    for axis in (covers, better, power):
        axis.set_xticks(list(at), [str(rows) for rows in ROWS])
        axis.set_xlabel("held-out rows")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7.5)
    figure.savefig(file, dpi=100)


def main(argv: Sequence[str]) -> int:
    """Simulate, print the table and the JSON line, and return 0."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    tokens, sums = draw(np.random.default_rng(0), 20, 8, 0.8, "normal")
    for own_tokens, own_sums, high, change in zip(tokens, sums, *shipped(tokens, sums, 8)[1:], strict=True):
        assert (
            abs(ratio_error(own_sums, own_tokens, 8)[1] / (high - change) - 1) < 0.01
        )  # what is simulated is what runs
    result = {
        "draws": args.draws,
        "rows": ROWS,
        "coverage": coverage(args.draws),
        "run": coverage_of_run(args.rows, args.draws) if args.rows else None,
        "better": called_better(args.draws),
        "auto": called_better_auto(args.draws),
    }
    print(table(["what, %", "way", *(f"{rows} rows" for rows in ROWS)], rows_of_table(result)))
    if args.picture:
        picture(result, args.picture)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
