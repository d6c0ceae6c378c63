"""Writes what all sides of a comparison share: rows or preference pairs, those of the check, and the initial factors.

    python benchmarks/sides/prepare.py JOB.json      (versus.py runs this)

train.jsonl  sorted.jsonl  check.jsonl       records as every trainer reads them; sorted: rows by token count
train.npz    sorted.npz    check.npz         the same encoded by us: ids and which are trained; of pairs, rows 2n and 2n + 1
                                             are a chosen and a rejected answer
initial.safetensors  perturbed.safetensors   our initial factors; and with B not zero, for the check

The job's `what` is rows, pairs, or quick: the fixed model and rows of the gate, which do not depend on anything else.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import mlx_lora  # isort: skip  (first: it gives MLX a fast BLAS)
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from on_mlx import gemm_gflops
from shared import read_job, write_result

from mlx_lora.adapters.inject import adapter_parameters, inject, select_targets
from mlx_lora.config.load import RECIPES
from mlx_lora.config.settings import DataSettings, ModelSettings
from mlx_lora.data.chat_template import resolve_template
from mlx_lora.data.data_sets import find_splits
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import BadRow, Completion, Conversation, Example, FormatError, Text
from mlx_lora.data.file_formats import read_records
from mlx_lora.data.formats import parse_record
from mlx_lora.data.load import load_data
from mlx_lora.data.preferences import parse_pairs
from mlx_lora.data.read import encode_entries
from mlx_lora.data.tokenize import Encoder
from mlx_lora.models.convert import convert_model
from mlx_lora.models.load import Base, load_base
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, replacing_folder
from mlx_lora.utils.hub import SMOLLM2_GGUF, embedded_model, resolve_model

# Large enough that a factor lost, swapped or scaled wrongly moves the loss far past the tolerance.
PERTURBATION = 0.05
CHECK_ROWS = 8
BLOCKS, RECIPE_NAMES = 8, ("tutor", "customer-service")  # of quick

Record = dict[str, Any]


def training_values(data: str) -> list[Record | None]:
    """Return the training split's records; None for a line that cannot be read."""
    found = [record for path in find_splits(data)["train"] for record in read_records(path)]
    return [None if isinstance(record, BadRow) else record.value for record in found]


def as_record(example: Example, as_text: bool) -> Record:
    """Write an example as the record that every side reads the same way."""
    if isinstance(example, Completion):
        turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]
        example = Conversation(turns)
    if isinstance(example, Text):
        return {"text": example.text}
    if as_text:
        return {"text": "\n\n".join(message["content"].strip() for message in example.messages)}
    return {"messages": example.messages, **({"tools": example.tools} if example.tools else {})}


def usable_rows(job: Record, tokenizer: Any) -> tuple[list[Record], Record]:
    """Return the records that give one whole row each, and facts; sides cut what is too long differently.

    Raises:
        InputError: there are fewer than the check takes, or chats and texts are mixed.
    """
    as_text, records = job["as_text"] or not tokenizer.chat_template, []
    for value in training_values(job["data"]):
        try:
            records += [as_record(parse_record(value)[1], as_text)] if value is not None else []
        except FormatError:
            continue
    if len({next(iter(record)) for record in records}) > 1:
        raise InputError(f"--data {job['data']} mixes chats and plain text; give one kind, or --as-text")
    has_chats = any("messages" in record for record in records)
    template = resolve_template(None, tokenizer)[0] if has_chats else None
    encoder = Encoder(tokenizer, template, max_seq_length=job["max_seq_length"])
    encoded = encoder.encode([parse_record(record)[1] for record in records])
    out = {*encoded.dropped, *encoded.truncated}
    numbers, counts = np.unique(encoded.source, return_counts=True)
    out |= set(numbers[counts > 1].tolist())
    kept = [record for number, record in enumerate(records) if number not in out]
    if len(kept) < CHECK_ROWS:
        raise InputError(f"--data {job['data']}: {len(kept)} usable rows; the loss check alone takes {CHECK_ROWS}")
    is_text = as_text or "text" in kept[0]
    return kept, {
        "rows_left_out": len(out),
        "kind": f"{'text, every token' if is_text else 'chats, assistant turns'} trained",
    }


def why_unusable(rows: EncodedSet) -> str | None:
    """Return why a pair cannot be given to every side as (prompt, chosen, rejected) token ids, or None."""
    prompts = []
    for row in (0, 1):
        tokens, mask = rows.row(row)
        trained = np.flatnonzero(mask)
        if trained[-1] - trained[0] + 1 != len(trained):
            return "an answer in several parts"
        prompts.append(tokens[: trained[0]])
    return None if np.array_equal(*prompts) else "the token ids of the prompt depend on the answer"


def usable_pairs(job: Record, tokenizer: Any) -> tuple[list[Record], Record]:
    """Return the records that every side can train on whole, and facts: how many are left out, and why.

    Raises:
        InputError: there are fewer than the check takes.
    """
    encoder = Encoder(tokenizer, resolve_template(None, tokenizer)[0], max_seq_length=job["max_seq_length"])
    kept, left_out = [], Counter[str]()
    for value in training_values(job["data"]):
        if value is None:
            left_out["unreadable"] += 1
            continue
        try:
            encoded = encode_entries(encoder, parse_pairs(value)[:1])
        except FormatError as error:
            left_out[str(error)] += 1
            continue
        if encoded.dropped:
            left_out[next(iter(encoded.dropped.values()))] += 1
        elif encoded.truncated:
            left_out[f"longer than {job['max_seq_length']} tokens"] += 1
        elif reason := why_unusable(encoded.rows):
            left_out[reason] += 1
        else:
            kept.append(value)
    if len(kept) < job["check_pairs"]:
        found = f"{len(kept)} usable pairs, the check alone takes {job['check_pairs']}; left out: {dict(left_out)}"
        raise InputError(f"--data {job['data']}: {found}")
    return kept, {"left_out": dict(left_out)}


def write(job: Record, name: str, records: list[Record], tokenizer: Any) -> EncodedSet:
    """Write records and, read back by our own loader, their encoding."""
    out, on_pairs = Path(job["folder"]), job["what"] == "pairs"
    file = out / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    settings = DataSettings(data=str(file), max_seq_length=job["max_seq_length"], valid_fraction=0.0)
    rows = load_data(settings, tokenizer, seed=0, **({"records": "pairs"} if on_pairs else {})).train
    found = rows.examples if on_pairs else len(rows)
    if found != len(records):
        raise InputError(f"{file}: {len(records)} records gave {found} rows; report this")
    np.savez(out / f"{name}.npz", tokens=rows.tokens, mask=rows.mask, offsets=rows.offsets)
    return rows


def evenly(order: np.ndarray, count: int) -> list[int]:
    """Return `count` of these numbers, evenly spaced."""
    return order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)].tolist()


def by_length(rows: EncodedSet, on_pairs: bool) -> np.ndarray:
    """Return the numbers of the records, the shortest first."""
    return np.argsort(rows.lengths.reshape(-1, 2).sum(axis=1) if on_pairs else rows.lengths, kind="stable")


def write_adapters(job: Record, model: Any) -> Record:
    """Write the initial and the perturbed factors; return which layers they are for."""
    targets, out = select_targets(model), Path(job["folder"])
    inject(model, targets.paths, job["rank"], job["scale"], seed=job["seed"])
    factors = adapter_parameters(model)
    mx.save_safetensors(str(out / "initial.safetensors"), factors)
    for name in (name for name in factors if name.endswith("lora_b")):
        factors[name] = PERTURBATION * mx.random.normal(factors[name].shape, key=mx.random.key(len(name)))
    mx.save_safetensors(str(out / "perturbed.safetensors"), factors)
    return {"keys": list(targets.keys), "layers": len(targets.paths), "blocks": targets.num_layers}


def about(base: Base) -> Record:
    """Return facts about the base and the machine, among them what ours computes in, and with."""
    machine = device.current_device()
    blas = mlx_lora.BLAS.name if machine.backend == "cpu" else f"MLX on {machine.backend}"
    return {
        "model": base.describe(),
        "model_fingerprint": base.fingerprint,
        "quantized": base.quantization is not None,
        "parameters_bytes": sum(p.nbytes for _, p in tree_flatten(base.model.parameters())),
        "device": {"name": machine.name, "backend": machine.backend, "memory_bytes": machine.memory_bytes},
        "blas": {"name": mlx_lora.BLAS.name, "fast": mlx_lora.BLAS.fast, "gemm_gflops": gemm_gflops()},
        "computes": {"dtypes": [str(device.compute_dtype()).removeprefix("mlx.core.")], "blas": blas},
    }


def prepare(job: Record) -> Record:
    """Write rows or pairs, and factors, and return the facts about them."""
    base, on_pairs = load_base(ModelSettings(model=job["model"])), job["what"] == "pairs"
    tokenizer = base.hf_tokenizer
    records, facts = (usable_pairs if on_pairs else usable_rows)(job, tokenizer)
    order = by_length(write(job, "train", records, tokenizer), on_pairs)
    if job["rows"] and job["rows"] < len(records):
        # Evenly spaced ranks of length: a short pass with the whole file's mix.
        records = [records[i] for i in sorted(evenly(order, job["rows"]))]
    rows = write(job, "train", records, tokenizer)
    order, checked = by_length(rows, on_pairs), job["check_pairs"] if on_pairs else CHECK_ROWS
    # The check is no speed test, so it is on shorter ones.
    shorter = order[: max(checked, len(order) // 3 if on_pairs else len(order) * 2 // 3)]
    check = write(job, "check", [records[i] for i in evenly(shorter, checked)], tokenizer)
    if on_pairs:
        trained = rows.supervised_counts.reshape(-1, 2).mean(axis=0)
        prompt = float(rows.lengths.mean() - trained.mean())
        means = {"prompt": prompt, "chosen": float(trained[0]), "rejected": float(trained[1])}
        facts |= {"pairs": rows.examples, **{f"mean_{part}_tokens": round(mean, 1) for part, mean in means.items()}}
    else:
        write(job, "sorted", [records[i] for i in order.tolist()], tokenizer)
        facts |= {
            "rows": len(rows), "rows_fingerprint": rows.fingerprint, "supervised_tokens": rows.supervised_tokens,
            "mean_row_tokens": round(float(rows.lengths.mean()), 1),
            "supervised_share": round(rows.supervised_tokens / float((rows.lengths - 1).sum()), 4),
            "check_supervised_tokens": check.supervised_tokens,
        }  # fmt: skip
    return {**about(base), **facts, "targets": write_adapters(job, base.model)}


def quick(job: Record) -> Record:
    """Make the gate's fixed model, once, and its fixed rows, and return their paths.

    The model, the first blocks of an embedded one in float32, is kept in our cache; its name has the GGUF file's checksum and
    the number of blocks.
    """
    model = cache_dir("converted") / f"quick-{SMOLLM2_GGUF.sha256[:12]}-{BLOCKS}-blocks"
    if not (model / "config.json").is_file():
        with replacing_folder(model) as temporary:
            convert_model(resolve_model(str(embedded_model(SMOLLM2_GGUF))), temporary / "whole", target="float")
            _cut(temporary / "whole", temporary)
    rows = Path(job["folder"]) / "quick.jsonl"
    texts = ((RECIPES / name / "train.jsonl").read_text(encoding="utf-8") for name in RECIPE_NAMES)
    rows.write_text("".join(texts), encoding="utf-8")
    return {"model": str(model), "data": str(rows)}


def _cut(whole: Path, out: Path) -> None:
    """Move a model's folder, without the blocks after the first ones."""

    def later(name: str) -> bool:
        after = name.partition("layers.")[2]
        return bool(after) and int(after.split(".")[0]) >= BLOCKS

    weights = dict(mx.load(str(whole / "model.safetensors")))
    kept = {name: array for name, array in weights.items() if not later(name)}
    mx.save_safetensors(str(out / "model.safetensors"), kept, metadata={"format": "mlx"})
    for path in list(whole.iterdir()):
        if path.name == "config.json":
            config = json.loads(path.read_text(encoding="utf-8")) | {"num_hidden_layers": BLOCKS}
            (out / path.name).write_text(json.dumps(config, indent=1), encoding="utf-8")
        elif not path.name.startswith("model."):
            path.rename(out / path.name)
    shutil.rmtree(whole)


if __name__ == "__main__":
    asked = read_job()
    write_result(asked, quick(asked) if asked["what"] == "quick" else prepare(asked))
