"""The GGUF reader on good files, and on every kind of bad one."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from mlx_lora.gguf.reader import is_gguf, read_gguf
from mlx_lora.utils.errors import InputError

VALUES = {"a.uint32": 7, "a.int64": -(2**40), "a.float32": 0.5, "a.bool": True, "a.string": "größe ▁"}
ARRAYS = {
    "a.strings": ["", "é", "<|end|>", "x" * 300],
    "a.ints": [1, -2, 3],
    "a.floats": [0.25, -1.5],
    "a.bools": [True, False],
}


def write_sample(path: Path) -> Path:
    """Write a file with every kind of metadata value and a few tensor types."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint32("a.uint32", VALUES["a.uint32"])
    writer.add_int64("a.int64", VALUES["a.int64"])
    writer.add_float32("a.float32", VALUES["a.float32"])
    writer.add_bool("a.bool", VALUES["a.bool"])
    writer.add_string("a.string", VALUES["a.string"])
    for name, array in ARRAYS.items():
        writer.add_array(name, array)
    rng = np.random.default_rng(0)
    writer.add_tensor("dense", rng.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("half", rng.normal(size=(4,)).astype(np.float16))
    packed = gguf.quants.quantize(rng.normal(size=(2, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    return write_sample(tmp_path / "sample.gguf")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def header(n_tensors: int = 0, n_pairs: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_pairs)


def tensor_info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def test_values_and_tensors(sample: Path) -> None:
    file = read_gguf(sample)
    assert {key: file.metadata[key] for key in VALUES} == VALUES
    assert {key: list(file.metadata[key]) for key in ARRAYS} == ARRAYS
    assert file.metadata["a.floats"].dtype == np.float32
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(file.tensors["dense"].dequantize(), rng.normal(size=(3, 5)).astype(np.float32))
    assert file.tensors["half"].shape == (4,)
    assert file.tensors["packed"].shape == (2, 64)
    assert file.tensors["packed"].data.shape == (2, 68)  # two blocks of 34 bytes per row
    assert is_gguf(sample)


def test_agrees_with_the_gguf_package(sample: Path) -> None:
    ours = read_gguf(sample)
    for tensor in gguf.GGUFReader(sample).tensors:
        mine = ours.tensors[tensor.name]
        assert mine.type == tensor.tensor_type
        assert mine.data.tobytes() == np.asarray(tensor.data).tobytes()


def test_tensor_bytes_are_mapped_not_copied(sample: Path) -> None:
    data = read_gguf(sample).tensors["packed"].data
    assert not data.flags.owndata
    assert not data.flags.writeable


def test_every_truncation_is_an_input_error(sample: Path, tmp_path: Path) -> None:
    whole = sample.read_bytes()
    last = max(int(t.data_offset) + t.n_bytes for t in gguf.GGUFReader(sample).tensors)
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, last, 7), last - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError) as caught:
            read_gguf(cut)
        assert "\n" not in str(caught.value)
    cut.write_bytes(whole[:last])  # the padding after the last tensor may be missing
    assert len(read_gguf(cut).tensors) == 3


HUGE = 2**62
BAD = {
    "magic": header(magic=b"GGML"),
    "version 1": header(version=1),
    "version 99": header(version=99),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "tensor count": header(n_tensors=HUGE) + b"\0" * 64,
    "pair count": header(n_pairs=HUGE) + b"\0" * 64,
    "key length": header(n_pairs=1) + struct.pack("<Q", HUGE) + b"\0" * 64,
    "string length": header(n_pairs=1) + string("k") + struct.pack("<IQ", 8, HUGE) + b"\0" * 64,
    "array length": header(n_pairs=1) + string("k") + struct.pack("<IIQ", 9, 4, HUGE) + b"\0" * 64,
    "string array length": header(n_pairs=1) + string("k") + struct.pack("<IIQ", 9, 8, HUGE) + b"\0" * 64,
    "item length": header(n_pairs=1) + string("k") + struct.pack("<IIQQ", 9, 8, 1, HUGE) + b"\0" * 64,
    "nested arrays": header(n_pairs=1) + string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000,
    "value type": header(n_pairs=1) + string("k") + struct.pack("<IQ", 77, 0),
    "item type": header(n_pairs=1) + string("k") + struct.pack("<IIQ", 9, 77, 0),
    "not UTF-8": header(n_pairs=1) + struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 0) + b"\0" * 8,
    "token not UTF-8": header(n_pairs=1) + string("k") + struct.pack("<IIQQ", 9, 8, 1, 2) + b"\xff\xfe",
    "key twice": header(n_pairs=2) + (string("k") + struct.pack("<II", 4, 1)) * 2,
    "alignment": header(n_pairs=1) + string("general.alignment") + struct.pack("<II", 4, 3),
    "alignment 0": header(n_pairs=1) + string("general.alignment") + struct.pack("<II", 4, 0),
    "alignment text": header(n_pairs=1) + string("general.alignment") + struct.pack("<I", 8) + string("x"),
    "dim count": header(n_tensors=1) + tensor_info("t", [1] * 5) + b"\0" * 64,
    "dim product overflows": header(n_tensors=1) + tensor_info("t", [2**33, 2**33, 2**33]) + b"\0" * 64,
    "dim zero": header(n_tensors=1) + tensor_info("t", [0, 4]) + b"\0" * 64,
    "tensor past the end": header(n_tensors=1) + tensor_info("t", [1024]) + b"\0" * 64,
    "offset past the end": header(n_tensors=1) + tensor_info("t", [4], offset=HUGE) + b"\0" * 64,
    "offset unaligned": header(n_tensors=1) + tensor_info("t", [4], offset=1) + b"\0" * 96,
    "tensor type": header(n_tensors=1) + tensor_info("t", [4], kind=999) + b"\0" * 64,
    "partial block": header(n_tensors=1) + tensor_info("t", [33], kind=8) + b"\0" * 256,
    "tensor twice": header(n_tensors=2) + tensor_info("t", [4]) * 2 + b"\0" * 96,
    "overlap": header(n_tensors=2) + tensor_info("t", [16]) + tensor_info("u", [4], offset=32) + b"\0" * 128,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_input_errors_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[name])
    start = time.process_time()
    with pytest.raises(InputError, match=r"bad\.gguf"):
        read_gguf(path)
    assert time.process_time() - start < 1


def test_random_damage_never_escapes(sample: Path, tmp_path: Path) -> None:
    whole = bytearray(sample.read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    for _ in range(300):
        damaged = whole.copy()
        for place in rng.integers(0, 700, 4):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_gguf(path)
        except InputError:
            continue  # refused, or the damage hit a value that may be anything


def test_missing_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    for path in (tmp_path / "none.gguf", tmp_path / "empty.gguf", tmp_path):
        with pytest.raises(InputError):
            read_gguf(path)
    assert not is_gguf(tmp_path / "none.gguf")


def test_a_large_vocabulary_is_fast(tmp_path: Path) -> None:
    path = tmp_path / "tokens.gguf"
    tokens = b"".join(string(f"token{i}") for i in range(262144))
    path.write_bytes(header(n_pairs=1) + string("tokens") + struct.pack("<IIQ", 9, 8, 262144) + tokens)
    start = time.process_time()
    assert read_gguf(path).metadata["tokens"][-1] == "token262143"
    assert time.process_time() - start < 2
