"""Find the fastest form of a step that works on a model, by differentiating it on a few tokens.

The graph is only built, not computed: both faults of third-party code (values computed while it is traced, kernels without a
gradient) show there, in a fifth of the time, and losses/check.py has already computed the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.kernels.table import Choose, assumed, exchanging
from mlx_lora.losses.check import check_arrays, way_out
from mlx_lora.losses.cross_entropy import PLAIN, Arrays, Loss
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign, short
from mlx_lora.models.load import embedding_rows
from mlx_lora.trainer.step import compiled_over, differentiation
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.kernels.attention import AttentionCall

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
    for variant in _variants(loss, attend, choose, (True, False) if compiles else (False,)):
        problem = _error_of(model, variant, batch)
        if problem is None:
            return replace(variant, notes=(_note(variant, loss, attend, problems[0]),)) if problems else variant
        problems.append(problem)
    raise InputError(
        f"--model {name}: mlx-lm's {config.get('model_type')} cannot be trained here ({short(problems[-1], 200)}); "
        f"{way_out(model)}"
    ) from problems[-1]


def _variants(
    loss: Loss, attend: AttentionCall | None, choose: Choose, compiles: tuple[bool, ...]
) -> Iterator[StepVariant]:
    """Yield the variants of a step, the fastest first."""
    kernels = [attend] if attend is None else [attend, None]
    choices = [(loss, own) for own in kernels]
    if loss.train is not PLAIN.train:
        choices.append((PLAIN, None))
    yield from (StepVariant(*choice, choose, compiled) for choice in choices for compiled in compiles)


def _note(variant: StepVariant, loss: Loss, attend: AttentionCall | None, problem: Exception) -> str:
    """Return a note for the header: the features that a variant does without, and the error that is the reason."""
    without = [
        words
        for words, missing in (
            ("not compiled", not variant.compiled),
            ("the model's own kernels instead of ours", variant.attend is not attend),
            ("plain instead of fused loss", variant.loss is not loss),
        )
        if missing
    ]
    return f"{', '.join(without)}, since that fails on this model ({short(problem, 160)})"


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
        if not is_foreign(error):
            raise
        return error
    finally:
        # A trace that fails leaves placeholder arrays in the model.
        model.update(tree_unflatten(arrays))
        mx.random.seed(high << 32 | low)
        model.train(training)
    return None
