"""Read the `--config` files of mlx-lm's `lora` and of mlx-lm-lora, which has mlx-lm's keys and others for preferences.

Most of mlx-lm's keys are flags of ours with the same meaning, so a file with only those is read as ours, with our defaults.
It is read as mlx-lm's if it has a mapping that only mlx-lm reads: lora_parameters, lr_schedule, optimizer_config,
hf_dataset; a name of a column (prompt_feature); or fine_tune_type. Then mlx-lm's defaults are used for what it leaves out,
because they differ a lot: rank 8 and scale 20, constant learning rate 1e-5, no clip, 16 blocks, prompts trained, Adam,
1,000 iterations of 4 rows, nothing held out of the training file. Model and data have no default here. mlx-lm-lora's
defaults are scale 10 and all blocks; its own keys are train_mode and train_type.

Such a file may also have settings of ours: mlx-lm ignores them, so one file can be used for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mlx_lora.config.migrate import common
from mlx_lora.config.migrate.common import FEATURES, LOSSES_OF_MLX_LM_LORA, MODES_OF_MLX_LM_LORA, Dialect, Sheet
from mlx_lora.config.objectives import SAMPLING
from mlx_lora.config.rules import OWNERS
from mlx_lora.config.settings import FIELDS
from mlx_lora.utils.parsing import hashable

MAPPINGS = ("lora_parameters", "lr_schedule", "optimizer_config")
OF_MLX_LM_LORA = ("train_mode", "training_mode", "train_type")
# Schedules that we have too (their name's first word is ours) -> what follows the rate in `arguments`.
ARGUMENTS = {"cosine_decay": ("steps", "end"), "linear_schedule": ("end", "steps")}
DEFAULT_RANK, DEFAULT_SCALE = 8, 20.0
# What mlx-lm counts in micro-batches, with its defaults.
COUNTED = {"iters": 1000, "steps_per_report": 10, "steps_per_eval": 200, "save_every": 100}


def recognizes(content: Mapping[str, Any]) -> bool:
    """Return whether a file has keys that only mlx-lm reads."""
    own = any(isinstance(content.get(key), dict) for key in MAPPINGS)
    own = own or (bool(content.get("fine_tune_type")) and "method" not in content)
    return (own or any(content.get(key) for key in ("hf_dataset", *FEATURES))) and not any(
        key in content for key in OF_MLX_LM_LORA
    )


def read_shape(sheet: Sheet, default_scale: float = DEFAULT_SCALE) -> None:
    """Set rank, alpha = scale * rank, dropout and targets from lora_parameters."""
    if sheet.rest.get("fine_tune_type") == "full":  # mlx-lm then ignores lora_parameters
        sheet.take("lora_parameters")
        return
    shape = sheet.part("lora_parameters")
    rank, scale = shape.number("rank"), shape.number("scale")
    if rank is not None:
        sheet.found["rank"] = rank
    sheet.copy({"rank": "rank"}, Sheet.number)  # a setting of ours, which mlx-lm ignores
    sheet.assume(rank=DEFAULT_RANK)
    alpha = (default_scale if scale is None else scale) * sheet.told("rank")
    if scale is not None:
        sheet.found["alpha"] = alpha
        sheet.note(f"lora_parameters.scale {scale:g}: alpha {alpha:g}, because the scale here is alpha / rank")
    sheet.assume(alpha=alpha)
    keys = shape.take("keys")
    shape.copy({"dropout": "dropout"})
    if keys:
        sheet.found["target_modules"] = keys
    shape.sort_rest()
    if sheet.switch("use_dora"):  # from before fine_tune_type existed
        sheet.found["method"] = "dora"


def read_schedule(sheet: Sheet) -> None:
    """Set schedule, peak rate and warm-up; without lr_schedule the rate is constant."""
    if isinstance(sheet.rest.get("lr_schedule"), str):  # a setting of ours
        return
    schedule = sheet.part("lr_schedule")
    if not schedule.rest:
        sheet.assume(lr_schedule="constant", warmup=0)
        return
    name, arguments = hashable(schedule.take("name")), schedule.take("arguments")
    if not isinstance(arguments, list) or not arguments or arguments[0] is None:
        raise sheet.refusal("lr_schedule has no arguments, a list that begins with the learning rate; fix the file")
    stated = Sheet(sheet.file, dict(zip(("rate", *ARGUMENTS.get(name, ())), arguments, strict=False)))
    rate, asked = stated.number("rate"), sheet.number("learning_rate")
    if asked not in (None, rate):
        sheet.note(f"learning_rate {asked:g}: lr_schedule's {rate:g} is used, as in mlx-lm")
    sheet.found |= {"learning_rate": rate, "warmup": schedule.number("warmup") or 0}
    if sheet.found["warmup"]:
        sheet.found["warmup_init"] = schedule.number("warmup_init") or 0
    schedule.sort_rest()
    if name not in ARGUMENTS:
        sheet.refuse("lr_schedule", f"only {' and '.join(ARGUMENTS)} are here", name)
        return
    sheet.found |= {"lr_schedule": str(name).split("_")[0], "decay_steps": stated.number("steps")}
    sheet.found["min_lr_ratio"] = (stated.number("end") or 0) / (rate or 1)


def read_optimizer(sheet: Sheet) -> None:
    """Set optimizer and weight decay; only the chosen optimizer's part of optimizer_config counts, as in mlx-lm."""
    if name := str(sheet.take("optimizer") or "").lower():
        sheet.found["optimizer"] = name
    sheet.assume(optimizer="adam")
    chosen = sheet.told("optimizer")
    part = sheet.part("optimizer_config").part(chosen)
    corrected = part.switch("bias_correction")
    part.copy({"weight_decay": "weight_decay", "eps": "adam_epsilon"})
    sheet.found |= dict(zip(("adam_beta1", "adam_beta2"), part.take("betas") or (), strict=False))
    part.sort_rest()
    if chosen in ("adam", "adamw") and not corrected:
        sheet.assume(bias_correction=False)
    if chosen == "sgd":
        sheet.assume(weight_decay=0.0)


def read_data(sheet: Sheet) -> None:
    """Set data from hf_dataset, which may have several sets, and the columns from its features."""
    told = common.take_sets(sheet, "hf_dataset")
    sheet_features = {key: sheet.rest[key] for key in FEATURES if key in sheet.rest}
    read_features(sheet)
    if not told:
        return
    sources, ways = [], []
    for one in told:
        own = replace(sheet.within(one, "hf_dataset"), found={})
        path = own.take("path") or own.take("name")
        own.rest |= {key: sheet_features[key] for key in sheet_features if key not in own.rest}
        read_features(own)
        config = own.part("config")
        subset = {"subset": config.take("name")} if "name" in config.rest else {}
        splits = {"train_split": ("train[:80%]", {}), "valid_split": ("train[-10%:]", {"as": "valid"})}
        for key, (usual, options) in splits.items():
            sources.append({"path": path, **subset, "split": own.take(key) or usual, **options})
            ways.append(dict(own.found))
        own.leave("test_split", "name")
        config.sort_rest()
        own.sort_rest()
    common.put_sets(sheet, "hf_dataset", sources, ways)


def read_features(sheet: Sheet) -> None:
    """Set our columns from mlx-lm's features; of a pair of which one is named, the other keeps mlx-lm's name."""
    given = {key: sheet.rest[key] for key in FEATURES if isinstance(sheet.rest.get(key), str)}
    common.read_columns(sheet, FEATURES)
    pair = {name: given.get(key, usual[0]) for key, (name, usual) in list(FEATURES.items())[:2]}
    if any(name in sheet.found for name in pair):
        sheet.assume(**pair)


def read_counts(sheet: Sheet) -> None:
    """Convert mlx-lm's counts of micro-batches to counts of optimizer steps."""
    sheet.copy({"grad_accumulation_steps": "grad_accumulation_steps"}, Sheet.number)
    window = sheet.told("grad_accumulation_steps")
    if window is None or window <= 1:
        return
    for name, default in COUNTED.items():
        if name == "iters" and "epochs" in sheet.rest:
            continue
        stated = sheet.number(name)
        steps = max(1, round((default if stated is None else stated) / window))
        if stated is not None:
            sheet.found[name] = steps
        sheet.assume(**{name: steps})
    sheet.note(
        f"grad_accumulation_steps {window}: iters and intervals count optimizer steps here, so they are divided by it"
        + (f" (iters {sheet.found['iters']})" if "iters" in sheet.found else "")
    )


def read_ours(sheet: Sheet) -> None:
    """Take keys that have the same name and meaning in both trainers, and settings of ours."""
    if sheet.rest.get("test") is True:
        sheet.drop({"train": (False,)})
    if sheet.take("clear_cache_threshold"):  # 0 means "never"
        sheet.harmless.append("clear_cache_threshold")
    sheet.copy({key: key for key in sheet.rest if key in FIELDS})
    if sheet.told("mask_prompt") and common.trains_on_chats(sheet):
        sheet.assume(last_answer=True)


MLX_LM = Dialect(
    name="mlx-lm",
    recognizes=recognizes,
    rules=(read_shape, read_schedule, read_optimizer, read_data, read_counts, read_ours),
    names={"fine_tune_type": "method", "lora_layers": "num_layers"},  # lora_layers: until 2024
    defaults={
        "num_layers": 16,
        "batch_size": 4,
        "iters": COUNTED["iters"],
        "learning_rate": 1e-5,
        "max_grad_norm": 0.0,
        "mask_prompt": False,
        "valid_fraction": 0.0,
        "long_rows": "cut",
    },
)


# mlx-lm-lora

# Its names for keys that mlx-lm has too, and a name that it used in 2025.
RENAMED = {
    "training_mode": "train_mode",
    "train_type": "fine_tune_type",
    "gradient_accumulation_steps": "grad_accumulation_steps",
}
BITS = {"load_in_4bits": 4, "load_in_6bits": 6, "load_in_8bits": 8, "load_in_mxfp4": 4}
# Of grpo: its names of numbers, and its defaults.
NUMBERS = {
    "group_size": "group_size",
    "max_completion_length": "max_new_tokens",
    "temperature": "temp",
    "epsilon": "epsilon",
    "epsilon_high": "epsilon_high",
    "beta": "kl_beta",
}
GRPO = {"group_size": 4, "max_new_tokens": 512, "epsilon": 1e-4, "kl_beta": 0.1, "grpo_loss": common.LOSSES[0]}


def read_mode(sheet: Sheet) -> None:
    """Set the objective and its options; refuse modes and losses that we do not have."""
    for theirs, name in RENAMED.items():
        if theirs in sheet.rest:
            sheet.rest[name] = sheet.take(theirs)
    common.read_bits(sheet, BITS)
    if sheet.rest.get("wandb"):
        sheet.found |= {"report_to": "wandb", "project_name": sheet.take("wandb")}
    if "iters" in sheet.rest:  # mlx-lm-lora then ignores epochs
        sheet.leave("epochs")
    mode = str(sheet.take("train_mode") or "normal").replace("-", "_")
    objective = MODES_OF_MLX_LM_LORA.get(mode)
    if objective is None:
        known = ", ".join(dict.fromkeys(MODES_OF_MLX_LM_LORA.values()))
        raise sheet.refusal(f"train_mode {mode}: only {known} are supported; use mlx-lm-lora for it")
    if objective in SAMPLING:
        read_sampling(sheet, objective)
        return
    loss = sheet.rest.get("dpo_cpo_loss_type", "sigmoid")
    if loss not in LOSSES_OF_MLX_LM_LORA.get(objective, (loss,)):
        known = ", ".join(LOSSES_OF_MLX_LM_LORA[objective])
        raise sheet.refusal(f"dpo_cpo_loss_type {loss} with train_mode {mode}: only {known} are supported")
    if loss == "sigmoid":
        sheet.take("dpo_cpo_loss_type")
    common.put_objective(sheet, objective, {"beta": "beta", "dpo_cpo_loss_type": "loss_type"})
    common.read_reference(sheet, "model", "reference_model_path")
    sheet.leave("alpha", "beta")  # alpha: of xpo, not the adapter's
    sheet.leave(*NUMBERS, "reward_weights")  # of grpo; its files often have them in other modes too
    if objective in OWNERS["cpo_alpha"]:
        sheet.found["cpo_alpha"] = 0.0
        sheet.note(f"{mode}: the likelihood of chosen answers is not added, as in mlx-lm-lora; --cpo-alpha adds it")
    if not common.trains_on_chats(sheet):
        sheet.leave("mask_prompt")
        sheet.note(f"{mode}: answers are compared by their own tokens; in mlx-lm-lora, the prompt's tokens count too")
    elif "mask_prompt" not in sheet.rest:
        sheet.assume(mask_prompt=False)


def read_sampling(sheet: Sheet, objective: str) -> None:
    """Set what samples and rewards answers; functions that are registered in a file of the user's are named by it here."""
    common.put_sampling(sheet, objective, NUMBERS, "grpo_loss_type")
    file, asked = sheet.take("reward_functions_file"), common.texts(sheet.take("reward_functions"))
    functions = {name: f"{file}:{name}" if file else None for name in asked}
    if not functions:
        sheet.note("reward_functions: not named, and mlx-lm-lora's own are not here; give --reward FILE.py:FUNCTION")
    common.put_rewards(sheet, functions, "reward_functions")
    if "reward" in sheet.found:
        sheet.note(
            "reward_functions: they also get completion_ids and every column of the data here; add **columns to them"
        )
    sheet.assume(**GRPO)
    common.read_reference(sheet, "model", "reference_model_path")
    sheet.leave("alpha", "mask_prompt")
    common.keep_cycles(sheet)


MLX_LM_LORA = Dialect(
    name="mlx-lm-lora",
    recognizes=lambda content: any(key in content for key in OF_MLX_LM_LORA),
    rules=(
        *(read_mode, partial(read_shape, default_scale=10.0), read_schedule),
        *(read_optimizer, read_data, read_counts, read_ours),
    ),
    names={"fine_tune_type": "method"},
    defaults={"batch_size": 4, "learning_rate": 1e-5, "max_grad_norm": 0.0, "valid_fraction": 0.0},
)
