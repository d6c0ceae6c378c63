"""Tasks of the package reasoning-gym by name, as prompts with an answer: `--data reasoning-gym:leg_counting`.

The tasks are made once, always the same, and kept as a file in the cache. Each record has the columns `question` as its
prompt, `answer`, and `metadata`, with which `--reward reasoning-gym` judges answers.
"""

from __future__ import annotations

import difflib
import json
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, one_at_a_time, replace_text

GYM = "reasoning-gym"
TASKS, SEED = 1000, 0  # of a set, unless its name has another number


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
                lines = [json.dumps(record_of(task), default=str, ensure_ascii=False) for task in tasks]
            except Exception as error:  # the package's tasks may raise anything, as those do that are made of others
                words = f"{type(error).__name__}: {error}".splitlines()[0]
                raise InputError(f"{asked}: {GYM} cannot make these tasks ({words}); give another name") from error
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, "\n".join(lines) + "\n")
    return file


def record_of(task: dict[str, Any]) -> dict[str, Any]:
    """Return a task as a record: a prompt, and the columns that judge an answer."""
    return {
        "prompt": [{"role": "user", "content": task["question"]}],
        "answer": task["answer"],
        "metadata": task["metadata"],
    }
