"""Split off validation rows if the data has none: repeatable, and disjoint from the training rows."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from mlx_lora.data.formats import Completion, Conversation, Example, Text
from mlx_lora.system.files import sha256_of


def content_key(*examples: Example) -> str:
    """Return a hash of the content of a record's examples, which is equal for duplicate rows in any format."""
    content: list = []
    for example in examples:
        if isinstance(example, Conversation):
            content += [example.messages, example.tools]
        elif isinstance(example, Completion):
            content += [example.prompt, example.completion]
        else:
            content += [example.text]
    return sha256_of(json.dumps(content, sort_keys=True))


def hold_out(keys: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Choose the rows to validate on.

    Rows are ordered by a hash of (seed, content). The first ones are held out, with all their duplicates, so that none
    of them is also trained on. Neither the order in the file nor other rows matter.

    Args:
        keys: `content_key` of each row.
        fraction: The fraction of rows to hold out; 0: none.
        seed: With another seed, other rows are held out.

    Returns:
        (rows,) bool, True: held out. At least one row if there are two different ones and fraction > 0; never all rows.
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
            continue  # a row that is repeated very often would take far more than the fraction
        held[groups[key]] = True
    return held


def cut_text(example: Text, fraction: float) -> tuple[Text, Text] | None:
    """Cut one long text in two, to hold out its last `fraction`.

    Returns:
        The part to train on, which gets no end token since the text continues, and the part held out; None if
        one of them would be empty. The cut is at the end of a line or sentence if one is near.
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
