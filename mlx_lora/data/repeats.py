"""Keep rows that nearly repeat each other on one side of the split, and count those that a validation file has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from mlx_lora.data.answers import answers_of
from mlx_lora.data.data_report import MAX_LISTED, Location, NearDuplicates
from mlx_lora.data.encode import Encoded
from mlx_lora.data.near_duplicates import near_pairs
from mlx_lora.data.reading import Rows
from mlx_lora.data.split import joined_groups, prompt_key
from mlx_lora.system.units import counted

MOST_TOGETHER = 0.5  # of the rows; if more nearly repeat each other, they are split row by row
NAMED = 3  # pairs of lines that a note names
TRAIN, VALID = "train", "valid"


@dataclass(frozen=True)
class Repeats:
    """Which records repeat each other.

    Attributes:
        groups: An id for each training record that gave rows; those with the same one must be on one side.
        records: Split -> numbers of the records that gave rows.
        texts: Split -> the number of each record's content; equal contents have one.
        locations: Split -> where each of these records is.
        near: Number of a content -> those that nearly repeat it.
        together: How many training records nearly repeat another.
        too_many: How many do, if that is so many that they are not kept together; 0 otherwise.
        sampled: As in `NearDuplicates`.
    """

    groups: Sequence[int]
    records: dict[str, list[int]]
    texts: dict[str, list[int]] = field(default_factory=dict)
    locations: dict[str, list[Location]] = field(default_factory=dict)
    near: dict[int, list[int]] = field(default_factory=dict)
    together: int = 0
    too_many: int = 0
    sampled: int = 1

    def across(self, held_out: Collection[int]) -> NearDuplicates:
        """Return which rows of the validation set repeat training rows.

        Args:
            held_out: Numbers of the training records that are held out.
        """
        if not self.texts:
            return NearDuplicates()
        held, trained, validated = set(held_out), dict[int, Location](), list[tuple[int, Location]]()
        for record, text, place in zip(self.records[TRAIN], self.texts[TRAIN], self.locations[TRAIN], strict=True):
            if record in held:
                validated.append((text, place))
            else:
                trained.setdefault(text, place)
        validated += zip(self.texts.get(VALID, []), self.locations.get(VALID, []), strict=True)
        found = [
            (place, trained[same], same == text)
            for text, place in validated
            if (same := next((one for one in (text, *self.near.get(text, ())) if one in trained), None)) is not None
        ]
        found.sort(key=lambda one: one[2])  # those that are only similar first
        return NearDuplicates(
            held_out_rows=len(found),
            exact=sum(equal for *_, equal in found),
            of_rows=len(validated),
            examples=[(place, other) for place, other, _ in found[:MAX_LISTED]],
            kept_together=0 if self.too_many else self.together,
            sampled=self.sampled,
        )


def find_repeats(
    parts: dict[str, Rows], encoded: dict[str, Encoded], keys: dict[str, list[str]], fraction: float
) -> Repeats:
    """Return which records repeat each other, of all splits together.

    Args:
        parts, encoded: `train`, `valid`, `test` -> what was read, and the same encoded.
        keys: Of the content of each record that gave rows.
        fraction: The share of training records to hold out; 0 without a validation set: nothing is compared.
    """
    records = {name: list(dict.fromkeys(encoded[name].source.tolist())) for name in (TRAIN, VALID) if name in encoded}
    train = parts[TRAIN]
    prompts = [prompt_key(answers_of(train.entries[number])[0]) for number in records[TRAIN]]
    if VALID not in records and not fraction:
        return Repeats(joined_groups(prompts).tolist(), records)
    numbers: dict[str, int] = {}
    texts = {name: [numbers.setdefault(key, len(numbers)) for key in keys[name]] for name in records}
    examples = {}
    for name, own in records.items():
        for number, text in zip(own, texts[name], strict=True):
            examples.setdefault(text, answers_of(parts[name].entries[number])[0])
    pairs = near_pairs([examples[text] for text in range(len(numbers))])
    near: dict[int, list[int]] = {}
    for one, other in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        near.setdefault(one, []).append(other)
        near.setdefault(other, []).append(one)
    alike = _connected(len(numbers), near)
    sizes = Counter(alike[text] for text in texts[TRAIN])
    contents = {text: alike[text] for text in set(texts[TRAIN])}
    several = {group for group, count in Counter(contents.values()).items() if count > 1}
    together = sum(sizes[group] for group in several)
    too_many = max((sizes[group] for group in several), default=0)
    too_many = too_many if too_many > MOST_TOGETHER * len(prompts) else 0
    reasons = [prompts] if too_many else [prompts, [alike[text] for text in texts[TRAIN]]]
    places = {name: [parts[name].locations[number] for number in own] for name, own in records.items()}
    groups = joined_groups(*reasons).tolist()
    return Repeats(groups, records, texts, places, near, together, too_many, pairs.sampled)


def _connected(count: int, near: dict[int, list[int]]) -> list[int]:
    """Return a group for each content: that of all it is connected with, through others too."""
    group = list(range(count))
    seen: set[int] = set()
    for start in near:
        waiting = [] if start in seen else [start]
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                group[one] = start
                waiting += near[one]
    return group


def repeat_notes(near: NearDuplicates, too_many: int, holds_out: bool) -> list[str]:
    """Return notes on rows that nearly repeat others.

    Args:
        near: What was found.
        too_many: As in `Repeats`.
        holds_out: Whether rows of the training data are held out.
    """
    notes = []
    if almost := near.held_out_rows - near.exact:
        pairs = [f"{_place(one)} and {_place(other)}" for one, other in near.examples[:NAMED]]
        verb = "repeats" if almost == 1 else "repeat"
        notes.append(
            f"{counted(almost, 'held-out row')} nearly {verb} a training row ({'; '.join(pairs)}); the held-out loss will be too low"
        )
    if too_many and holds_out:
        notes.append(
            f"{too_many:,} rows nearly repeat each other, more than half of all; they are split row by row, so the held-out "
            "loss will be too low"
        )
    elif near.kept_together and holds_out:
        notes.append(
            f"{near.kept_together:,} rows nearly repeat another row; such rows are either all trained or all held out"
        )
    if near.sampled > 1:
        notes.append(f"near duplicates were searched by one run of words in {near.sampled}, because the data is large")
    return notes


def _place(location: Location) -> str:
    return f"{location.file} {location.unit} {location.line}"
