"""A validation split for data that brings none: repeatable, and disjoint from the training rows."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from mlx_lora.data.formats import Completion, Conversation, Example, Text
from mlx_lora.system.files import sha256_of


def content_key(example: Example) -> str:
    """Return a hash of what an example says, equal for duplicate rows in whatever format."""
    if isinstance(example, Conversation):
        content = [example.messages, example.tools]
    elif isinstance(example, Completion):
        content = [example.prompt, example.completion]
    else:
        content = [example.text]
    return sha256_of(json.dumps(content, sort_keys=True))


def hold_out(keys: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Choose the rows to validate on.

    Rows are ordered by a hash of (seed, content), and the first ones are held out, with all their
    duplicates, so that none of them is also trained on. Neither file order nor other rows matter.

    Args:
        keys: `content_key` of each row.
        fraction: Share of rows to hold out; 0: none.
        seed: Another seed holds out other rows.

    Returns:
        (rows,) bool, True: held out. At least one row when there are two different ones and fraction > 0;
        never all rows.
    """
    held = np.zeros(len(keys), bool)
    groups: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(sha256_of(f"{seed}:{key}"), []).append(row)
    if fraction <= 0 or len(groups) < 2:
        return held
    wanted = max(1, round(fraction * len(keys)))
    for key in sorted(groups)[:-1]:
        if held.sum() >= wanted:
            break
        if held.any() and held.sum() + len(groups[key]) > 2 * wanted:
            continue  # a row repeated very often would swallow far more than its share
        held[groups[key]] = True
    return held


def cut_text(example: Text, fraction: float) -> tuple[Text, Text] | None:
    """Cut one long text: its last `fraction` is held out.

    Returns:
        The part to train on, which goes on and so gets no end token, and the part held out; None when
        one of them would hold nothing. The cut is at the end of a line or sentence where one is near.
    """
    text = example.text
    at = len(text) - round(fraction * len(text))
    nearby = max(1, (len(text) - at) // 4)
    for mark in ("\n\n", "\n", ". ", " "):
        found = text.rfind(mark, at - nearby, at + len(mark))
        if found >= 0:
            at = found + len(mark)
            break
    first, last = text[:at], text[at:]
    if fraction <= 0 or not first.strip() or not last.strip():
        return None
    return Text(first, ends=False), Text(last)
