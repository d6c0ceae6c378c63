"""Environments: what answers the model, and rewards it. A rollout is one episode in an environment.

    reset    begins an episode, and may add a first observation to the record's prompt
    step     takes what the model said, and returns an observation, a reward, and whether the episode is over

The words are gymnasium's. `Env` is what a user writes: the environment of a single episode, in text. A `VectorEnv` runs the
episodes of a batch side by side, in tokens. There are three:

    SingleTurnEnv    every episode is over after one answer, and --reward rewards all answers of a batch in one call
    MultiTurnEnv     each episode has an `Env` of its own (--environment), whose observations become turns of the user
    ToolEnv          the model calls tools, whose results become turns of tools (rollouts/tools.py)

rollouts/make_environment.py chooses.

In a row, the model's tokens and the observations between them follow the prompt in the order in which they came. Only the
model's tokens are trained. The row has as much room as --max-new-tokens says for all of them together, so that shapes and
memory are known before the run; an episode that reaches the end of its room is truncated.

Shapes: N prompts, G episodes of each, E = N G episodes, F rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.load import prompt_encoder
from mlx_lora.data.prompts import example_with_answer, observation_tokens, with_observation
from mlx_lora.data.read import SplitRows
from mlx_lora.data.tokenize import Encoder
from mlx_lora.rollouts.rewards import (
    FirstTimes,
    Reward,
    TrainerState,
    guarded,
    one_note,
    problem_of,
    rewards_for,
)
from mlx_lora.rollouts.user_code import without_defaults
from mlx_lora.utils.errors import RunError

Facts = Mapping[str, Any]
"""What is known of a prompt beside its tokens: `prompt`, `chat`, `columns` and `example` (data/prompts.py)."""

# What a user writes


class Env(Protocol):
    """The environment of one episode; each episode gets a new instance, made without arguments.

    All that happens must follow from the arguments of `reset` and the completions, so that a resumed run samples the same
    answers, and the episodes of a prompt begin alike.
    """

    def reset(self, seed: int, **columns: Any) -> str | None:
        """Begin the episode.

        Args:
            seed: for what is random, the same in all episodes of a prompt.
            columns: of the prompt's record.

        Returns:
            What is added to the end of the prompt's last message; None: nothing.
        """

    def step(self, completion: str) -> tuple[str | None, float | None, bool]:
        """Take what the model said.

        Returns:
            The observation, to which the model replies if the episode goes on; the reward, of which those of all steps are
            added, or None; and whether the episode is over.
        """
        ...


# Episodes of a batch


@dataclass
class Episode:
    """What followed a prompt.

    Attributes:
        tokens: the model's completions, and the observations between them.
        observed: the first token of each observation in `tokens`, and the one after its last; the model sampled all others.
        truncated: whether the episode reached the end of its room.
        counts: what the environment counted, by the name of the report whose mean over episodes is shown.
        messages: the turns after the prompt, for people; None: the text of the tokens is all there is.
    """

    tokens: list[int] = field(default_factory=list)
    observed: list[tuple[int, int]] = field(default_factory=list)
    truncated: bool = False
    counts: dict[str, float] = field(default_factory=dict)
    messages: list[dict[str, Any]] | None = None

    @property
    def sampled(self) -> np.ndarray:
        """Which of the tokens the model sampled, (tokens,) bool."""
        own = np.ones(len(self.tokens), bool)
        for first, after in self.observed:
            own[first:after] = False
        return own


@dataclass(frozen=True)
class StepResults:
    """What some episodes get for their completions.

    Attributes:
        observations: the tokens that follow each completion if its episode goes on.
        rewards: (episodes, F) float64, NaN for none.
        done: whether each episode is over.
    """

    observations: Sequence[list[int]]
    rewards: np.ndarray
    done: Sequence[bool]


@dataclass
class VectorEnv:
    """The environment of all episodes of a batch, side by side; the classes below say what happens in a step.

    Attributes:
        rewards: names and weights of the rewards that a step gives; none where a teacher scores answers.
        settings: of the run.
        tokenizer: not mlx-lm's wrapper.
        day: that the chat template shows as today; None: today.
        state: where the run is, for rewards that take it.
        silent: counts rewards that gave nothing to a batch.
        facts: of each episode's prompt.
    """

    rewards: Sequence[Reward]
    settings: TrainSettings
    tokenizer: PreTrainedTokenizerBase
    day: date | None = None
    state: TrainerState = field(default_factory=TrainerState)
    silent: FirstTimes = field(default_factory=FirstTimes)
    facts: list[Facts] = field(default_factory=list)

    def reset(
        self,
        prompts: Sequence[list[int]],
        facts: Sequence[Facts],
        group: int,
        seeds: Sequence[int],
        note: Callable[[str], None],
    ) -> list[list[int]]:
        """Begin G episodes for each prompt, and return the prompts with the first observations.

        Args:
            prompts: tokens, (N,) lists.
            facts: of each prompt.
            group: G.
            seeds: for what is random, one for each prompt.
            note: takes a line if something failed and is skipped.

        Raises:
            RunError: a user's environment failed.
        """
        self.facts = [fact for fact in facts for _ in range(group)]
        return list(prompts)

    def step(
        self, episodes: Sequence[int], completions: Sequence[list[int]], note: Callable[[str], None]
    ) -> StepResults:
        """Take what the model said in some episodes.

        Args:
            episodes: their numbers; those of one prompt are neighbors.
            completions: tokens, with the end token if the model gave one.
            note: takes a line if something failed and is skipped.

        Raises:
            RunError: a reward or a user's environment failed.
        """
        raise NotImplementedError

    def finish(self, episodes: Sequence[Episode], note: Callable[[str], None]) -> np.ndarray | None:
        """Return what all episodes get at the end, (E, F) float64, which is added to what steps gave; None: nothing.

        Args:
            episodes: all of them, in order; each may get `counts` and `messages`.
            note: takes a line if something failed and is skipped.

        Raises:
            RunError: a reward failed.
        """

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, as rewards and environments see it."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @cached_property
    def encoder(self) -> Encoder:
        """What encodes prompts and observations, as the run's data were encoded."""
        rows = SplitRows([fact["example"] for fact in self.facts])
        return prompt_encoder(rows, self.settings.data, self.tokenizer, self.day)

    def columns(self) -> dict[str, list[Any]]:
        """Return the columns of the episodes' records, as rewards get them."""
        names = dict.fromkeys(name for fact in self.facts for name in fact["columns"])
        return {name: [fact["columns"].get(name) for fact in self.facts] for name in names}


@dataclass(frozen=True)
class Played:
    """The episodes of some prompts, and what they were rewarded with.

    Attributes:
        prompts: tokens of each, with the first observation.
        episodes: G for each prompt.
        rewards: (E, F) float64, NaN without one.
        notes: lines on what failed and was skipped.
    """

    prompts: list[list[int]]
    episodes: list[Episode]
    rewards: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def written(self) -> list[list[Any]]:
        """The episodes as JSON values, each with the arguments of `Episode` but the last."""
        return [[one.tokens, one.observed, one.truncated, one.counts] for one in self.episodes]


Sample = Callable[[int, list[int], list[list[int]], list[int]], list[list[int]]]
"""(turn, numbers of episodes, tokens before each completion, the most tokens of each) -> completions. At turn 0 it gets all
episodes, so that the tokens of a prompt are those of G neighbors."""


@dataclass(frozen=True)
class Agent:
    """The model as it acts in episodes.

    Attributes:
        sample: returns what it says.
        room: the most tokens that may follow a prompt; a first observation takes some of them.
        ends: tokens that end a completion.
    """

    sample: Sample
    room: int
    ends: frozenset[int]


def play(
    env: VectorEnv,
    agent: Agent,
    prompts: Sequence[list[int]],
    facts: Sequence[Facts],
    seeds: Sequence[int],
    group: int,
) -> Played:
    """Play G episodes after each prompt.

    Args:
        env: answers and rewards the agent.
        agent: acts in the environment.
        prompts, facts, seeds: of each prompt; see `VectorEnv.reset`.
        group: G.

    Raises:
        RunError: a reward or a user's environment failed, or a first observation is longer than the agent's room.
    """
    notes: list[str] = []
    room = agent.room
    begun = env.reset(prompts, facts, group, seeds, notes.append)
    left = [room + len(prompt) - len(now) for prompt, now in zip(prompts, begun, strict=True) for _ in range(group)]
    if min(left, default=1) < 1:
        raise RunError(
            f"a first observation needs {room - min(left)} tokens, and --max-new-tokens is {room}; raise it, or say less"
        )
    played = Played(begun, [Episode() for _ in left], np.full((len(left), len(env.rewards)), np.nan), notes)
    playing, turn = list(range(len(left))), 0
    while playing:
        before = [begun[number // group] + played.episodes[number].tokens for number in playing]
        completions = agent.sample(turn, playing, before, [left[number] for number in playing])
        found = env.step(playing, completions, notes.append)
        _add(played.rewards, playing, found.rewards)
        going_on = []
        for place, (number, completion) in enumerate(zip(playing, completions, strict=True)):
            episode, observation = played.episodes[number], found.observations[place]
            episode.tokens += completion
            left[number] -= len(completion)
            cut = not left[number] and completion[-1] not in agent.ends
            episode.truncated = cut or (not found.done[place] and left[number] <= len(observation))
            if found.done[place] or episode.truncated:
                continue
            episode.observed.append((len(episode.tokens), len(episode.tokens) + len(observation)))
            episode.tokens += observation
            left[number] -= len(observation)
            going_on.append(number)
        playing, turn = going_on, turn + 1
    last = env.finish(played.episodes, notes.append)
    if last is not None:
        _add(played.rewards, range(len(left)), last)
    return played


def _add(total: np.ndarray, episodes: Sequence[int], found: np.ndarray) -> None:
    """Add the rewards of a step to those of its episodes; what is missing in both stays missing."""
    before = total[episodes]
    both = np.nan_to_num(before) + np.nan_to_num(found)
    total[episodes] = np.where(np.isnan(before), found, np.where(np.isnan(found), before, both))


def seeds_of(seed: int, rollout: int, prompts: Sequence[int]) -> list[int]:
    """Return the seeds of a rollout's episodes, one for each of these prompts.

    Args:
        seed: of the run.
        rollout: its number.
        prompts: their numbers in the rollout.
    """
    of = [np.random.SeedSequence([seed, rollout], spawn_key=(0, prompt)) for prompt in prompts]
    return [int(one.generate_state(1)[0]) for one in of]


# One turn


@dataclass
class SingleTurnEnv(VectorEnv):
    """The environment of a single answer, which rewards answers in one call for all of a batch."""

    def step(
        self, episodes: Sequence[int], completions: Sequence[list[int]], note: Callable[[str], None]
    ) -> StepResults:
        found = np.zeros((len(completions), len(self.rewards)))
        if self.rewards and completions:
            facts = [self.facts[number] for number in episodes]
            texts = [self.text_of(answer) for answer in completions]
            told = [
                [{"role": "assistant", "content": text}] if fact["chat"] else text
                for fact, text in zip(facts, texts, strict=True)
            ]
            columns = {name: [values[number] for number in episodes] for name, values in self.columns().items()}
            for name in ("prompt", "completion", "prompts", "completions", "completion_ids"):
                columns.pop(name, None)
            arguments = {"prompts": [fact["prompt"] for fact in facts], "completions": told}
            arguments = {**columns, **arguments, "completion_ids": list(completions)}
            whole = [example_with_answer(fact["example"], text) for fact, text in zip(facts, texts, strict=True)]
            found = rewards_for(self.rewards, arguments, self.settings.objective, note, whole, self.state, self.silent)
        return StepResults([[] for _ in completions], found, [True] * len(completions))


# Several turns


def same_beginnings(first: Sequence[Any], group: int, asked: str) -> list[Any]:
    """Return the first observation of each prompt's episodes.

    Args:
        first: what `reset` returned for each episode.
        group: G.
        asked: the flag with the class, for the message.

    Raises:
        RunError: the episodes of a prompt begin in different ways.
    """
    found = [list(first[at : at + group]) for at in range(0, len(first), group)]
    for texts in found:
        if any(text != texts[0] for text in texts):
            raise RunError(
                f"{asked}: reset returned {texts[0]!r} and others for the same seed and columns; the episodes of a prompt "
                "must begin alike"
            )
    return [texts[0] for texts in found]


@dataclass
class MultiTurnEnv(VectorEnv):
    """Runs an `Env` for each episode; its rewards are one, with the name of its class.

    Attributes:
        make: returns the environment of one episode.
        episodes: of each; None: it failed, which is skipped.
        totals: rewards of each so far, NaN for none.
        turns: answers of each so far.
    """

    make: Callable[[], Env] = field(kw_only=True)

    def reset(
        self,
        prompts: Sequence[list[int]],
        facts: Sequence[Facts],
        group: int,
        seeds: Sequence[int],
        note: Callable[[str], None],
    ) -> list[list[int]]:
        super().reset(prompts, facts, group, seeds, note)
        self.turns, self.totals = [0] * len(self.facts), [np.nan] * len(self.facts)
        with one_note(note) as skipped:
            begun = [self._begun(number, seeds[number // group], skipped) for number in range(len(self.facts))]
        self.episodes: list[Env | None] = [None if one is None else one[0] for one in begun]
        found = []
        for place, (prompt, fact) in enumerate(zip(prompts, facts, strict=True)):
            texts = [one[1] for one in begun[place * group : (place + 1) * group] if one is not None]
            first = same_beginnings(texts, max(1, len(texts)), f"--environment {self.rewards[0].name}")
            for text in filter(None, first):  # none, or one
                prompt = self.encoder.prompt_tokens(with_observation(fact["example"], text))
            found.append(prompt)
        return found

    def step(
        self, episodes: Sequence[int], completions: Sequence[list[int]], note: Callable[[str], None]
    ) -> StepResults:
        observations, done = [], []
        with one_note(note) as skipped:
            for number, completion in zip(episodes, completions, strict=True):
                text, example = self._answered(number, self.text_of(completion), skipped), self.facts[number]["example"]
                observations.append([] if text is None else observation_tokens(self.encoder, example, text))
                done.append(text is None)
        return StepResults(observations, np.full((len(done), 1), np.nan), done)

    def finish(self, episodes: Sequence[Episode], note: Callable[[str], None]) -> np.ndarray | None:
        return np.array(self.totals)[:, None]

    def _begun(self, number: int, seed: int, note: Callable[[str], None]) -> tuple[Env, str | None] | None:
        """Begin an episode, and return it with what is added to its prompt; None if that failed and is skipped."""

        def begin() -> list[Any]:
            made = self.make()
            columns = {**self.facts[number]["columns"], "seed": seed}
            return [made, made.reset(**without_defaults(made.reset, columns))]

        begun = self._guarded(begin, number, "", note)
        return None if begun is None else (begun[0], begun[1])

    def _answered(self, number: int, text: str, note: Callable[[str], None]) -> str | None:
        """Tell an episode what the model said, and return the observation; None: it is over.

        An episode that fails is over, and so that it is not compared with whole ones, it has no reward for earlier turns.
        """
        episode = self.episodes[number]
        if episode is None:
            return None

        def answered() -> list[Any]:
            found = episode.step(text)
            if not isinstance(found, tuple) or len(found) != 3:
                raise ValueError(f"step returned {type(found).__name__}; return observation, reward, done")
            observation, reward, done = found
            if problem := problem_of(reward):
                raise ValueError(f"step gave {problem} as the reward; return a number or None")
            if not done and not isinstance(observation, str):
                kind = type(observation).__name__
                raise ValueError(f"step gave {kind} as the observation of an episode that goes on; return a text")
            return list(found)

        found = self._guarded(answered, number, text, note)
        if found is None:
            self.episodes[number], self.totals[number] = None, np.nan
            return None
        observation, reward, over = found
        if reward is not None:
            self.totals[number] = float(np.nan_to_num(self.totals[number])) + float(reward)
        self.turns[number] += 1
        return None if over or self.turns[number] >= self.settings.objective.max_turns else observation

    def _guarded(
        self, function: Callable[[], list[Any]], number: int, text: str, note: Callable[[str], None]
    ) -> list[Any] | None:
        """Return what an episode of the user's returns, None if it failed and that is skipped."""
        answers = {"prompts": [self.facts[number]["prompt"]], "completions": [text]}
        return guarded(function, f"--environment {self.rewards[0].name}", answers, self.settings.objective, note)
