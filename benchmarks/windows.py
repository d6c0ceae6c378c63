"""Measure attention with a sliding window, forward and backward, against the same attention with a mask of all keys.

    python benchmarks/windows.py                                       the heads and the window of Gemma 3 270M
    python benchmarks/windows.py --heads 32 --key-heads 8 --width 128 --window 4096 --tokens 8192

Both sides are our kernel (kernels/attention.py) in one process, taking turns: `mask` gets mlx-lm's mask alone, as before windows
were known, and `window` is told the window, too. Their outputs and gradients are compared. Times are wall and processor seconds,
medians of --rounds; the latter are fairer if other programs run. The mask side is skipped beyond --longest-mask, where it would
take minutes. Ends with one line of JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from _harness import environment, options, paired_ratio, record, say, spread, table

OPTIONS = (
    ("--tokens", [4096, 8192, 16384, 32768], "Lengths of the row."),
    ("--heads", 4, "Of queries."),
    ("--key-heads", 1, "Of keys and values."),
    ("--width", 256, "Of a head."),
    ("--window", 512, "Keys that a query sees."),
    ("--rounds", 3, "Of each point."),
    ("--longest-mask", 8192, "Longest row of the side with the mask."),
)
AGREE = 1e-4


def point(args: Any, tokens: int) -> dict[str, Any]:
    """Return the figures of one length."""
    import mlx.core as mx  # here, because a parent process must stay small
    from mlx_lm.models.base import create_causal_mask

    from mlx_lora.kernels.attention import Tiles, tiled_attention
    from mlx_lora.planner.memory import tile_queries

    shapes = [(1, heads, tokens, args.width) for heads in (args.heads, args.key_heads, args.key_heads, args.heads)]
    *primals, cotangent = (mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate(shapes))
    mask = create_causal_mask(tokens, window_size=args.window)
    scale = args.width**-0.5
    sides = {"window": Tiles(scale, mask, tile_queries(args.window), window=args.window)}
    if tokens <= args.longest_mask:
        sides["mask"] = Tiles(scale, mask)
    mx.eval(primals, cotangent, *([mask] if "mask" in sides else []))
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    results: dict[str, list[mx.array]] = {}
    for _ in range(args.rounds):
        for side, tiles in sides.items():
            start, used = time.perf_counter(), time.process_time()
            out, gradients = mx.vjp(lambda *p, tiles=tiles: [tiled_attention(*p, tiles)], primals, [cotangent])
            mx.eval(out, gradients)
            found[side].append({"wall_s": time.perf_counter() - start, "processor_s": time.process_time() - used})
            results[side] = [*out, *gradients]
    pairs = zip(results["window"], results.get("mask", ()), strict=False)
    error = max((mx.abs(a - b).max() / mx.abs(b).max()).item() for a, b in pairs) if "mask" in results else None
    return {"tokens": tokens, "error": error, **found}


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return the exit code: 1 if the sides disagree."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    points, rows = [], []
    for tokens in args.tokens:
        say(f"{tokens} tokens")
        points.append(one := point(args, tokens))
        window, mask = (
            {name: [times[name] for times in one.get(side, [])] for name in ("wall_s", "processor_s")}
            for side in ("window", "mask")
        )
        row: list[Any] = [f"{tokens:,}"]
        for side in (mask, window):
            row += [
                f"{found['median']:.2f}" if (found := spread(side[name])) else "-" for name in ("wall_s", "processor_s")
            ]
        ratio = paired_ratio(window["processor_s"], mask["processor_s"]) if mask["processor_s"] else None
        row += [
            f"{ratio['median']:.2f}" if ratio else "-",
            f"{1e6 * spread(window['processor_s'])['median'] / tokens:.0f}",
        ]
        rows.append(row)
    head = ["tokens", "mask, wall s", "mask, processor s", "window, wall s", "window, processor s", "window / mask"]
    print(table([*head, "window, processor us a token"], rows))
    good = all(one["error"] is None or one["error"] < AGREE for one in points)
    record({"agree": good, "points": points, "settings": vars(args), **environment()})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
