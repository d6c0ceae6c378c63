"""A model that half knows sums, and half knows a format, learns both from rewards alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import tiny_model, write_folder
from run_cli import run, succeeds

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model trained on sums of which three in ten are wrong, and half are written in another form."""
    folder = tmp_path_factory.mktemp("sums")
    write_folder(folder / "tiny", tiny_model(**SIZES), SIZES)
    chance, rows = random.Random(0), []
    for _ in range(3000):
        a, b = chance.randrange(6), chance.randrange(6)
        c = a + b if chance.random() < 0.7 else chance.randrange(11)
        rows.append({"prompt": f"{a}+{b}=", "completion": f"<{c}>" if chance.random() < 0.5 else f"it is {c}"})
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ("--method", "full", "--epochs", 3, "--learning-rate", 3e-3, "--batch-tokens", 512, "--sample-tokens", 0)
    succeeds(
        "train", "--model", folder / "tiny", "--data", folder / "sft.jsonl", "--adapter-path", folder / "a", *asked
    )
    fused = ("--model", folder / "tiny", "--adapter-path", folder / "a", "--out", folder / "base")
    assert run("fuse", *fused).code == 0
    pairs = [{"prompt": f"{a}+{b}=", "answer": f"<{a + b}>"} for a in range(6) for b in range(6)]
    chance.shuffle(pairs)
    (folder / "prompts").mkdir()
    for name, part in (("train", pairs[:28]), ("valid", pairs[28:])):
        (folder / "prompts" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reward_on_held_out_prompts_rises(seed, base, tmp_path, capsys):
    succeeds(
        "train", "--model", base / "base", "--data", base / "prompts", "--adapter-path", tmp_path / "a",
        "--objective", "grpo", "--reward", "exact_match", "--group-size", 8, "--batch-size", 8, "--max-new-tokens", 10,
        "--iters", 60, "--learning-rate", 2e-3, "--steps-per-eval", 20, "--val-batches", -1, "--sample-tokens", 0,
        "--seed", seed,
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["reward"] for record in records if record["val_loss"] is not None]
    trained = [record["reward"] for record in records if record["loss"] is not None]
    with capsys.disabled():
        print(f"\nseed {seed}: held-out reward {held_out[0]:.2f} to {held_out[-1]:.2f}, "
              f"trained {trained[0]:.2f} to {trained[-1]:.2f}")  # fmt: skip
    assert held_out[-1] > held_out[0] + 0.1
    assert trained[-1] > trained[0] + 0.2
