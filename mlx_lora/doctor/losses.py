"""Check the losses of every objective, and the loss of a whole model: numbers and gradients against float64 on the CPU.

Losses of whole answers take float32 numbers whatever the model computes in. The whole model computes in the dtype of runs,
with mlx's own kernels: ours have their own lines (kernels.py).

Shapes: E pairs or answers, P tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.base import QUANTIZED, dense_weight, with_weight
from mlx_lora.adapters.inject import adapter_parameters, inject
from mlx_lora.adapters.targets import select_targets
from mlx_lora.data.batch import Batch
from mlx_lora.doctor.check import (
    CheckFinding,
    Kit,
    KitCheck,
    apart,
    bounded,
    compare_passes,
    dtype_name,
    dtypes_of,
    exact_passes,
    largest_apart,
    normal,
    on_cpu,
)
from mlx_lora.doctor.models import TINY, TINY_4BIT, random_model
from mlx_lora.kernels.measure import TOLERANCE
from mlx_lora.losses import preference as pair_losses
from mlx_lora.losses.cross_entropy import Arrays, plain_loss
from mlx_lora.losses.divergence import (
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    DivergenceOptions,
    Known,
    divergence_of_logits,
    likeliest,
    sampled_kl,
)
from mlx_lora.losses.policy import RATIO_OF, PolicyOptions, Sampled, policy_loss
from mlx_lora.losses.preference import (
    PAIR_LOSSES,
    RATED_LOSSES,
    PairLoss,
    PairOptions,
    Pairs,
    RatedOptions,
    Ratings,
    bradley_terry,
)

EXAMPLES, TOKENS, VOCABULARY = 17, 60, 500
ADVICE = "do not train toward this objective here; mlx_lora/objectives has the loss; report it"
MODEL_ADVICE = "the layers of mlx and mlx-lm: try other versions of them, or --dtype float32; report it"
AGAINST = "float64 on the CPU"
OTHER_PAIR_LOSSES: dict[str, PairLoss] = {
    "ORPO's odds ratio": pair_losses.odds_ratio,
    "SimPO": pair_losses.simpo,
    "CPO": pair_losses.cpo,
}


def loss_checks() -> list[KitCheck]:
    """Return a check for each family of losses, and for the loss of a model."""
    families: dict[str, Callable[[Kit], Iterator[CheckFinding]]] = {
        "DPO's family": partial(check_pair_losses, PAIR_LOSSES),
        "ORPO, SimPO, CPO": partial(check_pair_losses, OTHER_PAIR_LOSSES),
        "KTO's family": check_rated_losses,
        "reward model": check_reward_loss,
        "GRPO's family and RLOO": check_policy_losses,
        "distillation": check_divergences,
        "a whole model": partial(check_model, None),
        "a whole 4-bit model": partial(check_model, TINY_4BIT),
    }
    return [KitCheck("losses", name, check) for name, check in families.items()]


def _compare(name: str, function: Callable[..., mx.array], *arrays: mx.array) -> Iterator[CheckFinding]:
    """Compare a function of float32 arrays with itself in float64 on the CPU."""

    def outputs(*arrays: mx.array) -> list[mx.array]:
        return [function(*arrays)]

    cotangent = [normal(*function(*arrays).shape, seed=9)]
    exact = exact_passes(outputs, arrays, cotangent, double=True)
    yield from compare_passes(name, outputs, exact, arrays, cotangent, ADVICE, against=AGAINST)


def _logps(count: int, seed: int) -> mx.array:
    """Return log-probabilities of whole answers, about -20."""
    return -mx.abs(normal(count, seed=seed, size=8.0) + 20)


def check_pair_losses(losses: dict[str, PairLoss], kit: Kit) -> Iterator[CheckFinding]:
    """Compare losses of pairs."""
    options = PairOptions(label_smoothing=0.1)
    chosen, rejected, likelihood = _logps(EXAMPLES, 1), _logps(EXAMPLES, 2), -_logps(EXAMPLES, 3)
    other_chosen, other_rejected = chosen + normal(EXAMPLES, seed=4), rejected + normal(EXAMPLES, seed=5)
    tokens, real = mx.arange(5, 5 + EXAMPLES).astype(mx.float32), mx.ones((EXAMPLES,))
    for name, loss in losses.items():

        def function(chosen: mx.array, rejected: mx.array, likelihood: mx.array, loss: PairLoss = loss) -> mx.array:
            pairs = Pairs(chosen, rejected, other_chosen, other_rejected, tokens, tokens[::-1], likelihood, real)
            return loss(pairs, options)

        yield from _compare(name, function, chosen, rejected, likelihood)


def check_rated_losses(kit: Kit) -> Iterator[CheckFinding]:
    """Compare losses of answers that are rated good or bad."""
    good = mx.array([float(n % 2) for n in range(EXAMPLES)])
    for name, loss in RATED_LOSSES.items():

        def function(ratio: mx.array, loss=loss) -> mx.array:
            return loss(Ratings(ratio, good, mx.array(0.3)), RatedOptions())

        yield from _compare(name, function, normal(EXAMPLES, seed=1, size=3.0))


def check_reward_loss(kit: Kit) -> Iterator[CheckFinding]:
    """Compare the loss of a reward model."""
    margin = mx.abs(normal(EXAMPLES, seed=3))
    yield from _compare(
        "Bradley-Terry",
        lambda good, bad: bradley_terry(good, bad, margin, 0.01),
        normal(EXAMPLES, seed=1),
        normal(EXAMPLES, seed=2),
    )


def check_policy_losses(kit: Kit) -> Iterator[CheckFinding]:
    """Compare losses of sampled answers."""
    answers = 6
    of = mx.array([answers * n // TOKENS for n in range(TOKENS)])
    old, reference = _logps(TOKENS, 2) / 10, _logps(TOKENS, 3) / 10
    logps = old + normal(TOKENS, seed=1, size=0.2)
    rest = (mx.ones((TOKENS,)), of, normal(answers, seed=5), mx.array(answers / TOKENS))
    for name in RATIO_OF:
        options = PolicyOptions(name, beta=0.05, compares=True)

        def function(logps: mx.array, options: PolicyOptions = options) -> mx.array:
            return policy_loss(Sampled(logps, old, reference, *rest), options)[0]

        yield from _compare(name, function, logps)
    yield from _compare("sampled KL", lambda logps: sampled_kl(logps, old, reference), logps)


def check_divergences(kit: Kit) -> Iterator[CheckFinding]:
    """Compare the divergences from a teacher, with its likeliest tokens and with all."""
    student, teacher = normal(TOKENS, VOCABULARY, seed=1, size=2.0), normal(TOKENS, VOCABULARY, seed=2, size=2.0)
    for name in (FORWARD_KL, REVERSE_KL, JSD):
        for top_k in (16, 0):
            options = DivergenceOptions(name, top_k=top_k, temperature=1.5)
            known = likeliest(teacher, options)

            def function(logits: mx.array, known: Known = known, options: DivergenceOptions = options) -> mx.array:
                return divergence_of_logits(logits, known, options)[0]

            yield from _compare(f"{name}, {f'{top_k} tokens' if top_k else 'all tokens'}", function, student)


def check_model(layout: dict[str, Any] | None, kit: Kit) -> Iterator[CheckFinding]:
    """Compare the loss of a model of two blocks, and the gradient of each factor of its adapter."""
    arrays = Arrays.of(_batch())
    mx.eval(arrays)
    for dtype in dtypes_of(kit):
        found = _model_numbers(_adapted(dtype, layout), arrays)
        with on_cpu():
            model = _adapted(dtype, layout)
            _unpack(model)
            model.set_dtype(mx.float64)
            exact = _model_numbers(model, arrays)
        label, bound = dtype_name(dtype), 2 * TOLERANCE[dtype]
        what = f"{label} against {AGAINST}"
        yield bounded(f"{label}: loss", apart(found.pop("loss"), exact.pop("loss")), bound, what, MODEL_ADVICE)
        error, worst = largest_apart(found, exact)
        yield bounded(f"{label}: gradients", error, bound, f"{what}; the farthest: {worst}", MODEL_ADVICE)


def _batch() -> Batch:
    random = np.random.default_rng(0)
    ids = random.integers(0, TINY["vocab_size"], (2, 41)).astype(np.int32)
    return Batch.of(ids[:, :-1], ids[:, 1:], random.random((2, 40)) < 0.5, 80)


def _adapted(dtype: mx.Dtype, layout: dict[str, Any] | None) -> nn.Module:
    """Return the tiny model with an adapter on all linear layers, whose B is not zero."""
    model = random_model(TINY, dtype, layout)
    inject(model, select_targets(model).paths, rank=4, scale=2.0)
    moved = [
        (name, normal(*value.shape, seed=number, size=0.02))
        for number, (name, value) in enumerate(sorted(adapter_parameters(model).items()))
    ]
    model.load_weights(moved, strict=False)
    mx.eval(model.parameters())
    return model


def _unpack(model: nn.Module) -> None:
    """Replace quantized layers by dense ones of the same numbers."""
    dense = [
        (path, with_weight(layer, dense_weight(layer)))
        for path, layer in model.named_modules()
        if isinstance(layer, QUANTIZED)
    ]
    model.update_modules(tree_unflatten(dense))
    model.freeze()
    model.unfreeze(keys=["lora_a", "lora_b"], strict=False)


def _model_numbers(model: nn.Module, arrays: Arrays) -> dict[str, mx.array]:
    """Return the loss per token and the gradient of each factor, by name."""

    def mean(model: nn.Module) -> mx.array:
        total, count = plain_loss(model, *arrays)
        return total / count

    loss, gradients = nn.value_and_grad(model, mean)(model)
    found = {"loss": loss, **dict(tree_flatten(gradients))}
    mx.eval(found)
    return found
