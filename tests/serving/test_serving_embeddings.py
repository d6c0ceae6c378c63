"""Vectors over HTTP, asked for by OpenAI's own client: those of `mlx-lora embed`."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from comparing import by_dtype
from conftest import TINY, write_folder
from make_adapters import make_three
from mlx.utils import tree_flatten
from run_cli import one_line, run, succeeds
from serving_process import Server

import mlx_lora
from mlx_lora.models.encoder import Model, ModelArgs

SAME = by_dtype(1e-6, 5e-3)  # of a number in a vector of length one

openai = pytest.importorskip("openai")
TEXTS = [
    f"Cat {n} is by the river{', behind the tree' * (n % 3)}." for n in range(20)
]  # more than are computed together


def trained(model, folder, *flags):
    rows = [{"query": f"Where is cat {n}?", "positive": f"Cat {n} is by the river {n}."} for n in range(24)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    succeeds("train", "--objective", "embed", "--model", model, "--data", folder / "pairs.jsonl", "--adapter-path", folder / "search",
              "--iters", 4, "--learning-rate", "5e-3", "--rank", 4, "--query-prompt", "Q: ", "--max-seq-length", 24, *flags)  # fmt: skip
    return folder / "search"


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    return trained(tiny_folder, tmp_path_factory.mktemp("embedder"), "--pooling", "mean")


@pytest.fixture(scope="module")
def client(tiny_folder, adapter, tmp_path_factory):
    bard = make_three(tiny_folder, tmp_path_factory.mktemp("adapters"))["bard"]
    named = ("--adapter", f"search={adapter}", "--adapter", f"bard={bard}")
    with Server("--model", tiny_folder, *named, log=tmp_path_factory.mktemp("log") / "log") as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert "vectors search: 64 numbers, mean pooling" in server.text


def test_the_vectors_are_those_of_embed(client, tiny_folder, adapter):
    ours = mlx_lora.embed(tiny_folder, TEXTS, adapter)
    found = client.embeddings.create(model="search", input=TEXTS)  # the client asks for base64
    assert [one.index for one in found.data] == list(range(20))
    assert np.abs(np.array([one.embedding for one in found.data]) - ours).max() < SAME
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(min(24, len(text)) for text in TEXTS)
    plain = client.embeddings.create(model="search", input=TEXTS[0], encoding_format="float").data[0].embedding
    assert np.allclose(plain, ours[0], atol=SAME)
    raw = client.embeddings.with_raw_response.create(model="search", input=TEXTS[0]).parse().data[0].embedding
    assert np.allclose(raw, ours[0], atol=SAME)
    base = mlx_lora.embed(tiny_folder, TEXTS, pooling="mean", max_seq_length=24)
    assert np.abs(base - ours).max() > 1e-3


def test_queries_have_their_prompt(client, tiny_folder, adapter):
    for given, query in (("query", True), ("search_query", True), ("document", False)):
        found = client.embeddings.create(model="search", input=TEXTS[:2], extra_body={"input_type": given}).data
        ours = mlx_lora.embed(tiny_folder, TEXTS[:2], adapter, query=query)
        assert np.abs(np.array([one.embedding for one in found]) - ours).max() < SAME
    assert np.abs(ours - mlx_lora.embed(tiny_folder, TEXTS[:2], adapter, query=True)).max() > 1e-3


def test_tokens_are_taken_as_they_are(client, tiny_folder, adapter):
    tokens = [byte_tokenizer()(text)["input_ids"] for text in TEXTS[:2]]
    texts = mlx_lora.embed(tiny_folder, TEXTS[:2], adapter)
    several = client.embeddings.create(model="search", input=tokens)
    assert np.abs(np.array([one.embedding for one in several.data]) - texts).max() < SAME
    one = client.embeddings.create(model="search", input=tokens[0])
    assert np.allclose(one.data[0].embedding, texts[0], atol=SAME)


def test_dimensions_are_the_first_numbers_at_length_one(client, tiny_folder, adapter):
    found = client.embeddings.create(model="search", input=TEXTS[:3], dimensions=16)
    vectors = np.array([one.embedding for one in found.data])
    assert np.abs(vectors - mlx_lora.embed(tiny_folder, TEXTS[:3], adapter, dims=16)).max() < SAME
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_what_cannot_be_embedded_says_why(client):
    for change, status, word in (
        ({"model": "bard"}, 404, "there are search"),
        ({"input": []}, 400, "from 1"),
        ({"input": ["a", " "]}, 400, "none of them empty"),
        ({"input": [[1, 2], []]}, 400, "none of them empty"),
        ({"input": [1, 99999]}, 400, "99999"),
        ({"dimensions": 65}, 400, "from 1 to 64"),
        ({"encoding_format": "hex"}, 400, "encoding_format"),
        ({"extra_body": {"input_type": "side"}}, 400, "input_type"),
        ({"extra_body": {"truncate": True}}, 400, "truncate: not a field"),
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            client.embeddings.create(**{"model": "search", "input": "a", **change})
        assert (refused.value.status_code, word in str(refused.value)) == (status, True)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    config = {"model_type": "bert", "max_position_embeddings": 96, "architectures": ["BertModel"]}
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict({**TINY, **config}))
    folder = write_folder(tmp_path_factory.mktemp("models") / "encoder", model, config)
    plain = {name.removeprefix("model."): value for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), plain, {"format": "pt"})
    return folder


@pytest.mark.parametrize("objective", ["sft", "reward"])
def test_an_encoder_trains_vectors_and_scores_of_texts_alone(objective, encoder, tmp_path):
    """Other objectives would let its tokens see the padding behind them."""
    rows = {"sft": {"prompt": "a", "completion": "b"}, "reward": {"prompt": "a", "chosen": "b", "rejected": "c"}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[objective]) + "\n")
    common = ("--model", encoder, "--data", tmp_path / "rows.jsonl", "--objective", objective)
    one_line(run("train", *common, "--adapter-path", tmp_path / "a"), "it is an encoder", "--objective embed")


def test_an_encoder_writes_no_text_and_says_so(encoder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for asked in (("generate", "--prompt", "a"), ("evaluate", "--tasks", tmp_path / "rows.jsonl"), ("plan",)):
        one_line(run(asked[0], "--model", encoder, *asked[1:]), "it is an encoder")
    assert run("plan", "--model", encoder, "--objective", "embed").code == 0


@pytest.mark.slow
def test_an_encoder_is_served_with_and_without_its_adapter(encoder, tmp_path):
    folder = encoder
    adapter = trained(folder, tmp_path)
    with Server("--model", folder, "--adapter", f"search={adapter}", log=tmp_path / "log") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        for name, own in (("encoder", None), ("search", adapter)):
            found = client.embeddings.create(model=name, input=TEXTS)
            ours = mlx_lora.embed(folder, TEXTS, own)
            assert np.abs(np.array([one.embedding for one in found.data]) - ours).max() < SAME
        assert np.abs(ours - mlx_lora.embed(folder, TEXTS)).max() > 1e-3
        with pytest.raises(openai.BadRequestError, match="an encoder"):
            client.completions.create(model="encoder", prompt="a")
