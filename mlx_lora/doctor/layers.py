"""Check every adapter layer, the losses of every objective, and the loss of a whole model, with their gradients.

The definition of a layer uses the adapted weight as a whole, in float32 on the CPU: y = x (W + D)^T, and for DoRA the rows of
W + D at their trained lengths. The layers never make that weight. Losses of whole answers take float32 numbers whatever the model
computes in, and are compared with float64. The whole model computes in the dtype of runs, with mlx's own kernels: ours have their
own lines (kernels.py).

Shapes: x (N, in), tokens (N,), experts' x (N, 1, in); E pairs or answers, P tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_lora.adapters.base import QUANTIZED, SWITCH, AdapterLayer, dense_weight, with_weight
from mlx_lora.adapters.inject import adapter_parameters, inject
from mlx_lora.adapters.targets import adapter_class, select_targets
from mlx_lora.config.presets import PRESETS
from mlx_lora.data.batch import Batch
from mlx_lora.doctor.check import (
    TINY,
    TINY_4BIT,
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
    random_model,
)
from mlx_lora.kernels.measure import TOLERANCE
from mlx_lora.losses import preference as pair_losses
from mlx_lora.losses.cross_entropy import Arrays, plain_loss, token_arrays
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
from mlx_lora.losses.policy import RATIO_OF, PolicyOptions, SampledTokens, policy_loss
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
from mlx_lora.utils import device

ROWS, WIDE, OUT, TOKENS, EXPERTS, RANK, ALPHA = 70, 128, 96, 300, 4, 8, 16.0
PACKED = {"bits": 4, "group_size": 32, "mode": "affine"}
ADVICE = "do not train with this method here; mlx_lora/adapters has the layer; report it"


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        kind: of the base: `linear`, `embedding`, `tied head` or `experts`.
        method: a name in PRESETS, which gives the layer type, the scale and the further arrays.
        packed: whether the base is quantized.
        dropout: probability.
    """

    kind: str
    method: str = "lora"
    packed: bool = False
    dropout: float = 0.0

    @property
    def words(self) -> str:
        """Its name in the result."""
        kind = {"linear": "linear layer", "experts": "experts"}.get(self.kind, self.kind)
        return f"{self.method}, {'4-bit ' if self.packed else ''}{kind}{', dropout' if self.dropout else ''}"


CASES = (
    Case("linear"),
    Case("linear", packed=True),
    Case("linear", dropout=0.3),
    Case("linear", "rslora"),
    Case("linear", "dora"),
    Case("linear", "dora", packed=True),
    Case("linear", "pissa", packed=True),
    Case("linear", "adalora"),
    Case("linear", "relora", packed=True),
    Case("linear", "qa-lora", packed=True),
    Case("linear", "qa-lora", packed=True, dropout=0.3),
    Case("embedding"),
    Case("embedding", packed=True),
    Case("embedding", "dora"),
    Case("tied head"),
    Case("tied head", "dora"),
    Case("tied head", "qa-lora", packed=True),
    Case("experts"),
    Case("experts", packed=True),
    Case("experts", "dora", packed=True),
    Case("experts", "qa-lora", packed=True),
)


def layer_checks() -> list[KitCheck]:
    """Return a check for each case."""
    return [KitCheck("adapters", case.words, partial(check_layer, case)) for case in CASES]


def check_layer(case: Case, kit: Kit) -> Iterator[CheckFinding]:
    """Compare one layer with its definition in every dtype."""
    for dtype in dtypes_of(kit):
        label = dtype_name(dtype)
        if case.kind == "experts" and not (dtype == mx.float32 or device.multiplies_16_bit_experts()):
            yield CheckFinding(label, "skipped", "mlx has no 16-bit experts on this device")
            continue
        yield from _compare_layer(case, dtype)


def _compare_layer(case: Case, dtype: mx.Dtype) -> Iterator[CheckFinding]:
    label = dtype_name(dtype)
    layer = build_layer(case, dtype)
    arrays = {name: layer[name] for name in layer.trained}
    x, call = _input(case, dtype)
    found = _numbers(lambda x, layer=layer, call=call: call(layer, x), layer, arrays, x)
    with on_cpu():
        # The same numbers: weights and scales are cast up from their 16 bits.
        exact_layer = build_layer(case, dtype)
        exact_layer.base.set_dtype(mx.float32)
        wide = x if x.dtype == mx.int32 else x.astype(mx.float32)
        exact = _numbers(lambda x: _definition(case, exact_layer, x), exact_layer, arrays, wide)
    bound = 2 * TOLERANCE[dtype]
    what = f"{label} against the adapted weight in float32 on the CPU"
    yield bounded(f"{label}: output", apart(found.pop("output"), exact.pop("output")), bound, what, ADVICE)
    error, worst = largest_apart(found, exact)
    yield bounded(f"{label}: gradients", error, bound, f"{what}; the farthest: {worst}", ADVICE)


def build_layer(case: Case, dtype: mx.Dtype) -> AdapterLayer:
    """Return a layer with random numbers in all its arrays."""
    base = _base(case, dtype)
    method = PRESETS[case.method]
    made = adapter_class(base, method.layer_type)
    if made is None:
        raise ValueError(f"no layer of type {method.layer_type} over {type(base).__name__}")
    layer = made.from_base(base, _factors(made, base, 1), method.scale_of(ALPHA, RANK), case.dropout)
    if case.method == "pissa":
        layer.start_a, layer.start_b = _factors(made, base, 2)
    elif case.method == "adalora":
        layer.lora_e = normal(RANK, seed=5)
    elif case.method == "relora":
        layer.merge(*_factors(made, base, 2))
    if "m" in layer:
        layer.m = layer.m * (1 + 0.2 * normal(*layer.m.shape, seed=6))
    layer.train()
    mx.eval(layer.parameters())
    return layer


def _base(case: Case, dtype: mx.Dtype) -> nn.Module:
    if case.kind == "experts":
        base: Any = SwitchLinear(WIDE, OUT, EXPERTS, bias=False)
        base.weight = normal(EXPERTS, OUT, WIDE, seed=11, dtype=dtype, size=0.1)
    elif case.kind == "linear":
        base = nn.Linear(WIDE, OUT)
        base.weight = normal(OUT, WIDE, seed=11, dtype=dtype, size=0.1)
        base.bias = normal(OUT, seed=12, dtype=dtype)
    else:
        base = nn.Embedding(TOKENS, WIDE)
        base.weight = normal(TOKENS, WIDE, seed=11, dtype=dtype, size=0.1)
    return base.to_quantized(**PACKED) if case.packed else base


def _factors(made: type[AdapterLayer], base: nn.Module, seed: int) -> tuple[mx.array, mx.array]:
    """Return (lora_a, lora_b) in the orientation that the class has; B is not zero, or A would have no gradient."""
    rows, columns = made.factor_dims(base)
    a, b = (rows, RANK), (RANK, columns)
    if made.OVER is SWITCH:
        a, b = (EXPERTS, RANK, rows), (EXPERTS, columns, RANK)
    return normal(*a, seed=20 + seed, size=0.1), normal(*b, seed=30 + seed, size=0.1)


def _input(case: Case, dtype: mx.Dtype) -> tuple[mx.array, Callable[[AdapterLayer, mx.array], mx.array]]:
    """Return the input of a layer, and how it is called with it."""
    if case.kind == "experts":
        return normal(ROWS, 1, WIDE, seed=41, dtype=dtype), lambda layer, x: layer(x, _chosen(), sorted_indices=True)
    if case.kind == "embedding":
        tokens = mx.array([(17 * n) % TOKENS for n in range(ROWS)], mx.int32)
        return tokens, lambda layer, x: layer(x)
    x = normal(ROWS, WIDE, seed=41, dtype=dtype)
    if case.kind == "tied head":
        return x, lambda layer, x: layer.as_linear(x)  # pyright: ignore[reportAttributeAccessIssue]
    return x, lambda layer, x: layer(x, key=mx.random.key(7))


def _chosen() -> mx.array:
    return mx.array([EXPERTS * n // ROWS for n in range(ROWS)])


def _definition(case: Case, layer: AdapterLayer, x: mx.array) -> mx.array:
    """Return a layer's output by its adapted weight, float32."""
    weight = layer.weight + layer.product()
    if "m" in layer:
        weight = weight * (layer.m / mx.stop_gradient(mx.linalg.norm(weight, axis=-1)))[..., None]
    if case.kind == "experts":
        return x @ weight[_chosen()].swapaxes(-1, -2)
    if case.kind == "embedding":
        return weight[x]
    if case.kind == "tied head":
        return x @ weight.T
    if case.dropout:
        dropped = layer.dropout(x, mx.random.key(7))
        return x @ layer.weight.T + dropped @ layer.product().T + layer.base.bias
    return x @ weight.T + layer.base.bias


def _numbers(
    function: Callable[[mx.array], mx.array], layer: AdapterLayer, arrays: dict[str, mx.array], x: mx.array
) -> dict[str, mx.array]:
    """Return a layer's output, and the gradient of its input and of each trained array, by name."""
    names = list(arrays)
    whole = x.dtype == mx.int32  # token ids have no gradient

    def call(*values: mx.array) -> list[mx.array]:
        for name, value in zip(names, values, strict=False):
            layer[name] = value
        return [function(x if whole else values[-1])]

    values = [*arrays.values(), *([] if whole else [x])]
    made = call(*values)[0]
    cotangent = normal(*made.shape, seed=50, dtype=made.dtype)
    [output], gradients = mx.vjp(call, values, [cotangent])
    mx.eval(output, gradients)
    for name, value in arrays.items():  # no traced array may stay in the layer
        layer[name] = value
    return {"output": output, **dict(zip([*names, "x"], gradients, strict=False))}


# Losses

EXAMPLES, ANSWER_TOKENS, VOCABULARY = 17, 60, 500
LOSS_ADVICE = "do not train toward this objective here; mlx_lora/objectives has the loss; report it"
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
    yield from compare_passes(name, outputs, exact, arrays, cotangent, LOSS_ADVICE)


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
    of = mx.array([answers * n // ANSWER_TOKENS for n in range(ANSWER_TOKENS)])
    old, reference = _logps(ANSWER_TOKENS, 2) / 10, _logps(ANSWER_TOKENS, 3) / 10
    logps = old + normal(ANSWER_TOKENS, seed=1, size=0.2)
    rest = (mx.ones((ANSWER_TOKENS,)), of, normal(answers, seed=5), mx.array(answers / ANSWER_TOKENS))
    for name in RATIO_OF:
        options = PolicyOptions(name, beta=0.05, compares=True)

        def function(logps: mx.array, options: PolicyOptions = options) -> mx.array:
            return policy_loss(SampledTokens(logps, old, reference, *rest), options)[0]

        yield from _compare(name, function, logps)
    yield from _compare("sampled KL", lambda logps: sampled_kl(logps, old, reference), logps)


def check_divergences(kit: Kit) -> Iterator[CheckFinding]:
    """Compare the divergences from a teacher, with its likeliest tokens and with all."""
    student, teacher = (
        normal(ANSWER_TOKENS, VOCABULARY, seed=1, size=2.0),
        normal(ANSWER_TOKENS, VOCABULARY, seed=2, size=2.0),
    )
    for name in (FORWARD_KL, REVERSE_KL, JSD):
        for top_k in (16, 0):
            options = DivergenceOptions(name, top_k=top_k, temperature=1.5)
            known = likeliest(teacher, options)

            def function(logits: mx.array, known: Known = known, options: DivergenceOptions = options) -> mx.array:
                return divergence_of_logits(logits, known, options)[0]

            yield from _compare(f"{name}, {f'{top_k} tokens' if top_k else 'all tokens'}", function, student)


def check_model(layout: dict[str, Any] | None, kit: Kit) -> Iterator[CheckFinding]:
    """Compare the loss of a model of two blocks, and the gradient of each factor of its adapter."""
    arrays = token_arrays(_batch())
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
        total, count = plain_loss(model, arrays)
        return total / count

    loss, gradients = nn.value_and_grad(model, mean)(model)
    found = {"loss": loss, **dict(tree_flatten(gradients))}
    mx.eval(found)
    return found
