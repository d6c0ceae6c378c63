"""Measure search in this project's own pages, before and after training a small embedder on them.

    python benchmarks/search_docs.py --model all-MiniLM-L6-v2 --seeds 5

`search_questions.jsonl` has questions in a reader's words, each with the page and the heading whose passages answer it. For each
seed, some pages are held out: neither their questions nor their passages are trained on. What is trained is the questions of
the other pages with their passages, and the headings of these pages with the text below them. Then the questions of the
held-out pages are asked, against the passages of all pages. With `--reranker SmolLM2`, a reranker is trained on the same pages,
with the trained embedder's nearest wrong passages as negatives, and orders the embedder's best candidates anew. The last line
is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _harness import REPOSITORY, options, record

import mlx_lora  # loads the BLAS before mlx.core
from mlx_lora.api.embed import Corpus, ranks_of
from mlx_lora.data.pairs import Passage, read_passages
from mlx_lora.losses.contrastive import retrieval

QUESTIONS = Path(__file__).with_name("search_questions.jsonl")
HELD_OUT = 0.4  # of the pages that have questions
MEASURES = ("recall_at_10", "mrr_at_10", "ndcg_at_10")
CANDIDATES = 20  # of the embedder, which the reranker reads
NEGATIVES = 3
MARGIN = 0.95  # passages with more than this share of the right one's cosine may be right too
OPTIONS = (
    ("--model", ..., "The embedder to train."),
    ("--docs", str(REPOSITORY / "docs"), "Folder of the pages."),
    ("--seeds", 5, "Each with other held-out pages."),
    ("--first-seed", 0, "The seeds are this one and those after it."),
    ("--epochs", 2.0, "Of the embedder's training."),
    ("--headings", 150, "Headings that are trained on in addition to the questions."),
    ("--max-seq-length", 64, "Tokens of a text for the embedder."),
    ("--learning-rate", float, "Of the embedder; default: the run chooses."),
    ("--reranker", str, "Model to train as a reranker: a language model or an encoder."),
    ("--reranker-rows", 120, "Rows that it is trained on."),
    ("--reranker-length", 128, "Tokens of a row for it."),
    ("--reranker-rate", float, "Its learning rate; default: the run chooses."),
    ("--reranker-epochs", 1.0, "Of its training."),
)


def heading(passage: Passage) -> str:
    """Return the last heading above a passage."""
    return passage.text.split("\n", 1)[0].split(" > ")[-1]


def training_rows(
    questions: Sequence[dict], passages: Sequence[Passage], pages: set[str], headings: int, seed: int
) -> list[dict]:
    """Return queries with their documents, of some pages alone: all questions, and so many headings."""
    rows = []
    for one in questions:
        own = [p.text for p in passages if (p.file, heading(p)) == (one["page"], one["heading"])]
        rows += [{"query": one["question"], "positive": text} for text in own if one["page"] in pages]
    titled = []
    for passage in passages:
        first, _, body = passage.text.partition("\n")
        if passage.file in pages and body.strip() and not first.startswith(("#", "|", "```")):
            titled.append({"query": first.split(" > ")[-1], "positive": body})
    chosen = np.random.default_rng(seed).permutation(len(titled))[:headings]
    return rows + [titled[number] for number in chosen]


def searched(questions: Sequence[dict], passages: Sequence[Passage], pages: set[str]) -> Corpus:
    """Return the questions of some pages against all passages."""
    documents = list(dict.fromkeys(passage.text for passage in passages))
    number = {text: place for place, text in enumerate(documents)}
    asked = [one for one in questions if one["page"] in pages]
    own = [
        sorted({number[p.text] for p in passages if (p.file, heading(p)) == (q["page"], q["heading"])}) for q in asked
    ]
    return Corpus([one["question"] for one in asked], documents, own)


def vectors(base: mlx_lora.Base, corpus: Corpus, length: int, adapter: Path | None = None) -> list[np.ndarray]:
    """Return the vectors of queries and documents."""
    queries = mlx_lora.embed(base, corpus.queries, adapter, query=True, max_seq_length=length)
    return [queries, mlx_lora.embed(base, corpus.documents, adapter, max_seq_length=length)]


def with_negatives(rows: Sequence[dict], base: mlx_lora.Base, adapter: Path, length: int) -> list[dict]:
    """Return the rows with the wrong passages that the trained embedder finds nearest."""
    texts = list(dict.fromkeys(row["positive"] for row in rows))
    right: dict[str, list[int]] = {}
    for row in rows:
        right.setdefault(row["query"], []).append(texts.index(row["positive"]))
    corpus = Corpus([row["query"] for row in rows], texts, [right[row["query"]] for row in rows])
    queries, documents = vectors(base, corpus, length, adapter)
    found = []
    for row, near, own in zip(rows, queries @ documents.T, corpus.own, strict=True):
        nearly = MARGIN * near[texts.index(row["positive"])]
        wrong = [n for n in np.argsort(-near) if n not in own and near[n] < nearly][:NEGATIVES]
        if wrong:
            found.append(row | {"negatives": [texts[n] for n in wrong]})
    return found


def reranked(corpus: Corpus, near: np.ndarray, model: mlx_lora.Base, adapter: Path) -> list[np.ndarray]:
    """Return the ranks of each query's own documents after the reranker ordered the first candidates.

    Args:
        corpus: queries, documents, and which belong together.
        near: (Q, M), the embedder's similarities.
        model: of the reranker.
        adapter: of the reranker.
    """
    ranks = []
    for query, row, own in zip(corpus.queries, near, corpus.own, strict=True):
        order = np.argsort(-row).tolist()
        first = order[:CANDIDATES]
        found = mlx_lora.rerank(model, query, [corpus.documents[n] for n in first], adapter)
        order[:CANDIDATES] = [first[one["index"]] for one in found]
        ranks.append(np.array([order.index(n) for n in own]))
    return ranks


def training(base: mlx_lora.Base, rows: Sequence[dict], folder: Path, rate: float | None, **asked: Any) -> Path:
    """Train on some rows with no held-out ones, at the rate that the run chooses if none is given; return the adapter's folder."""
    given = {} if rate is None else {"learning_rate": rate}
    return mlx_lora.train(base, rows, folder, valid_fraction=0.0, **asked, **given).adapter


def summarized(found: Sequence[Sequence[dict[str, float]]]) -> dict[str, Any]:
    """Print and return the means over the seeds of each measure before and after each stage, and the spread of the gain."""
    summary: dict[str, Any] = {}
    for name in MEASURES:
        summary[name] = {}
        for number, stage in enumerate(("trained", "reranked")[: len(found[0]) - 1], 1):
            gains = [stages[number][name] - stages[number - 1][name] for stages in found]
            spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
            before, after = (statistics.mean(stages[number - side][name] for stages in found) for side in (1, 0))
            summary[name][stage] = {"before": before, "after": after, "stdev_of_gain": spread}
            gain = f"{statistics.mean(gains):+.3f} (standard deviation {spread:.3f})"
            print(f"{name}, {stage}: {before:.3f} to {after:.3f}, gain {gain}")
    return summary


def main() -> None:
    """Train and search with each seed, and end with one line of JSON."""
    asked = options(__doc__, *OPTIONS).parse_args()
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    passages, base = read_passages(asked.docs), mlx_lora.load(asked.model)
    reader = None if asked.reranker is None else mlx_lora.load(asked.reranker)
    kept: np.ndarray | None = None
    pages, found, length = sorted({one["page"] for one in questions}), [], asked.max_seq_length
    for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
        chosen = np.random.default_rng(seed).permutation(pages)
        held_out = set(chosen[: round(HELD_OUT * len(pages))].tolist())
        others = {passage.file for passage in passages} - held_out
        corpus = searched(questions, passages, held_out)
        rows = training_rows(questions, passages, others, asked.headings, seed)
        asking = mlx_lora.embed(base, corpus.queries, query=True, max_seq_length=length)
        if kept is None:  # the documents are the same for every seed
            kept = mlx_lora.embed(base, corpus.documents, max_seq_length=length)
        stages = [retrieval(ranks_of(asking, kept, corpus.own))]
        with tempfile.TemporaryDirectory() as folder:
            how = {"objective": "embed", "seed": seed, "epochs": asked.epochs, "max_seq_length": length}
            adapter = training(base, rows, Path(folder) / "a", asked.learning_rate, **how)
            pair = vectors(base, corpus, length, adapter)
            stages.append(retrieval(ranks_of(*pair, corpus.own)))
            if reader is not None:
                few = np.random.default_rng(seed).permutation(len(rows))[: asked.reranker_rows]
                mined = with_negatives([rows[n] for n in few], base, adapter, length)
                how |= {"objective": "rerank", "epochs": asked.reranker_epochs, "max_seq_length": asked.reranker_length}
                second = training(reader, mined, Path(folder) / "r", asked.reranker_rate, **how)
                stages.append(retrieval(reranked(corpus, pair[0] @ pair[1].T, reader, second)))
        found.append(stages)
        words = ", ".join(f"{name} {' to '.join(f'{one[name]:.3f}' for one in stages)}" for name in MEASURES)
        counts = f"{len(corpus.queries)} questions, {len(corpus.documents)} passages, {len(rows)} rows"
        print(f"seed {seed}: {counts}: {words}", flush=True)
    record({"model": Path(asked.model).name, "seeds": asked.seeds, **summarized(found)})


if __name__ == "__main__":
    main()
