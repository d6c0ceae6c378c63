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

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import mlx_lora  # loads the BLAS before mlx.core
from mlx_lora.api.embed import Corpus, ranks_of
from mlx_lora.data.pairs import Passage, read_passages
from mlx_lora.losses.contrastive import retrieval

HERE = Path(__file__).parent
HELD_OUT = 0.4  # of the pages that have questions
MEASURES = ("recall_at_10", "mrr_at_10", "ndcg_at_10")
CANDIDATES = 20  # of the embedder, which the reranker reads
NEGATIVES = 3
MARGIN = 0.95  # passages with more than this share of the right one's cosine may be right too


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
        sorted({number[p.text] for p in passages if (p.file, heading(p)) == (one["page"], one["heading"])})
        for one in asked
    ]
    return Corpus([one["question"] for one in asked], documents, own)


def vectors(base: mlx_lora.Base, corpus: Corpus, length: int, adapter: Path | None = None) -> list[np.ndarray]:
    """Return the vectors of queries and documents."""
    return [
        mlx_lora.embed(base, texts, adapter, query=side == 0, max_seq_length=length)
        for side, texts in enumerate((corpus.queries, corpus.documents))
    ]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--docs", default=str(HERE.parent / "docs"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--headings", type=int, default=150)
    parser.add_argument("--max-seq-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument(
        "--reranker", default=None, help="Model to train as a reranker: a language model or an encoder."
    )
    parser.add_argument("--reranker-rows", type=int, default=120)
    parser.add_argument("--reranker-length", type=int, default=128)
    parser.add_argument("--reranker-rate", type=float, default=None, help="Learning rate; default: the run chooses.")
    parser.add_argument("--reranker-epochs", type=float, default=1)
    asked = parser.parse_args()
    questions = [
        json.loads(line) for line in (HERE / "search_questions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    passages, base = read_passages(asked.docs), mlx_lora.load(asked.model)
    reader = None if asked.reranker is None else mlx_lora.load(asked.reranker)
    kept: np.ndarray | None = None
    pages, found = sorted({one["page"] for one in questions}), []
    for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
        chosen = np.random.default_rng(seed).permutation(pages)
        held_out = set(chosen[: round(HELD_OUT * len(pages))].tolist())
        others = {passage.file for passage in passages} - held_out
        corpus, rows = (
            searched(questions, passages, held_out),
            training_rows(questions, passages, others, asked.headings, seed),
        )
        asking = mlx_lora.embed(base, corpus.queries, query=True, max_seq_length=asked.max_seq_length)
        if kept is None:  # the documents are the same for every seed
            kept = mlx_lora.embed(base, corpus.documents, max_seq_length=asked.max_seq_length)
        before = retrieval(ranks_of(asking, kept, corpus.own))
        with tempfile.TemporaryDirectory() as folder:
            given = {} if asked.learning_rate is None else {"learning_rate": asked.learning_rate}
            run = mlx_lora.train(
                base, rows, Path(folder) / "a", objective="embed", seed=seed, epochs=asked.epochs, valid_fraction=0.0,
                max_seq_length=asked.max_seq_length, **given,
            )  # fmt: skip
            pair = vectors(base, corpus, asked.max_seq_length, run.adapter)
            stages = [before, retrieval(ranks_of(*pair, corpus.own))]
            if reader is not None:
                chosen = np.random.default_rng(seed).permutation(len(rows))[: asked.reranker_rows]
                mined = with_negatives([rows[n] for n in chosen], base, run.adapter, asked.max_seq_length)
                second = mlx_lora.train(
                    reader, mined, Path(folder) / "r", objective="rerank", seed=seed, epochs=asked.reranker_epochs,
                    valid_fraction=0.0, max_seq_length=asked.reranker_length,
                    **({} if asked.reranker_rate is None else {"learning_rate": asked.reranker_rate}),
                )  # fmt: skip
                stages.append(retrieval(reranked(corpus, pair[0] @ pair[1].T, reader, second.adapter)))
        found.append(stages)
        words = ", ".join(f"{name} {' to '.join(f'{one[name]:.3f}' for one in stages)}" for name in MEASURES)
        print(
            f"seed {seed}: {len(corpus.queries)} questions, {len(corpus.documents)} passages, {len(rows)} rows: {words}",
            flush=True,
        )
    summary = {}
    for name in MEASURES:
        summary[name] = {}
        for number, stage in enumerate(("trained", "reranked")[: len(found[0]) - 1], 1):
            gains = [stages[number][name] - stages[number - 1][name] for stages in found]
            spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
            columns = [statistics.mean(stages[number - side][name] for stages in found) for side in (1, 0)]
            summary[name][stage] = {"before": columns[0], "after": columns[1], "stdev_of_gain": spread}
            print(
                f"{name}, {stage}: {columns[0]:.3f} to {columns[1]:.3f}, gain {statistics.mean(gains):+.3f} "
                f"(standard deviation {spread:.3f})"
            )
    print(json.dumps({"model": Path(asked.model).name, "seeds": asked.seeds, **summary}))


if __name__ == "__main__":
    main()
