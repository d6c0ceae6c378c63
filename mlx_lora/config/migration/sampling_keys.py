"""Convert other trainers' keys for objectives that sample answers, GRPO and RLOO, and their batches of answers.

TRL and Axolotl count answers in a batch, of which those to one prompt are neighbors; here a batch is counted in prompts. A
reward function is named by its import path there, and by its file here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lora.config.migration.preference_keys import OPTIONS
from mlx_lora.config.migration.sheet import Sheet

# TRL's names, which Axolotl has under `trl:`, of numbers.
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
# mlx-lm-lora's names of numbers.
NUMBERS_OF_MLX_LM_LORA = {
    "group_size": "group_size",
    "max_completion_length": "max_new_tokens",
    "temperature": "temp",
    "epsilon": "epsilon",
    "epsilon_high": "epsilon_high",
    "beta": "kl_beta",
}
LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo")
SCALES = {True: "group", "group": "group", "batch": "batch", False: "none", "none": "none"}
# Reward functions that the trainers bring along -> ours.
READY = {"think_format_reward": "think_format"}
WHOLE_ROLLOUT = ("steps_per_generation", "generation_batch_size")


def put_sampling(
    sheet: Sheet,
    objective: str,
    key: str,
    source: Sheet | None = None,
    numbers: Mapping[str, str] = NUMBERS,
    loss: str = "loss_type",
) -> None:
    """Set the objective and its numbers; keys of other objectives are reported as left out.

    Args:
        sheet: read and written.
        objective: ours, grpo or rloo.
        key: that asked for it.
        source: the sheet that has the keys, if it is a part of the file; None: `sheet`.
        numbers: their key -> our option.
        loss: the key of grpo's loss.
    """
    told = sheet if source is None else source
    sheet.put("objective", objective, key)
    for theirs, name in numbers.items():
        value = told.number(theirs)
        if value is not None:
            sheet.put(name, value, theirs)
    if told.switch("mask_truncated_completions"):
        sheet.put("mask_truncated", True, "mask_truncated_completions")
    if objective == "grpo":
        _put_loss(sheet, told, loss)
    if "scale_rewards" in told.rest and objective == "grpo":
        scale = told.take("scale_rewards")
        if not isinstance(scale, bool | str) or scale not in SCALES:
            raise sheet.refusal(f"scale_rewards {scale}: only group, batch and none are supported; fix the file")
        sheet.put("scale_rewards", SCALES[scale], "scale_rewards")


def _put_loss(sheet: Sheet, told: Sheet, key: str) -> None:
    """Set the loss: gspo is what TRL calls a ratio of sequences."""
    asked, level = told.take(key), told.take("importance_sampling_level")
    if asked is not None and asked not in LOSSES:
        raise sheet.refusal(f"{key} {asked}: only {', '.join(LOSSES)} are supported")
    if level not in (None, "token", "sequence"):
        raise sheet.refusal(f"importance_sampling_level {level}: only token and sequence are supported")
    if level == "sequence":
        sheet.put("grpo_loss", "gspo", "importance_sampling_level")
        if asked != "grpo":
            sheet.note(
                f"importance_sampling_level sequence: --grpo-loss gspo, which takes every answer once, as {key} grpo does"
            )
    elif asked is not None:
        sheet.put("grpo_loss", asked, key)


def put_rewards(sheet: Sheet, told: Sheet, functions: Mapping[str, str | None], key: str) -> None:
    """Set the rewards and their weights; all of them or none, because a run without one has another goal.

    Args:
        sheet: written.
        told: has the weights.
        functions: their name -> ours, or None if there is none.
        key: of the functions.
    """
    weights = told.take("reward_weights")
    if not functions:
        return
    foreign = [name for name, ours in functions.items() if ours is None]
    if foreign:
        sheet.left_out += [key] + ["reward_weights"] * (weights is not None)
        sheet.note(
            f"{key} {', '.join(foreign)}: not a function in a file of yours; give all rewards as --reward FILE.py:FUNCTION, or "
            "by a name of docs/rewards.md such as number_match"
        )
        return
    sheet.put("reward", ",".join(filter(None, functions.values())), key)
    if weights is not None:
        many = weights if isinstance(weights, list) else str(weights).strip("[]").split(",")
        sheet.put("reward_weights", ",".join(str(weight).strip() for weight in many), "reward_weights")


def rewards_of_paths(sheet: Sheet, told: Sheet, key: str = "reward_funcs") -> dict[str, str | None]:
    """Take reward functions by import path, my.rewards.f, as my/rewards.py:f; TRL's own become ours or None."""
    asked = told.take(key)
    names = asked if isinstance(asked, list) else [] if asked is None else str(asked).split(",")
    found: dict[str, str | None] = {}
    for name in (str(one).strip() for one in names):
        module, _, function = name.rpartition(".")
        found[name] = f"{module.replace('.', '/')}.py:{function}" if module else READY.get(name)
        if name in READY:
            sheet.note(f"{name}: {READY[name]}, which also asks for an answer after the thought")
    return found


def read_prompts(sheet: Sheet, rows: str, default_rows: int) -> None:
    """Set the prompts of a batch from answers per micro-batch and accumulation, and the longest prompt.

    Args:
        sheet: read and written; it has the group's size.
        rows: key of the answers per micro-batch.
        default_rows: the trainer's default of it.
    """
    count, group = sheet.number(rows) or default_rows, max(1, sheet.found["group_size"])
    known = sheet.found.get("grad_accumulation_steps")  # Axolotl may say it by the rows of a whole step
    accumulation = sheet.number("gradient_accumulation_steps") or known or 1
    prompts, rest = divmod(count * accumulation, group)
    if rest or not prompts:
        raise sheet.refusal(
            f"{rows} {count} x gradient_accumulation_steps {accumulation}: {count * accumulation} answers in a step "
            f"cannot be divided into groups of {group}; fix the file, or give --batch-size in prompts"
        )
    whole = count % group == 0
    sheet.put("batch_size", count // group if whole else 1, rows)
    sheet.put("grad_accumulation_steps", accumulation if whole else prompts, "gradient_accumulation_steps")
    sheet.note(
        f"{rows} {count}: answers there, prompts here: batch_size {sheet.found['batch_size']}, "
        f"grad_accumulation_steps {sheet.found['grad_accumulation_steps']}"
    )
    for key in WHOLE_ROLLOUT:
        asked, usual = sheet.take(key), accumulation if key == "steps_per_generation" else count * accumulation
        if asked not in (None, usual):
            sheet.left_out.append(key)
            sheet.note(f"{key} {asked}: answers are sampled for one step at a time here")
    longest = sheet.number("max_prompt_length")
    if longest is not None:
        sheet.put("max_seq_length", longest, "max_prompt_length")
        sheet.note(f"max_prompt_length {longest}: longer prompts are left out, not cut")


def keep_cycles(sheet: Sheet) -> None:
    """Set intervals that end with the last update on the same answers, where the file leaves them to us."""
    updates = sheet.found.get("updates_per_rollout") or 1
    if updates > 1:
        for name, usual in (("save_every", 100), ("steps_per_eval", 200)):
            sheet.assume(name, -(-usual // updates) * updates)


def reads(objective: Any) -> bool:
    """Return whether an objective of ours samples its answers."""
    return objective in ("grpo", "rloo") and objective in OPTIONS
