"""Measure the time from the command to the first step: the phases, the lines that are shown meanwhile, and the total.

    python benchmarks/first_step.py --model DIR --data FILE.json --cold --out first.json
    python benchmarks/first_step.py --model DIR --data FILE.json --cold --against ../before     a worktree of another commit
    python benchmarks/first_step.py --model DIR --data FILE.json --processes 2

Each side runs twice with one cache folder (MLX_LORA_CACHE): with --cold the first run begins with an empty one and no kernels
compiled (MLX keeps those in the folder for temporary files, so this has its own), the second finds what the first one left.
Without --cold there are warm runs only, after one that does not count. A model in a folder is not converted, a file is.

Processor seconds are those of the process and the compilers that it started; on a machine with other load they say more than
the wall clock does. The longest silence is that between two lines on standard error. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from _harness import REPOSITORY, SIDES_FOLDER, ChildFailed, child_environment, environment, options, record

SHOWN_S = 0.1  # phases that took less are summed up
OPTIONS = (
    ("--model", ..., "As for the train command."),
    ("--data", ..., "As for the train command."),
    ("--against", Path, "A checkout of another commit, which runs first."),
    ("--cold", False, "Begin with empty caches and no compiled kernels."),
    ("--steps", 100, "--iters of the run, of which one step is taken."),
    ("--flags", "", "Further flags of the command."),
    ("--processes", 1, "Of the run."),
    ("--threads", int, "OPENBLAS_NUM_THREADS; not given: not set."),
    ("--port", 34600, "First port of the processes' ring."),
    ("--timeout", 1200.0, "Seconds for a run."),
    ("--lines", False, "Print the command's lines with their times."),
    ("--out", str, "JSON file of everything."),
)

Lines = list[tuple[float, str]]


def run(args: argparse.Namespace, checkout: Path, folder: Path, kept: Path) -> list[dict[str, Any]]:
    """Run a checkout's command up to its first step in each process, and return what each found; caches are `kept`.

    Raises:
        ChildFailed: a process ended without a first step.
    """
    folder.mkdir(parents=True)
    (kept / "tmp").mkdir(parents=True, exist_ok=True)
    train = ["train", "--model", args.model, "--data", args.data, "--adapter-path", str(folder / "run")]
    train += ["--iters", str(args.steps), *shlex.split(args.flags)]
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{args.port + rank}"] for rank in range(args.processes)]))
    variables = {**child_environment(), "PYTHONPATH": str(checkout), "MLX_LORA_CACHE": str(kept / "cache")}
    variables["TMPDIR"] = str(kept / "tmp")
    for name in ("OPENBLAS", "OMP", "MKL"):
        variables.pop(f"{name}_NUM_THREADS", None)
    variables |= {"OPENBLAS_NUM_THREADS": str(args.threads)} if args.threads else {}
    children = []
    for rank in range(args.processes):
        ring = {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} if args.processes > 1 else {}
        started_s, out = time.monotonic(), folder / f"rank{rank}.json"
        command = [sys.executable, str(SIDES_FOLDER / "first_step_side.py"), str(out), str(started_s), *train]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        child = subprocess.Popen(command, env=variables | ring, cwd=checkout, text=True, **pipes)
        lines: Lines = []
        reader = threading.Thread(target=_read, args=(child, started_s, lines))
        reader.start()
        children.append((child, started_s, out, lines, reader))
    found = []
    for child, started_s, out, lines, reader in children:
        try:
            child.wait(max(1, args.timeout - (time.monotonic() - started_s)))
        except subprocess.TimeoutExpired:
            child.kill()
        reader.join()
        if not out.exists():
            said = "\n".join(line for _, line in lines[-15:])
            late = f"no first step within {args.timeout:.0f} s (--timeout), code {child.wait()}"
            raise ChildFailed(f"{checkout}: {late}:\n{said}")
        found.append({**json.loads(out.read_text(encoding="utf-8")), **_silence(lines), "lines": lines})
    return found


def _read(child: subprocess.Popen[str], started_s: float, lines: Lines) -> None:
    for line in child.stderr or ():
        lines.append((round(time.monotonic() - started_s, 2), line.rstrip()))


def _silence(lines: Lines) -> dict[str, Any]:
    """Return when the first line came, and the longest time between two lines, with the line before it."""
    if not lines:
        return {"first_line_s": None, "longest_silence_s": None, "after": ""}
    gaps = [(after[0] - before[0], before[1]) for before, after in pairwise(lines)]
    longest, after = max(gaps, default=(0.0, ""))
    return {"first_line_s": lines[0][0], "longest_silence_s": round(longest, 2), "after": after}


def _print(name: str, found: dict[str, Any], show_lines: bool) -> None:
    reached = f"loss {found['loss']:.6f}" if "loss" in found else "no first step (--timeout)"
    print(f"\n{name}: {found['wall_s']:.1f} s, {found['processor_s']:.1f} processor seconds, {reached}")
    silence = f"longest silence {found['longest_silence_s']} s after {found['after']!r}"
    print(f"  first line after {found['first_line_s']} s, {silence}")
    for phase, (wall_s, processor_s) in sorted(found["phases"].items(), key=lambda one: -one[1][0]):
        if wall_s >= SHOWN_S:
            print(f"  {wall_s:7.1f} s {processor_s:7.1f} s processor  {phase}")
    for at_s, line in found["lines"] if show_lines else ():
        print(f"    {at_s:7.2f}  {line}")
    sys.stdout.flush()


def main(argv: Sequence[str]) -> int:
    """Measure this checkout, and the one to compare with."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    args.model, args.data = (str(Path(one).resolve()) if Path(one).exists() else one for one in (args.model, args.data))
    sides = {"before": args.against.resolve()} if args.against else {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for side, checkout in {**sides, "this checkout": REPOSITORY}.items():
            kept = Path(temporary) / side.replace(" ", "-")
            for number, kind in enumerate(("cold", "second run")):
                ranks = run(args, checkout, kept / f"run{number}", kept)
                if kind == "cold" and not args.cold:
                    continue
                results[f"{side}, {kind}"] = ranks
                for rank, found in enumerate(ranks):
                    of = f", rank {rank}" if args.processes > 1 else ""
                    _print(f"{side}, {kind}{of}", found, args.lines)
    short = {name: {key: ranks[0][key] for key in ("wall_s", "processor_s", "first_line_s", "longest_silence_s")}
             for name, ranks in results.items()}  # fmt: skip
    asked = {"model": args.model, "steps": args.steps, "flags": args.flags, "load": os.getloadavg()[0]}
    record({**asked, "environment": environment(), "runs": results, **short}, args.out, short)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
