"""Read tables: .csv and .tsv as spreadsheets write them, .xlsx and .parquet.

A .csv file's separator is a comma, a semicolon (LibreOffice, and Excel in many countries) or a tab, whichever its first
line has.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import warnings
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO
from xml.etree.ElementTree import ParseError

from mlx_lora.data.examples import MAX_LINE_BYTES, BadRow, Record, checked
from mlx_lora.utils.errors import InputError

# Real texts can be compressed to a tenth, repeated ones even more.
LEAST_UNPACKED_BYTES, MOST_UNPACKED, LEAST_ROWS = 256 * 2**20, 100, 10_000
SEPARATORS = ",;\t"
PROBED_ROWS = 20
EXCEL_HINT = "Excel calls that 'CSV UTF-8'"


def text_encoding(path: Path) -> str:
    """Return the encoding that a text file's first bytes tell: UTF-16, or else UTF-8, each without its BOM."""
    with path.open("rb") as file:
        head = file.read(2)
    return "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def read_csv(path: Path) -> Iterator[Record | BadRow]:
    """Yield the rows of a table of text; `line` is where a row starts.

    Raises:
        InputError: the file is no such table, or neither UTF-8 nor UTF-16.
    """
    old_limit = csv.field_size_limit(MAX_LINE_BYTES)  # Python's own limit, 128 KiB, is too small for long texts
    number, encoding = 0, text_encoding(path)
    try:
        separator, skipped = _separator(path, encoding)
        with path.open(encoding=encoding, newline="") as file:
            rows = csv.reader(_bounded_lines(path, file), delimiter=separator, strict=True)
            for _ in range(skipped):
                next(rows, None)
            header = _header(path, next(rows, []))
            number = rows.line_num
            for row in rows:
                line, number = number + 1, rows.line_num  # a quoted field may span lines: report the first
                while len(row) > len(header) and not row[-1].strip():
                    row.pop()  # below the empty names that `_header` leaves out
                if len(row) == len(header):
                    yield Record(line, dict(zip(header, row, strict=True)))
                elif row:
                    yield BadRow(line, f"{len(row)} columns, the first line has {len(header)}")
    except UnicodeDecodeError as error:
        name, byte = encoding.removesuffix("-sig").upper(), error.object[error.start]
        raise InputError(f"{path} is not {name} (byte {byte:#04x}); save it as UTF-8 ({EXCEL_HINT})") from error
    except csv.Error as error:
        raise InputError(f"{path} is not valid CSV after line {number}: {error}") from error
    finally:
        csv.field_size_limit(old_limit)


def _header(path: Path, names: list[str]) -> list[str]:
    """Return the columns' names, without empty ones at the end, which a spreadsheet may add."""
    names = list(names)
    while names and not names[-1].strip():
        names.pop()
    if not names or len(set(names)) != len(names):
        raise InputError(f"{path}: the first line must name each column once, found {str(names)[:300]}")
    return names


def _separator(path: Path, encoding: str) -> tuple[str, int]:
    """Return the separator of a table, and the number of lines before its header (Excel's `sep=;`)."""
    with path.open(encoding=encoding, newline="") as file:
        first = file.readline(MAX_LINE_BYTES)
        if first.lower().startswith("sep=") and len(first.strip()) == 5:
            return first[4], 1
        found = [mark for mark in SEPARATORS if _widths(first, mark) != [1]]
        if len(found) < 2:
            return (found or ["\t" if path.suffix.lower() == ".tsv" else ","])[0], 0
        probe = [first, *islice(_bounded_lines(path, file), PROBED_ROWS)]
    # Several of them are in the header: take the one that cuts all rows alike, or else that with the most columns.
    widths = {mark: _widths("".join(probe), mark) for mark in found}
    return max(found, key=lambda mark: (len(set(widths[mark])) == 1, widths[mark][0])), 0


def _widths(text: str, separator: str) -> list[int]:
    """Return the number of columns of each row of a text, as far as it can be read."""
    widths: list[int] = []
    with contextlib.suppress(csv.Error):
        for row in csv.reader(text.splitlines(keepends=True), delimiter=separator):
            widths += [len(row)] if row else []
    return widths or [1]


def _bounded_lines(path: Path, file: TextIO) -> Iterator[str]:
    """Yield a file's lines, without ever holding a line that is longer than a record may be."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES:
            raise InputError(f"{path}, line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB; is it a CSV file?")
        yield line


def read_xlsx(path: Path, sheet: str | None = None) -> Iterator[Record | BadRow]:
    """Yield the rows of a sheet of an Excel file, with Excel's row numbers; numbers and dates become text.

    Args:
        path: The file.
        sheet: The sheet's name; None: the first sheet.

    Raises:
        InputError: openpyxl is not installed, or the file, the sheet or its first row cannot be used.
    """
    try:
        import openpyxl
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise InputError(f"{path} requires openpyxl, which is not installed; pip install 'mlx-lora[xlsx]'") from error
    broken = (InvalidFileException, zipfile.BadZipFile, ParseError, KeyError, ValueError, TypeError, OSError, EOFError)
    try:
        _check_unpacked(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it does not keep when it writes; nothing is written
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            names = [page.title for page in book.worksheets]
    except broken as error:
        raise InputError(f"{path} is not a readable .xlsx file ({_reason(error)}); save it again as .xlsx") from error
    try:
        if sheet is not None and sheet not in names:
            raise InputError(f"{path} has no sheet {sheet!r}; its sheets are {', '.join(names[:8]) or 'none'}")
        if not names:
            raise InputError(f"{path} has no sheet with rows")
        sheet = sheet or names[0]
        others = [name for name in names if name != sheet]
        empty = f"{path}: the sheet {sheet} is empty; " + (
            f"name another one as {path.name}#{others[0]} (its other sheets: {', '.join(others[:8])})"
            if others
            else "it is the only one; fill it in"
        )
        yield from _sheet_rows(path, book[sheet].iter_rows(values_only=True), empty)
    except broken as error:
        raise InputError(f"{path} is not a readable .xlsx file ({_reason(error)}); save it again as .xlsx") from error
    finally:
        book.close()


def _sheet_rows(path: Path, rows: Iterator[tuple[Any, ...]], empty: str) -> Iterator[Record | BadRow]:
    """Yield the rows below the header, the first row that has content; `empty` is the error if there is none."""
    header: list[str] = []
    for number, values in enumerate(rows, 1):
        cells = [None if value is None else _cell(value) for value in values]
        if not any(cells):
            continue
        if not header:  # the first row that has content
            header = _header(path, [cell or "" for cell in cells])
            continue
        if any(cells[len(header) :]):
            yield BadRow(number, f"{len(cells)} columns, the first row has {len(header)}", "row")
            continue
        record = {name: cell for name, cell in zip(header, cells, strict=False) if name}
        yield checked(number, record, json.dumps(record, ensure_ascii=False), "row")
    if not header:
        raise InputError(empty)


def _cell(value: Any) -> str:
    """Return a cell's value as the text that a person sees there, or nearly."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)  # a date and a time as in 2026-11-26 09:30:00


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_unpacked(path: Path) -> None:
    """Refuse a file whose parts would unpack to far more than its size."""
    with zipfile.ZipFile(path) as parts:
        unpacked = sum(part.file_size for part in parts.infolist())
    if unpacked > LEAST_UNPACKED_BYTES + path.stat().st_size * MOST_UNPACKED:
        raise InputError(f"{path} unpacks to more than {MOST_UNPACKED} times its size; is it a data file?")


def read_parquet(path: Path) -> Iterator[Record | BadRow]:
    """Yield the rows of a .parquet file, numbered from 1.

    Raises:
        InputError: pyarrow is not installed, or the file cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(f"{path} requires pyarrow, which is not installed; pip install 'mlx-lora[parquet]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            allowance = _Allowance(path, file.metadata.num_rows)
            # Read texts as dictionaries: a repeated text is only stored once until its row is read.
            texts = [
                c.path for c in map(file.schema.column, range(len(file.schema))) if c.physical_type == "BYTE_ARRAY"
            ]
            with parquet.ParquetFile(path, read_dictionary=texts) as file:
                for batch in file.iter_batches(batch_size=256):
                    for row in range(batch.num_rows):
                        number += 1
                        (value,) = batch.slice(row, 1).to_pylist()
                        yield allowance.record(number, value)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a readable parquet file: {reason}") from error


class _Allowance:
    """A limit on what a compressed file may unpack to: a few kilobytes could unpack to terabytes."""

    def __init__(self, path: Path, rows: int):
        """Refuse a file that claims to have more rows than bytes."""
        self._path, size = path, path.stat().st_size
        self._left = LEAST_UNPACKED_BYTES + size * MOST_UNPACKED
        if rows > size + LEAST_ROWS:
            raise InputError(f"{path}: {size} bytes that claim to hold {rows} rows; download it again")

    def record(self, number: int, value: dict[str, Any]) -> Record | BadRow:
        """Return a row, and count it against the limit.

        Raises:
            InputError: the limit is exceeded.
        """
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):
            return BadRow(
                number, "has a value that JSON does not support (bytes, a date); keep texts, numbers and lists", "row"
            )
        if len(text) > MAX_LINE_BYTES:
            return BadRow(number, f"row longer than {MAX_LINE_BYTES // 2**20} MiB", "row")
        self._left -= len(text)
        if self._left < 0:
            raise InputError(f"{self._path} unpacks to more than {MOST_UNPACKED} times its size; is it a data file?")
        return checked(number, value, text, "row")
