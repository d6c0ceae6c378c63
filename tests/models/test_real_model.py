"""The whole path on SmolLM2-135M from its GGUF: slow, needs scripts/get_models.py."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import mlx.core as mx
import pytest
from comparing import weights_checksum
from mlx_lm import generate as mlx_lm_generate
from mlx_lm.utils import load as mlx_lm_load
from real_models import smollm2_gguf
from run_cli import run, succeeds

from mlx_lora.config.settings import ModelSettings
from mlx_lora.models.load import load_base

pytestmark = pytest.mark.slow
DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("smollm2")
    for name, flags in (("q4", ()), ("float", ("--no-quantize",))):
        assert run("convert", "--model", smollm2_gguf(), "--out", root / name, *flags).code == 0
    return root


@pytest.mark.parametrize("form", ["q4", "float"])
def test_lora_and_qlora_lower_held_out_loss_and_leave_the_base(folders, form, tmp_path):
    model, adapter = folders / form, tmp_path / "adapter"
    files = {p.name: p.read_bytes() for p in model.iterdir()}
    checksum = weights_checksum(load_base(ModelSettings(model=str(model))).model)
    succeeds(
        "train", "--model", model, "--data", DATA / "alpaca", "--adapter-path", adapter, "--iters", 8,
        "--batch-tokens", 512, "--learning-rate", "1e-3", "--val-batches", -1,
    )  # fmt: skip
    values = [json.loads(line)["val_loss"] for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    values = [v for v in values if v is not None]
    assert values[-1] < values[0] * 0.97, values
    assert {p.name: p.read_bytes() for p in model.iterdir()} == files
    assert weights_checksum(load_base(ModelSettings(model=str(model))).model) == checksum
    for prompt in ("Name three colors.", "What is the capital of France?"):
        ours = run(
            "generate", "--model", model, "--adapter-path", adapter, "--prompt", prompt, "--max-tokens", 24, "--json"
        )
        stock, tokenizer = mlx_lm_load(str(model), adapter_path=str(adapter))
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True
        )
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = mlx_lm_generate(stock, tokenizer, chat, max_tokens=24)
        assert json.loads(ours.out)["text"] == theirs
        bare = run("generate", "--model", model, "--prompt", prompt, "--max-tokens", 24, "--json")
        assert {"text", "tokens", "tokens_per_s"} <= set(json.loads(bare.out))


def test_gguf_is_used_as_it_is_and_converted_once(folders):
    first = load_base(ModelSettings(model=str(smollm2_gguf())))
    stamp = (first.folder / "config.json").stat().st_mtime_ns
    again = load_base(ModelSettings(model=str(smollm2_gguf())))
    assert (again.folder / "config.json").stat().st_mtime_ns == stamp
    tokens = mx.array([[1, 2, 3, 4]])
    assert mx.array_equal(first.model(tokens), load_base(ModelSettings(model=str(folders / "q4"))).model(tokens))
    assert first.fingerprint == load_base(ModelSettings(model=str(folders / "float"))).fingerprint
