"""Seeded mutations: the same seed spoils the same thing in the same way, on every machine."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

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
