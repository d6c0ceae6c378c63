"""Seeded mutations: the same seed spoils the same thing in the same way, on every machine; and GGUF written by hand, so that everything in it can be a lie."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

DEEP = "@@deep@@"  # stands for brackets nested beyond what Python's own JSON writer can write
DEPTH = 20_000
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 10**6, 10**9, 2**31, 2**63, 10**18, 10**30, 10**400, 0.5, -0.5, 1e308, 1e-320,
    float("nan"), float("inf"), "", "x", "1", "0", "nan", "true", "../../outside/escaped", "/outside/escaped", "a/b",
    "..", ".", "\0", "a\0b", "\ud800", "\u202e", "a" * 20_000, "é" * 300, "__class__", "model.layers", "self", "lora_a",
    [], {}, [[]], [None], [1, "a", None], ["x"] * 50, {"a": 1}, {"": {"": []}}, [[[[[[[[1]]]]]]]], DEEP,
]  # fmt: skip


def spoiled_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat or swap pieces of a file, one to four times."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        span = rng.choice((1, 2, 4, 8, 64))
        how = rng.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at : at + span]
        elif how == 2:
            data[at:at] = rng.randbytes(span)
        elif how == 3:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data))))
        elif how == 4:
            data[at:at] = data[at : at + span] * rng.choice((1, 3, 100))
        else:
            del data[at:]
    return bytes(data)


def spoiled_text(text: str, rng: random.Random) -> bytes:
    """Spoil a text file: bytes, a control character, another encoding, a byte order mark, one line many times."""
    how = rng.randrange(6)
    lines = text.splitlines(keepends=True) or [""]
    if how == 0:
        return text.encode("utf-16")
    if how == 1:
        return b"\xef\xbb\xbf" + text.encode()
    if how == 2:
        at = rng.randrange(len(text) + 1)
        mark = rng.choice(
            ("\0", "\x1b[31m", "\u2028", "\u202e", "\r", "\x85", '"', "{", "[", "'", "\t", "&a", "*a", "!!", "%")
        )
        return (text[:at] + mark + text[at:]).encode()
    if how == 3:
        at = rng.randrange(len(lines))
        lines[at] *= rng.choice((2, 100))
        return "".join(lines).encode()
    if how == 4:
        return text.encode("latin-1", "replace") + rng.randbytes(3)
    return spoiled_bytes(text.encode(), rng)


def spoiled_tree(tree: Any, rng: random.Random) -> Any:
    """Return a copy of a JSON value with one to three places spoiled: other type, other size, gone, renamed, wrapped."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return rng.choice(VALUES)
        holder, key = rng.choice(places)
        how = rng.randrange(8)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[rng.choice(("x", "", "../" + key, key.upper(), key + ".0", "\0", "a" * 3000))] = holder.pop(key)
        elif how == 2:
            holder[key] = rng.choice(([holder[key]], {"x": holder[key]}, str(holder[key])))
        elif how == 3 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = rng.choice((-holder[key], holder[key] * 10**9, holder[key] + 1, holder[key] / 3))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def _places(tree: Any):
    """Yield every (holder, key) of a JSON value."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def json_bytes(tree: Any, indent: int | None = None) -> bytes:
    """Write JSON, with NaN, half characters and bottomless brackets where the mutation put them."""
    deep = "[" * DEPTH + "]" * DEPTH
    return json.dumps(tree, indent=indent).replace(json.dumps(DEEP), deep).encode()


def spoiled_json(content: bytes, rng: random.Random) -> bytes:
    """Spoil a JSON file: its tree mostly, else its bytes."""
    if rng.random() < 0.2:
        return spoiled_bytes(content, rng)
    return json_bytes(spoiled_tree(json.loads(content), rng))


def spoiled_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Spoil a safetensors file: its table, the length before it, or its bytes."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    how = rng.randrange(8)
    if how == 0:
        return spoiled_bytes(content, rng)
    if how == 1:
        wrong = rng.choice((0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + content[8:]
    if how == 2:  # one entry, told twice
        name = rng.choice(list(header))
        text = json.dumps({name: header[name]})[:-1] + "," + json.dumps(header)[1:]
        return safetensors_bytes(text.encode(), data)
    if how == 3:  # a tensor's own numbers
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        entry[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(
            ("F64", "F8_E5M2", "I8", [2**40, 0], [-1], [10**30], [0, 2**63], [1] * 40, [3.0], [True], "F32", [8, 4], [])
        )
        return safetensors_bytes(json_bytes(header), data)
    return safetensors_bytes(json_bytes(spoiled_tree(header, rng)), data)


def safetensors_bytes(header: bytes, data: bytes) -> bytes:
    """Put a safetensors file together."""
    return len(header).to_bytes(8, "little") + header + data


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
