"""versus.py --quick: fixed rows, a fixed model and one thread, as an entry of the history (history.py).

The model is the first eight blocks of SmolLM2-135M-Instruct in float32, from the GGUF file whose checksum we pin; the
rows are 24 of the tutor and customer-service recipes. Every round takes the same steps, in fresh processes, and the side
that goes first alternates. With one BLAS thread a process is at work all the time, so on a CPU a side's speed is taken per
second of its own processor time, which other programs disturb far less than the clock; how busy the machine was is noted
all the same, and a round of a busy machine is not recorded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _harness import REPOSITORY
from _sides import OURS
from history import HISTORY, compare, read_history, words

PEER = "mlx-lm"
ROUNDS, STEPS, ROWS = 5, 5, 24
# What --quick fixes.
FIXED = {
    "sides": f"{OURS},{PEER}", "reference": PEER, "steps": STEPS, "rows": ROWS, "batch_tokens": 1024, "batch_size": 4,
    "rank": 8, "scale": 2.0, "learning_rate": 1e-5, "max_seq_length": 512, "seed": 0,
}  # fmt: skip
THREADS = "1"
LEAST_BUSY = 0.9  # processor seconds per second that a side gets on a quiet machine
MOST_LOAD = 0.25  # processes per core that want one before we start


# Options of versus.py; with --quick, only these and a few others are free.
GATE_OPTIONS = (
    ("--quick", False, f"{ROUNDS} rounds on fixed rows; see docs/development/benchmarks.md."),
    ("--record", False, "With --quick: add the result to the history."),
    ("--check", False, "With --quick: exit with 1 after a fall, or if one of 5%% may have stayed unseen."),
    ("--force", False, "With --record: record a busy machine or a changed tree too."),
    ("--history", HISTORY, "With --quick: file of the entries."),
)
FREE = {*(flag for flag, *_ in GATE_OPTIONS), "--rounds", "--out", "--keep", "--timeout", "--ours"}


def fix_arguments(args: argparse.Namespace, given: Sequence[str]) -> None:
    """Set what --quick fixes.

    Raises:
        ValueError: an option that it fixes was given, or one of the gate's without it.
    """
    if not args.quick:
        if alone := [name for name in ("record", "check", "force") if getattr(args, name)]:
            raise ValueError(f"--{alone[0]}: only with --quick")
        if args.rounds is None:
            args.rounds = 3
        if not (args.model and args.data):
            raise ValueError("--model and --data are required, or --quick, which has its own")
        return
    names = {word.split("=")[0] for word in given if word.startswith("--")}
    if names - FREE:
        raise ValueError(f"{', '.join(sorted(names - FREE))}: --quick fixes it; leave it out")
    if args.ours and args.record and not args.force:
        raise ValueError("--ours with --record: the history is of the defaults; leave out one of the two")
    for name, value in FIXED.items():
        setattr(args, name, value)
    args.rounds = args.rounds or ROUNDS
    if args.rounds < 2:
        raise ValueError(f"--rounds {args.rounds}: a spread needs 2")
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = THREADS


def load_before() -> float:
    """Return how many processes wanted a core in the last minute."""
    return os.getloadavg()[0]


def entry_of(result: dict[str, Any], load: float) -> dict[str, Any]:
    """Return a result of versus.py as an entry of the history; `load` was measured before it began."""
    rounds, facts = result["rounds"], result["prepared"]
    backend = facts["device"]["backend"]
    by_cpu = backend == "cpu" and all(run["tokens_per_cpu_s"] for runs in rounds.values() for run in runs)
    by = "tokens_per_cpu_s" if by_cpu else "supervised_tokens_per_s"
    clock, ratios = _ratios(rounds, "supervised_tokens_per_s"), _ratios(rounds, by)
    return {
        "date": result["date"], "commit": result["commit"], "cores": result["cores"], "backend": backend, "threads": THREADS,
        "cpu": cpu_name() if backend == "cpu" else facts["device"]["name"],
        "versions": {name: result["versions"][name] for name in ("mlx", "mlx-lm", "python", "scipy-openblas32")},
        "workload": {"model": facts["model_fingerprint"][:16], "rows": facts["rows_fingerprint"][:16], **FIXED},
        "by": by, "ratio": round(_middle(ratios), 4), "ratios": [round(ratio, 4) for ratio in ratios],
        "clock_ratio": round(_middle(clock), 4), "clock_ratios": [round(ratio, 4) for ratio in clock],
        "tokens_per_s": {name: round(_middle([run[by] for run in runs]), 2) for name, runs in rounds.items()},
        "losses": {name: check["loss_sum"] for name, check in result["checks"].items()},
        "tolerance": result["tolerance"], "load": round(load, 2),
        "busy": {name: _share(runs) for name, runs in rounds.items()}, "unsound": unsound(result, load),
    }  # fmt: skip


def unsound(result: dict[str, Any], load: float) -> list[str]:
    """Return why a comparison says little: other programs had the cores, or the tree is no commit."""
    found = []
    if load > (most := MOST_LOAD * result["cores"]):
        found.append(f"load average {load:.1f} before the start, {most:g} allowed")
    if result["prepared"]["device"]["backend"] == "cpu":
        shares = {name: _share(runs) for name, runs in result["rounds"].items()}
        few = {name: share for name, share in shares.items() if share is not None and share < LEAST_BUSY}
        found += [f"{name} got {share:.0%} of a core, {LEAST_BUSY:.0%} needed" for name, share in few.items()]
    if changed_tree():
        found.append("the checkout has changes that are not committed")
    if result["arguments"].get("begun_at") not in (None, result["commit"]):
        found.append(f"the checkout was at {result['arguments']['begun_at']} when it began")
    if result["arguments"].get("ours"):
        found.append(f"--ours {result['arguments']['ours']}")
    return found


def changed_tree() -> bool:
    """Tell whether the checkout differs from its commit, the history itself aside."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results/history.jsonl"]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return told.returncode != 0 or bool(told.stdout.strip())


def cpu_name() -> str:
    """Return the processor's name."""
    if sys.platform == "darwin":
        told = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return told.stdout.strip() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def finish(args: argparse.Namespace, result: dict[str, Any], load: float) -> tuple[str, int]:
    """Compare with the history, and record if that was asked for and is sound; return what to say, and the exit code.

    Raises:
        ValueError: the history cannot be read.
    """
    entry, earlier = entry_of(result, load), read_history(args.history)
    verdict = compare(entry, earlier)
    per = "processor second" if entry["by"] == "tokens_per_cpu_s" else "second"
    speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in entry["tokens_per_s"].items())
    lines = [
        f"Supervised tokens per {per}: {speeds}; ratio {entry['ratio']:.3f}, rounds {', '.join(map(str, entry['ratios']))}; "
        f"by the clock {entry['clock_ratio']:.3f}, rounds {', '.join(map(str, entry['clock_ratios']))}",
        f"Against {args.history.name}: {words(verdict)}.",
    ]
    lines += [f"Unsound: {reason}" for reason in entry["unsound"]]
    alone = verdict.change is None and not args.record  # there is nothing that a fall could have shown against
    code = int(args.check and (verdict.fell or verdict.blind or alone))
    if args.check and alone:
        lines.append("Nothing to compare with: run it with --record at an earlier commit of this machine first")
    if args.record and entry["unsound"] and not args.force:
        lines.append("Not recorded; make the machine quiet and commit first, or give --force, which marks the entry")
        code = 1
    elif args.record:
        with args.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        lines.append(f"Recorded in {args.history}")
    return "\n".join(lines), code


def _ratios(rounds: dict[str, list[dict[str, Any]]], key: str) -> list[float]:
    return [ours[key] / peer[key] for ours, peer in zip(rounds[OURS], rounds[PEER], strict=True)]


def _middle(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def _share(runs: Sequence[dict[str, Any]]) -> float | None:
    """Return the share of a core that the counted steps got, None where it is not known."""
    shares = [run["supervised_tokens_per_s"] / run["tokens_per_cpu_s"] for run in runs if run["tokens_per_cpu_s"]]
    return round(min(shares), 3) if shares else None
