"""Rerankers through the commands and Python, and their losses against sentence-transformers' on torch."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from bound import bind
from comparing import by_dtype
from conftest import TINY, tiny_model
from run_cli import one_line, run, succeeds

import mlx_lora
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import DataSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import EmptyPart, FormatError
from mlx_lora.data.files import DataFile
from mlx_lora.data.labeled import GRADES, ROWS, Candidates, pair_text
from mlx_lora.data.read import read_rows
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.ranking import (
    BINARY,
    LISTWISE,
    PAIRWISE,
    RANKING_LOSSES,
    best_first,
    random_mrr,
    ranking_loss,
    ranking_measures,
)
from mlx_lora.models.head import put_score_head
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.reports.diagnosis import of_rankings
from mlx_lora.utils.errors import InputError

# PEFT calls what transformers has deprecated.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

QUICK = ("--objective", "rerank", "--learning-rate", "5e-3", "--batch-size", 8, "--kernels", "ours", "--steps-per-report", 1,
         "--rank", 4, "--iters", 30)  # fmt: skip


def write(file, rows: list[dict]):
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def queries(count: int = 32) -> list[dict]:
    """Return queries whose good documents end in an exclamation mark, whatever the query."""
    return [
        {"query": f"q{n}", "positive": f"{n} yes!", "negatives": [f"{n} no{'?' * i}" for i in range(1 + n % 4)]}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("queries")
    write(folder / "valid.jsonl", [{**row, "query": row["query"] + "x"} for row in queries(9)])
    return write(folder / "train.jsonl", queries()).parent


@pytest.fixture(scope="module")
def trained(tiny_folder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerank") / "a"
    more = ("--save-every", 15, "--dropout", 0.1)
    succeeds("train", "--model", tiny_folder, "--data", data, "--adapter-path", folder, *QUICK, *more)
    return folder


def measured(model, adapter, data, *more) -> dict:
    common = ("--model", model, "--adapter-path", adapter, "--data", data, "--objective", "rerank")
    ran = succeeds("evaluate", *common, "--json", *more)
    return json.loads(ran.out)


def test_the_order_is_learned(tiny_folder, data, trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if line["val_loss"] is not None]
    assert last["val_loss"] < first["val_loss"] / 2
    assert last["mrr"] > 0.9
    found = measured(tiny_folder, trained, data / "train.jsonl")
    assert (found["rows"], found["mrr"] > 0.9, found["ndcg"] > 0.9) == (32, True, True)
    assert "MRR" in (trained / "report.html").read_text()
    shown = run("evaluate", "--model", tiny_folder, "--adapter-path", trained, "--data", data, "--objective", "rerank")
    assert "9 query lists" in shown.out
    few = measured(tiny_folder, trained, data / "train.jsonl", "--candidates", 2)
    assert few["supervised_tokens"] == 64


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(tiny_folder, data, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints/step-000030")
    more = ("--save-every", 15, "--dropout", 0.1, "--resume")
    succeeds("train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "b", *QUICK, *more)
    known, resumed = ((folder / "adapters.safetensors").read_bytes() for folder in (trained, tmp_path / "b"))
    assert known == resumed
    assert known != (tmp_path / "b/checkpoints/step-000015/adapters.safetensors").read_bytes()


def test_python_orders_documents(tiny_folder, trained):
    base = mlx_lora.load(str(tiny_folder))
    documents = ["7 no", "7 yes!", "7 no??"]
    found = mlx_lora.rerank(base, "q7", documents, trained)
    assert (found[0]["index"], found[0]["document"]) == (1, "7 yes!")
    assert 1 > found[0]["score"] > found[1]["score"] >= found[2]["score"] > 0
    assert [one["index"] for one in mlx_lora.rerank(base, "q7", documents, trained, top_n=1)] == [1]
    with pytest.raises(InputError, match="not empty"):
        mlx_lora.rerank(base, "q7", ["a", ""], trained)
    with pytest.raises(InputError, match="trained with objective rerank"):
        mlx_lora.predict(base, "a", trained)


def test_what_cannot_be_learned_is_one_line(tiny_folder, data, trained, tmp_path):
    def refused(row: dict, *more: object) -> str:
        ran = run("train", "--model", tiny_folder, "--data", write(tmp_path / "x.jsonl", [row] * 9), "--adapter-path",
                  tmp_path / "a", *QUICK, *more)  # fmt: skip
        assert ran.code == 2
        return ran.lines[-1]

    assert "without a negative" in refused({"query": "a", "positive": "b"})
    assert "equally good" in refused({"query": "a", "documents": ["b", "c"], "labels": [1, 1]})
    assert "empty" in refused({"query": "a", "positive": "", "negative": "c"})
    assert "needs positive and negative" in refused({"query": "a", "completion": "b"})
    assert "only rerank" in refused({"query": "a"}, "--objective", "sft", "--candidates", 4)
    assert "reads no such column" in refused({"query": "a"}, "--text-column", "query")
    common = ("--model", tiny_folder, "--adapter-path", trained, "--data", data)
    one_line(run("evaluate", *common, "--objective", "classify"), "was trained with --objective rerank")


def test_transformers_gives_the_same_score(tiny_folder, trained, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "peft"
    assert run("export", "--model", tiny_folder, "--adapter-path", trained, "--to", "peft", "--out", out).code == 0
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
    file = write(tmp_path / "rows.jsonl", rows)
    ran = succeeds("train", "--model", tiny_folder, "--data", file, "--adapter-path", tmp_path / "a", *QUICK, "--iters", 1,
              "--valid-fraction", 0)  # fmt: skip
    assert "train      4 query lists" in ran.err


def test_queries_get_rows_of_their_best_documents_and_the_worst(logged):
    objective = objective_of(ObjectiveSettings("rerank", candidates=3))
    tokens = [np.arange(1, 3 + n, dtype=np.int32) for n in range(4)]
    facts = [{ROWS: tokens, "grades": [1.0, 1.0, 1.0, 0.0]}, {ROWS: tokens[:2], "grades": [0.0, 1.0]}]
    rows = EncodedSet.from_rows([(tokens[0], np.zeros(2, bool))] * 2).with_facts(facts)
    found = objective._with_targets(rows)
    assert found.group == 3
    assert "1 query, of up to 4; --candidates 4" in " ".join(logged)
    assert np.array(found.labels).tolist() == [1, 1, 0, 1, 0, -1]
    assert [len(found.row(i)[0]) for i in range(6)] == [3, 4, 6, 4, 3, 2]  # one more each, which is only a target


# Losses and measures


@pytest.mark.parametrize("kind", RANKING_LOSSES)
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
@pytest.mark.parametrize("kind", RANKING_LOSSES)
def test_losses_and_gradients_are_those_of_sentence_transformers(kind):
    pytest.importorskip("sentence_transformers")
    random = np.random.default_rng(0)
    scores = (3 * random.normal(size=(5, 4))).astype(np.float32)
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
    grades = np.array([[1, 0, 0], [2, 0, 1], [1, 0, -1]], np.float32)
    found = ranking_measures(scores, grades)
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
