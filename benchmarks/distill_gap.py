"""Measure what a teacher's k likeliest tokens miss of its divergence from a student over the whole vocabulary.

    python benchmarks/distill_gap.py --model smollm2 --data chats.jsonl --teacher-prompt pirate.txt
    python benchmarks/distill_gap.py --model smollm2 --data chats.jsonl --teacher Qwen/Qwen3-0.6B

For each k: the held-out divergence of the untrained student by the kept bins, its share of that over all tokens, and the
bytes that a token takes on disk. The records are computed in an empty cache, which is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

from mlx_lora.data.loading import load_eval_set  # isort: skip
from _environment import environment

from mlx_lora.data.teacher_rows import read_teacher_prompt
from mlx_lora.models.load import load_base
from mlx_lora.objectives.objective_table import objective_of
from mlx_lora.runs.distilling import with_teacher
from mlx_lora.settings.resolve import train_settings
from mlx_lora.training.trainer import held_out_loss


def main() -> None:
    """Print a row for each k, and all figures as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher")
    parser.add_argument("--teacher-prompt")
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--rows", type=int, default=64, help="the first rows of the data")
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 8, 64, 256])
    args = parser.parse_args()
    asked = {
        "model": args.model, "data": args.data, "objective": "distill", "divergence": args.divergence,
        "teacher": args.teacher, "teacher_prompt": args.teacher_prompt, "test_batches": -1,
    }  # fmt: skip
    settings = train_settings({name: value for name, value in asked.items() if value is not None})
    base = load_base(settings.model)
    prompt = read_teacher_prompt(args.teacher_prompt)
    rows = load_eval_set(args.data, settings.data, base.hf_tokenizer, teacher_prompt=prompt)
    rows = rows.select(range(min(args.rows, rows.examples)))
    figures = []
    print(f"{rows.supervised_tokens:,} tokens of {len(rows)} rows; {base.describe()}")
    print("k | divergence | share of all | bytes per token | processor s")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MLX_LORA_CACHE"] = cache
        for top_k in (0, *args.top_k):
            of_k = replace(settings, objective=replace(settings.objective, teacher_top_k=top_k))
            start = time.process_time()
            taught = with_teacher(of_k, base, {"rows": rows}, lambda line: None).sets["rows"]
            seconds = time.process_time() - start
            loss = held_out_loss(base, taught, of_k.loop, objective_of(of_k.objective)).loss
            size = taught.table.form.record_bytes if taught.table else 0
            whole = figures[0]["loss"] if figures else loss
            figures.append({"top_k": top_k, "loss": loss, "share": loss / whole, "bytes": size, "seconds": seconds})
            print(f"{top_k or 'all'} | {loss:.5f} | {loss / whole:.2%} | {size:,} | {seconds:.1f}", flush=True)
    print(json.dumps({"environment": environment(), "settings": vars(args), "figures": figures}))


if __name__ == "__main__":
    main()
