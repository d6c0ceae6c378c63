"""Pictures through the commands: imitation, preferences, rewards and single families; learning, resume, plan, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from architectures.images import try_family
from bound import bind
from comparing import by_dtype
from gguf_pictures import adapt, load
from mlx.utils import tree_flatten
from PIL import Image
from resumed_runs import metrics, stopped_after, weights
from run_cli import holds, one_line, refused, run, succeeds
from tiers import by_default
from tiny_vision import MAKERS, vision_files, write_model_here
from vision_rows import (
    PAIRS,
    SIZES,
    Rows,
    chats_of,
    conversation,
    picture,
    preference,
    read_rows,
    write_pairs,
    write_rows,
)

from mlx_lora.adapters.inject import inject, select_targets
from mlx_lora.api.evaluate import with_settings_of_run
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import AdapterSettings, DataSettings, ModelSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.examples import FormatError, Record
from mlx_lora.data.formats import NamedColumns
from mlx_lora.data.image_tokens import FAMILIES, ImageProcessor, ImageTable, family_of
from mlx_lora.data.images import MARK
from mlx_lora.data.read import parse_record_of
from mlx_lora.engine.engine import PictureReader
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.models.folder import of_connector, of_tower
from mlx_lora.models.generator import SamplingOptions, TokenSteps, answer_keys, sample_groups
from mlx_lora.models.image_inputs import (
    ImageInputSpec,
    ModelWithImages,
    PositionsAndMask,
    PositionsAndWindowMask,
    positions_of,
    prepare_rotation,
    with_images,
)
from mlx_lora.models.load import load_base
from mlx_lora.models.vision import arrays_of, load_tower
from mlx_lora.objectives import vision_encoder as image_features
from mlx_lora.objectives.pictures import BUFFERS, Pictures, tower_targets
from mlx_lora.objectives.policy_arrays import at_temperature, token_logps
from mlx_lora.objectives.reference import row_log_probabilities
from mlx_lora.objectives.vision_encoder import ImageFeatureCache, tower_key
from mlx_lora.rollouts.rollout import PromptsWithPictures
from mlx_lora.trainer.callbacks import before_answer
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.several_runs import SeveralRuns
from mlx_lora.trainer.step import differentiation
from mlx_lora.utils.errors import InputError

pytest.importorskip("mlx_vlm")
SEEING = by_default(sorted(MAKERS), "smolvlm", "qwen3_vl", "gemma4_31b", "qwen3_5", "paligemma2")
COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory) -> Callable[[str], Path]:
    """Return the folder of a family's tiny model, which is written once."""

    @cache
    def folder(family: str) -> Path:
        return write_model_here(family, tmp_path_factory.mktemp(family) / "model")

    return folder


@pytest.fixture(scope="module")
def model(model_of) -> Path:
    return model_of("smolvlm")


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


@pytest.mark.long
def test_a_run_learns_what_pictures_show(trained, model, colors):
    folder, ran = trained
    assert ran.code == 0, ran.err
    losses = [json.loads(line).get("val_loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.5 * losses[0]
    holds(ran.err, "24 pictures", "no.png")
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("made", "step"),
    by_default(
        [("trained", 6), ("seeing", 3), ("preferring", 4), ("rewarded", 6)],
        ("trained", 6),
        ("seeing", 3),
        ("preferring", 4),
    ),
)
def test_a_resumed_run_ends_with_the_same_bytes(made, step, request, tmp_path):
    folder, _ = request.getfixturevalue(made)
    copy = stopped_after(folder, tmp_path / "copy", step)
    succeeds("train", "--config", copy / "run.yaml", "--adapter-path", copy, "--resume")
    assert weights(copy) == weights(folder) != weights(copy / f"checkpoints/step-{step:06d}")


def test_other_pictures_are_other_data_for_a_resumed_run(trained, model, colors, tmp_path):
    folder, _ = trained
    copy = stopped_after(folder, tmp_path / "copy", 6)
    data = tmp_path / "data"
    data.mkdir()
    for file in colors.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (41, 32), (1, 2, 3)).save(data / "1.png")
    refused(
        run(*command(model, data / "train.jsonl", copy, "--save-every", 6, "--keep", 0, "--resume", "auto")), "pictures"
    )


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


@pytest.mark.long
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


@pytest.mark.long
def test_training_the_tower_is_planned(model, colors, tmp_path):
    def planned(*more: object) -> int:
        ran = succeeds("plan", "--model", model, "--data", colors / "train.jsonl", "--batch-size", 4, "--json", *more)  # fmt: skip
        return json.loads(ran.out)["peak_bytes"]

    sizes = [planned(), planned("--train-connector"), planned("--train-connector", "--train-vision", "lora")]
    assert sizes == sorted(set(sizes))


@pytest.mark.long
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


@pytest.mark.long
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


# Rows


@pytest.fixture(scope="module")
def chats_seen_by(model_of, tmp_path_factory) -> Callable[[str], Rows]:
    """Return the chats as a family's tiny model reads them, once; nothing of it is changed."""

    @cache
    def rows(family: str) -> Rows:
        return read_rows(model_of(family), write_rows(tmp_path_factory.mktemp("chats"), chats_of(family)))

    return rows


@pytest.mark.parametrize("family", SEEING)
def test_the_fused_loss_with_pictures_is_that_of_the_logits(family, chats_seen_by):
    rows = chats_seen_by(family)
    model, arrays = rows.base.model, rows.arrays()
    fused = choose_loss(model, rows.base.config, "ours")
    found = [bind(rows.objective, loss, model).loss.measure(model, arrays)[0].item() for loss in (PLAIN, fused)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert fused.kernel != PLAIN.kernel


@pytest.mark.parametrize("family", SEEING)
def test_rows_of_a_batch_do_not_change_one_another(family, chats_seen_by):
    rows = chats_seen_by(family)
    measure = bind(rows.objective, PLAIN, rows.base).loss.measure
    together = measure(rows.base.model, rows.arrays())[0].item()
    apart = [measure(rows.base.model, rows.arrays([number]))[0].item() for number in range(3)]
    assert sum(apart) == pytest.approx(together, rel=1e-5)


@pytest.mark.parametrize("family", SEEING)
def test_swapped_pictures_have_another_loss(family, model_of, tmp_path):
    size = len(SIZES)  # pictures that are so far apart have the same size
    chats = [(conversation("Same?", numbers, ("No.",)), numbers) for numbers in ((0, size), (size, 0))]
    rows = read_rows(model_of(family), write_rows(tmp_path / "data", chats))
    assert rows.rows.row(0)[0].tolist() == rows.rows.row(1)[0].tolist()
    measure = bind(rows.objective, PLAIN, rows.base).loss.measure
    one, two = (measure(rows.base.model, rows.arrays([number]))[0].item() for number in range(2))
    assert abs(one - two) > 1e-3 * one


def test_no_image_token_is_trained(model, tmp_path):
    for masked in (True, False):
        rows = read_rows(model, write_rows(tmp_path / "data"), mask_prompt=masked)
        is_picture = rows.rows.tokens == rows.pictures.vision.tower.token
        assert is_picture.any()
        assert not (rows.rows.mask & is_picture).any()


def test_a_row_that_is_cut_inside_a_picture_is_told(model, tmp_path):
    chat = [*conversation("Hi", (), ("Yes.",)), *conversation("Which?", (0,), ("A cat.",))]
    data = write_rows(tmp_path / "data", [(chat, (0,))])
    first = int(np.argmax(read_rows(model, data).rows.tokens == read_rows(model, data).pictures.vision.tower.token))
    with pytest.raises(InputError, match="inside a picture"):
        read_rows(model, data, max_seq_length=first + 2)
    assert len(read_rows(model, data, max_seq_length=first).rows) == 1  # cut before the picture


@pytest.mark.parametrize("family", SEEING)
def test_generated_tokens_are_those_of_the_whole_row(family, chats_seen_by):
    from mlx_lm.generate import generate_step

    rows = chats_seen_by(family)
    vision, model = rows.pictures.vision, rows.base.model
    tokens = rows.rows.row(2)[0]
    digests = rows.pictures.table.of_numbers(rows.rows.pictures, 3)[2]
    reader = ModelWithImages(model, vision.spec, vision.arrays(tokens[None], [digests]), tokens.tolist())
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


def test_pictures_are_seen_once_and_kept_on_disk(model, tmp_path, own_cache):
    rows = read_rows(model, write_rows(tmp_path / "data"))
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

    monkeypatch.setattr("mlx_lora.cli.generate.image_answer_pieces", told)
    command = (
        "generate", "--model", model, "--adapter-path", tmp_path / "a", "--image", colors / "1.png", "--prompt", "x",
    )  # fmt: skip
    one_line(run(*command), "900 pixels")
    one_line(run(*command, "--max-pixels", 500), "500 pixels")


# Positions


def test_positions_of_a_row_with_two_pictures():
    found = positions_of(np.array([0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0], bool), [(2, 3), (1, 2)])
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


@pytest.mark.long
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
    *_, gradients = differentiation(model, bind(rows.objective, PLAIN, model).loss.train)(rows.arrays())
    assert all("lora_" in name for name, _ in tree_flatten(gradients))


TWO_COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
QUESTION = {"role": "user", "content": "What is it?"}
SEEN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("A cat.", "A dog."))


@pytest.fixture(scope="module")
def color_pairs(tmp_path_factory) -> Path:
    """Pairs of color names, of which the picture says which one is better, and one row that cannot be used."""
    folder = tmp_path_factory.mktemp("colors")
    rows = []
    for number in range(16):
        good, bad = list(TWO_COLORS)[:: 1 if number % 2 else -1]
        Image.new("RGB", (40 + number // 2, 50), TWO_COLORS[good]).save(folder / f"{number}.png")
        rows.append({"prompt": "Which color?", "chosen": good, "rejected": bad, "images": [f"{number}.png"]})
    rows.append({"prompt": "?", "chosen": "x", "rejected": "y", "images": ["no.png"]})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def pair_command(model, data, folder, *more: object) -> tuple:
    return (
        "train", "--model", model, "--data", data, "--adapter-path", folder, "--objective", "dpo", "--iters", 8,
        "--batch-size", 4, "--learning-rate", "2e-2", "--rank", 4, "--kernels", "ours", "--warmup", 0, "--steps-per-report", 2,
        "--valid-fraction", 0, "--sample-tokens", 0, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def preferring(model, color_pairs, tmp_path_factory):
    """A run with checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return folder, run(*pair_command(model, color_pairs / "train.jsonl", folder, "--save-every", 4, "--keep", 0))


def test_a_run_learns_which_answer_a_picture_asks_for(preferring, model, color_pairs):
    folder, ran = preferring
    assert ran.code == 0, ran.err
    holds(ran.err, "16 pictures", "no.png")
    found = metrics(folder)
    losses = [line["loss"] for line in found if line.get("loss") is not None]
    assert losses[-1] < 0.8 * losses[0]
    asked = (
        "evaluate", "--objective", "dpo", "--images", "--model", model, "--data", color_pairs / "train.jsonl", "--json",
    )  # fmt: skip
    measured = json.loads(run(*asked, "--adapter-path", folder).out)
    # Both answers are right for half of the pictures, so who does not look is right in half of the pairs.
    assert measured["accuracy"] > 0.8
    assert measured["rows"] == 16


@pytest.mark.slow
def test_an_adapter_is_measured_against_the_one_that_its_run_began_with(preferring, model, color_pairs, tmp_path):
    more = ("--resume-adapter-file", preferring[0], "--learning-rate", "1e-9", "--iters", 1)
    succeeds(*pair_command(model, color_pairs / "train.jsonl", tmp_path / "a", *more))
    asked = ("--objective", "dpo", "--images", "--model", model, "--data", color_pairs / "train.jsonl")
    found = run("evaluate", *asked, "--adapter-path", tmp_path / "a", "--json")
    assert json.loads(found.out)["margin"] == pytest.approx(0, abs=1e-4)
    shutil.copytree(color_pairs, tmp_path / "data")
    shutil.copy(color_pairs / "train.jsonl", tmp_path / "data/test.jsonl")
    alone = succeeds("train", *asked, "--data", tmp_path / "data", "--adapter-path", tmp_path / "a", "--test")
    assert "margin 0.0000" in alone.err or "margin -0.0000" in alone.err


@pytest.mark.long
def test_a_plan_counts_the_pictures(model, color_pairs, tmp_path):
    def planned(data: Path) -> dict:
        ran = succeeds(
            "plan", "--model", model, "--data", data, "--objective", "dpo", "--images", "--batch-size", 4, "--json"
        )
        return json.loads(ran.out)

    seen = planned(color_pairs / "train.jsonl")
    rows = [json.loads(line) for line in (color_pairs / "train.jsonl").read_text().splitlines()[:16]]
    blind = tmp_path / "train.jsonl"
    blind.write_text("\n".join(json.dumps({**row, "images": []}) for row in rows))
    without = planned(blind)
    assert seen["data"]["tokens"] > without["data"]["tokens"] + 32 * 4
    # The tower, frozen, and what it makes of pictures.
    assert seen["parts"]["other models"] > without["parts"]["other models"] > 0


@pytest.mark.parametrize("objective", ["orpo", "kto"])
def test_other_objectives_see_pictures_too(objective, model, color_pairs, tmp_path):
    ran = succeeds(
        *pair_command(model, color_pairs / "train.jsonl", tmp_path / "a", "--objective", objective, "--iters", 2)
    )
    assert "16 pictures" in ran.err


# Rows


def test_the_reference_of_other_pictures_is_another_one(model, tmp_path):
    """The same tokens with other pictures of the same size, and the same cache."""
    found = []
    for name, numbers in (("one", (0, 4)), ("two", (4, 0))):
        rows = [preference("What is it?", (number,), "A cat.", "A dog.") for number in numbers]
        read = read_rows(model, write_pairs(tmp_path / name, rows), objective="dpo", images=True)
        assert picture(0).size == picture(4).size
        sums = read.objective.sums_of(PLAIN.tokens)
        found.append((row_log_probabilities(read.base.model, sums, read.rows, 2048), read.pictures.facts))
    assert found[0][1] != found[1][1]
    assert np.allclose(found[0][0], np.roll(found[1][0], 2), rtol=1e-4)
    assert np.abs(found[0][0] - found[1][0]).max() > 1e-2


def test_image_tokens_are_in_no_mask(model, tmp_path):
    for objective in ("dpo", "orpo"):
        read = read_rows(model, write_pairs(tmp_path / objective), objective=objective, images=True)
        is_picture = read.rows.tokens == read.pictures.vision.tower.token
        assert is_picture.any()
        assert not (read.rows.mask & is_picture).any()
        assert (read.rows.answers is None) == (objective == "dpo")


def test_a_rated_answer_is_compared_with_one_about_another_picture(model, tmp_path):
    """Prompts of the same words are others if their pictures are."""
    rows = [
        {"image": f"p{number}.png", "prompt": "What is it?", "completion": answer, "label": True, "images": None}
        for number, answer in ((0, "A cat."), (0, "A dog."), (4, "Oh, no cat."))
    ]
    folder = tmp_path / "data"
    for number in (0, 4):
        write_pairs(folder, [preference("", (number,), "a", "b")])
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = read_rows(model, folder / "train.jsonl", objective="kto", images=True)
    shown = read.pictures.table.of_numbers(read.rows.pictures, len(read.rows))
    assert shown[0] == shown[1] == shown[2] == shown[3] != shown[4] == shown[5]
    texts = [read.base.hf_tokenizer.decode(tokens[mask]) for tokens, mask in map(read.rows.row, range(6))]
    assert [text.split(".")[0].strip() for text in texts] == [
        "A cat",
        "Oh, no cat",
        "A dog",
        "Oh, no cat",
        "Oh, no cat",
        "A cat",
    ]


FORMS = {
    "a text": {"images": ["a.png"], "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."},
    "a place": {"image": "a.png", "prompt": "<image>What is it?", "chosen": "A cat.", "rejected": "A dog."},
    "TRL's prompt": {"images": ["a.png"], "prompt": [SEEN], "chosen": [GOOD], "rejected": [BAD]},
    "TRL's prompt without parts": {"images": ["a.png"], "prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
    "dialogues": {"images": ["a.png"], "chosen": [SEEN, GOOD], "rejected": [SEEN, BAD]},
    "dialogues and their question": {"images": ["a.png"], "prompt": "What is it?", "chosen": [SEEN, GOOD], "rejected": [SEEN, BAD]},
    "dialogues without parts": {"images": ["a.png"], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "LLaMA-Factory's": {"images": ["a.png"], "conversations": [{"from": "human", "value": "<image>What is it?"}],
                        "chosen": {"from": "gpt", "value": "A cat."}, "rejected": {"from": "gpt", "value": "A dog."}},
    "OpenAI's": {"input": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                 {"type": "text", "text": "What is it?"}]}]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    "scores": {"images": ["a.png"], "instruction": "What is it?", "completions": [
        {"response": "A dog.", "overall_score": 1}, {"response": "A cat.", "overall_score": 4}]},
}  # fmt: skip


def parsed(record: dict, kind: str = "pairs") -> list:
    settings = DataSettings()
    return list(parse_record_of(Record(1, record), "x", settings, NamedColumns.of(settings), kind, True)[1])


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_pairs(name):
    (pair,) = parsed(FORMS[name])
    assert [answer.messages[-1]["content"] for answer in (pair.chosen, pair.rejected)] == ["A cat.", "A dog."]
    for answer in (pair.chosen, pair.rejected):
        (asked, _) = answer.messages
        assert [*answer.sources.values()] == ["a.png"]
        assert MARK.sub("<image>", asked["content"]) == "<image>What is it?"
    (pair,) = parsed({"prompt": "Hello", "chosen": "Hi", "rejected": "No", "images": []})
    assert not hasattr(pair.chosen, "sources")


def test_captions_and_rated_answers():
    (pair,) = parsed({"image": "a.png", "chosen": "a cat", "rejected": "a dog"})
    assert len(pair.chosen.marks) == 1
    for record in (
        {"image": "a.png", "prompt": "What is it?", "completion": "A cat.", "label": False},
        {"images": ["a.png"], "prompt": [SEEN], "completion": [GOOD], "label": False},
        {"images": ["a.png"], "messages": [SEEN, GOOD], "kto_tag": False},
    ):
        (rated,) = parsed(record, "rated")
        assert not rated.good
        assert rated.answer.messages[-1]["content"] == "A cat."
        assert len(rated.answer.marks) == 1
    both = parsed(FORMS["TRL's prompt"], "rated")
    assert [(one.good, len(one.answer.marks)) for one in both] == [(True, 1), (False, 1)]


TWO = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]}
OWN = {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]}
OTHER = {"role": "user", "content": [{"type": "image", "path": "b.png"}, {"type": "text", "text": "What is it?"}]}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"images": ["a.png", "b.png"], "chosen": [TWO, GOOD], "rejected": [SEEN, BAD]}, ("rejected", "2 pictures")),
        ({"images": ["a.png"], "chosen": [TWO, GOOD], "rejected": [TWO, BAD]}, ("chosen", "no such picture")),
        ({"images": ["a.png"], "prompt": [TWO], "chosen": [GOOD], "rejected": [BAD]}, ("picture 2",)),
        ({"chosen": [OWN, GOOD], "rejected": [OTHER, BAD]}, ("same prompt",)),
        ({"prompt": [QUESTION], "chosen": [{**GOOD, "content": [{"type": "image"}]}], "rejected": [BAD]}, ("image",)),
        ({"images": [7], "prompt": "?", "chosen": "a", "rejected": "b"}, ("int",)),
        ({"images": ["a.png"], "prompt": "?", "chosen": "a"}, ("rejected",)),
    ],
)  # fmt: skip
def test_what_is_no_pair_about_pictures(record, words):
    with pytest.raises(FormatError) as told:
        parsed(record)
    for word in words:
        assert word in str(told.value)


# What is refused


def test_what_cannot_see_is_told_in_one_line(model, color_pairs, tiny_folder, tmp_path):
    data = color_pairs / "train.jsonl"
    one_line(run(*pair_command(tiny_folder, data, tmp_path / "a", "--images")), "llama")
    blind = ("train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "a", "--iters", 1)
    one_line(run(*blind, "--objective", "dpo"), "vision-language")
    one_line(run(*blind, "--objective", "rerank", "--images"), "--images")
    one_line(run(*pair_command(model, data, tmp_path / "a", "--shared-prefix", "on")), "--shared-prefix")


def test_a_prompt_that_sees_itself_is_not_trained(paligemma, tmp_path):
    ran = run(*pair_command(paligemma, write_pairs(tmp_path / "data", PAIRS), tmp_path / "a", "--objective", "orpo"))
    one_line(ran, "orpo", "paligemma")


WRITING = by_default([name for name in sorted(MAKERS) if "pali" not in name], "smolvlm", "qwen2_5_vl", "gemma3")
HALF = 160  # token ids below are "low"
REWARD = f"""
def low_for_red(completion_ids, color, images, prompts, **columns):
    assert all(name[0].endswith(".png") for name in images)
    assert all(prompt == "<image>Which color?" for prompt in prompts), prompts
    shares = [sum(token < {HALF} for token in ids) / len(ids) for ids in completion_ids]
    return [share if name == "red" else 1 - share for share, name in zip(shares, color)]
"""


@pytest.fixture(scope="module")
def color_prompts(tmp_path_factory) -> Path:
    """Prompts of the same words, whose best answers depend on the picture; a reward; and one row that cannot be used."""
    folder = tmp_path_factory.mktemp("colors")
    rows = []
    for number in range(4):
        name = list(TWO_COLORS)[number % 2]
        Image.new("RGB", (40 + number // 2, 50), TWO_COLORS[name]).save(folder / f"{number}.png")
        rows.append({"prompt": "Which color?", "images": [f"{number}.png"], "color": name})
    rows.append({"prompt": "Which color?", "images": ["no.png"], "color": "red"})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD)
    return folder


def reward_command(model, color_prompts, folder, *more: object) -> tuple:
    return (
        "train", "--model", model, "--data", color_prompts / "train.jsonl", "--adapter-path", folder, "--objective", "grpo", "--images",
        "--reward", f"{color_prompts / 'reward.py'}:low_for_red", "--group-size", 24, "--max-new-tokens", 2, "--iters", 12,
        "--batch-size", 4, "--learning-rate", "1e-2", "--rank", 8, "--kernels", "ours", "--warmup", 0, "--steps-per-report", 2,
        "--lr-schedule", "constant", "--valid-fraction", 0, "--sample-tokens", 0, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rewarded(model, color_prompts, tmp_path_factory):
    """A run with checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return folder, run(*reward_command(model, color_prompts, folder, "--save-every", 6, "--keep", 0))


@pytest.mark.slow
def test_a_run_learns_what_a_picture_is_rewarded_for(rewarded):
    folder, ran = rewarded
    assert ran.code == 0, ran.err
    holds(ran.err, "4 pictures", "no.png")
    found = metrics(folder)
    rewards = [line["reward"] for line in found if line.get("loss") is not None]
    assert rewards[-1] > 0.65  # who does not look gets 0.5 on average, whatever the answer
    assert rewards[-1] > rewards[0] + 0.1


def test_the_answers_at_validations_are_shown_with_their_pictures(model, color_prompts, tmp_path):
    folder = tmp_path / "out"
    more = ("--iters", 2, "--valid-fraction", 0.5, "--val-batches", 1, "--group-size", 2, "--steps-per-eval", 1)
    succeeds(*reward_command(model, color_prompts, folder, *more, "--sample-tokens", 8))
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    facts = json.loads((folder / "report.json").read_text())
    assert {one["step"] for one in answers} >= {0, 2}
    assert all(len(one["pictures"]) == 1 and one["pictures"][0] in facts["pictures"] for one in answers)
    page = (folder / "report.html").read_text()
    assert facts["pictures"][answers[0]["pictures"][0]] in page
    assert '<div class="said">Which color?</div>' in page, "without the place of the picture, which is beside it"


@pytest.mark.long
def test_rloo_with_a_divergence_sees_pictures_too(model, color_prompts, tmp_path):
    more = ("--objective", "rloo", "--kl-beta", 0.1, "--updates-per-rollout", 2, "--iters", 2)
    succeeds(*reward_command(model, color_prompts, tmp_path / "a", *more))
    found = metrics(tmp_path / "a")
    assert all(np.isfinite(line["loss"]) for line in found if line.get("loss") is not None)


@pytest.mark.long
def test_a_plan_counts_the_pictures_of_prompts(model, color_prompts):
    asked = (
        "plan", "--model", model, "--data", color_prompts / "train.jsonl", "--objective", "grpo", "--images", "--json",
    )  # fmt: skip
    planned = json.loads(succeeds(*asked, "--group-size", 4, "--max-new-tokens", 8, "--reward", "exact_match").out)
    assert planned["data"]["longest"] > 8 + 16  # a picture has more tokens than the words
    assert planned["parts"]["other models"] > 0


# Sampling


@pytest.mark.parametrize("family", WRITING)
def test_the_training_pass_gives_the_samplers_log_probabilities(family, model_of, tmp_path):
    """What a step computes of whole rows is what the sampler had token by token: with one, two and no pictures."""
    rows = [preference("What is it?", numbers, "", "") for numbers in ((0,), (), (1, 3))]
    rows = [{name: row[name] for name in ("images", "prompt")} for row in rows]
    asked = {"objective": "grpo", "images": True, "reward": "exact_match", "group_size": 3, "max_new_tokens": 5}
    read = read_rows(model_of(family), write_pairs(tmp_path / "data", rows), **asked)
    model, objective = read.base.model, read.objective
    prepare_rotation(model, objective.pictures.vision.spec)
    prompts = [read.rows.row(3 * number)[0][:-5].tolist() for number in range(3)]
    digests = objective.pictures.table.of_numbers(read.rows.pictures[::3], 3)
    assert [len(one) for one in digests] == [1, 0, 2]
    model.eval()
    kept = PromptsWithPictures(vision=objective.pictures.vision, digests=digests, group=3)
    options, keys = SamplingOptions(3, 5, temperature=0.8), answer_keys(0, 0, 9)
    answers, logps = sample_groups(TokenSteps(model), prompts, options, frozenset(), keys, kept=kept)  # pyright: ignore[reportArgumentType]
    whole = [[*prompts[number // 3], *answer] for number, answer in enumerate(answers)]
    inputs = np.zeros((9, max(map(len, whole)) - 1), np.int32)
    targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
    for number, tokens in enumerate(whole):
        inputs[number, : len(tokens) - 1], targets[number, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        mask[number, len(tokens) - 6 : len(tokens) - 1] = True
    batch = Batch.of(inputs, targets, mask, group=3, pictures=read.rows.pictures)
    loss = at_temperature(choose_loss(model, read.base.config, "ours"), model, read.base.config, 0.8)
    with objective.pictures.shown(model, batch):
        found = token_logps(model, loss, batch)
    np.testing.assert_allclose(found[mask], np.concatenate(logps), atol=2e-4)
    shown = batch.columns["pictures"]
    swapped = batch.with_columns(pictures=np.where(shown == shown[0], 0, shown))
    with pytest.raises(ValueError, match="embeddings"):
        objective.pictures.arrays_of(swapped.with_columns(pictures=np.full(9, shown[-1], np.int32)))
    assert np.abs(token_logps(model, loss, batch)[mask][:15] - found[mask][:15]).max() > 1e-2


def test_an_image_token_that_the_model_writes_is_text(model, tmp_path):
    read = read_rows(model, write_pairs(tmp_path / "data"), objective="dpo", images=True)
    vision, token = read.pictures.vision, read.pictures.vision.tower.token
    tokens, _ = read.rows.row(0)
    digests = read.pictures.table.of_numbers(read.rows.pictures, len(read.rows))[0]
    longer = np.concatenate([tokens, [token, 5]]).astype(np.int32)
    places = np.array(vision.arrays(longer[None], [digests])[1])[0]
    assert (places[: len(tokens)] > 0).sum() == (tokens == token).sum() == places.max()
    assert not places[len(tokens) :].any()
    with pytest.raises(ValueError, match="embeddings"):
        vision.arrays(tokens[None, :20], [digests])


# Prompts


def prompt_of(record: dict):
    settings = DataSettings()
    (found,) = parse_record_of(Record(1, record), "x", settings, NamedColumns.of(settings), "prompts", True)[1]
    return found


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"images": ["a.png"], "prompt": "What is it?", "answer": "A cat"}, "<image>What is it?"),
        ({"image": "a.png", "question": "<image>What is it?", "answer": "A cat"}, "<image>What is it?"),
        ({"images": ["a.png"], "prompt": [SEEN], "answer": "A cat"}, [SEEN]),
        ({"images": ["a.png"], "messages": [SEEN, {"role": "assistant", "content": "A cat"}]}, [SEEN]),
        ({"prompt": "What is it?", "answer": "A cat"}, "What is it?"),
    ],
)
def test_rewards_see_the_row_as_it_is(record, asked):
    found = prompt_of({**record, "level": 3, "none": None})
    fact = found.fact(found.example)
    assert fact["prompt"] == asked
    assert fact["columns"]["level"] == 3
    assert fact["columns"]["answer"] == "A cat"
    assert {name: fact["columns"][name] for name in record} == record
    assert len(found.example.marks) == ("images" in record or "image" in record)
    assert "\U000fff00" not in str(fact)


def test_what_is_no_prompt_about_pictures():
    for record, words in (
        ({"images": ["a.png"], "text": "a cat"}, "without a text"),
        ({"images": ["a.png", "b.png"], "prompt": [SEEN]}, "2 pictures"),
    ):
        with pytest.raises(FormatError, match=words):
            prompt_of(record)


# What is refused


def test_what_cannot_be_sampled_is_told_in_one_line(model, paligemma, color_prompts, tiny_folder, tmp_path):
    one_line(run(*reward_command(tiny_folder, color_prompts, tmp_path / "a")), "llama")
    one_line(run(*reward_command(paligemma, color_prompts, tmp_path / "a")), "paligemma")


NEW = ("gemma4", "gemma4_31b", "mistral3", "paligemma", "paligemma2", "pixtral", "qwen3_5")


@pytest.mark.slow
@pytest.mark.parametrize("family", NEW)
def test_the_commands_take_a_family(family, tmp_path):
    try_family(family, tmp_path / family)


@pytest.fixture(scope="module")
def paligemma(model_of) -> Path:
    return model_of("paligemma")


def brief_command(model, data, folder, *more: object) -> tuple:
    return ("train", "--model", model, "--data", data, "--adapter-path", folder, "--iters", 1,
            "--batch-size", 1, "--kernels", "mlx", "--valid-fraction", 0, *more)  # fmt: skip


# PaliGemma


def test_paligemma_has_rows_of_one_question_and_tells_of_others(paligemma, tmp_path):
    ran = succeeds(
        *brief_command(paligemma, write_rows(tmp_path / "data"), tmp_path / "out")
    )  # the first has two questions
    holds(ran.err, "one question", "dropped 1")


def test_paligemma_trains_no_prompt_and_is_not_served(paligemma, tmp_path):
    data = write_rows(tmp_path / "data", chats_of("paligemma"))
    one_line(run(*brief_command(paligemma, data, tmp_path / "out", "--no-mask-prompt")), "--no-mask-prompt")
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
    shown = np.tri(4, dtype=bool).copy()
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
