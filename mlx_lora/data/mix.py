"""Divide the rows of one or several data sets into training and validation rows, and mix the sets by their weights.

The split is repeatable. Rows that belong together (answers to one prompt, duplicates) are on the same side, so that the
held-out loss does not measure what was trained. `prompt_key` and `content_key` say which rows do, and `split_by_group`
splits.

A set with a validation file of its own is validated by that. Of the others together a share is held out; a set that is
one long text gives its last part. Then the training rows are repeated by their set's weight w: floor(w) times, and what
is left of w decides how many of them, chosen by the seed, are there once more. Every epoch has the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.data_sets import DataSet
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion, Conversation, Example, Text, as_conversation
from mlx_lora.data.read import Repeated, SplitRows, check_speaker, cut_repeated_prompts, read_rows, share_columns
from mlx_lora.data.report import SetReport
from mlx_lora.data.tokenize import Encoded
from mlx_lora.utils.files import sha256_of


@dataclass(frozen=True)
class Part:
    """A set's part of the training records.

    Attributes:
        name, weight: Of the set.
        first, after: Its records are the entries of these numbers, the last one left out.
        rows_read: Records in its training files, bad ones included.
        held_out: Whether some of its rows are held out, because nothing else of the set is to validate on.
    """

    name: str
    weight: float
    first: int
    after: int
    rows_read: int
    held_out: bool


def read_sets(
    sets: Sequence[DataSet], settings: DataSettings, records: str, pictures: bool = False
) -> tuple[dict[str, SplitRows], list[Part], list[Repeated]]:
    """Read all files of some sets.

    Args:
        sets: Each with training files.
        settings, records, pictures: As in `read_rows`.

    Returns:
        `train`, `valid`, `test` -> the rows of all sets, without splits that no set has; each set's part of `train`; and
        its rows whose answers repeat their prompt.
    """
    rows: dict[str, SplitRows] = {}
    parts, repeated = [], []
    chosen = any("train" not in one.splits for one in sets)  # the rows to validate on
    for one in sets:
        before = rows.get("train", SplitRows())
        first, read = len(before.entries), before.rows_read
        own = []
        for split in ("train", "valid", "test"):
            if split in one.splits:
                begin = len(rows[split].entries) if split in rows else 0
                rows[split] = read_rows(one.splits[split], settings, records, rows.get(split), pictures)
                own.append((rows[split], begin))
        repeated.append(cut_repeated_prompts(own))
        if "train" not in one.splits:
            continue
        train = rows["train"]
        held_out, own_rows = "valid" not in one.splits and not chosen, train.entries[first:]
        single = own_rows[0] if held_out and len(own_rows) == 1 else None
        if isinstance(single, Text) and (halves := cut_text(single, settings.valid_fraction)):
            held_out, valid = False, rows.setdefault("valid", SplitRows())
            train.entries[first] = halves[0]
            valid.entries.append(halves[1])
            valid.locations.append(train.locations[first])
        parts.append(Part(one.name, one.weight, first, len(train.entries), train.rows_read - read, held_out))
    check_speaker(rows.values(), settings)
    share_columns(rows.values())
    return rows, parts, repeated


@dataclass(frozen=True)
class Mixed:
    """The training rows of all sets, split and repeated.

    Attributes:
        train: The rows to train on.
        held: Those held out; None if none are.
        sets: What each set gives.
        divided: Numbers of the records whose prompt so many rows share that these rows are on both sides.
        held_records: Numbers of the records that are held out.
    """

    train: EncodedSet
    held: EncodedSet | None
    sets: list[SetReport]
    divided: list[int]
    held_records: list[int]


def mix(
    train: Encoded, keys: list[str], groups: Sequence[Hashable], parts: Sequence[Part], fraction: float, seed: int
) -> Mixed:
    """Hold rows out of the training data, and repeat those that stay by the weights of their sets.

    Args:
        train: The encoded training records of all sets.
        keys: Of the content of each record that gave rows, in order.
        groups: An id for each of these records; those with the same one are on one side.
        parts: The sets.
        fraction: The fraction of records to hold out.
        seed: Decides which, and which rows a fractional weight repeats.
    """
    numbers, record = np.unique(train.source, return_inverse=True)  # there is a key for each record that gave rows
    in_part = np.searchsorted([part.first for part in parts], numbers, side="right") - 1
    may = np.array([part.held_out for part in parts])[in_part]
    split = split_by_group(groups, keys, fraction, seed, may)  # a group that another set trains is not held out
    held = split.held
    part_of = in_part[record]  # (examples,)
    kept = ~held[record]
    repeats = np.zeros(len(record), np.int64)
    reports = []
    for number, part in enumerate(parts):
        own = np.flatnonzero(kept & (part_of == number))
        whole = int(part.weight)
        once_more = max(round((part.weight - whole) * len(own)), 0 if whole else 1)  # a set is never left out whole
        repeats[own] = whole
        repeats[own[np.random.default_rng([seed, number]).permutation(len(own))[:once_more]]] += 1
        reports.append(SetReport(part.name, part.weight, part.rows_read, len(own), int(repeats[own].sum())))
    valid = train.rows.select(np.flatnonzero(~kept)) if held.any() else None
    plain = bool((repeats == 1).all())
    kept_rows = train.rows if plain else train.rows.select(np.repeat(np.arange(len(repeats)), repeats))
    divided = numbers[split.divided].tolist() if valid is not None else []
    return Mixed(kept_rows, valid, reports, divided, numbers[held].tolist())


def joined_sets(first: EncodedSet | None, second: EncodedSet | None) -> EncodedSet | None:
    """Return the rows of both sets, which have the same kind of examples; None if there are none."""
    if first is None or second is None:
        return second if first is None else first
    rows = EncodedSet.from_rows([one.row(i) for one in (first, second) for i in range(len(one))])
    labels, pictures = (
        None if one is None or other is None else np.concatenate([one, other])
        for one, other in ((first.labels, second.labels), (first.pictures, second.pictures))
    )
    facts = None if first.facts is None or second.facts is None else [*first.facts, *second.facts]
    seen = None if first.teacher is None or second.teacher is None else joined_sets(first.teacher, second.teacher)
    grouped = rows.grouped(first.group, labels, first.trained_rows).with_facts(facts)
    return replace(grouped, teacher=seen, pictures=pictures)


# Holding rows out


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
        fraction: The fraction of the rows that may be held out, or from 1 on their number; 0: none.
        seed: With another seed, other rows are held out.
        may: (rows,) bool, False: this row must not be held out, nor any of its group; None: all may be.

    Returns:
        At least one row is held out if fraction > 0 and two different groups may be; never all of them.
    """
    together = joined_groups(groups, keys)
    wanted = (
        round(fraction) if fraction >= 1 else max(1, round(fraction * (len(together) if may is None else may.sum())))
    )
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
    turns: list = []
    if isinstance(example, Completion) and example.prompt.strip():
        turns = as_conversation(example).messages[:1]  # how a template shows it
    elif isinstance(example, Conversation):
        marked = [turn["role"] == "assistant" and turn.get("weight", 1) for turn in example.messages]
        turns = example.messages[: next((i for i, trained in enumerate(marked) if trained), 0)]
    prompt = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
    return sha256_of(json.dumps(["prompt", prompt], sort_keys=True)) if prompt else content_key(example)


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
    first, last = text[: max(0, at)], text[max(0, at) :]
    if not 0 < fraction < 1 or not first.strip() or not last.strip():
        return None
    return Text(first, ends=False), Text(last)
