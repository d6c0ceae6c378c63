"""The loss: a sum over trained tokens and their count, never a mean.

A mean cannot be added to another batch's mean; sums and counts can, so accumulation, validation and
several ranks all divide once, at the end.

Two kinds of loss compute the same number. `plain` uses the model's own logits of every position. `fused` uses
the hidden states of the supervised positions only and never holds their logits (fused.py); where the model allows it, the
last block computes only these positions too (models/last_block.py). Both are used if they agree with plain on a few tokens
of this model; otherwise plain, or the whole block, is used, and the run header says why.

Shapes: B batch, T time, P supervised positions (padded), D width, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.adapters.cut_layers import Wire
from mlx_lora.data.batches import Batch
from mlx_lora.models.few_blocks import few_blocks
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign, short
from mlx_lora.models.head import Head, find_head, with_last_block
from mlx_lora.models.kernel_choice import AUTO, OURS, KernelChoice
from mlx_lora.models.kernel_row import MLX, POLYNOMIAL
from mlx_lora.models.kernels import has_recurrence, training_kernels
from mlx_lora.models.shared_prefix import shared_caches
from mlx_lora.planner.memory import CHECK_TOKENS, LOSS_TOKENS, RECURRENT_CHECK_TOKENS
from mlx_lora.planner.this_machine import loss_tile_bytes
from mlx_lora.system import device
from mlx_lora.system.errors import InputError
from mlx_lora.system.long_task import long_task
from mlx_lora.training.base_shards import is_shared
from mlx_lora.training.divided_loss import divided
from mlx_lora.training.in_step import called_together
from mlx_lora.training.loss_choice import PLAIN_LOGITS, ROWS, TILES, choose_kernel, loss_figures, loss_kernels
from mlx_lora.training.passed_checks import check_name, has_passed, keep_passed
from mlx_lora.training.probe import Probe, disagreement, has_halves, probe
from mlx_lora.training.shared_use import unshareable_words
from mlx_lora.training.tensor_parallel import wire_of

# What a check is called while it runs.
CHECKING_LOSS = "Checking that the faster loss gives the model's own numbers"
CHECKING_KERNELS = "Checking that the faster kernels give the model's own numbers"


class Arrays(NamedTuple):
    """A batch on the device.

    Attributes:
        inputs, targets: (B, T) int32.
        mask: (B, T) bool, True where the target is trained.
        positions: (P,) int32, flat indices of the trained targets, padded with 0.
        weights: (P,) float32, 1 for a real position, 0 for padding.
    """

    inputs: mx.array
    targets: mx.array
    mask: mx.array
    positions: mx.array
    weights: mx.array

    @classmethod
    def of(cls, batch: Batch) -> Arrays:
        """Copy a batch to the device."""
        return cls(*(mx.array(getattr(batch, name)) for name in cls._fields))


TokenLosses = Callable[..., mx.array]
"""(model, *Arrays) -> (P,) float32 losses of the positions, 0 for padding. If a row holds a prompt and several answers,
`Batch.starts` is a sixth array."""
LossFunction = Callable[..., tuple]
"""(model, *arrays) -> (sum, count), float32 scalars, and if an objective reports more, a dict of sums. An empty mask gives (0, 0): nothing is divided, so no NaN."""


@dataclass(frozen=True)
class Loss:
    """A loss in its two uses.

    Attributes:
        train: the loss that is differentiated.
        measure: the loss for validation and evaluation, without a gradient.
        description: for the run header.
        tokens: the loss of each position, which can be differentiated; the checks compare it.
        kernel: its name (loss_choice.py); `plain` computes the model's own logits, of all positions at once.
        part_of_last: whether the model's last block computes only the supervised positions.
        measure_tokens: `tokens` without a gradient; None: use `tokens`.
    """

    train: LossFunction
    measure: LossFunction
    description: str
    tokens: TokenLosses
    kernel: str = PLAIN_LOGITS
    part_of_last: bool = False
    measure_tokens: TokenLosses | None = None


def plain_loss(
    model: nn.Module, inputs: mx.array, targets: mx.array, mask: mx.array, positions: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the summed next-token cross-entropy and its token count from the model's (B, T, V) logits."""
    losses = _plain_losses(model, inputs, targets)
    # where, not a product: a masked position may hold inf, and 0 * inf is NaN.
    return mx.where(mask, losses, 0.0).sum(), mask.astype(mx.float32).sum()


def plain_token_losses(
    model: nn.Module,
    inputs: mx.array,
    targets: mx.array,
    mask: mx.array,
    positions: mx.array,
    weights: mx.array,
    *starts: mx.array,
) -> mx.array:
    """Return the cross-entropy at the positions, (P,), from the model's logits."""
    losses = _plain_losses(model, inputs, targets, *starts).reshape(-1)[positions]
    return mx.where(weights > 0, losses * weights, 0.0)


def _plain_losses(model: nn.Module, inputs: mx.array, targets: mx.array, *starts: mx.array) -> mx.array:
    logits = model(inputs, **shared_caches(model, inputs, *starts)).astype(mx.float32)  # (B, T, V)
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)


def plain(description: str) -> Loss:
    """Return the loss from the model's own logits."""
    return Loss(plain_loss, plain_loss, description, plain_token_losses)


PLAIN = plain("plain cross-entropy")


def head_loss(head: Head, kernel: str, tile_bytes: int, whole_because: str = "", wire: Wire | None = None) -> Loss:
    """Return a loss that is computed only from the hidden states of the supervised positions.

    Args:
        head: turns hidden states into logits.
        kernel: a name in `loss_kernels()`.
        tile_bytes: the most bytes of logits at a time.
        whole_because: why the head has no last block of which some positions can be computed alone.
        wire: connects ranks that each compute some of the positions.
    """
    tiles = f"fused cross-entropy, {tile_bytes / 2**20:.0f} MiB tiles"
    words = {TILES: tiles, POLYNOMIAL: f"{tiles}, polynomial", ROWS: "mx.fast.cross_entropy by rows"}
    block = (
        "last block where trained" if head.last is not None else f"whole last block ({whole_because or 'not asked'})"
    )
    token_losses = partial(loss_kernels()[kernel], tile_bytes=tile_bytes)
    if wire is not None:
        token_losses, block = divided(token_losses, wire), f"{block}; positions divided by {wire.size} processes"

    def tokens(gradient: bool, model: nn.Module, *batch: mx.array) -> mx.array:
        inputs, targets, _mask, positions, weights, *starts = batch
        chosen = head.hidden_at(positions, inputs, **shared_caches(model, inputs, *starts))  # (P, D)
        return token_losses(head, chosen, targets.reshape(-1)[positions], weights, gradient=gradient)

    def loss(gradient: bool, model: nn.Module, *batch: mx.array) -> tuple[mx.array, mx.array]:
        return tokens(gradient, model, *batch).sum(), batch[-1].sum()

    of_tokens = partial(tokens, True), kernel, head.last is not None, partial(tokens, False)
    return Loss(partial(loss, True), partial(loss, False), f"{words[kernel]}; {block}", *of_tokens)


def choose_loss(
    model: nn.Module,
    config: dict[str, Any],
    asked: str = AUTO,
    say: Callable[[str], None] | None = None,
    whole_because: str = "",
) -> Loss:
    """Return the fastest loss that agrees with the plain loss on this model, or the plain loss if none does.

    Args:
        model: the model to train, with its adapters, or one to measure.
        config: its config.json.
        asked: --kernels; `mlx` is the model's own logits.
        say: called with one line before something is measured; None: nothing is measured, and our kernel is used
            if there are no measurements.
        whole_because: why the whole last block is computed although the model may allow less; empty: no reason.

    Raises:
        InputError: the model's own forward pass fails.
    """
    if asked == MLX:
        return plain(f"plain cross-entropy (--kernels {MLX})")
    if called_together(model):  # what one rank measures, another might not
        asked = OURS
    if is_shared(model):
        whole_because = whole_because or "it gets its weights in whole"
    head = find_head(model, config)
    if isinstance(head, str):
        return plain(f"plain cross-entropy ({head})")
    figures = None if asked == OURS else loss_figures(head, _dtype(model), say)
    kernel = choose_kernel(figures)
    if kernel == PLAIN_LOGITS:
        return plain("plain cross-entropy (measured)")
    # A head that ranks share is at hand a slice at a time, which whole rows of logits cannot use.
    others = [other for other in loss_kernels() if other != kernel and not (other == ROWS and len(head.parts()) > 1)]
    part, whole_because = (head, whole_because) if whole_because else with_last_block(head, model)
    first = head_loss(part, kernel, loss_tile_bytes(), whole_because, wire_of(model))
    check = check_name(model, config, "loss", first.description)
    if has_passed(check):
        return first
    # Two passes over one block of each kind, unless the first candidate is wrong.
    with long_task(CHECKING_LOSS, 2, "computations", say) as task, _few_blocks(model):
        expected, reasons = _own_probe(model, config, PLAIN, head.vocabulary, LOSS_TOKENS), []
        task.advance()
        for name in (kernel, *others):
            for one in [head] if part is head else [part, head]:
                loss = head_loss(one, name, loss_tile_bytes(), whole_because, wire_of(model))
                problem = _problem(model, expected, loss, head.vocabulary, tokens=LOSS_TOKENS)
                if problem is None:
                    keep_passed(check if loss.description == first.description else "", loss.description)
                    return loss
                whole_because = whole_because or f"less {problem}"
            reasons.append(f"{'fused' if name == TILES else name} {problem}")
    return plain(f"plain cross-entropy ({'; '.join(reasons)})")


def _few_blocks(model: nn.Module) -> AbstractContextManager:
    """Check one block of each kind; where ranks call the model together, all."""
    return nullcontext() if called_together(model) else few_blocks(model, CHECK_TOKENS)


def _dtype(model: nn.Module) -> mx.Dtype:
    """Return the dtype of most of a model's numbers, which is that of its activations."""
    sizes: Counter[mx.Dtype] = Counter()
    for _, p in tree_flatten(model.parameters()):
        if mx.issubdtype(p.dtype, mx.floating):
            sizes[p.dtype] += p.size
    return sizes.most_common(1)[0][0]


def check_kernels(
    model: nn.Module,
    config: dict[str, Any],
    loss: Loss,
    choice: KernelChoice,
    say: Callable[[str], None] | None = None,
) -> tuple[KernelChoice | None, str]:
    """Return the kernels if the model's results with them agree with its own, else None; and a text for the header.

    Args:
        model: the model to train, with its adapters.
        config: its config.json.
        loss: the loss that was chosen for the model.
        choice: the kernels that were chosen for the model.
        say: takes a line if it takes long.
    """
    if choice.asked == MLX:
        return None, f"the model's own kernels (--kernels {MLX})"
    head = find_head(model, config)
    vocabulary = config.get("vocab_size", 256) if isinstance(head, str) else head.vocabulary
    expected, variants = None, choice.variants()
    for variant in variants:
        with training_kernels(model, choose=variant) as exchanged:
            if not exchanged:
                return None, "the model's own kernels"
    of_blocks = loss
    if loss.kernel != PLAIN_LOGITS and not isinstance(head, str):  # no kernel of a block changes what the head does
        last = with_last_block(head, model)[0] if loss.part_of_last else head
        of_blocks = replace(loss, tokens=partial(_along_a_direction, last))
    check = check_name(model, config, "kernels", loss.description, sorted(choice.classes.items()))
    if not has_passed(check):
        with long_task(CHECKING_KERNELS, 1 + len(variants), "computations", say) as task, _few_blocks(model):
            for variant in variants:
                expected = expected or _own_probe(model, config, of_blocks, vocabulary)
                task.advance()
                problem = _problem(model, expected, of_blocks, vocabulary, variant)
                if problem:
                    names = " and ".join(variant.names()) or "ours"
                    return None, f"the model's own kernels ({names} {problem})"
        keep_passed(check, f"{config.get('model_type')}: {', '.join(choice.names())}")
    others = [name for name in exchanged if name not in {kernel for kernel, _ in choice.classes}]
    return choice, "; ".join([*choice.describe(), *(f"ours for {name}" for name in others)])


def _along_a_direction(head: Head, model: nn.Module, *batch: mx.array) -> mx.array:
    """Return the hidden state of each position along one random direction, (P,): a large vocabulary would take seconds."""
    inputs, _targets, _mask, positions, weights, *starts = batch
    hidden = head.hidden_at(positions, inputs, **shared_caches(model, inputs, *starts)).astype(mx.float32)  # (P, D)
    return hidden @ mx.random.normal(hidden.shape[-1:], key=mx.random.key(1)) * weights


def _own_probe(
    model: nn.Module, config: dict[str, Any], loss: Loss, vocabulary: int, tokens: int = CHECK_TOKENS
) -> Probe:
    """Try a loss with the model's own kernels.

    Raises:
        InputError: the model's own forward pass fails, or has no weights where ranks share them.
    """
    try:
        found = _probe(model, loss, vocabulary, has_recurrence(model), tokens)
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        raise InputError(
            f"mlx-lm's {config.get('model_type')}: its forward pass fails here ({short(error, 200)}); {way_out(model)}"
        ) from error
    if is_shared(model) and not mx.isfinite(found.losses).all().item():
        raise InputError(unshareable_words(config))
    return found


def _problem(
    model: nn.Module,
    expected: Probe,
    loss: Loss,
    vocabulary: int,
    choose: KernelChoice | None = None,
    tokens: int = CHECK_TOKENS,
) -> str | None:
    """Return in a few words what is wrong with a loss, or with the kernels below it, on this model; None: nothing."""
    recurrent = has_recurrence(model)  # must look at the model's own functions, before ours replace them
    try:
        with nullcontext() if choose is None else training_kernels(model, choose=choose):
            found = _probe(model, loss, vocabulary, recurrent, tokens)
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        return f"fails on this model: {short(error, 100)}"
    return disagreement(model, expected, found)


def _probe(model: nn.Module, loss: Loss, vocabulary: int, recurrent: bool, tokens: int) -> Probe:
    """Try a loss on some tokens.

    mlx-lm differentiates a recurrence token by token and keeps several states of each, which takes gigabytes for a whole
    model. For such a model, the gradient covers only RECURRENT_CHECK_TOKENS, and the longer row only a forward pass.
    """

    def on(tokens: int, gradient: bool) -> Probe:
        batch = check_arrays(vocabulary, tokens)
        return probe(model, lambda model: loss.tokens(model, *batch), gradient)

    if not recurrent:
        return on(tokens, True)
    long, short_row = on(tokens, False), on(RECURRENT_CHECK_TOKENS, True)
    return Probe(mx.concatenate([long.losses, short_row.losses]), short_row.gradients)


def check_arrays(vocabulary: int, tokens: int) -> Arrays:
    """Return one row with this many random tokens, the same ones in every call, three in four of them trained."""
    ids = mx.random.randint(0, vocabulary, (1, tokens + 1), key=mx.random.key(0))
    trained = np.arange(tokens) % 4 != 0  # not all, or a last block that leaves out the others would not be tried
    positions = np.flatnonzero(trained).astype(np.int32)
    return Arrays(ids[:, :-1], ids[:, 1:], mx.array(trained[None]), mx.array(positions), mx.ones((len(positions),)))


def way_out(model: nn.Module) -> str:
    """Return advice about a model that fails; float32 may help, because mlx lacks a few 16-bit products on a CPU."""
    if has_halves(model) and not device.multiplies_16_bit_experts():
        return "give --dtype float32, or choose another model"
    return "choose another model"
