"""Several runs on one base: each equals its solo run, whatever happens to the others, and goes on exactly after a kill."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from architectures.build import write_architecture
from conftest import quantized, tiny_model, write_folder
from resumed_runs import metrics
from run_cli import one_line, run, succeeds
from tiers import by_default, named

from mlx_lora.api.train import train_several
from mlx_lora.config.load import train_settings
from mlx_lora.trainer import several_runs, stacked_step
from mlx_lora.trainer.run import train_run
from mlx_lora.trainer.several_runs import Left, SeveralRuns, common_round
from mlx_lora.utils.errors import InputError

FOUR_BITS = {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "dense": lambda path: write_folder(path, tiny_model()),
    "4-bit": lambda path: write_folder(path, quantized(tiny_model()), FOUR_BITS),
    "mixture": lambda path: write_architecture(path, "qwen3_moe"),
    "gated delta": lambda path: write_architecture(path, "qwen3_next"),
    "gemma": lambda path: write_architecture(path, "gemma3_text"),
}
# Different rates, ranks, methods and lengths.
EIGHT: list[dict[str, Any]] = [
    {"learning_rate": 2e-3, "rank": 4},
    {"learning_rate": 5e-4, "rank": 16, "alpha": 8, "weight_decay": 0.1},
    {"learning_rate": 1e-3, "rank": 8, "method": "rslora", "lr_schedule": "linear", "warmup": 5},
    {"learning_rate": 1e-4, "rank": 4, "method": "lora-plus", "max_grad_norm": 0.1},
    {"learning_rate": 1e-3, "rank": 3, "method": "dora"},
    {"learning_rate": 2e-3, "rank": 6, "method": "dora", "num_layers": 1},
    {"learning_rate": 1e-3, "rank": 2, "optimizer": "muon", "target_modules": "q_proj,o_proj,down_proj,up_proj"},
    {"learning_rate": 2e-3, "rank": 5, "grad_accumulation_steps": 2, "batch_tokens": 200},
]
DROPPING = {"learning_rate": 1e-3, "rank": 4, "dropout": 0.2}
GROUPS = {"learning_rate": 1e-3, "rank": 4, "method": "qa-lora"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    """Return the folder of a family's tiny model."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = FAMILIES[name](tmp_path_factory.mktemp("model") / "tiny")
        return made[name]

    return folder


@pytest.fixture
def groups(monkeypatch) -> list[list[int]]:
    """The runs of each group of batches that were computed together."""
    seen: list[list[int]] = []
    own = stacked_step.StackedStep._group

    def noted(self, group, keys):
        seen.append([part.run for part in group])
        return own(self, group, keys)

    monkeypatch.setattr(stacked_step.StackedStep, "_group", noted)
    return seen


def records(path: Path, number: int, objective: str, count: int = 24) -> Path:
    """Write a data set of its own."""
    rows = []
    for n in range(count):
        good = "abc" * (1 + (n + number) % 4)
        if objective == "kto":
            answer = good if n % 3 else "No" + "!" * (n % 3)
            rows.append({"prompt": f"Say {n} {number}", "completion": answer, "label": bool(n % 3)})
            continue
        rows.append(
            {"prompt": f"Say {n % 7} #{n} {number}", "completion": good}
            if objective in ("sft", "grpo")
            else {"prompt": f"Say {n} {number}", "chosen": good, "rejected": "No" + "!" * (n % 3)}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_of(model: Path, folder: Path, number: int, objective: str = "sft", **changes: Any):
    """Return the settings of a short run that reports each step."""
    data = folder.parent / f"{objective}-{number}.jsonl"
    flat = {
        "model": str(model), "data": str(data if data.exists() else records(data, number, objective)), "adapter_path": str(folder),
        "objective": objective, "iters": 6, "batch_size": 4, "steps_per_report": 1, "steps_per_eval": 3, "val_batches": 1,
        "seed": number, "save_every": 0, "sample_tokens": 0, "kernels": "ours",
    }  # fmt: skip
    return train_settings({**flat, **changes})


def losses(folder: Path) -> np.ndarray:
    return np.array([line["loss"] if line["val_loss"] is None else line["val_loss"] for line in metrics(folder)])


def factors(folder: Path) -> np.ndarray:
    return np.concatenate(
        [np.array(a).ravel() for _, a in sorted(mx.load(str(folder / "adapters.safetensors")).items())]
    )


def close(one: Path, other: Path, losses_within: float = 1e-5) -> bool:
    """Return whether two runs have the same losses and factors but for rounding."""
    a, b = factors(one), factors(other)
    same = np.abs(a - b).max() <= 2e-3 * np.abs(a).max() and float(a @ b / (a @ a)) == pytest.approx(1, abs=1e-4)
    return same and bool(np.abs(losses(one) - losses(other)).max() <= losses_within)


def solo_and_together(
    model: Path, tmp_path: Path, runs: list[dict[str, Any]], objective: str = "sft"
) -> list[tuple[Path, Path]]:
    """Train runs alone and together, and return the folders of each."""
    pairs = [(tmp_path / f"alone-{n}", tmp_path / f"together-{n}") for n in range(len(runs))]
    for number, (changes, (alone, _)) in enumerate(zip(runs, pairs, strict=True)):
        train_run(settings_of(model, alone, number, **{"objective": objective, **changes}))
    several = [
        settings_of(model, together, number, **{"objective": objective, **changes})
        for number, (changes, (_, together)) in enumerate(zip(runs, pairs, strict=True))
    ]
    for member in SeveralRuns.open(several).train():
        assert member.error is None
    return pairs


QUICK = {
    "dense": ("dense", "sft", [EIGHT[0], {**EIGHT[1], "iters": 4}, DROPPING]),
    "dora": ("dense", "sft", [EIGHT[4], EIGHT[5], EIGHT[7]]),
    "4-bit": ("4-bit", "dpo", [EIGHT[0], EIGHT[2], GROUPS]),
    "checkpointed": ("dense", "sft", [{**EIGHT[0], "grad_checkpoint": "block"}, {**DROPPING, "grad_checkpoint": "block"}]),
    "selective": ("dense", "sft", [{**EIGHT[0], "grad_checkpoint": "selective"}, {**EIGHT[4], "grad_checkpoint": "none"}]),
    "qa-lora": ("4-bit", "sft", [GROUPS, {**GROUPS, "rank": 2}, {**GROUPS, "dropout": 0.1}]),
    "other methods": ("dense", "sft", [{"method": "pissa", "rank": 4}, {"method": "adalora", "rank": 4}, EIGHT[0]]),
    "relora": ("dense", "sft", [{"method": "relora", "relora_every": 2}, {"learning_rate": 5e-4}]),
    "other objectives": (
        "dense", "dpo", [{"objective": "orpo"}, {"objective": "simpo"}, {"objective": "cpo"}, {"shared_prefix": "off"}]
    ),
    "rated answers": ("dense", "kto", [{"learning_rate": 2e-3}, {"beta": 0.3, "undesirable_weight": 2.0}]),
    "mixture": ("mixture", "sft", [EIGHT[0], EIGHT[4]]),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.float32("runs that round otherwise part, and every step multiplies the difference")
@pytest.mark.parametrize("case", named(QUICK, "4-bit"))
def test_each_run_equals_its_solo_run(case, models, tmp_path, groups):
    family, objective, runs = case
    runs = [{"learning_rate": 1e-3, "rank": 4, **changes} for changes in runs]
    pairs = solo_and_together(models(family), tmp_path, runs, objective)
    assert all(close(*pair) for pair in pairs)
    # Not because each was computed by itself; other targets, or answers in rows of their own, make other groups.
    assert max(map(len, groups)) >= (2 if any("objective" in one for one in runs) else len(runs))
    assert (
        np.abs(losses(pairs[0][0])[:4] - losses(pairs[1][1])[:4]).max() > 1e-3
    )  # two runs are not the same to begin with


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_runs_equal_their_solo_runs_over_thirty_steps(family, objective, models, tmp_path, groups):
    pairs = solo_and_together(models(family), tmp_path, [{**changes, "iters": 30} for changes in EIGHT], objective)
    for alone, together in pairs:
        assert len(losses(alone)) > 30
        assert np.abs(losses(alone) - losses(together)).max() <= 1e-5
        assert close(alone, together)
    assert max(map(len, groups)) > 4


@pytest.mark.slow
def test_a_run_that_trains_the_base_takes_its_steps_by_itself(models, tmp_path, groups, logged):
    runs = [{"learning_rate": 1e-4, "method": "full", "num_layers": 1}, EIGHT[0], EIGHT[2]]
    assert all(close(*pair) for pair in solo_and_together(models("dense"), tmp_path, runs))
    assert {run for group in groups for run in group} == {1, 2}
    assert any("together-0: its rows are computed by themselves" in line for line in logged)


@pytest.mark.long
def test_a_run_that_diverges_leaves_the_others_bytes(models, tmp_path, groups):
    """Its factors are infinite from the first step on, and it leaves when a finite run of as many steps would end."""

    def trained(place: str, poisoned: bool) -> list[bytes]:
        runs = [{"iters": 6}, {"iters": 3}, {"iters": 6, "method": "dora"}]
        several = SeveralRuns.open(
            [
                settings_of(models("dense"), tmp_path / f"{place}-{n}", n, **{"rank": 4, **own})
                for n, own in enumerate(runs)
            ]
        )
        with several.begun():
            if poisoned:
                step = several.members[1].wanted.trainer.step
                step.masters.put({name: mx.full(a.shape, mx.inf) for name, a in step.masters.arrays.items()})
                step.masters.hand_out()
            while several.active:
                several.round()
        assert (several.members[1].error is not None) == poisoned
        assert [several.members[n].outcome.steps for n in (0, 2)] == [6, 6]
        return [(tmp_path / f"{place}-{n}" / "adapters.safetensors").read_bytes() for n in (0, 2)]

    assert trained("ends", False) == trained("diverges", True)
    state = json.loads((tmp_path / "diverges-1" / several_runs.TOGETHER_FILE).read_text())
    assert (state["ended"], "not finite" in state["error"]) == (3, True)
    assert {(0, 1, 2), (0, 2)} <= {tuple(sorted(group)) for group in groups}


# Going on


def checkpointed(model: Path, tmp_path: Path, place: str, **changes: Any) -> list[Any]:
    """Return settings of runs of different lengths and cadences."""
    runs = [
        {"save_every": 3, "dropout": 0.1},
        {"save_every": 3, "iters": 5, "method": "dora"},
        {"save_every": 4, "keep": 1},
    ]
    return [
        settings_of(model, tmp_path / f"{place}-{n}", n, **{"rank": 4, "iters": 9, **own, **changes})
        for n, own in enumerate(runs)
    ]


def results(tmp_path: Path, place: str) -> list[bytes]:
    return [(tmp_path / f"{place}-{n}" / "adapters.safetensors").read_bytes() for n in range(3)]


@pytest.mark.long
@pytest.mark.parametrize("at", by_default([1, 4, 6, 8], 8))
def test_runs_that_are_killed_go_on_with_the_same_bytes(at, models, tmp_path):
    SeveralRuns.open(checkpointed(models("dense"), tmp_path, "whole")).train()
    killed = SeveralRuns.open(checkpointed(models("dense"), tmp_path, "killed"))
    with killed.begun():
        for _ in range(at):
            killed.round()
        for n in range(3):  # what is on the disk now is what a kill leaves
            shutil.copytree(tmp_path / f"killed-{n}", tmp_path / f"again-{n}")
    again = SeveralRuns.open(checkpointed(models("dense"), tmp_path, "again", resume="auto"))
    assert again.at == max(step for step in (0, 3, 4, 5, 6, 8, 9) if step <= at)
    again.train()
    assert results(tmp_path, "again") == results(tmp_path, "whole")
    assert [len(metrics(tmp_path / f"again-{n}")) for n in range(3)] == [
        len(metrics(tmp_path / f"whole-{n}")) for n in range(3)
    ]


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_with_the_same_bytes(models, tmp_path):
    def command(place: str, *more: str) -> list[str]:
        files = []
        for n, settings in enumerate(checkpointed(models("dense"), tmp_path, place, iters=40, save_every=2)):
            files.append(tmp_path / f"{place}-{n}.yaml")
            files[-1].write_text(json.dumps({k: v for k, v in settings.to_flat().items() if v is not None}))
        return [sys.executable, "-m", "mlx_lora", "train", "--runs", *map(str, files), *more]

    subprocess.run(command("whole"), check=True, capture_output=True)
    for kill in range(4):
        process = subprocess.Popen(command("again", *(["--resume"] if kill else [])), stderr=subprocess.DEVNULL)
        folder, deadline = tmp_path / "again-0" / "checkpoints", time.monotonic() + 100
        while time.monotonic() < deadline and not any(folder.glob(f"step-{8 * (kill + 1):06d}")):
            time.sleep(0.01)
        process.kill()
        assert process.wait() != 0
    subprocess.run(command("again", "--resume"), check=True, capture_output=True)
    assert results(tmp_path, "again") == results(tmp_path, "whole")


def test_the_round_to_go_on_from_is_one_that_all_runs_have():
    left = [Left(frozenset({10, 20, 30})), Left(frozenset({10, 20}))]
    assert common_round(left) == 20
    assert common_round([*left, Left(frozenset())]) == 0
    assert common_round([*left, Left(frozenset({5}), ended=5)]) == 20
    assert common_round([*left, Left(frozenset({25}), ended=25)]) == 0
    assert common_round([left[0], Left(frozenset({10, 25}), ended=25)]) == 30


@pytest.mark.long
def test_runs_that_do_not_belong_together_keep_their_checkpoints(models, tmp_path):
    """A third run beside two that are resumed, or runs that were trained alone, would all begin again."""
    SeveralRuns.open(checkpointed(models("dense"), tmp_path, "a")[:2]).train()
    stored = sorted(path for n in (0, 1) for path in (tmp_path / f"a-{n}").rglob("*.safetensors"))
    asked = checkpointed(models("dense"), tmp_path, "a", resume="auto")
    with pytest.raises(InputError, match=r"a-0: 9, a-1: 5, a-2: none"):
        SeveralRuns.open(asked)
    assert stored
    assert all(path.is_file() for path in stored)
    shutil.rmtree(tmp_path / "a-0" / "checkpoints")
    (tmp_path / "a-2").mkdir()
    (tmp_path / "a-2" / "run.yaml").write_text("")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "a-1" / "checkpoints" / f"step-{step:06d}", ignore_errors=True)
    for name in ("a-0", "a-1"):
        (tmp_path / name / several_runs.TOGETHER_FILE).unlink()
    assert SeveralRuns.open(asked).at == 0  # as a kill during the first saving leaves them


# What is refused


def test_runs_that_do_not_belong_together_are_refused(models, tmp_path):
    one = settings_of(models("dense"), tmp_path / "a", 0)
    other_base = settings_of(models("4-bit"), tmp_path / "b", 1)
    with pytest.raises(InputError, match=r"b: --model .*one base"):
        SeveralRuns.open([one, other_base])
    with pytest.raises(InputError, match="--adapter-path"):
        SeveralRuns.open([one, one], ["a", "b"])
    with pytest.raises(InputError, match=r"b: --objective grpo .*sft, dpo"):
        SeveralRuns.open([one, settings_of(models("dense"), tmp_path / "b", 1, objective="grpo", reward="length")])


@pytest.mark.parametrize("command", [True, False])
def test_one_run_alone_is_no_several_runs(models, tmp_path, command):
    if command:
        (tmp_path / "a.yaml").write_text("rank: 4\n")
        one_line(run("train", "--runs", tmp_path / "a.yaml", "--model", models("dense")), "two or more")
    else:
        with pytest.raises(InputError, match="two or more"):
            train_several(models("dense"), [{"data": "a.jsonl", "adapter_path": tmp_path / "a"}])


def test_more_runs_than_fit_are_refused_with_the_number_that_does(models, tmp_path):
    many = [settings_of(models("dense"), tmp_path / f"r{n}", 0, rank=64, memory_budget=0.02) for n in range(100)]
    with pytest.raises(InputError, match=r"--runs: 100 runs .*the first (\d+) do") as refused:
        SeveralRuns.open(many)
    fitting = int(str(refused.value).split("the first ")[1].split()[0])
    assert 1 < fitting < 100
    assert SeveralRuns.open(many[:fitting]).members


# The command


def test_the_command_trains_runs_from_their_files(models, tmp_path):
    files = []
    for n, settings in enumerate([settings_of(models("dense"), tmp_path / f"run-{n}", n) for n in range(2)]):
        files.append(tmp_path / f"run-{n}.yaml")
        files[-1].write_text(json.dumps({k: v for k, v in settings.to_flat().items() if v is not None}))
    ran = succeeds("train", "--runs", *files, "--iters", 2, "--rank", 4, exactly=True)
    for n in range(2):
        assert metrics(tmp_path / f"run-{n}")[-1]["step"] == 2
        assert any(line.startswith(f"run-{n}: ") for line in ran.lines)
    one_line(run("train", "--runs", files[0], "--iters", 2, exactly=True), "--runs")
    one_line(run("train", "--runs", *files, "--adapter-path", tmp_path / "x", exactly=True), "--adapter-path")
    one_line(run("train", "--runs", *files, "--config", files[0], exactly=True), "--config")


def test_runs_that_are_over_go_on_if_they_are_to_be_longer(models, tmp_path):
    def runs(place: str, iters: int, **changes: Any) -> list[Any]:
        return [
            settings_of(models("dense"), tmp_path / f"{place}-{n}", n, rank=4, save_every=3, iters=iters, **changes)
            for n in range(2)
        ]

    SeveralRuns.open(runs("a", 6)).train()
    longer = SeveralRuns.open(runs("a", 9, resume="auto"))
    longer.train()
    assert [member.outcome.steps for member in longer.members] == [9, 9]
    assert [metrics(tmp_path / f"a-{n}")[-1]["step"] for n in range(2)] == [9, 9]
    # Without checkpoints, what was trained is not replaced.
    for n in range(2):
        shutil.rmtree(tmp_path / f"a-{n}" / "checkpoints")
    with pytest.raises(InputError, match="--force"):
        SeveralRuns.open(runs("a", 9, resume="auto"))
    # Nor is one of them if the other never saved.
    shutil.rmtree(tmp_path / "a-1")
    with pytest.raises(InputError, match="--force"):
        SeveralRuns.open(runs("a", 9, resume="auto"))
