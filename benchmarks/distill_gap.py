"""Measure what a teacher's k likeliest tokens miss of its divergence from a student over the whole vocabulary.

    python benchmarks/distill_gap.py --model smollm2 --data chats.jsonl --teacher-prompt pirate.txt
    python benchmarks/distill_gap.py --model smollm2 --data chats.jsonl --teacher Qwen/Qwen3-0.6B

For each k: the divergence of the untrained student by the kept bins, its share of that over all tokens, how far 16 bits
move it, and the bytes of a record. Teacher and student compute each row once.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

import mlx.core as mx  # isort: skip
import numpy as np
from _environment import environment

from mlx_lora.config.load import train_settings
from mlx_lora.data.batch import collate
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import load_eval_set
from mlx_lora.data.teacher_prompt import read_teacher_prompt
from mlx_lora.data.teacher_table import TableFormat
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.divergence import DivergenceOptions, bins, divergence, head_of, known_of_batch, likeliest
from mlx_lora.models.head import Head
from mlx_lora.models.load import Base, load_base
from mlx_lora.objectives.teacher import facts_of, load_teacher


def logps_of(base: Base, head: Head | None, rows: EncodedSet, row: int, vocabulary: int) -> mx.array:
    """Return a model's log-probabilities of every token at a row's trained targets, (P, V)."""
    width = int(rows.lengths[row]) - 1
    batch = collate(rows, np.array([row]), width, width)
    options = DivergenceOptions(top_k=0, vocabulary=vocabulary)
    return mx.concatenate([known.logps for known in known_of_batch(base.model, head, batch, options)])


def in_16_bits(form: TableFormat, logps: mx.array, ids: mx.array | None) -> mx.array:
    """Return log-probabilities as they come back from a record."""
    relative, _ = form.unpack(form.pack(np.array(logps), None if ids is None else np.array(ids)))
    found = mx.array(relative).astype(mx.float32)
    return found - mx.logsumexp(found, axis=-1, keepdims=True)


def main() -> None:
    """Print a row for each k, and all figures as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher")
    parser.add_argument("--teacher-prompt")
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--rows", type=int, default=24, help="the first rows of the data")
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 8, 64, 256])
    args = parser.parse_args()
    asked = {
        "model": args.model, "data": args.data, "objective": "distill", "divergence": args.divergence,
        "teacher": args.teacher, "teacher_prompt": args.teacher_prompt,
    }  # fmt: skip
    settings = train_settings({name: value for name, value in asked.items() if value is not None})
    base = load_base(settings.model)
    rows = load_eval_set(
        args.data, settings.data, base.hf_tokenizer, teacher_prompt=read_teacher_prompt(args.teacher_prompt)
    )
    rows = rows.select(range(min(args.rows, rows.examples)))
    vocabulary, teacher = facts_of(settings, base).vocabulary, load_teacher(settings, base)
    forms = {top_k: TableFormat.of(vocabulary, top_k) for top_k in (*args.top_k, 0)}
    beta = DivergenceOptions(args.divergence).beta
    heads = [head_of(choose_loss(one.model, one.config, "ours"), one.model, one.config) for one in (teacher, base)]
    sums = {top_k: np.zeros(2) for top_k in forms}
    for row in range(len(rows)):
        theirs = logps_of(teacher, heads[0], rows.teacher or rows, row, vocabulary)
        ours = logps_of(base, heads[1], rows, row, vocabulary)
        for top_k, form in forms.items():
            known = likeliest(theirs, replace(DivergenceOptions(), top_k=top_k))
            student = bins(ours, known.ids)
            rounded = in_16_bits(form, known.logps, known.ids)
            sums[top_k] += [divergence(one, student, beta).sum().item() for one in (known.logps, rounded)]
    tokens = rows.supervised_tokens
    print(f"{tokens:,} tokens of {len(rows)} rows; {base.describe()}")
    print("k | divergence | share of all | moved by 16 bits | bytes of a token")
    figures = []
    for top_k, (exact, rounded) in sums.items():
        share, moved = exact / sums[0][0], abs(rounded / exact - 1)
        figures.append({"top_k": top_k, "loss": exact / tokens, "share": share, "moved": moved})
        print(
            f"{top_k or 'all'} | {exact / tokens:.5f} | {share:.2%} | {moved:.1e} | {forms[top_k].record_bytes:,}",
            flush=True,
        )
    print(json.dumps({"environment": environment(), "settings": vars(args), "figures": figures}))


if __name__ == "__main__":
    main()
