"""The memory that a plan gives a vision tower: read from its graph, and the same before a run and in it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from run_cli import run
from tiny_vision import write_model_here

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.data.image_tokens import ImageProcessor, ImageTable
from mlx_lora.models.load import load_base
from mlx_lora.models.vision import open_tower
from mlx_lora.objectives.pictures import TracedTower, outlined_tower, tower_targets, with_tower
from mlx_lora.planner.memory import phase_parts
from mlx_lora.planner.shapes import Machine, ModelShape, RunShape, TowerBytes, TowerShape

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
    ran = run("train", *asked, "--adapter-path", tmp_path / "out", "--val-batches", 0)
    assert ran.code == 0, ran.err
    own = json.loads((tmp_path / "out/report.json").read_text())["planned_peak_bytes"]
    assert own == planned["peak_bytes"]
    without = json.loads(run("plan", *asked, "--json", "--max-pixels", 400).out)["phases"]
    assert without.keys() == planned["phases"].keys()
    assert np.all([planned["phases"][name] >= size for name, size in without.items()])
