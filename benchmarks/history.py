"""Show how fast we were against mlx-lm, commit by commit, and whether the last entry is a fall.

    python benchmarks/history.py            a table of every entry, with what each could have seen
    python benchmarks/history.py --check    also exit with 1 if the last entry is a fall, or could not have seen one of 5%

`versus.py --quick --record` writes the entries, one JSON line each, to results/history.jsonl. Entries are compared where
machine, versions, rows, model and settings are the same. An entry's ratio is the geometric mean of its rounds' ratios;
its interval is Student's, over the logarithms of those ratios. Nothing here imports numpy or mlx.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _harness import options, say
from _harness import table as markdown

HISTORY = Path(__file__).parent / "results" / "history.jsonl"
BASELINE = 3  # earlier entries that a new one is compared with
TO_SEE = 0.05  # the change that must be seen
# Student's t, one-sided 95%, by degrees of freedom; from 30 on, the normal distribution's is near enough.
T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753,
       1.746, 1.740, 1.734, 1.729, 1.725, 1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699)  # fmt: skip
NORMAL95, NORMAL90 = 1.645, 1.282
# What two entries must have in common to be compared.
SAME = ("cpu", "cores", "backend", "threads", "versions", "workload")

Entry = dict[str, Any]


def t95(degrees: int) -> float:
    """Return Student's t, one-sided 95%; infinite without a degree of freedom."""
    if degrees < 1:
        return math.inf
    return T95[degrees - 1] if degrees <= len(T95) else NORMAL95


@dataclass(frozen=True)
class Spread:
    """The logarithm of a ratio, measured in rounds.

    Attributes:
        mean: of the logarithms.
        deviation: standard deviation of one round.
        rounds: how many.
    """

    mean: float
    deviation: float
    rounds: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Spread:
        """Return the spread of some rounds' ratios."""
        logs = [math.log(ratio) for ratio in ratios]
        return cls(statistics.fmean(logs), statistics.stdev(logs) if len(logs) > 1 else math.inf, len(logs))

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.deviation / math.sqrt(self.rounds)

    def interval(self) -> tuple[float, float]:
        """Return the ratio's 90% interval."""
        wide = t95(self.rounds - 1) * self.error
        return math.exp(self.mean - wide) if math.isfinite(wide) else 0.0, _exp(self.mean + wide)


@dataclass(frozen=True)
class Verdict:
    """An entry against those before it.

    Attributes:
        change: of the ratio, as a share; None without an entry to compare with.
        least, most: the 90% interval of the change; a fall is one whose `most` is below 0.
        sees: the smallest fall that such a comparison finds nine times out of ten.
        rounds: that each of two entries would need to find a fall of 5% so often.
        compared: the number of entries that it is compared with.
    """

    change: float | None
    least: float
    most: float
    sees: float
    rounds: int
    compared: int

    @property
    def fell(self) -> bool:
        """Whether the ratio fell by more than the spread explains."""
        return self.change is not None and self.most < 0

    @property
    def blind(self) -> bool:
        """Whether a fall of 5% may have stayed unseen."""
        return self.sees > TO_SEE


def comparable(entry: Entry, earlier: Sequence[Entry]) -> list[Entry]:
    """Return the last sound entries before this one that it may be compared with, the oldest first."""
    key = [entry[name] for name in SAME]
    fit = [other for other in earlier if not other["unsound"] and [other[name] for name in SAME] == key]
    return fit[-BASELINE:]


def compare(entry: Entry, earlier: Sequence[Entry]) -> Verdict:
    """Compare an entry with those before it, by Welch's interval of the difference of their logarithms."""
    now, base = Spread.of(entry["ratios"]), [Spread.of(other["ratios"]) for other in comparable(entry, earlier)]
    needed = rounds_needed(now.deviation)
    if not base:
        return Verdict(None, math.nan, math.nan, _share_seen(now.error * math.sqrt(2), now.rounds - 1), needed, 0)
    before = statistics.fmean(one.mean for one in base)
    parts = [(now.error**2, now.rounds), *((one.error**2 / len(base) ** 2, one.rounds) for one in base)]
    error = math.sqrt(sum(part for part, _ in parts))
    if not math.isfinite(error):
        return Verdict(_exp(now.mean - before) - 1, -1.0, math.inf, 1.0, needed, len(base))
    below = sum(part**2 / (rounds - 1) for part, rounds in parts)
    degrees = int(error**4 / below) if below else 10**6
    change, wide = now.mean - before, t95(degrees) * error
    return Verdict(
        _exp(change) - 1, _exp(change - wide) - 1, _exp(change + wide) - 1, _share_seen(error, degrees), needed, len(base)
    )  # fmt: skip


def rounds_needed(deviation: float) -> int:
    """Return the rounds that two entries need to show a fall of 5% nine times out of ten; 0: it is not known."""
    if not math.isfinite(deviation):
        return 0
    for rounds in range(2, 10_000):
        if _share_seen(deviation * math.sqrt(2 / rounds), 2 * (rounds - 1)) <= TO_SEE:
            return rounds
    return 10_000


def _share_seen(error: float, degrees: int) -> float:
    if not math.isfinite(error):
        return 1.0
    return 1 - math.exp(-(t95(degrees) + NORMAL90) * error)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def read_history(path: Path) -> list[Entry]:
    """Return all entries, the oldest first.

    Raises:
        ValueError: a line is no entry; the message has its number.
    """
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            entry = json.loads(line)
            Spread.of(entry["ratios"])
            missing = {*SAME, "commit", "date", "unsound"} - entry.keys()
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: no entry of versus.py --quick ({error!r})") from None
        if missing:
            raise ValueError(f"{path}, line {number}: without {', '.join(sorted(missing))}")
        entries.append(entry)
    return entries


def words(verdict: Verdict) -> str:
    """Return a verdict in one sentence."""
    seen = f"this comparison finds a fall of {verdict.sees:.1%} nine times out of ten"
    if verdict.blind:
        more = f"; {verdict.rounds} rounds per entry would find one of {TO_SEE:.0%}" if verdict.rounds else ""
        seen += f", so one of {TO_SEE:.0%} may stay unseen{more}"
    if verdict.change is None:
        return f"no earlier entry of this machine, these versions and this workload to compare with; {seen}"
    what = f"{verdict.change:+.1%} ({verdict.least:+.1%} to {verdict.most:+.1%}) against the last {verdict.compared}"
    return f"{'FELL: ' if verdict.fell else ''}{what}; {seen}"


def table(entries: Sequence[Entry]) -> str:
    """Return all entries as a Markdown table, each with its comparison with those before it."""
    rows = []
    for number, entry in enumerate(entries):
        spread, verdict = Spread.of(entry["ratios"]), compare(entry, entries[:number])
        low, high = spread.interval()
        interval = f"{verdict.least:+.1%} to {verdict.most:+.1%}"
        notes = ["FELL"] * verdict.fell + [f"sees {verdict.sees:.0%} at best"] * verdict.blind
        notes += [f"unsound: {reason}" for reason in entry["unsound"]]
        rows.append([
            entry["date"][:16], entry["commit"], f"{entry['cpu']}, {entry['cores']} cores",
            ", ".join(str(entry["versions"].get(name)) for name in ("mlx", "mlx-lm")),
            ", ".join(f"{speed:.1f}" for speed in entry["tokens_per_s"].values()),
            f"{math.exp(spread.mean):.3f} ({low:.3f}-{high:.3f})",
            "-" if verdict.change is None else f"{verdict.change:+.1%} ({interval})", "; ".join(notes),
        ])  # fmt: skip
    speeds = "ours, mlx-lm (supervised tokens per second)"
    head = ["date", "commit", "processor", "mlx, mlx-lm", speeds, "ratio (90% interval)", "change", ""]
    return markdown(head, rows)


def main(argv: Sequence[str]) -> int:
    """Print the history; return 0, 1 with --check if the last entry is a fall or blind to one, 2 for a bad file."""
    args = options(
        __doc__,
        ("--history", HISTORY, "File of the entries."),
        ("--check", False, "Exit with 1 if the last entry fell, or could not have seen it."),
    ).parse_args(argv)
    try:
        entries = read_history(args.history)
    except ValueError as error:
        say(f"Error: {error}")
        return 2
    print(table(entries))
    if not entries:
        return 0
    verdict = compare(entries[-1], entries[:-1])
    print(f"\nLast entry: {words(verdict)}.")
    return int(args.check and (verdict.fell or verdict.blind))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
