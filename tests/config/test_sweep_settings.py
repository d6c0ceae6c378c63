"""What a sweep tries, and how its work is divided."""

from __future__ import annotations

import itertools

import pytest
from refusing import refuses

from mlx_lora.config.load import train_settings
from mlx_lora.config.sweep import (
    BUDGET,
    Rung,
    TooShort,
    candidates,
    check_long_enough,
    check_varied,
    read_budget,
    read_vary,
    rungs,
    with_candidate,
    without_last_round,
    words,
    work,
)
from mlx_lora.utils.errors import InputError


def test_a_range_has_equal_ratios_and_both_ends():
    values = read_vary(["learning_rate=5e-5..2e-3/12"])["learning_rate"]
    assert len(values) == 12
    assert (values[0], values[-1]) == (5e-5, 2e-3)
    ratios = [b / a for a, b in itertools.pairwise(values)]
    assert max(ratios) < 1.02 * min(ratios)


def test_a_range_without_a_count_about_doubles():
    assert read_vary(["rank=8..64"]) == {"rank": [8, 16, 32, 64]}
    values = read_vary(["--learning-rate=5e-5..2e-3"])["learning_rate"]
    assert all(1.6 < b / a < 2.5 for a, b in itertools.pairwise(values))


def test_lists_are_read_as_their_settings_are_and_combined():
    vary = read_vary(["rank=8, 16,8", "method=lora,dora", "learning_rate=1e-3"])
    assert vary == {"rank": [8, 16], "method": ["lora", "dora"], "learning_rate": [1e-3]}
    found = candidates(vary)
    assert len(found) == 4
    assert {"rank": 16, "method": "lora", "learning_rate": 1e-3} in found
    assert words(found[0]) == "--rank 8 --method lora --learning-rate 0.001"
    assert read_vary({"rank": [4, 8], "learning_rate": "1e-4..1e-3/2"}) == {
        "rank": [4, 8],
        "learning_rate": [1e-4, 1e-3],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate=2e-3..5e-5", "smaller to a larger"),
        ("learning_rate=1e-3..1e-3", "smaller to a larger"),
        ("learning_rate=0..1e-3", "above 0"),
        ("learning_rate=a..b", "not a range"),
        ("learning_rate=1e-4..1e-3/1", "from 2 to"),
        ("learning_rate=1e-4..1e-3/x", "not a range"),
        ("learning_rate", "no setting with values"),
        ("learning_rate=", "no setting with values"),
        ("learning_rate=,", "no values"),
        ("learning_rate=fast", "not a number"),
        ("rank=0,8", "at least 1"),
        ("method=lora..dora", "only numbers have a range"),
        ("method=lora,lara", "not one of"),
        ("lerning_rate=1e-3,1e-4", "learning_rate"),
        ("seed=1,2", "--seeds"),
        ("model=a,b", "vary another"),
        ("save_every=1,2", "vary another"),
        ("rank=1..65536/64", "64"),
    ],
)
def test_what_is_no_range_is_one_line(text, said):
    if text.startswith("rank=1.."):
        refuses("combinations", read_vary, [text, "alpha=1..100/64"])
        return
    refuses(said, read_vary, [text])


def test_a_setting_is_given_once():
    refuses("twice", read_vary, ["rank=8,16", "rank=32"])


@pytest.mark.parametrize(
    ("count", "seeds", "budget"), [(2, 1, 2.0), (6, 1, BUDGET), (12, 2, 6.0), (24, 3, 10.0), (256, 1, 20.0)]
)
def test_rounds_take_the_budget_and_end_with_few(count, seeds, budget):
    rounds = rungs(count, seeds, budget)
    assert work(rounds, seeds) + 1 == pytest.approx(budget)
    assert rounds[0].candidates == count
    assert rounds[-1].candidates <= 3
    assert all(a.share < b.share and a.candidates > b.candidates for a, b in itertools.pairwise(rounds))


def test_a_round_fewer_takes_the_same_work_and_makes_the_others_longer():
    rounds = rungs(12, 2, 6.0)  # a quarter of a grid of 12 rates and 2 seeds
    fewer = without_last_round(rounds, 2)
    assert [rung.candidates for rung in fewer] == [rung.candidates for rung in rounds[:-1]]
    assert work(fewer, 2) == pytest.approx(work(rounds, 2))
    assert all(longer.share > rung.share for longer, rung in zip(fewer, rounds, strict=False))
    assert [rung.steps(32) for rung in fewer] == [4, 12]


def test_rounds_never_go_beyond_a_whole_run():
    assert rungs(3, 1, 100) == [Rung(3, 1.0)]
    rounds = rungs(30, 1, 25)
    assert max(rung.share for rung in rounds) <= 1 + 1e-9
    assert work(rounds, 1) + 1 <= 25 + 1e-6
    assert [rung.steps(10) for rung in (Rung(2, 0.001), Rung(2, 1.0))] == [1, 10]


def test_budgets():
    assert read_budget("3x") == read_budget(3) == read_budget(" 3.0X") == 3
    for text in ("", "x", "-1x", "nan", "inf", "three"):
        refuses("3x", read_budget, text)
    refuses("give more", rungs, 4, 1, 1.0)


def test_rounds_that_are_too_short_say_what_would_do():
    rounds = rungs(12, 1, 2.0)
    with pytest.raises(TooShort, match=r"--budget (\d+)x") as refused:
        check_long_enough(rounds, 40, 1, 5)
    enough = float(str(refused.value).split("--budget ")[1].split("x")[0])
    check_long_enough(rungs(12, 1, enough), 40, 1, 5)


@pytest.mark.parametrize(
    ("vary", "given", "said"),
    [
        ({"batch_tokens": [64, 512]}, {"batch_size": 4}, "--batch-size 4"),
        ({"weight_decay": [0.0, 0.1]}, {"optimizer": "adam"}, "--optimizer adam"),
        ({"weight_decay": [0.01, 0.1], "optimizer": ["adam", "adamw"]}, {}, "--optimizer adam"),
        ({"rank": [4, 8]}, {"method": "full"}, "--method full"),
        ({"iters": [10, 20], "epochs": [1.0, 2.0]}, {}, "only one of the two"),
        ({"beta": [0.1, 0.3]}, {"objective": "dpo"}, "changes the loss"),
    ],
)
def test_what_changes_nothing_is_not_varied(vary, given, said):
    flat = train_settings(given).to_flat()
    with pytest.raises(InputError, match=said) as refused:
        check_varied(candidates(vary), flat)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("vary", "given"),
    [
        ({"batch_tokens": [64, 512]}, {}),
        ({"batch_size": [2, 4]}, {"batch_tokens": 512}),
        ({"weight_decay": [0.01, 0.1]}, {}),
        ({"rank": [4, 8]}, {}),
        ({"beta": [0.1, 0.3]}, {"objective": "dpo", "metric_for_best_model": "accuracy"}),
    ],
)
def test_what_changes_a_run_is_varied(vary, given):
    check_varied(candidates(vary), train_settings(given).to_flat())


@pytest.mark.parametrize(
    ("given", "varied"), [("iters", "epochs"), ("epochs", "iters"), ("batch_tokens", "batch_size")]
)
def test_a_candidate_overrides_the_setting_of_the_same_meaning(given, varied):
    flat = train_settings({given: 30, "rank": 3}).to_flat()
    found = train_settings(with_candidate(flat, {varied: 2})).to_flat()
    assert (found[given], found[varied], found["rank"]) == (None, 2, 3)
