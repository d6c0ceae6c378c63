"""Load rewards by name or from a user's Python file, and call them with a time limit.

Shapes: A answers, F functions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlx_lora.objectives.rewards import NAMES, PLAIN, Reward, RewardFunction, ready_reward
from mlx_lora.settings.config import ObjectiveSettings
from mlx_lora.system.errors import InputError, RunError


class _TooLong(BaseException):
    """A reward took longer than allowed; not an Exception, so that the user's code does not catch it."""


def rewards_of(settings: ObjectiveSettings) -> list[Reward]:
    """Return the rewards that the settings name.

    Raises:
        InputError: there are none, a name is unknown, or a file cannot be loaded.
    """
    names = [name.strip() for name in (settings.reward or "").split(",") if name.strip()]
    if not names:
        raise InputError(
            f"--objective {settings.objective} requires --reward: a function as FILE.py:FUNCTION, or {', '.join(NAMES)}"
        )
    weights = _weights(settings.reward_weights, len(names))
    return [Reward(_short(name), _function(name), weight) for name, weight in zip(names, weights, strict=True)]


def reward_files(settings: ObjectiveSettings) -> dict[str, str]:
    """Return a check sum of each file that a reward is read from; all ranks must have the same."""
    if not settings.rewarded:
        return {}
    found = {}
    for name in filter(None, (name.strip() for name in (settings.reward or "").split(","))):
        path = name.partition(":")[2] if name.startswith("json_schema:") else name.rpartition(":")[0]
        file = Path(path).expanduser()
        if path and file.is_file():
            found[f"code of --reward {name}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found


def rewards_for(
    rewards: Sequence[Reward],
    answers: dict[str, Any],
    settings: ObjectiveSettings,
    say: Callable[[str], None],
) -> np.ndarray:
    """Return what every function gives every answer, (A, F) float64; NaN: it cannot be rewarded.

    Args:
        rewards: the functions.
        answers: their arguments by name: prompts, completions, completion_ids, and the data's columns.
        settings: the time limit, and what to do if a function fails.
        say: takes a line if a failure is skipped.

    Raises:
        RunError: a function failed, and the run is to stop.
    """
    count = len(answers["completions"])
    found = np.full((count, len(rewards)), math.nan)
    for column, reward in enumerate(rewards):
        values = _called(reward, answers, settings, say)
        if values is None:
            continue
        for row, value in enumerate(values):
            problem = _problem(value)
            if problem:
                _fail(f"--reward {reward.name} gave {problem} for {_shown(answers, row)}", settings, say)
            elif value is not None:
                found[row, column] = float(value)
    return found


def summed(found: np.ndarray, rewards: Sequence[Reward]) -> np.ndarray:
    """Return the weighted sum of each answer's rewards, (A,); what is missing counts as 0, and NaN if all is missing."""
    total = np.where(np.isnan(found), 0.0, found) @ np.array([reward.weight for reward in rewards])
    return np.where(np.isnan(found).all(axis=1), math.nan, total)


def _called(
    reward: Reward, answers: dict[str, Any], settings: ObjectiveSettings, say: Callable[[str], None]
) -> list[Any] | None:
    """Return a function's values, None if it failed and that is skipped."""
    count = len(answers["completions"])
    try:
        with _at_most(settings.reward_timeout):
            values = list(reward.function(**answers))
    except _TooLong:
        limit = f"{settings.reward_timeout:g} s"
        _fail(f"--reward {reward.name} took longer than {limit} for {count} answers", settings, say, "--reward-timeout")
        return None
    except Exception as error:  # a user's code may raise anything
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        _fail(f"--reward {reward.name} failed ({words}) for {_shown(answers, 0)}", settings, say)
        return None
    if len(values) != count:
        _fail(f"--reward {reward.name} gave {len(values)} values for {count} answers", settings, say)
        return None
    return values


def _fail(what: str, settings: ObjectiveSettings, say: Callable[[str], None], flag: str = "") -> None:
    """Stop the run, or say what is skipped."""
    if settings.reward_errors == "skip":
        say(f"Note: {what}; skipped")
        return
    raise RunError(f"{what}; correct it{f', raise {flag}' if flag else ''}, or give --reward-errors skip")


def _problem(value: Any) -> str | None:
    """Return what is wrong with a reward, None if nothing is; None as a reward means that there is none."""
    if value is None:
        return None
    if isinstance(value, str) or not hasattr(value, "__float__"):
        return f"a {type(value).__name__}, not a number,"
    return None if math.isfinite(float(value)) else str(float(value))


def _shown(answers: dict[str, Any], row: int) -> str:
    """Return the answer of a row in words, with its prompt."""
    prompt, completion = (str(answers[name][row])[:60] for name in ("prompts", "completions"))
    return f"the answer {completion!r} to {prompt!r}"


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _TooLong in here after some seconds; only in the main thread, the others have no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _function(name: str) -> RewardFunction:
    found = ready_reward(name)
    if found is not None:
        return found
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        near = get_close_matches(name, PLAIN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give FILE.py:FUNCTION, or {', '.join(NAMES)}"
        raise InputError(f"--reward {name}: {hint}")
    module = _module(Path(path).expanduser(), name)
    if not callable(getattr(module, function, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"--reward {name}: {path} has no function {function}; it has {', '.join(known) or 'none'}")
    return getattr(module, function)


def _module(file: Path, name: str) -> ModuleType:
    """Run a user's file and return it as a module."""
    if not file.is_file():
        raise InputError(f"--reward {name}: there is no file {file}; give its path")
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--reward {name}: {file} is not a Python file; give one")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's code may raise anything
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"--reward {name}: {file} cannot be run ({words}); correct it") from error
    return module


def _short(name: str) -> str:
    """Return the name for reports: the function's, or the kind of a ready one."""
    path, _, function = name.rpartition(":")
    return function if path.endswith(".py") else name.partition(":")[0]


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise InputError(f"--reward-weights {text}: give {count} numbers separated by commas, one for each --reward")
    return weights
