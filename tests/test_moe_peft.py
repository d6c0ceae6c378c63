"""Adapters of experts in PEFT: its logits on transformers' models are ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_folder
from run_cli import run
from test_adapter_folder import make_adapter
from test_moe_folder import FEW, MANY, close, loaded, logits
from tiny_moe import tiny_moe

from mlx_lora.artifacts.adapter import load_adapter
from mlx_lora.artifacts.peft import PEFT_CONFIG

KINDS = ["gpt_oss", "qwen3_moe", "qwen2_moe", "mixtral"]
EXPERTS = {"gpt_oss": "mlp.experts", "mixtral": "block_sparse_moe.switch_mlp"}
CLOSE, FAR = 1e-4, 1e-2


def judged(kind: str, folder: Path, scratch: Path, *adapter: Path) -> list[np.ndarray]:
    """Return transformers' logits of FEW and MANY, with PEFT's adapter."""
    pytest.importorskip("peft")
    ids = np.empty(2, dtype=object)
    ids[:] = [np.array(FEW[0], np.int64), np.array(MANY[0], np.int64)]
    np.save(scratch / "ids.npy", ids, allow_pickle=True)
    script = Path(__file__).parent / "judge_moe.py"
    command = [sys.executable, script, kind, folder, scratch / "ids.npy", scratch / "out.npz", *adapter]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    with np.load(scratch / "out.npz") as found:
        return [found["arr_0"], found["arr_1"]]


@pytest.mark.parity
@pytest.mark.parametrize("targets", ["all-linear", "experts", "*.up_proj", "*.down_proj,q_proj"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_of_experts_gives_our_logits_in_peft(kind, targets, tmp_path):
    model, config = tiny_moe(kind)
    folder = write_folder(tmp_path / "base", model, config)
    bare = judged(kind, folder, tmp_path)
    assert close(bare, logits(loaded(folder).model), CLOSE)
    wish = f"{EXPERTS.get(kind, 'mlp.switch_mlp')}.*" if targets == "experts" else targets
    make_adapter(folder, tmp_path / "a", wish)
    adapted = loaded(folder)
    load_adapter(adapted, tmp_path / "a")
    ran = run("export", "--model", folder, "--adapter-path", tmp_path / "a", "--to", "peft", "--out", tmp_path / "p")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "p" / PEFT_CONFIG).read_text())["target_parameters"]
    assert close(judged(kind, folder, tmp_path, tmp_path / "p"), logits(adapted.model), CLOSE)
    assert not close(bare, logits(adapted.model), FAR)


@pytest.mark.parametrize("kind", KINDS)
def test_routers_are_refused_by_name(kind, tmp_path):
    model, config = tiny_moe(kind)
    folder = write_folder(tmp_path / "base", model, config)
    router = "router" if kind == "gpt_oss" else "gate"
    make_adapter(folder, tmp_path / "a", f"{router},q_proj")
    ran = run("export", "--model", folder, "--adapter-path", tmp_path / "a", "--to", "peft", "--out", tmp_path / "p")
    assert ran.code == 2
    assert f".{router} and 1 more" in ran.err
    assert not (tmp_path / "p").exists()
