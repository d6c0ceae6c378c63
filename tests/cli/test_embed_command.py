"""The commands `embed`, `mine` and `evaluate --objective embed`, and the same in Python."""

from __future__ import annotations

import json

import numpy as np
import pytest
from run_cli import one_line, run, succeeds

import mlx_lora
from mlx_lora.api.texts import ranks_of
from mlx_lora.objectives.embed import batches_of

PLACES = ["river", "tree", "house", "stone", "cloud", "field", "window", "garden"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [
        {"query": f"Where is cat {n}?", "positive": f"Cat {n} is by the {PLACES[n % 8]} {n}.", "negative": f"Dog {n}."}
        for n in range(24)
    ]
    file = tmp_path_factory.mktemp("search") / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def adapter(tiny_folder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder") / "a"
    succeeds(
        "train", "--objective", "embed", "--model", tiny_folder, "--data", data, "--adapter-path", folder, "--iters", 8,
        "--learning-rate", "5e-3", "--rank", 4, "--batch-size", 12, "--pooling", "mean", "--query-prompt", "Q: ",
    )  # fmt: skip
    return folder


def test_a_folder_of_notes_becomes_vectors_with_their_texts(tiny_folder, adapter, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("# Cats\n\nOne.\n\n## Dogs\n\nTwo.")
    out = tmp_path / "v.npy"
    ran = succeeds(
        "embed", tmp_path / "notes", "--model", tiny_folder, "--adapter-path", adapter, "--out", out, "--json"
    )
    assert json.loads(ran.out) | {"model": ""} == {
        "texts": 2, "width": 64, "model": "", "out": str(out), "columns": [], "pooling": "mean", "adapter_path": str(adapter),
    }  # fmt: skip
    vectors, texts = np.load(out), [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert vectors.shape == (2, 64)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    assert texts == [{"text": "Cats\nOne.", "file": "a.md"}, {"text": "Cats > Dogs\nTwo.", "file": "a.md"}]
    whole = mlx_lora.embed(tiny_folder, [one["text"] for one in texts], adapter)
    assert np.allclose(vectors, whole, atol=1e-5)
    base = mlx_lora.embed(tiny_folder, [one["text"] for one in texts], pooling="mean")
    assert not np.allclose(vectors, base, atol=1e-3)


def test_an_adapters_prompt_is_put_before_queries_alone(tiny_folder, adapter):
    query, prompted, document = (
        mlx_lora.embed(tiny_folder, [text], adapter, query=query)
        for text, query in (("cat", True), ("Q: cat", False), ("cat", False))
    )
    assert np.allclose(query, prompted, atol=1e-6)
    assert not np.allclose(query, document, atol=1e-3)
    given = mlx_lora.embed(tiny_folder, ["cat"], adapter, query=True, query_prompt="")
    assert np.allclose(given, document, atol=1e-6)


def test_fewer_numbers_are_the_first_ones(tiny_folder):
    texts = ["cat", "a longer text about a cat"]
    whole = mlx_lora.embed(tiny_folder, texts, normalize=False)
    part = mlx_lora.embed(tiny_folder, texts, dims=16)
    cut = whole[:, :16]
    assert np.allclose(part, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-5)
    assert not np.allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-2)


def test_a_table_has_vectors_beside_their_texts(tiny_folder, data, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "v.parquet"
    ran = succeeds("embed", data, "--model", tiny_folder, "--text-column", "query", "--query", "--out", out)
    assert "24 vectors of 64 numbers" in ran.out
    table = parquet.read_table(out).to_pydict()
    assert table["text"][3] == "Where is cat 3?"
    assert np.array(table["embedding"]).shape == (24, 64)


@pytest.mark.parametrize(("query", "column"), [(["--query"], "query"), ([], "positive")])
def test_queries_of_pairs_are_read_as_queries(tiny_folder, data, tmp_path, query, column):
    out = tmp_path / "v.npy"
    ran = run("embed", data, "--model", tiny_folder, *query, "--out", out, "--json")
    assert json.loads(ran.out)["columns"] == [column]
    texts = [json.loads(line)["text"] for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert texts == [json.loads(line)[column] for line in data.read_text().splitlines()]


def test_search_is_measured_for_base_and_adapter(tiny_folder, data, adapter, tmp_path):
    corpus = tmp_path / "more.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"Another text, {n}."}) + "\n" for n in range(5)))
    common = ("evaluate", "--objective", "embed", "--model", tiny_folder, "--data", data)
    ran = succeeds(*common, "--adapter-path", adapter, "--corpus", corpus, "--json")
    found = json.loads(ran.out)
    assert (found["queries"], found["documents"], found["rows"]) == (24, 53, 24)
    assert found["mrr_at_10"] > found["base_mrr_at_10"]
    assert found["recall_at_10"] > found["base_recall_at_10"]
    table = run(*common, "--adapter-path", adapter)
    assert [line.split()[0] for line in table.out.splitlines()[:2]] == ["measure", "accuracy"]
    assert "24 queries in 48 documents" in table.out


def test_ranks_count_equal_documents_against_their_query():
    documents = np.eye(4, dtype=np.float32)
    queries = np.array([[0.1, 0.9, 0.5, 0.5], [1, 1, 1, 1]], np.float32)
    assert [ranks.tolist() for ranks in ranks_of(queries, documents, [[1], [2]])] == [[0], [3]]
    assert ranks_of(queries, documents, [[2, 0], [0]])[0].tolist() == [2, 3]


def test_batches_hold_every_row_once():
    lengths = [3, 40, 7, 8, 9, 100, 1]
    batches = batches_of(lengths, 64)
    assert sorted(number for batch in batches for number in batch) == list(range(7))
    assert all(len(batch) == 1 or -(-max(lengths[n] for n in batch) // 8) * 8 * len(batch) <= 64 for batch in batches)


def test_mined_negatives_are_near_and_not_the_querys_own(tiny_folder, data, tmp_path):
    out = tmp_path / "mined.jsonl"
    common = ("mine", "--model", tiny_folder, "--data", data, "--out", out, "--count", 3)
    ran = succeeds(*common, "--margin", 0, "--json")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    counts = json.loads(ran.out)
    assert counts["negatives"] + counts["kept"] == sum(len(row["negatives"]) for row in rows) > 48
    assert [row["negatives"][0] for row in rows] == [f"Dog {n}." for n in range(24)]
    base = mlx_lora.load(str(tiny_folder))

    def cosines(row: dict) -> np.ndarray:
        """Return those of a query with its own document and with its negatives."""
        documents = mlx_lora.embed(base, [row["positive"], *row["negatives"]])
        return documents @ mlx_lora.embed(base, [row["query"]], query=True)[0]

    for row in rows[:4]:
        assert row["positive"] not in row["negatives"]
        own, *others = cosines({**row, "negatives": row["negatives"][1:]})  # the first is the row's own
        assert all(other <= own + 1e-5 for other in others)
        assert others == sorted(others, reverse=True)
    one_line(run(*common), "exists")
    assert run(*common, "--force", "--margin", 0.5).code == 0
    for line in out.read_text().splitlines()[:4]:
        row = json.loads(line)
        own, *others = cosines({**row, "negatives": row["negatives"][1:]})
        assert all(other <= own / 2 + 1e-5 for other in others)
    again = tmp_path / "b"
    succeeds(
        "train", "--objective", "embed", "--model", tiny_folder, "--data", out, "--adapter-path", again, "--iters", 1,
    )  # fmt: skip


def test_mined_negatives_follow_those_of_each_pair(tiny_folder, tmp_path):
    rows = [
        {"query": "q", "positive": "a", "negatives": ["x", "y"]},
        {"query": "q", "positive": "b", "negatives": ["x"]},
        {"query": "q", "positive": "a", "negatives": ["y", "z"]},
        {"query": "r", "positive": "c"},
    ]
    file, out = tmp_path / "pairs.jsonl", tmp_path / "mined.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = succeeds("mine", "--model", tiny_folder, "--data", file, "--out", out, "--count", 9, "--margin", 0, "--json")
    found = {(row["query"], row["positive"]): row["negatives"] for row in map(json.loads, out.read_text().splitlines())}
    assert found["q", "a"][:3] == ["x", "y", "z"]
    assert found["q", "b"][0] == "x"
    assert all(len(set(negatives)) == len(negatives) for negatives in found.values())
    assert not {"a", "b"} & {*found["q", "a"], *found["q", "b"]}
    counts = json.loads(ran.out)
    assert counts["kept"] == 4
    assert counts["negatives"] == sum(map(len, found.values())) - 4


def test_a_file_that_is_read_is_never_replaced(tiny_folder, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "one"}\n')
    notes, pairs = tmp_path / "a.md", tmp_path / "pairs.jsonl"
    notes.write_text("one")
    pairs.write_text('{"query": "a", "positive": "b"}\n')
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    out, model = tmp_path / "texts.npy", ("--model", tiny_folder)
    one_line(run("embed", notes, *model, "--out", out), "texts.jsonl")  # someone's file
    one_line(run("embed", texts, *model, "--out", out, "--force"), "texts.jsonl")
    one_line(run("mine", *model, "--data", pairs, "--out", pairs, "--force"), "pairs.jsonl")
    one_line(run("mine", *model, "--data", pairs, "--corpus", texts, "--out", texts, "--force"), "texts.jsonl")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert run("embed", notes, *model, "--out", out, "--force").code == 0
    assert texts.read_bytes() != before[texts]


def test_bad_input_is_one_line(tiny_folder, data, tmp_path):
    common = ("--model", tiny_folder, "--out", tmp_path / "v.npy")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    one_line(run("embed", tmp_path / "empty.jsonl", *common), "text is empty")
    one_line(run("embed", tmp_path / "nowhere.jsonl", *common), "nowhere.jsonl")
    one_line(run("embed", data, "--model", tiny_folder, "--out", tmp_path / "v.txt"), ".npy or .parquet")
    one_line(run("embed", data, *common, "--text-column", "no"), "--text-column")
    one_line(run("embed", data, *common, "--dims", 100), "64 numbers")
    for flags in (("--offload-base", "on"), ("--shard-base",)):  # which would be left unused
        measured = ("evaluate", "--objective", "embed", "--model", tiny_folder, "--data", data, *flags)
        one_line(run(*measured), f"--objective embed with {flags[0]}")
    with pytest.raises(ValueError, match="none of which is empty"):
        mlx_lora.embed(tiny_folder, ["a", ""])
