"""Measure the epochs of a run that keeps its frozen blocks' output (--cache-trunk on) against one that computes everything.

    python benchmarks/trunk.py --model FILE.gguf --data FILE.json                       8 of the blocks adapted, 64 rows
    python benchmarks/trunk.py --model FILE.gguf --data FILE.json --rows 32 --dense     from a float32 copy of the model
    python benchmarks/trunk.py --model FILE.gguf --data FILE.txt                        long prompts, short answers

A text file is cut into passages, each with a question whose answer is the passage's next line.

Both runs take two epochs over the same rows in one process, in a cache of their own, so that nothing was kept before.
Times are of steps, each with its data, its writing and its reading, without loading and validation: processor seconds of
all threads, and wall seconds. Losses of all steps are compared. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _environment import environment

EPOCHS = 2
PASSAGE = 1000  # characters of a passage, about 300 tokens


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="As for the train command.")
    parser.add_argument("--data", required=True, help="JSON file with a list of records, or a text.")
    parser.add_argument("--rows", type=int, default=64, help="Records to train on, the first ones.")
    parser.add_argument("--num-layers", type=int, default=8, help="Adapted blocks, the last ones.")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--grad-checkpoint", default="none")
    parser.add_argument("--dense", action="store_true", help="Dequantize the model first.")
    return parser.parse_args(argv)


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


@dataclass
class Clock:
    """Notes the clocks and the loss at the end of each step; told by a run as a callback."""

    processor_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def on_start(self, facts: dict[str, Any]) -> None:
        self.processor_s.append(time.process_time())
        self.wall_s.append(time.perf_counter())

    def on_report(self, facts: dict[str, Any]) -> None:
        self.on_start(facts)
        self.losses.append(facts["loss"])
        self.peak_bytes = facts["peak_memory_bytes"]

    def epochs(self, times: list[float]) -> list[float]:
        """Return the seconds of each epoch."""
        steps = len(self.losses) // EPOCHS
        return [times[(n + 1) * steps] - times[n * steps] for n in range(EPOCHS)]


def measured(base: Any, data: Path, folder: Path, asked: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train two epochs and return their times and losses.

    Args:
        base: a loaded model.
        data: its rows.
        folder: of the run.
        asked: --cache-trunk.
        args: the command line.
    """
    import mlx_lora
    from mlx_lora.trainer.callbacks import Callback

    class Told(Clock, Callback):
        """A clock that a run accepts as a callback."""

    clock = Told()
    mlx_lora.train(
        base, str(data), folder, epochs=EPOCHS, rank=args.rank, num_layers=args.num_layers, cache_trunk=asked,
        batch_tokens=args.batch_tokens, grad_checkpoint=args.grad_checkpoint, steps_per_report=1, val_batches=0,
        valid_fraction=0.0, save_every=0, sample_tokens=0, callbacks=[clock], progress=False,
    )  # fmt: skip
    return {
        "processor_s": clock.epochs(clock.processor_s),
        "wall_s": clock.epochs(clock.wall_s),
        "losses": clock.losses,
        "peak_bytes": clock.peak_bytes,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run both, print a table and one line of JSON."""
    args = arguments(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as room:
        import mlx_lora

        data = Path(room) / "rows.json"
        data.write_text(json.dumps(records_of(Path(args.data), args.rows)))
        base = mlx_lora.load(args.model)
        if args.dense:
            from mlx_lora.cli.convert import main as convert

            convert.main(["--model", args.model, "--out", f"{room}/dense", "--no-quantize"], standalone_mode=False)
            base = mlx_lora.load(f"{room}/dense")
        os.environ["MLX_LORA_CACHE"] = f"{room}/cache"
        found = {asked: measured(base, data, Path(room) / asked, asked, args) for asked in ("off", "on")}
        kept = sum(file.stat().st_size for file in Path(room).glob("cache/trunk/*/values.bin"))
    print(f"{'--cache-trunk':<16}{'epoch 1':>12}{'epoch 2':>12}   processor s (wall s)     peak")
    for asked, one in found.items():
        epochs = "".join(f"{a:7.1f} ({b:.1f})" for a, b in zip(one["processor_s"], one["wall_s"], strict=True))
        print(f"{asked:<16}{epochs}   {one['peak_bytes'] / 1e9:.2f} GB")
    first, second = found["on"]["processor_s"]
    pairs = zip(found["on"]["losses"], found["off"]["losses"], strict=True)
    apart = max(abs(one - other) / other for one, other in pairs)
    print(
        f"second epoch {first / second:.2f}x as fast as the first, {found['off']['processor_s'][1] / second:.2f}x the other run's;"
    )
    print(f"losses at most {apart:.1e} apart (relative), {kept / 1e6:.0f} MB on disk")
    result = {
        "environment": environment(), "settings": vars(args), "runs": found, "kept_bytes": kept,
        "second_epoch_speed": first / second, "second_epoch_against_off": found["off"]["processor_s"][1] / second,
        "losses_apart": apart,
    }  # fmt: skip
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
