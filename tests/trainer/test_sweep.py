"""Sweeps: the winner's folder is what `train` gives, a sweep that was killed ends as if it had not been, and a rate is found on the way.

What a sweep orders by, says and draws is the number that decides, and equal ones are told."""

from __future__ import annotations

import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from comparing import by_dtype
from resumed_runs import metrics
from run_cli import holds, one_line, run, succeeds
from tiers import by_default

import mlx_lora
from mlx_lora.api.train import SweepJob
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.reports.sweep_page import SweepResults, advice, write_page
from mlx_lora.trainer import sweep as sweeping
from mlx_lora.trainer import trainer as loop
from mlx_lora.trainer.run import train_run
from mlx_lora.trainer.several_runs import SeveralRuns, TooManyRuns, how_many_fit
from mlx_lora.trainer.sweep import (
    DIVERGED,
    MOST_EXTRA,
    Score,
    Sweep,
    SweepState,
    _reason,
    find_learning_rate,
    held_out_curve,
    results_of,
    rounds_for,
    trials_of,
)
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import parse_yaml

RATES = "learning_rate=1e-4,1e-3,5e-3,1e-2"
ASKED = {"seeds": 2, "budget": 3.7}  # two rounds, of 5 and 15 steps


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rows = [{"prompt": f"Say {n % 7} #{n}", "completion": "abc" * (1 + n % 4)} for n in range(40)]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_of(model: Path, data: Path, **changes: Any) -> TrainSettings:
    flat = {
        "model": str(model), "data": str(data), "iters": 30, "batch_size": 4, "rank": 4, "steps_per_report": 5, "valid_fraction": 0.2,
        "sample_tokens": 0, "kernels": "ours", "save_every": 4,
    }  # fmt: skip
    return train_settings({**flat, **changes})


def job_of(settings: TrainSettings, out: Path, *vary: str, **asked: Any) -> SweepJob:
    return SweepJob(settings, out, vary or (RATES,), **asked)


def factors(folder: Path) -> np.ndarray:
    arrays = mx.load(str(folder / "adapters.safetensors"))
    return np.concatenate([np.array(a).ravel() for _, a in sorted(arrays.items())])


def contents(folder: Path) -> dict[str, bytes]:
    """Return what must be the same: adapters and the sweep's file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))} | {
        "sweep.json": (folder / "sweep.json").read_bytes().replace(str(folder).encode(), b"")
    }


@pytest.fixture(scope="module")
def found(tiny_folder, data, tmp_path_factory) -> SweepJob:
    """A sweep that is done."""
    job = job_of(settings_of(tiny_folder, data), tmp_path_factory.mktemp("sweep") / "found", **ASKED)
    job.run()
    return job


@pytest.mark.long
def test_the_winner_is_an_ordinary_run(found, tiny_folder, data, tmp_path):
    state, folder = found.sweep.state, found.sweep.folder
    best = state.candidates[state.winner]["learning_rate"]
    assert best in (5e-3, 1e-2)
    train_run(settings_of(tiny_folder, data, learning_rate=best, adapter_path=str(tmp_path / "alone")))
    same = (tmp_path / "alone" / "adapters.safetensors").read_bytes()
    assert (folder / "winner" / "adapters.safetensors").read_bytes() == same
    train_run(settings_of(tiny_folder, data, learning_rate=1e-4, adapter_path=str(tmp_path / "other")))
    assert (tmp_path / "other" / "adapters.safetensors").read_bytes() != same
    used = parse_yaml((folder / "winner" / "run.yaml").read_text())
    assert (used["learning_rate"], used["resume"], used["force"]) == (best, None, False)
    assert state.val_loss == pytest.approx(_last_loss(folder / "winner"))


def _last_loss(folder: Path) -> float:
    lines = metrics(folder)
    return next(line["val_loss"] for line in reversed(lines) if line["val_loss"] is not None)


@pytest.mark.long
def test_trials_of_the_first_round_are_runs_that_were_stopped(found, tiny_folder, data, tmp_path):
    trial = found.sweep.trials[0]  # goes out after the first round
    steps = found.sweep.state.rounds[0][0]["step"]
    assert steps >= sweeping.FEWEST_STEPS
    assert trial.candidate not in found.sweep.state.scores(1)
    alone = settings_of(
        tiny_folder, data, learning_rate=1e-4, adapter_path=str(tmp_path / "alone"), save_every=steps, keep=0
    )
    train_run(alone)
    at = tmp_path / "alone" / "checkpoints" / f"step-{steps:06d}"
    assert np.abs(factors(trial.folder) - factors(at)).max() < by_dtype(1e-5, 1e-2) * np.abs(factors(at)).max() + 1e-7


@pytest.mark.long
def test_work_keeps_to_the_budget_and_the_page_says_what_to_use(found):
    state, compared = found.sweep.state, found.sweep.compared()
    assert 2.2 < compared.work() <= 2.7
    page = (found.sweep.folder / "sweep.html").read_text()
    best = state.candidates[state.winner]["learning_rate"]
    holds(page, f"Use --learning-rate {best:g}", "<svg")
    losses = [row["loss"] for row in compared.table()]
    assert compared.table()[0]["learning_rate"] == best
    assert losses[-1] == max(losses)
    known = [json.loads(line)["path"] for line in _known_runs()]
    assert not any("/trials/" in path for path in known)


@pytest.mark.long
def test_a_round_is_left_out_where_the_first_would_be_too_short(tiny_folder, data, tmp_path):
    settings, rates = settings_of(tiny_folder, data, iters=16), "learning_rate=1e-4..1e-2/6"
    job = job_of(settings, tmp_path / "short", rates, budget="3x")
    planned = len(job.sweep.rungs)
    job.run()
    rounds = job.sweep.state.rounds
    assert len(rounds) == planned - 1
    assert rounds[0][0]["step"] >= sweeping.FEWEST_STEPS
    again = job_of(settings, tmp_path / "short", rates, budget="3x", resume=True)
    again.run()
    assert again.sweep.state == job.sweep.state


def failing(after: int) -> Callable[[SeveralRuns], None]:
    """Return a `SeveralRuns.round` that fails when it is called for the nth time."""
    own, calls = SeveralRuns.round, itertools.count(1)

    def fails(runs: SeveralRuns) -> None:
        if next(calls) == after:
            raise ZeroDivisionError
        own(runs)

    return fails


def _known_runs() -> list[str]:
    from mlx_lora.trainer.run_folder import runs_file

    return runs_file().read_text().splitlines() if runs_file().exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("after", [3, 12])
def test_a_sweep_that_was_stopped_goes_on_to_the_same_bytes(found, tiny_folder, data, tmp_path, monkeypatch, after):
    out = tmp_path / "again"
    with monkeypatch.context() as patched:
        patched.setattr(SeveralRuns, "round", failing(after))
        with pytest.raises(ZeroDivisionError):
            job_of(settings_of(tiny_folder, data), out, **ASKED).run()
    with pytest.raises(InputError, match="already holds a sweep"):
        job_of(settings_of(tiny_folder, data), out, **ASKED)
    with pytest.raises(InputError, match=r"another .*seeds"):
        job_of(settings_of(tiny_folder, data), out, seeds=3, budget=3.7, resume=True)
    with pytest.raises(InputError, match=r"another rank"):
        job_of(settings_of(tiny_folder, data, rank=8), out, **ASKED, resume=True)
    job_of(settings_of(tiny_folder, data), out, **ASKED, resume=True).run()
    assert contents(out) == contents(found.sweep.folder)


@pytest.mark.slow
def test_as_many_at_once_as_fit(found, tiny_folder, data, tmp_path, monkeypatch):
    groups, own = [], SeveralRuns.open.__func__

    def noted(cls, runs, *others, **more):
        groups.append(len(runs))
        if len(runs) > 2:
            raise TooManyRuns(len(runs), 2)
        return own(cls, runs, *others, **more)

    monkeypatch.setattr(sweeping, "how_many_fit", lambda runs: 4)
    monkeypatch.setattr(SeveralRuns, "open", classmethod(noted))
    job = job_of(settings_of(tiny_folder, data), tmp_path / "narrow", **ASKED)
    job.run()
    assert groups == [4, 2, 2, 2, 2, 4, 2, 2]
    assert job.sweep.state.winner == found.sweep.state.winner
    for entry, wide in zip(job.sweep.state.rounds[0], found.sweep.state.rounds[0], strict=True):
        assert entry["loss"] == pytest.approx(wide["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_rate_that_diverges_is_the_last(tiny_folder, data, tmp_path):
    job = job_of(settings_of(tiny_folder, data), tmp_path / "out", "learning_rate=5e-3,1e-2,900", budget=2.9)
    job.run()
    assert job.sweep.state.candidates[job.sweep.state.winner]["learning_rate"] < 1
    assert list(job.sweep.state.scores(0))[-1] == 2


@pytest.mark.parametrize(("given", "vary"), [({}, "epochs=1,2"), ({"iters": None, "epochs": 1.0}, "iters=10,20")])
def test_a_length_varies_whatever_the_settings_call_it(tiny_folder, data, tmp_path, given, vary):
    job = job_of(settings_of(tiny_folder, data, **given), tmp_path / "out", vary)
    name = vary.split("=")[0]
    job.sweep.state.winner = 1
    chosen = [trial.settings for trial in job.sweep.trials] + [job.winner_settings()]
    assert [settings.to_flat()[name] for settings in chosen] == [
        *job.sweep.state.asked["vary"][name],
        chosen[1].to_flat()[name],
    ]
    assert all((settings.loop.iters is None) != (settings.loop.epochs is None) for settings in chosen)


@pytest.mark.slow
def test_lengths_may_vary(tiny_folder, data, tmp_path):
    job = job_of(settings_of(tiny_folder, data, learning_rate=5e-3), tmp_path / "out", "iters=10,30", budget=2.6)
    job.run()
    assert [entry["step"] for entry in job.sweep.state.rounds[0]] == [8, 24]


@pytest.mark.parametrize(
    ("keep_best", "metric", "until", "expected"),
    [
        (False, "loss", 9, sweeping.Score(0.0, 0.7)),
        (False, "loss", 6, sweeping.Score(0.0, 0.4)),
        (True, "loss", 9, sweeping.Score(0.0, 0.4)),
        (True, "accuracy", 9, sweeping.Score(0.25, 0.6)),
        (False, "accuracy", 6, sweeping.Score(0.5, 0.4)),
        (True, "task", 9, sweeping.Score(0.25, 0.6)),
    ],
)
def test_a_trial_is_judged_as_its_run_would_be(tiny_folder, data, tmp_path, keep_best, metric, until, expected):
    settings = settings_of(
        tiny_folder, data, objective="dpo", metric_for_best_model=metric, eval_tasks="x", adapter_path=str(tmp_path)
    )
    steps = [(0, 0.2, 1.0), (3, 0.6, 0.75), (6, 0.4, 0.5), (9, 0.7, 0.75)]
    lines = [{"step": step, "val_loss": loss, "accuracy": number, "task": number} for step, loss, number in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.yaml").write_text(f"keep_best: {str(keep_best).lower()}\n")
    assert sweeping.score_of(sweeping.Trial("a", 0, "", settings), until) == expected


def test_a_trial_without_a_number_is_the_last_but_for_one_that_diverged(tiny_folder, data, tmp_path):
    settings = settings_of(tiny_folder, data, metric_for_best_model="task", eval_tasks="x", adapter_path=str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "val_loss": 0.5, "task": None}))
    (tmp_path / "run.yaml").write_text("keep_best: false\n")
    found = sweeping.score_of(sweeping.Trial("a", 0, "", settings), 9)
    # A function of the user may give any numbers, so an error may be above 1.
    assert sorted([sweeping.DIVERGED, found, sweeping.Score(6.0, 0.9)]) == [
        sweeping.Score(6.0, 0.9), found, sweeping.DIVERGED,
    ]  # fmt: skip
    rounds = [
        [{"candidate": at, "error": one.error, "loss": one.loss} for at, one in enumerate((sweeping.DIVERGED, found))]
    ]
    sweeping.SweepState({}, [], rounds=rounds).write(tmp_path)
    assert list(sweeping.SweepState.read(tmp_path).scores(0)) == [1, 0]


@pytest.mark.parametrize("resume", [True, False])
def test_folders_that_are_no_sweeps_are_not_deleted(tiny_folder, data, tmp_path, resume):
    (tmp_path / "winner").mkdir()
    (tmp_path / "winner" / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match=r"winner/.*--force"):
        job_of(settings_of(tiny_folder, data), tmp_path, resume=resume)
    assert (tmp_path / "winner" / "mine.txt").read_text() == "kept"
    job_of(settings_of(tiny_folder, data), tmp_path, force=True)
    assert not (tmp_path / "winner").exists()


@pytest.mark.parametrize("finite", [2, 1])
def test_a_trial_whose_held_out_loss_is_not_finite_is_the_last(tiny_folder, data, tmp_path, monkeypatch, finite):
    """And not as good as it was before: such a loss is null in the file, as is that of a line of training."""
    measured, own = [], loop.mean_loss

    def broken(*given: Any) -> Any:
        measured.append(own(*given))
        return measured[-1] if len(measured) <= finite else replace(measured[-1], loss=math.nan)

    monkeypatch.setattr(loop, "mean_loss", broken)
    changes = {"iters": 4, "steps_per_eval": 2, "keep_best": False, "adapter_path": str(tmp_path / "a")}
    settings = settings_of(tiny_folder, data, **changes)
    train_run(settings)
    assert len(measured) == 3  # before the first step, after two, and after four
    found = sweeping.score_of(sweeping.Trial("a", 0, "", settings), 9)
    assert found == sweeping.Score(0.0, math.inf)
    assert found < sweeping.DIVERGED


@pytest.mark.parametrize(
    ("changes", "asked", "said"),
    [
        ({}, {"vary": ("rank=8",)}, "nothing to compare"),
        ({}, {"seeds": 0}, "--seeds 0"),
        ({}, {"budget": 1.0}, "--budget"),
        ({"objective": "grpo", "reward": "exact_match"}, {}, "--objective grpo"),
        ({"objective": "classify"}, {}, "--objective classify cannot be trained together"),
        ({"objective": "embed"}, {}, "--objective embed cannot be trained together"),
        ({"valid_fraction": 0}, {"budget": 2.9}, "held-out"),
        ({"objective": "dpo"}, {"vary": ("beta=0.1,0.3",)}, "changes the loss"),
        (
            {"metric_for_best_model": "accuracy", "objective": "dpo"},
            {"vary": ("objective=dpo,orpo",)},
            "changes the loss",
        ),
        ({"iters": 6}, {"budget": 2.0}, "too few to tell them apart"),
        ({"learning_rate": "auto"}, {"vary": ("rank=4,8",), "budget": 2.9}, "--learning-rate auto"),
    ],
)
def test_what_cannot_be_compared_is_refused(tiny_folder, data, tmp_path, changes, asked, said):
    with pytest.raises(InputError, match=said) as refused:
        SweepJob(settings_of(tiny_folder, data, **changes), tmp_path / "out", **{"vary": (RATES,), **asked}).run()
    assert "\n" not in str(refused.value)


REFUSED = [
    ({"valid_fraction": 0}, "--valid-fraction 0.05"),
    ({"val_batches": 0}, "--val-batches 0"),
    ({"iters": 6}, "too few"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_is_refused_trains_no_step_and_leaves_nothing(tiny_folder, data, tmp_path, monkeypatch, changes, said):
    monkeypatch.setattr(SeveralRuns, "round", lambda runs: pytest.fail("a step was taken"))
    with pytest.raises(InputError, match=said):
        job_of(settings_of(tiny_folder, data, **changes), tmp_path / "out", budget=2.0).run()
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=rf"--learning-rate auto: .*{said}"):
        find_learning_rate(auto(tiny_folder, data, tmp_path / "auto", **{"iters": 100, **changes}))
    assert not (tmp_path / "auto").exists()


def test_what_is_refused_leaves_the_files_that_were_there(tiny_folder, data, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="--valid-fraction"):
        job_of(settings_of(tiny_folder, data, valid_fraction=0), tmp_path, budget=2.9).run()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    job = job_of(settings_of(tiny_folder, data), tmp_path, budget=2.9)
    (job.sweep.trials[0].folder / "checkpoints").mkdir(parents=True)  # steps of an earlier start
    job.sweep._forget_unbegun()
    assert job.sweep.trials[0].folder.is_dir()


@pytest.mark.long
def test_the_command(tiny_folder, data, tmp_path):
    flags = (
        "--model", tiny_folder, "--data", data, "--iters", 20, "--batch-size", 4, "--valid-fraction", 0.2,
        "--sample-tokens", 0,
    )  # fmt: skip
    done = succeeds(
        "sweep", *flags, "--vary", "learning_rate=1e-4..1e-2/2", "--budget", "2x", "--out", tmp_path / "out", "--json"
    )
    answer = json.loads(done.out)
    assert answer["best"] == {"learning_rate": 1e-2}
    assert answer["advice"].startswith("Use --learning-rate 0.01")
    assert parse_yaml((tmp_path / "out" / "winner" / "run.yaml").read_text())["learning_rate"] == 1e-2
    one_line(run("sweep", *flags, "--vary", "rank=8..4", "--out", tmp_path / "x"), "smaller to a larger")
    one_line(run("sweep", *flags, "--out", tmp_path / "x", "--adapter-path", "y"), "--adapter-path")


@pytest.mark.slow
def test_python_and_rates_around_the_default(tiny_folder, data, tmp_path):
    shown = mlx_lora.sweep(
        tiny_folder, data, tmp_path / "out", iters=40, batch_size=4, valid_fraction=0.2, sample_tokens=0, progress=False
    )
    assert len(shown.table) == 6
    assert shown.best["learning_rate"] in [row["learning_rate"] for row in shown.table]
    assert shown.run.adapter == tmp_path / "out" / "winner"
    axes = shown.plot().axes[0]
    assert axes.get_xscale() == "log"
    assert max(len(line.get_xdata()) for line in axes.lines) == 6
    assert shown.run.steps == 40
    assert max(row["learning_rate"] for row in shown.table) == pytest.approx(
        32 * min(row["learning_rate"] for row in shown.table), rel=0.1
    )


@pytest.mark.long
def test_a_plan_says_how_many_trials_fit_and_how_long_a_sweep_takes(tiny_folder):
    flags = ("--model", tiny_folder, "--rank", 64, "--iters", 100, "--max-seq-length", 64, "--json", "--sweep")
    plans = [json.loads(run("plan", *flags, "4x", "--memory-budget", gb).out) for gb in (0.02, 0.04)]
    few, more = (plan["sweep"]["runs_at_once"] for plan in plans)
    assert 1 <= few < more < 256
    settings = train_settings(
        {"model": str(tiny_folder), "rank": 64, "max_seq_length": 64, "memory_budget": 0.02, "batch_size": 1}
    )
    assert few <= how_many_fit([settings] * 100)  # with the shortest rows
    said = run("plan", *flags[:-2], "--sweep", "--learning-rate", "auto").out
    holds(said, "--budget 3x", "planned with the default rate")
    one_line(run("plan", "--model", tiny_folder, "--sweep", "much"), "--budget much")


# --learning-rate auto


@pytest.fixture
def brief(monkeypatch) -> None:
    """Let a first round of two steps be long enough, so that a run of forty can try rates."""
    monkeypatch.setattr(sweeping, "FEWEST_STEPS", 1.3)


def auto(model: Path, data: Path, folder: Path, **changes: Any) -> TrainSettings:
    return settings_of(model, data, **{"iters": 40, "learning_rate": "auto", "adapter_path": str(folder), **changes})


@pytest.mark.long
def test_the_rate_is_found_in_the_runs_own_first_part(brief, tiny_folder, data, tmp_path):
    settings, base = find_learning_rate(auto(tiny_folder, data, tmp_path / "a"))
    rate = settings.optimizer.learning_rate
    state = json.loads((tmp_path / "a" / "trials" / "sweep.json").read_text())
    last = state["rounds"][-1]
    assert (
        rate
        == min(last, key=lambda entry: entry["loss"])["candidate"] * 0
        + state["candidates"][state["winner"]]["learning_rate"]
    )
    steps = {entry["name"]: entry["step"] for entries in state["rounds"] for entry in entries}
    assert 0 < sum(steps.values()) - last[0]["step"] <= MOST_EXTRA * 40 + len(steps)
    assert train_run(settings, base=base).steps == 40
    used = parse_yaml((tmp_path / "a" / "run.yaml").read_text())
    assert (used["learning_rate"], used["resume"]) == (rate, None)
    # The same as a run with this rate, but for the rounding of steps that were computed with others.
    train_run(settings_of(tiny_folder, data, iters=40, learning_rate=rate, adapter_path=str(tmp_path / "b")))
    one, other = factors(tmp_path / "a"), factors(tmp_path / "b")
    assert float(one @ other / (other @ other)) == pytest.approx(1, abs=1e-3)
    steps_seen = [json.loads(line)["step"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert steps_seen[0] == 0
    assert steps_seen == sorted(steps_seen)
    assert (tmp_path / "a" / "trials" / "sweep.html").is_file()
    assert not list((tmp_path / "a" / "trials").rglob("*.safetensors"))


@pytest.mark.slow
def test_python_and_command_find_the_same_rate(brief, tiny_folder, data, tmp_path):
    flags = ("--model", tiny_folder, "--data", data, "--batch-size", 4, "--valid-fraction", 0.2, "--sample-tokens", 0)
    done = succeeds("train", *flags, "--iters", 40, "--learning-rate", "auto", "--adapter-path", tmp_path / "a")
    assert "Learning rate: trying" in done.err
    result = mlx_lora.train(
        tiny_folder, data, tmp_path / "b", learning_rate="auto", iters=40, batch_size=4, valid_fraction=0.2, sample_tokens=0,
        progress=False,
    )  # fmt: skip
    assert result.settings["learning_rate"] == parse_yaml((tmp_path / "a" / "run.yaml").read_text())["learning_rate"]
    again = succeeds(
        "train", *flags, "--iters", 44, "--learning-rate", "auto", "--adapter-path", tmp_path / "a", "--resume"
    )
    assert "trying" not in again.err


@pytest.mark.slow
@pytest.mark.parametrize(("after", "iters"), by_default([(1, 40), (3, 40), (3, 30)], (3, 30)))
def test_trials_that_were_stopped_go_on(brief, tiny_folder, data, tmp_path, monkeypatch, after, iters):
    settings, _ = find_learning_rate(auto(tiny_folder, data, tmp_path / "a", iters=iters))
    with monkeypatch.context() as patched:
        patched.setattr(SeveralRuns, "round", failing(after))
        with pytest.raises(ZeroDivisionError):
            find_learning_rate(auto(tiny_folder, data, tmp_path / "b", iters=iters))
    resumed, _ = find_learning_rate(auto(tiny_folder, data, tmp_path / "b", iters=iters, resume="auto"))
    assert resumed.optimizer == settings.optimizer
    # Killed after that, it still ends with the best adapter.
    later, _ = find_learning_rate(auto(tiny_folder, data, tmp_path / "b", iters=iters, resume="auto"))
    assert later.loop == resumed.loop == replace(settings.loop, adapter_path=later.loop.adapter_path)
    assert later.loop.keep_best
    last = find_learning_rate(auto(tiny_folder, data, tmp_path / "b", iters=iters, resume="auto", keep_best=False))[0]
    assert (last.loop.keep_best, last.loop.steps_per_eval) == (False, None)
    at = "checkpoints/" + sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())[-1]
    assert np.array_equal(factors(tmp_path / "a" / at), factors(tmp_path / "b" / at))


def test_a_run_that_is_too_short_for_trials_is_refused(tiny_folder, data, tmp_path):
    with pytest.raises(InputError, match=r"has 20 steps, .*--iters \d+") as refused:
        find_learning_rate(auto(tiny_folder, data, tmp_path / "a", iters=20))
    named = int(str(refused.value).split("--iters ")[1])
    assert 20 < named <= 80
    assert not (tmp_path / "a" / "trials").exists()
    one_line(run("train", "--model", tiny_folder, "--data", data, "--learning-rate", "fast"), "auto")


COMMAND = (
    "--iters", "30", "--batch-size", "4", "--rank", "4", "--valid-fraction", "0.2", "--sample-tokens", "0", "--save-every", "4", "--vary", RATES,
    "--seeds", "2", "--budget", "3.7", "--kernels", "ours",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tiny_folder, data, tmp_path_factory) -> tuple[list[str], Path, float]:
    """The command of a sweep, what it leaves, and how long it takes."""
    command = [sys.executable, "-m", "mlx_lora", "sweep", "--model", str(tiny_folder), "--data", str(data), *COMMAND]
    begun, out = time.monotonic(), tmp_path_factory.mktemp("whole") / "out"
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    return command, out, time.monotonic() - begun


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(7))
def test_a_sweep_that_is_killed_ends_as_if_it_had_not_been(undisturbed, tmp_path, seed):
    command, whole, lasts = undisturbed
    draw = random.Random(seed)
    for _ in range(3):
        process = subprocess.Popen([*command, "--out", str(tmp_path / "killed"), "--resume"], stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.3, 0.9) * lasts)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, "--out", str(tmp_path / "killed"), "--resume"], check=True, capture_output=True)
    assert contents(tmp_path / "killed") == contents(whole)


THREE_RATES = [{"learning_rate": rate} for rate in (1e-4, 1e-3, 1e-2)]
BETAS = [{"beta": beta} for beta in (0.1, 0.3, 0.5)]


def state_of(candidates: list[dict], *rounds: list[Score], metric: str = "accuracy") -> tuple[SweepState, SweepResults]:
    """Return a sweep's state and results; each round has a score for the first candidates."""
    entries = [
        [
            {
                "name": str(of),
                "candidate": of,
                "seed": 0,
                "step": 10 * (at + 1),
                "loss": score.loss,
                "error": score.error,
            }
            for of, score in enumerate(scores)
        ]
        for at, scores in enumerate(rounds)
    ]
    state = SweepState({}, candidates, {"": 100}, entries)
    state.winner = next(iter(state.scores(len(rounds) - 1)))
    return state, results_of(state, metric, {})


def test_the_metric_orders_the_table_and_is_what_is_told(tmp_path):
    """The best by accuracy has the highest loss."""
    state, found = state_of(THREE_RATES, [Score(0.5, 0.4), Score(0.25, 0.7), Score(0.125, 0.9)])
    assert state.winner == 2
    assert list(found.last()) == list(state.scores(0)) == [2, 1, 0]
    assert [row["accuracy"] for row in found.table()] == [0.875, 0.75, 0.5]
    said = advice(found)
    assert "accuracy 0.8750" in said
    assert "loss" not in said
    write_page(tmp_path / "sweep.html", found)
    page = (tmp_path / "sweep.html").read_text()
    assert "accuracy at step 10" in page
    assert "loss" not in page.split("</style>")[-1]
    assert "0.9000" not in page
    assert "accuracy 0.9375 after its whole run" in advice(replace(found, val_loss=0.3, val_score=0.9375))


@pytest.mark.parametrize(("candidates", "best"), [(THREE_RATES, 1), (BETAS, 0)])
def test_equal_numbers_are_told_and_decided_by_losses_that_can_be_compared(candidates, best):
    """Losses under other betas mean other things."""
    state, found = state_of(candidates, [Score(0.125, 0.9), Score(0.125, 0.2), Score(0.5, 0.1)])
    assert state.winner == best
    assert list(found.last()) == list(state.scores(0))
    said = advice(found)
    assert "the same accuracy" in said
    assert ("a higher loss" in said) == (candidates is THREE_RATES)


def test_a_tie_of_an_earlier_round_is_told():
    said = advice(state_of(BETAS, [Score(0.125, 0.9)] * 3, [Score(0.0, 0.9), Score(0.5, 0.2)])[1])
    assert "--beta 0.5 had the same" in said
    assert "--beta 0.3" not in said


def test_what_diverged_is_the_last_and_means_over_seeds_are_equal_in_any_order():
    state, found = state_of(BETAS, [DIVERGED, Score(float("inf"), 0.5), Score(0.5, 0.5)])
    assert list(found.last()) == list(state.scores(0)) == [2, 1, 0]
    seeds = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]
    entries = [
        {"name": "", "candidate": of, "seed": 0, "step": 1, "loss": 1.0 - of, "error": error}
        for of, errors in enumerate(seeds)
        for error in errors
    ]
    assert list(SweepState({}, THREE_RATES[:2], {}, [entries]).scores(0)) == [1, 0]


@pytest.mark.parametrize(
    ("losses", "last", "said"),
    [
        ([1.0, 1.005, 1.009], 0, "from 0.0001 to 0.01"),
        ([0.5, 1.0, 1.005], 1, "from 0.001 to 0.01"),  # the first was much better in the first round
        ([1.0, 9.0, 1.0], 0, None),  # not from the first to the last
        ([1.0, 2.0, 3.0], 0, None),
    ],
)
def test_as_good_is_about_the_same_loss_on_both_sides(losses, last, said):
    state, _ = state_of(THREE_RATES, [Score(0.0, loss) for loss in losses], metric="loss")
    state.winner = last
    found = advice(results_of(state, "loss", {}))
    assert ("within" in found) == bool(said)
    assert not said or said in found
    assert "within" not in advice(results_of(state, "accuracy", {}))


def test_curves_are_of_the_number_that_decides(tmp_path):
    lines: list[dict[str, Any]] = [
        {"step": 0, "val_loss": 0.7, "accuracy": 0.1},
        {"step": 2, "val_loss": None, "accuracy": 0.2},  # of the rows that are trained on
        {"step": 4, "val_loss": 0.6, "accuracy": 0.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert held_out_curve(tmp_path) == [(0, 0.7), (4, 0.6)]
    assert held_out_curve(tmp_path, "accuracy") == [(4, 0.75)]


def test_the_reason_of_a_rate_is_the_number_that_decided(tmp_path):
    settings = train_settings({"model": "m", "objective": "dpo", "metric_for_best_model": "accuracy"})
    trials = trials_of(settings, THREE_RATES, 1, tmp_path)
    sweep = Sweep(
        tmp_path,
        state_of(THREE_RATES, [Score(0.5, 0.4), Score(0.25, 0.7), Score(0.125, 0.9)])[0],
        trials,
        rounds_for(3),
    )
    said = _reason(sweep, trials[2])
    holds(said, "highest held-out accuracy", "0.01: 0.8750; 0.001: 0.7500")
    assert "loss" not in said


@pytest.mark.slow
def test_betas_are_compared_by_accuracy_from_beginning_to_end(tiny_folder, tmp_path):
    rows = [{"prompt": f"Say {n % 7}", "chosen": "abc" * (1 + n % 4), "rejected": "xyz"} for n in range(40)]
    data: Path = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = train_settings({
        "model": str(tiny_folder), "data": str(data), "objective": "dpo", "metric_for_best_model": "accuracy", "iters": 10,
        "batch_size": 4, "rank": 4, "valid_fraction": 0.2, "sample_tokens": 0, "kernels": "ours",
    })  # fmt: skip
    job = SweepJob(settings, tmp_path / "out", ("beta=0.1,0.5",), budget=2.0)
    job.run()
    found = job.sweep.compared()
    assert 0 <= (found.val_score or 0) <= 1
    assert f"accuracy {found.val_score:.4f} after its whole run" in advice(found)
    assert found.table()[0]["beta"] == found.candidates[found.winner or 0]["beta"]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["val_score"] == found.val_score
