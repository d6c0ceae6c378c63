"""The sides of a comparison, and how each is checked and run in a new process; those on preferences: _pair_sides.py."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from _figures import run_figures, steps_from_metrics
from _ours import read_metrics, train_timed
from _peers import peer_python
from _processes import Ended, run_child

SIDES_FOLDER = Path(__file__).parent / "sides"
OURS = "mlx_lora"

# Small enough that an epoch of steps does not change any loss, so that a whole epoch can be one check.
NO_RATE = "1e-30"
ENDLESS = 10**6


@dataclass(frozen=True)
class Side:
    """One trainer in one regime.

    Attributes:
        name: as in `--sides`.
        script: file in sides/; None for ours, which runs as a command.
        data: `train` or `sorted`.
        settings: added to the job.
        regime: a description in one line.
        peer: name of the Python that it runs in, as in `--python` (see peers.py).
        packages: that Python's must have, where it is this one.
        flags: of ours alone, at the end of the command.
    """

    name: str
    script: str | None
    regime: str
    data: str = "train"
    settings: tuple[tuple[str, Any], ...] = ()
    peer: str = ""
    packages: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


TORCH = ("torch", "peft", "transformers")


SIDES = {
    side.name: side
    for side in (
        Side(OURS, None, "python -m mlx_lora.train, batches by token budget"),
        *(
            Side(
                f"{OURS}-{mode}", None, f"the same with --grad-checkpoint {mode}", settings=(("grad_checkpoint", mode),)
            )
            for mode in ("2", "selective", "block")
        ),
        Side("mlx-lm", "mlx_lm_side.py", "mlx_lm.tuner.trainer.train, --batch-size rows"),
        Side("mlx-lm-sorted", "mlx_lm_side.py", "the same on rows sorted by length beforehand", data="sorted"),
        *(
            Side(f"peft-{name}", "peft_side.py", regime, settings=(("batching", name),), packages=TORCH)
            for name, regime in (
                ("padded", "random --batch-size rows"),
                ("packed", "whole rows in --batch-tokens bins"),
                ("grouped", "like lengths, --batch-tokens"),
            )
        ),
        Side(
            "unsloth-zoo",
            "unsloth_zoo_side.py",
            "MLXTrainer with its chunked loss, --batch-size rows of like length",
            peer="unsloth-zoo",
        ),
    )
}


@dataclass(frozen=True)
class Bench:
    """The fixed settings of a comparison.

    Attributes:
        folder: for the files of `sides/prepare.py`, and every child's job, log and result.
        settings: model, rank, scale, learning_rate, batch_size, batch_tokens, max_seq_length, grad_checkpoint.
        steps, seconds, passes: length of a run, passes over preference pairs; all but one are None.
        ours: extra flags of our train command, at its end.
        pythons: side or peer name -> interpreter, for a side that needs other packages.
        timeout_s: for each child.
        quick: every round takes the same batches, and ours writes no texts; otherwise round n shuffles with seed n.
        computes: `dtypes` and `blas` of ours without flags, as the preparation found them; empty before it.
    """

    folder: Path
    settings: dict[str, Any]
    steps: int | None
    seconds: float | None
    ours: str
    timeout_s: float
    pythons: dict[str, str] = field(default_factory=dict)
    passes: int | None = None
    quick: bool = False
    computes: dict[str, Any] = field(default_factory=dict)

    def log(self, name: str) -> Path:
        """Return the log file of a child."""
        return self.folder / f"{name}.log"


def why_skipped(side: Side, quantized: bool, pythons: dict[str, str]) -> str | None:
    """Return why a side cannot run here, or None."""
    if side.peer and not python_of(side, pythons):
        return f"give --python {side.peer}=PATH, or install it with `python benchmarks/peers.py {side.peer}`"
    if not side.packages:
        return None
    missing = [name for name in side.packages if importlib.util.find_spec(name) is None]
    if missing and not python_of(side, pythons):
        return f"not installed: {', '.join(missing)}"
    return "torch cannot hold this folder's quantized weights" if quantized else None


def python_of(side: Side, pythons: dict[str, str]) -> str | None:
    """Return the interpreter that was given or installed for a side, None where it runs in this one."""
    installed = peer_python(side.peer) if side.peer else None
    return pythons.get(side.name) or pythons.get(side.peer) or installed


def prepare(bench: Bench, data: str, rows: int, as_text: bool, seed: int) -> dict[str, Any]:
    """Write rows and adapters for all sides, and return the facts about them."""
    job = {**bench.settings, "folder": str(bench.folder), "data": data, "rows": rows, "as_text": as_text, "seed": seed}
    return run_script(bench, "prepare.py", "prepare", job)[0]


def check_loss(bench: Bench, side: Side, adapter: Path) -> dict[str, Any]:
    """Compute the side's loss on the check rows with the factors in `adapter`."""
    if side.script is None:
        return _check_ours(bench, side, adapter)
    return run_script(bench, side.script, f"{side.name}.check", _job(bench, side, "check", adapter, 0), side)[0]


def time_run(bench: Bench, side: Side, number: int) -> dict[str, Any]:
    """Train once in a new process, and return its figures, raw steps and memory."""
    adapter = bench.folder / "initial.safetensors"
    name = f"{side.name}.round{number}"
    number = 0 if bench.quick else number
    if side.script is None:
        result, ended, command = _train_ours(bench, side, adapter, name, number)
    else:
        result, ended = run_script(bench, side.script, name, _job(bench, side, "train", adapter, number), side)
        command = command_of(bench, side)
    first_step_s = result["first_step_unix_s"] - ended.started_unix_s
    return {
        **run_figures(result["steps"], first_step_s),
        "peak_allocator_bytes": result["peak_allocator_bytes"],
        "peak_process_bytes": ended.peak_process_bytes,
        "process_s": ended.wall_s,
        "facts": result["facts"],
        "steps": result["steps"],
        "command": command,
    }


def _job(bench: Bench, side: Side, mode: str, adapter: Path, seed: int) -> dict[str, Any]:
    data = "check" if mode == "check" else side.data
    return {
        **bench.settings,
        **dict(side.settings),
        "mode": mode,
        "data": str(bench.folder / f"{data}.jsonl"),
        "rows": str(bench.folder / f"{data}.npz"),
        "adapter": str(adapter),
        "seed": seed,
        "steps": bench.steps,
        "seconds": bench.seconds,
    }


def command_of(bench: Bench, side: Side | None) -> list[str]:
    """Return the start of a side's command: its interpreter, and its script if it has one."""
    python = python_of(side, bench.pythons) if side else None
    return [python or sys.executable, *([f"benchmarks/sides/{side.script}"] if side and side.script else [])]


def run_script(
    bench: Bench, script: str, name: str, job: dict[str, Any], side: Side | None = None
) -> tuple[dict[str, Any], Ended]:
    """Run a script of sides/ on a job, in the side's Python, and return its result and how it ended."""
    job_file, result = bench.folder / f"{name}.job.json", bench.folder / f"{name}.result.json"
    job_file.write_text(json.dumps({**job, "result": str(result)}), encoding="utf-8")
    command = [command_of(bench, side)[0], str(SIDES_FOLDER / script), str(job_file)]
    ended = run_child(command, bench.log(name), timeout_s=bench.timeout_s)
    return json.loads(result.read_text(encoding="utf-8")), ended


def our_command(bench: Bench, data: str, adapter: Path, folder: Path, changes: Sequence[str]) -> list[str]:
    """Return our train command, with the sides' common settings and a report per step."""
    settings = bench.settings
    flags = {
        "--model": settings["model"],
        "--data": bench.folder / f"{data}.jsonl",
        "--adapter-path": folder,
        "--resume-adapter-file": adapter,
        "--rank": settings["rank"],
        "--alpha": settings["scale"] * settings["rank"],
        "--batch-tokens": settings["batch_tokens"],
        "--max-seq-length": settings["max_seq_length"],
        "--lr-schedule": "constant",
        "--warmup": 0,
        "--valid-fraction": 0,
        "--val-batches": 0,
        "--save-every": 0,
        "--steps-per-report": 1,
    }
    command = [sys.executable, "-m", "mlx_lora.train"]
    command += [str(part) for pair in flags.items() for part in pair]
    command += ["--grad-checkpoint"] if settings["grad_checkpoint"] else []
    command += ["--sample-tokens", "0"] if bench.quick else []  # no texts for the report, which are not counted anyway
    return [*command, *changes]


def own_flags(bench: Bench, side: Side) -> list[str]:
    """Return this side's flags for our command, and then the user's."""
    mode = dict(side.settings).get("grad_checkpoint")
    return [*(["--grad-checkpoint", mode] if mode else []), *shlex.split(bench.ours), *side.flags]


def our_facts(bench: Bench, side: Side) -> dict[str, Any]:
    """Return what ours computes in and with, by its flags and this machine."""
    given = dict(pairwise(own_flags(bench, side))).get("--dtype", "auto")
    return bench.computes if given == "auto" or not bench.computes else {**bench.computes, "dtypes": [given]}


def _check_ours(bench: Bench, side: Side, adapter: Path) -> dict[str, Any]:
    """Train one epoch over the check rows with a rate near zero, with the loss and batches that are timed."""
    folder = bench.folder / f"{side.name}.check"
    changes = ["--epochs", "1", "--force"]
    # Last, so that flags in --ours cannot change the factors during the check.
    command = [
        *our_command(bench, "check", adapter, folder, changes),
        *own_flags(bench, side),
        "--learning-rate",
        NO_RATE,
    ]
    run_child(command, bench.log(folder.name), timeout_s=bench.timeout_s)
    steps = steps_from_metrics(read_metrics(folder))
    return {
        "loss_sum": sum(step["loss"] * step["supervised"] for step in steps),
        "count": sum(step["supervised"] for step in steps),
        "same_ids": True,
        "notes": [],
        "facts": our_facts(bench, side),
    }


def _train_ours(
    bench: Bench, side: Side, adapter: Path, name: str, seed: int
) -> tuple[dict[str, Any], Ended, list[str]]:
    folder = bench.folder / name
    length = ["--iters", str(bench.steps or ENDLESS)]
    rate = ["--learning-rate", str(bench.settings["learning_rate"])]
    command = our_command(bench, "train", adapter, folder, [*length, *rate, "--seed", str(seed), "--force"])
    command += own_flags(bench, side)
    result, ended = train_timed(command, folder, bench.log(name), bench.seconds, bench.timeout_s)
    return result, ended, command
