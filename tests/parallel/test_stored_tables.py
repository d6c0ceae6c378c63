"""Embedding and head that stay in the base's files: the model's own numbers, with a slice of them in memory, read once a step."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import by_dtype
from conftest import write_folder
from mlx.utils import tree_flatten
from mlx_lm.models import gemma2, llama, qwen2
from run_cli import run

from mlx_lora.config.load import train_settings
from mlx_lora.losses.check import check_arrays
from mlx_lora.losses.cross_entropy import PLAIN, TILES, Arrays
from mlx_lora.losses.fused import head_loss
from mlx_lora.models.head import find_head
from mlx_lora.models.load import Base, load_base
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel import offloaded_base as stored_tables
from mlx_lora.parallel.block_walk import Mode
from mlx_lora.parallel.offloaded_base import OffloadedBase, StoredEmbedding, StoredLinear, StoredTable
from mlx_lora.trainer.adapter import adapt
from mlx_lora.utils.errors import RunError

VOCABULARY = 4003
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY,
}  # fmt: skip
FAMILIES = {
    "tied": (llama, {"model_type": "llama", "tie_word_embeddings": True}),
    "untied": (qwen2, {"model_type": "qwen2", "tie_word_embeddings": False}),
    "capped": (gemma2, {"model_type": "gemma2", "head_dim": 32, "final_logit_softcapping": 5.0}),
}
LAYOUTS = {"float": {}, "4-bit": {"group_size": 32, "bits": 4}, "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}


def written(folder, family: str, layout: str):
    module, own = FAMILIES[family]
    config = {**SMALL, **own}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    if LAYOUTS[layout]:
        nn.quantize(model, **LAYOUTS[layout])
        config["quantization"] = LAYOUTS[layout]
    return write_folder(folder, model, config)


def opened(folder, offload: bool, **more) -> tuple[Base, OffloadedBase | None]:
    """Return an adapted model, whose B is not zero, in memory or in its files."""
    settings = train_settings({"model": str(folder), "data": "x", "sample_tokens": 0, "rank": 4, **more})
    base = load_base(settings.model, read=not offload)
    adapt(settings, base, objective_of(settings.objective), None)
    strategy = OffloadedBase() if offload else None
    if strategy is not None:
        strategy.divide(base, settings)
    mx.random.seed(1)
    for path, module in base.model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(len(path))) * 0.05
    return base, strategy


def tables_of(base: Base) -> list[StoredTable]:
    return [module for module in base.model.modules() if isinstance(module, StoredTable)]


@pytest.mark.parametrize(
    ("family", "layout"),
    [("tied", "4-bit"), ("untied", "float"), ("untied", "mxfp4"), ("capped", "float"), ("capped", "4-bit")],
)
def test_loss_and_gradients_are_those_of_the_model_in_memory(family, layout, tmp_path):
    folder = written(tmp_path / "base", family, layout)
    whole, (stored, strategy) = opened(folder, False)[0], opened(folder, True)
    assert strategy is not None
    assert sum(isinstance(table, StoredEmbedding) for table in tables_of(stored)) == 1
    assert sum(isinstance(table, StoredLinear) for table in tables_of(stored)) == (family == "untied")
    assert all(len(table.parts()) > 1 for table in tables_of(stored))
    assert not any(unit.kept_bytes for table in tables_of(stored) for unit in [one.unit for one in table._slices.every])
    ids = mx.random.randint(0, VOCABULARY, (2, 17), key=mx.random.key(1))
    ids[0, :3] = mx.array([VOCABULARY - 1, 0, VOCABULARY - 1])
    close = {"rtol": by_dtype(1e-4, 2e-2), "atol": by_dtype(1e-5, 2e-2)}
    assert mx.allclose(whole.model(ids), stored.model(ids), **close)
    arrays = check_arrays(VOCABULARY, 24)
    for plain in (False, True):
        loss = PLAIN if plain else head_loss(find_head(stored.model, stored.config), TILES, 1 << 14)  # pyright: ignore[reportArgumentType]
        ours = loss_and_gradients(stored, loss, arrays, strategy)
        loss = PLAIN if plain else head_loss(find_head(whole.model, whole.config), TILES, 1 << 14)  # pyright: ignore[reportArgumentType]
        theirs = loss_and_gradients(whole, loss, arrays, None)
        assert ours[0] == pytest.approx(theirs[0], rel=by_dtype(1e-5, 1e-2))
        assert ours[1].keys() == theirs[1].keys()
        for name, gradient in theirs[1].items():
            assert np.linalg.norm(ours[1][name] - gradient) <= by_dtype(1e-4, 5e-2) * np.linalg.norm(gradient), name


@pytest.mark.parametrize(
    ("family", "layout", "method"),
    [("tied", "float", "lora"), ("untied", "float", "dora"), ("tied", "4-bit", "qa-lora"), ("untied", "4-bit", "lora")],
)
def test_dropout_outside_of_blocks_is_that_of_the_forward_pass(family, layout, method, tmp_path):
    """What is between the blocks is planned once for each block; all of these plans belong to one forward pass."""
    folder = written(tmp_path / "base", family, layout)
    targets = "embed_tokens,lm_head,q_proj" if family == "untied" else "embed_tokens,q_proj"
    more = {"dropout": 0.5, "target_modules": targets, "method": method}
    found = []
    for offload, seed in ((False, 7), (True, 7), (True, 8)):
        base, strategy = opened(folder, offload, **more)
        base.model.train()
        mx.random.seed(seed)
        value, gradients = loss_and_gradients(base, PLAIN, check_arrays(VOCABULARY, 24), strategy)
        found.append((value, gradients, mx.random.state[0].tolist()))
    theirs, ours, others = found
    assert ours[0] == pytest.approx(theirs[0], rel=by_dtype(1e-5, 1e-2))
    assert ours[2] == theirs[2]  # and the next step goes on as in memory
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        size = np.linalg.norm(gradient)
        assert np.linalg.norm(ours[1][name] - gradient) <= by_dtype(1e-4, 5e-2) * size, name
        assert np.linalg.norm(others[1][name] - gradient) > 0.1 * size > 0, name


def loss_and_gradients(base: Base, loss, arrays: Arrays, strategy: OffloadedBase | None):
    def total(batch):
        return loss.train(base.model, batch)

    take = nn.value_and_grad(base.model, total) if strategy is None else strategy.value_and_grad(base.model, total)
    (value, _), gradients = take(arrays)
    mx.eval(value, gradients)
    return value.item(), {name: np.array(g.astype(mx.float32)) for name, g in tree_flatten(gradients)}


def test_a_step_reads_each_slice_of_the_head_once(tmp_path, monkeypatch):
    base, strategy = opened(written(tmp_path / "base", "untied", "4-bit"), True)
    assert strategy is not None
    [head] = [table for table in tables_of(base) if isinstance(table, StoredLinear)]
    loss = head_loss(find_head(base.model, base.config), TILES, 1 << 14)  # pyright: ignore[reportArgumentType]
    loss_and_gradients(base, loss, check_arrays(VOCABULARY, 24), strategy)
    used, own = [], [one.unit._number for one in head._slices.every]
    real = type(strategy._files.reader).used
    monkeypatch.setattr(type(strategy._files.reader), "used", lambda self, unit: (used.append(unit), real(self, unit)))
    loss_and_gradients(base, loss, check_arrays(VOCABULARY, 24), strategy)
    assert [unit for unit in used if unit in own] == own
    blocks = [unit for unit in used if unit not in own]
    assert blocks == [*range(3), *reversed(range(3))]
    assert strategy._walk is not None
    assert not strategy._walk.results
    assert strategy._walk.mode is Mode.AT_ONCE


def test_only_a_slice_is_in_memory(tmp_path):
    """A vocabulary that is most of the model takes no memory, before, during and after a step."""
    folder = written(tmp_path / "base", "tied", "float")
    table = VOCABULARY * 64 * 4
    before = mx.get_active_memory()
    base, strategy = opened(folder, True)
    assert strategy is not None
    held = mx.get_active_memory() - before
    assert held < table / 2
    [embedding] = tables_of(base)
    slices = len(embedding.parts())
    assert slices > 5
    loss = head_loss(find_head(base.model, base.config), TILES, 1 << 14)  # pyright: ignore[reportArgumentType]
    loss_and_gradients(base, loss, check_arrays(VOCABULARY, 24), strategy)
    mx.clear_cache()
    mx.reset_peak_memory()
    loss_and_gradients(base, loss, check_arrays(VOCABULARY, 24), strategy)
    assert mx.get_peak_memory() - before < held + table
    assert mx.get_active_memory() - before < held + table / 2


def test_rows_that_cannot_be_read_are_one_line(tmp_path, monkeypatch):
    base, _ = opened(written(tmp_path / "base", "untied", "float"), True)
    base.model(mx.array([[1, 2]]))
    monkeypatch.setattr(stored_tables.os, "preadv", lambda *_: 0)
    with pytest.raises(RunError, match=r"model\.safetensors"):
        base.model(mx.array([[3, 4]]))


@pytest.mark.slow
def test_a_run_with_a_large_vocabulary_says_that_nothing_stays(tmp_path, chats):
    folder, out = written(tmp_path / "base", "untied", "4-bit"), tmp_path / "run"
    ran = run("train", "--model", folder, "--data", chats, "--adapter-path", out, "--offload-base", "--iters", 2, "--batch-size", 2,
              "--steps-per-report", 1, "--learning-rate", "1e-2", "--chat-template", "chatml")  # fmt: skip
    assert ran.code == 0, ran.err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if line.get("loss") is not None]
    assert len(found) == 2
    assert found[1] < found[0]
    plan = json.loads(
        run("plan", "--model", folder, "--data", chats, "--offload-base", "--batch-size", 2, "--json").out
    )
    tables = 2 * VOCABULARY * (64 // 2 + 2 * 2 * 64 // 32)
    whole = json.loads(
        run("plan", "--model", folder, "--data", chats, "--offload-base", "off", "--batch-size", 2, "--json").out
    )
    assert whole["model"]["base_bytes"] - plan["model"]["base_bytes"] > tables / 2
    assert (out / "adapters.safetensors").exists()
