"""Compare the speed and memory of trainers on one machine, and check that they do the same work.

    python benchmarks/versus.py --model DIR --data FILE.json --seconds 120 --out versus.json
    python benchmarks/versus.py --model DIR --data FILE.json --sides mlx_lora,mlx-lm,peft-grouped --steps 20
    python benchmarks/versus.py --quick --check          the gate: fixed rows against mlx-lm, compared with history.jsonl
    python benchmarks/versus.py --objective dpo --model DIR --data PAIRS.json --rows 24 --passes 1 --rounds 3

Every run is a new process; rounds alternate (A B A B ...), so that drift of the machine affects all sides; medians and
extremes are printed. All have the same folder, rows, rank, layers, initial factors and learning rate. Before timing,
every side computes its loss on the same 8 rows with the same perturbed adapter; sums and counts must agree. On
preferences every side takes the same first steps on the same pairs instead, and these must agree.
docs/development/benchmarks.md explains what is counted. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from _comparison_table import PAIR_FIGURES, PAIR_RATIOS, ROW_FIGURES, ROW_RATIOS, render
from _figures import check_agreement, check_curves, summarize, wrong_accuracies
from _harness import ChildFailed, Disagreement, environment, options, record, say, take_turns
from _quick import GATE_OPTIONS, finish, fix_arguments, load_before
from _sides import OURS, PAIR_SIDES, SIDES, Bench, Side, prepare, variant_of, why_skipped

from _sides import check_curve, check_loss, time_pairs, time_run  # isort: skip

# By objective: the sides that are compared, and the one that the others are compared with.
DEFAULT_SIDES = {"sft": f"{OURS},mlx-lm", "dpo": ",".join(name for name in PAIR_SIDES if name != f"{OURS}-pairs")}
DEFAULT_REFERENCE = {"sft": "mlx-lm", "dpo": OURS}
# What every side is told.
TOLD = (
    "model", "rank", "scale", "learning_rate", "batch_size", "batch_tokens", "max_seq_length", "grad_checkpoint", "beta",
    "weight_decay", "check_pairs", "torch_device", "torch_dtype", "steps", "seconds", "passes", "ours", "timeout", "quick",
)  # fmt: skip
DEVICES, DTYPES = ("auto", "mps", "cuda", "cpu"), ("auto", "float32", "bfloat16")
OPTIONS = (
    ("--model", str, "Folder of the base model, as mlx-lm reads it."),
    ("--data", str, "Data file: chats, instructions or text records; with dpo: preference pairs."),
    *GATE_OPTIONS,
    ("--objective", "sft", "What is trained.", ("sft", "dpo")),
    ("--sides", str, f"Separated by commas: {', '.join(SIDES)}; with dpo: {', '.join(PAIR_SIDES)}, and --variant's."),
    ("--reference", str, "The side that ratios are relative to; with dpo: whose ratio to each other is shown."),
    ("--rounds", int, "Of every side (default 3, with --quick 5)."),
    ("--steps", int, "Steps per run, at least 2."),
    ("--seconds", float, "Seconds per run after its first step (default 60)."),
    ("--passes", int, "With dpo: passes over the pairs per run."),
    ("--rows", 0, "Use this many rows or pairs, spaced evenly by length; 0: all."),
    ("--as-text", False, "Train on all tokens of each row as plain text."),
    ("--rank", 8, "Of every side's adapter."),
    ("--scale", 2.0, "alpha / rank, for every side."),
    ("--learning-rate", 1e-5, "Of every side, constant."),
    ("--beta", 0.1, "With dpo: DPO's beta."),
    ("--weight-decay", 0.01, "With dpo: of every side's AdamW."),
    ("--check-pairs", 4, "With dpo: pairs of the batch that is checked."),
    ("--batch-size", int, "Rows per step of mlx-lm and peft-padded (4), pairs with dpo (2)."),
    ("--batch-tokens", 1024, "Positions per step of ours and peft's other sides."),
    ("--max-seq-length", 2048, "Longer rows are skipped for all sides."),
    ("--grad-checkpoint", False, "For every side."),
    ("--ours", "", "Extra flags of `python -m mlx_lora.train`, in one string."),
    ("--variant", (), f"NAME=FLAGS, with dpo: one more side, {OURS}-NAME, ours with these flags."),
    ("--python", (), "SIDE=PATH: interpreter of a side with other packages."),
    ("--torch-device", "auto", "Where torch's sides compute (default: the first that is there).", DEVICES),
    ("--torch-dtype", "auto", "What they compute in (default: bfloat16 on a GPU, as ours).", DTYPES),
    ("--seed", 0, "Seed of the factors; round n shuffles with seed n."),
    ("--timeout", 7200.0, "Seconds allowed for each process."),
    ("--out", str, "JSON file of everything, raw rounds included."),
    ("--keep", str, "Folder to keep jobs, logs and results in (default: a temporary one)."),
)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__, *OPTIONS)
    args = parser.parse_args(argv)
    try:
        fix_arguments(args, argv)
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in what depends on the objective.

    Raises:
        ValueError: arguments that do not go together, or names that are not known.
    """
    on_pairs = args.objective == "dpo"
    args.table = sides_of(args)
    args.sides = [name.strip() for name in (args.sides or DEFAULT_SIDES[args.objective]).split(",")]
    args.sides += [side.name for side in args.table.values() if on_pairs and side.flags and side.name not in args.sides]
    args.reference = args.reference or DEFAULT_REFERENCE[args.objective]
    if unknown := [name for name in [*args.sides, args.reference] if name not in args.table]:
        raise ValueError(f"--sides {', '.join(unknown)}: not one of {', '.join(args.table)}")
    if args.reference not in args.sides:
        raise ValueError(f"--reference {args.reference}: not among --sides {','.join(args.sides)}")
    lengths = [name for name in ("steps", "seconds", "passes") if getattr(args, name) is not None]
    if len(lengths) > 1:
        raise ValueError(f"--{' and --'.join(lengths)}: give one of them")
    if args.steps is not None and args.steps < 2:
        raise ValueError(f"--steps {args.steps}: the first step is not counted; give 2 or more")
    if args.passes is not None and (not on_pairs or args.passes < 1):
        raise ValueError(f"--passes {args.passes}: only with --objective dpo, and 1 or more")
    if args.check_pairs < 1:
        raise ValueError(f"--check-pairs {args.check_pairs}: give 1 or more")
    if args.as_text and on_pairs:
        raise ValueError("--as-text: only with --objective sft")
    args.batch_size = args.batch_size or (2 if on_pairs else 4)
    args.pythons = dict(pair.split("=", 1) for pair in args.python if "=" in pair)
    known = {*args.table, *(side.peer for side in args.table.values() if side.peer)}
    if len(args.pythons) != len(args.python) or set(args.pythons) - known:
        raise ValueError(f"--python {' '.join(args.python)}: write SIDE=PATH, SIDE one of {', '.join(sorted(known))}")
    args.seconds = args.seconds if lengths else 60.0


def sides_of(args: argparse.Namespace) -> dict[str, Side]:
    """Return the sides of the objective by name.

    Raises:
        ValueError: a --variant that is malformed, or is given with --objective sft.
    """
    if args.objective == "sft":
        if args.variant:
            raise ValueError(f"--variant {args.variant[0]}: only with --objective dpo; --ours adds flags to ours")
        return dict(SIDES)
    found = dict(PAIR_SIDES)
    for text in args.variant:
        try:
            side = variant_of(text)
        except ValueError:
            raise ValueError(f"--variant {text}: write NAME=FLAGS, as in wide='--batch-tokens 4096'") from None
        if side.name in found:
            raise ValueError(f"--variant {text}: there is a side {side.name} already")
        found[side.name] = side
    return found


def make_bench(args: argparse.Namespace, folder: Path) -> Bench:
    """Return the common settings of all sides."""
    return Bench(folder, {name: getattr(args, name) for name in TOLD}, args.pythons)


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare, check, time, and return the whole result.

    Raises:
        Disagreement: the sides do other work; nothing has been timed.
        ChildFailed: a side ended with an error.
    """
    if args.quick:
        say("the fixed model and rows")
        made = prepare(make_bench(args, folder), "quick")
        args.model, args.data = made["model"], made["data"]
    on_pairs, bench = args.objective == "dpo", make_bench(args, folder)
    what = {"rows": args.rows, "as_text": args.as_text, "seed": args.seed, "data": args.data}
    facts = prepare(bench, "pairs" if on_pairs else "rows", **what)
    bench = replace(bench, computes=facts["computes"])
    sides, skipped = split_sides(args, facts["quantized"])
    checks: dict[str, dict[str, Any]] = {}
    for side in list(sides):
        with failing(args, side, sides, skipped):
            checks[side.name] = found = (check_curve if on_pairs else check_loss)(bench, side)
            told = found["losses"] if on_pairs else [found["loss_sum"]]
            say(f"check {side.name}: loss {', '.join(f'{loss:.4f}' for loss in told)}")
    tolerance = (check_curves if on_pairs else check_agreement)(checks, args.reference)

    def turn(side: Side, number: int) -> dict[str, Any]:
        run: dict[str, Any] = {}
        if side in sides:
            with failing(args, side, sides, skipped):
                pairs = [facts["pairs"]] if on_pairs else []
                run = (time_pairs if on_pairs else time_run)(bench, side, number - 1, *pairs)
                tell(side.name, run, f"round {number}/{args.rounds}")
        return run

    rounds = take_turns({side.name: partial(turn, side) for side in sides}, args.rounds, swap=args.quick)
    rounds = {side.name: rounds[side.name] for side in sides}
    figures, ratios = (PAIR_FIGURES, PAIR_RATIOS) if on_pairs else (ROW_FIGURES, ROW_RATIOS)
    return {
        **environment(),
        "arguments": {name: value for name, value in vars(args).items() if name != "table"},
        "command_line": [sys.executable, *sys.argv],
        "prepared": facts,
        "checks": checks,
        "tolerance": tolerance,
        "accuracies": wrong_accuracies(checks, args.reference) if on_pairs else [],
        "regimes": {side.name: {"regime": side.regime, "reference": side.reference} for side in sides},
        "skipped": skipped,
        "summary": summarize(rounds, args.reference, figures, ratios),
        "rounds": rounds,
    }


def tell(name: str, run: dict[str, Any], where: str) -> None:
    """Print a run's result as progress."""
    speed = f"{run['supervised_tokens_per_s']:.1f} supervised tokens/s"
    if "pairs_per_s" in run:
        speed = f"{run['pairs_per_s']:.3f} pairs/s, {run['pairs_per_s_with_reference']:.3f} with the reference"
    peak = run["peak_allocator_bytes"] or run["peak_process_bytes"]
    say(f"{where} {name}: {speed}, over {run['counted_steps']} steps, {peak / 1e9:.2f} GB")


@contextmanager
def failing(args: argparse.Namespace, side: Side, sides: list[Side], skipped: dict[str, str]) -> Iterator[None]:
    """With dpo, leave a side out, with the reason, if it fails in this context; the reference must not fail."""
    try:
        yield
    except ChildFailed as error:
        if args.objective == "sft" or side.name == args.reference:
            raise
        say(f"{side.name} is left out: {error}")
        sides.remove(side)
        skipped[side.name] = f"failed: {str(error).splitlines()[-1].strip()}"


def split_sides(args: argparse.Namespace, quantized: bool) -> tuple[list[Side], dict[str, str]]:
    """Return the sides that run here, and why the others do not.

    Raises:
        ChildFailed: the reference cannot run.
    """
    reasons = {name: why_skipped(args.table[name], quantized, args.pythons) for name in args.sides}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    if args.reference in skipped:
        raise ChildFailed(f"--reference {args.reference}: {skipped[args.reference]}")
    return [args.table[name] for name in args.sides if name not in skipped], skipped


def main(argv: Sequence[str]) -> int:
    """Run the comparison; return 0, or 1 if a side failed, the losses disagree or the gate of --quick stays shut."""
    args, load = arguments(argv), load_before()
    args.begun_at = environment()["commit"] if args.quick else None
    with tempfile.TemporaryDirectory(prefix="versus-") as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = compare(args, folder)
        except (Disagreement, ChildFailed) as error:
            say(f"Error: {error}")
            return 1
    print(render(result))
    record(result, args.out, ("date", "commit", "versions", "skipped", "summary"))
    if not args.quick:
        return 0
    try:
        told, code = finish(args, result, load)
    except ValueError as error:
        say(f"Error: {error}")
        return 1
    say(told)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
