"""The memory that sampling is planned to take: against measured peaks, by what a model's own caches hold, and in the fit."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from architectures.build import tiny_architecture
from conftest import tiny_model
from real_models import smollm2_gguf
from run_cli import run
from tiers import by_default

from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import ModelSettings, TrainSettings
from mlx_lora.models.load import load_base
from mlx_lora.models.meta import layer_caches, model_shape
from mlx_lora.planner.fit import DataLimits, fit, largest_rollout, run_of
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.memory import plan_memory, rollout_parts
from mlx_lora.planner.shapes import LayerCache, Machine, ModelShape, Rollout, RunShape
from mlx_lora.rollouts.generator import KeptCaches, SamplingOptions, answer_keys, sample_groups
from mlx_lora.utils.text import GIB

NO_END = frozenset()
CPU = Machine("a CPU", "cpu", 24 * GIB, 22 * GIB, 4)
SHAPE = ModelShape("llama", 64, 288, (), 10**9, 10**6)


def measured(model, rollout: Rollout) -> int:
    """Return the bytes that sampling adds to what was there, at its peak."""
    options = SamplingOptions(rollout.group, rollout.new_tokens)
    prompts = [[3 + (n * 7 + i) % 200 for i in range(rollout.prompt_tokens)] for n in range(rollout.prompts)]
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    sample_groups(model, prompts, options, NO_END, answer_keys(0, 0, rollout.prompts * rollout.group))
    return mx.get_peak_memory() - before


def planned(model, config: dict, rollout: Rollout) -> int:
    shape = replace(model_shape(model, config), caches=layer_caches(model))
    return sum(rollout_parts(shape, rollout, this_machine("float32")).values())


WIDE = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 384, "vocab_size": 2000}
CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True} | WIDE


@pytest.mark.parametrize(
    "rollout",
    by_default(
        [Rollout(1, 8, 300, 20), Rollout(4, 8, 20, 20), Rollout(2, 16, 100, 300), Rollout(8, 4, 200, 4)],
        Rollout(4, 8, 20, 20),
        Rollout(8, 4, 200, 4),
    ),
    ids=lambda one: f"{one.prompts}x{one.group} of {one.prompt_tokens}+{one.new_tokens}",
)
def test_the_plan_is_near_the_measured_peak(rollout):
    model = tiny_model(**WIDE)
    peak = max(measured(model, rollout) for _ in range(3))  # buffers that are freed early make one run's lower
    assert planned(model, CONFIG, rollout) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("rollout", [Rollout(2, 8, 300, 20), Rollout(4, 8, 100, 40)], ids=str)
def test_what_is_kept_from_turn_to_turn_is_planned(rollout):
    """All rows end a turn at once, near the end of their room, which takes the most: each is kept beside the batch's caches."""
    model, rows = tiny_model(**WIDE), rollout.prompts * rollout.group
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    options = SamplingOptions(rollout.group, rollout.new_tokens)
    prompts = [[3 + (n * 7 + i) % 200 for i in range(rollout.kept_tokens - 2)] for n in range(rollout.prompts)]
    kept = KeptCaches()
    answers, _ = sample_groups(model, prompts, options, frozenset(range(2000)), answer_keys(0, 0, rows), kept=kept)
    episodes = [[*prompts[row // rollout.group], *answer, 5] for row, answer in enumerate(answers)]
    later = KeptCaches([kept.ended[row] for row in range(rows)])
    kept.ended.clear()
    sample_groups(model, episodes, replace(options, group=1), NO_END, answer_keys(0, 1, rows), kept=later)
    peak = mx.get_peak_memory() - before
    several = replace(rollout, several_turns=True)
    assert planned(model, CONFIG, several) == pytest.approx(peak, rel=0.1)
    assert planned(model, CONFIG, rollout) < 0.8 * peak


def test_caches_are_read_as_they_are():
    assert layer_caches(tiny_model()) == (LayerCache(2 * 2 * 16 * 4),) * 2
    windowed = layer_caches(tiny_architecture("gemma3_text"))
    assert {cache.most_tokens for cache in windowed} > {None}
    recurrent = layer_caches(tiny_architecture("qwen3_5"))
    assert any(cache.fixed_bytes and not cache.token_bytes for cache in recurrent)
    assert any(cache.token_bytes and not cache.fixed_bytes for cache in recurrent)
    assert sum(cache.token_bytes for cache in layer_caches(tiny_architecture("falcon_h1"))) > 0
    shape = replace(SHAPE, caches=(LayerCache(100), LayerCache(100, most_tokens=64), LayerCache(fixed_bytes=7)))
    parts = rollout_parts(shape, Rollout(1, 2, 101, 256), CPU)
    assert parts["keys and values"] == 2 * (356 * 100 + 64 * 100 + 7)


def test_sampling_is_a_phase_of_its_own():
    shape = replace(SHAPE, caches=(LayerCache(4096),) * 32)
    run_alone = RunShape(8, 512, checkpointing="block")
    without, with_it = (
        plan_memory(shape, replace(run_alone, rollout=one), CPU) for one in (None, Rollout(4, 64, 256, 1024))
    )
    assert "rollout" not in without.phases
    assert with_it.phase == "rollout"
    assert with_it.peak_bytes == sum(with_it.parts.values()) > without.peak_bytes
    assert with_it.parts["keys and values"] == 256 * 32 * 4096 * (255 + 1024)
    assert with_it.parts["base"] == without.parts["base"]
    assert "gradients" not in with_it.parts
    assert {name: with_it.phases[name] for name in without.phases} == without.phases


def settings_of(**flags: object) -> TrainSettings:
    return train_settings({"objective": "grpo", "reward": "length:4", "grad_checkpoint": "block", **flags})


@pytest.mark.parametrize("shared", ["auto", "on"])
def test_the_largest_rollout_follows_from_the_prompts(shared):
    settings = settings_of(group_size=4, max_new_tokens=16, shared_prefix=shared)
    prompts = ((5, 3), (10, 50), (200, 60))
    found = largest_rollout(settings, 2048, prompts)
    assert found.prompt_tokens == 10  # a cache's step is many tokens: the batch with the most rows
    room = 4 * 17 - 2 if shared == "on" else 15
    assert found.prompts == 2048 // ((1 if shared == "on" else 4) * (10 + room))
    assert largest_rollout(settings, 2048, ()) is None
    alone = run_of(settings, 4, 200 + room, "block").rollout
    assert (alone.prompt_tokens, alone.prompts) == (200, 4 if shared == "on" else 1)
    shape = replace(SHAPE, caches=(LayerCache(4096),) * 32)
    peaks = [
        fit(settings, shape, CPU, 200 + room, DataLimits(prompts=of)).memory.phases["rollout"] for of in ((), prompts)
    ]
    assert peaks[0] < peaks[1]


@pytest.mark.slow
def test_a_run_whose_answers_do_not_fit_says_what_to_lower(tiny_folder, tmp_path):
    data = tmp_path / "p.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{n}?"}) for n in range(40)))
    flags = (
        "--model",
        tiny_folder,
        "--data",
        data,
        "--objective",
        "grpo",
        "--reward",
        "length:4",
        "--valid-fraction",
        0,
    )
    big = ("--group-size", 16, "--max-new-tokens", 2000, "--batch-size", 4)
    free = json.loads(run("plan", *flags, *big, "--json").out)
    assert free["phase"] in free["phases"]
    assert free["phases"]["rollout"] > 64 * 2000 * 2 * 256  # A x tokens x layers x bytes of one token
    budget = 0.3 * free["needed_bytes"] / 1e9
    ran = run("plan", *flags, *big, "--memory-budget", budget)
    advice = ran.out.splitlines()[-1]
    assert advice.startswith("To fit: try --batch-size 1")
    ran = run("train", *flags, *big, "--adapter-path", tmp_path / "a", "--memory-budget", budget, "--iters", 1)
    assert ran.code == 2
    assert ran.lines[-1].startswith("Error: this run: needs")
    assert "; try --batch-size 1" in ran.lines[-1]
    least = ("--batch-size", 1, *big[:4])
    ran = run("plan", *flags, *least, "--memory-budget", 0.04 * free["needed_bytes"] / 1e9)
    assert "--max-new-tokens" in ran.out.splitlines()[-1]
    ran = run("plan", *flags, *big)
    assert "16 answers are sampled to a prompt" in ran.out


@pytest.mark.slow
@pytest.mark.parametrize("rollout", [Rollout(1, 8, 300, 60), Rollout(4, 8, 40, 60), Rollout(1, 4, 600, 300)])
def test_the_plan_is_near_the_measured_peak_of_smollm2(rollout):
    base = load_base(ModelSettings(model=str(smollm2_gguf()), dtype="float32"))
    shape = planned(base.model, base.config, rollout)
    assert shape == pytest.approx(measured(base.model, rollout), rel=0.1)
