"""Reranking: give a document a score of how well it answers a query (--objective rerank), by a cross-encoder.

Query and document are read together (data/labeled.py), and the score head of one output reads the last token, as in a
classifier (objectives/classify.py). A query with K documents is an example of K rows, which stay together in a batch; a query
with fewer has rows of one token, which no loss reads. Losses and measures are in losses/ranking.py.

Shapes: B rows of a batch, E = B / K queries, T columns, P positions (one for each row, then padding).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.labeled import GRADES, ROWS
from mlx_lora.losses.cross_entropy import Arrays, Loss, token_arrays
from mlx_lora.losses.ranking import LISTWISE, PAIRWISE, best_first, random_mrr, ranking_loss, ranking_measures
from mlx_lora.models.head import body_of, scores_at, with_last_block
from mlx_lora.models.prefix_attention import answers_at
from mlx_lora.objectives.base import BoundObjective
from mlx_lora.objectives.scored_texts import ScoredTexts
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.parallel.strategy import Strategy

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
        kind: of the loss.
        candidates: the most documents of a query that are used.
    """

    kind: str = PAIRWISE
    candidates: int = 8

    @property
    def metrics(self) -> tuple[str, ...]:
        return (ACCURACY, "mrr", "ndcg")

    @property
    def head(self) -> dict[str, Any]:
        return {"objective": self.name, "problem_type": "regression", "labels": [], "loss": self.kind}

    def measures_with(self, head: Mapping[str, Any] | None) -> None:
        self.kind = (head or {}).get("loss", self.kind)

    def targets_of(self, rows: EncodedSet) -> EncodedSet:
        """Return the rows of all queries' documents, the best graded first, with the last token of each as its position."""
        facts: Any = rows.facts or ()
        chosen = [_chosen(np.array(fact[GRADES]), self.candidates) for fact in facts]
        most = max(map(len, chosen), default=1)
        if longer := [len(fact[GRADES]) for fact in facts if len(fact[GRADES]) > self.candidates]:
            log.info(
                f"Ranked among {self.candidates} documents, those with the best grades and the worst one, where a query has more: "
                f"{counted(len(longer), 'query', 'queries')}, of up to {max(longer):,}; --candidates {max(longer)} ranks all"
            )
        found, grades = [], []
        for fact, numbers in zip(facts, chosen, strict=True):
            tokens = [fact[ROWS][number] for number in numbers]
            tokens += [tokens[0][:1]] * (most - len(tokens))
            found += [(one, np.zeros(len(one), bool)) for one in tokens]
            grades += [fact[GRADES][number] for number in numbers] + [NONE] * (most - len(numbers))
        return EncodedSet.from_rows(found).grouped(most, np.array(grades, np.float32)).with_end_scores()

    def bind(self, loss: Loss, model: nn.Module) -> BoundObjective:
        body = body_of(model)
        body = with_last_block(body, model)[0] if loss.part_of_last else body

        def scored(model: nn.Module, arrays: Arrays) -> mx.array:
            """Return the scores of a batch's documents, (E, K)."""
            found, grades = scores_at(model, body, arrays).squeeze(-1) * arrays["weights"], arrays["grades"]  # (P,)
            own = answers_at(arrays)[None, :] == mx.arange(grades.size)[:, None]  # (B, P)
            return mx.where(own, found[None, :], 0.0).sum(axis=1).reshape(grades.shape)

        def summed(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
            scores = scored(model, arrays)
            right, queries = best_first(scores, arrays["grades"])
            lost, count = ranking_loss(self.kind, scores, arrays["grades"])
            # The listwise loss is a mean over queries, too. MLX cannot compile a function that computes one output twice.
            return lost, count, {ACCURACY: right, QUERIES: count if self.kind == LISTWISE else queries}

        words = f"{self.description}; last block {'whole' if body.last is None else 'where scored'}"
        return BoundObjective(
            replace(loss, train=summed, measure=summed, description=words),
            arrays_of,
            reports=(ACCURACY, QUERIES),
            finish=_finished,
            whole_set=RankedSet(scored, self.kind),
        )


def rerank(settings: ObjectiveSettings) -> Rerank:
    """Return the objective of --objective rerank."""
    return Rerank(
        "rerank", "candidates", f"rerank: {settings.rerank_loss}", scores=True, reports=(ACCURACY,),
        kind=settings.rerank_loss, candidates=settings.candidates, head_scale=HEAD_SCALE,
    )  # fmt: skip


def _chosen(grades: np.ndarray, most: int) -> np.ndarray:
    """Return the numbers of at most so many documents, the best first, and always the worst one among them."""
    order = np.argsort(-grades, kind="stable")
    if len(order) > most and grades[order[most - 1]] == grades[order[0]]:
        return np.append(order[: most - 1], order[-1])  # else all were equally good
    return order[:most]


def _finished(means: dict[str, float]) -> dict[str, float]:
    """Turn the sums of a step's queries into a share: the loss may be divided by documents or pairs."""
    return {ACCURACY: means[ACCURACY] / means[QUERIES]} if means.get(QUERIES) else means


def arrays_of(batch: Batch) -> Arrays:
    """Copy a batch to the device, with the `grades` of its documents, (E, K) float32, NONE where there is none."""
    if batch.labels is None:
        raise ValueError("a batch of rows without grades")
    grades = np.where(batch.real, batch.labels, NONE).astype(np.float32)
    return token_arrays(batch) | {"grades": mx.array(grades.reshape(-1, batch.group))}


@dataclass(frozen=True)
class RankedSet:
    """Measures a set of queries from the scores of all their documents.

    Attributes:
        scored: (model, arrays of a batch) -> (E, K) scores.
        kind: of the loss.
    """

    scored: Callable[..., mx.array]
    kind: str

    def above(self, given: Callable[[Callable[..., Any]], Callable[..., Any]]) -> RankedSet:
        """Return it with `given` around what computes the scores of a batch."""
        return replace(self, scored=given(self.scored))

    def __call__(
        self,
        model: nn.Module,
        arrays_of: Callable[[Batch], Arrays],
        batches: Iterable[Batch],
        strategy: Strategy,
    ) -> tuple[float, int, dict[str, float]]:
        """Return the mean loss over all ranks' batches, the number of queries, and the measures of their rankings.

        Args:
            model: in eval mode.
            arrays_of: returns the arguments of `scored` for a batch.
            batches: this rank's.
            strategy: how the ranks that call this divide the batches.
        """
        found = []
        for batch in batches:
            arrays = arrays_of(batch)
            scores, grades = np.array(self.scored(model, arrays)), np.array(arrays["grades"])
            real = (grades >= 0).any(axis=1)
            found += np.stack([scores[real], grades[real]], axis=1).tolist()  # (E, 2, K)
        queries = [one for part in strategy.everyone(found) for one in part]
        if not queries:
            return math.nan, 0, {}
        scores, grades = np.moveaxis(np.array(queries, np.float32), 1, 0)
        total, count = ranking_loss(self.kind, mx.array(scores), mx.array(grades))
        return (
            total.item() / max(1.0, count.item()),
            len(queries),
            ranking_measures(scores, grades) | random_mrr(grades),
        )
