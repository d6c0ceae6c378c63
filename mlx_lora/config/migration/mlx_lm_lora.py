"""Read mlx-lm-lora's `--config` file: mlx-lm's keys, and others of its own for preferences.

For what the file leaves out, its defaults are used if they change the result: those of mlx-lm, but scale 10 and all
blocks. Its own keys are train_mode and train_type.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mlx_lora.config.migration import hf, mlx_lm
from mlx_lora.config.migration.preference_keys import put_objective, read_reference, trains_on_chats
from mlx_lora.config.migration.sampling_keys import NUMBERS_OF_MLX_LM_LORA, keep_cycles, put_rewards, put_sampling
from mlx_lora.config.migration.sheet import Dialect, Sheet

# Its names for keys that mlx-lm has too, and a name that it used in 2025.
RENAMED = {
    "training_mode": "train_mode",
    "train_type": "fine_tune_type",
    "gradient_accumulation_steps": "grad_accumulation_steps",
}
MODES = {"sft": "sft", "normal": "sft", "dpo": "dpo", "orpo": "orpo", "cpo": "cpo", "grpo": "grpo"}
GRPO = {"group_size": 4, "max_new_tokens": 512, "epsilon": 1e-4, "kl_beta": 0.1, "grpo_loss": "grpo"}
LOSSES = {"dpo": ("sigmoid", "hinge", "ipo"), "cpo": ("sigmoid",)}
BITS = {"load_in_4bits": 4, "load_in_6bits": 6, "load_in_8bits": 8, "load_in_mxfp4": 4}
DEFAULT_SCALE = 10.0


def recognizes(content: Mapping[str, Any]) -> bool:
    """Return whether a file has a key that only mlx-lm-lora has."""
    return any(key in content for key in mlx_lm.OF_MLX_LM_LORA)


def read_kind(sheet: Sheet) -> None:
    """Set the objective and its options; refuse modes and losses that we do not have."""
    for theirs, name in RENAMED.items():
        if theirs in sheet.rest:
            sheet.rest[name] = sheet.take(theirs)
    mode = str(sheet.take("train_mode") or "sft").replace("-", "_")
    if mode not in MODES:
        known = ", ".join(name for name in MODES if name != "normal")
        raise sheet.refusal(f"train_mode {mode}: only {known} are supported; use mlx-lm-lora for it")
    if mode == "grpo":
        read_sampling(sheet)
        return
    loss = sheet.rest.get("dpo_cpo_loss_type", "sigmoid")
    if mode in LOSSES and loss not in LOSSES[mode]:
        known = ", ".join(LOSSES[mode])
        raise sheet.refusal(f"dpo_cpo_loss_type {loss} with train_mode {mode}: only {known} are supported")
    if loss == "sigmoid":
        sheet.take("dpo_cpo_loss_type")
    put_objective(sheet, MODES[mode], "train_mode", {"beta": "beta", "dpo_cpo_loss_type": "loss_type"})
    read_reference(sheet, "model", "reference_model_path")
    sheet.leave("alpha", "beta")  # alpha: of xpo, not the adapter's
    sheet.leave(*NUMBERS_OF_MLX_LM_LORA, "reward_weights")  # of grpo; its files often have them in other modes too
    if mode == "cpo":
        sheet.put("cpo_alpha", 0.0, "train_mode")
        sheet.note("cpo: the likelihood of chosen answers is not added, as in mlx-lm-lora; --cpo-alpha adds it")
    if trains_on_chats(sheet) and "mask_prompt" not in sheet.rest:
        sheet.assume("mask_prompt", False)
    elif not trains_on_chats(sheet):
        sheet.leave("mask_prompt")
        sheet.note(f"{mode}: answers are compared by their own tokens; in mlx-lm-lora, the prompt's tokens count too")


def read_sampling(sheet: Sheet) -> None:
    """Set what samples and rewards answers; functions that are registered in a file of the user's are named by it here."""
    put_sampling(sheet, "grpo", "train_mode", numbers=NUMBERS_OF_MLX_LM_LORA, loss="grpo_loss_type")
    file, asked = sheet.take("reward_functions_file"), sheet.take("reward_functions")
    names = asked if isinstance(asked, list) else [] if asked is None else str(asked).split(",")
    functions = {name.strip(): f"{file}:{name.strip()}" if file else None for name in map(str, names)}
    if not functions:
        sheet.note("reward_functions: not named, and mlx-lm-lora's own are not here; give --reward FILE.py:FUNCTION")
    put_rewards(sheet, sheet, functions, "reward_functions")
    if "reward" in sheet.found:
        sheet.note(
            "reward_functions: they also get completion_ids and every column of the data here; add **columns to them"
        )
    for name, value in GRPO.items():
        sheet.assume(name, value)
    read_reference(sheet, "model", "reference_model_path")
    sheet.leave("alpha", "mask_prompt")
    keep_cycles(sheet)


def read_rest(sheet: Sheet) -> None:
    """Set the remaining keys that have another name in mlx-lm-lora."""
    for key, bits in BITS.items():
        if sheet.switch(key):
            hf.put_bits(sheet, key, bits)
    if sheet.rest.get("wandb"):
        sheet.put("report_to", "wandb", "wandb")
        sheet.put("project_name", sheet.take("wandb"), "wandb")
    if "iters" in sheet.rest:  # mlx-lm-lora then ignores epochs
        sheet.leave("epochs")


MLX_LM_LORA = Dialect(
    name="mlx-lm-lora",
    recognizes=recognizes,
    rules=(
        read_kind,
        read_rest,
        partial(mlx_lm.read_shape, default_scale=DEFAULT_SCALE),
        mlx_lm.read_schedule,
        mlx_lm.read_optimizer,
        mlx_lm.read_data,
        mlx_lm.read_counts,
        mlx_lm.read_ours,
    ),
    names=(),
    defaults={"batch_size": 4, "learning_rate": 1e-5, "max_grad_norm": 0.0, "valid_fraction": 0.0},
)
