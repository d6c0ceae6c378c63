"""Random examples of texts, and what computes their vectors here and in sentence-transformers on torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from bound import bind

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.losses.agree import choose_loss
from mlx_lora.objectives.table import objective_of

VOCABULARY = 288


def random_examples(count: int, negatives: int = 0, scored: bool = False, seed: int = 0) -> EncodedSet:
    """Return examples whose texts are all different, queries shorter than documents."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        for side in range(2 + negatives):
            ids = random.integers(1, VOCABULARY, int(random.integers(3, 9 if side == 0 else 20))).astype(np.int32)
            rows.append((ids, np.zeros(len(ids), bool)))
    labels = np.arange(len(rows), dtype=np.float32)
    if scored:
        labels[0::2] = random.permutation(count) / count
    return EncodedSet.from_rows(rows).grouped(2 + negatives, labels).with_end_scores()


def bound(base, rows: EncodedSet, **settings):
    """Return the objective on a model, and its `BoundObjective`."""
    objective = objective_of(ObjectiveSettings(objective="embed", **{"pooling": "last"} | settings))
    objective.chosen = objective.options
    return objective, bind(objective, choose_loss(base.model, base.config), base)


def columns(batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (token ids, attention mask) of each column of a batch's examples, as sentence-transformers takes them."""
    kept = np.flatnonzero(batch.numbers >= 0)
    lengths = batch.mask.argmax(axis=1) + 1
    found = []
    for side in range(batch.group):
        rows = kept[side :: batch.group]
        mask = np.arange(batch.inputs.shape[1])[None] < lengths[rows][:, None]
        found.append((batch.inputs[rows].astype(np.int64), mask.astype(np.int64)))
    return found


def with_repeats(rows: EncodedSet, labels: dict[int, float]) -> EncodedSet:
    """Return the set with other numbers for some texts."""
    changed = rows.labels.copy()
    for row, label in labels.items():
        changed[row] = label
    return replace(rows, labels=changed)
