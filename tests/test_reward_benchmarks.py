"""benchmarks/rollouts.py and reward_learning.py: equal work or no figures, and whole runs on the tiny model."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("rollouts", ["--cells", "8-bit:30"], "--cells 8-bit:30"),
        ("rollouts", ["--cells", "float32:1"], "2 tokens or more"),
        ("rollouts", ["--steps", "1x1"], "--steps 1x1"),
        ("rollouts", ["--steps", "9x2"], "1 to 8 prompts"),
        ("rollouts", ["--slow-rounds", "0"], "--slow-rounds 0"),
        ("reward_learning", ["--seeds", "0,one"], "--seeds 0,one"),
        ("reward_learning", ["--answers", "0"], "--answers 0"),
        ("reward_learning", ["--reuse"], "--reuse"),
    ],
)
def test_bad_arguments_are_refused(module, script, arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        module(script).arguments(["--model", "m", *arguments])
    assert words in capsys.readouterr().err


def test_sides_take_turns_and_the_first_turn_is_not_counted(module, capsys):
    rollouts, order = module("rollouts"), []

    def turn(side: str):
        def run(number: int) -> dict:
            order.append(side)
            return {"tokens": 12, "seconds": 100.0 if number == 0 else 2.0}

        return rollouts.Turn(side, run)

    found = rollouts.rounds_of([turn("a"), turn("b")], 3, "some work")
    assert "".join(order) == "baabbaab"
    assert {side: [one["tokens_per_s"] for one in turns] for side, turns in found.items()} == {
        "a": [6] * 3,
        "b": [6] * 3,
    }
    assert "warm-up, b" in capsys.readouterr().err


def test_other_work_is_refused(module):
    rollouts = module("rollouts")
    rollouts.must_equal("tokens", {"asked": 8, 0: 8, 1: 8})
    with pytest.raises(rollouts.Disagreement, match="tokens differ"):
        rollouts.must_equal("tokens", {"asked": 8, 0: 8, 1: 7})


def test_ratios_are_taken_within_rounds(module):
    """Both sides get slower together: the ratio stays, and ours is the faster one where more tokens or fewer seconds are."""
    rollouts = module("rollouts")
    sides = {
        "mlx_lora": [{"tokens_per_s": 40, "seconds": 2}, {"tokens_per_s": 20, "seconds": 4}],
        "peer": [{"tokens_per_s": 10, "seconds": 6}, {"tokens_per_s": 5, "seconds": 12}],
    }
    assert rollouts.gain(sides, "peer", "tokens_per_s") == "4.00x (4.00-4.00)"
    assert rollouts.gain(sides, "peer", "seconds") == "3.00x (3.00-3.00)"
    assert rollouts.gain(sides, "mlx_lora", "seconds") == ""


@pytest.mark.slow
def test_rollouts_compares_with_mlx_lm(module, tiny_folder, tmp_path):
    """And with mlx-lm-lora where it is installed."""
    command = [sys.executable, str(BENCHMARKS / "rollouts.py"), "--model", str(tiny_folder), "--rank", "4"]
    command += ["--cells", "float32:20,4-bit:20", "--tokens", "8", "--rounds", "2", "--out", str(tmp_path / "out.json")]
    peer = module("_peers").peer_python("mlx-lm-lora")
    command += ["--steps", "1x4,2x2" if peer else ""]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    result, last = json.loads((tmp_path / "out.json").read_text()), json.loads(ran.stdout.splitlines()[-1])
    assert set(last["sampling"]) == {"float32:20", "4-bit:20"}
    for cell, tokens, rounds in (("float32:20", 64, 2), ("4-bit:20", 16, 1)):
        assert set(result["sampling"][cell]) == {"mlx_lora", "mlx-lm", "mlx-lm, prompt once"}
        for turns in result["sampling"][cell].values():
            assert [turn["tokens"] for turn in turns] == [tokens] * rounds
            assert all(turn["lengths"] == [tokens // 8] * 8 for turn in turns)
    for shape in ("1x4", "2x2") if peer else ():
        for turns in result["steps"][shape].values():
            assert [turn["tokens"] for turn in turns] == [32, 32]
            assert all(0 < turn["sampling_s"] < turn["seconds"] for turn in turns)
    assert "| float32 | 20 | 8 each | mlx_lora | 2 |" in ran.stdout


def test_a_runs_cost_is_read_from_its_metrics(module):
    rates = {"rollout_tokens_per_s": 50.0, "rollout_share": 0.5}
    validated = {"rollout_tokens_per_s": 9.0, "rollout_share": 0.1, "loss": None}
    records = [
        {"step": 0, "elapsed_s": 2.0, "reward": 0.2, "peak_memory_bytes": 1, **validated},
        {"step": 4, "elapsed_s": 9.0, "reward": 0.4, "peak_memory_bytes": 2, "loss": 1.0, **rates},
        {"step": 8, "elapsed_s": 20.0, "reward": 0.6, "peak_memory_bytes": 3, "loss": 1.0, **rates},
        {"step": 8, "elapsed_s": 24.0, "reward": 0.5, "peak_memory_bytes": 3, **validated},
    ]
    found = module("reward_learning").cost(records)
    assert (found["steps"], found["seconds"], found["rollout_tokens_per_s"]) == (8, 24.0, 50.0)
    assert found["trained_rewards"] == [(4, 0.4), (8, 0.6)]
    assert found["validation_rewards"] == [(0, 0.2), (8, 0.5)]


@pytest.mark.slow
def test_reward_learning_measures_each_part(tiny_folder, tmp_path):
    """With a reward of two parts, each is measured on the test file, before and after, with the same random streams."""
    rows = [{"prompt": f"Say {n}.", "answer": str(n)} for n in range(12)]
    (tmp_path / "data").mkdir()
    for name, part in (("train", rows[:6]), ("valid", rows[6:9]), ("test", rows[9:])):
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    (tmp_path / "parts.py").write_text(
        "def odd(completions, **c): return [sum(ord(x) % 2 for x in t) / max(1, len(t)) for t in completions]\n"
        "def one(completions, answer, **c): return [len(right) for right in answer]\n"
    )
    settings = {
        "data": str(tmp_path / "data"), "objective": "grpo", "reward": f"{tmp_path}/parts.py:odd,{tmp_path}/parts.py:one",
        "reward_weights": "1,0.5", "group_size": 6, "max_new_tokens": 8, "batch_size": 2, "iters": 12, "learning_rate": 0.01,
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(settings))
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "reward_learning.py"), "--model", str(tiny_folder)]
    command += ["--config", str(tmp_path / "mine.yaml"), "--seeds", "0,3", "--answers", "5", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(out.read_text())
    assert set(result["rewards"]) == {"base", "0", "3"}
    assert {run["steps"] for run in result["runs"].values()} == {12}
    for found in result["rewards"].values():
        sampled = found["sampled"]
        assert sampled["parts"]["one"] == pytest.approx((1 + 2 + 2) / 3)
        assert sampled["reward"] == pytest.approx(sampled["parts"]["odd"] + 0.5 * sampled["parts"]["one"])
        assert len(found["greedy"]["texts"]) == found["prompts"] == 3
    before = result["rewards"]["base"]["sampled"]["parts"]["odd"]
    assert all(result["rewards"][seed]["sampled"]["parts"]["odd"] > before + 0.05 for seed in ("0", "3"))
    assert "| 0 | 12 |" in ran.stdout
