"""What all benchmarks share: options, child processes, sides that take turns, medians and ratios, tables, the record.

Neither this file nor a parent process may import numpy or mlx: Linux includes a parent's resident size at the fork in its
child's peak, so the parent must stay small. What a child process shares with others is in sides/shared.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_lora.utils.supervise import last_given

POLL_S = 0.02
REPOSITORY = Path(__file__).parents[1]
SIDES_FOLDER = Path(__file__).parent / "sides"
# Both change OpenBLAS's kernels or block sizes; figures must not depend on them.
DROPPED_ENVIRONMENT = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
PACKAGES = ("mlx", "mlx-lm", "torch", "peft", "trl", "transformers", "scipy-openblas32")


class ChildFailed(RuntimeError):
    """A child ended with an error; the message has the end of its log."""


class Disagreement(Exception):
    """Two sides compute different things, so their speed cannot be compared."""


# --- options, progress, the record


def options(doc: str | None, *rows: tuple[Any, ...]) -> argparse.ArgumentParser:
    """Return a parser whose help begins with the first paragraph of a module's docstring.

    Args:
        doc: the docstring.
        rows: (flag, default, help), and choices as a fourth. Special defaults: `...` the option is required; a type: there is
            no default; `False`: a switch; `()`: the option may be repeated; a list: several values after one flag.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n", 1)[0])
    for flag, default, text, *choices in rows:
        given: dict[str, Any] = {"help": text, **({"choices": choices[0]} if choices else {})}
        if default is ...:
            given["required"] = flag.startswith("--") or None
        elif default is False:
            given["action"] = "store_true"
        elif isinstance(default, type):
            given["type"] = default
        elif isinstance(default, tuple):
            given |= {"action": "append", "default": []}
        elif isinstance(default, list):
            given |= {"nargs": "+", "type": type(default[0]), "default": default}
        else:
            given |= {"type": type(default), "default": default}
        parser.add_argument(flag, **{name: value for name, value in given.items() if value is not None})
    return parser


def as_words(flags: Mapping[str, Any]) -> list[str]:
    """Return options and their values as words of a command."""
    return [str(part) for pair in flags.items() for part in pair]


def say(text: str) -> None:
    """Print progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def environment() -> dict[str, Any]:
    """Return versions, commit, machine and threads, without what the child processes report."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit or None,
        "versions": {**versions, "python": platform.python_version()},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "thread_variables": {f"{name}_NUM_THREADS": os.environ.get(f"{name}_NUM_THREADS") for name in ("OMP", "OPENBLAS", "MKL")},
        "removed_variables": {name: os.environ.get(name) for name in DROPPED_ENVIRONMENT},
    }  # fmt: skip


def record(result: Mapping[str, Any], out: str | Path | None = None, keys: Iterable[str] = ()) -> None:
    """Write a result to a JSON file, if one is asked for, and end the output with one line of JSON: these keys, or all."""
    if out:
        Path(out).write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
    print(json.dumps({key: result[key] for key in keys or result}, default=str))


# --- medians, ratios, tables


def spread(values: Iterable[float | int | None]) -> dict[str, float | int] | None:
    """Return median, least and largest of the values that are not None."""
    there = [value for value in values if value is not None]
    return {"median": statistics.median(there), "min": min(there), "max": max(there)} if there else None


def paired_ratio(side: Sequence[Any], reference: Sequence[Any]) -> dict[str, float | int] | None:
    """Return the spread of the round-by-round ratios, so that both sides of a pair have the same drift."""
    pairs = zip(side, reference, strict=True)
    return spread([a / b for a, b in pairs if a is not None and b])


def cell(value: Mapping[str, float] | None, factor: float = 1, digits: int = 1) -> str:
    """Return a spread's median, and the extremes if there are several values."""
    if value is None:
        return "-"
    middle, low, high = (f"{value[key] * factor:.{digits}f}" for key in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low}-{high})"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table whose columns are aligned in the source, too."""
    whole = [[str(one) for one in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in whole) for i in range(len(head))]
    lines = [f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths, strict=True))} |" for row in whole]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def take_turns(
    turns: Mapping[str, Callable[[int], dict[str, Any]]], rounds: int, *, warm: bool = False, swap: bool = True
) -> dict[str, list[dict[str, Any]]]:
    """Let sides run in turn, and return what each found in each round.

    Turns get the round's number, from 1. With `warm`, each side has a turn with number 0 first, which is not counted. With
    `swap`, every second round begins with the last side, so that none is always the first.
    """
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in turns}
    for number in range(0 if warm else 1, rounds + 1):
        for side in list(turns) if number % 2 or not swap else list(turns)[::-1]:
            answer = turns[side](number)
            if number:
                found[side].append(answer)
    return found


# --- child processes


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        started_unix_s: wall clock when it was started.
        wall_s: seconds until it ended.
        peak_process_bytes: its peak resident size by the operating system.
    """

    started_unix_s: float
    wall_s: float
    peak_process_bytes: int


def child_environment() -> dict[str, str]:
    """Return this process's environment without the variables that change OpenBLAS."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED_ENVIRONMENT}
    # Another side's interpreter has no mlx_lora installed, but needs its BLAS loader.
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [kept.get("PYTHONPATH"), str(REPOSITORY)]))
    return {**kept, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def run_child(
    command: list[str],
    log: Path,
    *,
    timeout_s: float,
    watch: Callable[[subprocess.Popen], None] | None = None,
    good_codes: tuple[int, ...] = (0,),
    environment: dict[str, str] | None = None,
) -> Ended:
    """Run a command to its end, with its output in `log`.

    Args:
        command: program and arguments.
        log: file that takes standard output and error.
        timeout_s: the child is killed after this time.
        watch: called every 20 ms with the process, to read its results or interrupt it.
        good_codes: exit codes that are not failures.
        environment: variables to set beside `child_environment`.

    Raises:
        ChildFailed: the exit code is another one, or the time ran out.
    """
    variables = {**child_environment(), **(environment or {})}
    with log.open("w", encoding="utf-8") as output:
        started_unix_s, start = time.time(), time.perf_counter()
        # Flags for one side come after the common ones, and beat them.
        child = subprocess.Popen(last_given(command), stdout=output, stderr=subprocess.STDOUT, env=variables)
        try:
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
            while not ended:
                if time.perf_counter() - start > timeout_s:
                    raise ChildFailed(f"{command[1:4]} took longer than {timeout_s:.0f} s (--timeout)")
                if watch is not None:
                    watch(child)
                time.sleep(POLL_S)
                ended, status, usage = os.wait4(child.pid, os.WNOHANG)
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if child.returncode is None:
                child.send_signal(signal.SIGKILL)
                child.wait()
    if child.returncode not in good_codes:
        raise ChildFailed(f"{' '.join(command[:4])} ended with code {child.returncode}:\n{last_lines(log)}")
    peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    return Ended(started_unix_s, time.perf_counter() - start, peak)


def run_side(
    script: str, job: Mapping[str, Any], folder: Path, name: str, *, timeout_s: float, python: str | None = None
) -> tuple[dict[str, Any], Ended]:
    """Run a file of sides/ on a job in a new process, and return its result and how it ended.

    The job, the result and the log lie in `folder` under this name. `python` is another interpreter than this one.
    """
    job_file, result = folder / f"{name}.job.json", folder / f"{name}.result.json"
    job_file.write_text(json.dumps({**job, "result": str(result)}), encoding="utf-8")
    command = [python or sys.executable, str(SIDES_FOLDER / script), str(job_file)]
    ended = run_child(command, folder / f"{name}.log", timeout_s=timeout_s)
    return json.loads(result.read_text(encoding="utf-8")), ended


def cpu_seconds(pid: int) -> float | None:
    """Return the processor seconds that a running process has used, None where /proc does not tell."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    user, system = facts.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def last_lines(log: Path, count: int = 15) -> str:
    """Return the end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
