"""Report what the data contains, so that a person can check it before training."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlx_lora.config.objectives import SCORED_RECORDS, UNITS
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.utils.text import counted

MAX_LISTED = 10  # dropped rows that are listed one by one
MAX_REASONS = 3  # reasons that an error lists
MAX_REASON_CHARS = 200
MAX_SEGMENT_CHARS = 360
MAX_EXAMPLE_LINES = 12
MAX_LINE_CHARS = 110
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that could control the terminal
GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class DroppedRow:
    """A row that is not trained: its location (`unit` says what `line` counts) and the reason."""

    file: str
    line: int
    why: str
    unit: str = "line"

    @property
    def location(self) -> str:
        """The location in words."""
        return f"{self.file} {self.unit} {self.line}"


class Location(NamedTuple):
    """A row's location; `unit` says what `line` counts."""

    file: str
    line: int
    unit: str = "line"


@dataclass(frozen=True)
class SplitReport:
    """The size of one encoded split; lengths are in tokens, of single rows. Rows that are only measured do not count."""

    rows: int
    tokens: int
    supervised_tokens: int
    min_length: int
    median_length: int
    p95_length: int
    max_length: int

    @classmethod
    def of(cls, rows: EncodedSet) -> SplitReport:
        """Return the sizes of an encoded set."""
        lengths = rows.lengths[rows.trained_numbers]
        marks = np.percentile(lengths if len(rows) else np.zeros(1, np.int64), [0, 50, 95, 100], method="nearest")
        return cls(rows.examples, int(lengths.sum()), rows.supervised_tokens, *map(int, marks))


@dataclass(frozen=True)
class SetReport:
    """One of several data sets.

    Attributes:
        name, weight: As `--data` has them.
        rows_read: Records in its training files, bad ones included.
        rows: Its rows (or pairs) to train on.
        rows_per_epoch: How many of them an epoch has, by the weight.
    """

    name: str
    weight: float
    rows_read: int
    rows: int
    rows_per_epoch: int


@dataclass(frozen=True)
class NearDuplicates:
    """Rows that repeat, or nearly repeat, each other (data/notes.py).

    Attributes:
        held_out_rows: How many rows of the validation set nearly or exactly repeat a training row.
        exact: How many of these are equal to one.
        of_rows: Rows of the validation set.
        examples: Where the first of them are, and where a training row is that they repeat.
        kept_together: How many rows nearly repeat another, and are on the same side of the split as it.
        sampled: 1 if all words were compared; n: one run of words in n, because the data is large.
    """

    held_out_rows: int = 0
    exact: int = 0
    of_rows: int = 0
    examples: list[tuple[Location, Location]] = field(default_factory=list)
    kept_together: int = 0
    sampled: int = 1


@dataclass(frozen=True)
class DataReport:
    """Counts over all files, sizes of the splits, and one example.

    Attributes:
        data: The value of `--data`.
        rows_read: Records in all files, bad ones included.
        formats: Format name -> rows.
        splits: `train`, `valid`, `test` -> sizes.
        valid_source: `file`, `held out` or `none`.
        template: Where the chat template comes from; `none` for plain text.
        max_seq_length: Longest row allowed, in tokens.
        truncated, empty, duplicates, dropped: Numbers of rows; `dropped` includes empty ones, duplicates are trained.
        dropped_rows: The first dropped rows.
        truncated_rows, duplicate_rows: Locations of the first of these rows.
        notes: Other things to know, a sentence each.
        example: Decoded pieces of one training row, (text, trained); of a pair, the chosen row's.
        rejected: Decoded pieces of the pair's other answer; empty for other data.
        records: `examples`, `pairs`, `rated` or `prompts`.
        sets: What each set gives, if there are several or one has a weight.
        near_duplicates: Held-out rows that repeat training rows.
    """

    data: str
    rows_read: int
    formats: dict[str, int]
    splits: dict[str, SplitReport]
    valid_source: str
    template: str
    max_seq_length: int
    truncated: int
    empty: int
    duplicates: int
    dropped: int
    dropped_rows: list[DroppedRow] = field(default_factory=list)
    truncated_rows: list[Location] = field(default_factory=list)
    duplicate_rows: list[Location] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    example: list[tuple[str, bool]] = field(default_factory=list)
    rejected: list[tuple[str, bool]] = field(default_factory=list)
    records: str = "examples"
    sets: list[SetReport] = field(default_factory=list)
    near_duplicates: NearDuplicates = NearDuplicates()
    rephrased: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        """Return a report from the values of `to_dict`, which may have been stored as JSON."""
        made = {
            "splits": {name: SplitReport(**split) for name, split in values["splits"].items()},
            "dropped_rows": [DroppedRow(**row) for row in values["dropped_rows"]],
            "truncated_rows": [Location(*location) for location in values["truncated_rows"]],
            "duplicate_rows": [Location(*location) for location in values["duplicate_rows"]],
            "example": [(text, trained) for text, trained in values["example"]],
            "rejected": [(text, trained) for text, trained in values["rejected"]],
            "sets": [SetReport(**one) for one in values["sets"]],
        }
        near = values.get("near_duplicates", {})
        places = [tuple(Location(*one) for one in pair) for pair in near.get("examples", [])]
        made["near_duplicates"] = NearDuplicates(**{**near, "examples": places})
        return cls(**{**values, **made})

    def render(self, color: bool = False) -> str:
        """Return the report as lines of text.

        Args:
            color: Show the trained part in green (ANSI) instead of between ⟦ and ⟧.
        """
        formats = ", ".join(f"{count:,} {name}" for name, count in sorted(self.formats.items()))
        lines = [_line("data", self.data), _line("rows read", f"{self.rows_read:,} ({formats or 'none usable'})")]
        for one in self.sets:
            times = "" if one.weight == 1 else f" x {one.weight:g} = {one.rows_per_epoch:,} per epoch"
            found = f"{one.rows_read:,} read, {one.rows:,} {UNITS[self.records]} to train on"
            lines.append(_line("set", f"{one.name}: {found}{times}"))
        lines.append(_line("template", self.template))
        lines += [self._split_line(name) for name in ("train", "valid", "test")]
        train = self.splits["train"]
        lines.append(
            _line(
                "length",
                f"min {train.min_length:,}, median {train.median_length:,}, 95% {train.p95_length:,}, "
                f"max {train.max_length:,} tokens (limit {self.max_seq_length:,})",
            )
        )
        counts = f"truncated {self.truncated:,}, duplicate {self.duplicates:,}, empty {self.empty:,}"
        lines.append(_line("rows", f"{counts}, dropped {self.dropped:,}"))
        for what, places, count in (
            ("truncated", self.truncated_rows, self.truncated),
            ("duplicate, trained as often as it occurs", self.duplicate_rows, self.duplicates),
        ):
            lines += [f"  {what}: {where(places, count)}"] if places else []
        lines += [cut(f"  {row.location}: {_clean(row.why)}", MAX_REASON_CHARS) for row in self.dropped_rows]
        if self.dropped > len(self.dropped_rows):
            lines.append(f"  and {self.dropped - len(self.dropped_rows):,} more")
        lines += [
            _line("rephrased", line) if line is self.rephrased[0] else f"  {_clean(line)}" for line in self.rephrased
        ]
        lines += [_line("note", note) for note in self.notes]
        if self.example:
            mark = "in green" if color else "between ⟦ and ⟧"
            pair = "one pair, the chosen answer first, both answers"
            what = pair if self.rejected else "one training row, the trained text"
            what, mark = ("one text,", "as it is") if self.records in SCORED_RECORDS else (what, mark)
            lines.append(_line("example", f"{what} {mark}; ↵ is a line end"))
            lines += _example_lines(self.example, color)
            lines += ["  rejected:", *_example_lines(self.rejected, color)] if self.rejected else []
        return "\n".join(lines)

    def _split_line(self, name: str) -> str:
        split = self.splits.get(name)
        if split is None:
            return _line(name, "none")
        said = self.valid_source.replace("held out", "held out (not trained on, to measure)")
        source = f", {said}" if name == "valid" else ""
        share = split.supervised_tokens / max(1, split.tokens)
        scored = self.records in SCORED_RECORDS  # which train a score of each text, and no token
        trained = "" if scored else f", {split.supervised_tokens:,} trained ({100 * share:.0f}%)"
        return _line(name, f"{counted(split.rows, UNITS[self.records][:-1])}, {split.tokens:,} tokens{trained}{source}")


def example_pieces(
    rows: EncodedSet, tokenizer: PreTrainedTokenizerBase, showing: Collection[str] = ()
) -> list[list[tuple[str, bool]]]:
    """Return the rows of a typical example (of the first 25, that of median length) as decoded pieces.

    Args:
        rows: At least one example.
        tokenizer: The tokenizer that the rows were encoded with.
        showing: Names of functions; examples that are trained to call one come first.

    Returns:
        For each row of the example, (text, trained) pieces in order.
    """
    first = np.argsort(rows.lengths[: 25 * rows.group : rows.group], kind="stable") * rows.group
    if showing:
        trained = {
            number: str(tokenizer.decode(rows.row(number)[0][rows.row(number)[1]].tolist()))
            for number in first.tolist()
        }
        calling = [number for number, text in trained.items() if any(name in text for name in showing)]
        first = np.array(calling or first)
    number = int(first[len(first) // 2])
    return [row_pieces(*rows.row(row), tokenizer) for row in range(number, number + rows.group)]


def row_pieces(tokens: np.ndarray, mask: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return a row as decoded pieces, (text, trained)."""
    edges = np.flatnonzero(np.diff(mask)) + 1
    pieces = []
    for start, stop in zip([0, *edges], [*edges, len(tokens)], strict=True):
        text = tokenizer.decode(tokens[start:stop].tolist(), skip_special_tokens=False)
        pieces.append((text, bool(mask[start])))
    return pieces


def _line(name: str, text: str) -> str:
    return f"{name:<10} {_clean(text)}"


def reasons(dropped: list[DroppedRow]) -> str:
    """Return one line with the first reasons why rows were dropped, each with its first row."""
    by_reason: dict[str, list[DroppedRow]] = {}
    for row in dropped:
        by_reason.setdefault(row.why, []).append(row)
    told = list(by_reason.items())[:MAX_REASONS]
    parts = []
    for why, rows in told:
        as_well = f" and {len(rows) - 1:,} more" if len(rows) > 1 else ""
        parts.append(f"{rows[0].location}{as_well}: {cut(why, MAX_REASON_CHARS)}")
    left = len(dropped) - sum(len(rows) for _, rows in told)
    return "; ".join(parts) + (f"; and {left:,} more" if left else "")


def cut(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters; a longer one is cut after a word and ends with an ellipsis."""
    if len(text) <= limit:
        return text
    end = text.rfind(" ", limit // 2, limit - 1)
    return f"{text[: end if end > 0 else limit - 2]} …"


def where(locations: list[Location], count: int) -> str:
    """Return the locations of the first of `count` rows in words."""
    by_file: dict[str, list[str]] = {}
    for file, line, unit in locations:
        by_file.setdefault(f"{file} {unit}", []).append(str(line))
    named = "; ".join(
        f"{file}{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}" for file, numbers in by_file.items()
    )
    more = f" and {count - len(locations):,} more" if count > len(locations) else ""
    return f"{_clean(named)}{more}"


def _clean(text: str) -> str:
    return CONTROL.sub("·", text).replace("\n", " ")


def _example_lines(pieces: list[tuple[str, bool]], color: bool) -> list[str]:
    if len(pieces) > 6:
        pieces = [*pieces[:3], (f"\n… {len(pieces) - 6} more parts …\n", False), *pieces[-3:]]
    lines, trained_lines = [""], [False]
    for text, trained in pieces:
        parts = _visible(_shorten(text)).split("\n")
        marks = [trained and bool(part) for part in parts]
        if trained and not color:
            parts = [*parts[:-1], parts[-1] + "⟧"]
            parts[0] = "⟦" + parts[0]
        if color:
            paint = GREEN if trained else DIM
            parts = [f"{paint}{part}{RESET}" if part else "" for part in parts]
        lines[-1] += parts[0]
        trained_lines[-1] |= marks[0]
        lines += parts[1:]
        trained_lines += marks[1:]
    shown = [(line, trained) for line, trained in zip(lines, trained_lines, strict=True) if line]
    return [f"  {line}" for line in _fewer(shown)]


def _fewer(lines: list[tuple[str, bool]]) -> list[str]:
    """Return at most about MAX_EXAMPLE_LINES of an example's lines, with the number of those left out in their places.

    Trained lines stay first, then the first and the last ones, then those before a trained one, which it answers.

    Args:
        lines: Each with whether some of it is trained.
    """
    if len(lines) <= MAX_EXAMPLE_LINES:
        return [line for line, _ in lines]
    half = (MAX_EXAMPLE_LINES - 2) // 2
    trained = [number for number, (_, is_trained) in enumerate(lines) if is_trained]
    order = [0, *trained[:half], *trained[-half:], len(lines) - 1]
    order += [near for back in (1, 2) for number in trained[:half] if (near := number - back) >= 0]
    order += [number for pair in zip(range(len(lines)), reversed(range(len(lines))), strict=True) for number in pair]
    kept = sorted(list(dict.fromkeys(order))[:MAX_EXAMPLE_LINES])
    found, last = [], -1
    for number in kept:
        if left := number - last - 1:
            found.append(f"… {counted(left, 'line')} …")
        found.append(lines[number][0])
        last = number
    return found


def _shorten(text: str) -> str:
    """Return the text without the middle of a long piece, and of each long line."""
    if len(text) > MAX_SEGMENT_CHARS:
        half = MAX_SEGMENT_CHARS // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    return "\n".join(
        line if len(line) <= MAX_LINE_CHARS * 3 else f"{line[:MAX_LINE_CHARS]} … {line[-MAX_LINE_CHARS:]}"
        for line in text.split("\n")
    )


def _visible(text: str) -> str:
    """Return the text with visible line ends, tabs, and spaces at the end of lines."""
    text = re.sub(r" +(?=\n|$)", lambda spaces: "␣" * len(spaces[0]), text.replace("\t", "→"))
    return CONTROL.sub("·", text.replace("\n", "↵\n"))


def has_questions(splits: Mapping[str, Any]) -> bool:
    """Tell whether a run's rows have prompts: of plain text, every token but the first is trained.

    Args:
        splits: of `DataReport.to_dict`, as report.json has it.
    """
    train = splits.get("train") or {}
    return train.get("supervised_tokens", 0) < train.get("tokens", 1) - train.get("rows", 0)
