"""The Python API: the same results as the commands, and a base that can be used again."""

from __future__ import annotations

import pytest
import yaml
from run_cli import run

import mlx_lora

QUICK = {"iters": 6, "learning_rate": 5e-3, "batch_tokens": 256, "max_seq_length": 128, "steps_per_report": 2}


@pytest.fixture(scope="module")
def base(tiny_folder):
    return mlx_lora.load(tiny_folder)


@pytest.fixture(scope="module")
def trained(base, chats, tmp_path_factory):
    return mlx_lora.train(base, chats, tmp_path_factory.mktemp("api") / "a", progress=False, **QUICK)


def test_command_and_api_train_to_the_same_bytes(trained, tiny_folder, chats, tmp_path):
    flags = [part for name, value in QUICK.items() for part in (f"--{name.replace('_', '-')}", value)]

    def command(name: str, *more) -> bytes:
        common = ("train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / name, *flags)
        ran = run(*common, *more)
        assert ran.code == 0, ran.err
        return (tmp_path / name / "adapters.safetensors").read_bytes()

    ours = (trained.adapter / "adapters.safetensors").read_bytes()
    assert command("same") == ours
    assert command("other", "--seed", 1) != ours
    files = [yaml.safe_load((folder / "run.yaml").read_text()) for folder in (trained.adapter, tmp_path / "same")]
    assert {name for name in files[0] if files[0][name] != files[1][name]} == {"adapter_path"}
