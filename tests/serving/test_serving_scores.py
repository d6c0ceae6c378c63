"""Classifiers behind the server, asked over HTTP beside an adapter that generates."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from make_adapters import make_three
from run_cli import one_line, run, succeeds
from serving_process import Server

import mlx_lora
from mlx_lora.config.settings import ModelSettings
from mlx_lora.engine.engine import Engine, Limits
from mlx_lora.models.load import load_base
from mlx_lora.serving.app import TextModels, a_few_at_a_time
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.http import ApiError

LABELS = ("cold", "hot", "mild")
QUICK = ("--objective", "classify", "--learning-rate", "5e-3", "--batch-size", 12, "--kernels", "ours", "--rank", 4, "--val-batches", 0,
         "--iters", 24)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """Name -> folder of two classifiers, of one label and of several."""
    room = tmp_path_factory.mktemp("classifiers")
    rows = {
        "days": [{"text": f"day {n}: {'abz'[n % 3] * 3}", "label": LABELS[n % 3]} for n in range(36)],
        "tags": [{"text": f"day {n}: {'abz'[n % 3] * 3}", "label": [LABELS[n % 3], "day"]} for n in range(36)],
    }
    for name, own in rows.items():
        (room / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)))
        succeeds(
            "train", "--model", tiny_folder, "--data", room / f"{name}.jsonl", "--adapter-path", room / name, *QUICK
        )
    searches = [{"query": f"q{n}", "positive": f"{n} yes!", "negatives": [f"{n} no", f"{n} no?"]} for n in range(24)]
    (room / "searches.jsonl").write_text("\n".join(map(json.dumps, searches)))
    more = ("--objective", "rerank", "--iters", 30, "--batch-size", 8)
    data = ("--data", room / "searches.jsonl", "--adapter-path", room / "order")
    succeeds("train", "--model", tiny_folder, *data, *QUICK, *more)
    return {name: room / name for name in (*rows, "order")}


@pytest.fixture(scope="module")
def server(tiny_folder, folders, tmp_path_factory):
    bard = make_three(tiny_folder, tmp_path_factory.mktemp("adapters"))["bard"]
    named = [f for name, folder in {**folders, "bard": bard}.items() for f in ("--adapter", f"{name}={folder}")]
    with Server("--model", tiny_folder, *named, log=tmp_path_factory.mktemp("log") / "log") as server:
        yield server
        assert "scores days: classify: cold, hot, mild" in server.text


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.mark.long
def test_texts_get_the_labels_that_predict_gives(http, tiny_folder, folders):
    texts = [f"day {n}: {'abz'[n % 3] * 3}" for n in range(20)]  # more than are scored together
    for path in ("/classify", "/v1/classify"):
        answer = http.post(path, json={"model": "days", "input": texts}).json()
        found = answer["data"]
        assert [one["label"] for one in found] == [LABELS[n % 3] for n in range(20)]
        assert answer["model"] == "days"
    ours = mlx_lora.predict(str(tiny_folder), texts, folders["days"])
    assert found[3]["probs"] == pytest.approx(list(ours[3]["probabilities"].values()), abs=1e-4)
    assert (found[3]["index"], found[3]["num_classes"]) == (3, 3)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))
    one = http.post("/classify", json={"model": "tags", "input": texts[1]}).json()["data"]
    assert one[0]["labels"] == ["day", "hot"]


def test_documents_are_ordered_as_jinas_and_coheres_clients_ask(http, tiny_folder, folders):
    documents = [f"7 {word}" for word in ("no", "yes!", "no?", "yes!")] + ["8 no"] * 20  # more than are scored together
    ours = mlx_lora.rerank(str(tiny_folder), "q7", documents, folders["order"])
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        found = http.post(path, json={"model": "order", "query": "q7", "documents": documents}).json()["results"]
        assert sorted(one["index"] for one in found[:2]) == [1, 3]  # equal texts
        assert len(found) == len(documents)
        assert [one["relevance_score"] for one in found] == pytest.approx([one["score"] for one in ours], abs=1e-4)
        assert "document" not in found[0]
    body = {"query": "q7", "documents": [{"text": one} for one in documents], "top_n": 2, "return_documents": True}
    answer = http.post("/v1/rerank", json=body).json()  # there is one reranker, so it need not be named
    assert [one["document"]["text"] for one in answer["results"]] == ["7 yes!", "7 yes!"]
    assert (answer["model"], answer["usage"]["total_tokens"] > 0) == ("order", True)
    for change, word in (
        ({"top_n": 0}, "top_n"),
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": [1]}, "documents"),
    ):
        refused = http.post("/v1/rerank", json=body | change)
        assert refused.status_code == 400
        assert word in refused.json()["error"]["message"]
    assert http.post("/v1/rerank", json=body | {"model": "days"}).status_code == 404


def test_answers_are_generated_meanwhile(http):
    found = {}

    def generate():
        body = {"model": "bard", "prompt": "a", "max_tokens": 40, "temperature": 0}
        found["text"] = http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    thread = threading.Thread(target=generate)
    thread.start()
    answers = [http.post("/classify", json={"model": "days", "input": ["day 1: bbb"] * 20}).json() for _ in range(3)]
    thread.join()
    assert all(one["label"] == "hot" for answer in answers for one in answer["data"])
    alone = dict(found)
    generate()
    assert found == alone


def test_what_cannot_be_scored_says_why(http):
    for body, status, word in (
        ({"model": "bard", "input": "a"}, 404, "days, tags"),
        ({"input": "a"}, 404, "days, tags"),
        ({"model": "days"}, 400, "input"),
        ({"model": "days", "input": []}, 400, "from 1"),
        ({"model": "days", "input": ["a", " "]}, 400, "empty"),
        ({"model": "days", "input": "a", "n": 2}, 400, "n: not a field"),
    ):
        answer = http.post("/classify", json=body)
        assert answer.status_code == status
        assert word in answer.json()["error"]["message"]


def test_a_text_that_cannot_be_used_is_no_invalid_adapter():
    def refuse(part):
        raise InputError("--model /the/base: a text cannot be used: no token")

    base = SimpleNamespace(folder=Path("/the/base"), model_id="/the/base")
    engine: Any = SimpleNamespace(
        call=lambda function: in_thread.submit(function, None), base=base, store=SimpleNamespace(folders=[])
    )
    with ThreadPoolExecutor(1) as in_thread, pytest.raises(ApiError, match="no token") as refused:
        asyncio.run(a_few_at_a_time(engine, 60, refuse, ["\u200b"]))
    assert (refused.value.status, refused.value.code) == (400, "invalid_value")
    assert "/the" not in str(refused.value)


def test_a_classifier_of_another_base_is_accepted_if_asked(tiny_folder, folders, tmp_path):
    adapter = shutil.copytree(folders["days"], tmp_path / "days")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["mlx_lora"]["base_fingerprint"] = "0123456789abcdef"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for ignored in (True, False):
        engine = Engine(lambda: load_base(ModelSettings(model=str(tiny_folder))), Limits(), ignore_fingerprint=ignored)
        if ignored:
            assert TextModels(engine, {"days": adapter}, {}, 30.0).describe()
        else:
            with pytest.raises(InputError, match="fingerprint"):
                TextModels(engine, {"days": adapter}, {}, 30.0)
        engine.close()


def test_names_are_given_once(tiny_folder, folders):
    twice = ("--adapter", f"a={folders['days']}", "--adapter", f"a={folders['tags']}")
    one_line(run("serve", "--model", tiny_folder, *twice, exactly=True), "two adapters of this name")


@pytest.mark.long
def test_questions_are_answered_as_decision_clients_ask(http, folders):
    body = {"model": "days", "state": "day 3: aaa", "questions": {"label": {"type": "choice"}}}
    answer = http.post("/v1/decisions", json=body).json()
    assert answer["answers"]["label"]["value"] == "cold"
    assert answer["usage"]["input_tokens"] > 0
    for change in ({"state": ""}, {"questions": {"mood": {}}}, {"questions": [1]}, {"state": None}):
        assert http.post("/v1/decisions", json=body | change).status_code == 400
    told = http.post("/v1/classify", json={"model": "days", "input": "day 3: aaa", "answer_above": 1}).json()["data"][0]
    assert told["ask_a_person"] is (told["probability"] < 1)
    refused = http.post("/v1/classify", json={"model": "days", "input": "a", "coverage": 0.9})
    assert refused.status_code == 400
    assert "held-out answers" in refused.json()["error"]["message"]
