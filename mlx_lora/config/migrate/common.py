"""What the trainers' tables share: a file while it is read, and the topics that the files of several trainers have.

A trainer is a `Dialect`: a table of names, and a few functions for what a table cannot say. Axolotl, LLaMA-Factory and TRL
all use transformers' trainer and PEFT, so that most of what they have differs in its names only: the functions here read it
by our names, after the table has given them.

Each key of a file is translated, or changes no result, or is refused with what it would change. So is a key that is not known here.

TRL and Axolotl count answers in a batch, of which those to one prompt are neighbors; here a batch is counted in prompts. A
reward function is named by its import path there, and by its file here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_lora.config.fields import field_type, source_text
from mlx_lora.config.objectives import IMITATION, SAMPLING, SMOOTHED
from mlx_lora.config.presets import ADAMW
from mlx_lora.config.rules import OWNERS
from mlx_lora.config.settings import FIELDS, LOGGERS, other_names
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import hashable

# Keys about speed, memory, logging, saving, other machines, and the classes that load a model: they change no result, or only its
# rounding. The names in BEGINNINGS begin several.
BEGINNINGS = (
    "activation_", "attn_", "bf16", "bnb_", "comet_", "context_par", "cp_", "dataloader_", "dataset_num_proc", "dataset_pr",
    "ddp_", "dist_config", "dp_", "eval_", "expert_parallel", "flash_att", "flash_opt", "flex_", "fp16", "fsdp", "gc_",
    "gradient_checkpointing_", "hf_", "hub_", "include_", "kt_", "lora_mlp_kernel", "lora_o_kernel", "lora_qkv_kernel", "log_",
    "logging_", "loss_watchdog", "mlflow_", "overlap_", "overwrite_", "pipeline_", "preprocessing_", "profile", "ray_", "save_",
    "sequence_parallel", "skip_", "swanlab_", "tensor_model_par", "tensor_parallel_size", "tokenizer_type", "torch_", "trackio_",
    "vllm_", "wandb_", "xformers_", "expert_model_parallel",
)  # fmt: skip
HARMLESS = {
    "accelerator_config", "apply_rope_fusion", "auto_find_batch_size", "auto_resume_from_checkpoints", "average_tokens_across_devices",
    "base_model_ignore_patterns", "batch_eval_metrics", "bfloat16", "bias_activation_fusion", "cache_dir",
    "cut_cross_entropy", "data_seed", "data_shared_file_system", "dataset_test_split", "debug", "deepspeed", "device_map",
    "disable_tqdm", "do_eval", "do_predict", "double_quantization", "eager_attention",
    "evals_per_epoch", "evaluation_strategy", "experimental_skip_move_to_device", "experts_implementation", "float16",
    "full_determinism", "fused_attn_kernel", "gemma4_hybrid_attn_impl", "group_by_length", "ignore_data_skip",
    "length_column_name", "liger_fused_linear_cross_entropy", "liger_glu_activation", "liger_kernel_config", "liger_layer_norm",
    "liger_rms_norm", "liger_rms_norm_gated", "liger_rope", "llama4_linearized_experts", "local_rank", "lora_fan_in_fan_out",
    "lora_task_type", "low_cpu_mem_usage", "media_dir",
    "mixed_precision", "model_quantization_config", "model_quantization_config_kwargs", "moe_grouped_gemm", "moe_token_dispatcher_type", "num_completions_to_print", "num_processes", "output_logs", "pad_to_multiple_of",
    "pad_to_sequence_len", "padding_free", "pad_token", "per_device_eval_batch_size", "pissa_convert", "pissa_iter",
    "plot_loss", "prediction_loss_only",
    "processor_type", "pure_bf16", "push_to_hub", "quantization_method", "quantize_moe_experts", "recompute_granularity",
    "relora_cpu_offload", "remove_unused_columns", "report_to", "resize_token_embeddings_to_32x", "run_name", "sdp_attention",
    "shuffle_dataset", "shuffle_merged_datasets", "strict", "streaming", "streaming_multipack_buffer_size", "tf32", "tiled_mlp",
    "tokenizer_legacy", "tokenizer_use_fast", "use_cache", "use_cpu", "use_data_parallel",
    "use_distributed_optimizer", "use_dsv4_kernels", "use_fast_tokenizer", "use_glm_dsa_kernels", "use_kernels", "use_kt",
    "use_liger_kernel", "use_mca", "use_otel_metrics", "use_ray", "use_reentrant_gc", "use_scattermoe", "use_sonicmoe",
    "use_tensorboard", "use_unsloth", "use_unsloth_gc", "use_v1_kernels", "use_vllm", "use_wandb", "val_batch_size",
    "video_fps", "video_max_pixels", "video_maxlen", "video_min_pixels",
    "otel_metrics_host", "otel_metrics_port", "use_packed_sequences", "dsv4_fp4_grouped_mode", "eval_dataset_split",
}  # fmt: skip
# What a key changes that is not here.
CHANGES = {
    "neftune_noise_alpha": "noise on the embeddings",
    "metric_for_best_model": "another metric chooses the best checkpoint",
    "greater_is_better": "another metric chooses the best checkpoint",
    "train_sampling_strategy": "rows keep their order",
    "base_model_config": "the configuration of another model",
    "label_smoothing_factor": "labels are smoothed",
    "lora_target_parameters": "factors for parameters that no layer of its own has",
    "unfrozen_parameters": "only parameters that match are trained",
    "model_config": "the model's configuration is changed, for MoE often by a loss that balances the experts",
    "qat": "rounding to a type that fuse does not write; --qat rounds as fuse does",
    "quantizer": "rounding to a type that fuse does not write; --qat rounds as fuse does",
    "fp8": "matrices are multiplied in 8 bits",
    "tokens": "tokens are added to the vocabulary",
    "add_tokens": "tokens are added to the vocabulary",
    "new_special_tokens_config": "tokens are added to the vocabulary",
    "tokenizer_use_mistral_common": "chats are written by the package mistral-common",
    "gptq": "the base is quantized by GPTQ",
    "reinit_weights": "the model begins with random weights",
    "diffusion": "a diffusion loss is trained",
    "dataset_exact_deduplication": "rows that occur twice are left out; remove them from the file",
    "min_sample_len": "short rows are left out",
    "lr_quadratic_warmup": "the warm-up is not linear",
    "cosine_constant_lr_ratio": "the rate stops to fall before the end",
    "lr_scheduler_kwargs": "numbers of a schedule",
    "optim_args": "numbers of an optimizer",
    "lisa_n_layers": "a few layers at a time are trained",
    "use_galore": "gradients are projected", "use_apollo": "gradients are projected", "use_badam": "a few layers at a time are trained",
    "use_adam_mini": "another optimizer", "use_llama_pro": "blocks are added", "mixture_of_depths": "tokens skip blocks",
    "use_dft_loss": "another loss", "use_asft_loss": "another loss", "use_eaft_loss": "another loss", "use_eaft": "another loss",
    "rope_scaling": "positions are scaled", "moe_aux_loss_coef": "a loss that balances the experts",
    "router_aux_loss_coef": "a loss that balances the experts", "num_labels": "a head for labels; use --objective classify",
    "gamma": "an option of another method", "use_onebitllms": "weights are rounded to one bit",
    "curriculum_sampling": "rows keep their order", "sample_packing_sequentially": "rows keep their order",
    "disable_shuffling": "rows keep their order",
    "steps_per_generation": "answers are sampled for one step at a time here",
    "generation_batch_size": "answers are sampled for one step at a time here",
}  # fmt: skip
LIKELIHOOD_OF_SIMPO = "a likelihood of chosen answers, which only cpo has here; give 0"
UNKNOWN = "not known here; remove it if it changes no result"


def changes_nothing(key: str) -> bool:
    """Tell whether a key changes no result."""
    return key in HARMLESS or (key.startswith(BEGINNINGS) and key not in CHANGES)


@dataclass(frozen=True)
class Dialect:
    """One trainer's format of settings files.

    Attributes:
        name: of the trainer.
        recognizes: tells whether a file is this trainer's.
        names: key, with those of the mappings around it (`lora.lora_r`) -> our setting. If several keys are one setting, the last one
            counts.
        rules: functions that each read the keys of one topic, or turn a value under our name into ours; they run in order, after
            names and values are read.
        values: key, written so -> its values with another meaning than their own -> our settings.
        defaults: our setting -> the trainer's default, if it differs from ours and changes the result.
        nulls: key -> what null means, if that is not the trainer's default.
        changes: key, written so -> what it changes that is not here, in addition to `CHANGES`.
        harmless: keys, written so, that change no result here, in addition to `HARMLESS`.
        others: key that only files of its other commands have -> what is said of them.
    """

    name: str
    recognizes: Callable[[Mapping[str, Any]], bool]
    names: Mapping[str, str]
    rules: tuple[Callable[[Sheet], None], ...]
    defaults: Mapping[str, Any]
    values: Mapping[str, Mapping[Any, Mapping[str, Any]]] = field(default_factory=dict)
    nulls: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)
    harmless: Collection[str] = ()
    others: Mapping[str, str] = field(default_factory=dict)

    def read(self, content: Mapping[str, Any], file: str, flags: Mapping[str, Any] | None = None) -> Sheet:
        """Return a file of this dialect, read.

        Args:
            content: of the file.
            file: its name, for messages.
            flags: settings given as flags.

        Raises:
            InputError: it asks for another kind of training, or has an invalid value.
        """
        nulls = {key: off for key, off in self.nulls.items() if content.get(key, off) in (None, "None")}
        rest = filled(replaced(content, content)) | nulls
        sheet = Sheet(file, rest, flags or {}, self, defaults=self.defaults)
        if key := next((key for key in self.others if key in content), None):
            raise sheet.refusal(f"{key}: {self.others[key]}")
        for rule in self.rules:
            rule(sheet)
        sheet.assume(**sheet.defaults)
        for one in (*sheet.parts, sheet):
            one.sort_rest()
        if bits := sheet.found.get("bits"):
            sheet.notes.append(f"bits {bits}: by MLX's affine mode, in groups of 64 weights")
        return sheet


@dataclass
class Sheet:
    """One file, or a mapping in it, while the functions of its trainer read it.

    Attributes:
        file: its name, for errors.
        rest: keys that have not been read yet.
        flags: settings given as flags, which override the file; see `told`.
        dialect: of the file.
        prefix: of a mapping's keys in messages, such as `trl.`.
        defaults: the trainer's, for what the file leaves out.
        parts: the mappings in the file that are read by their keys.
        found: our settings, with values from the file; a mapping writes into those of its file.
        keys: our setting -> the file's key of its value.
        assumed: those of `found` that the file leaves out, with its trainer's defaults.
        notes: what is said in other words here, one line each.
        harmless: keys that change no result.
        refused: keys that change it in a way that is not here, each with value and reason.
    """

    file: str
    rest: dict[str, Any]
    flags: Mapping[str, Any] = field(default_factory=dict)
    dialect: Dialect = Dialect("", bool, {}, (), {})
    prefix: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    parts: list[Sheet] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    harmless: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Read the keys that its trainer's tables have."""
        names, values = self.dialect.names.items(), self.dialect.values.items()
        self.copy({key.removeprefix(self.prefix): name for key, name in names if key.startswith(self.prefix)})
        self.turn({key.removeprefix(self.prefix): known for key, known in values if key.startswith(self.prefix)})

    def take(self, key: str) -> Any:
        """Return a key's value and mark it as read; None if the file does not set it."""
        return self.rest.pop(key, None)

    def told(self, name: str) -> Any:
        """Return one of our settings as the run will have it: the flag's value, or else the file's, or its trainer's default.

        What is computed from a setting (alpha = 2 * rank) must follow the flag, or a flag would change its meaning.
        """
        return self.flags.get(name, self.found.get(name, self.defaults.get(name)))

    def number(self, key: str) -> int | float | None:
        """Take a number; a text such as 2e-5, which YAML does not read as a number, is accepted.

        Raises:
            InputError: it is not a number.
        """
        value = self.take(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self.refusal(f"{key} {value!r}: not a number; fix the file")
        return int(number) if number.is_integer() else number

    def switch(self, key: str) -> bool:
        """Take true or false; false if it is left out.

        Raises:
            InputError: it is neither.
        """
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(f"{key} {value!r}: neither true nor false; fix the file")
        return bool(value)

    def one_of(self, key: str, values: Mapping[str, Any], whose: str = "") -> Any:
        """Take one of the names in a table, and return what it is here; None if it is left out. `whose` ends it in the error.

        Raises:
            InputError: the table does not have it.
        """
        asked = self.take(key)
        if asked not in (None, False) and str(asked) not in values:
            known = ", ".join(values)
            raise self.refusal(f"{key} {asked}{whose}: only {known} are supported; use {self.dialect.name} for it")
        return values.get(str(asked))

    def copy(self, names: Mapping[str, str]) -> None:
        """Set ours from those keys of a table, key -> setting, that the file has; for a number here, it must be one."""
        for key, name in names.items():
            if key in self.rest:
                self.keys[name] = key
                self.found[name] = self.number(key) if field_type(FIELDS[name]) in (int, float) else self.take(key)

    def turn(self, values: Mapping[str, Mapping[Any, Mapping[str, Any]]]) -> None:
        """Turn values of the keys in a table into our settings; other values are left."""
        for key, known in values.items():
            if hashable(self.rest.get(key)) in known:
                self.found |= known[hashable(self.take(key))]

    def put(self, **values: Any) -> None:
        """Set those of our settings that are known: not None."""
        self.found |= {name: value for name, value in values.items() if value is not None}

    def assume(self, **values: Any) -> None:
        """Set ours to the other trainer's defaults, unless the file set them, by either of two names (epochs or iters)."""
        for name, value in values.items():
            if name not in self.found and self.found.keys().isdisjoint(other_names(name)):
                self.found[name] = self.assumed[name] = value

    def choose(self, name: str, values: Mapping[str, str]) -> None:
        """Turn the file's value of one of our settings into ours; one that is not in the table is refused, unless a flag decides."""
        asked = self.found.pop(name, None)
        self.put(**{name: values.get(str(asked))})
        if asked is not None and str(asked) not in values:
            self.refuse(self.keys[name], f"only {', '.join(values)} are here", asked, name)

    def part(self, key: str) -> Sheet:
        """Take a mapping as a sheet, to read its keys; an empty one if it is left out.

        Raises:
            InputError: it is not a mapping.
        """
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(f"{key} {value!r}: not a mapping of names to values; fix the file")
        return self.within(value or {}, key)

    def within(self, content: Mapping[str, Any], key: str, **own: Any) -> Sheet:
        """Return a sheet of a mapping in this one, which has some attributes of its own."""
        part = replace(self, rest=filled(content), prefix=f"{self.prefix}{key}.", **own)
        self.parts.append(part)
        return part

    def drop(self, usual: Mapping[str, Collection[Any]]) -> None:
        """Drop the keys of a table that have one of its values, because that is what we do without being told."""
        self.rest = {key: value for key, value in self.rest.items() if value not in usual.get(key, ())}

    def leave(self, *keys: str) -> None:
        """Leave out keys that have no effect in this run, if the file sets them."""
        self.harmless += [self.prefix + key for key in keys if self.take(key) is not None]

    def forget(self, *names: str) -> None:
        """Leave out settings that have no effect in this run, if the file has set them."""
        self.harmless += [self.prefix + self.keys[name] for name in names if self.found.pop(name, None) is not None]

    def refuse(self, key: str, why: str, value: Any = None, instead: str = "") -> None:
        """Refuse a key, after the whole file is read.

        Args:
            key: in the file.
            why: what it changes, or what is here.
            value: its value if it has been read already.
            instead: the setting that decides the same, which a flag may give.
        """
        asked = self.take(key) if value is None else value
        if asked is not None and instead not in self.flags:
            text = " ".join(str(asked).split())
            self.refused.append(f"{self.prefix}{key} {text[:60]}{'...' * (len(text) > 60)}: {why}")

    def sort_rest(self) -> None:
        """Sort what has not been read into keys that change no result, and keys that are refused; what is off is neither."""
        for key in list(self.rest):
            if changes_nothing(key) or self.prefix + key in self.dialect.harmless:
                self.leave(key)
            elif self.rest[key] is not False and self.rest[key] != 0:
                self.refuse(key, self.dialect.changes.get(self.prefix + key) or CHANGES.get(key, UNKNOWN))

    def refusal(self, problem: str) -> InputError:
        """Return the error to raise if the file cannot be migrated."""
        return InputError(f"--config {self.file}: {problem}")


def filled(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping without its empty keys, such as `wandb_project:`."""
    return {key: value for key, value in content.items() if value is not None and value not in ("", [], {})}


def replaced(value: Any, content: Mapping[str, Any]) -> Any:
    """Return a value with the names of others in it, such as ${output_dir}, replaced by their values."""
    if isinstance(value, Mapping):
        return {key: replaced(one, content) for key, one in value.items()}
    given = re.compile(r"\$\{(\w+)\}")
    return given.sub(lambda name: str(content.get(name[1], name[0])), value) if isinstance(value, str) else value


def texts(asked: Any) -> list[str]:
    """Return the names in a list, or in a text that separates them with commas."""
    names = asked if isinstance(asked, list) else [] if asked is None else str(asked).split(",")
    return [str(name).strip() for name in names]


# transformers' trainer and PEFT

UNCUT = 10**8  # tokens, more than a row has: nothing is cut
# Keys with the same meaning in each of these trainers: of the run, of Adam, of a schedule, and of PEFT.
SHARED = {
    "trust_remote_code": "trust_remote_code", "learning_rate": "learning_rate", "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm", "gradient_accumulation_steps": "grad_accumulation_steps",
    "output_dir": "adapter_path", "seed": "seed", "max_steps": "iters", "logging_steps": "steps_per_report",
    "eval_steps": "steps_per_eval", "save_steps": "save_every", "early_stopping_patience": "early_stopping_patience",
    "early_stopping_threshold": "early_stopping_threshold", "min_lr_rate": "min_lr_ratio", "cosine_min_lr_ratio": "min_lr_ratio",
    "adam_beta1": "adam_beta1", "adam_beta2": "adam_beta2", "adam_epsilon": "adam_epsilon", "adam_eps": "adam_epsilon",
    "lora_alpha": "alpha", "lora_dropout": "dropout", "loraplus_lr_ratio": "loraplus_lr_ratio",
}  # fmt: skip
# Those that Axolotl calls otherwise.
TRANSFORMERS = {
    "num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size", "lr_scheduler_type": "lr_schedule",
    "optim": "optimizer",
}  # fmt: skip
# With one cycle, which is the default, restarts are none.
SCHEDULES = {
    "cosine": "cosine", "cosine_with_restarts": "cosine", "cosine_with_min_lr": "cosine", "linear": "linear", "constant": "constant",
    "constant_with_warmup": "constant",
}  # fmt: skip
OPTIMIZERS = {"AdamW": "adamw", "sgd": "sgd", "adafactor": "adafactor", "muon": "muon"}
# Keys that are true if rows are packed to the longest sequence.
PACKING = ("packing", "sample_packing", "neat_packing")
PER_EPOCH = {"evals_per_epoch": "steps_per_eval", "saves_per_epoch": "save_every"}
STRATEGIES = {"eval_strategy": "steps_per_eval", "evaluation_strategy": "steps_per_eval", "save_strategy": "save_every"}
# "steps" is what we do; YAML 1.1 reads an unquoted no as false.
EVALUATIONS = {"no": {"val_batches": 0}, False: {"val_batches": 0}, "steps": {}}
VALUES = {
    "eval_strategy": EVALUATIONS, "evaluation_strategy": EVALUATIONS,
    "save_strategy": {"no": {"save_every": 0}, False: {"save_every": 0}, "steps": {}},
    "load_in_8bit": {True: {"bits": 8}}, "load_in_4bit": {True: {"bits": 4}}, "float32": {True: {"dtype": "float32"}},
    "load_best_model_at_end": {True: {"keep_best": True}}, "metric_for_best_model": {"eval_loss": {}, "loss": {}},
    "greater_is_better": {False: {}}, "train_sampling_strategy": {"random": {}, "group_by_length": {}},
}  # fmt: skip
# Chat templates that we have with the same name and text.
TEMPLATES = ("alpaca", "chatml", "llama3")
# Keys that are true for a method; if several methods are on, the first of PRECEDENCE is used.
METHODS = {"use_dora": "dora", "use_rslora": "rslora"}
PRECEDENCE = ("full", "dora", "pissa", "relora", "lora-plus", "rslora")
# The last part of a regular expression on layer names, such as (up|down)_proj; ([qkv]_proj) is not supported.
LAST_NAMES = re.compile(r"(?:.*[.)*+])?(?P<before>\w*)\((?P<names>\w+(?:\|\w+)*)\)(?P<after>\w*)\$?")


def two_of(*marks: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return what tells whether a file has two of a trainer's own keys, and not our key for the model."""
    return lambda content: "model" not in content and sum(key in content for key in marks) >= 2


def read_loop(sheet: Sheet) -> None:
    """Set length, batch, schedule, optimizer, intervals and loggers."""
    found = sheet.found
    found.pop("epochs" if (found.get("iters") or 0) > 0 else "iters", None)  # steps override epochs there too
    sheet.assume(epochs=sheet.defaults["epochs"])
    if found.get("objective") in SAMPLING:
        read_prompts(sheet)
    elif packed := [key for key in PACKING if sheet.switch(key)]:
        budget = (found.pop("batch_size", None) or sheet.defaults["batch_size"]) * sheet.told("max_seq_length")
        found["batch_tokens"] = budget
        sheet.notes.append(
            f"{packed[0]}: rows of similar length share a batch of {budget} tokens instead; rows are not joined"
        )
    read_schedule(sheet)
    name = str(found.get("optimizer"))
    if ADAMW.fullmatch(name):
        found["optimizer"] = "AdamW"
        if re.search("4bit|8bit|paged", name):
            sheet.notes.append(
                f"{sheet.keys['optimizer']} {name}: AdamW, with its state in float32, which is small for an adapter"
            )
    sheet.choose("optimizer", OPTIMIZERS)
    read_intervals(sheet)
    loggers = texts(sheet.take("report_to")) + ["swanlab"] * sheet.switch("use_swanlab")
    sheet.put(report_to=",".join(name for name in loggers if name in LOGGERS) or None)
    sheet.harmless += ["report_to"] * bool(set(loggers) - set(LOGGERS))
    if "gradient_checkpointing" in sheet.rest:  # or a way of it, such as unsloth
        found["grad_checkpoint"] = bool(sheet.take("gradient_checkpointing"))
    sheet.put(keep_best=True if found.get("early_stopping_patience") else None)


def read_schedule(sheet: Sheet) -> None:
    """Set schedule and warm-up; a number of steps overrides a fraction of them, as in transformers, and the first rate is 0."""
    steps, share = sheet.number("warmup_steps"), sheet.number("warmup_ratio")
    warmup, name = steps if steps or share is None else share, sheet.found.get("lr_schedule")
    sheet.put(warmup=warmup)
    sheet.choose("lr_schedule", SCHEDULES)
    if sheet.told("lr_schedule") == name == "constant":  # it has no warm-up in transformers, whatever the file says
        sheet.found["warmup"] = 0
    elif sheet.told("warmup"):
        sheet.found |= {"warmup_init": 0} | ({"warmup_rounding": "up"} if 0 < float(warmup or 0) < 1 else {})


def read_intervals(sheet: Sheet) -> None:
    """Set the steps between reports, validations and checkpoints, or the share of the run, as transformers has it, too."""
    found, epochs = sheet.found, float(sheet.found.get("epochs") or 1)
    if "steps_per_report" in found:
        found["steps_per_report"] = max(1, found["steps_per_report"])
    for key, name in PER_EPOCH.items():
        if (times := sheet.number(key)) is not None and name not in found:
            found |= {"val_batches": 0} if not times and name == "steps_per_eval" else {}
            share = 1 / (times * epochs) if times else 0
            found[name] = share if share < 1 else 0  # the whole run: at its end
    for key, name in STRATEGIES.items():
        if sheet.rest.get(key) == "epoch":
            sheet.take(key)
            found[name] = 1 / epochs if epochs > 1 else 0


def read_targets(sheet: Sheet) -> None:
    """Turn the target layers into names, from names, or from the last part of a regular expression."""
    asked = sheet.found.pop("target_modules", None)
    names, text = texts(asked), str(asked[0] if isinstance(asked, list) else asked)
    if {"all-linear", "all"} & set(names):
        sheet.found["target_modules"] = "all-linear"
    elif all(re.fullmatch(r"[\w.]+", name) for name in names):
        sheet.put(target_modules=",".join(names) or None)
    elif match := LAST_NAMES.fullmatch(text):
        layers = ",".join(match["before"] + name + match["after"] for name in match["names"].split("|"))
        sheet.found["target_modules"] = layers
        said = f"a regular expression, read as {layers} in all modules of the language model"
        sheet.notes.append(f"{sheet.keys['target_modules']}: {said}")
    else:
        why = "a regular expression; give names and patterns as --target-modules"
        sheet.refuse(sheet.keys["target_modules"], why, asked, "target_modules")


def read_template(sheet: Sheet, key: str, model: Any, exact: Mapping[str, str | None]) -> None:
    """Set the chat template: ours if it has the same text, or else the model's own, which one of its family's name means.

    Args:
        sheet: of the file.
        key: of the template's name.
        model: that is trained; empty: a template of its family may have another text.
        exact: names of the trainer's templates -> ours; None: what is done without a name.
    """
    name = str(sheet.take(key) or "")
    family = re.sub("[^a-z].*", "", name.lower())
    if name in exact or name in ("", *TEMPLATES):
        sheet.put(chat_template=exact.get(name, name or None))
    elif re.fullmatch(r".*\.jinja2?", name):
        sheet.found["chat_template"] = name
    elif family and family in str(model).lower():
        sheet.found["chat_template"] = "own"
    else:
        own = f", nor is it that of {model}" * bool(model)
        sheet.refuse(key, f"no text of that name is here{own}; give its Jinja file", name, "chat_template")


def choose_method(sheet: Sheet, others: Mapping[str, Any], switches: Mapping[str, str] = METHODS) -> None:
    """Set the method from the switches that are on, and the layers it adapts; we have one method, so others are left out.

    An exception is rsLoRA, which only scales by alpha / sqrt(r) instead of alpha / r: together with another method, it
    becomes that method's alpha.

    Args:
        sheet: already has rank and alpha.
        others: method -> the key that turned it on in another way, or nothing.
        switches: key -> the method that it is true for.
    """
    on = {method: key for key, method in switches.items() if sheet.switch(key)}
    on |= {method: key for method, key in others.items() if key}
    on |= {"lora-plus": "loraplus_lr_ratio"} if "loraplus_lr_ratio" in sheet.found else {}
    method = sheet.found["method"] = next((name for name in PRECEDENCE if name in on), "lora")
    rank, alpha, told = sheet.told("rank"), sheet.found.get("alpha"), sheet.told("method")
    for other, key in on.items():
        # With the flag --method rslora, the method itself scales so.
        if other == "rslora" != method and told not in ("full", "rslora") and rank and alpha:
            sheet.found["alpha"] = alpha * rank**0.5
            sheet.notes.append(
                f"{key}: with {told}, alpha {alpha:g} / sqrt({rank}) becomes alpha {sheet.found['alpha']:g} / {rank}"
            )
        elif other != method:
            sheet.refuse(key, f"with {method}; a run has one method", True, "method")
    if method != "lora-plus":
        sheet.found.pop("loraplus_lr_ratio", None)
    if method == "full":
        sheet.forget("rank", "alpha", "dropout", "modules_to_save", "target_modules")
        sheet.leave("lora_target_linear")
        sheet.found["target_modules"] = "*"
        return
    read_targets(sheet)


# Data

# mlx-lm's key of a column -> our setting, and the columns that need none; mlx-lm itself takes the first.
FEATURES = {
    "prompt_feature": ("prompt_column", ("prompt",)),
    "completion_feature": ("completion_column", ("completion",)),
    "chat_feature": ("chat_column", ("messages",)),
    "text_feature": ("text_column", ("text",)),
}
# Fields and roles of a turn that are recognized by themselves.
FIELDS_OF_TURNS = {"role": ("role", "from"), "content": ("content", "value")}
ROLES = {
    "system": ("system",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "chatgpt"),
    "tool": ("tool", "observation"),
}


def read_columns(sheet: Sheet, names: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
    """Set our columns from a data set's keys: key -> our setting, and the columns that we recognize without it."""
    for key, (ours, usual) in names.items():
        value = sheet.take(key) if isinstance(sheet.rest.get(key), str) else None
        if value is not None and value not in usual:
            sheet.found[ours] = value
            sheet.found.pop("data_format", None)  # the columns tell it


def put_pair(sheet: Sheet, question: list[str], answer: str | None) -> None:
    """Set the columns of questions, which are joined, and of answers; if only one of these is named, the other has Alpaca's name."""
    sheet.put(
        prompt_column=",".join(question) or ("instruction" if answer else None),
        completion_column=answer or ("output" if question else None),
    )


def put_turn_names(sheet: Sheet, fields: Mapping[str, Any], roles: Mapping[str, Any], key: str) -> None:
    """Set the names in the data of a turn's fields and roles, unless we recognize them; `key` is left out if we cannot."""
    parts = [f"{ours}={theirs}" for ours, theirs in fields.items() if theirs not in FIELDS_OF_TURNS[ours]]
    for ours, theirs in roles.items():
        names = theirs if isinstance(theirs, list) else [theirs]
        parts += [f"{ours}={name}" for name in names if str(name).lower() not in ROLES.get(ours, ())]
    if parts and (any("," in part or part.count("=") > 1 for part in parts) or roles.keys() - ROLES.keys()):
        sheet.refuse(key, "only the roles system, user, assistant and tool have other names", {**fields, **roles})
    else:
        sheet.put(turn_names=",".join(parts) or None)


def take_source(dataset: Sheet, key: str = "path", subset: str = "name") -> dict[str, Any]:
    """Take a set's path, or its one file if the path is only the name of a format; and its subset and split."""
    path, files, revision = dataset.take(key), dataset.rest.get("data_files"), dataset.take("revision")
    files = files if isinstance(files, list) else [files]
    if path in ("json", "csv", "parquet", "text") and len(files) == 1 and files[0]:
        path = str(dataset.take("data_files") and files[0])
    elif path and revision:
        path = f"{path}@{revision}"
    return {"path": path, "subset": dataset.take(subset), "split": dataset.take("split")}


def read_sets(
    sheet: Sheet, keys: Mapping[str, Mapping[str, str]], read: Callable[[Sheet, str], list[dict[str, Any]]]
) -> None:
    """Set the data from all data sets that a file names, each with its own form.

    Args:
        sheet: of the file.
        keys: of a set, or of a list of them, each a mapping or only its path -> options of these sets.
        read: sets what the records of one are read with in a sheet of its own; returns path and options of it or of its splits, as
            `source_text` takes them. The text is the set's key.

    Raises:
        InputError: a set is neither a mapping nor a text.
    """
    objective = {name: sheet.found[name] for name in ("objective", "data_format") if name in sheet.found}
    sources, ways = list[dict[str, Any]](), list[dict[str, Any]]()
    for key, options in keys.items():
        asked = sheet.take(key)
        for one in asked if isinstance(asked, list) else [] if asked is None else [asked]:
            if not isinstance(one, dict | str):
                raise sheet.refusal(f"{key} has no mappings with a path; fix the file")
            own = sheet.within({"path": one} if isinstance(one, str) else one, key, found=dict(objective))
            of_one = [{**source, **options} for source in read(own, key)]
            sources += of_one
            ways += [{name: value for name, value in own.found.items() if name != "objective"} for _ in of_one]
    if not sources:
        return
    sheet.found.pop("data_format", None)
    if all(way == ways[0] for way in ways):
        sheet.found |= ways[0]
    else:
        templates = {way.pop("chat_template", None) for way in ways}
        sheet.put(chat_template=next(iter(templates)) if len(templates) == 1 else None)
        if len(templates) > 1:
            names = " and ".join(sorted(map(str, templates)))
            sheet.refuse(next(iter(keys)), "sets with unlike chat templates; train them in two runs", names)
        for source, way in zip(sources, ways, strict=True):
            source |= {name: value for name, value in way.items() if value != "auto"}
    if all(source.get("path") for source in sources):
        known = [{key: value for key, value in one.items() if value not in (None, "train")} for one in sources]
        sheet.found["data"] = ",".join(map(source_text, known))


# Preferences, and answers that are sampled

# Other trainers' names of what is trained toward -> our objective, with the name of its loss if that is not the usual one.
RL_OF_AXOLOTL = {
    "dpo": ("dpo", None), "ipo": ("dpo", "ipo"), "orpo": ("orpo", None), "simpo": ("simpo", None), "kto": ("kto", None),
    "grpo": ("grpo", None),
}  # fmt: skip
STAGES_OF_LLAMA_FACTORY = {"sft": "sft", "pt": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto"}
PREFERENCE_LOSSES_OF_LLAMA_FACTORY = {
    "sigmoid": ("dpo", None), "hinge": ("dpo", "hinge"), "ipo": ("dpo", "ipo"), "orpo": ("orpo", None),
    "simpo": ("simpo", None), "kto_pair": ("kto", None),
}  # fmt: skip
MODES_OF_MLX_LM_LORA = {
    "sft": "sft", "dpo": "dpo", "orpo": "orpo", "cpo": "cpo", "grpo": "grpo", "normal": "sft",
}  # fmt: skip
LOSSES_OF_TORCHTUNE = {"DPOLoss": "dpo"}
# By our objective; its usual one is ours.
LOSSES_OF_MLX_LM_LORA = {"dpo": {"sigmoid": None, "hinge": "hinge", "ipo": "ipo"}, "cpo": {"sigmoid": None}}


def trains_on_chats(sheet: Sheet) -> bool:
    """Return whether a file asks for training on the answers in the data."""
    return sheet.found.get("objective", "sft") in IMITATION


def read_prompts_trained(sheet: Sheet, key: str) -> None:
    """Set mask_prompt, the opposite of `key`; preferences only compare answers, so there `false` has no effect."""
    if trains_on_chats(sheet) and key in sheet.rest:
        sheet.found["mask_prompt"] = not sheet.switch(key)
    sheet.leave(key)


def put_objective(sheet: Sheet, objective: str, options: Mapping[str, str]) -> None:
    """Set the objective and those of the options, key -> ours, that belong to it; the others are reported as left out."""
    found = sheet.found
    found["objective"] = objective
    sheet.copy({theirs: name for theirs, name in options.items() if objective in OWNERS[name]})
    sheet.take("precompute_ref_log_probs")  # always done here
    if objective == "simpo" and "cpo_alpha" in options:  # where it is 1 unless the file has it
        sheet.rest.setdefault("cpo_alpha", 1)
    if objective != "dpo":
        return
    losses, weights = texts(found.get("loss_type", "sigmoid")), texts(found.get("loss_weights"))
    if found.get("label_smoothing") and not set(losses) & set(SMOOTHED):
        key = next(theirs for theirs, name in options.items() if name == "label_smoothing")
        sheet.refuse(key, f"of dpo's losses only {', '.join(SMOOTHED)} have it", found.pop("label_smoothing"))
    if weight := sum(
        sheet.number(key) or 0 for key in ("rpo_alpha", "pref_ftx")
    ):  # RPO adds the chosen answers' likelihood
        found["loss_type"] = ",".join([*losses, "sft"])
        found["loss_weights"] = ",".join([*(weights or ["1"] * len(losses)), str(weight)])


def read_reference(sheet: Sheet, model: Any, reference: str) -> None:
    """Drop a reference that is the model itself; refuse any other, because the run would then train toward another goal."""
    sheet.drop({reference: (model,)})
    if sheet.found["objective"] in OWNERS["reference_adapter"]:
        sheet.refuse(reference, "it is --model itself or an adapter on it (--reference-adapter); leave it out")
    sheet.leave(reference)


def turn_off_dropout(sheet: Sheet, hint: str = "") -> None:
    """Leave the file's dropout out, because its trainer turns dropout off before it trains; `hint` ends the note."""
    if asked := sheet.found.pop("dropout", None):
        off = f"it is turned off for {sheet.found['objective']}{hint}"
        sheet.notes.append(f"lora_dropout {asked:g}: not used, as there: {off}")


# Sampled answers

# TRL's names of numbers, which Axolotl has under `trl:`.
NUMBERS = {
    "num_generations": "group_size",
    "max_completion_length": "max_new_tokens",
    "temperature": "temp",
    "top_p": "top_p",
    "min_p": "min_p",
    "epsilon": "epsilon",
    "epsilon_high": "epsilon_high",
    "beta": "kl_beta",
    "num_iterations": "updates_per_rollout",
}
WHOLE_ROLLOUT = ("steps_per_generation", "generation_batch_size")
LOSSES = {"grpo": "grpo", "bnpo": "bnpo", "dapo": "dapo", "dr_grpo": "dr_grpo"}
LEVELS = {"token": None, "sequence": "gspo"}  # a ratio of whole answers is what we call gspo
SCALES = {"group": "group", "batch": "batch", "none": "none", "True": "group", "False": "none"}
# Reward functions of TRL -> ours with the same value.
READY = {
    "think_format_reward": r"regex:(?sm)\A<think>(?!.*<think>)(.*?)</think>.*$",
    "accuracy_reward": "math-verify",
}


def put_sampling(sheet: Sheet, objective: str, numbers: Mapping[str, str] = NUMBERS, loss: str = "loss_type") -> None:
    """Set the objective, grpo or rloo, its numbers, key -> ours, and grpo's loss, which has the key `loss`."""
    sheet.found["objective"] = objective
    sheet.copy(numbers)
    sheet.put(mask_truncated=sheet.switch("mask_truncated_completions") or None)
    # Intervals that end with the last update on the same answers, where the file leaves them to us.
    updates = sheet.told("updates_per_rollout") or 1
    if updates > 1:
        sheet.assume(save_every=-(-100 // updates) * updates, steps_per_eval=-(-200 // updates) * updates)
    if objective != "grpo":
        return
    asked, level = sheet.one_of(loss, LOSSES), sheet.one_of("importance_sampling_level", LEVELS)
    sheet.put(grpo_loss=level or asked, scale_rewards=sheet.one_of("scale_rewards", SCALES))
    if level and asked != "grpo":
        sheet.notes.append(
            f"importance_sampling_level sequence: --grpo-loss gspo, which takes every answer once, as {loss} grpo does"
        )


def put_rewards(sheet: Sheet, functions: Mapping[str, str | None], key: str) -> None:
    """Set the rewards and their weights; all of them or none, because a run without one has another goal.

    Args:
        sheet: has the weights.
        functions: their name, given as `key`, -> ours, or None if there is none.
        key: for messages.
    """
    weights = sheet.take("reward_weights")
    if foreign := ", ".join(name for name, ours in functions.items() if ours is None):
        sheet.refuse(key, "no function of a file, and no reward of docs/reward-functions.md", foreign, "reward")
    elif functions:
        many = texts(weights.strip("[]") if isinstance(weights, str) else weights)
        sheet.put(reward=",".join(filter(None, functions.values())), reward_weights=",".join(many) or None)


def rewards_of_paths(sheet: Sheet) -> dict[str, str | None]:
    """Take reward functions by import path, my.rewards.f, as my/rewards.py:f; TRL's own become ours or None."""
    found: dict[str, str | None] = {}
    for name in texts(sheet.take("reward_funcs")):
        module, _, function = name.rpartition(".")
        found[name] = f"{module.replace('.', '/')}.py:{function}" if module else READY.get(name)
    return found


def read_prompts(sheet: Sheet) -> None:
    """Set a batch's prompts, from the answers of a micro-batch and accumulation, and the longest prompt.

    Raises:
        InputError: the answers of a step are no whole groups.
    """
    found, group = sheet.found, max(1, sheet.told("group_size"))
    rows = found.pop("batch_size", None) or sheet.defaults["batch_size"]
    steps = found["grad_accumulation_steps"] = found.get("grad_accumulation_steps") or 1
    answers = rows * steps
    if "batch_size" not in sheet.flags:  # else it is in prompts: nothing to convert
        if answers % group or not answers:
            raise sheet.refusal(
                f"{sheet.keys.get('batch_size', 'rows')} {rows} x gradient_accumulation_steps {steps}: {answers} answers in a step "
                f"cannot be divided into groups of {group}; fix the file, or give --batch-size in prompts"
            )
        prompts = (1, answers // group) if rows % group else (rows // group, steps)
        found |= dict(zip(("batch_size", "grad_accumulation_steps"), prompts, strict=True))
        said = f"batch_size {prompts[0]}, grad_accumulation_steps {prompts[1]}"
        sheet.notes.append(f"{sheet.keys.get('batch_size', 'rows')} {rows}: answers there, prompts here: {said}")
    sheet.drop(dict(zip(WHOLE_ROLLOUT, ((steps,), (answers,)), strict=True)))
    sheet.forget("max_seq_length")
    sheet.leave(*PACKING)
    longest = sheet.number("max_prompt_length")
    sheet.put(max_seq_length=longest)
    if longest is not None and longest < UNCUT:
        sheet.notes.append(f"max_prompt_length {longest}: longer prompts are left out, not cut")
    # Of answers, which are counted otherwise here.
    sheet.defaults = {
        name: value for name, value in sheet.defaults.items() if name not in ("batch_size", "max_seq_length")
    }
