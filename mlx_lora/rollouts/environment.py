"""Environments: what answers the model, and rewards it. A rollout is one episode in an environment.

    reset    begins an episode, and may add a first observation to the record's prompt
    step     takes what the model said, and returns an observation, a reward, and whether the episode is over

The words are gymnasium's. `Env` is what a user writes: the environment of a single episode, in text. A `VectorEnv` runs the
episodes of a batch side by side, in tokens. There are three:

    SingleTurnEnv    every episode is over after one answer, and --reward rewards all answers of a batch in one call
    MultiTurnEnv     each episode has an `Env` of its own (--environment), whose observations become turns of the user
    ToolEnv          the model calls tools, whose results become turns of tools

rollouts/make_environment.py chooses.

In a row, the model's tokens and the observations between them follow the prompt in the order in which they came. Only the
model's tokens are trained. The row has as much room as --max-new-tokens says for all of them together, so that shapes and
memory are known before the run; an episode that reaches the end of its room is truncated.

Shapes: N prompts, G episodes of each, E = N G episodes, F rewards.

Tools that the model may call: which ones there are, their schemas, and calling them.

    --tools FILE.py, FILE.py:NAME,NAME    plain functions, the same for every episode
    --environment FILE.py:CLASS           a class of TRL's `environment_factory`: its public methods are tools, beside
                                          `reset`, which begins an episode, and `get_reward`, which ends it

A schema is that of transformers, from type hints and a docstring with "Args:". What a tool returns is put back as text. If
it fails, the model reads {'error': ...}, as in TRL, and the run goes on.

Episodes in which the model calls tools: it calls, reads what they return, and calls again or answers.

    reset     begins an instance of the user's class for each episode (--environment), if there is one
    step      reads the calls in what the model said, makes them, and returns what the chat template writes of their results
    finish    rewards all episodes of the batch in one call, when all are over

An episode is over after an answer without a call, at --max-turns, or at the end of its room. The model's tokens stay as they
were sampled; results are appended to them as the template writes results (rollouts/tool_calls.py). Rewards see conversations,
the calls and results included, and `environments`, the instances of the class, as in TRL.
"""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from types import MethodType
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import get_json_schema

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.examples import Conversation, Message
from mlx_lora.data.load import prompt_encoder
from mlx_lora.data.prompts import example_with_answer, observation_tokens, with_observation
from mlx_lora.data.read import SplitRows
from mlx_lora.data.tokenize import Encoder
from mlx_lora.rollouts.rewards import (
    IN_PYTHON,
    NO_FUNCTIONS,
    FirstTimes,
    Functions,
    Note,
    Reward,
    TrainerState,
    guarded,
    one_note,
    problem_of,
    rewards_for,
)
from mlx_lora.rollouts.tool_calls import Call, CallReader, ToolTurns, call_id
from mlx_lora.rollouts.user_code import FAILURES, TooLong, at_most, awaited, from_file, module_of, without_defaults
from mlx_lora.utils.errors import InputError, RunError

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
        self, prompts: Sequence[list[int]], facts: Sequence[Facts], group: int, seeds: Sequence[int], note: Note
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

    def step(self, episodes: Sequence[int], completions: Sequence[list[int]], note: Note) -> StepResults:
        """Take what the model said in some episodes.

        Args:
            episodes: their numbers; those of one prompt are neighbors.
            completions: tokens, with the end token if the model gave one.
            note: takes a line if something failed and is skipped.

        Raises:
            RunError: a reward or a user's environment failed.
        """
        raise NotImplementedError

    def finish(self, episodes: Sequence[Episode], note: Note) -> np.ndarray | None:
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

    def step(self, episodes: Sequence[int], completions: Sequence[list[int]], note: Note) -> StepResults:
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
        self, prompts: Sequence[list[int]], facts: Sequence[Facts], group: int, seeds: Sequence[int], note: Note
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

    def step(self, episodes: Sequence[int], completions: Sequence[list[int]], note: Note) -> StepResults:
        observations, done = [], []
        with one_note(note) as skipped:
            for number, completion in zip(episodes, completions, strict=True):
                text, example = self._answered(number, self.text_of(completion), skipped), self.facts[number]["example"]
                observations.append([] if text is None else observation_tokens(self.encoder, example, text))
                done.append(text is None)
        return StepResults(observations, np.full((len(done), 1), np.nan), done)

    def finish(self, episodes: Sequence[Episode], note: Note) -> np.ndarray | None:
        return np.array(self.totals)[:, None]

    def _begun(self, number: int, seed: int, note: Note) -> tuple[Env, str | None] | None:
        """Begin an episode, and return it with what is added to its prompt; None if that failed and is skipped."""

        def begin() -> list[Any]:
            made = self.make()
            columns = {**self.facts[number]["columns"], "seed": seed}
            return [made, made.reset(**without_defaults(made.reset, columns))]

        begun = self._guarded(begin, number, "", note)
        return None if begun is None else (begun[0], begun[1])

    def _answered(self, number: int, text: str, note: Note) -> str | None:
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

    def _guarded(self, function: Callable[[], list[Any]], number: int, text: str, note: Note) -> list[Any] | None:
        """Return what an episode of the user's returns, None if it failed and that is skipped."""
        answers = {"prompts": [self.facts[number]["prompt"]], "completions": [text]}
        return guarded(function, f"--environment {self.rewards[0].name}", answers, self.settings.objective, note)


# Tools that the model may call

Tool = Callable[..., Any]
RESET, STEP, OWN_REWARD = "reset", "step", "get_reward"
FLAG, ENVIRONMENT_FLAG = "--tools", "--environment"

# Which tools there are


def asked_tools(settings: ObjectiveSettings) -> list[str]:
    """Return what --tools names, one text each: FILE.py, FILE.py:NAME or python:NAME."""
    found, file = [], ""
    for text in (part.strip() for part in (settings.tools or "").split(",")):
        if not text:
            continue
        path, colon, _ = text.rpartition(":")
        if text.endswith(".py") or path.endswith(".py") or text.startswith(IN_PYTHON) or not file:
            file = path if colon and path.endswith(".py") else ""
            found.append(text)
        else:
            found.append(f"{file}:{text}")
    return found


def plain_tools(settings: ObjectiveSettings, functions: Functions = NO_FUNCTIONS) -> list[Tool]:
    """Return the functions that --tools names.

    Args:
        settings: with --tools.
        functions: those that were given in Python, by what --tools calls them.

    Raises:
        InputError: a file cannot be loaded, or has no such function.
    """
    found: list[Tool] = []
    for text in asked_tools(settings):
        if text.startswith(IN_PYTHON):
            if text not in functions:
                raise InputError(
                    f"{FLAG} {text}: a function that was given in Python; continue with mlx_lora.train there"
                )
            found.append(functions[text])
        elif text.endswith(".py"):
            module = module_of(text, f"{FLAG} {text}")
            own = [
                value
                for name, value in vars(module).items()
                if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
            ]
            if not own:
                raise InputError(f"{FLAG} {text}: it defines no function; name one that it has as {text}:NAME")
            found += own
        elif text.rpartition(":")[0].endswith(".py"):
            found.append(from_file(FLAG, text, "function"))
        else:
            raise InputError(f"{FLAG} {text}: not functions in a file; give FILE.py or FILE.py:NAME,NAME")
    return found


def tool_methods(environment: type[Any]) -> list[str]:
    """Return the names of the methods of a class that are tools, as in TRL."""
    names = [name for name, _ in inspect.getmembers(environment, inspect.isfunction)]
    return [name for name in names if not name.startswith("_") and name not in (RESET, OWN_REWARD)]


def tool_schemas(plain: Sequence[Tool], environment: type[Any] | None, asked: str = "") -> list[dict[str, Any]]:
    """Return the schemas of all tools, in the order in which the chat template shows them.

    Args:
        plain: functions.
        environment: a class whose methods are tools, or None.
        asked: what --environment says, for messages.

    Raises:
        InputError: a tool has no schema, or two have one name.
    """
    found = [(f"{FLAG}, {getattr(tool, '__name__', type(tool).__name__)}", tool) for tool in plain]
    if environment is not None:
        for name in tool_methods(environment):
            method = inspect.getattr_static(environment, name)
            bound = (
                method.__func__ if isinstance(method, staticmethod) else MethodType(method, object())
            )  # a schema needs no instance
            found.append((f"{ENVIRONMENT_FLAG} {asked}, {name}", bound))
    schemas = []
    for where, tool in found:
        try:
            schemas.append(get_json_schema(tool))
        except Exception as error:  # a docstring or type hints of any form
            words = str(error).strip().split("\n")[0] or type(error).__name__
            raise InputError(
                f'{where}: no tool ({words}); give it type hints, and a docstring with "Args:" that describes each argument'
            ) from None
    names = Counter(schema["function"]["name"] for schema in schemas)
    for name, count in names.items():
        if count > 1:
            raise InputError(f"{FLAG}: {count} tools are called {name}; rename all but one")
    return schemas


# Calls


@dataclass(frozen=True)
class Result:
    """What a call gave.

    Attributes:
        value: for rewards: a list as it is, anything else as text, as in TRL.
        failed: why it failed, an empty text if it did not.
    """

    value: Any
    failed: str = ""

    @property
    def text(self) -> str:
        """What the model reads."""
        if not isinstance(self.value, list):
            return str(self.value)
        parts = [part.get("text") if isinstance(part, dict) else None for part in self.value]
        return "\n".join(map(str, parts)) if parts and all(isinstance(part, str) for part in parts) else str(self.value)


def called(tools: Mapping[str, Tool], call: Call, limit_s: float) -> Result:
    """Call a tool; whatever goes wrong becomes its result.

    Args:
        tools: by name.
        call: from the model.
        limit_s: seconds that it may take.
    """
    name, arguments = call["name"], call["arguments"]
    try:
        if name not in tools:
            raise ValueError(f"Tool {name} not found.")
        if not isinstance(arguments, dict):
            raise TypeError(f"the arguments of {name} are not an object")
        with at_most(limit_s):
            value = tools[name](**arguments)
            value = awaited(value) if inspect.isawaitable(value) else value
            return Result(value if isinstance(value, list) else str(value))
    except TooLong:
        words, kind = f"{name} took longer than {limit_s:g} s", "TimeoutError"
    except FAILURES as error:  # a user's code may raise anything
        words, kind = str(error), type(error).__name__
    first = words.strip().splitlines()[:1]
    return Result(str({"error": words}), f"{kind}: {first[0]}" if first else kind)


def watch_failure(counts: FirstTimes, tool: str, why: str, note: Note) -> None:
    """Count a failed call, and say so at the first, the 10th, the 100th of each tool."""
    tool = tool[:40]
    if count := counts.next(tool):
        times = "once" if count == 1 else f"{count:,} times so far"
        note(f"Note: the tool {tool} failed {times} ({why[:120]}); the model is told")


# What is random in tools


class OwnRandom:
    """Python's and NumPy's own random numbers of one episode.

    Classes written for TRL draw from `random` as it is. So that the episodes of a prompt begin alike, and a resumed run
    repeats them, an episode has a state of its own, which is exchanged with the process's while its code runs.
    """

    def __init__(self, seed: int):
        """Begin at a seed."""
        self._python: Any = random.Random(seed).getstate()
        self._numpy: Any = np.random.RandomState(seed % (1 << 32)).get_state()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Draw from these numbers in here."""
        before = random.getstate(), np.random.get_state()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        try:
            yield
        finally:
            self._python, self._numpy = random.getstate(), np.random.get_state()
            random.setstate(before[0])
            np.random.set_state(before[1])


def begin(environment: Any, columns: Mapping[str, Any], seed: int) -> str | None:
    """Call an environment's `reset` with the columns that it takes, and return what is added to the prompt.

    Args:
        environment: an instance.
        columns: of the record.
        seed: given as `seed` if it takes one, unless the record has one of its own in a column of this name.

    Raises:
        TypeError: it returned neither a text nor None.
    """
    own = columns.get("seed")
    given = without_defaults(environment.reset, {**columns, "seed": seed if own is None else own})
    parameters = inspect.signature(environment.reset).parameters.values()
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        given = {one.name: given[one.name] for one in parameters if one.name in given}
    observation = environment.reset(**given)
    if isinstance(observation, list):
        return Result(observation).text
    if observation is not None and not isinstance(observation, str):
        raise TypeError(f"reset returned a {type(observation).__name__}; return a text, or None to add nothing")
    return observation


# Episodes in which the model calls tools

# What is reported of episodes; the first two are TRL's. Failed calls are counted for each episode, and shown as a share of calls.
TOOL_REPORTS = CALLS, FAILED, TURNS, CUT = (
    "tools/call_frequency",
    "tools/failure_frequency",
    "tools/turns",
    "tools/max_turns_frequency",
)
MOST_CHARACTERS = 64  # of a result, for each token that an episode has room for


def failures_of_calls(means: dict[str, float]) -> dict[str, float]:
    """Return reports with the share of calls that failed; 0 if there were none."""
    if FAILED not in means:
        return means
    return {**means, FAILED: means[FAILED] / means[CALLS] if means[CALLS] else 0.0}


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


@dataclass
class EpisodeTurns:
    """The conversation of an episode so far.

    Attributes:
        tools: by name.
        random: what its tools draw from.
        prompt: the turns before the model's first.
        turns: those of the model and of tools.
        blocks: where the results after each turn begin in `turns`.
        counts: of calls, failed calls and answers, and whether calls were left at --max-turns.
    """

    tools: dict[str, Tool]
    random: OwnRandom
    prompt: list[Message]
    turns: list[Message] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TOOL_REPORTS, 0.0))


@dataclass
class ToolEnv(VectorEnv):
    """The environment of episodes with tools, whose rewards are of whole episodes.

    Attributes:
        toolbox: what the model may call.
        ends: tokens that end what the model says.
        failed: counts calls that failed, by tool.
        pool: instances of the class, made once and begun anew for each episode, as in TRL.
        talks: of each episode; none if the class could not be begun, which is skipped.
    """

    toolbox: Toolbox = field(kw_only=True)
    ends: frozenset[int] = field(kw_only=True)
    failed: FirstTimes = field(default_factory=FirstTimes)
    pool: list[Any] = field(default_factory=list)

    def reset(
        self, prompts: Sequence[list[int]], facts: Sequence[Facts], group: int, seeds: Sequence[int], note: Note
    ) -> list[list[int]]:
        super().reset(prompts, facts, group, seeds, note)
        self.talks: list[EpisodeTurns] = []
        if not self.facts:
            return list(prompts)
        randoms = [OwnRandom(seed) for seed in seeds for _ in range(group)]
        first = self._begun(randoms, [seed for seed in seeds for _ in range(group)], note)
        if first is None:
            return list(prompts)
        observations = same_beginnings(first, group, f"--environment {self.toolbox.name}")
        for number, own_random in enumerate(randoms):
            example = with_observation(self.facts[number]["example"], first[number] or "")
            box = self.toolbox
            names = (schema["function"]["name"] for schema in box.schemas)
            own: dict[str, Tool] = dict(zip(names, box.plain, strict=False))
            if box.environment is not None:
                own |= {name: getattr(self.pool[number], name) for name in tool_methods(box.environment)}
            self.talks.append(EpisodeTurns(own, own_random, list(example.messages[:-1])))  # pyright: ignore[reportAttributeAccessIssue] # with tools, a prompt is a conversation
        return [
            prompt if not text else self.encoder.prompt_tokens(with_observation(fact["example"], text))
            for prompt, fact, text in zip(prompts, facts, observations, strict=True)
        ]

    def step(self, episodes: Sequence[int], completions: Sequence[list[int]], note: Note) -> StepResults:
        nothing = np.full((len(completions), len(self.rewards)), np.nan)
        if not self.talks:
            return StepResults([[] for _ in completions], nothing, [True] * len(completions))
        found = [
            self._answered(self.talks[number], said, note) for number, said in zip(episodes, completions, strict=True)
        ]
        return StepResults([tokens or [] for tokens in found], nothing, [tokens is None for tokens in found])

    def finish(self, episodes: Sequence[Episode], note: Note) -> np.ndarray | None:
        if not self.talks:
            return None
        for talk, episode in zip(self.talks, episodes, strict=True):
            if len(talk.blocks) > len(episode.observed):  # results for which the episode had no room
                del talk.turns[talk.blocks[-1] :]
            episode.counts, episode.messages = talk.counts, talk.turns
        arguments: dict[str, Any] = self.columns()
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
            return rewards_for(self.rewards, arguments, self.settings.objective, note, whole, self.state, self.silent)

    def _begun(self, randoms: Sequence[OwnRandom], seeds: Sequence[int], note: Note) -> list[Any] | None:
        """Begin the episodes, and return what is added to each prompt; None if one failed and that is skipped."""
        make = self.toolbox.environment
        if make is None:
            return [None] * len(self.facts)

        def begun() -> list[Any]:
            found = []
            for number, (fact, own_random, seed) in enumerate(zip(self.facts, randoms, seeds, strict=True)):
                if number == len(self.pool):
                    # Alike for those that play a prompt's episodes; of the run's seed and the place alone, because which
                    # episodes come first in a process is another after it resumed.
                    place = number // self.settings.objective.answers_per_prompt
                    own_seed = np.random.SeedSequence(self.settings.loop.seed, spawn_key=(1, place)).generate_state(1)
                    with OwnRandom(int(own_seed[0])).used():
                        self.pool.append(make())
                with own_random.used():
                    found.append(begin(self.pool[number], fact["columns"], seed))
            return found

        answers = {"prompts": [fact["prompt"] for fact in self.facts], "completions": [""] * len(self.facts)}
        return guarded(begun, f"--environment {self.toolbox.name}", answers, self.settings.objective, note)

    def _answered(self, talk: EpisodeTurns, completion: list[int], note: Note) -> list[int] | None:
        """Take what the model said in an episode; return the tokens of the results of its calls, or None if it is over."""
        said = self.reader(completion)
        talk.turns.append(said.message)
        talk.counts[TURNS] += 1
        if not said.calls or completion[-1] not in self.ends:
            return None
        if talk.counts[TURNS] >= self.settings.objective.max_turns:
            talk.counts[CUT] = 1.0
            return None
        results = []
        for call in said.calls:
            with talk.random.used():
                result = called(talk.tools, call, self.settings.objective.reward_timeout)
            talk.counts[CALLS] += 1
            if result.failed:
                talk.counts[FAILED] += 1
                watch_failure(self.failed, str(call["name"]), result.failed, note)
            results.append(result)
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
