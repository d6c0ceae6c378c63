"""Read the records of one split into canonical form, with the reason for each that cannot be used, and encode their answers.

Some sets have full texts: their answers repeat the prompt, which is then cut. Other answers only begin like it:

    prompt "The sky is"    chosen "The sky is blue."          in every row: full texts, and the answer is " blue."
    prompt "Hi"            chosen "Hi! How can I help you?"   here and there: an answer that greets back

One row does not show which of the two it is, so the whole set decides.

The answers of a record, one or several, are encoded together:

example   one row
pair      two rows: the chosen answer, then the rejected one; their label is the margin
prompt    one row, in which nothing is trained; its answers are sampled during the run
rated     two rows: the answer, then the answer to another prompt after the same prompt, which tells how far the policy
          is from the reference (KTO, arXiv 2402.01306, section 4.2); the label is 1 for a good answer and 0 for a bad one
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import islice
from typing import Any

import numpy as np

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.chat_exports import ChatSummary, chats_of, conversations_of
from mlx_lora.data.data_sets import DataFile
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import BadRow, EmptyPart, EmptyRecord, Example, FormatError, MissingColumn, OwnEntry, Record
from mlx_lora.data.file_formats import read_records, without_empty_cells
from mlx_lora.data.formats import NamedColumns, are_empty, empty_cells, ignored_columns, parse_record
from mlx_lora.data.preferences import Pair, Rated, columns_not_read, parse_pairs, parse_rated
from mlx_lora.data.prompts import Prompt, encode_prompts, parse_prompt, with_teacher_rows
from mlx_lora.data.report import MAX_LISTED, DroppedRow, Location, where
from mlx_lora.data.tokenize import Encoded, Encoder
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import shown_data
from mlx_lora.utils.text import counted

Entry = Example | Pair | Rated | Prompt | OwnEntry
"""The content of one record in canonical form."""
# Kind of records -> the module in this room that has its class, and the class; it is imported when such records are read.
OWN_ENTRIES = {
    "labeled": ("labeled", "Labeled"),
    "labeled with pictures": ("labeled", "Pictured"),
    "candidates": ("labeled", "Candidates"),
}


def answers_of(entry: Entry) -> list[Example]:
    """Return the examples of an entry, each of which becomes a row."""
    if isinstance(entry, Pair):
        return [entry.chosen, entry.rejected]
    if isinstance(entry, Prompt):
        return [entry.example]
    if isinstance(entry, OwnEntry):
        return [entry.shown]
    return [entry.answer] if isinstance(entry, Rated) else [entry]


def encode_entries(
    encoder: Encoder,
    entries: Sequence[Entry],
    on_rows: Callable[[int], None] = lambda done: None,
    teacher_prompt: str | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
) -> Encoded:
    """Encode entries of one kind.

    Args:
        encoder: how.
        entries: all examples, all pairs, all rated answers, all prompts, or all of one class of their own.
        on_rows: as in `Encoder.encode`.
        teacher_prompt: a text that only a teacher sees; the rows of examples and prompts then have its rows beside them.
        tools: schemas that all prompts show.

    Returns:
        As `Encoder.encode`, with numbers of entries. A pair is dropped if one of its answers gave no row.
    """
    prompts = [entry for entry in entries if isinstance(entry, Prompt)]
    if prompts:
        return encode_prompts(encoder, prompts, teacher_prompt, tools, on_rows)
    if entries and isinstance(entries[0], OwnEntry):
        return type(entries[0]).encode(encoder, entries, on_rows)
    pairs = [entry for entry in entries if isinstance(entry, Pair)]
    rated = [entry for entry in entries if isinstance(entry, Rated)]
    size = 2 if pairs else 1
    answers = [answer for entry in entries for answer in answers_of(entry)]
    encoded = encoder.encode(answers, lambda done: on_rows(done // size))
    if teacher_prompt is not None:
        return with_teacher_rows(encoded, answers, teacher_prompt, encoder)
    return _as_pairs(encoded, pairs) if pairs else _as_rated(encoded, rated) if rated else encoded


def _as_pairs(encoded: Encoded, pairs: Sequence[Pair]) -> Encoded:
    """Put the two rows of each pair side by side, and number the results by pairs instead of answers."""
    rows_of: dict[int, list[int]] = {}
    for row, answer in enumerate(encoded.source.tolist()):
        rows_of.setdefault(answer, []).append(row)
    dropped = {}
    for answer, why in sorted(
        encoded.dropped.items(), reverse=True
    ):  # if both are dropped, the chosen answer's reason counts
        dropped[answer // 2] = f"{'rejected' if answer % 2 else 'chosen'} answer: {why}"
    rows, numbers, source, equal = [], [], [], []
    for pair in range(len(pairs)):
        both = [rows_of.get(2 * pair + side, []) for side in range(2)]
        if pair in dropped or not all(both):
            continue
        found = [encoded.rows.row(side[-1]) for side in both]  # its last row: earlier ones show the prompt's turns
        if np.array_equal(found[0][0], found[1][0]):
            equal.append(pair)  # equal within --max-seq-length
            continue
        rows += found
        numbers += [side[-1] for side in both]
        source.append(pair)
    dropped |= dict.fromkeys(equal, "the answers are equal after the cut at --max-seq-length")
    margins = np.array([value for pair in source for value in (pairs[pair].margin, 0.0)], np.float32)
    grouped = EncodedSet.from_rows(rows).grouped(2, margins)
    return _numbered(encoded, grouped, numbers, source, dropped, 2)


def _as_rated(encoded: Encoded, rated: Sequence[Rated]) -> Encoded:
    """Add a row after each answer: the answer of the next record with another prompt, after this record's prompt."""
    last = {answer: row for row, answer in enumerate(encoded.source.tolist())}
    source = sorted(last)
    numbers = [last[number] for number in source]
    rows = [encoded.rows.row(number) for number in numbers]
    starts = [int(np.argmax(mask)) for _, mask in rows]  # the first token of each answer
    prompts = [tokens[:start].tobytes() for (tokens, _), start in zip(rows, starts, strict=True)]
    shown = encoded.rows.pictures
    following = _next_others(prompts if shown is None else list(zip(prompts, shown[numbers].tolist(), strict=True)))
    joined = []
    for i, (tokens, mask) in enumerate(rows):
        joined.append((tokens, mask))
        other_tokens, other_mask = rows[following[i]]
        other = starts[following[i]]
        together = np.concatenate([tokens[: starts[i]], other_tokens[other:]])
        trained = np.concatenate([np.zeros(starts[i], bool), other_mask[other:]])
        joined.append((together, trained))
    labels = np.array([value for number in source for value in (float(rated[number].good), 0.0)], np.float32)
    grouped = EncodedSet.from_rows(joined).grouped(2, labels, trained_rows=1)
    return _numbered(encoded, grouped, np.repeat(numbers, 2), source, encoded.dropped, 1)


def _next_others(prompts: Sequence[Hashable]) -> list[int]:
    """Return for each prompt the number of the next one that differs, in a circle; if none does, of the next one."""
    count = len(prompts)
    found = [(number + 1) % count for number in range(count)]
    if len(set(prompts)) > 1:
        for number in reversed(range(2 * count)):  # twice around, so that the last ones know the first ones' next
            after = (number + 1) % count
            if prompts[after] == prompts[number % count]:
                found[number % count] = found[after]
    return found


def _numbered(
    encoded: Encoded,
    rows: EncodedSet,
    shown: Sequence[int] | np.ndarray,
    source: list[int],
    dropped: dict[int, str],
    size: int,
) -> Encoded:
    """Return the result with numbers of entries instead of answers.

    Args:
        encoded: of the answers.
        rows: of the entries.
        shown: which encoded rows have the pictures of these rows.
        source: the entry of each example.
        dropped: entry -> why it gave no row.
        size: answers of an entry.
    """
    if encoded.rows.pictures is not None:
        rows = replace(rows, pictures=encoded.rows.pictures[np.asarray(shown, np.int64)])
    return replace(
        encoded,
        rows=rows,
        source=np.array(source, np.int64),
        dropped=dict(sorted(dropped.items())),
        truncated=sorted({number // size for number in encoded.truncated}),
        unshown={name: sorted({n // size for n in numbers}) for name, numbers in encoded.unshown.items()},
        divided=sorted({number // size for number in encoded.divided}),
        controls={name: sorted({n // size for n in numbers}) for name, numbers in encoded.controls.items()},
    )


NEARLY_ALL = 0.95  # of a set's pairs with a text as the prompt; then the few others are taken for mistakes


@dataclass
class SplitRows:
    """The usable records of one split, their locations, and the unusable records.

    Attributes:
        entries, locations: The examples, pairs or rated answers, and where each is from.
        formats: Format, or names of columns -> records.
        dropped: Records that cannot be used, with the reason.
        empty, unread: How many of these have nothing to train on, and how many were not read as records.
        truncated: Where the rows are from that were cut.
        ignored: Column that is not read -> records that have it.
        without: What was left out of a file's text -> files.
        chats: What was made of each chat export.
        transcripts: A note on each text that may be one.
    """

    entries: list[Entry] = field(default_factory=list)
    locations: list[Location] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    dropped: list[DroppedRow] = field(default_factory=list)
    empty: int = 0
    truncated: list[Location] = field(default_factory=list)
    unread: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    without: Counter[str] = field(default_factory=Counter)
    chats: list[ChatSummary] = field(default_factory=list)
    transcripts: list[str] = field(default_factory=list)

    @property
    def rows_read(self) -> int:
        """The number of records in the files, bad ones included."""
        return sum(self.formats.values()) + self.unread

    def add(self, name: str, record: Record, kind: str, entries: Sequence[Entry]) -> None:
        """Add what a record of the file `name` gave, and the format that it has."""
        self.formats[kind] += 1
        self.without.update([record.without] if record.without else [])
        self.entries += entries
        self.locations += [Location(name, record.line, record.unit)] * len(entries)


def read_rows(
    files: Sequence[DataFile],
    settings: DataSettings,
    records: str,
    rows: SplitRows | None = None,
    pictures: bool = False,
) -> SplitRows:
    """Read all records of some files.

    Args:
        files: Of one split.
        settings: As in `parse_rows`.
        records: `examples`, `pairs`, `rated`, `prompts`, or one of OWN_ENTRIES.
        rows: To add to, and to return; None: new ones.
        pictures: Whether records may have pictures.
    """
    rows = SplitRows() if rows is None else rows
    for file in files:
        own = file.reading(settings)
        parse_rows(file_records(file, own, rows), file.name, own, records, rows, pictures)
    return rows


def share_columns(parts: Iterable[SplitRows]) -> None:
    """Give each prompt the columns of all, with None for what it lacks, so that rewards get the same ones in every batch.

    TRL does so, too: its data sets have each column in every row.
    """
    columns = [entry.columns for rows in parts for entry in rows.entries if isinstance(entry, Prompt)]
    names = dict.fromkeys(name for own in columns for name in own)
    for own in columns:
        own |= {name: None for name in names if name not in own}


def file_records(file: DataFile, settings: DataSettings, rows: SplitRows) -> Iterator[Record | BadRow]:
    """Yield the records of a file; those of a chat export are conversations, and `rows` gets what was made of it.

    Raises:
        InputError: the file cannot be read, or is a chat export and --speaker does not name who is trained.
    """
    chats, note = chats_of(file, settings)
    if chats is None:
        rows.transcripts += [note] if note else []
        found = read_records(file.path, file.sheet)
        yield from islice(found, file.part.start, file.part.stop) if file.part is not None else found
        return
    conversations, summary = conversations_of(chats, file.name, settings)
    rows.chats.append(summary)
    yield from conversations


def parse_rows(
    source: Iterable[Record | BadRow],
    name: str,
    settings: DataSettings,
    records: str,
    rows: SplitRows,
    pictures: bool = False,
) -> None:
    """Add records to `rows` in canonical form, and those that cannot be used with the reason.

    Args:
        source: Records wherever they come from, each with its number there.
        name: Of their file or other source, for messages.
        settings: Format and columns of plain examples, and which pairs to take of several answers.
        records: `examples`, `pairs`, `rated`, `prompts`, or one of OWN_ENTRIES.
        rows: To add to.
        pictures: Whether records may have pictures.
    """
    named = NamedColumns.of(settings)
    for record in source:
        if isinstance(record, BadRow):
            rows.unread += 1
            rows.dropped.append(DroppedRow(name, record.line, record.why, record.unit))
            continue
        try:
            kind, entries, unread = parse_record_of(record, name, settings, named, records, pictures)
        except FormatError as error:
            # A message about the format would name our columns instead of the file's.
            cells = empty_cells(record.value, settings) if isinstance(error, MissingColumn | EmptyPart) else []
            if cells and not pictures:
                error = EmptyRecord(are_empty(cells))
            rows.unread += 1
            rows.empty += isinstance(error, EmptyRecord)
            rows.dropped.append(DroppedRow(name, record.line, str(error), record.unit))
            continue
        rows.ignored.update(unread)
        rows.add(name, record, kind, entries)


def parse_record_of(
    record: Record, name: str, settings: DataSettings, named: NamedColumns, records: str, pictures: bool = False
) -> tuple[str, Sequence[Entry], list[str]]:
    """Return a record's format, its entries, and the columns that were not read; arguments as for `parse_rows`.

    Raises:
        FormatError: it cannot be used.
    """
    value = record.value
    if records in OWN_ENTRIES:  # which name their columns themselves
        module, name_of_class = OWN_ENTRIES[records + " with pictures" * pictures]
        own: type[OwnEntry] = getattr(import_module(f"mlx_lora.data.{module}"), name_of_class)
        value = without_empty_cells(value, name, own.optional) if own.optional else value
        return records, [own.parse(value, settings)], []
    sources: dict[str, str | bytes] = {}
    if pictures:
        from mlx_lora.data.images import illustrated, marked  # a run without pictures imports none of it

        value = marked(value, records, settings, sources)
    columns, value = named.renamed(value, records)
    kind, unread = records, []
    if records == "examples":
        found, example = parse_record(value, settings.data_format)
        kind, entries = record.form or columns or found, [example]
        unread = [] if record.form or pictures else ignored_columns(record.value, kind)
    elif records == "prompts":
        entries = [parse_prompt(value)]
    else:
        entries = parse_pairs(value, settings.pairs == "all") if records == "pairs" else parse_rated(value)
        unread = [] if pictures else columns_not_read(record.value, columns)
    if pictures:
        entries = [illustrated(entry, record.value, sources) for entry in entries]
    return kind, entries, unread


def check_speaker(parts: Iterable[SplitRows], settings: DataSettings) -> None:
    """Raise if --speaker is given and none of the files is a chat export."""
    if settings.speaker is not None and not any(rows.chats for rows in parts):
        raise InputError(
            f"--speaker {settings.speaker}: --data {shown_data(settings.data or '')} has no chat export (WhatsApp .txt, "
            "Telegram .json, iMessage text, or a transcript with a name at the beginning of each line); leave --speaker out"
        )


# Answers that begin with their prompt


@dataclass(frozen=True)
class Repeated:
    """The rows of a set whose two answers begin with their prompt.

    Attributes:
        places: Where each is from.
        of: The number of rows with two answers to a text.
        cut: Whether the prompt was cut from these answers.
    """

    places: tuple[Location, ...]
    of: int
    cut: bool


def cut_repeated_prompts(parts: Sequence[tuple[SplitRows, int]]) -> Repeated:
    """Cut the prompt from the answers of one data set if nearly all of its pairs repeat it; change `parts` in place.

    Args:
        parts: The rows of each split, and the number of the set's first entry in it.
    """
    told = {
        place: entry.repeats
        for rows, first in parts
        for entry, place in zip(rows.entries[first:], rows.locations[first:], strict=True)
        if isinstance(entry, Pair | Rated) and entry.repeats is not None
    }
    places = tuple(place for place, repeats in told.items() if repeats)
    cut = bool(places) and len(places) >= NEARLY_ALL * len(told)
    if cut:
        for rows, first in parts:
            for number, entry in enumerate(rows.entries[first:], first):
                if isinstance(entry, Pair | Rated) and entry.repeats:
                    names = ("chosen", "rejected") if isinstance(entry, Pair) else ("answer",)
                    answers: dict[str, Any] = {name: getattr(entry, name) for name in names}
                    without = {
                        name: replace(one, completion=one.completion.removeprefix(one.prompt))
                        for name, one in answers.items()
                    }
                    rows.entries[number] = replace(entry, **without)
    return Repeated(places, len(told), cut)


def repeated_notes(sets: Sequence[Repeated]) -> list[str]:
    """Return what the report says on answers that begin with their prompt: what was done, and to how many rows."""
    notes = []
    for cut in (True, False):
        chosen = [one for one in sets if one.places and one.cut == cut]
        places = [place for one in chosen for place in one.places]
        if not places:
            continue
        of = sum(one.of for one in chosen)
        found = f"both answers begin with the prompt in {len(places):,} of {counted(of, 'row')}"
        if cut:
            notes.append(f"{found}, so the set has full texts, and the prompt was cut from these answers")
        else:
            listed = where(places[:MAX_LISTED], len(places))
            notes.append(f"{found}, too few for a set of full texts; these answers are trained whole: {listed}")
    return notes
