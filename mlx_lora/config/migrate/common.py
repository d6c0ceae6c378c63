"""What the trainers' tables share: a file while it is read, and the topics that the files of several trainers have.

A trainer is a `Dialect`: a table of names, and a few functions for what a table cannot say. Axolotl, LLaMA-Factory and TRL
all use transformers' trainer and PEFT, so that most of what they have differs in its names only (`Names`).

Each key of a file is translated, or changes no result, or is refused with what it would change. So is a key that is not known here.

TRL and Axolotl count answers in a batch, of which those to one prompt are neighbors; here a batch is counted in prompts. A
reward function is named by its import path there, and by its file here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_lora.config.fields import source_text
from mlx_lora.config.objectives import IMITATION, SAMPLING, SMOOTHED
from mlx_lora.config.presets import ADAMW
from mlx_lora.config.rules import OWNERS
from mlx_lora.config.settings import LOGGERS, other_names
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
}  # fmt: skip
UNKNOWN = "not known here; remove it if it changes no result"


def changes_nothing(key: str) -> bool:
    """Tell whether a key changes no result."""
    return key in HARMLESS or (key.startswith(BEGINNINGS) and key not in CHANGES)


@dataclass
class Sheet:
    """One file, or a mapping in it, while the functions of its trainer read it.

    Attributes:
        file: its name, for errors.
        rest: keys that have not been read yet.
        flags: settings given as flags, which override the file; see `told`.
        prefix: of a mapping's keys in messages, such as `trl.`.
        found: our settings, with values from the file; a mapping writes into those of its file.
        assumed: those of `found` that the file leaves out, with its trainer's defaults.
        notes: what is said in other words here, one line each.
        harmless: keys that change no result.
        refused: keys that change it in a way that is not here, each with value and reason.
    """

    file: str
    rest: dict[str, Any]
    flags: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    harmless: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def take(self, key: str) -> Any:
        """Return a key's value and mark it as read; None if the file does not set it."""
        return self.rest.pop(key, None)

    def told(self, name: str, default: Any = None) -> Any:
        """Return one of our settings as the run will have it: the flag's value, or else the file's.

        What is computed from a setting (alpha = 2 * rank) must follow the flag, or a flag would change its meaning.
        """
        return self.flags.get(name, self.found.get(name, default))

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

    def copy(self, names: Mapping[str, str], read: Callable[[Sheet, str], Any] = take) -> None:
        """Set ours from those keys of a table, key -> setting, that the file has; `read` takes a value of one type."""
        for key, name in names.items():
            if key in self.rest:
                self.found[name] = read(self, key)

    def part(self, key: str) -> Sheet:
        """Take a mapping as a sheet, to read its keys; an empty one if it is left out.

        Raises:
            InputError: it is not a mapping.
        """
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(f"{key} {value!r}: not a mapping of names to values; fix the file")
        return self.within(filled(value or {}), key)

    def within(self, rest: dict[str, Any], key: str) -> Sheet:
        """Return a sheet of a mapping in this one."""
        prefix = f"{self.prefix}{key}."
        return replace(self, rest=rest, prefix=prefix)

    def assume(self, **values: Any) -> None:
        """Set ours to the other trainer's defaults, unless the file set them, by either of two names (epochs or iters)."""
        for name, value in values.items():
            if name not in self.found and self.found.keys().isdisjoint(other_names(name)):
                self.found[name] = self.assumed[name] = value

    def drop(self, usual: Mapping[str, Collection[Any]]) -> None:
        """Drop the keys of a table that have one of its values, because that is what we do without being told."""
        self.rest = {key: value for key, value in self.rest.items() if value not in usual.get(key, ())}

    def leave(self, *keys: str) -> None:
        """Leave out keys that have no effect in this run, if the file sets them."""
        self.harmless += [self.prefix + key for key in keys if self.take(key) is not None]

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
            if changes_nothing(key):
                self.leave(key)
            elif self.rest[key] is not False and self.rest[key] != 0:
                self.refuse(key, CHANGES.get(key, UNKNOWN))

    def note(self, text: str) -> None:
        """Note that something has another meaning here."""
        self.notes.append(text)

    def refusal(self, problem: str) -> InputError:
        """Return the error to raise if the file cannot be migrated."""
        return InputError(f"--config {self.file}: {problem}")


@dataclass(frozen=True)
class Dialect:
    """One trainer's format of settings files.

    Attributes:
        name: of the trainer.
        recognizes: tells whether a file is this trainer's.
        rules: functions that each read the keys of one topic; they run in order.
        names: key -> our setting with the same meaning; read after the rules.
        defaults: our setting -> the trainer's default, if it differs from ours and changes the result.
        nulls: key -> what null means, if that is not the trainer's default.
    """

    name: str
    recognizes: Callable[[Mapping[str, Any]], bool]
    rules: tuple[Callable[[Sheet], None], ...]
    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    nulls: Mapping[str, Any] = field(default_factory=dict)

    def read(self, content: Mapping[str, Any], file: str, flags: Mapping[str, Any] | None = None) -> Sheet:
        """Return a file of this dialect, read.

        Args:
            content: of the file.
            file: its name, for messages.
            flags: settings given as flags.

        Raises:
            InputError: it asks for another kind of training, or has an invalid value.
        """
        sheet = Sheet(
            file,
            filled(content) | {key: off for key, off in self.nulls.items() if content.get(key, off) in (None, "None")},
            flags or {},
        )
        for rule in self.rules:
            rule(sheet)
        sheet.copy(self.names)
        sheet.assume(**self.defaults)
        sheet.sort_rest()
        return sheet


def filled(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping without its empty keys, such as `wandb_project:`."""
    return {key: value for key, value in content.items() if value is not None and value not in ("", [], {})}


# transformers' trainer and PEFT


@dataclass(frozen=True)
class Names:
    """What a trainer calls the settings of transformers' trainer and of PEFT, and its defaults for some of them.

    Attributes:
        length: key of the longest sequence in tokens.
        held_out: key of the share of rows to validate on.
        targets, modules_to_save: keys of the layers to adapt, and of those to train in full.
        all_layers: the value of `targets` that means all linear layers.
        rows: key of the rows per micro-batch.
        packing: key that is true if rows are packed to the longest sequence.
        default_rows, default_length, default_epochs: what the trainer does without the key.
    """

    length: str
    held_out: str
    targets: str
    modules_to_save: str
    all_layers: str
    default_length: int
    epochs: str = "num_train_epochs"
    rows: str = "per_device_train_batch_size"
    packing: str = "packing"
    schedule: str = "lr_scheduler_type"
    optimizer: str = "optim"
    default_rows: int = 8
    default_epochs: float = 3.0


UNCUT = 10**8  # tokens, more than a row has: nothing is cut
# Keys with the same meaning in each of these trainers.
SHARED = {
    "trust_remote_code": "trust_remote_code", "learning_rate": "learning_rate", "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm", "gradient_accumulation_steps": "grad_accumulation_steps",
    "output_dir": "adapter_path", "seed": "seed",
}  # fmt: skip
# With one cycle, which is the default, restarts are none.
SCHEDULES = {
    "cosine": "cosine", "cosine_with_restarts": "cosine", "cosine_with_min_lr": "cosine", "linear": "linear", "constant": "constant",
    "constant_with_warmup": "constant",
}  # fmt: skip
# A schedule's own numbers, and Adam's, which have the same names here and in transformers, or Axolotl's.
NUMBERS_OF_RATE = {
    "min_lr_rate": "min_lr_ratio", "cosine_min_lr_ratio": "min_lr_ratio", "adam_beta1": "adam_beta1", "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon", "adam_eps": "adam_epsilon",
}  # fmt: skip
EXACT_OPTIMIZERS = {"sgd": "sgd", "adafactor": "adafactor", "muon": "muon"}
INTERVALS = {"logging_steps": "steps_per_report", "eval_steps": "steps_per_eval", "save_steps": "save_every"}
PER_EPOCH = {"evals_per_epoch": "steps_per_eval", "saves_per_epoch": "save_every"}
# "no" is 0 here, and "steps" is what we do.
STRATEGIES = {"eval_strategy": "val_batches", "evaluation_strategy": "val_batches", "save_strategy": "save_every"}
# Values that say what is done here.
USUAL = {
    "metric_for_best_model": ("eval_loss", "loss"), "greater_is_better": (False,), "train_sampling_strategy": ("random", "group_by_length"),
}  # fmt: skip
# Chat templates that we have with the same name and text.
TEMPLATES = ("alpaca", "chatml", "llama3")
HALF_PRECISION = ("bf16", "fp16", "bfloat16", "float16", "pure_bf16")
BITS = {"load_in_8bit": 8, "load_in_4bit": 4}
# If several methods are on, the first of these is used.
PRECEDENCE = ("full", "dora", "pissa", "relora", "lora-plus", "rslora")
# The last part of a regular expression on layer names, such as (up|down)_proj; ([qkv]_proj) is not supported.
LAST_NAMES = re.compile(r"(?:.*[.)*+])?(?P<before>\w*)\((?P<names>\w+(?:\|\w+)*)\)(?P<after>\w*)\$?")


def read_loop(sheet: Sheet, names: Names) -> None:
    """Set length, batch, schedule, optimizer, held-out rows, intervals and dtype."""
    steps, passes = sheet.number("max_steps"), sheet.number(names.epochs)
    if steps is not None and steps > 0:  # it overrides epochs there too
        sheet.found["iters"] = steps
    elif passes is not None:
        sheet.found["epochs"] = passes
    sheet.assume(epochs=names.default_epochs)
    read_rows(sheet, names)
    read_warmup(sheet, names.schedule)
    read_optimizer(sheet, names.optimizer)
    share = sheet.number(names.held_out)
    if share is not None:
        sheet.found["valid_fraction"] = share
    sheet.assume(valid_fraction=0.0)
    read_intervals(sheet)
    read_loggers(sheet)
    if "gradient_checkpointing" in sheet.rest:  # or a way of it, such as unsloth
        sheet.found["grad_checkpoint"] = bool(sheet.take("gradient_checkpointing"))
    if sheet.switch("float32"):
        sheet.found["dtype"] = "float32"
    sheet.leave(*HALF_PRECISION)  # that of the machine is used
    same = ("early_stopping_patience", "early_stopping_threshold")
    sheet.copy(dict(zip(same, same, strict=True)), Sheet.number)
    sheet.drop(USUAL)
    if sheet.found.get("early_stopping_patience") or sheet.switch("load_best_model_at_end"):
        sheet.found["keep_best"] = True


def read_batch(sheet: Sheet, names: Names) -> None:
    """Set the longest sequence and the rows per micro-batch; packed rows become a budget of as many tokens."""
    count, tokens, packed = sheet.number(names.rows), sheet.number(names.length), sheet.switch(names.packing)
    if tokens is not None:
        sheet.found["max_seq_length"] = tokens
    sheet.assume(max_seq_length=names.default_length)
    if packed:
        budget = (count or names.default_rows) * sheet.told("max_seq_length")
        sheet.found["batch_tokens"] = budget
        sheet.note(
            f"{names.packing}: rows of similar length share a batch of {budget} tokens instead; rows are not joined"
        )
    elif count is not None:
        sheet.found["batch_size"] = count
    else:
        sheet.assume(batch_size=names.default_rows)


def read_warmup(sheet: Sheet, schedule: str) -> None:
    """Set schedule and warm-up; a number of steps overrides a fraction of them, as in transformers, and the first rate is 0."""
    steps, share = sheet.number("warmup_steps"), sheet.number("warmup_ratio")
    name = hashable(sheet.take(schedule))
    if isinstance(numbers := sheet.rest.get("lr_scheduler_kwargs"), dict) and numbers.keys() <= {"min_lr_rate"}:
        sheet.rest |= sheet.take("lr_scheduler_kwargs")
    warmup = steps if steps or share is None else share
    if warmup is not None:
        sheet.found["warmup"] = warmup
    if name in SCHEDULES:
        sheet.found["lr_schedule"] = SCHEDULES[name]
    elif name is not None:
        sheet.refuse(schedule, f"only {', '.join(SCHEDULES)} are here", name, "lr_schedule")
    if sheet.told("lr_schedule") == name == "constant":  # it has no warm-up in transformers, whatever the file says
        sheet.found["warmup"] = 0
    elif sheet.told("warmup"):
        sheet.found |= {"warmup_init": 0} | ({"warmup_rounding": "up"} if 0 < float(warmup or 0) < 1 else {})
    sheet.copy(NUMBERS_OF_RATE, Sheet.number)


def read_optimizer(sheet: Sheet, key: str) -> None:
    """Set the optimizer; the 8-bit and paged variants of AdamW only differ in how they store their state."""
    name = sheet.take(key)
    if name is None:
        return
    if ADAMW.fullmatch(str(name)):
        sheet.found["optimizer"] = "adamw"
        if re.search("4bit|8bit|paged", str(name)):
            sheet.note(f"{key} {name}: AdamW, with its state in float32, which is small for an adapter")
    elif name in EXACT_OPTIMIZERS:
        sheet.found["optimizer"] = name
    else:
        sheet.refuse(key, f"only AdamW and {', '.join(EXACT_OPTIMIZERS)} are here", name, "optimizer")


def read_intervals(sheet: Sheet) -> None:
    """Set the steps between reports, validations and checkpoints, or the share of the run, as transformers has it, too."""
    epochs = sheet.found.get("epochs")
    for key, name in INTERVALS.items():
        if (steps := sheet.number(key)) is not None:
            sheet.found[name] = max(1, steps) if name == "steps_per_report" else steps
    for key, name in PER_EPOCH.items():
        if (times := sheet.number(key)) is not None and name not in sheet.found:
            sheet.found |= {"val_batches": 0} if not times and name == "steps_per_eval" else {}
            share = 1 / (times * float(epochs or 1)) if times else 0
            sheet.found[name] = share if share < 1 else 0  # the whole run: at its end
    for key, name in STRATEGIES.items():
        when = sheet.take(key)
        if when in ("no", False):  # YAML 1.1 reads an unquoted no as false
            sheet.found[name] = 0
        elif when == "epoch":
            every = "save_every" if name == "save_every" else "steps_per_eval"
            sheet.found[every] = 1 / float(epochs or 1) if float(epochs or 1) > 1 else 0
        elif when not in (None, "steps"):
            sheet.harmless.append(key)


def read_layers(sheet: Sheet, names: Names) -> None:
    """Set the layers to adapt, and the modules that are trained in full with them."""
    read_targets(sheet, names.targets, names.all_layers)
    if sheet.rest.get(names.modules_to_save):
        sheet.found["modules_to_save"] = sheet.take(names.modules_to_save)


def read_targets(sheet: Sheet, key: str, all_layers: str) -> None:
    """Set the target layers from names, or from the last part of a regular expression."""
    asked = sheet.take(key)
    if asked in (None, []):
        return
    names = asked if isinstance(asked, list) else [part.strip() for part in str(asked).split(",")]
    if all_layers in names:
        sheet.found["target_modules"] = "all-linear"
    elif all(re.fullmatch(r"[\w.]+", str(name)) for name in names):
        sheet.found["target_modules"] = ",".join(map(str, names))
    elif match := LAST_NAMES.fullmatch(str(asked[0] if isinstance(asked, list) else asked)):
        layers = ",".join(match["before"] + name + match["after"] for name in match["names"].split("|"))
        sheet.found["target_modules"] = layers
        sheet.note(f"{key}: a regular expression, read as {layers} in all modules of the language model")
    else:
        sheet.refuse(key, "a regular expression; give names and patterns as --target-modules", asked, "target_modules")


def read_template(sheet: Sheet, key: str, model: Any, exact: Mapping[str, str | None]) -> None:
    """Set the chat template: ours if it has the same text, or else the model's own, which one of its family's name means.

    Args:
        sheet: of the file.
        key: of the template's name.
        model: that is trained; empty: a template of its family may have another text.
        exact: names of the trainer's templates -> ours; None: what is done without a name.
    """
    name = sheet.take(key)
    if name is None:
        return
    family = re.match("[a-z]*", str(name).lower())
    if name in exact or name in TEMPLATES:
        ours = exact.get(name, name)
        sheet.found |= {"chat_template": ours} if ours else {}
    elif re.fullmatch(r".*\.jinja2?", str(name)):
        sheet.found["chat_template"] = name
    elif family and family[0] and family[0] in str(model).lower():
        sheet.found["chat_template"] = "own"
    else:
        sheet.refuse(
            key,
            f"no text of that name is here{f', nor is it that of {model}' * bool(model)}; give its Jinja file",
            name,
            "chat_template",
        )


def choose_method(sheet: Sheet, switches: Mapping[str, str], others: Mapping[str, str | None]) -> None:
    """Set the method from the switches that are on; we have one method, so others are left out.

    An exception is rsLoRA, which only scales by alpha / sqrt(r) instead of alpha / r: together with another method, it
    becomes that method's alpha.

    Args:
        sheet: already has rank and alpha.
        switches: method -> the key that is true for it.
        others: method -> the key that turned it on in another way, or None.
    """
    ratio = sheet.number("loraplus_lr_ratio")
    on = {method: key for method, key in switches.items() if sheet.switch(key)}
    on |= {method: key for method, key in others.items() if key}
    on |= {"lora-plus": "loraplus_lr_ratio"} if ratio is not None else {}
    method = sheet.found["method"] = next((name for name in PRECEDENCE if name in on), "lora")
    for other, key in on.items():
        if other == method:
            continue
        rank, alpha = sheet.told("rank"), sheet.found.get("alpha")
        # With the flag --method rslora, the method itself scales so.
        if other == "rslora" and sheet.told("method") not in ("full", "rslora") and rank and alpha:
            sheet.found["alpha"] = alpha * rank**0.5
            sheet.note(
                f"{key}: with {sheet.told('method')}, alpha {alpha:g} / sqrt({rank}) becomes alpha {sheet.found['alpha']:g} / {rank}"
            )
        else:
            sheet.refuse(key, f"with {method}; a run has one method", True, "method")
    if method == "lora-plus":
        sheet.found["loraplus_lr_ratio"] = ratio
    elif method == "full":
        sheet.leave("lora_r", "lora_rank", "lora_alpha", "lora_dropout", "lora_modules_to_save", "additional_target")
        sheet.leave("lora_target_modules", "lora_target", "lora_target_linear")
        sheet.found["target_modules"] = "*"


def read_bits(sheet: Sheet, bits: Mapping[str, int] = BITS) -> None:
    """Set the bits that the base is quantized to from a switch for each number of them."""
    for key, number in bits.items():
        if sheet.switch(key):
            put_bits(sheet, key, number)


def put_bits(sheet: Sheet, key: str, bits: Any) -> None:
    """Set the bits that the base is quantized to."""
    sheet.found["bits"] = bits
    sheet.note(f"{key}: {bits} bits by MLX's affine mode, in groups of 64 weights")


def read_loggers(sheet: Sheet) -> None:
    """Set the loggers that are supported; others are left out."""
    asked = sheet.take("report_to")
    names = asked if isinstance(asked, list) else [] if asked is None else [asked]
    if sheet.switch("use_swanlab"):
        names = [*names, "swanlab"]
    if ours := [name for name in names if hashable(name) in LOGGERS]:
        sheet.found["report_to"] = ",".join(ours)
    if any(name not in LOGGERS for name in names):
        sheet.harmless.append("report_to")


# Data


# mlx-lm's key of a column -> our setting, and the columns that need none; mlx-lm itself takes the first.
FEATURES = {
    "prompt_feature": ("prompt_column", ("prompt",)),
    "completion_feature": ("completion_column", ("completion",)),
    "chat_feature": ("chat_column", ("messages",)),
    "text_feature": ("text_column", ("text",)),
}
# Fields and roles of a turn that are recognized by themselves.
USUAL = {
    "role": ("role", "from"),
    "content": ("content", "value"),
    "system": ("system",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "chatgpt"),
    "tool": ("tool", "observation"),
}
ROLES = ("system", "user", "assistant", "tool")


def read_columns(sheet: Sheet, names: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
    """Set our columns from a data set's keys: key -> our setting, and the columns that we recognize without it."""
    for key, (ours, usual) in names.items():
        if isinstance(sheet.rest.get(key), str):
            value = sheet.take(key)
            if value not in usual:
                sheet.found[ours] = value
                sheet.found.pop("data_format", None)  # the columns tell it


def put_turn_names(sheet: Sheet, fields: Mapping[str, Any], roles: Mapping[str, Any], key: str) -> None:
    """Set the names in the data of a turn's fields and roles, unless we recognize them; `key` is left out if we cannot."""
    parts = [f"{ours}={theirs}" for ours, theirs in fields.items() if theirs not in USUAL[ours]]
    for ours, theirs in roles.items():
        names = theirs if isinstance(theirs, list) else [theirs]
        parts += [f"{ours}={name}" for name in names if str(name).lower() not in USUAL.get(ours, ())]
    if not parts:
        return
    if any("," in part or part.count("=") > 1 for part in parts) or not set(roles) <= set(ROLES):
        sheet.refuse(key, "only the roles system, user, assistant and tool have other names", {**fields, **roles})
        return
    before = sheet.found.get("turn_names")
    sheet.found["turn_names"] = ",".join([*([before] if before else []), *parts])


def take_sets(sheet: Sheet, key: str) -> list[dict[str, Any]]:
    """Take a data set, or several in a list, each a mapping or only its path.

    Raises:
        InputError: one is neither.
    """
    asked = sheet.take(key)
    sets = asked if isinstance(asked, list) else [] if asked is None else [asked]
    sets = [{"path": one} if isinstance(one, str) else one for one in sets]
    if not all(isinstance(one, dict) for one in sets):
        raise sheet.refusal(f"{key} has no mappings with a path; fix the file")
    return [filled(one) for one in sets]


def take_path(dataset: Sheet, key: str = "path") -> str | None:
    """Take a set's path, or its one file if the path is only the name of a format."""
    path, files, revision = dataset.take(key), dataset.rest.get("data_files"), dataset.take("revision")
    files = [files] if isinstance(files, str) else files if isinstance(files, list) else []
    if path in ("json", "csv", "parquet", "text") and len(files) == 1:
        return str(dataset.take("data_files") and files[0])
    return f"{path}@{revision}" if path and revision else path


def put_sets(sheet: Sheet, key: str, sources: Sequence[Mapping[str, Any]], ways: Sequence[dict[str, Any]]) -> None:
    """Set the data from several sets.

    Args:
        sheet: of the file.
        key: of the sets.
        sources: path and options of each, as `source_text` takes them.
        ways: settings that the records of each are read with; if they differ, each set has its own.
    """
    if any(way != ways[0] for way in ways):
        templates = {way.pop("chat_template", None) for way in ways}
        if len(templates) > 1:
            sheet.refuse(
                key,
                "sets with unlike chat templates; train them in two runs",
                " and ".join(sorted(map(str, templates))),
            )
        elif template := templates.pop():
            sheet.found["chat_template"] = template
        sources = [
            {**one, **{name: value for name, value in way.items() if value != "auto"}}
            for one, way in zip(sources, ways, strict=True)
        ]
    else:
        sheet.found |= ways[0]
    if all(one.get("path") for one in sources):
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
    "sft": "sft", "normal": "sft", "dpo": "dpo", "orpo": "orpo", "cpo": "cpo", "grpo": "grpo",
}  # fmt: skip
LOSSES_OF_TORCHTUNE = {"DPOLoss": "dpo"}
LOSSES_OF_MLX_LM_LORA = {"dpo": ("sigmoid", "hinge", "ipo"), "cpo": ("sigmoid",)}  # by our objective
LIKELIHOOD = (
    "rpo_alpha",
    "pref_ftx",
)  # keys of the weight of the chosen answers' likelihood that is added to dpo's loss (RPO)
LISTS = ("loss_type", "loss_weights", "reference_adapter")  # not numbers


def trains_on_chats(sheet: Sheet) -> bool:
    """Return whether a file asks for training on the answers in the data."""
    return sheet.found.get("objective", "sft") in IMITATION


def samples(sheet: Sheet) -> bool:
    """Return whether a file asks for training on answers that are sampled and rewarded."""
    return sheet.found.get("objective") in SAMPLING


def read_prompts_trained(sheet: Sheet, key: str) -> None:
    """Set mask_prompt, the opposite of `key`; preferences only compare answers, so there `false` has no effect."""
    if trains_on_chats(sheet) and key in sheet.rest:
        sheet.found["mask_prompt"] = not sheet.switch(key)
    else:
        sheet.leave(key)


def put_objective(sheet: Sheet, objective: str, options: Mapping[str, str]) -> None:
    """Set the objective and those of the options, key -> ours, that belong to it; the others are reported as left out."""
    sheet.found["objective"] = objective
    own = {theirs: name for theirs, name in options.items() if objective in OWNERS[name]}
    for theirs, name in own.items():
        sheet.copy({theirs: name}, Sheet.take if name in LISTS else Sheet.number)
    found, losses = sheet.found, sheet.found.get("loss_type", "sigmoid")
    losses = losses if isinstance(losses, list) else str(losses).split(",")
    if objective == "dpo" and found.get("label_smoothing") and not any(loss in SMOOTHED for loss in losses):
        smoothing = found.pop("label_smoothing")
        key = next(theirs for theirs, name in options.items() if name == "label_smoothing")
        sheet.refuse(key, f"of dpo's losses only {', '.join(SMOOTHED)} have it", smoothing)
    asked = [sheet.number(key) or 0 for key in LIKELIHOOD if key in sheet.rest] if objective == "dpo" else []
    if weight := sum(asked):
        given = found.get("loss_weights")
        weights = [1] * len(losses) if given is None else given if isinstance(given, list) else [given]
        found["loss_type"] = ",".join([*map(str, losses), "sft"])
        found["loss_weights"] = ",".join(map(str, [*weights, weight]))


def read_reference(sheet: Sheet, model: str, reference: str) -> None:
    """Drop a reference that is the model itself; refuse any other, because the run would then train toward another goal."""
    asked = sheet.take(reference)
    if asked is None or asked == sheet.rest.get(model):
        return
    if sheet.found["objective"] in OWNERS["reference_adapter"]:
        raise sheet.refusal(
            f"{reference} {asked}: the reference is --model itself or an adapter on it (--reference-adapter); leave it out"
        )
    sheet.harmless.append(reference)


def turn_off_dropout(sheet: Sheet, hint: str = "") -> None:
    """Leave the file's dropout out, because its trainer turns dropout off before it trains; `hint` ends the note."""
    if asked := sheet.number("lora_dropout"):
        sheet.note(f"lora_dropout {asked:g}: not used, as there: it is turned off for {sheet.found['objective']}{hint}")


def refuse_likelihood(sheet: Sheet, usual: float) -> None:
    """Refuse the likelihood of the chosen answers that TRL adds to SimPO's loss, unless cpo_alpha is 0."""
    asked = sheet.number("cpo_alpha")
    if weight := usual if asked is None else asked:
        sheet.refuse("cpo_alpha", "simpo has no likelihood of chosen answers here; give 0, or use cpo", weight)


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
LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo")
SCALES = {True: "group", "group": "group", "batch": "batch", False: "none", "none": "none"}
# Reward functions of TRL -> ours with the same value.
READY = {
    "think_format_reward": r"regex:(?sm)\A<think>(?!.*<think>)(.*?)</think>.*$",
    "accuracy_reward": "math-verify",
}
WHOLE_ROLLOUT = ("steps_per_generation", "generation_batch_size")


def put_sampling(sheet: Sheet, objective: str, numbers: Mapping[str, str] = NUMBERS, loss: str = "loss_type") -> None:
    """Set the objective, grpo or rloo, its numbers, key -> ours, and grpo's loss, which has the key `loss`."""
    sheet.found["objective"] = objective
    sheet.copy(numbers, Sheet.number)
    if sheet.switch("mask_truncated_completions"):
        sheet.found["mask_truncated"] = True
    if objective != "grpo":
        return
    asked, level = sheet.take(loss), sheet.take("importance_sampling_level")
    if asked is not None and asked not in LOSSES:
        raise sheet.refusal(f"{loss} {asked}: only {', '.join(LOSSES)} are supported")
    if level not in (None, "token", "sequence"):
        raise sheet.refusal(f"importance_sampling_level {level}: only token and sequence are supported")
    if level == "sequence":  # a ratio of whole answers is what we call gspo
        sheet.found["grpo_loss"] = "gspo"
        if asked != "grpo":
            sheet.note(
                f"importance_sampling_level sequence: --grpo-loss gspo, which takes every answer once, as {loss} grpo does"
            )
    elif asked is not None:
        sheet.found["grpo_loss"] = asked
    if "scale_rewards" in sheet.rest:
        scale = sheet.take("scale_rewards")
        if not isinstance(scale, bool | str) or scale not in SCALES:
            raise sheet.refusal(f"scale_rewards {scale}: only group, batch and none are supported; fix the file")
        sheet.found["scale_rewards"] = SCALES[scale]


def put_rewards(sheet: Sheet, functions: Mapping[str, str | None], key: str) -> None:
    """Set the rewards and their weights; all of them or none, because a run without one has another goal.

    Args:
        sheet: has the weights.
        functions: their name, given as `key`, -> ours, or None if there is none.
        key: for messages.
    """
    weights = sheet.take("reward_weights")
    if not functions:
        return
    if foreign := [name for name, ours in functions.items() if ours is None]:
        sheet.refuse(
            key, "no function in a file of yours, and no reward of docs/rewards.md", ", ".join(foreign), "reward"
        )
        return
    sheet.found["reward"] = ",".join(filter(None, functions.values()))
    if weights is not None:
        many = weights if isinstance(weights, list) else str(weights).strip("[]").split(",")
        sheet.found["reward_weights"] = ",".join(str(weight).strip() for weight in many)


def texts(asked: Any) -> list[str]:
    """Return the names in a list, or in a text that separates them with commas."""
    names = asked if isinstance(asked, list) else [] if asked is None else str(asked).split(",")
    return [str(name).strip() for name in names]


def rewards_of_paths(sheet: Sheet) -> dict[str, str | None]:
    """Take reward functions by import path, my.rewards.f, as my/rewards.py:f; TRL's own become ours or None."""
    found: dict[str, str | None] = {}
    for name in texts(sheet.take("reward_funcs")):
        module, _, function = name.rpartition(".")
        found[name] = f"{module.replace('.', '/')}.py:{function}" if module else READY.get(name)
    return found


def read_rows(sheet: Sheet, names: Names) -> None:
    """Set a batch's rows; or its prompts, from the answers of a micro-batch and accumulation, and the longest prompt."""
    if not samples(sheet):
        read_batch(sheet, names)
        return
    count, group = sheet.number(names.rows) or names.default_rows, max(1, sheet.told("group_size"))
    known = sheet.found.get("grad_accumulation_steps")  # Axolotl may say it by the rows of a whole step
    accumulation = sheet.number("gradient_accumulation_steps") or known or 1
    if "batch_size" in sheet.flags:  # in prompts: nothing to convert
        sheet.found["grad_accumulation_steps"] = accumulation
    else:
        prompts, rest = divmod(count * accumulation, group)
        if rest or not prompts:
            raise sheet.refusal(
                f"{names.rows} {count} x gradient_accumulation_steps {accumulation}: {count * accumulation} answers in a step "
                f"cannot be divided into groups of {group}; fix the file, or give --batch-size in prompts"
            )
        whole = count % group == 0
        rows = sheet.found["batch_size"] = count // group if whole else 1
        steps = sheet.found["grad_accumulation_steps"] = accumulation if whole else prompts
        sheet.note(
            f"{names.rows} {count}: answers there, prompts here: batch_size {rows}, grad_accumulation_steps {steps}"
        )
    for key in WHOLE_ROLLOUT:
        asked, usual = sheet.take(key), accumulation if key == "steps_per_generation" else count * accumulation
        if asked not in (None, usual):
            sheet.refuse(key, "answers are sampled for one step at a time here", asked)
    longest = sheet.number("max_prompt_length")
    if longest is not None:
        sheet.found["max_seq_length"] = longest
        if longest < UNCUT:
            sheet.note(f"max_prompt_length {longest}: longer prompts are left out, not cut")
    sheet.leave(names.length, names.packing)


def keep_cycles(sheet: Sheet) -> None:
    """Set intervals that end with the last update on the same answers, where the file leaves them to us."""
    updates = sheet.told("updates_per_rollout") or 1
    if updates > 1:
        for name, usual in (("save_every", 100), ("steps_per_eval", 200)):
            sheet.assume(**{name: -(-usual // updates) * updates})
