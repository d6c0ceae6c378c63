"""Runs cases one after another in this process, each in its own folder, and tells what happened, line by line.

    python -m fuzz.worker PLAN.json      {"root", "seed", "cases": [[kind, number], ...]}

Before a case it prints `start <index>`, after it `done <index> <json>`: when the process dies or hangs, the
last start names the case. What a case may not do is watched from inside: write outside its folder, read a
file laid out beside it, unpickle, run a file's code, start a program, or talk to a network.
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

# First of all, as everywhere: the fast BLAS comes before mlx.core.
import mlx_lora.utils.device  # noqa: F401  isort: skip

import click

from fuzz.kinds import Command, make_case
from fuzz.seeds import Seeds
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.data import sandbox
from mlx_lora.utils import console

MEMORY_BYTES = 6 << 30  # address space beyond what the process has at its start: a lie that is believed dies here
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


class Watch:
    """An audit hook that notes what a case must not do, while one runs."""

    def __init__(self, root: Path):
        self.outside, self.free = str(root / "outside"), (str(root / "cache"), str(root / "tmp"), "/dev/", "/proc/")
        self.place: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.place is None:
            return
        if event == "open":
            path, _mode, flags = arguments
            if isinstance(path, (str, bytes, os.PathLike)):
                self._file(os.fsdecode(path), bool(flags & WRITES))
        elif event in CHANGES:
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    self._file(os.fsdecode(path), True)
        elif event == "subprocess.Popen" and arguments[1][: len(sandbox.COMMAND)] == sandbox.COMMAND:
            return  # the process in which chat templates are rendered
        elif event in FORBIDDEN:
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(self.place):
            self.seen.append(f"ran {arguments[0].co_filename}")

    def _file(self, path: str, writes: bool) -> None:
        full = os.path.normpath(os.path.join(os.getcwd(), path))
        if full.startswith(self.outside) or (writes and not full.startswith((self.place, *self.free))):
            self.seen.append(f"{'wrote' if writes else 'read'} {full}")


@click.command(cls=console.Command)
@click.option("--config", "file")
def settings(file: str) -> None:
    """Resolve a settings file, as `train` does before anything else."""
    click.echo(train_settings({}, read_settings(file, {})).to_flat())


def main(plan_file: str) -> None:
    """Run the cases of a plan."""
    plan = json.loads(Path(plan_file).read_text())
    root, seeds = Path(plan["root"]), Seeds(Path(plan["root"]) / "seeds")
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what native code prints is not part of the talk
    sandbox.RENDER_S = plan["render_s"]
    watch = Watch(root)
    _bound_memory()
    for index, (kind, number) in plan["cases"]:
        place = root / "world" / f"{re.sub(r'[^a-zA-Z]+', '-', kind)}-{number}"
        print("make", index, file=channel, flush=True)
        command = make_case(kind, number, plan["seed"], place, seeds)
        print("start", index, file=channel, flush=True)
        result = run_case(command, place, root, watch)
        print("done", index, json.dumps(result), file=channel, flush=True)


def run_case(command: Command, place: Path, root: Path, watch: Watch) -> dict[str, Any]:
    """Run one command in `place` and return its outcome in words and numbers."""
    before, beside = listed(place / "in"), listed(root / "world", place)
    os.chdir(place)
    _reset_peak()
    start_bytes, start_s = peak_bytes(), time.monotonic()
    watch.seen, watch.place = [], str(place)
    code, _out, err, trace = called(command)
    watch.place = None
    elapsed_s, grown_bytes = time.monotonic() - start_s, peak_bytes() - start_bytes
    os.chdir(root)
    broken = list(watch.seen)
    broken += [f"appeared outside: {name}" for name in sorted(listed(root / "world", place).keys() - beside.keys())[:3]]
    if command[0] not in ("train", "export"):
        changed = dict(listed(place / "in").items() ^ before.items())
        broken += [f"input changed: {name}" for name in sorted(changed)[:3]]
    broken += ["pwned"] if (place / "pwned").exists() else []
    outcome, note = judged(code, err, trace, place)
    if outcome not in ("traceback", "bad message") and not broken:
        shutil.rmtree(place)
    return {
        "outcome": outcome,
        "note": note,
        "outside": broken,
        "elapsed_s": round(elapsed_s, 3),
        "grown_bytes": grown_bytes,
        "command": " ".join(str(part)[:200] for part in command),
    }


def called(command: Command) -> tuple[int, str, str, str]:
    """Call a command's `main` as the program would; returns exit code, both outputs, and a traceback or nothing."""
    from mlx_lora.__main__ import load_command

    name, *arguments = command
    main = settings if name == "settings" else load_command(name, arguments)
    out, err, trace, code = io.StringIO(), io.StringIO(), "", 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main.main([str(part) for part in arguments], prog_name=f"mlx-lora {name}")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:  # anything that got through is what the fuzzer looks for
            trace = traceback.format_exc()
    return code, out.getvalue(), err.getvalue(), trace


def judged(code: int, err: str, trace: str, place: Path) -> tuple[str, str]:
    """Return the outcome and the words that tell it: a refusal must be one short line and leave nothing behind."""
    lines = [line for line in err.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if trace:
        return "traceback", trace[-3000:]
    if code == 0:
        return "accepted", ""
    problems = []
    if not last.startswith("Error: ") or sum(line.startswith("Error") for line in lines) != 1 or "Traceback" in err:
        problems.append("not one line")
    if len(last) > 1500:
        problems.append(f"{len(last)} characters")
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in last):
        problems.append("control characters")
    if (place / "out").exists() and code == 2 and any((place / "out").iterdir()):
        problems.append("left half an output")
    if problems:
        return "bad message", f"{', '.join(problems)}: {last[:600]!r}"
    return ("refused" if code == 2 else "failed"), last[:300]


def listed(folder: Path, leave_out: Path | None = None) -> dict[str, Any]:
    """Return every file under a folder with its size and time of change; of `leave_out` nothing."""
    found: dict[str, Any] = {}
    for directory, names, files in os.walk(folder):
        if leave_out and Path(directory) == folder:
            names[:] = [name for name in names if name != leave_out.name]
        for name in files:
            stat = os.lstat(os.path.join(directory, name))
            found[os.path.join(directory, name)] = (stat.st_size, stat.st_mtime_ns)
    return found


def _bound_memory() -> None:
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _reset_peak() -> None:
    """Start the peak anew, where the system can."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the process's largest resident size since the last reset (elsewhere: since its start)."""
    if sys.platform == "linux":
        text = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", text)[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(sys.argv[1])
