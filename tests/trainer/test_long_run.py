"""A long run takes no more memory and files at its end than near its beginning (mlx#3993, unsloth#6990)."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import mlx.core as mx
import pytest
from run_cli import succeeds

from mlx_lora.trainer import run as training_run
from mlx_lora.trainer.callbacks import Callback

pytestmark = pytest.mark.slow

STEPS, SETTLED = 2000, 100
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_2000_steps_stay_flat(tiny_folder, tmp_path, monkeypatch, capsys):
    chance = random.Random(0)
    rows = [{"prompt": f"say {n}", "completion": "ab" * chance.randint(1, 60)} for n in range(300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = []

    class Sample(Callback):
        def on_report(self, facts) -> None:
            files = len(os.listdir("/proc/self/fd"))
            samples.append((facts["step"], resident_bytes(), mx.get_cache_memory(), mx.get_active_memory(), files))

    monkeypatch.setattr(training_run, "logger_callbacks", lambda settings: [Sample()])
    succeeds(
        "train", "--model", tiny_folder, "--data", tmp_path / "rows.jsonl", "--adapter-path", tmp_path / "a", "--iters",
        STEPS, "--batch-tokens", 512, "--dropout", 0.1, "--steps-per-report", 5, "--steps-per-eval", 50, "--save-every", 50,
    )  # fmt: skip
    assert samples[-1][0] == STEPS
    settled = [s for s in samples if SETTLED <= s[0] <= 2 * SETTLED]
    late = [s for s in samples if s[0] > STEPS - SETTLED]
    names = ("resident", "cache", "active", "open files")
    for place, name in enumerate(names, 1):
        early, end = max(s[place] for s in settled), max(s[place] for s in late)
        with capsys.disabled():
            print(f"\n{name}: {early:,} up to step {2 * SETTLED}, {end:,} at the end", end="")
        # Allocations of shapes that come rarely: a hundredth and 8 MB; a leak of 5 KB a step would be 10 MB.
        assert end <= early * 1.01 + (0 if name == "open files" else 8e6), name
    print()
