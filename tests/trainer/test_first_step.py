"""What makes the first step come sooner: checks of one block of each kind, and once; texts later; a line from the start."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures.build import tiny_architecture, tiny_config
from conftest import TINY, tiny_model
from run_cli import succeeds
from tiny_steps import adapted

from mlx_lora.adapters.inject import inject, select_targets, without_adapters
from mlx_lora.config.settings import ModelSettings
from mlx_lora.kernels.attention import Tiles, attend, tiled_attention
from mlx_lora.kernels.measure import SWITCH
from mlx_lora.kernels.table import choose_model_kernels, kernel_rows, traced_calls, training_kernels
from mlx_lora.losses import check as losses
from mlx_lora.losses.check import check_kernels, choose_loss
from mlx_lora.models.load import load_base
from mlx_lora.models.meta import enough_blocks, few_blocks
from mlx_lora.trainer.callbacks import greedy_text
from mlx_lora.utils.files import cache_dir

TOKENS = 24


@pytest.fixture
def measuring(tmp_path, monkeypatch):
    """A cache of its own, in which checks may be remembered."""
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "own-cache"))
    monkeypatch.setenv(SWITCH, "1")


def used(model) -> set:
    return {(kernel.name, shape) for kernel, shape in traced_calls(model, [TOKENS])}


def test_blocks_that_are_alike_are_one():
    model = tiny_model(num_hidden_layers=5)
    blocks = list(model.layers)
    assert enough_blocks(model, TOKENS) == [4]
    inject(model, [path for path in select_targets(model).paths if ".3." in path or ".4." in path], 4, 2.0)
    assert enough_blocks(model, TOKENS) == [2, 4]  # a frozen one as well
    with few_blocks(model, TOKENS) as some:
        assert [model.layers.index(block) for block in model.layers] == [0, 1]
        assert model.layers == [blocks[number] for number in some]
    assert model.layers == blocks


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "deepseek_v2", "qwen3_next", "gemma3n", "mamba2"])
def test_few_blocks_use_every_kernel_and_shape_of_all(name):
    model = tiny_architecture(name)
    blocks, of_all = list(model.layers), used(model)
    with few_blocks(model, TOKENS) as some:
        assert used(model) == of_all
        assert some[-1] == len(blocks) - 1
    assert list(model.layers) == blocks


def test_a_model_whose_own_list_decides_keeps_as_many_as_it_needs(monkeypatch):
    """Its blocks do not know, say, which of them look through a window."""
    model, row = tiny_model(num_hidden_layers=7), kernel_rows()[0]
    for needed, some in ((1, [6]), (2, [5, 6]), (3, [3, 4, 5, 6]), (5, list(range(7)))):
        monkeypatch.setattr(
            "mlx_lora.models.meta.traced_calls",
            lambda model, tokens, needed=needed: [(row, (min(needed, len(model.layers)),))],
        )
        assert enough_blocks(model, TOKENS) == some


def test_a_model_that_cannot_be_shortened_is_checked_whole(monkeypatch):
    model = tiny_model(num_hidden_layers=3)
    monkeypatch.setattr(type(model), "layers", property(lambda self: tuple(self.model.layers)))
    assert enough_blocks(model, TOKENS) == [2]  # whatever type of list it shows
    monkeypatch.setattr(type(model), "layers", property(lambda self: [*self.model.layers, *self.model.layers]))
    assert enough_blocks(model, TOKENS) == list(range(6))
    with few_blocks(nn.Linear(2, 2), TOKENS) as some:
        assert some == []


def test_a_kernel_that_is_wrong_in_one_kind_of_block_is_found(monkeypatch):
    model = tiny_architecture("gemma3_text", config={**tiny_config("gemma3_text"), "num_hidden_layers": 6})
    inject(model, select_targets(model).paths, 4, 2.0)
    config = {"model_type": "gemma3_text", "vocab_size": 288}
    loss = choose_loss(model, config, "ours")
    choice = choose_model_kernels(model, [100], "ours", mx.float32)
    assert check_kernels(model, config, loss, choice)[0] is choice
    assert len(enough_blocks(model, 128)) < len(model.layers)

    def wrong(q, k, v, tiles, sinks=None):
        windowed = isinstance(tiles.mask, mx.array)
        return tiled_attention(q, k, v, Tiles(1.05 * tiles.scale, tiles.mask)) if windowed else attend(q, k, v, tiles)

    monkeypatch.setattr(losses, "training_kernels", lambda model, choose: training_kernels(model, wrong, choose))
    kernels, words = check_kernels(model, config, loss, choice)
    assert kernels is None
    assert "differ" in words


def counted(monkeypatch) -> list[str]:
    calls: list[str] = []
    probe = losses.probe
    monkeypatch.setattr(losses, "probe", lambda *given, **named: calls.append("probe") or probe(*given, **named))
    return calls


def test_a_check_that_passed_is_not_repeated(measuring, monkeypatch):
    calls = counted(monkeypatch)

    def checks(model=None, config=TINY) -> int:
        before, model = len(calls), model or adapted()
        loss = choose_loss(model, config, "ours")
        choice = choose_model_kernels(model, [40], "ours", mx.float32)
        assert check_kernels(model, config, loss, choice)[0] is choice
        assert loss.kernel == "tiles"
        return len(calls) - before

    first = checks()
    assert first == 4  # the model's own numbers and ours, of the loss and of the kernels
    assert checks() == 0
    assert json.loads((cache_dir("measured") / "passed_checks.json").read_text())
    # Whatever a result depends on makes it another check.
    assert checks(config={**TINY, "rope_theta": 5.0}) == first
    assert checks(adapted(bits=4)) == first
    fewer = adapted()
    fewer.layers[0].freeze()
    assert checks(fewer) == first
    halves = adapted()
    halves.set_dtype(mx.bfloat16)
    assert checks(halves) == first
    assert checks(adapted(seed=1)) == first  # other norms: another base
    monkeypatch.setattr("mlx_lora.losses.check._package_sum", lambda: 0)
    assert checks() == first
    assert checks() == 0
    monkeypatch.setenv(SWITCH, "0")
    assert checks() == first


def test_a_check_that_failed_is_repeated(measuring, monkeypatch):
    calls, model = counted(monkeypatch), adapted()
    loss = choose_loss(model, TINY, "ours")
    choice = choose_model_kernels(model, [40], "ours", mx.float32)
    monkeypatch.setattr(losses, "disagreement", lambda *_: "differs")
    for _ in range(2):
        before = len(calls)
        assert check_kernels(model, TINY, loss, choice)[0] is None
        assert len(calls) > before


def test_without_adapters_a_model_is_its_base(tiny_folder):
    base = load_base(ModelSettings(model=str(tiny_folder)))
    own = greedy_text(base, [5, 6, 7], 8)
    inject(base.model, select_targets(base.model).paths, 4, 2.0)
    layers = [module for module in base.model.modules() if hasattr(module, "lora_b")]
    for layer in layers:
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
    adapted_text = greedy_text(base, [5, 6, 7], 8)
    assert adapted_text != own
    with without_adapters(base.model):
        assert greedy_text(base, [5, 6, 7], 8) == own
    assert greedy_text(base, [5, 6, 7], 8) == adapted_text
    assert [module for module in base.model.modules() if hasattr(module, "lora_b")] == layers


@pytest.mark.parametrize(("flags", "first"), [((), "step"), (("--fine-tune-type", "full"), "text")])
def test_texts_of_the_untrained_model_are_written_before_the_first_step_only_if_they_must(
    flags, first, tiny_folder, chats, tmp_path, monkeypatch
):
    happened: list[str] = []
    text = "mlx_lora.trainer.callbacks.greedy_text"
    monkeypatch.setattr(text, lambda *given: happened.append("text") or greedy_text(*given))
    step = "mlx_lora.trainer.step.Step.__call__"
    from mlx_lora.trainer.step import Step

    taken = Step.__call__
    monkeypatch.setattr(step, lambda *given, **named: happened.append("step") or taken(*given, **named))
    words = ("train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "a", "--iters", 4)
    succeeds(*words, "--learning-rate", 1e-2, "--sample-tokens", 8, "--batch-size", 2, *flags)
    assert happened[0] == first
    assert happened.count("text") == 2
    (sample,) = json.loads((tmp_path / "a" / "report.json").read_text())["samples"]
    base = load_base(ModelSettings(model=str(tiny_folder)))
    prompt = base.hf_tokenizer.encode(sample["prompt"], add_special_tokens=False)
    assert sample["before"] == greedy_text(base, prompt, 8)


def test_a_line_comes_before_the_libraries_are_loaded(tmp_path):
    code = "import sys; sys.modules['transformers'] = None; from mlx_lora.cli.train import main; main(sys.argv[1:])"
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    words = [sys.executable, "-c", code, "--model", "m", "--data", str(tmp_path / "d.jsonl")]
    words += ["--adapter-path", str(tmp_path / "a")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    said, _, problem = done.stderr.partition("Traceback")
    assert "transformers" in problem
    assert len(said.strip().splitlines()) == 1
