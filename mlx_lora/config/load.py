"""Turn flags and the file of `--config` into checked settings: flags override the file, which overrides the defaults.

The file is ours, or with `migrate/` another trainer's. A bare word names a recipe: a settings file with its data that comes
with the package, found from any folder. Names of settings in PEFT, TRL, transformers, Axolotl, LLaMA-Factory and Unsloth are
translated into ours: `migrate/` reads whole files of theirs, and errors about unknown flags and keys give advice.

A file may be a stranger's, and so may a run folder. So a setting in a file that runs Python (`runs` in its row) counts only if the
command line has it too, or --allow-code, or if a person agreed. What was agreed to is kept in the cache, outside of the folders
that it is about: code/ has an empty file for each such setting of a file, which is named by a check sum. It also has those of the
runs that were started here, so that they go on without a question.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from mlx_lora.config.fields import flag_of, read_value, row_of
from mlx_lora.config.presets import ADAMW
from mlx_lora.config.rules import is_verifiers, settings_problems
from mlx_lora.config.settings import FIELDS, ROWS, SECTIONS, ModelSettings, ServeSettings, TrainSettings, decided_by
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, sha256_of
from mlx_lora.utils.parsing import MAX_YAML_CHARACTERS, parse_yaml
from mlx_lora.utils.text import closest

log = logging.getLogger(__name__)

_NAMES = {
    "model": "model_name_or_path base_model model_name model_id model_path pretrained_model_name_or_path",
    "revision": "model_revision revision_of_model",
    "bits": "quantization_bit q_bits quantize_bits",
    "dtype": "torch_dtype compute_dtype precision",
    "data": "dataset datasets dataset_name dataset_path data_path train_file train_data hf_dataset",
    "data_format": "dataset_type dataset_format",
    "prompt_column": "prompt_feature prompt_key field_prompt field_instruction instruction_column question_column input_column",
    "completion_column": "completion_feature completion_key response_column answer_column output_column field_output",
    "system_column": "field_system system_key",
    "chat_column": "chat_feature messages_column conversation_column field_messages messages_key",
    "text_column": "text_feature dataset_text_field text_field",
    "max_seq_length": "max_length max_seq_len seq_length sequence_len cutoff_len block_size model_max_length",
    "mask_prompt": "completion_only_loss assistant_only_loss train_on_responses_only",
    "chat_template": "template",
    "valid_fraction": "val_set_size val_size test_size eval_split",
    "method": "fine_tune_type train_type finetuning_type",
    "rank": "lora_r lora_rank r lora_dim",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "bias": "lora_bias",
    "target_modules": "lora_target_modules lora_target lora_target_linear lora_modules",
    "modules_to_save": "lora_modules_to_save additional_target",
    "num_layers": "lora_layers layers_to_transform",
    "optimizer": "optim",
    "learning_rate": "lr",
    "lr_schedule": "lr_scheduler lr_scheduler_type scheduler",
    "warmup": "warmup_steps warmup_ratio",
    "max_grad_norm": "grad_clip gradient_clipping clip_grad_norm gradient_clip_val",
    "iters": "max_steps max_iters num_steps num_iters num_training_steps train_steps steps iterations",
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "batch_size": "per_device_train_batch_size micro_batch_size train_batch_size per_device_batch_size",
    "grad_accumulation_steps": "gradient_accumulation_steps gradient_accumulation grad_accum accumulate_grad_batches",
    "grad_checkpoint": "gradient_checkpointing use_gradient_checkpointing activation_checkpointing",
    "memory_budget": "max_memory",
    "steps_per_report": "logging_steps log_every",
    "steps_per_eval": "eval_steps eval_every",
    "save_every": "save_steps",
    "keep": "save_total_limit",
    "keep_best": "load_best_model_at_end",
    "resume": "resume_from_checkpoint",
    "adapter_path": "output_dir output output_path out_dir save_path adapter_name_or_path adapter adapters",
    "project_name": "wandb_project swanlab_project",
    "objective": "train_mode training_mode rl trainer_type",
    "loss_type": "dpo_cpo_loss_type pref_loss dpo_loss_type",
    "loss_weights": "dpo_loss_weights",
    "beta": "pref_beta rl_beta dpo_beta orpo_alpha",
    "label_smoothing": "dpo_label_smoothing",
    "desirable_weight": "kto_chosen_weight kto_desirable_weight",
    "undesirable_weight": "kto_rejected_weight kto_undesirable_weight",
    "reference_adapter": "ref_model_adapters ref_adapter_name",
    "reward": "reward_funcs reward_functions",
    "group_size": "num_generations",
    "max_new_tokens": "max_completion_length",
    "grpo_loss": "grpo_loss_type",
    "mask_truncated": "mask_truncated_completions",
    "updates_per_rollout": "num_iterations",
    "seed": "random_state random_seed",
    "force": "overwrite_output_dir overwrite",
}
# Another trainer's name -> ours.
OTHER_NAMES = {theirs: ours for ours, names in _NAMES.items() for theirs in names.split()}

_FOUR_BITS = "use --bits 4"
_LIKELIHOOD = "use --loss-type sigmoid,sft --loss-weights 1,WEIGHT"
_REFERENCE = "leave it out; the reference is the model at the start of the run, unless you give --reference-adapter"
# Names that are not a setting here -> advice.
_OTHER_WAYS = {
    "load_in_4bit": _FOUR_BITS,
    "load_in_8bit": _FOUR_BITS.replace("4", "8"),
    "use_dora": "use --method dora",
    "use_rslora": "use --method rslora",
    "bf16": "use --dtype bfloat16, which auto chooses on a GPU",
    "fp16": "use --dtype float16",
    "train_on_inputs": "use --no-mask-prompt to train on prompts too",
    "stage": "use --objective; for the stages sft and pt, it is sft",
    "ref_model": _REFERENCE,
    "reference_model_path": _REFERENCE,
    "precompute_ref_log_probs": "leave it out; the reference is always computed before the first step",
    "rpo_alpha": _LIKELIHOOD,
    "pref_ftx": _LIKELIHOOD,
    "length_normalize": "use --loss-type sigmoid_norm",
    "clear_cache_threshold": "use --memory-budget; MLX's buffer cache is a sixteenth of it",
    "fetch_images": "only train and evaluate download pictures; send serve a data URL, or the name of a file of --images-from",
    "push_to_hub": "use mlx-lora export --push-to-hub REPO after the run",
    "hub_model_id": "use mlx-lora export --push-to-hub REPO after the run",
    "wandb": "use --report-to wandb",
    "use_wandb": "use --report-to wandb",
    "tensorboard": "use --report-to tensorboard",
    "draft_model": "leave it out; train with --train-mtp makes a head that drafts tokens",
    "attn_implementation": "leave it out; attention is computed by MLX's own kernels or ours, whichever is faster here",
    "device_map": "leave it out; CPU and GPU share one memory",
    "dataset_train_split": "name it in --data: 'owner/name?split=test[:20%]'",
    "dataset_test_split": "name it in --data: 'FILE,owner/name?split=test&as=valid'",
    "dataset_config": "name it in --data: 'owner/name?subset=en'",
    "test_datasets": "name them in --data: 'FILE,OTHER?as=valid'",
    "max_samples": "name them in --data: 'FILE?split=train[:1000]'",
    "mix_strategy": "give sets their weights in --data: a.jsonl,b.jsonl=0.5",
    "interleave_probs": "give sets their weights in --data: a.jsonl,b.jsonl=0.5",
    "mask_history": "use --last-answer",
    "default_system": "write it into the rows, or name its column with --system-column",
    "use_peft": "leave it out; LoRA is trained unless --method full",
    "pissa_init": "use --method pissa",
    "use_muon": "use --optimizer muon",
    "loftq_config": "use --method pissa",
    "freeze_trainable_layers": "use --method full --num-layers N",
    "freeze_vision_tower": "leave it out; --train-vision trains it",
    "freeze_multi_modal_projector": "leave it out; --train-connector trains it",
    "qat_enable": "use --qat",
    "save_gguf": "use mlx-lora export --to gguf after the run",
    "push_gguf": "use mlx-lora export --to gguf --push-to-hub REPO after the run",
    "gguf_path": "use mlx-lora export --to gguf --out FOLDER after the run",
    "fuse": "use mlx-lora fuse after the run",
    "hub_path": "use mlx-lora export --push-to-hub REPO after the run",
    "upload_repo": "use mlx-lora export --push-to-hub REPO after the run",
    "hf_path": "use --model",
    "hf_repo": "use --model",
    "mlx_path": "use --out",
    "raw_text_file": "use --data FILE.txt",
    "early_stopping_steps": "use --early-stopping-patience",
    **dict.fromkeys(("load_in_4bits", "load_in_mxfp4"), _FOUR_BITS),
    "load_in_8bits": _FOUR_BITS.replace("4", "8"),
    "no_load_in_4bit": "leave it out, and name a 16-bit model",
    "use_vllm": "leave it out; answers are sampled by MLX",
    "reward_functions_file": "use --reward FILE.py:FUNCTION",
    "importance_sampling_level": "use --grpo-loss gspo for one ratio for a whole answer",
    "deepspeed": "leave it out; share a base that does not fit with --shard-base",
    "fsdp": "leave it out; share a base that does not fit with --shard-base",
    "packing": "leave it out; rows of similar length share a batch of --batch-tokens",
}
# Settings of earlier versions -> their values in a file, such as run.yaml, that changed nothing; others are refused with advice.
GONE = {
    "fine_tune_type": (None,),
    "length_normalize": (False,),
    "rpo_alpha": (0,),
    "clear_cache_threshold": (None, 0),
}
# A flag of some commands -> the flag of the others that takes the same.
_OTHER_COMMANDS = {"adapter_path": "adapter", "adapter_name_or_path": "adapter", "max_new_tokens": "max_tokens"}
_OTHER_COMMANDS |= {"temperature": "temp", "output": "out", "output_dir": "out", "out_dir": "out", "save_path": "out"}
# Values of a setting with choices -> advice.
OTHER_VALUES = {
    "qlora": "QLoRA is LoRA over a 4-bit base; use --method lora and --bits 4",
    "bf16": "use bfloat16",
    "fp16": "use float16",
    "fp32": "use float32",
    "tensor": "tensor parallel training is gone; share a base that does not fit with --shard-base",
    "eval_loss": "use loss",
    "eval_rewards/accuracies": "use accuracy",
}


def instead_of(name: str, known: Collection[str], spell: Callable[[str], str], listing: str = "--help-all") -> str:
    """Return advice on what to write instead of an unknown name.

    Args:
        name: the unknown name, with underscores.
        known: the names that are allowed there.
        spell: returns a name in the user's spelling.
        listing: the flag that lists all names.
    """
    if name in _OTHER_WAYS:
        return _OTHER_WAYS[name]
    for names in (_OTHER_COMMANDS, OTHER_NAMES):
        if names.get(name) in known:
            return f"use {spell(names[name])}"
    close = closest(name, known)
    from mlx_lora.config.migrate.common import CHANGES, changes_nothing  # few errors need it

    if changes_nothing(name) and not close:
        return "leave it out; it changes no result here"
    if name in CHANGES:
        return f"leave it out; there is nothing like it here ({CHANGES[name]})"
    return f"did you mean {spell(close[0])}?" if close else f"leave it out ({listing} lists the options)"


# Names that are gone
RECIPES = Path(__file__).parents[1] / "recipes"
FILES = ("data", "teacher_prompt")  # settings that name a recipe's own files


def train_settings(flags: Mapping[str, Any], content: Mapping[str, Any] | None = None) -> TrainSettings:
    """Resolve settings: flags override the settings file, which overrides the defaults.

    Args:
        flags: the flat settings that were given on the command line.
        content: the file's flat settings with our names, as `read_settings` returns them.

    Raises:
        InputError: there are unknown keys or bad values; the message has all of them, in the flags' spelling.
    """
    decided = decided_by(flags)
    content = {key: value for key, value in (content or {}).items() if value not in GONE.get(key, ())}
    values = {key: value for key, value in content.items() if key not in decided} | dict(flags)
    problems = [
        f"{'settings' if key in flags else '--config'}: unknown setting {key!r}; {instead_of(key, FIELDS, repr)}"
        for key in values
        if key not in FIELDS
    ]
    values = _read(values, FIELDS, problems)
    if not values.get("data") and is_verifiers(values.get("environment")):
        values["data"] = values["environment"]  # such an environment has tasks of its own
    path = Path(values.get("data") or "").expanduser()
    if values.get("data") and any((one / "dataset_info.json").is_file() for one in (path, path.parent)):
        from mlx_lora.config.migrate.llama_factory import settings_of_table  # few runs need it

        table = settings_of_table(values["data"])
        values |= {name: value for name, value in table.items() if name == "data" or name not in values}
    sections = {
        name: section(**{f.name: values[f.name] for f in dataclasses.fields(section) if f.name in values})
        for name, section in SECTIONS.items()
    }
    settings = TrainSettings(**sections)
    problems = problems or settings_problems(settings.to_flat())
    if problems:
        raise InputError("; ".join(problems))
    return settings


def serve_settings(flags: Mapping[str, Any]) -> tuple[ModelSettings, ServeSettings]:
    """Resolve a server's settings from its flags.

    Raises:
        InputError: there are bad values; the message has all of them.
    """
    fields, problems = {f.name: f for f in dataclasses.fields(ServeSettings)}, []
    settings = ServeSettings(**_read(flags, fields, problems))
    if problems:
        raise InputError("; ".join(problems))
    return train_settings({key: value for key, value in flags.items() if key not in fields}).model, settings


def _read(values: Mapping[str, Any], fields: Mapping[str, dataclasses.Field], problems: list[str]) -> dict[str, Any]:
    """Return the values of known settings in their types, and add the errors to `problems`."""
    read = {}
    for name, value in values.items():
        if name not in fields:
            continue
        if name == "optimizer" and value != "adamw" and ADAMW.fullmatch(str(value)):
            log.info(f"--optimizer {value}: AdamW, with its state in float32, which is small for an adapter")
            value = "adamw"
        try:
            read[name] = read_value(fields[name], value)
        except ValueError as error:
            other = OTHER_VALUES.get(str(value).lower()) if row_of(fields[name]).choices else None
            problems.append(f"{flag_of(name)} {f'{value!r}: {other}' if other else error}")
    return read


# The file of --config


def read_settings(path: str | None, flags: Mapping[str, Any], allow_code: bool = False) -> dict[str, Any]:
    """Return the settings in a file with our names; empty without a file.

    Args:
        path: the YAML file, or the name of a recipe.
        flags: the settings given on the command line; other trainers' defaults for these are not reported.
        allow_code: whether the file may name code to run.

    Raises:
        InputError: there is no such file or recipe, or the file is not UTF-8 YAML, not a mapping, or cannot be read as ours; or it
            names code, and nobody agreed to run it.
    """
    if not path:
        return {}
    is_recipe = names_recipe(path)
    content = read_yaml(str(recipe_file(path)) if is_recipe else path)
    if (
        is_recipe
    ):  # which names its files as a checkout sees them (`recipes/bard`), so that it can be given as a file as well
        content |= {name: str(RECIPES.parent / content[name]) for name in FILES if name in content}
    from mlx_lora.config.migrate import migrate  # only files need it

    content = migrate(content, flags, path)
    code = code_of({**content, **flags})
    code = unknown_code(Path(path), {name: text for name, text in code.items() if name not in decided_by(flags)})
    if code and not allow_code:
        asked = asked_about(Path(path), code)
        if not console.agreed(f"{asked}. Run it?", usual=False):
            raise InputError(f"--config {path}: {asked}; read it, then add --allow-code, or give these flags yourself")
        keep_allowed(Path(path), code, with_content=True)
    return content


def read_yaml(path: str) -> dict[str, Any]:
    """Read a flat YAML settings file; keys come back with underscores.

    Raises:
        InputError: the file is missing, not UTF-8 YAML, or not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = parse_yaml(file.read(MAX_YAML_CHARACTERS + 1))
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror}); give a YAML file") from None
    except ValueError as error:  # not UTF-8 either
        raise InputError(f"--config {path}: not usable YAML ({' '.join(str(error).split())}); fix the file") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: has no settings; write one `flag_name: value` per line")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


# Code that a file names

CODE_FILES = re.compile(r"[^,:]+\.(?:py|toml|ya?ml)(?=[:,]|$)")  # in a value such as FILE.py:NAME,FILE.py:NAME
MOST_ALLOWED = 5000  # check sums that are kept, the newest


def code_of(settings: Mapping[str, Any], folder: str = "") -> dict[str, str]:
    """Return the settings that run code, by name, with whole paths; for trust_remote_code, the models whose code runs.

    Args:
        settings: by name, checked or as they are in a file.
        folder: where relative names start; "": the current folder.
    """

    def whole(name: str) -> str:
        path = os.path.abspath(os.path.join(folder, os.path.expanduser(name.strip())))
        return path if os.path.exists(path) else name

    trusted = " and ".join(whole(str(settings[name])) for name in ("model", "teacher") if settings.get(name))
    texts = {name: str(settings.get(name)) for name, row in ROWS.items() if row.runs}
    return {
        name: trusted if name == "trust_remote_code" else CODE_FILES.sub(lambda found: whole(found[0]), text)
        for name, text in texts.items()
        if re.search(ROWS[name].runs, text)
    }


def asked_about(file: Path, code: Mapping[str, str]) -> str:
    """Return what a person is told of the code of a settings file: one printable line with all paths."""
    said = ", ".join(f"{flag_of(name)} ({text})" for name, text in code.items())
    return console.printable(f"{os.path.abspath(file)} runs code: {said}", limit=10**6)


def unknown_code(file: Path, code: Mapping[str, str]) -> dict[str, str]:
    """Return what nobody agreed to on this machine, of the code of a settings file."""
    return {
        name: text
        for name, text in code.items()
        if not any(os.path.exists(_allowed(file, name, text, with_content)) for with_content in (False, True))
    }


def keep_allowed(file: Path, code: Mapping[str, str], with_content: bool = False) -> None:
    """Keep that the code of a settings file may run; if the cache cannot be written, it is asked about again.

    Args:
        file: has the settings.
        code: of `code_of`.
        with_content: only as long as the files of code have the same content.
    """
    with contextlib.suppress(OSError):
        for name, text in code.items():
            cache_dir("code").mkdir(parents=True, exist_ok=True)
            _allowed(file, name, text, with_content).touch()
        for old in sorted(cache_dir("code").iterdir(), key=lambda one: one.stat().st_mtime)[:-MOST_ALLOWED]:
            old.unlink()


def _allowed(file: Path, name: str, text: str, with_content: bool) -> Path:
    """Return the file in the cache that says that a setting of a settings file may run code."""
    files = [Path(one) for one in CODE_FILES.findall(text) if with_content and os.path.isfile(one)]
    return cache_dir("code") / sha256_of(json.dumps([os.path.realpath(file), name, text, *map(sha256_of, files)]))


# Recipes


def recipe_names() -> list[str]:
    """Return the names that `--config` accepts in place of a file, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def names_recipe(config: str) -> bool:
    """Tell whether a value of `--config` is a recipe's name: a bare word, and no file of that name is here."""
    return not Path(config).suffix and os.sep not in config and not os.path.isfile(config)


def recipe_file(name: str) -> Path:
    """Return a recipe's settings file.

    Raises:
        InputError: there is no such recipe; the message lists those there are.
    """
    names = recipe_names()
    if name not in names:
        close, listed = difflib.get_close_matches(name, names, n=1), ", ".join(names)
        advice = f"did you mean {close[0]}? There are {listed}" if close else f"the recipes are {listed}"
        raise InputError(f"--config {name}: no such file, and no recipe of that name; {advice}")
    return RECIPES / f"{name}.yaml"
