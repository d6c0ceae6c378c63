"""The fixed, versioned workloads: the same work on every machine, in tiers by the memory they need.

A workload never changes: if it must, it gets the next version, and figures of the two are not compared. Batch shape and
checkpointing are part of it, so that a large Mac does the same work as a small one. Tiers are memory sizes in GB: by the
planner, all workloads of a tier fit the chips sold with that memory (tests/test_suite.py checks it).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from mlx_lora.sources.embedded_models import SMOLLM2_GGUF
from mlx_lora.suite.rows import chat_rows, pair_rows
from mlx_lora.suite.workload_models import (
    GEMMA3_1B,
    GPT_OSS_20B,
    LLAMA_1B,
    LLAMA_3B,
    MODELS,
    QWEN3_4B,
    QWEN3_8B,
    SMOLLM2,
    SuiteModel,
)
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import sha256_of

TIERS = ("embedded", "8", "16", "32", "64", "128")


@dataclass(frozen=True)
class Rows:
    """The training data to generate (see rows.py).

    Attributes:
        count: the number of rows.
        prompt_words, answer_words: least and most words.
        seed: of the words and lengths.
    """

    count: int
    prompt_words: tuple[int, int]
    answer_words: tuple[int, int]
    seed: int = 0

    def text(self) -> str:
        """Return the data file's content."""
        return chat_rows(self.count, self.prompt_words, self.answer_words, self.seed)


@dataclass(frozen=True)
class Pairs(Rows):
    """Preference pairs to generate: two answers to each prompt."""

    def text(self) -> str:
        """Return the data file's content."""
        return pair_rows(self.count, self.prompt_words, self.answer_words, self.seed)


@dataclass(frozen=True)
class RowShape:
    """The data of a workload and the lengths of its rows.

    Attributes:
        rows: the data.
        max_seq_length: in tokens; `2k` and `8k` rows are longer and are cut, so that all batches have one shape.
        typical_width: positions of a typical row, for predictions without a tokenizer.
        real_share, trained_share: fractions of a batch's positions that are not padding, and that are trained, for the
            same use.
        objective: what is trained toward.
    """

    rows: Rows
    max_seq_length: int
    typical_width: int
    real_share: float
    trained_share: float
    objective: str = "sft"


# There are few rows, because the first pass over them, which compiles every batch shape, is the warm-up.
ROW_SHAPES = {
    "chat": RowShape(Rows(48, (8, 60), (16, 320)), 1024, 204, 0.94, 0.61),
    "2k": RowShape(Rows(3, (20, 40), (2600, 2600)), 2049, 2048, 1.0, 0.97),
    "dpo": RowShape(Pairs(24, (8, 60), (16, 160)), 1024, 168, 0.76, 0.40, "dpo"),
    "8k": RowShape(Rows(3, (20, 40), (10400, 10400)), 8193, 8192, 1.0, 0.99),
}


@dataclass(frozen=True)
class Workload:
    """One workload.

    Attributes:
        tier: a memory size in GB, or `embedded`: a model that PyPI has too, for machines without access to the hub.
        model: a name in suite/workload_models.py.
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

    def flags(self) -> dict[str, Any]:
        """Return its train settings by name."""
        # Imitation is not named, so that definitions from the time when it was the only objective stay the same.
        toward = {} if self.shape.objective == "sft" else {"objective": self.shape.objective, "beta": 0.1}
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


def _of(tier: str, model: SuiteModel, form: str, packed: bool, **changes: Any) -> Workload:
    return Workload(tier, model.name, form, packed, **changes)


SHORT = {"batch_tokens": 1024, "checkpointing": "none", "epochs": 2}
LONG = {"batch_tokens": 8192, "epochs": 2}

WORKLOADS = (
    _of("embedded", SMOLLM2, "chat", False, **SHORT),
    _of("embedded", SMOLLM2, "chat", True, **SHORT),
    _of("embedded", SMOLLM2, "2k", True, epochs=2),
    _of("embedded", SMOLLM2, "dpo", False, **SHORT),
    _of("8", SMOLLM2, "chat", False, checkpointing="none"),
    _of("8", SMOLLM2, "2k", False),
    _of("8", LLAMA_1B, "chat", True),
    _of("8", LLAMA_1B, "2k", True),
    _of("8", GEMMA3_1B, "chat", True),
    _of("16", LLAMA_1B, "chat", False),
    _of("16", GEMMA3_1B, "2k", False),
    _of("16", LLAMA_3B, "chat", True),
    _of("16", LLAMA_3B, "2k", True),
    _of("16", QWEN3_4B, "chat", True),
    _of("32", LLAMA_3B, "chat", False),
    _of("32", QWEN3_4B, "2k", True),
    _of("32", QWEN3_8B, "chat", True),
    _of("32", QWEN3_8B, "2k", True),
    _of("32", GPT_OSS_20B, "chat", True),
    _of("64", QWEN3_4B, "2k", False),
    _of("64", QWEN3_8B, "chat", False),
    _of("64", QWEN3_8B, "8k", True, **LONG),
    _of("64", GPT_OSS_20B, "2k", True),
    _of("128", QWEN3_8B, "2k", False),
    _of("128", QWEN3_8B, "8k", False, **LONG),
    _of("128", GPT_OSS_20B, "8k", True, **LONG),
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
