"""Answers sampled in groups: their distribution, their independence, and their log-probabilities."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import tiny_model

from mlx_lora.adapters.inject import adapter_parameters, inject, select_targets
from mlx_lora.data.batch import Batch
from mlx_lora.losses.agree import choose_loss
from mlx_lora.models import generator as group_sampling
from mlx_lora.models.generator import SamplingOptions, answer_keys
from mlx_lora.objectives.policy_arrays import at_temperature, token_logps

PROMPTS = [[5, 9, 3, 7, 7], [4, 8]]
NO_END = frozenset()


def sample_groups(*arguments):
    """Return the answers' tokens."""
    return group_sampling.sample_groups(*arguments)[0]


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    for layer in model.layers:  # far from uniform, so that a wrong distribution shows
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * 8
    model.eval()
    return model


def probabilities(model, tokens: list[int], temperature: float = 1.0) -> np.ndarray:
    return np.array(mx.softmax(model(mx.array([tokens]))[0, -1] / temperature), np.float64)


def test_frequencies_are_the_models_probabilities(model):
    """6,000 draws of the first and the second token: chi-square against the softmax."""
    draws, options = 6_000, SamplingOptions(3_000, 2, temperature=0.7)
    found = []
    for rollout in range(draws // options.group):
        found += sample_groups(model, PROMPTS[:1], options, NO_END, answer_keys(3, rollout, options.group))
    tokens = np.array(found)
    vocabulary = model.args.vocab_size
    wanted = probabilities(model, PROMPTS[0], 0.7)
    assert chi_square_surprise(np.bincount(tokens[:, 0], minlength=vocabulary), wanted) < 4
    uniform = np.full(vocabulary, 1 / vocabulary)
    assert chi_square_surprise(np.bincount(tokens[:, 0], minlength=vocabulary), uniform) > 20
    likeliest = int(wanted.argmax())
    after = tokens[tokens[:, 0] == likeliest, 1]
    wanted = probabilities(model, [*PROMPTS[0], likeliest], 0.7)
    assert chi_square_surprise(np.bincount(after, minlength=vocabulary), wanted) < 4


FILTERS = {
    "top_p": (1.0, {"top_p": 0.6}),
    "min_p": (1.0, {"min_p": 0.05}),
    "a temperature below 1": (0.7, {"top_p": 0.8, "min_p": 0.02}),
    "a temperature above 1": (1.5, {"top_p": 0.8, "min_p": 0.1}),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name if "above" in name else pytest.param(name, marks=pytest.mark.slow) for name in FILTERS]
)
def test_filtered_frequencies_are_those_of_transformers_warpers(name, model):
    """6,000 draws with filters: the tempered probabilities, of which unlikely tokens are left out."""
    temperature, filters = FILTERS[name]
    options = SamplingOptions(6_000, 1, temperature, **filters)
    found, logps = group_sampling.sample_groups(model, PROMPTS[:1], options, NO_END, answer_keys(4, 0, options.group))
    tokens = np.array(found)[:, 0]
    counts = np.bincount(tokens, minlength=model.args.vocab_size)
    tempered = probabilities(model, PROMPTS[0], temperature)
    kept = warped(tempered, **filters)
    assert 3 < kept.sum() < len(tempered)
    assert not counts[~kept].any()
    wanted = np.where(kept, tempered, 0)
    assert chi_square_surprise(counts, wanted / wanted.sum()) < 4
    assert chi_square_surprise(counts, kept / kept.sum()) > 20
    if temperature != 1:  # filters before the temperature would leave others
        assert kept.tolist() != warped(probabilities(model, PROMPTS[0]), **filters).tolist()
    # What the objective compares with is of all tokens, as in TRL.
    np.testing.assert_allclose(np.array(logps)[:, 0], np.log(tempered[tokens]), atol=1e-4)


def warped(tempered: np.ndarray, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Return which tokens transformers' TopPLogitsWarper and then MinPLogitsWarper keep after the temperature."""
    order = np.argsort(tempered)
    kept = np.zeros(len(tempered), bool)
    kept[order] = np.cumsum(tempered[order]) > 1 - top_p  # from the least likely token up
    kept[order[-1]] = True
    left = np.where(kept, tempered, 0) / tempered[kept].sum()
    return kept & (left >= min_p * left.max())


def chi_square_surprise(counts: np.ndarray, wanted: np.ndarray) -> float:
    """Return how many standard deviations a chi-square statistic is above its mean; rare tokens are put together."""
    expected = wanted * counts.sum()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    statistic = float(((counts - expected)[used] ** 2 / expected[used]).sum())
    freedom = used.sum() - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


def test_an_answer_does_not_depend_on_the_others(model):
    options, keys = SamplingOptions(4, 12), answer_keys(0, 7, 8)
    together = sample_groups(model, PROMPTS, options, NO_END, keys)
    assert together[4:] == sample_groups(model, PROMPTS[1:], options, NO_END, keys[4:])
    assert len(set(map(tuple, together[:4]))) == 4
    other = sample_groups(model, PROMPTS, options, NO_END, answer_keys(0, 8, 8))
    assert all(a != b for a, b in zip(together, other, strict=True))


def test_an_answer_ends_with_its_end_token(model):
    options = SamplingOptions(32, 20)
    free = sample_groups(model, PROMPTS, options, NO_END, answer_keys(1, 0, 64))
    end = free[0][3]
    ended = sample_groups(model, PROMPTS, options, frozenset([end]), answer_keys(1, 0, 64))
    for with_end, without in zip(ended, free, strict=True):
        stop = without.index(end) + 1 if end in without else len(without)
        assert with_end == without[:stop]
    assert min(map(len, ended)) <= 4
    assert max(map(len, ended)) == 20


def test_the_nucleus_and_the_floor_leave_out_unlikely_tokens(model):
    wanted = probabilities(model, PROMPTS[0])
    floor = 0.5
    for options in (SamplingOptions(400, 1, top_p=0.3), SamplingOptions(400, 1, min_p=floor)):
        drawn = {a[0] for a in sample_groups(model, PROMPTS[:1], options, NO_END, answer_keys(2, 0, 400))}
        order = np.argsort(-wanted)
        nucleus = order[: int(np.searchsorted(np.cumsum(wanted[order]), 0.3)) + 1]
        allowed = set(nucleus) if options.top_p < 1 else set(np.flatnonzero(wanted >= floor * wanted.max()))
        assert drawn <= allowed
    free = {a[0] for a in sample_groups(model, PROMPTS[:1], SamplingOptions(400, 1), NO_END, answer_keys(2, 0, 400))}
    assert len(free) > len(drawn)


def test_a_prompt_of_one_token_is_answered(model):
    options = SamplingOptions(3, 5)
    alone = sample_groups(model, [[4]], options, NO_END, answer_keys(0, 0, 3))
    both = sample_groups(model, [[4], PROMPTS[0]], options, NO_END, answer_keys(0, 0, 6))
    assert [len(answer) for answer in alone] == [5, 5, 5]
    keys = answer_keys(0, 0, 6)[:3]
    assert sample_groups(model, [[4]], options, NO_END, keys) == both[:3]


def test_greedy_sampling_is_the_models_own_choice(model):
    """Near temperature 0, the answers are those of the forward pass over the whole text."""
    (answer, _) = sample_groups(
        model, PROMPTS[:1], SamplingOptions(2, 8, temperature=1e-4), NO_END, answer_keys(0, 0, 2)
    )
    tokens = list(PROMPTS[0])
    for token in answer:
        assert token == int(nn.softmax(model(mx.array([tokens]))[0, -1]).argmax())
        tokens.append(token)


@pytest.fixture(params=["the base", "an adapter"])
def policy(request, model):
    """The model, or a copy with an adapter in place that changes what it says."""
    if request.param == "the base":
        return model
    adapted = copy.deepcopy(model)
    inject(adapted, select_targets(adapted).paths, 4, 2.0)
    factors = {
        name: 0.1 * mx.random.normal(values.shape, key=mx.random.key(len(name)))
        for name, values in adapter_parameters(adapted).items()
    }
    adapted.load_weights(list(factors.items()), strict=False)
    adapted.eval()
    assert np.abs(probabilities(adapted, PROMPTS[0]) - probabilities(model, PROMPTS[0])).max() > 1e-2
    return adapted


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_training_pass_gives_the_samplers_log_probabilities(temperature, policy):
    """What the loss computes of whole rows is what the sampler had token by token, at its temperature."""
    model = policy
    base_loss = choose_loss(model, {"model_type": "llama"})
    loss = at_temperature(base_loss, model, {"model_type": "llama"}, temperature)
    options, keys = SamplingOptions(4, 12, temperature=temperature, top_p=0.9), answer_keys(0, 0, 8)
    answers, logps = group_sampling.sample_groups(model, PROMPTS, options, NO_END, keys)
    rows = [
        (np.array([*PROMPTS[row // 4], *answer], np.int32), len(PROMPTS[row // 4]))
        for row, answer in enumerate(answers)
    ]
    wide = max(len(tokens) for tokens, _ in rows) - 1
    inputs, targets = np.zeros((8, wide), np.int32), np.zeros((8, wide), np.int32)
    mask = np.zeros((8, wide), bool)
    for row, (tokens, begin) in enumerate(rows):
        inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        mask[row, begin - 1 : len(tokens) - 1] = True
    found = token_logps(model, loss, Batch.of(inputs, targets, mask))
    np.testing.assert_allclose(found[mask], np.concatenate(logps), atol=1e-4)
    other = token_logps(
        model, at_temperature(base_loss, model, {"model_type": "llama"}, 0.9), Batch.of(inputs, targets, mask)
    )
    assert np.abs(other[mask] - np.concatenate(logps)).max() > 1e-2
