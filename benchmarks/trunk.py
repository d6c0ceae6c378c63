"""Measure the epochs of a run that keeps its frozen blocks' output (--cache-trunk on) against one that computes everything.

    python benchmarks/trunk.py --model FILE.gguf --data FILE.json                       8 of the blocks adapted, 64 rows
    python benchmarks/trunk.py --model FILE.gguf --data FILE.json --rows 32 --dense     from a float32 copy of the model
    python benchmarks/trunk.py --model FILE.gguf --data FILE.txt                        long prompts, short answers

A text file is cut into passages, each with a question whose answer is the passage's next line. Both runs take two
epochs over the same rows in one process, in a cache of their own, so that nothing was kept before. Times are of
steps, each with its data, its writing and its reading, without loading and validation: processor seconds of all
threads, and wall seconds. Losses of all steps are compared. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _harness import environment, options, record, table

import mlx_lora

EPOCHS = 2
PASSAGE = 1000  # characters of a passage, about 300 tokens
OPTIONS = (
    ("--model", ..., "As for the train command."),
    ("--data", ..., "JSON file with a list of records, or a text."),
    ("--rows", 64, "Records to train on, the first ones."),
    ("--num-layers", 8, "Adapted blocks, the last ones."),
    ("--rank", 8, "Of the adapter."),
    ("--batch-tokens", 1024, "As for the train command."),
    ("--grad-checkpoint", "none", "As for the train command."),
    ("--dense", False, "Dequantize the model first."),
)


def records_of(file: Path, rows: int) -> list[dict[str, str]]:
    """Return the first records of a JSON file, or records made of the passages of a text."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return json.loads(text)[:rows]
    records, begin = [], 0
    while len(records) < rows and begin + PASSAGE < len(text):
        cut = text.index("\n", begin + PASSAGE) + 1
        answer = text[cut:].lstrip("\n").split("\n", 1)[0]
        records.append({"instruction": f"{text[begin:cut]}\nWhat is the next line?", "output": answer})
        begin = cut
    return records


class Clock(mlx_lora.Callback):
    """Notes the clocks and the loss at the end of each step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []  # processor and wall seconds
        self.losses: list[float] = []
        self.peak_bytes = 0

    def on_start(self, facts: dict[str, Any]) -> None:
        self.times.append((time.process_time(), time.perf_counter()))

    def on_report(self, facts: dict[str, Any]) -> None:
        self.on_start(facts)
        self.losses.append(facts["loss"])
        self.peak_bytes = facts["peak_memory_bytes"]

    def epochs(self, clock: int) -> list[float]:
        """Return the seconds of each epoch by the processor's (0) or the wall clock (1)."""
        ends = [times[clock] for times in self.times[:: len(self.losses) // EPOCHS]]
        return [ends[n + 1] - ends[n] for n in range(EPOCHS)]


def measured(base: Any, data: Path, folder: Path, asked: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train two epochs with this --cache-trunk on the rows in `data`, and return their times and losses."""
    clock = Clock()
    mlx_lora.train(
        base, str(data), folder, epochs=EPOCHS, rank=args.rank, num_layers=args.num_layers, cache_trunk=asked,
        batch_tokens=args.batch_tokens, grad_checkpoint=args.grad_checkpoint, steps_per_report=1, val_batches=0,
        valid_fraction=0.0, save_every=0, sample_tokens=0, callbacks=[clock], progress=False,
    )  # fmt: skip
    times = {"processor_s": clock.epochs(0), "wall_s": clock.epochs(1)}
    return {**times, "losses": clock.losses, "peak_bytes": clock.peak_bytes}


def main(argv: Sequence[str]) -> int:
    """Run both, print a table and one line of JSON."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    with tempfile.TemporaryDirectory() as room:
        data, model = Path(room) / "rows.json", args.model
        data.write_text(json.dumps(records_of(Path(args.data), args.rows)))
        if args.dense:
            from mlx_lora.cli.convert import main as convert

            model = f"{room}/dense"
            convert.main(["--model", args.model, "--out", model, "--no-quantize"], standalone_mode=False)
        base = mlx_lora.load(model)
        os.environ["MLX_LORA_CACHE"] = f"{room}/cache"
        found = {asked: measured(base, data, Path(room) / asked, asked, args) for asked in ("off", "on")}
        kept = sum(file.stat().st_size for file in Path(room).glob("cache/trunk/*/values.bin"))
    rows = []
    for asked, one in found.items():
        epochs = [f"{a:.1f} ({b:.1f})" for a, b in zip(one["processor_s"], one["wall_s"], strict=True)]
        rows.append([asked, *epochs, f"{one['peak_bytes'] / 1e9:.2f}"])
    print(table(["--cache-trunk", "epoch 1: processor s (wall s)", "epoch 2", "peak GB"], rows))
    (first, second), other = found["on"]["processor_s"], found["off"]["processor_s"][1]
    pairs = zip(found["on"]["losses"], found["off"]["losses"], strict=True)
    apart = max(abs(one - off) / off for one, off in pairs)
    print(f"second epoch {first / second:.2f}x as fast as the first, {other / second:.2f}x the other run's;")
    print(f"losses at most {apart:.1e} apart (relative), {kept / 1e6:.0f} MB on disk")
    speeds = {"second_epoch_speed": first / second, "second_epoch_against_off": other / second, "losses_apart": apart}
    record({"environment": environment(), "settings": vars(args), "runs": found, "kept_bytes": kept, **speeds})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
