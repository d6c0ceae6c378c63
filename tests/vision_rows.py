"""Rows with pictures for tests: seeded pictures, conversations about them, and our loss of a batch of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data.batch import Batch, collate
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.losses.cross_entropy import Arrays, token_arrays
from mlx_lora.models.load import Base, load_base
from mlx_lora.objectives.base import Objective, RunContext
from mlx_lora.objectives.pictures import Pictures
from mlx_lora.objectives.table import objective_of

SIZES = ((70, 123), (31, 29), (56, 56), (150, 40))  # height, width


def picture(number: int) -> Image.Image:
    """Return a seeded picture of colored blocks: its parts differ as much as two pictures do."""
    height, width = SIZES[number % len(SIZES)]
    blocks = np.random.default_rng(number).integers(0, 256, (6, 5, 3), np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def conversation(words: str, pictures: Sequence[int], answers: Sequence[str]) -> list[dict[str, Any]]:
    """Return turns of a chat whose first question has pictures; further answers follow questions of text."""
    images = [{"type": "image", "path": f"p{number}.png"} for number in pictures]
    content: Any = [*images, {"type": "text", "text": words}]
    turns: list[dict[str, Any]] = []
    for number, answer in enumerate(answers):
        question = content if number == 0 else [{"type": "text", "text": f"{words} {number}"}]
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]  # fmt: skip
    return turns


CHATS: list[tuple[list[dict[str, Any]], tuple[int, ...]]] = [
    (conversation("What is it?", (0,), ("A cat.", "Yes, a cat.")), (0,)),
    (conversation("Hello", (), ("Hello, you.",)), ()),
    (conversation("Which of these?", (1, 3), ("The first one",)), (1, 3)),
]


def chats_of(family: str) -> list[tuple[list[dict[str, Any]], tuple[int, ...]]]:
    """Return these conversations, or their first question and answer for models that take no more."""
    return [(turns[:2], numbers) for turns, numbers in CHATS] if family.startswith("paligemma") else CHATS


def write_rows(folder: Path, chats: Sequence[tuple[list[dict[str, Any]], tuple[int, ...]]] = CHATS) -> Path:
    """Write conversations and their pictures; return the data file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in {number for _, numbers in chats for number in numbers}:
        picture(number).save(folder / f"p{number}.png")
    file = folder / "train.jsonl"
    file.write_text("\n".join(json.dumps({"messages": turns}) for turns, _ in chats), encoding="utf-8")
    return file


def preference(words: str, pictures: Sequence[int], chosen: str, rejected: str) -> dict[str, Any]:
    """Return a pair as TRL's trainers take it: a prompt whose parts are pictures, which a column has."""
    parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": words}]
    answers = {"chosen": chosen, "rejected": rejected}
    return {
        "images": [f"p{number}.png" for number in pictures],
        "prompt": [{"role": "user", "content": parts}],
        **{
            name: [{"role": "assistant", "content": [{"type": "text", "text": text}]}] for name, text in answers.items()
        },
    }


PAIRS = [
    preference("What is it?", (0,), "A cat.", "A dog, no"),
    preference("Hello", (), "Hello, you.", "Go."),
    preference("Which of these?", (1, 3), "The first one", "None"),
]
PAIR_PICTURES = ((0,), (), (1, 3))


def write_pairs(folder: Path, rows: Sequence[dict[str, Any]] = tuple(PAIRS)) -> Path:
    """Write rows and the pictures that they name; return the data file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in {name for row in rows for name in row.get("images") or ()}:
        picture(int(name[1:-4])).save(folder / name)
    file = folder / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@dataclass
class Rows:
    """Encoded rows with pictures, and what is needed to compute their loss."""

    base: Base
    objective: Objective
    pictures: Pictures
    rows: EncodedSet

    def batch(self, numbers: Sequence[int] | None = None) -> Batch:
        """Return rows as one padded batch."""
        numbers = range(len(self.rows)) if numbers is None else numbers
        width = int(self.rows.lengths.max()) - 1
        slots = int(self.rows.supervised_counts[list(numbers)].sum())
        return collate(self.rows, np.array(numbers), width, slots)

    def arrays(self, numbers: Sequence[int] | None = None) -> Arrays:
        """Return the loss's arguments for some rows."""
        batch = self.batch(numbers)
        return token_arrays(batch) | {"pictures": self.pictures.arrays_of(batch)}


def read_rows(model: Path, data: Path, trains: bool = True, objective: str = "sft", **settings: Any) -> Rows:
    """Load a vision-language model, and read rows for it, to train or to measure."""
    base = load_base(ModelSettings(model=str(model), dtype="float32"))
    asked = train_settings({"model": str(model), "data": str(data), "objective": objective, "images": True, **settings})
    made = objective_of(asked.objective)
    assert made.pictures is not None
    ctx = RunContext(asked, made, base, trains=trains)
    made.open(ctx)
    return Rows(base, made, made.pictures, made.read_set(ctx, asked.data))
