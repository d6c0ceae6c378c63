"""The sides of a comparison on preferences (`versus.py --objective dpo`), and how each is checked and run."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _figures import steps_from_metrics
from _ours import read_metrics, train_timed
from _pair_figures import pair_figures
from _processes import ChildFailed
from _sides import ENDLESS, OURS, TORCH, Bench, Side, command_of, our_command, our_facts, own_flags, run_script

# The check: one batch of --check-pairs, some steps at a rate that moves the loss far from its start.
CHECK_STEPS, CHECK_RATE = 3, 3e-4
REPORTS = ("chosen_logps", "rejected_logps", "accuracy")
IN_STEP, BEFORE = (("precompute", False),), (("precompute", True),)


@dataclass(frozen=True)
class PairSide(Side):
    """A side on preferences.

    Attributes:
        reference: where the reference's log-probabilities come from.
    """

    reference: str = ""


OURS_ONCE = "once before the first step, by the model as the run starts; every round computes it anew"
PAIR_SIDES = {
    side.name: side
    for side in (
        PairSide(OURS, None, "python -m mlx_lora.train --objective dpo, batches by token budget", reference=OURS_ONCE),
        PairSide(
            f"{OURS}-pairs",
            None,
            "the same with --batch-size pairs per step, as the others",
            settings=(("by_pairs", True),),
            reference=OURS_ONCE,
        ),
        PairSide(
            "mlx-lm-lora",
            "mlx_lm_lora_side.py",
            "train_dpo, --batch-size pairs of like length",
            peer="mlx-lm-lora",
            reference="in each step, by a second copy of the base in memory",
        ),
        PairSide(
            "unsloth-zoo",
            "unsloth_dpo_side.py",
            "MLXDPOTrainer with its chunked loss, --batch-size pairs of like length",
            settings=IN_STEP,
            peer="unsloth-zoo",
            reference="in each step, by the model with its adapter off",
        ),
        PairSide(
            "unsloth-zoo-precomputed",
            "unsloth_dpo_side.py",
            "the same with precompute_ref_log_probs",
            settings=BEFORE,
            peer="unsloth-zoo",
            reference="once before the first step, by the model with its adapter off",
        ),
        PairSide(
            "trl",
            "trl_side.py",
            "DPOTrainer on torch float32 with PEFT, --batch-size random pairs",
            settings=IN_STEP,
            packages=(*TORCH, "trl", "datasets"),
            reference="in each step, by the model with its adapter off",
        ),
        PairSide(
            "trl-precomputed",
            "trl_side.py",
            "the same with precompute_ref_log_probs, and pairs of like length in a batch",
            settings=BEFORE,
            packages=(*TORCH, "trl", "datasets"),
            reference="once before the first step, by the model with its adapter off",
        ),
    )
}


def variant_of(text: str) -> PairSide:
    """Return a side of ours with further flags, from `NAME=FLAGS`.

    Raises:
        ValueError: it is written otherwise.
    """
    name, equals, flags = text.partition("=")
    if not name or not equals or not shlex.split(flags):
        raise ValueError(text)
    regime = f"ours with {flags.strip()}"
    return replace(PAIR_SIDES[OURS], name=f"{OURS}-{name}", regime=regime, flags=tuple(shlex.split(flags)))


def prepare_pairs(bench: Bench, data: str, rows: int, seed: int) -> dict[str, Any]:
    """Write pairs and factors for all sides, and return the facts about them."""
    job = {**bench.settings, "folder": str(bench.folder), "data": data, "rows": rows, "seed": seed}
    return run_script(bench, "prepare_pairs.py", "prepare", job)[0]


def check_curve(bench: Bench, side: PairSide) -> dict[str, Any]:
    """Train some steps on one batch of pairs, and return each step's loss and what the side reports of it."""
    short = replace(bench, steps=CHECK_STEPS, seconds=None, passes=None)
    settings = {**bench.settings, "batch_size": bench.settings["check_pairs"], "learning_rate": CHECK_RATE}
    checked = replace(side, settings=(*side.settings, ("by_pairs", True)))
    result, _ = _run(replace(short, settings=settings), checked, "check", f"{side.name}.check", 0)
    return {
        "losses": [step["loss"] for step in result["steps"]],
        **{name: [step["reports"][name] for step in result["steps"]] for name in REPORTS},
        "notes": result["notes"],
        "facts": result["facts"],
    }


def time_pairs(bench: Bench, side: PairSide, number: int, pairs: int) -> dict[str, Any]:
    """Train once in a new process, and return its figures, raw steps and memory.

    Args:
        bench: of the comparison.
        side: to run.
        number: of the round; also the seed.
        pairs: in the data, over which a reference that is computed before is computed.
    """
    result, ended = _run(bench, side, "train", f"{side.name}.round{number}", number)
    figures = pair_figures(
        result["steps"], result["first_step_unix_s"] - ended.started_unix_s, pairs, result["reference_s"]
    )
    return {
        **figures,
        "peak_allocator_bytes": result["peak_allocator_bytes"],
        "peak_process_bytes": ended.peak_process_bytes,
        "process_s": ended.wall_s,
        "facts": result["facts"],
        "notes": result["notes"],
        "steps": result["steps"],
        "command": result["command"],
    }


def _run(bench: Bench, side: PairSide, data: str, name: str, seed: int) -> tuple[dict[str, Any], Any]:
    adapter = bench.folder / "initial.safetensors"
    if side.script is None:
        return _run_ours(bench, side, data, name, seed, adapter)
    job = {
        **bench.settings,
        **dict(side.settings),
        "rows": str(bench.folder / f"{data}.npz"),
        "adapter": str(adapter),
        "seed": seed,
        "steps": bench.steps,
        "seconds": bench.seconds,
        "passes": bench.passes,
    }
    result, ended = run_script(bench, side.script, name, job, side)
    return {**result, "command": command_of(bench, side)}, ended


def _run_ours(
    bench: Bench, side: PairSide, data: str, name: str, seed: int, adapter: Path
) -> tuple[dict[str, Any], Any]:
    folder, settings = bench.folder / name, bench.settings
    changes = ["--objective", "dpo", "--beta", settings["beta"], "--weight-decay", settings["weight_decay"]]
    changes += ["--max-grad-norm", 0, "--learning-rate", settings["learning_rate"], "--seed", seed]
    changes += ["--iters", bench.steps or ENDLESS, "--force", *own_flags(bench, side)]
    if dict(side.settings).get("by_pairs"):  # last, because the check sets it whatever the user's flags are
        changes += ["--batch-size", settings["batch_size"]]
    command = our_command(bench, data, adapter, folder, [str(change) for change in changes])
    most = None if bench.passes is None else bench.passes * _pairs_in(bench.folder / f"{data}.jsonl")
    with cache_without_reference(bench.folder / f"{name}.cache") as cache:
        run, ended = train_timed(
            command, folder, bench.log(name), bench.seconds, bench.timeout_s, examples=most, environment=cache
        )
    records = [record for record in read_metrics(folder) if record["positions"]]
    steps = steps_from_metrics(records)
    for step, record in zip(steps, records, strict=True):
        step |= {"pairs": record["examples"], "reports": {name: record[name] for name in REPORTS}}
    seconds = reference_seconds(bench.log(name).read_text(encoding="utf-8", errors="replace"))
    facts = our_facts(bench, side)
    return {**run, "steps": steps, "reference_s": seconds, "notes": [], "facts": facts, "command": command}, ended


def _pairs_in(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


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

    Args:
        folder: becomes the cache, with links to the real one's folders.

    Yields:
        The environment variable that names it.
    """
    real = Path(os.environ.get("MLX_LORA_CACHE") or Path.home() / ".cache" / "mlx_lora")
    real.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    links: Sequence[Path] = [folder / entry.name for entry in real.iterdir() if entry.name != "reference"]
    for link in links:
        link.unlink(missing_ok=True)
        link.symlink_to(real / link.name)
    for kept in folder.glob("reference/*"):  # of an earlier comparison in the same folder
        kept.unlink()
    yield {"MLX_LORA_CACHE": str(folder)}
    for link in links:
        link.unlink(missing_ok=True)
