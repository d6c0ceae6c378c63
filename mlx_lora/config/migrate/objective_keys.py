"""What other trainers' keys for preferences and for sampled answers become here; every trainer has its own names for them.

TRL and Axolotl count answers in a batch, of which those to one prompt are neighbors; here a batch is counted in prompts. A
reward function is named by its import path there, and by its file here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lora.config.migrate.common import UNCUT, Names, Sheet, read_batch
from mlx_lora.config.objectives import IMITATION, SAMPLING
from mlx_lora.config.rules import OWNERS

SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # of dpo's losses, those with label smoothing
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
    elif sheet.rest.get(key) is False:
        sheet.take(key)


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
        sheet.left_out.append(next(theirs for theirs, name in options.items() if name == "label_smoothing"))
        sheet.note(
            f"label smoothing {smoothing:g}: left out, because of dpo's losses only {', '.join(SMOOTHED)} have it"
        )
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
    sheet.left_out.append(reference)


def turn_off_dropout(sheet: Sheet, hint: str = "") -> None:
    """Leave the file's dropout out, because its trainer turns dropout off before it trains; `hint` ends the note."""
    if asked := sheet.number("lora_dropout"):
        sheet.note(f"lora_dropout {asked:g}: not used, as there: it is turned off for {sheet.found['objective']}{hint}")


def note_plain_simpo(sheet: Sheet) -> None:
    """Note that SimPO comes without the likelihood that TRL's trainer adds to it by default (cpo_alpha 1)."""
    asked = sheet.number("cpo_alpha")
    if asked != 0:
        sheet.left_out += ["cpo_alpha"] if asked else []
        sheet.note(
            f"simpo: the likelihood of chosen answers is not added, as TRL does with cpo_alpha {asked or 1:g}; "
            "--objective cpo has it"
        )


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
READY = {"think_format_reward": "think_format"}  # reward functions of TRL -> ours
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
    foreign = [name for name, ours in functions.items() if ours is None]
    if foreign:
        sheet.left_out += [key] + ["reward_weights"] * (weights is not None)
        sheet.note(
            f"{key} {', '.join(foreign)}: not a function in a file of yours; give all rewards as --reward FILE.py:FUNCTION, or "
            "by a name of docs/rewards.md such as number_match"
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
        if name in READY:
            sheet.note(f"{name}: {READY[name]}, which also asks for an answer after the thought")
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
        _put_prompts(sheet, names.rows, count, accumulation, group)
    for key in WHOLE_ROLLOUT:
        asked, usual = sheet.take(key), accumulation if key == "steps_per_generation" else count * accumulation
        if asked not in (None, usual):
            sheet.left_out.append(key)
            sheet.note(f"{key} {asked}: answers are sampled for one step at a time here")
    longest = sheet.number("max_prompt_length")
    if longest is not None:
        sheet.found["max_seq_length"] = longest
        if longest < UNCUT:
            sheet.note(f"max_prompt_length {longest}: longer prompts are left out, not cut")
    sheet.leave(names.length, names.packing)


def _put_prompts(sheet: Sheet, key: str, count: float, accumulation: float, group: int) -> None:
    """Set a batch's prompts from the answers of a micro-batch, `count`, and accumulation."""
    prompts, rest = divmod(count * accumulation, group)
    if rest or not prompts:
        raise sheet.refusal(
            f"{key} {count} x gradient_accumulation_steps {accumulation}: {count * accumulation} answers in a step "
            f"cannot be divided into groups of {group}; fix the file, or give --batch-size in prompts"
        )
    whole = count % group == 0
    sheet.found["batch_size"] = count // group if whole else 1
    sheet.found["grad_accumulation_steps"] = accumulation if whole else prompts
    sheet.note(
        f"{key} {count}: answers there, prompts here: batch_size {sheet.found['batch_size']}, "
        f"grad_accumulation_steps {sheet.found['grad_accumulation_steps']}"
    )


def keep_cycles(sheet: Sheet) -> None:
    """Set intervals that end with the last update on the same answers, where the file leaves them to us."""
    updates = sheet.told("updates_per_rollout") or 1
    if updates > 1:
        for name, usual in (("save_every", 100), ("steps_per_eval", 200)):
            sheet.assume(**{name: -(-usual // updates) * updates})
