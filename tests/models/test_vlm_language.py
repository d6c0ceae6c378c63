"""Language models that mlx-vlm has and mlx-lm has not; tests/models/test_architectures.py takes some through training."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures.build import tiny_architecture, tiny_config, write_architecture
from architectures.saved import auto_class, config_of_transformers
from architectures.tiny import shrunk_package
from make_adapters import make_adapter
from mlx.utils import tree_flatten
from run_cli import one_line, refused, run, succeeds

from mlx_lora.adapters.base import LINEAR
from mlx_lora.adapters.inject import adapt_model, adapter_layers
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.exporters.peft import COMPARED, peft_path
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.models import vlm_language
from mlx_lora.models.config import architecture_of
from mlx_lora.models.load import load_base
from mlx_lora.models.meta import outline_of_config
from mlx_lora.trainer.fit import outlined_shape


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mamba9"}, "mamba9"),
        ({"model_type": "../x"}, "../x"),
        (shrunk_package("llada2_moe", {}, {}, {}), "diffusion"),
        ({"model_type": "sam3"}, "sam3"),
        ({"model_type": "flux2"}, "flux2"),
    ],
    ids=["unknown", "path", "diffusion", "segmentation", "pictures"],
)
def test_what_is_no_language_model_is_refused_in_one_line(tmp_path, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {f"w{n}": mx.zeros(2) for n in range(9)})
    one_line(run("generate", "--model", tmp_path, "--prompt", "x"), said)


def test_without_mlx_vlm_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(vlm_language, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="mlx-lora\\[vision\\]"):
        architecture_of(tiny_config("k2_horizon"))


@pytest.mark.parametrize("name", ["glm_ocr", "qwen3_5_text"])
def test_positions_are_those_of_this_call(name):
    """mlx-vlm's models keep the positions of the last rows, which may have been fewer or longer."""
    ids = mx.array([[5, 6, 7, 8, 9, 10, 11]])
    model = tiny_architecture(name)
    expected = model(ids)
    model(mx.array([[5, 6], [7, 8]]))
    assert mx.allclose(model(ids), expected, atol=1e-6)
    cache = model.make_cache()
    parts = [model(ids[:, begin:end], cache=cache) for begin, end in ((0, 4), (4, 5), (5, 7))]
    assert mx.allclose(mx.concatenate(parts, axis=1), expected, atol=1e-5)


def test_a_row_shorter_than_a_block_of_keys_writes_to_its_own_memory_only():
    """MLX keeps an array's size in front of its numbers, so a write before them shows in the memory that it counts."""
    model = tiny_architecture("qwen4_exp")
    mx.eval(model(mx.array([[5, 6]])))
    assert mx.get_active_memory() < 2**40


def test_long_rows_choose_their_keys_without_computing_in_between():
    outline = outline_of_config(tiny_config("deepseek_v4"), mx.float32)
    blocks = outlined_shape(outline, train_settings({"model": "x"})).blocks
    short, long = (blocks[1].memory.at(1, width, on_gpu=True).kept for width in (2048, 4096))
    assert 1.9 < long / short < 5


def test_the_tower_is_left_to_those_who_see(tmp_path):
    folder = write_architecture(tmp_path / "m", "fastvlm")
    weights = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(str(folder / "model.safetensors"), {**weights, "vision_tower.patch.weight": mx.zeros((2, 2))})
    model = load_base(ModelSettings(model=str(folder), dtype="float32")).model
    assert {name for name, _ in tree_flatten(model.parameters())} == set(weights)


@pytest.mark.parametrize("name", ["k2_horizon", "qwen3_5_text"])
def test_mlx_vlm_computes_the_same_with_an_exported_adapter(tmp_path, name):
    from mlx_vlm.trainer.peft.utils import apply_lora_layers
    from mlx_vlm.utils import load_model

    folder = write_architecture(tmp_path / "m", name)
    adapter = make_adapter(folder, tmp_path / "a")
    succeeds("export", "--model", folder, "--adapter-path", adapter, "--to", "mlx-vlm", "--out", tmp_path / "v")
    base, ids = load_base(ModelSettings(model=str(folder), dtype="float32")), mx.array([[3, 4, 5, 6]])
    plain = base.model(ids)
    load_adapter(base, adapter)
    theirs = (
        apply_lora_layers(load_model(folder, lazy=True), str(tmp_path / "v")).language_model(ids, cache=None).logits
    )
    assert mx.allclose(theirs, base.model(ids), atol=1e-4)
    assert not mx.allclose(theirs, plain, atol=1e-2)
    one_line(export(folder, adapter, "mlx-lm", tmp_path / "l"), "mlx-vlm")


def test_adapters_that_another_program_would_read_wrongly_are_not_written(tmp_path):
    folder = write_architecture(tmp_path / "m", "kolibri1")
    experts = make_adapter(folder, tmp_path / "a")
    one_line(export(folder, experts, "mlx-vlm", tmp_path / "v"), "experts")
    plain = write_architecture(tmp_path / "k", "k2_horizon")
    refused(export(plain, make_adapter(plain, tmp_path / "b"), "peft", tmp_path / "p"), "fuse")


@pytest.mark.parity
@pytest.mark.parametrize("name", sorted(COMPARED))
def test_peft_gets_the_names_that_transformers_has(name):
    """The layers of experts have none there; PEFT is not given these."""
    import torch

    made = config_of_transformers(name)
    with torch.device("meta"):
        theirs = {
            path
            for path, module in auto_class(made).from_config(made).named_modules()
            if isinstance(module, torch.nn.Linear)
        }
    model = tiny_architecture(name)
    adapt_model(model, AdapterSettings(rank=2), seed=0)
    ours = {peft_path(path, name) for path, layer in adapter_layers(model).items() if layer.OVER is LINEAR}
    assert ours
    assert ours <= theirs


def export(model, adapter, to, out):
    return run("export", "--model", model, "--adapter-path", adapter, "--to", to, "--out", out)


class Choosing(nn.Module):
    """Takes the two largest of some numbers, as a model takes experts: by indices that MLX has no gradient by."""

    def __init__(self, name: str):
        super().__init__()
        self.w, self._name = mx.array([3.0, 0.5, 2.0, 5.0]), name

    def __call__(self, x: mx.array) -> mx.array:
        scores = x * self.w
        if self._name == "where":
            chosen = mx.where(scores[:2] > 2, 1, 0)
        else:
            chosen = getattr(mx, self._name)(scores, **({"kth": 2} if self._name == "argpartition" else {}))
        return (scores[chosen] * mx.arange(chosen.size)).sum()


@pytest.mark.parametrize("name", ["argsort", "argpartition", "argmax", "where"])
def test_no_gradient_flows_into_what_a_model_chooses_by(name):
    model, x = Choosing(name), mx.array([1.0, 2.0, 3.0, 4.0])
    gradient = nn.value_and_grad(model, lambda model: model(x))
    with pytest.raises(ValueError, match="indices"):
        mx.eval(gradient(model))
    with left_unchanged(model):
        _, found = gradient(model)
    step = 1e-2  # the sum is linear in w as long as the order stays
    for number in range(4):
        there = Choosing(name)
        there.w = model.w + step * (mx.arange(4) == number)
        assert found["w"][number].item() == pytest.approx(((there(x) - model(x)) / step).item(), abs=1e-2)
