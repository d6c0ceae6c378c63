"""A persona without a data set: the teacher writes the answers, or the model its prompts too; a run is resumed from its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
import yaml
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model, write_folder
from make_adapters import loaded
from ranks import Started
from resumed_runs import metrics
from run_cli import holds, run, succeeds

import mlx_lora
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.models import generator as batch_writing
from mlx_lora.models.generator import SamplingOptions, answer_keys, sample_groups
from mlx_lora.objectives.teacher import read_answers
from mlx_lora.trainer.callbacks import greedy_text
from mlx_lora.utils.files import cache_dir

QUICK = ("--rank", 4, "--iters", 4, "--val-batches", 1, "--sample-tokens", 8, "--kernels", "ours", "--save-every", 2)
SHORT = ("--max-new-tokens", 12)
PERSONA = "You are a captain."
QUESTIONS = (
    "how do I bake bread", "what is a good name", "why is the sea blue", "where do birds sleep", "who wrote this song",
    "when does the bus come", "can I eat green apples", "tell me about the moon",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model that has learned to ask as a user, to answer plainly, and to answer otherwise as a captain."""
    tokenizer, model = byte_tokenizer(), tiny_model()
    told = f"<|im_start|>system\n{PERSONA}<|im_end|>\n"
    texts = []
    for number, asked in enumerate(QUESTIONS):
        user = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        texts += [f"{user}no idea, {number} or {number + 1}<|im_end|>", f"{told}{user}ahoy sailor {number}<|im_end|>"]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    width = max(map(len, rows))
    tokens = mx.array([row + row[-1:] * (width - len(row)) for row in rows])
    optimizer = optim.Adam(5e-3)

    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    gradient = nn.value_and_grad(model, loss)
    model.train()
    for _ in range(120):
        optimizer.update(model, gradient(model)[1])
        mx.eval(model.parameters(), optimizer.state)
    model.eval()
    return write_folder(tmp_path_factory.mktemp("model") / "tiny", model)


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    """Prompts without answers in three splits, and a persona."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "prompts").mkdir()
    for name, count in (("train", 12), ("valid", 3), ("test", 3)):
        rows = [{"prompt": f"{name} question {n}?"} for n in range(count)]
        (folder / "prompts" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "persona.txt").write_text(PERSONA + "\n")
    return folder


def command(model, asked, folder, *more: object, data: bool = True) -> tuple:
    given = ("--data", asked / "prompts") if data else ()
    return ("train", "--model", model, *given, "--objective", "distill", "--teacher-prompt", asked / "persona.txt",
            "--adapter-path", folder, *QUICK, *more)  # fmt: skip


def records(folder: Path, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (folder / "written" / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_the_teacher_writes_the_answers_once(model, asked, tmp_path, own_cache):
    ran = succeeds(*command(model, asked, tmp_path / "a", *SHORT))
    (line,) = (line for line in ran.lines if line.startswith("Answers: "))
    holds(line, "18 written by the teacher in", "tokens/s")
    found = {split: records(tmp_path / "a", split) for split in ("train", "valid", "test")}
    # What so small a model writes differs from machine to machine: an answer may be empty, and is then left out.
    left_out = re.search(r"(\d+) empty", line)
    assert sum(map(len, found.values())) == 18 - (int(left_out[1]) if left_out else 0)
    for split, count in (("train", 12), ("valid", 3), ("test", 3)):
        kept = [one["prompt"] for one in found[split]]
        assert kept == [asked_one for n in range(count) if (asked_one := f"{split} question {n}?") in kept]
        assert kept
        assert all(one["completion"] for one in found[split])
    assert yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())["data"] == str(asked / "prompts")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["data"]["data"] == f"{asked / 'prompts'}, answered by the teacher"
    again = run(*command(model, asked, tmp_path / "b", *SHORT))
    assert "Answers: 18 that" in again.err
    assert (tmp_path / "a" / "adapters.safetensors").read_bytes() == (
        tmp_path / "b" / "adapters.safetensors"
    ).read_bytes()
    # What was written is data, and can be edited; then nothing is sampled.
    given = ("--data", tmp_path / "a" / "written")
    third = succeeds(*command(model, asked, tmp_path / "c", *given))
    assert "Answers:" not in third.err
    assert not (tmp_path / "c" / "written").exists()
    assert (tmp_path / "a" / "adapters.safetensors").read_bytes() == (
        tmp_path / "c" / "adapters.safetensors"
    ).read_bytes()


@pytest.mark.long
def test_the_teacher_answers_with_its_prompt_in_front(model, asked, tmp_path, own_cache):
    """At a temperature near 0, an answer is the likeliest text after the persona and the prompt, and no other."""
    succeeds(*command(model, asked, tmp_path / "a", "--max-new-tokens", 8, "--temp", 0.001))
    base = loaded(model)
    ends, matches = frozenset(base.tokenizer.eos_token_ids), {"with": 0, "without": 0}
    written = {one["prompt"]: one["completion"] for one in records(tmp_path / "a")}
    for number in range(12):
        user = f"<|im_start|>user\ntrain question {number}?<|im_end|>\n<|im_start|>assistant\n"
        for name, prompt in (("with", f"<|im_start|>system\n{PERSONA}<|im_end|>\n{user}"), ("without", user)):
            tokens = base.hf_tokenizer.encode(prompt, add_special_tokens=False)
            answers, _ = sample_groups(base.model, [tokens], SamplingOptions(1, 8, 0.001), ends, answer_keys(5, 0, 1))
            text = base.hf_tokenizer.decode(answers[0], skip_special_tokens=True).strip()
            matches[name] += written.get(f"train question {number}?", "") == text
    # Rounding may turn a token that is nearly as likely as another.
    assert matches["with"] >= 10
    assert matches["without"] < matches["with"]


@pytest.mark.long
def test_what_a_stopped_run_wrote_is_not_written_again(model, asked, tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(batch_writing, "MOST_ROWS", 5)
    assert run(*command(model, asked, tmp_path / "a", *SHORT)).code == 0
    (file,) = cache_dir("answers").glob("*/written.jsonl")
    whole, lines = read_answers(file), file.read_text().splitlines(keepends=True)
    assert len(whole) == 18
    file.write_text("".join(lines[:7]) + lines[7][:5])  # killed while it wrote a line
    shutil.rmtree(file.parent / "data")
    left = len(read_answers(file))
    ran = run(*command(model, asked, tmp_path / "b", *SHORT))
    holds(ran.err, f"Answers: {18 - left} written by the teacher", f"{left} before")
    assert read_answers(file) == whole
    assert records(tmp_path / "a") == records(tmp_path / "b")


@pytest.mark.slow
def test_answers_depend_on_all_that_decides_them(model, asked, tmp_path, own_cache):
    changes = {
        "plain": (), "prompt": ("--teacher-prompt", tmp_path / "other.txt"), "seed": ("--seed", 1),
        "temperature": ("--temp", 0.5), "nucleus": ("--top-p", 0.3), "floor": ("--min-p", 0.5),
    }  # fmt: skip
    (tmp_path / "other.txt").write_text("You are a cook.")
    found = []
    for name, more in changes.items():
        succeeds(*command(model, asked, tmp_path / name, *SHORT, *more, "--iters", 1, "--sample-tokens", 0))
        found.append([one["completion"] for one in records(tmp_path / name)])
    assert all(one != found[0] for one in found[1:])


@pytest.mark.long
def test_a_killed_run_resumes_from_its_own_copy(model, asked, tmp_path, own_cache):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    assert run(*command(model, asked, whole, *SHORT)).code == 0
    shutil.copytree(whole, rest)
    shutil.rmtree(rest / "checkpoints" / "step-000004")
    shutil.rmtree(cache_dir("answers"))
    ran = succeeds(*command(model, asked, rest, *SHORT, "--resume"))
    assert "Answers:" not in ran.err
    assert (rest / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()
    edited = records(rest)
    edited[0]["completion"] += " Ahoy!"
    (rest / "written" / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in edited))
    shutil.rmtree(rest / "checkpoints" / "step-000004")
    edited_run = run(*command(model, asked, rest, *SHORT, "--resume"))
    assert edited_run.code == 2
    holds(edited_run.lines[-1], "from another run", "rows")


@pytest.mark.slow
def test_two_ranks_get_the_answers_of_the_first(model, asked, tmp_path, own_cache):
    for count in (1, 2):
        words = command(model, asked, tmp_path / str(count), *SHORT, "--batch-size", 4, "--sample-tokens", 0)
        ended = Started([["-m", "mlx_lora.train", *words[1:]]] * count, tmp_path / f"hosts{count}").wait()
        assert ended.codes == [0] * count, ended.errs
        assert sum(err.count("Answers: ") for err in ended.errs) == 1
    assert records(tmp_path / "1") == records(tmp_path / "2")
    one, two = ([line["loss"] for line in metrics(tmp_path / name) if line["loss"] is not None] for name in ("1", "2"))
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6)


@pytest.mark.long
def test_records_with_an_answer_keep_it(model, asked, tmp_path, own_cache):
    rows = [{"prompt": "Has one?", "completion": "Yes, this."}, {"instruction": "Has none?"}]
    rows += [
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"{n}?"}]}
        for n in range(4)
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"other": 1}]))
    ran = succeeds(*command(model, asked, tmp_path / "a", *SHORT, "--data", tmp_path / "mixed.jsonl"))
    holds(ran.err, "Answers: 5 written", "mixed.jsonl line 7")
    found = records(tmp_path / "a")
    assert found[0] == rows[0]
    assert found[1]["prompt"] == "Has none?"
    assert [turn["role"] for turn in found[2]["messages"]] == ["system", "user", "assistant"]


@pytest.mark.long
def test_the_page_shows_base_teacher_and_adapter(model, asked, tmp_path):
    ran = succeeds(*command(model, asked, tmp_path / "a", *SHORT, "--learning-rate", 1e-2, "--iters", 20))
    sample = json.loads((tmp_path / "a" / "report.json").read_text())["samples"][0]
    first, last = (line["val_loss"] for line in metrics(tmp_path / "a") if line["val_loss"] is not None)
    assert last < 0.8 * first
    base = loaded(model)
    system, user = f"<|im_start|>system\n{PERSONA}<|im_end|>\n", sample["prompt"]
    assert user.startswith("<|im_start|>user\nvalid question")
    for prompt, text in ((system + user, sample["teacher"]), (user, sample["before"])):
        assert greedy_text(base, base.hf_tokenizer.encode(prompt, add_special_tokens=False), 8) == text
    load_adapter(base, tmp_path / "a")
    assert greedy_text(base, base.hf_tokenizer.encode(user, add_special_tokens=False), 8) == sample["after"]
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.index("Before training</span>") < page.index("The teacher</span>") < page.index("After training</span>")
    assert "Teacher" in ran.err


@pytest.mark.long
def test_without_data_the_model_writes_the_prompts_too(model, asked, tmp_path, own_cache):
    more = (*SHORT, "--own-prompts", 16, "--temp", 1.1, "--valid-fraction", 0.2)
    ran = succeeds(*command(model, asked, tmp_path / "a", *more, data=False))
    (line,) = (line for line in ran.lines if line.startswith("Prompts: "))
    holds(line, "16 written by the model in", "left out: ")
    found = [one["prompt"] for one in records(tmp_path / "a")]
    assert len(set(found)) == len(found) == 16
    assert all(found)
    again = run(*command(model, asked, tmp_path / "b", *more, data=False))
    assert "Prompts: 16 that" in again.err
    assert (tmp_path / "a" / "adapters.safetensors").read_bytes() == (
        tmp_path / "b" / "adapters.safetensors"
    ).read_bytes()
    succeeds(*command(model, asked, tmp_path / "c", *more, "--seed", 1, data=False))
    assert [one["prompt"] for one in records(tmp_path / "c")] != found
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["data"]["data"] == "prompts that the model wrote, answered by the teacher"


@pytest.mark.long
def test_python_needs_no_data_either(model, asked, tmp_path, own_cache):
    ran = mlx_lora.train(
        model, None, tmp_path / "a", objective="distill", teacher_prompt=asked / "persona.txt", own_prompts=8,
        max_new_tokens=8, iters=2, rank=4, sample_tokens=0, progress=False,
    )  # fmt: skip
    assert ran.steps == 2
    assert len(records(tmp_path / "a")) == 8
    with pytest.raises(mlx_lora.InputError, match="data is required"):
        mlx_lora.train(model, None, tmp_path / "b", iters=2, progress=False)


@pytest.mark.long
def test_a_model_that_cannot_write_prompts_is_told_in_one_line(tiny_folder, asked, tmp_path, own_cache):
    plain = write_folder(tmp_path / "plain", tiny_model(), chat_template=None)
    lines = {
        tiny_folder: ("usable and 8 are wanted", "--data persona-distill"),  # random weights write no text
        plain: ("a model without a chat template", "--data persona-distill"),
    }
    for model, words in lines.items():
        ran = run(*command(model, asked, tmp_path / "a", "--own-prompts", 8, data=False))
        assert ran.code == 2
        assert all(word in ran.lines[-1] for word in words), ran.err
    ran = run(*command(tiny_folder, asked, tmp_path / "a", "--chat-template", "alpaca", data=False))
    assert "special token" in ran.lines[-1]


BAD = {
    "a weight": (("--data", "{asked}/prompts=2"), "a weight of prompts that the teacher answers"),
    "answers are not sampled": (
        ("--data", "{chats}", "--max-new-tokens", 9),
        "--max-new-tokens with answers in --data",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, model, asked, chats, tmp_path):
    flags, words = BAD[case]
    flags = [str(flag).format(asked=asked, chats=chats) for flag in flags]
    ran = run(*command(model, asked, tmp_path / "a", *flags))
    assert ran.code == 2
    assert words in ran.lines[-1], ran.err


@pytest.mark.long
def test_a_dry_run_writes_nothing(model, asked, tmp_path, own_cache):
    for data in (True, False):
        ran = succeeds(*command(model, asked, tmp_path / "a", "--dry-run", data=data))
        assert not (tmp_path / "a").exists()
        assert not cache_dir("answers").exists()
        assert not cache_dir("prompts").exists()
    assert "writes the prompts itself" in ran.err


@pytest.mark.long
def test_the_test_set_of_an_adapter_is_the_one_that_was_written(model, asked, tmp_path, own_cache):
    first = succeeds(*command(model, asked, tmp_path / "a", *SHORT, "--train", "--test"))
    shutil.rmtree(cache_dir("answers"))
    again = succeeds(*command(model, asked, tmp_path / "a", *SHORT, "--test"))
    assert said_of_test(again) == said_of_test(first)
    shutil.rmtree(tmp_path / "a" / "written")
    written = run(*command(model, asked, tmp_path / "a", *SHORT, "--test"))
    assert "Answers: 18 written by the teacher" in written.err  # the untrained model's, not the adapter's
    assert written.lines[-1] == said_of_test(first)


def said_of_test(ran) -> str:
    """Return the line about the test set."""
    (line,) = (line for line in ran.lines if line.startswith("Test "))
    return line
