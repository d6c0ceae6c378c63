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
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _harness import environment, options, record, run_side

SIDES = ("loop", "ours")
AGREE = 1e-3  # two correct float32 results differ by less, relative to the larger
OPTIONS = (
    ("--kind", "gated-delta", "Layer: a row of KINDS in sides/recurrent_layer.py."),
    ("--tokens", "256,1024,4096", "Lengths, separated by commas."),
    ("--heads", 16, "Of the layer."),
    ("--width", 128, "Channels of a head, of its keys and of its values."),
    ("--hidden", 1024, "Width of the layer's input."),
    ("--rounds", 3, "Of each point."),
    ("--loop-limit-gb", 3.0, "Skip the loop if it would take more."),
    ("--timeout", 1800.0, "Seconds for one point."),
)


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


def slope(points: list[dict[str, Any]], side: str) -> float | None:
    """Return a side's bytes per token between the shortest and the longest length, or None for fewer than two."""
    own = [point for point in points if point["side"] == side]
    if len(own) < 2:
        return None
    return (own[-1]["peak_bytes"] - own[0]["peak_bytes"]) / (own[-1]["tokens"] - own[0]["tokens"])


def agree(points: list[dict[str, Any]]) -> bool:
    """Tell whether the results of both sides agree at all common lengths; False if there are none."""
    ours = {point["tokens"]: point["check"] for point in points if point["side"] == "ours"}
    pairs = [pair for p in points if p["side"] == "loop" for pair in zip(p["check"], ours[p["tokens"]], strict=True)]
    return bool(pairs) and all(abs(one - other) < AGREE * max(abs(one), abs(other), 1e-9) for one, other in pairs)


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return the exit code: 1 if the sides disagree."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    args.tokens = [int(word) for word in args.tokens.split(",")]
    job = {name: getattr(args, name) for name in ("kind", "heads", "width", "hidden", "rounds")}
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens, side in ((tokens, side) for tokens in args.tokens for side in SIDES):
            if side == "loop" and (expected := loop_bytes(args, tokens)) > args.loop_limit_gb * 1e9:
                print(f"loop  {tokens:6d} tokens  skipped: about {expected / 1e9:.1f} GB, --loop-limit-gb", flush=True)
                continue
            asked = {**job, "side": side, "tokens": tokens}
            limit = {"timeout_s": args.timeout}
            found, ended = run_side("recurrent_layer.py", asked, Path(folder), f"{side}-{tokens}", **limit)
            points.append({"side": side, "tokens": tokens, **found, "peak_process_bytes": ended.peak_process_bytes})
            print(
                f"{side:<5} {tokens:6d} tokens  {found['peak_bytes'] / 1e6:8.1f} MB {found['peak_bytes'] / tokens / 1e3:8.1f} kB "
                f"a token  {found['seconds']:8.3f} s  {found['processor_s']:8.3f} processor s",
                flush=True,
            )
    slopes = {side: slope(points, side) for side in SIDES}
    if slopes["loop"] and slopes["ours"]:
        print(f"memory per token: {slopes['ours'] / 1e3:.1f} kB, {slopes['ours'] / slopes['loop']:.4f} of the loop's")
    same = agree(points)
    record({"agree": same, "slopes": slopes, "points": points, "settings": vars(args), **environment()})
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
