"""What a new user runs into: wrong flags and names, data with gaps, and the words at a run's end."""

from __future__ import annotations

import importlib
import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from run_cli import one_line, run, succeeds

import mlx_lora
from mlx_lora.__main__ import OTHER_WORDS, load_command, main
from mlx_lora.config.load import instead_of, train_settings
from mlx_lora.config.settings import FIELDS, DataSettings, ModelSettings
from mlx_lora.data import data_sets as files
from mlx_lora.data.file_formats import read_records
from mlx_lora.data.load import load_data, load_eval_set
from mlx_lora.engine.adapter_store import named_source
from mlx_lora.engine.engine import ModelThread
from mlx_lora.models.load import load_base
from mlx_lora.reports.run_report import Sample
from mlx_lora.trainer.callbacks import Uses, next_commands
from mlx_lora.utils import text as program
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import closest, did_you_mean, similar_paths

GERMAN = [{"frage": f"Wie viel ist {n}?", "antwort": f"{n}!", "thema": "x" if n < 3 else ""} for n in range(8)]
USUAL = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(8)]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return load_base(ModelSettings(model=str(tiny_folder))).hf_tokenizer


@pytest.fixture(scope="module")
def german_run(tiny_folder, tmp_path_factory):
    """A run that was trained on columns that only the settings name."""
    folder = tmp_path_factory.mktemp("runs")
    write(folder / "de.jsonl", GERMAN)
    flags = ("--prompt-column", "frage", "--completion-column", "antwort", "--iters", 1, "--sample-tokens", 2)
    ran = succeeds(
        "train", "--model", tiny_folder, "--data", folder / "de.jsonl", "--adapter-path", folder / "bard", *flags
    )
    return folder / "bard", ran.err


# --- the columns of a run


def test_evaluate_reads_the_columns_of_the_run(german_run, tiny_folder, tmp_path):
    folder, _ = german_run
    flags = ("--model", tiny_folder, "--adapter-path", folder, "--json")
    data = write(tmp_path / "de.jsonl", GERMAN)
    ran = succeeds("evaluate", *flags, "--data", data)
    assert "--prompt-column frage, --completion-column antwort" in ran.err
    given = run("evaluate", *flags, "--data", data, "--prompt-column", "frage", "--completion-column", "antwort")
    assert json.loads(given.out) == json.loads(ran.out)
    assert "as in the run" not in given.err
    found = mlx_lora.evaluate(tiny_folder, data, adapter=folder)
    assert found["loss"] == pytest.approx(json.loads(ran.out)["loss"])
    # Data with other columns is read by its own, as before, and what is given decides.
    usual = run("evaluate", *flags, "--data", write(tmp_path / "usual.jsonl", USUAL))
    assert (usual.code, "as in the run" in usual.err) == (0, False)
    one_line(
        run("evaluate", *flags, "--data", data, "--prompt-column", "thema"), "the evaluation data", "name the answer"
    )


def test_errors_of_an_evaluation_speak_of_its_data(tokenizer, tmp_path):
    data = str(write(tmp_path / "x.jsonl", [{"a": 1}]))
    with pytest.raises(InputError, match="evaluation data, 1 refused"):
        load_eval_set(data, DataSettings(), tokenizer)
    own = tmp_path / "shop.json"
    own.write_text('{"shop": "Harbor", "open": {"from": 9}}')
    with pytest.raises(InputError, match=r"list of rows: \[\{"):
        load_eval_set(str(own), DataSettings(), tokenizer)
    with pytest.raises(InputError, match="--strict: 1 unusable evaluation row"):
        load_eval_set(str(write(tmp_path / "y.jsonl", [*USUAL, {"a": 1}])), DataSettings(strict=True), tokenizer)


# --- told before the libraries for models are imported

REFUSED = """
import json, sys
from mlx_lora.__main__ import main
for args in json.loads(sys.argv[1]):
    try:
        main(args)
    except SystemExit as ended:
        print(ended.code, "mlx_lm" in sys.modules or "transformers" in sys.modules)
"""


def test_what_cannot_work_is_told_before_anything_slow_is_imported(tiny_folder, tmp_path):
    model, there = ("--model", str(tiny_folder)), write(tmp_path / "there.jsonl", USUAL)
    (tmp_path / "empty.csv").touch()
    (tmp_path / "header.csv").write_text("question,answer\n")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 20)
    (tmp_path / "picture.jsonl").write_bytes((tmp_path / "picture.csv").read_bytes())
    (tmp_path / "book.txt").write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        data = ["nosuch.csv", "nosuchfolder", "empty.csv", "header.csv", "picture.csv", "picture.jsonl", "book.txt"]
        asked = [["train", *model, "--data", str(tmp_path / name), "--adapter-path", "a"] for name in data]
        asked += [[command, *model, f"--data={tmp_path / 'picture.csv'}"] for command in ("evaluate", "plan")]
        asked += [["sweep", *model, "--data", str(tmp_path / "empty.csv"), "--out", "s"]]
        asked += [[command, "--model", "nosuch.gguf"] for command in ("train", "generate", "serve", "convert", "chat")]
        asked += [["generate", *model, "--adapter-path", "nosuch", "--prompt", "x"]]
        asked += [[*command, "--port", port] for command in (("serve", *model), ("studio", "--no-browser"))]
        # What is fine goes on, and is refused by the command itself.
        asked += [["train", *model, "--data", str(there), "--adapter-path", "a", "--rank", "0"]]
        ran = subprocess.run([sys.executable, "-c", REFUSED, json.dumps(asked)], cwd=tmp_path, capture_output=True, text=True, check=False)  # fmt: skip
    assert ran.stdout.splitlines() == ["2 False"] * len(asked), ran.stderr
    said = ran.stderr.splitlines()
    assert len(said) == len(asked)  # one line each
    assert all(name in line for name, line in zip(data, said, strict=False))
    assert "--rank" in said[-1]


def test_help_is_given_whatever_the_flags_name(tmp_path):
    assert run("__main__", "train", "--model", tmp_path / "nosuch", "--help").code == 0


def test_rows_made_elsewhere_are_not_looked_for(monkeypatch):
    monkeypatch.setattr(files, "find_sets", lambda name: pytest.fail(name))
    files.look_at_data("owner/name,tiny-shakespeare,reasoning-gym:leg_counting")


def test_what_a_settings_file_names_is_looked_at_before_the_model_is_loaded(monkeypatch, tiny_folder, tmp_path):
    monkeypatch.setattr(
        importlib.import_module("mlx_lora.trainer.run"), "load_base", lambda *_, **__: pytest.fail("loaded")
    )
    (tmp_path / "empty.csv").touch()
    settings = {"model": str(tiny_folder), "data": str(tmp_path / "empty.csv"), "adapter_path": str(tmp_path / "a")}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    one_line(run("train", "--config", tmp_path / "run.yaml"), "empty.csv is empty")


# --- data with gaps


@pytest.mark.parametrize(
    ("row", "settings", "why"),
    [
        ({"prompt": None, "completion": "b"}, {}, "cell prompt is empty"),
        ({"prompt": "a", "completion": None}, {}, "cell completion is empty"),
        ({"Question": None, "Answer": None}, {}, "cells Question and Answer are empty"),
        ({"frage": "a", "antwort": None}, {"prompt_column": "frage", "completion_column": "antwort"}, "cell antwort is empty"),
        ({"frage": None, "antwort": "b"}, {"prompt_column": "frage", "completion_column": "antwort"}, "cell frage is empty"),
        ({"frage": "a", "antwort": " "}, {"prompt_column": "frage", "completion_column": "antwort"}, "cell antwort is empty"),
        ({"Question": "a", "Answer": " "}, {}, "cell Answer is empty"),
        ({"instruction": None, "input": "", "output": "b"}, {}, "cell instruction is empty"),
    ],
)  # fmt: skip
def test_an_empty_cell_is_said_with_its_line(row, settings, why, tokenizer, tmp_path):
    good = {"frage": "q", "antwort": "a"} if settings else USUAL[0]
    data = write(tmp_path / "d.jsonl", [good, row])
    report = load_data(DataSettings(data=str(data), **settings), tokenizer, seed=0).report
    [dropped] = report.dropped_rows
    assert dropped.line == 2
    assert why in dropped.why
    assert report.empty == 1
    assert f"d.jsonl line 2: {dropped.why}" in report.render()


def test_a_missing_column_is_still_missing(tokenizer, tmp_path):
    data = write(tmp_path / "d.jsonl", [USUAL[0], {"prompt": "a", "remark": None}])
    (row,) = load_data(DataSettings(data=str(data)), tokenizer, seed=0).report.dropped_rows
    assert row.why.startswith("found columns prompt; name yours")


def test_an_empty_cell_of_a_table_is_said_with_its_row_and_column(tokenizer, tmp_path):
    """As spreadsheets write them: a text without characters in .csv, nothing in .xlsx."""
    openpyxl = pytest.importorskip("openpyxl")
    rows = [["Frage", "Antwort"], ["Was?", "Das."], ["Wie?", None], [None, "So."]]
    (tmp_path / "a.csv").write_text("\n".join(";".join(cell or "" for cell in row) for row in rows))
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    named = {"prompt_column": "Frage", "completion_column": "Antwort", "valid_fraction": 0.0}
    for name, unit in (("a.csv", "line"), ("a.xlsx", "row")):
        report = load_data(DataSettings(data=str(tmp_path / name), **named), tokenizer, seed=0).report
        assert f"  {name} {unit} 3: the cell Antwort is empty; fill it in, or remove the row" in report.render()


def test_an_empty_sheet_is_named_with_the_others(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "Notes"
    book.save(tmp_path / "one.xlsx")
    with pytest.raises(InputError, match="the sheet Notes is empty; it is the only one"):
        list(read_records(tmp_path / "one.xlsx"))
    book.create_sheet("Rows").append(["prompt", "completion"])
    book.create_sheet("More")
    book.save(tmp_path / "b.xlsx")
    with pytest.raises(
        InputError, match=r"the sheet Notes is empty; name another one as b.xlsx#Rows .*sheets: Rows, More"
    ):
        list(read_records(tmp_path / "b.xlsx"))


def test_columns_that_are_not_read_are_counted(tokenizer, tmp_path):
    chat = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "id": 1,
        "user_id": 2,
    }
    rows = [{**chat, "score": 3, "lang": "de"}, {**chat, "score": 4, "lang": ""}, {**chat, "tools": None}]
    notes = load_data(DataSettings(data=str(write(tmp_path / "d.jsonl", rows))), tokenizer, seed=0).report.notes
    assert "columns that are not read: score (2 rows), lang (1 row)" in notes
    named = DataSettings(
        data=str(write(tmp_path / "de.jsonl", GERMAN)), prompt_column="frage", completion_column="antwort"
    )
    assert "columns that are not read: thema (3 rows)" in load_data(named, tokenizer, seed=0).report.notes
    plain = load_data(DataSettings(data=str(write(tmp_path / "u.jsonl", USUAL))), tokenizer, seed=0).report
    assert not any("not read" in note for note in plain.notes)


def test_an_empty_prompt_is_noted(tokenizer, tmp_path):
    data = write(tmp_path / "d.jsonl", [*USUAL, {"prompt": "", "completion": "b"}])
    notes = load_data(DataSettings(data=str(data)), tokenizer, seed=0).report.notes
    assert "1 row has an empty prompt, and only the answer is trained: d.jsonl line 9" in notes


@pytest.mark.parametrize(
    ("text", "trained"),
    [
        ("---\ntitle: Bread\ntags: [a, b]\n---\n\n# Bread\n\nFlour.\n", "# Bread\n\nFlour.\n"),
        ("---\r\ntitle: Bread\r\n---\r\n# Bread\r\n", "# Bread\n"),
        ("---\nA rule, then text, then a rule.\n---\nMore.\n", None),
        ("# Bread\n\n---\ntitle: x\n---\n", None),
        ("---\ntitle: never ends\n\n# Bread\n", None),
    ],
)
def test_front_matter_of_markdown_is_left_out(text, trained, tokenizer, tmp_path):
    (tmp_path / "a.md").write_bytes(text.encode())
    (record,) = read_records(tmp_path / "a.md")
    assert record.value == {"text": trained or text}
    notes = load_data(DataSettings(data=str(tmp_path / "a.md")), tokenizer, seed=0).report.notes
    assert ("YAML front matter of 1 file is left out, and not trained" in notes) == (trained is not None)
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert next(iter(read_records(tmp_path / "a.txt"))).value["text"].startswith(text[:4].strip())


def test_a_note_of_front_matter_alone_is_a_bad_row(tmp_path):
    (tmp_path / "a.md").write_text("---\ntitle: x\n---\n\n")
    (row,) = read_records(tmp_path / "a.md")
    assert row.why == "no text after its front matter"


@pytest.mark.parametrize(
    ("rows", "fraction", "note"),
    [
        (USUAL[:1], 0.05, "no row is held out"),
        ([USUAL[0]] * 3, 0.05, "no row is held out"),
        (USUAL[:2], 0.05, "1 of 2 rows is held out"),
        (USUAL[:3], 0.05, "1 of 3 rows is held out"),
        (USUAL[:3], 0.0, None),
        (USUAL, 0.25, None),
    ],
)
def test_what_few_rows_hold_out_is_said(rows, fraction, note, tokenizer, tmp_path):
    data = write(tmp_path / "d.jsonl", rows)
    report = load_data(DataSettings(data=str(data), valid_fraction=fraction), tokenizer, seed=0).report
    found = [one for one in report.notes if "held out" in one]
    assert len(found) == (note is not None)
    assert note is None or found[0].startswith(note)


# --- flags and names


def test_spelling_ignores_case_and_orders_by_likeness():
    assert closest("FRAGE", ["antwort", "fragen", "frage"], most=2) == ["frage", "fragen"]
    assert did_you_mean("zzzz", ["frage"]) == ""
    assert did_you_mean("fraeg", ["Frage"]) == "; did you mean Frage?"


def test_misspelled_names_are_answered(german_run, tiny_folder, tmp_path, monkeypatch):
    folder, _ = german_run
    data = write(tmp_path / "de.jsonl", GERMAN)
    flags = ("train", "--model", tiny_folder, "--adapter-path", tmp_path / "new", "--completion-column", "antwort")
    one_line(
        run(*flags, "--data", data, "--prompt-column", "Frage"), "found columns frage, antwort", "did you mean frage?"
    )
    rows = [{f"c{n}": "x" for n in range(12)} | {"frage": "y", "antwort": "z"}]
    found = run(*flags, "--data", write(tmp_path / "wide.jsonl", rows), "--prompt-column", "fraeg")
    one_line(found, "found columns frage, c0", "did you mean frage?")  # the closest first: the list is cut after eight
    one_line(run("generate", "--model", "smolm2", "--prompt", "x"), "did you mean smollm2?")
    (tmp_path / "smolm3").mkdir()
    (tmp_path / "smolm3/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    one_line(run("generate", "--model", "smolm2", "--prompt", "x"), "did you mean smolm3?")
    brad = folder.parent / "brad"
    asked = ("--model", tiny_folder, "--adapter-path", brad)
    one_line(run("generate", *asked, "--prompt", "x"), "no such folder", f"did you mean {folder}?")
    one_line(run("chat", "--model", tiny_folder, "--adapter", brad), "no such folder", f"did you mean {folder}?")
    below = folder.parent.with_name(folder.parent.name[:-1]) / "bard"  # a folder above it is misspelled
    asked = ("--model", tiny_folder, "--adapter-path", below, "--to", "peft", "--out", tmp_path / "out")
    one_line(run("export", *asked), "no such folder", f"did you mean {folder}?")
    assert similar_paths(Path("no/such/folder/anywhere"), Path.is_dir) == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate --max-new-tokens 3", "use --max-tokens"),
        ("export --output x", "use --out"),
        ("train --hlep", "did you mean --help?"),
        ("doctor --zzzz", "--zzzz: "),
        ("train data.jsonl", "--data data.jsonl"),
        ("train 'my data.jsonl'", "write --data 'my data.jsonl'"),
        ("train model.gguf", "write --model model.gguf"),
        ("chat model.gguf", "write --model model.gguf"),
        ("plan --chip M2 --memory-gb much", "--memory-gb much: not a whole number of GB"),
    ],
)
def test_wrong_flags_are_answered(command, words):
    one_line(run(*shlex.split(command)), words)


def test_a_value_without_a_flag_is_looked_at(german_run, tiny_folder):
    folder, _ = german_run
    one_line(run("train", tiny_folder), f"write --model {tiny_folder}")
    required = ("--prompt", "x", "--model", tiny_folder)
    one_line(run("generate", *required, folder), f"write --adapter-path {folder}")


def group(*words: str) -> tuple[int, str, str]:
    """Run `mlx-lora WORDS`."""
    from click.testing import CliRunner

    ran = CliRunner().invoke(importlib.import_module("mlx_lora.__main__").main, words, prog_name="mlx-lora")
    return ran.exit_code, ran.stdout, ran.stderr


def test_help_and_version_are_words_too():
    assert group("help") == group("--help") == group("-h")
    assert group("help", "train")[1] == group("train", "--help")[1] == group("train", "-h")[1]
    assert "Train an adapter" in group("help", "train")[1]
    assert group("version") == group("--version")
    assert mlx_lora.__version__ in group("version")[1]
    assert "did you mean train?" in group("help", "trian")[2]
    assert "did you mean --help?" in group("--hlep")[2]
    assert run("bench", "run", "-h").code == run("convert", "-h").code == 0


@pytest.mark.long
def test_gigabytes_and_formats_in_any_spelling(german_run, tiny_folder, tmp_path):
    flags = ("--model", tiny_folder, "--chip", "M2 Pro", "--json")
    found = {run("plan", *flags, "--memory-gb", text).out for text in ("16", "16GB", "16 gb")}
    assert len(found) == 1
    assert json.loads(found.pop())["fits"]
    succeeds("export", "--model", tiny_folder, "--adapter-path", german_run[0], "--to", "PEFT", "--out", tmp_path / "p")
    assert (tmp_path / "p/adapter_model.safetensors").is_file()


def test_an_adapter_without_a_name_has_its_folders(german_run, tmp_path, monkeypatch):
    folder, _ = german_run
    assert named_source("--adapter", str(folder)) == ("bard", named_source("--adapter", f"x={folder}")[1])
    (tmp_path / "a=b").mkdir()
    with pytest.raises(InputError, match="'a=b' cannot be a name"):
        named_source("--adapter", str(tmp_path / "a=b"))
    monkeypatch.chdir(folder)
    assert named_source("--adapter", ".")[0] == "bard"
    with pytest.raises(InputError, match="write it as NAME=ADAPTER:WEIGHT"):
        named_source("--blend", str(folder))


def test_chat_takes_an_adapter_without_a_name(german_run, tiny_folder, monkeypatch):
    import io
    from types import SimpleNamespace

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b""), isatty=lambda: False))
    ran = succeeds("chat", "--model", tiny_folder, "--adapter", german_run[0])
    assert "bard answers" in ran.err


# --- a run's end


def test_the_next_commands_have_a_prompt_of_the_data(german_run):
    _, said = german_run
    assert "--prompt 'Wie viel ist " in said
    assert "--prompt Hello" not in said
    settings = train_settings({"model": "m", "data": "d"})
    info = type("Info", (), {"scores": False, "method": "lora", "full": (), "qat": False})
    long = "<|im_start|>user\n" + "It's a long\nquestion, " * 20 + "<|im_end|>\n<|im_start|>assistant\n"
    *_, prompt = shlex.split(next_commands(Path("runs/a"), settings, info, [Sample(long, "")], Uses("llama"))[1])
    assert 60 < len(prompt) <= 80
    assert ("It's a long question, " * 4).startswith(prompt)
    assert next_commands(Path("runs/a"), settings, info, [], Uses("llama"))[1].endswith("--prompt Hello")


def test_the_prompt_to_try_is_a_question_where_rows_are_trained_from_their_first_token(tiny_folder, tmp_path):
    turns = [[("system", "You know all dogs."), ("user", f"Who is {n}?"), ("assistant", f"{n}!")] for n in range(20)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    data, adapter = write(tmp_path / "rows.jsonl", rows), tmp_path / "a"
    flags = ("--no-mask-prompt", "--iters", 1, "--sample-tokens", 2, "--val-batches", 1)
    ran = succeeds("train", "--model", tiny_folder, "--data", data, "--adapter-path", adapter, *flags)
    prompt = next(shlex.split(line)[-1] for line in ran.err.splitlines() if " --prompt " in line)
    assert prompt in {f"Who is {n}?" for n in range(20)}


def test_commands_are_spelled_as_a_person_can_start_them(monkeypatch, tmp_path):
    monkeypatch.setattr(program.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert program.command_line(["chat", "--model", "my model"]) == "python -m mlx_lora chat --model 'my model'"
    (tmp_path / "mlx-lora").touch()
    assert program.command_line(["chat", "--model", "m"]) == "mlx-lora chat --model m"
    for started in (["-m", "mlx_lora.train"], ["-m", "mlx_lora", "train"], ["/bin/mlx-lora", "train"]):
        monkeypatch.setattr(sys, "orig_argv", ["python", *started, "--rank", "8"])
        assert program.this_command() == "mlx-lora train --rank 8"
    monkeypatch.setattr(sys, "orig_argv", ["python", "mine.py", "a b"])
    assert program.this_command() == "python mine.py 'a b'"
    monkeypatch.setenv("UV", "/somewhere/uv")
    monkeypatch.setattr(sys, "prefix", "/cache/uv/archive-v0/abc")
    assert program.command_line(["chat"]) == "uvx mlx-lora chat"


def test_the_runs_files_name_the_script(german_run):
    folder, _ = german_run
    assert "mlx-lora generate --model" in (folder / "README.md").read_text()
    assert "python -m mlx_lora" not in (folder / "README.md").read_text()


def test_a_failed_engine_speaks_no_python():
    failed = ModelThread.__new__(ModelThread)
    failed.failure = RuntimeError("[metal] out of memory")
    words = str(failed.failed())
    assert "[metal] out of memory" in words
    assert "RuntimeError" not in words


# --- LLaMA-Factory's table of data sets


@pytest.fixture
def table(tmp_path):
    entries = {
        "shop": {"file_name": "shop.jsonl", "columns": {"prompt": "frage", "query": "thema", "response": "antwort"}},
        "hub": {"hf_hub_url": "someone/rows"},
    }
    write(tmp_path / "shop.jsonl", GERMAN)
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    return tmp_path


def test_a_folder_with_a_table_is_read_by_it(table, tokenizer):
    for data in (table, table / "shop"):
        settings = train_settings({"data": str(data)}).data
        assert settings.data == str(table / "shop.jsonl")
        assert (settings.prompt_column, settings.completion_column) == ("frage,thema", "antwort")
    assert load_data(settings, tokenizer, seed=0).report.formats == {"frage + thema + antwort": 8}
    assert train_settings({"data": str(table), "prompt_column": "frage"}).data.prompt_column == "frage"
    assert train_settings({"data": str(table / "hub")}).data.data == "someone/rows"
    assert train_settings({"data": str(table / "shop.jsonl")}).data.prompt_column is None
    with pytest.raises(InputError, match=r"no set 'shpo' in .*; did you mean shop\?"):
        train_settings({"data": str(table / "shpo")})
    write(table / "more.jsonl", GERMAN)
    entries = json.loads((table / "dataset_info.json").read_text())
    (table / "dataset_info.json").write_text(json.dumps(entries | {"more": {"file_name": "more.jsonl"}}))
    with pytest.raises(InputError, match="has the sets shop, hub, more; name one as"):
        train_settings({"data": str(table)})
    write(table / "train.jsonl", USUAL)  # a folder of ours keeps its meaning
    assert train_settings({"data": str(table)}).data.data == str(table)


def test_a_table_of_another_program_changes_nothing(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": {"train": {"num_examples": 3}}}))
    write(tmp_path / "rows.jsonl", USUAL)
    assert train_settings({"data": str(tmp_path)}).data.data == str(tmp_path)


@pytest.mark.parametrize(
    ("entry", "wanted", "left"),
    [
        ({"columns": {"prompt": "instruction", "response": "output"}}, {}, []),
        ({"columns": {"messages": "dialog", "system": "rolle"}, "tags": {"role_tag": "wer", "content_tag": "was", "user_tag": "kunde"}},
         {"chat_column": "dialog", "system_column": "rolle", "turn_names": "role=wer,content=was,user=kunde"}, []),
        ({"columns": {"prompt": "q", "response": "a", "history": "vorher"}}, {"prompt_column": "q", "completion_column": "a"},
         ["dataset_info.json s.columns.history"]),
        ({"ranking": True, "columns": {"prompt": "q", "chosen": "gut", "rejected": "rejected"}}, {"prompt_column": "q"},
         ["dataset_info.json s.columns.chosen"]),
        ({"columns": ["prompt"]}, {}, ["dataset_info.json s.columns"]),
    ],
)  # fmt: skip
def test_columns_and_tags_of_a_table(entry, wanted, left, tmp_path):
    from mlx_lora.config.migrate.common import Sheet
    from mlx_lora.config.migrate.llama_factory import find_dataset

    (tmp_path / "dataset_info.json").write_text(json.dumps({"s": {"file_name": "s.json", **entry}}))
    sheet = Sheet("f", {})
    assert find_dataset(sheet, "s", tmp_path) == (str(tmp_path / "s.json"), {})
    assert sheet.found == wanted
    assert all(line.startswith(key) for line, key in zip(sheet.refused, left, strict=True))


# --- Python


def test_a_list_is_called_a_list(tiny_folder, tmp_path, capfd):
    base = mlx_lora.load(tiny_folder)
    with pytest.raises(ValueError, match="data: an empty list"):
        mlx_lora.train(base, [])
    with pytest.raises(ValueError, match="data: no record in valid; give"):
        mlx_lora.train(base, {"train": USUAL, "validation": []})
    with pytest.raises(ValueError, match="the given train list line 1: the cell completion is empty") as refused:
        mlx_lora.train(base, [{"prompt": "a", "completion": ""}])
    assert "/records/" not in str(refused.value)
    capfd.readouterr()
    out = tmp_path / "run"
    mlx_lora.train(base, USUAL, adapter_path=out, iters=1, sample_tokens=2)
    said = capfd.readouterr().err
    assert "data       the list that was given" in said
    assert "/records/" not in said.split("Adapter:")[0]
    assert "| data | the list that was given |" in (out / "README.md").read_text()
    mlx_lora.train(base, USUAL, adapter_path=tmp_path / "quiet", iters=1, sample_tokens=0, progress=False)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match='resume="auto" to continue, or force=True'):
        mlx_lora.train(base, USUAL, adapter_path=out, iters=1)


def test_load_says_that_it_quantizes_once(tmp_path, capfd):
    from conftest import tiny_model, write_folder

    folder = write_folder(tmp_path / "own", tiny_model(seed=5))
    mlx_lora.load(folder, bits=4)
    assert "to 4 bits; this is done once" in capfd.readouterr().err
    mlx_lora.load(folder, bits=4)
    assert "4 bits" not in capfd.readouterr().err


def test_a_table_of_two_columns_gets_the_flags_that_read_it(tokenizer, tmp_path):
    table = tmp_path / "shop.csv"
    table.write_text("customer asks,we_reply\nWhen do you open?,At nine.\nWhere are you?,In Mill Street.\n")
    with pytest.raises(InputError) as refused:
        load_eval_set(str(table), DataSettings(), tokenizer)
    assert "--prompt-column 'customer asks' --completion-column we_reply" in str(refused.value)
    columns = DataSettings(prompt_column="customer asks", completion_column="we_reply")
    assert len(load_eval_set(str(table), columns, tokenizer)) == 2
    table.write_text("customer asks,we_reply,date\nWhen do you open?,At nine.,3 May\n")
    with pytest.raises(InputError, match="--prompt-column and --completion-column"):  # which of three, only you know
        load_eval_set(str(table), DataSettings(), tokenizer)


@pytest.mark.parametrize("typed", [*OTHER_WORDS, "sft", "grpo", "distill", "my.csv", "axolotl.yml"])
def test_what_others_type_is_answered_with_a_command_that_is_there(typed, capsys):
    with pytest.raises(SystemExit):
        main([typed])
    name, *args = capsys.readouterr().err.split("write mlx-lora ")[1].split()
    args = [arg for arg in args if arg != "--help"]
    name = args.pop() if name == "--json-schema" else name
    flags = {flag for param in load_command(name).params for flag in param.opts}
    assert {arg for arg in args if arg.startswith("--")} <= flags


@pytest.mark.parametrize("name", ["FastLanguageModel", "DPOTrainer"])
def test_names_of_other_libraries_say_ours(name):
    with pytest.raises(ImportError, match=f"{name}; use mlx_lora"):
        getattr(mlx_lora, name)


def test_arguments_of_others_say_ours():
    for wrong, ours in (
        ({"load_in_4bit": True}, "bits=4"),
        ({"max_seq_length": 9}, "mlx_lora.train"),
        ({"fast": 1}, "leave it out"),
    ):
        with pytest.raises(ValueError, match=ours):
            mlx_lora.load("nowhere", **wrong)
    assert train_settings({"optimizer": "paged_adamw_8bit"}).optimizer.optimizer == "adamw"
    assert "changes no result" in instead_of("dataloader_num_workers", FIELDS, str)
    assert "noise on the embeddings" in instead_of("neftune_noise_alpha", FIELDS, str)
