"""A tiny model that half knows a look-up tool learns in an environment of verifiers to use it, measured on words that it never asked about."""

from __future__ import annotations

import json
import os

import pytest
from run_cli import succeeds
from tool_model import shelf_folder
from verifiers_environments import SHELF, write_environments

from mlx_lora.config.load import train_settings
from mlx_lora.rollouts.verifiers_env import close_hosts, rehearse

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # of the package's own code


def test_more_right_answers_about_new_words(tmp_path, monkeypatch):
    pytest.importorskip("verifiers.v1", reason="pip install 'mlx-lora[verifiers]'")
    monkeypatch.syspath_prepend(str(write_environments(tmp_path, vl_shelf=SHELF)))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # the run adds the folder, for servers of tools
    for part in ("train", "test"):
        (tmp_path / f"{part}.toml").write_text(f"[env.taskset]\nid = 'vl_shelf'\nwords = '{part}'\n")
    objective = {"model": "m", "objective": "grpo", "environment": f"verifiers:{tmp_path / 'train.toml'}"}
    schemas = rehearse(train_settings(objective).objective).tools
    base = shelf_folder(tmp_path / "shelf", steps=250, schemas=schemas) / "base"
    common = ("--objective", "grpo", "--max-new-tokens", 30, "--max-turns", 2)

    def right(*adapter: object) -> float:
        test = ("--environment", f"verifiers:{tmp_path / 'test.toml'}", "--group-size", 32)
        ran = succeeds("evaluate", "--model", base, *adapter, *test, *common, "--json")
        return json.loads(ran.out)["reward"]

    trained = ("--environment", f"verifiers:{tmp_path / 'train.toml'}", "--adapter-path", tmp_path / "adapter")
    quick = ("--group-size", 16, "--batch-size", 4, "--iters", 20, "--learning-rate", 3e-3, "--warmup", 0, "--rank", 8,
             "--val-batches", 0, "--valid-fraction", 0, "--sample-tokens", 0, "--kernels", "ours")  # fmt: skip
    ran = succeeds("train", "--model", base, *trained, *common, *quick)
    before, after = right(), right("--adapter-path", tmp_path / "adapter")
    close_hosts()
    print(f"right answers {before:.2f} to {after:.2f}")
    assert before < 0.6
    assert after > before + 0.2
