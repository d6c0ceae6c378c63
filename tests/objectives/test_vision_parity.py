"""Vision-language models against transformers and PEFT on torch: tokens, masks, logits, loss and every factor's gradient.

One batch has a chat of two turns with one picture, one without, and one with two, of odd sizes.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from bound import bind
from mlx.utils import tree_flatten
from tiny_vision import MAKERS, write_model
from vision_judge import ALPHA, RANK, Judge, judge_inputs, judge_processor
from vision_rows import chats_of, picture, read_rows, write_rows

from mlx_lora.adapters.inject import adapt_model, adapter_parameters, inject, select_targets
from mlx_lora.config.settings import AdapterSettings
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.models.folder import of_connector, of_tower
from mlx_lora.models.image_inputs import with_images
from mlx_lora.trainer.step import differentiation
from mlx_lora.utils.errors import InputError

pytestmark = pytest.mark.parity
BAR = 1e-4


@pytest.fixture(params=sorted(MAKERS))
def compared(request, tmp_path):
    """Our rows on an adapted model, its folder, and the conversations."""
    folder, chats = write_model(request.param, tmp_path / "model"), chats_of(request.param)
    rows = read_rows(folder, write_rows(tmp_path / "data", chats))
    model = rows.base.model
    inject(model, select_targets(model).paths, rank=RANK, scale=ALPHA / RANK, seed=1)
    put_second_factors(model)
    return rows, folder, chats


def put_second_factors(model) -> None:
    """Give each B random values, which are zeros before the first step."""
    for name, value in adapter_parameters(model).items():
        if name.endswith("lora_b"):
            draw = 0.05 * mx.random.normal(value.shape, key=mx.random.key(len(name)))
            model.load_weights([(name, draw)], strict=False)


def test_tokens_logits_loss_and_gradients_are_those_of_transformers(compared):
    rows, folder, chats = compared
    model = rows.base.model
    judge = Judge(folder, {name: np.array(value) for name, value in adapter_parameters(model).items()})
    processor = judge_processor(folder)
    given = [judge_inputs(processor, turns, [picture(n) for n in numbers]) for turns, numbers in chats]
    for number, row in enumerate(given):
        assert rows.rows.row(number)[0].tolist() == row["input_ids"][0].tolist()
    masks = [rows.rows.row(number)[1] for number in range(len(given))]
    logits, total, gradients = judge.run(given, masks)
    arrays = rows.arrays()

    bound = bind(rows.objective, PLAIN, model)
    with with_images(model, rows.pictures.vision.spec, arrays["pictures"]):
        found = np.array(model(arrays["inputs"]))
    for number, expected in enumerate(logits):
        own = found[number, : len(expected) - 1]
        assert np.abs(own - expected[:-1]).max() <= BAR * np.abs(expected).max()

    for loss in (PLAIN, choose_loss(model, rows.base.config, "ours")):
        bound = bind(rows.objective, loss, model)
        loss_sum, count, _, own = differentiation(model, bound.loss.train)(arrays)
        assert loss_sum.item() == pytest.approx(total, rel=BAR)
        assert count.item() == sum(mask[1:].sum() for mask in masks)
        own = dict(tree_flatten(own))
        assert own.keys() == gradients.keys()
        largest = max(np.abs(value).max() for value in gradients.values())
        for name, expected in gradients.items():
            assert np.abs(np.array(own[name]) - expected).max() <= BAR * largest, name


@pytest.mark.parametrize(
    "ways",
    [("full", "full"), ("lora", "lora"), ("full", None)],
    ids=lambda ways: f"connector {ways[0]}, tower {ways[1]}",
)
@pytest.mark.parametrize("family", sorted(MAKERS))
def test_gradients_of_tower_and_connector_are_those_of_transformers(family, ways, tmp_path):
    connector, tower = ways
    folder, asked = write_model(family, tmp_path / "model"), {"train_connector": connector, "train_vision": tower}
    if family == "gemma3" and connector == "lora":
        with pytest.raises(InputError, match="--train-connector full"):
            read_rows(folder, write_rows(tmp_path / "data"), **asked)
        asked["train_connector"] = "full"
    chats = chats_of(family)
    rows = read_rows(folder, write_rows(tmp_path / "data", chats), **asked)
    model = rows.base.model
    adapt_model(model, rows.pictures.adapted(AdapterSettings(rank=RANK, alpha=ALPHA)), 1)
    put_second_factors(model)
    trained = {name: np.array(value) for name, value in adapter_parameters(model).items()}
    for part, way in ((of_connector, asked["train_connector"]), (lambda name: not of_connector(name), tower)):
        found = [name for name in trained if of_tower(name) and part(name)]
        assert bool(found) == (way is not None)
        assert {".lora_" in name for name in found} == ({way == "lora"} if way else set())
    judge, processor = Judge(folder, trained), judge_processor(folder)
    given = [judge_inputs(processor, turns, [picture(n) for n in numbers]) for turns, numbers in chats]
    _, total, gradients = judge.run(given, [rows.rows.row(number)[1] for number in range(len(given))])
    bound = bind(rows.objective, PLAIN, model)
    loss_sum, _, _, own = differentiation(model, bound.loss.train)(rows.arrays())
    assert loss_sum.item() == pytest.approx(total, rel=BAR)
    own = dict(tree_flatten(own))
    assert own.keys() == gradients.keys()
    of_towers = [name for name in gradients if of_tower(name)]
    for names in (of_towers, gradients.keys() - set(of_towers)):
        largest = max(np.abs(gradients[name]).max() for name in names)
        for name in names:
            assert np.abs(np.array(own[name]) - gradients[name]).max() <= BAR * largest, name
    reached = [name for name in of_towers if np.abs(gradients[name]).max() > 0]
    assert len(reached) >= 0.5 * len(of_towers)  # LLaVA does not use the tower's last block


def test_without_its_picture_a_row_has_another_loss(compared):
    rows, *_ = compared
    model = rows.base.model
    arrays = rows.arrays()
    bound = bind(rows.objective, PLAIN, model)
    right = bound.loss.measure(model, arrays)[0].item()
    for number, name in enumerate(rows.pictures.vision.spec.names):
        given = arrays["pictures"][number]
        if name == "pictures":
            changed = mx.zeros_like(given)
        elif name == "positions":
            changed = mx.broadcast_to(mx.arange(given.shape[-1]), given.shape)
        elif name == "places":
            changed = mx.where(given > 1, given - 1, given)
        else:
            changed = given[..., ::-1]
        seen = [changed if place == number else one for place, one in enumerate(arrays["pictures"])]
        wrong = bound.loss.measure(model, arrays | {"pictures": seen})[0].item()
        assert abs(wrong - right) > 5 * BAR * right, name
