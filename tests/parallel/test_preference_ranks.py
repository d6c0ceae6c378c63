"""Objectives on more than single rows, in two processes, take the steps of one, or say that they do not."""

from __future__ import annotations

import json

import pytest
from rank_runs import assert_same_run, records
from ranks import Started

OF_TEXTS = {
    "classify": [{"text": f"{'warm' * (n % 3)} day {n}", "label": "abc"[n % 3]} for n in range(36)],
    "rerank": [
        {"query": f"Where is {n}?", "positive": f"{n}, here.", "negatives": [f"{n}, no.", "No."]} for n in range(24)
    ],
    "embed": [{"query": f"Where is {n}?", "positive": f"{n} is by the river."} for n in range(36)],
}
PAIRS = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No" + "!" * (n % 5)} for n in range(24)]
OBJECTIVES = ["dpo", "orpo", "kto", "reward", "classify", "rerank", "embed"]
# On a shared base, the second rank has no batch of the validation and computes one without rows.
SHARED = ["reward", "classify", "rerank", "embed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "shared"), [*((name, False) for name in OBJECTIVES), *((name, True) for name in SHARED)]
)
def test_two_ranks_take_the_steps_of_one(objective, shared, tiny_folder, tmp_path):
    rows = PAIRS
    if objective == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in rows
            for name in ("chosen", "rejected")
        ]
    rows = OF_TEXTS.get(objective, rows)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for count in (1, 2):
        command = ["-m", "mlx_lora.train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / str(count),
                   "--objective", objective, "--iters", 4, "--learning-rate", "5e-3", "--batch-size", 6, "--sample-tokens", 0,
                   "--steps-per-report", 1, "--val-batches", 1 if shared else 2, "--kernels", "ours"]  # fmt: skip
        command += ["--shard-base"] if shared and count > 1 else []
        ended = Started([command] * count, tmp_path / f"hosts{count}").wait()
        assert ended.codes == [0] * count, ended.errs
    rates = ("loss", "val_loss", "margin", "accuracy", "macro_f1", "mrr")
    assert_same_run(tmp_path / "1", tmp_path / "2", 1e-4, 1e-4, rates, ("step",))
    first, *_, last = records(tmp_path / "1")
    assert last["val_loss"] != pytest.approx(first["val_loss"], rel=1e-3)


@pytest.mark.slow
def test_two_ranks_say_that_each_sorts_its_own_pairs(tiny_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, PAIRS)))
    for loss_type, told in (("aot", [1, 0]), ("sigmoid", [0, 0])):
        command = ["-m", "mlx_lora.train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / loss_type,
                   "--objective", "dpo", "--loss-type", loss_type, "--iters", 2, "--batch-size", 6]  # fmt: skip
        ended = Started([command] * 2, tmp_path / f"hosts-{loss_type}").wait()
        assert ended.codes == [0, 0], ended.errs
        assert [err.count("--loss-type aot") for err in ended.errs] == told


@pytest.mark.slow
def test_the_first_of_two_ranks_scores_the_task_for_both(tiny_folder, tmp_path):
    rows = [{"prompt": f"Say {n}.", "completion": "abc"} for n in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
    scores = {}
    for count in (1, 2):
        command = ["-m", "mlx_lora.train", "--model", tiny_folder, "--data", tmp_path / "data.jsonl", "--adapter-path",
                   tmp_path / str(count), "--iters", 12, "--learning-rate", "1e-2", "--batch-size", 6, "--sample-tokens", 0,
                   "--kernels", "ours", "--steps-per-eval", 4, "--eval-tasks", tmp_path / "task.jsonl", "--eval-metric", "rouge_l",
                   "--eval-max-tokens", 6, "--metric-for-best-model", "task", "--early-stopping-patience", 2]  # fmt: skip
        ended = Started([command] * count, tmp_path / f"hosts{count}").wait()
        assert ended.codes == [0] * count, ended.errs
        scores[count] = [line["task"] for line in records(tmp_path / str(count)) if line["val_loss"] is not None]
    assert scores[1] == pytest.approx(scores[2])
    assert len(scores[1]) >= 3
