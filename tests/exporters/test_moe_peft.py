"""Adapters of experts in PEFT: its logits on transformers' models are ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_folder
from make_adapters import adapt_and_save, as_peft, loaded
from mlx_lm.models.switch_layers import SwitchLinear
from run_cli import run, succeeds
from tiers import by_default
from tiny_moe import FEW, MANY, close, differ, logits, tiny_moe

from mlx_lora.adapters.inject import adapter_layers, inject
from mlx_lora.adapters.lora import LoRASwitchLinear
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.exporters.peft import PEFT_CONFIG, PEFT_WEIGHTS, THEIRS, expert_tensors, write_peft
from mlx_lora.utils.errors import InputError

KINDS = ["gpt_oss", "qwen3_moe", "qwen2_moe", "mixtral"]
EXPERTS = {"gpt_oss": "mlp.experts", "mixtral": "block_sparse_moe.switch_mlp"}
CLOSE, FAR = 1e-4, 1e-2


def judged(kind: str, folder: Path, scratch: Path, adapters: list[Path]) -> list[list[np.ndarray]]:
    """Return transformers' logits of FEW and MANY, bare and then with each of PEFT's adapters."""
    pytest.importorskip("peft")
    np.savez(scratch / "ids.npz", *(np.array(ids, np.int64) for ids in (FEW, MANY)))
    script = Path(__file__).parents[1] / "judge_moe.py"
    command = [sys.executable, script, kind, folder, scratch / "ids.npz", scratch / "out.npz", *adapters]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    with np.load(scratch / "out.npz") as found:
        flat = [found[f"arr_{i}"] for i in range(2 * len(adapters) + 2)]
    return [flat[i : i + 2] for i in range(0, len(flat), 2)]


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_exported_adapters_of_experts_give_our_logits_in_peft(kind, tmp_path):
    model, config = tiny_moe(kind)
    folder = write_folder(tmp_path / "base", model, config)
    experts = f"{EXPERTS.get(kind, 'mlp.switch_mlp')}.*"
    expected, exported = [logits(loaded(folder).model)], []
    for i, targets in enumerate(("all-linear", experts, "*.up_proj", "*.down_proj,q_proj", "layers.1.*.gate_proj")):
        adapt_and_save(folder, tmp_path / f"a{i}", targets)
        adapted = loaded(folder, tmp_path / f"a{i}")
        out = tmp_path / f"p{i}"
        succeeds("export", "--model", folder, "--adapter-path", tmp_path / f"a{i}", "--to", "peft", "--out", out)
        assert json.loads((out / PEFT_CONFIG).read_text())["target_parameters"]
        expected.append(logits(adapted.model))
        exported.append(out)
    found = judged(kind, folder, tmp_path, exported)
    for i, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        assert close(theirs, ours, CLOSE), i
        assert i == 0 or differ(theirs, expected[0], FAR), i


@pytest.mark.parametrize("in_turns", [False, True])
def test_joined_gate_and_up_hold_gains_fixed_factors_and_scales(in_turns):
    def layer(rank: int, scale: float) -> LoRASwitchLinear:
        factors = mx.random.normal((4, rank, 32)), mx.random.normal((4, 24, rank))
        made = LoRASwitchLinear.from_base(SwitchLinear(32, 24, 4), factors, scale)
        made.lora_e = mx.random.normal((4, rank))
        made.fixed_a, made.fixed_b = mx.random.normal((4, 2, 32)), mx.random.normal((4, 24, 2))
        return made

    kind, place = ("gpt_oss", "mlp.experts") if in_turns else ("qwen3_moe", "mlp.switch_mlp")
    gate, up = layer(3, 0.5), layer(5, 2.0)
    layers = {f"model.layers.7.{place}.gate_proj": gate, f"model.layers.7.{place}.up_proj": up}
    (tensor,) = expert_tensors(kind, layers)
    assert (tensor.parameter, tensor.module) == (f"model.layers.7.{THEIRS}.gate_up_proj", f"model.layers.7.{THEIRS}")
    assert tensor.rank == 3 + 2 + 5 + 2
    a = np.array(tensor.a).reshape(4, tensor.rank, 32)
    b = np.array(tensor.b).reshape(48, tensor.rank, 4)  # as PEFT reads them
    delta = tensor.scale * np.einsum("ore,eri->eoi", b, a)
    rows = (slice(0, None, 2), slice(1, None, 2)) if in_turns else (slice(0, 24), slice(24, None))
    for part, expected in zip(rows, (gate.delta(), up.delta()), strict=True):
        assert np.allclose(delta[:, part], expected, atol=1e-4)


def test_dora_and_unknown_families_are_refused_by_name(tmp_path):
    factors = mx.random.normal((4, 3, 32)), mx.random.normal((4, 24, 3))
    base, path = SwitchLinear(32, 24, 4), "model.layers.0.mlp.switch_mlp.up_proj"
    model, _ = tiny_moe("qwen3_moe")
    inject(model, (path, path.replace("0", "1")), 3, 1.0, layer_type="dora")
    with pytest.raises(InputError, match=r"switch_mlp.up_proj is a DoRA over experts, .* and 1 more"):
        write_peft(tmp_path, model, "some/base", 0.0)
    with pytest.raises(InputError, match=rf"{path}: .* we can write experts of gpt_oss"):
        expert_tensors("olmoe", {path: LoRASwitchLinear.from_base(base, factors, 1.0)})
    assert expert_tensors("qwen3_moe", {path: LoRASwitchLinear.from_base(base, factors, 1.0)})


@pytest.mark.parametrize("kind", KINDS)
def test_routers_are_refused_by_name(kind, tmp_path):
    model, config = tiny_moe(kind)
    folder = write_folder(tmp_path / "base", model, config)
    router = "router" if kind == "gpt_oss" else "gate"
    adapt_and_save(folder, tmp_path / "a", f"{router},q_proj")
    ran = run("export", "--model", folder, "--adapter-path", tmp_path / "a", "--to", "peft", "--out", tmp_path / "p")
    assert (ran.code, f".{router} and 1 more" in ran.err) == (2, True)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("kind", by_default(KINDS, "gpt_oss", "qwen3_moe"))
@pytest.mark.parametrize("targets", ["all-linear", "*.up_proj", "*.down_proj,q_proj", "layers.1.*.gate_proj"])
def test_our_exports_of_experts_can_be_read_back(kind, targets, tmp_path):
    model, config = tiny_moe(kind)
    folder = write_folder(tmp_path / "base", model, config)
    as_peft(folder, tmp_path, targets)
    bare, ours, back = (loaded(folder, adapter) for adapter in (None, tmp_path / "ours", tmp_path / "p"))
    expected = adapter_layers(ours.model)
    assert adapter_layers(back.model).keys() == expected.keys()
    for path, layer in adapter_layers(back.model).items():
        assert mx.allclose(layer.delta(), expected[path].delta(), atol=1e-5)
        assert layer.lora_a.shape == expected[path].lora_a.shape
    assert close(logits(back.model), logits(ours.model), CLOSE)
    assert differ(logits(back.model), logits(bare.model), FAR)


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_pairs_that_peft_trained_together_are_read(kind, tmp_path):
    """There every rank serves the gate and up; a pair for another width is refused."""
    model, config = tiny_moe(kind)
    folder = write_folder(tmp_path / "base", model, config)
    as_peft(folder, tmp_path, "layers.0.*.up_proj")
    stored = mx.load(str(tmp_path / "p" / PEFT_WEIGHTS))
    ((name_a, a), (name_b, b)) = sorted(stored.items())
    b = mx.random.normal(b.shape)
    mx.save_safetensors(str(tmp_path / "p" / PEFT_WEIGHTS), {name_a: a, name_b: b})
    base = loaded(folder, tmp_path / "p")
    layers = {path.rsplit(".", 1)[-1]: layer for path, layer in adapter_layers(base.model).items()}
    assert layers.keys() == {"gate_proj", "up_proj"}
    rank = layers["up_proj"].lora_a.shape[1]
    theirs_a, theirs_b = np.array(a).reshape(4, rank, -1), np.array(b).reshape(-1, rank, 4)  # as PEFT reads them
    delta = layers["up_proj"].scale * np.einsum("ore,eri->eoi", theirs_b, theirs_a)
    half = delta.shape[1] // 2
    parts = (delta[:, 0::2], delta[:, 1::2]) if kind == "gpt_oss" else (delta[:, :half], delta[:, half:])
    for layer, expected in zip((layers["gate_proj"], layers["up_proj"]), parts, strict=True):
        assert np.allclose(layer.delta(), expected, atol=1e-4)
    assert not np.allclose(parts[0], parts[1], atol=1e-2)
    mx.save_safetensors(str(tmp_path / "p" / PEFT_WEIGHTS), {name_a: a[:, 1:], name_b: b})
    with pytest.raises(InputError, match="do not fit any"):
        load_adapter(loaded(folder), tmp_path / "p")
