"""The host waits for the device at most once per step, beside reports: a GPU that is waited for has nothing to do."""

from __future__ import annotations

import json

import pytest
from rehearsal.host_syncs import counted_syncs
from run_cli import run, succeeds

from mlx_lora.trainer.step import Step

FEW, MANY = 6, 18


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}.", "chosen": "abc" * (1 + n % 3), "rejected": "cba" * (1 + n % 2)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def syncs_per_step(model, data, folder, *flags):
    """Return (waits per step, the places that wait once per step) from two runs that differ only in their length."""
    counts = []
    for steps in (FEW, MANY):
        with counted_syncs() as found:
            ran = run("train", "--model", model, "--data", data, "--adapter-path", folder / str(steps), "--iters", steps,
                "--batch-size", 2, "--sample-tokens", 0, "--steps-per-report", 1000, "--steps-per-eval", 0, "--save-every", 1000, *flags)  # fmt: skip
        assert ran.code == 0, ran.err
        counts.append(found)
    few, many = counts
    more = {place: (many[place] - few[place]) / (MANY - FEW) for place in many if many[place] > few[place]}
    return sum(more.values()), more


@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(("--method", "dora"), marks=pytest.mark.slow),
        pytest.param(("--grad-checkpoint", "block"), marks=pytest.mark.slow),
        ("--grad-accumulation-steps", "2"),
    ],
)
def test_a_step_waits_once(tiny_folder, chats, tmp_path, flags):
    waits, places = syncs_per_step(tiny_folder, chats, tmp_path, *flags)
    assert waits <= 1, places


def test_a_step_on_pairs_waits_once(tiny_folder, pairs, tmp_path):
    waits, places = syncs_per_step(tiny_folder, pairs, tmp_path, "--objective", "dpo")
    assert waits <= 1, places


def test_a_sampled_token_of_all_rows_waits_once(tiny_folder, pairs, tmp_path):
    (tmp_path / "reward.py").write_text("def odd(completions, **columns): return [len(one) % 2 for one in completions]")
    waits = []
    for tokens in (FEW, MANY):
        with counted_syncs() as found:
            succeeds("train", "--model", tiny_folder, "--data", pairs, "--adapter-path", tmp_path / str(tokens), "--iters", 1,
                     "--objective", "grpo", "--reward", f"{tmp_path / 'reward.py'}:odd", "--batch-size", 2, "--group-size", 4,
                     "--max-new-tokens", tokens, "--kernels", "ours", "--sample-tokens", 0, "--val-batches", 0)  # fmt: skip
        waits.append(sum(found.values()))
    assert FEW - MANY // 2 < waits[1] - waits[0] <= MANY - FEW


def test_a_second_wait_in_a_step_is_found(tiny_folder, chats, tmp_path, monkeypatch):
    plain = Step.__call__

    def waiting(self, *args, **named):
        result = plain(self, *args, **named)
        result.loss_sum.item()
        return result

    monkeypatch.setattr(Step, "__call__", waiting)
    waits, places = syncs_per_step(tiny_folder, chats, tmp_path)
    assert waits >= 2, places
