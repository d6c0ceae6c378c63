"""Measure the gain from several processes: tokens/s of N one-thread ranks against one one-thread process.

    python benchmarks/ranks.py --model DIR --data FILE.json --rounds 5 --out ranks.json
    python benchmarks/ranks.py --model DIR --data FILE.json --ours "--shard-base" --against ""    as many ranks on both sides
    python benchmarks/ranks.py --model DIR --random 12x512x8 --data FILE.json --ours "--parallel tensor" --against ""

Rounds alternate (1, N, N, 1, 1, N ...) on the same cores, with one thread and one core per process (by taskset, if
installed) and the ring on loopback. Every run takes the same steps over the same rows; the losses must agree. The first
step of each shape traces and is slow on both sides: `steady` excludes such steps. Ends with one line of JSON.

A machine with other load gives each process only a part of its core, and the two sides different parts. Therefore
`cpu_share` is reported in addition to the wall clock: processor seconds by core seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _environment import environment
from _figures import paired_ratio, run_figures, steps_from_metrics
from _ours import read_metrics
from _processes import ChildFailed, child_environment, last_lines
from _random_llama import write_random_llama

from mlx_lora.utils.supervise import last_given

FIGURES = ("tokens_per_s", "supervised_tokens_per_s", "steady_tokens_per_s")


def command(args: argparse.Namespace, folder: Path, flags: str) -> list[str]:
    """Return the train command of one side."""
    words = [sys.executable, "-m", "mlx_lora.train", "--model", args.model, "--data", args.data]
    words += ["--adapter-path", str(folder / "run"), "--rank", "8", "--iters", str(args.steps)]
    words += ["--batch-tokens", str(args.batch_tokens), "--steps-per-report", "1", "--save-every", "0"]
    return last_given([*words, "--valid-fraction", "0", "--val-batches", "0", *shlex.split(flags)])


def run_ranks(args: argparse.Namespace, count: int, folder: Path, flags: str) -> dict[str, Any]:
    """Train in `count` processes with one thread each and return the run's figures.

    Raises:
        ChildFailed: a rank ended with an error, or the time ran out.
    """
    folder.mkdir(parents=True)
    hosts = [[f"127.0.0.1:{args.port + rank}"] for rank in range(count)]
    (folder / "hosts.json").write_text(json.dumps(hosts), encoding="utf-8")
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "VECLIB_MAXIMUM")}
    children = []
    started_unix_s = time.time()
    for rank in range(count):
        ring = {"MLX_HOSTFILE": str(folder / "hosts.json"), "MLX_RANK": str(rank)} if count > 1 else {}
        core = ["taskset", "-c", str(args.cores[rank])] if shutil.which("taskset") else []
        with (folder / f"rank{rank}.log").open("w") as log:
            environment_of = {**child_environment(), **one_thread, **ring}
            children.append(
                subprocess.Popen([*core, *command(args, folder, flags)], stdout=log, stderr=log, env=environment_of)
            )
    cpu_s, resident = 0.0, []
    try:
        for rank, child in enumerate(children):
            while True:
                ended, status, usage = os.wait4(child.pid, os.WNOHANG)
                if ended:
                    break
                if time.time() - started_unix_s > args.timeout:
                    raise ChildFailed(f"{count} ranks took longer than {args.timeout:.0f} s (--timeout)")
                time.sleep(0.05)
            child.returncode = os.waitstatus_to_exitcode(status)
            cpu_s += usage.ru_utime + usage.ru_stime
            resident.append(usage.ru_maxrss * 1024)
            if child.returncode:
                raise ChildFailed(
                    f"rank {rank} of {count} ended with {child.returncode}:\n{last_lines(folder / f'rank{rank}.log')}"
                )
    finally:
        for child in children:
            if child.returncode is None:
                child.send_signal(signal.SIGKILL)
                child.wait()
    wall_s = time.time() - started_unix_s
    records = read_metrics(folder / "run")
    figures = run_figures(steps_from_metrics(records), records[0]["elapsed_s"])
    losses = [r["loss"] for r in records if r["loss"] is not None]
    figures |= {"peak_bytes": max(r["peak_memory_bytes"] for r in records), "resident_bytes": resident}
    return {**figures, "losses": losses, "cpu_share": cpu_s / (wall_s * count), "wall_s": wall_s}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="Folder of the base model.")
    parser.add_argument(
        "--random",
        help="Blocks, width and heads, such as 12x512x8: a llama of random weights with --model's tokenizer.",
    )
    parser.add_argument("--bits", type=int, help="Bits of --random's weights (default: float32).")
    parser.add_argument("--data", required=True, help="Data file.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--cores", default="", help="Cores, separated by commas, one per rank (default: the first ones)."
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=34300)
    parser.add_argument("--ours", default="", help="Extra flags of `python -m mlx_lora.train`, in one string.")
    parser.add_argument("--against", help="Flags of a side with as many ranks, to compare with instead of one process.")
    parser.add_argument("--timeout", type=float, default=1800, help="Seconds allowed for each run.")
    parser.add_argument("--out", help="JSON file of everything.")
    args = parser.parse_args(argv)
    args.cores = [int(core) for core in args.cores.split(",")] if args.cores else list(range(args.ranks))
    if len(args.cores) != args.ranks or args.steps < 3 or args.ranks < 2:
        parser.error("give --ranks 2 or more, a core for each, and --steps 3 or more")
    return args


def main(argv: Sequence[str]) -> int:
    """Measure all rounds; return 0, or 1 if a run failed or the losses differ."""
    args = arguments(argv)
    if args.random is None:
        return measure(args)
    with tempfile.TemporaryDirectory(prefix="random-llama-") as temporary:
        args.model = str(write_random_llama(Path(temporary) / "model", Path(args.model), args.random, args.bits))
        return measure(args)


def measure(args: argparse.Namespace) -> int:
    """Measure all rounds of the given model; see `main`."""
    other = (1, args.ours) if args.against is None else (args.ranks, args.against)
    sides: dict[tuple[int, str], list[dict[str, Any]]] = {other: [], (args.ranks, args.ours): []}
    for number in range(args.rounds):
        for count, flags in list(sides)[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory(prefix="ranks-") as temporary:
                try:
                    figures = run_ranks(args, count, Path(temporary) / "one", flags)
                except ChildFailed as error:
                    print(f"Error: {error}", file=sys.stderr)
                    return 1
            sides[count, flags].append(figures)
            resident = ", ".join(f"{size / 1e9:.2f}" for size in figures["resident_bytes"])
            print(
                f"round {number + 1}: {count} x 1 thread {flags}: {figures['tokens_per_s']:.1f} tokens/s, "
                f"steady {figures['steady_tokens_per_s'] or 0:.1f} supervised/s, cpu share {figures['cpu_share']:.2f}, "
                f"peak {figures['peak_bytes'] / 1e9:.2f} GB, resident {resident} GB",
                file=sys.stderr,
            )
    apart = max(
        abs(a - b) / a
        for one, more in zip(*sides.values(), strict=True)
        for a, b in zip(one["losses"], more["losses"], strict=True)
    )
    ratios = {}
    for name in FIGURES:
        one, more = ([figures[name] for figures in side] for side in sides.values())
        if None not in (*one, *more):
            ratios[name] = paired_ratio(more, one)
            print(f"{name}: {statistics.median(one):.1f} -> {statistics.median(more):.1f}, {ratios[name]}")
    print(f"largest relative difference of a step's loss: {apart:.1e}")
    result = {**environment(), "arguments": vars(args), "ratios": ratios, "loss_difference": apart}
    result["sides"] = [{"ranks": count, "flags": flags, "rounds": side} for (count, flags), side in sides.items()]
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("date", "commit", "versions", "ratios", "loss_difference")}))
    return 0 if apart < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
