"""A few tokens forward and back before the run: whether a model trains at all, and with which of our forms.

mlx-lm's models are third-party code that was written to generate. Some compute values while they are traced, some
have kernels without a gradient. What fails here is done without, one thing after the other, and said in the run's
header; a model with which nothing works is refused before it has cost anyone an hour.

The graph is built and not computed: both faults show there, and it takes a fifth of the time. That the forward pass
can be computed is known from the checks of its values (losses.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.models.attention import AttentionCall
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign, short
from mlx_lora.models.kernels import Choose, assumed
from mlx_lora.models.vocabulary import embedding_rows
from mlx_lora.system.errors import InputError
from mlx_lora.training.losses import PLAIN, Arrays, Loss, check_arrays, way_out
from mlx_lora.training.step import compiled_over, differentiation

TRIAL_TOKENS = 8


@dataclass(frozen=True)
class StepForm:
    """What a step computes with.

    Attributes:
        loss: fused or plain.
        attend: our attention, None for the model's own kernels.
        choose: says which kernels are used, by shape.
        compiled: whether loss and gradient are compiled.
        notes: for the run header, on what had to be left out.
    """

    loss: Loss
    attend: AttentionCall | None
    choose: Choose = assumed
    compiled: bool = True
    notes: tuple[str, ...] = ()


def choose_step_form(
    model: nn.Module,
    config: dict[str, Any],
    loss: Loss,
    attend: AttentionCall | None,
    name: str,
    choose: Choose = assumed,
) -> StepForm:
    """Return the fastest form of the step that this model can be differentiated with.

    Args:
        model: the model to train, adapters and checkpointing in place; left as it was.
        config: its config.json.
        loss, attend: what was chosen for it.
        name: of the model, for the error.
        choose: says which kernels are used, by shape.

    Raises:
        InputError: it cannot be differentiated at all.
    """
    batch = check_arrays(embedding_rows(model, config) or 256, TRIAL_TOKENS)
    problems: list[Exception] = []
    for form in _forms(loss, attend, choose):
        problem = _problem_of(model, form, batch)
        if problem is None:
            return replace(form, notes=(_note(form, loss, attend, problems[0]),)) if problems else form
        problems.append(problem)
    raise InputError(
        f"--model {name}: mlx-lm's {config.get('model_type')} cannot be trained here ({short(problems[-1], 200)}); "
        f"{way_out(model)}"
    ) from problems[-1]


def _forms(loss: Loss, attend: AttentionCall | None, choose: Choose) -> Iterator[StepForm]:
    """Yield the forms of a step, the fastest first."""
    kernels = [attend] if attend is None else [attend, None]
    choices = [(loss, own) for own in kernels]
    if loss.train is not PLAIN.train:
        choices.append((PLAIN, None))
    yield from (StepForm(*choice, choose, compiled) for choice in choices for compiled in (True, False))


def _note(form: StepForm, loss: Loss, attend: AttentionCall | None, problem: Exception) -> str:
    """Return for the header what a form does without, and what it was that failed."""
    without = [
        words
        for words, missing in (
            ("not compiled", not form.compiled),
            ("the model's own kernels instead of ours", form.attend is not attend),
            ("plain instead of fused loss", form.loss is not loss),
        )
        if missing
    ]
    return f"{', '.join(without)}, since that fails on this model ({short(problem, 160)})"


def _problem_of(model: nn.Module, form: StepForm, batch: Arrays) -> Exception | None:
    """Differentiate the batch and return what foreign code raised, None if nothing did. The model stays as it was."""
    arrays = [(name, value) for name, value in tree_flatten(model.state) if isinstance(value, mx.array)]
    high, low = mx.random.state[0].tolist()
    training = model.training
    model.train()
    step = differentiation(model, form.loss.train, form.attend, form.choose)
    try:
        (compiled_over(model, step) if form.compiled else step)(*batch)
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        return error
    finally:
        # A trace that fails leaves its stand-ins behind.
        model.update(tree_unflatten(arrays))
        mx.random.seed(high << 32 | low)
        model.train(training)
    return None
