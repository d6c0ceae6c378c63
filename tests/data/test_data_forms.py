"""Data as other programs write it: read under its own names, and trained by the command."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from run_cli import one_line, run

import mlx_lora.data
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import DataSettings
from mlx_lora.data.examples import BadRow, Record
from mlx_lora.data.files import find_sets, find_splits, named_sets
from mlx_lora.data.formats import NamedColumns, parse_record, without_names
from mlx_lora.data.load import load_data, load_eval_set
from mlx_lora.data.preferences import parse_pairs, parse_rated
from mlx_lora.data.read import SplitRows, parse_rows
from mlx_lora.data.records import read_records
from mlx_lora.planner.speed import Ceilings
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
    """Assert that a command ends with one line that holds these words."""
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
    ran = run("train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "a", *SHORT)
    assert ran.code == 0, ran.err
    assert (tmp_path / "a" / "adapters.safetensors").exists()
    for path in written.values():
        assert f"{path}: 4 read, " in ran.err
    assert f"{4 * len(written)} Question + Answer" in ran.err


# Files of settings that name the columns of the rows below, as the docs of their programs write them.
MLX_LM = """
model: {model}
hf_dataset: {{path: {data}, prompt_feature: frage, completion_feature: antwort}}
num_layers: -1
adapter_path: {out}
"""
AXOLOTL = """
base_model: {model}
adapter: lora
datasets:
  - path: {data}
    type: {{field_instruction: frage, field_output: antwort, format: "{{instruction}}"}}
output_dir: {out}
"""


@pytest.mark.parametrize("settings", [MLX_LM, AXOLOTL], ids=["mlx-lm", "axolotl"])
def test_columns_that_another_programs_settings_name_are_trained(settings, tiny_folder, tmp_path):
    rows = [{"frage": row["Question"], "antwort": row["Answer"]} for row in ASKED]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(
        settings.format(model=tiny_folder, data=tmp_path / "d.jsonl", out=tmp_path / "out")
    )
    ran = run("train", "--config", tmp_path / "c.yaml", *SHORT)
    assert ran.code == 0, ran.err
    assert "4 frage + antwort" in ran.err
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
        Path("rows.jsonl").write_text("".join(json.dumps({"frage": f"q {n}", "antwort": "a"}) + "\n" for n in range(4)))
        out = f"runs/{data.replace(',', '-')}"
        ran = run("train", "--model", tiny_folder, "--data", data, "--adapter-path", out, *SHORT, *flags)
        assert ran.code == 0, ran.err
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
    with pytest.raises(InputError, match=r"not a readable \.xlsx file"):
        values(broken)
    with pytest.raises(InputError, match=r"cannot read \.xls; save it as"):
        values(Path(_touched(broken.with_name("old.xls"))))
    with pytest.raises(
        InputError, match=r"cannot read \.pdf; .*\.txt.*\.csv"
    ):  # what to make of it, not only what is read
        values(Path(_touched(broken.with_name("leaflet.pdf"))))


def _touched(path: Path) -> str:
    path.write_bytes(b"x")
    return str(path)


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


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"question": "q", "answer": "a", "level": 3}, [("user", "q"), ("assistant", "a")]),
        ({"Prompt": "q", "RESPONSE ": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"input": "q", "output": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "response": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, [("user", "q\nc"), ("assistant", "a")]),
        ({"instruction": "q", "context": "", "response": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"query": "q", "response": 42}, [("user", "q"), ("assistant", "42")]),
        ({"Instruction": "q", "Output": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
        ({"messages": [{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]},
         [("user", "q"), ("assistant", "a")]),
        ({"conversations": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]},
         [("user", "q"), ("assistant", "a")]),
    ],
)  # fmt: skip
def test_usual_names_are_recognized(record, turns):
    assert messages(record) == turns


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "q", "answer": "a", "rejected": "b"}, "preference row"),
        ({"Question": "q", "Chosen": "a", "Rejected": "b"}, "preference row"),
        ({"question": "q", "answer": "a", "label": False}, "rated answer"),
        ({"question": "q", "answer": "a", "response": "b"}, "found columns question, answer, response; name yours: --prompt"),
        ({"frage": "q"}, "--completion-column, or --chat-column, or --text-column"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_refused_and_preferences_win(record, words):
    with pytest.raises(ValueError, match=words):
        messages(record)


def test_named_columns_do_not_hide_what_a_row_compares():
    named = {"prompt_column": "question", "completion_column": "answer"}
    asked = {"question": "q", "answer": "a"}
    assert read_named({**asked, "response": "b"}, **named).completion == "a"
    assert (
        read_named({"question": "q", "chosen": "a", "rejected": "b"}, **{**named, "completion_column": "chosen"}).prompt
        == "q"
    )
    for more, words in (({"label": False}, "rated answer"), ({"chosen": "a", "rejected": "b"}, "preference row")):
        with pytest.raises(ValueError, match=words):
            read_named({**asked, **more}, **named)


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
        with pytest.raises(ValueError, match=words):
            NamedColumns.of(DataSettings(**wrong)).renamed(record | {"messages": 1}, "examples")


def test_other_data_are_read_without_the_names_of_the_runs(tmp_path):
    general = Path(mlx_lora.data.__file__).parent / "general" / "chat.jsonl"
    named = DataSettings(prompt_column="frage", turn_names="role=wer", max_seq_length=4096)
    assert len(load_eval_set(str(general), without_names(named), byte_tokenizer())) == 48
    with pytest.raises(InputError, match="--prompt-column frage is not there"):
        load_eval_set(str(general), named, byte_tokenizer())


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
    with pytest.raises(InputError, match="--turn-names 'sender=x': write role or content"):
        train_settings({"turn_names": "sender=x"})


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
    splits = load_data(DataSettings(data=str(tmp_path), valid_fraction=0.0), byte_tokenizer(None), seed=0)
    assert len(splits.train) == 1
    assert "b.md" in splits.report.render()
    assert find_splits("bard").keys() == {"train", "valid", "test"}
    with pytest.raises(InputError, match="no such file"):
        find_splits("brad")


def numbered(path: Path, name: str, count: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(count)))
    return path


def counts(data: str, **settings: object) -> dict[str, int]:
    """How often each text is in an epoch."""
    splits = load_data(DataSettings(data=data, **{"valid_fraction": 0.0, **settings}), byte_tokenizer(None), seed=0)
    texts = [bytes_of(splits.train.row(i)[0]) for i in range(len(splits.train))]
    return {text: texts.count(text) for text in texts}


def bytes_of(tokens) -> str:
    return byte_tokenizer(None).decode(tokens.tolist(), skip_special_tokens=True)


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
    held = load_data(DataSettings(data="a.jsonl=3,b", valid_fraction=0.25), byte_tokenizer(None), seed=0)
    valid = [bytes_of(held.valid.row(i)[0]) for i in range(len(held.valid))]
    trained = [bytes_of(held.train.row(i)[0]) for i in range(len(held.train))]
    assert len(set(valid)) == len(valid) == 4
    assert not set(valid) & set(trained)
    assert {trained.count(text) for text in trained if text.startswith("a")} == {3}
    lines = [line for line in held.report.render().splitlines() if line.startswith("set ")]
    rows = sum(text.startswith("a") for text in set(trained))
    assert lines[0] == f"set        a.jsonl: 10 read, {rows} rows to train on x 3 = {3 * rows} per epoch"
    assert len(lines) == 2
    assert "set " not in load_data(DataSettings(data="b"), byte_tokenizer(None), seed=0).report.render()


def test_a_sets_own_validation_counts_and_the_others_hold_out(tmp_path):
    numbered(tmp_path / "a.jsonl", "a", 20)
    numbered(tmp_path / "b" / "train.jsonl", "b", 20)
    numbered(tmp_path / "b" / "valid.jsonl", "v", 3)
    (tmp_path / "long.txt").write_text("One line of a long text.\n" * 40)
    data = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b'},{tmp_path / 'long.txt'}"
    splits = load_data(DataSettings(data=data, valid_fraction=0.1), byte_tokenizer(None), seed=0)
    valid = [bytes_of(splits.valid.row(i)[0]) for i in range(len(splits.valid))]
    starts = [text[0] for text in valid]
    assert (starts.count("v"), starts.count("a"), starts.count("b"), starts.count("O")) == (3, 2, 0, 1)
    assert splits.report.valid_source == "file and held out"
    assert splits.report.splits["train"].rows == 18 + 20 + 1
    with pytest.raises(InputError, match="a weight is for training"):
        load_eval_set(f"{tmp_path / 'a.jsonl'}=2", DataSettings(), byte_tokenizer(None))
    assert (
        len(load_eval_set(f"{tmp_path / 'a.jsonl'},{tmp_path / 'b/train.jsonl'}", DataSettings(), byte_tokenizer(None)))
        == 40
    )


def test_names_with_the_signs_of_the_list_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "c=2", "d.jsonl", "c"):
        numbered(Path(name), "x", 1)
    assert named_sets("a,b.jsonl") == [("a,b.jsonl", 1.0)]
    assert named_sets("a,b.jsonl=3,d.jsonl, c=2") == [("a,b.jsonl", 3.0), ("d.jsonl", 1.0), ("c=2", 1.0)]
    os.remove("c=2")
    assert named_sets("c=2") == [("c", 2.0)]
    assert named_sets("owner/name@v1=0.5,missing.jsonl") == [("owner/name@v1", 0.5), ("missing.jsonl", 1.0)]
    for wrong in ("d.jsonl=0", "d.jsonl=x", "d.jsonl=-1,c", "d.jsonl=1e9", "d.jsonl=nan"):
        with pytest.raises(InputError, match="a weight must be a number above 0"):
            named_sets(wrong)
    with pytest.raises(InputError, match="names no file"):
        named_sets(",")
    with pytest.raises(InputError, match=r"--data missing.jsonl: no such file"):
        find_sets("d.jsonl,missing.jsonl")


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
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = load_data(DataSettings(data=str(file), valid_fraction=0.0), byte_tokenizer(), seed=0).report
    (note,) = [note for note in report.notes if "placeholder" in note]
    assert note == (
        "3 rows have placeholders such as {{name}}, <insert your address here>, {first_name}: d.jsonl lines 1, 2, 3; "
        "fill them in, or remove the rows"
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[3:]))
    report = load_data(DataSettings(data=str(file), valid_fraction=0.0), byte_tokenizer(), seed=0).report
    assert not [note for note in report.notes if "placeholder" in note]


def test_a_weighted_run_resumes_exactly(tiny_folder, tmp_path):
    numbered(tmp_path / "a.jsonl", "a", 9)
    numbered(tmp_path / "b.jsonl", "b", 4)
    data = f"{tmp_path / 'a.jsonl'}=1.5,{tmp_path / 'b.jsonl'}=2"
    common = ("--model", tiny_folder, "--batch-size", 4, "--val-batches", 0, "--sample-tokens", 0, "--rank", 2)

    def train(folder: str, iters: int, *more: object, data: str = data):
        return run("train", *common, "--data", data, "--adapter-path", tmp_path / folder, "--iters", iters, *more)

    constant = ("--lr-schedule", "constant")
    assert train("whole", 4, *constant).code == 0
    assert train("parts", 2, *constant).code == 0
    other = train("parts", 4, *constant, "--resume", data=data.replace("=2", "=3"))
    refused(other, "from another run")
    assert train("parts", 4, *constant, "--resume").code == 0
    whole, parts = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_a_dry_run_reports_and_plans_and_writes_nothing(tiny_folder, chats, tmp_path, monkeypatch, ceilings):
    monkeypatch.chdir(tmp_path)
    asked = ("--model", tiny_folder, "--data", chats, "--adapter-path", "a", "--rank", 2)
    ran = run("train", *asked, "--dry-run")
    assert ran.code == 0, ran.err
    assert "rows read  40 (40 alpaca)" in ran.err
    assert list(tmp_path.iterdir()) == []
    assert ran.out.splitlines()[1].startswith("Data: ")
    planned = run("plan", *asked)
    assert [line for line in ran.out.splitlines() if "Predicted" not in line] == [
        line for line in planned.out.splitlines() if "Predicted" not in line
    ]
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
        for command in (("plan",), ("train", "--adapter-path", tmp_path / "a")):
            refused(run(*command, "--model", tiny_folder, "--data", tmp_path / name), words)
    one_line(run("plan", "--model", tiny_folder / "config.json", "--data", tmp_path / "none.jsonl"), "no such file")
    assert run("plan", "--model", tiny_folder, "--data", "owner/name").code == 0  # on the hub, which is not asked
