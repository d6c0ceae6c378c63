"""Every adapter layer over every form of its base: outputs and gradients are those of a dense weight, and so is what it fuses to."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear
from tiers import by_default

from mlx_lora.adapters.base import EMBEDDING, LINEAR, SWITCH, AdapterLayer, base_dims, dense_weight
from mlx_lora.adapters.inject import REGISTRY
from mlx_lora.adapters.qa_lora import QALoRALayer

IN, OUT, R, EXPERTS, SCALE = 96, 33, 5, 3, 1.5
FORMS = {
    "float": None,
    **{f"{bits}-bit": (32, bits, "affine") for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": (32, 4, "mxfp4"),
    "mxfp8": (32, 8, "mxfp8"),
    "nvfp4": (16, 4, "nvfp4"),
}
KINDS = list(REGISTRY.values())
FITTING = [
    (kind, form)
    for kind in KINDS
    for form in FORMS
    # QA-LoRA merges into the biases of affine weights, and an embedding in another mode computes in bfloat16.
    if form.endswith("-bit") or not (issubclass(kind, QALoRALayer) or (kind.OVER is EMBEDDING and form != "float"))
]
OFTEN = [(kind, form) for kind, form in FITTING if form in ("float", "3-bit", "mxfp4")]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def base_of(over: tuple[type, ...], form: str) -> nn.Module:
    mx.random.seed(1)
    if over is EMBEDDING:
        base = nn.Embedding(OUT, IN)
    else:
        bias = form != "float"
        base = nn.Linear(IN, OUT, bias=bias) if over is LINEAR else SwitchLinear(IN, OUT, EXPERTS, bias=bias)
        if bias:
            base.bias = mx.random.normal(base.bias.shape)
    return base if FORMS[form] is None else base.to_quantized(*FORMS[form])


def layer_of(kind: type[AdapterLayer], form: str, dropout: float = 0.0) -> AdapterLayer:
    """Return a layer whose factors, and lengths, are not those it starts from."""
    base = base_of(kind.OVER, form)
    rows, columns = kind.factor_dims(base)
    shapes = (EXPERTS, R, rows), (EXPERTS, columns, R)
    if kind.OVER is not SWITCH:
        shapes = (rows, R), (R, columns)
    layer = kind.from_base(base, [0.2 * mx.random.normal(shape) for shape in shapes], SCALE, dropout)
    if "m" in layer:
        layer.m = layer.m * (1 + 0.2 * mx.random.normal(layer.m.shape))
    return layer


def inputs_of(over: tuple[type, ...]) -> list[tuple]:
    """Return arguments of a call in each form: tokens and a tied head's rows; a mixture's many sorted rows, and few."""
    x = mx.random.normal((3, 7, IN))
    if over is SWITCH:
        many = mx.random.normal((70, 1, IN)), mx.sort(mx.random.randint(0, EXPERTS, (70,))), True
        return [many, (x[:, :, None, None], mx.random.randint(0, EXPERTS, (3, 7, 2)), False)]
    return [(mx.array([[0, 7, 32, 7]]),), (x,)] if over is EMBEDDING else [(x,)]


def weight_by_definition(layer: AdapterLayer, through_lengths: bool = False) -> mx.array:
    """Return the dense weight that a layer stands for: W + D, for DoRA with rows of length m, which get no gradient."""
    a, b, over = layer.lora_a, layer.lora_b, layer.OVER
    if isinstance(layer, QALoRALayer):  # one number for each group of the base
        group, axis = layer.base.group_size, {LINEAR: 0, SWITCH: 2}.get(over)
        a, b = (a, mx.repeat(b, group, 1)) if axis is None else (mx.repeat(a, group, axis), b)
    product = b @ a if over is SWITCH else a @ b
    weight = dense_weight(layer.base).astype(mx.float32) + SCALE * (product.T if over is LINEAR else product)
    if "m" not in layer:
        return weight
    lengths = mx.linalg.norm(weight, axis=-1)
    return weight * (layer.m / (lengths if through_lengths else mx.stop_gradient(lengths)))[..., None]


def is_float(x: mx.array) -> bool:
    return mx.issubdtype(x.dtype, mx.floating)


def dense_call(layer: AdapterLayer, weight: mx.array, x: mx.array, indices: mx.array | None = None, *_) -> mx.array:
    """Return what a dense layer of the base's kind gives; floats that come to an embedding come to its tied head."""
    if layer.OVER is EMBEDDING:
        return x @ weight.T if is_float(x) else weight[x]
    y = x @ (weight.T if indices is None else weight[indices].swapaxes(-1, -2))
    if "bias" not in layer.base:
        return y
    return y + (layer.base.bias if indices is None else layer.base.bias[indices][..., None, :])


def called(layer: nn.Module, x: mx.array, *rest) -> mx.array:
    is_head = hasattr(layer, "as_linear") and is_float(x)
    return layer.as_linear(x) if is_head else layer(x, *rest)


def gradients(layer: AdapterLayer, function, x: mx.array, *rest) -> tuple[float, dict[str, mx.array]]:
    """Return the value of a weighted sum of outputs, and its gradient by the trained arrays and by x, if that is float."""
    trained = {name: layer[name] for name in layer.trained}
    d = mx.random.normal(function(x, *rest).shape, key=mx.random.key(7))

    def loss(trained: dict[str, mx.array], x: mx.array) -> mx.array:
        layer.update(trained)
        return (function(x, *rest) * d).sum()

    floats = is_float(x)
    value, found = mx.value_and_grad(loss, argnums=(0, 1) if floats else 0)(trained, x)
    layer.update(trained)
    return value.item(), {**found[0], "x": found[1]} if floats else found


@pytest.mark.parametrize(
    ("kind", "form"), by_default(FITTING, *OFTEN), ids=lambda value: getattr(value, "__name__", value)
)
def test_outputs_gradients_and_what_it_fuses_to_are_those_of_a_dense_weight(kind, form):
    layer = layer_of(kind, form)
    base, weight = layer.base, weight_by_definition(layer)
    assert base_dims(base) == ((OUT, IN) if kind.OVER is EMBEDDING else (IN, OUT))
    assert np.allclose(layer.delta(), weight - dense_weight(base), atol=1e-4)
    fused = layer.fuse()
    assert fused.weight.dtype == dense_weight(base).dtype
    rounding = 2e-4 if fused.weight.dtype == mx.float32 else 1e-2  # the microscaling modes are bfloat16
    for arguments in inputs_of(kind.OVER):
        value, found = gradients(layer, lambda *given: called(layer, *given), *arguments)
        wanted, expected = gradients(
            layer, lambda *given: dense_call(layer, weight_by_definition(layer), *given), *arguments
        )
        assert value == pytest.approx(wanted, rel=1e-4, abs=1e-2)
        assert found.keys() - {"x"} == set(layer.trained)
        for name, array in expected.items():
            assert np.allclose(found[name], array, rtol=1e-3, atol=1e-4 * mx.abs(array).max().item()), name
        if "m" in layer:  # with a gradient through the lengths it would be another one
            other = gradients(
                layer, lambda *given: dense_call(layer, weight_by_definition(layer, True), *given), *arguments
            )
            assert not np.allclose(other[1]["lora_a"], expected["lora_a"], rtol=1e-2)
        outputs = dense_call(layer, weight, *arguments)
        size = mx.abs(outputs).max().item()
        assert np.allclose(called(fused, *arguments).astype(mx.float32), outputs, atol=rounding * size)
        assert not np.allclose(called(base, *arguments).astype(mx.float32), outputs, atol=1e-2 * size)
    layer.finish()
    assert np.allclose(called(layer, *arguments), outputs, atol=1e-4 * size)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@each_kind
def test_float32_masters_do_not_promote_activations(kind, dtype):
    layer = layer_of(kind, "4-bit" if issubclass(kind, QALoRALayer) else "float")
    layer.base.set_dtype(dtype)
    assert layer.lora_a.dtype == mx.float32
    for x, *rest in inputs_of(kind.OVER):
        assert called(layer, x.astype(dtype) if is_float(x) else x, *rest).dtype == dtype


@each_kind
def test_dropout_acts_in_training_only(kind):
    layer = layer_of(kind, "4-bit", dropout=0.5)
    for arguments in inputs_of(kind.OVER):
        layer.eval()
        assert mx.array_equal(called(layer, *arguments), called(layer, *arguments))
        layer.train()
        assert not mx.array_equal(called(layer, *arguments), called(layer, *arguments))
    key, arguments = mx.random.key(3), inputs_of(kind.OVER)[0]
    assert mx.array_equal(layer(*arguments, key=key), layer(*arguments, key=key))
