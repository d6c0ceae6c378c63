"""Classifiers through the commands: trained, resumed, measured, asked, exported, and refused."""

from __future__ import annotations

import csv
import json
import shutil
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from comparing import by_dtype
from run_cli import one_line, run, succeeds

import mlx_lora
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import DataSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import EmptyPart, FormatError
from mlx_lora.data.labeled import Labeled
from mlx_lora.losses.classification import NUMBER, SEVERAL, SINGLE, class_measures, macro_f1
from mlx_lora.models.head import SCORE_WEIGHT
from mlx_lora.objectives.classify import problem_of
from mlx_lora.objectives.table import objective_of
from mlx_lora.serving import app as serving
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import sha256_of

# PEFT calls what transformers has deprecated.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

LABELS = ("cold", "hot", "mild")
QUICK = ("--objective", "classify", "--learning-rate", "5e-3", "--batch-size", 12, "--kernels", "ours", "--steps-per-report", 1,
         "--rank", 4, "--iters", 24)  # fmt: skip


def write(file, rows: list[dict]):
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def texts(count: int = 36) -> list[dict]:
    return [{"text": f"day {n}: {'abz'[n % 3] * 3}", "label": LABELS[n % 3]} for n in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    write(
        folder / "valid.jsonl", [{"text": f"night {n}: {'abz'[n % 3] * 3}", "label": LABELS[n % 3]} for n in range(9)]
    )
    return write(folder / "train.jsonl", texts()).parent


@pytest.fixture(scope="module")
def trained(tiny_folder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify") / "a"
    more = ("--save-every", 12, "--dropout", 0.1)
    ran = succeeds("train", "--model", tiny_folder, "--data", data, "--adapter-path", folder, *QUICK, *more)
    assert "Labels: cold 12, hot 12, mild 12" in ran.err
    assert "predict --model" in ran.err
    return folder


@pytest.fixture(scope="module")
def several(tiny_folder, tmp_path_factory):
    """An adapter of texts with several labels, which also sees unbalanced ones, and its data."""
    folder = tmp_path_factory.mktemp("several")
    rows = [
        {"mail": f"{n}{'abz'[n % 3] * 3}{'q' * (n % 2)}", "tags": [LABELS[n % 3]] + ["odd"] * (n % 2)}
        for n in range(36)
    ]
    succeeds(*several_command(tiny_folder, write(folder / "train.jsonl", rows), folder / "a"))
    return folder


def several_command(model, data, folder) -> list:
    named = ("--text-column", "mail", "--label-column", "tags", "--class-weights", "odd=2")
    return ["train", "--model", model, "--data", data, "--adapter-path", folder, *QUICK, *named,
            "--valid-fraction", 0.3, "--iters", 60]  # fmt: skip


def measured(model, adapter, data, *more) -> dict:
    common = ("--model", model, "--adapter-path", adapter, "--data", data, "--objective", "classify")
    ran = succeeds("evaluate", *common, "--json", *more)
    return json.loads(ran.out)


def test_the_labels_are_learned_and_kept_with_the_adapter(tiny_folder, data, trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if line["val_loss"] is not None]
    assert first["val_loss"] == pytest.approx(np.log(3), abs=0.3)
    assert last["val_loss"] < first["val_loss"] - 0.4
    assert (last["accuracy"], last["macro_f1"]) == (1.0, 1.0)
    assert mx.load(str(trained / "adapters.safetensors"))[SCORE_WEIGHT].shape == (3, 64)
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["id2label"] == {"0": "cold", "1": "hot", "2": "mild"}
    assert config["label2id"]["mild"] == 2
    assert config["problem_type"] == SINGLE
    found = measured(tiny_folder, trained, data / "train.jsonl")
    assert (found["rows"], found["accuracy"], found["macro_f1"]) == (36, 1.0, 1.0)
    assert found["majority"] == pytest.approx(1 / 3)
    assert found["confusion"] == [[12, 0, 0], [0, 12, 0], [0, 0, 12]]
    assert found["classes"]["hot"]["texts"] == 12
    assert measured(tiny_folder, trained, data / "train.jsonl", "--labels", "mild,hot,cold")["accuracy"] < 0.5
    page = (trained / "report.html").read_text()
    assert "<h2>Labels</h2>" in page
    assert "taken for" in page
    assert "it labels texts" in (trained / "README.md").read_text()
    shown = run(
        "evaluate", "--model", tiny_folder, "--adapter-path", trained, "--data", data, "--objective", "classify"
    )
    assert "9 texts" in shown.out
    assert "taken for" in shown.out


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(tiny_folder, data, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints/step-000024")
    flags = ("--save-every", 12, "--dropout", 0.1, "--resume")
    command = ("train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "b", *QUICK, *flags)
    assert run(*command).code == 0
    for file in ("adapters.safetensors", "classes.jsonl"):
        assert (trained / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    half = tmp_path / "b/checkpoints/step-000012/adapters.safetensors"
    assert (trained / "adapters.safetensors").read_bytes() != half.read_bytes()
    other = write(tmp_path / "other.jsonl", [{**row, "label": row["label"] + "!"} for row in texts()])
    ran = run(*command, "--data", other, "--force")
    assert ran.code == 2


def test_a_run_that_starts_from_a_classifier_goes_on_with_its_labels(tiny_folder, data, trained, tmp_path):
    """Rows of the head were matched by their place, so that labels in another order had each other's rows."""
    more = ("--resume-adapter-file", trained, "--iters", 1, "--learning-rate", "1e-9", "--val-batches", -1)
    known = {}
    for name, labels in (("same", ()), ("other", ("--labels", "mild,cold,hot"))):
        folder = tmp_path / name
        succeeds("train", "--model", tiny_folder, "--data", data, "--adapter-path", folder, *QUICK, *more, *labels)
        known[name] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert known["other"]["accuracy"] == known["same"]["accuracy"] > 0.8
    assert known["other"]["val_loss"] == pytest.approx(known["same"]["val_loss"], rel=1e-4)


def test_a_run_that_starts_from_a_classifier_of_other_labels_is_refused(tiny_folder, trained, tmp_path):
    for label, word in (("warm", "--labels"), (["hot", "cold"], "--problem-type")):
        rows = [{**row, "label": label if row["label"] == "hot" else row["label"]} for row in texts()]
        file = write(tmp_path / "rows.jsonl", rows)
        ran = run("train", "--model", tiny_folder, "--data", file, "--adapter-path", tmp_path / "a", *QUICK,
                  "--resume-adapter-file", trained)  # fmt: skip
        assert ran.code == 2
        assert f"{word} " in ran.lines[-1]
        assert str(trained) in ran.lines[-1]


def test_the_best_validation_is_the_most_accurate(tiny_folder, data, tmp_path):
    more = ("--metric-for-best-model", "accuracy", "--keep-best", "--steps-per-eval", 6, "--save-every", 6)
    command = ("train", "--model", tiny_folder, "--data", data, *QUICK, *more)
    ran = succeeds(*command, "--adapter-path", tmp_path / "a")
    assert "highest held-out accuracy" in ran.err
    numbers = write(tmp_path / "numbers.jsonl", [{"text": str(n), "label": n / 2} for n in range(12)])
    one_line(run(*command, "--adapter-path", tmp_path / "b", "--problem-type", NUMBER), "accuracy")
    ran = run(*command, "--adapter-path", tmp_path / "c", "--data", numbers)
    assert (ran.code, "labels that are numbers" in ran.lines[-1]) == (2, True)


def test_predictions_are_written_as_lines_of_json_and_as_csv(tiny_folder, data, trained, tmp_path):
    common = ("predict", "--model", tiny_folder, "--adapter-path", trained)
    ran = run(*common, "--text", "day 3: aaa", "--text", "day 8: zzz", exactly=True)
    found = [json.loads(line) for line in ran.out.splitlines()]
    assert [one["predicted"] for one in found] == ["cold", "mild"]
    assert found[0]["probability"] == max(found[0]["probabilities"].values()) > 0.5
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1)
    rows = [*texts(4), {"text": "  "}]
    file = write(tmp_path / "in.jsonl", rows)
    kept = file.read_text()
    ran = run(*common, "--data", file, "--out", tmp_path / "out.csv")
    assert "1 text could not be labeled" in ran.err
    with (tmp_path / "out.csv").open(newline="") as opened:
        table = list(csv.DictReader(opened))
    assert [row["predicted"] for row in table] == ["cold", "hot", "mild", "cold", ""]
    assert table[4]["error"] == "empty text"
    assert float(table[0]["probability"]) > 0.5
    run(*common, "--data", file, "--out", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.get("predicted") for line in lines] == ["cold", "hot", "mild", "cold", None]
    assert lines[1]["text"] == rows[1]["text"]
    one_line(run(*common), "--text TEXT, or --data FILE")
    one_line(run(*common, "--text", ""), "empty text")
    one_line(run(*common, "--data", file, "--out", "x.txt"), ".jsonl or .csv")
    one_line(run(*common, "--data", data), "is a folder")
    one_line(run(*common, "--data", file, "--out", tmp_path / "out.csv"), "exists")
    one_line(run(*common, "--data", file, "--out", file, "--force"), str(file))
    assert file.read_text() == kept


def test_a_table_of_predictions_has_the_columns_of_all_records(tiny_folder, trained, tmp_path):
    file, out = tmp_path / "in.jsonl", tmp_path / "out.csv"
    rows = [{"text": "day 3: aaa", "id": 1, "error": "none"}, {"text": "day 4: bbb", "shop": "north"}, {"text": " "}]
    file.write_text("{\n" + "".join(json.dumps(row) + "\n" for row in rows))
    ran = run("predict", "--model", tiny_folder, "--adapter-path", trained, "--data", file, "--out", out)
    assert "2 texts could not be labeled" in ran.err
    with out.open(newline="") as opened:
        table = list(csv.DictReader(opened))
    assert list(table[0]) == ["text", "id", "shop", "predicted", "probability", "error"]
    assert [row["predicted"] for row in table] == ["", "cold", "hot", ""]
    assert (table[1]["id"], table[1]["error"], table[2]["shop"]) == ("1", "none", "north")


def test_python_predicts_what_the_command_does(tiny_folder, trained):
    base = mlx_lora.load(str(tiny_folder))
    found = mlx_lora.predict(base, ["day 3: aaa", {"text": "day 4: bbb"}], trained)
    assert [one["predicted"] for one in found] == ["cold", "hot"]
    assert mlx_lora.predict(base, "day 3: aaa", trained)["probability"] == pytest.approx(
        found[0]["probability"], abs=1e-5
    )
    assert "score" not in base.model
    with pytest.raises(InputError, match="number 1: empty text"):
        mlx_lora.predict(base, ["a", " "], trained)
    many = [f"day {n}: {'abz'[n % 3] * (n % 7)}" for n in range(40)]
    whole = mlx_lora.predict(base, many, trained, batch_tokens=40)
    again = mlx_lora.predict(base, many[::-1], trained)[::-1]
    assert [one["predicted"] for one in whole] == [one["predicted"] for one in again]
    assert np.allclose([one["probability"] for one in whole], [one["probability"] for one in again], atol=1e-5)


def test_a_text_is_cut_where_the_run_cut_it(tiny_folder, data, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "short", ignore=shutil.ignore_patterns("checkpoints"))
    settings = (trained / "run.yaml").read_text()
    assert "max_seq_length: 2048" in settings
    (tmp_path / "short/run.yaml").write_text(settings.replace("max_seq_length: 2048", "max_seq_length: 10"))
    base, text = mlx_lora.load(str(tiny_folder)), "day 3: aaa, day 4: bbbbbbb"
    found = mlx_lora.predict(base, text, tmp_path / "short")
    assert found == mlx_lora.predict(base, text, trained, max_seq_length=10)
    assert found != mlx_lora.predict(base, text, trained)
    assert found != mlx_lora.predict(base, text, tmp_path / "short", max_seq_length=20)
    engine: Any = SimpleNamespace(base=base.loaded, ignore_fingerprint=False)
    assert serving.load_scorer(engine, tmp_path / "short").data.max_seq_length == 10
    # A length that is asked for counts, the usual one, too.
    assert mlx_lora.predict(base, text, tmp_path / "short", max_seq_length=2048) == mlx_lora.predict(
        base, text, trained
    )
    losses = [measured(tiny_folder, *more)["loss"] for more in (
        (tmp_path / "short", data), (trained, data, "--max-seq-length", 10), (trained, data), (tmp_path / "short", data, "--max-seq-length", 2048)
    )]  # fmt: skip
    assert losses[0] == losses[1] != losses[2] == losses[3]
    python = mlx_lora.evaluate(base, str(data), tmp_path / "short", objective="classify")
    assert python["loss"] == pytest.approx(losses[0])


def test_several_labels_have_thresholds_that_were_chosen_on_validation(tiny_folder, several):
    head = json.loads((several / "a/adapter_config.json").read_text())["mlx_lora"]["head"]
    assert head["problem_type"] == SEVERAL
    assert head["labels"] == ["cold", "hot", "mild", "odd"]
    found = measured(tiny_folder, several / "a", several / "train.jsonl")
    assert found["macro_f1"] > 0.9
    assert list(found["thresholds"].values()) == head["thresholds"]
    base = mlx_lora.load(str(tiny_folder))
    answer = mlx_lora.predict(base, "1bbbq", several / "a")
    assert answer["predicted"] == ["hot", "odd"]
    high = json.loads((several / "a/adapter_config.json").read_text())
    high["mlx_lora"]["head"]["thresholds"] = [0.5, 0.5, 0.5, 1.0]
    shutil.copytree(several / "a", several / "b")
    (several / "b/adapter_config.json").write_text(json.dumps(high))
    assert mlx_lora.predict(base, "1bbbq", several / "b")["predicted"] == ["hot"]


def test_thresholds_of_the_last_validation_are_kept_by_a_run_that_goes_on(tiny_folder, several, tmp_path):
    shutil.copytree(several / "a", tmp_path / "c")
    file = tmp_path / "c/checkpoints/step-000060/adapter_config.json"
    config = json.loads(file.read_text())
    config["mlx_lora"]["head"]["thresholds"] = chosen = [0.25, 0.5, 0.5, 0.75]
    file.write_text(json.dumps(config))
    state = json.loads((file.parent / "state.json").read_text())
    state["sha256"][file.name] = sha256_of(file)
    (file.parent / "state.json").write_text(json.dumps(state))
    succeeds(*several_command(tiny_folder, several / "train.jsonl", tmp_path / "c"), "--resume")
    assert json.loads((tmp_path / "c/adapter_config.json").read_text())["mlx_lora"]["head"]["thresholds"] == chosen


def test_numbers_are_learned_with_the_squared_error(tiny_folder, tmp_path):
    rows = [{"text": "a" * (n % 5) + "b", "label": (n % 5) / 2} for n in range(40)]
    file, folder = write(tmp_path / "train.jsonl", rows), tmp_path / "a"
    more = ("--valid-fraction", 0.2, "--iters", 60)
    assert run("train", "--model", tiny_folder, "--data", file, "--adapter-path", folder, *QUICK, *more).code == 0
    found = measured(tiny_folder, folder, file)
    assert found["loss"] == found["mse"] < 0.1
    assert found["pearson"] > 0.95
    assert found["spearman"] > 0.9
    predicted = mlx_lora.predict(mlx_lora.load(str(tiny_folder)), "aab", folder)["predicted"]
    assert predicted == pytest.approx(1.0, abs=0.5)
    assert "squared error" in (folder / "report.html").read_text()


def test_what_cannot_be_learned_is_one_line(tiny_folder, data, trained, tmp_path):
    def refused(rows: list[dict] | None, *more: object) -> str:
        source = data if rows is None else write(tmp_path / "x.jsonl", rows)
        ran = run("train", "--model", tiny_folder, "--data", source, "--adapter-path", tmp_path / "a", *QUICK, *more)
        assert ran.code == 2
        assert len([line for line in ran.lines if line.startswith("Error")]) == 1
        return ran.lines[-1]

    assert "only the label x" in refused([{"text": str(n), "label": "x"} for n in range(9)])
    assert "the cell text is empty" in refused([{"text": " ", "label": "x"} for _ in range(9)])
    assert "--label-column" in refused([{"text": str(n)} for n in range(9)])
    assert "--text-column" in refused([{"label": str(n)} for n in range(9)])
    assert "found the label mild" in refused(None, "--labels", "hot,cold")
    assert "at least two labels" in refused(None, "--labels", "hot")
    assert "mile is not among" in refused(None, "--class-weights", "mile=2")
    assert "write balanced" in refused(None, "--class-weights", "mild=0")
    assert "which is no number" in refused(None, "--problem-type", NUMBER)
    assert "reads no such column" in refused(None, "--prompt-column", "text")
    assert "only classify" in refused(None, "--label-column", "text", "--objective", "sft")
    split = tmp_path / "split"
    split.mkdir()
    write(split / "train.jsonl", texts())
    write(split / "valid.jsonl", [{"text": "x", "label": "new"}])
    ran = run("train", "--model", tiny_folder, "--data", split, "--adapter-path", tmp_path / "a", *QUICK)
    assert (ran.code, "found the label new" in ran.lines[-1]) == (2, True)
    common = ("--model", tiny_folder, "--adapter-path", trained)
    one_line(run("generate", *common, "--prompt", "x"), "gives scores, not text")
    one_line(run("evaluate", *common, "--data", data, "--objective", "reward"), "was trained with --objective classify")


@pytest.mark.parametrize("kind", ["one", "several"])
def test_peft_reads_it_and_we_read_pefts(kind, tiny_folder, trained, several, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    adapter, said = (trained, "day 3: aaa") if kind == "one" else (several / "a", "1bbbq")
    out = tmp_path / "peft"
    assert run("export", "--model", tiny_folder, "--adapter-path", adapter, "--to", "peft", "--out", out).code == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    names = json.loads((out / "labels.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny_folder, num_labels=len(names["id2label"]), pad_token_id=256
    )
    model = peft.PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        logits = model(**tokenizer(said, return_tensors="pt")).logits[0]
    chances = logits.softmax(-1) if kind == "one" else logits.sigmoid()
    ours = mlx_lora.predict(str(tiny_folder), said, adapter)
    assert list(ours["probabilities"].values()) == pytest.approx(chances.tolist(), abs=by_dtype(1e-5, 1e-2))
    assert max(chances) - min(chances) > 0.3
    again = mlx_lora.predict(str(tiny_folder), said, out)
    assert again["predicted"] == ours["predicted"]
    assert list(again["probabilities"].values()) == pytest.approx(list(ours["probabilities"].values()), abs=1e-5)
    (out / "labels.json").unlink()  # as PEFT itself writes it
    if kind == "one":
        assert mlx_lora.predict(str(tiny_folder), said, out)["predicted"] == "LABEL_0"


def test_transformers_reads_the_fused_model(tiny_folder, trained, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "fused"
    succeeds("export", "--model", tiny_folder, "--adapter-path", trained, "--to", "hf", "--out", out)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "cold", 1: "hot", 2: "mild"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    with torch.no_grad():
        chances = model.eval()(**tokenizer("day 3: aaa", return_tensors="pt")).logits.softmax(-1)[0]
    ours = mlx_lora.predict(str(tiny_folder), "day 3: aaa", trained)
    assert list(ours["probabilities"].values()) == pytest.approx(chances.tolist(), abs=by_dtype(1e-5, 1e-2))


# Data and labels


def parsed(record: dict, **settings: str | None) -> tuple[object, object]:
    found = Labeled.parse(record, DataSettings(**settings))
    return getattr(found.example, "text", found.example), found.label


def test_texts_and_labels_are_found_by_their_names():
    assert parsed({"text": "a", "label": 1}) == ("a", 1)
    assert parsed({"subject": "s", "body": "b", "Label": "x"}) == ("s\nb", "x")
    assert parsed({"premise": "p", "hypothesis": "h", "text": "t", "label": "x"})[0] == "p\nh"
    named = {"text_column": "one,two", "label_column": "three"}
    assert parsed({"one": "1", "two": 2, "three": ["x"]}, **named) == ("1\n2", ["x"])
    chat = Labeled.parse({"messages": [{"role": "user", "content": "a"}], "labels": []}, DataSettings())
    assert chat.example.messages[0]["content"] == "a"
    for record in ({"text": "a"}, {"label": "a"}, {"text": ["a"], "label": "a"}):
        with pytest.raises(FormatError):
            parsed(record)
    with pytest.raises(EmptyPart):
        parsed({"text": "\n", "label": "a"})


def test_labels_say_what_they_are():
    assert problem_of(["a", "b"]) == SINGLE
    assert problem_of([0, 1, 2]) == SINGLE
    assert problem_of(["0", "4.0"]) == SINGLE
    assert problem_of([0.5, 1, "2"]) == NUMBER
    assert problem_of([["a"], []]) == SEVERAL


def rows_with(labels: list) -> EncodedSet:
    rows = [(np.array([1, 2], np.int32), np.zeros(2, bool))] * len(labels)
    return EncodedSet.from_rows(rows).with_facts([{"label": label} for label in labels])


def test_balanced_weights_are_those_of_the_training_rows(tiny_folder, data, tmp_path):
    rows = [row for row in texts() if row["label"] == "cold"] + texts(12)
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", rows)
    write(folder / "valid.jsonl", [row for row in texts(24) if row["label"] != "hot"])  # others are more frequent here
    flags = ("--model", tiny_folder, "--data", folder, *QUICK, "--iters", 3, "--class-weights", "balanced")
    succeeds("train", *flags, "--adapter-path", tmp_path / "a", "--val-batches", -1, "--sample-tokens", 0)
    kept = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["mlx_lora"]["head"]["weights"]
    assert kept[0] < min(kept[1:])  # cold is the most frequent label
    losses = [json.loads(line).get("val_loss") for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    given = (
        "--model",
        tiny_folder,
        "--adapter-path",
        tmp_path / "a",
        "--data",
        folder,
        "--objective",
        "classify",
        "--json",
    )
    found = json.loads(run("evaluate", *given).out)
    assert found["loss"] == pytest.approx([one for one in losses if one is not None][-1], rel=by_dtype(1e-4, 2e-2))


def test_the_scale_of_weights_does_not_change_the_step(tiny_folder, tmp_path):
    """The gradient is that of a mean: it is divided by the sum of the weights, also where that is below 1."""
    file, norms = write(tmp_path / "rows.jsonl", texts(4)), []
    for weights in ("cold=0.1,hot=0.2,mild=0.1", "cold=1,hot=2,mild=1"):
        flags = (
            "--model",
            tiny_folder,
            "--data",
            file,
            *QUICK,
            "--iters",
            1,
            "--batch-size",
            4,
            "--valid-fraction",
            0,
            "--force",
        )
        succeeds("train", *flags, "--class-weights", weights, "--adapter-path", tmp_path / "a", "--sample-tokens", 0)
        norms += [json.loads(line)["grad_norm"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert norms[0] == pytest.approx(norms[1], rel=by_dtype(1e-3, 5e-2))


def test_macro_f1_is_scikit_learns():
    truth = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]], bool)
    found = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]], bool)
    several = class_measures(truth, found, ["a", "b", "c"])
    assert macro_f1(several, SEVERAL) == pytest.approx(
        5 / 9
    )  # f1_score(truth, found, average="macro"): label c counts as 0
    assert macro_f1(several, SINGLE) == pytest.approx(5 / 6)  # f1_score of numbers of labels leaves c out


def test_labels_get_numbers_in_their_order():
    objective = objective_of(ObjectiveSettings("classify", class_weights="balanced"))
    assert objective._with_targets(rows_with([10, 9, 9, 9])).labels.tolist() == [1, 0, 0, 0]
    assert (objective.labels, objective.head.outputs) == (("9", "10"), 2)
    assert objective.weights.tolist() == pytest.approx([4 / 6, 2])
    assert objective._with_targets(rows_with(["10"])).labels.tolist() == [1]
    with pytest.raises(InputError, match="found the label 8"):
        objective._with_targets(rows_with([8]))
    objective = objective_of(ObjectiveSettings("classify", problem_type=SEVERAL))
    found = objective._with_targets(rows_with(["a; b", "b", "", '["c"]']))
    assert found.labels.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert found.row(0)[1].tolist() == [False, False, True]
