"""Decide whether a run computes a prompt once for its answers: if that saves work and the model allows it.

The answers are the two of a pair, or those that are sampled to a prompt. First the model's structure is checked
(models/shared_prefix.py). Then a random pair is computed both ways, with the run's own loss and kernels; the results may
differ only by rounding.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.batches import BatchPlan
from mlx_lora.data.encode import EncodedSet
from mlx_lora.data.joining import joined, saved_share
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign, short
from mlx_lora.models.kernel_choice import KernelChoice
from mlx_lora.models.kernels import training_kernels
from mlx_lora.models.shared_prefix import rotate_by_token, unshareable
from mlx_lora.models.vocabulary import embedding_rows
from mlx_lora.planner.shapes import ModelShape
from mlx_lora.training.losses import Arrays, Loss
from mlx_lora.training.probe import Probe, disagreement, probe

# What a score costs, in its two products: masks, exponentials and passes over memory included. From eight answers of 100
# tokens to a prompt of 20, which took 19% longer in one row on a CPU (benchmarks/group_training.py, SmolLM2).
SCORE_COST = 4.0
LEAST_SAVED = 0.02  # share of a step's products; a smaller saving is not worth a mask for each row
PROMPT_TOKENS, ANSWER_TOKENS = 24, (20, 12)
NEARER = 4.0  # a joined row must be this many times nearer to separate rows than the same tokens read as one text


def work_of(shape: ModelShape) -> Callable[[np.ndarray], float]:
    """Return what counts the products of a pass over rows of these numbers of positions, (R,).

    Every position is multiplied by the weights, and its query by the keys before it. Masks and exponentials count as
    SCORE_COST says.
    """
    weights = sum(layer.inputs * layer.outputs * layer.active for block in shape.blocks for layer in block.layers)
    per_score = SCORE_COST * sum(2 * block.heads * block.head_width for block in shape.blocks)

    def cost(positions: np.ndarray) -> float:
        counted = positions.astype(float)
        return float((weights * counted + per_score * counted**2 / 2).sum())

    return cost


def saved_work(shape: ModelShape, rows: EncodedSet) -> float:
    """Return the share of a pass's products that joining rows saves; it is below 0 if the longer rows cost more.

    Fewer positions are multiplied by the weights, but each attends to a row that also holds the other answers.
    """
    cost = work_of(shape)
    apart = cost(rows.lengths - 1)
    return 1 - cost(joined(rows).lengths - 1) / apart if apart and saved_share(rows) else 0.0


def layout_problem(asked: str, model: nn.Module, shape: ModelShape, rows: EncodedSet) -> str | None:
    """Return in a few words why the answers to a prompt should stay in separate rows, None if they can share one.

    Args:
        asked: --shared-prefix.
        model: its arrays need not be computed.
        shape: of the model.
        rows: each answer in a row of its own, or room for one.
    """
    problem = f"--shared-prefix {asked}" if asked == "off" else unshareable(model)
    if problem is None and asked == "auto":
        saved = saved_work(shape, rows)
        problem = None if saved >= LEAST_SAVED else f"a shared prompt would save {max(0.0, saved):.0%} of the work"
    return problem


def sharing_problem(
    model: nn.Module, config: dict[str, Any], loss: Loss, kernels: KernelChoice | None = None
) -> str | None:
    """Return in a few words how this model's results for a joined row are wrong, None if they equal separate rows'.

    Args:
        model: adapted; from this call on, its rotary embeddings take a position for each token.
        config: its config.json.
        loss, kernels: of the run; None: the model's own kernels.
    """
    rotate_by_token(model)
    rows = _random_pair(embedding_rows(model, config) or 256)
    try:
        with nullcontext() if kernels is None else training_kernels(model, choose=kernels):
            apart, together, as_one = (
                _probe(model, loss, one) for one in (rows, joined(rows), _without_starts(joined(rows)))
            )
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        return f"fails on a shared prompt: {short(error, 100)}"
    problem = disagreement(model, apart, together)
    if problem:
        return f"a shared prompt {problem}"
    # With 16 bits, rounding is so large that wrong positions could pass as rounding. So the joined row must also be much
    # nearer to the separate rows than a row with wrong positions is.
    difference, wrong = (mx.abs(one.losses - apart.losses).max().item() for one in (together, as_one))
    if difference * NEARER > wrong:
        return "rounding is too large on this model to check a shared prompt"
    return None


def _random_pair(vocabulary: int) -> EncodedSet:
    random = np.random.default_rng(0)
    prompt = random.integers(0, vocabulary, PROMPT_TOKENS).astype(np.int32)
    texts = [np.concatenate([prompt, random.integers(0, vocabulary, n).astype(np.int32)]) for n in ANSWER_TOKENS]
    return EncodedSet.from_rows([(text, np.arange(len(text)) >= PROMPT_TOKENS) for text in texts]).grouped(2)


def _without_starts(rows: EncodedSet) -> EncodedSet:
    return EncodedSet(rows.tokens, rows.mask, rows.offsets)


def _probe(model: nn.Module, loss: Loss, rows: EncodedSet) -> Probe:
    plan = BatchPlan(rows, batch_tokens=2 * int(rows.lengths.max()), batch_size=None, seed=0)
    batch = plan.batch(0, 0)
    arrays = [*Arrays.of(batch), *([] if batch.starts is None else [mx.array(batch.starts)])]
    found = probe(model, lambda model: loss.tokens(model, *arrays))
    return Probe(found.losses[: sum(ANSWER_TOKENS)], found.gradients)  # without padding
