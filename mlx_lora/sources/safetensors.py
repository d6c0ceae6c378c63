"""Check a safetensors file before MLX maps it: MLX trusts the header, and the header may be wrong.

The safetensors library checks the format's own rules (sizes that fit the file, no gaps, no overlaps); this file adds
what MLX needs beyond them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlx_lora.system.errors import InputError, first_line

MAX_DIM = 2**31 - 1  # MLX's shapes are 32-bit
MAX_DIMS = 32
READABLE = [
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E8M0",
    "U16",
    "I16",
    "F16",
    "BF16",
    "U32",
    "I32",
    "F32",
    "U64",
    "I64",
    "C64",
]  # the types that mx.load supports
MAX_SHOWN = 200  # characters of the library's message, which may quote a name of any length


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Return the tensor table of `path` after checking every size in it against the file.

    Returns:
        {name: {"dtype", "shape"}}, without the metadata entry.

    Raises:
        InputError: the file cannot be read or is truncated, or its header does not fit it.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            header = {name: {"dtype": part.get_dtype(), "shape": part.get_shape()} for name, part in slices.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); check the path") from None
    except SafetensorError as error:
        found = first_line(error).removeprefix("Error while deserializing header: ")[:MAX_SHOWN]
        raise InputError(f"{path}: truncated or damaged safetensors ({found}); download or save it again") from None
    for name, entry in header.items():
        if entry["dtype"] not in READABLE:
            found = f"{name[:MAX_SHOWN]} is {entry['dtype']}"
            raise InputError(f"{path}: {found}, which MLX cannot read; save it as float32 or bfloat16")
        if len(entry["shape"]) > MAX_DIMS or max(entry["shape"], default=0) > MAX_DIM:
            raise InputError(f"{path}: the shape of {name[:MAX_SHOWN]} is larger than MLX can read; save it again")
    return header
