"""Look up an objective by name and build it from a run's settings.

A new objective is a file in this room with a function that takes `ObjectiveSettings`, and one more row in `OBJECTIVES`. Its
file is imported when the objective is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import mlx.nn as nn

from mlx_lora.config.objectives import OF_SAMPLING, SAMPLING, WITH_IMAGES, ObjectiveSettings
from mlx_lora.models.encoder import is_encoder
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import unknown_name

if TYPE_CHECKING:
    from mlx_lora.objectives.base import Objective

# Name -> file in this room and function in it.
OBJECTIVES = {
    "sft": ("sft", "sft"),
    "dpo": ("preference", "dpo"),
    "orpo": ("preference", "orpo"),
    "simpo": ("preference", "simpo"),
    "cpo": ("preference", "cpo"),
    "kto": ("preference", "kto"),
    "reward": ("preference", "reward"),
    "grpo": ("grpo", "policy"),
    "rloo": ("grpo", "policy"),
    "distill": ("distill", "distill"),
    "classify": ("classify", "classify"),
    "rerank": ("rerank", "rerank"),
    "embed": ("embed", "embed"),
    "vision_sft": ("vision_sft", "vision_sft"),
}
# Settings of objectives that reward sampled answers, and of those with a teacher.
OF_REWARDS = (
    "reward",
    "environment",
    "tools",
    "max_turns",
    "reward_weights",
    "reward_errors",
    "reward_timeout",
    "epsilon",
    "epsilon_high",
    "kl_beta",
)
OF_TEACHER = ("teacher", "teacher_prompt", "teacher_top_k", "divergence", "jsd_beta", "distill_temp", "on_policy")
OF_TEXTS = (
    "embed_loss",
    "embed_temp",
    "triplet_margin",
    "negatives",
    "matryoshka_dims",
    "pooling",
    "query_prompt",
    "document_prompt",
)
# Options that only some objectives use; with any other objective they are refused, because they would be ignored.
OWN_OPTIONS = {
    "images": WITH_IMAGES,
    "loss_type": ("dpo", "kto"),
    "loss_weights": ("dpo",),
    "beta": ("dpo", "orpo", "simpo", "cpo", "kto"),
    "label_smoothing": ("dpo", "simpo", "cpo"),
    "discopop_tau": ("dpo",),
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("cpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "shared_prefix": ("dpo", "orpo", "simpo", "cpo", "reward", *SAMPLING),
    "reference_adapter": ("dpo", "kto"),
    "center_rewards": ("reward",),
    "grpo_loss": ("grpo",),
    "scale_rewards": ("grpo",),
    **dict.fromkeys(OF_REWARDS, SAMPLING),
    **dict.fromkeys(OF_SAMPLING, (*SAMPLING, "distill")),
    "own_prompts": ("distill",),
    **dict.fromkeys(("problem_type", "labels", "class_weights"), ("classify",)),
    **dict.fromkeys(("rerank_loss", "candidates"), ("rerank",)),
    **dict.fromkeys(OF_TEACHER, ("distill",)),
    **dict.fromkeys(OF_TEXTS, ("embed",)),
}


def objective_of(settings: ObjectiveSettings) -> Objective:
    """Return the objective that the settings ask for.

    Raises:
        InputError: an unknown objective or loss type, or an option that the objective does not have.
    """
    row = OBJECTIVES.get(settings.objective)
    if row is None:
        raise InputError(f"--objective {settings.objective!r}: {unknown_name(settings.objective, OBJECTIVES)}")
    _refuse_foreign(settings)
    file, function = _with_images(settings) if settings.images else row
    objective = getattr(import_module(f"mlx_lora.objectives.{file}"), function)(settings)
    if settings.shared_prefix == "on" and settings.images:
        raise InputError(
            "--shared-prefix on with --images: each answer is computed with its prompt's pictures; leave it out"
        )
    if settings.shared_prefix != ObjectiveSettings.shared_prefix and not (objective.shares_prompts or settings.images):
        raise InputError(
            f"--shared-prefix with --objective {settings.objective}: only objectives with several answers to a prompt use it; leave "
            "it out"
        )
    return objective


def _with_images(settings: ObjectiveSettings) -> tuple[str, str]:
    """Return the file and the function of an objective with --images.

    Raises:
        InputError: it has none.
    """
    if settings.objective not in WITH_IMAGES:
        imitation = (
            "; imitate answers about pictures with --objective vision_sft" if settings.objective == "sft" else ""
        )
        raise InputError(
            f"--images with --objective {settings.objective}: only {', '.join(WITH_IMAGES)} use it; leave it out{imitation}"
        )
    kind = "policy" if settings.objective in SAMPLING else "preference"
    return f"vision_{kind}", f"vision_{kind}"


def _refuse_foreign(settings: ObjectiveSettings) -> None:
    """Refuse options that the objective does not use."""
    defaults = ObjectiveSettings()
    for name, owners in OWN_OPTIONS.items():
        if name in ("shared_prefix", "images"):  # `objective_of` says more on these
            continue
        if settings.objective not in owners and getattr(settings, name) != getattr(defaults, name):
            flag = "--" + name.replace("_", "-")
            only = f"{', '.join(owners)} {'use' if owners[1:] else 'uses'}"
            raise InputError(f"{flag} with --objective {settings.objective}: only {only} it; leave it out")


def check_kind(model: nn.Module, model_id: str, objective: Objective) -> None:
    """Refuse an encoder for an objective that does not mask the padding, which every token of an encoder would see.

    Raises:
        InputError: it is one.
    """
    if is_encoder(model) and not (objective.vectors or objective.on_encoders):
        raise InputError(
            f"--objective {objective.name} with --model {model_id}: it is an encoder, which writes no text; train it "
            "with --objective embed, rerank or classify, or choose a language model"
        )
