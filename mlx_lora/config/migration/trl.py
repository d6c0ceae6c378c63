"""Read the settings file of TRL's commands: `trl dpo --config`, `trl kto`, `trl reward`, `trl grpo`, `trl rloo`, `trl sft`;
and of its GKDTrainer.

The file does not say which command it is for; --objective says so, or else keys that only one command has. For what the
file leaves out, TRL's defaults are used if they change the result: the model itself is trained unless use_peft is set,
rank 16, alpha 32, dropout 0.05, 8 rows per micro-batch, three epochs with linear decay, 1,024 tokens, nothing held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lora.config.migration import hf, sampling_keys, trl_distill
from mlx_lora.config.migration.column_keys import take_columns
from mlx_lora.config.migration.preference_keys import OPTIONS, put_objective, say_plain_simpo, trains_on_chats
from mlx_lora.config.migration.sheet import Dialect, Sheet

MARKS = ("dataset_name", "dataset_train_split", "dataset_test_split", "use_peft", "lora_target_modules", "datasets")
# Keys of commands that we do not have.
SAMPLING = ("reward_model_path",)
# Objective -> keys that only its configuration has; the first that a file has decides.
OWN_KEYS = {
    trl_distill.NAME: trl_distill.OWN_KEYS,
    "rloo": ("normalize_advantages", "reward_clip_range"),
    "grpo": (
        *("reward_funcs", "num_generations", "num_iterations", "scale_rewards", "importance_sampling_level"),
        *("mask_truncated_completions", "epsilon_high"),
    ),
    "reward": ("center_rewards_coefficient",),
    "kto": ("desirable_weight", "undesirable_weight"),
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "dpo": (
        *("loss_weights", "precompute_ref_log_probs", "discopop_tau", "f_divergence_type", "ld_alpha", "rpo_alpha"),
        *("use_weighting", "sync_ref_model", "loss_type", "label_smoothing", "max_prompt_length", "beta"),
    ),
}
CHAT_LOSSES = ("nll", "chunked_nll", "dft")  # of `trl sft`
# Defaults of answers that differ from ours.
GRPO = {"group_size": 8, "max_new_tokens": 512}
RLOO = {"group_size": 2, "max_new_tokens": 512, "kl_beta": 0.05}
LEARNING_RATES = {"sft": 2e-5, "distill": 2e-5, "reward": 1e-4}
LEARNING_RATE = 1e-6
OWN_NAMES = ("loss_type", "loss_weights", "beta", "label_smoothing", "rpo_alpha", "discopop_tau", "simpo_gamma",
             "cpo_alpha", "desirable_weight", "undesirable_weight")  # fmt: skip
PEFT_TARGETS = "q_proj,v_proj"  # of most architectures


def recognizes(content: Mapping[str, Any]) -> bool:
    """Return whether a file names its model as TRL does, and has one of its own keys."""
    return "model_name_or_path" in content and "model" not in content and any(key in content for key in MARKS)


def read_kind(sheet: Sheet) -> None:
    """Set the objective and its options."""
    for key in SAMPLING:
        if key in sheet.rest:
            raise sheet.refusal(
                f"{key}: only trl sft, dpo, kto, reward, grpo and rloo are supported, and ORPO and CPO; use TRL for it"
            )
    objective, key = _objective(sheet)
    if objective == trl_distill.NAME:
        sheet.put("objective", objective, key)
        trl_distill.read_distill(sheet)
        return
    if sampling_keys.reads(objective):
        read_sampling(sheet, objective, key)
        return
    losses = sheet.rest.get("loss_type")
    if isinstance(losses, list) and len(losses) == 1:
        sheet.rest["loss_type"] = losses = losses[0]
    if objective == "cpo" and losses in ("simpo", "alphapo"):
        sheet.take("loss_type")
        if losses == "alphapo" or sheet.number("alpha"):
            raise sheet.refusal("loss_type alphapo: not supported; use TRL for it")
        objective = "simpo"
    elif objective == "cpo" and losses not in (None, "sigmoid"):
        raise sheet.refusal(f"loss_type {losses} with CPO: only sigmoid and simpo are supported; use TRL for it")
    if losses == "sigmoid" or (objective == "kto" and losses == "kto"):
        sheet.take("loss_type")
    names = {name: name for name in OWN_NAMES} | {"center_rewards_coefficient": "center_rewards"}
    if objective == "simpo":
        say_plain_simpo(sheet)
    put_objective(sheet, objective, key, names)
    sheet.take("precompute_ref_log_probs")  # always done here
    if sheet.rest.get("truncation_mode") == "keep_start":
        sheet.take("truncation_mode")


def read_sampling(sheet: Sheet, objective: str, key: str) -> None:
    """Set what samples, rewards and compares answers; a reward model is none of ours."""
    sampling_keys.put_sampling(sheet, objective, key)
    functions, model = sampling_keys.rewards_of_paths(sheet, sheet), sheet.take("reward_model_name_or_path")
    sampling_keys.put_rewards(
        sheet,
        sheet,
        functions | ({str(model): None} if model else {}),
        "reward_funcs" if functions else "reward_model_name_or_path",
    )
    for name, value in RLOO.items() if objective == "rloo" else GRPO.items():
        sheet.assume(name, value)
    sampling_keys.keep_cycles(sheet)


def _objective(sheet: Sheet) -> tuple[str, str]:
    """Return the objective and the key that decides it."""
    if sheet.objective in (*OPTIONS, trl_distill.NAME):
        return sheet.objective, "objective"
    losses = sheet.rest.get("loss_type")
    own = OWN_KEYS if losses not in CHAT_LOSSES else {}
    for objective, keys in own.items():
        key = next((key for key in keys if key in sheet.rest), None)
        if objective == "kto" and losses in ("kto", "apo_zero_unpaired"):
            key = "loss_type"
        if key:
            of = "TRL's GKDTrainer" if objective == trl_distill.NAME else f"trl {objective}"
            sheet.note(f"{key}: read as a file of {of}; --objective chooses another")
            return objective, key
    sheet.note("read as a file of trl sft; give --objective dpo, kto, reward, grpo or rloo for those commands")
    return "sft", "objective"


def read_method(sheet: Sheet) -> None:
    """Set rank, alpha and method; without use_peft the model itself is trained, as in TRL."""
    adapts = sheet.switch("use_peft")
    if adapts:
        for key, name, default in (
            ("lora_r", "rank", 16),
            ("lora_alpha", "alpha", 32),
            ("lora_dropout", "dropout", 0.05),
        ):
            if key in sheet.rest:
                sheet.put(name, sheet.number(key), key)
            sheet.assume(name, default)
    on = {
        "dora": "use_dora" if sheet.switch("use_dora") else None,
        "rslora": "use_rslora" if sheet.switch("use_rslora") else None,
        "full": None if adapts else "use_peft",
    }
    hf.choose_method(sheet, {method: key for method, key in on.items() if key})
    hf.read_targets(sheet, "lora_target_modules", ("all-linear",))
    if adapts:
        sheet.assume("target_modules", PEFT_TARGETS)
    if sheet.rest.get("lora_modules_to_save"):
        sheet.put("modules_to_save", sheet.take("lora_modules_to_save"), "lora_modules_to_save")
    for key, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if sheet.switch(key):
            hf.put_bits(sheet, key, bits)


def read_data(sheet: Sheet) -> None:
    """Set data from dataset_name, or the first of datasets."""
    sets = sheet.take("datasets") or []
    if not isinstance(sets, list) or not all(isinstance(one, dict) for one in sets):
        raise sheet.refusal("datasets has no mappings with a path; fix the file")
    first = dict(sets[0]) if sets else {}
    path = first.pop("path", None)
    if path:
        sheet.put("data", path, "datasets.path")
        sheet.leave("dataset_name")
    elif "dataset_name" in sheet.rest:
        sheet.put("data", sheet.take("dataset_name"), "dataset_name")
    sheet.left_out += [f"datasets.{name}" for name, value in first.items() if (name, value) != ("split", "train")]
    if len(sets) > 1:
        sheet.note(
            f"datasets: {len(sets)} sets, only the first ({path}) is used; join them in one file to use all of them"
        )
    if sheet.rest.get("dataset_train_split") == "train":
        sheet.take("dataset_train_split")
    if "chat_template_path" in sheet.rest:
        sheet.put("chat_template", sheet.take("chat_template_path"), "chat_template_path")
    if trains_on_chats(sheet):
        take_columns(sheet, sheet.rest, {"dataset_text_field": ("text_column", "text")}, "")
        whole = sheet.rest.get("completion_only_loss") is False
        own = [key for key in ("assistant_only_loss", "completion_only_loss") if sheet.take(key)]
        if whole or own:
            sheet.put("mask_prompt", not whole, own[0] if own else "completion_only_loss")
        elif sheet.found.get("objective") != trl_distill.NAME:  # GKD trains on answers
            sheet.note("trl sft trains on whole dialogues, here only on answers; --no-mask-prompt trains on everything")


def read_loop(sheet: Sheet) -> None:
    """Set length, batch, schedule, optimizer, intervals."""
    for key in ("dtype", "torch_dtype"):
        kind = sheet.take(key)
        if kind in ("float32", *hf.HALF_PRECISION):
            sheet.rest[kind] = True
    if "max_seq_length" in sheet.rest:  # its name until 2025
        sheet.rest["max_length"] = sheet.take("max_seq_length")
    hf.read_length(sheet, "num_train_epochs")
    if "iters" not in sheet.found:
        sheet.assume("epochs", 3.0)
    if sampling_keys.reads(sheet.found.get("objective")):
        sampling_keys.read_prompts(sheet, "per_device_train_batch_size", 8)
    else:
        hf.read_batch(sheet, "per_device_train_batch_size", "max_length", "packing", defaults=(8, 1024))
    hf.read_warmup(sheet, "lr_scheduler_type")
    hf.read_optimizer(sheet, "optim")
    hf.read_held_out(sheet, "test_split_size")
    hf.read_intervals(sheet)
    hf.read_precision(sheet)
    hf.read_loggers(sheet)
    if "gradient_checkpointing" in sheet.rest:
        sheet.put("grad_checkpoint", sheet.switch("gradient_checkpointing"), "gradient_checkpointing")
    if "learning_rate" not in sheet.rest:
        sheet.assume("learning_rate", LEARNING_RATES.get(sheet.found.get("objective", ""), LEARNING_RATE))


TRL = Dialect(
    name="TRL",
    recognizes=recognizes,
    rules=(read_kind, read_method, read_data, read_loop),
    names=(
        "model_name_or_path",
        "model_revision",
        "trust_remote_code",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "gradient_accumulation_steps",
        "output_dir",
        "overwrite_output_dir",
        "seed",
    ),
    defaults={"lr_schedule": "linear", "warmup": 0, "weight_decay": 0.0},
)
