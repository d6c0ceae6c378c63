"""Split off validation rows if the data has none: repeatable, and disjoint from the training rows.

Rows that belong together (answers to one prompt, duplicates) are on the same side, so that the held-out loss does not
measure what was trained. `prompt_key` and `content_key` say which rows do, and `split_by_group` splits.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

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


def prompt_key(example: Example) -> str:
    """Return a hash of what an example answers: the turns before its first trained answer, or a completion's prompt.

    An example without a prompt, such as plain text, has its content's hash, so that only its duplicates share it.
    """
    prompt: list = []
    if isinstance(example, Completion) and example.prompt.strip():
        prompt = [{"role": "user", "content": example.prompt}]  # how a template shows it
    elif isinstance(example, Conversation):
        trained = (
            i for i, turn in enumerate(example.messages) if turn["role"] == "assistant" and turn.get("weight", 1)
        )
        context = example.messages[: next(trained, 0)]
        prompt = [{key: value for key, value in turn.items() if key != "weight"} for turn in context]
    return sha256_of(json.dumps(["prompt", prompt], sort_keys=True)) if prompt else content_key(example)


@dataclass(frozen=True)
class GroupSplit:
    """Which rows are held out.

    Attributes:
        held: (rows,) bool, True: held out.
        groups: (rows,) int64, the groups that were kept together.
        divided: (rows,) bool, True: the row's group was too large to hold out, so its rows were split one by one.
    """

    held: np.ndarray
    groups: np.ndarray
    divided: np.ndarray


def split_by_group(
    groups: Sequence[Hashable], keys: Sequence[str], fraction: float, seed: int, may: np.ndarray | None = None
) -> GroupSplit:
    """Choose the rows to validate on, whole groups at a time.

    Groups are ordered by the smallest hash of (seed, key) of their rows, and the first ones are held out. Neither the
    order in the file nor other groups matter. A group with more than a quarter of the rows, and more than twice the
    fraction, is not one question with several answers but a text that many rows begin with: its rows are split one by
    one.

    Args:
        groups: Any id of each row's group; equal ids stay together. See `joined_groups` for several reasons to.
        keys: `content_key` of each row; rows with equal keys stay together in every case.
        fraction: The fraction of the rows that may be held out; 0: none.
        seed: With another seed, other rows are held out.
        may: (rows,) bool, False: this row must not be held out, nor any of its group; None: all may be.

    Returns:
        At least one row is held out if fraction > 0 and two different groups may be; never all of them.
    """
    together = joined_groups(groups, keys)
    wanted = max(1, round(fraction * (len(together) if may is None else may.sum())))
    size = np.bincount(together)[together] if len(together) else together
    large = (size > max(2 * wanted, len(size) // 4)) | (size == len(size))
    numbers = joined_groups(
        [("row", key) if alone else group for group, key, alone in zip(together.tolist(), keys, large, strict=True)]
    )
    divided = large & (np.bincount(numbers)[numbers] < size) if len(size) else large
    members: dict[int, list[int]] = {}
    for row, number in enumerate(numbers.tolist()):
        members.setdefault(number, []).append(row)
    held = np.zeros(len(numbers), bool)
    found = GroupSplit(held, numbers, divided)
    free = [rows for rows in members.values() if may is None or may[rows].all()]
    free.sort(key=lambda rows: min(sha256_of(f"{seed}:{keys[row]}") for row in rows))
    free = free[:-1]  # one group stays to train on
    if fraction <= 0 or not free:
        return found
    for rows in free:
        if held.sum() + len(rows) <= 2 * wanted:
            held[rows] = True
        if held.sum() >= wanted:
            break
    if not held.any():
        held[min(free, key=len)] = True  # all of them have far more rows than the fraction
    return found


def joined_groups(*ids: Sequence[Hashable]) -> np.ndarray:
    """Return groups of the rows that share an id with each other, directly or through other rows.

    Args:
        ids: One id per row, for each reason to keep rows together (their prompt, being near duplicates ...).

    Returns:
        (rows,) int64, groups numbered from 0 in order of their first rows.
    """
    count = len(ids[0])
    leader = list(range(count))

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    for reason in ids:
        first: dict[Hashable, int] = {}
        for row, name in enumerate(reason):
            one, other = sorted((find(first.setdefault(name, row)), find(row)))
            leader[other] = one
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(find(row), len(numbers)) for row in range(count)], np.int64)


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
