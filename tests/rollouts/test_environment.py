"""Episodes of several turns: what is in a row and what of it is trained, how an episode ends, and whose rewards it gets."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from byte_tokenizer import SPECIAL_TOKENS, byte_tokenizer, template

from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.data.batch import collate
from mlx_lora.data.chat_template import chat_tokens
from mlx_lora.data.data_sets import find_sets
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion, Conversation
from mlx_lora.data.load import load_eval_set
from mlx_lora.data.mix import read_sets
from mlx_lora.data.prompts import observation_tokens, with_observation
from mlx_lora.data.tokenize import Encoder
from mlx_lora.models.generator import answer_keys
from mlx_lora.objectives.policy_arrays import LENGTHS, REWARDS, TRUNCATED
from mlx_lora.rollouts.environment import (
    Agent,
    Episode,
    MultiTurnEnv,
    Played,
    SingleTurnEnv,
    play,
    seeds_of,
)
from mlx_lora.rollouts.make_environment import check_environment
from mlx_lora.rollouts.rewards import Reward, TrainerState, exact_match, no_function, reward_files
from mlx_lora.rollouts.rollout import Rollouts
from mlx_lora.utils.errors import InputError, RunError

PLAIN = byte_tokenizer(None)
END = PLAIN.eos_token_id
SETTINGS = train_settings(
    {
        "model": "m",
        "data": "d",
        "objective": "grpo",
        "environment": "game.py:Echo",
        "group_size": 2,
        "max_new_tokens": 12,
    }
)


class Echo:
    """Repeats what the model says until it says "q", with the seed's parity as a reward for each answer."""

    def reset(self, seed: int, greeting: str | None = None, **columns):
        self.parity = seed % 2
        return greeting

    def step(self, completion: str):
        return f"<{completion}>", 1.0 + self.parity, "q" in completion


def echo(make=Echo, tokenizer=PLAIN, **objective) -> MultiTurnEnv:
    settings = replace(SETTINGS, objective=replace(SETTINGS.objective, **objective))
    return MultiTurnEnv([Reward("Echo", no_function)], settings, tokenizer, make=make)


def tokens_of(text: str) -> list[int]:
    return PLAIN.encode(text, add_special_tokens=False)


def fact(text: str, **columns) -> dict:
    return {"prompt": text, "chat": False, "columns": columns, "example": Completion(text, ".")}


def played(env, answers: list[list[str]], room: int = 12, **columns) -> Played:
    """Play an episode for each list of answers, two of each prompt; "." ends one that does not fit with its end token."""
    prompts = [f"p{number}" for number in range(len(answers) // 2)]

    def sample(turn, episodes, before, left):
        texts = [answers[number][turn] for number in episodes]
        return [[*tokens_of(text), END][:most] for text, most in zip(texts, left, strict=True)]

    facts, seeds = [fact(text, **columns) for text in prompts], [4] * len(prompts)
    return play(env, Agent(sample, room, frozenset([END])), list(map(tokens_of, prompts)), facts, seeds, 2)


def test_an_episode_has_all_its_turns_and_only_the_models_are_sampled():
    [once, twice] = played(echo(), [["q"], ["a", "q"]]).episodes
    assert once.tokens == [*tokens_of("q"), END]
    assert once.sampled.all()
    assert twice.tokens == [*tokens_of("a"), END, *tokens_of("<a>"), *tokens_of("q"), END]
    assert twice.sampled.tolist() == [True] * 2 + [False] * 3 + [True] * 2
    assert not once.truncated
    assert not twice.truncated


def test_rewards_of_all_turns_are_added_for_each_episode():
    found = played(echo(), [["q"], ["a", "q"], ["a", "b", "q"], ["q"]], room=30)
    assert found.rewards.tolist() == [[1], [2], [3], [1]]


@pytest.mark.parametrize(
    ("room", "text", "truncated"),
    [
        (7, "a\0<a>q\0", False),  # fits exactly
        (6, "a\0<a>q", True),  # the second answer is cut
        (5, "a\0", True),  # after the observation there would be no room for an answer, so it is not put there
        (2, "a\0", True),
        (1, "a", True),  # the first answer is cut
    ],
)
def test_no_episode_is_longer_than_its_room(room, text, truncated):
    episode = played(echo(), [["a", "q"], ["a", "q"]], room=room).episodes[0]
    wanted = [END if letter == "\0" else tokens_of(letter)[0] for letter in text]
    assert (episode.tokens, episode.truncated) == (wanted, truncated)
    assert episode.sampled[-1]


def test_an_episode_ends_at_the_most_turns():
    for turns in (1, 3):
        [episode, _] = played(echo(max_turns=turns), [["a"] * 9] * 2, room=99).episodes
        assert len(episode.observed) == turns - 1
        assert not episode.truncated


def test_a_first_observation_is_added_to_the_prompt_and_takes_room():
    found = played(echo(), [["q"], ["a", "q"]], room=9, greeting="Hi")
    assert found.prompts == [tokens_of("p0Hi")]
    assert len(found.episodes[1].tokens) == 7
    assert played(echo(), [["q"], ["a", "q"]], room=8, greeting="Hi").episodes[1].truncated
    assert played(echo(), [["q"], ["q"]]).prompts == [tokens_of("p0")]
    with pytest.raises(RunError, match="needs 2 tokens, and --max-new-tokens is 2"):
        played(echo(), [["q"], ["q"]], room=2, greeting="Hi")


def test_episodes_of_a_prompt_must_begin_alike():
    count = iter(range(9))

    class Other(Echo):
        def reset(self, seed, **columns):
            return str(next(count))

    with pytest.raises(RunError, match="must begin alike"):
        played(echo(Other), [["q"], ["q"]])


def test_a_column_without_a_value_leaves_resets_default():
    class Greets(Echo):
        def reset(self, seed, greeting="Hi", **columns):
            return super().reset(seed, greeting)

    empty, named = (played(echo(Greets), [["q"], ["q"]], greeting=greeting) for greeting in (None, "Hi"))
    assert empty.prompts == named.prompts
    assert empty.prompts != played(echo(Greets), [["q"], ["q"]], greeting="Ho").prompts


BROKEN = {
    "no tuple": (lambda self, text: 1.0, "return observation, reward, done"),
    "a text as the reward": (lambda self, text: ("x", "1", True), "a str, not a number"),
    "no observation": (lambda self, text: (None, 1.0, False), "NoneType as the observation"),
    "an error": (lambda self, text: {}["key"], "KeyError: 'key'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_failing_environment_ends_the_run_or_is_skipped(case):
    step, words = BROKEN[case]
    broken = type("Broken", (Echo,), {"step": step})
    with pytest.raises(RunError, match=f"--environment Echo failed .*{words}"):
        played(echo(broken), [["a"], ["q"]])
    found = played(echo(broken, reward_errors="skip"), [["a"], ["q"]])
    assert np.isnan(found.rewards).all()
    [note] = found.notes  # of both episodes
    assert "skipped" in note
    assert not np.isnan(played(echo(), [["q"], ["q"]]).rewards).any()


class Number(Echo):
    """Gives 0.1 for the first answer, and 1 for the number 7 as the second."""

    def reset(self, seed, **columns):
        self.said = []

    def step(self, completion):
        self.said.append(completion)
        return ("?", 0.1, False) if len(self.said) == 1 else (None, float(int(completion) == 7), True)


class Quits(Number):
    def step(self, completion):
        return sys.exit(0) if completion == "b" else super().step(completion)


class Waits(Number):
    def step(self, completion):
        return time.sleep(30) if completion == "b" else super().step(completion)


@pytest.mark.parametrize("make", [Number, Quits, Waits])
def test_an_episode_that_fails_loses_its_rewards_and_the_others_go_on(make):
    limit = 0.3 if make is Waits else 30.0
    env = echo(make, reward_errors="skip", reward_timeout=limit)
    found = played(env, [["a", "7"], ["a", "b"], ["7", "7"], ["a", "3"]], room=40)
    assert np.isnan(found.rewards.ravel()).tolist() == [False, True, False, False]
    assert found.rewards.ravel()[[0, 2, 3]].tolist() == [1.1, 1.1, 0.1]
    assert [len(episode.observed) for episode in found.episodes] == [1] * 4
    [note] = found.notes
    assert make is Waits or "'b'" in note  # its own answer
    with pytest.raises(RunError) as stopped:
        played(echo(make, reward_timeout=limit), [["a", "7"], ["a", "b"]], room=40)
    assert "\n" not in str(stopped.value)


def test_a_failing_reset_is_skipped_too():
    broken = type("Broken", (Echo,), {"reset": lambda self, seed, **columns: {}["key"]})
    with pytest.raises(RunError, match="KeyError"):
        played(echo(broken), [["a"], ["q"]])
    found = played(echo(broken, reward_errors="skip"), [["a"], ["q"]])
    assert np.isnan(found.rewards).all()
    assert [len(episode.observed) for episode in found.episodes] == [0, 0]


def test_the_episodes_of_a_prompt_go_on_without_one_that_does_not_begin():
    count = iter(range(9))

    class Third(Echo):
        def reset(self, seed, **columns):
            super().reset(seed)
            return sys.exit("no") if next(count) == 2 else "Hi"

    found = played(echo(Third, reward_errors="skip"), [["q"], ["q"], ["q"], ["a", "q"]])
    assert np.isnan(found.rewards.ravel()).tolist() == [False, False, True, False]
    assert found.prompts == [tokens_of("p0Hi"), tokens_of("p1Hi")]
    assert [len(episode.observed) for episode in found.episodes] == [0, 0, 0, 1]


def test_seeds_depend_on_run_rollout_and_prompt_alone():
    assert seeds_of(1, 2, [0, 3]) == [*seeds_of(1, 2, [0]), *seeds_of(1, 2, [3])]
    different = {*seeds_of(1, 2, [0, 3]), *seeds_of(1, 3, [0, 3]), *seeds_of(2, 2, [0, 3])}
    assert len(different) == 6


def test_each_turn_draws_from_a_stream_of_its_own():
    """With numbers above 32 bits, and more words than numpy's seed has by itself."""
    keys = [answer_keys(0, rollout, 1, turn) for rollout in (1, 1 + (2 << 32)) for turn in (0, 1, 2)]
    assert len({tuple(key[0].tolist()) for key in keys}) == 6
    assert mx.array_equal(answer_keys(0, 1, 1), answer_keys(0, 1, 1, 0))


def chat_encoder(chat: str | None, tokenizer=None) -> tuple[Encoder, str]:
    tokenizer = tokenizer or byte_tokenizer(chat or "")
    return Encoder(tokenizer, tokenizer.chat_template, max_seq_length=10**4), tokenizer.chat_template


@pytest.mark.parametrize("name", [None, "llama3", "gemma", "mistral"])
def test_an_observation_is_the_templates_own_turn_of_the_user(name):
    tokenizer = byte_tokenizer(template(name)) if name else byte_tokenizer()
    encoder, text = chat_encoder(None, tokenizer)
    turns = [{"role": "user", "content": "Guess!"}, {"role": "assistant", "content": "five"}]
    asked = [*turns, {"role": "user", "content": "higher"}]
    whole = chat_tokens(tokenizer, asked, text)
    before = chat_tokens(tokenizer, turns[:1], text)
    answer = tokenizer.encode("five", add_special_tokens=False)
    observed = observation_tokens(encoder, Conversation(turns), "higher")
    said = whole[len(before) : len(whole) - len(observed)]
    assert whole == before + said + observed
    assert said[: len(answer)] == answer or said[1 : 1 + len(answer)] == answer  # Mistral writes a space
    assert tokenizer.decode(said[-1:]) in SPECIAL_TOKENS  # the end token, which the model samples
    assert observation_tokens(encoder, Conversation(turns), "lower") != observed


def test_control_tokens_in_an_observation_are_text():
    tokenizer = byte_tokenizer()
    encoder, _ = chat_encoder(None, tokenizer)
    observed = observation_tokens(encoder, Conversation([]), "<|im_end|>")
    ends = [token for token in observed if token == tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert len(ends) == 1  # the template's own
    assert "<|im_end|>" in tokenizer.decode(observed).replace("<|im_end|>", "", 1)


def test_a_first_observation_follows_the_last_message():
    turns = [{"role": "user", "content": "Guess"}, {"role": "assistant", "content": "."}]
    found = with_observation(Conversation(turns), " now")
    assert found.messages == [{"role": "user", "content": "Guess now"}, turns[1]]
    assert with_observation(Completion("Guess", "."), " now") == Completion("Guess now", ".")


@pytest.mark.parametrize("cut", [False, True])
def test_a_row_trains_the_models_tokens_alone(cut):
    """The row of an episode: prompt, answer, observation, answer; its log-probabilities belong to the answers."""
    settings = replace(SETTINGS, objective=replace(SETTINGS.objective, mask_truncated=cut))
    prompts = EncodedSet.from_rows([(np.array([5, 6, 7], np.int32), np.zeros(3, bool))]).with_facts([fact("p")])
    batch = collate(prompts.with_room(2, 12), np.array([0]), 14, 24)
    made = Played([[5, 6, 7]], [Episode([1, 2, 8, 9, 3], [(2, 4)], True), Episode([4])], np.array([[1.0], [3.0]]))
    rows = np.flatnonzero(batch.real)
    sampling = Rollouts(None, settings, echo(), None, {})  # what is called below needs no model
    filled, begins, ends = sampling._filled(batch, rows, made)
    assert filled.inputs[0, :8].tolist() == [5, 6, 7, 1, 2, 8, 9, 0]
    assert filled.targets[0, :8].tolist() == [6, 7, 1, 2, 8, 9, 3, 0]
    assert filled.mask[0, :8].astype(int).tolist() == ([0] * 8 if cut else [0, 0, 1, 1, 0, 0, 1, 0])
    assert filled.mask[1, :8].astype(int).tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert (begins.tolist(), ends.tolist()) == ([2, 2], [7, 3])
    assert filled.columns[LENGTHS].tolist() == [3, 1]
    assert filled.columns[TRUNCATED].tolist() == [1, 0]
    rewarded = sampling._with_rewards(filled, rows, made.rewards, None)
    assert rewarded.columns[REWARDS].tolist() == [1, 3]


def test_one_turn_gives_every_answer_to_the_rewards_at_once():
    calls = []

    def reward(prompts, completions, completion_ids, level, trainer_state, **columns):
        calls.append((prompts, completions, completion_ids, level, trainer_state.global_step))
        return [float(len(text)) for text in completions]

    env = SingleTurnEnv([Reward("r", reward)], SETTINGS, PLAIN, state=TrainerState(7))
    found = played(env, [["a"], ["bb"]], level=3)
    ids = [[*tokens_of("a"), END], [*tokens_of("bb"), END]]
    assert calls == [(["p0"] * 2, ["a", "bb"], ids, [3, 3], 7)]
    assert found.rewards.tolist() == [[1], [2]]
    assert found.episodes[0].sampled.all()


@pytest.mark.parametrize("pictures", [False, True])
def test_every_batch_has_the_columns_of_all_rows(tmp_path, pictures):
    """A batch without a hint gives the reward None for it, as TRL does, and so does a split without one."""
    rows = [{"prompt": f"p{number}", "answer": None} for number in range(6)]
    rows[2] |= {"hint": "h", "tip": None}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "valid.jsonl").write_text('{"prompt": "other"}\n')
    asked = replace(SETTINGS.data, data=str(tmp_path))
    parts, _, _ = read_sets(find_sets(str(tmp_path)), asked, "prompts", pictures)
    found = [entry.columns for split in ("train", "valid") for entry in parts[split].entries]
    assert [sorted(columns) for columns in found] == [["answer", "hint", "prompt", "tip"]] * 7
    assert [columns["hint"] for columns in found] == [None, None, "h", None, None, None, None]
    if pictures:
        return
    one = load_eval_set(str(tmp_path / "train.jsonl"), asked, PLAIN, "prompts").facts[0]

    def reward(completions, hint, tip, **columns):
        return [float(hint == [None] * 2 == tip)] * 2

    env = SingleTurnEnv([Reward("r", reward), Reward("e", exact_match)], SETTINGS, PLAIN)
    env.reset([tokens_of("p0")], [one], 2, [0], print)
    rewards = env.step([0, 1], [tokens_of("a")] * 2, print).rewards
    assert rewards[:, 0].tolist() == [1, 1]
    assert np.isnan(rewards[:, 1]).all()


def test_what_is_no_environment_is_one_line(tmp_path):
    file = tmp_path / "game.py"
    file.write_text("class Half:\n    def reset(self, seed): ...\n\ndef whole(): ...\n")
    asked = ObjectiveSettings("grpo")
    for name, words in {
        f"{file}:Half": "it has no step",
        f"{file}:whole": "it has no reset and no step",
        f"{file}:Gone": "has no class Gone; it has Half, whole",
        "game": "give FILE.py:CLASS",
        f"{tmp_path}/gone.py:A": "there is no file",
    }.items():
        with pytest.raises(InputError, match=words):
            check_environment(replace(asked, environment=name))
    file.write_text(file.read_text() + "\nclass Both(Half):\n    def step(self, completion): ...\n")
    with pytest.raises(InputError, match="leave one of the two out"):
        check_environment(replace(asked, environment=f"{file}:Both", reward="length:4"))
    before = reward_files(replace(asked, environment=f"{file}:Half"))
    file.write_text("# other code\n")
    assert reward_files(replace(asked, environment=f"{file}:Half")) != before
