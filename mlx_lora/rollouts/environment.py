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

Read the calls of tools in what a model wrote, in the form in which its chat template writes calls.

Which form that is, is found by having the template write a call and reading it back (`ToolTurns`), so a template
needs no entry in a list. The forms are those of mlx-lm's parsers (mlx_lm/tool_parsers), which have a text before a call
and one after it, and these:

    Llama 3    {"name": "f", "parameters": {"x": 1}}
    harmony    <|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>
    fenced     ```tool_code, a call in Python, ```

A call inside the model's thinking is no call. What cannot be read as a call is text, as in TRL.

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
were sampled; results are appended to them as the template writes results (at the end of this file). Rewards see conversations,
the calls and results included, and `environments`, the instances of the class, as in TRL.
"""

from __future__ import annotations

import ast
import inspect
import json
import pkgutil
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cache, cached_property, partial
from importlib import import_module
from types import MethodType
from typing import Any, Protocol

import jinja2
import numpy as np
from mlx_lm import tool_parsers
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import get_json_schema

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.chat_template import rendered_chat, template_shows, tokens_of_rendered
from mlx_lora.data.examples import Conversation, FormatError, Message
from mlx_lora.data.load import prompt_encoder
from mlx_lora.data.prompts import example_with_answer, observation_tokens, with_observation
from mlx_lora.data.read import SplitRows
from mlx_lora.data.render import CALL_FORMATS
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


Call = dict[str, Any]
"""`name` and `arguments`, and `id` if the model wrote one."""
Schemas = Sequence[dict[str, Any]]
Reader = Callable[[str, Schemas], tuple[str, list[Call]]]
"""(what the model wrote after its thinking, schemas of the tools) -> the text around its calls, and these.

Raises any exception if what looks like a call cannot be read.
"""


@dataclass(frozen=True)
class CallForm:
    """A way of writing calls: its name, of the parser in mlx-lm or of the family, and what reads them."""

    name: str
    read: Reader


@dataclass(frozen=True)
class Said:
    """What a model said in a turn.

    Attributes:
        content: the text, without special tokens, thinking and calls.
        calls: of tools, in order.
        thinking: the text of its thinking.
    """

    content: str
    calls: list[Call] = field(default_factory=list)
    thinking: str = ""

    @property
    def message(self) -> dict[str, Any]:
        """The turn as rewards see it, which is as in TRL."""
        found: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thinking:
            found["reasoning_content"] = self.thinking
        if self.calls:
            found["tool_calls"] = [
                {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
                for call in self.calls
            ]
        return found


# Forms


def _between(start: str, end: str, parse: Callable[..., Any], text: str, tools: Schemas) -> tuple[str, list[Call]]:
    """Read calls that stand between two texts; without an end, the last one goes up to the text's end."""
    rest, calls = "", []
    before, found, after = text.partition(start)
    rest += before
    while found:
        inside, closed, after = after.partition(end) if end else (after, "", "")
        if end and not closed:
            raise ValueError("a call without an end")
        read = parse(inside, list(tools))
        calls += read if isinstance(read, list) else [read]
        before, found, after = after.partition(start)
        rest += before
    return rest, calls


LLAMA_CALL = re.compile(r'\{\s*"name"\s*:')


def _llama(text: str, tools: Schemas) -> tuple[str, list[Call]]:
    """Read JSON objects with a name and parameters, which nothing but white space or a semicolon may follow."""
    text = text.replace("<|python_tag|>", "")
    found = LLAMA_CALL.search(text)
    if found is None:
        return text, []
    calls, at, decoder = [], found.start(), json.JSONDecoder()
    while at < len(text):
        read, at = decoder.raw_decode(text, at)
        calls.append({"name": read["name"], "arguments": read.get("parameters", read.get("arguments"))})
        at += len(text[at:]) - len(text[at:].lstrip(" \n;"))
    return text[: found.start()], calls


HARMONY_TO = re.compile(r"to=functions\.([\w.-]+)")


def _harmony(text: str, tools: Schemas) -> tuple[str, list[Call]]:
    """Read messages of the commentary channel to a function; the text is that of the final channel."""
    said, calls = "", []
    for part in text.split("<|start|>"):
        header, message, body = part.partition("<|message|>")
        body = re.split(r"<\|(?:end|call|return)\|>", body)[0]
        if to := HARMONY_TO.search(header):
            calls.append({"name": to[1], "arguments": json.loads(body)})
        elif not message:
            said += header
        elif "analysis" not in header:
            said += body
    return said, calls


FENCE = re.compile(r"```tool_code\s*\n(.*?)```", re.DOTALL)


def _fenced(text: str, tools: Schemas) -> tuple[str, list[Call]]:
    """Read calls in Python, one a line, in a fence."""
    calls = []
    for fence in FENCE.findall(text):
        for line in ast.parse(fence.strip()).body:
            call = line.value if isinstance(line, ast.Expr) else None
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
                raise ValueError("not a call with named arguments")
            arguments = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
            calls.append({"name": call.func.id, "arguments": arguments})
    return FENCE.sub("", text), calls


PLAINEST = "json_tools"  # is tried first: some others read its form too


@cache
def call_forms() -> tuple[CallForm, ...]:
    """Return all forms that are known."""
    found, names = [], [module.name for module in pkgutil.iter_modules(tool_parsers.__path__)]
    for name in sorted(names, key=lambda name: (name != PLAINEST, name)):
        parser: Any = import_module(f"{tool_parsers.__name__}.{name}")
        read = partial(_between, parser.tool_call_start, parser.tool_call_end or "", parser.parse_tool_call)
        found.append(CallForm(name, read))
    return *found, CallForm("harmony", _harmony), CallForm("fenced", _fenced), CallForm("llama3", _llama)


def call_form(turns: ToolTurns) -> CallForm:
    """Return the form in which a chat template writes calls.

    Raises:
        InputError: the template does not show tools, or its form is not known.
    """
    written = turns.probed()
    said = written
    for end in turns.ends:  # the token that ends the turn
        token = str(turns.tokenizer.convert_ids_to_tokens(end))
        if written.endswith(token) and token != "<|call|>":
            said = written.removesuffix(token)
            break
    for form in call_forms():
        found = _read(form, said, [PROBE_SCHEMA])[1]
        if [{name: call[name] for name in PROBE} for call in found] == [PROBE]:
            return form
    raise InputError(
        f"the chat template writes calls of tools in a form that is not known ({said.strip()[:80]!r}); give another with "
        "--chat-template, such as chatml"
    )


def _read(form: CallForm, text: str, tools: Schemas) -> tuple[str, list[Call]]:
    """Return the text around the calls and these; all of it as text if a call cannot be read."""
    try:
        (around, found), calls = form.read(text, tools), []
        for call in found:
            name, arguments = call["name"], call.get("arguments")
            if not isinstance(name, str) or not name:
                raise ValueError("a call without a name")
            own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
            calls.append({"name": name, "arguments": {} if arguments is None else arguments, **own})
        return around, calls
    except Exception:  # mlx-lm's parsers may raise anything on what a model wrote
        return text, []


# What a model said

# Texts around thinking; harmony's is a channel of its own.
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>"))
HARMONY_THOUGHT = re.compile(r"<\|channel\|>analysis<\|message\|>(.*?)(?:<\|end\|>|$)", re.DOTALL)


@dataclass(frozen=True)
class CallReader:
    """Reads what a model said in a turn.

    Attributes:
        turns: of its chat template.
        form: of calls there.
        opened: whether its turn begins inside its thinking.
    """

    turns: ToolTurns
    form: CallForm
    opened: bool

    @classmethod
    def of(cls, turns: ToolTurns) -> CallReader:
        """Return it for a chat template; errors as of `call_form`."""
        return cls(turns, call_form(turns), turns.opens_thinking())

    def __call__(self, tokens: Sequence[int]) -> Said:
        """Return what the tokens of a turn say, with or without its end token."""
        tokenizer, own = self.turns.tokenizer, list(tokens)
        if own and own[-1] in self.turns.ends and tokenizer.convert_ids_to_tokens(own[-1]) != "<|call|>":
            own.pop()
        text = str(tokenizer.decode(own, skip_special_tokens=False))
        thinking, answer = _thought(text, self.opened)
        around, calls = _read(self.form, answer, self.turns.tools)
        for token in tokenizer.added_tokens_decoder.values():
            if token.special:
                around, thinking = around.replace(token.content, ""), thinking.replace(token.content, "")
        return Said(around.strip(), calls, thinking.strip())


def _thought(text: str, opened: bool) -> tuple[str, str]:
    """Return the thinking and what follows it; all is thinking if that does not end."""
    if harmony := HARMONY_THOUGHT.findall(text):
        return "\n".join(harmony), text
    for start, end in THOUGHTS:
        before, found, after = text.rpartition(end)
        if found:
            later = after.partition(start)  # it thinks once more, and was cut
            return before.replace(start, "", 1) + later[2], later[0]
        if start in text or (opened and start == THOUGHTS[0][0]):
            answer, _, thinking = ("", "", text) if opened and start not in text else text.partition(start)
            return thinking, answer
    return "", text


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


# How a chat template writes a call of a tool and its result: what the model says, and what follows until it speaks again.
#
# Both are found in a rendered conversation. The call has an argument that no other text has; after it, the first token that
# ends an answer of this model divides the two:
#
#     <|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"text": MARK}}\n</tool_call><|im_end|>
#     \n<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>assistant\n
#
# Only what follows is ever put into an episode. What the model said stays as it was sampled, even where the template would
# write it otherwise, for example without its thinking.

QUESTION, RESULT, MARK = "the-question-before", "the-result-after", "the-call-between"
PROBE: dict[str, Any] = {"name": "look_up", "arguments": {"text": MARK, "count": 7}}
PROBE_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a text.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "description": "The text."},
                "count": {"type": "integer", "description": "A number."},
            },
            "required": ["text", "count"],
        },
    },
}
ANOTHER = "give another with --chat-template, such as chatml"
THINKING = ("<think>", "</think>")


@dataclass(frozen=True)
class ToolTurns:
    """Writes results of tools as a chat template does.

    Attributes:
        tokenizer: not mlx-lm's wrapper.
        template: Jinja text.
        ends: the tokens that end what the model says.
        tools: schemas of all tools that prompts show.
        day: that the template shows as today; None: today.
        allow_special_tokens: a result that spells a control token brings that token in.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    ends: frozenset[int]
    tools: Sequence[dict[str, Any]] = field(default_factory=list)
    day: date | None = None
    allow_special_tokens: bool = False

    def probed(self) -> str:
        """Return how the model would write the call `PROBE`, from its turn's beginning to its end token.

        Raises:
            InputError: the template does not show tools, calls or results, or no end token stands between the two.
        """
        asked = [{"role": "user", "content": QUESTION}]
        if not template_shows(self.tokenizer, asked, self.template, [PROBE_SCHEMA]):
            raise InputError(f"the chat template does not show tools to the model; {ANOTHER}")
        text, _, cut = self._divided([PROBE], [RESULT], MARK, [PROBE_SCHEMA])
        if RESULT not in text[cut:]:
            raise InputError(f"the chat template does not show what a tool returned; {ANOTHER}")
        if RESULT in text[:cut]:
            raise InputError(
                "the chat template writes no end token of the model between a call and its result, so the model would not "
                f"wait for it; {ANOTHER}"
            )
        begun = self._rendered(asked, [PROBE_SCHEMA])[0].partition(QUESTION)[2]
        said = text[:cut].partition(QUESTION)[2]
        return said.removeprefix(begun)

    def opens_thinking(self) -> bool:
        """Return whether the template itself opens the model's thinking, so that an answer begins inside of it."""
        begun = self._rendered([{"role": "user", "content": QUESTION}], self.tools)[0].partition(QUESTION)[2]
        return begun.rfind(THINKING[0]) > begun.rfind(THINKING[1])

    def tokens(self, calls: Sequence[Mapping[str, Any]], results: Sequence[str]) -> list[int]:
        """Return the tokens between the end token of a turn with calls and the model's next turn.

        Args:
            calls: each with `name`, and an `id` if the model wrote one.
            results: the text that each returned.

        Raises:
            InputError: the template refuses them.
        """
        mark = MARK
        while any(mark in result for result in results):
            mark += "-"
        marked = [{**call, "arguments": {"text": mark}} for call in calls]
        text, spans, cut = self._divided(marked, results, mark, self.tools)
        return tokens_of_rendered(self.tokenizer, text[cut:], [(a - cut, b - cut) for a, b in spans if a >= cut])

    def _divided(
        self, calls: Sequence[Mapping[str, Any]], results: Sequence[str], mark: str, tools: Sequence[dict[str, Any]]
    ) -> tuple[str, list[tuple[int, int]], int]:
        """Return a conversation with calls and results, the spans of its control tokens, and where the turn of the calls ends."""
        ids = [call_id(call, place) for place, call in enumerate(calls)]
        written = [
            {"id": own, "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for own, call in zip(ids, calls, strict=True)
        ]
        after: list[Message] = [
            {"role": "tool", "name": call["name"], "content": result, "tool_call_id": own}
            for own, call, result in zip(ids, calls, results, strict=True)
        ]
        refused: Exception | None = None
        for shown in (written, written[-1:]):  # some templates take a single call in a turn
            turn: Message = {"role": "assistant", "content": "", "tool_calls": shown}
            for formatted in CALL_FORMATS:
                messages = formatted([{"role": "user", "content": QUESTION}, turn, *after])
                try:
                    text, spans = self._rendered(messages, tools)
                except (jinja2.TemplateError, TypeError, ValueError, FormatError) as error:
                    refused = refused or error
                    continue
                return text, spans, self._end(text, mark)
        raise InputError(f"the chat template refuses the result of a tool ({refused}); {ANOTHER}")

    def _end(self, text: str, mark: str) -> int:
        """Return where the turn ends whose call has the mark."""
        if mark not in text:
            raise InputError(f"the chat template does not show calls of tools; {ANOTHER}")
        after = text.rindex(mark) + len(mark)
        texts = [str(self.tokenizer.convert_ids_to_tokens(end)) for end in self.ends]
        found = [(text.find(one, after), -len(one)) for one in texts if text.find(one, after) >= 0]
        if not found:
            raise InputError(f"the chat template writes no end token of the model after a call; {ANOTHER}")
        start, minus_length = min(found)
        return start - minus_length

    def _rendered(self, messages: list[Message], tools: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        return rendered_chat(self.tokenizer, messages, self.template, list(tools), self.day, self.allow_special_tokens)


def call_id(call: Mapping[str, Any], place: int) -> str:
    """Return the id of a call: the model's own if Mistral's templates would take it, else one of its place."""
    own = call.get("id")
    return own if isinstance(own, str) and len(own) == 9 and own.isalnum() and own.isascii() else f"call{place:05d}"
