"""Every setting of a run, its default and its help text: the only home of both.

A flag `--max-seq-length` is the field `max_seq_length`; the same name works in a YAML file. The click
options are made from these dataclasses (cli.py), and `run.yaml` writes them back.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlx_lora.errors import InputError

FORMATS = ("auto", "alpaca", "sharegpt", "messages", "completions", "text")
DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "adam", "muon", "sgd", "adafactor")
SCHEDULES = ("cosine", "linear", "constant")
METHODS = ("lora", "rslora")


def setting(default: Any, help: str, **meta: Any) -> Any:
    """A dataclass field with help text; `choices`, `type` and `short` are passed on to click."""
    return field(default=default, metadata={"help": help, **meta})


@dataclass(frozen=True)
class ModelSettings:
    """Which base model, and how it is held in memory."""

    model: str | None = setting(None, "Hub id, local folder or .gguf file of the base model.")
    revision: str | None = setting(None, "Hub branch, tag or commit of the model.")
    dtype: str = setting("auto", "Compute dtype; auto: float32 on CPU, bfloat16 on a GPU.", choices=DTYPES)
    trust_remote_code: bool = setting(False, "Let the model's repository run its own tokenizer code.")


@dataclass(frozen=True)
class DataSettings:
    """What is trained on, and which of its tokens."""

    data: str | None = setting(None, "File, folder with train/valid/test, hub dataset id or tiny-shakespeare.")
    data_format: str = setting("auto", "Record format; auto looks at each record.", choices=FORMATS)
    max_seq_length: int = setting(2048, "Longest sequence in tokens; longer chats are cut, text is windowed.")
    mask_prompt: bool = setting(True, "Train on assistant turns only; --no-mask-prompt trains on all tokens.")
    chat_template: str | None = setting(None, "Jinja file, or built-in name (alpaca, chatml), to use instead.")
    valid_fraction: float = setting(0.05, "Share of rows held out when there is no validation file.")
    strict: bool = setting(False, "Stop at the first report of bad rows instead of skipping them.")


@dataclass(frozen=True)
class AdapterSettings:
    """The adapter's shape. Defaults: LoRA 2106.09685 (alpha = 2r), all linear layers as in QLoRA 2305.14314."""

    method: str = setting("lora", "Preset over form, scale, init and optimizer groups.", choices=METHODS)
    fine_tune_type: str | None = setting(None, "mlx-lm's name for --method.", choices=METHODS)
    rank: int = setting(16, "Rank r of the two factors.")
    alpha: float = setting(32.0, "Numerator of the scale alpha / r.")
    dropout: float = setting(0.0, "Dropout probability on the adapter's input.")
    target_modules: str = setting("all-linear", "all-linear, or names or patterns (q_proj,*.mlp.*), by comma.")
    num_layers: int = setting(-1, "Adapt only the last N blocks; -1: all.")
    resume_adapter_file: str | None = setting(None, "Start from the factors in this adapters.safetensors.")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW as torch has it (bias corrected), 3 % warm-up, cosine to zero, global-norm clip 1.0."""

    optimizer: str = setting("adamw", "Optimizer.", choices=OPTIMIZERS)
    learning_rate: float = setting(2e-4, "Peak learning rate.")
    lr_schedule: str = setting("cosine", "Shape after the warm-up.", choices=SCHEDULES)
    warmup: float = setting(0.03, "Warm-up: a share of all steps below 1, a count of steps from 1 on.")
    weight_decay: float = setting(0.01, "Decoupled weight decay of the factors (adamw, muon, sgd).")
    max_grad_norm: float = setting(1.0, "Clip the global gradient norm at this; 0: no clip.")


@dataclass(frozen=True)
class LoopSettings:
    """How long, how much per step, and what is written when."""

    adapter_path: str = setting("adapters", "Run folder: adapter, metrics, settings, checkpoints.")
    iters: int | None = setting(None, "Optimizer steps; default: --epochs over the data.")
    epochs: float | None = setting(None, "Passes over the data (default 1).")
    batch_size: int | None = setting(None, "Rows per micro-batch; default: as many as --batch-tokens holds.")
    batch_tokens: int = setting(2048, "Tokens per micro-batch, padding included, unless --batch-size is given.")
    grad_accumulation_steps: int = setting(1, "Micro-batches per optimizer step, weighted by their tokens.")
    grad_checkpoint: bool = setting(False, "Recompute each block in the backward pass to save memory.")
    steps_per_report: int = setting(10, "Steps between reports.")
    steps_per_eval: int = setting(200, "Steps between validations; 0: only at the end.")
    val_batches: int = setting(25, "Validation batches per validation; -1: all, 0: none.")
    save_every: int = setting(100, "Steps between checkpoints; 0: only at the end.")
    train: bool | None = setting(None, "Train. On unless only --test is given.", flag=True)
    test: bool = setting(False, "Measure the loss on the test set (after training, with --train).")
    test_batches: int = setting(500, "Test batches; -1: all.")
    clear_cache_threshold: str | None = setting(None, "Bound on MLX's buffer cache, as in 2GB (default: a third of the limit).")
    report_to: str | None = setting(None, "Also log to wandb, swanlab or both, by comma.")
    project_name: str | None = setting(None, "Project name for --report-to.")
    seed: int = setting(0, "Seed of data order, initial factors and dropout.")
    force: bool = setting(False, "Write into a run folder that already holds an adapter.")


SECTIONS = {
    "model": ModelSettings,
    "data": DataSettings,
    "adapter": AdapterSettings,
    "optimizer": OptimizerSettings,
    "loop": LoopSettings,
}
