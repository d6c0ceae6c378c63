"""Read the records of one split into canonical form, with the reason for each that cannot be used.

Some sets have full texts: their answers repeat the prompt, which is then cut. Other answers only begin like it:

    prompt "The sky is"    chosen "The sky is blue."          in every row: full texts, and the answer is " blue."
    prompt "Hi"            chosen "Hi! How can I help you?"   here and there: an answer that greets back

One row does not show which of the two it is, so the whole set decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.chat_exports import ChatSummary, chats_of, conversations_of, transcript_note
from mlx_lora.data.encode import Entry
from mlx_lora.data.examples import BadRow, Completion, EmptyPart, EmptyRecord, FormatError, MissingColumn, Record
from mlx_lora.data.files import DataFile
from mlx_lora.data.formats import NamedColumns, are_empty, empty_cells, ignored_columns, parse_record
from mlx_lora.data.preferences import Answer, Pair, Rated, parse_pairs, parse_rated
from mlx_lora.data.prompts import parse_prompt
from mlx_lora.data.records import read_records
from mlx_lora.data.report import MAX_LISTED, DroppedRow, Location, where
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import shown_data
from mlx_lora.utils.text import counted

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


def read_rows(
    files: Sequence[DataFile], settings: DataSettings, records: str, rows: SplitRows | None = None
) -> SplitRows:
    """Read all records of some files.

    Args:
        files: Of one split.
        settings: As in `parse_rows`.
        records: `examples`, `pairs`, `rated` or `prompts`.
        rows: To add to, and to return; None: new ones.
    """
    rows = SplitRows() if rows is None else rows
    for file in files:
        parse_rows(file_records(file, settings, rows), file.name, settings, records, rows)
    return rows


def file_records(file: DataFile, settings: DataSettings, rows: SplitRows) -> Iterator[Record | BadRow]:
    """Yield the records of a file; those of a chat export are conversations, and `rows` gets what was made of it.

    Raises:
        InputError: the file cannot be read, or is a chat export and --speaker does not name who is trained.
    """
    chats = chats_of(file, settings)
    if chats is None:
        if settings.data_format == "auto" and (note := transcript_note(file)):
            rows.transcripts.append(note)
        yield from read_records(file.path, file.sheet)
        return
    conversations, summary = conversations_of(chats, file.name, settings)
    rows.chats.append(summary)
    yield from conversations


def parse_rows(
    source: Iterable[Record | BadRow], name: str, settings: DataSettings, records: str, rows: SplitRows
) -> None:
    """Add records to `rows` in canonical form, and those that cannot be used with the reason.

    Args:
        source: Records wherever they come from, each with its number there.
        name: Of their file or other source, for messages.
        settings: Format and columns of plain examples, and which pairs to take of several answers.
        records: `examples`, `pairs`, `rated` or `prompts`.
        rows: To add to.
    """
    named = NamedColumns.of(settings)
    for record in source:
        if isinstance(record, BadRow):
            rows.unread += 1
            rows.dropped.append(DroppedRow(name, record.line, record.why, record.unit))
            continue
        try:
            columns, value = named.renamed(record.value, records)
            if records == "examples":
                found, example = parse_record(value, settings.data_format)
                kind, entries = columns or found, [example]
                kind = record.form or kind
            elif records == "pairs":
                kind, entries = records, parse_pairs(value, settings.pairs == "all")
            elif records == "rated":
                kind, entries = records, parse_rated(value)
            else:
                kind, entries = records, [parse_prompt(value)]
        except FormatError as error:
            # A message about the format would name our columns instead of the file's.
            cells = empty_cells(record.value, settings) if isinstance(error, MissingColumn | EmptyPart) else []
            if cells:
                error = EmptyRecord(are_empty(cells))
            rows.unread += 1
            rows.empty += isinstance(error, EmptyRecord)
            rows.dropped.append(DroppedRow(name, record.line, str(error), record.unit))
            continue
        rows.formats[kind] += 1
        rows.without.update([record.without] if record.without else [])
        if records == "examples" and not record.form:
            rows.ignored.update(ignored_columns(record.value, kind))
        rows.entries += entries
        rows.locations += [Location(name, record.line, record.unit)] * len(entries)


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
            rows.entries[first:] = [
                _cut(entry) if isinstance(entry, Pair | Rated) and entry.repeats else entry
                for entry in rows.entries[first:]
            ]
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


def _cut(entry: Pair | Rated) -> Pair | Rated:
    if isinstance(entry, Pair):
        return replace(entry, chosen=_without_prompt(entry.chosen), rejected=_without_prompt(entry.rejected))
    return replace(entry, answer=_without_prompt(entry.answer))


def _without_prompt(answer: Answer) -> Answer:
    if isinstance(answer, Completion):
        return replace(answer, completion=answer.completion.removeprefix(answer.prompt))
    return answer
