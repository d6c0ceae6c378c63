"""Define the fixed, versioned workloads: the same work on every machine, in tiers by the memory they need; and predict them.

A workload never changes: if it must, it gets the next version, and figures of the two are not compared. Batch shape and
checkpointing are part of it, so that a large Mac does the same work as a small one. Tiers are memory sizes in GB: by the
planner, all workloads of a tier fit the chips sold with that memory (tests/bench/test_suite.py checks it).

The shapes of the models are those of the published config.json files, reduced to what decides memory and speed, so that a plan
needs no download.

The training data is generated from a seed: the same bytes everywhere, and nothing to download. The text consists of common
English words, drawn by rank (a word further down the list is less likely), in sentences of 6 to 18 words. It has no meaning, and
neither has a loss on it; a benchmark only needs token counts, lengths and shapes. Only `random.random` is used, because Python
guarantees its sequence for a seed.

Useful work does not include padding and what checkpointing repeats. MFU is useful work per second divided by the rate of
a large product.

Run workloads, each as `python -m mlx_lora.train` in a fresh process with a clean environment, and compute their figures.

A step's time is the wall-clock time from the end of the step before it to its own end, data and host work included. The
first pass over the rows is left out, because it compiles every batch shape; medians also leave out later steps with a
new shape. Tokens do not include padding. Energy is measured if the system allows it to be read without a password.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import mlx.core as mx

import mlx_lora
from mlx_lora.bench.machine import DROPPED_VARIABLES, answer, describe_power
from mlx_lora.config.fields import flag_words
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import PAIRS
from mlx_lora.config.settings import TrainSettings
from mlx_lora.models.meta import outline_of_config
from mlx_lora.planner.fit import run_of
from mlx_lora.planner.memory import Machine, ModelShape, plan_memory
from mlx_lora.planner.speed import CHIPS, Ceilings, count_step, known_chip, listed_ceilings, step_seconds
from mlx_lora.trainer.fit import outlined_shape
from mlx_lora.utils.errors import InputError, RunError, first_line
from mlx_lora.utils.files import sha256_of
from mlx_lora.utils.hub import SMOLLM2_GGUF, embedded_model

# Models


@dataclass(frozen=True)
class SuiteModel:
    """A base model, in bfloat16 and in 4 bits.

    Attributes:
        name: in workload names and tables.
        float_id, packed_id: hub ids of the bfloat16 and the 4-bit model; None: no workload uses it.
        parameters: the published number of weights.
        config: the fields of config.json that decide its shape.
        quantization: of the 4-bit model.
    """

    name: str
    float_id: str | None
    packed_id: str | None
    parameters: float
    config: dict[str, Any]
    quantization: dict[str, Any]


AFFINE = {"group_size": 64, "bits": 4, "mode": "affine"}


def _config(model_type: str, width: int, blocks: int, inner: int, heads: int, key_heads: int, **more: Any) -> dict:
    return {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 32768,
        **more,
    }


SMOLLM2 = SuiteModel(
    "smollm2-135m",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "mlx-community/SmolLM2-135M-Instruct-4bit",
    134.5e6,
    _config("llama", 576, 30, 1536, 9, 3, vocab_size=49152, tie_word_embeddings=True),
    AFFINE,
)
LLAMA_1B = SuiteModel(
    "llama-3.2-1b",
    "mlx-community/Llama-3.2-1B-Instruct-bf16",
    "mlx-community/Llama-3.2-1B-Instruct-4bit",
    1.236e9,
    _config("llama", 2048, 16, 8192, 32, 8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    AFFINE,
)
LLAMA_3B = SuiteModel(
    "llama-3.2-3b",
    "mlx-community/Llama-3.2-3B-Instruct-bf16",
    "mlx-community/Llama-3.2-3B-Instruct-4bit",
    3.213e9,
    _config("llama", 3072, 28, 8192, 24, 8, head_dim=128, vocab_size=128256, tie_word_embeddings=True),
    AFFINE,
)
QWEN3_4B = SuiteModel(
    "qwen3-4b",
    "mlx-community/Qwen3-4B-bf16",
    "mlx-community/Qwen3-4B-4bit",
    4.022e9,
    _config("qwen3", 2560, 36, 9728, 32, 8, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    AFFINE,
)
QWEN3_8B = SuiteModel(
    "qwen3-8b",
    "mlx-community/Qwen3-8B-bf16",
    "mlx-community/Qwen3-8B-4bit",
    8.191e9,
    _config("qwen3", 4096, 36, 12288, 32, 8, head_dim=128, vocab_size=151936, tie_word_embeddings=False),
    AFFINE,
)
GEMMA3_1B = SuiteModel(
    "gemma-3-1b",
    "mlx-community/gemma-3-1b-it-bf16",
    "mlx-community/gemma-3-1b-it-4bit",
    1.0e9,
    _config(
        "gemma3_text", 1152, 26, 6912, 4, 1, head_dim=256, vocab_size=262144, query_pre_attn_scalar=256,
        rope_local_base_freq=10000.0, sliding_window=512, sliding_window_pattern=6,
    ),
    AFFINE,
)  # fmt: skip
GPT_OSS_20B = SuiteModel(
    "gpt-oss-20b",
    None,
    "mlx-community/gpt-oss-20b-MXFP4-Q8",
    20.9e9,
    _config(
        "gpt_oss", 2880, 24, 2880, 64, 8, head_dim=64, vocab_size=201088, num_local_experts=32, num_experts_per_tok=4,
        sliding_window=128, tie_word_embeddings=False,
    ),
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
)  # fmt: skip
MODELS = {m.name: m for m in (SMOLLM2, LLAMA_1B, LLAMA_3B, QWEN3_4B, QWEN3_8B, GEMMA3_1B, GPT_OSS_20B)}


# Workloads

TIERS = ("embedded", "8", "16", "32", "64", "128")


@dataclass(frozen=True)
class ChatData:
    """The training data to generate, as chats, or as preference pairs: two answers to each prompt.

    Attributes:
        count: the number of rows.
        prompt_words, answer_words: least and most words.
        seed: of the words and lengths.
    """

    count: int
    prompt_words: tuple[int, int]
    answer_words: tuple[int, int]
    seed: int = 0


@dataclass(frozen=True)
class RowShape:
    """The data of a workload and the lengths of its rows.

    Attributes:
        rows: the data.
        max_seq_length: in tokens; `2k` and `8k` rows are longer and are cut, so that all batches have one shape.
        typical_width: positions of a typical row, for predictions without a tokenizer.
        real_share, trained_share: fractions of a batch's positions that are not padding, and that are trained, for the
            same use.
        words: a description.
        objective: what is trained toward; None: imitation, which has no name in definitions from the time when it was the
            only objective.
    """

    rows: ChatData
    max_seq_length: int
    typical_width: int
    real_share: float
    trained_share: float
    words: str
    objective: str | None = None


# There are few rows, because the first pass over them, which compiles every batch shape, is the warm-up.
ROW_SHAPES = {
    "chat": RowShape(ChatData(48, (8, 60), (16, 320)), 1024, 204, 0.94, 0.61, "short chats"),
    "2k": RowShape(ChatData(3, (20, 40), (2600, 2600)), 2049, 2048, 1.0, 0.97, "rows of 2,048 tokens"),
    "dpo": RowShape(ChatData(24, (8, 60), (16, 160)), 1024, 168, 0.76, 0.40, "DPO on pairs of short answers", "dpo"),
    "8k": RowShape(ChatData(3, (20, 40), (10400, 10400)), 8193, 8192, 1.0, 0.99, "rows of 8,192 tokens"),
}


@dataclass(frozen=True)
class Workload:
    """One workload.

    Attributes:
        tier: a memory size in GB, or `embedded`: a model that PyPI has too, for machines without access to the hub.
        model: a key of MODELS.
        form: a key of ROW_SHAPES: `chat` (short rows), `2k` or `8k` (full rows), `dpo` (pairs of short answers).
        packed: 4-bit base (QLoRA), else floats (LoRA).
        batch_tokens: the most positions per step.
        checkpointing: --grad-checkpoint.
        epochs: passes over the rows that are counted, after one that is not.
        rank: of the adapter on all linear layers; alpha is twice that.
        version: of this definition.
    """

    tier: str
    model: str
    form: str
    packed: bool
    batch_tokens: int = 2048
    checkpointing: str = "block"
    epochs: int = 3
    rank: int = 16
    version: int = 1

    @property
    def name(self) -> str:
        """The name, such as `llama-3.2-1b-2k-qlora`; it starts with `embedded-` in that tier."""
        plain = f"{self.model}-{self.form}-{'qlora' if self.packed else 'lora'}"
        return f"embedded-{plain}" if self.tier == "embedded" else plain

    @property
    def shape(self) -> RowShape:
        """The data and lengths of its rows."""
        return ROW_SHAPES[self.form]

    @property
    def source(self) -> str:
        """The hub id of its model, or the file and hash of the embedded one."""
        if self.tier == "embedded":
            return f"{SMOLLM2_GGUF.file_name}, sha256 {SMOLLM2_GGUF.sha256[:12]}"
        found = MODELS[self.model]
        return (found.packed_id if self.packed else found.float_id) or ""

    def text(self) -> str:
        """Return the content of its data file."""
        return chat_rows(**vars(self.shape.rows), pairs=self.shape.objective in PAIRS)

    def flags(self) -> dict[str, Any]:
        """Return its train settings by name."""
        toward = {"objective": self.shape.objective, "beta": 0.1} if self.shape.objective else {}
        return {
            **toward,
            "method": "lora",
            "rank": self.rank,
            "alpha": 2.0 * self.rank,
            "target_modules": "all-linear",
            "max_seq_length": self.shape.max_seq_length,
            "batch_tokens": self.batch_tokens,
            "grad_checkpoint": self.checkpointing,
            "optimizer": "adamw",
            "learning_rate": 1e-4,
            "seed": 0,
        }

    def definition(self) -> dict[str, Any]:
        """Return its complete definition as JSON values."""
        rows = dataclasses.asdict(self.shape.rows)
        content = {
            "name": self.name,
            **dataclasses.asdict(self),
            "rows": {key: list(value) if isinstance(value, tuple) else value for key, value in rows.items()},
            "source": self.source,
            "flags": self.flags(),
        }
        return {**content, "digest": digest_of(content)}


def digest_of(definition: dict[str, Any]) -> str:
    """Return 12 hex digits that identify a definition, computed from everything but the digest itself."""
    content = {key: value for key, value in definition.items() if key != "digest"}
    return sha256_of(json.dumps(content, sort_keys=True))[:12]


SHORT: dict[str, Any] = {"batch_tokens": 1024, "checkpointing": "none", "epochs": 2}
LONG: dict[str, Any] = {"batch_tokens": 8192, "epochs": 2}
WORKLOADS = (
    Workload("embedded", SMOLLM2.name, "chat", False, **SHORT),
    Workload("embedded", SMOLLM2.name, "chat", True, **SHORT),
    Workload("embedded", SMOLLM2.name, "2k", True, epochs=2),
    Workload("embedded", SMOLLM2.name, "dpo", False, **SHORT),
    Workload("8", SMOLLM2.name, "chat", False, checkpointing="none"),
    Workload("8", SMOLLM2.name, "2k", False),
    Workload("8", LLAMA_1B.name, "chat", True),
    Workload("8", LLAMA_1B.name, "2k", True),
    Workload("8", GEMMA3_1B.name, "chat", True),
    Workload("16", LLAMA_1B.name, "chat", False),
    Workload("16", GEMMA3_1B.name, "2k", False),
    Workload("16", LLAMA_3B.name, "chat", True),
    Workload("16", LLAMA_3B.name, "2k", True),
    Workload("16", QWEN3_4B.name, "chat", True),
    Workload("32", LLAMA_3B.name, "chat", False),
    Workload("32", QWEN3_4B.name, "2k", True),
    Workload("32", QWEN3_8B.name, "chat", True),
    Workload("32", QWEN3_8B.name, "2k", True),
    Workload("32", GPT_OSS_20B.name, "chat", True),
    Workload("64", QWEN3_4B.name, "2k", False),
    Workload("64", QWEN3_8B.name, "chat", False),
    Workload("64", QWEN3_8B.name, "8k", True, **LONG),
    Workload("64", GPT_OSS_20B.name, "2k", True),
    Workload("128", QWEN3_8B.name, "2k", False),
    Workload("128", QWEN3_8B.name, "8k", False, **LONG),
    Workload("128", GPT_OSS_20B.name, "8k", True, **LONG),
)


def choose_workloads(tiers: tuple[str, ...], names: tuple[str, ...]) -> list[Workload]:
    """Return the workloads with these tiers or names, in the table's order.

    Raises:
        InputError: a name is unknown.
    """
    known = {one.name: one for one in WORKLOADS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"--workload {', '.join(unknown)}: no such workload; choose from {', '.join(known)}")
    return [one for one in WORKLOADS if one.tier in tiers or one.name in names]


# Training data

_LIST = """
the of and to in that it was for on with as his they at be this have from or one had by but not what all were we when
your can said there use an each which she do how their if will up other about out many then them these so some her
would make like him into time has look two more write go see number no way could people my than first water been call
who oil its now find long down day did get come made may part over new sound take only little work know place year
live me back give most very after thing our just name good sentence man think say great where help through much before
line right too mean old any same tell boy follow came want show also around form three small set put end does another
well large must big even such because turn here why ask went men read need land different home us move try kind hand
picture again change off play spell air away animal house point page letter mother answer found study still learn
should world high every near add food between own below country plant last school father keep tree never start city
earth eye light thought head under story saw left few while along might close something seem next hard open example
begin life always those both paper together got group often run important until children side feet car mile night walk
white sea began grow took river four carry state once book hear stop without second later miss idea enough eat face
watch far really almost let above girl sometimes mountain cut young talk soon list song being leave family
"""
WORDS = tuple(_LIST.split())


def chat_rows(
    count: int, prompt_words: tuple[int, int], answer_words: tuple[int, int], seed: int = 0, pairs: bool = False
) -> str:
    """Return `count` single-turn chats as JSON lines, in the messages format.

    Args:
        count: the number of rows.
        prompt_words, answer_words: least and most words. Lengths are evenly distributed on a logarithmic scale: as in
            real instructions, many are short and few are long.
        seed: of the words and lengths.
        pairs: return preference pairs instead, in TRL's conversational format.
    """
    source = random.Random(seed)
    lines = []
    for _ in range(count):
        words = [prompt_words, *[answer_words] * (2 if pairs else 1)]
        prompt, *answers = (_text(source, round(least * (most / least) ** source.random())) for least, most in words)
        asked = {"role": "user", "content": prompt}
        said = [{"role": "assistant", "content": answer} for answer in answers]
        row = {"prompt": [asked], "chosen": said[:1], "rejected": said[1:]} if pairs else {"messages": [asked, *said]}
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


def _text(source: random.Random, words: int) -> str:
    """Return this many words as sentences."""
    sentences: list[str] = []
    left = words
    while left > 0:
        size = min(left, 6 + int(source.random() * 13))
        # The square of a uniform number makes early words far more frequent, as in any language.
        chosen = [WORDS[int(source.random() ** 2 * len(WORDS))] for _ in range(size)]
        sentences.append(" ".join(chosen).capitalize() + ".")
        left -= size
    return " ".join(sentences)


# Predictions

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The quantization of the embedded model's GGUF file: Q4_1, and Q8_0 for the embedding, which is also the head.
EIGHT_BITS = {"group_size": 32, "bits": 8, "mode": "affine"}
EMBEDDED_QUANTIZATION = {**EIGHT_BITS, "bits": 4, "model.embed_tokens": EIGHT_BITS}


@dataclass(frozen=True)
class BatchCounts:
    """A batch of a workload.

    Attributes:
        rows, width: its shape.
        trained, real: numbers of positions that are trained, and that are not padding.
    """

    rows: int
    width: int
    trained: int
    real: int


def model_shape_of(workload: Workload, dtype: str = "bfloat16") -> ModelShape:
    """Return the shape of a workload's model with its adapter, from the list of workloads; nothing is read or downloaded.

    Workloads of the same model and adapter get the same object: building it and reading its blocks takes a second.

    Args:
        workload: the workload.
        dtype: of the floats.
    """
    packed_file = workload.packed and workload.tier == "embedded"
    alike = Workload("embedded" if packed_file else "8", workload.model, "chat", workload.packed, rank=workload.rank)
    return _shape_of(alike, dtype)


@cache
def _shape_of(workload: Workload, dtype: str) -> ModelShape:
    model = MODELS[workload.model]
    quantization = EMBEDDED_QUANTIZATION if workload.tier == "embedded" else model.quantization
    config = {**model.config, **({"quantization": quantization} if workload.packed else {})}
    outline = outline_of_config(config, getattr(mx, dtype))
    return outlined_shape(outline, _settings(workload))


@cache
def _settings(workload: Workload) -> TrainSettings:
    return train_settings(workload.flags())


def typical_batches(workload: Workload) -> list[BatchCounts]:
    """Return a typical batch, for predictions without a tokenizer."""
    shape = workload.shape
    rows = max(1, workload.batch_tokens // shape.typical_width)
    positions = rows * shape.typical_width
    return [
        BatchCounts(
            rows, shape.typical_width, round(positions * shape.trained_share), round(positions * shape.real_share)
        )
    ]


def batches_of(records: Sequence[dict[str, Any]]) -> list[BatchCounts]:
    """Return the batches of a run's steps; several micro-batches of a step share its tokens in proportion to size."""
    found = []
    for record in records:
        for shape in record["shapes"]:
            rows, width = (int(side) for side in shape.split("x"))
            share = rows * width / record["positions"]
            trained, real = (round(record[key] * share) for key in ("supervised_tokens", "real_tokens"))
            found.append(BatchCounts(rows, width, trained, real))
    return found


def predict(workload: Workload, machine: Machine, ceilings: Ceilings, batches: Sequence[BatchCounts]) -> dict[str, Any]:
    """Predict speed and memory of a workload.

    Args:
        workload: the workload.
        machine: the machine that it would run on.
        ceilings: the machine's rates.
        batches: the batches of its steps.

    Returns:
        `tokens_per_s` of real tokens, `peak_memory_bytes` and `needed_bytes` (with the buffer cache), whether it
        `fits`, and `flops_per_token` of useful work.
    """
    shape = model_shape_of(workload, "float32" if machine.number_bytes == 4 else "bfloat16")
    settings, mode = _settings(workload), workload.checkpointing
    seconds = flops = 0.0
    peak, needed, fits = 0, 0, True
    for batch in batches:
        run = run_of(settings, batch.rows, batch.width, mode, batch.trained)
        seconds += step_seconds(shape, run, machine, ceilings)[0]
        counts = count_step(shape, replace(run, checkpointing="none"), machine)
        flops += sum(count.flops for count in counts.values()) * batch.real / run.positions
        memory = plan_memory(shape, run, machine)
        peak, needed = max(peak, memory.peak_bytes), max(needed, memory.needed_bytes)
        fits = fits and memory.fits
    real = sum(batch.real for batch in batches)
    return {
        "tokens_per_s": real / seconds,
        "peak_memory_bytes": peak,
        "needed_bytes": needed,
        "fits": fits,
        "flops_per_token": flops / real,
    }


def measured_machine(device: dict[str, Any], ceilings: dict[str, Any]) -> tuple[Machine, Ceilings]:
    """Return the results of bench/machine.py as the planner's types."""
    machine = Machine(
        device["name"], device["backend"], device["memory_bytes"], device["working_set_bytes"],
        NUMBER_BYTES[device["compute_dtype"]],
    )  # fmt: skip
    exponentials = ceilings["exponentials_per_s"]
    rates = Ceilings(
        ceilings["flops_per_s"],
        ceilings["bytes_per_s"],
        float("inf") if exponentials is None else exponentials,
        ceilings["launch_s"],
        "measured here",
    )
    return machine, rates


def listed_flops(device: dict[str, Any], gpu_cores: int | None) -> float | None:
    """Return the listed peak in the run's dtype of a chip with this many GPU cores, None if the chip is not in the table."""
    chip = known_chip(device["name"]) if device["backend"] == "metal" else None
    if chip is None:
        return None
    share = gpu_cores / chip.gpu_cores if gpu_cores else 1.0  # the table has full chips
    return share * chip.tflops * 1e12 * (chip.half_rate if NUMBER_BYTES[device["compute_dtype"]] == 2 else 1.0)


def predict_chips(workload: Workload) -> list[dict[str, Any]]:
    """Predict a workload for every chip of the table, with the smallest memory sold that it fits in.

    Returns:
        One dict per chip: `chip`, `gpu_cores`, `status` (of the listed figures), `memory_gib` (None: it does not fit in
        any size that is sold), and what `predict` returns.
    """
    batches, found = typical_batches(workload), []
    for chip in CHIPS:
        expected: dict[str, Any] = {}
        for size in chip.memory_gib:
            expected = predict(workload, chip.machine(size), listed_ceilings(chip), batches) | {"memory_gib": size}
            if expected["fits"]:
                break
        about = {"chip": chip.name, "gpu_cores": chip.gpu_cores, "status": chip.status}
        found.append({**about, **expected, "memory_gib": expected["memory_gib"] if expected["fits"] else None})
    return found


def predict_sizes(workload: Workload) -> list[tuple[int, dict[str, Any]]]:
    """Predict a workload for Macs with each tier's memory: (GB, what `predict` returns and `working_set_bytes`)."""
    batches, found = typical_batches(workload), []
    for size in (int(tier) for tier in TIERS if tier != "embedded"):
        chip = next(chip for chip in CHIPS if size in chip.memory_gib)
        expected = predict(workload, chip.machine(size), listed_ceilings(chip), batches)
        found.append((size, {**expected, "working_set_bytes": chip.machine(size).working_set_bytes}))
    return found


BAD_INPUT, INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Length:
    """How long each workload runs; if it is changed, the result cannot be compared.

    Attributes:
        steps: total optimizer steps; None: the workload's own number.
        seconds: interrupt it this long after its first step; None: never.
    """

    steps: int | None = None
    seconds: float | None = None


class Watch:
    """Watches a run's metrics.jsonl to time its first step, and to interrupt the run when its time is over.

    Attributes:
        first_step_s: from the start of the process to the end of its first step; None before that.
        joules: energy at that moment.
    """

    def __init__(self, metrics: Path, seconds: float | None, meter: EnergyMeter | None = None):
        self._metrics, self._seconds, self._meter = metrics, seconds, meter
        self._begun, self._interrupted = time.perf_counter(), False
        self.first_step_s: float | None = None
        self.joules: float | None = None

    def __call__(self, child: subprocess.Popen) -> None:
        if self._interrupted or not self._metrics.exists():
            return
        spent = time.perf_counter() - self._begun
        if self.first_step_s is None and self._metrics.stat().st_size:
            self.first_step_s, self.joules = spent, self._meter and self._meter.joules()
        if self.first_step_s is None or self._seconds is None or spent - self.first_step_s < self._seconds:
            return
        if len(self._metrics.read_text(encoding="utf-8").splitlines()) > LEAST_STEPS:
            child.send_signal(signal.SIGINT)  # it ends its step, saves, and exits with 130
            self._interrupted = True


def measure_rates(work: Path) -> dict[str, Any]:
    """Run bench/machine.py in a process of its own, and return the device and the rates.

    Raises:
        RunError: it failed.
    """
    ended = run_process([sys.executable, "-m", "mlx_lora.bench.machine"], work / "rates.log")
    try:
        return json.loads(ended.log.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise RunError(f"micro-benchmarks: ended with code {ended.code} ({ended.last_words}); report it") from None


def prepare_embedded(packed: bool, work: Path) -> Path:
    """Return the embedded model as a folder, its 4-bit blocks carried over or made floats.

    Raises:
        InputError: it cannot be fetched.
        RunError: it cannot be converted.
    """
    folder = work / f"embedded-{'packed' if packed else 'float'}"
    if folder.exists():
        return folder
    gguf = embedded_model(SMOLLM2_GGUF)
    command = [sys.executable, "-m", "mlx_lora", "convert", "--model", str(gguf), "--out", str(folder)]
    ended = run_process([*command, *([] if packed else ["--no-quantize"])], work / f"{folder.name}.log")
    if ended.code:
        raise RunError(f"{gguf}: could not be converted ({ended.last_words}); report it")
    return folder


def train_command(workload: Workload, model: str, data: Path, folder: Path, length: Length) -> list[str]:
    """Return the command of one workload, which reports each step, and does not hold out, validate or save anything."""
    settings = {
        "model": model,
        "data": data,
        "adapter_path": folder,
        **workload.flags(),
        "valid_fraction": 0,
        "val_batches": 0,
        "steps_per_eval": 0,
        "save_every": 0,
        "steps_per_report": 1,
        **({"iters": length.steps} if length.steps is not None else {"epochs": 1 + workload.epochs}),
    }
    return [sys.executable, "-m", "mlx_lora.train", *flag_words(settings)]


def run_workload(
    workload: Workload,
    result: dict[str, Any],
    work: Path,
    length: Length,
    load_before: float,
    model: str | None = None,
) -> dict[str, Any]:
    """Run one workload and return its entry of the result; if it cannot run, the entry has the reason.

    Args:
        workload: the workload.
        result: its `machine`, `device` and `rates` are read.
        work: folder for data, models and run folders.
        length: the workload's own, or another.
        load_before: the load average before anything was measured.
        model: train this instead of the workload's own model (for tests).
    """
    text = workload.text()
    entry = {
        "workload": workload.definition(),
        "status": "not run",
        "reason": None,
        "shortened": length != Length(),
        "data_sha256": sha256_of(text),
        "base": None,
        # The load now is that of the micro-benchmarks or of the workload before, and would pass for other programs.
        "power_before": {**describe_power(), "load_average": load_before},
        "power_after": None,
        "figures": None,
        "predicted": None,
    }
    try:
        entry |= _outcome(workload, result, work, length, text, model)
    except (OSError, RunError) as error:  # a full disk, for example; other workloads may still run
        entry |= {"status": "failed", "reason": first_line(error)}
    if entry["reason"]:  # results are published, and must not contain a user's name
        entry["reason"] = entry["reason"].replace(str(Path.home()), "~")
    return entry


def _outcome(
    workload: Workload, result: dict[str, Any], work: Path, length: Length, text: str, model: str | None
) -> dict[str, Any]:
    """Run a workload on the training data `text`, and return what changes in its entry."""
    folder = work / workload.name
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "train.jsonl"
    data.write_text(text, encoding="utf-8")
    try:
        embedded = workload.tier == "embedded" and not model
        source = str(prepare_embedded(workload.packed, work)) if embedded else model or workload.source
    except (InputError, RunError) as error:
        return {"reason": str(error)}
    run = folder / "run"
    with closing(EnergyMeter()) as meter:
        watch = Watch(run / "metrics.jsonl", length.seconds, meter)
        ended = run_process(train_command(workload, source, data, run, length), folder / "log.txt", watch)
        joules = meter.joules()
    after = {"power_after": describe_power()}
    if ended.code == BAD_INPUT:
        return {**after, "reason": ended.last_words}
    if ended.code not in (0, INTERRUPTED) or watch.first_step_s is None:
        how = f"signal {-ended.code}" if ended.code < 0 else f"code {ended.code}"
        return {**after, "status": "failed", "reason": f"train ended with {how}: {ended.last_words}"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    try:
        figures = run_figures(records, watch.first_step_s)
    except ValueError as error:
        return {**after, "status": "failed", "reason": str(error)}
    figures["energy_j"] = None if joules is None or watch.joules is None else joules - watch.joules
    figures["energy_source"] = meter.source
    predicted = _against_plan(workload, result, records, figures)
    own = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))["mlx_lora"]
    base = {
        "model": workload.source if workload.tier == "embedded" else own["base_model"],
        "revision": own["base_revision"],
        "fingerprint": own["base_fingerprint"],
    }
    return {**after, "status": "measured", "base": base, "figures": figures, "predicted": predicted}


def _against_plan(
    workload: Workload, result: dict[str, Any], records: Sequence[dict[str, Any]], figures: dict[str, Any]
) -> dict[str, Any]:
    """Return the planner's figures for the counted steps, and add the utilization to the measured `figures`."""
    _, counted = counted_records(records)
    where, ceilings = measured_machine(result["device"], result["rates"]["ceilings"])
    expected = predict(workload, where, ceilings, batches_of(counted))
    useful = expected.pop("flops_per_token") * figures["tokens_per_s"]["median"]
    listed = listed_flops(result["device"], result["machine"]["gpu_cores"])
    figures["useful_flops_per_s"] = useful
    figures["mfu"] = useful / result["rates"]["gemm_flops_per_s"][result["device"]["compute_dtype"]]
    figures["mfu_listed"] = None if listed is None else useful / listed
    return {**expected, "ceilings": ceilings.source}


# Figures, from a run's metrics

LEAST_STEPS = 2
Record = dict[str, Any]


def counted_records(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return (warm-up, counted) steps from the lines of metrics.jsonl, each with its `seconds`.

    In a run that ended before its second pass, only the first step is warm-up.

    Raises:
        ValueError: fewer than two steps would be counted.
    """
    steps = [record for record in records if record["positions"]]
    before = [0.0, *(record["elapsed_s"] for record in steps)]
    timed = [{**step, "seconds": step["elapsed_s"] - start} for step, start in zip(steps, before, strict=False)]
    warm = sum(step["epoch"] <= 1 + 1e-9 for step in timed)
    if len(timed) - warm < LEAST_STEPS:
        warm = 1
    if len(timed) - warm < LEAST_STEPS:
        raise ValueError(f"{len(timed)} steps were run; at least {LEAST_STEPS} are needed after the warm-up")
    return timed[:warm], timed[warm:]


def run_figures(records: Sequence[Record], first_step_s: float) -> dict[str, Any]:
    """Return the figures of one run.

    Args:
        records: lines of metrics.jsonl, one per step.
        first_step_s: from the start of the process to the end of its first step.

    Raises:
        ValueError: there are too few steps.
    """
    warm, counted = counted_records(records)
    seen = {tuple(step["shapes"]) for step in warm}
    steady = []
    for step in counted:
        steady += [step] if tuple(step["shapes"]) in seen else []
        seen.add(tuple(step["shapes"]))
    if len(steady) < LEAST_STEPS:
        steady = counted
    spent = sum(step["seconds"] for step in counted)
    total = {key: sum(step[key] for step in counted) for key in ("real_tokens", "supervised_tokens", "positions")}
    losses = [step["loss"] for step in counted if step["loss"] is not None]
    return {
        "tokens_per_s": spread([step["real_tokens"] / step["seconds"] for step in steady]),
        "supervised_tokens_per_s": spread([step["supervised_tokens"] / step["seconds"] for step in steady]),
        "step_s": spread([step["seconds"] for step in steady]),
        "overall_tokens_per_s": total["real_tokens"] / spent,
        "first_step_s": first_step_s,
        "warmup_steps": len(warm),
        "counted_steps": len(counted),
        "counted_s": spent,
        "real_tokens": total["real_tokens"],
        "supervised_tokens": total["supervised_tokens"],
        "positions": total["positions"],
        "shapes": dict(sorted(Counter("+".join(step["shapes"]) for step in counted).items())),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "process_peak_bytes": max(record["process_peak_bytes"] for record in records),
        "skipped_steps": records[-1]["skipped_steps"],
        "last_loss": losses[-1] if losses else None,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, 10th and 90th percentile (nearest rank), minimum and maximum."""
    ordered = sorted(values)
    p10, p90 = (ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in (0.1, 0.9))
    return {"median": statistics.median(ordered), "p10": p10, "p90": p90, "min": ordered[0], "max": ordered[-1]}


# Processes

POLL_S = 0.02


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit code; negative if a signal ended it.
        log: everything that it printed.
        stopped: because its time was over.
    """

    code: int
    log: str
    stopped: bool = False

    @property
    def last_words(self) -> str:
        """The error that it printed, or its last line."""
        lines = [line.strip() for line in self.log.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("Error: ")]
        return errors[-1].removeprefix("Error: ") if errors else lines[-1] if lines else "it printed nothing"


def clean_environment() -> dict[str, str]:
    """Return this process's environment without the variables that would change OpenBLAS."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED_VARIABLES}
    # The child must find this package, even if it is a checkout that is not installed.
    root = str(Path(mlx_lora.__file__).resolve().parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")]))
    return {**kept, "TOKENIZERS_PARALLELISM": "true", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}


def run_process(
    command: list[str],
    log: Path,
    watch: Callable[[subprocess.Popen], None] = lambda child: None,
    limit_s: float = math.inf,
) -> Ended:
    """Run a command until it ends.

    Args:
        command: program and arguments.
        log: the file for its standard output and error.
        watch: called every 20 ms with the process, to check what it wrote or to interrupt it.
        limit_s: after which it is killed.
    """
    begun, stopped = time.perf_counter(), False
    with log.open("w", encoding="utf-8") as output:
        # A new session, so that Ctrl-C does not reach the child directly as well.
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=clean_environment(), start_new_session=True
        )
        try:
            while child.poll() is None:
                watch(child)
                if not stopped and time.perf_counter() - begun > limit_s:
                    stopped = True
                    child.kill()
                time.sleep(POLL_S)
        except BaseException:
            child.send_signal(signal.SIGKILL)
            child.wait()
            raise
    return Ended(child.returncode, log.read_text(encoding="utf-8", errors="replace"), stopped)


# Energy

PACKAGE_COUNTER = Path("/sys/class/powercap/intel-rapl:0")
SAMPLE_MS = 500
POWER = re.compile(r"Combined Power \(CPU \+ GPU \+ ANE\): (\d+) mW")


class EnergyMeter:
    """Measures the energy of the chip since the start (macOS: CPU, GPU and ANE; Linux: the CPU package).

    Attributes:
        source: what is read, or why nothing can be read.
    """

    def __init__(self, counter: Path = PACKAGE_COUNTER):
        self._counter, self._child, self._joules = counter, None, 0.0
        self._last: int | None = None
        self._closed = False
        if sys.platform == "darwin":
            self.source = self._start_powermetrics()
        else:
            self._last = self._read_counter()
            readable = self._last is not None
            self.source = "intel-rapl package" if readable else f"none: {counter} does not exist or is not readable"

    def joules(self) -> float | None:
        """Return the energy so far in joules, None if it cannot be read."""
        if self._child is not None:
            return self._joules
        now = self._read_counter() if self._last is not None else None
        if now is None or self._last is None:
            return None
        spent = now - self._last
        if spent < 0:  # the counter wraps around at the end of its range
            spent += int((self._counter / "max_energy_range_uj").read_text())
        self._last, self._joules = now, self._joules + spent / 1e6
        return self._joules

    def close(self) -> None:
        """Stop reading."""
        if self._child is None:
            return
        with suppress(PermissionError, ProcessLookupError):  # under sudo it is root's, and only root may end it
            self._child.terminate()
        self._closed = True  # nobody reads its next sample, which ends it
        with suppress(subprocess.TimeoutExpired):  # it holds no figures
            self._child.wait(timeout=10)

    def _start_powermetrics(self) -> str:
        """Start powermetrics if we are root, or can be without a password; return the source's name."""
        prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
        if prefix and answer("sudo", "-n", "-l", "powermetrics") is None:
            return "none: powermetrics needs root (run as root, or allow it in sudoers without a password)"
        command = [*prefix, "powermetrics", "--samplers", "cpu_power,gpu_power", "-i", str(SAMPLE_MS)]
        try:
            self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError as error:
            return f"none: powermetrics did not start ({error.strerror})"
        threading.Thread(target=self._follow, args=(self._child.stdout,), daemon=True).start()
        return "powermetrics, combined power"

    def _follow(self, samples: IO[str]) -> None:
        """Add up the samples, each of which is the mean power since the one before, until the meter is closed."""
        before = time.monotonic()
        with samples:
            for line in samples:
                if self._closed:
                    return
                if found := POWER.search(line):
                    now = time.monotonic()
                    self._joules += int(found[1]) / 1000 * (now - before)
                    before = now

    def _read_counter(self) -> int | None:
        try:
            return int((self._counter / "energy_uj").read_text())
        except (OSError, ValueError):
            return None
