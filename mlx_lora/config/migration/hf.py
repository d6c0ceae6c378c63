"""Rules that Axolotl, LLaMA-Factory and TRL share, because all use transformers' trainer and PEFT.

Each function reads the keys of one topic, whose names it is given, and sets ours.
"""

from __future__ import annotations

import re
from typing import Any

from mlx_lora.config.migration.sheet import Sheet
from mlx_lora.config.settings import LOGGERS
from mlx_lora.utils.parsing import hashable

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "muon": "muon",
}
# Chat templates that we have with the same name and text.
TEMPLATES = ("alpaca", "chatml")
HALF_PRECISION = ("bf16", "fp16", "bfloat16", "float16", "pure_bf16")
# If several methods are on, the first of these is used.
PRECEDENCE = ("full", "dora", "pissa", "relora", "lora-plus", "rslora")
# The last part of a regular expression on layer names, such as (up|down)_proj; ([qkv]_proj) is not supported.
LAST_NAMES = re.compile(r"(?:.*[.)*+])?(?P<before>\w*)\((?P<names>\w+(?:\|\w+)*)\)(?P<after>\w*)\$?")


def read_length(sheet: Sheet, epochs: str) -> None:
    """Set iters from max_steps, which overrides epochs there too, or else epochs."""
    steps, passes = sheet.number("max_steps"), sheet.number(epochs)
    if steps is not None and steps > 0:
        sheet.put("iters", steps, "max_steps")
    elif passes is not None:
        sheet.put("epochs", passes, epochs)


def read_warmup(sheet: Sheet, schedule: str) -> None:
    """Set schedule and warm-up; a number of steps overrides a fraction of them, as in transformers."""
    steps, share = sheet.number("warmup_steps"), sheet.number("warmup_ratio")
    name = hashable(sheet.take(schedule))
    warmup = steps if steps or share is None else share
    if warmup is not None:
        sheet.put("warmup", warmup, "warmup_ratio" if warmup == share else "warmup_steps")
    if name in SCHEDULES:
        sheet.put("lr_schedule", SCHEDULES[name], schedule)
    elif name is not None:
        shape = "linear" if "linear" in str(name) or "polynomial" in str(name) else "cosine"
        sheet.put("lr_schedule", shape, schedule)
        sheet.note(f"{schedule} {name}: not supported; a {shape} decay to zero is used instead")
    if name == "constant":  # in transformers this schedule has no warm-up, whatever the file says
        sheet.found["warmup"] = 0


def read_optimizer(sheet: Sheet, key: str) -> None:
    """Set the optimizer; the 8-bit and paged variants of AdamW only differ in how they store their state."""
    name = sheet.take(key)
    if name is None:
        return
    known = OPTIMIZERS.get(str(name))
    sheet.put("optimizer", known or "adamw", key)
    if known is None and "adamw" in str(name):
        sheet.note(f"{key} {name}: adamw is used, with its state in float32, which is small for an adapter")
    elif known is None:
        sheet.note(f"{key} {name}: not supported; adamw is used instead, so check the learning rate")


def read_precision(sheet: Sheet) -> None:
    """Leave the dtype to the device, and note it."""
    asked = [key for key in HALF_PRECISION if sheet.take(key) not in (None, False)]
    if sheet.switch("float32"):
        sheet.put("dtype", "float32", "float32")
    elif asked:
        sheet.note(f"{' and '.join(asked)}: dtype auto is used (bfloat16 on a GPU, float32 on a CPU), or --dtype")


def put_bits(sheet: Sheet, key: str, bits: Any) -> None:
    """Set the bits that the base is quantized to."""
    sheet.put("bits", bits, key)
    sheet.note(f"{key}: the base is quantized to {bits} bits by MLX's affine mode, in groups of 64 weights")


def read_batch(sheet: Sheet, rows: str, length: str, packing: str, defaults: tuple[int, int]) -> None:
    """Set the longest sequence and the rows per micro-batch; packed rows become a budget of as many tokens.

    Args:
        sheet: read and written.
        rows: key of the rows per micro-batch.
        length: key of the longest sequence in tokens.
        packing: key that is true if rows are packed to that length.
        defaults: the trainer's default rows and length.
    """
    count, tokens, packed = sheet.number(rows), sheet.number(length), sheet.switch(packing)
    if tokens is not None:
        sheet.put("max_seq_length", tokens, length)
    sheet.assume("max_seq_length", defaults[1])
    if packed:
        budget = (count or defaults[0]) * (tokens or defaults[1])
        sheet.put("batch_tokens", budget, packing)
        sheet.note(f"{packing}: rows of similar length share a batch of {budget} tokens instead; rows are not joined")
    elif count is not None:
        sheet.put("batch_size", count, rows)
    else:
        sheet.assume("batch_size", defaults[0])


def read_held_out(sheet: Sheet, key: str) -> None:
    """Set the fraction of rows held out; a number of rows has no counterpart."""
    share = sheet.number(key)
    if share is not None and share < 1:
        sheet.put("valid_fraction", share, key)
    elif share is not None:
        sheet.put("valid_fraction", 0.05, key)
        sheet.note(f"{key} {share}: a number of rows has no counterpart here, so 5% of the rows are held out")
    sheet.assume("valid_fraction", 0.0)


def read_intervals(sheet: Sheet) -> None:
    """Set the steps between reports, validations and checkpoints; fractions of the run have no counterpart."""
    for key, name in (
        ("logging_steps", "steps_per_report"),
        ("eval_steps", "steps_per_eval"),
        ("save_steps", "save_every"),
    ):
        steps = sheet.number(key)
        if steps is not None and steps >= 1:
            sheet.put(name, steps, key)
        elif steps is not None:
            sheet.left_out.append(key)
    for keys, name in ((("eval_strategy", "evaluation_strategy"), "val_batches"), (("save_strategy",), "save_every")):
        for key in keys:
            when = sheet.take(key)
            if when in ("no", False):  # YAML 1.1 reads an unquoted no as false
                sheet.put(name, 0, key)
            elif when not in (None, "steps"):
                sheet.left_out.append(key)


def read_targets(sheet: Sheet, key: str, all_names: tuple[str, ...]) -> None:
    """Set the target layers from names, or from the last part of a regular expression."""
    asked = sheet.take(key)
    names = (
        asked if isinstance(asked, list) else [] if asked is None else [part.strip() for part in str(asked).split(",")]
    )
    if not names:
        return
    if any(name in all_names for name in names):
        sheet.put("target_modules", "all-linear", key)
    elif all(re.fullmatch(r"[\w.]+", str(name)) for name in names):
        sheet.put("target_modules", ",".join(map(str, names)), key)
    elif match := LAST_NAMES.fullmatch(str(asked[0] if isinstance(asked, list) else asked)):
        layers = ",".join(match["before"] + name + match["after"] for name in match["names"].split("|"))
        sheet.put("target_modules", layers, key)
        sheet.note(f"{key}: a regular expression, read as {layers} in all modules")
    else:
        sheet.left_out.append(key)
        sheet.note(f"{key}: an unsupported regular expression; all-linear is used unless --target-modules is given")


def read_template(sheet: Sheet, key: str, own: tuple[str, ...]) -> None:
    """Set the chat template if we have it; otherwise the model's own template is used.

    Args:
        sheet: read and written.
        key: of the template's name.
        own: names that mean the model's own template.
    """
    name = sheet.take(key)
    if name in TEMPLATES:
        sheet.put("chat_template", name, key)
    elif name is not None and name not in own:
        sheet.note(f"{key} {name}: chats are rendered with the model's own template; --chat-template sets another")


def choose_method(sheet: Sheet, on: dict[str, str]) -> None:
    """Set the method from the switches that are on; we have one method, so others are left out.

    An exception is rsLoRA, which only scales by alpha / sqrt(r) instead of alpha / r: together with another method, it
    becomes that method's alpha.

    Args:
        sheet: already has rank and alpha.
        on: method -> the key that turned it on.
    """
    method = next((name for name in PRECEDENCE if name in on), "lora")
    sheet.put("method", method, on.get(method, "method"))
    for other, key in on.items():
        if other == method:
            continue
        rank, alpha = sheet.found.get("rank"), sheet.found.get("alpha")
        if other == "rslora" and method != "full" and rank and alpha:
            sheet.found["alpha"] = alpha * rank**0.5
            sheet.note(
                f"{key}: with {method}, alpha {alpha:g} / sqrt({rank}) becomes alpha {sheet.found['alpha']:g} / {rank}"
            )
        else:
            sheet.left_out.append(key)
    if method == "full":
        sheet.leave("lora_r", "lora_rank", "lora_alpha", "lora_dropout", "lora_modules_to_save", "additional_target")
        sheet.note("full: trains the layers that --target-modules names, which are all-linear by default")


def read_loggers(sheet: Sheet) -> None:
    """Set the loggers that are supported; others are left out."""
    asked = sheet.take("report_to")
    names = asked if isinstance(asked, list) else [] if asked is None else [asked]
    if sheet.switch("use_swanlab"):
        names = [*names, "swanlab"]
    if ours := [name for name in names if hashable(name) in LOGGERS]:
        sheet.put("report_to", ",".join(ours), "report_to")
    if any(name not in (*LOGGERS, "none") for name in names):
        sheet.left_out.append("report_to")
