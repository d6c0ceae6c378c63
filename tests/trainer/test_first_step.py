"""What comes before the first step: checks of one block of each kind, and once; the step is tried; texts later; a line from the start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config
from conftest import TINY, tiny_model
from mlx.utils import tree_flatten
from run_cli import succeeds
from tiny_steps import adapted

from mlx_lora.adapters.inject import inject, select_targets, without_adapters
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.kernels.attention import Tiles, attend, tiled_attention
from mlx_lora.kernels.choose import (
    choose_model_kernels,
    exchanging,
    kernel_rows,
    recorded_calls,
    training_kernels,
)
from mlx_lora.kernels.measure import SWITCH
from mlx_lora.losses import agree as losses
from mlx_lora.losses.agree import check_kernels, choose_loss, choose_step_variant
from mlx_lora.losses.cross_entropy import PLAIN, plain_loss, token_arrays
from mlx_lora.models.blocks import enough_blocks, few_blocks
from mlx_lora.models.folder import is_foreign
from mlx_lora.models.load import load_base
from mlx_lora.planner.memory import tile_shape
from mlx_lora.trainer.callbacks import greedy_text
from mlx_lora.trainer.step import Step, StepOptions
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir

TOKENS = 24


@pytest.fixture
def measuring(monkeypatch, own_cache):
    """A cache of its own, in which checks may be remembered."""
    monkeypatch.setenv(SWITCH, "1")


def used(model) -> set:
    return {(kernel.name, shape) for kernel, shape in recorded_calls(model, [TOKENS])}


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
            "mlx_lora.models.blocks.recorded_calls",
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
    monkeypatch.setattr("mlx_lora.losses.agree.package_sum", lambda: 0)
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


def with_random_factors(model: nn.Module) -> nn.Module:
    """Give every factor something to do, so that every gradient has a value."""
    inject(model, select_targets(model).paths, rank=4, scale=2.0, seed=1)
    drawn = [(name, 0.05 * mx.random.normal(p.shape)) for name, p in tree_flatten(model.trainable_parameters())]
    model.load_weights(drawn, strict=False)
    return model


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def some_batch(seed: int = 0):
    rng = np.random.default_rng(seed)
    rows = [(rng.integers(0, 250, 12), np.arange(12) > 2) for _ in range(3)]
    return BatchPlan(EncodedSet.from_rows(rows), batch_tokens=256, batch_size=3, seed=0).batch(0, 0)


def refuse(*_, **__):
    raise ValueError("[refuse] not here")


def test_a_llama_needs_no_fallback_and_stays_as_it_was():
    model = with_random_factors(tiny_model())
    loss = choose_loss(model, TINY)
    before, key = parameters(model), mx.random.state[0].tolist()
    variant = choose_step_variant(model, TINY, loss, tiled_attention, "tiny")
    assert (variant.loss, variant.attend, variant.compiled, variant.notes) == (loss, tiled_attention, True, ())
    assert not model.training
    assert mx.random.state[0].tolist() == key
    after = parameters(model)
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["dbrx", "gemma3n", "falcon_h1"])
def test_what_a_model_computes_on_its_way_does_not_stop_or_mislead_the_step(kind):
    """DBRX reads values while it is traced; Gemma 3n overwrites frozen weights. Their steps are those of plain mlx."""
    model, config = with_random_factors(tiny_architecture(kind)), tiny_config(kind)
    variant = choose_step_variant(model, config, choose_loss(model, config), tiled_attention, kind)
    stops = kind == "dbrx" and device.compiles()  # a rehearsal compiles nothing, and so reads values whenever it likes
    assert variant.compiled is not stops
    assert any("not compiled" in note for note in variant.notes) is stops
    batch = some_batch()
    frozen = {name: value for name, value in parameters(model).items() if ".lora_" not in name}
    model.train()
    (expected, count), grads = nn.value_and_grad(model, plain_loss)(model, token_arrays(batch))
    expected, count = expected.item(), count.item()
    norm = mx.sqrt(sum(mx.square(g).sum() for _, g in tree_flatten(grads))).item() / count
    step = Step(
        model,
        optim.SGD(0.1),
        variant.loss.train,
        0.0,
        StepOptions(exchanging(variant.attend), compiled=variant.compiled),
    )
    found = step([batch])
    assert found.loss_sum.item() == pytest.approx(expected, rel=1e-4)
    assert found.grad_norm.item() == pytest.approx(norm, rel=1e-3)
    after = parameters(model)  # every array can be read: none is left over from a trace
    # Gemma 3n clips a few of its own at each call; clipped once, they stay.
    moved = [name for name in frozen if not np.allclose(after[name], frozen[name], atol=1e-6)]
    assert all("_coefs.weight" in name for name in moved)
    assert step([batch]).loss_sum.item() < expected


def test_our_kernels_are_left_out_where_they_fail():
    model = with_random_factors(tiny_model())
    loss = choose_loss(model, TINY)
    variant = choose_step_variant(model, TINY, loss, refuse, "tiny")
    assert (variant.loss, variant.attend, variant.compiled) == (loss, None, True)
    assert "the model's own kernels instead of ours" in variant.notes[0]
    assert "[refuse] not here" in variant.notes[0]


def test_the_fused_loss_is_left_out_where_it_fails():
    model = with_random_factors(tiny_model())
    broken = replace(choose_loss(model, TINY), train=refuse)
    variant = choose_step_variant(model, TINY, broken, tiled_attention, "tiny")
    assert (variant.loss, variant.attend, variant.compiled) == (PLAIN, None, True)
    assert "plain instead of fused loss" in variant.notes[0]


class Deaf(nn.Module):
    """A Llama with something in it that has no gradient, as mlx-lm's Metal kernels have none."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_model()

        @mx.custom_function
        def kernel(x: mx.array) -> mx.array:
            return x * 2

        @kernel.vjp
        def _(*_):
            raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")

        self._kernel = kernel

    def __call__(self, ids: mx.array) -> mx.array:
        return self._kernel(self.inner(ids))

    @property
    def layers(self) -> list[nn.Module]:
        return self.inner.layers


def test_a_model_without_a_gradient_is_refused_in_one_line():
    model = Deaf()
    inject(model, select_targets(model).paths, rank=4, scale=2.0)
    before = parameters(model)
    config = {**TINY, "model_type": "rwkv7"}
    words = r"--model some/model: mlx-lm's rwkv7 cannot be trained here \(\[Primitive::vjp\] Not implemented"
    with pytest.raises(InputError, match=words) as refused:
        choose_step_variant(model, config, choose_loss(model, config), tiled_attention, "some/model")
    assert "\n" not in str(refused.value)
    after = parameters(model)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_forward_pass_that_fails_is_told_in_one_line(monkeypatch):
    model = with_random_factors(tiny_model())
    monkeypatch.setattr(type(model), "__call__", refuse)
    with pytest.raises(InputError, match=r"mlx-lm's llama: its forward pass fails here \(\[refuse\] not here\)"):
        choose_loss(model, TINY)


def test_our_own_slips_are_not_taken_for_a_models():
    with pytest.raises(TypeError) as ours:
        tile_shape(None, 8, 8)
    assert not is_foreign(ours.value)
    with pytest.raises(AttributeError) as theirs:
        nn.Linear(2, 2).nothing  # noqa: B018
    assert is_foreign(theirs.value)
    model = with_random_factors(tiny_model())
    broken = replace(choose_loss(model, TINY), train=lambda *_: (tile_shape(None, 8, 8), None))
    with pytest.raises(TypeError):
        choose_step_variant(model, TINY, broken, tiled_attention, "tiny")
