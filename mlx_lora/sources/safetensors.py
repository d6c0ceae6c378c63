"""Checks a safetensors file before MLX maps it: MLX trusts the header, and the header may lie.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes. The rules are the format's own
(no gaps, no overlaps, no name twice), so what passes here is read alike by every reader.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mlx_lora.system.errors import InputError
from mlx_lora.system.parsing import check_value, refuse_constant

MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
MAX_DIM = 2**31 - 1  # MLX's shapes are 32-bit
MAX_DIMS = 32
# What mx.load has a type for.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "C64": 8,
}  # fmt: skip
UNKNOWN_TO_MLX = ("F64", "F8_E5M2", "F4", "F6_E2M3", "F6_E3M2")


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Return the tensor table of `path` after checking every size in it against the file.

    Returns:
        {name: {"dtype", "shape", "data_offsets"}}, without the metadata entry.

    Raises:
        InputError: when the file cannot be read, is truncated, or its header does not fit it.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise InputError(_broken(path, f"{size} bytes, header says {header_bytes}"))
            header = _parse(file.read(header_bytes))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise InputError(_broken(path, f"its header is not JSON: {error}")) from None
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(_broken(path, "its metadata is not a table of texts"))
    data_bytes = size - 8 - header_bytes
    for name, entry in header.items():
        _check_entry(path, name, entry, data_bytes)
    end = 0
    for name, (start, stop) in sorted(((n, e["data_offsets"]) for n, e in header.items()), key=lambda pair: pair[1]):
        if start != end:
            raise InputError(_broken(path, f"{_shown(name)} begins at byte {start}, not {end}"))
        end = stop
    if end != data_bytes:
        raise InputError(_broken(path, f"{data_bytes} bytes of tensors where the header lists {end}"))
    return header


def _parse(data: bytes) -> dict[str, Any]:
    """Read the header as strictly as MLX's own JSON reader does, which would raise in the middle of the work.

    Raises:
        ValueError: with the reason.
    """
    text = data.decode("utf-8")
    try:
        header = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(header, dict):
        raise ValueError("it is not a table")
    check_value(header, text)
    return header


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):  # two readers would take two different ones
        raise ValueError("a name stands in it twice")
    return table


def _check_entry(path: Path, name: str, entry: Any, data_bytes: int) -> None:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype in UNKNOWN_TO_MLX:
            raise InputError(
                f"{path}: {_shown(name)} is {dtype}, which MLX does not read; save it as float32 or bfloat16"
            )
        item = ITEM_BYTES[dtype]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        raise InputError(_broken(path, f"no valid entry for {_shown(name)}")) from None
    if not whole or not start <= end <= data_bytes or len(shape) > MAX_DIMS or max(shape, default=0) > MAX_DIM:
        raise InputError(_broken(path, f"the size of {_shown(name)} does not fit"))
    if end - start != item * math.prod(shape):
        raise InputError(_broken(path, f"the size of {_shown(name)} does not fit"))


def _shown(name: str, limit: int = 80) -> str:
    return name if len(name) <= limit else name[:limit] + " ..."


def _broken(path: Path, found: str) -> str:
    return f"{path}: truncated or damaged safetensors ({found}); download or save it again"
