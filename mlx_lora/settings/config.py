"""Every setting of a run, its default and its help text: the only home of both.

A flag `--max-seq-length` is the field `max_seq_length`; the same name works in a YAML file. The click
options are made from these dataclasses (console.py), and `run.yaml` writes them back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.settings.checks import flag_of, range_problems, settings_problems
from mlx_lora.settings.migration.migrate import read_settings
from mlx_lora.settings.optimizers import OPTIMIZERS
from mlx_lora.system.errors import InputError

FORMATS = ("auto", "alpaca", "sharegpt", "messages", "completions", "text")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("cosine", "linear", "constant")
METHODS = ("lora", "rslora", "dora", "lora-plus", "pissa", "adalora", "relora", "full")
BIASES = ("none", "lora_only", "all")
DEFAULT_BATCH_TOKENS = 2048
QUANTIZED_MATMUL = ("auto", "packed", "dense")
KERNELS = ("auto", "mlx", "ours")


def setting(default: Any, help: str, **meta: Any) -> Any:
    """A dataclass field with help text; `choices` limits its values, in flags and YAML alike."""
    return field(default=default, metadata={"help": help, **meta})


@dataclass(frozen=True)
class ModelSettings:
    """Which base model, and how it is held in memory."""

    model: str | None = setting(None, "Hub id, local folder or .gguf file of the base model.")
    revision: str | None = setting(None, "Hub branch, tag or commit of the model.")
    dtype: str = setting("auto", "Compute dtype; auto: float32 on CPU, bfloat16 on a GPU.", choices=DTYPES)
    trust_remote_code: bool = setting(False, "Let the model's repository run its own tokenizer code.")
    quantized_matmul: str = setting(
        "auto",
        "How layers multiply by quantized weights; packed: mx.quantized_matmul, dense: dequantize, then GEMM, "
        "auto: by row count, as measured here.",
        choices=QUANTIZED_MATMUL,
    )


@dataclass(frozen=True)
class DataSettings:
    """What is trained on, and which of its tokens."""

    data: str | None = setting(None, "File, folder with train/valid/test, hub dataset id or tiny-shakespeare.")
    data_format: str = setting("auto", "Record format; auto looks at each record.", choices=FORMATS)
    max_seq_length: int = setting(2048, "Longest sequence in tokens; longer chats are cut, text is windowed.")
    mask_prompt: bool = setting(True, "Train on assistant turns only; --no-mask-prompt trains on all tokens.")
    chat_template: str | None = setting(None, "Jinja file, or built-in name (alpaca, chatml), to use instead.")
    chat_date: str | None = setting(
        None, "Day that a chat template shows as today, as in 2026-11-26 (default: the day the run began)."
    )
    valid_fraction: float = setting(0.05, "Share of rows held out when there is no validation file.")
    strict: bool = setting(False, "Stop at the first report of bad rows instead of skipping them.")


@dataclass(frozen=True)
class AdapterSettings:
    """The adapter's shape. Defaults: LoRA 2106.09685 (alpha = 2r), all linear layers as in QLoRA 2305.14314."""

    method: str = setting("lora", "Preset over form, scale, init and optimizer groups.", choices=METHODS)
    fine_tune_type: str | None = setting(None, "mlx-lm's name for --method.", choices=METHODS)
    loraplus_lr_ratio: float | None = setting(
        None, "Learning rate of B as a multiple of A's, for --method lora-plus (default 16)."
    )
    rank: int = setting(16, "Rank r of the two factors; for adalora the average rank at the end.")
    alpha: float = setting(32.0, "Numerator of the scale alpha / r.")
    rank_pattern: str | None = setting(None, "Ranks of some layers, as in q_proj=32,*.mlp.*=8; the first match counts.")
    alpha_pattern: str | None = setting(None, "Alphas of some layers, in the same form.")
    modules_to_save: str | None = setting(
        None, "Modules trained in full beside the adapter (lm_head,embed_tokens,*norm), by comma."
    )
    bias: str = setting("none", "Biases to train: none, those of adapted layers, or all.", choices=BIASES)
    dropout: float = setting(0.0, "Dropout probability on the adapter's input.")
    target_modules: str = setting("all-linear", "all-linear, or names or patterns (q_proj,*.mlp.*), by comma.")
    num_layers: int = setting(-1, "Adapt only the last N blocks; -1: all.")
    adalora_init_rank: int | None = setting(None, "adalora: rank of every layer at the start (default 1.5 r).")
    adalora_tinit: float | None = setting(
        None, "adalora: first steps without a cut, a share of the run below 1 (default 0.1)."
    )
    adalora_tfinal: float | None = setting(
        None, "adalora: last steps with the ranks fixed, a share below 1 (default 0.3)."
    )
    adalora_delta_t: int | None = setting(None, "adalora: steps between cuts (default: a hundredth of the run).")
    orth_reg_weight: float | None = setting(None, "adalora: weight of the orthogonality penalty (default 0.5).")
    relora_every: int | None = setting(None, "relora: steps between restarts (default: a quarter of the run).")
    relora_warmup: int | None = setting(None, "relora: warm-up steps after each restart (default: a tenth of a cycle).")
    relora_prune_ratio: float | None = setting(
        None, "relora: share of the optimizer's moments, the smallest, that a restart zeroes (default 0.99)."
    )
    resume_adapter_file: str | None = setting(None, "Start from the factors in this adapters.safetensors.")

    @property
    def method_name(self) -> str:
        """The method, under whichever of its two names it was given."""
        return self.fine_tune_type or self.method


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW as torch has it (bias corrected), 3% warm-up, cosine to zero, global-norm clip 1.0."""

    optimizer: str = setting("adamw", "Optimizer.", choices=tuple(OPTIMIZERS))
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
    batch_tokens: int | None = setting(
        None,
        f"Tokens per micro-batch, padding included, unless --batch-size is given (default: {DEFAULT_BATCH_TOKENS}, or less "
        "where the planner finds that it does not fit).",
    )
    grad_accumulation_steps: int = setting(1, "Micro-batches per optimizer step, weighted by their tokens.")
    batch_parts: int = setting(
        1,
        "Run each micro-batch in this many parts of its rows: the same update in less memory. Grows by itself when "
        "memory runs short.",
    )
    max_restarts: int = setting(
        0,
        "Restarts allowed after running out of memory; each goes on from the last checkpoint, in smaller parts.",
    )
    grad_checkpoint: str = setting(
        "auto",
        "Recompute in the backward pass to save memory: none, selective (all but products), block (all; also the "
        "flag alone), N (all, in every N-th block), or auto: the fastest that fits.",
        flag_value="block",
    )
    kernels: str = setting(
        "auto",
        "Kernels for attention, activations and the loss; auto: the best as measured on this machine, mlx: the model's "
        "own, ours: ours wherever there is one.",
        choices=KERNELS,
    )
    memory_budget: float | None = setting(
        None, "GB (10^9 bytes) that the run may use (default: what the device recommends)."
    )
    memory_check: bool = setting(True, "Refuse a run that does not fit by the plan; --no-memory-check tries it.")
    steps_per_report: int | None = setting(
        None, "Steps between reports (default: a twentieth of the run, and 25 at the most)."
    )
    steps_per_eval: int = setting(200, "Steps between validations; 0: only at the end.")
    val_batches: int = setting(25, "Validation batches per validation; -1: all, 0: none.")
    save_every: int = setting(100, "Steps between checkpoints; 0: only at the end.")
    keep: int = setting(3, "Newest checkpoints to keep, beside the one with the lowest validation loss; 0: all.")
    keep_best: bool = setting(
        False, "End with the adapter of the lowest validation loss, not with the last (needs --save-every)."
    )
    early_stopping_patience: int | None = setting(
        None, "End after this many validations in a row without a better one (default: never)."
    )
    early_stopping_threshold: float = setting(
        0.0, "An improvement of the validation loss counts when it is more than this."
    )
    resume: str | None = setting(
        None,
        "Go on from a checkpoint, exactly as if the run had never stopped: a checkpoint folder, or auto (the flag "
        "alone): the newest whole one in --adapter-path.",
        flag_value="auto",
    )
    sample_tokens: int = setting(
        48, "Length of the texts in report.html, made before the first step and after the last; 0: none."
    )
    train: bool | None = setting(None, "Train. On unless only --test is given.")
    test: bool = setting(False, "Measure the loss on the test set (after training, with --train).")
    test_batches: int = setting(500, "Test batches; -1: all.")
    clear_cache_threshold: str | None = setting(
        None, "Bound on MLX's buffer cache, as in 2GB (default: a sixteenth of the working set)."
    )
    short_buffers: bool = setting(
        False, "Give the GPU up between short command buffers, for a Mac whose display must stay live (slower)."
    )
    report_to: str | None = setting(None, "Also log to wandb, swanlab or both, by comma.")
    project_name: str | None = setting(None, "Project name for --report-to.")
    seed: int = setting(0, "Seed of data order, initial factors and dropout.")
    force: bool = setting(False, "Write into a run folder that already holds an adapter.")


@dataclass(frozen=True)
class ServeSettings:
    """What a server offers, to whom, and how much of it."""

    host: str = setting("127.0.0.1", "Address to listen on; any but this machine's own needs an API key.")
    port: int = setting(8080, "Port to listen on; 0: any free one.")
    api_key: str | None = setting(
        None,
        "Key that clients must send as a bearer token; the environment's MLX_LORA_API_KEY shows in no process list.",
    )
    allow_origin: str | None = setting(
        None, "Web origins whose pages may use the server (https://example.org), by comma; its own may always."
    )
    adapters_from: str | None = setting(None, "Folder from whose subfolders clients may load adapters; default: none.")
    allow_hub: bool = setting(False, "Let clients load adapters from the hub.")
    adapter_memory: str | None = setting(
        None, "Bound on adapters in memory, as in 2GB; the least recently used are evicted (default: no bound)."
    )
    prompt_cache: str = setting("256MB", "Bound on the keys and values kept of earlier prompts.")
    max_batch: int = setting(16, "Requests that generate at once.")
    max_waiting: int = setting(64, "Requests that wait for a place; more get 429.")
    max_tokens: int = setting(2048, "Most new tokens that a request may ask for.")
    max_context: int | None = setting(
        None, "Most tokens of prompt and answer together (default: the model's own bound)."
    )
    max_body: str = setting("1MB", "Largest request body.")
    read_timeout: float = setting(10.0, "Seconds in which a request must have arrived.")
    request_timeout: float = setting(300.0, "Seconds in which a request must be answered.")


SECTIONS = {
    "model": ModelSettings,
    "data": DataSettings,
    "adapter": AdapterSettings,
    "optimizer": OptimizerSettings,
    "loop": LoopSettings,
}
# Of commands that do not train: no key of a training run's file.
COMMAND_SECTIONS = {"serve": ServeSettings}
# Two ways to say one thing: the flag's beats whichever the file uses.
TWO_NAMES = (("iters", "epochs"), ("method", "fine_tune_type"), ("batch_size", "batch_tokens"))


@dataclass(frozen=True)
class TrainSettings:
    """All of a training run's settings, one section per stage."""

    model: ModelSettings
    data: DataSettings
    adapter: AdapterSettings
    optimizer: OptimizerSettings
    loop: LoopSettings

    def to_flat(self) -> dict[str, Any]:
        """Return one flat dict, spelled as flags with underscores: what run.yaml holds."""
        flat: dict[str, Any] = {}
        for name in SECTIONS:
            flat.update(dataclasses.asdict(getattr(self, name)))
        return flat


def train_settings(
    flags: dict[str, Any], config_file: str | None = None, say: Callable[[str], None] = lambda line: None
) -> TrainSettings:
    """Resolve settings: a flag beats the YAML file, the YAML file beats the default.

    Args:
        flags: flat settings given on the command line (only those given).
        config_file: YAML file of flat settings, spelled as the flags; hyphens and underscores both work. Or
            the file of another trainer (migration/).
        say: takes a line on each thing that another trainer's file says and we read in our own way.

    Raises:
        InputError: all unknown keys and bad values together, in the flags' spelling.
    """
    known = {f.name: section for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
    values = dict(flags)
    if config_file:
        beaten = {other for pair in TWO_NAMES for one, other in (pair, pair[::-1]) if one in flags}
        content = read_settings(config_file, known, flags.keys() | beaten, say)
        values = {**{key: value for key, value in content.items() if key not in beaten}, **flags}
    problems = [
        f"{config_file or 'settings'}: unknown setting {key!r}{_near(key, known)}" for key in values if key not in known
    ]
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        if key in known:
            coerced, problem = _coerce(SECTIONS[known[key]], key, value)
            sections[known[key]][key] = coerced
            problems += [problem] if problem else []
    if not problems:
        settings = TrainSettings(**{name: cls(**sections[name]) for name, cls in SECTIONS.items()})
        problems = settings_problems(settings.to_flat())
    if problems:
        raise InputError("; ".join(problems))
    return settings


def serve_settings(flags: dict[str, Any]) -> tuple[ModelSettings, ServeSettings]:
    """Resolve a server's settings from its flags.

    Raises:
        InputError: all bad values together.
    """
    own = {f.name for f in dataclasses.fields(ServeSettings)}
    model = train_settings({key: value for key, value in flags.items() if key not in own}).model
    settings = ServeSettings(**{key: value for key, value in flags.items() if key in own})
    problems = range_problems(dataclasses.asdict(settings))
    if problems:
        raise InputError("; ".join(problems))
    return model, settings


def _near(key: str, known: dict[str, str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else " (remove it; --help lists all)"


def field_type(f: dataclasses.Field) -> type:
    """Return the plain type of a settings field, without its `| None`."""
    return {"str": str, "int": int, "float": float, "bool": bool}[str(f.type).split(" |")[0]]


def _coerce(cls: type, key: str, value: Any) -> tuple[Any, str | None]:
    """Check one value against its field; YAML reads 2e-4 as text, so numbers in text are taken."""
    f = next(f for f in dataclasses.fields(cls) if f.name == key)
    kind, choices = field_type(f), f.metadata.get("choices")
    if value is None and "None" in str(f.type):
        return None, None
    if "flag_value" in f.metadata and isinstance(value, bool):  # grad_checkpoint: true, as in mlx-lm
        if not value and f.default is None:
            return None, None
        value = f.metadata["flag_value"] if value else "none"
    if kind is str and isinstance(value, dict):  # rank_pattern: {q_proj: 32}
        value = ",".join(f"{name}={number}" for name, number in value.items())
    if kind is str and isinstance(value, list):  # target_modules: [q_proj, v_proj]
        value = ",".join(str(item) for item in value)
    try:
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is int and (isinstance(value, bool) or float(value) != int(float(value))):
            raise ValueError
        if kind is int and not isinstance(value, int):
            value = float(value)  # 1e3 is a whole number too; an int stays exact beyond 2^53
        coerced = value if kind is bool else kind(value)
    except (TypeError, ValueError, OverflowError):
        return value, f"{flag_of(key)} {value!r}: not {kind.__name__}"
    if choices and coerced not in choices:
        return value, f"{flag_of(key)} {value!r}: not one of {', '.join(choices)}"
    return coerced, None
