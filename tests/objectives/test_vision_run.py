"""Imitation of answers about pictures through the commands: it learns, resumes to the same bytes, sees each picture once, and evaluates."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from bound import bind
from comparing import by_dtype
from PIL import Image
from resumed_runs import stopped_after, weights
from run_cli import one_line, run, succeeds
from tiers import by_default
from tiny_vision import MAKERS, write_model_here
from vision_rows import SIZES, chats_of, conversation, picture, read_rows, write_rows

from mlx_lora.api import image_answers
from mlx_lora.api.run_data import with_settings_of_run
from mlx_lora.config.load import train_settings
from mlx_lora.data.image_tokens import ImageTable
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.models.image_inputs import ImageInputSpec, ModelWithImages, positions_of, with_images
from mlx_lora.objectives.pictures import Pictures
from mlx_lora.objectives.vision_encoder import ImageFeatureCache
from mlx_lora.trainer.callbacks import before_answer
from mlx_lora.trainer.several_runs import SeveralRuns
from mlx_lora.trainer.step import differentiation
from mlx_lora.utils.errors import InputError

pytest.importorskip("mlx_vlm")
FAMILIES = by_default(sorted(MAKERS), "smolvlm", "qwen3_vl", "gemma4_31b", "qwen3_5", "paligemma2")
COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model_here("smolvlm", tmp_path_factory.mktemp("model") / "smolvlm")


@pytest.fixture(scope="module")
def colors(tmp_path_factory) -> Path:
    """Pictures of one color, and rows that name it; a few rows without a picture, and one that cannot be used."""
    folder = tmp_path_factory.mktemp("colors")
    rows = []
    for number in range(24):
        name = list(COLORS)[number % 4]
        size = (40 + number, 30 + 2 * number)
        Image.new("RGB", size, COLORS[name]).save(folder / f"{number}.png")
        rows.append({"prompt": "Which color?", "completion": name, "images": [f"{number}.png"]})
    rows += [{"prompt": "Say hello.", "completion": "hello"}, {"prompt": "?", "completion": "x", "images": ["no.png"]}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def command(model, data, folder, *more: object) -> tuple:
    return (
        "train", "--model", model, "--data", data, "--adapter-path", folder, "--iters", 12,
        "--batch-size", 4, "--learning-rate", "2e-2", "--rank", 4, "--kernels", "ours", "--warmup", 0, "--steps-per-report", 3,
        *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(model, colors, tmp_path_factory):
    """A run with checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return folder, run(*command(model, colors / "train.jsonl", folder, "--save-every", 6, "--keep", 0))


def test_a_run_learns_what_pictures_show(trained, model, colors):
    folder, ran = trained
    assert ran.code == 0, ran.err
    losses = [json.loads(line).get("val_loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.5 * losses[0]
    assert "24 pictures" in ran.err
    assert "no.png" in ran.err
    measured = run("evaluate", "--model", model, "--data", colors / "train.jsonl", "--json",
                   "--adapter-path", folder)  # fmt: skip
    assert json.loads(measured.out)["loss"] < losses[0]
    answer = run("generate", "--model", model, "--adapter-path", folder, "--image", colors / "1.png", "--prompt", "Which color?",
                 "--max-tokens", 4, "--json")  # fmt: skip
    assert json.loads(answer.out)["tokens"] == 4


def test_the_report_shows_the_pictures_of_its_texts(trained, model, colors, tmp_path):
    folder, _ = trained
    facts, page = json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()
    (sample,) = facts["samples"]
    (digest,) = sample["pictures"]
    url = facts["pictures"][digest]
    assert page.count(url) == 1
    shown = np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
    expected = COLORS[sample["expected"].split("<")[0]]
    assert np.abs(shown.mean(axis=(0, 1)) - expected).max() < 15, "the picture is another row's"
    assert "<image>" not in sample["prompt"]
    assert "Which color?" in sample["prompt"]
    assert len(url) < 30_000
    succeeds(*command(model, colors / "train.jsonl", tmp_path / "quiet", "--iters", 1, "--sample-tokens", 0))
    assert "data:image" not in (tmp_path / "quiet/report.html").read_text()


def test_a_text_of_the_report_depends_on_its_picture(model, colors):
    rows = read_rows(model, colors / "train.jsonl")
    prompt = before_answer(rows.rows, 0)
    all_pictures = [rows.pictures.of_row(int(number)) for number in rows.rows.pictures]
    found = [shown for one in all_pictures if one is not None and (shown := one.within(prompt)) is not None]
    logits = [np.array(one.model(rows.base.model, prompt)(mx.array([prompt]))[0, -1]) for one in found[:2]]
    assert np.abs(logits[0] - logits[1]).max() > 1e-4
    assert found[0].within(prompt[:-1]) is not None, "the prompt ends with text"
    image = prompt.index(rows.pictures.vision.tower.token)
    assert found[0].within(prompt[:image]) is None
    assert found[0].within(prompt[: image + 1]) is None
    assert rows.pictures.of_row(0) is None


def test_a_resumed_run_ends_with_the_same_bytes(trained, model, colors, tmp_path):
    folder, _ = trained
    copy = stopped_after(folder, tmp_path / "copy", 6)
    asked = command(model, colors / "train.jsonl", copy, "--save-every", 6, "--keep", 0, "--resume", "auto")
    assert run(*asked).code == 0
    assert weights(copy) == weights(folder)
    succeeds(*command(model, colors / "train.jsonl", tmp_path / "other", "--seed", 1))
    assert weights(tmp_path / "other") != weights(folder)


def test_other_pictures_are_other_data_for_a_resumed_run(trained, model, colors, tmp_path):
    folder, _ = trained
    copy = stopped_after(folder, tmp_path / "copy", 6)
    data = tmp_path / "data"
    data.mkdir()
    for file in colors.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (41, 32), (1, 2, 3)).save(data / "1.png")
    ran = run(*command(model, data / "train.jsonl", copy, "--save-every", 6, "--keep", 0, "--resume", "auto"))
    assert ran.code == 2
    assert "pictures" in ran.lines[-1]


@pytest.mark.slow
def test_memory_parts_and_checkpointing_give_the_same_losses(trained, model, colors, tmp_path):
    folder, _ = trained

    def losses(path: Path) -> list[float]:
        return [
            row["loss"]
            for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
            if row.get("loss") is not None
        ]

    for name, more in {
        "block": ("--grad-checkpoint", "block"),
        "parts": ("--grad-accumulation-steps", 1, "--batch-parts", 2),
    }.items():
        succeeds(*command(model, colors / "train.jsonl", tmp_path / name, *more))
        assert np.allclose(losses(tmp_path / name), losses(folder), rtol=1e-3)


# Tower and connector


TOWER = ("--train-connector", "full", "--train-vision", "lora", "--iters", 6, "--learning-rate", "2e-3")


@pytest.fixture(scope="module")
def seeing(model, colors, tmp_path_factory):
    """A run that trains tower and connector, with checkpoints."""
    folder = tmp_path_factory.mktemp("seeing") / "adapter"
    return folder, run(*command(model, colors / "train.jsonl", folder, *TOWER, "--save-every", 3, "--keep", 0))


def loss_of(model, colors, *more: object) -> float:
    ran = succeeds("evaluate", "--model", model, "--data", colors / "train.jsonl", "--json", *more)
    return json.loads(ran.out)["loss"]


def test_tower_and_connector_are_trained_and_kept(seeing, model, colors, tmp_path):
    folder, ran = seeing
    assert ran.code == 0, ran.err
    assert "connector trained (full), tower trained (lora)" in ran.err
    names = mx.load(str(folder / "adapters.safetensors")).keys()
    assert "connector.modality_projection.proj.weight" in names
    assert "vision_model.encoder.layers.0.self_attn.q_proj.lora_b" in names
    before, after = loss_of(model, colors), loss_of(model, colors, "--adapter-path", folder)
    last = [json.loads(line).get("val_loss") for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert after < before
    assert last is not None
    asked = ("--model", model, "--adapter-path", folder)
    succeeds("generate", *asked, "--image", colors / "1.png", "--prompt", "Which color?", "--max-tokens", 2, "--json")
    assert run("fuse", *asked, "--out", tmp_path / "fused").code == 0
    assert loss_of(tmp_path / "fused", colors) == pytest.approx(after, rel=by_dtype(1e-4, 5e-3))


def test_training_the_tower_is_planned(model, colors, tmp_path):
    def planned(*more: object) -> int:
        ran = succeeds("plan", "--model", model, "--data", colors / "train.jsonl", "--batch-size", 4, "--json", *more)  # fmt: skip
        return json.loads(ran.out)["peak_bytes"]

    sizes = [planned(), planned("--train-connector"), planned("--train-connector", "--train-vision", "lora")]
    assert sizes == sorted(set(sizes))


def test_a_run_plans_its_own_pictures_and_tower(model, colors, tmp_path, monkeypatch):
    asked = []
    own = Pictures.tower_bytes

    def noted(self, settings):
        asked.append((own(self, settings), len(self.table.pictures)))
        return asked[-1][0]

    monkeypatch.setattr(Pictures, "tower_bytes", noted)
    succeeds(*command(model, colors / "train.jsonl", tmp_path / "out", "--iters", 1))
    last, pictures = asked[-1]
    assert pictures == 24
    planned = json.loads((tmp_path / "out/report.json").read_text())["planned_peak_bytes"]
    monkeypatch.setattr(Pictures, "tower_bytes", lambda self, settings: own(self, settings) + 10**6)
    assert run(*command(model, colors / "train.jsonl", tmp_path / "more", "--iters", 1)).code == 0
    more = json.loads((tmp_path / "more/report.json").read_text())["planned_peak_bytes"]
    assert (last > 0, more - planned) == (True, 10**6)


def test_a_plan_counts_the_pictures_of_its_data(model, colors):
    asked = ("plan", "--model", model, "--images", "--train-vision", "full", "--json")
    with_data, without = (json.loads(run(*asked, *more).out) for more in (("--data", colors / "train.jsonl"), ()))
    assert with_data["phases"].keys() - without["phases"].keys() == {"tower"}


def test_a_trained_tower_sees_a_picture_of_several_rows_once(model, colors):
    rows = read_rows(model, colors / "train.jsonl", train_vision="full")
    tokens, _ = rows.rows.row(0)
    digests = rows.pictures.table.rows[int(rows.rows.pictures[0])]
    vision = rows.pictures.vision
    unseen = vision.arrays(np.stack([tokens, tokens]), [digests, digests])
    assert (len(unseen.pixels), unseen.which) == (1, [0, 0])
    alone = vision.arrays(tokens[None], [digests])
    both, one = (dict(zip(vision.spec.names, vision.shown(given), strict=True)) for given in (unseen, alone))
    count = vision.table.shown[digests[0]].tokens
    assert np.array_equal(np.array(both["embeddings"])[count : 2 * count], np.array(one["embeddings"])[:count])


def test_a_resumed_run_of_the_tower_ends_with_the_same_bytes(seeing, model, colors, tmp_path):
    folder, _ = seeing
    copy = stopped_after(folder, tmp_path / "copy", 3)
    asked = command(model, colors / "train.jsonl", copy, *TOWER, "--save-every", 3, "--keep", 0, "--resume", "auto")
    assert run(*asked).code == 0
    assert weights(copy) == weights(folder)


# Rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_loss_with_pictures_is_that_of_the_logits(family, tmp_path):
    rows = read_rows(write_model_here(family, tmp_path / "model"), write_rows(tmp_path / "data", chats_of(family)))
    model, arrays = rows.base.model, rows.arrays()
    fused = choose_loss(model, rows.base.config, "ours")
    found = [bind(rows.objective, loss, model).loss.measure(model, arrays)[0].item() for loss in (PLAIN, fused)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert fused.kernel != PLAIN.kernel


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_do_not_change_one_another(family, tmp_path):
    rows = read_rows(write_model_here(family, tmp_path / "model"), write_rows(tmp_path / "data", chats_of(family)))
    measure = bind(rows.objective, PLAIN, rows.base).loss.measure
    together = measure(rows.base.model, rows.arrays())[0].item()
    apart = [measure(rows.base.model, rows.arrays([number]))[0].item() for number in range(3)]
    assert sum(apart) == pytest.approx(together, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_pictures_have_another_loss(family, tmp_path):
    size = len(SIZES)  # pictures that are so far apart have the same size
    chats = [(conversation("Same?", numbers, ("No.",)), numbers) for numbers in ((0, size), (size, 0))]
    rows = read_rows(write_model_here(family, tmp_path / "model"), write_rows(tmp_path / "data", chats))
    assert rows.rows.row(0)[0].tolist() == rows.rows.row(1)[0].tolist()
    measure = bind(rows.objective, PLAIN, rows.base).loss.measure
    one, two = (measure(rows.base.model, rows.arrays([number]))[0].item() for number in range(2))
    assert abs(one - two) > 1e-3 * one


def test_no_image_token_is_trained(tmp_path):
    model = write_model_here("smolvlm", tmp_path / "model")
    for masked in (True, False):
        rows = read_rows(model, write_rows(tmp_path / "data"), mask_prompt=masked)
        is_picture = rows.rows.tokens == rows.pictures.vision.tower.token
        assert is_picture.any()
        assert not (rows.rows.mask & is_picture).any()


def test_a_row_that_is_cut_inside_a_picture_is_told(tmp_path):
    chat = [*conversation("Hi", (), ("Yes.",)), *conversation("Which?", (0,), ("A cat.",))]
    model, data = write_model_here("smolvlm", tmp_path / "model"), write_rows(tmp_path / "data", [(chat, (0,))])
    whole = read_rows(model, data).rows
    first = int(np.argmax(whole.tokens == read_rows(model, data).pictures.vision.tower.token))
    with pytest.raises(InputError, match="inside a picture"):
        read_rows(model, data, max_seq_length=first + 2)
    assert len(read_rows(model, data, max_seq_length=first).rows) == 1  # cut before the picture


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_are_those_of_the_whole_row(family, tmp_path):
    from mlx_lm.generate import generate_step

    rows = read_rows(write_model_here(family, tmp_path / "model"), write_rows(tmp_path / "data", chats_of(family)))
    vision, model = rows.pictures.vision, rows.base.model
    tokens = rows.rows.row(2)[0]
    digests = rows.pictures.table.of_numbers(rows.rows.pictures, 3)[2]
    arrays = vision.arrays(tokens[None], [digests])
    reader = ModelWithImages(model, vision.spec, arrays, tokens.tolist())
    given = generate_step(
        mx.array(tokens), reader, max_tokens=6, prompt_cache=reader.caches(), prefill_step_size=len(tokens)
    )
    wrote = [int(token) for token, _ in given]
    whole = np.concatenate([tokens, wrote[:-1]]).astype(np.int32)
    with with_images(model, vision.spec, vision.arrays(whole[None], [digests], np.array([len(tokens)]))):
        logits = np.array(model(mx.array(whole[None])))[0]
    for number, token in enumerate(wrote):
        row = logits[len(tokens) - 1 + number]
        assert row[token] >= row.max() - 1e-3


def test_pictures_are_seen_once_and_kept_on_disk(tmp_path, own_cache):
    rows = read_rows(write_model_here("smolvlm", tmp_path / "model"), write_rows(tmp_path / "data"))
    vision = rows.pictures.vision
    first = [np.array(array) for array in rows.arrays()["pictures"]]
    rows.arrays()
    assert (vision.seen.computed, vision.seen.read) == (3, 0)
    again = ImageFeatureCache(vision.tower, vision.processor, vision.table, most_bytes=1)
    object.__setattr__(vision, "seen", again)
    for _ in range(2):
        assert all(np.array_equal(a, np.array(b)) for a, b in zip(first, rows.arrays()["pictures"], strict=True))
    assert (again.computed, again.read) == (0, 6)
    (file, *_) = (own_cache / "pictures").rglob("*.safetensors")
    file.write_bytes(b"damaged")
    other = ImageFeatureCache(vision.tower, vision.processor, vision.table)
    object.__setattr__(vision, "seen", other)
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(first, rows.arrays()["pictures"], strict=True))
    assert (other.computed, other.read) == (1, 2)


def test_fewer_pixels_are_fewer_tokens(tmp_path):
    model, data = write_model_here("qwen3_vl", tmp_path / "model"), write_rows(tmp_path / "data")
    counts = [len(read_rows(model, data, **asked).rows.tokens) for asked in ({}, {"max_pixels": 1000})]
    assert counts[1] < counts[0]


def test_a_picture_has_the_pixels_that_it_had_in_the_run(trained, model, colors, tmp_path, monkeypatch):
    shutil.copytree(trained[0], tmp_path / "a", ignore=shutil.ignore_patterns("checkpoints"))
    settings = (tmp_path / "a/run.yaml").read_text()
    assert "max_pixels: null" in settings
    (tmp_path / "a/run.yaml").write_text(settings.replace("max_pixels: null", "max_pixels: 900"))
    asked = {"model": str(model), "data": str(colors / "train.jsonl"), "images": True}
    for more, pixels in (({}, 900), ({"max_pixels": 500}, 500)):
        found = with_settings_of_run(train_settings({**asked, **more}), {**asked, **more}, tmp_path / "a")
        assert found.data.max_pixels == pixels

    def told(*given):
        raise InputError(f"{given[-1]} pixels")

    monkeypatch.setattr(image_answers, "image_answer_pieces", told)
    command = (
        "generate",
        "--model",
        model,
        "--adapter-path",
        tmp_path / "a",
        "--image",
        colors / "1.png",
        "--prompt",
        "x",
    )
    one_line(run(*command), "900 pixels")
    one_line(run(*command, "--max-pixels", 500), "500 pixels")


# Positions


def test_positions_of_a_row_with_two_pictures():
    row = np.array([0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0], bool)
    found = positions_of(row, [(2, 3), (1, 2)])
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 8, 9],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 6, 8, 9],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9],
    ]
    assert positions_of(np.zeros(4, bool), []).tolist() == [[0, 1, 2, 3]] * 3


def test_a_model_without_three_positions_asks_for_none():
    assert ImageInputSpec.of({"model_type": "llava", "text_config": {}}).names == ("embeddings", "places")
    assert "positions" in ImageInputSpec.of({"text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}}}).names


# What is refused


def test_a_model_that_sees_nothing_is_told(tiny_folder, colors, tmp_path):
    one_line(run(*command(tiny_folder, colors / "train.jsonl", tmp_path / "out", "--images")), "llama")


def test_runs_that_are_trained_together_see_their_pictures(model, colors, tmp_path):
    """Their rows are computed by themselves: a joint pass would know no pictures."""
    asked = {"model": str(model), "data": str(colors / "train.jsonl"), "iters": 3, "batch_size": 4, "rank": 4}
    for names in (("alone",), ("one", "two")):
        several = SeveralRuns.open(
            [train_settings({**asked, "adapter_path": str(tmp_path / name), "seed": n}) for n, name in enumerate(names)]
        )
        with several.begun():
            while several.active:
                several.round()
    assert weights(tmp_path / "one") == weights(tmp_path / "alone") != weights(tmp_path / "two")


def test_what_needs_pictures_is_refused_without_any(model, tiny_folder, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "Hi.", "completion": "Yes."}))
    pictures = write_rows(tmp_path / "data")
    for base, data in ((model, tmp_path / "text.jsonl"), (tiny_folder, pictures)):
        asked = ("train", "--model", base, "--data", data, "--adapter-path", tmp_path / "out", "--iters", 1)
        one_line(run(*asked, "--train-connector"), "--train-connector")
    one_line(run(*asked, "--objective", "vision_sft"), "--objective vision_sft")


def test_a_table_knows_the_pictures_of_rows():
    table = ImageTable.empty()
    assert [table.number_of(one) for one in (("a", "b"), (), ("b", "a"), ("a", "b"))] == [1, 0, 2, 1]
    assert table.of_numbers(np.array([1, 0], np.int32), 2) == [("a", "b"), ()]
    assert table.of_numbers(None, 2) == [(), ()]
    assert picture(0).size != picture(1).size


def test_gradients_reach_factors_only_where_they_are(tmp_path):
    from mlx.utils import tree_flatten

    from mlx_lora.adapters.inject import inject, select_targets

    rows = read_rows(write_model_here("llava", tmp_path / "model"), write_rows(tmp_path / "data"))
    model = rows.base.model
    inject(model, select_targets(model).paths, rank=2, scale=1.0, seed=0)
    loss = bind(rows.objective, PLAIN, model).loss.train
    *_, gradients = differentiation(model, loss)(rows.arrays())
    assert all("lora_" in name for name, _ in tree_flatten(gradients))
