"""Divergences from their definitions, exact for bins, and the same in chunks of positions as from whole logits."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import quantized, tiny_model

from mlx_lora.data.dataset import TableFormat
from mlx_lora.losses import divergence as distill_loss
from mlx_lora.losses.divergence import (
    DivergenceOptions,
    Known,
    bins,
    chunked_divergence,
    divergence,
    divergence_of_logits,
    likeliest,
)
from mlx_lora.models.head import find_head

POSITIONS, VOCABULARY = 13, 50
CASES = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}


def logits(seed: int, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (POSITIONS, VOCABULARY)).astype(np.float32)


def softmax(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def defined(teacher: np.ndarray, student: np.ndarray, beta: float) -> np.ndarray:
    """Return the divergence of probabilities by its definition, in float64."""

    def kl(p, q):
        return (p * np.log(p / q)).sum(axis=1)

    if beta in (0, 1):
        return kl(student, teacher) if beta else kl(teacher, student)
    mixed = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("top_k", [0, 1, 7])
def test_the_value_is_the_definitions(name, top_k, temperature):
    options = DivergenceOptions(name, CASES[name], temperature, top_k)
    theirs, ours = logits(1), logits(2)
    found, kl = divergence_of_logits(mx.array(ours), likeliest(mx.array(theirs), options), options)
    p, q = softmax(theirs / temperature), softmax(ours / temperature)
    if top_k:
        order = np.argsort(-p, axis=1)[:, :top_k]
        p, q = (
            np.concatenate([kept := np.take_along_axis(one, order, 1), 1 - kept.sum(axis=1, keepdims=True)], axis=1)
            for one in (p, q)
        )
    assert np.allclose(np.array(found), defined(p, q, options.beta), rtol=1e-4, atol=1e-6)
    assert np.allclose(np.array(kl), defined(p, q, 0.0), rtol=1e-4, atol=1e-6)


def test_bins_hide_more_the_fewer_they_are():
    theirs, ours = mx.array(logits(1)), mx.array(logits(2))
    means = []
    for top_k in (1, 8, 30, 0):
        options = DivergenceOptions(top_k=top_k)
        means.append(divergence_of_logits(ours, likeliest(theirs, options), options)[0].mean().item())
    assert means == sorted(means)
    assert means[0] > 0


def test_a_teacher_that_is_nearly_sure_keeps_its_rest():
    """1 - sum of the k would be 0 here in float32, and its logarithm -inf."""
    sharp = np.zeros((1, VOCABULARY), np.float32)
    sharp[0, 3] = 40.0
    found = bins(mx.array(sharp), mx.array([[3]]))
    assert found[0, 1].item() == pytest.approx(np.log(VOCABULARY - 1) - 40, rel=1e-5)
    same = divergence(found, found, 0.5)
    assert same.item() == pytest.approx(0, abs=1e-7)


def test_impossible_tokens_count_as_zero():
    """Some models set the logits of padding to -inf."""
    theirs, ours = logits(1), logits(2)
    theirs[:, -3:], ours[:, -3:] = -np.inf, -np.inf
    for top_k in (0, 4):
        options = DivergenceOptions("jsd", 0.5, 1.0, top_k)

        def loss(student, options=options):
            return divergence_of_logits(student, likeliest(mx.array(theirs), options), options)[0].sum()

        value, gradient = mx.value_and_grad(loss)(mx.array(ours))
        assert np.isfinite(value.item())
        assert np.isfinite(np.array(gradient)).all()


def test_padding_of_the_larger_vocabulary_is_left_out():
    theirs, ours = logits(1), logits(2)
    for top_k in (0, 5):
        options = DivergenceOptions("forward_kl", 0.5, 1.0, top_k, VOCABULARY - 10)
        whole = divergence_of_logits(mx.array(ours), likeliest(mx.array(theirs), options), options)[0]
        cut = replace(options, vocabulary=None)
        alone = divergence_of_logits(mx.array(ours[:, :-10]), likeliest(mx.array(theirs[:, :-10]), cut), cut)[0]
        assert np.allclose(np.array(whole), np.array(alone), rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("top_k", [0, 6])
@pytest.mark.parametrize("kind", ["tied", "own head", "4-bit", "scaled"])
def test_chunks_of_positions_give_the_loss_and_gradient_of_whole_logits(kind, top_k, name, monkeypatch):
    model = tiny_model(tie_word_embeddings=kind != "own head")
    model = quantized(model) if kind == "4-bit" else model
    model.freeze()
    head = find_head(model, {"logit_scale": 0.5, "final_logit_softcapping": 3.0} if kind == "scaled" else {})
    assert not isinstance(head, str)
    monkeypatch.setattr(distill_loss, "loss_tile_bytes", lambda: 3 * 4 * head.vocabulary)  # three positions
    random = np.random.default_rng(0)
    hidden = mx.array(random.normal(0, 1, (10, 64)).astype(np.float32))
    options = DivergenceOptions(name, CASES[name], 1.5, top_k)
    teacher = likeliest(mx.array(random.normal(0, 2, (10, head.vocabulary)).astype(np.float32)), options)
    form = TableFormat.of(head.vocabulary, top_k)
    records = form.pack(np.array(teacher.logps), None if teacher.ids is None else np.array(teacher.ids))
    relative, ids = form.unpack(records)
    arrays = [mx.array(relative), *(() if ids is None else (mx.array(ids),))]
    weights = mx.array(random.uniform(0.5, 2, 10).astype(np.float32))

    def whole(hidden):
        known = Known(nn.log_softmax(arrays[0].astype(mx.float32), axis=-1), *arrays[1:])
        return (divergence_of_logits(head.logits(hidden), known, options)[0] * weights).sum()

    def chunked(hidden, gradient=True):
        found = chunked_divergence(head, hidden, *arrays, options=options, gradient=gradient)
        return (found[0] * weights).sum(), found[1].sum()

    expected, pull = mx.value_and_grad(whole)(hidden)
    (value, kl), own = mx.value_and_grad(chunked)(hidden)
    measured = chunked(hidden, gradient=False)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert [one.item() for one in measured] == pytest.approx([value.item(), kl.item()], rel=1e-6)
    assert np.allclose(np.array(own), np.array(pull), rtol=1e-3, atol=1e-6)
    assert np.abs(np.array(pull)).max() > 1e-4


@pytest.mark.parametrize(
    ("vocabulary", "top_k", "size"), [(288, 8, 8 * 2 + 9 * 2), (70000, 8, 8 * 4 + 9 * 2), (288, 0, 576)]
)
def test_records_hold_what_is_known_in_16_bits(vocabulary, top_k, size):
    form = TableFormat.of(vocabulary, top_k)
    assert form.record_bytes == size
    options = DivergenceOptions(top_k=top_k)
    teacher = likeliest(mx.array(np.random.default_rng(0).normal(0, 3, (20, vocabulary)).astype(np.float32)), options)
    logps, ids = np.array(teacher.logps), None if teacher.ids is None else np.array(teacher.ids)
    relative, kept = form.unpack(form.pack(logps, ids))
    assert (kept is None) if ids is None else np.array_equal(kept, ids)
    again = relative.astype(np.float32)
    again -= np.log(np.exp(again.astype(np.float64)).sum(axis=1, keepdims=True))
    assert np.abs(np.exp(logps) * (logps - again)).sum(axis=1).max() < 1e-3


def test_more_tokens_than_there_are_means_all():
    assert TableFormat.of(288, 287).top_k == 0
    assert TableFormat.of(288, 286).top_k == 286
    assert TableFormat.of(288, 64).bins == 65
