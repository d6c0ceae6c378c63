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
from functools import partial
from typing import Any

from mlx_lora.config.migrate.common import (
    FEATURES,
    LOSSES,
    LOSSES_OF_MLX_LM_LORA,
    MODES_OF_MLX_LM_LORA,
    Dialect,
    Sheet,
    put_objective,
    put_rewards,
    put_sampling,
    read_columns,
    read_reference,
    read_sets,
    texts,
    trains_on_chats,
)
from mlx_lora.config.objectives import PAIRS, SAMPLING
from mlx_lora.config.rules import OWNERS
from mlx_lora.config.settings import FIELDS

MAPPINGS = ("lora_parameters", "lr_schedule", "optimizer_config")
OF_MLX_LM_LORA = ("train_mode", "training_mode", "train_type")
# Schedules that we have too (their name's first word is ours) -> what follows the rate in `arguments`.
ARGUMENTS = {"cosine_decay": ("steps", "end"), "linear_schedule": ("end", "steps")}
# What mlx-lm counts in micro-batches, with its defaults.
COUNTED = {"iters": 1000, "steps_per_report": 10, "steps_per_eval": 200, "save_every": 100}


def recognizes(content: Mapping[str, Any]) -> bool:
    """Return whether a file has keys that only mlx-lm reads."""
    return not any(key in content for key in OF_MLX_LM_LORA) and (
        any(isinstance(content.get(key), dict) for key in MAPPINGS)
        or any(content.get(key) for key in ("hf_dataset", *FEATURES))
        or (bool(content.get("fine_tune_type")) and "method" not in content)
    )


def read_shape(sheet: Sheet, scale: float = 20.0) -> None:
    """Set rank, alpha = scale * rank, dropout and targets from lora_parameters; `scale` is the trainer's default."""
    if sheet.found.get("method") == "full":  # mlx-lm then ignores lora_parameters
        sheet.take("lora_parameters")
        return
    shape = sheet.part("lora_parameters")
    sheet.copy({"rank": "rank"})  # a setting of ours, which mlx-lm ignores
    sheet.assume(rank=8)
    if (stated := shape.number("scale")) is not None:
        alpha = sheet.found["alpha"] = stated * sheet.told("rank")
        sheet.notes.append(f"lora_parameters.scale {stated:g}: alpha {alpha:g}, because the scale here is alpha / rank")
    sheet.assume(alpha=scale * sheet.told("rank"))


def read_schedule(sheet: Sheet) -> None:
    """Set schedule, peak rate and warm-up; without lr_schedule the rate is constant."""
    if "lr_schedule" not in sheet.rest:
        sheet.assume(lr_schedule="constant", warmup=0)
    if not isinstance(sheet.rest.get("lr_schedule"), dict):  # or a setting of ours
        return
    schedule = sheet.part("lr_schedule")
    name, arguments = str(schedule.take("name")), schedule.take("arguments")
    if not isinstance(arguments, list) or not arguments or arguments[0] is None:
        raise sheet.refusal("lr_schedule has no arguments, a list that begins with the learning rate; fix the file")
    stated = Sheet(sheet.file, dict(zip(("rate", *ARGUMENTS.get(name, ())), arguments, strict=False)))
    rate, asked = stated.number("rate"), sheet.number("learning_rate")
    if asked not in (None, rate):
        sheet.notes.append(f"learning_rate {asked:g}: lr_schedule's {rate:g} is used, as in mlx-lm")
    sheet.found |= {"learning_rate": rate, "warmup": schedule.number("warmup") or 0}
    if sheet.found["warmup"]:
        sheet.found["warmup_init"] = schedule.number("warmup_init") or 0
    if name in ARGUMENTS:
        lowest = (stated.number("end") or 0) / (rate or 1)
        sheet.found |= {
            "lr_schedule": name.split("_")[0],
            "decay_steps": stated.number("steps"),
            "min_lr_ratio": lowest,
        }
    else:
        sheet.refuse("lr_schedule", f"only {' and '.join(ARGUMENTS)} are here", name)


def read_optimizer(sheet: Sheet) -> None:
    """Set optimizer and weight decay; only the chosen optimizer's part of optimizer_config counts, as in mlx-lm."""
    sheet.put(optimizer=str(sheet.take("optimizer") or "").lower() or None)
    sheet.assume(optimizer="adam")
    chosen, parts = sheet.told("optimizer"), sheet.part("optimizer_config")
    own = parts.part(chosen)
    parts.rest.clear()
    corrected = own.switch("bias_correction")
    own.copy({"weight_decay": "weight_decay", "eps": "adam_epsilon"})
    sheet.found |= dict(zip(("adam_beta1", "adam_beta2"), own.take("betas") or (), strict=False))
    if chosen in ("adam", "adamw") and not corrected:
        sheet.assume(bias_correction=False)
    if chosen == "sgd":
        sheet.assume(weight_decay=0.0)


def read_data(sheet: Sheet) -> None:
    """Set data from hf_dataset, which may have several sets, and the columns from its features."""

    def read_set(own: Sheet, _: str) -> list[dict[str, Any]]:
        path, config = own.take("path") or own.take("name"), own.part("config")
        own.rest = features | own.rest
        read_features(own)
        subset = config.take("name")
        return [
            {"path": path, "subset": subset, "split": own.take("train_split") or "train[:80%]"},
            {"path": path, "subset": subset, "split": own.take("valid_split") or "train[-10%:]", "as": "valid"},
        ]

    features = {key: sheet.rest[key] for key in FEATURES if key in sheet.rest}
    read_features(sheet)
    read_sets(sheet, {"hf_dataset": {}}, read_set)


def read_features(sheet: Sheet) -> None:
    """Set our columns from mlx-lm's features; of a pair of which one is named, the other keeps mlx-lm's name."""
    given = {key: sheet.rest[key] for key in FEATURES if isinstance(sheet.rest.get(key), str)}
    read_columns(sheet, FEATURES)
    pair = {name: given.get(key, usual[0]) for key, (name, usual) in list(FEATURES.items())[:2]}
    if any(name in sheet.found for name in pair):
        sheet.assume(**pair)


def read_counts(sheet: Sheet) -> None:
    """Convert mlx-lm's counts of micro-batches to counts of optimizer steps."""
    sheet.copy({name: name for name in ("grad_accumulation_steps", "epochs", *COUNTED)})
    window = sheet.told("grad_accumulation_steps")
    if window is None or window <= 1:
        return
    counts = {name: max(1, round(sheet.found.get(name, usual) / window)) for name, usual in COUNTED.items()}
    sheet.found |= {name: steps for name, steps in counts.items() if name in sheet.found}
    sheet.assume(**counts)
    sheet.notes.append(
        f"grad_accumulation_steps {window}: iters and intervals count optimizer steps here, so they are divided by it"
        + (f" (iters {sheet.found['iters']})" if "iters" in sheet.found else "")
    )


def read_ours(sheet: Sheet) -> None:
    """Take keys that have the same name and meaning in both trainers, and settings of ours."""
    if sheet.rest.get("test") is True:
        sheet.drop({"train": (False,)})
    sheet.found |= {key: sheet.take(key) for key in list(sheet.rest) if key in FIELDS}
    if trains_on_chats(sheet):
        sheet.assume(mask_prompt=False)
        sheet.assume(**{"last_answer": True} if sheet.told("mask_prompt") else {})


NO_RESULT = ("clear_cache_threshold", "hf_dataset.test_split", "hf_dataset.name")
NAMES = {
    "fine_tune_type": "method", "lora_parameters.rank": "rank", "lora_parameters.dropout": "dropout",
    "lora_parameters.keys": "target_modules",
}  # fmt: skip
DEFAULTS = {"batch_size": 4, "learning_rate": 1e-5, "max_grad_norm": 0.0, "valid_fraction": 0.0}
VALUES = {
    "use_dora": {True: {"method": "dora"}},
    "clear_cache_threshold": {0: {}},
}  # before fine_tune_type existed; never
MLX_LM = Dialect(
    name="mlx-lm",
    recognizes=recognizes,
    names={**NAMES, "lora_layers": "num_layers"},  # until 2024
    values=VALUES,
    harmless=NO_RESULT,
    rules=(read_shape, read_schedule, read_optimizer, read_data, read_counts, read_ours),
    defaults={**DEFAULTS, "num_layers": 16, "iters": COUNTED["iters"], "long_rows": "cut"},
)


# mlx-lm-lora

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
GRPO = {"group_size": 4, "max_new_tokens": 512, "epsilon": 1e-4, "kl_beta": 0.1, "grpo_loss": next(iter(LOSSES))}


def read_mode(sheet: Sheet) -> None:
    """Set the objective and its options; refuse modes and losses that we do not have."""
    sheet.put(report_to="wandb" if sheet.rest.get("wandb") else None, project_name=sheet.take("wandb"))
    if "iters" in sheet.rest:  # mlx-lm-lora then ignores epochs
        sheet.leave("epochs")
    modes = (sheet.take("training_mode"), sheet.take("train_mode"), "normal")
    mode = sheet.rest["train_mode"] = str(next(filter(None, modes))).replace("-", "_")
    objective = sheet.one_of("train_mode", MODES_OF_MLX_LM_LORA)
    if objective in SAMPLING:
        read_sampling(sheet, objective)
    else:
        losses = LOSSES_OF_MLX_LM_LORA.get(objective, {"sigmoid": None})
        sheet.put(loss_type=sheet.one_of("dpo_cpo_loss_type", losses, f" with train_mode {mode}"))
        put_objective(sheet, objective, {"beta": "beta"})
        sheet.leave(*NUMBERS, "reward_weights")  # of grpo; its files often have them in other modes too
    read_reference(sheet, sheet.rest.get("model"), "reference_model_path")
    sheet.leave("alpha")  # of xpo, not the adapter's
    if objective in OWNERS["cpo_alpha"]:
        sheet.found["cpo_alpha"] = 0.0
        sheet.notes.append(
            f"{mode}: the likelihood of chosen answers is not added, as in mlx-lm-lora; --cpo-alpha adds it"
        )
    if not trains_on_chats(sheet):
        sheet.leave("mask_prompt")
    if objective in PAIRS:
        sheet.notes.append(
            f"{mode}: answers are compared by their own tokens; in mlx-lm-lora, the prompt's tokens count too"
        )


def read_sampling(sheet: Sheet, objective: str) -> None:
    """Set what samples and rewards answers; functions that are registered in a file of the user's are named by it here."""
    put_sampling(sheet, objective, NUMBERS, "grpo_loss_type")
    file, asked = sheet.take("reward_functions_file"), texts(sheet.take("reward_functions"))
    put_rewards(sheet, {name: f"{file}:{name}" if file else None for name in asked}, "reward_functions")
    if not asked:
        sheet.notes.append(
            "reward_functions: not named, and mlx-lm-lora's own are not here; give --reward FILE.py:FUNCTION"
        )
    elif file:
        sheet.notes.append(
            "reward_functions: they also get completion_ids and every column of the data here; add **columns to them"
        )
    sheet.assume(**GRPO)


MLX_LM_LORA = Dialect(
    name="mlx-lm-lora",
    recognizes=lambda content: any(key in content for key in OF_MLX_LM_LORA),
    names={
        **NAMES,
        "train_type": "method",
        "gradient_accumulation_steps": "grad_accumulation_steps",
    },
    values={**VALUES, **{key: {True: {"bits": bits}} for key, bits in BITS.items()}},
    harmless=NO_RESULT,
    rules=(
        *(read_mode, partial(read_shape, scale=10.0), read_schedule),
        *(read_optimizer, read_data, read_counts, read_ours),
    ),
    defaults=DEFAULTS,
)
