"""MLPs in chunks of positions: the same results and gradients, less memory, and the planner knows it."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures.build import tiny_architecture, tiny_config
from comparing import assert_equal, peak_bytes
from conftest import quantized, tiny_model
from mlx.utils import tree_flatten
from tiers import by_default

from mlx_lora.adapters.inject import adapt_model, inject, select_targets
from mlx_lora.config.settings import AdapterSettings
from mlx_lora.kernels.choose import training_kernels
from mlx_lora.kernels.quantized_matmul import use_measured_matmul
from mlx_lora.models.head import ARCHITECTURES
from mlx_lora.models.meta import model_shape
from mlx_lora.planner.memory import (
    CHUNK_BYTES,
    CHUNKED_FROM_BYTES,
    Machine,
    ModelShape,
    RunShape,
    kept_by,
    plan_memory,
    position_chunks,
)
from mlx_lora.trainer.fit import with_block_memory
from mlx_lora.trainer.gradient_checkpointing import (
    InChunks,
    apply_checkpointing,
    chunk_positions,
    parts_of,
    position_numbers,
)

pytestmark = pytest.mark.usefixtures("all_chunks_traced")
NAMES = sorted(name.rpartition(".")[2] for name in ARCHITECTURES)
DEFAULT = ("llama", "gemma3_text", "qwen3_moe", "granitemoehybrid", "qwen3_5")


def adapted(name: str, dropout: float = 0.0, method: str = "lora") -> nn.Module:
    """Return a tiny architecture with adapters that are not zero."""
    model = tiny_architecture(name)
    model.freeze()
    adapt_model(model, AdapterSettings(rank=4, dropout=dropout, method=method), 0)
    for path, value in tree_flatten(model.trainable_parameters()):
        if path.endswith("lora_b"):
            model.load_weights(
                [(path, 0.05 * mx.random.normal(value.shape, key=mx.random.key(len(path))))], strict=False
            )
    model.train()
    return model


def gradients(model: nn.Module, config: dict, forced: int | None, compiled: bool = False) -> dict[str, mx.array]:
    """Return loss and gradients with checkpointed blocks, whose MLPs are computed in as many chunks as asked."""
    tape = apply_checkpointing(model, "block")
    assert tape is not None
    chunk_positions(model, config, "block")
    for part in found_parts(model):
        part.forced_chunks = forced
    ids = mx.random.randint(0, 200, (2, 23), key=mx.random.key(1))
    gradient = nn.value_and_grad(model, lambda model: mx.square(model(ids).astype(mx.float32)).mean())
    state = [model.state, mx.random.state]

    def step():
        own = model.trainable_parameters()
        with training_kernels(model, tape.attend):
            found = gradient(model)
        model.update(own)  # differentiation leaves its own stand-ins in the model
        return found

    mx.random.seed(5)
    loss, found = mx.compile(step, inputs=state, outputs=state)() if compiled else step()
    return {"loss": loss, **dict(tree_flatten(found))}


def found_parts(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, InChunks)]


@pytest.mark.parametrize("name", by_default(NAMES, *DEFAULT))
def test_gradients_equal_those_of_the_whole(name):
    """For every family in the list: a part that mixed positions would show here."""
    config, model = tiny_config(name), adapted(name)
    expected = gradients(model, config, forced=1)
    assert len(found_parts(model)) >= len(model.layers) > 0
    assert_equal(gradients(model, config, forced=5), expected)
    assert_equal(gradients(model, config, forced=100), expected)  # a chunk has at least one position


def test_a_part_that_mixes_positions_would_differ(monkeypatch):
    config, model = tiny_config("llama"), adapted("llama")
    expected = gradients(model, config, forced=1)
    mlp = type(model.layers[0].mlp).__mro__[2]
    own = mlp.__call__
    monkeypatch.setattr(mlp, "__call__", lambda self, x: own(self, x) + 0.1 * x.mean(axis=1, keepdims=True))
    whole = gradients(model, config, forced=1)
    assert abs(whole["loss"].item() - expected["loss"].item()) > 1e-4 * expected["loss"].item()
    with pytest.raises(AssertionError):
        assert_equal(gradients(model, config, forced=5), whole)


@pytest.mark.parametrize(
    ("method", "compiled"),
    by_default([("dora", False), ("full", False), ("lora", True)], ("dora", False), ("full", False)),
)
def test_other_methods_and_compiled_steps(method, compiled):
    config, model = tiny_config("llama"), adapted("llama", method=method)
    expected = gradients(model, config, forced=1)
    assert_equal(gradients(model, config, forced=4, compiled=compiled), expected)


def test_a_quantized_base_and_no_trained_mlp():
    config, model = tiny_config("llama"), tiny_architecture("llama")
    quantized(model)
    use_measured_matmul(model)
    adapt_model(model, AdapterSettings(rank=4, target_modules="q_proj,v_proj"), 0)
    model.train()
    expected = gradients(model, config, forced=1)
    found = gradients(model, config, forced=3)
    assert any(mx.abs(value).max().item() > 1e-4 for name, value in found.items() if name.endswith("lora_b"))
    assert_equal(found, expected)


def test_dropout_stays_what_it_is():
    """Chunks would draw other features, so the MLP is computed as a whole; without dropout they differ from that."""
    config, model = tiny_config("llama"), adapted("llama", dropout=0.3)
    expected = gradients(model, config, forced=1)
    assert_equal(gradients(model, config, forced=5), expected)
    model.eval()
    with pytest.raises(AssertionError):
        assert_equal(gradients(model, config, forced=5), expected)


def test_sixteen_bits_sum_in_float32():
    config, model = tiny_config("llama"), adapted("llama")
    exact = gradients(model, config, forced=1)
    model.set_dtype(mx.bfloat16)
    name = "model.layers.1.mlp.down_proj.lora_b"

    def error(forced: int) -> float:
        found = gradients(model, config, forced)[name]
        assert found.dtype == mx.bfloat16
        return mx.linalg.norm(found.astype(mx.float32) - exact[name]).item()

    assert error(23) < 1.5 * error(1) + 1e-6


def test_only_blocks_that_are_computed_again_and_only_large_batches(monkeypatch):
    config, model = tiny_config("llama"), adapted("llama")
    for mode in ("none", "selective", "2"):
        assert chunk_positions(model, config, mode, 1 << 30) == []
        assert not found_parts(model)
    [words] = chunk_positions(model, config, "block", 1 << 30)
    numbers = position_numbers(model.layers[0].mlp, config)
    assert f"{CHUNKED_FROM_BYTES // (4 * numbers):,}" in words
    assert chunk_positions(model, config, "block", 64) == []
    kinds = [type(part) for part in found_parts(model)]
    assert len(kinds) == len(model.layers)
    chunk_positions(model, config, "block")
    assert [type(part) for part in found_parts(model)] == kinds
    calls = []
    mlp = kinds[0].__mro__[2]
    own = mlp.__call__
    monkeypatch.setattr(mlp, "__call__", lambda self, x: calls.append(x.shape[1]) or own(self, x))
    model(mx.zeros((1, 40), mx.int32))
    assert calls == [40, 40]
    monkeypatch.setattr("mlx_lora.planner.memory.CHUNKED_FROM_BYTES", 40 * 4 * numbers - 1)
    monkeypatch.setattr("mlx_lora.planner.memory.CHUNK_BYTES", 10 * 4 * numbers)
    calls.clear()
    model(mx.zeros((1, 40), mx.int32))
    assert calls == [10] * 8


def test_a_block_whose_code_was_not_read_stays_whole():
    model = adapted("mamba")
    assert not any(map(parts_of, model.layers))
    assert chunk_positions(model, tiny_config("mamba"), "block", 1 << 30) == []


def test_the_number_of_chunks():
    assert position_chunks(CHUNKED_FROM_BYTES) == 1
    for size in (CHUNKED_FROM_BYTES + 1, 10 * CHUNK_BYTES, 1000 * CHUNK_BYTES):
        assert CHUNK_BYTES / 2 < size / position_chunks(size) <= CHUNK_BYTES


WIDE = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 2}


def peak_of_chunks(forced: int) -> int:
    """Return what an MLP's forward and backward pass take at their peak."""
    model = tiny_model(**WIDE)
    inject(model, select_targets(model).paths, rank=4, scale=2.0)
    chunk_positions(model, {}, "block")
    part = found_parts(model)[0]
    part.forced_chunks = forced
    mx.eval(model.parameters())
    return peak_bytes(lambda x: mx.vjp(lambda x: [part(x)], [x], [x]), mx.ones((1, 4096, 64)), waits=False)


def test_chunks_hold_less_at_once():
    assert peak_of_chunks(16) < 0.5 * peak_of_chunks(1)


def wide_shape() -> ModelShape:
    model = tiny_model(**WIDE)
    inject(model, select_targets(model).paths, rank=4, scale=2.0)
    config = {"model_type": "llama", **WIDE, "num_attention_heads": 4, "num_key_value_heads": 2}
    return with_block_memory(model_shape(model, config), model, config)


GPU = Machine("a GPU", "metal", 64 << 30, 48 << 30, 4)
LONG = RunShape(1, 1 << 16, checkpointing="block")


def test_the_planner_knows_the_chunks(monkeypatch):
    monkeypatch.setattr("mlx_lora.trainer.fit.WIDTHS", (32, 1024, 2048))  # quick to trace
    block = wide_shape().blocks[0]
    held = {
        "chunks": kept_by(block, LONG, GPU),
        "dropout": kept_by(block, replace(LONG, dropout=True), GPU),
        "selective": kept_by(block, replace(LONG, checkpointing="selective"), GPU),
    }
    assert held["dropout"] == held["selective"]
    assert held["chunks"] < 0.5 * held["dropout"]
    short = replace(LONG, width=512)
    assert kept_by(block, short, GPU) == kept_by(block, replace(short, dropout=True), GPU)


@pytest.mark.slow
def test_the_plan_of_a_long_row_is_linear():
    shape = wide_shape()
    peaks = [plan_memory(shape, replace(LONG, width=width), GPU).peak_bytes for width in (1 << 15, 1 << 16, 1 << 17)]
    assert 1.8 < peaks[1] / peaks[0] < 2.1
    assert 1.9 < peaks[2] / peaks[1] < 2.05
    assert peaks[1] < 0.7 * plan_memory(shape, replace(LONG, dropout=True), GPU).peak_bytes
