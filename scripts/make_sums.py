"""Write the prompts of the recipe arithmetic-grpo: sums up to ten, asked in two ways; every time the same rows.

    python scripts/make_sums.py            # into the recipe's folder
    python scripts/make_sums.py FOLDER

The sums of a split are in no other split, in neither order, so that what the test measures has not been trained.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "mlx_lora" / "recipes" / "arithmetic-grpo"
SEED = 0
MOST = 10  # of a sum
PROMPTS = ("What is {} + {}?", "How much is {} + {}?")
# Pairs of different numbers that are held out; each gives four prompts.
VALID_PAIRS, TEST_PAIRS = 3, 4


def split_pairs(seed: int = SEED) -> dict[str, list[tuple[int, int]]]:
    """Deal the pairs of numbers, the smaller one first, to the splits."""
    pairs = [(a, b) for a in range(10) for b in range(a, 10) if a + b <= MOST]
    random.Random(seed).shuffle(pairs)
    held_out = [pair for pair in pairs if pair[0] != pair[1]][: VALID_PAIRS + TEST_PAIRS]
    return {
        "train": [pair for pair in pairs if pair not in held_out],
        "valid": held_out[:VALID_PAIRS],
        "test": held_out[VALID_PAIRS:],
    }


def prompts_of(a: int, b: int) -> list[dict[str, str]]:
    """Return the rows of a pair: both orders, each asked in both ways."""
    orders = dict.fromkeys([(a, b), (b, a)])
    return [{"prompt": text.format(x, y), "answer": str(a + b)} for text in PROMPTS for x, y in orders]


def write(folder: Path) -> dict[str, int]:
    """Write train.jsonl, valid.jsonl and test.jsonl, and return their numbers of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, pairs in split_pairs().items():
        rows = [row for a, b in pairs for row in prompts_of(a, b)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        counts[name] = len(rows)
    return counts


def main(argv: Sequence[str]) -> int:
    """Write the files and say how many rows each has."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", nargs="?", type=Path, default=RECIPE, help="Folder to write into.")
    folder = parser.parse_args(argv).folder
    print(f"{folder}: " + ", ".join(f"{name} {count}" for name, count in write(folder).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
