"""How often is a run told rightly what became of it? Forty real runs, made to end in five ways, and their verdicts.

    PYTHONPATH=. nice python benchmarks/verdicts.py --out benchmarks/verdicts.json
    PYTHONPATH=. nice python benchmarks/verdicts.py --model smollm2 --rate 1e-3 --out smollm2.json --runs 10
    PYTHONPATH=. python benchmarks/verdicts.py --read benchmarks/verdicts.json      judge the kept evidence again

Each way has eight runs. The first four are on other data than the last four (other forms, other facts, other seeds): the
thresholds of reports/diagnosis.py may be chosen on the first four of each, and the score counts on the last four. What a run
was made to be is decided before it starts, by its settings and data. Without --model, the base is a very small one that this
script trains first (_small_base.py), and a run takes seconds. Each run's evidence is kept in the results, and a benchmark
that was stopped goes on where it ended.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _harness import options
from _small_base import write_small_base
from _verdict_sets import ARBITRARY, FOLLOWING, UNGUESSABLE, Row, arbitrary, following, repeated, unguessable

import mlx_lora
from mlx_lora.reports.diagnosis import (
    LEARNED,
    MEMORIZED,
    OVER_FITTED,
    TOO_FEW_STEPS,
    UNCHANGED,
    VerdictContext,
    diagnose,
    evidence_of,
)
from mlx_lora.reports.run_report import FACTS_FILE, read_records
from mlx_lora.trainer.evaluate import ROWS_FILE, RowLosses, read_rows_file

WAYS = (TOO_FEW_STEPS, LEARNED, OVER_FITTED, MEMORIZED, UNCHANGED)
EACH, TUNED_ON = 8, 4
ROWS_PER_STEP = 4
OPTIONS = (
    ("--model", str, "A base; default: a very small one that is trained here first."),
    ("--small-base", Path("build/small-base"), "Where that one is kept."),
    ("--rate", 1e-2, "A good learning rate for the base."),
    ("--runs", EACH * len(WAYS), "Of those that are missing, how many are made."),
    ("--out", Path("verdicts.json"), "File of the evidence."),
    ("--read", Path, "Judge the evidence in this file again, and train nothing."),
)


@dataclass(frozen=True)
class Made:
    """A run that is made to end in one way: its number among those of its way, its data, and its settings."""

    way: str
    number: int
    name: str
    data: dict[str, list[Row]]
    steps: int
    rate: float
    every: int

    @property
    def tuned_on(self) -> bool:
        """Whether the thresholds may follow this run."""
        return self.number < TUNED_ON


def made_runs(rate: float) -> Iterator[Made]:
    """Yield the forty runs for a good rate, those of one number together, so that a stopped benchmark has some of each way."""
    follows, facts = list(FOLLOWING), list(ARBITRARY)
    for number in range(EACH):
        half = 2 * (number // TUNED_ON)  # the first four have two forms of each kind, the last four the other two
        form, fact, r = follows[half + number % 2], facts[half + number % 2], random.Random(number)
        seed = 100 + number
        either = following(form, seed, 48, 12) if number % 4 < 2 else arbitrary(fact, seed, 24, 10)
        steps = (2, 4, 6, 9)[number % 4]
        yield Made(TOO_FEW_STEPS, number, form, either, steps, rate * r.uniform(0.2, 0.6), max(1, steps // 2))
        yield Made(LEARNED, number, form, following(form, seed, 192, 12), 48, rate * r.uniform(0.4, 0.8), 8)
        signs, steps = list(UNGUESSABLE)[half + number % 2], (56, 64, 72, 80)[number % 4]
        data = unguessable(signs, seed, 8, 10)
        yield Made(OVER_FITTED, number, signs, data, steps, rate * r.uniform(2, 3), steps // 8)
        again = repeated(either, seed, 10)
        yield Made(MEMORIZED, number, form, again, 45, rate * r.uniform(0.6, 1.2), 15)
        yield Made(UNCHANGED, number, form, either, 42, rate * 10 ** r.uniform(-4, -3), 21)


def near_duplicates(data: dict[str, list[Row]]) -> int:
    """Return the held-out rows of which a training row has at least 0.8 of the five-letter pieces (Jaccard)."""

    def pieces(row: Row) -> set[str]:
        text = " ".join(f"{row['prompt']} {row['completion']}".lower().split())
        return {text[n : n + 5] for n in range(len(text) - 4)}

    trained = [pieces(row) for row in data["train"]]
    held_out = map(pieces, data["valid"])
    return sum(any(len(own & other) >= 0.8 * len(own | other) for other in trained) for own in held_out)


def run_one(base: mlx_lora.Base, made: Made, folder: Path) -> dict[str, Any]:
    """Train a run, and return its evidence as JSON values."""
    begun = time.perf_counter()
    mlx_lora.train(
        base, made.data, folder, iters=made.steps, learning_rate=made.rate, batch_size=ROWS_PER_STEP, rank=8,
        seed=made.number, steps_per_eval=made.every, val_batches=-1, steps_per_report=max(1, made.every // 3), save_every=0,
        sample_tokens=6, kernels="mlx", progress=False,
    )  # fmt: skip
    records = read_records(folder / "metrics.jsonl")
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    rows = read_rows_file(folder / ROWS_FILE)
    kept = sorted({0, max(rows), min(rows, key=lambda step: rows[step].loss)}) if rows else []
    return {
        "way": made.way, "number": made.number, "data": made.name, "steps": made.steps, "rate": made.rate,
        "losses": [[r["step"], round(r["loss"], 4)] for r in records if r["loss"] is not None],
        "held_out": [[r["step"], round(r["val_loss"], 5)] for r in records if r["val_loss"] is not None],
        "rows": {step: [np.round(rows[step].sums, 3).tolist(), rows[step].tokens.tolist()] for step in kept},
        "texts": [[one["before"], one["after"]] for one in facts["samples"]],
        "held_out_rows": len(made.data["valid"]), "near_duplicates": near_duplicates(made.data),
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def judged(found: dict[str, Any]) -> str:
    """Return what a run's evidence is named."""
    records = [{"step": step, "loss": loss, "val_loss": None} for step, loss in found["losses"]]
    records += [{"step": step, "loss": None, "val_loss": loss} for step, loss in found["held_out"]]
    rows = {int(step): RowLosses(np.array(sums), np.array(tokens)) for step, (sums, tokens) in found["rows"].items()}
    texts = [(before, after) for before, after in found["texts"]]
    context = VerdictContext(
        None, rows, texts, held_out_rows=found["held_out_rows"], near_duplicates=found["near_duplicates"]
    )
    return diagnose(evidence_of(records, found["held_out"][-1][0], context)).name


def figures_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many runs are named rightly, of the half that thresholds were chosen on and of the other."""
    figures: dict[str, Any] = {}
    for half, belongs in (("tuned on", True), ("not tuned on", False)):
        own = [one for one in runs if (one["number"] < TUNED_ON) is belongs]
        right = Counter(one["way"] for one in own if judged(one) == one["way"])
        total = Counter(one["way"] for one in own)
        figures[half] = {"right": sum(right.values()), "of": len(own), "ways": {w: [right[w], total[w]] for w in WAYS}}
    return figures


def report(runs: list[dict[str, Any]]) -> None:
    """Print how many runs are named rightly, and every run that is not."""
    for half, one in figures_of(runs).items():
        print(f"{half}: {one['right']} of {one['of']} named rightly {one['ways']}")
    for one in runs:
        if judged(one) != one["way"]:
            curve = " ".join(f"{step}:{loss:.3f}" for step, loss in one["held_out"])
            print(f"  made to be {one['way']} #{one['number']} ({one['data']}): named {judged(one)}; held out {curve}")


def main(argv: Sequence[str]) -> None:
    """Make the runs that are missing, or judge kept ones again."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    if args.read:
        report(json.loads(args.read.read_text(encoding="utf-8"))["runs"])
        return
    base = mlx_lora.load(args.model or str(write_small_base(args.small_base)))
    runs = json.loads(args.out.read_text(encoding="utf-8"))["runs"] if args.out.exists() else []
    done = {(one["way"], one["number"]) for one in runs}
    for made in [one for one in made_runs(args.rate) if (one.way, one.number) not in done][: args.runs]:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run_one(base, made, Path(folder) / "run"))
        print(f"{len(runs)}: made to be {made.way}, named {judged(runs[-1])}, {runs[-1]['seconds']} s", flush=True)
        facts = {"model": args.model or "small base", "version": mlx_lora.__version__, "rate": args.rate}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**facts, "figures": figures_of(runs), "runs": runs}) + "\n", encoding="utf-8")
    report(runs)


if __name__ == "__main__":
    main(sys.argv[1:])
