"""Read the rows of a .parquet file, without unpacking more than a data file of its size holds.

A few kilobytes can unpack to terabytes: pages are compressed, a text that repeats is stored once, and so are a million equal values of a
list. So the sizes of all pages are added up before one is read, and those of a row's texts before the row is made.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

from mlx_lora.data.examples import MAX_LINE_BYTES, BadRow, Record, checked
from mlx_lora.utils.errors import InputError, first_line

# Real texts can be compressed to a tenth, repeated ones even more.
LEAST_UNPACKED_BYTES, MOST_UNPACKED, LEAST_ROWS = 32 * 2**20, 100, 10_000
TOO_MUCH = f"unpacks to more than {MOST_UNPACKED} times its size; is it a data file?"
LONG_ROW = f"row longer than {MAX_LINE_BYTES // 2**20} MiB"
LIST_VALUE_BYTES = 16  # of a number in a list of a Parquet file, with its place


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
            allowance = Allowance(path, footer.num_rows)
            _check_pages(path, file, allowance.left)
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
        AttributeError,
        TypeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise InputError(f"{path} is not a readable parquet file: {first_line(error)}") from error


def _check_pages(path: Path, file: Any, left: int) -> None:
    """Refuse a .parquet file whose pages would unpack to more than `left` bytes.

    The footer has the sizes of pages, too, but may lie: a reader goes by their own headers.
    """
    with path.open("rb") as opened:
        for group in map(file.metadata.row_group, range(file.num_row_groups)):
            for place in range(group.num_columns):
                column, schema = group.column(place), file.schema.column(place)
                value_bytes = max(0, schema.length) + (LIST_VALUE_BYTES if schema.max_repetition_level else 0)
                start = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
                end = start + column.total_compressed_size
                while start < end:
                    opened.seek(start)
                    header = _thrift(opened)  # 2, 3: its bytes unpacked and packed; 5 or 8: of data, 1: their number
                    start = opened.tell() + max(0, header[3])
                    values = (header.get(5) or header.get(8) or {1: 0})[1]
                    left -= max(0, header[2]) + max(0, values) * value_bytes
                    if left < 0:
                        raise InputError(f"{path} {TOO_MUCH}")


def _thrift(file: BinaryIO, kind: int = 12) -> Any:
    """Read a value in Thrift's compact protocol, as far as the headers of Parquet's pages use it.

    Args:
        file: at the value's start; afterwards at its end.
        kind: the protocol's number of its type; 12 is a struct.

    Returns:
        A whole number, or a struct's values by their numbers; nothing useful for a text.

    Raises:
        ValueError: it has a value of another type. (What is missing at the end of a file is 0.)
    """
    if kind == 12:
        fields, number = {}, 0
        while head := int.from_bytes(file.read(1)):
            number = number + (head >> 4) if head >> 4 else _thrift(file, 5)
            fields[number] = _thrift(file, head & 15)
        return fields
    if kind in (1, 2):  # true and false
        return 2 - kind
    if kind not in (4, 5, 6, 8):
        raise ValueError(f"a value of type {kind}")
    value = shift = 0
    while (byte := int.from_bytes(file.read(1))) > 127 and shift < 63:
        value, shift = value | (byte & 127) << shift, shift + 7
    value |= byte << shift
    if kind == 8:
        file.seek(value, 1)
    return value >> 1 ^ -(value & 1)


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


class Allowance:
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
