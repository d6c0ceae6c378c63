"""Adapters of experts as files: saved, loaded, read by stock mlx-lm, folded in, and refused where nothing can hold them."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import quantized, write_folder
from make_adapters import adapt_and_save, loaded
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load as mlx_lm_load
from mlx_lm.utils import load_model
from resumed_runs import metrics
from run_cli import one_line, run, succeeds
from tiers import by_default
from tiny_moe import close, logits, tiny_moe, with_quantized_experts

from mlx_lora.adapters.inject import adapter_layers, adapter_parameters, inject, select_targets
from mlx_lora.adapters.lora import DoRASwitchLinear, LoRASwitchLinear
from mlx_lora.exporters.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, AdapterInfo, load_adapter, save_adapter
from mlx_lora.exporters.fuse import fuse_adapter
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

FORM_4BIT = {"group_size": 32, "bits": 4, "mode": "affine"}


def folder_of(kind: str, tmp_path_factory):
    name, _, form = kind.partition("-")
    model, config = tiny_moe(name)
    if form in ("mxfp4", "nvfp4"):
        layout = {"mxfp4": {"group_size": 32, "bits": 4}, "nvfp4": {"group_size": 16, "bits": 4}}[form]
        model, config = with_quantized_experts(model, config, {**layout, "mode": form})
    elif form:
        config = {**config, "quantization": FORM_4BIT}
        quantized(model)
    return write_folder(tmp_path_factory.mktemp(kind), model, config)


KINDS = ["gpt_oss-mxfp4", "qwen3_moe", "qwen3_moe-4bit", "mixtral-nvfp4", "qwen2_moe"]


@pytest.fixture(scope="module", params=by_default(KINDS, KINDS[0], KINDS[2]))
def folder(request, tmp_path_factory):
    return folder_of(request.param, tmp_path_factory)


@pytest.mark.parametrize(("targets", "num_layers"), [("all-linear", -1), ("*.up_proj,down_proj", 1)])
def test_round_trip_here_and_in_stock_mlx_lm(folder, targets, num_layers, tmp_path):
    adapt_and_save(folder, tmp_path / "a", targets, num_layers)
    base, bare = loaded(folder, tmp_path / "a"), logits(loaded(folder).model)
    assert any(isinstance(layer, LoRASwitchLinear) for layer in adapter_layers(base.model).values())
    ours = logits(base.model)
    assert not close(ours, bare, 1e-2)
    stock, _ = mlx_lm_load(str(folder), adapter_path=str(tmp_path / "a"))
    assert close(logits(stock), ours, 1e-4)
    shapes = {name: value.shape for name, value in mx.load(str(tmp_path / "a" / WEIGHTS_FILE)).items()}
    theirs = {n: v.shape for n, v in tree_flatten(stock.parameters()) if n.rsplit(".", 1)[-1] in ("lora_a", "lora_b")}
    assert shapes == theirs


def test_what_was_saved_is_what_was_trained(folder, tmp_path):
    expected = np.array(adapt_and_save(folder, tmp_path / "a"))
    base = loaded(folder, tmp_path / "a")
    assert np.allclose(base.model(mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])), expected, atol=1e-5)


@pytest.mark.parametrize(
    "keys", [None, ["mlp.switch_mlp.up_proj", "block_sparse_moe.switch_mlp.up_proj", "mlp.experts.up_proj"]]
)
def test_an_adapter_of_stock_mlx_lm_loads_here(folder, keys, tmp_path):
    model, _ = load_model(folder)
    names = {path.split(".", 3)[3] for path, _ in model.named_modules() if path.startswith("model.layers.1.")}
    shape = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    if keys:
        shape["keys"] = [key for key in keys if key in names]
    model.freeze()
    linear_to_lora_layers(model, 1, shape)
    factors = [(n, 0.02 * mx.random.normal(v.shape)) for n, v in adapter_parameters(model).items()]
    assert any(value.ndim == 3 for _, value in factors)
    # Without keys mlx-lm adapts the router too.
    assert any(".gate." in name or ".router." in name for name, _ in factors) == (keys is None)
    model.load_weights(factors, strict=False)
    mx.save_safetensors(str(tmp_path / WEIGHTS_FILE), dict(factors))
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": shape}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    base = loaded(folder, tmp_path)
    assert close(logits(base.model), logits(model), 1e-4)


def test_dora_of_experts_round_trips(folder, tmp_path):
    base = loaded(folder)
    bare = logits(base.model)
    chosen = select_targets(base.model)
    inject(base.model, chosen.paths, 4, 1.5, layer_type="dora")
    for wrapped in adapter_layers(base.model).values():
        wrapped.lora_b = 0.1 * mx.random.normal(wrapped.lora_b.shape)
        wrapped.m = wrapped.m * 1.1
    expected = logits(base.model)
    info = AdapterInfo("dora", 4, 6.0, 1.5, 0.0, chosen.num_layers, chosen.keys, base.model_id, None, base.fingerprint)
    save_adapter(tmp_path, base.model, info)
    again = loaded(folder)
    assert load_adapter(again, tmp_path).method == "dora"
    assert any(isinstance(layer, DoRASwitchLinear) for layer in adapter_layers(again.model).values())
    assert close(logits(again.model), expected, 1e-4)
    assert not close(bare, expected, 1e-2)


def fuse(model, folder, *extra):
    ran = succeeds("fuse", "--model", model, "--adapter-path", folder / "a", "--out", folder / "f", "--json", *extra)
    return json.loads(ran.out), loaded(folder / "f")


def test_fused_and_dequantized_it_gives_the_adapters_logits(folder, tmp_path):
    adapt_and_save(folder, tmp_path / "a")
    bare, expected = (logits(loaded(folder, adapter).model) for adapter in (None, tmp_path / "a"))
    report, fused = fuse(folder, tmp_path, "--dequantize")
    stored = {name: value.dtype for name, value in tree_flatten(mx.load(str(tmp_path / "f" / "model.safetensors")))}
    # A microscaling format is bfloat16 when it is float, and its experts' sum with the adapter is rounded to that.
    rounded = any("switch_mlp" in n or "experts" in n for n, dtype in stored.items() if dtype == mx.bfloat16)
    in_halves = device.compute_dtype() != mx.float32 and "4bit" in folder.name
    assert rounded == (in_halves or any(form in folder.name for form in ("mxfp4", "nvfp4")))
    assert report["error_most"] < (0.1 if rounded else 1e-4)
    assert close(logits(fused.model), expected, 0.05 if rounded else 1e-3)
    assert not close(bare, expected, 0.2)
    assert "quantization" not in json.loads((tmp_path / "f" / "config.json").read_text())
    assert not any(isinstance(module, QuantizedSwitchLinear) for module in fused.model.modules())


@pytest.mark.long
@pytest.mark.float32("a code that rounds to its neighbor changes more than rounding")
def test_fused_it_is_quantized_as_its_base_was(folder, tmp_path):
    adapt_and_save(folder, tmp_path / "a")
    base, in_memory = loaded(folder), [loaded(folder, tmp_path / "a") for _ in range(2)]
    report, fused = fuse(folder, tmp_path)
    for new_grid, adapted in enumerate(in_memory):
        assert report["layers"] == len(fuse_adapter(adapted.model, dequantize=False, new_grid=bool(new_grid)))
    assert any(close(logits(fused.model), logits(adapted.model), 1e-4) for adapted in in_memory)
    assert not close(logits(fused.model), logits(base.model), 1e-2)
    kinds = {
        path: type(m) for path, m in base.model.named_modules() if isinstance(m, (SwitchLinear, QuantizedSwitchLinear))
    }
    after = dict(fused.model.named_modules())
    for path, kind in kinds.items():
        assert type(after[path]) is kind
        if "scales" in after[path]:
            old = dict(base.model.named_modules())[path]
            assert (after[path].bits, after[path].group_size, after[path].mode) == (old.bits, old.group_size, old.mode)
    stock, _ = mlx_lm_load(str(tmp_path / "f"))
    assert close(logits(stock), logits(fused.model), 1e-4)


@pytest.mark.long
def test_gpt_oss_as_it_is_published(tmp_path):
    # One interleaved tensor for gate and up, packed bytes, and Hugging Face's own quantization entry.
    model, config = with_quantized_experts(*tiny_moe("gpt_oss"))
    expected = logits(model)
    weights = dict(tree_flatten(model.parameters()))
    for block in range(2):
        experts = f"model.layers.{block}.mlp.experts."
        for leaf, ending in (("weight", "_blocks"), ("scales", "_scales"), ("bias", "_bias")):
            gate, up, down = (weights.pop(f"{experts}{name}_proj.{leaf}") for name in ("gate", "up", "down"))
            both = mx.stack([gate, up], axis=2).flatten(1, 2)  # rows in turns
            for name, value in (("gate_up_proj", both), ("down_proj", down)):
                bytes_ = value.view(mx.uint8).reshape(*value.shape[:-1], -1, 16) if leaf == "weight" else value
                weights[f"{experts}{name}{ending}"] = mx.contiguous(bytes_)
    config.pop("quantization")
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    folder = write_folder(tmp_path / "published", model, config)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    assert close(logits(loaded(folder).model), expected, 1e-4)
    adapt_and_save(folder, tmp_path / "a")
    adapted = loaded(folder, tmp_path / "a")
    unfused = logits(adapted.model)
    _, packed = fuse(folder, tmp_path)
    fuse_adapter(adapted.model, dequantize=False)
    assert close(logits(packed.model), logits(adapted.model), 1e-4)
    assert isinstance(packed.model.layers[0].mlp.experts.up_proj, QuantizedSwitchLinear)
    _, dense = fuse(folder, tmp_path, "--dequantize", "--force")
    assert close(logits(dense.model), unfused, 0.05)
    assert not close(unfused, expected, 0.2)


@pytest.mark.parametrize(("form", "kind"), [("gguf-adapter", "mixtral"), ("hf", "qwen3_moe")])
def test_exports_that_cannot_hold_experts_say_so(form, kind, tmp_path, tmp_path_factory):
    folder = folder_of(kind, tmp_path_factory)
    adapt_and_save(folder, tmp_path / "a")
    ran = run("export", "--model", folder, "--adapter-path", tmp_path / "a", "--to", form, "--out", tmp_path / "out")
    one_line(ran, kind)
    assert not (tmp_path / "out").exists()


METHODS = [("--method", method) for method in ("dora", "pissa", "adalora", "relora")]


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        (),
        *(pytest.param(flags, marks=() if "dora" in flags else pytest.mark.slow) for flags in METHODS),
        pytest.param(("--grad-checkpoint", "block", "--dropout", 0.1), marks=pytest.mark.slow),
    ],
)
def test_the_train_command_trains_experts(more, chats, tmp_path, tmp_path_factory):
    folder = folder_of("qwen3_moe-4bit", tmp_path_factory)
    succeeds(
        "train", "--model", folder, "--data", chats, "--adapter-path", tmp_path / "a", "--iters", 12, "--learning-rate",
        "5e-3", "--batch-tokens", 256, "--max-seq-length", 128, "--steps-per-report", 4, "--rank", 4, *more,
    )  # fmt: skip
    lines = metrics(tmp_path / "a")
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    assert losses[-1] < losses[0] - 0.1
    names = set(mx.load(str(tmp_path / "a" / WEIGHTS_FILE)))
    assert "model.layers.1.mlp.switch_mlp.down_proj.lora_b" in names
    assert not any(".gate." in name for name in names)
    succeeds("generate", "--model", folder, "--adapter-path", tmp_path / "a", "--prompt", "Say 1.", "--max-tokens", 3)
    ran = run("evaluate", "--model", folder, "--adapter-path", tmp_path / "a", "--data", chats, "--json")
    assert json.loads(ran.out)["loss"] < losses[0]
    if more in METHODS[1:]:  # stored as plain LoRA, which stock mlx-lm loads
        base = loaded(folder, tmp_path / "a")
        flags = ("--model", folder, "--adapter-path", tmp_path / "a", "--to", "mlx-lm", "--out", tmp_path / "m")
        assert run("export", *flags).code == 0
        stock, _ = mlx_lm_load(str(folder), adapter_path=str(tmp_path / "m"))
        assert close(logits(stock), logits(base.model), 1e-3)


def test_another_number_of_experts_is_named(tmp_path, tmp_path_factory):
    folder = folder_of("qwen3_moe", tmp_path_factory)
    adapt_and_save(folder, tmp_path)
    stored = mx.load(str(tmp_path / WEIGHTS_FILE))
    name = "model.layers.0.mlp.switch_mlp.up_proj.lora_a"
    mx.save_safetensors(str(tmp_path / WEIGHTS_FILE), {**stored, name: stored[name][:3]})
    with pytest.raises(InputError, match=rf"{name} is \(3, 4, 64\), the model needs \(4, 4, 64\)"):
        load_adapter(loaded(folder), tmp_path)
