"""What single families of vision-language models ask for: their commands, rows, masks, and what is refused of them."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from architectures.images import try_family
from bound import bind
from gguf_pictures import adapt, load
from mlx.utils import tree_flatten
from run_cli import one_line, run, succeeds
from tiers import by_default
from tiny_vision import MAKERS, vision_files, write_model_here
from vision_rows import chats_of, picture, read_rows, write_rows

from mlx_lora.adapters.inject import inject, select_targets
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.data.image_tokens import FAMILIES, ImageProcessor, family_of
from mlx_lora.engine.prompts import PictureReader
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.models.image_inputs import ImageInputSpec, PositionsAndMask, PositionsAndWindowMask
from mlx_lora.models.load import load_base
from mlx_lora.models.side_files import of_connector, of_tower
from mlx_lora.models.vision import arrays_of, load_tower
from mlx_lora.objectives import vision_encoder as image_features
from mlx_lora.objectives.pictures import BUFFERS, tower_targets
from mlx_lora.objectives.vision_encoder import tower_key
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.step import differentiation
from mlx_lora.utils.errors import InputError

pytest.importorskip("mlx_vlm")
NEW = ("gemma4", "gemma4_31b", "mistral3", "paligemma", "paligemma2", "pixtral", "qwen3_5")


@pytest.mark.slow
@pytest.mark.parametrize("family", NEW)
def test_the_commands_take_a_family(family, tmp_path):
    try_family(family, tmp_path / family)


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory):
    return write_model_here("paligemma", tmp_path_factory.mktemp("paligemma") / "model")


def command(model, data, folder, *more: object) -> tuple:
    return ("train", "--model", model, "--data", data, "--adapter-path", folder, "--iters", 1,
            "--batch-size", 1, "--kernels", "mlx", "--valid-fraction", 0, *more)  # fmt: skip


# PaliGemma


def test_paligemma_has_rows_of_one_question_and_tells_of_others(paligemma, tmp_path):
    ran = succeeds(*command(paligemma, write_rows(tmp_path / "data"), tmp_path / "out"))  # the first has two questions
    assert "one question" in ran.err
    assert "dropped 1" in ran.err


def test_paligemma_trains_no_prompt_and_is_not_served(paligemma, tmp_path):
    data = write_rows(tmp_path / "data", chats_of("paligemma"))
    one_line(run(*command(paligemma, data, tmp_path / "out", "--no-mask-prompt")), "--no-mask-prompt")
    base = load_base(ModelSettings(model=str(paligemma), dtype="float32"))
    with pytest.raises(InputError, match="--image"):
        PictureReader(base).prompt([{"role": "user", "content": "Hi"}], {}, None)


def test_a_prompt_that_sees_itself_does_not_see_its_answer(paligemma, tmp_path):
    rows = read_rows(paligemma, write_rows(tmp_path / "data", chats_of("paligemma")))
    arrays = rows.arrays([0])
    names = rows.pictures.vision.spec.names
    prompt = np.array(arrays["pictures"][names.index("pictures")])[0]
    trained = rows.rows.row(0)[1]
    assert prompt.tolist() == [1] * int(trained.argmax()) + [0] * (len(prompt) - int(trained.argmax()))
    measure = bind(rows.objective, PLAIN, rows.base).loss.measure
    right = measure(rows.base.model, arrays)[0].item()
    more = [mx.ones_like(a) if name == "pictures" else a for name, a in zip(names, arrays["pictures"], strict=True)]
    assert abs(measure(rows.base.model, arrays | {"pictures": more})[0].item() - right) > 1e-3 * right


# Gemma 4


def test_pictures_of_large_gemma_4_see_themselves_only_in_windows():
    none, numbers = mx.zeros((0,), mx.int32), mx.array([[0, 1, 1, 0]])
    windows, everywhere = PositionsAndWindowMask(none, numbers), PositionsAndMask(none, numbers)
    assert windows.make_mask(4) == "causal"
    causal = np.tri(4, dtype=bool)
    shown = causal.copy()
    shown[1, 2] = True
    assert np.array_equal(np.array(everywhere.make_mask(4))[0, 0], shown)
    assert np.array_equal(np.array(windows.make_mask(4, window_size=8))[0, 0], shown)
    assert np.array_equal(np.array(windows.make_mask(4, window_size=1))[0, 0], shown & (np.eye(4) + np.eye(4, k=1) > 0))


@pytest.mark.parametrize("family", ["gemma4", "gemma4_31b"])
def test_bounds_and_scales_of_gemma_4s_tower_are_never_trained(family, tmp_path):
    tower = load_tower(write_model_here(family, tmp_path / "model"), mx.float32).model
    parts = dict(tower.named_modules())
    assert any(not BUFFERS.isdisjoint(module) for name, module in parts.items() if of_tower(name))
    _, whole = tower_targets(tower, AdapterSettings(train_vision="full", train_connector="full"))
    assert whole
    assert all(BUFFERS.isdisjoint(parts[name]) for name in whole)


@pytest.mark.parametrize("family", ["paligemma", "gemma4", "smolvlm"])
def test_an_adapter_with_a_whole_connector_is_read_again(family, tmp_path):
    """PaliGemma's connector, and each layer of Gemma 4's, is called `linear`, as the base inside an adapted layer is."""
    folder = adapt(write_model_here(family, tmp_path / "model"), tmp_path / "adapter", tower=True)
    stored = {
        name: value for name, value in mx.load(str(folder / "adapters.safetensors")).items() if of_connector(name)
    }
    base = load(tmp_path / "model")
    info = load_adapter(base, folder)
    found = dict(tree_flatten(base.model.parameters()))
    assert set(info.full) == {name for name in stored if "lora" not in name}
    assert all(mx.array_equal(found[name], stored[name]) for name in info.full)
    untouched = arrays_of(load_tower(tmp_path / "model", mx.float32).model)
    assert not any(mx.array_equal(untouched[name], stored[name]) for name in info.full)


def test_what_a_tower_saw_is_kept_by_its_settings_too(tmp_path, monkeypatch):
    """The same weights see something else with smaller windows, and with pictures that are decoded in another way."""
    keys = []
    for window in (56, 112, 56):
        folder = tmp_path / str(len(keys))
        write_model_here("qwen2_5_vl", folder, changes={"vision_config": {"window_size": window}})
        config = json.loads((folder / "config.json").read_text())
        keys.append(tower_key(load_tower(folder, mx.float32), ImageProcessor(folder, config)))
    assert keys[0] == keys[2] != keys[1]
    monkeypatch.setattr(image_features, "DECODING", 1)
    assert tower_key(load_tower(folder, mx.float32), ImageProcessor(folder, config)) not in keys


def test_small_gemma_4_gives_blocks_the_padding_of_image_tokens(tmp_path):
    config = vision_files("gemma4", tmp_path)
    assert ImageInputSpec.of(config).padding == config["text_config"]["pad_token_id"]
    assert ImageInputSpec.of(vision_files("gemma4_31b", tmp_path / "large")).padding is None


# What is refused


def test_llama_4_is_refused_with_the_reason(tmp_path):
    with pytest.raises(InputError, match="torchvision"):
        ImageProcessor(tmp_path, {"model_type": "llama4", "vision_config": {}})


@pytest.mark.parametrize(("where", "changed"), [("vision_config", {"hidden_act": "gelu"}), (None, {"vision_feature_layer": [-1, -2]})])  # fmt: skip
def test_a_pixtral_tower_that_mlx_vlm_computes_otherwise_is_refused(where, changed, tmp_path):
    folder = write_model_here("mistral3", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (config[where] if where else config).update(changed)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=next(iter(changed))):
        load_tower(folder, mx.float32)


def test_each_family_has_a_tiny_model_that_shows_pictures(tmp_path):
    kinds = set()
    for family in MAKERS:
        config = vision_files(family, tmp_path / family)
        found = family_of(config)
        assert found is not None
        kinds.add(config["model_type"] if found is not FAMILIES["pixtral"] or family == "mistral3" else "pixtral")
        shown = ImageProcessor(tmp_path / family, config).shown(picture(0).size)
        assert shown.text.count(found.place) == shown.tokens or family in ("gemma3",)
    assert FAMILIES.keys() - kinds == {"qwen3_vl_moe", "qwen3_5_moe"}


# Checkpointing


@pytest.mark.float32
@pytest.mark.parametrize("family", by_default(NEW, "gemma4_31b", "paligemma2"))
def test_checkpointed_blocks_see_pictures_as_the_others_do(family, tmp_path):
    rows = read_rows(write_model_here(family, tmp_path / "model"), write_rows(tmp_path / "data", chats_of(family)))
    model, arrays = rows.base.model, rows.arrays()
    inject(model, select_targets(model).paths, rank=2, scale=1.0, seed=0)
    step = differentiation(model, bind(rows.objective, PLAIN, model).loss.train)
    expected, _, _, before = step(arrays)
    apply_checkpointing(model, "block")
    found, _, _, after = step(arrays)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = zip(tree_flatten(before), tree_flatten(after), strict=True)
    differences = [mx.abs(one - other).max().item() for (_, one), (_, other) in pairs]
    largest = max(mx.abs(value).max().item() for _, value in tree_flatten(before))
    assert max(differences) < 1e-4 * largest
