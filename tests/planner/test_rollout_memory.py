"""Measured memory beside the plan: trained towers, pictures, and rollouts."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from architectures.build import tiny_architecture
from conftest import tiny_model
from mlx.utils import tree_flatten, tree_unflatten
from real_models import smollm2_gguf
from run_cli import run, succeeds
from tiers import by_default
from tiny_vision import write_model_here

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import AdapterSettings, ModelSettings, TrainSettings
from mlx_lora.data.image_tokens import ImageProcessor, ImageTable
from mlx_lora.models.generator import KeptCaches, SamplingOptions, answer_keys, sample_groups
from mlx_lora.models.load import load_base
from mlx_lora.models.meta import layer_caches, model_shape
from mlx_lora.models.vision import open_tower
from mlx_lora.objectives.pictures import TracedTower, outlined_tower, tower_targets, with_tower
from mlx_lora.planner.fit import DataLimits, fit, largest_rollout, run_of
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.memory import (
    LayerCache,
    Machine,
    ModelShape,
    Rollout,
    RunShape,
    TowerBytes,
    TowerShape,
    phase_parts,
    plan_memory,
    rollout_parts,
)
from mlx_lora.utils.text import GIB

pytest.importorskip("mlx_vlm")
WIDER = {"vision_config": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 112}}  # fmt: skip
MACHINE = Machine("x", "cpu", 1 << 34, 1 << 33, 4)


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    return write_model_here("smolvlm", tmp_path_factory.mktemp("tower") / "model", changes=WIDER)


def table_of(processor: ImageProcessor, *rows: tuple[tuple[int, int], ...]) -> ImageTable:
    """A table of rows, each given by the sizes of its pictures; equal sizes are one picture."""
    sizes = {f"{width}x{height}": (width, height) for row in rows for width, height in row}
    return ImageTable(
        {digest: SimpleNamespace(size=size) for digest, size in sizes.items()},
        [(), *(tuple(f"{width}x{height}" for width, height in row) for row in rows)],
        {digest: processor.shown(size) for digest, size in sizes.items()},
    )


def traced_in(folder, *rows, train="full"):
    """The tower of a model, all of whose numbers are trained or none, with the memory for these rows."""
    settings = train_settings({"model": str(folder)})
    tower = outlined_tower(settings)
    assert tower is not None
    if train:
        tower.model.unfreeze()
    processor = ImageProcessor(folder, json.loads((folder / "config.json").read_text()))
    return TracedTower(tower, processor, table_of(processor, *rows))


def test_a_batch_takes_the_rows_whose_pictures_take_the_most(smolvlm):
    small, large = (200, 100), (50, 50)  # of which this processor makes two tiles, and four
    traced = traced_in(smolvlm, (small,), (large, small), (small, large), (large,))
    one = traced_in(smolvlm, (small,)).at(1, False).kept
    other = traced_in(smolvlm, (large,)).at(1, False).kept
    assert other > one > 0
    kept = [traced.at(rows, False).kept for rows in (1, 2, 3, 4)]
    assert kept == pytest.approx([one + other, 2 * (one + other), 2 * one + 3 * other, 3 * one + 3 * other], rel=1e-3)
    assert traced.at(9, False).kept == kept[-1]  # there are no more


def test_attention_of_large_pictures_takes_more_than_their_share(tmp_path):
    folder = write_model_here("qwen2_5_vl", tmp_path / "model")
    file = folder / "preprocessor_config.json"
    size = {"shortest_edge": 28**2, "longest_edge": 448**2}
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": size}))
    sides = (112, 448)
    small, large = (traced_in(folder, ((side, side),)).at(1, False).kept for side in sides)
    assert large > 1.05 * 16 * small


def test_a_frozen_tower_keeps_nothing_and_sees_one_picture_at_a_time(smolvlm):
    rows = (((200, 100),), ((100, 200),))
    frozen, trained = traced_in(smolvlm, *rows, train=None), traced_in(smolvlm, *rows)
    assert [frozen.at(rows, False).kept for rows in (1, 2)] == [0, 0]
    assert frozen.at(1, False).window == frozen.at(2, False).window > 0
    assert trained.at(1, False).kept > frozen.at(1, False).window


@pytest.mark.float32
@pytest.mark.parametrize(("vision", "connector"), [("full", "full"), ("lora", None), (None, "full")])
def test_what_a_trained_tower_takes_is_what_is_measured(smolvlm, vision, connector):
    base = load_base(ModelSettings(model=str(smolvlm)))
    tower = open_tower(base)
    adapter = AdapterSettings(train_vision=vision, train_connector=connector)
    layers, whole = tower_targets(tower.model, adapter)
    targets = ",".join((adapter.target_modules, *layers))
    adapt_model(base.model, replace(adapter, target_modules=targets, modules_to_save=",".join(whole) or None), 0)
    processor = ImageProcessor(smolvlm, base.config)
    traced = TracedTower(tower, processor, table_of(processor, ((200, 100),), ((100, 200),)))
    planned = traced.at(2, False)
    from PIL import Image

    sizes = ((200, 100), (100, 200))
    pixels = [{n: mx.array(v) for n, v in processor.pixels(Image.new("RGB", size)).items()} for size in sizes]
    own = dict(tree_flatten(tower.model.trainable_parameters()))
    mx.eval(tower.model.parameters(), pixels)

    def loss(parameters):
        tower.model.update(tree_unflatten(list(parameters.items())))
        seen = [tower(one, processor.shown(size).tokens) for one, size in zip(pixels, sizes, strict=True)]
        return sum((one.embeddings**2).sum() for one in seen)

    measured = 0
    for _ in range(3):  # the peak is lower while other programs keep MLX's second thread waiting
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(loss)(own))
        measured = max(measured, mx.get_peak_memory() - before)
    of_pixels = sum(array.nbytes for one in pixels for array in one.values())  # were there before
    assert planned.kept - of_pixels < 1.02 * measured
    # Not counted is a copy of the pixels, which SmolVLM makes before its tower begins: much where so little of it is trained.
    copied = of_pixels if vision is None else 0
    assert 0.9 < (planned.kept + planned.window - of_pixels + copied) / measured < 1.5


def test_a_tower_that_cannot_be_read_is_not_known(smolvlm):
    traced = traced_in(smolvlm, ((100, 100),))

    def reads_values(pixels, tokens):
        raise ValueError("[eval] Attempting to eval an array during function transformations")

    traced.tower.__class__ = type("Reading", (type(traced.tower),), {"__call__": lambda *args: reads_values(*args[1:])})
    shape = with_tower(ModelShape("x", 8, 8, (), 0, 0), traced.tower, traced.processor, traced.table, 1)
    assert shape.tower is None
    assert any("tower" in reason for reason in shape.not_known)


@dataclass
class Fixed:
    kept: int = 1000

    def at(self, rows: int, on_gpu: bool) -> TowerBytes:
        return TowerBytes(self.kept * rows, 70)


def test_pictures_are_in_memory_from_the_loss_to_the_gradients_of_the_tower():
    shape = ModelShape("x", 8, 8, (), base_bytes=5, trained=30, tower=TowerShape(Fixed(), trained=20, rows_each=2))
    plain = phase_parts(replace(shape, tower=None), RunShape(4, 8), MACHINE)
    seen = phase_parts(shape, RunShape(4, 8), MACHINE)
    added = {name: sum(parts.values()) - sum(plain.get(name, {}).values()) for name, parts in seen.items()}
    held = 5 + 30 * 4 * 3
    assert added.pop("tower") == held + 2000 + 70 + 10 * 4
    assert added.pop("check") == 2 * 4 * 20 if plain["check"]["gradients"] == 0 else added.pop("check") >= 0
    assert added == {"load": 0, "loss": 2000, "backward": 2000, "last": 2000, "update": 0}
    accumulating = phase_parts(shape, RunShape(4, 8, accumulates=True), MACHINE)
    assert accumulating["tower"]["gradients"] == 30 * 4
    frozen = phase_parts(replace(shape, trained=10, tower=TowerShape(Fixed(kept=0))), RunShape(4, 8), MACHINE)
    assert ("pictures" in frozen, "tower" in frozen) == (True, False)


@pytest.mark.long
@pytest.mark.parametrize("more", [(), ("--train-vision", "lora"), ("--train-vision", "--train-connector")])
def test_plan_and_run_plan_the_same(smolvlm, tmp_path, more):
    from PIL import Image

    data = tmp_path / "data"
    data.mkdir()
    for number, size in enumerate(((90, 60), (200, 100), (64, 64))):
        Image.new("RGB", size, (80 * number, 10, 99)).save(data / f"{number}.png")
    rows = [{"images": [f"{n}.png"], "prompt": "What is it?", "completion": "A color. " * 3} for n in range(3)]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ("--model", smolvlm, "--data", data / "train.jsonl", "--batch-size", 2, "--iters", 1,
             "--kernels", "ours", "--valid-fraction", 0, *more)  # fmt: skip
    planned = json.loads(run("plan", *asked, "--json").out)
    succeeds("train", *asked, "--adapter-path", tmp_path / "out", "--val-batches", 0)
    own = json.loads((tmp_path / "out/report.json").read_text())["planned_peak_bytes"]
    assert own == planned["peak_bytes"]
    without = json.loads(run("plan", *asked, "--json", "--max-pixels", 400).out)["phases"]
    assert without.keys() == planned["phases"].keys()
    assert np.all([planned["phases"][name] >= size for name, size in without.items()])


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


@pytest.mark.long
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


@pytest.mark.long
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
