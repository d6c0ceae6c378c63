"""Families of models that are made otherwise than Llama: what differs is borne, or refused in one plain line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config, write_architecture
from architectures.configs import ways
from run_cli import run
from tiers import by_default

from mlx_lora.adapters.inject import has_weights, select_targets
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
    ran = run("train", "--model", tiny_folder, "--data", chats, "--adapter-path", out, "--iters", 2)
    assert ran.code == 0, ran.err
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
    ran = run("train", "--model", folder, "--data", chats, "--adapter-path", out, "--iters", 4, "--batch-size", 4)
    assert ran.code == 0, ran.err
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(loss) for loss in losses if loss is not None)
    assert ("not compiled" in ran.err) is (kind == "dbrx")


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
    ran = run("train", "--model", folder, "--data", chats, "--adapter-path", out, "--iters", 1, "--batch-size", 2)
    assert ran.code == 0, ran.err
    assert "(no text: generation" in (out / "report.html").read_text()
