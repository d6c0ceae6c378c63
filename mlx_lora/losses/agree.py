"""Check before a run that our loss and kernels give a model's own results, and choose those that do.

mlx-lm's models are third-party code that was written for generation. Some compute values while they are traced, some
have kernels without a gradient. What fails or disagrees here is switched off, one feature after the other, which the run's
header reports; a model for which nothing works is refused before the run begins.

Loss and kernels are compared with the model's own, in each token's loss and in the gradient of its parameters. A summed loss
alone would hide errors that cancel, and those of the backward pass. Then the step itself is differentiated on a few tokens, with
ever fewer features until that works (`choose_step_variant`).

Checks that passed on this machine are remembered, so that a model's second run does not compute them again. A check is named
by all that its result depends on: processor, BLAS and mlx; the source of this package and of the model's architecture; the
model's configuration, fingerprint, types, shapes and dtypes, and what of it is trained; and what was compared. If anything
of that changes, it is another check. A check that failed is repeated.

Shapes: P positions.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.base import Dropout
from mlx_lora.kernels.choose import (
    AUTO,
    OURS,
    Choose,
    KernelChoice,
    assumed,
    choose_model_kernels,
    exchanging,
    has_recurrence,
    long_row_kernels,
    training_kernels,
)
from mlx_lora.kernels.measure import MLX, left_unchanged, may_measure
from mlx_lora.losses.cross_entropy import (
    PLAIN,
    PLAIN_LOGITS,
    ROWS,
    TILES,
    Arrays,
    Loss,
    compiled_over,
    differentiation,
    plain,
)
from mlx_lora.losses.fused import choose_kernel, head_loss, loss_figures, loss_kernels
from mlx_lora.models.blocks import few_blocks
from mlx_lora.models.folder import FOREIGN_ERRORS, base_fingerprint, is_foreign, raise_if_ours, short
from mlx_lora.models.head import Head, find_head, with_last_block
from mlx_lora.models.load import embedding_rows
from mlx_lora.models.prefix_attention import shared_caches
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.planner.machine import loss_tile_bytes
from mlx_lora.planner.memory import CHECK_TOKENS, LOSS_TOKENS, RECURRENT_CHECK_TOKENS, KernelTerms
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import read_store, write_store
from mlx_lora.utils.progress import long_task
from mlx_lora.utils.text import package_version

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.kernels.attention import AttentionCall
    from mlx_lora.models.load import Base

# The loss and the kernels

# What a check is called while it runs.
CHECKING_LOSS = "Checking that the faster loss gives the model's own numbers"
CHECKING_KERNELS = "Checking that the faster kernels give the model's own numbers"


@dataclass(frozen=True)
class Compute:
    """What computes a run's numbers.

    Attributes:
        loss: of the supervised positions.
        kernels: of the model's layers; None: its own.
        terms: their memory, for the planner.
        words: on the kernels, for the run header.
    """

    loss: Loss
    kernels: KernelChoice | None
    terms: KernelTerms
    words: str


def choose_compute(
    settings: TrainSettings, base: Base, rows: EncodedSet, strategy: Strategy, joined_too: EncodedSet | None = None
) -> Compute:
    """Choose loss and kernels: the best that were measured here, and that agree with the model's own on this model.

    Args:
        settings: of the run.
        base: adapted.
        rows: training data, whose lengths the kernels are chosen for.
        strategy: how ranks divide the run.
        joined_too: the same rows joined, if some batches will be.
    """
    asked = settings.loop.kernels
    loss = choose_loss(base.model, base.config, asked, measure=True, strategy=strategy)
    dtype = device.compute_dtype(settings.model.dtype)
    if asked == AUTO and strategy.lockstep:
        asked = OURS  # what one rank measures, another might not
    rows_of = {one.starts is not None: one for one in (rows, joined_too) if one is not None}
    lengths = {shared: sorted({max(1, int(n) - 1) for n in one.lengths}) for shared, one in rows_of.items()}
    with strategy.only_planned(base.model):
        choice = choose_model_kernels(base.model, lengths.get(False, []), asked, dtype, lengths.get(True, []))
    kernels, words = check_kernels(base.model, base.config, loss, choice, strategy)
    terms = replace((kernels or choice.of_mlx()).terms(), loss=loss.kernel)
    return Compute(loss, kernels, terms, words)


def choose_loss(
    model: nn.Module,
    config: dict[str, Any],
    asked: str = AUTO,
    measure: bool = False,
    whole_because: str = "",
    strategy: Strategy = SINGLE_DEVICE,
) -> Loss:
    """Return the fastest loss that agrees with the plain loss on this model, or the plain loss if none does.

    Args:
        model: the model to train, with its adapters, or one to measure.
        config: its config.json.
        asked: --kernels; `mlx` is the model's own logits.
        measure: measure the kernels if there are no measurements; False: then our kernel is used.
        whole_because: why the whole last block is computed although the model may allow less; empty: no reason.
        strategy: how ranks divide the run.

    Raises:
        InputError: the model's own forward pass fails.
    """
    return replace(_agreeing_loss(model, config, asked, measure, whole_because, strategy), measuring=long_row_kernels)


def _agreeing_loss(
    model: nn.Module, config: dict[str, Any], asked: str, measure: bool, whole_because: str, strategy: Strategy
) -> Loss:
    if asked == MLX:
        return plain(f"plain cross-entropy (--kernels {MLX})")
    if strategy.lockstep:  # what one rank measures, another might not
        asked = OURS
    whole_because = whole_because or strategy.whole_blocks
    head = find_head(model, config)
    if isinstance(head, str):
        return plain(f"plain cross-entropy ({head})")
    # A head that is divided is at hand a slice at a time: what is measured with it whole would be no numbers.
    whole_head = asked != OURS and not strategy.divides_base
    figures = loss_figures(head, activation_dtype(model), measure) if whole_head else None
    kernel = choose_kernel(figures)
    if kernel == PLAIN_LOGITS:
        return plain("plain cross-entropy (measured)")
    # A head that ranks share is at hand a slice at a time, which whole rows of logits cannot use.
    others = [other for other in loss_kernels() if other != kernel and not (other == ROWS and not head.is_whole)]
    part, whole_because = (head, whole_because) if whole_because else with_last_block(head, model)
    first = head_loss(part, kernel, loss_tile_bytes(), whole_because)
    check = check_name(model, config, strategy, "loss", first.description)
    if has_passed(check):
        return first
    # Of a head in files, all logits and what they are computed from are kept until a gradient is there (parallel/offloaded_base.py).
    tokens = LOSS_TOKENS if head.is_whole or strategy.lockstep else LOSS_TOKENS // 4
    # Two passes over one block of each kind, unless the first candidate is wrong.
    with long_task(CHECKING_LOSS, 2, "computations") as task, _few_blocks(model, strategy):
        expected, reasons = _own_probe(model, config, PLAIN, head.vocabulary, tokens, strategy), []
        task.advance()
        for name in (kernel, *others):
            for one in [head] if part is head else [part, head]:
                loss = head_loss(one, name, loss_tile_bytes(), whole_because)
                problem = _problem(model, expected, loss, head.vocabulary, tokens=tokens, strategy=strategy)
                if problem is None:
                    keep_passed(check if loss.description == first.description else "", loss.description)
                    return loss
                whole_because = whole_because or f"less {problem}"
            reasons.append(f"{'fused' if name == TILES else name} {problem}")
    return plain(f"plain cross-entropy ({'; '.join(reasons)})")


def check_kernels(
    model: nn.Module,
    config: dict[str, Any],
    loss: Loss,
    choice: KernelChoice,
    strategy: Strategy = SINGLE_DEVICE,
) -> tuple[KernelChoice | None, str]:
    """Return the kernels if the model's results with them agree with its own, else None; and a text for the header.

    Args:
        model: the model to train, with its adapters.
        config: its config.json.
        loss: the loss that was chosen for the model.
        choice: the kernels that were chosen for the model.
        strategy: how ranks divide the run.
    """
    if choice.asked == MLX:
        return None, f"the model's own kernels (--kernels {MLX})"
    head = find_head(model, config)
    vocabulary = config.get("vocab_size", 256) if isinstance(head, str) else head.vocabulary
    expected, variants = None, choice.variants()
    with training_kernels(model, choose=choice) as exchanged:
        if not exchanged:
            return None, "the model's own kernels"
    of_blocks = loss
    if loss.kernel != PLAIN_LOGITS and not isinstance(head, str):  # no kernel of a block changes what the head does
        last = with_last_block(head, model)[0] if loss.part_of_last else head
        of_blocks = replace(loss, tokens=partial(_along_a_direction, last))
    check = check_name(model, config, strategy, "kernels", loss.description, sorted(choice.classes.items()))
    if not has_passed(check):
        with long_task(CHECKING_KERNELS, 1 + len(variants), "computations") as task, _few_blocks(model, strategy):
            for variant in variants:
                expected = expected or _own_probe(model, config, of_blocks, vocabulary, strategy=strategy)
                task.advance()
                problem = _problem(model, expected, of_blocks, vocabulary, variant, strategy=strategy)
                if problem:
                    names = " and ".join(variant.names()) or "ours"
                    return None, f"the model's own kernels ({names} {problem})"
        keep_passed(check, f"{config.get('model_type')}: {', '.join(choice.names())}")
    others = [name for name in exchanged if name not in {kernel for kernel, _ in choice.classes}]
    return choice, "; ".join([*choice.describe(), *(f"ours for {name}" for name in others)])


def _along_a_direction(head: Head, model: nn.Module, arrays: Arrays) -> mx.array:
    """Return the hidden state of each position along one random direction, (P,): a large vocabulary would take seconds."""
    hidden = head.hidden_at(arrays["positions"], arrays["inputs"], **shared_caches(model, arrays)).astype(mx.float32)
    return hidden @ mx.random.normal(hidden.shape[-1:], key=mx.random.key(1)) * arrays["weights"]  # (P, D) @ (D,)


def _own_probe(
    model: nn.Module,
    config: dict[str, Any],
    loss: Loss,
    vocabulary: int,
    tokens: int = CHECK_TOKENS,
    strategy: Strategy = SINGLE_DEVICE,
) -> Probe:
    """Try a loss with the model's own kernels.

    Raises:
        InputError: the model's own forward pass fails, or has no weights where ranks share them.
    """
    found = _probe_loss(model, loss, vocabulary, None, tokens, strategy)
    if isinstance(found, Exception):
        raise InputError(
            f"mlx-lm's {config.get('model_type')}: its forward pass fails here ({short(found, 200)}); {way_out(model)}"
        ) from found
    strategy.check_read(~mx.isfinite(found.losses), config)
    return found


def _problem(
    model: nn.Module,
    expected: Probe,
    loss: Loss,
    vocabulary: int,
    choose: KernelChoice | None = None,
    tokens: int = CHECK_TOKENS,
    strategy: Strategy = SINGLE_DEVICE,
) -> str | None:
    """Return in a few words what is wrong with a loss, or with the kernels below it, on this model; None: nothing."""
    found = _probe_loss(model, loss, vocabulary, choose, tokens, strategy)
    if isinstance(found, Exception):
        return f"fails on this model: {short(found, 100)}"
    return disagreement(model, expected, found)


def _probe_loss(
    model: nn.Module, loss: Loss, vocabulary: int, choose: KernelChoice | None, tokens: int, strategy: Strategy
) -> Probe | Exception:
    """Try a loss on some tokens, with the chosen kernels or the model's own; return the error of foreign code, if any.

    mlx-lm differentiates a recurrence token by token and keeps several states of each, which takes gigabytes for a whole
    model. For such a model, the gradient covers only RECURRENT_CHECK_TOKENS, and the longer row only a forward pass.
    """

    def on(tokens: int, gradient: bool) -> Probe:
        batch = check_arrays(vocabulary, tokens)
        return probe(model, lambda model: loss.tokens(model, batch), gradient, strategy)

    try:
        with nullcontext() if choose is None else training_kernels(model, choose=choose):
            if not has_recurrence(model):
                return on(tokens, True)
            long, short_row = on(tokens, False), on(RECURRENT_CHECK_TOKENS, True)
            return Probe(mx.concatenate([long.losses, short_row.losses]), short_row.gradients)
    except FOREIGN_ERRORS as error:
        raise_if_ours(error)
        return error


def check_arrays(vocabulary: int, tokens: int) -> Arrays:
    """Return one row with this many random tokens, the same ones in every call, three in four of them trained."""
    ids = mx.random.randint(0, vocabulary, (1, tokens + 1), key=mx.random.key(0))
    trained = np.arange(tokens) % 4 != 0  # not all, or a last block that leaves out the others would not be tried
    positions = np.flatnonzero(trained).astype(np.int32)
    return {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "mask": mx.array(trained[None]),
        "positions": mx.array(positions),
        "weights": mx.ones((len(positions),)),
    }


def _few_blocks(model: nn.Module, strategy: Strategy) -> AbstractContextManager:
    """Check one block of each kind; where ranks call the model together, all."""
    return nullcontext() if strategy.lockstep else few_blocks(model, CHECK_TOKENS, strategy.only_planned(model))


def activation_dtype(model: nn.Module) -> mx.Dtype:
    """Return the dtype of most of a model's numbers, which is that of its activations."""
    sizes: Counter[mx.Dtype] = Counter()
    for _, p in tree_flatten(model.parameters()):
        if mx.issubdtype(p.dtype, mx.floating):
            sizes[p.dtype] += p.size
    return sizes.most_common(1)[0][0]


def way_out(model: nn.Module) -> str:
    """Return advice about a model that fails; float32 may help, because mlx lacks a few 16-bit products on a CPU."""
    if has_halves(model) and not device.multiplies_16_bit_experts():
        return "give --dtype float32, or choose another model"
    return "choose another model"


# The step
#
# The graph is only built, not computed: both faults of third-party code (values computed while it is traced, kernels without a
# gradient) show there, in a fifth of the time, and the forward pass was computed above.

TRIAL_TOKENS = 8


@dataclass(frozen=True)
class StepVariant:
    """The loss and kernels that a step computes with.

    Attributes:
        loss: fused or plain.
        attend: our attention, None for the model's own kernels.
        choose: says which kernels are used, by shape.
        compiled: whether loss and gradient are compiled.
        notes: for the run header, about features that had to be switched off.
    """

    loss: Loss
    attend: AttentionCall | None
    choose: Choose = assumed
    compiled: bool = True
    notes: tuple[str, ...] = ()


def choose_step_variant(
    model: nn.Module,
    config: dict[str, Any],
    loss: Loss,
    attend: AttentionCall | None,
    name: str,
    choose: Choose = assumed,
    compiles: bool = True,
) -> StepVariant:
    """Return the fastest variant of the step that this model can be differentiated with.

    Args:
        model: the model to train, with adapters and checkpointing; it is not changed.
        config: its config.json.
        loss, attend: the ones that were chosen for it.
        name: of the model, for the error.
        choose: says which kernels are used, by shape.
        compiles: whether the step may be compiled.

    Raises:
        InputError: it cannot be differentiated.
    """
    batch = check_arrays(embedding_rows(model, config) or 256, TRIAL_TOKENS)
    problems: list[Exception] = []
    features = [(loss, own) for own in dict.fromkeys((attend, None))]
    features += [] if loss.train is PLAIN.train else [(PLAIN, None)]
    for (of_tokens, own), compiled in product(features, (True, False) if compiles else (False,)):  # the fastest first
        variant = StepVariant(of_tokens, own, choose, compiled)
        problem = _error_of(model, variant, batch)
        if problem is None and problems:
            without = [] if compiled else ["not compiled"]
            without += [] if own is attend else ["the model's own kernels instead of ours"]
            without += [] if of_tokens is loss else ["plain instead of fused loss"]
            note = f"{', '.join(without)}, since that fails on this model ({short(problems[0], 160)})"
            return replace(variant, notes=(note,))
        if problem is None:
            return variant
        problems.append(problem)
    raise InputError(
        f"--model {name}: mlx-lm's {config.get('model_type')} cannot be trained here ({short(problems[-1], 200)}); "
        f"{way_out(model)}"
    ) from problems[-1]


def _error_of(model: nn.Module, variant: StepVariant, batch: Arrays) -> Exception | None:
    """Differentiate the batch and return the error of foreign code, if any. The model is not changed."""
    arrays = [(name, value) for name, value in tree_flatten(model.state) if isinstance(value, mx.array)]
    high, low = mx.random.state[0].tolist()
    training = model.training
    model.train()
    step = differentiation(model, variant.loss.train, exchanging(variant.attend, variant.choose))
    try:
        (compiled_over(model, step) if variant.compiled else step)(batch)
    except FOREIGN_ERRORS as error:
        raise_if_ours(error)
        return error
    finally:
        # A trace that fails leaves placeholder arrays in the model.
        model.update(tree_unflatten(arrays))
        mx.random.seed(high << 32 | low)
        model.train(training)
    return None


# The comparison of two computations

# The most by which two correct results may differ: float32 sums in another order, or logits near ten rounded to 16 bits.
LOSS_TOLERANCE, HALVES_LOSS_TOLERANCE = 1e-4, 1e-1
GRADIENT_TOLERANCE, HALVES_GRADIENT_TOLERANCE = 1e-3, 1e-1


@dataclass(frozen=True)
class Probe:
    """The results of one computation.

    Attributes:
        losses: (P,) float32.
        gradients: by parameter; empty if nothing is trained.
    """

    losses: mx.array
    gradients: dict[str, mx.array]


def probe(
    model: nn.Module,
    token_losses: Callable[[nn.Module], mx.array],
    gradient: bool = True,
    strategy: Strategy = SINGLE_DEVICE,
) -> Probe:
    """Return the losses and, if anything is trained, the gradient of their sum, without dropout.

    If the model's own code has no gradient, only losses are returned; `choose_step_variant` decides whether the model trains.

    Args:
        model: is not changed.
        token_losses: takes the model and returns (P,).
        gradient: whether to compute the gradient.
        strategy: how the run computes gradients.
    """
    trains = gradient and bool(tree_flatten(model.trainable_parameters()))
    training, gradients = model.training, {}
    # In training mode for a gradient, because some models otherwise run a kernel without one.
    model.train(trains)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, Dropout)):
            module.eval()

    def total(model: nn.Module) -> tuple[mx.array, mx.array]:
        losses = token_losses(model)
        return losses.sum(), losses

    try:
        with left_unchanged(model):
            if trains:
                (_, losses), tree = strategy.value_and_grad(model, total)(model)
                gradients = dict(tree_flatten(tree))
            else:
                _, losses = total(model)
            mx.eval(losses)  # separately, so that a quantized head is not dequantized for both at a time
            mx.eval(gradients)
            return Probe(losses, gradients)
    except FOREIGN_ERRORS as error:
        if not (trains and is_foreign(error)):
            raise
    finally:
        model.train(training)
    return probe(model, token_losses, False, strategy)


def disagreement(model: nn.Module, expected: Probe, found: Probe) -> str | None:
    """Return in a few words how `found` differs from `expected`, None if only by rounding.

    Args:
        model: its dtype decides the size of rounding.
        expected, found: results for the same tokens.
    """
    halves = has_halves(model)
    count = len(expected.losses)
    # Relative to the mean loss, because a token that the model is sure of has nearly no loss.
    size = mx.maximum(mx.abs(expected.losses).mean(), 1e-6)
    apart = (mx.abs(found.losses - expected.losses).max() / size).item()
    if not apart <= (HALVES_LOSS_TOLERANCE if halves else LOSS_TOLERANCE):  # NaN too
        return f"differs by {apart:.1e} in the worst of {count} tokens' losses"
    if not expected.gradients:
        return None
    if not found.gradients:
        return "has no gradient on this model"
    # RecurrentGemma's own gradients are NaN in 16 bits, ours are not; such gradients are not compared.
    squares = [
        mx.where(
            mx.isfinite(one).all(), mx.stack([mx.square(found.gradients[name] - one).sum(), mx.square(one).sum()]), 0
        )
        for name, one in expected.gradients.items()
    ]
    difference, whole = mx.sqrt(mx.stack(squares).sum(axis=0)).tolist()
    apart = difference / max(whole, 1e-12)
    if not apart <= (HALVES_GRADIENT_TOLERANCE if halves else GRADIENT_TOLERANCE):
        return f"differs by {apart:.1e} in the gradient of {count} tokens"
    return None


def has_halves(model: nn.Module) -> bool:
    """Tell whether anything in the model has 16 bits."""
    return any(p.dtype in (mx.bfloat16, mx.float16) for _, p in tree_flatten(model.parameters()))


# Passed checks

STORE = "passed_checks"
MOST = 500  # checks that are remembered, the latest ones
SETTINGS = (bool, int, float, str, mx.Dtype)  # of a module


def check_name(model: nn.Module, config: dict[str, Any], strategy: Strategy, *compared: Any) -> str:
    """Return the name of a check, 32 hex digits; empty if it may not be left out.

    Nothing is left out if nothing is measured (MLX_LORA_MEASURE_KERNELS=0), or if ranks call the model together: one of them
    would wait for another that remembers.

    Args:
        model: as it is checked, with its adapters.
        config: its config.json.
        strategy: how ranks divide the run.
        compared: what else the result depends on; anything with a `repr` that is the same in every process.
    """
    if not may_measure() or strategy.lockstep:
        return ""
    settings = [
        (path, type(module).__qualname__, sorted((k, v) for k, v in vars(module).items() if isinstance(v, SETTINGS)))
        for path, module in model.named_modules()
    ]
    arrays = [(name, p.shape, str(p.dtype)) for name, p in tree_flatten(model.parameters())]
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    modules = {type(module).__module__ for module in model.modules()}
    files = {name: Path(sys.modules[name].__file__ or "") for name in sorted(modules)}
    sources = [(name, zlib.crc32(file.read_bytes()) if file.is_file() else 0) for name, file in files.items()]
    facts = (
        device.measured_on(),
        device.compiles(),
        package_version("mlx-lm"),
        package_sum(),
        sources,
        json.dumps(config, sort_keys=True, default=str),
        base_fingerprint(model, config),
        settings,
        arrays,
        trained,
        compared,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def has_passed(name: str) -> bool:
    """Return whether a check has passed before; never if its name is empty."""
    return bool(name) and name in read_store(STORE)


def keep_passed(name: str, words: str) -> None:
    """Remember that a check passed.

    Args:
        name: of the check; empty: it is not remembered.
        words: what was checked, for people who read the file.
    """
    if name:
        known = {**read_store(STORE), name: words}
        write_store(STORE, dict([*known.items()][-MOST:]))


@cache
def package_sum() -> int:
    """Return a check sum of this package's source: its version alone does not change with each change of it."""
    package = Path(__file__).parents[1]
    total = 0
    for path in sorted(package.rglob("*.py")):
        total = zlib.crc32(path.read_bytes(), total)
    return total
