"""Episodes in which the model calls tools: it calls, reads what they return, and calls again or answers.

    reset     begins an instance of the user's class for each episode (--environment), if there is one
    step      reads the calls in what the model said, makes them, and returns what the chat template writes of their results
    finish    rewards all episodes of the batch in one call, when all are over

An episode is over after an answer without a call, at --max-turns, or at the end of its room. The model's tokens stay as they
were sampled; results are appended to them as the template writes results (data/tool_turns.py). Rewards see conversations,
the calls and results included, and `environments`, the instances of the class, as in TRL.

Shapes: N prompts, G episodes of each, E = N G episodes, F rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.examples import Conversation, Message
from mlx_lora.data.load import prompt_encoder
from mlx_lora.data.prompts import with_observation
from mlx_lora.data.read import SplitRows
from mlx_lora.data.tokenize import Encoder
from mlx_lora.data.tool_turns import ToolTurns, call_id
from mlx_lora.rollouts.environment import Episode, Facts, StepResults, same_beginnings, text_of
from mlx_lora.rollouts.rewards import Reward, SilentRewards, TrainerState, guarded, rewards_for
from mlx_lora.rollouts.tool_calls import CallReader, Said
from mlx_lora.rollouts.tools import FailedCalls, OwnRandom, Result, Tool, begin, called, tool_methods
from mlx_lora.utils.errors import InputError

# What is reported of episodes; the first two are TRL's. Failed calls are counted for each episode, and shown as a share of calls.
CALLS, FAILURES, TURNS, CUT = (
    "tools/call_frequency",
    "tools/failure_frequency",
    "tools/turns",
    "tools/max_turns_frequency",
)
TOOL_REPORTS = (CALLS, FAILURES, TURNS, CUT)
MOST_CHARACTERS = 64  # of a result, for each token that an episode has room for


def failures_of_calls(means: dict[str, float]) -> dict[str, float]:
    """Return reports with the share of calls that failed; 0 if there were none."""
    if FAILURES not in means:
        return means
    return {**means, FAILURES: means[FAILURES] / means[CALLS] if means[CALLS] else 0.0}


@dataclass
class Toolbox:
    """The tools of a run.

    Attributes:
        plain: functions, the same in every episode.
        environment: the class with an instance for each episode; None: there is none.
        schemas: of all tools, as prompts show them.
        name: of the class, for messages.
    """

    plain: Sequence[Tool]
    environment: type[Any] | None
    schemas: list[dict[str, Any]]
    name: str = ""

    def of(self, instance: Any) -> dict[str, Tool]:
        """Return the tools of an episode by name."""
        found = {schema["function"]["name"]: tool for schema, tool in zip(self.schemas, self.plain, strict=False)}
        if self.environment is not None:
            found |= {name: getattr(instance, name) for name in tool_methods(self.environment)}
        return found


@dataclass
class EpisodeTurns:
    """The conversation of an episode so far.

    Attributes:
        tools: by name.
        random: what its tools draw from.
        prompt: the turns before the model's first.
        turns: those of the model and of tools.
        answers: number of the model's turns.
        blocks: where the results after each turn begin in `turns`.
        calls, failures: numbers of calls, and of those that failed.
        cut: whether it ended at --max-turns with calls that were not made.
    """

    tools: dict[str, Tool]
    random: OwnRandom
    prompt: list[Message]
    turns: list[Message] = field(default_factory=list)
    answers: int = 0
    blocks: list[int] = field(default_factory=list)
    calls: int = 0
    failures: int = 0
    cut: bool = False

    def end(self, episode: Episode) -> None:
        """Leave out results for which the episode had no room, and give the episode what is reported of it."""
        if len(self.blocks) > len(episode.observed):
            del self.turns[self.blocks[-1] :]
        counts = (self.calls, self.failures, self.answers, self.cut)
        episode.counts = dict(zip(TOOL_REPORTS, map(float, counts), strict=True))
        episode.messages = self.turns


@dataclass
class ToolEnv:
    """The environment of episodes with tools.

    Attributes:
        toolbox: what the model may call.
        rewards: of whole episodes.
        settings: of the run.
        tokenizer: not mlx-lm's wrapper.
        ends: tokens that end what the model says.
        day: that the chat template shows as today; None: today.
        state: where the run is, for rewards that take it.
        silent: counts rewards that gave nothing to a batch.
        failed: counts calls that failed.
        pool: instances of the class, made once and begun anew for each episode, as in TRL.
        talks: of each episode; none if the class could not be begun, which is skipped.
        facts: of each episode's prompt.
    """

    toolbox: Toolbox
    rewards: Sequence[Reward]
    settings: TrainSettings
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    day: date | None = None
    state: TrainerState = field(default_factory=TrainerState)
    silent: SilentRewards = field(default_factory=SilentRewards)
    failed: FailedCalls = field(default_factory=FailedCalls)
    pool: list[Any] = field(default_factory=list)
    talks: list[EpisodeTurns] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)

    def reset(
        self,
        prompts: Sequence[list[int]],
        facts: Sequence[Facts],
        group: int,
        seeds: Sequence[int],
        note: Callable[[str], None],
    ) -> list[list[int]]:
        self.facts, self.talks = [fact for fact in facts for _ in range(group)], []
        if not self.facts:
            return list(prompts)
        randoms = [OwnRandom(seed) for seed in seeds for _ in range(group)]
        first = self._begun(randoms, [seed for seed in seeds for _ in range(group)], note)
        if first is None:
            return list(prompts)
        observations = same_beginnings(first, group, f"--environment {self.toolbox.name}")
        for number, random in enumerate(randoms):
            example = with_observation(self.facts[number]["example"], first[number] or "")
            instance = self.pool[number] if self.toolbox.environment is not None else None
            self.talks.append(EpisodeTurns(self.toolbox.of(instance), random, list(example.messages[:-1])))  # pyright: ignore[reportAttributeAccessIssue] # with tools, a prompt is a conversation
        return [
            prompt if not text else self.encoder.prompt_tokens(with_observation(fact["example"], text))
            for prompt, fact, text in zip(prompts, facts, observations, strict=True)
        ]

    def step(
        self, episodes: Sequence[int], completions: Sequence[list[int]], note: Callable[[str], None]
    ) -> StepResults:
        nothing = np.full((len(completions), len(self.rewards)), np.nan)
        if not self.talks:
            return StepResults([[] for _ in completions], nothing, [True] * len(completions))
        found = [
            self._answered(self.talks[number], said, note) for number, said in zip(episodes, completions, strict=True)
        ]
        return StepResults([tokens or [] for tokens in found], nothing, [tokens is None for tokens in found])

    def finish(self, episodes: Sequence[Episode], note: Callable[[str], None]) -> np.ndarray | None:
        if not self.talks:
            return None
        for talk, episode in zip(self.talks, episodes, strict=True):
            talk.end(episode)
        names = dict.fromkeys(name for fact in self.facts for name in fact["columns"])
        arguments: dict[str, Any] = {name: [fact["columns"].get(name) for fact in self.facts] for name in names}
        for name in ("prompt", "completion"):
            arguments.pop(name, None)
        arguments |= {
            "prompts": [talk.prompt for talk in self.talks],
            "completions": [talk.turns for talk in self.talks],
            "completion_ids": [episode.tokens for episode in episodes],
        }
        if self.toolbox.environment is not None:
            arguments["environments"] = self.pool[: len(self.talks)]
        whole = [Conversation([*talk.prompt, *with_ids(talk.turns)], self.toolbox.schemas) for talk in self.talks]
        with self.talks[0].random.used():  # `get_reward` may draw, too
            found = rewards_for(self.rewards, arguments, self.settings.objective, note, whole, self.state)
        self.silent.watch([reward.name for reward in self.rewards], found, note)
        return found

    def text_of(self, tokens: Sequence[int]) -> str:
        return text_of(self.tokenizer, tokens)

    def _begun(
        self, randoms: Sequence[OwnRandom], seeds: Sequence[int], note: Callable[[str], None]
    ) -> list[Any] | None:
        """Begin the episodes, and return what is added to each prompt; None if one failed and that is skipped."""
        make = self.toolbox.environment
        if make is None:
            return [None] * len(self.facts)

        def begun() -> list[Any]:
            found = []
            for number, (fact, random, seed) in enumerate(zip(self.facts, randoms, seeds, strict=True)):
                if number == len(self.pool):
                    with self._random_of_instance(number).used():
                        self.pool.append(make())
                with random.used():
                    found.append(begin(self.pool[number], fact["columns"], seed))
            return found

        answers = {"prompts": [fact["prompt"] for fact in self.facts], "completions": [""] * len(self.facts)}
        return guarded(begun, f"--environment {self.toolbox.name}", answers, self.settings.objective, note)

    def _random_of_instance(self, number: int) -> OwnRandom:
        """Return what an instance draws from when it is made, alike for those that play a prompt's episodes in training.

        It follows from the run's seed and the instance's place alone: which episodes come first in a process is another
        after it resumed.
        """
        place = number // self.settings.objective.answers_per_prompt
        return OwnRandom(
            int(np.random.SeedSequence(self.settings.loop.seed, spawn_key=(1, place)).generate_state(1)[0])
        )

    def _answered(self, talk: EpisodeTurns, completion: list[int], note: Callable[[str], None]) -> list[int] | None:
        """Take what the model said in an episode; return the tokens of the results of its calls, or None if it is over."""
        said = self.reader(completion)
        talk.turns.append(said.message)
        talk.answers += 1
        if not said.calls or completion[-1] not in self.ends:
            return None
        if talk.answers >= self.settings.objective.max_turns:
            talk.cut = True
            return None
        results = self._results(talk, said, note)
        talk.blocks.append(len(talk.turns))
        talk.turns += [
            {"role": "tool", "name": call["name"], "content": result.value}
            for call, result in zip(said.calls, results, strict=True)
        ]
        most = (
            MOST_CHARACTERS * self.settings.objective.max_new_tokens
        )  # what is longer does not fit, and takes long to render
        try:
            return self.reader.turns.tokens(said.calls, [result.text[:most] for result in results])
        except InputError as error:
            note(f"Note: {error}; an episode ends there")
            return None

    def _results(self, talk: EpisodeTurns, said: Said, note: Callable[[str], None]) -> list[Result]:
        found = []
        for call in said.calls:
            with talk.random.used():
                result = called(talk.tools, call, self.settings.objective.reward_timeout)
            talk.calls += 1
            talk.failures += bool(result.failed)
            self.failed.watch(call, result, note)
            found.append(result)
        return found

    @cached_property
    def encoder(self) -> Encoder:
        """What encodes prompts, as the run's data were encoded."""
        rows = SplitRows([fact["example"] for fact in self.facts])
        return prompt_encoder(rows, self.settings.data, self.tokenizer, self.day)

    @cached_property
    def reader(self) -> CallReader:
        """What reads calls, and writes their results."""
        encoder, asked = self.encoder, self.settings.data.allow_special_tokens
        if encoder.template is None:
            raise InputError("tools need a chat template, and the model has none; give one with --chat-template")
        turns = ToolTurns(self.tokenizer, encoder.template, self.ends, self.toolbox.schemas, encoder.day, asked)
        return CallReader.of(turns)


def with_ids(turns: Sequence[Message]) -> list[Message]:
    """Return turns whose calls and results have ids, and whose contents are texts, as chat templates take them."""
    found: list[Message] = []
    waiting: list[str] = []
    for message in turns:
        if calls := message.get("tool_calls"):
            waiting = [call_id(call, place) for place, call in enumerate(calls)]
            calls = [{**call, "id": own} for call, own in zip(calls, waiting, strict=True)]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            own = waiting.pop(0) if waiting else call_id(message, 0)
            message = {**message, "content": Result(message["content"]).text, "tool_call_id": own}
        found.append(message)
    return found
