"""A model that half knows how to use a tool learns it from rewards alone, over two turns; on words that it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_cli import succeeds
from tool_model import shelf_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    return shelf_folder(tmp_path_factory.mktemp("shelf"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_share_of_right_answers_on_held_out_tasks_rises(seed, shelf, tmp_path, capsys):
    succeeds(
        "train", "--model", shelf / "base", "--data", shelf / "prompts", "--adapter-path", tmp_path / "a",
        "--objective", "grpo", "--environment", f"{shelf / 'shelf.py'}:Shelf", "--reward", f"{shelf / 'shelf.py'}:right",
        "--max-turns", 3, "--group-size", 8, "--batch-size", 8, "--max-new-tokens", 40, "--iters", 40, "--rank", 8,
        "--learning-rate", 2e-3, "--steps-per-eval", 20, "--steps-per-report", 5, "--val-batches", -1, "--sample-tokens", 0, "--seed", seed,
        "--kernels", "ours",
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    held_out = [record for record in records if record["val_loss"] is not None]
    with capsys.disabled():
        for record in held_out:
            numbers = {name: round(value, 3) for name, value in record.items() if name == "reward" or "/" in name}
            print(f"\nseed {seed}, step {record['step']}: {numbers}", end="")
        print(f" ({records[-1]['elapsed_s']:.0f} s)")
    assert held_out[-1]["reward"] > held_out[0]["reward"] + 0.2
