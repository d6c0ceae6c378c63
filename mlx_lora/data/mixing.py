"""Several data sets in one run: which rows are held out, and how often each epoch has a set's rows.

A set with a validation file of its own is validated by that. Of the others together a share is held out; a set that is
one long text gives its last part. Then the training rows are repeated by their set's weight w: floor(w) times, and what
is left of w decides how many of them, chosen by the seed, are there once more. Every epoch has the same rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_lora.data.data_report import SetReport
from mlx_lora.data.encode import Encoded, EncodedSet
from mlx_lora.data.examples import Text
from mlx_lora.data.full_texts import Repeated, cut_repeated_prompts
from mlx_lora.data.reading import Rows, check_speaker, read_rows
from mlx_lora.data.split import cut_text, split_by_group
from mlx_lora.settings.config import DataSettings
from mlx_lora.sources.data_sets import DataSet


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
    sets: Sequence[DataSet], settings: DataSettings, records: str
) -> tuple[dict[str, Rows], list[Part], list[Repeated]]:
    """Read all files of some sets.

    Args:
        sets: Each with training files.
        settings, records: As in `read_rows`.

    Returns:
        `train`, `valid`, `test` -> the rows of all sets, without splits that no set has; each set's part of `train`; and
        its rows whose answers repeat their prompt.
    """
    rows: dict[str, Rows] = {}
    parts, repeated = [], []
    for one in sets:
        before = rows.get("train", Rows())
        first, read = len(before.entries), before.rows_read
        own = []
        for split in ("train", "valid", "test"):
            if split in one.splits:
                begin = len(rows[split].entries) if split in rows else 0
                rows[split] = read_rows(one.splits[split], settings, records, rows.get(split))
                own.append((rows[split], begin))
        repeated.append(cut_repeated_prompts(own))
        train = rows["train"]
        held_out = "valid" not in one.splits
        if held_out and (last := _cut_single_text(train, first, settings.valid_fraction)):
            held_out, valid = False, rows.setdefault("valid", Rows())
            valid.entries.append(last)
            valid.locations.append(train.locations[first])
        parts.append(Part(one.name, one.weight, first, len(train.entries), train.rows_read - read, held_out))
    check_speaker(rows.values(), settings)
    return rows, parts, repeated


def _cut_single_text(train: Rows, first: int, fraction: float) -> Text | None:
    """Cut a set in two if its records, those from `first` on, are one long text; return the part to validate on."""
    if len(train.entries) != first + 1 or not isinstance(entry := train.entries[first], Text):
        return None
    halves = cut_text(entry, fraction)
    if halves is None:
        return None
    train.entries[first] = halves[0]
    return halves[1]


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
        repeats[own] = _repeats(len(own), part.weight, np.random.default_rng([seed, number]))
        reports.append(SetReport(part.name, part.weight, part.rows_read, len(own), int(repeats[own].sum())))
    valid = train.rows.select(np.flatnonzero(~kept)) if held.any() else None
    plain = bool((repeats == 1).all())
    kept_rows = train.rows if plain else train.rows.select(np.repeat(np.arange(len(repeats)), repeats))
    divided = numbers[split.divided].tolist() if valid is not None else []
    return Mixed(kept_rows, valid, reports, divided, numbers[held].tolist())


def _repeats(rows: int, weight: float, random: np.random.Generator) -> np.ndarray:
    """Return how often each of a set's rows is in an epoch; a set is never left out whole."""
    whole = int(weight)
    once_more = round((weight - whole) * rows)
    found = np.full(rows, whole, np.int64)
    found[random.permutation(rows)[: max(once_more, 0 if whole else 1)]] += 1
    return found


def joined_sets(first: EncodedSet | None, second: EncodedSet | None) -> EncodedSet | None:
    """Return the rows of both sets, which have the same kind of examples; None if there are none."""
    if first is None or second is None:
        return second if first is None else first
    rows = EncodedSet.from_rows([one.row(i) for one in (first, second) for i in range(len(one))])
    labels = None
    if first.labels is not None and second.labels is not None:
        labels = np.concatenate([first.labels, second.labels])
    facts = None if first.facts is None or second.facts is None else [*first.facts, *second.facts]
    seen = None if first.teacher is None or second.teacher is None else joined_sets(first.teacher, second.teacher)
    return replace(rows.grouped(first.group, labels, first.trained_rows).with_facts(facts), teacher=seen)
