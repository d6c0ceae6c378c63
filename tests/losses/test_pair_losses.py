"""Pairwise losses against TRL's own code, values and gradients."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.losses import preference as pair_losses
from mlx_lora.losses.preference import PAIR_LOSSES, PairOptions, Pairs, preferred
from mlx_lora.objectives.reference import AnswerSums
from mlx_lora.objectives.table import objective_of

WIDTH, COUNT = 9, 5


def pairs_of(logps: mx.array, reference: np.ndarray, mask: np.ndarray, padding: int = 0) -> Pairs:
    """Return (2 E, T) log-probabilities, chosen rows first, as pairs; `padding` empty ones among them."""
    count = len(mask) // 2
    sums, tokens = logps.sum(axis=1), mask.sum(axis=1).astype(np.float32)
    nll = -sums[:count] * (count / tokens[:count].sum())
    fields = [sums[:count], sums[count:], reference[:count], reference[count:], tokens[:count], tokens[count:], nll]
    fields = [mx.array(field).astype(mx.float32) for field in [*fields, np.ones(count)]]
    where = [1, 3][:padding]
    return Pairs(*(_with_zeros(field, where) for field in fields))


def _with_zeros(values: mx.array, where: list[int]) -> mx.array:
    for index in where:
        values = mx.concatenate([values[:index], mx.zeros((1,)), values[index:]])
    return values


def our_loss(names, logps, reference, mask, weights=None, padding=0, **options):
    """Return the mean loss over pairs and its gradient in `logps`."""

    def loss(x):
        pairs = pairs_of(x, reference, mask, padding)
        weighted = zip(names, weights or [1.0] * len(names), strict=True)
        total = sum(weight * PAIR_LOSSES[name](pairs, PairOptions(**options)) for name, weight in weighted)
        return (total * pairs.real).sum() / pairs.real.sum()

    value, gradient = mx.value_and_grad(loss)(mx.array(logps).astype(mx.float32))
    return value.item(), np.array(gradient) * mask


def relative(found, wanted) -> float:
    return float(np.linalg.norm(np.subtract(found, wanted)) / np.linalg.norm(wanted))


@pytest.mark.parity
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("name", list(PAIR_LOSSES))
def test_each_loss_type_is_trls(name, padding):
    from trl_judge import dpo_loss, random_answers

    logps, reference, mask = random_answers(COUNT, WIDTH)
    options = {"beta": 0.3, "label_smoothing": 0.1}
    wanted, gradient, _ = dpo_loss([name], logps, reference, mask, **options)
    found, ours = our_loss([name], logps, reference, mask, padding=padding, **options)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert relative(ours, gradient * mask) < 1e-5
    swapped = np.concatenate([logps[COUNT:], logps[:COUNT]])
    assert abs(our_loss([name], swapped, reference, mask, **options)[0] - wanted) > 1e-3 * abs(wanted)
    if name != "sft":
        assert abs(our_loss([name], logps, reference, mask, beta=0.2, label_smoothing=0.1)[0] - wanted) > 1e-4


@pytest.mark.parity
def test_several_loss_types_with_weights_are_trls():
    from trl_judge import dpo_loss, random_answers

    logps, reference, mask = random_answers(COUNT, WIDTH, seed=1)
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    wanted, gradient, _ = dpo_loss(names, logps, reference, mask, weights=weights)
    found, ours = our_loss(names, logps, reference, mask, weights=weights)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert relative(ours, gradient * mask) < 1e-5
    assert abs(our_loss(names, logps, reference, mask)[0] - wanted) > 1e-3


@pytest.mark.parity
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_without_a_reference_are_trls(smoothing):
    from trl_judge import cpo_loss, orpo_loss, random_answers

    logps, reference, mask = random_answers(COUNT, WIDTH, seed=2)
    pairs = pairs_of(mx.array(logps), reference, mask)
    options = PairOptions(beta=0.4, label_smoothing=smoothing, simpo_gamma=0.7)
    sums, tokens = logps.sum(axis=1), mask.sum(axis=1)
    mean = sums / tokens
    words = {"beta": 0.4, "label_smoothing": smoothing, "simpo_gamma": 0.7}
    cases = (
        (pair_losses.cpo, cpo_loss("sigmoid", sums[:COUNT], sums[COUNT:], **words)),
        (pair_losses.simpo, cpo_loss("simpo", mean[:COUNT], mean[COUNT:], **words)),
        (pair_losses.odds_ratio, orpo_loss(mean[:COUNT], mean[COUNT:], 0.4)),
    )
    for function, wanted in cases:
        assert relative(np.array(function(pairs, options)), wanted) < 1e-5
        other = PairOptions(beta=0.5, label_smoothing=smoothing, simpo_gamma=0.7)
        assert relative(np.array(function(pairs, other)), wanted) > 1e-3


def test_sure_answers_give_finite_losses_and_gradients():
    """A policy that is sure of both answers: ORPO's log(1 - p) must not become infinite or NaN."""
    logps, mask = np.full((2 * COUNT, WIDTH), -1e-6), np.ones((2 * COUNT, WIDTH), bool)

    def loss(x):
        return pair_losses.odds_ratio(pairs_of(x, np.zeros(2 * COUNT), mask), PairOptions()).sum()

    value, gradient = mx.value_and_grad(loss)(mx.array(logps).astype(mx.float32))
    assert np.isfinite(value.item())
    assert np.isfinite(np.array(gradient)).all()
    assert np.abs(np.array(gradient)).max() > 0


def test_a_difference_that_rounding_makes_is_no_preference():
    bad, differences = mx.full((5,), -80.0), mx.array([0.0, 2e-4, -2e-4, 0.05, -0.05])
    assert preferred(bad + differences, bad, mx.abs(2 * bad)).tolist() == [0, 0, 0, 1, 0]
    # The same difference of scores near 0 is one.
    assert preferred(differences, 0 * bad, mx.abs(differences)).tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo", "cpo", "reward"])
def test_pairs_that_differ_by_rounding_are_not_counted_as_preferred(objective):
    """Two pairs: one whose answers differ by rounding only, and one whose answers differ."""
    given = objective_of(ObjectiveSettings(objective=objective))
    logps, zeros = mx.array([-80.0, -80.00001, -80.0, -81.0]), mx.zeros((4,))  # chosen, rejected, chosen, rejected
    reference = mx.full((4,), -80.0) if given.options.row.reference else zeros
    sums = AnswerSums(logps, mx.full((4,), 10.0), zeros, reference, zeros, mx.ones((4,)), mx.array(0.0))
    assert given.loss(sums)[1]["accuracy"].tolist() == [0, 1]


def test_padding_takes_no_part_in_any_loss():
    """A pair of nothing has zeros everywhere: no loss may make a NaN of it, in value or gradient."""
    zeros = mx.zeros((2,))
    one = mx.array([0.0, 1.0])
    functions = [*PAIR_LOSSES.values(), pair_losses.simpo, pair_losses.cpo, pair_losses.odds_ratio]
    for function in functions:

        def loss(x, function=function):
            pairs = Pairs(x, 2 * x, zeros, zeros, 3 * one, 4 * one, zeros, one)
            return (function(pairs, PairOptions(label_smoothing=0.1)) * pairs.real).sum()

        value, gradient = mx.value_and_grad(loss)(mx.array([0.0, -2.0]))
        assert np.isfinite(value.item()), function
        assert np.isfinite(np.array(gradient)).all(), function
        assert function is pair_losses.sft or abs(gradient[1].item()) > 0, function
        assert gradient[0].item() == 0, function
