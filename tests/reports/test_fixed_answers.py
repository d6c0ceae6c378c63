"""The same held-out prompts at every validation: their answers, their file, and what the page shows of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from browser import look
from make_adapters import loaded
from resumed_runs import metrics
from run_cli import run, succeeds

from mlx_lora.data.dataset import EncodedSet
from mlx_lora.reports.run_report import (
    MOST_CHARACTERS,
    MOST_VALIDATIONS,
    RunReport,
    add_answers,
    begin_lines,
    read_answers,
    rollout_charts,
    shown_answers,
    tiles,
    verdict,
)
from mlx_lora.rollouts.rollout import Rollouts

EVIL = "<script>alert(1)</script> & \"'\u2028"
REWARD = """
def odd(completions, **columns):
    return [sum(ord(letter) % 2 for letter in text) / max(1, len(text)) for text in completions]

def sometimes(completions, answer, **columns):
    return [None if int(n) % 2 else 1.0 for n in answer]
"""
QUICK = ("--learning-rate", "1e-2", "--batch-size", 2, "--group-size", 4, "--max-new-tokens", 8, "--kernels", "ours",
         "--steps-per-report", 1, "--rank", 4, "--warmup", 0)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    for name, numbers in (("train", range(8)), ("valid", range(20, 26))):
        rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "mine.py").write_text(REWARD)
    return folder


@pytest.fixture
def three(monkeypatch):
    """Three prompts, as outside of tests."""
    monkeypatch.setattr("mlx_lora.trainer.callbacks.TEXTS", 3)


def command(model: Path, data: Path, folder: Path, *more: object) -> tuple:
    rewards = f"{data / 'mine.py'}:odd,{data / 'mine.py'}:sometimes"
    return ("train", "--model", model, "--data", data, "--adapter-path", folder, "--objective", "grpo",
            "--reward", rewards, *QUICK, *more)  # fmt: skip


@pytest.mark.long
def test_a_run_shows_how_its_answers_change(three, tiny_folder, data, tmp_path):
    folder = tmp_path / "a"
    more = ("--iters", 8, "--steps-per-eval", 4, "--save-every", 4, "--updates-per-rollout", 2, "--kl-beta", 0.01)
    more += ("--learning-rate", "5e-2")
    ran = succeeds(*command(tiny_folder, data, folder, *more))
    answers = read_answers(folder / "answers.jsonl")
    assert [(one["step"], one["number"]) for one in answers] == [(step, n) for step in (0, 4, 8) for n in range(3)]
    assert len({one["prompt"] for one in answers}) == 3
    assert all(re.fullmatch(r"2\d\+1=", one["prompt"]) for one in answers), "held out, as rewards see them"
    for one in answers:
        odd, sometimes = one["rewards"]["odd"], one["rewards"]["sometimes"]
        assert one["reward"] == pytest.approx(odd + (sometimes or 0))
        assert sometimes == (None if int(one["prompt"][1]) % 2 == 0 else 1.0)
        assert odd == pytest.approx(sum(ord(x) % 2 for x in one["answer"]) / max(1, len(one["answer"])))
        assert 1 <= one["length"] <= 8
    assert [one["answer"] for one in answers[:3]] != [one["answer"] for one in answers[-3:]]
    page = (folder / "report.html").read_text()
    assert "Answers during training" in page
    assert "Before and after training" not in page
    assert page.count('<table class="answers">') == 3
    for title in ("Reward", "Reward: odd", "Reward: sometimes", "Spread of a prompt", "Tokens of an answer",
                  "Answers cut at", "Divergence from", "Share of the time in rollouts", "sampled, while sampling"):  # fmt: skip
        assert title in page, title
    # The end of the run tells the first of them, before and after.
    assert ran.lines[ran.lines.index("One text, before and after training:") + 1].split()[-1] == answers[0]["prompt"]
    kept = [line for line in metrics(folder) if line["val_loss"] is not None]
    assert kept[0]["reward/sometimes"] == 1.0, "of those that have one"

    # Killed after the fourth step, the run goes on to the same answers.
    shutil.copytree(folder, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-000008")
    assert run(*command(tiny_folder, data, tmp_path / "cut", *more, "--resume")).code == 0
    assert (tmp_path / "cut/answers.jsonl").read_bytes() == (folder / "answers.jsonl").read_bytes()


@pytest.mark.long
def test_the_answers_are_greedy_change_nothing_and_can_be_left_out(tiny_folder, data, tmp_path):
    for name, tokens in (("with", 8), ("without", 0)):
        more = ("--iters", 2, "--steps-per-eval", 1, "--dropout", 0.1, "--sample-tokens", tokens)
        succeeds(*command(tiny_folder, data, tmp_path / name, *more))
    with_them, without = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in ("with", "without"))
    assert with_them == without
    assert not (tmp_path / "without/answers.jsonl").exists()
    assert "Answers during training" not in (tmp_path / "without/report.html").read_text()
    first = read_answers(tmp_path / "with/answers.jsonl")[0]
    base = loaded(tiny_folder)
    prompt = f"<|im_start|>user\n{first['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    tokens = base.hf_tokenizer.encode(prompt, add_special_tokens=False)
    for _ in range(first["length"]):
        tokens.append(int(mx.argmax(base.model(mx.array([tokens]))[0, -1]).item()))
    assert base.hf_tokenizer.decode(tokens[-first["length"] :], skip_special_tokens=True) == first["answer"]


def test_prompts_are_different_and_spaced_by_length():
    rows = [(np.full(length, 5), np.zeros(length, bool)) for length in (3, 3, 9, 6, 20, 12)]
    facts = [{"prompt": str(length)} for length in (3, 3, 9, 6, 20, 12)]
    of = EncodedSet.from_rows(rows).with_facts(facts)
    found = Rollouts.fixed_prompts(of.with_room(4, 5), 3)
    assert [len(one.tokens) for one in found] == [int(one.fact["prompt"]) for one in found] == [3, 9, 20]
    twice = of.select([0, 1]).with_room(4, 5)
    assert len(Rollouts.fixed_prompts(twice, 3)) == 1


def answer(step: int, text: str, **more: object) -> dict:
    return {"step": step, "number": 0, "prompt": "a", "answer": text, "length": 3, "reward": 0.5, "rewards": {}} | more


def test_the_page_has_a_bounded_part_of_long_runs_and_texts(tmp_path):
    file = tmp_path / "answers.jsonl"
    for step in range(0, 1000, 10):
        add_answers(file, step, [{"prompt": EVIL, "answer": EVIL + "x" * 5000, "length": 1, "truncated": True}])
    (shown,) = shown_answers(read_answers(file))
    assert len(shown["answers"]) == MOST_VALIDATIONS
    assert (shown["answers"][0]["step"], shown["answers"][-1]["step"]) == ("0", "990")
    assert len({one["step"] for one in shown["answers"]}) == MOST_VALIDATIONS
    assert len(shown["answers"][0]["text"]) == MOST_CHARACTERS + 4
    assert (shown["answers"][0]["reward"], shown["answers"][0]["about"]) == ("–", "1 token, cut off")
    begin_lines(file, 20)
    assert [one["step"] for one in read_answers(file)] == [0, 10, 20]
    with file.open("a") as out:
        out.write('{"step": 30, "prom')  # a kill
    assert [one["step"] for one in read_answers(file)] == [0, 10, 20]
    begin_lines(file, None)
    assert read_answers(file) == []


def test_other_prompts_after_a_change_of_data_are_the_ones_shown():
    earlier = [answer(0, "x", prompt=name) for name in "pqr"]
    later = [answer(9, "y", prompt=name, number=n) for n, name in enumerate("stu")]
    assert [one["turns"] for one in shown_answers(earlier + later)] == [[("User", name)] for name in "stu"]
    chat = [{"role": "system", "content": "s" * 5000}, {"role": "user", "content": "u"}]
    (shown,) = shown_answers([answer(0, "", prompt=chat)])
    assert [role for role, _ in shown["turns"]] == ["System", "User"]
    assert len(shown["turns"][0][1]) < 1000
    assert shown["answers"][0]["text"] == "(empty text)"


def record(step: int, trained: bool = True, **more: object) -> dict:
    return {
        "step": step, "loss": 0.1 if trained else None, "val_loss": None if trained else -0.5, "learning_rate": 1e-4,
        "grad_norm": 0.5, "supervised_tokens_per_s": 100.0, "tokens_per_s": 150.0, "supervised_tokens": 10 * trained,
        "peak_memory_bytes": 2 * 10**9, "process_peak_bytes": 3 * 10**9, "skipped_steps": 0, "elapsed_s": step * 2.0,
        "reward": step / 10, "reward/a rule": step / 20, "reward/another": None, "reward_std": 0.3,
        "frac_reward_zero_std": 0.0, "length": 20.0 - step, "truncated": 0.0, **more,
    }  # fmt: skip


def records() -> list[dict]:
    of_steps = {"kl": 0.1, "clipped": 0.0, "rollout_tokens_per_s": 50.0, "rollout_share": 0.7}
    trained = [record(step, **of_steps) for step in range(1, 10)]
    return [record(0, False), *trained, record(9, False)]


def test_curves_of_rewards():
    found = {title: series for title, series, _, _ in rollout_charts(records())}
    assert list(found) == [
        "Reward", "Reward: a rule", "Spread of a prompt's rewards", "Tokens of an answer",
        "Divergence from the untrained model", "Share of the time in rollouts",
    ]  # fmt: skip
    assert [one.name for one in found["Reward"]] == ["training", "held out"]
    assert found["Reward"][1].points == [(0, 0.0), (9, 0.9)], "a reward of zero is a point"
    assert rollout_charts([{"step": 1, "loss": 1.0, "val_loss": None}]) == []


def test_tiles_and_notes_are_about_rewards():
    shown = dict(tiles(records()))
    assert shown["held-out reward"] == "0.000 → 0.900"
    assert shown["training reward"] == "0.100 → 0.900"
    assert "held-out loss" not in shown
    assert verdict(records(), {}).notes == []
    alike = [{**one, "frac_reward_zero_std": 0.8} for one in records()]
    assert "all answers to 80% of the prompts had the same reward" in verdict(alike, {}).notes[0]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records()))
    (tmp_path / "run.yaml").write_text("objective: grpo\n")
    split = {"rows": 9, "tokens": 90, "supervised_tokens": 50, "median_length": 10, "max_length": 12}
    data = {
        "data": "prompts", "rows_read": 10, "splits": {"train": split}, "valid_source": "file", "template": "none",
        "truncated": 0, "duplicates": 0, "empty": 0, "dropped": 1, "notes": [], "example": [("Good", True)],
        "records": "prompts",
    }  # fmt: skip
    long = "word " * 400 + "w" * 300
    own = {"short_and_right": 0.25, "a_reward_model_with_a_long_name": -11.123456}
    texts = [EVIL, long, "line\n\nline", ""]
    for step, text in enumerate(texts):
        add_answers(
            tmp_path / "answers.jsonl",
            step * 10_000,
            [answer(step, text, prompt=prompt, rewards=own, truncated=True) for prompt in (EVIL, long, "2+2=")],
        )
    RunReport("", "", "", "", "", data).write(tmp_path)
    return tmp_path


def test_nothing_of_an_answer_runs_as_markup(folder):
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4
    assert "<small>short_and_right 0.25 · a_reward_model_with_a_long_name -11.12 · 3 tokens, cut off</small>" in page


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(folder, width, dark):
    seen = look(folder / "report.html", width, dark)
    assert not seen.console
    assert seen.found["needed"] <= width == seen.found["width"]
    assert seen.found["outside"] == []
    assert seen.found["clipped"] == 0
