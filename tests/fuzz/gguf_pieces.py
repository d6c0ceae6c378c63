"""GGUF written by hand, so that every length, type and offset in it can be a lie."""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
LIES = (0, 1, 7, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def read_pieces(path: str) -> dict[str, Any]:
    """Return a good file's metadata as [key, type, item type, value] rows, and its tensors as [name, dims, type, bytes]."""
    reader = GGUFReader(path)
    pairs, tensors = [], []
    for field in reader.fields.values():
        if field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        item = field.types[1] if kind == GGUFValueType.ARRAY else None
        pairs.append([field.name, int(kind), None if item is None else int(item), field.contents()])
    for tensor in reader.tensors:
        dims = [int(n) for n in tensor.shape]
        tensors.append([tensor.name, dims, int(tensor.tensor_type), np.array(tensor.data).tobytes()])
    return {"pairs": pairs, "tensors": tensors}


def spoiled_gguf(pieces: dict[str, Any], rng: random.Random) -> bytes:
    """Write the pieces with one or two things wrong."""
    pairs = [list(pair) for pair in pieces["pairs"]]
    tensors = [list(tensor) for tensor in pieces["tensors"]]
    lies: dict[str, int] = {}
    for _ in range(rng.choice((1, 1, 2))):
        how = rng.randrange(9)
        if how < 4:
            _spoil_pair(pairs, rng)
        elif how < 7:
            _spoil_tensor(tensors, rng)
        else:
            lies[rng.choice(("tensors", "pairs", "version", "string", "array", "dims", "offset"))] = rng.choice(LIES)
    return gguf_bytes(pairs, tensors, lies)


def _spoil_pair(pairs: list[list[Any]], rng: random.Random) -> None:
    at = rng.randrange(len(pairs))
    key, kind, item, value = pairs[at]
    how = rng.randrange(7)
    if how == 0:
        del pairs[at]
    elif how == 1:
        pairs.insert(at, list(pairs[at]))
    elif how == 2:
        pairs[at] = [
            key,
            STRING,
            None,
            rng.choice(("", "x", "../../outside", "\0", "llama", "a" * 5000, "{{ 9 ** 9 ** 9 }}")),
        ]
    elif how == 3:
        pairs[at] = [key, rng.choice((4, 5, 6, 10, 12)), None, rng.choice((0, 1, 3, 4294967295))]
    elif how == 4:
        pairs[at] = [key, ARRAY, 4, [rng.choice((0, 1, 2**32 - 1))] * rng.choice((0, 1, 3))]
    elif how == 5 and kind == ARRAY and value:
        value = list(value)
        place = rng.randrange(len(value))
        if rng.random() < 0.5:
            value[place] = value[rng.randrange(len(value))]
        else:
            del value[place:]
        pairs[at] = [key, kind, item, value]
    else:
        pairs[at] = [rng.choice(("general.alignment", "split.count", key + "x")), 4, None, rng.choice((0, 1, 3, 2**31))]


def _spoil_tensor(tensors: list[list[Any]], rng: random.Random) -> None:
    at = rng.randrange(len(tensors))
    how = rng.randrange(6)
    if how == 0:
        del tensors[at]
    elif how == 1:
        tensors.insert(at, list(tensors[at]))
    elif how == 2:
        tensors[at][0] = rng.choice(("x", "", "../x", "blk.999999999.attn_q.weight", tensors[at][0] + ".bias"))
    elif how == 3:
        tensors[at][2] = rng.choice((0, 1, 2, 3, 8, 12, 14, 30, 39, 99, 2**32 - 1))
    elif how == 4:
        tensors[at][1] = rng.choice(
            ([], [0], [1], [2**40, 2**40], [2**63, 2], [32] * 4, [32] * 5, tensors[at][1][::-1])
        )
    else:
        tensors[at][3] = rng.randbytes(len(tensors[at][3]))


def gguf_bytes(pairs: list[list[Any]], tensors: list[list[Any]], lies: dict[str, int]) -> bytes:
    """Write a GGUF file; `lies` replace what the file says of itself."""
    head = b"GGUF" + struct.pack("<I", lies.get("version", 3) % 2**32)
    head += struct.pack("<QQ", lies.get("tensors", len(tensors)), lies.get("pairs", len(pairs)))
    for key, kind, item, value in pairs:
        head += _string(key) + struct.pack("<I", kind) + _value(kind, item, value, lies)
    offset, table, data = 0, b"", b""
    for name, dims, kind, content in tensors:
        table += _string(name) + struct.pack("<I", lies.get("dims", len(dims)) % 2**32)
        table += b"".join(struct.pack("<Q", n) for n in dims)
        table += struct.pack("<IQ", kind, lies.get("offset", offset))
        data += content + bytes(-len(content) % 32)
        offset = len(data)
    head += table
    return head + bytes(-len(head) % 32) + data


def _string(text: str, length: int | None = None) -> bytes:
    content = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content) if length is None else length) + content


def _value(kind: int, item: int | None, value: Any, lies: dict[str, int]) -> bytes:
    if kind == STRING:
        return _string(str(value), lies.get("string"))
    if kind in (6, 12):
        return struct.pack(SCALARS[kind], float(value))
    if kind != ARRAY:
        size = struct.calcsize(SCALARS[kind])
        return (int(value) % 256**size).to_bytes(size, "little")
    head = struct.pack("<IQ", item, lies.get("array", len(value)))
    return head + b"".join(_value(item, None, one, {}) for one in value)
