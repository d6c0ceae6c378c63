"""A sweep by another number than the loss: what it orders by, says and draws is that number, and equal ones are told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.api.train import SweepJob
from mlx_lora.config.load import train_settings
from mlx_lora.reports.sweep_page import SweepResults, advice, write_page
from mlx_lora.trainer.find_learning_rate import _reason, rounds_for
from mlx_lora.trainer.sweep import DIVERGED, Score, Sweep, SweepState, held_out_curve, results_of, trials_of

RATES = [{"learning_rate": rate} for rate in (1e-4, 1e-3, 1e-2)]
BETAS = [{"beta": beta} for beta in (0.1, 0.3, 0.5)]


def state_of(candidates: list[dict], *rounds: list[Score], metric: str = "accuracy") -> tuple[SweepState, SweepResults]:
    """Return a sweep's state and results; each round has a score for the first candidates."""
    entries = [
        [
            {
                "name": str(of),
                "candidate": of,
                "seed": 0,
                "step": 10 * (at + 1),
                "loss": score.loss,
                "error": score.error,
            }
            for of, score in enumerate(scores)
        ]
        for at, scores in enumerate(rounds)
    ]
    state = SweepState({}, candidates, {"": 100}, entries)
    state.winner = next(iter(state.scores(len(rounds) - 1)))
    return state, results_of(state, metric, {})


def test_the_metric_orders_the_table_and_is_what_is_told(tmp_path):
    """The best by accuracy has the highest loss."""
    state, found = state_of(RATES, [Score(0.5, 0.4), Score(0.25, 0.7), Score(0.125, 0.9)])
    assert state.winner == 2
    assert list(found.last()) == list(state.scores(0)) == [2, 1, 0]
    assert [row["accuracy"] for row in found.table()] == [0.875, 0.75, 0.5]
    said = advice(found)
    assert "accuracy 0.8750" in said
    assert "loss" not in said
    write_page(tmp_path / "sweep.html", found)
    page = (tmp_path / "sweep.html").read_text()
    assert "accuracy at step 10" in page
    assert "loss" not in page.split("</style>")[-1]
    assert "0.9000" not in page
    after = replace(found, val_loss=0.3, val_score=0.9375)
    assert "accuracy 0.9375 after its whole run" in advice(after)


@pytest.mark.parametrize(("candidates", "best"), [(RATES, 1), (BETAS, 0)])
def test_equal_numbers_are_told_and_decided_by_losses_that_can_be_compared(candidates, best):
    """Losses under other betas mean other things."""
    state, found = state_of(candidates, [Score(0.125, 0.9), Score(0.125, 0.2), Score(0.5, 0.1)])
    assert state.winner == best
    assert list(found.last()) == list(state.scores(0))
    said = advice(found)
    assert "the same accuracy" in said
    assert ("a higher loss" in said) == (candidates is RATES)


def test_a_tie_of_an_earlier_round_is_told():
    said = advice(state_of(BETAS, [Score(0.125, 0.9)] * 3, [Score(0.0, 0.9), Score(0.5, 0.2)])[1])
    assert "--beta 0.5 had the same" in said
    assert "--beta 0.3" not in said


def test_what_diverged_is_the_last_and_means_over_seeds_are_equal_in_any_order():
    state, found = state_of(BETAS, [DIVERGED, Score(float("inf"), 0.5), Score(0.5, 0.5)])
    assert list(found.last()) == list(state.scores(0)) == [2, 1, 0]
    seeds = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]
    entries = [
        {"name": "", "candidate": of, "seed": 0, "step": 1, "loss": 1.0 - of, "error": error}
        for of, errors in enumerate(seeds)
        for error in errors
    ]
    assert list(SweepState({}, RATES[:2], {}, [entries]).scores(0)) == [1, 0]


@pytest.mark.parametrize(
    ("losses", "last", "said"),
    [
        ([1.0, 1.005, 1.009], 0, "from 0.0001 to 0.01"),
        ([0.5, 1.0, 1.005], 1, "from 0.001 to 0.01"),  # the first was much better in the first round
        ([1.0, 9.0, 1.0], 0, None),  # not from the first to the last
        ([1.0, 2.0, 3.0], 0, None),
    ],
)
def test_as_good_is_about_the_same_loss_on_both_sides(losses, last, said):
    state, _ = state_of(RATES, [Score(0.0, loss) for loss in losses], metric="loss")
    state.winner = last
    found = advice(results_of(state, "loss", {}))
    assert ("within" in found) == bool(said)
    assert not said or said in found
    assert "within" not in advice(results_of(state, "accuracy", {}))


def test_curves_are_of_the_number_that_decides(tmp_path):
    lines: list[dict[str, Any]] = [
        {"step": 0, "val_loss": 0.7, "accuracy": 0.1},
        {"step": 2, "val_loss": None, "accuracy": 0.2},  # of the rows that are trained on
        {"step": 4, "val_loss": 0.6, "accuracy": 0.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert held_out_curve(tmp_path) == [(0, 0.7), (4, 0.6)]
    assert held_out_curve(tmp_path, "accuracy") == [(4, 0.75)]


def test_the_reason_of_a_rate_is_the_number_that_decided(tmp_path):
    settings = train_settings({"model": "m", "objective": "dpo", "metric_for_best_model": "accuracy"})
    trials = trials_of(settings, RATES, 1, tmp_path)
    sweep = Sweep(
        tmp_path, state_of(RATES, [Score(0.5, 0.4), Score(0.25, 0.7), Score(0.125, 0.9)])[0], trials, rounds_for(3)
    )
    said = _reason(sweep, trials[2])
    assert "highest held-out accuracy" in said
    assert "0.01: 0.8750; 0.001: 0.7500" in said
    assert "loss" not in said


@pytest.mark.slow
def test_betas_are_compared_by_accuracy_from_beginning_to_end(tiny_folder, tmp_path):
    rows = [{"prompt": f"Say {n % 7}", "chosen": "abc" * (1 + n % 4), "rejected": "xyz"} for n in range(40)]
    data: Path = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = train_settings({
        "model": str(tiny_folder), "data": str(data), "objective": "dpo", "metric_for_best_model": "accuracy", "iters": 10,
        "batch_size": 4, "rank": 4, "valid_fraction": 0.2, "sample_tokens": 0, "kernels": "ours",
    })  # fmt: skip
    job = SweepJob(settings, tmp_path / "out", ("beta=0.1,0.5",), budget=2.0)
    job.run()
    found = job.sweep.compared()
    assert 0 <= (found.val_score or 0) <= 1
    assert f"accuracy {found.val_score:.4f} after its whole run" in advice(found)
    assert found.table()[0]["beta"] == found.candidates[found.winner or 0]["beta"]
    state = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert state["val_score"] == found.val_score
