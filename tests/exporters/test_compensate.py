"""fuse --compensate and --bits-budget: block by block, smaller errors of outputs, sizes that hold, one line for bad input."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import tiny_model, write_folder
from make_adapters import adapt_and_save, loaded, make_adapter
from run_cli import holds, one_line, run, succeeds
from tiny_moe import tiny_moe, with_quantized_experts

from mlx_lora.adapters.base import exact_weight
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.api.fuse import FuseSettings, ways_to_round
from mlx_lora.exporters import rounding
from mlx_lora.exporters.rounding import (
    Budget,
    CalibrationTokens,
    LayerCost,
    allocate,
    compensated_layers,
    layer_inputs,
    rounded_layer,
)
from mlx_lora.models import blocks
from mlx_lora.models.blocks import BlockWalk
from mlx_lora.utils.errors import InputError

IDS = [
    mx.array(np.random.default_rng(n).integers(3, 250, (2, width)).astype(np.int32)) for n, width in enumerate((40, 25))
]


def tokens(ids=IDS) -> CalibrationTokens:
    real = [mx.ones(one.shape) for one in ids]
    real[0][1, 30:] = 0.0
    return CalibrationTokens(list(ids), real, sum(int(one.sum().item()) for one in real), "a test")


def adapted(folder, tmp_path, **more):
    return loaded(folder, make_adapter(folder, tmp_path / "a", **{"strength": 0.05} | more))


def whole_pass(model, path: str, given: CalibrationTokens) -> mx.array:
    """X X^T of one layer, from whole forward passes."""
    layer, seen = adapter_layers(model)[path], []
    own = type(layer)

    class Seen(own):
        def __call__(self, x):
            seen.append(x)
            return super().__call__(x)

    layer.__class__ = Seen
    for ids in given.ids:
        model(ids)
    layer.__class__ = own
    rows = [(x * real[..., None]).reshape(-1, x.shape[-1]) for x, real in zip(seen, given.real, strict=True)]
    return sum((x.T @ x for x in rows), mx.array(0.0))


@pytest.mark.parametrize("keeps", [True, False])
def test_inputs_of_layers_are_those_of_a_whole_pass(keeps, tiny_4bit_folder, tmp_path, monkeypatch):
    model, given = adapted(tiny_4bit_folder, tmp_path).model, tokens()
    if not keeps:
        monkeypatch.setattr(blocks, "_same", lambda *_: False)
    assert BlockWalk(model, given.ids).keeps is keeps
    found = {
        path: one.hessian
        for block in layer_inputs(model, given, adapter_layers(model))
        for one in block
        for path in one.paths
    }
    layers = adapter_layers(model)
    assert found.keys() == layers.keys()
    for path in layers:
        wanted = whole_pass(model, path, given)
        assert mx.allclose(found[path], wanted, rtol=1e-3, atol=1e-3 * mx.abs(wanted).max().item()), path
        assert not mx.allclose(found[path], whole_pass(model, path, tokens(IDS[:1])), rtol=1e-3)
    assert {type(block).__name__ for block in model.layers} == {"TransformerBlock"}


def test_a_compensated_layer_errs_less_in_its_outputs_than_a_rounded_one(tiny_4bit_folder, tmp_path):
    model, given = adapted(tiny_4bit_folder, tmp_path).model, tokens()
    layers = adapter_layers(model)
    made = compensated_layers(model, given, {path: layer.base for path, layer in layers.items()}, {})
    assert made.layers.keys() == layers.keys()
    assert made.kept_error < 0.7
    for path, layer in layers.items():
        gram, wanted, base = whole_pass(model, path, given), layer.merged(), layer.base
        plain = layer.fuse().to_quantized(base.group_size, base.bits, base.mode)
        one = made.layers[path]
        assert (one.bits, one.group_size, one.mode) == (base.bits, base.group_size, base.mode)
        errors = []
        for quantized in (one, plain):
            difference = wanted - mx.dequantize(quantized.weight, quantized.scales, quantized.biases, 32, 4)
            errors.append(((difference @ gram) * difference).sum().item())
        assert errors[0] < errors[1], path


def fuse(model, tmp_path, *extra):
    return succeeds(
        "fuse", "--model", model, "--adapter-path", tmp_path / "a", "--out", tmp_path / "f", "--force", *extra
    )


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(
            json.dumps({"text": f"the {n} quick brown foxes jump over {n * n} lazy dogs"}) + "\n" for n in range(30)
        )
    )
    return file


@pytest.mark.long
@pytest.mark.parametrize("layout", [
    {"group_size": 32, "bits": 4, "mode": "affine"}, {"group_size": 64, "bits": 3, "mode": "affine"},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"}, {"group_size": 16, "bits": 4, "mode": "nvfp4"},
])  # fmt: skip
def test_every_format_is_compensated_in_place(layout, rows, tmp_path):
    model = tiny_model(intermediate_size=128)
    nn.quantize(model, **layout)
    base = write_folder(tmp_path / "base", model, {"intermediate_size": 128, "quantization": layout})
    wanted = adapt_and_save(base, tmp_path / "a", "all-linear")
    errors = {}
    for name, extra in (("plain", ()), ("compensated", ("--compensate", rows))):
        ran = fuse(base, tmp_path, *extra, "--data", rows, "--json")
        errors[name] = json.loads(ran.out)["kl"]
        found = json.loads((tmp_path / "f" / "config.json").read_text())["quantization"]
        assert found == layout
    assert "Compensated 14 layers" in ran.err
    assert errors["compensated"] < errors["plain"]
    assert np.isfinite(np.array(wanted)).all()


def test_experts_and_embeddings_are_rounded_plainly_and_said(rows, tmp_path):
    model, config = with_quantized_experts(*tiny_moe("qwen3_moe"))
    nn.quantize(model, 32, 4, class_predicate=lambda path, m: path.endswith(("q_proj", "embed_tokens")))
    base = write_folder(tmp_path / "base", model, config)
    quantized = {"group_size": 32, "bits": 4, "mode": "affine"}
    saved = json.loads((base / "config.json").read_text())
    saved["quantization"] |= {p: quantized for p, m in model.named_modules() if p.endswith(("q_proj", "embed_tokens"))}
    (base / "config.json").write_text(json.dumps(saved))
    make_adapter(base, tmp_path / "a", targets="all-linear,embed_tokens", strength=0.05)
    ran = fuse(base, tmp_path, "--compensate", rows, "--data", rows)
    holds(ran.err, "Compensated 2 layers", "7 layers of experts or embeddings are rounded plainly")


@pytest.mark.long
def test_a_budget_gives_bits_where_most_is_lost_and_is_kept(tiny_4bit_folder, rows, tmp_path):
    make_adapter(tiny_4bit_folder, tmp_path / "a", strength=0.05)
    sizes, kls, chosen = [], [], []
    for extra in (
        (),
        ("--bits-budget", "+8%"),
        ("--bits-budget", "+60%"),
        ("--bits-budget", "+60%", "--compensate", rows),
    ):
        own = ("--compensate", rows) if extra and "--compensate" not in extra else ()
        ran = fuse(tiny_4bit_folder, tmp_path, *extra, *own, "--data", rows, "--json")
        kls.append(json.loads(ran.out)["kl"])
        sizes.append(sum(array.nbytes for array in mx.load(str(tmp_path / "f" / "model.safetensors")).values()))
        config = json.loads((tmp_path / "f" / "config.json").read_text())["quantization"]
        chosen.append({path: one["bits"] for path, one in config.items() if isinstance(one, dict)})
    assert sizes[0] < sizes[1] <= 1.08 * sizes[0]
    assert sizes[1] < sizes[2] <= 1.6 * sizes[0]
    assert not chosen[0]
    assert set(chosen[2].values()) <= {5, 6, 8}
    assert kls[2] < kls[1] < kls[0]
    assert loaded(tmp_path / "f").model(IDS[0]).shape[-1] == 288


@pytest.mark.parametrize("new_grid", [False, True])
def test_a_budget_measures_layers_on_the_grid_that_they_get(new_grid, tiny_4bit_folder, tmp_path, monkeypatch):
    model, given, costs = adapted(tiny_4bit_folder, tmp_path, strength=0.01).model, tokens(), {}
    monkeypatch.setattr(rounding, "allocate", lambda measured, room: costs.update(measured) or {})
    layers = adapter_layers(model)
    stored = {path: layer.base for path, layer in layers.items()}
    rounding.choose_bits(model, given, stored, Budget.parse("+15%"), 100_000, new_grid=new_grid)
    assert costs.keys() == layers.keys()
    for block in layer_inputs(model, given, stored):
        for path, hessian in ((path, one.hessian) for one in block for path in one.paths):
            weight, cost = layers[path].merged(), costs[path]
            whole = ((weight @ hessian) * weight).sum().item()
            for bits, loss in cost.losses.items():
                written = rounded_layer(stored[path], weight, bits, new_grid=new_grid)
                difference = weight - exact_weight(written)
                assert ((difference @ hessian) * difference).sum().item() / whole == pytest.approx(loss, rel=0.3)
                assert cost.sizes[bits] == sum(written[name].nbytes for name in ("weight", "scales", "biases"))


def test_more_bits_on_a_new_grid_leave_the_grid_of_the_base(tiny_4bit_folder, tmp_path):
    base = next(iter(adapter_layers(adapted(tiny_4bit_folder, tmp_path).model).values())).base
    old = exact_weight(base)
    own, new = (rounded_layer(base, old, 5, new_grid=new) for new in (False, True))
    assert mx.allclose(exact_weight(own), old, atol=1e-6)  # all old values are on it
    assert own.bits == new.bits == 5
    assert mx.abs(exact_weight(new) - old).max().item() > 1e-4


def test_grids_are_tried_for_all_bits_that_lose(tiny_4bit_folder, rows, tmp_path):
    make_adapter(tiny_4bit_folder, tmp_path / "a")
    base = loaded(tiny_4bit_folder, tmp_path / "a")

    def grids(**asked) -> list[bool]:
        return [way.new_grid for way in ways_to_round(base, tmp_path / "a", FuseSettings(tmp_path, **asked))]

    budget = Budget.parse("+10%")
    assert grids() == grids(bits=5) == [False, True]
    assert grids(bits=8) == grids(budget=budget, rows=str(rows)) == [False]
    assert grids(budget=budget, rows=str(rows), compensate=False) == [True, False]


def test_a_base_of_8_bits_gets_the_better_grid_too(tmp_path):
    model, layout = tiny_model(), {"group_size": 32, "bits": 8, "mode": "affine"}
    nn.quantize(model, **layout)
    folder = write_folder(tmp_path / "base", model, {"quantization": layout})
    base = adapted(folder, tmp_path)
    assert [way.new_grid for way in ways_to_round(base, tmp_path / "a", FuseSettings(tmp_path))] == [False, True]


def test_steps_that_help_most_per_byte_come_first():
    costs = {
        "a": LayerCost({4: 8.0, 5: 2.0, 8: 0.0}, {4: 100, 5: 120, 8: 200}),
        "b": LayerCost({4: 4.0, 5: 1.0, 8: 0.0}, {4: 100, 5: 120, 8: 200}),
        "c": LayerCost({4: 0.1, 5: 0.0, 8: 0.0}, {4: 100, 5: 120, 8: 200}),
    }
    wanted = {
        19: {},
        20: {"a": 5},
        40: {"a": 5, "b": 5},
        140: {"a": 8, "b": 5, "c": 5},
        1000: {"a": 8, "b": 8, "c": 5},  # nothing is spent where nothing is gained
    }
    assert {room: allocate(costs, room) for room in wanted} == wanted


def test_a_budget_is_a_size_or_a_share():
    assert Budget.parse("+10%").room(1000) == 100
    assert Budget.parse("2KB").room(1500) == 500
    for wrong in ("10%", "+x%", "lots", "-5MB"):
        with pytest.raises(InputError, match="--bits-budget"):
            Budget.parse(wrong)


def test_bad_input_is_one_line(tiny_folder, tiny_4bit_folder, tmp_path, rows):
    make_adapter(tiny_folder, tmp_path / "float")
    make_adapter(tiny_4bit_folder, tmp_path / "a")
    out = ("--out", tmp_path / "f")
    float_base = ("fuse", "--model", tiny_folder, "--adapter-path", tmp_path / "float", *out)
    base = ("fuse", "--model", tiny_4bit_folder, "--adapter-path", tmp_path / "a", *out)
    for given, flags, *words in (
        (float_base, ("--compensate", rows), "--compensate", "not quantized"),
        (float_base, ("--bits-budget", "+10%"), "--bits-budget", "not quantized"),
        (base, ("--compensate", tmp_path / "none.jsonl"), "none.jsonl"),
        (base, ("--compensate",), "--compensate", "does not name its data", "--compensate FILE"),
        (base, ("--bits-budget", "1KB", "--compensate", rows), "--bits-budget 1KB", "MB already"),
    ):
        one_line(run(*given, *flags), *words)
    assert not (tmp_path / "f").exists()
