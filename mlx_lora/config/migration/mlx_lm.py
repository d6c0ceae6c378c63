"""Read mlx-lm's `lora --config` file.

Most of its keys are flags of ours with the same meaning, so a file with only those is read as ours, with our defaults.
It is read as mlx-lm's if it has a mapping that only mlx-lm reads: lora_parameters, lr_schedule, optimizer_config,
hf_dataset, or a name of a column (prompt_feature). Then mlx-lm's defaults are used for what it leaves out, because they
differ a lot: rank 8 and scale 20,
constant learning rate 1e-5, no clip, 16 blocks, prompts trained, Adam, 1,000 iterations of 4 rows, nothing held out of
the training file. Model and data have no default here.

Such a file may also have settings of ours: mlx-lm ignores them, so one file can be used for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lora.config.migration.column_keys import FEATURES, join_paths, take_features
from mlx_lora.config.migration.sheet import Dialect, Sheet
from mlx_lora.utils.parsing import hashable

OF_MLX_LM_LORA = ("train_mode", "training_mode", "train_type")
MAPPINGS = ("lora_parameters", "lr_schedule", "optimizer_config")
# Schedules that we have too (their name's first word is ours) -> what follows the rate in `arguments`.
ARGUMENTS = {"cosine_decay": ("steps", "end"), "linear_schedule": ("end", "steps")}
DEFAULT_RANK, DEFAULT_SCALE, DEFAULT_ITERS = 8, 20.0, 1000
COUNTED_IN_MICRO_BATCHES = ("iters", "steps_per_report", "steps_per_eval", "save_every")
COUNTED_DEFAULTS = {"iters": DEFAULT_ITERS, "steps_per_report": 10, "steps_per_eval": 200, "save_every": 100}


def recognizes(content: Mapping[str, Any]) -> bool:
    """Return whether a file has keys that only mlx-lm reads."""
    own = any(isinstance(content.get(key), dict) for key in MAPPINGS)
    own = own or any(content.get(key) for key in ("hf_dataset", *FEATURES))
    return own and not any(key in content for key in OF_MLX_LM_LORA)


def read_shape(sheet: Sheet, default_scale: float = DEFAULT_SCALE) -> None:
    """Set rank, alpha = scale * rank, dropout and targets from lora_parameters."""
    if sheet.rest.get("fine_tune_type") == "full":  # mlx-lm then ignores lora_parameters
        sheet.take("lora_parameters")
        sheet.note("full: trains the layers that --target-modules names, which are all-linear by default")
        return
    shape = sheet.part("lora_parameters")
    rank, scale, keys = shape.number("rank"), shape.number("scale"), shape.take("keys")
    alpha = (default_scale if scale is None else scale) * (rank or DEFAULT_RANK)
    if rank is not None:
        sheet.put("rank", rank, "lora_parameters.rank")
    sheet.assume("rank", DEFAULT_RANK)
    if scale is not None:
        sheet.put("alpha", alpha, "lora_parameters.scale")
        sheet.note(f"lora_parameters.scale {scale:g}: alpha {alpha:g}, because the scale here is alpha / rank")
    sheet.assume("alpha", alpha)
    if shape.rest.get("dropout") is not None:
        sheet.put("dropout", shape.take("dropout"), "lora_parameters.dropout")
    if keys:
        sheet.put("target_modules", keys, "lora_parameters.keys")
    sheet.left_out += [f"lora_parameters.{key}" for key in shape.rest]
    if sheet.switch("use_dora"):  # from before fine_tune_type existed
        sheet.put("method", "dora", "use_dora")


def read_schedule(sheet: Sheet) -> None:
    """Set schedule, peak rate and warm-up; without lr_schedule the rate is constant."""
    if isinstance(sheet.rest.get("lr_schedule"), str):  # a setting of ours
        return
    schedule = sheet.part("lr_schedule")
    if not schedule.rest:
        sheet.assume("lr_schedule", "constant")
        sheet.assume("warmup", 0)
        return
    name, arguments = hashable(schedule.take("name")), schedule.take("arguments")
    if not isinstance(arguments, list) or not arguments or arguments[0] is None:
        raise sheet.refusal("lr_schedule has no arguments, a list that begins with the learning rate; fix the file")
    stated = Sheet(sheet.file, dict(zip(("rate", *ARGUMENTS.get(name, ())), arguments, strict=False)), sheet.known)
    rate, asked = stated.number("rate"), sheet.number("learning_rate")
    sheet.put("learning_rate", rate, "lr_schedule.arguments")
    if asked not in (None, rate):
        sheet.note(f"learning_rate {asked:g}: lr_schedule's {rate:g} is used, as in mlx-lm")
    sheet.put("warmup", schedule.number("warmup") or 0, "lr_schedule.warmup")
    sheet.left_out += [f"lr_schedule.{key}" for key, value in schedule.rest.items() if value]
    if name not in ARGUMENTS:
        sheet.put("lr_schedule", "constant", "lr_schedule")
        sheet.left_out.append("lr_schedule.name")
        sheet.note(f"lr_schedule {name}: not supported; the rate stays at {rate:g} after the warm-up")
        return
    ours = name.split("_")[0]
    sheet.put("lr_schedule", ours, "lr_schedule")
    sheet.note(
        f"lr_schedule {name} to {stated.number('end') or 0:g} in {stated.number('steps')} steps: {ours} to 0 at the end of the run"
    )


def read_optimizer(sheet: Sheet) -> None:
    """Set optimizer and weight decay; only the chosen optimizer's part of optimizer_config counts, as in mlx-lm."""
    name = str(sheet.take("optimizer") or "").lower()
    if name:
        sheet.put("optimizer", name, "optimizer")
    sheet.assume("optimizer", "adam")
    chosen = sheet.found["optimizer"]
    part = sheet.part("optimizer_config").part(chosen)
    corrected, decay = part.switch("bias_correction"), part.take("weight_decay")
    if decay is not None:
        sheet.put("weight_decay", decay, f"optimizer_config.{chosen}.weight_decay")
    sheet.left_out += [f"optimizer_config.{chosen}.{key}" for key in part.rest]
    if chosen in ("adam", "adamw") and not corrected:
        sheet.note(f"optimizer {chosen}: its bias is always corrected here, as in torch; in mlx-lm only on request")
    if chosen == "sgd":
        sheet.assume("weight_decay", 0.0)


def read_data(sheet: Sheet) -> None:
    """Set data from hf_dataset, which may have several sets, and the columns from its features."""
    asked = sheet.take("hf_dataset")
    sets = asked if isinstance(asked, list) else [asked] if asked else []
    if not all(isinstance(one, dict) for one in sets):
        raise sheet.refusal("hf_dataset is not a mapping with a path; fix the file")
    take_features(sheet, sheet.rest, "")
    if not sets:
        return
    first, others = dict(sets[0]), [dict(one) for one in sets[1:]]
    paths = [one.pop("path", None) or one.pop("name", None) for one in (first, *others)]
    alike = all(one == first for one in others)
    take_features(sheet, first, "hf_dataset.")
    if paths[0] and "data" not in sheet.rest:
        sheet.put("data", join_paths(paths) if alike else paths[0], "hf_dataset.path")
    sheet.left_out += [f"hf_dataset.{key}" for key in first]
    if not alike:
        sheet.note(
            f"hf_dataset: {len(sets)} sets that are read differently, only the first ({paths[0]}) is used; join them in "
            "one file to use all of them"
        )


def read_counts(sheet: Sheet) -> None:
    """Convert mlx-lm's counts of micro-batches to counts of optimizer steps."""
    window = sheet.number("grad_accumulation_steps")
    if window is None or window <= 1:
        return
    sheet.put("grad_accumulation_steps", window, "grad_accumulation_steps")
    for name in COUNTED_IN_MICRO_BATCHES:
        if name == "iters" and "epochs" in sheet.rest:
            continue
        stated = sheet.number(name)
        steps = max(1, round((COUNTED_DEFAULTS[name] if stated is None else stated) / window))
        if stated is None:
            sheet.assume(name, steps)
        else:
            sheet.put(name, steps, name)
    sheet.note(
        f"grad_accumulation_steps {window}: iters and intervals count optimizer steps here, so they are divided by it"
        + (f" (iters {sheet.found['iters']})" if "iters" in sheet.found else "")
    )


def read_ours(sheet: Sheet) -> None:
    """Take keys that have the same name and meaning in both trainers, and settings of ours."""
    if sheet.rest.get("clear_cache_threshold") == 0:  # it means "never"
        sheet.take("clear_cache_threshold")
    for key in [key for key in sheet.rest if key in sheet.known]:
        sheet.put(key, sheet.take(key), key)


MLX_LM = Dialect(
    name="mlx-lm",
    recognizes=recognizes,
    rules=(read_shape, read_schedule, read_optimizer, read_data, read_counts, read_ours),
    names=("lora_layers",),  # its name until 2024
    defaults={
        "num_layers": 16,
        "batch_size": 4,
        "iters": DEFAULT_ITERS,
        "learning_rate": 1e-5,
        "max_grad_norm": 0.0,
        "mask_prompt": False,
        "valid_fraction": 0.0,
    },
)
