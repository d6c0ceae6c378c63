"""The sides of versus.py, and how each is checked and run in a new process: rows to imitate, or pairs of preferences."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from _figures import pair_figures, run_figures
from _harness import ChildFailed, Ended, as_words, run_side
from _ours import read_metrics, train_command, train_timed
from peers import peer_python

OURS = "mlx_lora"
# Small enough that an epoch of steps does not change any loss, so that a whole epoch can be one check.
NO_RATE = 1e-30
ENDLESS = 10**6
# The check on pairs: one batch of --check-pairs, some steps at a rate that moves the loss far from its start.
CHECK_STEPS, CHECK_RATE = 3, 3e-4
REPORTS = ("chosen_logps", "rejected_logps", "accuracy")

Flags = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One trainer in one regime.

    Attributes:
        name: as in `--sides`.
        script: file in sides/; None for ours, which runs as a command.
        regime: a description in one line.
        reference: on pairs, where the reference's log-probabilities come from.
        settings: added to the job.
        data: `train` or `sorted`.
        peer: name of the Python that it runs in, as in `--python` (see peers.py).
        packages: that Python's must have, where it is this one.
        flags: of ours alone, at the end of the command.
    """

    name: str
    script: str | None
    regime: str
    reference: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    data: str = "train"
    peer: str = ""
    packages: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


TORCH = ("torch", "peft", "transformers")
TRL = (*TORCH, "trl", "datasets")
OURS_ONCE = "once before the first step, by the model as the run starts; every round computes it anew"
ADAPTER_OFF = "in each step, by the model with its adapter off"
ONCE = "once before the first step, by the model with its adapter off"
IN_STEP, BEFORE = {"precompute": False}, {"precompute": True}


def _by_name(*sides: Side) -> dict[str, Side]:
    return {side.name: side for side in sides}


def _peft(batching: str, regime: str) -> Side:
    return Side(f"peft-{batching}", "peft_side.py", regime, settings={"batching": batching}, packages=TORCH)


SIDES = _by_name(
    Side(OURS, None, "python -m mlx_lora.train, batches by token budget"),
    *(Side(f"{OURS}-{mode}", None, f"the same with --grad-checkpoint {mode}", flags=("--grad-checkpoint", mode)) for mode in ("2", "selective", "block")),
    Side("mlx-lm", "mlx_lm_side.py", "mlx_lm.tuner.trainer.train, --batch-size rows"),
    Side("mlx-lm-sorted", "mlx_lm_side.py", "the same on rows sorted by length beforehand", data="sorted"),
    _peft("padded", "random --batch-size rows"),
    _peft("packed", "whole rows in --batch-tokens bins"),
    _peft("grouped", "like lengths, --batch-tokens"),
    Side("unsloth-zoo", "unsloth_side.py", "MLXTrainer with its chunked loss, --batch-size rows of like length", peer="unsloth-zoo"),
)  # fmt: skip
PAIR_SIDES = _by_name(
    Side(OURS, None, "python -m mlx_lora.train --objective dpo, batches by token budget", OURS_ONCE),
    Side(f"{OURS}-pairs", None, "the same with --batch-size pairs per step, as the others", OURS_ONCE, {"by_pairs": True}),
    Side("mlx-lm-lora", "mlx_lm_lora_side.py", "train_dpo, --batch-size pairs of like length",
         "in each step, by a second copy of the base in memory", peer="mlx-lm-lora"),
    Side("unsloth-zoo", "unsloth_side.py", "MLXDPOTrainer with its chunked loss, --batch-size pairs of like length",
         ADAPTER_OFF, IN_STEP, peer="unsloth-zoo"),
    Side("unsloth-zoo-precomputed", "unsloth_side.py", "the same with precompute_ref_log_probs", ONCE, BEFORE, peer="unsloth-zoo"),
    Side("trl", "trl_side.py", "DPOTrainer on torch with PEFT, --batch-size random pairs", ADAPTER_OFF, IN_STEP, packages=TRL),
    Side("trl-precomputed", "trl_side.py", "the same with precompute_ref_log_probs, and pairs of like length in a batch",
         ONCE, BEFORE, packages=TRL),
)  # fmt: skip


def variant_of(text: str) -> Side:
    """Return a side of ours with further flags, from `NAME=FLAGS`.

    Raises:
        ValueError: it is written otherwise.
    """
    name, equals, flags = text.partition("=")
    if not name or not equals or not shlex.split(flags):
        raise ValueError(text)
    regime = f"ours with {flags.strip()}"
    return replace(PAIR_SIDES[OURS], name=f"{OURS}-{name}", regime=regime, flags=tuple(shlex.split(flags)))


@dataclass(frozen=True)
class Bench:
    """The fixed settings of a comparison.

    Attributes:
        folder: for the files of sides/prepare.py, and every child's job, log and result.
        settings: those of versus.py that sides are told; of `steps`, `seconds` and `passes`, all but one are None. With
            `quick`, every round takes the same batches, and ours writes no texts; otherwise round n shuffles with seed n.
        pythons: side or peer name -> interpreter, for a side that needs other packages.
        computes: `dtypes` and `blas` of ours without flags, as the preparation found them; empty before it.
    """

    folder: Path
    settings: dict[str, Any]
    pythons: dict[str, str] = field(default_factory=dict)
    computes: dict[str, Any] = field(default_factory=dict)


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


def prepare(bench: Bench, what: str, **more: Any) -> dict[str, Any]:
    """Write `rows` or `pairs`, and adapters, for all sides, or make the fixed work of `quick`; return the facts about them."""
    job = {**bench.settings, "what": what, "folder": str(bench.folder), **more}
    return run_side("prepare.py", job, bench.folder, f"prepare-{what}", timeout_s=bench.settings["timeout"])[0]


def check_loss(bench: Bench, side: Side, adapter: str = "perturbed") -> dict[str, Any]:
    """Compute the side's loss on the check rows with the factors in `adapter`."""
    if side.script:
        return _run_script(bench, side, f"{side.name}.check", "check", adapter, 0, mode="check")[0]
    # One epoch with a rate near zero, with the loss and batches that are timed; the rate is last, so that flags in --ours
    # cannot change the factors.
    name, last = f"{side.name}.check", ["--learning-rate", NO_RATE]
    run, _ = _run_ours(bench, side, name, ("check", adapter), {"--epochs": 1}, last)
    loss_sum = sum(step["loss"] * step["supervised"] for step in run["steps"])
    count = sum(step["supervised"] for step in run["steps"])
    return {"loss_sum": loss_sum, "count": count, "same_ids": True, "notes": [], "facts": our_facts(bench, side)}


def time_run(bench: Bench, side: Side, number: int) -> dict[str, Any]:
    """Train once in a new process, and return its figures, raw steps and memory; `number` is of the round, from 0."""
    name, seed = f"{side.name}.round{number}", 0 if bench.settings["quick"] else number
    if side.script:
        run, ended = _run_script(bench, side, name, side.data, "initial", seed)
    else:
        given = bench.settings
        length = {"--iters": given["steps"] or ENDLESS, "--learning-rate": given["learning_rate"], "--seed": seed}
        run, ended = _run_ours(bench, side, name, ("train", "initial"), length)
    return _timed(run, ended, run_figures(run["steps"], run["first_step_unix_s"] - ended.started_unix_s))


def check_curve(bench: Bench, side: Side) -> dict[str, Any]:
    """Train some steps on one batch of pairs, and return each step's loss and what the side reports of it."""
    short = {"steps": CHECK_STEPS, "seconds": None, "passes": None, "learning_rate": CHECK_RATE}
    settings = {**bench.settings, **short, "batch_size": bench.settings["check_pairs"]}
    checked = replace(side, settings={**side.settings, "by_pairs": True})
    run, _ = _run_pairs(replace(bench, settings=settings), checked, "check", f"{side.name}.check", 0)
    reports = {name: [step["reports"][name] for step in run["steps"]] for name in REPORTS}
    return {"losses": [step["loss"] for step in run["steps"]], **reports, "notes": run["notes"], "facts": run["facts"]}


def time_pairs(bench: Bench, side: Side, number: int, pairs: int) -> dict[str, Any]:
    """Do as `time_run` on preferences; `pairs` are in the data, over which a reference before the first step is computed."""
    run, ended = _run_pairs(bench, side, "train", f"{side.name}.round{number}", number)
    first_step_s = run["first_step_unix_s"] - ended.started_unix_s
    figures = pair_figures(run["steps"], first_step_s, pairs, run["reference_s"])
    return {**_timed(run, ended, figures), "notes": run["notes"]}


def _timed(run: dict[str, Any], ended: Ended, figures: dict[str, Any]) -> dict[str, Any]:
    kept = {name: run[name] for name in ("peak_allocator_bytes", "facts", "steps", "command")}
    return {**figures, **kept, "peak_process_bytes": ended.peak_process_bytes, "process_s": ended.wall_s}


def _run_script(
    bench: Bench, side: Side, name: str, data: str, adapter: str, seed: int, mode: str = "train"
) -> tuple[dict[str, Any], Ended]:
    """Run a side's script on the rows of this name, in its Python."""
    files = {"data": f"{data}.jsonl", "rows": f"{data}.npz", "adapter": f"{adapter}.safetensors"}
    job = {**bench.settings, **side.settings, "mode": mode, "seed": seed}
    job |= {key: str(bench.folder / file) for key, file in files.items()}
    python = python_of(side, bench.pythons)
    limits = {"timeout_s": bench.settings["timeout"], "python": python}
    run, ended = run_side(side.script or "", job, bench.folder, name, **limits)
    return {**run, "command": [python or sys.executable, f"benchmarks/sides/{side.script}"]}, ended


def _run_ours(
    bench: Bench, side: Side, name: str, rows: tuple[str, str], changes: Flags, last: Sequence[Any] = (), **more: Any
) -> tuple[dict[str, Any], Ended]:
    """Run our train command with the sides' common settings and a report per step.

    `rows` and adapter are named as in `_run_script`; `changes` come before the user's and the side's flags, `last` beats
    them, `more` are arguments of `train_timed`.
    """
    given, folder, (data, adapter) = bench.settings, bench.folder / name, rows
    flags = {
        "--model": given["model"], "--data": bench.folder / f"{data}.jsonl", "--adapter-path": folder,
        "--resume-adapter-file": bench.folder / f"{adapter}.safetensors", "--rank": given["rank"],
        "--alpha": given["scale"] * given["rank"], "--batch-tokens": given["batch_tokens"],
        "--max-seq-length": given["max_seq_length"], "--lr-schedule": "constant", "--warmup": 0,
    }  # fmt: skip
    command = train_command(*as_words(flags), last=["--grad-checkpoint"] if given["grad_checkpoint"] else [])
    if given["quick"]:  # no texts for the report, which are not counted anyway
        command += ["--sample-tokens", "0"]
    command += [*as_words(changes), "--force", *own_flags(bench, side), *map(str, last)]
    more |= {"timeout_s": given["timeout"], "seconds": None if data == "check" else given["seconds"]}
    run, ended = train_timed(command, folder, bench.folder / f"{name}.log", **more)
    return {**run, "command": command}, ended


def own_flags(bench: Bench, side: Side) -> list[str]:
    """Return the user's flags for our command, and this side's."""
    return [*shlex.split(bench.settings["ours"]), *side.flags]


def our_facts(bench: Bench, side: Side) -> dict[str, Any]:
    """Return what ours computes in and with, by its flags and this machine."""
    given = dict(pairwise(own_flags(bench, side))).get("--dtype", "auto")
    return bench.computes if given == "auto" or not bench.computes else {**bench.computes, "dtypes": [given]}


def _run_pairs(bench: Bench, side: Side, data: str, name: str, seed: int) -> tuple[dict[str, Any], Ended]:
    """Train on the pairs of this name."""
    if side.script:
        return _run_script(bench, side, name, data, "initial", seed)
    given = bench.settings
    changes = {
        "--objective": "dpo", "--beta": given["beta"], "--weight-decay": given["weight_decay"], "--max-grad-norm": 0,
        "--learning-rate": given["learning_rate"], "--seed": seed, "--iters": given["steps"] or ENDLESS,
    }  # fmt: skip
    # Last, because the check sets it whatever the user's flags are.
    last = ["--batch-size", given["batch_size"]] if side.settings.get("by_pairs") else []
    pairs = len((bench.folder / f"{data}.jsonl").read_text(encoding="utf-8").splitlines())
    most = None if given["passes"] is None else given["passes"] * pairs
    with cache_without_reference(bench.folder / f"{name}.cache") as cache:
        run, ended = _run_ours(bench, side, name, (data, "initial"), changes, last, examples=most, environment=cache)
    records = [record for record in read_metrics(bench.folder / name) if record["positions"]]
    for step, line in zip(run["steps"], records, strict=True):
        step |= {"pairs": line["examples"], "reports": {key: line[key] for key in REPORTS}}
    seconds = reference_seconds((bench.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace"))
    return {**run, "reference_s": seconds, "notes": [], "facts": our_facts(bench, side)}, ended


def reference_seconds(log: str) -> float:
    """Return the seconds that our run took for the reference, from what it printed.

    Raises:
        ChildFailed: it did not compute one.
    """
    found = re.findall(r"Reference: [\d,]+ answers computed in ([\d.]+) s", log)
    if not found:
        raise ChildFailed("our run did not say that it computed the reference; its whole cost would be unknown")
    return sum(float(seconds) for seconds in found)


@contextmanager
def cache_without_reference(folder: Path) -> Iterator[dict[str, str]]:
    """Give a run our cache without what earlier runs kept of the reference, so that it computes it.

    The folder becomes the cache, with links to the real one's folders. Yields the environment variable that names it.
    """
    real = Path(os.environ.get("MLX_LORA_CACHE") or Path.home() / ".cache" / "mlx_lora")
    real.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    links = [folder / entry.name for entry in real.iterdir() if entry.name != "reference"]
    for link in links:
        link.unlink(missing_ok=True)
        link.symlink_to(real / link.name)
    for kept in folder.glob("reference/*"):  # of an earlier comparison in the same folder
        kept.unlink()
    yield {"MLX_LORA_CACHE": str(folder)}
    for link in links:
        link.unlink(missing_ok=True)
