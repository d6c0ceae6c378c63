"""All settings of training and of `mlx-lora serve`, one row each: name, type, default, and the attributes of `fields.Row`.

The flag `--max-seq-length` is the field `max_seq_length`; the same name works in a YAML file. Options, checks, run.yaml
and the rules of resumed and distributed runs follow from the rows, so a new setting is a new row and nothing else.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_lora.config.fields import row_of, setting
from mlx_lora.config.objectives import ANSWERED, LABELED, METRICS, VERIFIERS, ObjectiveSettings
from mlx_lora.config.objectives import PAIRS as PAIRED
from mlx_lora.config.presets import OPTIMIZERS, PRESETS

# A file in data/forms/ is a form of records.
FORMATS = (
    "auto",
    *sorted(one.name for one in pkgutil.iter_modules([str(Path(__file__).parents[1] / "data" / "forms")])),
)
PAIRS = ("best", "all")
COLUMNS = ("prompt_column", "completion_column", "system_column", "chat_column", "text_column")
TURN_FIELDS, TURN_ROLES = ("role", "content"), ("system", "user", "assistant", "tool")
LONG_ROWS = ("divide", "cut", "drop")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ROUNDINGS = ("nearest", "up", "down")  # up: transformers; down: Axolotl
SCHEDULES = ("cosine", "linear", "constant")
BIASES = ("none", "lora_only", "all")
TOWER_TRAINING = ("lora", "full")
QUANTIZED_MATMUL = ("auto", "packed", "dense")
KERNELS = ("auto", "mlx", "ours")
LOGGERS = ("tensorboard", "trackio", "wandb", "swanlab")
SHARDING = ("even", "memory")  # --shard-base
DATA = "data"
PARALLEL = (DATA, "auto")
DEFAULT_BATCH_TOKENS = 2048
AUTO: Literal["auto"] = "auto"  # --learning-rate
# Headings of the help.
MODEL, ADAPTER, ONE_METHOD, TRAINING = "Model and data", "Adapter", "Settings of one method", "Training"
OUTPUT, MEMORY, VALIDATION = "Output", "Memory and speed", "Validation and test"
SERVER, LIMITS = "Server", "Limits"


# fmt: off
@dataclass(frozen=True)
class ModelSettings:
    """The base model, and its representation in memory."""

    model: str | None = setting(None, "Base model: hub id, local folder or .gguf file, such as Qwen/Qwen3-0.6B or models/qwen.gguf.",
        MODEL, common=True, may_change=True, per_machine=True)
    revision: str | None = setting(None, "Hub branch, tag or commit of the model.",
        MODEL, may_change=True, per_machine=True)
    bits: int | None = setting(None,
        "Quantize a 16-bit model to 2, 3, 4, 5, 6 or 8 bits (groups of 64) before loading it, as convert --bits does. This is "
        "done once, one tensor at a time, and the result is kept in the cache.",
        MODEL, at_least=2, at_most=8)
    dtype: str = setting("auto", "Compute dtype; auto: float32 on a CPU, bfloat16 on a GPU.", MODEL, choices=DTYPES)
    trust_remote_code: bool = setting(False, "Let the model's repository run its own tokenizer code.",
        MODEL, may_change=True, per_machine=True, runs="True")
    quantized_matmul: str = setting("auto",
        "How layers multiply by quantized weights: packed (mx.quantized_matmul), dense (dequantize, then GEMM), or auto "
        "(whichever is faster for the number of rows, as measured on this machine).",
        MODEL, choices=QUANTIZED_MATMUL, per_machine=True)
    decode_weights: str = setting("auto",
        "Quantized weights while text is generated: packed (as they are), dense (a float copy beside them), or auto "
        "(dense if it is faster, as measured, and takes at most a third of the free memory).",
        MODEL, choices=QUANTIZED_MATMUL, may_change=True, per_machine=True)


@dataclass(frozen=True)
class DataSettings:
    """The training data, and which of its tokens are trained."""

    data: str | None = setting(None,
        "File, folder with train/valid/test files, hub dataset id, name of a recipe, tiny-shakespeare, reasoning-gym:NAME or verifiers:NAME. Separate "
        "several with commas; with a weight, as in a.jsonl=2,b/, each epoch has the rows of a.jsonl twice. a/b?split=train[:20%] is a "
        "part of a set.",
        MODEL, common=True, may_change=True, per_machine=True, runs=VERIFIERS)
    ask: str | None = setting(None,
        "Your own test questions with their answers, in any form that --data takes; the run ends with how many it answers right. "
        "They are never trained.", MODEL, may_change=True, per_machine=True, runs=VERIFIERS, only=ANSWERED)
    data_format: str = setting("auto", "Format of the records; auto detects it for each record.", MODEL, choices=FORMATS)
    prompt_column: str | None = setting(None,
        "Column of the prompt; several columns, separated by commas, are joined with line breaks (default: the usual names).", MODEL)
    completion_column: str | None = setting(None, "Column that holds the answer (default: the usual names).", MODEL)
    system_column: str | None = setting(None, "Column that holds a system prompt.", MODEL)
    chat_column: str | None = setting(None, "Column that holds a chat: a list of turns.", MODEL)
    text_column: str | None = setting(None, "Column that holds a text; sft trains every token of it.", MODEL)
    label_column: str | None = setting(None, "classify: column that holds the label (default: label or labels).", MODEL, only=LABELED)
    label_columns: str | None = setting(None,
        "classify: columns that hold the answers to several questions, with the kind of answer (yes/no, 1-5, several, number) and a "
        "weight in the loss if you like: folder,urgent:yes/no,mood:1-5=2.", MODEL, only=LABELED)
    turn_names: str | None = setting(None,
        "Other names of a turn's fields and roles: role=speaker,content=text,user=customer,assistant=agent.", MODEL)
    speaker: str | None = setting(None,
        "Person whose messages of a chat export are trained as answers (WhatsApp .txt, Telegram .json, iMessage text, or a "
        "transcript); those of others become the user's turns.", MODEL)
    conversation_gap: float = setting(6.0,
        "With --speaker: hours without a message after which a new conversation begins. Six are longer than a pause within a "
        "day's chat, and shorter than a night.", MODEL, more_than=0, at_most=10**6)
    max_seq_length: int = setting(2048, "Maximum length of a row in tokens; longer chats are cut, longer texts divided.",
        MODEL, common=True, at_least=2, at_most=10**8)
    long_rows: str = setting("divide",
        "Rows longer than --max-seq-length: divide texts and cut chats, cut both, or drop (divide texts, and leave out chats).",
        MODEL, choices=LONG_ROWS)
    mask_prompt: bool = setting(True, "Train on assistant turns only; --no-mask-prompt trains on all tokens.",
        MODEL, common=True)
    last_answer: bool = setting(False, "Train only the last answer of a chat, as mlx-lm does with --mask-prompt.", MODEL)
    train_line_break: bool = setting(False, "Also train the line break after the end of an answer, as LLaMA-Factory does.", MODEL)
    whole_chats: bool = setting(False, "Train all turns of chats, as TRL does, but only the answers of prompts that have one.", MODEL)
    chat_template: str | None = setting(None,
        "Jinja file or built-in name (alpaca, chatml, llama3) to use instead of the model's template; own: the model's, and no other.",
        MODEL, per_machine=True)
    chat_date: str | None = setting(None,  # a resumed run's fingerprint of the rows holds what it changes
        "Date that a chat template shows as today, like 2026-11-26 (default: the day on which the run began).",
        MODEL, may_change=True)
    allow_special_tokens: bool = setting(False,
        "Read control tokens that messages spell out, like <|im_end|>, as control tokens (default: as ordinary text).", MODEL)
    special_tokens: str | None = setting(None,
        "Special tokens that the model must have, such as eos_token=</s>; a run with another model's stops.", MODEL)
    max_pixels: int | None = setting(None,
        "With pictures: shrink those that have more pixels; in models whose tokens depend on the size, this saves tokens.",
        MODEL, at_least=16, at_most=10**9)
    fetch_images: bool = setting(False,
        "With pictures: download those that rows name by a web address, once, into the cache (default: leave such rows out).",
        MODEL, may_change=True)
    pairs: str = setting("best", "If answers have scores: pair the best with the worst, or all with different scores.",
        MODEL, choices=PAIRS, only=PAIRED)
    valid_fraction: float = setting(0.05,
        "Share of rows held out when there is no validation file; from 1 on, their number.",
        MODEL, at_least=0, at_most=10**9)
    rephrase: int | None = setting(None,
        "sft: let a model write this many other wordings of each question, and train them with the same answer; up to 20 more are "
        "never trained, and measure whether the answer is known in new words.", MODEL, at_least=1, at_most=100, only=ANSWERED)
    rephrase_model: str | None = setting(None,
        "With --rephrase: the model that writes the wordings, given as for --model, or the address of a server with OpenAI's "
        "protocol, such as http://127.0.0.1:1234/v1 of LM Studio (default: the base).", MODEL, may_change=True, per_machine=True)
    strict: bool = setting(False, "Stop if the data has unusable rows, instead of skipping them.",
        MODEL, may_change=True, per_machine=True)


@dataclass(frozen=True)
class AdapterSettings:
    """The adapter's shape. Defaults: LoRA 2106.09685 (alpha = 2r), all linear layers as in QLoRA 2305.14314."""

    method: str = setting("lora", "Training method, which sets layer type, scale, initial adapter weights and learning rates.",
        ADAPTER, common=True, choices=tuple(PRESETS), also="--fine-tune-type")
    loraplus_lr_ratio: float | None = setting(None,
        "lora-plus: learning rate of B as a multiple of A's (default 16).",
        ONE_METHOD, method="lora-plus", more_than=0, at_most=10**6)
    rank: int = setting(16, "Rank of the adapter; for adalora, the average rank at the end.",
        ADAPTER, common=True, at_least=1, at_most=65536)
    alpha: float = setting(32.0, "LoRA's alpha; the update is scaled by alpha / rank.", ADAPTER, common=True, more_than=0, at_most=10**9)
    rank_pattern: str | None = setting(None,
        "Ranks of some layers, such as q_proj=32,*.mlp.*=8; the first matching pattern counts.", ADAPTER)
    alpha_pattern: str | None = setting(None, "Alphas of some layers, written as in --rank-pattern.", ADAPTER)
    modules_to_save: str | None = setting(None,
        "Modules to train in full in addition to the adapter, separated by commas, such as lm_head,*norm.", ADAPTER)
    train_connector: str | None = setting(None,
        "With pictures: also train the connector between vision tower and language model: lora or full.",
        ADAPTER, choices=TOWER_TRAINING, alone="full")
    train_vision: str | None = setting(None, "With pictures: also train the vision tower: lora or full.",
        ADAPTER, choices=TOWER_TRAINING, alone="full")
    bias: str = setting("none", "Biases to train: none, those of adapted layers, or all.", ADAPTER, choices=BIASES)
    dropout: float = setting(0.0, "Dropout probability on the adapter's input.", ADAPTER, at_least=0, at_most=0.99)
    target_modules: str = setting("all-linear",
        "Layers to adapt: all-linear, or names and patterns separated by commas, such as q_proj,*.mlp.*; all-experts are those of a "
        "mixture of experts.", ADAPTER, common=True)
    qat: float = setting(0.0,
        "Train with the rounding that fuse will apply, in the last share X of the steps; without a value: in all steps.",
        ADAPTER, at_least=0, at_most=1, alone="1")
    num_layers: int = setting(-1, "Adapt only the last N blocks; -1: all.", ADAPTER, at_least=-1, at_most=10**6)
    adalora_init_rank: int | None = setting(None, "adalora: rank of every layer at the start (default 1.5 r).",
        ONE_METHOD, method="adalora", at_least=1, at_most=65536)
    adalora_tinit: float | None = setting(None,
        "adalora: steps before the first cut of ranks; below 1, a share of the run (default 0.1).",
        ONE_METHOD, method="adalora", at_least=0)
    adalora_tfinal: float | None = setting(None,
        "adalora: last steps, with fixed ranks; below 1, a share of the run (default 0.3).",
        ONE_METHOD, method="adalora", at_least=0)
    adalora_delta_t: int | None = setting(None,
        "adalora: steps between cuts (default: a hundredth of the run).", ONE_METHOD, method="adalora", at_least=1)
    orth_reg_weight: float | None = setting(None, "adalora: weight of the orthogonality penalty (default 0.5).",
        ONE_METHOD, method="adalora", at_least=0, at_most=10**6)
    relora_every: int | None = setting(None, "relora: steps between restarts (default: a quarter of the run).",
        ONE_METHOD, method="relora", at_least=1)
    relora_warmup: int | None = setting(None,
        "relora: warm-up steps after each restart (default: a tenth of a cycle).",
        ONE_METHOD, method="relora", at_least=0)
    relora_prune_ratio: float | None = setting(None,
        "relora: share of the optimizer's moments that a restart sets to 0, the smallest first (default 0.99).",
        ONE_METHOD, method="relora", at_least=0, at_most=1)
    resume_adapter_file: str | None = setting(None, "Start from this adapter's weights: a run's or PEFT's folder, or its file.",
        ADAPTER, may_change=True, per_machine=True)


@dataclass(frozen=True)
class OptimizerSettings:
    """Defaults: AdamW as in torch (with bias correction), 3% warm-up, cosine to zero, global-norm clip 1.0."""

    optimizer: str = setting("adamw", "Optimizer.", TRAINING, choices=tuple(OPTIMIZERS))
    learning_rate: float | Literal["auto"] | None = setting(None,
        "Peak learning rate (default: by the model's width and family; 1.3e-3 for SmolLM2-135M, 2.9e-4 for Llama 3 8B); auto: try "
        "several at the beginning of the run, and continue with the best.",
        TRAINING, common=True, more_than=0, at_most=1000, word=AUTO)
    lr_schedule: str = setting("cosine", "Shape after the warm-up.", TRAINING, choices=SCHEDULES)
    warmup: float = setting(0.03, "Warm-up: a share of all steps if below 1, otherwise a number of steps.",
        TRAINING, at_least=0)
    weight_decay: float = setting(0.01, "Decoupled weight decay of the adapter weights (adamw, muon, sgd).",
        TRAINING, at_least=0, at_most=1000)
    warmup_init: float | None = setting(None,
        "Learning rate of the first step of a warm-up; transformers has 0 (default: as much as each further step adds).",
        TRAINING, at_least=0, at_most=1000)
    warmup_rounding: str = setting("nearest", "How a warm-up that is a share of the steps becomes a number of them; down never gives 1, but 2, as Axolotl.",
        TRAINING, choices=ROUNDINGS)
    decay_steps: int | None = setting(None, "Steps of the decay after the warm-up (default: the rest of the run).",
        TRAINING, at_least=1)
    min_lr_ratio: float = setting(0.0, "Learning rate at the end of a cosine or linear decay, as a share of its peak.",
        TRAINING, at_least=0, at_most=1)
    adam_beta1: float = setting(0.9, "adamw, adam: decay of the mean of gradients.", TRAINING, more_than=0, at_most=0.9999)
    adam_beta2: float = setting(0.999, "adamw, adam: decay of the mean of their squares.",
        TRAINING, more_than=0, at_most=0.99999)
    adam_epsilon: float = setting(1e-8, "adamw, adam: added to the root of these squares.", TRAINING, more_than=0, at_most=1)
    bias_correction: bool = setting(True, "adamw, adam: correct the bias of both means in the first steps, as torch does.", TRAINING)
    max_grad_norm: float = setting(1.0, "Clip the global gradient norm to this value; 0: no clipping.",
        TRAINING, at_least=0, at_most=10**9)


@dataclass(frozen=True)
class LoopSettings:
    """The run's length, the size of its steps, its reports and its results."""

    adapter_path: str = setting("adapters", "Run folder to write: adapter, metrics, settings, checkpoints.",
        OUTPUT, common=True, may_change=True, per_machine=True)
    iters: int | None = setting(None, "Number of optimizer steps (default: --epochs passes over the data).",
        TRAINING, common=True, may_change=True, at_least=1)
    epochs: float | None = setting(None,
        "Passes over the data (default: 1, or as many as give a small set about 100 steps).",
        TRAINING, common=True, may_change=True, more_than=0, at_most=10**9)
    batch_size: int | None = setting(None, "Rows per micro-batch (default: as many as fit into --batch-tokens).",
        TRAINING, common=True, at_least=1, at_most=10**6)
    batch_tokens: int | None = setting(None,
        f"Tokens per micro-batch, padding included, unless --batch-size is given (default: 4 to 32 rows, the more rows the data "
        f"has, at most {DEFAULT_BATCH_TOKENS} tokens; less if the planner finds that it does not fit).",
        TRAINING, at_least=2, at_most=10**9)
    grad_accumulation_steps: int = setting(1, "Micro-batches per optimizer step, weighted by their tokens.",
        TRAINING, at_least=1, at_most=10**6)
    batch_parts: int = setting(1,
        "Run each micro-batch in this many parts: the same update in less memory. A run increases this when "
        "memory runs short.", MEMORY, may_change=True, per_machine=True, at_least=1, at_most=10**6)
    max_restarts: int = setting(0,
        "Restarts allowed after running out of memory; each continues from the last checkpoint, in smaller parts.",
        MEMORY, may_change=True, per_machine=True, at_least=0, at_most=100)
    grad_checkpoint: str = setting("auto",
        "What to recompute in the backward pass to save memory: none, selective (all but matrix products), block (all; "
        "also the flag without a value), N (all, in every N-th block), or auto (the fastest that fits).",
        MEMORY, may_change=True, per_machine=True, alone="block")
    kernels: str = setting("auto",
        "Kernels for attention, activations and the loss: auto (the best as measured on this machine), mlx (the "
        "model's own), or ours (ours where there is one).", MEMORY, may_change=True, per_machine=True, choices=KERNELS)
    cache_trunk: str = setting("auto",
        "With --num-layers: keep the output of the frozen blocks below the adapted ones on disk, so that later epochs need "
        "not compute them: on, off, or auto (if the run has further epochs and it saves time and fits on the disk).",
        MEMORY, may_change=True, per_machine=True, choices=("auto", "on", "off"))
    shard_base: str = setting("off",
        "Share the base among the processes of a run, so that each keeps only a part of every block: off, even (also the flag "
        "without a value), memory (parts in proportion to each machine's), or parts by rank such as 3:1.",
        MEMORY, may_change=True, alone="even")
    offload_base: str = setting("auto",
        "Read each block's frozen weights from the model's files just before they are used, for a base that is larger than "
        "memory: on (also the flag without a value), off, or auto (if the run does not fit without).",
        MEMORY, may_change=True, per_machine=True, choices=("auto", "on", "off"), alone="on")
    offload_activations: bool = setting(False,
        "With --offload-base on: also keep on the disk what blocks keep for the backward pass, for long rows.",
        MEMORY, may_change=True, per_machine=True)
    parallel: str = setting("data",
        "What the processes of a run divide: data (rows), or auto (rows, and the base too if that is the fastest that fits, by "
        "the measured link).",
        MEMORY, may_change=True, choices=PARALLEL)
    memory_budget: float | None = setting(None,
        "GB (10^9 bytes) that the run may use, a sixteenth of it for MLX's buffer cache (default: what the device recommends).",
        MEMORY, may_change=True, per_machine=True, more_than=0, at_most=10**6)
    memory_check: bool = setting(True, "Refuse a run that does not fit by the plan; --no-memory-check tries it anyway.",
        MEMORY, may_change=True, per_machine=True)
    steps_per_report: int | None = setting(None,
        "Steps between reports (default: a twentieth of the run, at most 25).",
        OUTPUT, may_change=True, at_least=1)
    steps_per_eval: float | None = setting(None,
        "Steps between validations; below 1, a share of the run; 0: only at the end (default: 200, or a tenth of a run that may "
        "end early).",
        VALIDATION, may_change=True, at_least=0)
    val_batches: int | None = setting(None,
        "Batches per validation; -1: all, 0: no validation (default: as many rows as a tenth of the run's work allows, "
        "about 25 at most).",
        VALIDATION, may_change=True, at_least=-1)
    save_every: float = setting(100, "Steps between checkpoints; below 1, a share of the run; 0: only at the end.",
        OUTPUT, may_change=True, at_least=0)
    keep: int = setting(3, "Newest checkpoints to keep, in addition to the one with the best validation; 0: all.",
        OUTPUT, may_change=True, at_least=0, at_most=10**9)
    keep_best: bool | None = setting(None,
        "End with the adapter of the best validation, not of the last step; needs --save-every (default: in a run that may "
        "end early).",
        VALIDATION, may_change=True)
    metric_for_best_model: str = setting("loss",
        "How to tell the best validation, for --keep-best, early stopping and the checkpoint to keep: by the lowest "
        f"loss, or by the highest {', '.join(METRICS.values())} (of pairs, labels or rankings), or "
        "score of --eval-tasks (if equal, by the lower loss).",
        VALIDATION, may_change=True, choices=("loss", *METRICS, "task"))
    eval_tasks: str | None = setting(None,
        "Score the model at each validation, as `evaluate` does: a file of rows with their answers, a task's YAML file, or the "
        "name of one of lm-eval's tasks.", VALIDATION, may_change=True, per_machine=True, runs=r"\.ya?ml")
    eval_metric: str | None = setting(None,
        "Metric of --eval-tasks: for rows one of `evaluate --metric` (default: exact_match), for a task one of its own "
        "(default: the first for which higher is better).", VALIDATION, may_change=True, runs=r"\.py")
    eval_rows: int = setting(50, "Rows of --eval-tasks at each validation, from the first on.",
        VALIDATION, may_change=True, at_least=1, at_most=10**6)
    eval_max_tokens: int = setting(128, "Tokens of an answer to the rows of --eval-tasks, at most.",
        VALIDATION, may_change=True, at_least=1, at_most=10**5)
    eval_chat_template: bool = setting(False, "Ask a task of lm-eval in the form of the chat template.",
        VALIDATION, may_change=True)
    early_stopping_patience: int | None = setting(None,
        "End after this many validations in a row without a better one; 0: never (default: 3 if neither --epochs nor --iters "
        "is given and at least 20 examples are held out).",
        VALIDATION, may_change=True, at_least=0, at_most=10**9)
    early_stopping_threshold: float = setting(0.0,
        "An improvement in validation loss or accuracy only counts if it is larger than this.",
        VALIDATION, may_change=True, at_least=0, at_most=10**9)
    resume: str | None = setting(None,
        "Continue from a checkpoint, exactly as if the run had never stopped: a checkpoint folder, or auto (the "
        "flag without a value) for the newest complete one in --adapter-path.",
        OUTPUT, common=True, may_change=True, per_machine=True, alone="auto")
    sample_tokens: int = setting(48,
        "Tokens of each text in report.html, which the model writes with and without what was trained (grpo, rloo: whole "
        "answers, at every validation); 0: no texts.",
        OUTPUT, may_change=True, per_machine=True, at_least=0, at_most=10**5)
    train_mtp: bool = setting(False,
        "After training, also train a head that drafts the adapter's tokens, so that it answers faster. If --adapter-path already "
        "holds an adapter, train the head alone.", TRAINING, may_change=True)
    train: bool | None = setting(None, "With --test: train first. Without --test, a run always trains.", TRAINING, may_change=True)
    test: bool = setting(False, "Measure the loss on the test set; with --train, after training.",
        VALIDATION, may_change=True)
    test_batches: int = setting(500, "Test batches; -1: all.", VALIDATION, may_change=True, at_least=-1)
    short_buffers: bool = setting(False,
        "Use short GPU command buffers, so that a Mac's display keeps responding (slower).",
        MEMORY, may_change=True, per_machine=True)
    report_to: str | None = setting(None, f"Also log to these, separated by commas: {', '.join(LOGGERS)}.",
        OUTPUT, may_change=True, per_machine=True)
    project_name: str | None = setting(None, "Project name for --report-to (default: mlx-lora).",
        OUTPUT, may_change=True, per_machine=True)
    verbose: bool = setting(False, "Also print which loss, kernels and batch shapes a step uses.",
        OUTPUT, may_change=True, per_machine=True)
    seed: int = setting(0, "Seed of data order, initial adapter weights and dropout.", TRAINING, at_least=0, at_most=2**63 - 1)
    force: bool = setting(False, "Replace the adapter of a run folder that already has one.",
        OUTPUT, may_change=True, per_machine=True)


@dataclass(frozen=True)
class ServeSettings:
    """A server's settings: what it offers, to whom, and its limits."""

    host: str = setting("127.0.0.1", "Address to listen on; any other than this machine's own requires an API key.",
        SERVER, common=True)
    port: int = setting(8080, "Port to listen on; 0: any free one.", SERVER, common=True, at_least=0, at_most=65535)
    api_key: str | None = setting(None,
        "Key that clients must send as a bearer token; MLX_LORA_API_KEY sets it without showing it in process lists.",
        SERVER, common=True)
    allow_origin: str | None = setting(None,
        "Web origins whose pages may use the server, separated by commas, such as https://example.org; "
        "the server's own pages always may.", SERVER)
    adapters_from: str | None = setting(None,
        "Folder whose subfolders clients may load as adapters (default: none).", SERVER, common=True)
    images_from: str | None = setting(None,
        "Folder below which clients may name pictures as files (default: none; data URLs always work).", SERVER)
    allow_hub: bool = setting(False, "Let clients load adapters from the hub.", SERVER)
    adapter_memory: str | None = setting(None,
        "Limit on memory for adapters, such as 2GB; the least recently used are evicted (default: no limit).", LIMITS)
    speculate: str = setting("auto",
        "Use a head that drafts tokens, of the adapter or the model, for a request that is alone, where it is faster: auto, or off.",
        SERVER, choices=("auto", "off"))
    prompt_cache: str = setting("256MB", "Limit on memory for the keys and values of earlier prompts.", LIMITS)
    max_batch: int = setting(16, "Requests that are answered at the same time.", LIMITS, at_least=1, at_most=1024)
    max_waiting: int = setting(64, "Requests that may wait in the queue; further ones get HTTP status 429.",
        LIMITS, at_least=0, at_most=10**6)
    max_tokens: int = setting(2048, "Maximum number of new tokens that a request may ask for.",
        LIMITS, common=True, at_least=1, at_most=10**8)
    max_context: int | None = setting(None,
        "Maximum number of tokens of prompt and answer together (default: the model's own limit).",
        LIMITS, at_least=2, at_most=10**8)
    max_body: str = setting("1MB", "Largest request body.", LIMITS)
    training: bool = setting(False,
        "Train adapters for clients of Tinker's protocol instead of serving OpenAI's (docs/training-server.md).", SERVER, common=True)
    model_name: str | None = setting(None,
        "With --training: what clients call the model (default: its hub id, or the name of its folder).", SERVER)
    checkpoints: str = setting("checkpoints", "With --training: folder for the checkpoints that clients save.", SERVER)
    join_clients: bool = setting(False,
        "With --training: compute requests of several clients that wait at the same time in one pass, which rounds differently.", SERVER)
    max_sessions: int = setting(16, "With --training: clients that may be connected at the same time; further ones get HTTP status 429.",
        LIMITS, at_least=1, at_most=10**4)
    session_timeout: float = setting(120.0, "With --training: seconds of silence after which a client's adapters are freed.",
        LIMITS, more_than=0, at_most=10**6)
    read_timeout: float = setting(10.0, "Seconds within which a request must arrive.",
        LIMITS, more_than=0, at_most=10**6)
    request_timeout: float = setting(300.0, "Seconds within which a request must be answered.",
        LIMITS, more_than=0, at_most=10**6)


# fmt: on


SECTIONS = {
    "model": ModelSettings,
    "data": DataSettings,
    "adapter": AdapterSettings,
    "objective": ObjectiveSettings,
    "optimizer": OptimizerSettings,
    "loop": LoopSettings,
}
# Sections of commands that do not train; a training run's file cannot have their keys.
COMMAND_SECTIONS = {"serve": ServeSettings}
FIELDS = {f.name: f for section in SECTIONS.values() for f in dataclasses.fields(section)}
ROWS = {name: row_of(f) for name, f in FIELDS.items()}


@dataclass(frozen=True)
class TrainSettings:
    """All of a training run's settings, one section per topic."""

    model: ModelSettings
    data: DataSettings
    adapter: AdapterSettings
    objective: ObjectiveSettings
    optimizer: OptimizerSettings
    loop: LoopSettings

    def to_flat(self) -> dict[str, Any]:
        """Return the contents of run.yaml: one flat dict, with flags' names and underscores."""
        return {name: value for part in SECTIONS for name, value in dataclasses.asdict(getattr(self, part)).items()}


# Settings with the same meaning

# Pairs of which a run has one: a flag for either overrides both in the file.
TWO_NAMES = (("iters", "epochs"), ("batch_size", "batch_tokens"), ("data", "own_prompts"))


def other_names(name: str) -> set[str]:
    """Return the settings with the same meaning as one."""
    return {other for pair in TWO_NAMES if name in pair for other in pair} - {name}


def decided_by(flags: Iterable[str]) -> set[str]:
    """Return the settings that a file cannot change, because they were given as flags by either name."""
    return {one for name in flags for one in (name, *other_names(name))}


# Values with a form of their own


def turn_names(text: str | None) -> dict[str, dict[str, str]]:
    """Read `role=speaker,user=customer` as the fields {speaker: role} and the roles {customer: user}.

    Raises:
        ValueError: a part is not written like this; the message has it.
    """
    found: dict[str, dict[str, str]] = {"fields": {}, "roles": {}}
    for part in (text or "").split(","):
        ours, _, theirs = (word.strip() for word in part.partition("="))
        kind = "fields" if ours in TURN_FIELDS else "roles" if ours in TURN_ROLES else None
        if part.strip() and (kind is None or not theirs):
            raise ValueError(repr(part.strip()))
        if kind:
            found[kind][theirs] = ours
    return found


def shard_parts(text: str) -> list[float] | None:
    """Return the parts by rank that --shard-base names, such as 3:1; None for other texts."""
    parts = text.split(":")
    if len(parts) < 2 or not all(part.isdecimal() and 1 <= int(part) <= 10**6 for part in parts):
        return None
    return [float(part) for part in parts]


def checkpoint_every(mode: str) -> int | None:
    """Return n if every n-th block is recomputed, 1 for all, None for none."""
    if mode == "none":
        return None
    return int(mode) if mode.isdecimal() else 1


def parse_pattern(text: str | None) -> dict[str, float]:
    """Parse `q_proj=32,*.mlp.*=8` as name -> number.

    Raises:
        ValueError: a part does not have this form; the message is that part.
    """
    values = {}
    for part in (text or "").split(","):
        name, equals, number = part.strip().rpartition("=")
        if not part.strip():
            continue
        try:
            values[name.strip()] = float(number)
        except ValueError:
            raise ValueError(repr(part.strip())) from None
        if not equals or not name.strip():
            raise ValueError(repr(part.strip()))
    return values
