"""Read plain records from data files, each with its line.

This file does not interpret records; data/formats.py does. A file that cannot be read is an InputError; one bad line
among good ones is a BadRow, which the caller counts and reports.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from mlx_lora.system.errors import InputError
from mlx_lora.system.parsing import check_value, parse_json

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
MAX_LINE_BYTES = 64 * 1024 * 1024  # a longer record means a damaged file
# Real texts can be compressed to a tenth, repeated ones even more.
LEAST_UNPACKED_BYTES, MOST_UNPACKED, LEAST_ROWS = 256 * 2**20, 100, 10_000


@dataclass(frozen=True)
class Record:
    """One record of a file, and its location.

    Attributes:
        line: the line that it starts on, from 1.
        value: its content.
        unit: what `line` counts: `line`, or `row` if the file has no lines, or only one.
    """

    line: int
    value: dict[str, Any]
    unit: str = "line"


@dataclass(frozen=True)
class BadRow:
    """A line without a usable record, and the reason; `line` and `unit` as in a Record."""

    line: int
    why: str
    unit: str = "line"


def read_records(path: Path) -> Iterator[Record | BadRow]:
    """Yield the records of one data file in order, without holding a whole .jsonl, .csv or .parquet in memory.

    Args:
        path: A .jsonl, .json, .csv, .parquet or .txt file; text is UTF-8, with or without a BOM.

    Returns:
        Records and bad rows; a .txt file is one record `{"text": ...}`.

    Raises:
        InputError: the file cannot be read in the format of its suffix.
    """
    check_file(path)
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}
    yield from readers[path.suffix.lower()](path)


def check_file(path: Path) -> None:
    """Raise InputError unless `path` is a readable, non-empty file with a known suffix, and without a UTF-16 BOM."""
    if path.is_dir():
        raise InputError(f"{path} is a folder where a data file was expected; name a file inside it")
    if not path.is_file():
        raise InputError(f"data file {path} does not exist")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: cannot read {path.suffix or 'a name without a suffix'}; use {' '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    if not head:
        raise InputError(f"{path} is empty (0 bytes); it needs at least one record")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path} is UTF-16; save it as UTF-8")


def _jsonl(path: Path) -> Iterator[Record | BadRow]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                _skip_line(file, line)
                yield BadRow(number, f"line longer than {MAX_LINE_BYTES // 2**20} MiB")
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield _parse_line(number, line)


def _skip_line(file: BinaryIO, part: bytes) -> None:
    """Skip to the end of a line that begins with `part`, and hold only one piece of it at a time."""
    while part and not part.endswith(b"\n"):
        part = file.readline(1 << 20)


def _parse_line(number: int, line: bytes) -> Record | BadRow:
    try:
        value = parse_json(line)
    except UnicodeDecodeError as error:
        return BadRow(number, f"not UTF-8: byte {line[error.start]:#04x} at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return BadRow(number, f"not JSON: {error.msg} at column {error.colno}")
    except ValueError as error:  # half a surrogate pair, or a number or nesting beyond the limits
        return BadRow(number, f"not usable JSON: {error}")
    return _as_record(number, value)


def _as_record(number: int, value: Any, unit: str = "line") -> Record | BadRow:
    if not isinstance(value, dict):
        return BadRow(number, f"a JSON {_json_type(value)}, not an object", unit)
    return Record(number, value, unit)


def _checked(number: int, value: Any, text: str, unit: str) -> Record | BadRow:
    try:
        check_value(value, text)
    except ValueError as error:
        return BadRow(number, f"not usable JSON: {error}", unit)
    return _as_record(number, value, unit)


def _json_type(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _json(path: Path) -> Iterator[Record | BadRow]:
    text = _decode(path)
    start = _next_char(text, 0)
    if start == len(text):
        raise InputError(f"{path} only has white space; it needs a list of objects")
    if text[start] == "{":
        yield from _json_objects(path, text)
        return
    if text[start] != "[":
        raise InputError(f"{path} is not a JSON list of objects; write [{{...}}, ...] or one object per line as .jsonl")
    # In a file with one line, count records instead of lines.
    unit, rows = ("line" if "\n" in text.strip() else "row"), 0
    decoder, position, line, counted = json.JSONDecoder(), _next_char(text, start + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        rows += 1
        value, end = _decode_element(path, text, position, line, decoder)
        yield _checked(line if unit == "line" else rows, value, text[position:end], unit)
        position = _next_char(text, end)
        mark = text[position : position + 1]
        if mark == ",":
            position = _next_char(text, position + 1)
        elif mark != "]":
            line += text.count("\n", counted, position)
            raise InputError(f"{path}, line {line}: the JSON list is cut off: expected ',' or ']', found {mark!r}")


def _decode_element(path: Path, text: str, position: int, line: int, decoder: json.JSONDecoder) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, position)
    except json.JSONDecodeError as error:
        # What follows a syntax error cannot be trusted, so refuse the whole file.
        raise InputError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not usable JSON near line {line}: {error}") from error


def _json_objects(path: Path, text: str) -> Iterator[Record | BadRow]:
    """Yield the records of a .json file that begins with `{` and has one object per line, as many data sets do."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise InputError(
                f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            ) from error
        yield from _jsonl(path)
        return
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not usable JSON: {error}") from None
    if len(text.splitlines()) == 1:
        yield _checked(1, whole, text, "line")
        return
    keys = ", ".join(list(whole)[:5])
    raise InputError(f"{path} is one JSON object (keys: {keys}), not a list of objects; write [{{...}}, ...]")


def _next_char(text: str, position: int) -> int:
    """Return the index of the next character that is not JSON white space, or the text's length."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _csv(path: Path) -> Iterator[Record | BadRow]:
    old_limit = csv.field_size_limit(MAX_LINE_BYTES)  # Python's own limit, 128 KiB, is too small for long texts
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(_bounded_lines(path, file), strict=True)
            header = next(rows, [])
            if not any(header) or len(set(header)) != len(header):
                raise InputError(f"{path}: the first line must name each column once, found {str(header)[:300]}")
            end = rows.line_num
            for row in rows:
                line, end = end + 1, rows.line_num  # a quoted field may span lines: report the first
                if len(row) == len(header):
                    yield Record(line, dict(zip(header, row, strict=True)))
                elif row:
                    yield BadRow(line, f"{len(row)} columns, the first line has {len(header)}")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.object[error.start]:#04x}); save it as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{path} is not valid CSV after line {rows.line_num}: {error}") from error
    finally:
        csv.field_size_limit(old_limit)


def _bounded_lines(path: Path, file: TextIO) -> Iterator[str]:
    """Yield a file's lines, without ever holding a line that is longer than a record may be."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES:
            raise InputError(f"{path}, line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB; is it a CSV file?")
        yield line


def _parquet(path: Path) -> Iterator[Record | BadRow]:
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
        return _checked(number, value, text, "row")


def _txt(path: Path) -> Iterator[Record | BadRow]:
    yield Record(1, {"text": _decode(path)})


def _decode(path: Path) -> str:
    """Return a file's text with `\\n` line ends and without a BOM."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1  # the decoder's bytes, without a BOM
        raise InputError(
            f"{path} is not UTF-8 (line {line}, byte {error.object[error.start]:#04x}); save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
