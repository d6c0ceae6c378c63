"""Make the environment that a run's settings ask for: of single answers, of several turns, or of tools.

--reward alone                               single answers
--environment verifiers:NAME                 an environment of that package, with its own tools and rewards
--environment, a class with reset and step   several turns; step rewards them
--environment, a class of TRL's form         tools: its public methods; --reward or its get_reward rewards them
--tools                                      tools: plain functions, alone or beside such a class
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from datetime import date
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.rules import is_verifiers
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.tool_turns import ToolTurns
from mlx_lora.models.load import Base
from mlx_lora.rollouts.environment import (
    OWN_REWARD,
    RESET,
    STEP,
    TOOL_REPORTS,
    CallReader,
    MultiTurnEnv,
    SingleTurnEnv,
    Toolbox,
    ToolEnv,
    VectorEnv,
    plain_tools,
    tool_methods,
    tool_schemas,
)
from mlx_lora.rollouts.rewards import (
    IN_PYTHON,
    NO_FUNCTIONS,
    Functions,
    Reward,
    no_function,
    reward_names,
)
from mlx_lora.rollouts.user_code import awaited, from_file
from mlx_lora.rollouts.verifiers_env import ERRORS, METRIC, TIMEOUTS, VerifiersEnv, rehearse
from mlx_lora.utils.errors import InputError

# The user's class


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
