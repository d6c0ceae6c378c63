"""Writes what all sides of a preference comparison share: the pairs, the pairs of the check, the initial factors.

python benchmarks/sides/prepare_pairs.py JOB.json      (versus.py --objective dpo runs this)

train.jsonl  check.jsonl     records as they were, for ours
train.npz    check.npz       the same pairs encoded by our reader: rows 2n and 2n + 1 are a chosen and a rejected answer
initial.safetensors          our initial factors
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import mlx_lora  # isort: skip  (first: it gives MLX a fast BLAS)
import numpy as np
from mlx.utils import tree_flatten
from prepare import computes, gemm_gflops, write_adapters
from shared import read_job, write_result

from mlx_lora.config.settings import DataSettings, ModelSettings
from mlx_lora.data.chat_template import resolve_template
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.encode import encode_entries
from mlx_lora.data.examples import BadRow, FormatError
from mlx_lora.data.files import find_splits
from mlx_lora.data.load import load_data
from mlx_lora.data.preferences import parse_pairs
from mlx_lora.data.records import read_records
from mlx_lora.data.tokenize import Encoder
from mlx_lora.models.load import load_base
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError


def read_pairs(data: str) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the training split's records that are preference pairs, and why others are not."""
    records, left_out = [], Counter()
    for path in find_splits(data)["train"]:
        for record in read_records(path):
            if isinstance(record, BadRow):
                left_out["unreadable"] += 1
                continue
            try:
                parse_pairs(record.value)
            except FormatError as error:
                left_out[str(error)] += 1
                continue
            records.append(record.value)
    return records, left_out


def why_unusable(rows: EncodedSet, pair: int) -> str | None:
    """Return why a pair cannot be given to every side as (prompt, chosen, rejected) token ids, or None."""
    spans = []
    for row in (2 * pair, 2 * pair + 1):
        tokens, mask = rows.row(row)
        trained = np.flatnonzero(mask)
        if trained[-1] - trained[0] + 1 != len(trained):
            return "an answer in several parts"
        spans.append(tokens[: trained[0]])
    return None if np.array_equal(*spans) else "the token ids of the prompt depend on the answer"


def usable(
    records: list[dict[str, Any]], tokenizer: Any, max_seq_length: int, left_out: Counter[str]
) -> list[dict[str, Any]]:
    """Return the records that every side can train on whole; the others are counted in `left_out`."""
    encoder = Encoder(tokenizer, resolve_template(None, tokenizer)[0], max_seq_length=max_seq_length)
    kept = []
    for record in records:
        encoded = encode_entries(encoder, parse_pairs(record)[:1])
        if encoded.dropped:
            left_out[next(iter(encoded.dropped.values()))] += 1
        elif encoded.truncated:
            left_out[f"longer than {max_seq_length} tokens"] += 1
        elif reason := why_unusable(encoded.rows, 0):
            left_out[reason] += 1
        else:
            kept.append(record)
    return kept


def write_pairs(out: Path, name: str, records: list[dict[str, Any]], tokenizer: Any, max_tokens: int) -> EncodedSet:
    """Write records and, read back by our own loader, their encoding."""
    file = out / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    settings = DataSettings(data=str(file), max_seq_length=max_tokens, valid_fraction=0.0)
    rows = load_data(settings, tokenizer, seed=0, records="pairs").train
    if rows.examples != len(records):
        raise InputError(f"{file}: {len(records)} records gave {rows.examples} pairs; report this")
    np.savez(out / f"{name}.npz", tokens=rows.tokens, mask=rows.mask, offsets=rows.offsets)
    return rows


def evenly(order: np.ndarray, count: int) -> list[int]:
    """Return `count` of these numbers, evenly spaced."""
    return order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)].tolist()


def main() -> None:
    """Do the job."""
    job = read_job()
    out, max_tokens = Path(job["folder"]), job["max_seq_length"]
    base = load_base(ModelSettings(model=job["model"]))
    tokenizer = base.hf_tokenizer
    records, left_out = read_pairs(job["data"])
    records = usable(records, tokenizer, max_tokens, left_out)
    if len(records) < job["check_pairs"]:
        raise InputError(
            f"--data {job['data']}: {len(records)} usable pairs, the check alone takes {job['check_pairs']}; "
            f"left out: {dict(left_out)}"
        )
    lengths = write_pairs(out, "train", records, tokenizer, max_tokens).lengths.reshape(-1, 2).sum(axis=1)
    if job["rows"] and job["rows"] < len(records):
        # Evenly spaced ranks of length: a short pass with the whole file's mix.
        records = [records[i] for i in sorted(evenly(np.argsort(lengths, kind="stable"), job["rows"]))]
    rows = write_pairs(out, "train", records, tokenizer, max_tokens)
    by_length = np.argsort(rows.lengths.reshape(-1, 2).sum(axis=1), kind="stable")
    shorter = by_length[: max(job["check_pairs"], len(by_length) // 3)]  # the check is no speed test
    write_pairs(out, "check", [records[i] for i in evenly(shorter, job["check_pairs"])], tokenizer, max_tokens)
    machine = device.current_device()
    trained = rows.supervised_counts.reshape(-1, 2).mean(axis=0)
    facts = {
        "model": base.describe(),
        "quantized": base.quantization is not None,
        "parameters_bytes": sum(p.nbytes for _, p in tree_flatten(base.model.parameters())),
        "device": {"name": machine.name, "backend": machine.backend, "memory_bytes": machine.memory_bytes},
        "blas": {"name": mlx_lora.BLAS.name, "fast": mlx_lora.BLAS.fast, "gemm_gflops": gemm_gflops()},
        "computes": computes(),
        "pairs": rows.examples,
        "left_out": dict(left_out),
        "mean_prompt_tokens": round(float(rows.lengths.mean() - trained.mean()), 1),
        "mean_chosen_tokens": round(float(trained[0]), 1),
        "mean_rejected_tokens": round(float(trained[1]), 1),
        "targets": write_adapters(out, base.model, job),
    }
    write_result(job, facts)


if __name__ == "__main__":
    main()
