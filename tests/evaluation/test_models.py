"""Base and adapters in one batch: each has the numbers of its own model alone, computed in float64 from plain logits."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config
from comparing import by_dtype
from conftest import write_folder
from make_adapters import make_adapter
from tiers import by_default

from mlx_lora.config.settings import ModelSettings
from mlx_lora.engine.adapter_store import AdapterSource
from mlx_lora.evaluation import models as module
from mlx_lora.evaluation.models import BASE, LogLikelihood, Models, Scored, TextRequest
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.models.load import load_base
from mlx_lora.utils.errors import InputError

KINDS = {
    "four": {"rank": 4, "seed": 1},
    "eleven": {"rank": 11, "seed": 3},
    "dora": {"rank": 4, "seed": 5, "form": "dora", "strength": 4.0},
    "embedding": {"rank": 4, "seed": 7, "targets": "all-linear,embed_tokens", "strength": 0.1},
}
CONTEXT = tuple(range(40, 64))
CONTINUATIONS = [(65,), (66,), (70, 71, 72), (70, 71, 73), (80, 81, 82, 83, 84, 85)]
TOLERANCE = by_dtype(1e-4, 0.3)


@pytest.fixture(scope="module")
def adapters(untied_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(untied_folder, root / name, **kind) for name, kind in KINDS.items()}


@pytest.fixture
def opened(untied_folder, adapters):
    sources = {name: AdapterSource(folder=path) for name, path in adapters.items()}
    with Models.opened(load_base(ModelSettings(model=str(untied_folder))), sources) as models:
        yield models


def alone(folder, adapter) -> mx.array:
    """The model with one adapter, by the code that `generate` uses."""
    base = load_base(ModelSettings(model=str(folder)))
    if adapter is not None:
        load_adapter(base, adapter)
    return base.model


def expected(model, context, continuation) -> LogLikelihood:
    tokens = [*context, *continuation]
    logits = np.array(model(mx.array([tokens[:-1]]))[0].astype(mx.float32)).astype(np.float64)
    logits = logits[-len(continuation) :]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = logprobs[np.arange(len(continuation)), list(continuation)].sum()
    return LogLikelihood(total, bool((logits.argmax(-1) == list(continuation)).all()))


def test_each_model_has_its_own_numbers(opened, untied_folder, adapters):
    asked = [
        Scored(name, context, continuation)
        for context in (CONTEXT, CONTEXT[:5])
        for continuation in CONTINUATIONS
        for name in opened.names
    ]
    found = opened.log_likelihoods(asked)
    plain = {name: alone(untied_folder, adapters.get(name)) for name in opened.names}
    for one, got in zip(asked, found, strict=True):
        assert got.total == pytest.approx(expected(plain[one.model], *one[1:]).total, abs=TOLERANCE), one
    by_model = {name: [got.total for one, got in zip(asked, found, strict=True) if one.model == name] for name in plain}
    totals = list(by_model.values())
    assert all(max(np.abs(np.subtract(a, b))) > 0.05 for i, a in enumerate(totals) for b in totals[:i])


def folder_of(name, folder):
    config = tiny_config(name)
    return write_folder(folder, tiny_architecture(name), config)


@pytest.mark.parametrize("kind", by_default(["tied", "4-bit", "gemma3_text", "mamba"], "4-bit", "gemma3_text"))
def test_kinds_of_models(kind, tiny_folder, tiny_4bit_folder, tmp_path):
    folder = {"tied": tiny_folder, "4-bit": tiny_4bit_folder}.get(kind)
    if folder is None:
        folder = folder_of(kind, tmp_path / "model")
    adapter = make_adapter(folder, tmp_path / "adapter", rank=4, seed=2, targets="all-linear")
    sources = {"mine": AdapterSource(folder=adapter)}
    asked = [Scored(name, CONTEXT, one) for one in CONTINUATIONS for name in (BASE, "mine")]
    with Models.opened(load_base(ModelSettings(model=str(folder))), sources) as models:
        assert models._shares == (kind != "mamba")
        found = models.log_likelihoods(asked)
        said = models.texts([TextRequest(name, CONTEXT, 4) for name in (BASE, "mine")])
    plain = {BASE: alone(folder, None), "mine": alone(folder, adapter)}
    for one, got in zip(asked, found, strict=True):
        assert got.total == pytest.approx(expected(plain[one.model], *one[1:]).total, abs=by_dtype(1e-3, 0.3)), one
    assert len(said) == 2


def test_a_context_is_computed_once(opened):
    rows = opened._rows([Scored(BASE, CONTEXT, continuation) for continuation in CONTINUATIONS])
    assert opened._shares
    assert len(rows) == 1
    assert (
        len(rows[0].starts) == 3
    )  # one-token continuations share a part, and so do those that differ in their last token
    assert len(rows[0].tokens) == len(CONTEXT) - 1 + 1 + 3 + 6
    assert len(opened._rows([Scored(BASE, CONTEXT, one) for one in CONTINUATIONS], shares=False)) == 3


def test_small_batches_and_others_beside_change_nothing(opened):
    asked = [Scored(name, CONTEXT, one) for one in CONTINUATIONS for name in opened.names]
    whole = opened.log_likelihoods(asked)
    opened.batch_tokens = 40
    apart = opened.log_likelihoods(asked[::-1])[::-1]
    assert [one.total for one in apart] == pytest.approx([one.total for one in whole], abs=TOLERANCE)
    assert opened.log_likelihoods([Scored(BASE, CONTEXT, ())]) == [(0.0, True)]


def test_greedy_is_what_the_model_would_write(opened, untied_folder):
    model, tokens = alone(untied_folder, None), list(CONTEXT)
    for _ in range(3):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1]).item()))
    likeliest = tuple(tokens[-3:])
    other = (*likeliest[:2], likeliest[2] - 1 or 5)
    found = opened.log_likelihoods([Scored(BASE, CONTEXT, likeliest), Scored(BASE, CONTEXT, other)])
    assert [one.greedy for one in found] == [True, False]


def test_a_long_context_is_cut_at_its_beginning(opened, untied_folder):
    limit = opened.context_tokens
    context = tuple(np.random.default_rng(0).integers(5, 250, limit + 20).tolist())
    whole, cut = opened.log_likelihoods([Scored(BASE, context, (7, 8)), Scored(BASE, context[-(limit - 1) :], (7, 8))])
    assert whole == cut
    with pytest.raises(InputError, match="longer context"):
        opened.log_likelihoods([Scored(BASE, (1,), (5,) * (limit + 1))])


@pytest.mark.float32("what a tiny model's wrong layout changes is less than bfloat16's tolerance")
def test_a_wrong_head_or_layout_is_not_used(untied_folder, monkeypatch):
    """Where the fast ways do not agree with plain logits, the plain ones are used."""
    right = module.find_head
    monkeypatch.setattr(module, "find_head", lambda *given: dataclasses.replace(right(*given), scale=2.0))
    monkeypatch.setattr(module, "shared_caches", lambda *given: {})  # then a part sees those before it
    with Models.opened(load_base(ModelSettings(model=str(untied_folder))), {}) as models:
        assert (models._head, models._shares) == (None, False)
        found = models.log_likelihoods([Scored(BASE, CONTEXT, one) for one in CONTINUATIONS])
    plain = alone(untied_folder, None)
    for continuation, got in zip(CONTINUATIONS, found, strict=True):
        assert got.total == pytest.approx(expected(plain, CONTEXT, continuation).total, abs=TOLERANCE)


@pytest.mark.float32("texts are compared: where two tokens are nearly as likely, bfloat16 takes either")
def test_texts_are_those_of_each_model_alone(opened, untied_folder, adapters):
    names = [BASE, "four", "dora"]
    prompts = [CONTEXT[:n] for n in (5, 9, 24)]
    found = opened.texts([TextRequest(name, prompt, 8) for prompt in prompts for name in names])
    plain = {name: alone(untied_folder, adapters.get(name)) for name in names}
    ends = opened.base.tokenizer.eos_token_ids
    wanted = []
    for prompt in prompts:
        for name in names:
            tokens = list(prompt)
            while len(tokens) < len(prompt) + 8:
                token = int(mx.argmax(plain[name](mx.array([tokens]))[0, -1]).item())
                if token in ends:
                    break
                tokens.append(token)
            wanted.append(tuple(tokens[len(prompt) :]))
    assert [one.tokens for one in found] == wanted
    assert len(set(wanted)) > 3


def test_a_text_ends_before_its_stop(opened):
    [whole] = opened.texts([TextRequest(BASE, CONTEXT, 12)])
    stop = whole.text[4]
    [cut] = opened.texts([TextRequest(BASE, CONTEXT, 12, stops=(stop,))])
    assert cut.text == whole.text.split(stop)[0]
    assert opened.texts([]) == []


def test_stopping_ends_it(opened):
    with pytest.raises(KeyboardInterrupt):
        opened.log_likelihoods([Scored(BASE, CONTEXT, (65,))], lambda: True)
    with pytest.raises(KeyboardInterrupt):
        opened.texts([TextRequest(BASE, CONTEXT, 3)], lambda: True)
