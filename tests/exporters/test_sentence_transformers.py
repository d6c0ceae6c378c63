"""Exported embedders, read by sentence-transformers: a decoder and an encoder, merged and as PEFT."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, tiny_model, write_folder
from mlx.utils import tree_flatten
from run_cli import holds, one_line, run, succeeds

import mlx_lora
from mlx_lora.models.encoder import Model, ModelArgs
from mlx_lora.utils.errors import InputError

pytestmark = [
    pytest.mark.parity,
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")),
]
TEXTS = ["Where is cat 3?", "Cat 3 is by the river, behind the house and the old tree.", "x"]
ENCODER = {"model_type": "bert", "max_position_embeddings": 96, "architectures": ["BertModel"]}
PROMPT = "Q: "


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny decoder, and a tiny encoder with the names of transformers."""
    folder = tmp_path_factory.mktemp("models")
    mx.random.seed(0)
    encoder = Model(ModelArgs.from_dict({**TINY, **ENCODER}))
    write_folder(folder / "encoder", encoder, ENCODER)
    plain = {name.removeprefix("model."): value for name, value in tree_flatten(encoder.parameters())}
    mx.save_safetensors(str(folder / "encoder" / "model.safetensors"), plain, {"format": "pt"})
    decoder = {"architectures": ["LlamaForCausalLM"]}
    return {"decoder": write_folder(folder / "decoder", tiny_model(), decoder), "encoder": folder / "encoder"}


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    rows = [{"query": f"Where is cat {n}?", "positive": f"Cat {n} is by the river {n}."} for n in range(24)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, model in models.items():
        succeeds(
            "train", "--objective", "embed", "--model", model, "--data", folder / "pairs.jsonl", "--adapter-path",
            folder / name, "--iters", 3, "--learning-rate", "5e-3", "--rank", 4, "--query-prompt", PROMPT, "--max-seq-length", 48,
            "--pooling", "mean",
        )  # fmt: skip
    return {name: folder / name for name in models}


@pytest.mark.parametrize("form", ["sentence-transformers", "sentence-transformers-peft"])
@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_the_vectors_are_the_same_there(name, form, models, adapters, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    out = tmp_path / "st"
    succeeds("export", "--model", models[name], "--adapter-path", adapters[name], "--to", form, "--out", out)
    judge = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    assert judge.max_seq_length == 48
    for query in (False, True):
        ours = mlx_lora.embed(models[name], TEXTS, adapters[name], query=query)
        theirs = judge.encode_query(TEXTS) if query else judge.encode_document(TEXTS)
        assert np.abs(ours - theirs).max() < 1e-5
        base = mlx_lora.embed(models[name], TEXTS, query=query)
        assert np.abs(base - theirs).max() > 1e-3
    assert np.abs(judge.encode_query(TEXTS) - judge.encode_document(TEXTS)).max() > 1e-3  # the prompt


def test_a_merged_folder_is_a_model_of_ours(models, adapters, tmp_path):
    out = tmp_path / "st"
    common = ("export", "--model", models["encoder"], "--adapter-path", adapters["encoder"], "--out", out)
    assert run(*common, "--to", "sentence-transformers").code == 0
    merged = mlx_lora.embed(out, TEXTS, query=True)  # with the prompt and the pooling of its files
    assert np.allclose(merged, mlx_lora.embed(models["encoder"], TEXTS, adapters["encoder"], query=True), atol=1e-5)


@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_a_fused_model_keeps_pooling_and_prompts(name, models, adapters, tmp_path):
    """Its rounding is not measured by a loss on tokens, which vectors do not have."""
    common = ("fuse", "--model", models[name], "--adapter-path", adapters[name])
    succeeds(*common, "--out", tmp_path / "fused", "--json")
    for query in (False, True):
        wanted = mlx_lora.embed(models[name], TEXTS, adapters[name], query=query)
        assert np.abs(mlx_lora.embed(tmp_path / "fused", TEXTS, query=query) - wanted).max() < 1e-5
        assert np.abs(mlx_lora.embed(models[name], TEXTS, query=query) - wanted).max() > 1e-3
    one_line(
        run(*common, "--out", tmp_path / "b", "--data", adapters[name].parent / "pairs.jsonl"),
        "evaluate --objective embed",
    )
    ran = succeeds(*common, "--bits", 4, "--out", tmp_path / "four", "--json")
    facts = json.loads(ran.out)
    assert facts["error_mean"] > 0.05
    assert (facts["rows"], facts["loss_base"]) == (0, None)
    assert (tmp_path / "four" / "modules.json").is_file()


def test_a_length_that_is_given_counts(models, adapters):
    """The usual one, too: 48 tokens are those of the run."""

    def vectors(text: str, **more) -> np.ndarray:
        return mlx_lora.embed(models["decoder"], [text], adapters["decoder"], **more)

    long = "long " * 30
    assert np.allclose(vectors(long), vectors(long[:48]), atol=1e-6)
    assert np.abs(vectors(long, max_seq_length=2048) - vectors(long)).max() > 1e-3
    assert np.abs(vectors(long, max_seq_length=16) - vectors(long)).max() > 1e-3


def test_the_model_card_does_not_ask_for_text(models, adapters, tmp_path):
    for folder in adapters.values():
        card = (folder / "README.md").read_text()
        assert "generate" not in card
        holds(card, "pipeline_tag: feature-extraction", "mlx-lora embed", "--to sentence-transformers-peft")
    common = ("--model", models["decoder"], "--adapter-path", adapters["decoder"])
    assert run("export", *common, "--to", "peft", "--out", tmp_path / "peft").code == 0
    assert "generate" not in (tmp_path / "peft/README.md").read_text()


def test_a_merged_adapter_gives_vectors_as_its_parts_do(models, adapters, tmp_path):
    model, adapter = models["decoder"], adapters["decoder"]
    shutil.copytree(adapter, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints"))
    parts = {str(adapter): 0.5, str(tmp_path / "other"): 0.5}
    merged = mlx_lora.merge(model, parts, out=tmp_path / "merged", evaluate=False).adapter
    for query in (False, True):
        wanted = mlx_lora.embed(model, TEXTS, adapter, query=query)
        assert np.abs(mlx_lora.embed(model, TEXTS, merged, query=query) - wanted).max() < 1e-5
    assert "generate" not in (merged / "README.md").read_text()
    settings = (adapter / "run.yaml").read_text()
    assert "pooling: mean" in settings
    (tmp_path / "other/run.yaml").write_text(settings.replace("pooling: mean", "pooling: last"))
    with pytest.raises(InputError, match="pooling"):
        mlx_lora.merge(model, parts, out=tmp_path / "b", evaluate=False)
    assert not (tmp_path / "b").exists()


def test_only_embedders_have_this_form(models, adapters, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for file in adapters["decoder"].iterdir():
        if file.is_file() and file.name != "run.yaml":
            (folder / file.name).write_bytes(file.read_bytes())
    common = ("export", "--model", models["decoder"], "--adapter-path", folder, "--out", tmp_path / "st")
    one_line(run(*common, "--to", "sentence-transformers"), "not trained with --objective embed")
