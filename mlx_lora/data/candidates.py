"""Read records of queries with documents that answer them more or less well, and encode each document with its query.

    query, positive(s), negative(s)     texts or lists of texts; also negative_1, negative_2 ...
    query, documents, labels            a list of texts, and a list of numbers, higher for what answers better
    query, document, label              one document; the records of one query are put together

Names are recognized in any case, also those of sentence-transformers' sets (anchor, question; passage, docs, answer; score).

Each query is one example. What its documents' rows are is the objective's business: the encoded row is that of its best
document, and the fact of the example has the tokens and labels of all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import (
    Completion,
    EmptyPart,
    Fields,
    FormatError,
    MissingColumn,
    OwnEntry,
    Text,
    tokenizable,
)
from mlx_lora.data.formats import columns_of, usual_names
from mlx_lora.data.labeled import encode_texts
from mlx_lora.data.tokenize import Encoded, Encoder

QUERIES = ("query", "question", "anchor", "prompt")
POSITIVES = ("positive", "positives", "pos")
NEGATIVES = re.compile(r"negatives?(_\d+)?|neg")
LISTS = ("documents", "docs", "passages", "candidates")
SINGLES = ("document", "passage", "doc", "text", "answer", "response")
LABELS = ("labels", "label", "scores", "score", "relevance")
# Of an example's facts.
ROWS, GRADES = "rows", "grades"


@dataclass(frozen=True)
class Candidates(OwnEntry):
    """A query and its documents.

    Attributes:
        query: its text.
        documents: their texts.
        grades: a number for each, higher for what answers better, at least 0.
    """

    optional: ClassVar[re.Pattern[str] | None] = NEGATIVES

    query: str
    documents: tuple[str, ...]
    grades: tuple[float, ...]

    @property
    def shown(self) -> Completion:
        """The query and its best document."""
        return Completion(self.query, self.documents[int(np.argmax(self.grades))])

    @classmethod
    def parse(cls, record: Fields, settings: DataSettings) -> Candidates:
        record = usual_names({key: value for key, value in record.items() if value is not None})
        query = next((name for name in QUERIES if name in record), None)
        if query is None:
            raise MissingColumn(f"found {columns_of(record)}; a query is in {', '.join(QUERIES)}")
        positives = [name for name in POSITIVES if name in record]
        if positives:
            good = [text for name in positives for text in _texts(record[name], name)]
            bad = [text for name in record if NEGATIVES.fullmatch(name) for text in _texts(record[name], name)]
            if not bad:
                raise FormatError("a query without a negative; add documents that do not answer it")
            documents, grades = [*good, *bad], [1.0] * len(good) + [0.0] * len(bad)
        else:
            documents, grades = _graded(record)
        return cls(_texts(record[query], query)[0], tuple(documents), tuple(grades))

    @classmethod
    def encode(
        cls, encoder: Encoder, entries: Sequence[Candidates], on_rows: Callable[[int], None] = lambda done: None
    ) -> Encoded:
        """Encode queries, one row each, with the tokens and grades of all their documents as facts.

        A query whose documents are all equally good is dropped: nothing can be learned from their order.

        Args:
            encoder: whose tokenizer and length are used; a long document is cut at its end, a long pair as `encode_texts` does.
            entries: records; those of one query are put together, as the first of them.
            on_rows: called with the number of records that are done.
        """
        places: dict[str, list[int]] = {}
        for number, entry in enumerate(entries):
            places.setdefault(entry.query, []).append(number)
        texts, owners, grades = [], [], []
        for numbers in places.values():
            for number in numbers:
                texts += [query_with(entries[number].query, one) for one in entries[number].documents]
                owners += [number] * len(entries[number].documents)
                grades += entries[number].grades
        found, _, cut = encode_texts(encoder, texts)
        rows, facts, source, dropped = [], [], [], {}
        first = 0
        for numbers in places.values():
            count = sum(len(entries[number].documents) for number in numbers)
            own = grades[first : first + count]
            if max(own) == min(own):
                dropped |= dict.fromkeys(numbers, "all documents of the query are equally good")
            else:
                tokens = [found[i] for i in range(first, first + count)]
                best = tokens[int(np.argmax(own))]
                rows.append((best, np.zeros(len(best), bool)))
                facts.append({ROWS: tokens, GRADES: own})
                source.append(numbers[0])
            first += count
        on_rows(len(entries))
        encoded = EncodedSet.from_rows(rows).with_facts(facts)
        truncated = sorted({owners[number] for number in cut})
        return Encoded(encoded, np.array(source, np.int64), dict(sorted(dropped.items())), truncated, {}, [])


def query_with(query: str, document: str) -> Text:
    """Return what a reranker reads: the pair, or where the tokenizer has no form for pairs, one text."""
    return Text(pair_text(query, document), ends=False, pair=(query, document))


def pair_text(query: str, document: str) -> str:
    """Return the text that a reranker reads if it is a language model."""
    return f"Query: {query}\nDocument: {document}"


def _graded(record: Fields) -> tuple[list[str], list[float]]:
    """Return documents with the numbers that a record gives them."""
    name = next((name for name in (*LISTS, *SINGLES) if name in record), None)
    label = next((name for name in LABELS if name in record), None)
    if name is None or label is None:
        raise MissingColumn(
            f"found {columns_of(record)}; a query needs positive and negative, documents and labels, or document and label"
        )
    documents, given = _texts(record[name], name), record[label]
    given = given if isinstance(given, list) else [given]
    try:
        grades = [float(one) for one in given]
    except (TypeError, ValueError):
        grades = [-1.0]
    if not all(0 <= one < 1e6 for one in grades):
        raise FormatError(f"{label} has something else than numbers of at least 0")
    if len(documents) != len(grades):
        raise FormatError(f"{len(documents)} {name} and {len(grades)} {label}; each needs one")
    return documents, grades


def _texts(value: Any, name: str) -> list[str]:
    """Return the texts of a cell, one or a list."""
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise FormatError(f"{name} has something else than texts")
    if not all(text.strip() for text in texts):
        raise EmptyPart(f"{name} has an empty text")
    return list(map(tokenizable, texts))
