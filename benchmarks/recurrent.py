"""Measure a recurrent layer's forward and backward pass against mlx-lm's loop over tokens.

    python benchmarks/recurrent.py --kind gated-delta                              the heads of Qwen3.5-0.8B
    python benchmarks/recurrent.py --kind gated-delta --heads 4 --width 64         small enough for the loop at 4,096 tokens
    python benchmarks/recurrent.py --kind ssd --heads 24 --width 64 --hidden 768   Mamba-2
    python benchmarks/recurrent.py --kind ssd-alone --heads 24 --width 64 --hidden 1816   its recurrence alone
    python benchmarks/recurrent.py --kind selective-scan --heads 8 --width 64 --hidden 256    Mamba, 512 channels

Every point is a new process that runs one of mlx-lm's layers, with its own loop or with our kernels. Memory is the
allocator's peak above weights and inputs; time is the median of --rounds, in wall and in processor seconds (which are
fairer if other programs run). Points of the loop that would take more than --loop-limit-gb, by its memory per token, are
skipped. The results of both sides are compared. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _environment import environment
from _processes import run_child

SIDE = Path(__file__).parent / "sides" / "recurrent_layer.py"
SIDES = ("loop", "ours")
# Two correct float32 results differ by less than this, relative to the larger.
AGREE = 1e-3


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kind", default="gated-delta", help="Layer: a row of KINDS in sides/recurrent_layer.py.")
    parser.add_argument("--tokens", default="256,1024,4096", help="Lengths, separated by commas.")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=128, help="Channels of a head, of its keys and of its values.")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop-limit-gb", type=float, default=3.0, help="Skip the loop if it would take more.")
    parser.add_argument("--timeout", type=float, default=1800, help="Seconds for one point.")
    args = parser.parse_args(argv)
    args.tokens = [int(word) for word in args.tokens.split(",")]
    return args


def loop_bytes(args: argparse.Namespace, tokens: int) -> int:
    """Return about the bytes that the loop keeps: float32 states per token, or Mamba-2's scores per 256 tokens."""
    channels = args.heads * args.width
    numbers = {
        "ssd": 20 * 256 * args.heads,
        "ssd-alone": 20 * 256 * args.heads,
        "selective-scan": 10 * 16 * channels,
        # It writes each state into the array of all states, which makes a copy.
        "jamba-scan": 2 * 16 * 2 * args.hidden * tokens,
    }
    return 4 * tokens * numbers.get(args.kind, 3 * channels * args.width)


def measure(args: argparse.Namespace, side: str, tokens: int, folder: Path) -> dict[str, Any]:
    """Return the figures of one side at one length, from a new process."""
    result = folder / f"{side}-{tokens}.json"
    job = {"side": side, "tokens": tokens, "result": str(result)}
    job |= {name: getattr(args, name) for name in ("kind", "heads", "width", "hidden", "rounds")}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, str(SIDE), str(folder / "job.json")]
    ended = run_child(command, folder / "log.txt", timeout_s=args.timeout)
    figures = json.loads(result.read_text(encoding="utf-8"))
    return {"side": side, "tokens": tokens, **figures, "peak_process_bytes": ended.peak_process_bytes}


def slope(points: list[dict[str, Any]]) -> float | None:
    """Return bytes per token between the shortest and the longest length, or None for fewer than two."""
    if len(points) < 2:
        return None
    first, last = points[0], points[-1]
    return (last["peak_bytes"] - first["peak_bytes"]) / (last["tokens"] - first["tokens"])


def line(point: dict[str, Any]) -> str:
    """Return a point's line of the table."""
    return (
        f"{point['side']:<5} {point['tokens']:6d} tokens  {point['peak_bytes'] / 1e6:8.1f} MB "
        f"{point['peak_bytes'] / point['tokens'] / 1e3:8.1f} kB a token  {point['seconds']:8.3f} s  "
        f"{point['processor_s']:8.3f} processor s"
    )


def agree(points: list[dict[str, Any]]) -> bool:
    """Tell whether the results of both sides agree at all common lengths; False if there are none."""
    ours = {point["tokens"]: point["check"] for point in points if point["side"] == "ours"}
    pairs = [pair for p in points if p["side"] == "loop" for pair in zip(p["check"], ours[p["tokens"]], strict=True)]
    return bool(pairs) and all(abs(one - other) < AGREE * max(abs(one), abs(other), 1e-9) for one, other in pairs)


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return the exit code: 1 if the sides disagree."""
    args = arguments(argv)
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in args.tokens:
            for side in SIDES:
                if side == "loop" and loop_bytes(args, tokens) > args.loop_limit_gb * 1e9:
                    expected = loop_bytes(args, tokens) / 1e9
                    print(f"loop  {tokens:6d} tokens  skipped: about {expected:.1f} GB, --loop-limit-gb", flush=True)
                    continue
                points.append(measure(args, side, tokens, Path(folder)))
                print(line(points[-1]), flush=True)
    slopes = {side: slope([point for point in points if point["side"] == side]) for side in SIDES}
    if all(slopes.values()):
        print(f"memory per token: {slopes['ours'] / 1e3:.1f} kB, {slopes['ours'] / slopes['loop']:.4f} of the loop's")
    same = agree(points)
    print(json.dumps({"agree": same, "slopes": slopes, "points": points, "settings": vars(args), **environment()}))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
