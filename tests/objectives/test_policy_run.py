"""Sampled answers through the command: rewards rise, every option counts, and bad input is one line.

Slow: a model that half knows sums, a format, or how to use a tool, learns the rest from rewards alone."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model, write_folder
from resumed_runs import metrics, stopped_after, weights
from run_cli import one_line, run, succeeds
from tool_model import shelf_folder
from verifiers_environments import SHELF, write_environments

from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import SAMPLING
from mlx_lora.config.rules import OWNERS
from mlx_lora.losses.grpo import group_advantages
from mlx_lora.objectives.grpo import POLICY_REPORTS
from mlx_lora.objectives.policy_arrays import ADVANTAGES, REWARDS
from mlx_lora.rollouts.make_environment import close_hosts, rehearse
from mlx_lora.rollouts.rollout import Rollouts

REWARD = """
def odd(prompts, completions, completion_ids, answer, **columns):
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer)
    return [sum(ord(letter) % 2 for letter in text) / max(1, len(text)) for text in completions]

def broken(completions, **columns):
    raise KeyError("the key")
"""
QUICK = ("--learning-rate", "1e-2", "--batch-size", 2, "--group-size", 6, "--max-new-tokens", 8, "--sample-tokens", 0,
         "--kernels", "ours", "--val-batches", 1, "--steps-per-report", 1, "--rank", 4)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1), "level": n % 3} for n in range(16)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "mine.py").write_text(REWARD)
    return folder


def command(model, data, folder, objective: str, *more: object) -> tuple:
    return ("train", "--model", model, "--data", data / "prompts.jsonl", "--adapter-path", folder,
            "--objective", objective, "--reward", f"{data / 'mine.py'}:odd", *QUICK, *more)  # fmt: skip


SLOW = pytest.mark.slow


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [
        ("grpo",),
        pytest.param(("rloo", "--kl-beta", 0.01), marks=SLOW),
        pytest.param(("grpo", "--grpo-loss", "dr_grpo"), marks=SLOW),
    ],
)
def test_the_reward_rises(flags, tiny_folder, data, tmp_path):
    succeeds(*command(tiny_folder, data, tmp_path / "a", *flags, "--iters", 30, "--steps-per-eval", 30))
    found = metrics(tmp_path / "a")
    first, last = (line["reward"] for line in found if line["val_loss"] is not None)
    assert last > first + 0.1
    trained = [line for line in found if line["loss"] is not None]
    assert all(line["rollout_tokens_per_s"] > 0 and 0 < line["rollout_share"] < 1 for line in trained)
    assert set(POLICY_REPORTS) <= trained[0].keys()
    assert not [name for name in trained[0] if "/" in name]  # one reward has no mean of its own
    assert all(line["reward_std"] > 0 and 0 <= line["frac_reward_zero_std"] < 1 for line in trained)
    assert any(line["kl"] > 0 for line in trained) == ("--kl-beta" in flags)
    assert "Held-out reward" in (tmp_path / "a" / "report.html").read_text()
    measured = succeeds(
        "evaluate", "--model", tiny_folder, "--adapter-path", tmp_path / "a", "--data", data / "prompts.jsonl",
        "--objective", "grpo", "--reward", f"{data / 'mine.py'}:odd", "--max-new-tokens", 8, "--json",
    )  # fmt: skip
    assert json.loads(measured.out)["reward"] > first + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("grpo",),
        ("grpo", "--updates-per-rollout", 2, "--grad-accumulation-steps", 2, "--grpo-loss", "gspo"),
        ("rloo", "--kl-beta", 0.05, "--dropout", 0.1),
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes(flags, tiny_folder, data, tmp_path):
    """With several updates of a rollout: test_objectives.py."""
    asked = (*flags, "--iters", 8, "--save-every", 2)
    succeeds(*command(tiny_folder, data, tmp_path / "whole", *asked))
    rest = stopped_after(tmp_path / "whole", tmp_path / "rest", 4)
    succeeds(*command(tiny_folder, data, rest, *asked, "--resume"))
    assert weights(rest) == weights(tmp_path / "whole")


def test_the_batch_whose_deviation_scales_rewards_is_the_step(tiny_folder, data, tmp_path, monkeypatch):
    """It was the micro-batch: with one prompt in each, `batch` was the same as `group`."""
    (tmp_path / "levels.py").write_text(
        "def levels(completions, answer, **columns):\n"
        "    return [int(one) ** 2 * (n % 2) for n, one in enumerate(answer)]\n"
    )
    seen, answer = [], Rollouts.answer

    def kept(self, batches, rows, first, state=None):
        found = answer(self, batches, rows, first, state)
        seen.extend([found] if state else [])
        return found

    monkeypatch.setattr(Rollouts, "answer", kept)
    one_each = ("--batch-size", 1, "--grad-accumulation-steps", 4, "--group-size", 2, "--shared-prefix", "off")
    succeeds(*command(tiny_folder, data, tmp_path / "a", "grpo", *one_each, "--iters", 1, "--scale-rewards", "batch",
                       "--reward", f"{tmp_path / 'levels.py'}:levels"))  # fmt: skip
    [step] = seen
    rewards, advantages = (
        np.concatenate([batch.columns[name][batch.real] for batch in step]) for name in (REWARDS, ADVANTAGES)
    )
    assert len(rewards) == 8
    np.testing.assert_allclose(advantages, group_advantages(rewards, 2, "batch"), rtol=1e-5)


@pytest.mark.long
def test_a_second_update_uses_the_ratio(tiny_folder, data, tmp_path):
    """With one update the ratio is 1; with several the policy has moved away from the one that sampled."""
    for updates in (1, 4):
        flags = ("--updates-per-rollout", updates, "--iters", 4, "--warmup", 0, "--epsilon", 0.01, "--save-every", 4)
        assert run(*command(tiny_folder, data, tmp_path / str(updates), "grpo", *flags)).code == 0
    once, several = (
        [line["clipped"] for line in metrics(tmp_path / str(updates)) if line["loss"] is not None] for updates in (1, 4)
    )
    assert not any(once)
    assert several[0] == 0
    assert several[-1] > 0


def test_messages_are_rewarded_as_messages(tiny_folder, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{n}?"}], "level": n} for n in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "r.py").write_text(
        "def r(prompts, completions, level, **c):\n"
        "    assert prompts[0][0]['role'] == 'user' and completions[0][0]['role'] == 'assistant'\n"
        "    assert all(int(p[-1]['content'][:-1]) == n for p, n in zip(prompts, level))\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    succeeds("train", "--model", tiny_folder, "--data", tmp_path / "p.jsonl", "--adapter-path", tmp_path / "a",
              "--objective", "grpo", "--reward", f"{tmp_path / 'r.py'}:r", *QUICK, "--iters", 1)  # fmt: skip


def test_a_failing_reward_ends_the_run_or_is_skipped(tiny_folder, data, tmp_path):
    broken = ("--reward", f"{data / 'mine.py'}:broken", "--iters", 2, "--val-batches", 0)
    ran = run(*command(tiny_folder, data, tmp_path / "a", "grpo", *broken))
    assert ran.code == 1
    assert "KeyError" in ran.err
    assert "Traceback" not in ran.err
    ran = succeeds(*command(tiny_folder, data, tmp_path / "b", "grpo", *broken, "--reward-errors", "skip"))
    assert "skipped" in ran.err


BAD = {
    "no reward": (("--reward", ""), "requires --reward"),
    "a reward without sampling": (("--objective", "dpo"), "--reward"),
    "saves between updates": (("--updates-per-rollout", 3, "--iters", 6, "--save-every", 2), "a multiple of 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tiny_folder, data, tmp_path):
    flags, words = BAD[case]
    one_line(run(*command(tiny_folder, data, tmp_path / "a", "grpo", *flags)), words)


# By name: the run to compare with, and what is added to it.
CHANGES = {
    "reward": ((), ("--reward", "length:4")),
    "reward_weights": ((), ("--reward-weights", "3")),
    "group_size": ((), ("--group-size", 4)),
    "max_new_tokens": ((), ("--max-new-tokens", 4)),
    "temp": ((), ("--temp", 0.5)),
    "top_p": ((), ("--top-p", 0.5)),
    "min_p": ((), ("--min-p", 0.5)),
    "epsilon": (("--updates-per-rollout", 2), ("--epsilon", 1e-6)),
    "epsilon_high": (("--updates-per-rollout", 2), ("--epsilon-high", 1e-6)),
    "kl_beta": ((), ("--kl-beta", 1)),
    "mask_truncated": ((), ("--mask-truncated",)),
    "updates_per_rollout": ((), ("--updates-per-rollout", 2)),
    "grpo_loss": ((), ("--grpo-loss", "dr_grpo")),
    "scale_rewards": ((), ("--scale-rewards", "none")),
}


def test_every_option_is_tried():
    own = {name for name, owners in OWNERS.items() if set(owners) & set(SAMPLING)}
    # A reward that fails: above, and test_rewards.py. Rows that are shared change nothing: test_shared_prefix.py.
    # Episodes of several turns: test_environment.py, test_tool_env.py. Pictures: test_vision_run.py.
    assert set(CHANGES) == own - {
        "images",
        "reward_errors",
        "reward_timeout",
        "shared_prefix",
        "environment",
        "tools",
        "max_turns",
    }


@pytest.fixture(scope="module")
def plain(tiny_folder, data, tmp_path_factory):
    """What is compared of runs without the option under test, each made once."""
    known = {}

    def outcome(*more: object) -> list:
        if more not in known:
            known[more] = outcome_of(tiny_folder, data, tmp_path_factory.mktemp("plain") / "a", *more)
        return known[more]

    return outcome


def outcome_of(model, data, folder: Path, *more: object) -> list:
    succeeds(*command(model, data, folder, "grpo", "--iters", 4, "--warmup", 0, "--save-every", 4, *more))
    names = ("loss", "val_loss", "grad_norm", *POLICY_REPORTS)
    return [{name: line.get(name) for name in names} for line in metrics(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_run(name, tiny_folder, data, plain, tmp_path):
    common, more = CHANGES[name]
    assert outcome_of(tiny_folder, data, tmp_path / "a", *common, *more) != plain(*common)


@pytest.mark.slow
def test_without_options_the_run_is_the_same(tiny_folder, data, plain, tmp_path):
    assert outcome_of(tiny_folder, data, tmp_path / "a") == plain()


SIZES = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reward_on_held_out_prompts_rises(seed, sums, tmp_path, capsys):
    succeeds(
        "train", "--model", sums / "base", "--data", sums / "prompts", "--adapter-path", tmp_path / "a",
        "--objective", "grpo", "--reward", "exact_match", "--group-size", 8, "--batch-size", 8, "--max-new-tokens", 10,
        "--iters", 60, "--learning-rate", 2e-3, "--steps-per-eval", 20, "--val-batches", -1, "--sample-tokens", 0,
        "--seed", seed,
    )  # fmt: skip
    records = metrics(tmp_path / "a")
    held_out = [record["reward"] for record in records if record["val_loss"] is not None]
    trained = [record["reward"] for record in records if record["loss"] is not None]
    with capsys.disabled():
        print(f"\nseed {seed}: held-out reward {held_out[0]:.2f} to {held_out[-1]:.2f}, "
              f"trained {trained[0]:.2f} to {trained[-1]:.2f}")  # fmt: skip
    assert held_out[-1] > held_out[0] + 0.1
    assert trained[-1] > trained[0] + 0.2


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    return shelf_folder(tmp_path_factory.mktemp("shelf"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_share_of_right_answers_on_held_out_tasks_rises(seed, shelf, tmp_path, capsys):
    succeeds(
        "train", "--model", shelf / "base", "--data", shelf / "prompts", "--adapter-path", tmp_path / "a",
        "--objective", "grpo", "--environment", f"{shelf / 'shelf.py'}:Shelf", "--reward", f"{shelf / 'shelf.py'}:right",
        "--max-turns", 3, "--group-size", 8, "--batch-size", 8, "--max-new-tokens", 40, "--iters", 40, "--rank", 8,
        "--learning-rate", 2e-3, "--steps-per-eval", 20, "--steps-per-report", 5, "--val-batches", -1, "--sample-tokens", 0, "--seed", seed,
        "--kernels", "ours",
    )  # fmt: skip
    records = metrics(tmp_path / "a")
    held_out = [record for record in records if record["val_loss"] is not None]
    with capsys.disabled():
        for record in held_out:
            numbers = {name: round(value, 3) for name, value in record.items() if name == "reward" or "/" in name}
            print(f"\nseed {seed}, step {record['step']}: {numbers}", end="")
        print(f" ({records[-1]['elapsed_s']:.0f} s)")
    assert held_out[-1]["reward"] > held_out[0]["reward"] + 0.2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the package's own code
def test_more_right_answers_about_new_words(tmp_path, monkeypatch):
    pytest.importorskip("verifiers.v1", reason="pip install 'mlx-lora[verifiers]'")
    monkeypatch.syspath_prepend(str(write_environments(tmp_path, vl_shelf=SHELF)))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # the run adds the folder, for servers of tools
    for part in ("train", "test"):
        (tmp_path / f"{part}.toml").write_text(f"[env.taskset]\nid = 'vl_shelf'\nwords = '{part}'\n")
    objective = {"model": "m", "objective": "grpo", "environment": f"verifiers:{tmp_path / 'train.toml'}"}
    schemas = rehearse(train_settings(objective).objective).tools
    base = shelf_folder(tmp_path / "shelf", steps=250, schemas=schemas) / "base"
    common = ("--objective", "grpo", "--max-new-tokens", 30, "--max-turns", 2)

    def right(*adapter: object) -> float:
        test = ("--environment", f"verifiers:{tmp_path / 'test.toml'}", "--group-size", 32)
        return json.loads(succeeds("evaluate", "--model", base, *adapter, *test, *common, "--json").out)["reward"]

    trained = ("--environment", f"verifiers:{tmp_path / 'train.toml'}", "--adapter-path", tmp_path / "adapter")
    quick = ("--group-size", 16, "--batch-size", 4, "--iters", 20, "--learning-rate", 3e-3, "--warmup", 0, "--rank", 8,
             "--val-batches", 0, "--valid-fraction", 0, "--sample-tokens", 0, "--kernels", "ours")  # fmt: skip
    succeeds("train", "--model", base, *trained, *common, *quick)
    before, after = right(), right("--adapter-path", tmp_path / "adapter")
    close_hosts()
    print(f"right answers {before:.2f} to {after:.2f}")
    assert before < 0.6
    assert after > before + 0.2
