"""Reranking: give a document a score of how well it answers a query (--objective rerank), by a cross-encoder.

Query and document are read together (data/labeled.py), and the score head of one output reads the last token, as in a
classifier (objectives/classify.py). A query with K documents is an example of K rows, which stay together in a batch; a query
with fewer has rows of one token, which no loss reads. Losses and measures are in losses/scores.py.

Shapes: B rows of a batch, E = B / K queries, T columns, P positions (one for each row, then padding).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.labeled import GRADES, ROWS
from mlx_lora.losses.cross_entropy import Arrays, Loss, token_arrays
from mlx_lora.losses.scores import LISTWISE, best_first, random_mrr, ranking_loss, ranking_measures
from mlx_lora.models.prefix_attention import answers_at
from mlx_lora.objectives.base import BoundObjective, RunContext, ScoreHead, WholeSet
from mlx_lora.objectives.scored_texts import ScoredTexts, as_share
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch

log = logging.getLogger(__name__)

ACCURACY, QUERIES = "accuracy", "queries"
NONE = -1.0  # the grade of a row that holds no document
# A head at transformers' scale gives an untrained model scores that lie apart by more than 1, so that its loss is above that of
# guessing and a fall to guessing looks like learning. At this scale the run starts at the loss of guessing.
HEAD_SCALE = 0.01


@dataclass(eq=False)
class Rerank(ScoredTexts):
    """An objective whose examples are queries with documents.

    Attributes:
        kind: of the loss; that of an adapter which is measured is its own.
    """

    kind: str = field(init=False)

    def __post_init__(self) -> None:
        self.kind = self.options.rerank_loss

    @property
    def head(self) -> ScoreHead:
        about = {"objective": self.options.objective, "problem_type": "regression", "labels": [], "loss": self.kind}
        return ScoreHead(1, HEAD_SCALE, about)

    def open(self, ctx: RunContext) -> None:
        super().open(ctx)
        self.kind = (ctx.score_head or {}).get("loss", self.kind)

    def _with_targets(self, rows: EncodedSet) -> EncodedSet:
        """Return the rows of all queries' documents, the best graded first, with the last token of each as its position."""
        facts: Any = rows.facts or ()
        candidates = self.options.candidates
        chosen = [_chosen(np.array(fact[GRADES]), candidates) for fact in facts]
        most = max(map(len, chosen), default=1)
        if longer := [len(fact[GRADES]) for fact in facts if len(fact[GRADES]) > candidates]:
            log.info(
                f"Ranked among {candidates} documents, those with the best grades and the worst one, where a query has more: "
                f"{counted(len(longer), 'query', 'queries')}, of up to {max(longer):,}; --candidates {max(longer)} ranks all"
            )
        found, grades = [], []
        for fact, numbers in zip(facts, chosen, strict=True):
            tokens = [fact[ROWS][number] for number in numbers]
            tokens += [tokens[0][:1]] * (most - len(tokens))
            found += [(one, np.zeros(len(one), bool)) for one in tokens]
            grades += [fact[GRADES][number] for number in numbers] + [NONE] * (most - len(numbers))
        return EncodedSet.from_rows(found).grouped(most, np.array(grades, np.float32)).with_end_scores()

    def bind(self, ctx: RunContext, loss: Loss, rows: EncodedSet) -> BoundObjective:
        scores_of, words = self.scores_of(ctx, loss)

        def scored(model: nn.Module, arrays: Arrays) -> mx.array:
            """Return the scores of a batch's documents, (E, K)."""
            found, grades = scores_of(model, arrays).squeeze(-1) * arrays["weights"], arrays["grades"]  # (P,)
            own = answers_at(arrays)[None, :] == mx.arange(grades.size)[:, None]  # (B, P)
            return mx.where(own, found[None, :], 0.0).sum(axis=1).reshape(grades.shape)

        def summed(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
            scores = scored(model, arrays)
            right, queries = best_first(scores, arrays["grades"])
            lost, count = ranking_loss(self.kind, scores, arrays["grades"])
            # The listwise loss is a mean over queries, too. MLX cannot compile a function that computes one output twice.
            return lost, count, {ACCURACY: right, QUERIES: count if self.kind == LISTWISE else queries}

        def examples(scores: np.ndarray, batch: Batch, arrays: Arrays) -> np.ndarray:
            grades = np.array(arrays["grades"])
            return np.stack([scores, grades], axis=1)[(grades >= 0).any(axis=1)]  # (E, 2, K)

        def measured(found: np.ndarray) -> tuple[float, dict[str, float]]:
            scores, grades = np.moveaxis(found, 1, 0)
            total, count = ranking_loss(self.kind, mx.array(scores), mx.array(grades))
            return total.item() / max(1.0, count.item()), ranking_measures(scores, grades) | random_mrr(grades)

        description = f"rerank: {self.options.rerank_loss}; {words}"
        return BoundObjective(
            replace(loss, train=summed, measure=summed, description=description),
            arrays_of,
            reports=(ACCURACY, QUERIES),
            finish=lambda means: as_share(means, ACCURACY, QUERIES),
            whole_set=WholeSet(scored, examples, measured),
        )


def _chosen(grades: np.ndarray, most: int) -> np.ndarray:
    """Return the numbers of at most so many documents, the best first, and always the worst one among them."""
    order = np.argsort(-grades, kind="stable")
    if len(order) > most and grades[order[most - 1]] == grades[order[0]]:
        return np.append(order[: most - 1], order[-1])  # else all were equally good
    return order[:most]


def arrays_of(batch: Batch) -> Arrays:
    """Copy a batch to the device, with the `grades` of its documents, (E, K) float32, NONE where there is none."""
    grades = np.where(batch.real, batch.columns["labels"], NONE).astype(np.float32)
    return token_arrays(batch) | {"grades": mx.array(grades.reshape(-1, batch.group))}
