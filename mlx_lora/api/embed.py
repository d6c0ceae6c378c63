"""Compute the vectors of texts, measure how well they find documents, and find documents that look like answers and are none.

Shapes: N texts, Q queries, M documents, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.api.base import Base as PublicBase
from mlx_lora.api.base import PathLike, as_base
from mlx_lora.api.errors import speaks_python
from mlx_lora.api.train import run_settings
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, TrainSettings
from mlx_lora.data.pairs import TextRows, read_eval_pairs, read_passages
from mlx_lora.losses.contrastive import retrieval, spearman
from mlx_lora.models.load import Base
from mlx_lora.objectives.text_vectors import TextEmbedder, VectorOptions, open_embedder
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_adapter

QUERIES_AT_A_TIME = 256  # whose similarities to all documents are in memory


@speaks_python(adapter_path="adapter")
def embed(
    base: PublicBase | PathLike,
    texts: Sequence[str],
    adapter: PathLike | None = None,
    *,
    query: bool = False,
    dims: int | None = None,
    normalize: bool = True,
    **settings: Any,
) -> np.ndarray:
    """Return the vectors of texts.

    Args:
        base: from `load`, or a model's name; it stays as it is.
        texts: to embed; none may be empty.
        adapter: folder or hub id of an adapter, whose pooling and prompts are used; None: the base alone.
        query: whether the texts are queries, or documents; the prompt before them may differ.
        dims: keep the first so many numbers, for a model that was trained with `matryoshka_dims`; None: all.
        normalize: give vectors length one, so that their products are cosines.
        settings: `pooling`, `query_prompt`, `document_prompt`, `max_seq_length`, instead of what the adapter or the model says.

    Returns:
        (N, D) float32.

    Raises:
        InputError: base, adapter or a text that cannot be used.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError("texts: give a list of texts, none of which is empty")
    loaded = as_base(base, "embed")
    resolved = run_settings(loaded.settings, {**settings, "objective": "embed"}, of=("data", "objective"))
    check_prompts(settings, query)
    folder = None if adapter is None else resolve_adapter(os.fspath(adapter), None)
    with loaded.loaded.lent() as lent:
        how = VectorOptions(dims, normalize)
        return open_embedder(resolved, lent, folder, given=settings, how=how)(texts, query)


# Search


def check_prompts(given: Mapping[str, Any], query: bool) -> None:
    """Refuse the prompt of the side that is not embedded.

    Args:
        given: settings that the user gave.
        query: whether the texts are queries, or documents.

    Raises:
        InputError: naming it.
    """
    if query and given.get("document_prompt") is not None:
        raise InputError("--document-prompt with --query: the texts are queries; give --query-prompt")
    if not query and given.get("query_prompt") is not None:
        raise InputError("--query-prompt: the texts are documents; add --query, or give --document-prompt")


def ranks_of(queries: np.ndarray, documents: np.ndarray, own: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return the ranks of each query's own documents among all, from 0; equal ones count against them.

    Args:
        queries, documents: (Q, D) and (M, D), normalized.
        own: numbers of each query's documents.
    """
    found: list[np.ndarray] = []
    for first in range(0, len(queries), QUERIES_AT_A_TIME):
        part = mx.array(queries[first : first + QUERIES_AT_A_TIME]) @ mx.array(documents).T
        similarities = np.array(part)  # (C, M)
        for row, numbers in zip(similarities, own[first : first + QUERIES_AT_A_TIME], strict=True):
            mine = row[list(numbers)]
            others = np.delete(row, list(numbers))
            ahead = (others[None] >= mine[:, None]).sum(axis=1)  # of others
            before = (mine[None] > mine[:, None]).sum(axis=1)  # of its own
            found.append(ahead + before)
    return found


@dataclass(frozen=True)
class Corpus:
    """Queries, documents, and which belong together.

    Attributes:
        queries, documents: texts, all different.
        own: numbers of each query's documents.
    """

    queries: list[str]
    documents: list[str]
    own: list[list[int]]

    @classmethod
    def of(cls, rows: TextRows, more: Sequence[str] = ()) -> Corpus:
        """Return the queries of some examples, against all their documents and negatives, and more documents."""
        documents = {pair.document: None for pair in rows.pairs}
        documents |= {text: None for pair in rows.pairs for text in pair.negatives} | dict.fromkeys(more)
        number = {text: place for place, text in enumerate(documents)}
        own: dict[str, list[int]] = {}
        for pair in rows.pairs:
            mine = own.setdefault(pair.query, [])
            if number[pair.document] not in mine:
                mine.append(number[pair.document])
        return cls(list(own), list(documents), list(own.values()))

    def measure(self, embedder: TextEmbedder) -> dict[str, float]:
        """Return how well a model's vectors find the documents; see losses/contrastive.py."""
        queries = embedder(self.queries, True, "Queries")
        documents = embedder(self.documents, False, "Documents")
        return retrieval(ranks_of(queries, documents, self.own))


def measure_embeddings(
    settings: TrainSettings,
    base: Base,
    adapter: Path | None = None,
    ignore_fingerprint: bool = False,
    corpus: str | None = None,
    given: Collection[str] = (),
    batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Return what `evaluate --objective embed --json` prints: measures of the model, and with an adapter those of its base.

    Args:
        settings: data, and what of pooling and prompts is given.
        base: the model; it gets the adapter.
        adapter: its folder.
        ignore_fingerprint: as for `load_adapter`.
        corpus: files with more documents to search in.
        given: as for `open_embedder`.
        batch_tokens: most positions of a batch; None: the default.

    Raises:
        InputError: adapter or data that cannot be used.
    """
    how = VectorOptions(batch_tokens=batch_tokens or DEFAULT_BATCH_TOKENS)
    plain = open_embedder(settings, base, how=how)
    rows, scored = read_eval_pairs(settings.data, plain.form)
    if scored and corpus:
        raise InputError(f"--corpus {corpus}: pairs with a score are compared with each other alone; leave it out")
    passages = read_passages(corpus) if corpus else []
    of = None if scored else Corpus.of(rows, [one.text for one in passages])
    found: dict[str, Any] = {}
    if adapter:  # the base with the adapter's own prompts would be another model than the one it began as
        found |= {f"base_{name}": value for name, value in _measured(plain, rows, of).items()}
        plain = open_embedder(settings, base, adapter, ignore_fingerprint, given, how)
    found = _measured(plain, rows, of) | found
    counts = {"rows": len(rows.pairs)} | (
        {} if of is None else {"queries": len(of.queries), "documents": len(of.documents)}
    )
    return {**found, **counts, "model": base.model_id}


def _measured(embedder: TextEmbedder, rows: TextRows, corpus: Corpus | None) -> dict[str, float]:
    if corpus is not None:
        return corpus.measure(embedder)
    queries = embedder([pair.query for pair in rows.pairs], True, "First texts")
    documents = embedder([pair.document for pair in rows.pairs], False, "Second texts")
    cosines, scores = (queries * documents).sum(axis=1), np.array([pair.score for pair in rows.pairs], np.float32)
    return {"spearman": spearman(cosines, scores)}


# Hard negatives


@dataclass(frozen=True)
class MineOptions:
    """Which documents become negatives.

    Attributes:
        negatives: of each query, the nearest ones that may be.
        skip: leave out so many of the nearest, which are often answers that nobody marked.
        margin: leave out those whose cosine is more than (1 - margin) times that of the query's own document.
    """

    negatives: int = 5
    skip: int = 0
    margin: float = 0.05


@dataclass
class Mined:
    """What `mine` found.

    Attributes:
        with_some: pairs of a query and a document that have negatives now.
        found, kept: negatives that were found, and those that the rows had.
    """

    with_some: int = 0
    found: int = 0
    kept: int = 0


def mine(
    embedder: TextEmbedder,
    rows: TextRows,
    more: Sequence[str],
    options: MineOptions,
    on_row: Callable[[dict[str, Any]], None],
) -> Mined:
    """Add documents that are near to a query and not its own to the negatives that its pairs have.

    Args:
        embedder: of the model to mine with.
        rows: queries and their documents.
        more: documents to search in addition to those of the rows.
        options: which documents are taken.
        on_row: takes each record: query, positive, negatives, first those that the rows had.

    Source: sentence-transformers' mine_hard_negatives, with its relative margin (NV-Retriever, arXiv 2407.15831).
    """
    corpus, had = Corpus.of(rows, more), {}
    for pair in rows.pairs:  # the negatives that rows have for each query and document, each once
        had.setdefault((pair.query, pair.document), {}).update(dict.fromkeys(pair.negatives))
    queries, documents = embedder(corpus.queries, True, "Queries"), embedder(corpus.documents, False, "Documents")
    mined = Mined()
    for first in range(0, len(queries), QUERIES_AT_A_TIME):
        part = np.array(mx.array(queries[first : first + QUERIES_AT_A_TIME]) @ mx.array(documents).T)
        for place, row in enumerate(part, first):
            query, own = corpus.queries[place], corpus.own[place]
            nearest = [number for number in np.argsort(-row, kind="stable").tolist() if number not in own]
            for number in own:
                positive = corpus.documents[number]
                kept = had[query, positive]
                limit = row[number] - abs(row[number]) * options.margin
                known = {query, *kept}
                near = [other for other in nearest if corpus.documents[other] not in known][options.skip :]
                found = [corpus.documents[other] for other in near if row[other] <= limit][: options.negatives]
                on_row({"query": query, "positive": positive, "negatives": [*kept, *found]})
                mined.with_some += bool(kept or found)
                mined.found += len(found)
                mined.kept += len(kept)
    return mined
