"""Measure each process's memory when several share a base, against the bound and against the plan.

    python benchmarks/shared_memory.py --model float=DIR --model packed=DIR --model random=made:DIR --out memory.json

`made:DIR` is a random model with the tokenizer of DIR. For each model and way of sharing, one-thread processes train for two steps over rows of --length tokens. For each of them
this compares

    base     MLX's peak of a pass over a few tokens, without the adapter and its gradient, with its share of the base and the
             two largest units: at most 5 % above
    loading  MLX's peak until the base is shared, without the adapter, with the same bound; for `tensor:2`, instead of units two
             times the largest array
    peak     MLX's peak of the run, with the plan: within 10 %

and shows the resident size beyond what the process had before the model. Ends with one line of JSON; the exit code is 1 if
something is outside. Memory depends on no other load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _environment import environment
from _processes import ChildFailed, child_environment, last_lines

WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"]
MOST_BASE, MOST_APART = 1.05, 0.10


def parts_of(text: str) -> tuple[int, list[str]]:
    """Return the number of processes and the flags of `even:2`, `3:1` or `tensor:2`."""
    kind, _, count = text.partition(":")
    if kind == "tensor":
        return int(count), ["--parallel", "tensor"]
    return (int(count), ["--shard-base", "even"]) if kind == "even" else (text.count(":") + 1, ["--shard-base", text])


def run_ranks(args: argparse.Namespace, model: str, parts: str, folder: Path) -> list[dict[str, Any]]:
    """Train in several processes, and return what each wrote.

    Raises:
        ChildFailed: a rank ended with an error, or the time ran out.
    """
    count, sharing = parts_of(parts)
    hosts = [[f"127.0.0.1:{args.port + rank}"] for rank in range(count)]
    (folder / "hosts.json").write_text(json.dumps(hosts), encoding="utf-8")
    (folder / "text.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=60_000)), encoding="utf-8")
    flags = [
        "--model", model, "--data", str(folder / "text.txt"), "--adapter-path", str(folder / "run"), "--rank", "8",
        "--iters", "2", "--max-seq-length", str(args.length + 1), "--batch-tokens", str(args.batch_tokens),
        "--no-mask-prompt", "--valid-fraction", "0", "--val-batches", "0", "--save-every", "0",
        *sharing,
    ]  # fmt: skip
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "VECLIB_MAXIMUM")}
    ring = {**child_environment(), **one_thread, "MLX_HOSTFILE": str(folder / "hosts.json")}
    children = []
    for rank in range(count):
        command = [sys.executable, str(Path(__file__).with_name("_rank_memory.py")), str(folder / f"rank{rank}.json")]
        with (folder / f"rank{rank}.log").open("w") as log:
            variables = {**ring, "MLX_RANK": str(rank)}
            children.append(subprocess.Popen([*command, *flags], stdout=log, stderr=log, env=variables))
    end = time.time() + args.timeout
    try:
        for rank, child in enumerate(children):
            if child.wait(max(0.1, end - time.time())):
                raise ChildFailed(f"rank {rank} of {count}:\n{last_lines(folder / f'rank{rank}.log')}")
    except subprocess.TimeoutExpired:
        raise ChildFailed(f"{count} ranks took longer than {args.timeout:.0f} s (--timeout)") from None
    finally:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                child.wait()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]


def model_folder(source: str, temporary: Path) -> str:
    """Return the folder of a model, which is made if that is asked for."""
    if not source.startswith("made:"):
        return os.path.expanduser(source)
    folder, tokenizer = temporary / "made", os.path.expanduser(source.removeprefix("made:"))
    maker = [sys.executable, str(Path(__file__).with_name("_rank_memory.py")), "--make", str(folder), tokenizer]
    subprocess.run(maker, env=child_environment(), check=True)
    return str(folder)


def compared(found: dict[str, Any]) -> dict[str, Any]:
    """Return a rank's figures with what they are compared with."""
    # Norms and the like are whole everywhere, and with layers that are cut also the embedding and the head.
    whole = found["base_bytes"] - found["unit_bytes"]
    own = found["own_bytes"] if found["share"] is None else whole + found["share"] * found["unit_bytes"]
    bound = own + found["two_largest_bytes"]
    resident = found["resident_bytes"] - found["resident_before_bytes"]
    ratios = {
        "base": (found["base_alone_bytes"] - 2 * found["adapter_bytes"]) / bound,  # its gradient, too
        "loading": (found["loading_bytes"] - found["adapter_bytes"]) / bound,
        "peak": found["peak_bytes"] / found["planned_bytes"],
    }
    inside = max(ratios["base"], ratios["loading"]) <= MOST_BASE and abs(ratios["peak"] - 1) <= MOST_APART
    return {**found, "bound_bytes": bound, "resident_more_bytes": resident, "ratios": ratios, "inside": inside}


def row(name: str, parts: str, rank: int, found: dict[str, Any]) -> str:
    """Return a line of the table, in Markdown."""
    sizes = [found[f"{key}_bytes"] for key in ("bound", "base_alone", "loading", "planned", "peak", "resident_more")]
    ratios = found["ratios"]
    numbers = [f"{size / 1e6:.1f}" for size in sizes]
    numbers[1] += f" ({ratios['base']:.2f})"
    numbers[2] += f" ({ratios['loading']:.2f})"
    numbers[4] += f" ({ratios['peak']:.2f})"
    return f"| {name} | {parts} | {rank} | {' | '.join(numbers)} | {found['phase']} | {'yes' if found['inside'] else 'NO'} |"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR", help="Model; may be repeated.")
    parser.add_argument(
        "--parts",
        action="append",
        metavar="even:N|3:1|tensor:N",
        help="Way to share; may be repeated (even:2, 3:1, even:4).",
    )
    parser.add_argument("--length", type=int, default=128, help="Tokens of a row.")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="Of all ranks together.")
    parser.add_argument("--port", type=int, default=34800)
    parser.add_argument("--timeout", type=float, default=900, help="Seconds allowed for each run.")
    parser.add_argument("--out", help="JSON file of everything.")
    args = parser.parse_args(argv)
    args.parts = args.parts or ["even:2", "3:1", "even:4"]
    return args


def main(argv: Sequence[str]) -> int:
    """Measure all combinations; return 0, or 1 if a run failed or something is outside its bound."""
    args, results = arguments(argv), []
    print(
        "| model | parts | rank | bound, MB | base | loading | planned | peak | resident | phase | inside |", flush=True
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for model in args.model:
        name, _, source = model.partition("=")
        for parts in args.parts:
            with tempfile.TemporaryDirectory(prefix="shared-memory-") as temporary:
                try:
                    folder = model_folder(source, Path(temporary))
                    ranks = [compared(found) for found in run_ranks(args, folder, parts, Path(temporary))]
                except ChildFailed as error:
                    print(f"Error: {error}", file=sys.stderr)
                    return 1
            for rank, found in enumerate(ranks):
                print(row(name, parts, rank, found), flush=True)
            results.append({"model": name, "parts": parts, "ranks": ranks})
    inside = all(found["inside"] for result in results for found in result["ranks"])
    everything = {**environment(), "arguments": vars(args), "results": results}
    if args.out:
        Path(args.out).write_text(json.dumps(everything, indent=1), encoding="utf-8")
    print(json.dumps({"runs": len(results), "inside": inside, "date": everything["date"]}))
    return 0 if inside else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
