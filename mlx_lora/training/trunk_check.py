"""Check on a model that a step which starts at the first adapted block gives the same loss and gradient as a whole one.

A model may hand more past its blocks than their output: keys that later blocks share, embeddings that they add again. No
list of architectures is kept; rows of the data are computed both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.batches import Batch, BatchPlan
from mlx_lora.data.encode import EncodedSet
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign, short
from mlx_lora.models.kernels import has_recurrence, training_kernels
from mlx_lora.models.trunk import NoTrunk, Trunk
from mlx_lora.planner.memory import CHECK_TOKENS, RECURRENT_CHECK_TOKENS
from mlx_lora.training.losses import Arrays
from mlx_lora.training.probe import disagreement, probe
from mlx_lora.training.trial import StepVariant
from mlx_lora.training.trunk_rows import Record

ROWS = 2
NEARER = 4.0  # kept outputs must be this many times nearer to the whole model's losses than outputs in another order


def trunk_problem(
    model: nn.Module,
    variant: StepVariant,
    trunk: Trunk,
    outputs: Callable[[mx.array], mx.array],
    rows: EncodedSet,
) -> Record | str:
    """Return what is kept for a position, or in a few words why this model's trunk cannot be kept.

    Args:
        model: adapted, with checkpointing.
        variant: the loss and the kernels of the run.
        trunk: of the model.
        outputs: computes it.
        rows: of the run's data.
    """
    dropping = [m for block in model.layers[: trunk.blocks] for m in block.modules() if isinstance(m, nn.Dropout)]
    if any(m._p_1 < 1 for m in dropping):
        return "its frozen blocks have dropout"
    recurrent = variant.attend is None and has_recurrence(model)
    arrays = Arrays.of(_cut(rows, (RECURRENT_CHECK_TOKENS if recurrent else CHECK_TOKENS) // ROWS))
    try:
        with training_kernels(model, variant.attend, variant.choose) if variant.attend else nullcontext():
            whole = probe(model, lambda model: variant.loss.tokens(model, *arrays))
            output = outputs(arrays.inputs)
            kept = Record.of(output).to_array(Record.of(output).to_bytes(output))
            with trunk.given(kept):
                above = probe(model, lambda model: variant.loss.tokens(model, *arrays))
            with trunk.given(kept[:, ::-1]):
                other = probe(model, lambda model: variant.loss.tokens(model, *arrays), gradient=False)
    except NoTrunk as error:
        return str(error)
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        return f"fails on this model: {short(error, 100)}"
    problem = disagreement(model, whole, above)
    if problem:
        return f"a step from it {problem}"
    difference, wrong = (mx.abs(one.losses - whole.losses).max().item() for one in (above, other))
    if not difference * NEARER <= wrong or not wrong:
        return "this model's losses do not depend on it, or rounding is too large to tell"
    return Record.of(output)


def _cut(rows: EncodedSet, most: int) -> Batch:
    """Return a batch of the first rows, cut to `most` positions and less, so that one has padding; all of it is trained."""
    chosen = [rows.row(number % len(rows))[0][: most + 1 - most // 4 * number] for number in range(ROWS)]
    cut = EncodedSet.from_rows([(tokens, np.arange(len(tokens)) > 0) for tokens in chosen])
    return BatchPlan(cut, batch_tokens=ROWS * most, batch_size=ROWS, seed=0).batch(0, 0)
