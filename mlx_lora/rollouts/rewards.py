"""Rewards by name, such as exact_match or length:200.

Reward sampled answers: with functions that have the signature of TRL's, with ready ones by name, and with reward models.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

Prompts and completions are texts, or lists of messages for data with messages; each column of the data comes as a list
with one value for each answer. None means: cannot be rewarded. A function may be `async def`, and gets the trainer's state
where it takes it, as in TRL. It has a time limit. Reward models score whole conversations (rollouts/reward_models.py).

Shapes: A answers, F functions, G answers to one prompt.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.config.objectives import VERIFIERS
from mlx_lora.data.task_sets import GYM, gym
from mlx_lora.losses.grpo import group_deviation
from mlx_lora.rollouts.user_code import FAILURES, TooLong, at_most, awaited, from_file, one_line
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.data.examples import Completion, Conversation

ANSWER_COLUMNS = ("answer", "solution", "completion", "output", "response")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ESCAPED_COMMA = re.compile(
    r"(?<!\\)((?:\\\\)*)\\x2c", re.IGNORECASE
)  # \x2c, which is no comma between the numbers of {1,3}
FINAL_MARK = "####"  # before the result in GSM8K's answers
THINKING = re.compile(r"^\s*<think>(?!.*<think>).*?</think>\s*\S.*$", re.DOTALL)


def text_of(completion: Any) -> str:
    """Return a completion's text, given as text or as messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def exact_match(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Give 1 for an answer that equals the record's own, without white space around it, else 0."""
    return [
        None if right is None else float(text_of(completion).strip() == str(right).strip())
        for completion, right in zip(completions, _right_answers(completions, columns, "exact_match"), strict=True)
    ]


def number_match(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Give 1 if an answer's last number is that of the record's own answer, else 0.

    In both, a number after "####" (GSM8K) counts before the last one. Commas in numbers are ignored.
    """
    found = []
    for completion, right in zip(completions, _right_answers(completions, columns, "number_match"), strict=True):
        wanted, given = ("" if right is None else str(right)), text_of(completion)
        # The number after "####", else the last one.
        numbers = [
            (NUMBER.findall(text.rpartition(FINAL_MARK)[2])[:1] if FINAL_MARK in text else NUMBER.findall(text)[-1:])
            for text in (wanted, given)
        ]
        values = [float(one[0].replace(",", "")) if one else None for one in numbers]
        found.append(None if values[0] is None else float(values[0] == values[1]))
    return found


def think_format(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Give 1 for one thought in <think> tags, followed by an answer, else 0."""
    return [float(THINKING.match(text_of(completion)) is not None) for completion in completions]


# Rewards with an argument: it is no keyword of theirs, because the data may have a column of any name.


def length(most: int, /, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list:
    """Give 0 up to `most` tokens, and beyond, minus the share by which an answer is longer."""
    return [-max(0, len(tokens) - most) / most for tokens in completion_ids]


def matches(pattern: re.Pattern, /, completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Give 1 for an answer in which the pattern is found, else 0."""
    return [float(pattern.search(text_of(completion)) is not None) for completion in completions]


def fits_schema(validator: Any, /, completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Give 1 for an answer that is JSON and fits the schema, half for JSON that does not fit, else 0."""
    found: list[float | None] = []
    for completion in completions:
        try:
            found.append(1.0 if validator.is_valid(json.loads(text_of(completion))) else 0.5)
        except ValueError:
            found.append(0.0)
    return found


def math_verify(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Give 1 for an answer that equals the record's own as mathematics, else 0; None if the record's own is none.

    Both are read by the package math-verify, in LaTeX or as plain expressions.
    """
    library = _math_verify()
    found: list[float | None] = []
    for completion, right in zip(completions, _right_answers(completions, columns, MATH), strict=True):
        # The package's own time limits use the timer that rewards have.
        gold = library.parse(str(right), parsing_timeout=None) if right is not None else []
        given = library.parse(text_of(completion), parsing_timeout=None) if gold else []
        found.append(float(library.verify(gold, given, timeout_seconds=None)) if gold else None)
    return found


def _math_verify() -> Any:
    try:
        return import_module("math_verify")
    except ImportError:
        raise InputError(f"--reward {MATH}: needs math-verify; pip install 'mlx-lora[rewards]'") from None


def gym_score(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Give what the package reasoning-gym gives an answer to its task, from 0 to 1."""
    package = gym(f"--reward {GYM}")
    if "metadata" not in columns:
        raise ValueError(f"{GYM} needs the column metadata of --data {GYM}:NAME")
    answers = columns.get("answer") or [None] * len(completions)  # of tasks with many right answers, none is known
    found: list[float | None] = []
    for said, answer, about in zip(completions, answers, columns["metadata"], strict=True):
        if about is None:  # a record of other data
            found.append(None)
            continue
        score, text = package.get_score_answer_fn(about["source_dataset"]), text_of(said).strip()
        # JSON has no tuples, and some tasks compare what they find in an answer with tuples.
        forms = (about, _with_tuples(about))
        found.append(max(float(score(answer=text, entry={"answer": answer, "metadata": form})) for form in forms))
    return found


def _with_tuples(value: Any) -> Any:
    """Return a JSON value with tuples in place of its lists."""
    if isinstance(value, dict):
        return {name: _with_tuples(one) for name, one in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


MATH = "math-verify"
PLAIN: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "number_match": number_match,
    "think_format": think_format,
    MATH: math_verify,
    GYM: gym_score,
}
NAMES = (*PLAIN, "length:N", "regex:PATTERN", "json_schema:FILE")
GIVE = f"a function as FILE.py:FUNCTION, the folder of a reward model, or {', '.join(NAMES)}"


def ready_reward(name: str, flag: str = "--reward") -> Callable[..., Any] | None:
    """Return the ready function of a name, such as exact_match or length:200, which `flag` asks for; None if there is none.

    Raises:
        InputError: what follows the colon cannot be used.
    """
    kind, colon, argument = name.partition(":")
    if not colon:
        if kind == MATH:
            _math_verify()  # told before a model is loaded
        if kind == GYM:
            gym(f"{flag} {GYM}")
        return PLAIN.get(kind)
    if kind == "length":
        if not argument.isdecimal() or not int(argument):
            raise InputError(f"{flag} {name}: write a number of tokens, as in length:200")
        return partial(length, int(argument))
    if kind == "regex":
        try:
            return partial(matches, re.compile(ESCAPED_COMMA.sub(r"\1,", argument), re.DOTALL))
        except re.error as error:
            raise InputError(f"{flag} {name}: not a regular expression ({error}); correct it") from None
    if kind != "json_schema":
        return None
    try:
        import jsonschema
        from jsonschema.validators import validator_for
    except ImportError:
        raise InputError(f"{flag} {name}: needs jsonschema; install it: pip install jsonschema") from None
    try:
        schema = json.loads(Path(argument).read_text(encoding="utf-8"))
        validator = validator_for(schema)
        validator.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        raise InputError(f"{flag} {name}: {argument} holds no JSON schema ({error}); correct it") from None
    return partial(fits_schema, validator(schema))


def _right_answers(completions: Sequence[Any], columns: dict[str, Any], name: str) -> Sequence[Any]:
    """Return the record's own answer for each completion: its first column with one; None where it has none."""
    found = [columns[column] for column in ANSWER_COLUMNS if column in columns]
    if not found:
        raise ValueError(f"{name} needs the right answer in a column of the data: {', '.join(ANSWER_COLUMNS)}")
    return [next((one for one in own if one is not None), None) for own in zip(*found, strict=True)]


# Reward sampled answers

# Rewards of a run

RewardFunction = Callable[..., Sequence[float | None]]
Functions = Mapping[str, RewardFunction]
Note = Callable[[str], None]  # notes what failed
NO_FUNCTIONS: Functions = MappingProxyType({})
REGEX = "regex:"  # before a pattern
REWARD_NAME = re.compile(r"[\w./~ -]+(:.*)?")  # a ready reward, FILE.py:NAME or a folder
IN_PYTHON = "python:"  # before the name of a function that was given in Python


@dataclass(frozen=True)
class Reward:
    """One function that rewards answers.

    Attributes:
        name: for reports and errors; no other reward of a run has it.
        function: see the module.
        weight: of its values in the sum.
        model: folder of a reward model, whose function takes conversations and has no time limit; None: a function.
        alone: whether the function is called for each answer on its own, so that one that fails leaves the others theirs.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    model: Path | None = None
    alone: bool = False


def rewards_of(settings: ObjectiveSettings, functions: Functions = NO_FUNCTIONS) -> list[Reward]:
    """Return the rewards that the settings name; the reward models among them are not loaded yet.

    Args:
        settings: with --reward.
        functions: those that were given in Python, by what --reward calls them.

    Raises:
        InputError: there are none, a name is unknown, or a file cannot be loaded.
    """
    asked = _asked(settings)
    if not asked:
        raise InputError(f"--objective {settings.objective} requires --reward: {GIVE}")
    try:
        weights = [float(part) for part in (settings.reward_weights or ",".join("1" * len(asked))).split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(asked) or not all(map(math.isfinite, weights)):
        raise InputError(
            f"--reward-weights {settings.reward_weights}: give {len(asked)} numbers separated by commas, one for each --reward"
        )
    names = reward_names(settings)
    models = [_model_folder(text) for text in asked]
    found = []
    for place, (name, text, weight, model) in enumerate(zip(names, asked, weights, models, strict=True)):
        try:
            function = no_function if model else functions.get(text) or ready_reward(text)
            if function is None and text.startswith(IN_PYTHON):
                raise InputError(
                    f"--reward {text}: a function that was given in Python; continue with mlx_lora.train there"
                )
            if function is None and not text.rpartition(":")[0].endswith(".py"):
                near = get_close_matches(text, PLAIN, n=1)
                raise InputError(f"--reward {text}: {f'did you mean {near[0]}?' if near else f'give {GIVE}'}")
            function = function or from_file("--reward", text, "function")
        except InputError as error:
            near_pattern = asked[place - 1 : place] + asked[place : place + 1] * (place + 1 < len(asked))
            if not any(one.startswith(REGEX) for one in near_pattern):
                raise
            raise InputError(f"{error} (if this comma is part of the pattern, write it as \\x2c)") from None
        found.append(Reward(name, function, weight, model))
    return found


def reward_names(settings: ObjectiveSettings) -> list[str]:
    """Return the name of each reward for reports: the function's, the folder's or the kind's; where two are alike, all of it."""
    if settings.environment and not settings.reward:
        return [settings.environment.rpartition(":")[2]]
    asked = _asked(settings)
    short = []
    for text in asked:  # the function's, the folder's, or the kind of a ready one
        folder, (path, _, function) = _model_folder(text), text.rpartition(":")
        own = function if path.endswith(".py") or text.startswith(IN_PYTHON) else text.partition(":")[0]
        short.append(folder.resolve().name if folder else own)
    names = [text if short.count(name) > 1 else name for text, name in zip(asked, short, strict=True)]
    seen: Counter[str] = Counter()
    for place, name in enumerate(names):  # the same one twice
        seen[name] += 1
        names[place] = name if seen[name] == 1 else f"{name} {seen[name]}"
    return names


def reward_folders(settings: ObjectiveSettings) -> list[Path]:
    """Return the folders of the reward models that the settings name."""
    return [folder for text in _asked(settings) if (folder := _model_folder(text))]


def reward_files(settings: ObjectiveSettings) -> dict[str, str]:
    """Return a check sum of the files that each reward is read from; all ranks must have the same.

    Of a reward model these are its adapter and its config; a whole model's weights would take long to read.
    """
    if not settings.rewarded:
        return {}
    found = {}
    for flag, text in (("--environment", settings.environment), ("--tools", settings.tools)):
        text = (text or "").removeprefix(VERIFIERS)
        files = [Path(os.path.expanduser(name)) for name in re.findall(r"[^,]+?\.(?:py|toml)(?=[:,]|$)", text)]
        if digest := "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files):
            found[f"code of {flag}"] = hashlib.sha256(digest.encode()).hexdigest()[:16]
    for text in _asked(settings) if settings.samples else []:
        path = text.partition(":")[2] if text.startswith("json_schema:") else text.rpartition(":")[0]
        folder = _model_folder(text)
        files = [Path(os.path.expanduser(path))] if path else []
        files = [*folder.glob("adapter*"), folder / "config.json"] if folder else files
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files) if os.path.isfile(file)]
        if digests:
            found[f"code of --reward {text}"] = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    return found


def _asked(settings: ObjectiveSettings) -> list[str]:
    """Return what --reward names, one text each; a comma in a pattern belongs to it unless a reward may begin there."""
    found: list[str] = []
    for part in (settings.reward or "").split(","):
        text, plain = part.strip(), re.sub(r"\\.|\[[^]]*\]", "", found[-1] if found else "")  # without escapes and sets
        opened = any(plain.count(one) > plain.count(other) for one, other in ("()", "{}", "[]"))
        # What follows a comma is of the pattern in brackets, or where it can be no reward's name, right or wrong.
        named = text.startswith(IN_PYTHON) or REWARD_NAME.fullmatch(text) or _model_folder(text)
        if found and found[-1].startswith(REGEX) and (opened or not named):
            found[-1] += f",{part}"
        elif text:
            found.append(part.lstrip())
    return [text.strip() for text in found]


def _model_folder(text: str) -> Path | None:
    """Return the folder that a text of --reward names; None if it names something else."""
    path = os.path.expanduser(text)
    return Path(path) if text not in PLAIN and os.path.isdir(path) else None  # unlike Path's, False for any text


def no_function(*answers: Any, **columns: Any) -> list[float | None]:
    """Stand for a reward model that is not loaded, and for what an environment gives by itself."""
    raise ValueError("a reward that has no function was called")


# Calls

STATE = "trainer_state"


@dataclass
class TrainerState:
    """Where a run is, under the names of transformers' TrainerState.

    Attributes:
        global_step: Optimizer steps that are done.
        max_steps: Of the run; 0 for a measurement.
        epoch: Passes over the data that are done.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0


def call_reward(function: Callable[..., Any], arguments: dict[str, Any], state: TrainerState) -> list[Any]:
    """Return a reward's values.

    Args:
        function: Plain or `async def`.
        arguments: By name.
        state: Passed as `trainer_state` if the function has such a parameter, or takes any.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some callables written in C
        parameters = {}
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    if STATE not in arguments and (takes_any or STATE in parameters):
        arguments = {**arguments, STATE: state}
    values = function(**arguments)
    return list(awaited(values) if inspect.isawaitable(values) else values)


def _called(
    reward: Reward,
    answers: dict[str, Any],
    conversations: Sequence[Conversation | Completion],
    settings: ObjectiveSettings,
    note: Note,
    state: TrainerState,
) -> list[Any] | None:
    """Return a function's values, None if it failed and that is skipped."""
    count, name = len(answers["completions"]), f"--reward {reward.name}"
    if reward.alone and count > 1:
        every = [{key: values[row : row + 1] for key, values in answers.items()} for row in range(count)]
        with one_note(note) as skipped:
            found = [_called(reward, one, (), settings, skipped, state) for one in every]
        return [None if values is None else values[0] for values in found]
    if reward.model is None:
        values = guarded(lambda: call_reward(reward.function, answers, state), name, answers, settings, note)
    else:
        values = guarded(lambda: list(reward.function(conversations)), name, answers, settings, note, limited=False)
    if values is not None and len(values) != count:
        fail(f"{name} gave {len(values)} values for {count} answers", settings, note)
        return None
    return values


def guarded(
    function: Callable[[], list[Any]],
    name: str,
    answers: dict[str, Any],
    settings: ObjectiveSettings,
    note: Note,
    limited: bool = True,
) -> list[Any] | None:
    """Return what a user's code returns, None if it failed and that is skipped.

    Args:
        function: calls it.
        name: the flag that named it, and its name, for messages.
        answers: that it is about: prompts and completions.
        settings: the time limit, and what to do if it fails.
        note: takes a line if the failure is skipped.
        limited: whether the time limit holds.

    Raises:
        RunError: it failed, and the run is to stop.
    """
    try:
        with at_most(settings.reward_timeout) if limited else nullcontext():
            return function()
    except TooLong:
        words = f"{settings.reward_timeout:g} s for {counted(len(answers['completions']), 'answer')}"
        fail(f"{name} took longer than {words}", settings, note, "--reward-timeout")
    except FAILURES as error:  # a user's code may raise anything
        fail(f"{name} failed ({one_line(error)}) for {_shown(answers, 0)}", settings, note)
    return None


def fail(what: str, settings: ObjectiveSettings, note: Note, flag: str = "") -> None:
    """Stop the run, or note what is skipped."""
    if settings.reward_errors == "skip":
        note(f"Note: {what}; skipped")
        return
    raise RunError(f"{what}; correct it{f', raise {flag}' if flag else ''}, or give --reward-errors skip")


@contextmanager
def one_note(note: Note) -> Iterator[Note]:
    """Take the notes on what is skipped in here, and pass on the first, with how many more there were."""
    found: list[str] = []
    yield found.append
    if found:
        note(found[0] + (f", with {counted(len(found) - 1, 'more failure')} in this batch" if len(found) > 1 else ""))


def problem_of(value: Any) -> str | None:
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


# Values and reports

# What is reported of answers beside their reward; a reward's own mean has its name after OWN, and KNOWN before that its share.
SPREAD, NO_SPREAD, OWN, KNOWN = "reward_std", "frac_reward_zero_std", "reward/", "known "


def rewards_for(
    rewards: Sequence[Reward],
    answers: dict[str, Any],
    settings: ObjectiveSettings,
    note: Note,
    conversations: Sequence[Conversation | Completion] = (),
    state: TrainerState = TrainerState(),  # noqa: B008 (never changed here)
    silent: FirstTimes | None = None,
) -> np.ndarray:
    """Return what every function gives every answer, (A, F) float64; NaN: it cannot be rewarded.

    Args:
        rewards: the functions.
        answers: their arguments by name: prompts, completions, completion_ids, and the data's columns.
        settings: the time limit, and what to do if a function fails.
        note: takes a line if a failure is skipped.
        conversations: each prompt with its answer, for reward models.
        state: where the run is, for functions that take it.
        silent: counts rewards that give nothing to a batch, which is noted at times; None: nobody is told.

    Raises:
        RunError: a function failed, and the run is to stop.
    """
    count = len(answers["completions"])
    found = np.full((count, len(rewards)), math.nan)
    for column, reward in enumerate(rewards):
        values = _called(reward, answers, conversations, settings, note, state)
        for row, value in enumerate(values or ()):
            problem = problem_of(value)
            if problem:
                fail(f"--reward {reward.name} gave {problem} for {_shown(answers, row)}", settings, note)
            elif value is not None:
                found[row, column] = float(value)
        if silent and count and np.isnan(found[:, column]).all() and (batches := silent.next(reward.name)):
            times = "a batch" if batches == 1 else f"{batches:,} batches so far"
            note(f"Note: --reward {reward.name} gave None to every answer of {times}; it changes nothing there")
    return found


def summed(found: np.ndarray, rewards: Sequence[Reward]) -> np.ndarray:
    """Return the weighted sum of each answer's rewards, (A,); what is missing counts as 0, and NaN if all is missing."""
    total = np.where(np.isnan(found), 0.0, found) @ np.array([reward.weight for reward in rewards])
    return np.where(np.isnan(found).all(axis=1), math.nan, total)


def reports_of(found: np.ndarray, rewards: Sequence[Reward], group: int) -> dict[str, np.ndarray]:
    """Return what to report of answers, name -> (A,), so that means over answers are what users watch.

    These are TRL's `reward_std`, the mean over groups of their standard deviation, and `frac_reward_zero_std`, the share of
    groups without any spread, from which nothing is learned; and of several rewards each one's own, beside whether it gave one.

    Args:
        found: as `rewards_for` returns it.
        rewards: the functions.
        group: G.
    """
    deviation = group_deviation(summed(found, rewards).reshape(-1, group)).repeat(group)
    named = {SPREAD: deviation, NO_SPREAD: np.isclose(deviation, 0.0).astype(np.float64)}
    for column, name in enumerate(own_reports([reward.name for reward in rewards])):
        own = found[:, column]
        named |= {name: np.nan_to_num(own, nan=0.0), KNOWN + name: np.isfinite(own).astype(np.float64)}
    return named


def own_reports(names: Sequence[str]) -> list[str]:
    """Return the names in reports of several rewards; none for a single one, which is the reward itself."""
    return [OWN + name for name in names] if len(names) > 1 else []


def means_of_known(means: dict[str, float]) -> dict[str, float]:
    """Return reports with each reward's mean over the answers to which it gave one; NaN if there are none."""
    shares = {name: means[KNOWN + name] for name in means if KNOWN + name in means}
    own = {name: means[name] / share if share else math.nan for name, share in shares.items()}
    return {name: own.get(name, value) for name, value in means.items() if not name.startswith(KNOWN)}


class FirstTimes:
    """Counts things by name, of which the first, the 10th, the 100th ... is worth a note."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def next(self, name: str) -> int:
        """Count one more, and return how many there were, or 0 if that is no news."""
        self.counts[name] += 1
        return self.counts[name] if str(self.counts[name]).strip("0") == "1" else 0
