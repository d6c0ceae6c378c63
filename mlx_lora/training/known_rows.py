"""After a run: how many of its training rows the model would answer word for word.

A held-out loss tells whether the form of the answers was learned. Facts that stand in no held-out row do not show in it: a run
over a catalog can halve its held-out loss and know nothing of the catalog. The rows that were trained tell.
"""

from __future__ import annotations

import math

import numpy as np

from mlx_lora.data.encoded_set import EncodedSet
from mlx_lora.models.load import Base
from mlx_lora.objectives.objective_table import objective_of
from mlx_lora.settings.config import TrainSettings
from mlx_lora.training.held_out import spaced_by_length
from mlx_lora.training.held_out_rows import KnownRows
from mlx_lora.training.trainer import held_out_loss

MOST_ROWS = 32
MOST_POSITIONS = 8192  # of all measured rows together
SHORT = 48  # trained tokens of a row, on average; longer answers are seldom meant to be repeated word for word


def known_rows(base: Base, rows: EncodedSet, settings: TrainSettings) -> KnownRows | None:
    """Measure a sample of the training rows with the trained model.

    Args:
        base: with its adapter.
        rows: that were trained on.
        settings: of the run, which ran in one process.

    Returns:
        None where the question has no meaning: another objective, plain text, trained prompts, long answers.
    """
    if settings.objective.objective != "sft" or not settings.data.mask_prompt:
        return None
    count = min(MOST_ROWS, len(rows), max(1, int(MOST_POSITIONS / max(1.0, float(rows.lengths.mean())))))
    sample = rows.select(spaced_by_length(rows, count)) if count else rows
    if not len(sample) or not _has_short_answers(sample):
        return None
    # With a loss of its own: that of a run may read what its frozen blocks gave for a row of the whole set.
    losses = held_out_loss(base, sample, settings.loop, objective_of(settings.objective)).rows
    if losses is None or not np.isfinite(losses.sums).all():
        return None
    return KnownRows(int((losses.sums < math.log(2)).sum()), len(losses.sums))


def _has_short_answers(rows: EncodedSet) -> bool:
    """Return whether all rows have a prompt that is not trained, and answers that are short on average."""
    firsts = [np.flatnonzero(rows.row(number)[1])[:1] for number in range(len(rows))]
    return all(len(first) and first[0] > 1 for first in firsts) and rows.mask.sum() / len(rows) <= SHORT
