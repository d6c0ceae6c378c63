"""Rows with pictures for tests: seeded pictures, conversations about them, and our loss of a batch of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data.batch import Batch, collate
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.models.load import Base, load_base
from mlx_lora.objectives.base import RunContext
from mlx_lora.objectives.vision_sft import VisionSFT, vision_sft

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


@dataclass
class Rows:
    """Encoded rows with pictures, and what is needed to compute their loss."""

    base: Base
    objective: VisionSFT
    rows: EncodedSet

    def batch(self, numbers: Sequence[int] | None = None) -> Batch:
        """Return rows as one padded batch."""
        numbers = range(len(self.rows)) if numbers is None else numbers
        width = int(self.rows.lengths.max()) - 1
        slots = int(self.rows.supervised_counts[list(numbers)].sum())
        return collate(self.rows, np.array(numbers), width, slots)

    def arrays(self, numbers: Sequence[int] | None = None) -> tuple[mx.array, ...]:
        """Return the loss's arguments for some rows."""
        return self.objective.arrays_of(self.batch(numbers))


def read_rows(model: Path, data: Path, trains: bool = True, **settings: Any) -> Rows:
    """Load a vision-language model, and read rows for it, to train or to measure."""
    base = load_base(ModelSettings(model=str(model), dtype="float32"))
    objective = vision_sft(ObjectiveSettings("vision_sft"))
    assert isinstance(objective, VisionSFT)
    asked = train_settings({"model": str(model), "data": str(data), "objective": "vision_sft", **settings})
    ctx = RunContext(asked, objective, base, trains=trains)
    objective.open(ctx)
    return Rows(base, objective, objective.read_set(ctx, asked.data))
