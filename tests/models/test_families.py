"""Families of models that are made otherwise than Llama: their layers, vocabularies and outlines; what differs is borne, or refused in one plain line."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config, write_architecture
from architectures.configs import CONFIGS, ways
from mlx.utils import tree_flatten
from run_cli import run, succeeds
from tiers import by_default

from mlx_lora.adapters.inject import has_weights, select_targets
from mlx_lora.config.settings import ModelSettings
from mlx_lora.models.convert import TIED_BY_WEIGHTS
from mlx_lora.models.folder import load_weights
from mlx_lora.models.load import check_token_ids, embedding_rows, load_base
from mlx_lora.models.meta import outline_of
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.trainer import callbacks as page
from mlx_lora.utils.errors import InputError


def test_a_config_that_transformers_refuses_is_not_blamed_on_the_tokenizer(tmp_path):
    config = tiny_config("gemma3")
    config["text_config"]["query_pre_attn_scalar"] = 16.5
    folder = write_architecture(tmp_path / "g", "gemma3", config=config)
    with pytest.raises(InputError, match=r"config.json: transformers refuses it \(.*query_pre_attn_scalar"):
        load_folder_tokenizer(folder, config, trust_remote_code=False)
    (folder / "config.json").write_text(json.dumps(tiny_config("gemma3")))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        load_folder_tokenizer(folder, config, trust_remote_code=False)


@pytest.mark.parametrize(
    ("kind", "part", "name", "why"),
    [
        ("deepseek_v32", "indexer", "indexer.wq_b", "top-k, which has no gradient"),
        ("minimax_m3_vl", "index_q_proj", "index_q_proj", "top-k, which has no gradient"),
        ("minimax_m3_vl", "index_k_proj", "index_k_proj", "top-k, which has no gradient"),
        ("gemma3n", "altup", "prediction_coefs", "without the adapter"),
    ],
)
def test_layers_out_of_reach_are_left_alone_and_refused_by_name(kind, part, name, why):
    model = tiny_architecture(kind)
    paths = select_targets(model).paths
    assert paths
    assert not [path for path in paths if part in path.split(".")]
    with pytest.raises(InputError, match=rf"--target-modules '{name}': {part} would learn nothing, .*{why}"):
        select_targets(model, name)
    # Training in full reaches what mlx-lm reads itself, and still nothing without a gradient.
    whole = select_targets(model, fits=has_weights).paths
    assert any(part in path.split(".") for path in whole) is (part == "altup")
    # What an adapter has that was made elsewhere can be read all the same.
    assert [path for path in select_targets(model, name, stored=True).paths if part in path.split(".")]


def test_a_linear_layer_of_another_kind_is_not_adapted():
    """AFM's returns a list."""
    model = tiny_architecture("afm7")
    names = {path.rsplit(".", 1)[-1] for path in select_targets(model).paths}
    assert names == {"q_proj", "out_proj", "gate_proj", "up_proj", "down_proj"}
    assert any(path.endswith("qkv_proj") for path, _ in model.named_modules())


def test_a_run_goes_on_without_a_text(tiny_folder, chats, tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("[broadcast_shapes] Shapes (3) and (4) cannot be broadcast.")

    monkeypatch.setattr(page, "greedy_text", fails)
    out = tmp_path / "a"
    succeeds("train", "--model", tiny_folder, "--data", chats, "--adapter-path", out, "--iters", 2)
    (sample,) = json.loads((out / "report.json").read_text())["samples"]
    assert sample["before"].startswith("(no text: generation fails with this model: [broadcast_shapes]")
    assert sample["after"] == sample["before"]
    assert "(no text: generation" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    "kind", ["afm7", "baichuan_m1", "dbrx", "gear", "phi", "recurrent_gemma", "talkie", "youtu_llm"]
)
@pytest.mark.slow
def test_families_train_by_the_command(kind, chats, tmp_path):
    folder = write_architecture(tmp_path / kind, kind, ways(kind)[0])
    out = tmp_path / "a"
    ran = succeeds("train", "--model", folder, "--data", chats, "--adapter-path", out, "--iters", 4, "--batch-size", 4)
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(loss) for loss in losses if loss is not None)
    assert ("not compiled" in ran.err) is (kind == "dbrx")


@pytest.mark.long
@pytest.mark.cpu("a GPU multiplies by 16-bit experts")
@pytest.mark.parametrize("command", by_default(["train", "evaluate"], "train"))
def test_16_bit_experts_on_a_cpu_are_refused_in_one_line(command, chats, tmp_path):
    folder = write_architecture(tmp_path / "moe", "qwen3_moe")
    words = ("--model", folder, "--data", chats, "--dtype", "bfloat16")
    words += ("--adapter-path", tmp_path / "a", "--iters", 1) if command == "train" else ()
    ran = run(command, *words)
    assert ran.code == 2
    assert "--dtype float32" in ran.err
    # Packed ones have a product of their own there; an adapter's factors have none.
    packed = tmp_path / "packed"
    assert run("convert", "--model", folder, "--out", packed, "--bits", 4, "--group-size", 32).code == 0
    ran = run(command, *words, "--model", packed)
    assert ran.code == (2 if command == "train" else 0), ran.err
    assert "--dtype float32" in ran.err or command == "evaluate"


@pytest.mark.long
def test_a_model_that_cannot_generate_trains_and_says_so(chats, tmp_path):
    """mlx-lm's Gear makes a cache without what its own layers ask of it."""
    folder = write_architecture(tmp_path / "gear", "gear")
    words = ("--prompt", "Say 3.", "--max-tokens", 3)
    ran = run("generate", "--model", folder, *words)
    if ran.code == 0:
        pytest.skip("this mlx-lm generates with it")
    assert ran.code == 2
    assert "mlx-lm's gear cannot generate here ('ArraysCache' object has no attribute 'offset')" in ran.err
    out = tmp_path / "a"
    ran = succeeds("train", "--model", folder, "--data", chats, "--adapter-path", out, "--iters", 1, "--batch-size", 2)
    assert "(no text: generation" in (out / "report.html").read_text()


@pytest.mark.parametrize("kind", ["mistral3", "qwen3_vl", "gemma3", "baichuan_m1", "youtu_llm"])
def test_ids_without_a_row_are_refused(kind, tmp_path):
    """Wrappers keep the vocabulary's size elsewhere, and some models keep no settings at all."""
    config = tiny_config(kind)
    for part in (config, config.get("text_config", config)):
        if "vocab_size" in part:
            part["vocab_size"] = 280
    base = load_base(ModelSettings(model=str(write_architecture(tmp_path / kind, kind, config=config))))
    check_token_ids(base, 279, "--data x")
    with pytest.raises(InputError, match=r"has token 280, and --model .* only has 280"):
        check_token_ids(base, 280, "--data x")


@pytest.mark.parametrize("kind", ["gpt2", "gemma3n", "qwen2_vl"])
def test_only_the_embedding_of_the_ids_counts(kind):
    """GPT-2 has another of positions, Gemma 3n one of each block; the config is not asked."""
    model = tiny_architecture(kind)
    others = [module.weight.shape for module in model.modules() if isinstance(module, nn.Embedding)]
    assert len(others) == (1 if kind == "qwen2_vl" else 2)
    assert embedding_rows(model, {}) == 288


def test_watching_leaves_the_model_as_it_was():
    model = tiny_architecture("llama")
    before = {path: (type(module), tuple(module)) for path, module in model.named_modules()}
    assert embedding_rows(model, {"vocab_size": 5}) == 288
    assert {path: (type(module), tuple(module)) for path, module in model.named_modules()} == before


def test_a_model_that_embeds_in_its_own_way_is_asked_through_its_config():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4).weight

        def __call__(self, ids):
            return self.table[ids]

    assert embedding_rows(Own(), {"text_config": {"vocab_size": 7}, "vocab_size": 9}) == 7
    assert embedding_rows(Own(), {}) is None


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tree_flatten(model.parameters())}


# Of each way that families have with their heads and with `sanitize`; the others are slow only together.
QUICK = {
    "afm7", "cohere", "cohere2", "ernie4_5", "exaone", "exaone4", "falcon_h1", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gemma3n", "glm4", "gpt_bigcode", "olmo3", "phi3", "qwen2_vl", "qwen3_5", "qwen3_vl",
    "recurrent_gemma", "starcoder2", "talkie",
}  # fmt: skip
# Not on a CPU, or not at all: mlx-lm itself cannot load these when their configs say that they are tied.
UNLOADABLE = {"bitnet", "muse_spark", "olmo"}
NOT_TIED = {"minicpm", "qwen3_vl_moe"}


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow)
        for kind in sorted(CONFIGS.keys() - UNLOADABLE)
    ],
)
def test_an_outline_has_what_the_loader_makes(kind, tmp_path):
    """With a config that says tied and with one that does not; from the folder and from the config alone."""
    found = {}
    for tied in ways(kind) if kind not in NOT_TIED else (False,):
        folder = write_architecture(tmp_path / str(tied), kind, tied)
        loaded = shapes(load_weights(folder, trust_remote_code=False)[0])
        assert shapes(outline_of(str(folder), dtype=mx.float32).model) == loaded
        if "quantization" not in tiny_config(kind):
            assert shapes(outline_of(str(folder / "config.json"), dtype=mx.float32).model) == loaded
        found[tied] = loaded
    if kind in ("gemma3", "gemma3_text", "recurrent_gemma", "qwen3_vl"):
        assert any("lm_head" in name for name in found[False])
        assert not any("lm_head" in name for name in found[True])


def test_a_stored_head_is_kept_whatever_the_config_says(tmp_path):
    untied = write_architecture(tmp_path / "g", "gemma3_text", tied=False)
    config = untied / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert "lm_head.weight" in shapes(load_weights(untied, trust_remote_code=False)[0])
    assert "lm_head.weight" in shapes(outline_of(str(untied), dtype=mx.float32).model)
    assert "lm_head.weight" not in shapes(outline_of(str(config), dtype=mx.float32).model)


def test_the_families_that_lose_their_head_on_loading_are_known():
    """Of a new mlx-lm too: `sanitize` changes the model itself in these architectures and in no other."""
    changing = set()
    for file in Path(mlx_lm.models.__path__[0]).glob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "def sanitize" not in text:
            continue
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef) and function.name == "sanitize":
                called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                if called & {"self.pop", "self.update_modules", "setattr", "delattr"}:
                    changing.add(file.stem)
    assert changing == set(TIED_BY_WEIGHTS)
