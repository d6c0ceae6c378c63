"""Experts: exact algebra in every form of base, true gradients, exactly the factors trained, a loss that falls."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import assert_equal, weights_checksum
from conftest import quantized
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from tiers import by_default, named
from tiny_moe import tiny_moe, with_quantized_experts
from tiny_steps import CHECKPOINT_MODES, batch, gradients, make_step

from mlx_lora.adapters.base import dense_weight
from mlx_lora.adapters.inject import adapter_layers, adapter_parameters, inject, kaiming_factors, select_targets
from mlx_lora.adapters.lora import LoRASwitchLinear
from mlx_lora.kernels import quantized_matmul as matmul
from mlx_lora.kernels.quantized_matmul import MeasuredQuantizedSwitchLinear, use_measured_matmul
from mlx_lora.losses.cross_entropy import plain_loss, token_arrays

E, IN, OUT, R = 3, 96, 40, 5
LAYOUTS = {
    **{f"{bits}-bit": (32, bits, "affine") for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": (32, 4, "mxfp4"),
    "mxfp8": (32, 8, "mxfp8"),
    "nvfp4": (16, 4, "nvfp4"),
}
MODELS = {
    "gpt_oss-mxfp4": lambda: with_quantized_experts(*tiny_moe("gpt_oss"))[0],
    "qwen3_moe": lambda: tiny_moe("qwen3_moe")[0],
    "qwen3_moe-4bit": lambda: quantized(tiny_moe("qwen3_moe")[0]),
    "mixtral-3bit": lambda: quantized(tiny_moe("mixtral")[0], 3),
}
SORTED = pytest.mark.parametrize("is_sorted", [False, True])


def base_of(form: str, bias: bool = True) -> nn.Module:
    base = SwitchLinear(IN, OUT, E, bias=bias)
    if bias:
        base.bias = mx.random.normal((E, OUT))
    return base if form == "float" else base.to_quantized(*LAYOUTS[form])


def random_factors(scale: float = 1.0) -> tuple[mx.array, mx.array]:
    return scale * mx.random.normal((E, R, IN)), scale * mx.random.normal((E, OUT, R))


def rows(is_sorted: bool) -> tuple[mx.array, mx.array]:
    """Return x and indices as SwitchGLU gives them: many rows sorted by expert, few with their k experts."""
    if is_sorted:
        return mx.random.normal((70, 1, IN)), mx.sort(mx.random.randint(0, E, (70,)))
    return mx.random.normal((2, 7, 1, 1, IN)), mx.random.randint(0, E, (2, 7, 2))


def by_definition(x: mx.array, indices: mx.array, weight: mx.array, base: nn.Module) -> mx.array:
    """Return each row times its expert's weight (E, out, in), plus its bias."""
    y = x @ weight[indices].swapaxes(-1, -2)
    return y + base.bias[indices][..., None, :] if "bias" in base else y


def adapted(model: nn.Module, form: str = "lora", targets: str = "all-linear") -> nn.Module:
    """Adapt `model` and move the factors away from where they start."""
    use_measured_matmul(model)
    inject(model, select_targets(model, targets).paths, rank=4, scale=2.0, seed=1, layer_type=form)
    mx.random.seed(4)
    for name, value in adapter_parameters(model).items():
        moved = value * 1.1 if name.endswith(".m") else 0.05 * mx.random.normal(value.shape)
        model.load_weights([(name, moved)], strict=False)
    return model


def test_nvfp4_experts_with_scales_of_their_own():
    base = SwitchLinear(IN, OUT, E, bias=False)
    base.weight = base.weight * mx.array([1.0, 100.0, 1e4])[:, None, None]
    packed = base.to_quantized(16, 4, "nvfp4", global_scale=True)
    error = mx.linalg.norm(dense_weight(packed) - base.weight, axis=(1, 2)) / mx.linalg.norm(base.weight, axis=(1, 2))
    assert mx.all(error < 0.15)


@SORTED
def test_gains_and_fixed_factors_are_in_the_output_and_in_the_plain_factors(is_sorted):
    base = base_of("4-bit")
    layer = LoRASwitchLinear.from_base(base, random_factors(), 0.7)
    plain = np.array(layer.delta())
    layer.lora_e = mx.random.normal((E, R))
    layer.fixed_a, layer.fixed_b = mx.random.normal((E, 2, IN)), mx.random.normal((E, OUT, 2))
    gained = layer.lora_a * layer.lora_e[..., None]
    expected = 0.7 * layer.lora_b @ gained + layer.fixed_b @ layer.fixed_a
    assert np.allclose(layer.delta(), expected, atol=1e-4)
    assert not np.allclose(plain, expected, atol=1e-1)
    a, b = layer.plain_factors()
    assert (a.shape, b.shape) == ((E, R + 2, IN), (E, OUT, R + 2))
    assert np.allclose(0.7 * b @ a, expected, atol=1e-4)
    x, indices = rows(is_sorted)
    wanted = by_definition(x, indices, dense_weight(base) + expected, base)
    assert np.allclose(layer(x, indices, is_sorted), wanted, rtol=1e-4, atol=1e-3)


def test_fixed_factors_are_not_dropped():
    layer = LoRASwitchLinear.from_base(base_of("float"), random_factors(), 1.0, dropout=0.5)
    layer.lora_b = mx.zeros_like(layer.lora_b)
    layer.fixed_a, layer.fixed_b = random_factors()
    x, indices = rows(True)
    layer.train()
    assert mx.array_equal(layer(x, indices, True), layer(x, indices, True))


def test_each_expert_starts_from_a_draw_of_its_own():
    a, b = kaiming_factors("x.up_proj", 64, 32, 8, seed=1, experts=4)
    assert (a.shape, b.shape) == ((4, 8, 64), (4, 32, 8))
    assert 0.11 < mx.abs(a).max().item() <= 1 / 8
    assert not mx.array_equal(a[0], a[1])
    assert not b.any()
    assert mx.array_equal(a, kaiming_factors("x.up_proj", 64, 32, 8, seed=1, experts=4)[0])
    assert not mx.array_equal(a, kaiming_factors("x.up_proj", 64, 32, 8, seed=2, experts=4)[0])


@SORTED
@pytest.mark.parametrize("form", by_default(LAYOUTS, "4-bit", "mxfp4"))
def test_both_products_with_quantized_experts_are_one(form, is_sorted):
    mx.random.seed(3)
    base = base_of(form)
    x, indices = rows(is_sorted)
    d = mx.random.normal(base(x, indices).shape)

    def both(experts: nn.Module) -> tuple[mx.array, mx.array]:
        y = experts(x, indices, is_sorted)
        return y, mx.grad(lambda x: (experts(x, indices, is_sorted) * d).sum())(x)

    expected = [np.array(value) for value in both(base)]
    holder = nn.Module()
    holder.experts = base
    paths = use_measured_matmul(holder, "dense")
    assert isinstance(base, MeasuredQuantizedSwitchLinear)
    assert not paths.others
    for found, value in zip(both(base), expected, strict=True):
        assert np.allclose(found, value, rtol=1e-4, atol=1e-3)
    # Few rows are not sorted, and stay with the packed product.
    if not is_sorted:
        assert mx.array_equal(both(base)[0], expected[0])


def test_experts_too_large_in_float_stay_packed(monkeypatch):
    base = base_of("4-bit")
    x, indices = rows(True)
    expected = base(x, indices, True)
    holder = nn.Module()
    holder.experts = base
    use_measured_matmul(holder, "dense")
    assert not mx.array_equal(base(x, indices, True), expected)
    monkeypatch.setattr(matmul, "dense_experts_bytes", lambda: E * OUT * IN * 4 - 1)
    assert mx.array_equal(base(x, indices, True), expected)


def test_all_linear_takes_experts_and_shared_ones_but_no_router():
    def names(kind: str, targets: str = "all-linear") -> set[str]:
        paths = select_targets(tiny_moe(kind)[0], targets).paths
        return {path.removeprefix("model.layers.1.") for path in paths if ".layers.1." in path}

    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    three = ("gate_proj", "up_proj", "down_proj")
    assert names("gpt_oss") == attention | {f"mlp.experts.{name}" for name in three}
    assert names("qwen3_moe") == attention | {f"mlp.switch_mlp.{name}" for name in three}
    assert names("mixtral") == attention | {f"block_sparse_moe.switch_mlp.{name}" for name in three}
    shared = {f"mlp.{experts}.{name}" for experts in ("switch_mlp", "shared_expert") for name in three}
    assert names("qwen2_moe") == attention | shared
    assert names("gpt_oss", "mlp.router") == {"mlp.router"}
    assert names("qwen2_moe", "mlp.gate,shared_expert_gate") == {"mlp.gate", "mlp.shared_expert_gate"}
    assert names("qwen3_moe", "switch_mlp.up_proj") == {"mlp.switch_mlp.up_proj"}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_fresh_adapter_changes_nothing_and_a_moved_one_does(model):
    model, ids = model(), mx.array([[1, 2, 3, 4, 5] * 8])
    before, checksum = model(ids), weights_checksum(model)
    inject(model, select_targets(model).paths, rank=4, scale=2.0)
    assert np.allclose(model(ids), before, atol=1e-6)
    assert weights_checksum(model, frozenset({"lora_a", "lora_b"})) == checksum
    layer = next(layer for layer in adapter_layers(model).values() if isinstance(layer, LoRASwitchLinear))
    layer.lora_b = mx.full(layer.lora_b.shape, 0.05)
    assert not np.allclose(model(ids), before, atol=1e-3)


def test_the_trainable_parameters_are_exactly_the_factors():
    model = MODELS["gpt_oss-mxfp4"]()
    frozen = {name: value.shape for name, value in tree_flatten(model.parameters())}
    inject(model, select_targets(model, "experts.*").paths, rank=4, scale=1.0)
    found = {name: value.shape for name, value in adapter_parameters(model).items()}
    dims = {"gate_proj": (64, 64), "up_proj": (64, 64), "down_proj": (64, 64)}
    expected = {}
    for block in range(2):
        for name, (width, out) in dims.items():
            expected[f"model.layers.{block}.mlp.experts.{name}.lora_a"] = (4, 4, width)
            expected[f"model.layers.{block}.mlp.experts.{name}.lora_b"] = (4, out, 4)
    assert found == expected
    everything = {name.replace(".linear.", "."): value.shape for name, value in tree_flatten(model.parameters())}
    assert everything == {**frozen, **expected}


class PinnedRouter(nn.Module):
    """A router that keeps to the experts it chose first, and weighs them anew: the loss is then smooth.

    Every one of these mixtures weighs its chosen experts by a softmax among them, so an offset that all of
    them share changes no weight.
    """

    def __init__(self, router: nn.Module, k: int):
        super().__init__()
        self.router, self.k = router, k
        self._offset: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        scores = self.router(x)
        if self._offset is None:
            least = mx.sort(scores, axis=-1)[..., -self.k, None]
            self._offset = 20.0 * (scores >= least)
            mx.eval(self._offset)
        return scores + self._offset


def pin_routers(model: nn.Module, ids: mx.array) -> None:
    """Keep each token of `ids` at its experts of now."""
    for block in model.layers:
        parts = [(part, name) for part in block.children().values() for name in ("gate", "router") if name in part]
        for part, name in parts:
            part[name] = PinnedRouter(part[name], k=2)
    model(ids)


@pytest.mark.parametrize("width", [6, 40])  # 24 rows for the experts: not sorted; 160: sorted
@pytest.mark.parametrize("form", ["lora", "dora"])
@pytest.mark.parametrize("model", named(MODELS, "gpt_oss-mxfp4", "qwen3_moe"))
def test_gradients_equal_finite_differences(model, form, width):
    model = adapted(model(), form)
    arrays = token_arrays(batch(2, width, seed=3))
    before = plain_loss(model, arrays)[0].item()
    pin_routers(model, arrays["inputs"])
    assert plain_loss(model, arrays)[0].item() == pytest.approx(before, rel=1e-5)
    _, grads = nn.value_and_grad(model, lambda m, a: plain_loss(m, a)[0])(model, arrays)
    flat, start = dict(tree_flatten(grads)), adapter_parameters(model)
    for layer in adapter_layers(model).values():
        if form == "dora":
            layer.finish()  # no gradient goes through them, so they stand still here too
    experts = [name for name in start if start[name].ndim == 3 or ("switch_mlp" in name or "experts" in name)]
    assert len(experts) == 2 * 3 * (3 if form == "dora" else 2)
    for seed in range(6):
        # Every other direction moves the experts' factors alone: they must be right without the rest.
        moved = experts if seed % 2 else list(start)
        steps = {n: mx.random.normal(start[n].shape, key=mx.random.key(97 * seed + i)) for i, n in enumerate(moved)}
        ends = []
        for h in (3e-4, -3e-4):
            model.load_weights([(n, start[n] + h * step) for n, step in steps.items()], strict=False)
            ends.append(plain_loss(model, arrays)[0].item())
        model.load_weights(list(start.items()), strict=False)
        measured = (ends[0] - ends[1]) / 6e-4
        derivative = sum((flat[n] * step).sum().item() for n, step in steps.items())
        assert derivative == pytest.approx(measured, rel=0.02, abs=0.1), seed


@pytest.mark.parametrize("mode", CHECKPOINT_MODES)
@pytest.mark.parametrize("form", ["lora", "dora"])
@pytest.mark.parametrize("model", named(MODELS, "gpt_oss-mxfp4"))
def test_checkpointed_gradients_are_the_same_dropout_included(model, form, mode):
    def drawn(mode: str, kernels: bool, seed: int = 7) -> dict[str, mx.array]:
        made = adapted(model(), form)
        for layer in adapter_layers(made).values():
            layer.dropout.probability = 0.3
        made.train()
        mx.random.seed(seed)
        return gradients(made, mode, kernels, width=40)

    expected = drawn("none", kernels=False)
    assert_equal(drawn(mode, kernels=True), expected)
    other = drawn(mode, kernels=True, seed=8)
    assert any(not np.allclose(other[name], value, rtol=0.05) for name, value in expected.items())


@pytest.mark.parametrize("form", ["lora", "dora"])
@pytest.mark.parametrize("experts_only", [False, True])
@pytest.mark.parametrize("name", by_default(MODELS, "gpt_oss-mxfp4", "qwen3_moe-4bit"))
def test_training_lowers_the_loss_and_moves_the_factors_alone(name, experts_only, form):
    model = MODELS[name]()
    checksum = weights_checksum(model)
    experts = "experts.*" if name.startswith("gpt_oss") else "switch_mlp.*"
    inject(model, select_targets(model, experts if experts_only else "all-linear").paths, 4, scale=2.0, layer_type=form)
    before = adapter_parameters(model)
    step, b = make_step(model), batch(2, 40, seed=5)
    losses = [step([b]).loss_sum.item() / b.mask.sum() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.2
    after = adapter_parameters(model)
    assert not [name for name, value in after.items() if mx.array_equal(value, before[name])]
    assert weights_checksum(model, frozenset({"lora_a", "lora_b", "m"})) == checksum


@pytest.mark.parametrize("init", ["kaiming", "pissa", "svd"])
@pytest.mark.parametrize("model", named(MODELS, "gpt_oss-mxfp4", "qwen3_moe"))
def test_every_start_leaves_a_mixture_as_it_was(model, init):
    model, ids = model(), mx.array([[1, 2, 3, 4, 5] * 8])
    before = model(ids)
    inject(model, select_targets(model).paths, rank=4, scale=2.0, init=init)
    assert np.allclose(model(ids), before, atol=1e-4)
    layers = [layer for layer in adapter_layers(model).values() if isinstance(layer, LoRASwitchLinear)]
    for layer in layers:
        assert ("start_a" in layer, "lora_e" in layer) == (init == "pissa", init == "svd")
        layer.lora_a = layer.lora_a + 0.1
        layer.lora_b = layer.lora_b + 0.1
        if init == "svd":
            layer.lora_e = layer.lora_e + 1.0
    assert not np.allclose(model(ids), before, atol=1e-2)


def test_pissa_of_experts_starts_from_each_ones_principal_directions():
    model = tiny_moe("qwen3_moe")[0]
    inject(model, select_targets(model, "switch_mlp.up_proj").paths, rank=4, scale=2.0, init="pissa")
    layer = model.layers[1].mlp.switch_mlp.up_proj
    found = np.array(2.0 * layer.lora_b @ layer.lora_a)
    for expert in range(4):
        u, s, vt = np.linalg.svd(np.array(layer.linear.weight[expert], np.float64))
        assert np.allclose(found[expert], (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5)


@pytest.mark.parametrize(("width", "out"), [(96, 8), (8, 40)])
def test_merged_cycles_of_experts_are_their_sum_and_grow_no_wider_than_the_layer(width, out):
    base = SwitchLinear(width, out, E)
    layer = LoRASwitchLinear.from_base(base, (mx.zeros((E, R, width)), mx.zeros((E, out, R))), 0.7)
    total = mx.zeros((E, out, width))
    for _ in range(3):
        a, b = mx.random.normal((E, R, width)), mx.random.normal((E, out, R))
        layer.merge(a, b)
        total = total + 0.7 * b @ a
        assert np.allclose(layer.delta(), total, atol=1e-4)
    assert layer.fixed_a.shape[1] == min(width, out) == layer.fixed_b.shape[2]
    assert "fixed_a" not in layer.trainable_parameters()
