"""Compare the speed and memory of trainers on one machine, and check that they do the same work.

    python benchmarks/versus.py --model DIR --data FILE.json --seconds 120 --out versus.json
    python benchmarks/versus.py --model DIR --data FILE.json --sides mlx_lora,mlx-lm,peft-grouped --steps 20
    python benchmarks/versus.py --quick --check          the gate: fixed rows against mlx-lm, compared with history.jsonl
    python benchmarks/versus.py --objective dpo --model DIR --data PAIRS.json --rows 24 --passes 1 --rounds 3

Every run is a new process; rounds alternate (A B A B ...), so that drift of the machine affects all sides; medians and
extremes are printed. All have the same folder, rows, rank, layers, initial factors and learning rate. Before timing,
every side computes its loss on the same 8 rows with the same perturbed adapter; sums and counts must agree. On
preferences every side takes the same first steps on the same pairs instead, and these must agree.
docs/benchmarks.md explains what is counted. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from _environment import environment
from _figures import coarser, paired_ratio, spread
from _pair_figures import Disagreement, check_curves, summarize_pairs, wrong_accuracies
from _pair_sides import PAIR_SIDES, check_curve, prepare_pairs, time_pairs, variant_of
from _pair_table import render_pairs
from _processes import ChildFailed
from _quick import add_arguments, finish, fix_arguments, load_before, prepare_quick
from _sides import OURS, SIDES, Bench, Side, check_loss, prepare, time_run, why_skipped
from _table import render

TOLERANCE = 1e-3  # relative, of the loss sums
FIGURES = (
    "supervised_tokens_per_s",
    "steady_tokens_per_s",
    "whole_tokens_per_s",
    "tokens_per_s",
    "tokens_per_cpu_s",
    "padding_fraction",
    "peak_allocator_bytes",
    "peak_process_bytes",
    "first_step_s",
    "counted_steps",
    "steady_steps",
    "shapes",
    "supervised_tokens_per_step",
    "positions_per_step",
)
RATIOS = ("supervised_tokens_per_s", "steady_tokens_per_s", "peak_allocator_bytes", "peak_process_bytes")
# By objective: the sides that are compared, and the one that the others are compared with.
DEFAULT_SIDES = {"sft": f"{OURS},mlx-lm", "dpo": ",".join(name for name in PAIR_SIDES if name != f"{OURS}-pairs")}
DEFAULT_REFERENCE = {"sft": "mlx-lm", "dpo": OURS}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", help="Folder of the base model, as mlx-lm reads it.")
    parser.add_argument("--data", help="Data file: chats, instructions or text records; with dpo: preference pairs.")
    add_arguments(parser)
    parser.add_argument("--objective", choices=("sft", "dpo"), default="sft")
    parser.add_argument(
        "--sides", help=f"Separated by commas: {', '.join(SIDES)}; with dpo: {', '.join(PAIR_SIDES)}, and --variant's."
    )
    parser.add_argument(
        "--reference", help="The side that ratios are relative to; with dpo: whose ratio to each other is shown."
    )
    parser.add_argument("--rounds", type=int, help="Of every side (default 3, with --quick 5).")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="Steps per run, at least 2.")
    length.add_argument("--seconds", type=float, help="Seconds per run after its first step (default 60).")
    length.add_argument("--passes", type=int, help="With dpo: passes over the pairs per run.")
    parser.add_argument(
        "--rows", type=int, default=0, help="Use this many rows or pairs, spaced evenly by length; 0: all."
    )
    parser.add_argument("--as-text", action="store_true", help="Train on all tokens of each row as plain text.")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--scale", type=float, default=2.0, help="alpha / rank, for every side.")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.1, help="With dpo: DPO's beta.")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="With dpo: of every side's AdamW.")
    parser.add_argument("--check-pairs", type=int, default=4, help="With dpo: pairs of the batch that is checked.")
    parser.add_argument(
        "--batch-size", type=int, default=None, help="Rows per step of mlx-lm and peft-padded (4), pairs with dpo (2)."
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=1024, help="Positions per step of ours and peft's other sides."
    )
    parser.add_argument("--max-seq-length", type=int, default=2048, help="Longer rows are skipped for all sides.")
    parser.add_argument("--grad-checkpoint", action="store_true", help="For every side.")
    parser.add_argument("--ours", default="", help="Extra flags of `python -m mlx_lora.train`, in one string.")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help=f"With dpo: one more side, {OURS}-NAME, ours with these flags.",
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="SIDE=PATH", help="Interpreter of a side with other packages."
    )
    parser.add_argument(
        "--torch-device",
        choices=("auto", "mps", "cuda", "cpu"),
        default="auto",
        help="Where torch's sides compute (default: the first of mps, cuda, cpu that is there).",
    )
    parser.add_argument(
        "--torch-dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="What they compute in (default: as ours, bfloat16 on a GPU and float32 on a CPU).",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the factors; round n shuffles with seed n.")
    parser.add_argument("--timeout", type=float, default=7200, help="Seconds allowed for each process.")
    parser.add_argument("--out", help="JSON file of everything, raw rounds included.")
    parser.add_argument("--keep", help="Folder to keep jobs, logs and results in (default: a temporary one).")
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
    if args.steps is None and args.seconds is None and args.passes is None:
        args.seconds = 60.0


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


def check_agreement(checks: dict[str, dict[str, Any]], reference: str) -> float:
    """Compare every side's check with the reference's, and return the widest tolerance that was used.

    Raises:
        Disagreement: token ids or counts differ, or loss sums differ by more than the tolerance.
    """
    wanted, problems, widest = checks[reference], [], TOLERANCE
    for name, found in checks.items():
        if not found["same_ids"]:
            problems.append(f"{name}: {'; '.join(found['notes'])}")
        if found["count"] != wanted["count"]:
            problems.append(f"{name} trains {found['count']} tokens of the check rows, {reference} {wanted['count']}")
        tolerance = TOLERANCE * coarser(found, wanted)
        widest = max(widest, tolerance)
        apart = abs(found["loss_sum"] - wanted["loss_sum"]) / abs(wanted["loss_sum"])
        if not apart <= tolerance:  # NaN too
            problems.append(
                f"{name}: loss sum {found['loss_sum']:.4f}, {reference} {wanted['loss_sum']:.4f}, "
                f"{apart:.1e} apart, {tolerance:g} allowed"
            )
    if problems:
        raise Disagreement("; ".join(problems))
    return widest


def summarize(rounds: dict[str, list[dict[str, Any]]], reference: str) -> dict[str, Any]:
    """Return spreads of every figure per side, and of the round-by-round ratios to the reference."""
    summary = {}
    for name, runs in rounds.items():
        figures = {key: spread([run[key] for run in runs]) for key in FIGURES}
        ratios = {
            key: paired_ratio([run[key] for run in runs], [run[key] for run in rounds[reference]]) for key in RATIOS
        }
        summary[name] = {**figures, "ratio": ratios}
    return summary


def make_bench(args: argparse.Namespace, folder: Path) -> Bench:
    """Return the common settings of all sides."""
    settings = {
        "model": args.model,
        "rank": args.rank,
        "scale": args.scale,
        "learning_rate": args.learning_rate,
        "batch_size": args.batch_size,
        "batch_tokens": args.batch_tokens,
        "max_seq_length": args.max_seq_length,
        "grad_checkpoint": args.grad_checkpoint,
        "beta": args.beta,
        "weight_decay": args.weight_decay,
        "check_pairs": args.check_pairs,
        "torch_device": args.torch_device,
        "torch_dtype": args.torch_dtype,
    }
    return Bench(
        folder, settings, args.steps, args.seconds, args.ours, args.timeout, args.pythons, args.passes, args.quick
    )


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare, check, time, and return the whole result.

    Raises:
        Disagreement: the losses differ; nothing has been timed.
        ChildFailed: a side ended with an error.
    """
    if args.quick:
        say("the fixed model and rows")
        made = prepare_quick(make_bench(args, folder))
        args.model, args.data = made["model"], made["data"]
    bench = make_bench(args, folder)
    facts = prepare(bench, args.data, args.rows, args.as_text, args.seed)
    bench = replace(bench, computes=facts["computes"])
    sides, skipped = split_sides(args, facts["quantized"])
    checks = {}
    for side in sides:
        say(f"check {side.name}: loss of 8 rows")
        checks[side.name] = check_loss(bench, side, folder / "perturbed.safetensors")
    tolerance = check_agreement(checks, args.reference)
    rounds: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for number in range(args.rounds):
        turns = sides[::-1] if args.quick and number % 2 else sides  # no side is always the first
        for side in turns:
            rounds[side.name].append(timed(bench, side, number, args.rounds))
    return {
        **described(args, facts),
        "checks": checks,
        "tolerance": tolerance,
        "regimes": {side.name: side.regime for side in sides},
        "skipped": skipped,
        "summary": summarize(rounds, args.reference),
        "rounds": rounds,
    }


def compare_pairs(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Do the same on preference pairs.

    Raises:
        Disagreement: the sides do not take the same steps; nothing has been timed.
        ChildFailed: a side ended with an error.
    """
    bench = make_bench(args, folder)
    facts = prepare_pairs(bench, args.data, args.rows, args.seed)
    bench = replace(bench, computes=facts["computes"])
    sides, skipped = split_sides(args, facts["quantized"])
    checks: dict[str, dict[str, Any]] = {}
    for side in list(sides):
        with failing(args, side, sides, skipped):
            checks[side.name] = check_curve(bench, side)
            say(f"check {side.name}: losses {', '.join(f'{loss:.4f}' for loss in checks[side.name]['losses'])}")
    check_curves(checks, args.reference)
    rounds: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for number in range(args.rounds):
        for side in list(sides):
            with failing(args, side, sides, skipped):
                run = time_pairs(bench, side, number, facts["pairs"])
                rounds[side.name].append(run)
                say(
                    f"round {number + 1}/{args.rounds} {side.name}: {run['pairs_per_s']:.3f} pairs/s, "
                    f"{run['pairs_per_s_with_reference']:.3f} with the reference, over {run['counted_steps']} steps, "
                    f"{run['peak_process_bytes'] / 1e9:.2f} GB RSS"
                )
    rounds = {side.name: rounds[side.name] for side in sides}
    return {
        **described(args, facts),
        "checks": checks,
        "accuracies": wrong_accuracies(checks, args.reference),
        "regimes": {side.name: {"regime": side.regime, "reference": side.reference} for side in sides},
        "skipped": skipped,
        "summary": summarize_pairs(rounds, args.reference),
        "rounds": rounds,
    }


@contextmanager
def failing(args: argparse.Namespace, side: Side, sides: list[Side], skipped: dict[str, str]) -> Iterator[None]:
    """Leave a side out, with the reason, if it fails in this context; the reference must not fail."""
    try:
        yield
    except ChildFailed as error:
        if side.name == args.reference:
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


def described(args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """Return a result's facts about the machine, the command and the data."""
    given = {name: value for name, value in vars(args).items() if name != "table"}
    command = [sys.executable, *sys.argv]
    return {**environment(), "arguments": given, "command_line": command, "prepared": facts}


def timed(bench: Bench, side: Side, number: int, total: int) -> dict[str, Any]:
    """Time one run and print its result."""
    run = time_run(bench, side, number)
    say(
        f"round {number + 1}/{total} {side.name}: {run['supervised_tokens_per_s']:.1f} supervised tokens/s over "
        f"{run['counted_steps']} steps, {(run['peak_allocator_bytes'] or run['peak_process_bytes']) / 1e9:.2f} GB"
    )
    return run


def say(text: str) -> None:
    """Print progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Run the comparison; return 0, or 1 if a side failed, the losses disagree or the gate of --quick stays shut."""
    args, load = arguments(argv), load_before()
    args.begun_at = environment()["commit"] if args.quick else None
    with tempfile.TemporaryDirectory(prefix="versus-") as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = compare(args, folder) if args.objective == "sft" else compare_pairs(args, folder)
        except (Disagreement, ChildFailed) as error:
            say(f"Error: {error}")
            return 1
    print(render(result) if args.objective == "sft" else render_pairs(result))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
    keys = ("date", "commit", "versions", "skipped", "summary")
    print(json.dumps({key: result[key] for key in keys}))
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
