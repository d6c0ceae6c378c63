"""Preferences about pictures through the commands: forms of rows, learning, resume, plan, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from resumed_runs import stopped_after, weights
from run_cli import one_line, run, succeeds
from tiny_vision import write_model_here
from vision_rows import PAIRS, picture, preference, read_rows, write_pairs

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.examples import FormatError, Record
from mlx_lora.data.formats import NamedColumns
from mlx_lora.data.images import MARK
from mlx_lora.data.read import parse_record_of
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.objectives.reference import row_log_probabilities

pytest.importorskip("mlx_vlm")
COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
QUESTION = {"role": "user", "content": "What is it?"}
SEEN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("A cat.", "A dog."))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model_here("smolvlm", tmp_path_factory.mktemp("model") / "smolvlm")


@pytest.fixture(scope="module")
def colors(tmp_path_factory) -> Path:
    """Pairs of color names, of which the picture says which one is better, and one row that cannot be used."""
    folder = tmp_path_factory.mktemp("colors")
    rows = []
    for number in range(16):
        good, bad = list(COLORS)[:: 1 if number % 2 else -1]
        Image.new("RGB", (40 + number // 2, 50), COLORS[good]).save(folder / f"{number}.png")
        rows.append({"prompt": "Which color?", "chosen": good, "rejected": bad, "images": [f"{number}.png"]})
    rows.append({"prompt": "?", "chosen": "x", "rejected": "y", "images": ["no.png"]})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def command(model, data, folder, *more: object) -> tuple:
    return (
        "train", "--model", model, "--data", data, "--adapter-path", folder, "--objective", "dpo", "--iters", 8,
        "--batch-size", 4, "--learning-rate", "2e-2", "--rank", 4, "--kernels", "ours", "--warmup", 0, "--steps-per-report", 2,
        "--valid-fraction", 0, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(model, colors, tmp_path_factory):
    """A run with checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return folder, run(*command(model, colors / "train.jsonl", folder, "--save-every", 4, "--keep", 0))


def test_a_run_learns_which_answer_a_picture_asks_for(trained, model, colors):
    folder, ran = trained
    assert ran.code == 0, ran.err
    assert "16 pictures" in ran.err
    assert "no.png" in ran.err
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in found if line.get("loss") is not None]
    assert losses[-1] < 0.8 * losses[0]
    asked = ("evaluate", "--objective", "dpo", "--images", "--model", model, "--data", colors / "train.jsonl", "--json")
    measured = json.loads(run(*asked, "--adapter-path", folder).out)
    # Both answers are right for half of the pictures, so who does not look is right in half of the pairs.
    assert measured["accuracy"] > 0.8
    assert measured["rows"] == 16


@pytest.mark.slow
def test_an_adapter_is_measured_against_the_one_that_its_run_began_with(trained, model, colors, tmp_path):
    more = ("--resume-adapter-file", trained[0], "--learning-rate", "1e-9", "--iters", 1)
    succeeds(*command(model, colors / "train.jsonl", tmp_path / "a", *more))
    asked = ("--objective", "dpo", "--images", "--model", model, "--data", colors / "train.jsonl")
    found = run("evaluate", *asked, "--adapter-path", tmp_path / "a", "--json")
    assert json.loads(found.out)["margin"] == pytest.approx(0, abs=1e-4)
    shutil.copytree(colors, tmp_path / "data")
    shutil.copy(colors / "train.jsonl", tmp_path / "data/test.jsonl")
    alone = succeeds("train", *asked, "--data", tmp_path / "data", "--adapter-path", tmp_path / "a", "--test")
    assert "margin 0.0000" in alone.err or "margin -0.0000" in alone.err


def test_a_resumed_run_ends_with_the_same_bytes(trained, model, colors, tmp_path):
    folder, _ = trained
    copy = stopped_after(folder, tmp_path / "copy", 4)
    asked = command(model, colors / "train.jsonl", copy, "--save-every", 4, "--keep", 0, "--resume", "auto")
    assert run(*asked).code == 0
    assert weights(copy) == weights(folder)


def test_a_plan_counts_the_pictures(model, colors, tmp_path):
    def planned(data: Path) -> dict:
        ran = succeeds(
            "plan", "--model", model, "--data", data, "--objective", "dpo", "--images", "--batch-size", 4, "--json"
        )
        return json.loads(ran.out)

    seen = planned(colors / "train.jsonl")
    rows = [json.loads(line) for line in (colors / "train.jsonl").read_text().splitlines()[:16]]
    blind = tmp_path / "train.jsonl"
    blind.write_text("\n".join(json.dumps({**row, "images": []}) for row in rows))
    without = planned(blind)
    assert seen["data"]["tokens"] > without["data"]["tokens"] + 32 * 4
    # The tower, frozen, and what it makes of pictures.
    assert seen["parts"]["other models"] > without["parts"]["other models"] > 0


@pytest.mark.parametrize("objective", ["orpo", "kto"])
def test_other_objectives_see_pictures_too(objective, model, colors, tmp_path):
    ran = succeeds(*command(model, colors / "train.jsonl", tmp_path / "a", "--objective", objective, "--iters", 2))
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


def test_what_cannot_see_is_told_in_one_line(model, colors, tiny_folder, tmp_path):
    data = colors / "train.jsonl"
    one_line(run(*command(tiny_folder, data, tmp_path / "a", "--images")), "llama")
    blind = ("train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "a", "--iters", 1)
    one_line(run(*blind, "--objective", "dpo"), "vision-language")
    one_line(run(*blind, "--objective", "classify", "--images"), "--images")
    one_line(run(*command(model, data, tmp_path / "a", "--objective", "reward", "--images")), "--images", "reward")
    one_line(run(*command(model, data, tmp_path / "a", "--shared-prefix", "on")), "--shared-prefix")
    one_line(run(*command(model, data, tmp_path / "a", "--cache-trunk", "on")), "--cache-trunk")


def test_a_prompt_that_sees_itself_is_not_trained(tmp_path):
    model = write_model_here("paligemma", tmp_path / "model")
    ran = run(*command(model, write_pairs(tmp_path / "data", PAIRS), tmp_path / "a", "--objective", "orpo"))
    one_line(ran, "orpo", "paligemma")
