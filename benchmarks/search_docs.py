"""Measure search in this project's own pages, before and after training a small embedder on them.

    python benchmarks/search_docs.py --model all-MiniLM-L6-v2 --seeds 5

`search_questions.jsonl` has questions in a reader's words, each with the page and the heading whose passages answer it. For each
seed, some pages are held out: neither their questions nor their passages are trained on. What is trained is the questions of
the other pages with their passages, and the headings of these pages with the text below them. Then the questions of the
held-out pages are asked, against the passages of all pages. The last line is one JSON object.
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
    asked = parser.parse_args()
    questions = [
        json.loads(line) for line in (HERE / "search_questions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    passages, base = read_passages(asked.docs), mlx_lora.load(asked.model)
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
            after = retrieval(ranks_of(*vectors(base, corpus, asked.max_seq_length, run.adapter), corpus.own))
        found.append((before, after))
        words = ", ".join(f"{name} {before[name]:.3f} to {after[name]:.3f}" for name in MEASURES)
        print(
            f"seed {seed}: {len(corpus.queries)} questions, {len(corpus.documents)} passages, {len(rows)} rows: {words}"
        )
    summary = {}
    for name in MEASURES:
        gains = [after[name] - before[name] for before, after in found]
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        columns = [statistics.mean(one[side][name] for one in found) for side in (0, 1)]
        summary[name] = {"base": columns[0], "trained": columns[1], "gain": statistics.mean(gains), "stdev": spread}
        print(
            f"{name}: {columns[0]:.3f} to {columns[1]:.3f}, gain {statistics.mean(gains):+.3f} (standard deviation {spread:.3f})"
        )
    print(json.dumps({"model": Path(asked.model).name, "seeds": asked.seeds, **summary}))


if __name__ == "__main__":
    main()
