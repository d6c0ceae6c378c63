"""Writes what all sides share: the rows, the rows of the loss check, and the initial adapter factors.

python benchmarks/sides/prepare.py JOB.json      (versus.py runs this)

train.jsonl  sorted.jsonl  check.jsonl     rows as every trainer reads them; sorted: by token count
train.npz    sorted.npz    check.npz       the same rows encoded by us: ids and which are trained
initial.safetensors  perturbed.safetensors   our initial factors; and with B not zero, for the check
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import mlx_lora  # isort: skip  (first: it gives MLX a fast BLAS)
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from shared import read_job, write_result

from mlx_lora.adapters.inject import adapter_parameters, inject
from mlx_lora.adapters.targets import select_targets
from mlx_lora.config.settings import DataSettings, ModelSettings
from mlx_lora.data.chat_template import resolve_template
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import BadRow, Completion, Conversation, Example, FormatError, Text
from mlx_lora.data.files import find_splits
from mlx_lora.data.formats import parse_record
from mlx_lora.data.load import load_data
from mlx_lora.data.records import read_records
from mlx_lora.data.tokenize import Encoder
from mlx_lora.models.load import load_base
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

# Large enough that a factor lost, swapped or scaled wrongly moves the loss far past the tolerance.
PERTURBATION = 0.05


def read_examples(data: str) -> list[Example]:
    """Read the usable records of the training split."""
    examples = []
    for path in find_splits(data)["train"]:
        for record in read_records(path):
            if isinstance(record, BadRow):
                continue
            try:
                examples.append(parse_record(record.value)[1])
            except FormatError:
                continue
    return examples


def as_record(example: Example, as_text: bool) -> dict[str, Any]:
    """Write an example as the record that every side reads the same way."""
    if isinstance(example, Completion):
        turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]
        example = Conversation(turns)
    if isinstance(example, Text):
        return {"text": example.text}
    if as_text:
        return {"text": "\n\n".join(message["content"].strip() for message in example.messages)}
    return {"messages": example.messages, **({"tools": example.tools} if example.tools else {})}


def usable(records: list[dict[str, Any]], tokenizer: Any, max_seq_length: int) -> tuple[list[dict[str, Any]], int]:
    """Return the records that give one whole row each, and how many do not (too long: sides cut differently)."""
    has_chats = any("messages" in record for record in records)
    template = resolve_template(None, tokenizer)[0] if has_chats else None
    encoder = Encoder(tokenizer, template, max_seq_length=max_seq_length)
    encoded = encoder.encode([parse_record(record)[1] for record in records])
    out = {*encoded.dropped, *encoded.truncated}
    numbers, counts = np.unique(encoded.source, return_counts=True)
    out |= set(numbers[counts > 1].tolist())
    return [record for number, record in enumerate(records) if number not in out], len(out)


def write_rows(out: Path, name: str, records: list[dict[str, Any]], tokenizer: Any, max_seq_length: int) -> EncodedSet:
    """Write records and, read back by our own loader, their encoding."""
    file = out / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    settings = DataSettings(data=str(file), max_seq_length=max_seq_length, valid_fraction=0.0)
    rows = load_data(settings, tokenizer, seed=0).train
    if len(rows) != len(records):
        raise InputError(f"{file}: {len(records)} records gave {len(rows)} rows; report this")
    np.savez(out / f"{name}.npz", tokens=rows.tokens, mask=rows.mask, offsets=rows.offsets)
    return rows


def write_adapters(out: Path, model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Write the initial and the perturbed factors; return which layers they are for."""
    targets = select_targets(model)
    inject(model, targets.paths, job["rank"], job["scale"], seed=job["seed"])
    factors = adapter_parameters(model)
    mx.save_safetensors(str(out / "initial.safetensors"), factors)
    for name in (name for name in factors if name.endswith("lora_b")):
        factors[name] = PERTURBATION * mx.random.normal(factors[name].shape, key=mx.random.key(len(name)))
    mx.save_safetensors(str(out / "perturbed.safetensors"), factors)
    return {"keys": list(targets.keys), "layers": len(targets.paths), "blocks": targets.num_layers}


def gemm_gflops(size: int = 1024, repeats: int = 5) -> float:
    """Measure float32 GEMM here: what the fast BLAS is worth, said in every result file."""
    x = mx.random.normal((size, size))
    mx.eval(x @ x)
    best_s = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(x @ x)
        best_s = min(best_s, time.perf_counter() - start)
    return round(2 * size**3 / best_s / 1e9, 1)


def computes() -> dict[str, Any]:
    """Return the dtype that ours computes in on this machine, and what multiplies its matrices."""
    on = device.current_device().backend
    blas = mlx_lora.BLAS.name if on == "cpu" else f"MLX on {on}"
    return {"dtypes": [str(device.compute_dtype()).removeprefix("mlx.core.")], "blas": blas}


def main() -> None:
    """Do the job."""
    job = read_job()
    out, max_tokens = Path(job["folder"]), job["max_seq_length"]
    base = load_base(ModelSettings(model=job["model"]))
    tokenizer = base.hf_tokenizer
    as_text = job["as_text"] or not tokenizer.chat_template
    records = [as_record(example, as_text) for example in read_examples(job["data"])]
    if len({next(iter(record)) for record in records}) > 1:
        raise InputError(f"--data {job['data']} mixes chats and plain text; give one kind, or --as-text")
    records, left_out = usable(records, tokenizer, max_tokens)
    if len(records) < 8:
        raise InputError(f"--data {job['data']}: {len(records)} usable rows; the loss check alone takes 8")
    lengths = write_rows(out, "train", records, tokenizer, max_tokens).lengths
    if job["rows"] and job["rows"] < len(records):
        # Evenly spaced ranks of length: a short pass with the whole file's mix.
        ranks = np.linspace(0, len(records) - 1, job["rows"]).round().astype(int)
        records = [records[i] for i in sorted(np.argsort(lengths, kind="stable")[ranks].tolist())]
    rows = write_rows(out, "train", records, tokenizer, max_tokens)
    by_length = np.argsort(rows.lengths, kind="stable")
    write_rows(out, "sorted", [records[i] for i in by_length.tolist()], tokenizer, max_tokens)
    shorter = by_length[: max(8, len(by_length) * 2 // 3)]  # the check is no speed test
    chosen = shorter[np.linspace(0, len(shorter) - 1, 8).round().astype(int)]
    check = write_rows(out, "check", [records[i] for i in chosen.tolist()], tokenizer, max_tokens)
    parameters = [p for _, p in tree_flatten(base.model.parameters())]
    machine = device.current_device()
    facts = {
        "model": base.describe(),
        "quantized": base.quantization is not None,
        "parameters_bytes": sum(p.nbytes for p in parameters),
        "device": {"name": machine.name, "backend": machine.backend, "memory_bytes": machine.memory_bytes},
        "blas": {"name": mlx_lora.BLAS.name, "fast": mlx_lora.BLAS.fast, "gemm_gflops": gemm_gflops()},
        "computes": computes(),
        "model_fingerprint": base.fingerprint,
        "rows_fingerprint": rows.fingerprint,
        "rows": len(rows),
        "rows_left_out": left_out,
        "kind": "text, every token trained" if as_text or "text" in records[0] else "chats, assistant turns trained",
        "supervised_tokens": rows.supervised_tokens,
        "mean_row_tokens": round(float(rows.lengths.mean()), 1),
        "supervised_share": round(rows.supervised_tokens / float((rows.lengths - 1).sum()), 4),
        "check_supervised_tokens": check.supervised_tokens,
        "targets": write_adapters(out, base.model, job),
    }
    write_result(job, facts)


if __name__ == "__main__":
    main()
