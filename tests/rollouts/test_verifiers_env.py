"""Environments of verifiers: which tokens an episode has and trains, what is rewarded, and what goes wrong in one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from tool_files import FAMILIES, answer_text, call_text, family_tokenizer
from verifiers_environments import SINGLE, TOOLS, TURNS, WRONG, write_environments

from mlx_lora.config.load import train_settings
from mlx_lora.data.chat_template import chat_tokens
from mlx_lora.data.prompts import encode_prompts, parse_prompt
from mlx_lora.data.task_sets import verifiers_file
from mlx_lora.data.tokenize import Encoder
from mlx_lora.rollouts import make_environment as verifiers_env
from mlx_lora.rollouts.environment import CALLS, CUT, FAILED, Agent, Played, play
from mlx_lora.rollouts.environment import TURNS as ANSWERS
from mlx_lora.rollouts.make_environment import (
    ERRORS,
    METRIC,
    TIMEOUTS,
    VerifiersEnv,
    close_hosts,
    own_rewards_and_reports,
    rehearse,
)
from mlx_lora.rollouts.rewards import summed
from mlx_lora.utils.errors import RunError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the package's own code
QWEN = "qwen3_thinking"
ASKED = {"model": "m", "objective": "grpo", "group_size": 2, "max_new_tokens": 4000, "reward_timeout": 30.0}


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    pytest.importorskip("verifiers.v1", reason="pip install 'mlx-lora[verifiers]'")
    folder = write_environments(
        tmp_path_factory.mktemp("modules"), vf_words=SINGLE, vf_turns=TURNS, vf_shelf=TOOLS, vf_wrong=WRONG
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # the run adds the folder, for servers of tools
        yield folder
        close_hosts()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("mlx_lora.data.task_sets.cache_dir", lambda name: tmp_path / name)


def environment(name: str, family: str = QWEN, **asked) -> VerifiersEnv:
    settings = train_settings({**ASKED, "environment": f"verifiers:{name}", **asked})
    tokenizer, ends = family_tokenizer(family)
    return VerifiersEnv(own_rewards_and_reports(settings.objective, ())[0], settings, tokenizer, ends=ends)


def played(env: VerifiersEnv, tasks: list[int], answers: list[list[str]], room: int = 4000) -> Played:
    """Play an episode for each list of answers, in groups of the same task."""
    records = [json.loads(line) for line in verifiers_file(env.settings.data.data).read_text().splitlines()]
    encoder = Encoder(env.tokenizer, env.tokenizer.chat_template, max_seq_length=10**4)
    tools = rehearse(env.settings.objective).tools or None
    encoded = encode_prompts(encoder, [parse_prompt(records[task]) for task in tasks], tools=tools)
    prompts = [encoded.rows.row(place)[0].tolist() for place in range(len(tasks))]

    def sample(turn, episodes, before, left):
        texts = [answers[number][turn] for number in episodes]
        for number, tokens in zip(episodes, before, strict=True):
            assert tokens == env.talks[number].tokens
        return [
            env.tokenizer.encode(text, add_special_tokens=False)[:most] for text, most in zip(texts, left, strict=True)
        ]

    group = len(answers) // len(tasks)
    found = play(env, Agent(sample, room, env.ends), prompts, encoded.rows.facts, [4] * len(tasks), group)
    assert found.prompts == prompts or env.settings.objective.environment == "verifiers:vf_wrong"
    return found


def same_as_the_record(env: VerifiersEnv, found: Played, number: int) -> None:
    """Check an episode against the package's own record of it, token by token."""
    [branch] = env.host.episodes[number].trace.branches
    group = len(found.episodes) // len(found.prompts)
    prompt, episode = found.prompts[number // group], found.episodes[number]
    assert branch.token_ids == prompt + episode.tokens
    assert branch.sampled_mask == [False] * len(prompt) + episode.sampled.tolist()


def said(text: str, family: str = QWEN) -> str:
    return answer_text(family, text)


def test_one_answer_has_the_packages_rewards_and_metrics(caplog):
    env = environment("vf_words")
    assert [(one.name, one.weight) for one in env.rewards] == [("says", 1.0), ("short", 0.5)]
    long = "It is a pear, not an apple, I think."
    found = played(
        env, [0, 1], [[said("apple")], [said("nothing")], [said(long)], [said("<think>\npear\n</think>\n\n?")]]
    )
    assert found.rewards.tolist() == [[1, 1], [0, 1], [1, 0], [0, 1]]
    assert summed(found.rewards, env.rewards).tolist() == [1.5, 0.5, 1.0, 0.5]
    assert [one.counts[METRIC + "characters"] for one in found.episodes] == [5, 7, len(long), 1]
    assert METRIC + "characters" in own_rewards_and_reports(env.settings.objective, ())[1]
    assert env.tokenizer.decode(found.prompts[0]).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    for number, episode in enumerate(found.episodes):
        assert episode.sampled.all()
        assert not episode.truncated
        same_as_the_record(env, found, number)
    other = played(env, [0], [[said("apple")], [said("fig")]])
    assert other.rewards[:, 0].tolist() == [1, 0]


def test_several_turns_are_those_of_the_template_and_only_the_models_tokens_are_trained():
    """Whole conversations equal the template's own rendering, token by token, in a template that leaves turns as they are."""
    env = environment("vf_turns", "llama3_2", data="verifiers:vf_turns:5")
    one, two, five = (said(text, "llama3_2") for text in ("1", "2", "5"))
    found = played(env, [1, 4], [[one, two], [five, one, two], [one, five], [five]])
    assert found.rewards.ravel().tolist() == [1, 1, 1, 1]
    assert [episode.counts[ANSWERS] for episode in found.episodes] == [2, 3, 2, 1]
    hints = [[turn["content"] for turn in episode.messages if turn["role"] == "user"] for episode in found.episodes]
    assert hints == [["higher"], ["lower", "higher"], ["higher"], []]
    for number, episode in enumerate(found.episodes):
        same_as_the_record(env, found, number)
        turns = [{"role": "user", "content": f"Guess {[1, 4][number // 2]}"}, *episode.messages]
        last = env.tokenizer.encode(f"{turns[-1]['content']}<|eot_id|>", add_special_tokens=False)
        whole = chat_tokens(env.tokenizer, turns[:-1], env.tokenizer.chat_template) + last
        assert found.prompts[number // 2] + episode.tokens == whole
        own = [token for token, sampled in zip(episode.tokens, episode.sampled, strict=True) if sampled]
        assert env.tokenizer.decode(own) == "".join(f"{turn['content']}<|eot_id|>" for turn in episode.messages[::2])


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_are_called_and_their_results_are_not_trained(family):
    env = environment("vf_shelf", family)
    assert [one["function"]["name"] for one in rehearse(env.settings.objective).tools] == ["look_up"]
    calls = [call_text(family, "look_up", {"word": word}) for word in ("apple", "plum")]
    red, no = said("It is red.", family), said("No.", family)
    found = played(env, [0], [[calls[0], red], [calls[1], calls[0], red], [call_text(family, "fly", {}), no], [red]])
    assert found.rewards.ravel().tolist() == [1, 1, 0, 1]
    assert [one.counts[CALLS] for one in found.episodes] == [1, 2, 1, 0]
    assert [one.counts[FAILED] for one in found.episodes] == [0, 1, 1, 0]
    assert [one.counts[METRIC + "looked"] for one in found.episodes] == [1, 2, 1, 0]
    results = [[turn["content"] for turn in one.messages if turn["role"] == "tool"] for one in found.episodes]
    assert results[0] == ["red"]
    assert "plum" in results[1][0]
    assert results[2] == ["error: unknown tool 'fly'"]
    for number, episode in enumerate(found.episodes):
        same_as_the_record(env, found, number)
        own = [token for token, sampled in zip(episode.tokens, episode.sampled, strict=True) if sampled]
        texts = [[calls[0], red], [calls[1], calls[0], red], [call_text(family, "fly", {}), no], [red]][number]
        assert own == [token for text in texts for token in env.tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.slow  # the package asks such a server six times
def test_a_tool_that_ends_its_process_is_told_to_the_model():
    env, red = environment("vf_shelf"), said("It is red.")
    calls = [call_text(QWEN, "look_up", {"word": word}) for word in ("exit", "apple")]
    found = played(env, [0], [[calls[0], red], [calls[1], red]])
    assert found.rewards.ravel().tolist() == [1, 1]
    assert [one.counts[FAILED] for one in found.episodes] == [1, 0]
    assert found.episodes[0].messages[1]["content"].startswith("error: ")
    again = played(env, [0], [[calls[1], red], [red]])  # it is there for the next call
    assert again.episodes[0].messages[1]["content"] == "red"


def test_a_result_is_as_the_template_writes_it_and_thinking_stays():
    env = environment("vf_shelf")
    thought = "<think>\nHm.\n</think>\n\n" + call_text(QWEN, "look_up", {"word": "apple"})
    found = played(env, [0], [[thought, said("red")], [said("red")]])
    episode = found.episodes[0]
    observed = env.tokenizer.decode(episode.tokens[slice(*episode.observed[0])])
    assert observed == "\n<|im_start|>user\n<tool_response>\nred\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert "Hm." in env.tokenizer.decode(episode.tokens)
    assert episode.messages[0]["reasoning_content"] == "Hm."
    same_as_the_record(env, found, 0)


def test_an_episode_without_room_is_scored_as_it_is():
    env = environment("vf_shelf")
    call = call_text(QWEN, "look_up", {"word": "apple"})
    found = played(env, [0], [[call, said("red")], [said("red and more")]], room=len(call) + 4)
    cut, whole = found.episodes
    assert (cut.truncated, whole.truncated) == (True, False)
    assert found.rewards.ravel().tolist() == [0, 1]
    assert [turn["role"] for turn in cut.messages] == ["assistant"]  # the result had no room
    assert cut.sampled.all()


def test_a_loop_ends_at_the_most_turns():
    env = environment("vf_turns", max_turns=2)
    found = played(env, [1], [[said("1"), said("1"), said("2")], [said("2")]])
    assert [one.counts[CUT] for one in found.episodes] == [1, 0]
    assert [one.counts[ANSWERS] for one in found.episodes] == [2, 1]
    assert found.rewards.ravel().tolist() == [0, 1]


TASKS = ("fine", "setup", "slow", "rewritten", "reward", "names", "twice", "begins", "forgets", "picture", "exits")
PROBLEMS = {
    "setup": "no such shelf",
    "rewritten": "other tokens",
    "reward": "cannot judge this",
    "names": "reward other",
    "twice": "several conversations",
    "forgets": "rewrites the conversation",
    "picture": "has a picture",
    "exits": "SystemExit",
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_what_goes_wrong_in_an_episode_is_named(what):
    task, bad = TASKS.index(what), [[said("bad")] * 3, [said("good")] * 3]
    with pytest.raises(RunError, match=PROBLEMS[what]) as stopped:
        played(environment("vf_wrong"), [task], bad)
    assert f"task {task}" in str(stopped.value)
    assert "\n" not in str(stopped.value)
    found = played(environment("vf_wrong", reward_errors="skip"), [0, task], [[said("fine")] * 3] * 2 + bad)
    assert found.rewards.ravel()[:2].tolist() == [1, 1]  # the others count
    lost = [True, what not in ("reward", "exits")]
    assert np.isnan(found.rewards.ravel()[2:]).tolist() == lost
    assert [one.counts[ERRORS] for one in found.episodes] == [0, 0, *map(float, lost)]
    assert sum(PROBLEMS[what] in note for note in found.notes) == sum(lost)


def test_a_time_limit_ends_an_episode():
    with pytest.raises(RunError, match=r"took longer than 2 s.*--reward-timeout"):
        played(environment("vf_wrong", reward_timeout=2.0), [TASKS.index("slow")], [[said("x")], [said("x")]])
    env = environment("vf_wrong", reward_timeout=2.0, reward_errors="skip")
    found = played(env, [TASKS.index("slow"), 0], [[said("x")]] * 4)
    assert [one.counts[TIMEOUTS] for one in found.episodes] == [1, 1, 0, 0]
    assert np.isnan(found.rewards.ravel()).tolist() == [True, True, False, False]


def test_an_environment_that_starts_slowly_is_started_again(monkeypatch):
    host = environment("vf_words", max_turns=4).host
    host.close()
    before = host.environment.serving

    @asynccontextmanager
    async def slow():
        await asyncio.sleep(0.5)
        async with before():
            yield

    monkeypatch.setattr(host.environment, "serving", slow)
    with pytest.raises(TimeoutError, match="does not start"):
        host.start(0.01)
    monkeypatch.undo()
    host.start(30.0)
    host.begin({0: verifiers_env.tasks_of("verifiers:vf_words")[0]})
    assert not host.settle([0], 30.0)
    assert host.episodes[0].question.messages[-1]["content"] == "Say apple"


def test_the_episodes_of_a_prompt_must_begin_alike():
    with pytest.raises(RunError, match="begin alike"):
        played(environment("vf_wrong"), [TASKS.index("begins")], [[said("x")], [said("x")]])


def test_tasks_that_changed_are_refused(monkeypatch):
    env = environment("vf_words")
    before = verifiers_env.tasks_of
    monkeypatch.setattr(verifiers_env, "tasks_of", lambda data: before(data)[1:])
    with pytest.raises(RunError, match="task 0 is another one"):
        played(env, [0], [[said("x")], [said("x")]])


def test_the_same_environment_has_one_server_of_tools(modules):
    first, second = environment("vf_words"), environment("vf_words")
    assert first.host is second.host
    assert first.host is not environment("vf_words", max_turns=3).host
    assert Path(sys.modules["vf_words"].__file__).parent == modules
