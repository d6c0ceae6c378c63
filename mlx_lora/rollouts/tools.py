"""Tools that the model may call: which ones there are, their schemas, and calling them.

    --tools FILE.py, FILE.py:NAME,NAME    plain functions, the same for every episode
    --environment FILE.py:CLASS           a class of TRL's `environment_factory`: its public methods are tools, beside
                                          `reset`, which begins an episode, and `get_reward`, which ends it

A schema is that of transformers, from type hints and a docstring with "Args:". What a tool returns is put back as text. If
it fails, the model reads {'error': ...}, as in TRL, and the run goes on.
"""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import get_json_schema

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.rollouts.rewards import IN_PYTHON, NO_FUNCTIONS, Functions
from mlx_lora.rollouts.tool_calls import Call
from mlx_lora.rollouts.user_calls import FAILURES, TooLong, at_most, awaited
from mlx_lora.rollouts.user_files import from_file, module_of, without_defaults
from mlx_lora.utils.errors import InputError

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
            found += _all_of(text)
        elif text.rpartition(":")[0].endswith(".py"):
            found.append(from_file(FLAG, text, "function"))
        else:
            raise InputError(f"{FLAG} {text}: not functions in a file; give FILE.py or FILE.py:NAME,NAME")
    return found


def _all_of(file: str) -> list[Tool]:
    """Return the functions that a user's file defines and whose names do not begin with an underscore."""
    module = module_of(file, f"{FLAG} {file}")
    own = [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    if not own:
        raise InputError(f"{FLAG} {file}: it defines no function; name one that it has as {file}:NAME")
    return own


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
    found = [(f"{FLAG}, {_name(tool)}", tool) for tool in plain]
    if environment is not None:
        for name in tool_methods(environment):
            method = inspect.getattr_static(environment, name)
            bound = (
                method.__func__ if isinstance(method, staticmethod) else MethodType(method, object())
            )  # a schema needs no instance
            found.append((f"{ENVIRONMENT_FLAG} {asked}, {name}", bound))
    schemas = [_schema(tool, where) for where, tool in found]
    names = Counter(schema["function"]["name"] for schema in schemas)
    for name, count in names.items():
        if count > 1:
            raise InputError(f"{FLAG}: {count} tools are called {name}; rename all but one")
    return schemas


def _schema(tool: Tool, where: str) -> dict[str, Any]:
    try:
        return get_json_schema(tool)
    except Exception as error:  # a docstring or type hints of any form
        words = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f'{where}: no tool ({words}); give it type hints, and a docstring with "Args:" that describes each argument'
        ) from None


def _name(tool: Tool) -> str:
    return str(getattr(tool, "__name__", type(tool).__name__))


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
        return _failed(f"{name} took longer than {limit_s:g} s", "TimeoutError")
    except FAILURES as error:  # a user's code may raise anything
        return _failed(str(error), type(error).__name__)


def _failed(words: str, kind: str) -> Result:
    first = words.strip().splitlines()[:1]
    return Result(str({"error": words}), f"{kind}: {first[0]}" if first else kind)


@dataclass
class FailedCalls:
    """Counts calls that failed, and says so at the first, the 10th, the 100th of each tool.

    Attributes:
        counts: by tool.
    """

    counts: Counter[str] = field(default_factory=Counter)

    def watch(self, call: Call, result: Result, note: Callable[[str], None]) -> None:
        """Count a call's result; `note` takes a line."""
        if not result.failed:
            return
        name = str(call["name"])[:40]
        self.counts[name] += 1
        count = self.counts[name]
        if str(count).strip("0") == "1":
            times = "once" if count == 1 else f"{count:,} times so far"
            note(f"Note: the tool {name} failed {times} ({result.failed[:120]}); the model is told")


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
