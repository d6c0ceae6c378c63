"""Make the environment that a run's settings ask for: of single answers, of several turns, or of tools.

--reward alone                               single answers
--environment verifiers:NAME                 an environment of that package, with its own tools and rewards
--environment, a class with reset and step   several turns; step rewards them
--environment, a class of TRL's form         tools: its public methods; --reward or its get_reward rewards them
--tools                                      tools: plain functions, alone or beside such a class

Episodes of an environment of verifiers (0.4), with exact tokens: `--environment verifiers:NAME`.

    rehearse   plays the first task with a stand-in for the model, to learn which tools and rewards there are
    reset      begins an episode of the package for each row, and renders its first question to the model
    step       gives each episode the tokens of its answer, and renders what its next question adds
    finish     reads the rewards and metrics that the package has recorded of each episode

The package sends whole conversations as messages. Their tokens are ours: the model's stay as they were sampled, and what
the environment adds is appended as the chat template writes it, as in our own environments. The package keeps the same tokens
and the same mask in its record; an episode in which the two differ cannot be used, because the environment has rewritten the
conversation.

Shapes: N prompts, G episodes of each, E = N G episodes, F rewards.
"""

from __future__ import annotations

import atexit
import inspect
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.rules import is_verifiers
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.examples import Conversation, Message
from mlx_lora.data.prompts import observation_tokens
from mlx_lora.data.task_sets import STAND_IN, make_environment, named, one_line, package, tasks_of
from mlx_lora.models.load import Base
from mlx_lora.rollouts.environment import (
    CALLS,
    CUT,
    FAILED,
    MOST_CHARACTERS,
    OWN_REWARD,
    RESET,
    STEP,
    TOOL_REPORTS,
    TURNS,
    Episode,
    Facts,
    MultiTurnEnv,
    SingleTurnEnv,
    StepResults,
    Toolbox,
    ToolEnv,
    VectorEnv,
    plain_tools,
    same_beginnings,
    tool_methods,
    tool_schemas,
    watch_failure,
)
from mlx_lora.rollouts.rewards import (
    IN_PYTHON,
    NO_FUNCTIONS,
    FirstTimes,
    Functions,
    Note,
    Reward,
    fail,
    no_function,
    reward_names,
)
from mlx_lora.rollouts.tool_calls import NO_CALLS, CallReader, Said, ToolTurns, call_id
from mlx_lora.rollouts.user_code import awaited, from_file
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.progress import waiting

if TYPE_CHECKING:
    from mlx_lora.rollouts.verifiers_host import Host, PlayedEpisode, Question

METRIC = "metrics/"  # before the name of a metric in reports
ERRORS, TIMEOUTS = "episodes/error_frequency", "episodes/timeout_frequency"
START_S = 240.0  # that servers of tools may take to start, at least; the package gives up after 180 s, and says why


# Episodes of verifiers: before a run


@dataclass(frozen=True)
class Rehearsal:
    """What an environment showed when its first task was played.

    Attributes:
        tools: schemas of what the model may call.
        weights: of the rewards, by name.
        metrics: names of what it measures.
    """

    tools: list[dict[str, Any]]
    weights: dict[str, float]
    metrics: tuple[str, ...]


def rehearse(settings: ObjectiveSettings) -> Rehearsal:
    """Play the first task once with a stand-in for the model's answers.

    Raises:
        InputError: that fails, as it does without a network, a sandbox or a judge that the environment needs.
    """
    return _rehearsed(settings.environment or "", settings.max_turns, settings.reward_timeout)


@lru_cache(maxsize=4)
def _rehearsed(environment: str, turns: int, limit_s: float) -> Rehearsal:
    asked = f"--environment {environment}"
    task = tasks_of(environment)[0]
    host = host_of(environment, turns, limit_s)
    try:
        with waiting(f"Playing a task of {environment} without the model, to see its tools and rewards"):
            host.start(max(limit_s, START_S))
            host.begin({0: task})
            tools, late = None, host.settle([0], limit_s)
            while not late and (question := host.episodes[0].question) is not None:
                tools = question.tools if tools is None else tools
                respond = import_module(type(host).__module__).response_of
                host.answer(0, respond(STAND_IN, "", [], question.before or [0], [0], True))
                late = host.settle([0], limit_s)
    except Exception as error:  # the package's and the environment's code may raise anything
        raise InputError(f"{asked}: it cannot be started ({one_line(error)}); correct it") from error
    episode = host.episodes[0]
    if late:
        host.drop(0, "")
        raise InputError(f"{asked}: its first task takes longer than {limit_s:g} s; raise --reward-timeout")
    if episode.problem or tools is None:
        why = episode.problem or "it asks the model nothing"
        raise InputError(
            f"{asked}: its first task cannot be played on this machine ({why}); it must reach what it needs from here"
        )
    weights = {name: one.weight for name, one in episode.trace.rewards.items() if one is not None}
    if not weights:
        raise InputError(f"{asked}: nothing rewards its episodes; give a task a reward")
    return Rehearsal(tools, weights, tuple(episode.trace.metrics))


HOSTS: dict[tuple[str, int, float], Host] = {}
LOCK = threading.Lock()


def host_of(environment: str, turns: int, limit_s: float) -> Host:
    """Return what plays episodes, the same one for the same environment: its tool servers are started once.

    Raises:
        InputError: the environment cannot be loaded.
    """
    asked, key = f"--environment {environment}", (environment, turns, limit_s)
    package(asked)
    with LOCK:
        if key not in HOSTS:
            made = make_environment(named(environment)[0], asked, turns, limit_s)
            HOSTS[key] = import_module("mlx_lora.rollouts.verifiers_host").Host(made)
        return HOSTS[key]


@atexit.register
def close_hosts() -> None:
    """End all environments and their tool servers."""
    with LOCK:
        while HOSTS:
            HOSTS.popitem()[1].close()
    _rehearsed.cache_clear()


# Episodes of verifiers: in a run


@dataclass
class Dialogue:
    """An episode as the model sees it.

    Attributes:
        tokens: of the conversation so far, from the prompt on.
        mask: which of them the model sampled, for what the package has kept.
        calls: of the last answer.
        turns: the messages after the prompt.
        unseen: where in `turns` those begin that the model has not answered.
        counts: of calls, failed calls and answers, and whether calls were left at --max-turns.
        dead: whether it cannot be used.
    """

    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)
    unseen: int = 0
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*TOOL_REPORTS, ERRORS, TIMEOUTS), 0.0))
    dead: bool = False


@dataclass
class VerifiersEnv(VectorEnv):
    """The environment of episodes of verifiers; its rewards are the package's, with its weights.

    Attributes:
        ends: tokens that end what the model says.
        failed: counts calls of tools that failed.
        failures: episode, tool and reason of calls that failed since the last look.
        talks: of each episode.
        readers: of answers, by the tools of the question.
    """

    ends: frozenset[int] = field(kw_only=True)
    failed: FirstTimes = field(default_factory=FirstTimes)
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    readers: dict[str, CallReader] = field(default_factory=dict)

    def reset(
        self, prompts: Sequence[list[int]], facts: Sequence[Facts], group: int, seeds: Sequence[int], note: Note
    ) -> list[list[int]]:
        super().reset(prompts, facts, group, seeds, note)
        self.talks = [Dialogue() for _ in self.facts]
        if not self.facts:
            return list(prompts)
        numbers = list(range(len(self.facts)))
        try:
            self.host.start(max(self._limit_s, START_S))
            self.host.failed = lambda number, name, why: self.failures.append((number, name, why))
            tasks, begins = tasks_of(self.settings.data.data or ""), {}
            for number, fact in enumerate(self.facts):
                place = fact["columns"].get("task")
                task = tasks[place] if isinstance(place, int) and place < len(tasks) else None
                if task is None or task.hash != fact["columns"].get("task_hash"):
                    raise RunError(
                        f"{self.asked}: task {place} is another one than when the run began; its tasks must stay the same"
                    )
                begins[number] = task
            self.host.begin(begins)
        except Exception as error:
            if isinstance(error, InputError | RunError):
                raise
            raise RunError(f"{self.asked} cannot be started ({one_line(error)})") from error
        self._settle(numbers, self._limit_s, note)
        begun = []
        for place, prompt in enumerate(prompts):
            questions: list[Question] = []
            for number in numbers[place * group : (place + 1) * group]:
                talk, played = self.talks[number], self.host.episodes[number]
                if not talk.dead and played.question is None:
                    self._give_up(number, played.problem or "it asks the model nothing", note)
                if not talk.dead and played.question is not None:
                    questions.append(played.question)
            contents = [[json.dumps(one.messages), json.dumps(one.tools)] for one in questions]
            same_beginnings(contents, max(1, len(questions)), self.asked)
            tokens = list(prompt)
            if questions:
                said = [*questions[0].messages, {"role": "assistant", "content": STAND_IN}]
                try:
                    tokens = self.encoder.prompt_tokens(Conversation(said, questions[0].tools or None))
                except (jinja2.TemplateError, TypeError, ValueError) as error:
                    raise RunError(
                        f"{self.asked}: the chat template refuses its first question ({one_line(error)}); give another "
                        "with --chat-template"
                    ) from error
            for number in numbers[place * group : (place + 1) * group]:
                self.talks[number].tokens, self.talks[number].mask = list(tokens), [False] * len(tokens)
            begun.append(tokens)
        return begun

    def step(self, episodes: Sequence[int], completions: Sequence[list[int]], note: Note) -> StepResults:
        for number, completion in zip(episodes, completions, strict=True):
            self._answer(number, completion, note)
        alive = [number for number in episodes if not self.talks[number].dead]
        most = max((len(self.talks[number].calls) for number in alive), default=0)
        self._settle(alive, self._limit_s * (1 + most), note)
        found = [self._observation(number, note) for number in episodes]
        nothing = np.full((len(episodes), len(self.rewards)), np.nan)
        return StepResults([tokens or [] for tokens in found], nothing, [tokens is None for tokens in found])

    def finish(self, episodes: Sequence[Episode], note: Note) -> np.ndarray | None:
        found = np.full((len(self.talks), len(self.rewards)), np.nan)
        alive = [number for number, talk in enumerate(self.talks) if not talk.dead]
        for number in alive:  # what stands at a question has no room for an answer
            if self.host.episodes[number].question is not None:
                del self.talks[number].turns[self.talks[number].unseen :]
                self.host.end(number)
        self._settle(alive, self._limit_s, note)
        for number, (talk, episode) in enumerate(zip(self.talks, episodes, strict=True)):
            played = self.host.episodes[number]
            if not talk.dead and played.problem is not None:
                self._give_up(number, played.problem, note)
            if not talk.dead:
                # The package must have the same tokens, and the same mask; or none after the last answer.
                whole = played.trace.branches if len(played.trace.branches) == 1 else ()
                tokens, mask = (whole[0].token_ids, whole[0].sampled_mask) if whole else ([], [])
                same = talk.tokens[: len(tokens)] == tokens and talk.mask[: len(mask)] == mask
                if tokens and same and not any(talk.mask[len(mask) :]):
                    found[number] = self._scores(number, played, note)
                else:
                    self._give_up(number, "its record of the conversation has other tokens than the model saw", note)
            episode.counts, episode.messages = dict(talk.counts), talk.turns
        return found

    # Parts of these

    @property
    def asked(self) -> str:
        """The flag and its value, for messages."""
        return f"--environment {self.settings.objective.environment}"

    @property
    def _limit_s(self) -> float:
        return self.settings.objective.reward_timeout

    @cached_property
    def host(self) -> Host:
        """What plays the episodes."""
        objective = self.settings.objective
        return host_of(objective.environment or "", objective.max_turns, objective.reward_timeout)

    def _settle(self, numbers: Sequence[int], limit_s: float, note: Note) -> None:
        """Wait until episodes ask something or are over, and give those up that take too long."""
        for number in self.host.settle(numbers, limit_s):
            why = f"took longer than {limit_s:g} s"
            self.host.drop(number, why)
            self.talks[number].counts[TIMEOUTS] = 1.0
            self._give_up(number, why, note, "--reward-timeout")
        failures, self.failures = sorted(self.failures), []
        for number, name, why in failures:
            if number < len(self.talks):
                self.talks[number].counts[FAILED] += 1
                watch_failure(self.failed, name, why, note)

    def _give_up(self, number: int, why: str, note: Note, flag: str = "") -> None:
        """Stop the run for an episode that cannot be used, or leave it without a reward."""
        talk = self.talks[number]
        talk.dead, talk.counts[ERRORS] = True, 1.0
        task = self.facts[number]["columns"].get("task")
        verb = why if why.startswith("took") else f"failed ({why})"
        fail(f"{self.asked} {verb} in an episode of task {task}", self.settings.objective, note, flag)

    def _answer(self, number: int, completion: list[int], note: Note) -> None:
        """Give an episode what the model said."""
        talk = self.talks[number]
        if talk.dead:
            return
        question = self.host.episodes[number].question
        if question is None:  # a time limit of the environment ended it meanwhile
            played = self.host.episodes[number]
            talk.counts[TIMEOUTS] = float(played.cut_short)
            self._give_up(number, played.problem or "it ended while the model was answering", note)
            return
        ended = completion[-1] in self.ends
        said = self._reader(question.tools)(completion)
        calls = said.calls if ended else []
        talk.calls = [{**call, "id": call_id(call, place)} for place, call in enumerate(calls)]
        before = talk.tokens
        talk.tokens = [*before, *completion]
        talk.mask += [True] * len(completion)
        talk.turns.append(Said(said.content, talk.calls, said.thinking).message)
        talk.counts[CALLS] += len(talk.calls)
        talk.counts[TURNS] += 1
        made = import_module("mlx_lora.rollouts.verifiers_host").response_of
        self.host.answer(number, made(said.content, said.thinking, talk.calls, before, list(completion), ended))

    def _observation(self, number: int, note: Note) -> list[int] | None:
        """Return the tokens of what an episode adds to the conversation; None: it is over."""
        talk, played = self.talks[number], self.host.episodes[number]
        if talk.dead or played.question is None:
            return None
        try:
            if played.question.before != talk.tokens:
                raise InputError(
                    "it rewrites the conversation, or begins another, and only what it adds can be trained on"
                )
            tokens = self._added(played.question.tail, played.question.tools, talk)
        except InputError as error:
            self.host.drop(number, str(error))
            self._give_up(number, str(error), note)
            return None
        talk.tokens = [*talk.tokens, *tokens]
        talk.mask += [False] * len(tokens)
        return tokens

    def _added(self, tail: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], talk: Dialogue) -> list[int]:
        """Return the tokens between an answer and the next, and keep the messages for people."""
        talk.unseen = len(talk.turns)
        roles = [one["role"] for one in tail]
        if roles == ["user"]:
            text = str(tail[0]["content"])
            talk.turns.append({"role": "user", "content": text})
            return observation_tokens(self.encoder, Conversation([]), text)
        ids = [one.get("tool_call_id") for one in tail]
        if set(roles) != {"tool"} or ids != [call["id"] for call in talk.calls]:
            raise InputError(f"it replies with messages of {', '.join(roles)} to {len(talk.calls)} calls")
        most = MOST_CHARACTERS * self.settings.objective.max_new_tokens
        results = [str(one["content"])[:most] for one in tail]
        names = [call["name"] for call in talk.calls]
        talk.turns += [
            {"role": "tool", "name": name, "content": text} for name, text in zip(names, results, strict=True)
        ]
        return self._reader(tools).turns.tokens(talk.calls, results)

    def _scores(self, number: int, played: PlayedEpisode, note: Note) -> np.ndarray:
        """Return an episode's rewards, (F,), and count what the package measured."""
        talk, trace = self.talks[number], played.trace
        talk.counts[TIMEOUTS] = float(played.cut_short)
        talk.counts[CUT] = float(trace.stop_condition == "max_turns")
        talk.counts |= {METRIC + name: float(value) for name, value in trace.metrics.items() if value is not None}
        given = {name: one for name, one in trace.rewards.items() if one is not None}
        found = np.full(len(self.rewards), np.nan)
        for place, reward in enumerate(self.rewards):
            if (one := given.pop(reward.name, None)) is not None:
                found[place] = (
                    one.score if one.weight == reward.weight or not reward.weight else one.value / reward.weight
                )
        if given:
            self._give_up(number, f"it gives the reward {', '.join(given)}, which its first task does not", note)
            return np.full(len(self.rewards), np.nan)
        return found

    def _reader(self, tools: Sequence[dict[str, Any]]) -> CallReader:
        """Return what reads an answer, and writes the results of its calls."""
        key = json.dumps(tools)
        if key not in self.readers:
            encoder, special = self.encoder, self.settings.data.allow_special_tokens
            if encoder.template is None:
                raise InputError(
                    f"{self.asked}: needs a chat template, and the model has none; give one with --chat-template"
                )
            turns = ToolTurns(self.tokenizer, encoder.template, self.ends, list(tools), encoder.day, special)
            self.readers[key] = CallReader.of(turns) if tools else CallReader(turns, NO_CALLS, turns.opens_thinking())
        return self.readers[key]


# Choose the environment of a run: the user's class


def env_class(settings: ObjectiveSettings, functions: Functions = NO_FUNCTIONS) -> type[Any]:
    """Return the class that --environment names.

    Args:
        settings: with --environment.
        functions: what was given in Python, by what --environment calls it.

    Raises:
        InputError: it cannot be loaded, or has not the methods of an environment.
    """
    text = settings.environment or ""
    if text.startswith(IN_PYTHON):
        if text not in functions:
            raise InputError(
                f"--environment {text}: a class that was given in Python; continue with mlx_lora.train there"
            )
        found: Any = functions[text]
    elif text.rpartition(":")[0].endswith(".py"):
        found = from_file("--environment", text, "class")
    else:
        raise InputError(f"--environment {text}: not a class in a file; give FILE.py:CLASS")
    missing = [name for name in (RESET, STEP) if not callable(getattr(found, name, None))]
    has_tools = inspect.isclass(found) and (tool_methods(found) or settings.tools)
    if not inspect.isclass(found) or RESET in missing or (missing and not has_tools):
        problem = f"it has no {' and no '.join(missing)}" if missing else "not a class"
        raise InputError(
            f"--environment {text}: {problem}; give a class with reset(seed, **columns) and step(completion), or with "
            "reset and public methods that are tools"
        )
    return found


def shown_tools(settings: ObjectiveSettings, functions: Functions = NO_FUNCTIONS) -> list[dict[str, Any]] | None:
    """Return the schemas of the tools that prompts show; None: there are none.

    Raises:
        InputError: a class, a function or an environment cannot be used.
    """
    if is_verifiers(settings.environment):
        return rehearse(settings).tools or None
    toolbox = toolbox_of(settings, functions) if settings.has_episodes else None
    return toolbox.schemas if toolbox else None


def toolbox_of(settings: ObjectiveSettings, functions: Functions = NO_FUNCTIONS) -> Toolbox | None:
    """Return the tools that a run's settings ask for; None: there are none.

    Args:
        settings: with --environment and --tools.
        functions: what was given in Python, by the names that settings have for it.

    Raises:
        InputError: a class or a function cannot be used.
    """
    environment = env_class(settings, functions) if settings.environment else None
    if callable(getattr(environment, STEP, None)):  # it answers the model itself
        if settings.tools:
            raise InputError(
                f"--tools with --environment {settings.environment}: its step answers the model, so no tool would be "
                "called; leave one of the two out, or give the class methods as tools instead of step"
            )
        return None
    plain = plain_tools(settings, functions)
    if environment is None and not plain:
        return None
    name = (settings.environment or "").removeprefix(IN_PYTHON).rpartition(":")[2]
    return Toolbox(plain, environment, tool_schemas(plain, environment, settings.environment or ""), name)


def check_environment(settings: ObjectiveSettings, functions: Functions = NO_FUNCTIONS) -> None:
    """Refuse --environment and --tools that cannot be used, before a model is loaded.

    Raises:
        InputError: they cannot be loaded, nothing rewards the episodes, or two do.
    """
    if is_verifiers(settings.environment):
        rehearse(settings)
        return
    toolbox = toolbox_of(settings, functions)
    if toolbox is None and settings.reward:
        raise InputError(
            f"--reward {settings.reward} with --environment {settings.environment}: the environment's step gives the "
            "rewards; leave one of the two out"
        )
    if toolbox is not None and not settings.reward and not rewards_itself(toolbox.environment):
        asked = f"--environment {settings.environment}" if settings.environment else f"--tools {settings.tools}"
        raise InputError(
            f"{asked}: nothing rewards the episodes; give --reward FILE.py:FUNCTION, or the class a method get_reward"
        )


# The environment of a run


def environment_of(
    settings: TrainSettings,
    rewards: Sequence[Reward],
    base: Base,
    day: date | None = None,
    functions: Functions = NO_FUNCTIONS,
) -> VectorEnv:
    """Return the environment that a run's settings ask for.

    Args:
        settings: of the run.
        rewards: of answers, or of episodes with tools.
        base: whose tokenizer and end tokens are used.
        day: that chat templates show as today; None: today.
        functions: what was given in Python.

    Raises:
        InputError: --environment or --tools cannot be used.
    """
    objective, tokenizer = settings.objective, base.hf_tokenizer
    ends = frozenset(base.tokenizer.eos_token_ids)
    if is_verifiers(objective.environment):
        return VerifiersEnv(rewards, settings, tokenizer, day, ends=ends)
    toolbox = toolbox_of(objective, functions)
    if toolbox is not None:
        return ToolEnv(rewards, settings, tokenizer, day, toolbox=toolbox, ends=ends)
    if objective.environment:
        [name] = reward_names(objective)
        make = env_class(objective, functions)
        return MultiTurnEnv([Reward(name, no_function)], settings, tokenizer, day, make=make)
    return SingleTurnEnv(rewards, settings, tokenizer)


def check_template(tokenizer: TokenizerWrapper, template: str | None, schemas: Sequence[dict[str, Any]]) -> None:
    """Refuse a chat template that cannot show tools, calls and results, or whose calls cannot be read.

    Args:
        tokenizer: as mlx-lm wraps it, with the model's end tokens.
        template: of the run; None: it has none.
        schemas: of the tools.

    Raises:
        InputError: with the reason.
    """
    if template is not None:
        CallReader.of(ToolTurns(tokenizer._tokenizer, template, frozenset(tokenizer.eos_token_ids), schemas))


def own_rewards_and_reports(
    settings: ObjectiveSettings, rewards: Sequence[Reward], functions: Functions = NO_FUNCTIONS
) -> tuple[Sequence[Reward], tuple[str, ...]]:
    """Return the rewards of a run's episodes, and the names of what is reported of them beside rewards.

    Args:
        settings: of the run.
        rewards: those of --reward.
        functions: what was given in Python.
    """
    if is_verifiers(settings.environment):
        seen = rehearse(settings)
        own = [Reward(name, no_function, weight) for name, weight in seen.weights.items()]
        return own, (*TOOL_REPORTS, ERRORS, TIMEOUTS, *(METRIC + name for name in seen.metrics))
    toolbox = toolbox_of(settings, functions) if settings.has_episodes else None
    return (rewards, ()) if toolbox is None else (episode_rewards(rewards, toolbox.environment), TOOL_REPORTS)


def episode_rewards(rewards: Sequence[Reward], environment: type[Any] | None) -> tuple[Reward, ...]:
    """Return the rewards of episodes with tools: those of --reward, and what the class gives by itself."""
    if not rewards_itself(environment):
        return tuple(rewards)

    def get_reward(environments: Sequence[Any], **columns: Any) -> list[float | None]:
        found = [one.get_reward() for one in environments]
        return [awaited(value) if inspect.isawaitable(value) else value for value in found]

    name = environment.__name__  # pyright: ignore[reportOptionalMemberAccess] # there is one
    alike = sum(one.name == name for one in rewards)
    return *rewards, Reward(f"{name} {alike + 1}" if alike else name, get_reward, alone=True)


def rewards_itself(environment: type[Any] | None) -> bool:
    """Return whether a class of TRL's form gives a reward by itself, from `get_reward`."""
    return not callable(getattr(environment, STEP, None)) and callable(getattr(environment, OWN_REWARD, None))
