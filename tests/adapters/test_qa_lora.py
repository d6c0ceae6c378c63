"""QA-LoRA layers: a dense reference and its gradients, PEFT's own layer, an exact merge into biases, storage, and refusals."""

from __future__ import annotations

import json
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import by_dtype
from make_adapters import TOKENS, make_adapter
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load as mlx_lm_load

from mlx_lora.adapters.base import dense_weight
from mlx_lora.adapters.inject import adapter_layers, inject, select_targets
from mlx_lora.adapters.lora import LoRALinear
from mlx_lora.adapters.qa_lora import QALoRAEmbedding, QALoRALinear, QALoRASwitchLinear, group_update
from mlx_lora.config.settings import ModelSettings
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, load_factors, save_adapter
from mlx_lora.exporters.fuse import fuse_adapter
from mlx_lora.exporters.peft import write_peft
from mlx_lora.models.load import load_base
from mlx_lora.utils.errors import InputError

IN, OUT, R, EXPERTS = 96, 33, 5, 3
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
    factors = 0.3 * mx.random.normal((EXPERTS, R, 3)), 0.3 * mx.random.normal((EXPERTS, OUT, R))
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
