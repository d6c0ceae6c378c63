"""Join the rows of an example, which begin with the same tokens: the prompt once, then the rest of each row.

    rows      p p p p a a a         joined    p p p | p a a a | p b b
              p p p p b b           starts            3         7

The prompt's last token is repeated, because it is the one that predicts an answer's first token, and each answer needs
that prediction. models/shared_prefix.py computes such rows.

Shapes: E examples, K rows of each.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from mlx_lora.data.encode import EncodedSet


def joined(rows: EncodedSet) -> EncodedSet:
    """Return a set with one row per example, which holds all its rows; labels and references are (E, K)."""
    if rows.group < 2 or not len(rows):
        return rows
    parts, starts = [], []
    for example, shared in enumerate(shared_tokens(rows)):
        edges = rows.offsets[example * rows.group : (example + 1) * rows.group + 1]
        spans = [(edges[0], edges[0] + shared), *((a + shared, b) for a, b in pairwise(edges))]
        parts += [np.arange(*span) for span in spans]
        starts.append(np.cumsum([b - a for a, b in spans[:-1]]))
    order = np.concatenate(parts)
    begins = np.array(starts, np.int32)  # (E, K)
    lengths = [sum(map(len, parts[i : i + rows.group + 1])) for i in range(0, len(parts), rows.group + 1)]

    def by_example(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values.reshape(-1, rows.group)

    return replace(
        rows,
        tokens=rows.tokens[order],
        mask=rows.mask[order],
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        group=1,
        labels=by_example(rows.labels),
        answers=None if rows.answers is None else rows.answers[order],
        reference=by_example(rows.reference),
        starts=begins,
    )


def shared_tokens(rows: EncodedSet) -> np.ndarray:
    """Return how many tokens of each example's rows can be computed once, (E,) int64.

    These are the tokens that all rows begin with, without the one before a row's first answer token.
    """
    trained = rows.mask if rows.answers is None else rows.answers
    found = np.zeros(rows.examples, np.int64)
    for example in range(rows.examples):
        edges = rows.offsets[example * rows.group : (example + 1) * rows.group + 1]
        texts = [rows.tokens[a:b] for a, b in pairwise(edges)]
        most = min(int(np.argmax(trained[a:b])) - 1 for a, b in pairwise(edges))
        alike = np.logical_and.reduce([text[:most] == texts[0][:most] for text in texts])
        found[example] = most if alike.all() else int(np.argmin(alike))
    return found


def saved_share(rows: EncodedSet) -> float:
    """Return the share of positions that joining saves, 0 if nothing can be joined."""
    if rows.group < 2 or not len(rows):
        return 0.0
    saved = int(shared_tokens(rows).sum()) * (rows.group - 1)
    return saved / int((rows.lengths - 1).sum())
