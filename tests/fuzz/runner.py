"""Starts workers, times each case, lays a death to the case that died, and makes the table."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.kinds import KINDS
from fuzz.seeds import make_seeds

CASE_S = 60.0  # of a case that takes 0.2 s: MLX compiles kernels on the way, and the machine may be busy
START_S = 120.0  # imports
RENDER_S = 2.0  # for a chat template, which has 10 outside of tests
MOST_BYTES = 1 << 30  # a case may add this much to the process

Tell = Callable[[str, int, dict[str, Any]], None]


HEAD = (
    *("kind", "cases", "accepted", "refused", "failed", "tracebacks", "crashes", "hangs"),
    *("outside", "peak MB", "slowest s"),
)


@dataclass
class Report:
    """What became of all cases: their results, each with its kind and number."""

    results: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, number: int, result: dict[str, Any]) -> None:
        """Take the result of one case."""
        self.results.append({"kind": kind, "number": number, **result})

    @property
    def faults(self) -> list[dict[str, Any]]:
        """Every one that did what it must not."""
        return [result for result in self.results if is_fault(result)]

    def table(self) -> str:
        """Return the summary as a Markdown table."""
        lines = ["| " + " | ".join(HEAD) + " |", "|---" + "|---:" * (len(HEAD) - 1) + "|"]
        for name in (*dict.fromkeys(result["kind"] for result in self.results), "**all**"):
            own = [result for result in self.results if name in ("**all**", result["kind"])]
            o = Counter(result["outcome"] for result in own)
            cells = [
                name, o.total(), o["accepted"], o["refused"], o["failed"], o["traceback"] + o["bad message"], o["crash"], o["hang"],
                sum(bool(result.get("outside")) for result in own),
                round(max(result.get("grown_bytes", 0) for result in own) / 1e6),
                round(max(result.get("elapsed_s", 0.0) for result in own), 1),
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines)


def run_cases(
    root: Path, cases: list[tuple[str, int]], seed: int, tell: Tell = lambda kind, number, result: None
) -> Report:
    """Run cases in child processes, one after another.

    Args:
        root: an empty folder for seeds, cases and caches.
        cases: (kind, number), as from `plan_cases`.
        seed: of the mutations.
        tell: takes each case and its result, as it is done.
    """
    for name in ("world", "tmp", "cache", "outside"):
        (root / name).mkdir(parents=True)
    seeds = make_seeds(root / "seeds")
    _lay_out(root / "outside", seeds.model)
    report, left = Report(), list(enumerate(cases))
    while left:
        reached = _run_some(root, left, seed, report, tell)
        left = left[reached:]
    return report


def _lay_out(folder: Path, model: Path) -> None:
    """Put files where only a case that leaves its folder finds them."""
    for source, name in (
        ("tokenizer.json", "secret.json"),
        ("tokenizer.json", "tokenizer.4.0.0.json"),
        ("model.safetensors", "secret.safetensors"),
    ):
        (folder / name).write_bytes((model / source).read_bytes())
    (folder / "evil.py").write_text(
        "import pathlib\npathlib.Path('pwned').touch()\nclass Evil: ...\nModel = ModelArgs = Evil\n"
    )


def _run_some(root: Path, left: list[tuple[int, Any]], seed: int, report: Report, tell: Tell) -> int:
    """Run cases in one worker until all are done, or one kills or stops it; returns how many are done with."""
    plan = root / "plan.json"
    plan.write_text(json.dumps({"root": str(root), "seed": seed, "cases": left, "render_s": RENDER_S}))
    process = _started(root, plan)
    done, running, text, patience_s = 0, False, b"", START_S
    while done < len(left):
        ready, _, _ = select.select([process.stdout], [], [], patience_s)
        piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
        text += piece
        while b"\n" in text:
            line, text = text.split(b"\n", 1)
            word, _, rest = line.decode().partition(" ")
            running, patience_s = word == "start", CASE_S if word == "start" else START_S
            if word == "done":
                result = json.loads(rest.partition(" ")[2])
                tell(*left[done][1], result)
                report.add(*left[done][1], result)
                done += 1
        if not piece:
            break
    code = _stopped(process)
    if done == len(left):
        return done
    if not running:
        raise AssertionError(
            f"the fuzzer itself broke at {left[done][1]}: exit {code}, {(root / 'worker.log').read_text()[-2000:]}"
        )
    outcome = "hang" if ready == [] else "crash"
    words = f"exit {code}: {(root / 'worker.log').read_text(errors='replace')[-3000:]}"
    result = {"outcome": outcome, "note": words, "elapsed_s": CASE_S if outcome == "hang" else 0.0}
    tell(*left[done][1], result)
    report.add(*left[done][1], result)
    return done + 1


def _started(root: Path, plan: Path) -> subprocess.Popen:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    own = {
        "HOME": root / "tmp",
        "HF_HOME": root / "tmp" / "hf",
        "MLX_LORA_CACHE": root / "cache",
    }
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {**os.environ, **settings, **{name: str(value) for name, value in own.items()}}
    command = [sys.executable, "-m", "fuzz.worker", str(plan)]
    with (root / "worker.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def _stopped(process: subprocess.Popen) -> int:
    """End a worker, whatever it does, and return its exit code."""
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # its fault handler writes where it hangs
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    return process.wait()


def describe(kind: str, number: int, result: dict[str, Any]) -> str:
    """Return one line about a case."""
    made = "hand-made" if number < len(KINDS[kind][1]) else "mutated"
    grown = result.get("grown_bytes", 0) / 1e6
    words = [f"{kind} {number} ({made}): {result['outcome']}", *result.get("outside", []), f"{grown:.0f} MB"]
    return ", ".join([*words, _gist(str(result.get("note", "")))])


def is_fault(result: dict[str, Any]) -> bool:
    """Tell whether a case did what it must not."""
    grown = result.get("grown_bytes", 0)
    return (
        result["outcome"] not in ("accepted", "refused", "failed") or bool(result.get("outside")) or grown > MOST_BYTES
    )


def _gist(note: str) -> str:
    """Return our own last frame of a traceback, the very last frame, and the error; of other words their end."""
    lines = note.strip().splitlines()
    frames = [line.strip() for line in lines if line.lstrip().startswith("File ")]
    ours = [frame for frame in frames if "/mlx_lora/" in frame]
    return " | ".join([*ours[-1:], *frames[-1:], *lines[-1:]])[-700:]
