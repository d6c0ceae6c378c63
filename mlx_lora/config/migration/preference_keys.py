"""Convert other trainers' keys for preference training; every dialect has its own names for them."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_lora.config.migration.sheet import Sheet
from mlx_lora.config.objectives import IMITATION

OF_SAMPLING = (
    *("reward", "reward_weights", "group_size", "max_new_tokens", "temp", "top_p", "min_p", "epsilon", "epsilon_high"),
    *("kl_beta", "mask_truncated", "updates_per_rollout"),
)
# The options of each objective; other options in a file are left out.
OPTIONS = {
    "sft": (),
    "dpo": ("loss_type", "loss_weights", "beta", "label_smoothing", "rpo_alpha", "discopop_tau", "reference_adapter"),
    "orpo": ("beta",),
    "simpo": ("beta", "label_smoothing", "simpo_gamma"),
    "cpo": ("beta", "label_smoothing", "cpo_alpha"),
    "kto": ("loss_type", "beta", "desirable_weight", "undesirable_weight", "reference_adapter"),
    "reward": ("center_rewards",),
    "grpo": (*OF_SAMPLING, "grpo_loss", "scale_rewards"),
    "rloo": OF_SAMPLING,
}
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # of dpo's losses, those with label smoothing
LISTS = ("loss_type", "loss_weights", "reference_adapter")  # not numbers


def trains_on_chats(sheet: Sheet) -> bool:
    """Return whether a file asks for training on the answers in the data."""
    return sheet.found.get("objective", "sft") in IMITATION


def read_prompts_trained(sheet: Sheet, key: str) -> None:
    """Set mask_prompt, the opposite of `key`; preferences only compare answers, so there `false` has no effect."""
    if trains_on_chats(sheet) and key in sheet.rest:
        sheet.put("mask_prompt", not sheet.switch(key), key)
    elif sheet.rest.get(key) is False:
        sheet.take(key)


def put_objective(sheet: Sheet, objective: str, key: str, options: Mapping[str, str]) -> None:
    """Set the objective and the options in a file that belong to it; the others are reported as left out.

    Args:
        sheet: read and written.
        objective: ours.
        key: that asked for it.
        options: their key -> our option.
    """
    sheet.put("objective", objective, key)
    for theirs, name in options.items():
        if theirs in sheet.rest and name in OPTIONS[objective]:
            sheet.put(name, sheet.take(theirs) if name in LISTS else sheet.number(theirs), theirs)
    found, losses = sheet.found, sheet.found.get("loss_type", "sigmoid")
    losses = losses if isinstance(losses, list) else str(losses).split(",")
    if objective == "dpo" and found.get("label_smoothing") and not any(loss in SMOOTHED for loss in losses):
        smoothing = found.pop("label_smoothing")
        sheet.left_out.append(next(theirs for theirs, name in options.items() if name == "label_smoothing"))
        sheet.note(
            f"label smoothing {smoothing:g}: left out, because of dpo's losses only {', '.join(SMOOTHED)} have it"
        )


def read_reference(sheet: Sheet, model: str, reference: str) -> None:
    """Drop a reference that is the model itself; refuse any other, because the run would then train toward another goal.

    Args:
        sheet: read and written.
        model, reference: keys.
    """
    asked = sheet.take(reference)
    if asked is None or asked == sheet.rest.get(model):
        return
    if "reference_adapter" in OPTIONS[sheet.found["objective"]]:
        raise sheet.refusal(
            f"{reference} {asked}: the reference is --model itself or an adapter on it (--reference-adapter); leave it out"
        )
    sheet.left_out.append(reference)


def say_plain_simpo(sheet: Sheet) -> None:
    """Note that SimPO comes without the likelihood that TRL's trainer adds to it by default (cpo_alpha 1)."""
    asked = sheet.number("cpo_alpha")
    if asked != 0:
        sheet.left_out += ["cpo_alpha"] if asked else []
        sheet.note(
            f"simpo: the likelihood of chosen answers is not added, as TRL does with cpo_alpha {asked or 1:g}; "
            "--objective cpo has it"
        )
