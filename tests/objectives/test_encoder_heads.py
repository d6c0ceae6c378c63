"""Rerankers and classifiers on encoders through the commands: trained, resumed, measured, asked, served, exported, refused."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from comparing import by_dtype
from run_cli import one_line, run, succeeds
from serving_process import Server
from tiny_encoders import KINDS, pair_tokenizer, tiny_encoder

import mlx_lora
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data.examples import Text
from mlx_lora.data.labeled import encode_texts, has_pairs, query_with
from mlx_lora.data.tokenize import Encoder
from mlx_lora.models.head import head_parameters, put_head, start_words
from mlx_lora.models.load import load_base
from mlx_lora.utils.errors import InputError

# PEFT calls what transformers has deprecated.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]
QUICK = ("--learning-rate", "5e-3", "--batch-size", 8, "--kernels", "ours", "--steps-per-report", 1, "--rank", 4, "--iters", 20,
         "--save-every", 10, "--dropout", 0.1)  # fmt: skip
TESTS = {"rerank": 1, "classify": 3}


def rows_of(objective: str, count: int = 24) -> list[dict]:
    """Return queries whose good documents end in an exclamation mark, or pairs of texts whose second says the label."""
    if objective == "rerank":
        return [{"query": f"q{n}", "positive": f"{n} yes!", "negatives": [f"{n} no", f"no {n}?"]} for n in range(count)]
    labels = ("cold", "hot", "mild")
    return [{"text": f"day {n}", "text_pair": "abz"[n % 3] * 3, "label": labels[n % 3]} for n in range(count)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {kind: tiny_encoder(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """(kind, objective) -> adapter's folder."""
    room = tmp_path_factory.mktemp("adapters")
    found = {}
    for objective in TESTS:
        (room / f"{objective}.jsonl").write_text("\n".join(map(json.dumps, rows_of(objective))))
    for kind, objective in (
        ("bert", "rerank"),
        ("modernbert", "rerank"),
        ("bert", "classify"),
        ("xlm-roberta", "classify"),
    ):
        adapter = room / f"{kind}-{objective}"
        data = ("--data", room / f"{objective}.jsonl", "--objective", objective)
        ran = succeeds("train", "--model", models[kind], *data, "--adapter-path", adapter, *QUICK)
        assert "Score head: new (the model has none)" in ran.err
        found[kind, objective] = adapter
    return found


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_an_order_is_learned_measured_and_asked_for(kind, models, trained):
    adapter = trained[kind, "rerank"]
    common = ("--model", models[kind], "--adapter-path", adapter, "--objective", "rerank")
    ran = run("evaluate", *common, "--data", adapter.parent / "rerank.jsonl", "--json")
    assert json.loads(ran.out)["mrr"] > 0.9, ran.err
    found = mlx_lora.rerank(models[kind], "q7", ["7 no", "7 yes!", "no 7?"], adapter)
    assert found[0]["index"] == 1
    with pytest.raises(InputError, match="trained with objective rerank"):
        mlx_lora.predict(models[kind], "a", adapter)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_labels_of_pairs_are_learned_and_predicted(kind, models, trained):
    adapter = trained[kind, "classify"]
    records = [{"text": "day 30", "text_pair": second} for second in ("aaa", "bbb", "zzz")]
    found = mlx_lora.predict(models[kind], records, adapter)
    assert [one["predicted"] for one in found] == ["cold", "hot", "mild"]
    swapped = mlx_lora.predict(models[kind], [{"text": "aaa", "text_pair": "day 30"}], adapter)[0]
    assert abs(swapped["probabilities"]["cold"] - found[0]["probabilities"]["cold"]) > 1e-4


@pytest.mark.parametrize(("kind", "objective"), [("bert", "rerank"), ("xlm-roberta", "classify")])
def test_a_run_that_was_cut_goes_on_to_the_same_bytes(kind, objective, models, trained, tmp_path):
    known = trained[kind, objective]
    shutil.copytree(known, tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints/step-000020")
    data = ("--data", known.parent / f"{objective}.jsonl", "--objective", objective)
    succeeds("train", "--model", models[kind], *data, "--adapter-path", tmp_path / "b", *QUICK, "--resume")
    first, resumed = ((folder / "adapters.safetensors").read_bytes() for folder in (known, tmp_path / "b"))
    assert first == resumed
    assert first != (tmp_path / "b/checkpoints/step-000010/adapters.safetensors").read_bytes()


def test_a_run_may_start_from_another_adapter(models, trained, tmp_path):
    adapter = trained["bert", "rerank"]
    data = ("--data", adapter.parent / "rerank.jsonl", "--objective", "rerank", "--resume-adapter-file", adapter)
    still = ("--learning-rate", "1e-12", "--iters", 1, "--rank", 4, "--kernels", "ours")
    succeeds("train", "--model", models["bert"], *data, "--adapter-path", tmp_path / "a", *still)
    one, other = (
        mlx_lora.rerank(models["bert"], "q7", ["7 no", "7 yes!"], folder) for folder in (adapter, tmp_path / "a")
    )
    assert [a["score"] for a in one] == pytest.approx([a["score"] for a in other], abs=by_dtype(1e-6, 1e-2))


def test_all_of_the_head_is_saved_with_the_adapter(trained):
    stored = mx.load(str(trained["bert", "rerank"] / "adapters.safetensors"))
    head = {name: value for name, value in stored.items() if name.startswith(("pooler", "score"))}
    assert head.keys() == {"pooler.dense.weight", "pooler.dense.bias", "score.weight", "score.bias"}
    assert {value.dtype for value in head.values()} == {mx.float32}


@pytest.mark.parametrize(
    ("kind", "objective"), [("bert", "rerank"), ("modernbert", "rerank"), ("xlm-roberta", "classify")]
)
def test_the_merged_model_and_pefts_form_score_as_the_adapter(kind, objective, models, trained, tmp_path):
    adapter = trained[kind, objective]

    def scores(model, adapter):
        if objective == "classify":
            (found,) = mlx_lora.predict(model, [{"text": "day 30", "text_pair": "aaa"}], adapter)
            return list(found["probabilities"].values())
        return [
            one["score"]
            for one in sorted(mlx_lora.rerank(model, "q7", ["7 no", "7 yes!"], adapter), key=lambda one: one["index"])
        ]

    wanted = scores(models[kind], adapter)
    common = ("--model", models[kind], "--adapter-path", adapter)
    assert run("export", *common, "--to", "peft", "--out", tmp_path / "peft").code == 0
    assert scores(models[kind], tmp_path / "peft") == pytest.approx(wanted, abs=by_dtype(1e-5, 2e-2))
    ran = succeeds("fuse", *common, "--out", tmp_path / "fused")
    base = load_base(ModelSettings(model=str(tmp_path / "fused")))
    assert "goes on from" in start_words(base.model, TESTS[objective])
    # A merged model goes on: a run without a step of any size leaves its scores.
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows_of(objective))))
    data = (
        "--data",
        tmp_path / "rows.jsonl",
        "--objective",
        objective,
        "--learning-rate",
        "1e-12",
        "--iters",
        1,
        "--rank",
        2,
    )
    succeeds("train", "--model", tmp_path / "fused", *data, "--adapter-path", tmp_path / "again", "--kernels", "ours")
    assert scores(tmp_path / "fused", tmp_path / "again") == pytest.approx(wanted, abs=by_dtype(1e-4, 3e-2))


@pytest.mark.slow
def test_the_server_orders_documents(models, trained, tmp_path):
    import httpx

    model, adapter = models["bert"], trained["bert", "rerank"]
    documents = ["7 no", "7 yes!", "no 7?"]
    with Server("--model", model, "--adapter", f"order={adapter}", log=tmp_path / "log") as server:
        body = {"model": "order", "query": "q7", "documents": documents}
        found = httpx.post(f"{server.url}/v1/rerank", json=body, timeout=60).json()["results"]
        ours = mlx_lora.rerank(model, "q7", documents, adapter)
        assert [one["index"] for one in found] == [one["index"] for one in ours]
        assert [one["relevance_score"] for one in found] == pytest.approx([one["score"] for one in ours], abs=1e-4)
        assert server.stop() == 0, server.text


def test_a_run_is_planned(models, trained):
    for kind, objective in (("bert", "rerank"), ("xlm-roberta", "classify")):
        data = ("--data", trained[kind, objective].parent / f"{objective}.jsonl", "--objective", objective)
        succeeds("plan", "--model", models[kind], *data)


def test_a_plan_without_data_has_rows_that_the_model_can_take(models):
    for kind in ("bert", "xlm-roberta"):
        longest = load_base(ModelSettings(model=str(models[kind]))).model.args.longest
        found = mlx_lora.plan(models[kind], objective="classify")
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


def test_an_adapter_with_a_part_of_the_head_needs_the_rest_from_the_model(trained, models, tmp_path):
    adapter = tmp_path / "peft"
    common = ("--model", models["bert"], "--adapter-path", trained["bert", "rerank"])
    assert run("export", *common, "--to", "peft", "--out", adapter).code == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["modules_to_save"] = ["classifier"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    stored = mx.load(str(adapter / "adapter_model.safetensors"))
    mx.eval(stored)
    kept = {name: value for name, value in stored.items() if "pooler" not in name}
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), kept, {"format": "pt"})
    assert len(mlx_lora.rerank(models["bert"], "q", ["a"], adapter)) == 1
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
    found, dropped, cut = encode_texts(Encoder(tokenizer, None, max_seq_length=20), examples)
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


def test_what_an_encoder_cannot_do_is_one_line(models, trained, tmp_path):
    data = ("--data", trained["bert", "rerank"].parent / "rerank.jsonl", "--adapter-path", tmp_path / "a")
    ran = run("train", "--model", models["bert"], *data, "--objective", "rerank", "--cache-trunk", "on", "--iters", 1)
    one_line(ran, "--cache-trunk on", "encoder")
    one_line(run("train", "--model", models["bert"], *data, "--objective", "sft"), "it is an encoder", "rerank")
    common = ("--model", models["bert"], "--adapter-path", trained["bert", "rerank"])
    one_line(run("export", *common, "--to", "gguf", "--out", tmp_path / "x.gguf"))
    one_line(run("export", *common, "--to", "sentence-transformers", "--out", tmp_path / "x"))
    one_line(run("generate", *common, "--prompt", "x"))
