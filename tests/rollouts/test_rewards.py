"""Rewards by name and from files: their values, their failures, and that TRL's own functions run as they are."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from mlx_lora.api.train import named_functions
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.rollouts.rewards import (
    FirstTimes,
    Reward,
    TrainerState,
    means_of_known,
    ready_reward,
    reports_of,
    rewards_for,
    rewards_of,
    summed,
)
from mlx_lora.utils.errors import InputError, RunError

ASKED = ObjectiveSettings("grpo")


def given(name: str, *texts: str, chat: bool = False, **columns):
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    ids = [list(range(len(text))) for text in texts]
    return ready_reward(name)(prompts=["?"] * len(texts), completions=completions, completion_ids=ids, **columns)


GSM8K = ["She has 3 + 4.\n#### 7", "#### 1,200"]
THOUGHTS = "<think>a</think> b", "<think>a</think>", "b", "<think><think>a</think> b"
COLUMNS = {"pattern": ["a", "b"], "most": [1, 2]}  # of the data, and nothing else
READY = [
    ("exact_match", (" 4\n", "5"), {"answer": ["4", "4"]}, [1.0, 0.0]),
    ("exact_match", ("x",), {"solution": [None]}, [None]),
    ("exact_match", ("x", "y"), {"answer": [None, "z"], "solution": ["x", "y"]}, [1.0, 0.0]),
    ("number_match", ("I think 3 and then 7.", "1200.0"), {"answer": GSM8K}, [1.0, 1.0]),
    ("number_match", ("#### 7 because 8", "12"), {"answer": GSM8K}, [1.0, 0.0]),
    ("number_match", ("no number",), {"answer": ["7"]}, [0.0]),
    ("think_format", THOUGHTS, {"chat": True}, [1.0, 0.0, 0.0, 0.0]),
    ("length:4", ("abcd", "abcdef"), {}, [0.0, -0.5]),
    ("length:2", ("12", "a12"), COLUMNS, [0, -0.5]),
    (r"regex:^\d+$", ("12", "a12"), {}, [1.0, 0.0]),
    (r"regex:^\d+$", ("12", "a12"), COLUMNS, [1.0, 0.0]),
    # An escaped comma is one.
    (r"regex:^\d{1\x2c3}$", ("12", "1234"), {}, [1.0, 0.0]),
    (r"regex:^a\x2c[\x2C]$", ("a,,", "a,;"), {}, [1.0, 0.0]),
    (r"regex:^\\x2c$", ("\\x2c", ","), {}, [1.0, 0.0]),  # a backslash before x2c
]


@pytest.mark.parametrize(("name", "texts", "columns", "wanted"), READY)
def test_ready_rewards(name, texts, columns, wanted):
    assert given(name, *texts, **columns) == wanted


def test_mathematics():
    pytest.importorskip("math_verify")
    right = [r"$\\frac{1}{2}$", "2", None, "$x^2 + 1$"]
    said = given("math-verify", r"It is $\\boxed{0.5}$", "3", "4", "$1 + x^2$", answer=right)
    assert said == [1.0, 0.0, None, 1.0]


def test_mathematics_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"needs math-verify; pip install 'mlx-lora\[rewards\]'"):
        ready_reward("math-verify")


def test_json_schema(tmp_path):
    pytest.importorskip("jsonschema")
    schema = tmp_path / "s.json"
    schema.write_text('{"type": "object", "required": ["name"]}')
    assert given(f"json_schema:{schema}", '{"name": 1}', "{}", "name") == [1.0, 0.5, 0.0]
    assert given(f"json_schema:{schema}", "{}", validator=["of the data"]) == [0.5]
    schema.write_text('{"type": 5}')
    with pytest.raises(InputError, match="holds no JSON schema"):
        ready_reward(f"json_schema:{schema}")


@pytest.mark.parity
def test_trls_own_rewards_run_as_they_are(tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text("from trl.rewards import think_format_reward\n")
    rewards = rewards_of(replace(ASKED, reward=f"{file}:think_format_reward"))
    texts = ["<think>a</think>b", "b"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    answers = {"prompts": ["?"] * 2, "completions": completions, "completion_ids": [[1], [2]], "level": [1, 2]}
    assert rewards_for(rewards, answers, ASKED, print).tolist() == [[1.0], [0.0]]


def written(tmp_path, body: str):
    file = tmp_path / "mine.py"
    file.write_text(f"import time\ndef mine(completions, **columns):\n    {body}\n")
    return rewards_of(replace(ASKED, reward=f"{file}:mine"))


ANSWERS = {"prompts": ["2+2=", "3+3="], "completions": ["4", "7"], "completion_ids": [[1], [2]]}
FAILURES = {
    "raise ValueError('no such thing')": "ValueError: no such thing",
    "return [1.0]": "1 values for 2 answers",
    "return [1.0, float('nan')]": "nan for the answer '7' to '3\\+3='",
    "return [1.0, 'good']": "a str, not a number, for the answer '7'",
    "time.sleep(30)": "longer than 0.2 s",
    "return len(completions)": "TypeError",
    "raise SystemExit(0)": "SystemExit",
}


@pytest.mark.parametrize("body", FAILURES)
def test_a_failing_reward_stops_the_run_or_is_skipped(body, tmp_path):
    rewards, asked = written(tmp_path, body), replace(ASKED, reward_timeout=0.2)
    start = time.perf_counter()
    with pytest.raises(RunError, match=FAILURES[body]) as failed:
        rewards_for(rewards, ANSWERS, asked, print)
    assert "\n" not in str(failed.value)
    assert "--reward-errors skip" in str(failed.value)
    said = []
    found = rewards_for(rewards, ANSWERS, replace(asked, reward_errors="skip"), said.append)
    assert time.perf_counter() - start < 28  # it sleeps for 30 s
    assert math.isnan(found[1, 0])
    assert said[0].startswith("Note: --reward mine")


def test_rewards_are_added_by_their_weights(tmp_path):
    file = tmp_path / "two.py"
    file.write_text("def a(completions, **c): return [1, None]\ndef b(completions, **c): return [2, 3]\n")
    asked = replace(ASKED, reward=f"{file}:a,{file}:b", reward_weights="2,0.5")
    rewards = rewards_of(asked)
    found = rewards_for(rewards, ANSWERS, asked, print)
    assert summed(found, rewards).tolist() == [3.0, 1.5]
    assert np.isnan(summed(np.full((1, 2), math.nan), rewards)).all()
    assert [reward.name for reward in rewards] == ["a", "b"]


def test_what_is_reported_of_rewards():
    rewards = [Reward("a", len, 2.0), Reward("b", len)]
    found = np.array([[1.0, 0.0], [3.0, math.nan], [2.0, math.nan], [2.0, math.nan]])  # sums 2, 6 and 4, 4
    means = {name: values.mean() for name, values in reports_of(found, rewards, 2).items()}
    assert means["reward_std"] == pytest.approx(np.std([2, 6], ddof=1) / 2)
    assert means["frac_reward_zero_std"] == 0.5
    own = means_of_known(means)
    assert own == {"reward_std": means["reward_std"], "frac_reward_zero_std": 0.5, "reward/a": 2.0, "reward/b": 0.0}
    nothing = reports_of(np.full((2, 2), math.nan), rewards, 2)
    assert math.isnan(means_of_known({name: values.mean() for name, values in nothing.items()})["reward/a"])
    assert list(reports_of(found[:, :1], rewards[:1], 2)) == ["reward_std", "frac_reward_zero_std"]


@pytest.mark.parametrize(
    ("reward", "parts"),
    [
        (r"regex:^\d{1,3}$", [r"regex:^\d{1,3}$"]),
        (r"exact_match, regex:^a, b$ ,length:200", ["exact_match", "regex:^a, b$", "length:200"]),
        ("regex:a,regex:b+,c+,mine.py:f,python:g", ["regex:a", "regex:b+,c+", "mine.py:f", "python:g"]),
        ("regex:[,;],tests", ["regex:[,;]", "tests"]),  # a folder
        ("exact_match,number_match,", ["exact_match", "number_match"]),
    ],
)
def test_a_comma_in_a_pattern_is_part_of_it(reward, parts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    found = rewards_of(replace(ASKED, reward=reward), dict.fromkeys(parts, len))
    assert len(found) == len(parts)
    assert all(one.model or one.function is len for one in found)


def test_a_pattern_may_count():
    [one] = rewards_of(replace(ASKED, reward=r"regex:^\d{1,3}$"))
    assert one.function(["12", "1234"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("reward", "weights", "words"),
    [
        (None, None, "requires --reward"),
        ("exact_mach", None, "did you mean exact_match"),
        ("length:x", None, "as in length:200"),
        ("regex:(", None, "not a regular expression"),
        ("regex:a,yes", None, "x2c"),
        (r"regex:\d,format", None, "x2c"),
        (r"regex:\(,reward_model:f", None, "x2c"),
        ("regex:^a$,exact_mach", None, "did you mean exact_match.*x2c"),
        ("missing.py:f", None, "there is no file"),
        ("exact_match", "1,2", "give 1 numbers"),
        ("exact_match", "nan", "give 1 numbers"),
    ],
)
def test_bad_settings_are_one_line(reward, weights, words):
    with pytest.raises(InputError, match=words) as refused:
        rewards_of(replace(ASKED, reward=reward, reward_weights=weights))
    assert "\n" not in str(refused.value)


def test_a_file_that_fails_or_has_no_such_function(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def other(): pass\n")
    with pytest.raises(InputError, match="has no function mine; it has other"):
        rewards_of(replace(ASKED, reward=f"{file}:mine"))
    file.write_text("1 / 0\n")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        rewards_of(replace(ASKED, reward=f"{file}:mine"))


def test_async_rewards_and_the_trainers_state(tmp_path):
    file = tmp_path / "r.py"
    file.write_text(
        "import asyncio\n"
        "async def waits(completions, **c):\n    await asyncio.sleep(0)\n    return [3.0] * len(completions)\n"
        "def late(completions, trainer_state):\n    return [trainer_state.global_step] * len(completions)\n"
        "def plain(completions, completion_ids, prompts):\n    return [1.0] * len(completions)\n"
    )
    rewards = rewards_of(replace(ASKED, reward=",".join(f"{file}:{name}" for name in ("waits", "plain"))))
    assert rewards_for(rewards, ANSWERS, ASKED, print).tolist() == [[3.0, 1.0]] * 2
    [late] = rewards_of(replace(ASKED, reward=f"{file}:late"))
    only = {"completions": ANSWERS["completions"], "prompts": ANSWERS["prompts"]}
    called = replace(late, function=lambda prompts, **rest: late.function(**rest))
    assert rewards_for([called], only, ASKED, print, state=TrainerState(7, 9)).tolist() == [[7.0]] * 2

    async def inside_a_loop():
        return rewards_for(rewards[:1], ANSWERS, ASKED, print).tolist()

    assert asyncio.run(inside_a_loop()) == [[3.0]] * 2


def test_a_reward_that_gives_nothing_is_said_now_and_then():
    silent, said = FirstTimes(), []
    rewards = [
        Reward("quiet", lambda completions, **c: [None] * 2),
        Reward("loud", lambda completions, **c: [1.0, None]),
    ]
    for _ in range(30):
        rewards_for(rewards, ANSWERS, ASKED, said.append, silent=silent)
    assert silent.counts == {"quiet": 30}
    assert ["quiet" in line for line in said] == [True, True]
    none = {name: [] for name in ("prompts", "completions", "completion_ids")}
    rewards_for([Reward("quiet", lambda completions, **c: [])], none, ASKED, said.append, silent=silent)
    assert len(said) == 2


def test_functions_are_rewards_in_python():
    def mine(completions, **columns):
        return [len(text) for text in completions]

    twice = [mine, "length:9", lambda completions, **c: [0.0] * len(completions), mine]
    given_, functions = named_functions({"objective": "grpo", "reward": twice})
    rewards = rewards_of(replace(ASKED, reward=given_["reward"]), functions)
    assert len({reward.name for reward in rewards}) == 4
    assert rewards_for(rewards, ANSWERS, ASKED, print)[:, 0].tolist() == [len(t) for t in ANSWERS["completions"]]
    assert named_functions({"reward": "exact_match"}) == ({"reward": "exact_match"}, {})
    assert named_functions({"reward": mine})[0]["reward"].endswith("mine")
    with pytest.raises(InputError, match="given in Python"):
        rewards_of(replace(ASKED, reward="python:mine"))
