"""`train --test` without training measures what `evaluate` measures, also where a reference model is part of the loss."""

from __future__ import annotations

import json
import re

import pytest
from run_cli import run

PAIRS = [{"prompt": f"ask {n}", "chosen": "abcabc" * (1 + n % 2), "rejected": "zzz" * (1 + n % 3)} for n in range(8)]
SHORT = ("--iters", 3, "--max-seq-length", 96, "--learning-rate", "1e-2", "--val-batches", 0)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_reference_is_in_the_loss_of_a_test_alone(objective, tiny_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "valid", "test"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    run_ = ("--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "out", "--objective", objective)
    assert run("train", *run_, *SHORT).code == 0
    alone = run("train", *run_, "--max-seq-length", 96, "--test")
    [line] = [line for line in alone.lines if line.startswith("Test ")]
    measured = ("--data", data / "test.jsonl", "--max-seq-length", 96, "--json")
    loss = json.loads(run("evaluate", *run_[:2], *run_[4:], *measured).out)["loss"]
    told = float(re.search(r"loss ([\d.]+)", line)[1])
    assert told == pytest.approx(loss, abs=2e-3)
