"""Which product a quantized layer uses: forced, or measured once per shape class and kept."""

from __future__ import annotations

import io
import json
import re
import time
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import peak_bytes
from conftest import quantized, tiny_model
from run_cli import run, succeeds
from tiers import by_default

from mlx_lora.config.settings import ModelSettings
from mlx_lora.kernels import quantized_matmul as matmul
from mlx_lora.kernels.quantized_matmul import dequantized_matmul, use_measured_matmul
from mlx_lora.models.graph import gradient_graph
from mlx_lora.models.load import load_base
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir


def operations(model: nn.Module, rows: int) -> Counter[str]:
    """Count the operations of the model's logits and of their gradient for the first block's input."""
    text = io.StringIO()
    mx.eval(model.parameters())
    hidden = mx.zeros((1, rows, 64))
    logits, gradients = mx.value_and_grad(lambda h: model.model.embed_tokens.as_linear(blocks(model, h)).sum())(hidden)
    mx.export_to_dot(text, logits, gradients)
    return Counter(re.findall(r'label ="(\w+)"', text.getvalue()))


def blocks(model: nn.Module, hidden: mx.array) -> mx.array:
    for block in model.model.layers:
        hidden = block(hidden, mask=None)
    return hidden


@pytest.mark.parametrize("rows", [1, 40])
def test_a_forced_path_is_the_one_taken_forwards_and_backwards(rows):
    found, logits = {}, []
    model = quantized(tiny_model())
    for path in ("packed", "dense"):  # the second choice replaces the first
        paths = use_measured_matmul(model, path)
        assert paths.describe() == [f"4-bit/32 affine: {path} product, forced"]
        found[path] = operations(model, rows)
        logits.append(np.array(model(mx.arange(60).reshape(3, 20))))
    assert np.allclose(*logits, atol=1e-4)
    assert "forced" not in use_measured_matmul(model).describe()[0]
    products = 2 * (2 * 7 + 1)  # forwards and backwards, of two blocks and the tied head
    assert found["packed"]["QuantizedMatmul"] == products
    assert found["dense"]["QuantizedMatmul"] == 0
    assert found["dense"]["Matmul"] - found["packed"]["Matmul"] == products


def test_a_large_vocabulary_is_never_dense_as_a_whole(monkeypatch):
    mx.random.seed(0)
    packed, layout = [*mx.quantize(mx.random.normal((100, 64)), 32, 4)], {"group_size": 32, "bits": 4, "mode": "affine"}
    x, cotangent = mx.random.normal((2, 3, 64)), mx.random.normal((2, 3, 100))

    def found() -> tuple[list[mx.array], set[int]]:
        product = lambda x: dequantized_matmul(x, packed, **layout)  # noqa: E731
        graph = gradient_graph(lambda varied, fixed: [dequantized_matmul(varied[0], fixed, **layout)], [x], packed)
        dense = {array.shape[0] for array in graph.arrays.values() if len(array.shape) == 2 and array.shape[1] == 64}
        return [array for pair in mx.vjp(product, [x], [cotangent]) for array in pair], dense

    whole, rows = found()
    assert 100 in rows
    monkeypatch.setattr(matmul, "MAX_SLICE", 32)
    sliced, rows = found()
    assert max(rows) == 32
    assert all(mx.allclose(one, other, atol=1e-4) for one, other in zip(whole, sliced, strict=True))
    assert mx.abs(whole[1]).max() > 1  # a gradient that a missing slice would change


def test_types_that_have_one_path_are_named():
    model = quantized(tiny_model())
    model.experts = nn.QuantizedLinear(64, 64)
    model.experts.__class__ = type("QuantizedSwitchLinear", (nn.QuantizedLinear,), {})
    assert use_measured_matmul(model, "dense").describe()[-1].startswith("1 QuantizedSwitchLinear layers: packed")
    assert len(use_measured_matmul(model, "packed").describe()) == 1


def test_forcing_a_path_of_a_float_model_is_refused():
    with pytest.raises(InputError, match="no quantized linear layer"):
        use_measured_matmul(tiny_model(), "packed")
    assert use_measured_matmul(tiny_model()).describe() == []


# --- the setting reaches every command that shows it


@pytest.mark.parametrize("path", ["packed", "dense"])
def test_the_setting_reaches_the_layers(tiny_4bit_folder, path):
    base = load_base(ModelSettings(model=str(tiny_4bit_folder), quantized_matmul=path))
    assert base.model.layers[0].self_attn.q_proj.dense_from_rows == {"packed": device.NEVER, "dense": 1}[path]


@pytest.mark.long
@pytest.mark.parametrize("command", by_default(["train", "evaluate", "generate"], "train"))
def test_every_command_that_shows_the_option_heeds_it(command, tiny_folder, tiny_4bit_folder, chats, tmp_path):
    more = {
        "train": ("--data", chats, "--adapter-path", tmp_path / "a", "--iters", 1),
        "evaluate": ("--data", chats),
        "generate": ("--prompt", "x", "--max-tokens", 1),
    }[command]
    ran = run(command, "--model", tiny_folder, *more, "--quantized-matmul", "packed")
    assert ran.code == 2
    assert ran.lines[-1].startswith("Error: --quantized-matmul packed: the model has no quantized")
    ran = succeeds(command, "--model", tiny_4bit_folder, *more, "--quantized-matmul", "packed", "--verbose")
    if command == "train":
        assert "4-bit/32 affine: packed product, forced" in ran.err
        assert "quantized_matmul: packed" in (tmp_path / "a/run.yaml").read_text()


# --- what is measured is kept


@pytest.fixture
def store(own_cache):
    """The measurements' file in a cache of its own."""
    return cache_dir("measured") / "dense_matmul_from_rows.json"


def measured(shape: tuple[int, int] = (96, 64)) -> int:
    return matmul.dense_matmul_from_rows(shape, 4, 32, "affine", mx.float32)


def test_a_weight_is_timed_as_its_class():
    assert matmul.shape_class((576, 1536)) == (512, 2048)
    assert matmul.shape_class((1536, 576)) == (2048, 512)
    assert matmul.shape_class((49152, 4096)) == (2048, 2048)
    assert matmul.shape_class((1, 64)) == (128, 128)


def test_each_class_is_measured_once(store):
    assert measured() == measured((128, 140))
    (key,) = json.loads(store.read_text())
    assert key.endswith("|4|32|affine|mlx.core.float32|128x128")
    measured((250, 64))
    assert {k.rsplit("|", 1)[-1] for k in json.loads(store.read_text())} == {"128x128", "256x128"}


def test_a_kept_measurement_is_believed(store):
    measured()
    (key,) = json.loads(store.read_text())
    kept = {"at": time.time(), "rows": device.NEVER}
    store.write_text(json.dumps({key: kept}))
    assert measured() == device.NEVER
    assert measured((250, 64)) in (*matmul.ROW_COUNTS, device.NEVER)
    assert json.loads(store.read_text())[key] == kept


@pytest.mark.parametrize(("before", "now", "stays"), [(256, 16, 16), (16, 256, 16)])
def test_a_measurement_beside_other_programs_is_mended_after_a_day(store, monkeypatch, before, now, stays):
    measured()
    (key,) = json.loads(store.read_text())
    monkeypatch.setattr(matmul, "_measure_dense_matmul", lambda *_: now)
    store.write_text(json.dumps({key: {"at": time.time(), "rows": before}}))
    assert measured() == before
    store.write_text(json.dumps({key: {"at": time.time() - 2 * matmul.KEPT_S, "rows": before}}))
    assert measured() == stays
    monkeypatch.setattr(matmul, "_measure_dense_matmul", lambda *_: pytest.fail("measured again"))
    assert measured() == stays


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1, 2]", b"\xff\xfe", "value"])
def test_a_damaged_file_is_measured_again(store, content):
    measured()
    (key,) = json.loads(store.read_text())
    store.write_bytes(json.dumps({key: "soon"}).encode() if content == "value" else content)
    assert measured() in (*matmul.ROW_COUNTS, device.NEVER)
    assert list(json.loads(store.read_text())) == [key]


def test_the_dense_weights_do_not_wait_for_the_backward_pass():
    # Compiling merges equal operations: a second dequantization that is not tied to the backward pass would be
    # merged with the first, and every layer's dense weight kept, which is all that a 4-bit base saves.
    layout = {"group_size": 32, "bits": 4, "mode": "affine"}
    weights = [mx.quantize(mx.random.normal((512, 512)), **layout) for _ in range(16)]

    def loss(x: mx.array, weights: list[tuple[mx.array, ...]]) -> mx.array:
        for packed in weights:
            x = mx.tanh(dequantized_matmul(x, list(packed), **layout))
        return x.sum()

    peak = peak_bytes(mx.compile(mx.grad(loss)), mx.random.normal((4, 512)), weights)
    assert peak < 6 * 512 * 512 * 4  # what one dequantization takes in between
