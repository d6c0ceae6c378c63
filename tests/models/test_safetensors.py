"""A safetensors header is read whole or refused in one line: sixteen ways to spoil it, and all types that MLX reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_lora.models.folder import READABLE, read_safetensors_header
from mlx_lora.utils.errors import InputError

BYTES = {"F64": 8, "C64": 8, "U64": 8, "I64": 8, "U32": 4, "I32": 4, "F32": 4, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}


def entry(dtype: str = "F32", shape: Any = (2,), start: int = 0, stop: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write(path: Path, header: dict[str, Any] | bytes, n_bytes: int = 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(n_bytes))
    return path


@pytest.mark.parametrize("dtype", READABLE)
def test_shapes_and_types_are_those_that_mlx_loads(dtype, tmp_path):
    size = BYTES.get(dtype, 1)
    path = write(tmp_path / "m.safetensors", {"a": entry(dtype, [2, 3], 0, 6 * size), "b": entry()
                 | {"data_offsets": [6 * size, 6 * size + 8]}, "__metadata__": {"format": "mlx"}}, 6 * size + 8)  # fmt: skip
    header = read_safetensors_header(path)
    assert header == {"a": {"dtype": dtype, "shape": [2, 3]}, "b": {"dtype": "F32", "shape": [2]}}
    assert {name: list(value.shape) for name, value in mx.load(str(path)).items()} == {"a": [2, 3], "b": [2]}


def test_what_mlx_writes_is_read_without_torch(tmp_path):
    path = tmp_path / "m.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((3, 5), mx.bfloat16), "scalar": mx.array(1.0)})
    before = "torch" in sys.modules
    assert read_safetensors_header(path) == {"a": {"dtype": "BF16", "shape": [3, 5]}, "scalar": {"dtype": "F32", "shape": []}}  # fmt: skip
    assert ("torch" in sys.modules) == before


CORRUPT = {
    "not JSON": (b"{" * 40, 8),
    "no object": (b"[]", 0),
    "not UTF-8": (b'{"\xff": 1}', 8),
    "half a character": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    "NaN": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":NaN}}', 8),
    "nested without end": (b'{"a":{"x":' + b"[" * 9999 + b"]" * 9999 + b"}}", 8),
    "cut": ({"a": entry()}, 7),
    "more bytes than it lists": ({"a": entry()}, 9),
    "a gap": ({"a": entry(), "b": entry(start=9, stop=17)}, 17),
    "an overlap": ({"a": entry(), "b": entry()}, 8),
    "begins after it ends": ({"a": entry(start=8, stop=0)}, 8),
    "another size than its shape": ({"a": entry(shape=[3])}, 8),
    "a negative dimension": ({"a": entry(shape=[-2])}, 8),
    "a dimension that is no number": ({"a": entry(shape=["2"])}, 8),
    "more elements than can be counted": ({"a": entry(shape=[2**63, 4])}, 8),
    "a type nobody knows": ({"a": entry("F33")}, 8),
    "an entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
    "metadata that is no text": ({"a": entry(), "__metadata__": {"x": 1}}, 8),
}
LYING = [({"a": entry()}, 8, length) for length in (0, 1, 10**6, 2**63, 2**64 - 1)]


@pytest.mark.parametrize(("header", "n_bytes", "length"), [(*case, None) for case in CORRUPT.values()] + LYING)
def test_a_corrupt_header_is_one_line(header, n_bytes, length, tmp_path):
    path = write(tmp_path / "m.safetensors", header, n_bytes)
    if length is not None:
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(
        InputError, match=r"m\.safetensors: truncated or damaged safetensors \(.+\); download"
    ) as raised:
        read_safetensors_header(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("header", "n_bytes", "words"),
    [
        ({"a" * 10**5: entry("F64", [1])}, 8, "is F64, which MLX cannot read"),
        ({"a": entry("F8_E5M2")}, 2, "is F8_E5M2, which MLX cannot read"),
        ({"a": entry(shape=[2**40, 0])}, 0, "larger than MLX can read"),
        ({"a": entry(shape=[1] * 33)}, 4, "larger than MLX can read"),
    ],
)
def test_what_the_format_allows_and_mlx_does_not_read_is_named(header, n_bytes, words, tmp_path):
    for value in header.values():
        value["data_offsets"] = [0, n_bytes]
    with pytest.raises(InputError, match=words) as raised:
        read_safetensors_header(write(tmp_path / "m.safetensors", header, n_bytes))
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_what_is_no_file_is_one_line(name, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_safetensors_header(tmp_path / name)


def test_of_a_name_that_stands_twice_mlx_takes_the_same_one(tmp_path):
    twice = b'{"a":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]},"a":{"dtype":"I32","shape":[8],"data_offsets":[0,32]}}'
    path = write(tmp_path / "m.safetensors", twice, 32)
    loaded = mx.load(str(path))["a"]
    assert read_safetensors_header(path) == {"a": {"dtype": "I32", "shape": [8]}}
    assert (loaded.dtype, loaded.shape) == (mx.int32, (8,))
