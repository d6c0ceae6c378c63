"""Run the commands of golden runs in one process, because starting Python takes longer than a tiny run.

python -P worker.py RUNS.json RESULTS.jsonl

Each command is run as `python -m mlx_lora` runs it. The package is the one on PYTHONPATH; this file uses nothing of it
but that module, `mlx_lora.load` and `mlx_lora.train`, so that it can run any tree.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import runpy
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TAIL = 12  # lines of a failed command that are kept


def command(words: list[str], out: str | None = None) -> None:
    """Run `python -m mlx_lora WORDS`, with standard output in the file `out`; it ends in SystemExit."""
    sys.argv, printed = ["mlx_lora", *words], io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module("mlx_lora", run_name="__main__", alter_sys=True)
    finally:
        if out is not None:
            Path(out).write_text(printed.getvalue(), encoding="utf-8")


def train(model: str, data: str, folder: str, settings: dict[str, Any]) -> None:
    """Train as a Python program does."""
    package = importlib.import_module("mlx_lora")
    package.train(package.load(model), data, folder, progress=False, **settings)


def stop(folder: str, copy: str, step: int) -> None:
    """Copy a run's folder as a kill right after the checkpoint of a step leaves it."""
    shutil.copytree(folder, copy)
    for path in (Path(copy) / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def take(action: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Take one action and return its exit code, the last lines of standard error, and its seconds of processor time."""
    err, begun = io.StringIO(), time.process_time()
    code: Any = 0
    with contextlib.redirect_stderr(err):
        try:
            {"command": command, "train": train, "stop": stop}[action](**arguments)
        except SystemExit as end:
            code = end.code or 0
        except Exception:  # whatever a tree does wrong is one case's result; the others go on
            code = 1
            traceback.print_exc(file=err)
    spent = time.process_time() - begun
    return {"code": code, "err": err.getvalue().splitlines()[-TAIL:], "cpu_s": spent}


def main(runs: str, results: str) -> None:
    """Take all actions of all cases; a case ends with the first that fails."""
    package = Path(importlib.import_module("mlx_lora").__file__ or "")
    root = Path.cwd()
    with open(results, "a", encoding="utf-8") as file:
        for case in json.loads(Path(runs).read_text(encoding="utf-8")):
            folder = root / case["name"]
            folder.mkdir(exist_ok=True)
            os.chdir(folder)
            os.environ["MLX_LORA_CACHE"] = str(folder / "cache")
            taken = []
            for action, arguments in case["actions"]:
                taken.append({"action": action, **take(action, arguments)})
                if taken[-1]["code"]:
                    break
            file.write(json.dumps({"name": case["name"], "package": str(package.parent), "taken": taken}) + "\n")
            file.flush()
            print(f"{case['name']}: {sum(one['cpu_s'] for one in taken):.1f} s of processor time", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
