"""Checks a safetensors file before MLX maps it: MLX trusts the header, and the header may lie.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mlx_lora.errors import InputError

MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


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
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError:  # JSON and UTF-8 errors both
        raise InputError(_broken(path, "its header is not JSON")) from None
    if not isinstance(header, dict):
        raise InputError(_broken(path, "its header is not a table"))
    header.pop("__metadata__", None)
    data_bytes = size - 8 - header_bytes
    for name, entry in header.items():
        _check_entry(path, name, entry, data_bytes)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != data_bytes:
        raise InputError(_broken(path, f"{data_bytes} bytes of tensors where the header lists {end}"))
    return header


def _check_entry(path: Path, name: str, entry: Any, data_bytes: int) -> None:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        item = ITEM_BYTES[dtype]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        raise InputError(_broken(path, f"no valid entry for {name[:80]}")) from None
    if not whole or not start <= end <= data_bytes or end - start != item * math.prod(shape):
        raise InputError(_broken(path, f"the size of {name[:80]} does not fit"))


def _broken(path: Path, found: str) -> str:
    return f"{path}: truncated or damaged safetensors ({found}); download or save it again"
