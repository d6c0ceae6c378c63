"""Runs that several processes take together, and how they are compared with another."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

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


def assert_same_run(one: Path, other: Path, since: int = 0, atol: float = 1e-5) -> None:
    """Compare losses (1e-5), counts (equal) and factors (`atol`, and 1e-3 of each) of two run folders."""
    expected = [r for r in records(one) if r["step"] > since]
    found = [r for r in records(other) if r["step"] > since]
    assert [{k: r[k] for k in COUNTS} for r in found] == [{k: r[k] for k in COUNTS} for r in expected]
    for a, b in zip(expected, found, strict=True):
        for name in RATES:
            assert a[name] == b[name] or abs(a[name] - b[name]) <= 1e-5 * abs(a[name]), (a["step"], name)
    theirs, ours = (mx.load(str(folder / "adapters.safetensors")) for folder in (one, other))
    for name, value in theirs.items():
        assert mx.allclose(value, ours[name], rtol=1e-3, atol=atol), name
