"""Score heads: classifiers, rerankers and reward models, of language models and of encoders, through the commands and Python.

Trained, measured, asked, served, exported, read by transformers and PEFT, and refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from bound import bind
from comparing import by_dtype
from conftest import TINY, tiny_model, write_folder
from resumed_runs import metrics, stopped_after, weights
from run_cli import holds, one_line, refused, run, succeeds
from serving_process import Server
from tiers import by_default
from tiny_encoders import KINDS, pair_tokenizer, tiny_encoder

import mlx_lora
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import DataSettings, ModelSettings
from mlx_lora.data.data_sets import DataFile
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion, Conversation, EmptyPart, FormatError, Text
from mlx_lora.data.labeled import GRADES, ROWS, Candidates, Labeled, encode_texts, has_pairs, pair_text, query_with
from mlx_lora.data.read import read_rows
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.data.tokenize import Encoder
from mlx_lora.exporters.adapter_config import check_fusing, classifier_of, padding_token
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.scores import (
    BINARY,
    LISTWISE,
    NUMBER,
    PAIRWISE,
    SEVERAL,
    SINGLE,
    best_first,
    class_measures,
    macro_f1,
    random_mrr,
    ranking_loss,
    ranking_measures,
)
from mlx_lora.models.encoder import start_words
from mlx_lora.models.head import SCORE_WEIGHT, head_parameters, put_head, put_score_head
from mlx_lora.models.load import Base, load_base
from mlx_lora.objectives.questions import problem_of
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.reports.run_report import of_rankings
from mlx_lora.rollouts.reward_models import score_answers
from mlx_lora.serving import app as serving
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import sha256_of

# PEFT calls what transformers has deprecated.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

LABELS = ("cold", "hot", "mild")
CLASSIFY = ("--objective", "classify", "--learning-rate", "5e-3", "--batch-size", 12, "--kernels", "ours", "--steps-per-report", 1,
         "--rank", 4, "--iters", 24)  # fmt: skip


def write_jsonl(file, rows: list[dict]):
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def texts(count: int = 36) -> list[dict]:
    return [{"text": f"day {n}: {'abz'[n % 3] * 3}", "label": LABELS[n % 3]} for n in range(count)]


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    write_jsonl(
        folder / "valid.jsonl", [{"text": f"night {n}: {'abz'[n % 3] * 3}", "label": LABELS[n % 3]} for n in range(9)]
    )
    return write_jsonl(folder / "train.jsonl", texts()).parent


@pytest.fixture(scope="module")
def classifier(tiny_folder, labels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify") / "a"
    more = ("--save-every", 12, "--dropout", 0.1)
    ran = succeeds("train", "--model", tiny_folder, "--data", labels, "--adapter-path", folder, *CLASSIFY, *more)
    holds(ran.err, "Labels: cold 12, hot 12, mild 12", "predict --model")
    return folder


@pytest.fixture(scope="module")
def several(tiny_folder, tmp_path_factory):
    """An adapter of texts with several labels, which also sees unbalanced ones, and its data."""
    folder = tmp_path_factory.mktemp("several")
    rows = [
        {"mail": f"{n}{'abz'[n % 3] * 3}{'q' * (n % 2)}", "tags": [LABELS[n % 3]] + ["odd"] * (n % 2)}
        for n in range(36)
    ]
    succeeds(*several_command(tiny_folder, write_jsonl(folder / "train.jsonl", rows), folder / "a"))
    return folder


def several_command(model, labels, folder) -> list:
    named = ("--text-column", "mail", "--label-column", "tags", "--class-weights", "odd=2")
    return ["train", "--model", model, "--data", labels, "--adapter-path", folder, *CLASSIFY, *named,
            "--valid-fraction", 0.3, "--iters", 60]  # fmt: skip


def measured(model, adapter, data, *more, objective: str = "classify") -> dict:
    common = ("--model", model, "--adapter-path", adapter, "--data", data, "--objective", objective)
    return json.loads(succeeds("evaluate", *common, "--json", *more).out)


def test_the_labels_are_learned_and_kept_with_the_adapter(tiny_folder, labels, classifier):
    lines = metrics(classifier)
    first, *_, last = [line for line in lines if line["val_loss"] is not None]
    assert first["val_loss"] == pytest.approx(np.log(3), abs=0.3)
    assert last["val_loss"] < first["val_loss"] - 0.4
    assert (last["accuracy"], last["macro_f1"]) == (1.0, 1.0)
    assert mx.load(str(classifier / "adapters.safetensors"))[SCORE_WEIGHT].shape == (3, 64)
    config = json.loads((classifier / "adapter_config.json").read_text())
    assert config["id2label"] == {"0": "cold", "1": "hot", "2": "mild"}
    assert config["label2id"]["mild"] == 2
    assert config["problem_type"] == SINGLE
    found = measured(tiny_folder, classifier, labels / "train.jsonl")
    assert (found["rows"], found["accuracy"], found["macro_f1"]) == (36, 1.0, 1.0)
    assert found["majority"] == pytest.approx(1 / 3)
    assert found["confusion"] == [[12, 0, 0], [0, 12, 0], [0, 0, 12]]
    assert found["classes"]["hot"]["texts"] == 12
    assert measured(tiny_folder, classifier, labels / "train.jsonl", "--labels", "mild,hot,cold")["accuracy"] < 0.5
    holds((classifier / "report.html").read_text(), "<h2>Labels</h2>", "taken for")
    assert "it labels texts" in (classifier / "README.md").read_text()
    shown = run(
        "evaluate", "--model", tiny_folder, "--adapter-path", classifier, "--data", labels, "--objective", "classify"
    )
    holds(shown.out, "9 texts", "taken for")


def test_a_run_goes_on_with_its_own_labels_alone(tiny_folder, labels, classifier, tmp_path):
    rest = stopped_after(classifier, tmp_path / "b", 12)
    flags = ("--save-every", 12, "--dropout", 0.1, "--resume")
    command = ("train", "--model", tiny_folder, "--data", labels, "--adapter-path", rest, *CLASSIFY, *flags)
    succeeds(*command)
    assert (classifier / "classes.jsonl").read_bytes() == (rest / "classes.jsonl").read_bytes()
    other = write_jsonl(tmp_path / "other.jsonl", [{**row, "label": row["label"] + "!"} for row in texts()])
    assert run(*command, "--data", other, "--force").code == 2


def test_a_run_that_starts_from_a_classifier_goes_on_with_its_labels(tiny_folder, labels, classifier, tmp_path):
    """Rows of the head were matched by their place, so that labels in another order had each other's rows."""
    more = ("--resume-adapter-file", classifier, "--iters", 1, "--learning-rate", "1e-9", "--val-batches", -1)
    known = {}
    for name, named in (("same", ()), ("other", ("--labels", "mild,cold,hot"))):
        folder = tmp_path / name
        succeeds("train", "--model", tiny_folder, "--data", labels, "--adapter-path", folder, *CLASSIFY, *more, *named)
        known[name] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert known["other"]["accuracy"] == known["same"]["accuracy"] > 0.8
    assert known["other"]["val_loss"] == pytest.approx(known["same"]["val_loss"], rel=1e-4)


def test_a_run_that_starts_from_a_classifier_of_other_labels_is_refused(tiny_folder, classifier, tmp_path):
    for label, word in (("warm", "--labels"), (["hot", "cold"], "--problem-type")):
        rows = [{**row, "label": label if row["label"] == "hot" else row["label"]} for row in texts()]
        file = write_jsonl(tmp_path / "rows.jsonl", rows)
        ran = run("train", "--model", tiny_folder, "--data", file, "--adapter-path", tmp_path / "a", *CLASSIFY,
                  "--resume-adapter-file", classifier)  # fmt: skip
        assert ran.code == 2
        assert f"{word} " in ran.lines[-1]
        assert str(classifier) in ran.lines[-1]


def test_the_best_validation_is_the_most_accurate(tiny_folder, labels, tmp_path):
    more = ("--metric-for-best-model", "accuracy", "--keep-best", "--steps-per-eval", 6, "--save-every", 6)
    command = ("train", "--model", tiny_folder, "--data", labels, *CLASSIFY, *more)
    ran = succeeds(*command, "--adapter-path", tmp_path / "a")
    assert "highest held-out accuracy" in ran.err
    numbers = write_jsonl(tmp_path / "numbers.jsonl", [{"text": str(n), "label": n / 2} for n in range(12)])
    one_line(run(*command, "--adapter-path", tmp_path / "b", "--problem-type", NUMBER), "accuracy")
    ran = run(*command, "--adapter-path", tmp_path / "c", "--data", numbers)
    assert (ran.code, "labels that are numbers" in ran.lines[-1]) == (2, True)


def test_predictions_are_written_as_lines_of_json_and_as_csv(tiny_folder, labels, classifier, tmp_path):
    common = ("predict", "--model", tiny_folder, "--adapter-path", classifier)
    ran = run(*common, "--text", "day 3: aaa", "--text", "day 8: zzz", exactly=True)
    found = [json.loads(line) for line in ran.out.splitlines()]
    assert [one["predicted"] for one in found] == ["cold", "mild"]
    assert found[0]["probability"] == max(found[0]["probabilities"].values()) > 0.5
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1)
    rows = [*texts(4), {"text": "  "}]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
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
    one_line(run(*common), "--text", "--data")
    one_line(run(*common, "--text", ""), "empty text")
    one_line(run(*common, "--data", file, "--out", "x.txt"), ".jsonl or .csv")
    one_line(run(*common, "--data", labels), "is a folder")
    one_line(run(*common, "--data", file, "--out", tmp_path / "out.csv"), "exists")
    one_line(run(*common, "--data", file, "--out", file, "--force"), str(file))
    assert file.read_text() == kept


def test_a_table_of_predictions_has_the_columns_of_all_records(tiny_folder, classifier, tmp_path):
    file, out = tmp_path / "in.jsonl", tmp_path / "out.csv"
    rows = [{"text": "day 3: aaa", "id": 1, "error": "none"}, {"text": "day 4: bbb", "shop": "north"}, {"text": " "}]
    file.write_text("{\n" + "".join(json.dumps(row) + "\n" for row in rows))
    ran = run("predict", "--model", tiny_folder, "--adapter-path", classifier, "--data", file, "--out", out)
    assert "2 texts could not be labeled" in ran.err
    with out.open(newline="") as opened:
        table = list(csv.DictReader(opened))
    assert list(table[0]) == ["text", "id", "shop", "predicted", "probability", "error"]
    assert [row["predicted"] for row in table] == ["", "cold", "hot", ""]
    assert (table[1]["id"], table[1]["error"], table[2]["shop"]) == ("1", "none", "north")


def test_python_predicts_what_the_command_does(tiny_folder, classifier):
    base = mlx_lora.load(str(tiny_folder))
    found = mlx_lora.predict(base, ["day 3: aaa", {"text": "day 4: bbb"}], classifier)
    assert [one["predicted"] for one in found] == ["cold", "hot"]
    assert mlx_lora.predict(base, "day 3: aaa", classifier)["probability"] == pytest.approx(
        found[0]["probability"], abs=1e-5
    )
    assert "score" not in base.model
    with pytest.raises(InputError, match="number 1: empty text"):
        mlx_lora.predict(base, ["a", " "], classifier)
    many = [f"day {n}: {'abz'[n % 3] * (n % 7)}" for n in range(40)]
    whole = mlx_lora.predict(base, many, classifier, batch_tokens=40)
    again = mlx_lora.predict(base, many[::-1], classifier)[::-1]
    assert [one["predicted"] for one in whole] == [one["predicted"] for one in again]
    assert np.allclose([one["probability"] for one in whole], [one["probability"] for one in again], atol=1e-5)


def test_a_text_is_cut_where_the_run_cut_it(tiny_folder, labels, classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "short", ignore=shutil.ignore_patterns("checkpoints"))
    settings = (classifier / "run.yaml").read_text()
    assert "max_seq_length: 2048" in settings
    (tmp_path / "short/run.yaml").write_text(settings.replace("max_seq_length: 2048", "max_seq_length: 10"))
    base, text = mlx_lora.load(str(tiny_folder)), "day 3: aaa, day 4: bbbbbbb"
    found = mlx_lora.predict(base, text, tmp_path / "short")
    assert found == mlx_lora.predict(base, text, classifier, max_seq_length=10)
    assert found != mlx_lora.predict(base, text, classifier)
    assert found != mlx_lora.predict(base, text, tmp_path / "short", max_seq_length=20)
    engine: Any = SimpleNamespace(base=base.loaded, ignore_fingerprint=False, store=SimpleNamespace(cards={}))
    engine.call = lambda work: SimpleNamespace(result=lambda: work(engine.store))
    served = serving.TextModels(engine, {"short": tmp_path / "short"}, {}, 1.0)
    assert served._scorers["short"].data.max_seq_length == 10
    # A length that is asked for counts, the usual one, too.
    assert mlx_lora.predict(base, text, tmp_path / "short", max_seq_length=2048) == mlx_lora.predict(
        base, text, classifier
    )
    losses = [measured(tiny_folder, *more)["loss"] for more in (
        (tmp_path / "short", labels), (classifier, labels, "--max-seq-length", 10), (classifier, labels), (tmp_path / "short", labels, "--max-seq-length", 2048)
    )]  # fmt: skip
    assert losses[0] == losses[1] != losses[2] == losses[3]
    python = mlx_lora.evaluate(base, str(labels), tmp_path / "short", objective="classify")
    assert python["loss"] == pytest.approx(losses[0])


def test_several_labels_have_thresholds_that_were_chosen_on_validation(tiny_folder, several):
    head = json.loads((several / "a/adapter_config.json").read_text())["mlx_lora"]["head"]
    assert head["problem_type"] == SEVERAL
    assert head["labels"] == ["cold", "hot", "mild", "odd"]
    found = measured(tiny_folder, several / "a", several / "train.jsonl")
    assert found["macro_f1"] > 0.9
    assert list(found["thresholds"].values()) == head["thresholds"]
    base = mlx_lora.load(str(tiny_folder))
    assert mlx_lora.predict(base, "1bbbq", several / "a")["predicted"] == ["hot", "odd"]
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
    file, folder = write_jsonl(tmp_path / "train.jsonl", rows), tmp_path / "a"
    more = ("--valid-fraction", 0.2, "--iters", 60)
    assert run("train", "--model", tiny_folder, "--data", file, "--adapter-path", folder, *CLASSIFY, *more).code == 0
    found = measured(tiny_folder, folder, file)
    assert found["loss"] == pytest.approx(found["mse"])
    assert found["mse"] < 0.1
    assert found["pearson"] > 0.95
    assert found["spearman"] > 0.9
    predicted = mlx_lora.predict(mlx_lora.load(str(tiny_folder)), "aab", folder)["predicted"]
    assert predicted == pytest.approx(1.0, abs=0.5)
    assert "squared error" in (folder / "report.html").read_text()


NUMBERED = {"text": "1", "label": "x"}  # what a row has if it is like all others


@pytest.mark.parametrize(
    ("row", "flags", "words"),
    [
        (NUMBERED, (), "only the label x"),
        ({**NUMBERED, "text": " "}, (), "the cell text is empty"),
        ({"text": "1"}, (), "--label-column"),
        ({"label": "1"}, (), "--text-column"),
        (None, ("--labels", "hot,cold"), "found the label mild"),
        (None, ("--labels", "hot"), "at least two labels"),
        (None, ("--class-weights", "mile=2"), "mile is not among"),
        (None, ("--class-weights", "mild=0"), "write balanced"),
        (None, ("--problem-type", NUMBER), "which is no number"),
    ],
)
def test_what_cannot_be_learned_is_one_line(row, flags, words, tiny_folder, labels, tmp_path):
    source = labels if row is None else write_jsonl(tmp_path / "x.jsonl", [{**row, "id": n} for n in range(9)])
    ran = run("train", "--model", tiny_folder, "--data", source, "--adapter-path", tmp_path / "a", *CLASSIFY, *flags)
    refused(ran, words)
    assert len([line for line in ran.lines if line.startswith("Error")]) == 1


def test_what_a_classifier_cannot_do_is_one_line(tiny_folder, labels, classifier, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", texts())
    write_jsonl(tmp_path / "valid.jsonl", [{"text": "x", "label": "new"}])
    ran = run("train", "--model", tiny_folder, "--data", tmp_path, "--adapter-path", tmp_path / "a", *CLASSIFY)
    refused(ran, "found the label new")
    common = ("--model", tiny_folder, "--adapter-path", classifier)
    one_line(run("generate", *common, "--prompt", "x"), "gives scores, not text")
    asked = ("--data", labels, "--objective", "reward")
    one_line(run("evaluate", *common, *asked), "was trained with --objective classify")


@pytest.mark.parametrize("kind", ["one", "several"])
def test_peft_reads_it_and_we_read_pefts(kind, tiny_folder, classifier, several, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    adapter, said = (classifier, "day 3: aaa") if kind == "one" else (several / "a", "1bbbq")
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


def test_transformers_reads_the_fused_model(tiny_folder, classifier, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "fused"
    succeeds("export", "--model", tiny_folder, "--adapter-path", classifier, "--to", "hf", "--out", out)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "cold", 1: "hot", 2: "mild"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    with torch.no_grad():
        chances = model.eval()(**tokenizer("day 3: aaa", return_tensors="pt")).logits.softmax(-1)[0]
    ours = mlx_lora.predict(str(tiny_folder), "day 3: aaa", classifier)
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


def test_balanced_weights_are_those_of_the_training_rows(tiny_folder, labels, tmp_path):
    rows = [row for row in texts() if row["label"] == "cold"] + texts(12)
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(
        folder / "valid.jsonl", [row for row in texts(24) if row["label"] != "hot"]
    )  # others are more frequent here
    flags = ("--model", tiny_folder, "--data", folder, *CLASSIFY, "--iters", 3, "--class-weights", "balanced")
    succeeds("train", *flags, "--adapter-path", tmp_path / "a", "--val-batches", -1, "--sample-tokens", 0)
    kept = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["mlx_lora"]["head"]["weights"]
    assert kept[0] < min(kept[1:])  # cold is the most frequent label
    losses = [json.loads(line).get("val_loss") for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    given = (
        "--model", tiny_folder, "--adapter-path", tmp_path / "a", "--data", folder, "--objective", "classify", "--json",
    )  # fmt: skip
    found = json.loads(run("evaluate", *given).out)
    assert found["loss"] == pytest.approx([one for one in losses if one is not None][-1], rel=by_dtype(1e-4, 2e-2))


def test_the_scale_of_weights_does_not_change_the_step(tiny_folder, tmp_path):
    """The gradient is that of a mean: it is divided by the sum of the weights, also where that is below 1."""
    file, norms = write_jsonl(tmp_path / "rows.jsonl", texts(4)), []
    for scale in ("cold=0.1,hot=0.2,mild=0.1", "cold=1,hot=2,mild=1"):
        flags = (
            "--model", tiny_folder, "--data", file, *CLASSIFY, "--iters", 1, "--batch-size", 4, "--valid-fraction", 0,
            "--force",
        )  # fmt: skip
        succeeds("train", *flags, "--class-weights", scale, "--adapter-path", tmp_path / "a", "--sample-tokens", 0)
        norms += [json.loads(line)["grad_norm"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert norms[0] == pytest.approx(norms[1], rel=by_dtype(1e-3, 5e-2))


def test_macro_f1_is_scikit_learns():
    truth = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]], bool)
    several = class_measures(truth, np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]], bool), ["a", "b", "c"])
    assert macro_f1(several, SEVERAL) == pytest.approx(
        5 / 9
    )  # f1_score(truth, found, average="macro"): label c counts as 0
    assert macro_f1(several, SINGLE) == pytest.approx(5 / 6)  # f1_score of numbers of labels leaves c out


def test_labels_get_numbers_in_their_order():
    objective = objective_of(ObjectiveSettings("classify", class_weights="balanced"))
    objective._settle([rows_with([10, 9, 9, 9])])
    assert objective._targets(rows_with([10, 9, 9, 9])).labels.tolist() == [[1], [0], [0], [0]]
    (question,) = objective.questions
    assert (question.labels, objective.head.outputs) == (("9", "10"), 2)
    assert question.weights == pytest.approx((4 / 6, 2))
    objective._settle([rows_with([7, 10])])  # changes nothing
    assert objective._targets(rows_with(["10"])).labels.tolist() == [[1]]
    with pytest.raises(InputError, match="found the label 8"):
        objective._targets(rows_with([8]))
    objective = objective_of(ObjectiveSettings("classify", problem_type=SEVERAL))
    rows = rows_with(["a; b", "b", "", '["c"]'])
    objective._settle([rows])
    found = objective._targets(rows)
    assert found.labels.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert found.row(0)[1].tolist() == [False, False, True]


RERANK = ("--objective", "rerank", "--learning-rate", "5e-3", "--batch-size", 8, "--kernels", "ours", "--steps-per-report", 1,
         "--rank", 4, "--iters", 30)  # fmt: skip


def queries(count: int = 32) -> list[dict]:
    """Return queries whose good documents end in an exclamation mark, whatever the query."""
    return [
        {"query": f"q{n}", "positive": f"{n} yes!", "negatives": [f"{n} no{'?' * i}" for i in range(1 + n % 4)]}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("queries")
    write_jsonl(folder / "valid.jsonl", [{**row, "query": row["query"] + "x"} for row in queries(9)])
    return write_jsonl(folder / "train.jsonl", queries()).parent


@pytest.fixture(scope="module")
def reranker(tiny_folder, ranked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerank") / "a"
    more = ("--save-every", 15, "--dropout", 0.1)
    succeeds("train", "--model", tiny_folder, "--data", ranked, "--adapter-path", folder, *RERANK, *more)
    return folder


@pytest.mark.long
def test_the_order_is_learned(tiny_folder, ranked, reranker):
    lines = metrics(reranker)
    first, *_, last = [line for line in lines if line["val_loss"] is not None]
    assert last["val_loss"] < first["val_loss"] / 2
    assert last["mrr"] > 0.9
    found = measured(tiny_folder, reranker, ranked / "train.jsonl", objective="rerank")
    assert (found["rows"], found["mrr"] > 0.9, found["ndcg"] > 0.9) == (32, True, True)
    assert "MRR" in (reranker / "report.html").read_text()
    shown = run(
        "evaluate", "--model", tiny_folder, "--adapter-path", reranker, "--data", ranked, "--objective", "rerank"
    )
    assert "9 query lists" in shown.out
    few = measured(tiny_folder, reranker, ranked / "train.jsonl", "--candidates", 2, objective="rerank")
    assert few["supervised_tokens"] == 64


def test_python_orders_documents(tiny_folder, reranker):
    base = mlx_lora.load(str(tiny_folder))
    documents = ["7 no", "7 yes!", "7 no??"]
    found = mlx_lora.rerank(base, "q7", documents, reranker)
    assert (found[0]["index"], found[0]["document"]) == (1, "7 yes!")
    assert 1 > found[0]["score"] > found[1]["score"] >= found[2]["score"] > 0
    assert [one["index"] for one in mlx_lora.rerank(base, "q7", documents, reranker, top_n=1)] == [1]
    with pytest.raises(InputError, match="not empty"):
        mlx_lora.rerank(base, "q7", ["a", ""], reranker)
    with pytest.raises(InputError, match="trained with objective rerank"):
        mlx_lora.predict(base, "a", reranker)


@pytest.mark.parametrize(
    ("row", "flags", "words"),
    [
        ({"query": "a", "positive": "b"}, (), "without a negative"),
        ({"query": "a", "documents": ["b", "c"], "labels": [1, 1]}, (), "equally good"),
        ({"query": "a", "positive": "", "negative": "c"}, (), "empty"),
        ({"query": "a", "completion": "b"}, (), "needs positive and negative"),
    ],
)
def test_what_cannot_be_ranked_is_one_line(row, flags, words, tiny_folder, tmp_path):
    data = write_jsonl(tmp_path / "x.jsonl", [row] * 9)
    refused(
        run("train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "a", *RERANK, *flags), words
    )


def test_transformers_gives_a_rerankers_score(tiny_folder, reranker, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "peft"
    assert run("export", "--model", tiny_folder, "--adapter-path", reranker, "--to", "peft", "--out", out).code == 0
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1, pad_token_id=256)
    model, tokenizer = (
        peft.PeftModel.from_pretrained(base, out).eval(),
        transformers.AutoTokenizer.from_pretrained(tiny_folder),
    )
    with torch.no_grad():
        wanted = model(**tokenizer(pair_text("q7", "7 yes!"), return_tensors="pt")).logits.sigmoid().item()
    (found,) = mlx_lora.rerank(str(tiny_folder), "q7", ["7 yes!"], out)
    assert found["score"] == pytest.approx(wanted, abs=by_dtype(1e-5, 1e-2))


# Records


def test_records_in_all_forms():
    one = Candidates.parse(
        {"Query": "q", "positives": ["a", "b"], "negative_1": "c", "negative_2": "d"}, DataSettings()
    )
    assert (one.query, one.documents, one.grades) == ("q", ("a", "b", "c", "d"), (1, 1, 0, 0))
    assert one.shown.completion == "a"
    listed = Candidates.parse({"question": "q", "docs": ["a", "b"], "labels": [0, 2]}, DataSettings())
    assert (listed.documents, listed.grades, listed.shown.completion) == (("a", "b"), (0, 2), "b")
    assert Candidates.parse({"query": "q", "document": "a", "score": "0.5"}, DataSettings()).grades == (0.5,)
    for record in (
        {"positive": "a"},
        {"query": "q", "docs": ["a"], "labels": [1, 0]},
        {"query": "q", "doc": "a", "label": "x"},
    ):
        with pytest.raises(FormatError):
            Candidates.parse(record, DataSettings())
    with pytest.raises(EmptyPart):
        Candidates.parse({"query": " ", "document": "a", "label": 1}, DataSettings())


@pytest.mark.parametrize(("suffix", "between"), [(".csv", ","), (".tsv", "\t")])
def test_an_empty_cell_of_a_table_is_no_negative(tmp_path, suffix, between):
    lines = (
        ("query", "positive", "negative_1", "Negative 2"),
        ("q", "a", "b", ""),
        ("r", "a", "b", "c"),
        ("s", "a", "", ""),
    )
    file = tmp_path / f"rows{suffix}"
    file.write_text("".join(between.join(line) + "\n" for line in lines))
    rows = read_rows([DataFile(file, file.name)], DataSettings(), "candidates")
    assert [entry.documents for entry in rows.entries] == [("a", "b"), ("a", "b", "c")]
    assert len(rows.dropped) == 1  # without any


def test_rows_of_one_query_are_one_example(tiny_folder, tmp_path):
    rows = [{"query": f"q{n // 3}", "document": f"d{n}", "label": int(n % 3 == 0)} for n in range(12)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    ran = succeeds("train", "--model", tiny_folder, "--data", file, "--adapter-path", tmp_path / "a", *RERANK, "--iters", 1,
              "--valid-fraction", 0)  # fmt: skip
    assert "train      4 query lists" in ran.err


def test_queries_get_rows_of_their_best_documents_and_the_worst(logged):
    objective = objective_of(ObjectiveSettings("rerank", candidates=3))
    tokens = [np.arange(1, 3 + n, dtype=np.int32) for n in range(4)]
    facts = [{ROWS: tokens, "grades": [1.0, 1.0, 1.0, 0.0]}, {ROWS: tokens[:2], "grades": [0.0, 1.0]}]
    found = objective._with_targets(EncodedSet.from_rows([(tokens[0], np.zeros(2, bool))] * 2).with_facts(facts))
    assert found.group == 3
    assert "1 query, of up to 4; --candidates 4" in " ".join(logged)
    assert np.array(found.labels).tolist() == [1, 1, 0, 1, 0, -1]
    assert [len(found.row(i)[0]) for i in range(6)] == [3, 4, 6, 4, 3, 2]  # one more each, which is only a target


# Losses and measures


@pytest.mark.parametrize("kind", ["pairwise", "listwise", "binary"])
def test_loss_and_gradient_can_be_compiled(kind):
    """MLX cannot compile a function that computes one of its outputs twice: here, the number of queries."""
    model = tiny_model()
    model.freeze()
    put_score_head(model, TINY, 1, 1)
    objective = objective_of(ObjectiveSettings("rerank", rerank_loss=kind))
    tokens = [np.arange(1, 6 + n, dtype=np.int32) for n in range(3)]
    facts = [{ROWS: tokens, GRADES: [1.0, 0.0, 0.0]}, {ROWS: tokens[1:], GRADES: [0.0, 1.0]}]
    rows = objective._with_targets(EncodedSet.from_rows([(tokens[0], np.zeros(5, bool))] * 2).with_facts(facts))
    bound = bind(objective, choose_loss(model, TINY), model)
    [batch] = bound.prepare([BatchPlan(rows, batch_tokens=400, batch_size=2, seed=0).batch(0, 0)], SINGLE_DEVICE)
    gradient = nn.value_and_grad(model, lambda arrays: bound.loss.train(model, arrays))
    plain, compiled = gradient(bound.arrays_of(batch)), mx.compile(gradient)(bound.arrays_of(batch))
    assert [one.item() for one in compiled[0][:2]] == pytest.approx([one.item() for one in plain[0][:2]], rel=1e-5)


class Scored:
    """Stands for a cross-encoder whose scores of numbered documents are given."""

    num_labels, device = 1, "cpu"

    def __init__(self, scores):
        self.scores = scores

    def preprocess(self, pairs, **_):
        import torch

        return {"numbers": torch.tensor([int(document) for _, document in pairs])}

    def __call__(self, tokens):
        return {"scores": self.scores[tokens["numbers"]]}


def in_sentence_transformers(kind: str, scores: np.ndarray, grades: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the loss and its gradient with respect to the scores."""
    import torch
    from sentence_transformers.cross_encoder import losses

    given = torch.tensor(scores, requires_grad=True)
    flat = given.reshape(-1)
    if kind == BINARY:
        there = grades >= 0
        loss = torch.nn.BCEWithLogitsLoss()(given[there], torch.tensor(grades[there]))
    else:
        model = Scored(flat)
        numbers = np.arange(grades.size).reshape(grades.shape)
        documents = [[str(n) for n in row[own >= 0]] for row, own in zip(numbers, grades, strict=True)]
        labels = [torch.tensor(own[own >= 0]) for own in grades]
        made = losses.RankNetLoss(model) if kind == PAIRWISE else losses.ListNetLoss(model)
        loss = made([["q"] * len(grades), documents], labels)
    loss.backward()
    return loss.item(), given.grad.numpy()


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["pairwise", "listwise", "binary"])
def test_losses_and_gradients_are_those_of_sentence_transformers(kind):
    pytest.importorskip("sentence_transformers")
    scores = (3 * np.random.default_rng(0).normal(size=(5, 4))).astype(np.float32)
    grades = np.array([[1, 0, 0, -1], [1, 1, 0, 0], [0, 1, -1, -1], [1, 0, 1, 0], [0, 0, 0, 1]], np.float32)

    def ours(scores: mx.array) -> mx.array:
        total, count = ranking_loss(kind, scores, mx.array(grades))
        return total / count

    found, gradient = mx.value_and_grad(ours)(mx.array(scores))
    wanted, theirs = in_sentence_transformers(kind, scores, grades)
    assert found.item() == pytest.approx(wanted, rel=1e-4)
    assert np.linalg.norm(np.array(gradient) - theirs) < 1e-4 * np.linalg.norm(theirs)
    assert abs(ours(mx.array(scores + np.arange(4, dtype=np.float32))).item() - wanted) > 1e-2


def test_measures_are_those_of_a_ranking_by_hand():
    scores = np.array([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0], [0.0, 1.0, 9.0]], np.float32)
    found = ranking_measures(scores, np.array([[1, 0, 0], [2, 0, 1], [1, 0, -1]], np.float32))
    assert found["mrr"] == pytest.approx((1 / 3 + 1 + 1 / 2) / 3)
    assert found["accuracy"] == pytest.approx(1 / 3)
    second = (3 + 1 / 2) / (3 + 1 / np.log2(3))
    assert found["ndcg"] == pytest.approx((1 / 2 + second + 1 / np.log2(3)) / 3)


def test_grades_may_be_as_large_as_numbers_of_clicks():
    scores = np.array([[1, 2], [2, 1]], np.float32)
    found = ranking_measures(scores, np.array([[1501, 1500], [1501, 1500]], np.float32))
    second = (1 / 2 + 1 / np.log2(3)) / (1 + 1 / 2 / np.log2(3))
    assert found["ndcg"] == pytest.approx((second + 1) / 2)


def test_a_row_without_a_document_changes_nothing():
    scores, grades = mx.array([[1.0, -1.0, 9.0]]), mx.array([[1.0, 0.0, -1.0]])
    for kind in (BINARY, PAIRWISE, LISTWISE):
        with_it = [one.item() for one in ranking_loss(kind, scores, grades)]
        without = [one.item() for one in ranking_loss(kind, scores[:, :2], grades[:, :2])]
        assert with_it == pytest.approx(without)
        assert with_it != pytest.approx([one.item() for one in ranking_loss(kind, scores, mx.maximum(grades, 0))])


def test_a_head_that_gives_all_the_same_score_has_found_nothing():
    grades = np.array([[1, 0, 0, -1], [2, 2, 1, 0]], np.float32)  # the best first, as a run has them
    same = np.zeros_like(grades)
    found = ranking_measures(same, grades)
    assert found["accuracy"] == 0
    assert found["mrr"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found["ndcg"] < 0.8
    assert [one.item() for one in best_first(mx.array(same), mx.array(grades))] == [0, 2]
    right = np.array([[3, 2, 1, 0], [3, 3, 1, 0]], np.float32)  # two documents may be equally good
    assert ranking_measures(right, grades) == {"accuracy": 1.0, "mrr": 1.0, "ndcg": 1.0}
    assert [one.item() for one in best_first(mx.array(right), mx.array(grades))] == [2, 2]


def test_a_random_order_is_what_random_scores_give():
    grades = np.array([[1, 0, 0, 0, -1], [1, 1, 0, 0, 0], [2, 0, -1, -1, -1]], np.float32)
    random = np.random.default_rng(0)
    found = [ranking_measures(random.normal(size=grades.shape), grades)["mrr"] for _ in range(4000)]
    wanted = random_mrr(grades)
    assert wanted["random_mrr"] == pytest.approx(np.mean(found), abs=0.02)
    assert wanted["random_mrr_sd"] == pytest.approx(np.std(found), rel=0.1)
    wanted["random_mrr_sd"] /= 4  # as of 48 queries
    first = {"mrr": 0.2, "val_loss": 1.2, "accuracy": 0.2} | wanted
    assert of_rankings([first], first | {"mrr": 0.99})[1] == "plain"  # measured once
    assert of_rankings([first, first], first | {"mrr": 0.99})[1] == "good"
    assert of_rankings([first, first], first | {"mrr": wanted["random_mrr"] + wanted["random_mrr_sd"]})[1] == "bad"


@pytest.mark.parametrize(("kind", "guessing"), [(PAIRWISE, 1.0), (LISTWISE, np.log(2)), (BINARY, np.log(2))])
def test_a_run_starts_at_the_loss_of_guessing(tiny_folder, tmp_path, kind, guessing):
    rows = [{"query": f"q{n}", "positive": f"{n} yes", "negatives": [f"{n} no"]} for n in range(6)]
    mlx_lora.train(tiny_folder, rows, tmp_path / "a", objective="rerank", rerank_loss=kind, iters=1, valid_fraction=0.5)
    first = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["val_loss"] == pytest.approx(guessing, abs=0.05)
    assert first["random_mrr"] == pytest.approx(0.75)


REWARD = ("--iters", 4, "--learning-rate", "5e-3", "--batch-size", 4, "--sample-tokens", 4, "--kernels", "ours",
         "--val-batches", 1, "--steps-per-report", 1, "--rank", 4)  # fmt: skip
CHATS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": text}]
    for n, text in ((1, "It is 1."), (2, "No idea!!!"), (3, ""), (4, "It is four, of course."))
]


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A tiny model with an output head of its own."""
    config = {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}
    return write_folder(tmp_path_factory.mktemp("untied"), tiny_model(tie_word_embeddings=False), config)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea" + "!" * (n % 5)} for n in range(24)
    ]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def rewarder(untied, pairs, tmp_path_factory):
    """A reward model's adapter."""
    folder = tmp_path_factory.mktemp("reward") / "a"
    train_on_pairs(untied, pairs, folder)
    return folder


@pytest.fixture(scope="module")
def imitated(untied, pairs, tmp_path_factory):
    """An adapter without a score head."""
    folder = tmp_path_factory.mktemp("orpo") / "a"
    train_on_pairs(untied, pairs, folder, "--sample-tokens", 0, objective="orpo")
    return folder


def train_on_pairs(model, pairs, folder, *more, objective="reward"):
    succeeds(
        "train", "--model", model, "--data", pairs, "--adapter-path", folder, "--objective", objective, *REWARD, *more
    )
    return metrics(folder)


def base_with(model, adapter) -> Base:
    base = load_base(ModelSettings(model=str(model)))
    load_adapter(base, adapter, scores=True)
    return base


def rewards_of(model, adapter) -> np.ndarray:
    return score_answers(base_with(model, adapter), [Conversation(chat) for chat in CHATS])


def torch_scores(model, tokenizer) -> np.ndarray:
    """Return transformers' scores of the chats, padded to one batch."""
    import torch

    inputs = tokenizer.apply_chat_template(CHATS, return_dict=True, return_tensors="pt", padding=True)
    assert (inputs["attention_mask"] == 0).any()
    with torch.no_grad():
        return model.eval()(**inputs).logits.squeeze(1).numpy()


def test_the_only_target_of_a_row_is_behind_its_last_token():
    rows = EncodedSet.from_rows(
        [(np.arange(1, 4), np.array([0, 1, 1], bool)), (np.arange(7, 9), np.array([0, 1], bool))]
    )
    ends = rows.grouped(2).with_end_scores()
    assert [ends.row(i)[0].tolist() for i in range(2)] == [[1, 2, 3, 0], [7, 8, 0]]
    assert [ends.row(i)[1].tolist() for i in range(2)] == [[False] * 3 + [True], [False] * 2 + [True]]
    assert ends.group == 2


def test_evaluate_measures_what_was_trained(untied, pairs, rewarder):
    assert json.loads((rewarder / "adapter_config.json").read_text())["mlx_lora"]["full"] == [SCORE_WEIGHT]
    lines = metrics(rewarder)
    ran = run(
        "evaluate", "--model", untied, "--adapter-path", rewarder, "--data", pairs, "--objective", "reward", "--json"
    )
    found = json.loads(ran.out)
    assert found["accuracy"] > 0.9
    assert found["margin"] == pytest.approx(found["chosen_rewards"] - found["rejected_rewards"], abs=1e-4)
    assert found["margin"] > lines[0]["margin"] + 0.1
    assert found["loss"] < lines[0]["val_loss"]
    assert (found["rows"], found["supervised_tokens"]) == (24, 48)
    assert "Before and after" not in (rewarder / "report.html").read_text()
    assert "scores answers and does not write text" in (rewarder / "README.md").read_text()


def test_a_reward_model_is_refused_where_text_is_wanted(untied, pairs, rewarder, tmp_path):
    common = ("--model", untied, "--adapter-path", rewarder)
    says = "this adapter is a reward model, which gives scores, not text"
    one_line(run("generate", *common, "--prompt", "x"), says)
    one_line(run("chat", "--model", untied, "--adapter", f"r={rewarder}"), says)
    one_line(run("serve", "--model", untied, "--adapter", f"r={rewarder}"), says)
    one_line(run("evaluate", *common, "--data", pairs, "--objective", "orpo"), says)
    one_line(run("evaluate", *common, "--data", pairs, "--forgetting"), says)
    for to in ("gguf", "gguf-adapter", "ollama", "mlx-lm"):
        one_line(run("export", *common, "--to", to, "--out", tmp_path / to), says)
    more = ("--model", untied, "--data", pairs, "--adapter-path", tmp_path / "b", *REWARD, "--resume-adapter-file")
    refused(run("train", *more, rewarder / "adapters.safetensors", "--objective", "orpo"), says)


def test_what_a_reward_model_cannot_be_is_one_line(untied, pairs, rewarder, imitated, tmp_path):
    one_line(run("evaluate", "--model", untied, "--data", pairs, "--objective", "reward"), "no score head")
    common = ("--model", untied, "--data", pairs, "--objective", "reward")
    one_line(run("evaluate", *common, "--adapter-path", imitated), "has no score head")
    ran = run("train", *common, "--adapter-path", tmp_path / "b", *REWARD, "--target-modules", "q_proj,lm_head")
    assert (ran.code, "hidden states of this model cannot be read" in ran.lines[-1]) == (2, True)
    with pytest.raises(InputError, match="no such class"):
        classifier_of("kimi_linear")
    base = base_with(untied, rewarder)
    answers = [Completion("a", "b"), Completion("a" * 200, "b")]
    with pytest.raises(InputError, match="answer 1: no trained token"):
        score_answers(base, answers, DataSettings(max_seq_length=100))
    with pytest.raises(InputError, match="has no score head"):
        score_answers(load_base(ModelSettings(model=str(untied))), answers)


def test_a_run_starts_from_a_reward_model_or_from_another_adapter(untied, pairs, rewarder, imitated, tmp_path):
    fresh = train_on_pairs(untied, pairs, tmp_path / "b", "--iters", 1)
    again = train_on_pairs(
        untied, pairs, tmp_path / "c", "--iters", 1, "--resume-adapter-file", rewarder / "adapters.safetensors"
    )
    assert again[0]["val_loss"] < fresh[0]["val_loss"] - 0.05
    file = imitated / "adapters.safetensors"
    other = train_on_pairs(untied, pairs, tmp_path / "d", "--iters", 1, "--resume-adapter-file", file)
    assert other[0]["val_loss"] not in (fresh[0]["val_loss"], again[0]["val_loss"])


def test_the_head_is_seeded_and_every_factor_and_the_head_move(untied, pairs, rewarder, tmp_path):
    train_on_pairs(untied, pairs, tmp_path / "b")
    mine, same = (mx.load(str(folder / "adapters.safetensors")) for folder in (rewarder, tmp_path / "b"))
    assert all(mx.array_equal(value, same[name]) for name, value in mine.items())
    assert mine[SCORE_WEIGHT].dtype == mx.float32
    train_on_pairs(untied, pairs, tmp_path / "c", "--seed", 1)
    other = mx.load(str(tmp_path / "c/adapters.safetensors"))
    assert not mx.allclose(other[SCORE_WEIGHT], mine[SCORE_WEIGHT], atol=1e-3)
    assert all(mx.abs(value).max() > 0 for name, value in mine.items() if name.endswith("lora_b"))


def test_peft_reads_a_reward_model_and_we_read_pefts(untied, rewarder, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "peft"
    assert run("export", "--model", untied, "--adapter-path", rewarder, "--to", "peft", "--out", out).code == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(untied)
    tokenizer.pad_token = "<|endoftext|>"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        untied, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    wanted = rewards_of(untied, rewarder)
    assert np.ptp(wanted) > 0.1
    assert np.abs(torch_scores(base, tokenizer) - wanted).max() > 1e-2  # without the adapter
    found = torch_scores(peft.PeftModel.from_pretrained(base, out), tokenizer)
    assert np.abs(found - wanted).max() < by_dtype(1e-4, 3e-2)
    assert np.abs(rewards_of(untied, out) - wanted).max() < 1e-5
    one_line(run("generate", "--model", untied, "--adapter-path", out, "--prompt", "x"), "is a reward model")


@pytest.mark.parametrize("command", [("fuse",), ("export", "--to", "hf")])
def test_transformers_reads_a_fused_reward_model(command, untied, rewarder, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    out = tmp_path / "fused"
    succeeds(command[0], "--model", untied, "--adapter-path", rewarder, *command[1:], "--out", out)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert (model.config.num_labels, model.config.pad_token_id) == (1, 256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    wanted = rewards_of(untied, rewarder)
    assert np.abs(torch_scores(model, tokenizer) - wanted).max() < by_dtype(1e-4, 3e-2)
    model.score.weight.data *= 1.1
    assert np.abs(torch_scores(model, tokenizer) - wanted).max() > 1e-2
    stored = mx.load(str(out / "model.safetensors"))
    assert SCORE_WEIGHT in stored
    assert "lm_head.weight" not in stored
    one_line(run("generate", "--model", out, "--prompt", "x"), "gives scores, not text")


def test_a_fused_reward_model_is_in_float_and_in_transformers_layout(untied):
    base = load_base(ModelSettings(model=str(untied)))
    packed = replace(base, config={**base.config, "quantization": {"bits": 4, "group_size": 32}})
    with pytest.raises(InputError, match="give --dequantize"):
        check_fusing(packed, dequantize=False)
    check_fusing(packed, dequantize=True)
    for kind, why in (("mixtral", "another layout"), ("kimi_linear", "no such class")):
        with pytest.raises(InputError, match=why):
            check_fusing(replace(base, config={**base.config, "model_type": kind}), dequantize=True)


def test_padding_is_a_token_that_ends_no_text(untied):
    base = load_base(ModelSettings(model=str(untied)))
    tokenizer = base.hf_tokenizer
    assert padding_token(tokenizer, base.config) == "<|endoftext|>"
    assert padding_token(tokenizer, {"eos_token_id": [256, 257]}) not in ("<|endoftext|>", "<s>", tokenizer.eos_token)
    assert padding_token(tokenizer, {"eos_token_id": list(range(300))}) is None


def test_answers_are_scored_in_their_order_whatever_the_batch(untied, rewarder):
    base = base_with(untied, rewarder)
    answers = [Conversation(chat) for chat in CHATS]
    whole = score_answers(base, answers)
    assert np.abs(score_answers(base, answers, batch_tokens=48) - whole).max() < 1e-5
    assert np.abs(score_answers(base, answers[::-1])[::-1] - whole).max() < 1e-5
    assert np.abs(np.diff(whole)).min() > 1e-3
    plain = replace(base)
    plain.hf_tokenizer.chat_template = None
    assert score_answers(plain, [Completion("a ", "b")]) != pytest.approx(whole[0], abs=1e-3)


ENCODERS = ("--learning-rate", "5e-3", "--batch-size", 8, "--kernels", "ours", "--steps-per-report", 1, "--rank", 4, "--iters", 20,
         "--save-every", 10, "--dropout", 0.1)  # fmt: skip
TESTS = {"rerank": 1, "classify": 3}


def rows_of(objective: str, count: int = 24) -> list[dict]:
    """Return queries whose good documents end in an exclamation mark, or pairs of texts whose second says the label."""
    if objective == "rerank":
        return [{"query": f"q{n}", "positive": f"{n} yes!", "negatives": [f"{n} no", f"no {n}?"]} for n in range(count)]
    labels = ("cold", "hot", "mild")
    return [{"text": f"day {n}", "text_pair": "abz"[n % 3] * 3, "label": labels[n % 3]} for n in range(count)]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {kind: tiny_encoder(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def on_encoders(encoders, tmp_path_factory) -> Callable[[str, str], Path]:
    """Return the folder of an adapter for a kind of encoder and an objective, which is trained once."""
    room = tmp_path_factory.mktemp("adapters")
    for objective in TESTS:
        write_jsonl(room / f"{objective}.jsonl", rows_of(objective))

    @cache
    def folder(kind: str, objective: str) -> Path:
        adapter = room / f"{kind}-{objective}"
        data = ("--data", room / f"{objective}.jsonl", "--objective", objective)
        ran = succeeds("train", "--model", encoders[kind], *data, "--adapter-path", adapter, *ENCODERS)
        assert "Score head: new (the model has none)" in ran.err
        return adapter

    return folder


@pytest.mark.parametrize("kind", by_default(["bert", "modernbert"], "bert"))
def test_an_order_is_learned_measured_and_asked_for(kind, encoders, on_encoders):
    adapter = on_encoders(kind, "rerank")
    common = ("--model", encoders[kind], "--adapter-path", adapter, "--objective", "rerank")
    ran = run("evaluate", *common, "--data", adapter.parent / "rerank.jsonl", "--json")
    assert json.loads(ran.out)["mrr"] > 0.9, ran.err
    assert mlx_lora.rerank(encoders[kind], "q7", ["7 no", "7 yes!", "no 7?"], adapter)[0]["index"] == 1
    with pytest.raises(InputError, match="trained with objective rerank"):
        mlx_lora.predict(encoders[kind], "a", adapter)


@pytest.mark.parametrize("kind", by_default(["bert", "xlm-roberta"], "xlm-roberta"))
def test_labels_of_pairs_are_learned_and_predicted(kind, encoders, on_encoders):
    adapter = on_encoders(kind, "classify")
    records = [{"text": "day 30", "text_pair": second} for second in ("aaa", "bbb", "zzz")]
    found = mlx_lora.predict(encoders[kind], records, adapter)
    assert [one["predicted"] for one in found] == ["cold", "hot", "mild"]
    swapped = mlx_lora.predict(encoders[kind], [{"text": "aaa", "text_pair": "day 30"}], adapter)[0]
    assert abs(swapped["probabilities"]["cold"] - found[0]["probabilities"]["cold"]) > 1e-4


@pytest.mark.parametrize(
    ("kind", "objective"), by_default([("bert", "rerank"), ("xlm-roberta", "classify")], ("bert", "rerank"))
)
def test_a_run_on_an_encoder_that_was_cut_goes_on_to_the_same_bytes(kind, objective, encoders, on_encoders, tmp_path):
    known = on_encoders(kind, objective)
    rest = stopped_after(known, tmp_path / "b", 10)
    data = ("--data", known.parent / f"{objective}.jsonl", "--objective", objective)
    succeeds("train", "--model", encoders[kind], *data, "--adapter-path", rest, *ENCODERS, "--resume")
    assert weights(known) == weights(rest) != weights(rest / "checkpoints/step-000010")


def test_a_run_may_start_from_another_adapter(encoders, on_encoders, tmp_path):
    adapter = on_encoders("bert", "rerank")
    data = ("--data", adapter.parent / "rerank.jsonl", "--objective", "rerank", "--resume-adapter-file", adapter)
    still = ("--learning-rate", "1e-12", "--iters", 1, "--rank", 4, "--kernels", "ours")
    succeeds("train", "--model", encoders["bert"], *data, "--adapter-path", tmp_path / "a", *still)
    one, other = (
        mlx_lora.rerank(encoders["bert"], "q7", ["7 no", "7 yes!"], folder) for folder in (adapter, tmp_path / "a")
    )
    assert [a["score"] for a in one] == pytest.approx([a["score"] for a in other], abs=by_dtype(1e-6, 1e-2))


def test_a_classifiers_head_on_an_encoder_learns_three_times_as_fast(encoders, on_encoders, tmp_path):
    data = ("--data", on_encoders("xlm-roberta", "classify").parent / "classify.jsonl", "--objective", "classify")
    found = []
    for rate in ("1e-4", "1e-12"):
        still = ("--learning-rate", rate, "--warmup", 0, "--iters", 1, "--rank", 4, "--kernels", "ours")
        succeeds("train", "--model", encoders["bert"], *data, "--adapter-path", tmp_path / rate, *still)
        found.append(mx.load(str(tmp_path / rate / "adapters.safetensors")))
    moved = {
        name: mx.abs(found[0][name] - found[1][name]).max().item() for name in ("score.weight", "pooler.dense.weight")
    }
    assert moved["score.weight"] == pytest.approx(
        3 * moved["pooler.dense.weight"], rel=0.1
    )  # Adam's first step is the rate


def test_all_of_the_head_is_saved_with_the_adapter(on_encoders):
    stored = mx.load(str(on_encoders("bert", "rerank") / "adapters.safetensors"))
    head = {name: value for name, value in stored.items() if name.startswith(("pooler", "score"))}
    assert head.keys() == {"pooler.dense.weight", "pooler.dense.bias", "score.weight", "score.bias"}
    assert {value.dtype for value in head.values()} == {mx.float32}


@pytest.mark.parametrize(
    ("kind", "objective"),
    by_default(
        [("bert", "rerank"), ("modernbert", "rerank"), ("xlm-roberta", "classify")],
        ("bert", "rerank"), ("xlm-roberta", "classify"),
    ),
)  # fmt: skip
def test_the_merged_model_and_pefts_form_score_as_the_adapter(kind, objective, encoders, on_encoders, tmp_path):
    adapter = on_encoders(kind, objective)

    def scores(model, adapter):
        if objective == "classify":
            (found,) = mlx_lora.predict(model, [{"text": "day 30", "text_pair": "aaa"}], adapter)
            return list(found["probabilities"].values())
        return [
            one["score"]
            for one in sorted(mlx_lora.rerank(model, "q7", ["7 no", "7 yes!"], adapter), key=lambda one: one["index"])
        ]

    wanted = scores(encoders[kind], adapter)
    common = ("--model", encoders[kind], "--adapter-path", adapter)
    assert run("export", *common, "--to", "peft", "--out", tmp_path / "peft").code == 0
    assert scores(encoders[kind], tmp_path / "peft") == pytest.approx(wanted, abs=by_dtype(1e-5, 2e-2))
    succeeds("fuse", *common, "--out", tmp_path / "fused")
    base = load_base(ModelSettings(model=str(tmp_path / "fused")))
    assert "goes on from" in start_words(base.model, TESTS[objective])
    # A merged model goes on: a run without a step of any size leaves its scores.
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows_of(objective))))
    data = (
        "--data", tmp_path / "rows.jsonl", "--objective", objective, "--learning-rate", "1e-12", "--iters", 1, "--rank",
        2,
    )  # fmt: skip
    succeeds("train", "--model", tmp_path / "fused", *data, "--adapter-path", tmp_path / "again", "--kernels", "ours")
    assert scores(tmp_path / "fused", tmp_path / "again") == pytest.approx(wanted, abs=by_dtype(1e-4, 3e-2))


@pytest.mark.slow
def test_the_server_orders_documents(encoders, on_encoders, tmp_path):
    import httpx

    model, adapter = encoders["bert"], on_encoders("bert", "rerank")
    documents = ["7 no", "7 yes!", "no 7?"]
    with Server("--model", model, "--adapter", f"order={adapter}", log=tmp_path / "log") as server:
        body = {"model": "order", "query": "q7", "documents": documents}
        found = httpx.post(f"{server.url}/v1/rerank", json=body, timeout=60).json()["results"]
        ours = mlx_lora.rerank(model, "q7", documents, adapter)
        assert [one["index"] for one in found] == [one["index"] for one in ours]
        assert [one["relevance_score"] for one in found] == pytest.approx([one["score"] for one in ours], abs=1e-4)
        assert server.stop() == 0, server.text


def test_a_run_is_planned(encoders, on_encoders):
    for kind, objective in (("bert", "rerank"), ("xlm-roberta", "classify")):
        data = ("--data", on_encoders(kind, objective).parent / f"{objective}.jsonl", "--objective", objective)
        succeeds("plan", "--model", encoders[kind], *data)


def test_a_plan_without_data_has_rows_that_the_model_can_take(encoders):
    for kind in ("bert", "xlm-roberta"):
        longest = load_base(ModelSettings(model=str(encoders[kind]))).model.args.longest
        found = mlx_lora.plan(encoders[kind], objective="classify")
        assert 0 < found["settings"]["row_tokens"] <= longest
        assert all(0 < most <= longest for most in found["largest_sequence"].values())


# Where a head begins


def test_a_checkpoints_head_is_the_start_if_it_has_as_many_outputs(tmp_path):
    base = load_base(ModelSettings(model=str(tiny_encoder("bert", tmp_path / "three", 3)), dtype="float32"))
    stored = mx.load(str(tmp_path / "three" / "model.safetensors"))
    put_head(base, 1, 3)
    assert mx.array_equal(base.model.score.weight, stored["classifier.weight"])
    assert mx.array_equal(base.model.pooler.dense.bias, stored["bert.pooler.dense.bias"])
    put_head(base, 1, 2)
    assert base.model.score.weight.shape == (2, 32)
    assert mx.array_equal(base.model.pooler.dense.weight, stored["bert.pooler.dense.weight"])
    assert start_words(base.model, 2) == "Score head: new (the model's own has 3 outputs, not 2)"
    first = np.array(base.model.score.weight)
    put_head(base, 2, 2)
    assert 0.01 < first.std() < 0.03
    assert np.abs(first - np.array(base.model.score.weight)).max() > 0
    assert set(head_parameters(base.model)) == {
        "pooler.dense.weight",
        "pooler.dense.bias",
        "score.weight",
        "score.bias",
    }


def test_outputs_of_the_same_names_are_put_in_our_order(tmp_path):
    names = {"0": "NEGATIVE", "1": "POSITIVE", "2": "NEUTRAL"}
    base = load_base(ModelSettings(model=str(tiny_encoder("bert", tmp_path / "m", 3, id2label=names)), dtype="float32"))
    stored = mx.load(str(tmp_path / "m" / "model.safetensors"))["classifier.bias"].tolist()
    put_head(base, 1, 3, labels=("negative", "neutral", "positive"))
    assert base.model.score.bias.tolist() == [stored[0], stored[2], stored[1]]
    put_head(base, 1, 3, labels=("a", "b", "c"))
    assert base.model.score.bias.tolist() == stored


def test_a_quantized_encoder_keeps_its_head(tmp_path):
    folder = tiny_encoder("modernbert", tmp_path / "m", 1)
    succeeds("convert", "--model", folder, "--out", tmp_path / "q", "--bits", 8, "--group-size", 32)
    plain, packed = (load_base(ModelSettings(model=str(one), dtype="float32")) for one in (folder, tmp_path / "q"))
    for base in (plain, packed):
        put_head(base)
    assert packed.quantization
    for part in ("pooler.dense.weight", "pooler.norm.weight", "score.weight"):
        module, _, leaf = part.rpartition(".")
        one, other = (dict(base.model.named_modules())[module][leaf] for base in (plain, packed))
        assert np.abs(np.array(one) - np.array(other)).max() < by_dtype(1e-6, 1e-2)


def test_an_adapter_with_a_part_of_the_head_needs_the_rest_from_the_model(on_encoders, encoders, tmp_path):
    adapter = tmp_path / "peft"
    common = ("--model", encoders["bert"], "--adapter-path", on_encoders("bert", "rerank"))
    assert run("export", *common, "--to", "peft", "--out", adapter).code == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["modules_to_save"] = ["classifier"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    stored = mx.load(str(adapter / "adapter_model.safetensors"))
    mx.eval(stored)
    kept = {name: value for name, value in stored.items() if "pooler" not in name}
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), kept, {"format": "pt"})
    assert len(mlx_lora.rerank(encoders["bert"], "q", ["a"], adapter)) == 1
    bare = tiny_encoder("bert", tmp_path / "bare", pooler=False)
    with pytest.raises(InputError, match="pooler"):
        mlx_lora.rerank(bare, "q", ["a"], adapter)


# Tokens


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_have_the_form_of_the_family_and_are_cut_inside(kind):
    tokenizer = pair_tokenizer(kind)
    assert has_pairs(tokenizer)
    long, end = "x" * 80, tokenizer.sep_token
    examples = [
        query_with("q", "d"),
        query_with("q", long),
        query_with("y" * 70, long),
        Text(long, ends=False),
        Text(f"a{end}", ends=False),
    ]
    found, dropped, cut, _ = encode_texts(Encoder(tokenizer, None, max_seq_length=20), examples)
    assert (dropped, cut) == ({}, [1, 2, 3])
    assert found[0].tolist() == tokenizer("q", "d")["input_ids"]
    for number, pair in ((1, ("q", long)), (2, ("y" * 70, long))):
        wanted = tokenizer(*pair, truncation=True, max_length=20)["input_ids"]
        assert found[number].tolist() == wanted
        assert len(wanted) == 20
    assert found[3].tolist() == tokenizer(long, truncation=True, max_length=20)["input_ids"]
    assert found[4].tolist().count(tokenizer.sep_token_id) == 1  # the text has the letters
    assert len(tokenizer(long)["input_ids"]) == 82  # other calls are as before
    assert tokenizer(f"a{end}")["input_ids"].count(tokenizer.sep_token_id) == 2
    with pytest.raises(InputError, match=r"use [56] or more"):
        encode_texts(Encoder(tokenizer, None, max_seq_length=4), examples[:1])


# What is refused


def test_what_an_encoder_cannot_do_is_one_line(encoders, on_encoders, tmp_path):
    data = ("--data", on_encoders("bert", "rerank").parent / "rerank.jsonl", "--adapter-path", tmp_path / "a")
    ran = run("train", "--model", encoders["bert"], *data, "--objective", "rerank", "--cache-trunk", "on", "--iters", 1)
    one_line(ran, "--cache-trunk on", "encoder")
    one_line(run("train", "--model", encoders["bert"], *data, "--objective", "sft"), "it is an encoder", "rerank")
    common = ("--model", encoders["bert"], "--adapter-path", on_encoders("bert", "rerank"))
    one_line(run("export", *common, "--to", "gguf", "--out", tmp_path / "x.gguf"))
    one_line(run("export", *common, "--to", "sentence-transformers", "--out", tmp_path / "x"))
    one_line(run("generate", *common, "--prompt", "x"))
