"""Work with vectors and scores of texts: embed, search, mine hard negatives, label with a classifier, order with a reranker.

Shapes: N texts, Q queries, M documents, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.api.base import Base as PublicBase
from mlx_lora.api.base import PathLike, as_base, speaks_python
from mlx_lora.api.train import run_settings
from mlx_lora.config.objectives import CLASSIFY, RERANK
from mlx_lora.config.rules import check_options
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, DataSettings, TrainSettings
from mlx_lora.data.data_sets import all_files
from mlx_lora.data.examples import BadRow, Conversation, Fields, FormatError, Text
from mlx_lora.data.file_formats import read_records
from mlx_lora.data.labeled import Labeled, Pictured
from mlx_lora.data.pairs import TextRows, read_eval_pairs, read_passages
from mlx_lora.engine.adapter_store import unrouted_twin
from mlx_lora.exporters.adapter_folder import load_adapter, with_limits_of_run
from mlx_lora.losses.scores import retrieval, spearman
from mlx_lora.models.load import Base
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.embed import TextEmbedder, VectorOptions, open_embedder
from mlx_lora.objectives.questions import AS_THEY_ARE, Acting
from mlx_lora.objectives.scored_texts import ERROR, TextScorer, in_order
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_adapter

CHUNK = 256  # texts that are scored together, so that a file may be longer than memory
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
    check_options("embed", settings | {"query": query})
    folder = None if adapter is None else resolve_adapter(os.fspath(adapter), None)
    with loaded.loaded.lent() as lent:
        how = VectorOptions(dims, normalize)
        return open_embedder(resolved, lent, folder, given=settings, how=how)(texts, query)


# Search


def ranks_of(queries: np.ndarray, documents: np.ndarray, own: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return the ranks of each query's own documents among all, from 0; equal ones count against them.

    Args:
        queries, documents: (Q, D) and (M, D), normalized.
        own: numbers of each query's documents.
    """
    found: list[np.ndarray] = []
    for row, numbers in zip(similarities(queries, documents), own, strict=True):
        mine = row[list(numbers)]
        others = np.delete(row, list(numbers))
        ahead = (others[None] >= mine[:, None]).sum(axis=1)  # of others
        before = (mine[None] > mine[:, None]).sum(axis=1)  # of its own
        found.append(ahead + before)
    return found


def similarities(queries: np.ndarray, documents: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the similarities of each query to all documents, (M,)."""
    for first in range(0, len(queries), QUERIES_AT_A_TIME):
        yield from np.array(mx.array(queries[first : first + QUERIES_AT_A_TIME]) @ mx.array(documents).T)  # (C, M)


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
        """Return how well a model's vectors find the documents; see losses/scores.py."""
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
    for query, own, row in zip(corpus.queries, corpus.own, similarities(queries, documents), strict=True):
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


# Labels and ranks


@speaks_python(adapter_path="adapter")
def predict(
    base: PublicBase | PathLike,
    texts: str | Sequence[str | dict[str, Any]],
    adapter: PathLike,
    *,
    answer_above: float | None = None,
    coverage: float | None = None,
    batch_tokens: int | None = None,
    ignore_fingerprint: bool = False,
    **settings: Any,
) -> Any:
    """Return what a classifier predicts of texts, in their order.

    Args:
        base: from `load`, or a model's name; it stays as it is.
        texts: a text, or a list of texts, or of records as they were trained on, such as `{"image": "001.jpg"}`.
        adapter: folder or hub id of an adapter that was trained with `objective="classify"`, here or by PEFT.
        answer_above: also say of each answer whether to ask a person (`ask_a_person`), because its probability is lower.
        coverage: also give the labels, or the ends of the interval, that have the truth with this probability (`set`, `between`).
        batch_tokens: tokens per batch, padding included; None: the default.
        ignore_fingerprint: use an adapter that was trained on another base of the same shape.
        settings: of data, as for `train`: `text_column`, `max_seq_length` (default: that of the adapter's run), `chat_template`.

    Returns:
        For a text, a dictionary; for a list, a list of them. Of one label, `predicted` is its name; of several, a list of names; of
        a number, the number. `probability` is that of the answer to be right, and `probabilities` has those of all labels. An adapter
        of several questions (`label_columns`) returns `answers`, with these values by the questions' names.

    Raises:
        InputError: base, adapter or a setting that cannot be used, or an empty text.
    """
    base = as_base(base, "predict")
    data = run_settings(base.settings, {**settings, "objective": CLASSIFY}, of=("data", "objective")).data
    given: list[Any] = [texts] if isinstance(texts, str) else list(texts)
    examples = []
    for number, one in enumerate(given):
        found = example_of(
            {"text": one} if isinstance(one, str) else one,
            replace(data, text_column=None) if isinstance(one, str) else data,
            "vision_config" in base.loaded.config,
        )
        if isinstance(found, str):
            raise InputError(f"texts: number {number}: {found}")
        examples.append(found)
    folder: Any = resolve_adapter(os.fspath(adapter), None)
    data = with_limits_of_run(data, settings, folder)
    with base.loaded.lent() as lent:
        acting = Acting(answer_above, coverage)
        answers = load_scorer(lent, folder, data, batch_tokens, ignore_fingerprint).predict(examples, acting)
    for number, answer in enumerate(answers):
        if ERROR in answer:
            raise InputError(f"texts: number {number}: {answer[ERROR]}")
    return answers[0] if isinstance(texts, str) else answers


def load_scorer(
    base: Base,
    folder: Path,
    data: DataSettings,
    batch_tokens: int | None = None,
    ignore_fingerprint: bool = False,
    objective: str | None = CLASSIFY,
) -> TextScorer:
    """Put the adapter of an objective (None: of any) on a base, and return what scores texts with it.

    Raises:
        InputError: it does not fit the base, or has no score head.
    """
    info = load_adapter(base, folder, ignore_fingerprint, scores=True)
    if info.chat_template and not data.chat_template:
        base.hf_tokenizer.chat_template = info.chat_template
    scorer = TextScorer.of(base, info.head, data, batch_tokens)
    if info.head is None and objective == RERANK and len(scorer.head["labels"]) == 0:
        scorer = replace(scorer, head=scorer.head | {"objective": objective})  # PEFT does not say what one output means
    if objective and scorer.head["objective"] != objective:
        raise InputError(f"{folder}: was trained with --objective {scorer.head['objective']}; give one of {objective}")
    return scorer


def twin_of(base: Base) -> Base:
    """Return a base on its own modules, with a tokenizer of its own, because tokenizers are not thread-safe; arrays are shared."""
    tokenizer = load_folder_tokenizer(base.folder, base.config, False)
    return replace(base, model=unrouted_twin(base.model), tokenizer=tokenizer)


@speaks_python(adapter_path="adapter")
def rerank(
    base: PublicBase | PathLike,
    query: str,
    documents: Sequence[str],
    adapter: PathLike,
    *,
    top_n: int | None = None,
    batch_tokens: int | None = None,
    ignore_fingerprint: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Return documents in the order of how well they answer a query, the best first.

    Args:
        base: from `load`, or a model's name; it stays as it is.
        query: the query.
        documents: texts.
        adapter: folder or hub id of an adapter that was trained with `objective="rerank"`.
        top_n: how many to return; None: all.
        batch_tokens: tokens per batch, padding included; None: the default.
        ignore_fingerprint: use an adapter that was trained on another base of the same shape.
        settings: of data, as for `train`: `max_seq_length` (default: that of the adapter's run).

    Returns:
        For each, its `index` in `documents`, its `score` between 0 and 1, and the `document`.

    Raises:
        InputError: base, adapter or a setting that cannot be used, or an empty text.
    """
    base = as_base(base, RERANK)
    data = run_settings(base.settings, {**settings, "objective": RERANK}, of=("data", "objective")).data
    if not all(isinstance(text, str) and text.strip() for text in (query, *documents)):
        raise InputError("rerank: the query and each document must be a text that is not empty")
    folder: Any = resolve_adapter(os.fspath(adapter), None)
    data = with_limits_of_run(data, settings, folder)
    with base.loaded.lent() as lent:
        scores, _ = load_scorer(lent, folder, data, batch_tokens, ignore_fingerprint, RERANK).rank(query, documents)
    return [{"index": i, "score": score, "document": documents[i]} for i, score in in_order(scores)[:top_n]]


def example_of(record: Fields, data: DataSettings, sees: bool) -> Text | Conversation | str:
    """Return the text of a record, or what it asks about pictures if the model sees them, or why there is none."""
    try:
        return (Pictured if sees else Labeled).parse(record, data, needs_label=False).example
    except FormatError as error:
        return str(error)


def predicted_records(
    scorer: TextScorer, data: DataSettings, acting: Acting = AS_THEY_ARE
) -> Iterator[tuple[Fields, bool]]:
    """Yield the records of --data with what is predicted of each, and whether that failed; then it has `error`.

    Raises:
        InputError: --data is a folder, or cannot be read.
    """
    records = records_of(data)
    while chunk := list(islice(records, CHUNK)):
        read = [one if isinstance(one, str) else example_of(one, data, scorer.sees) for one in chunk]
        places = [number for number, one in enumerate(read) if not isinstance(one, str)]
        answers = dict(
            zip(places, scorer.predict([one for one in read if not isinstance(one, str)], acting), strict=True)
        )
        for number, (record, found) in enumerate(zip(chunk, read, strict=True)):
            answer = answers.get(number, {ERROR: found})
            yield {**(record if isinstance(record, dict) else {}), **answer}, ERROR in answer


def records_of(data: DataSettings) -> Iterator[Fields | str]:
    """Yield the records of --data, or why one is none."""
    name = data.data or ""
    if Path(name).expanduser().is_dir():
        raise InputError(f"--data {name}: is a folder; name a file in it")
    for file in all_files(name):
        for record in read_records(file.path, file.sheet):
            yield record.why if isinstance(record, BadRow) else record.value


def data_columns(data: DataSettings) -> dict[str, None]:
    """Return the names of the columns that the records of --data have, in order; errors as of `predicted_records`."""
    return {str(name): None for record in records_of(data) if isinstance(record, dict) for name in record}
