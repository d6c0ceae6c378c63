"""Adapter layers: outputs, gradients and what they fuse to are a dense weight's; targets, storage, mlx-lm and PEFT."""

from __future__ import annotations

import json
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import by_dtype, weights_checksum
from conftest import quantized, tiny_model
from make_adapters import TOKENS, make_adapter
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load as mlx_lm_load
from tiers import by_default

from mlx_lora.adapters.base import EMBEDDING, LINEAR, SWITCH, AdapterLayer, base_dims, dense_weight
from mlx_lora.adapters.inject import (
    REGISTRY,
    adapter_layers,
    adapter_parameters,
    inject,
    kaiming_factors,
    select_targets,
)
from mlx_lora.adapters.lora import (
    DoRALinear,
    LoRALinear,
    QALoRAEmbedding,
    QALoRALayer,
    QALoRALinear,
    QALoRASwitchLinear,
    group_update,
)
from mlx_lora.config.settings import ModelSettings
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, load_factors, save_adapter
from mlx_lora.exporters.fuse import fuse_adapter
from mlx_lora.exporters.peft import write_peft
from mlx_lora.models.folder import base_fingerprint
from mlx_lora.models.load import load_base
from mlx_lora.utils.errors import InputError

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


ALL = "all-linear,embed_tokens"


@pytest.mark.parametrize("bits", [None, 4])
def test_fresh_adapter_changes_nothing_and_a_moved_one_does(bits):
    model = tiny_model()
    if bits:
        quantized(model, bits)
    tokens = mx.array([[1, 2, 3, 4, 5]])
    before, checksum = model(tokens), weights_checksum(model)
    inject(model, select_targets(model, ALL).paths, rank=4, scale=2.0)
    assert mx.array_equal(model(tokens), before)
    assert weights_checksum(model, frozenset({"lora_a", "lora_b"})) == checksum
    layer = next(iter(adapter_layers(model).values()))
    layer.lora_b = mx.full(layer.lora_b.shape, 0.05)
    assert not np.allclose(model(tokens), before, atol=1e-3)


def test_trainable_set_is_exactly_the_factors():
    model = quantized(tiny_model())
    targets = select_targets(model)
    inject(model, targets.paths, rank=4, scale=1.0)
    names = set(adapter_parameters(model))
    assert names == {f"{path}.{leaf}" for path in targets.paths for leaf in ("lora_a", "lora_b")}
    assert len(targets.paths) == 2 * 7
    assert all("embed" not in path for path in targets.paths)


def test_factors_depend_on_seed_and_path_only():
    a, b = kaiming_factors("x.q_proj", 64, 32, 8, seed=1)
    assert mx.array_equal(a, kaiming_factors("x.q_proj", 64, 32, 8, seed=1)[0])
    assert not mx.array_equal(a, kaiming_factors("x.q_proj", 64, 32, 8, seed=2)[0])
    assert not mx.array_equal(a, kaiming_factors("x.k_proj", 64, 32, 8, seed=1)[0])
    assert a.shape == (64, 8)
    assert b.shape == (8, 32)
    assert mx.abs(a).max().item() <= 1 / 8
    assert mx.abs(a).max().item() > 0.11
    assert not b.any()


def test_targets_by_name_pattern_and_depth():
    model = tiny_model(tie_word_embeddings=False)
    assert select_targets(model, "q_proj,v_proj", 1).paths == (
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    )
    assert select_targets(model, "self_attn.*").keys == (
        "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
    )  # fmt: skip
    assert select_targets(model, "q_proj", 0) == select_targets(model, "q_proj")  # as in mlx-lm
    uneven = select_targets(model, "layers.0.mlp.*,layers.1.self_attn.q_proj,lm_head")
    assert uneven.keys == uneven.paths
    assert "lm_head" in uneven.paths
    assert select_targets(model, "embed_tokens").paths == ("model.embed_tokens",)


def test_every_unmatched_target_is_named_with_what_exists():
    model = tiny_model()
    with pytest.raises(InputError, match=r"'q_prj'.*did you mean q_proj.*'nothing'.*the layers are.*gate_proj"):
        select_targets(model, "q_prj,nothing,v_proj")
    with pytest.raises(InputError, match="outside the last 1 blocks"):
        select_targets(model, "layers.0.mlp.up_proj", num_layers=1)
    with pytest.raises(InputError, match="the model has 2 blocks"):
        select_targets(model, "all-linear", num_layers=3)


def test_fingerprint_survives_quantization_and_dtype_but_not_another_model():
    config = {"model_type": "llama"}
    mark = base_fingerprint(tiny_model(), config)
    assert base_fingerprint(quantized(tiny_model()), config) == mark
    half = tiny_model()
    half.set_dtype(mx.bfloat16)
    assert base_fingerprint(half, config) == mark
    adapted = tiny_model()
    inject(adapted, select_targets(adapted, ALL).paths, rank=4, scale=2.0)
    assert base_fingerprint(adapted, config) == mark
    assert base_fingerprint(tiny_model(seed=1), config) != mark
    assert base_fingerprint(tiny_model(), {"model_type": "mistral"}) != mark


def test_a_row_of_zeros_stays_one_when_fused():
    """Padded vocabularies have such rows; without a length they have no direction."""
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight[3] = 0
    fused = DoRALinear.from_base(linear, (mx.random.normal((IN, R)), mx.zeros((R, OUT))), 2.0).fuse()
    assert not fused.weight[3].any()
    assert np.allclose(fused.weight, linear.weight, atol=1e-6)
    assert fused.weight[4].any()


@pytest.mark.parametrize(
    ("folder", "targets"),
    [("tiny_folder", "all-linear,embed_tokens"), ("tiny_4bit_folder", "all-linear")],
)
def test_round_trip_here_and_in_stock_mlx_lm(folder, targets, request, tmp_path):
    path = request.getfixturevalue(folder)
    base = load_base(ModelSettings(model=str(path)))
    bare = np.array(base.model(TOKENS))
    chosen = select_targets(base.model, targets)
    inject(base.model, chosen.paths, 4, 1.5, layer_type="dora")
    for wrapped in adapter_layers(base.model).values():
        wrapped.lora_b = 0.1 * mx.random.normal(wrapped.lora_b.shape)
        wrapped.m = wrapped.m * 1.1
    expected = np.array(base.model(TOKENS))
    info = AdapterInfo("dora", 4, 6.0, 1.5, 0.0, chosen.num_layers, chosen.keys, base.model_id, None, base.fingerprint)
    save_adapter(tmp_path, base.model, info)
    again = load_base(ModelSettings(model=str(path)))
    assert load_adapter(again, tmp_path).method == "dora"
    assert np.allclose(again.model(TOKENS), expected, atol=1e-5)
    assert not np.allclose(bare, expected, atol=1e-2)
    stock, _ = mlx_lm_load(str(path), adapter_path=str(tmp_path))
    # The folder is float32, as mlx-lm then computes, whatever we compute in.
    assert np.allclose(stock(TOKENS), expected, atol=by_dtype(1e-3, 3e-2 * np.abs(expected).max()))


VOCABULARY = 11


def width_of(group: int) -> int:
    return 3 * group


def linear(bits: int = 4, group: int = 32, bias: bool = True) -> QALoRALinear:
    base = nn.Linear(width_of(group), OUT, bias=bias).to_quantized(group, bits)
    return QALoRALinear.from_base(base, (0.3 * mx.random.normal((3, R)), 0.3 * mx.random.normal((R, OUT))), 1.5)


def embedding(group: int = 32) -> QALoRAEmbedding:
    base = nn.Embedding(VOCABULARY, width_of(group)).to_quantized(group, 4)
    return QALoRAEmbedding.from_base(
        base, (0.3 * mx.random.normal((VOCABULARY, R)), 0.3 * mx.random.normal((R, 3))), 1.5
    )


def experts(group: int = 32) -> QALoRASwitchLinear:
    base = SwitchLinear(width_of(group), OUT, EXPERTS, bias=False).to_quantized(group, 4)
    factors = (
        0.3 * mx.random.normal((EXPERTS, R, 3)),
        0.3 * mx.random.normal((EXPERTS, OUT, R)),
    )
    return QALoRASwitchLinear.from_base(base, factors, 1.5)


@pytest.mark.parametrize("make", [linear, embedding, experts])
def test_fusing_changes_biases_only_and_computes_the_same(make):
    layer = make()
    model = nn.Sequential(layer)
    model.layers[0].freeze()
    before = dict(layer.base.parameters())
    update = np.array(layer.delta())
    survival = fuse_adapter(model, dequantize=False)
    fused = model.layers[0]
    assert type(fused) is type(layer.base)
    for name, array in before.items():
        assert mx.array_equal(fused[name], array).item() == (name != "biases"), name
    assert np.allclose(dense_weight(fused) - dense_weight(layer.base), update, atol=1e-6)
    assert next(iter(survival.values())).error < 1e-5


def test_half_precision_biases_lose_only_their_own_rounding():
    """The packed numbers stay in every dtype; what is lost is a rounded bias, not a step of the grid."""
    for dtype, bound in ((mx.float16, 2**-11), (mx.bfloat16, 2**-8)):
        layer = linear(bias=False)
        layer.linear.scales, layer.linear.biases = (layer.linear[n].astype(dtype) for n in ("scales", "biases"))
        wanted = np.array(layer.linear.biases.astype(mx.float32) + group_update(layer))
        model = nn.Sequential(layer)
        fuse_adapter(model, dequantize=False)
        found = np.array(model.layers[0].biases.astype(mx.float32))
        assert model.layers[0].biases.dtype == dtype
        assert (np.abs(found - wanted) <= bound * np.abs(wanted) + 1e-8).all()
        assert not np.array_equal(found, wanted)


def test_a_lora_whose_update_is_not_constant_in_groups_is_not_merged_so():
    base = nn.Linear(IN, OUT).to_quantized(32, 4)
    layer = LoRALinear.from_base(base, (mx.random.normal((IN, R)), mx.random.normal((R, OUT))), 1.0)
    assert group_update(layer) is None
    layer.lora_a = mx.repeat(layer.lora_a[::32], 32, axis=0)
    update = group_update(layer)
    assert update is not None
    assert np.allclose(mx.repeat(update, 32, axis=1), layer.delta(), atol=1e-5)


def adapted(folder, seed: int = 0):
    """Return a base with a QA-LoRA whose B is not zero, and the facts about it."""
    base = load_base(ModelSettings(model=str(folder)))
    targets = select_targets(base.model)
    inject(base.model, targets.paths, 4, 2.0, seed, layer_type="qa-lora")
    for number, layer in enumerate(adapter_layers(base.model).values()):
        layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    info = AdapterInfo(
        "qa-lora", 4, 8.0, 2.0, 0.0, targets.num_layers, targets.keys, base.model_id, None, base.fingerprint
    )
    return base, info


def test_stock_mlx_lm_and_we_load_the_folder(tiny_4bit_folder, tmp_path):
    base, info = adapted(tiny_4bit_folder)
    wanted = np.array(base.model(TOKENS).astype(mx.float32))
    save_adapter(tmp_path, base.model, info)
    theirs, _ = mlx_lm_load(str(tiny_4bit_folder), adapter_path=str(tmp_path))
    ours = load_base(ModelSettings(model=str(tiny_4bit_folder)))
    assert load_adapter(ours, tmp_path).method == "qa-lora"
    assert all(group_update(layer) is not None for layer in adapter_layers(ours.model).values())
    for model in (theirs, ours.model):
        assert np.allclose(model(TOKENS).astype(mx.float32), wanted, atol=by_dtype(2e-4, 1e-1))
    plain = load_base(ModelSettings(model=str(tiny_4bit_folder)))
    assert not np.allclose(plain.model(TOKENS).astype(mx.float32), wanted, atol=by_dtype(1e-2, 5e-1))


def test_training_goes_on_from_stored_factors_and_refuses_those_of_a_lora(tiny_4bit_folder, tmp_path):
    base, info = adapted(tiny_4bit_folder)
    save_adapter(tmp_path / "qa", base.model, info)
    again, _ = adapted(tiny_4bit_folder, seed=3)
    load_factors(again.model, tmp_path / "qa" / "adapters.safetensors", info.scale)
    for path, layer in adapter_layers(base.model).items():
        assert mx.array_equal(layer.lora_a, adapter_layers(again.model)[path].lora_a).item(), path
    plain = load_base(ModelSettings(model=str(tiny_4bit_folder)))
    inject(plain.model, select_targets(plain.model).paths, 4, 2.0)
    save_adapter(tmp_path / "lora", plain.model, info)
    with pytest.raises(InputError):
        load_factors(again.model, tmp_path / "lora" / "adapters.safetensors", info.scale)


@pytest.mark.parametrize(
    "base",
    [nn.Linear(64, 32), nn.Linear(64, 32).to_quantized(32, 4, mode="mxfp4"), nn.Embedding(9, 64)],
    ids=["float", "mxfp4", "embedding"],
)
def test_bases_without_biases_are_refused_by_name(base):
    model = nn.Module()
    model.layers, model.named = [], base
    with pytest.raises(InputError, match="named"):
        inject(model, ["named"], 4, 2.0, layer_type="qa-lora")


@pytest.mark.parity
@pytest.mark.parametrize("group", [32, 64])
def test_pefts_own_layer_computes_the_same(group):
    """PEFT multiplies the mean of a group by the number of groups, so its scale is g / G times ours for the same update."""
    torch = pytest.importorskip("torch")
    variants = pytest.importorskip("peft.tuners.lora.variants")
    layer = linear(4, group, bias=False)
    x = np.random.default_rng(0).normal(size=(2, 5, width_of(group))).astype(np.float32)
    theirs = torch.tensor(x, requires_grad=True)
    a = torch.tensor(np.array(layer.lora_a.T), requires_grad=True)
    b = torch.tensor(np.array(layer.lora_b.T), requires_grad=True)
    module = SimpleNamespace(
        lora_A={"default": SimpleNamespace(weight=a)},
        lora_B={"default": SimpleNamespace(weight=b)},
        lora_dropout={"default": torch.nn.Identity()},
        scaling={"default": 1.5 * group / 3},
        qalora_group_size={"default": group},
        training=True,
        in_features=width_of(group),
    )
    added = variants.QALoraLinearVariant.forward(module, "default", theirs, torch.zeros(2, 5, OUT))
    weights = mx.random.normal((2, 5, OUT), key=mx.random.key(7))
    (added * torch.tensor(np.array(weights))).sum().backward()

    def update(a: mx.array, b: mx.array, x: mx.array) -> mx.array:
        layer.lora_a, layer.lora_b = a, b
        return layer(x) - layer.linear(x)

    given = layer.lora_a, layer.lora_b, mx.array(x)
    assert np.allclose(update(*given), added.detach().numpy(), atol=1e-4)
    found = mx.grad(lambda *given: (update(*given) * weights).sum(), argnums=(0, 1, 2))(*given)
    for ours, wanted in zip(found, (a.grad.T, b.grad.T, theirs.grad), strict=True):
        assert np.allclose(ours, wanted.numpy(), rtol=1e-3, atol=1e-4 * np.abs(wanted.numpy()).max())


def test_pefts_adapter_is_written_and_read_back(tiny_4bit_folder, tmp_path):
    make_adapter(tiny_4bit_folder, tmp_path / "own", form="qa-lora", strength=0.1)
    base = load_base(ModelSettings(model=str(tiny_4bit_folder)))
    load_adapter(base, tmp_path / "own")
    wanted = np.array(base.model(TOKENS))
    write_peft(tmp_path / "peft", base.model, "some/base", 0.0, qalora=True)
    own = json.loads((tmp_path / "own" / "adapter_config.json").read_text())  # with a type that mlx-lm knows
    assert (own["fine_tune_type"], own["mlx_lora"]["method"]) == ("lora", "qa-lora")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["use_qalora"], config["qalora_group_size"]) == (True, 32)
    again = load_base(ModelSettings(model=str(tiny_4bit_folder)))
    load_adapter(again, tmp_path / "peft")
    assert np.allclose(again.model(TOKENS), wanted, atol=1e-4)
    assert all(group_update(layer) is not None for layer in adapter_layers(again.model).values())
    for change in ({"use_qalora": False}, {"qalora_group_size": 48}):
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, **change}))
        fresh = load_base(ModelSettings(model=str(tiny_4bit_folder)))
        with pytest.raises(InputError):
            load_adapter(fresh, tmp_path / "peft")


def test_an_ordinary_lora_is_not_written_as_pefts_qalora(tiny_4bit_folder, tmp_path):
    make_adapter(tiny_4bit_folder, tmp_path / "own")
    base = load_base(ModelSettings(model=str(tiny_4bit_folder)))
    load_adapter(base, tmp_path / "own")
    with pytest.raises(InputError):
        write_peft(tmp_path / "peft", base.model, "some/base", 0.0, qalora=True)
