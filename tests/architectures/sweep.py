"""Tries every architecture in every stage and keeps what came of it.

PYTHONPATH=tests python -m architectures.sweep --out sweep.json            everything, about 15 minutes
PYTHONPATH=tests python -m architectures.sweep --out sweep.json llama phi  some
PYTHONPATH=tests python -m architectures.table --results sweep.json        the pages from it

PYTHONPATH=tests python -m architectures.sweep --stage saved --out saved.json      what transformers 5 saved, 2 minutes
PYTHONPATH=tests python -m architectures.table --results saved.json --only saved   only that field of found.json; also images
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from architectures.configs import CONFIGS, architecture_modules, ways
from architectures.stages import STAGES
from architectures.trial import NotRun, Refused, Trial, Wrong
from architectures.vlm import CHANGES
from mlx_lora.utils.errors import InputError

# A fresh process now and then: compiled functions of a hundred models would pile up in one.
AT_ONCE = 6
LONGEST_TRIAL_S = 600


@dataclass
class Stage:
    """What came of a stage.

    Attributes:
        outcome: `right`, `refused` (in one line), `fails`, or `not run` for want of an earlier stage's result.
        text: the refusal's line, the failure, or a note.
        seconds: it took.
    """

    outcome: str
    text: str = ""
    seconds: float = 0.0


@dataclass
class Result:
    """What came of an architecture in one of its ways."""

    name: str
    tied: bool
    stages: dict[str, Stage] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def try_architecture(name: str, tied: bool, stages: Iterable[str] | None = None) -> Result:
    """Take one architecture through the stages, each tried whatever became of those before it."""
    result = Result(name, tied)
    with tempfile.TemporaryDirectory() as work:
        trial = Trial(name, tied, Path(work), facts=result.facts)
        for stage in stages or STAGES:
            print(f"{name} {'tied' if tied else 'untied'} {stage}", file=sys.stderr, flush=True)
            result.stages[stage] = _try_stage(trial, stage)
    return result


def _try_stage(trial: Trial, stage: str) -> Stage:
    started = time.perf_counter()
    try:
        outcome, text = "right", STAGES[stage](trial) or ""
    except (Refused, InputError) as error:
        outcome, text = "refused", _one_line(error, trial.work)
    except NotRun as error:
        outcome, text = "not run", str(error)
    except Wrong as error:
        outcome, text = "fails", _one_line(error, trial.work)
    except (Exception, SystemExit) as error:  # the point of a sweep: whatever it is, it is written down
        outcome, text = "fails", f"{type(error).__name__}: {_one_line(error, trial.work)}"
    return Stage(outcome, text, round(time.perf_counter() - started, 2))


def _one_line(error: BaseException, work: Path) -> str:
    """Return an error's text on a line, its folders named as a reader would."""
    return " ".join(str(error).replace(f"{work.resolve()}/", "").replace(f"{work}/", "").split())


def read_results(file: Path) -> dict[tuple[str, bool], Result]:
    """Read a results file, by name and way."""
    results = {}
    for entry in json.loads(file.read_text(encoding="utf-8")):
        stages = {name: Stage(**stage) for name, stage in entry.pop("stages").items()}
        results[entry["name"], entry["tied"]] = Result(**entry, stages=stages)
    return results


def write_results(file: Path, results: Iterable[Result]) -> None:
    """Write results, in alphabetical order."""
    ordered = sorted(results, key=lambda result: (result.name.lower(), result.tied))
    file.write_text(json.dumps([asdict(result) for result in ordered], indent=1), encoding="utf-8")


def asked_for(names: Iterable[str]) -> list[str]:
    """Return the architectures to try: those named, or all installed ones that have a tiny configuration."""
    return [name for name in names or architecture_modules() if name in CONFIGS or name in CHANGES]


def sweep(
    names: list[str], say: Any = lambda text: None, keep: Any = lambda results: None, stages: tuple[str, ...] = ()
) -> list[Result]:
    """Try architectures, a few to a process; a process that dies is what became of its architecture then.

    Args:
        names: of architectures.
        say: gets a line for each result.
        keep: gets the results so far after each process.
        stages: to go through; all of them if it is empty.
    """
    trials = [(name, tied) for name in names for tied in ways(name)]
    results: list[Result] = []
    while trials:
        part, trials = trials[:AT_ONCE], trials[AT_ONCE:]
        done, died = _in_a_process(part, stages)
        results += done
        if died:
            results.append(died)
            trials = part[len(done) + 1 :] + trials
        keep(results)
        for result in done + ([died] if died else []):
            bad = [
                f"{stage} {found.outcome}: {found.text}"
                for stage, found in result.stages.items()
                if found.outcome != "right"
            ]
            took = sum(found.seconds for found in result.stages.values())
            say(
                f"{result.name} ({'tied' if result.tied else 'untied'}), {took:.0f} s: {'; '.join(bad)[:300] or 'right'}"
            )
    return results


def _in_a_process(part: list[tuple[str, bool]], stages: tuple[str, ...] = ()) -> tuple[list[Result], Result | None]:
    """Try some in a process of their own; return the results, and one for what the process died of."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.jsonl"
        asked = [f"{name}:{int(tied)}" for name, tied in part]
        asked += [f"--stage={stage}" for stage in stages]
        worker = subprocess.run(
            [sys.executable, "-m", "architectures.sweep", "--worker", "--out", str(out), *asked],
            capture_output=True, text=True, timeout=LONGEST_TRIAL_S * len(part), check=False,
            env={**os.environ, "MLX_LORA_CACHE": os.environ.get("MLX_LORA_CACHE", f"{folder}/cache")},
        )  # fmt: skip
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    done = []
    for line in lines:
        entry = json.loads(line)
        done.append(Result(**{**entry, "stages": {name: Stage(**stage) for name, stage in entry["stages"].items()}}))
    if len(done) == len(part):
        return done, None
    name, tied = part[len(done)]
    last = [line for line in worker.stderr.splitlines() if line.startswith(f"{name} ")] or [f"{name} ? load"]
    stage = last[-1].split()[-1]
    end = f"the process ended with {worker.returncode}: {(worker.stderr.splitlines() or [''])[-1][:200]}"
    return done, Result(name, tied, {stage: Stage("fails", end)})


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Results file; other architectures' stay.")
@click.option("--worker", is_flag=True, hidden=True)
@click.option("--stage", "stages", multiple=True, type=click.Choice(list(STAGES)), help="Go through this stage only.")
@click.argument("names", nargs=-1)
def main(out: Path, worker: bool, stages: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Try architectures of mlx-lm (all of them unless named) in every stage, and write what came of it to --out."""
    if worker:
        with out.open("w", encoding="utf-8") as file:
            for name, tied in (asked.split(":") for asked in names):
                print(json.dumps(asdict(try_architecture(name, bool(int(tied)), stages))), file=file, flush=True)
        return
    kept = read_results(out) if out.exists() else {}

    def keep(results: list[Result]) -> None:
        write_results(out, {**kept, **{(result.name, result.tied): result for result in results}}.values())

    sweep(asked_for(names), lambda text: click.echo(text, err=True), keep, stages)


if __name__ == "__main__":
    main()
