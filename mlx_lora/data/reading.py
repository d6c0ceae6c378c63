"""Read the records of one split into canonical form, with the reason for each that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_lora.data.answers import Entry
from mlx_lora.data.data_report import DroppedRow, Location
from mlx_lora.data.examples import EmptyRecord, FormatError
from mlx_lora.data.formats import parse_record
from mlx_lora.data.preferences import parse_pairs, parse_rated
from mlx_lora.settings.config import DataSettings
from mlx_lora.sources.records import BadRow, read_records


@dataclass
class Rows:
    """The usable records of one split, their locations, and the unusable records."""

    entries: list[Entry] = field(default_factory=list)
    locations: list[Location] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    dropped: list[DroppedRow] = field(default_factory=list)
    empty: int = 0
    truncated: list[Location] = field(default_factory=list)
    unread: int = 0

    @property
    def rows_read(self) -> int:
        """The number of records in the files, bad ones included."""
        return sum(self.formats.values()) + self.unread


def read_rows(paths: Sequence[Path], settings: DataSettings, records: str) -> Rows:
    """Read all records of some files.

    Args:
        paths: Of one split.
        settings: the format of plain examples, and which pairs to take of several answers.
        records: `examples`, `pairs` or `rated`.
    """
    rows = Rows()
    for path in paths:
        for record in read_records(path):
            if isinstance(record, BadRow):
                rows.unread += 1
                rows.dropped.append(DroppedRow(path.name, record.line, record.why, record.unit))
                continue
            try:
                if records == "examples":
                    name, example = parse_record(record.value, settings.data_format)
                    entries = [example]
                elif records == "pairs":
                    name, entries = records, parse_pairs(record.value, settings.pairs == "all")
                else:
                    name, entries = records, parse_rated(record.value)
            except FormatError as error:
                rows.unread += 1
                rows.empty += isinstance(error, EmptyRecord)
                rows.dropped.append(DroppedRow(path.name, record.line, str(error), record.unit))
                continue
            rows.formats[name] += 1
            rows.entries += entries
            rows.locations += [Location(path.name, record.line, record.unit)] * len(entries)
    return rows
