"""Tasks of two packages by name. Environments of verifiers (0.4), and their tasks as prompts: `--environment verifiers:NAME`.

    verifiers:gsm8k-v1           an installed package of that name, with its own settings
    verifiers:gsm8k.toml         a TOML file whose table `env` configures one, as for the package's own `eval`
    --data verifiers:NAME:500    the same with a number of tasks

A task set has no splits in verifiers; where a package has a setting for that, two TOML files name the two. Each record has the
prompt of a task, and its number and check sum, by which an episode finds the task again (rollouts/make_environment.py).

Tasks of reasoning-gym, `--data reasoning-gym:leg_counting`, are made once, always the same, and kept as a file in the cache. Each
record has the columns `question` as its prompt, `answer`, and `metadata`, with which `--reward reasoning-gym` judges answers.
"""

from __future__ import annotations

import difflib
import itertools
import json
import pkgutil
import tomllib
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from mlx_lora.config.objectives import VERIFIERS
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, one_at_a_time, replace_text, sha256_of

TASKS = 1000  # of a set of reasoning-gym, and of an endless one, unless its name has another number
STAND_IN = "."  # the prompt of a task that has none, because the environment opens the conversation
PINNED = {
    "model": "the model that is trained plays",
    "client": "the model that is trained plays",
    "sampling": "give --temp, --top-p and --max-new-tokens",
    "retries": "an episode that was sampled is not played again; see --reward-errors",
}


def named(text: str) -> tuple[str, int | None]:
    """Return the environment that a name of --environment or --data has, and the number of tasks; None: no number.

    Raises:
        InputError: there is no name.
    """
    rest = text.removeprefix(VERIFIERS)
    name, _, count = rest.rpartition(":")
    name, tasks = (name, int(count)) if name and count.isdecimal() else (rest, None)
    if not name or tasks == 0:
        raise InputError(f"{text}: give the name of an environment, as in {VERIFIERS}gsm8k-v1")
    return name, tasks


def package(asked: str) -> Any:
    """Return verifiers.

    Args:
        asked: the flag and its value, for the message.

    Raises:
        InputError: it is not installed, or an older version is.
    """
    try:
        return import_module("verifiers.v1")
    except ImportError as error:
        needs = "needs verifiers 0.4; pip install 'mlx-lora[verifiers]'"
        missing = getattr(error, "name", None) or ""
        why = "" if missing.startswith("verifiers") else f" ({one_line(error)})"
        raise InputError(f"{asked}: {needs}{why}") from None


def one_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message; of settings that do not fit, the first of them."""
    if (wrong := getattr(error, "errors", None)) is not None and type(error).__name__ == "ValidationError":
        first = wrong()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".splitlines()[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


# Environments


def make_environment(name: str, asked: str, turns: int | None = None, tool_s: float | None = None) -> Any:
    """Return an environment, with its one agent in this process.

    Args:
        name: of the package, or a TOML file.
        asked: the flag and its value, for messages.
        turns: the most answers of the model in an episode, unless the environment says another number.
        tool_s: seconds that a call of a tool may take, unless the environment says so.

    Raises:
        InputError: it cannot be loaded, or needs what a run on this machine does not have: several agents, a container, or a
            sandbox in a cloud.
    """
    vf = package(asked)
    raw = _settings(name, asked)
    try:
        kind = vf.env_config_type(raw["taskset"]["id"], raw.get("id") or "")
        seats = {
            key: field.default for key, field in kind.model_fields.items() if isinstance(field.default, vf.AgentConfig)
        }
        if len(seats) != 1:
            raise InputError(f"{asked}: it has {len(seats)} agents ({', '.join(seats)}); only one model is trained")
        [(seat, default)] = seats.items()
        user = raw.get(seat)
        if set_there := sorted(PINNED.keys() & (user or {}).keys()):
            raise InputError(f"{asked}: sets {set_there[0]} of its agent; {PINNED[set_there[0]]}")
        raw[seat] = _agent(vf, raw, seat, default, turns, tool_s)
        made = vf.load_environment(vf.resolve_env_config({**raw, "interception": {"type": "server"}}))
    except InputError:
        raise
    except Exception as error:  # a package's code may raise anything
        raise InputError(f"{asked}: {_not_loaded(raw['taskset']['id'], error)}") from error
    own_machine = "runtime" in (user or {})
    [harness] = made.config.agent_harnesses().values()
    _check_agent(vf, getattr(made.config, seat), harness, type(made.taskset).task_type(), own_machine, asked)
    return made


def agent_of(environment: Any) -> tuple[str, Any]:
    """Return the name and the settings of an environment's one agent."""
    vf = package("")
    [found] = [(name, value) for name, value in environment.config if isinstance(value, vf.AgentConfig)]
    return found


def _settings(name: str, asked: str) -> dict[str, Any]:
    """Return the environment's settings, in the package's form."""
    if not name.endswith(".toml"):
        return {"taskset": {"id": name}}
    file = Path(name).expanduser()
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{asked}: {file} cannot be read ({one_line(error)}); give a TOML file") from None
    found = content.get("env")
    if not isinstance(found, dict) or not isinstance(found.get("taskset"), dict) or not found["taskset"].get("id"):
        raise InputError(f"{asked}: {file} has no [env.taskset] with an id; add it, as for the package's own eval")
    if more := sorted(content.keys() - {"env"}):
        raise InputError(f"{asked}: {file} has {', '.join(more)}, and only its table env is read; leave the others out")
    return dict(found)


def _agent(
    vf: Any, raw: dict[str, Any], seat: str, default: Any, turns: int | None, tool_s: float | None
) -> dict[str, Any]:
    """Return an agent's settings: a plain chat on this machine, where neither the user nor the package says otherwise.

    The package's own default is a coding agent in a cloud's sandbox.
    """
    given = {
        "sampling": None,
        "retries": {"max_retries": 0, "rules": []},
        **(raw.get(seat) or {}),
    }  # the run's flags decide
    own_harness = vf.default_harness_id(raw["taskset"]["id"]) != "bash"  # bash: the package has none of its own
    if "harness" not in given and default.harness is None and not own_harness:
        given["harness"] = {"id": "null"}
    if tool_s is not None and isinstance(given.get("harness"), dict) and given["harness"].get("id") == "null":
        given["harness"] = {"tool_timeout": tool_s, **given["harness"]}
    if "runtime" not in given and "runtime" not in default.model_fields_set:
        given["runtime"] = {"type": "subprocess"}
    if turns is not None and "max_turns" not in given and default.max_turns is None:
        given["max_turns"] = turns
    return given


def _check_agent(vf: Any, agent: Any, harness: Any, task: Any, own_machine: bool, asked: str) -> None:
    """Refuse what an episode on this machine cannot have, or what its user has not allowed.

    Args:
        vf: the package.
        agent: its settings.
        harness: those of its program.
        task: the class of the tasks.
        own_machine: whether the user asked for this machine in so many words.
        asked: the flag and its value, for messages.
    """
    if other := [name for name in ("model", "client") if getattr(agent, name) is not None]:
        raise InputError(f"{asked}: its agent has {other[0]} set; {PINNED[other[0]]}")
    if agent.runtime.type != "subprocess":
        raise InputError(
            f"{asked}: its agent runs in a sandbox ({agent.runtime.type}), and a run plays episodes on this machine alone; "
            "set runtime.type to subprocess in a TOML file if the environment allows it"
        )
    if task.NEEDS_CONTAINER:
        raise InputError(f"{asked}: its tasks need a container, and a run plays episodes on this machine alone")
    if vf.load_harness(harness).EXECUTES_CODE and not own_machine:
        raise InputError(
            f"{asked}: its program ({harness.id}) lets the model run commands on this machine; if you allow that, set "
            "runtime = {type = 'subprocess'} of the agent in a TOML file"
        )


def _not_loaded(wanted: str, error: Exception) -> str:
    """Return in words why an environment cannot be loaded."""
    cause = error.__cause__ if isinstance(error.__cause__, ModuleNotFoundError) else error
    module = wanted.rpartition("/")[2].partition("@")[0].replace("-", "_").lower()
    if isinstance(cause, ModuleNotFoundError) and cause.name == module:
        with_it = [one.name for one in pkgutil.iter_modules(import_module("verifiers.v1.tasksets").__path__)]
        near = difflib.get_close_matches(module, with_it, n=1)
        hint = f"did you mean {near[0]}?" if near else "install it, or put its folder on PYTHONPATH"
        return f"no package {module} is installed; {hint}"
    return f"the environment cannot be loaded ({one_line(cause)}); correct it"


# Tasks


def tasks_of(data: str) -> Sequence[Any]:
    """Return the tasks that a name of --data or --environment has, in order.

    Raises:
        InputError: there are none, or they cannot be loaded here.
    """
    name, count = named(data)
    file = Path(name).expanduser()
    return _tasks(name, count, sha256_of(file) if name.endswith(".toml") and file.is_file() else "")


@lru_cache(maxsize=4)
def _tasks(name: str, count: int | None, content: str) -> tuple[Any, ...]:
    asked = f"{VERIFIERS}{name}"
    taskset = make_environment(name, asked).taskset
    most = count or (TASKS if not taskset.bounded else None)
    try:
        found = tuple(itertools.islice(iter(taskset), most))
    except Exception as error:  # such as a data set that is not on this disk, without a network
        raise InputError(f"{asked}: its tasks cannot be loaded ({one_line(error)}); correct it") from error
    if not found:
        raise InputError(f"{asked}: it has no tasks")
    if boxed := next((task for task in found if task.data.image is not None), None):
        raise InputError(
            f"{asked}: task {boxed.data.idx} needs the container image {boxed.data.image}, and a run plays episodes on this "
            "machine alone"
        )
    return found


def verifiers_file(data: str) -> Path:
    """Return a file with the tasks as prompts, made now.

    Raises:
        InputError: see `tasks_of`; or some tasks have rewards that the first has not.
    """
    asked = f"--data {data}"
    name, _ = named(data)
    tasks = tasks_of(data)
    first = {reward.__name__ for reward in tasks[0].hooks("reward")}  # the run's rewards
    for kind, task in {type(task): task for task in reversed(tasks)}.items():  # the first task of each class
        if other := sorted({reward.__name__ for reward in task.hooks("reward")} - first):
            raise InputError(
                f"{asked}: task {task.data.idx} ({kind.__name__}) has the reward {', '.join(other)}, which its first task "
                f"({type(tasks[0]).__name__}) has not; give all its tasks the same rewards"
            )
    [config] = make_environment(name, asked).config.agent_harnesses().values()
    harness = package(asked).load_harness(config)  # which decides where a system prompt goes
    lines = [json.dumps(record_of(task, harness, asked), ensure_ascii=False) for task in tasks]
    text = "\n".join(lines) + "\n"
    file = cache_dir("verifiers") / f"{Path(name).stem}-{sha256_of(text)[:16]}" / "train.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, text)
    return file


def record_of(task: Any, harness: Any, asked: str) -> dict[str, Any]:
    """Return a task as a record: its prompt as messages, `task`, its number, and `task_hash`, its check sum.

    Raises:
        InputError: the prompt has a picture.
    """
    system, prompt = harness.resolve_prompt(task.data)
    turns = [{"role": "user", "content": prompt or STAND_IN}] if not isinstance(prompt, list) else plain(prompt, asked)
    if system:
        turns = [{"role": "system", "content": system}, *turns]
    return {"prompt": turns, "task": task.data.idx, "task_hash": task.hash}


def plain(messages: Sequence[Any], asked: str) -> list[dict[str, Any]]:
    """Return the package's messages as chat templates take them.

    Raises:
        InputError: one has a picture.
    """
    wire = import_module("verifiers.v1.dialects.chat").message_to_wire
    found = []
    for message in messages:
        turn = dict(wire(message))
        if isinstance(turn.get("content"), list):
            if any(part.get("type") != "text" for part in turn["content"]):
                raise InputError(f"{asked}: a message has a picture, and only texts are trained on")
            turn["content"] = "\n".join(part["text"] for part in turn["content"])
        found.append({**turn, "content": turn.get("content") or ""})
    return found


# reasoning-gym

GYM = "reasoning-gym"
SEED = 0


def gym(asked: str) -> Any:
    """Return the package.

    Args:
        asked: the flag and its value, for the message.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module("reasoning_gym")
    except ImportError:
        raise InputError(f"{asked}: needs reasoning-gym; pip install 'mlx-lora[rewards]'") from None


def task_file(data: str) -> Path:
    """Return the file of a set of tasks, made now or earlier.

    Args:
        data: reasoning-gym:NAME, or reasoning-gym:NAME:COUNT.

    Raises:
        InputError: the package is not installed, has no such tasks, or the count is none.
    """
    _, name, *rest = data.split(":")
    asked = f"--data {data}"
    package = gym(asked)
    if len(rest) > 1 or (rest and (not rest[0].isdecimal() or not int(rest[0]))):
        raise InputError(f"{asked}: give a number of tasks after the name, as in {GYM}:{name}:{TASKS}")
    count = int(rest[0]) if rest else TASKS
    known = sorted(package.factory.DATASETS)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or [*known[:3], "..."]
        raise InputError(f"{asked}: {GYM} has no tasks of this name; it has {', '.join(near)}")
    file = cache_dir(GYM) / f"{name}-{count}-{metadata.version('reasoning-gym')}" / "train.jsonl"
    with one_at_a_time(file):
        if not file.exists():
            try:
                tasks = package.create_dataset(name, size=count, seed=SEED)
                lines = [json.dumps(gym_record(task), default=str, ensure_ascii=False) for task in tasks]
            except Exception as error:  # the package's tasks may raise anything, as those do that are made of others
                words = f"{type(error).__name__}: {error}".splitlines()[0]
                raise InputError(f"{asked}: {GYM} cannot make these tasks ({words}); give another name") from error
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, "\n".join(lines) + "\n")
    return file


def gym_record(task: dict[str, Any]) -> dict[str, Any]:
    """Return a task as a record: a prompt, and the columns that judge an answer."""
    return {
        "prompt": [{"role": "user", "content": task["question"]}],
        "answer": task["answer"],
        "metadata": task["metadata"],
    }
