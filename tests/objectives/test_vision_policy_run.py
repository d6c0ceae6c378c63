"""Rewards of answers about pictures through the commands: what is sampled, what rewards get, learning, resume, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from resumed_runs import stopped_after, weights
from run_cli import one_line, run, succeeds
from tiers import by_default
from tiny_vision import MAKERS, write_model_here
from vision_rows import preference, read_rows, write_pairs

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.examples import FormatError, Record
from mlx_lora.data.formats import NamedColumns
from mlx_lora.data.read import parse_record_of
from mlx_lora.losses.check import choose_loss
from mlx_lora.models.image_inputs import prepare_rotation
from mlx_lora.objectives.policy_arrays import at_temperature, token_logps
from mlx_lora.rollouts.generator import SamplingOptions, TokenSteps, answer_keys, sample_groups
from mlx_lora.rollouts.rollout import PromptsWithPictures

pytest.importorskip("mlx_vlm")
FAMILIES = by_default([name for name in sorted(MAKERS) if "pali" not in name], "smolvlm", "qwen2_5_vl", "gemma3")
COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
HALF = 160  # token ids below are "low"
REWARD = f"""
def low_for_red(completion_ids, color, images, prompts, **columns):
    assert all(name[0].endswith(".png") for name in images)
    assert all(prompt == "<image>Which color?" for prompt in prompts), prompts
    shares = [sum(token < {HALF} for token in ids) / len(ids) for ids in completion_ids]
    return [share if name == "red" else 1 - share for share, name in zip(shares, color)]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model_here("smolvlm", tmp_path_factory.mktemp("model") / "smolvlm")


@pytest.fixture(scope="module")
def colors(tmp_path_factory) -> Path:
    """Prompts of the same words, whose best answers depend on the picture; a reward; and one row that cannot be used."""
    folder = tmp_path_factory.mktemp("colors")
    rows = []
    for number in range(4):
        name = list(COLORS)[number % 2]
        Image.new("RGB", (40 + number // 2, 50), COLORS[name]).save(folder / f"{number}.png")
        rows.append({"prompt": "Which color?", "images": [f"{number}.png"], "color": name})
    rows.append({"prompt": "Which color?", "images": ["no.png"], "color": "red"})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD)
    return folder


def command(model, colors, folder, *more: object) -> tuple:
    return (
        "train", "--model", model, "--data", colors / "train.jsonl", "--adapter-path", folder, "--objective", "grpo", "--images",
        "--reward", f"{colors / 'reward.py'}:low_for_red", "--group-size", 24, "--max-new-tokens", 2, "--iters", 12,
        "--batch-size", 4, "--learning-rate", "1e-2", "--rank", 8, "--kernels", "ours", "--warmup", 0, "--steps-per-report", 2,
        "--lr-schedule", "constant", "--valid-fraction", 0, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(model, colors, tmp_path_factory):
    """A run with checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return folder, run(*command(model, colors, folder, "--save-every", 6, "--keep", 0))


def test_a_run_learns_what_a_picture_is_rewarded_for(trained):
    folder, ran = trained
    assert ran.code == 0, ran.err
    assert "4 pictures" in ran.err
    assert "no.png" in ran.err
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in found if line.get("loss") is not None]
    assert rewards[-1] > 0.65  # who does not look gets 0.5 on average, whatever the answer
    assert rewards[-1] > rewards[0] + 0.1


def test_the_answers_at_validations_are_shown_with_their_pictures(model, colors, tmp_path):
    folder = tmp_path / "out"
    more = ("--iters", 2, "--valid-fraction", 0.5, "--val-batches", 1, "--group-size", 2, "--steps-per-eval", 1)
    succeeds(*command(model, colors, folder, *more))
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    facts = json.loads((folder / "report.json").read_text())
    assert {one["step"] for one in answers} >= {0, 2}
    assert all(len(one["pictures"]) == 1 and one["pictures"][0] in facts["pictures"] for one in answers)
    page = (folder / "report.html").read_text()
    assert facts["pictures"][answers[0]["pictures"][0]] in page
    assert '<div class="said">Which color?</div>' in page, "without the place of the picture, which is beside it"


def test_a_resumed_run_ends_with_the_same_bytes(trained, model, colors, tmp_path):
    folder, _ = trained
    copy = stopped_after(folder, tmp_path / "copy", 6)
    asked = command(model, colors, copy, "--save-every", 6, "--keep", 0, "--resume", "auto")
    assert run(*asked).code == 0
    assert weights(copy) == weights(folder)


def test_rloo_with_a_divergence_sees_pictures_too(model, colors, tmp_path):
    more = ("--objective", "rloo", "--kl-beta", 0.1, "--updates-per-rollout", 2, "--iters", 2)
    succeeds(*command(model, colors, tmp_path / "a", *more))
    found = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in found if line.get("loss") is not None)


def test_a_plan_counts_the_pictures(model, colors):
    asked = ("plan", "--model", model, "--data", colors / "train.jsonl", "--objective", "grpo", "--images", "--json")
    ran = succeeds(*asked, "--group-size", 4, "--max-new-tokens", 8, "--reward", "exact_match")
    planned = json.loads(ran.out)
    assert planned["data"]["longest"] > 8 + 16  # a picture has more tokens than the words
    assert planned["parts"]["other models"] > 0


# Sampling


@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_pass_gives_the_samplers_log_probabilities(family, tmp_path):
    """What a step computes of whole rows is what the sampler had token by token: with one, two and no pictures."""
    rows = [preference("What is it?", numbers, "", "") for numbers in ((0,), (), (1, 3))]
    rows = [{name: row[name] for name in ("images", "prompt")} for row in rows]
    asked = {"objective": "grpo", "images": True, "reward": "exact_match", "group_size": 3, "max_new_tokens": 5}
    read = read_rows(write_model_here(family, tmp_path / "model"), write_pairs(tmp_path / "data", rows), **asked)
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
    blind = token_logps(model, loss, batch)
    assert np.abs(blind[mask][:15] - found[mask][:15]).max() > 1e-2


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

SEEN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}


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


def test_what_cannot_be_sampled_is_told_in_one_line(model, colors, tiny_folder, tmp_path):
    asked = command(model, colors, tmp_path / "a")
    one_line(run(*asked, "--tools", colors / "reward.py"), "--tools")
    one_line(run(*command(tiny_folder, colors, tmp_path / "a")), "llama")
    one_line(run(*asked, "--shared-prefix", "on"), "--shared-prefix")
    pali = write_model_here("paligemma", tmp_path / "model")
    one_line(run(*command(pali, colors, tmp_path / "a")), "paligemma")
