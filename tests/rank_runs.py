"""Runs that several processes take together, and how they are compared with another."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
from resumed_runs import stopped_after

STEPS = 8
RATES = {"loss", "val_loss", "grad_norm", "learning_rate"}
COUNTS = {"step", "epoch", "examples", "supervised_tokens", "real_tokens", "positions", "shapes", "skipped_steps"}


def command(model, data, folder, *extra) -> list:
    return [
        "--model", model, "--data", data, "--adapter-path", folder, "--iters", STEPS, "--batch-tokens", 240,
        "--learning-rate", 5e-3, "--rank", 4, "--steps-per-report", 1, "--steps-per-eval", 4, "--val-batches", 3,
        "--save-every", 3, "--keep", 0, *extra,
    ]  # fmt: skip


def train(*words) -> list:
    return ["-m", "mlx_lora.train", *words]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def until(folder: Path, copy: Path, step: int) -> Path:
    """Return a copy of a run folder as it was after a checkpoint, without its adapter."""
    stopped_after(folder, copy, step)
    (copy / "adapters.safetensors").unlink()
    return copy


def assert_same_run(
    one: Path,
    other: Path,
    atol: float = 1e-5,
    rel: float = 1e-5,
    rates: Iterable[str] = RATES,
    counts: Iterable[str] = COUNTS,
) -> None:
    """Compare rates (`rel`), counts (equal) and factors (`atol`, and 1e-3 of each) of two run folders."""
    for expected, found in zip(records(one), records(other), strict=True):
        assert {name: found[name] for name in counts} == {name: expected[name] for name in counts}
        for name in rates:
            a, b = expected.get(name), found.get(name)
            assert a == b or abs(a - b) <= rel * abs(a) + 0.1 * atol, (expected["step"], name)
    theirs, ours = (mx.load(str(folder / "adapters.safetensors")) for folder in (one, other))
    for name, value in theirs.items():
        assert mx.allclose(value, ours[name], rtol=1e-3, atol=atol), name
