"""Read GGUF files: metadata, tensor table, and tensor bytes mapped from disk.

Every length in the file is checked against the file's size before anything is allocated or read, so a truncated or
malicious file ends in one `InputError`. Layout (little endian), as in ggml's docs/gguf.md:

    "GGUF" | version u32 | tensor count u64 | metadata count u64
    metadata:     key string | value type u32 | value
    tensor table: name string | n_dims u32 | dims u64 x n_dims, innermost first | ggml type u32 | offset u64
    padding to general.alignment | tensor data
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from mlx_lora.utils.errors import InputError

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
# The same types as codes of `struct`, which differ from numpy's: "l" has 4 bytes in `struct` and 8 in numpy.
_STRUCT_CODES = {
    "<u1": "<B",
    "<i1": "<b",
    "<u2": "<H",
    "<i2": "<h",
    "<u4": "<I",
    "<i4": "<i",
    "<f4": "<f",
    "<u8": "<Q",
    "<i8": "<q",
    "<f8": "<d",
}
_SMALLEST_PAIR_BYTES = 8 + 4 + 1  # empty key, value type, one-byte value
_SMALLEST_TENSOR_BYTES = 8 + 4 + 4 + 8  # empty name, no dims, type, offset
_MOST_DIMS = 4  # GGML_MAX_DIMS
_MOST_NESTING = 4  # arrays of arrays; real files have none


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor, still packed.

    Attributes:
        name: as in the file, e.g. `blk.0.attn_q.weight`.
        type: ggml block type.
        shape: row-major, (out, in) for a weight matrix: the reverse of the file's order.
        data: (rows, bytes per row) uint8, mapped from the file; rows are all but the last axis of `shape`.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray

    def dequantize(self) -> np.ndarray:
        """Return the values.

        Returns:
            `shape` float32, a new array.

        Raises:
            InputError: the `gguf` package cannot unpack this type.
        """
        try:
            values = gguf.quants.dequantize(self.data, self.type)
        except NotImplementedError:
            raise InputError(
                f"tensor {self.name}: type {self.type.name} cannot be unpacked; use a file with K-quants or Q8_0"
            ) from None
        return np.array(values, dtype=np.float32).reshape(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: of the file.
        version: 2 or 3.
        metadata: key to value; numeric arrays are numpy arrays, string arrays are lists.
        tensors: name to tensor, in the file's order.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file (version 2 or 3, little endian) without reading its tensor data.

    Args:
        path: the file.

    Returns:
        The file with metadata in memory, and tensors mapped from disk.

    Raises:
        InputError: the file is missing, truncated, damaged, or not such a GGUF file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise InputError(f"{path}: asked to read a GGUF file, found a folder; give the .gguf file in it")
        if size == 0:
            raise InputError(f"{path}: asked to read a GGUF file, found an empty one; download it again")
        cursor = _Cursor(path, np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise InputError(f"{path}: asked to read a GGUF file, found none ({error.strerror}); check the path") from None
    magic = bytes(cursor.view[:4])
    if magic != b"GGUF":
        raise InputError(f"{path}: asked to read GGUF, found a file that starts with {magic!r}; give a .gguf file")
    cursor.position = 4
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in (1, 2, 3)
        kind = "a big-endian file" if swapped else f"GGUF version {version}"
        raise InputError(f"{path}: asked to read GGUF, found {kind}; give a little-endian file of version 2 or 3")
    n_tensors = cursor.number("<Q", "the tensor count")
    n_pairs = cursor.number("<Q", "the metadata count")
    cursor.need(n_pairs * _SMALLEST_PAIR_BYTES, f"{n_pairs} metadata pairs")
    cursor.need(n_tensors * _SMALLEST_TENSOR_BYTES, f"a table of {n_tensors} tensors")
    metadata: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = cursor.string("a metadata key")
        if key in metadata:
            cursor.fail(f"metadata key {key!r} twice")
        metadata[key] = _read_value(cursor, cursor.number("<I", f"the type of {key}"), key)
    table = []
    for _ in range(n_tensors):
        name = cursor.string("a tensor name")
        n_dims = cursor.number("<I", f"the dimension count of {name}")
        if n_dims > _MOST_DIMS:
            cursor.fail(f"{n_dims} dimensions of tensor {name} (at most {_MOST_DIMS})")
        dims = [cursor.number("<Q", f"the shape of {name}") for _ in range(n_dims)]
        kind, offset = (cursor.number(layout, f"the type or offset of {name}") for layout in ("<I", "<Q"))
        table.append((name, tuple(reversed(dims)), kind, offset))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment {alignment!r}, which is not a power of two")
    return GGUFFile(path, version, metadata, _map_tensors(cursor, table, alignment))


def is_gguf(path: str | Path) -> bool:
    """Return whether a file starts with GGUF's magic bytes."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


class _Cursor:
    """A position in the mapped file that never runs past its end."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.view = path, data, data.data
        self.position, self.size = 0, len(data)

    def fail(self, found: str) -> NoReturn:
        raise InputError(f"{self.path}: reading it as GGUF found {found}; download or convert the file again")

    def need(self, n_bytes: int, what: str) -> None:
        """Check that `n_bytes` more exist, before they are read or allocated."""
        if n_bytes > self.size - self.position:
            left = self.size - self.position
            self.fail(f"{what} of {n_bytes} bytes at byte {self.position} where only {left} are left")

    def number(self, layout: str, what: str) -> Any:
        n_bytes = struct.calcsize(layout)
        self.need(n_bytes, what)
        (value,) = struct.unpack_from(layout, self.view, self.position)
        self.position += n_bytes
        return value

    def string(self, what: str) -> str:
        length = self.number("<Q", f"the length of {what}")
        self.need(length, what)
        start, self.position = self.position, self.position + length
        return self._text(start, self.position, what)

    def strings(self, count: int, what: str) -> list[str]:
        """Return `count` strings, read in one tight loop because vocabularies have hundreds of thousands."""
        self.need(8 * count, what)
        unpack, view, size = struct.Struct("<Q").unpack_from, self.view, self.size
        position, result = self.position, []
        for _ in range(count):
            start = position + 8
            if start > size:
                self.position = position
                self.need(8, what)
            position = start + unpack(view, position)[0]
            if position > size:
                self.position = start
                self.need(position - start, what)
            try:
                result.append(str(view[start:position], "utf-8"))
            except UnicodeDecodeError:
                self._text(start, position, what)
        self.position = position
        return result

    def _text(self, start: int, end: int, what: str) -> str:
        try:
            return str(self.view[start:end], "utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} at byte {start} that is not UTF-8")


def _read_value(cursor: _Cursor, type_number: int, key: str, depth: int = 0) -> Any:
    """Return one metadata value; a numeric array of any length is a numpy array."""
    kind = _known(GGUFValueType, type_number)
    if kind is None:
        cursor.fail(f"value type {type_number} of {key}, which GGUF does not have")
    if kind is GGUFValueType.STRING:
        return cursor.string(key)
    if kind is not GGUFValueType.ARRAY:
        value = cursor.number(_STRUCT_CODES[_SCALARS[kind]], key)
        return bool(value) if kind is GGUFValueType.BOOL else value
    item_number = cursor.number("<I", f"the item type of {key}")
    count = cursor.number("<Q", f"the length of {key}")
    item = _known(GGUFValueType, item_number)
    if item is GGUFValueType.STRING:
        return cursor.strings(count, f"{key} ({count} strings)")
    if item is GGUFValueType.ARRAY:
        if depth == _MOST_NESTING:
            cursor.fail(f"arrays nested more than {_MOST_NESTING} deep in {key}")
        cursor.need(count * (4 + 8), f"{key} ({count} arrays)")
        return [_read_value(cursor, item_number, key, depth + 1) for _ in range(count)]
    if item is None:
        cursor.fail(f"item type {item_number} of {key}, which GGUF does not have")
    dtype = np.dtype(_SCALARS[item])
    cursor.need(count * dtype.itemsize, f"{key} ({count} numbers)")
    start, cursor.position = cursor.position, cursor.position + count * dtype.itemsize
    values = np.frombuffer(cursor.view[start : cursor.position], dtype=dtype).copy()
    return values.astype(bool) if item is GGUFValueType.BOOL else values


def _map_tensors(
    cursor: _Cursor, table: list[tuple[str, tuple[int, ...], int, int]], alignment: int
) -> dict[str, GGUFTensor]:
    """Return the tensors of the mapped file, after checking that each is inside the file and none overlap."""
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    spans = []
    for name, shape, type_number, offset in table:
        if name in tensors:
            cursor.fail(f"tensor {name} twice")
        kind = _known(GGMLQuantizationType, type_number)
        if kind is None or kind not in gguf.GGML_QUANT_SIZES:
            cursor.fail(f"tensor {name} of ggml type {type_number}, which is not known")
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        width = shape[-1] if shape else 1
        if 0 in shape or width % block:
            cursor.fail(f"tensor {name} of shape {shape}, which {kind.name} blocks of {block} cannot fill")
        if offset % alignment:
            cursor.fail(f"tensor {name} at offset {offset}, which is not aligned to {alignment}")
        rows, row_bytes = math.prod(shape[:-1]), width // block * block_bytes
        begin, end = start + offset, start + offset + rows * row_bytes  # Python integers do not overflow
        if end > cursor.size:
            cursor.fail(f"tensor {name} that ends at byte {end} of {cursor.size}")
        spans.append((begin, end, name))
        tensors[name] = GGUFTensor(name, kind, shape, cursor.data[begin:end].reshape(rows, row_bytes))
    spans.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            cursor.fail(f"tensors {first} and {second} that overlap")
    return tensors


def _known(kinds: type, number: int) -> Any:
    """Return the enum member with that number, or None."""
    try:
        return kinds(number)
    except ValueError:
        return None
