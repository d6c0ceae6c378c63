"""Read plain records from data files, each with its line: JSON, YAML, text, and tables (.csv, .tsv, .xlsx, .parquet).

Records are not interpreted here, but in data/formats.py. A file that cannot be read is an InputError; one bad line
among good ones is a BadRow, which the caller counts and reports. A .csv file's separator is a comma, a semicolon
(LibreOffice, and Excel in many countries) or a tab, whichever its first line has.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import csv
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any, TextIO
from xml.etree.ElementTree import ParseError

from mlx_lora.data.examples import MAX_LINE_BYTES, BadRow, Fields, Record, as_record, checked
from mlx_lora.utils.errors import InputError, first_line
from mlx_lora.utils.parsing import page_bytes, parse_json, parse_yaml

# Real texts can be compressed to a tenth, repeated ones even more.
LEAST_UNPACKED_BYTES, MOST_UNPACKED, LEAST_ROWS = 32 * 2**20, 100, 10_000
TOO_MUCH = f"unpacks to more than {MOST_UNPACKED} times its size; is it a data file?"
LONG_ROW = f"row longer than {MAX_LINE_BYTES // 2**20} MiB"
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
        with zipfile.ZipFile(path) as parts:
            unpacked = sum(part.file_size for part in parts.infolist())
        if unpacked > LEAST_UNPACKED_BYTES + path.stat().st_size * MOST_UNPACKED:
            raise InputError(f"{path} {TOO_MUCH}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it does not keep when it writes; nothing is written
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            names = [page.title for page in book.worksheets]
    except broken as error:
        raise InputError(
            f"{path} is not a readable .xlsx file ({first_line(error)[:200]}); save it again as .xlsx"
        ) from error
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
        page = book[sheet]
        page.reset_dimensions()  # else it reads only as far as the file claims; some programs write less than there is
        yield from _sheet_rows(path, page.iter_rows(values_only=True), empty)
    except broken as error:
        raise InputError(
            f"{path} is not a readable .xlsx file ({first_line(error)[:200]}); save it again as .xlsx"
        ) from error
    finally:
        book.close()


def _sheet_rows(path: Path, rows: Iterator[tuple[Any, ...]], empty: str) -> Iterator[Record | BadRow]:
    """Yield the rows below the header, the first row that has content; `empty` is the error if there is none."""
    header: list[str] = []
    allowance = _Allowance(path, 0)  # many cells may have the same text, which is in the file once
    for number, values in enumerate(rows, 1):
        cells = [None if value is None else _cell(value) for value in values]
        if not any(cells):
            continue
        if not header:  # the first row that has content
            header = _header(path, [cell or "" for cell in cells])
            continue
        too_many, too_long = any(cells[len(header) :]), sum(len(cell or "") for cell in cells) > MAX_LINE_BYTES
        if too_many or too_long:
            why = f"{len(cells)} columns, the first row has {len(header)}" if too_many else LONG_ROW
            yield BadRow(number, why, "row")
            continue
        cells += [None] * (len(header) - len(cells))
        record = {name: cell for name, cell in zip(header, cells, strict=False) if name}
        yield allowance.record(number, record)
    if not header:
        raise InputError(empty)


def _cell(value: Any) -> str:
    """Return a cell's value as the text that a person sees there, or nearly."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)  # a date and a time as in 2026-11-26 09:30:00


def read_parquet(path: Path) -> Iterator[Record | BadRow]:
    """Yield the rows of a .parquet file, numbered from 1.

    Raises:
        InputError: pyarrow is not installed, the file cannot be read, or it unpacks to too much.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(f"{path} requires pyarrow, which is not installed; pip install 'mlx-lora[parquet]'") from error
    number = 0
    try:
        with path.open("rb") as opened:
            opened.seek(-8, os.SEEK_END)
            opened.seek(-8 - int.from_bytes(opened.read(4), "little"), os.SEEK_END)
            # Without the Arrow types that it may name, among them lists of a fixed size, which a single bit makes large.
            footer = parquet.read_metadata(io.BytesIO(opened.read().replace(b"ARROW:schema", b"arrow:schema")))
        with parquet.ParquetFile(path, metadata=footer) as file:
            allowance = _Allowance(path, footer.num_rows)
            if sum(page_bytes(path, file)) > allowance.left:
                raise InputError(f"{path} {TOO_MUCH}")
            columns = [file.schema.column(place) for place in range(len(file.schema))]
        # Read texts as dictionaries: a repeated text is only stored once until its row is read.
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        with parquet.ParquetFile(path, metadata=footer, read_dictionary=texts) as file:
            for batch in map(pyarrow.RecordBatch.to_struct_array, file.iter_batches(batch_size=256)):
                fits = _unpacked_bytes(batch) <= MAX_LINE_BYTES
                for row in map(batch.slice, range(len(batch)), repeat(1)):
                    number += 1
                    if not fits and _unpacked_bytes(row) > MAX_LINE_BYTES:
                        yield BadRow(number, LONG_ROW, "row")
                        continue
                    (value,) = row.to_pylist()
                    yield allowance.record(number, {key: _jsonable(item) for key, item in value.items()})
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise InputError(f"{path} is not a readable parquet file: {first_line(error)}") from error


def _unpacked_bytes(array: Any) -> int:
    """Return the bytes of the values of an Arrow array; a text counts each time that it is used."""
    import pyarrow.compute as compute

    if hasattr(array, "dictionary"):
        lengths = compute.call_function("binary_length", [array.dictionary])
        return compute.call_function("sum", [lengths.take(array.indices)]).as_py() or 0
    if not array.type.num_fields:
        return array.nbytes
    parts = (
        array.flatten()
        if hasattr(array, "field")
        else [array.values[array.offsets[0].as_py() : array.offsets[-1].as_py()]]
    )
    return sum(map(_unpacked_bytes, parts))


def _jsonable(value: Any) -> Any:
    """Return a cell of a table as JSON can hold it.

    Pictures, as bytes or as the hub's `{"bytes": ..., "path": ...}`, become data URLs; dates and exact decimals become text. An object loses
    its absent fields: a column has one type, so each object has the fields of all rows (tools' arguments, for example).
    """
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, date | time | timedelta | Decimal):  # a datetime is a date
        return str(value)
    if isinstance(value, bytes):
        return {"url": f"data:;base64,{base64.b64encode(value).decode()}"}
    if not isinstance(value, dict):
        return value
    if value.keys() == {"bytes", "path"} and isinstance(value["bytes"], bytes):
        return _jsonable(value["bytes"])
    return {key: _jsonable(item) for key, item in value.items() if item is not None}


class _Allowance:
    """A limit on what a compressed file may unpack to: a few kilobytes could unpack to terabytes."""

    def __init__(self, path: Path, rows: int):
        """Refuse a file that claims to have more rows than bytes."""
        self._path, size = path, path.stat().st_size
        self.left = LEAST_UNPACKED_BYTES + size * MOST_UNPACKED
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
            return BadRow(number, "has a value that JSON does not support; keep texts, numbers and lists", "row")
        if len(text) > MAX_LINE_BYTES:
            return BadRow(number, LONG_ROW, "row")
        self.left -= len(text)
        if self.left < 0:
            raise InputError(f"{self._path} {TOO_MUCH}")
        return checked(number, value, text, "row")


# Tables
MARKDOWN = (".md", ".markdown")
DOCUMENTS = (".txt", *MARKDOWN)  # a file is one text
FRONT_MATTER = re.compile(r"---[ \t]*\n(?P<settings>.*?\n)(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
TABLES = (".csv", ".tsv")  # where a cell without a value is an empty text
PACKED = (".xlsx", ".parquet")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".parquet", *DOCUMENTS)
INSTEAD = {  # what to do with files of other kinds
    **dict.fromkeys((".xls", ".ods", ".numbers"), "save it as .xlsx or .csv"),
    **dict.fromkeys(
        (".pdf", ".doc", ".docx", ".rtf", ".pages", ".odt", ".html", ".htm"),
        "save its text as .txt to teach its style; to teach answers, write rows of a question and an answer (.csv)",
    ),
    ".zip": "unpack it, and give a file inside, such as WhatsApp's _chat.txt",
}
# Lists of rows in an object, those that are found first; the viewer of hub data sets writes `rows`.
ROW_LISTS = ("rows", "data", "examples", "conversations", "records", "items", "dataset")
# Lists that are a part of one record.
_OF_ANSWERS = ("completion", "completions", "answers", "chosen", "rejected", "chosen_messages", "rejected_messages")
RECORD_LISTS = frozenset(("prompt", "messages", "conversation", "history", "tools", "functions", *_OF_ANSWERS))
TURN_KEYS = ({"role", "content"}, {"from", "value"})


def read_records(path: Path, sheet: str | None = None) -> Iterator[Record | BadRow]:
    """Yield the records of one data file in order, without holding a whole .jsonl, .csv or .parquet in memory.

    Args:
        path: A file with one of SUFFIXES; text is UTF-8, with or without a BOM, or UTF-16 with one.
        sheet: The sheet of an .xlsx file; None: the first.

    Returns:
        Records and bad rows; a .txt or .md file is one record `{"text": ...}`.

    Raises:
        InputError: the file cannot be read in the format of its suffix.
    """
    check_file(path)
    readers = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": read_csv,
        ".tsv": read_csv,
        ".xlsx": partial(read_xlsx, sheet=sheet),
        ".parquet": read_parquet,
    }
    yield from readers.get(path.suffix.lower(), _document)(path)


def without_empty_cells(record: Fields, file: str, columns: re.Pattern[str]) -> Fields:
    """Return a record of a .csv or .tsv file without the empty cells of some columns, which every row has there.

    Args:
        record: as it was read.
        file: the name of its file; records of other files stay as they are.
        columns: matches names in lower case, with `_` for spaces.
    """
    if not file.lower().endswith(TABLES):
        return record
    names = {name: "_".join(str(name).lower().replace("-", " ").split()) for name in record}
    return {name: cell for name, cell in record.items() if cell or not columns.fullmatch(names[name])}


def check_file(path: Path) -> None:
    """Raise InputError unless `path` is a readable file with a known suffix, and begins as such a file does.

    Tables are not empty, text is no picture, and .jsonl is not UTF-16.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        raise InputError(f"{path} is a folder where a data file was expected; name a file inside it")
    if not path.is_file():
        raise InputError(f"data file {path} does not exist")
    if suffix in INSTEAD:
        raise InputError(f"{path}: cannot read {suffix}; {INSTEAD[suffix]}")
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: cannot read {path.suffix or 'a name without a suffix'}; use {' '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    if not head and suffix not in DOCUMENTS:  # an empty note in a folder of notes is a bad row, which the report counts
        raise InputError(f"{path} is empty (0 bytes); it needs at least one record")
    if suffix == ".jsonl" and head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path} is UTF-16; save it as UTF-8")
    if suffix not in PACKED and (head.startswith(b"%PDF") or (b"\0" in head and text_encoding(path) != "utf-16")):
        raise InputError(
            f"{path} is no {suffix} file: it begins with {head[:4]!r}, which is not text; give a file that is, in UTF-8"
        )


def _jsonl(path: Path) -> Iterator[Record | BadRow]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):  # hold only one piece of it at a time
                    line = file.readline(1 << 20)
                yield BadRow(number, f"line longer than {MAX_LINE_BYTES // 2**20} MiB")
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield _parse_line(number, line)


def _parse_line(number: int, line: bytes) -> Record | BadRow:
    try:
        value = parse_json(line)
    except UnicodeDecodeError as error:
        return BadRow(number, f"not UTF-8: byte {line[error.start]:#04x} at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        if ends_early(error):
            return BadRow(number, f"not JSON: the line ends too early, after {len(error.doc.rstrip()):,} characters")
        return BadRow(number, f"not JSON: {error.msg} at column {error.colno}")
    except ValueError as error:  # half a surrogate pair, or a number or nesting beyond the limits
        return BadRow(number, f"not usable JSON: {error}")
    return as_record(number, value)


def ends_early(error: json.JSONDecodeError) -> bool:
    """Tell whether a text is no JSON because its end is missing: json then names the place where more would begin."""
    return error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")


def _where(error: json.JSONDecodeError) -> str:
    """Return what is wrong with a file, and in which line."""
    if ends_early(error):
        last = error.doc.rstrip().count("\n") + 1
        return f"the file ends too early, in line {last}; download it again, or complete it"
    return f"{error.msg} at line {error.lineno}, column {error.colno}"


def _json(path: Path) -> Iterator[Record | BadRow]:
    text = decoded_text(path)
    start = _next_char(text, 0)
    if start == len(text):
        raise InputError(f"{path} only has white space; it needs a list of objects")
    if text[start] == "{":
        yield from _json_objects(path, text)
        return
    if text[start] != "[":
        raise InputError(f"{path} is not a JSON list of objects; write [{{...}}, ...] or one object per line as .jsonl")
    # In a file with one line, count records instead of lines.
    unit, rows = ("line" if "\n" in text.strip() else "record"), 0
    decoder, position, line, counted = json.JSONDecoder(), _next_char(text, start + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        rows += 1
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            # What follows a syntax error cannot be trusted, so refuse the whole file.
            raise InputError(f"{path} is not valid JSON: {_where(error)}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not usable JSON near line {line}: {error}") from error
        yield checked(line if unit == "line" else rows, value, text[position:end], unit)
        position = _next_char(text, end)
        mark = text[position : position + 1]
        if mark == ",":
            position = _next_char(text, position + 1)
        elif mark != "]":
            line += text.count("\n", counted, position)
            raise InputError(f"{path}, line {line}: the JSON list is cut off: expected ',' or ']', found {mark!r}")


def _json_objects(path: Path, text: str) -> Iterator[Record | BadRow]:
    """Yield the records of a .json file that begins with `{` and has one object per line, as many data sets do."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise InputError(f"{path} is not valid JSON: {_where(error)}") from error
        yield from _jsonl(path)
        return
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not usable JSON: {error}") from None
    rows = _rows_of(whole)
    if rows is not None:
        for number, row in enumerate(rows, 1):
            yield _row(number, row)
    elif len(text.splitlines()) == 1:
        yield checked(1, whole, text, "record")
    else:
        keys = ", ".join(list(whole)[:5])
        raise InputError(f"{path} is one JSON object (keys: {keys}) with no list of rows; write [{{...}}, ...]")


def _rows_of(whole: dict[str, Any]) -> list[Any] | None:
    """Return the rows that an object holds: in a list, or in columns as pandas and datasets write them; None: none."""
    lists = [name for name, value in whole.items() if name not in RECORD_LISTS and _holds_rows(value)]
    named = [name for name in ROW_LISTS if name in lists]
    if named or len(lists) == 1:
        return whole[(named or lists)[0]]
    columns = list(whole.values())
    if columns and all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        if all(name.isdecimal() for name in whole):  # rows by their numbers
            return columns
        return [{name: column[row] for name, column in whole.items()} for row in columns[0]]
    lists = all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
    if len(columns) < 2 or not lists or any(_is_turn(value) for column in columns for value in column):
        return None  # turns are one record's
    return [dict(zip(whole, row, strict=True)) for row in zip(*columns, strict=True)]


def _holds_rows(value: Any) -> bool:
    """Tell whether a value is a list of rows: of objects that are no turns of one chat, or of lists of turns."""
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(row, list) and row and all(map(_is_turn, row)) for row in value):
        return True
    return all(isinstance(row, dict) for row in value) and not all(map(_is_turn, value))


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and any(value.keys() >= keys for keys in TURN_KEYS)


def _row(number: int, row: Any) -> Record | BadRow:
    """Return one row of such a list; one of the viewer's is unwrapped, and a list of turns is a conversation."""
    if isinstance(row, list):
        row = {"conversations": row}
    elif isinstance(row, dict) and isinstance(row.get("row"), dict) and "row_idx" in row:
        if row.get("truncated_cells"):
            return BadRow(number, f"the viewer cut {', '.join(map(str, row['truncated_cells']))} short", "record")
        row = row["row"]
    return checked(number, row, json.dumps(row, ensure_ascii=False), "record")


def _next_char(text: str, position: int) -> int:
    """Return the index of the next character that is not JSON white space, or the text's length."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _document(path: Path) -> Iterator[Record | BadRow]:
    text = decoded_text(path)
    front = _front_matter(text) if path.suffix.lower() in MARKDOWN else ""
    text = text[len(front) :]
    if not text.strip():
        yield BadRow(1, "no text after its front matter" if front else "empty file")
        return
    yield Record(1, {"text": text.lstrip("\n") if front else text}, without="YAML front matter" if front else "")


def _front_matter(text: str) -> str:
    """Return the block of settings between two lines `---` with which a Markdown file may begin; empty if it has none."""
    found = FRONT_MATTER.match(text)
    try:
        return found[0] if found and isinstance(parse_yaml(found["settings"]), dict) else ""
    except ValueError:
        return ""  # a rule, then text, then another rule


def decoded_text(path: Path) -> str:
    """Return a file's text with `\\n` line ends and without a BOM."""
    data, encoding = path.read_bytes(), text_encoding(path)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        line = error.object.count(b"\n", 0, error.start) + 1  # the decoder's bytes, without a BOM
        raise InputError(
            f"{path} is not {name} (line {line}, byte {error.object[error.start]:#04x}); save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
