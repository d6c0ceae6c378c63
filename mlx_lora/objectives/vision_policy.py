"""Rewards of answers about pictures: the policy objectives of objectives/grpo.py, on prompts that have pictures.

Answers are sampled with the pictures in the prompt (rollouts/rollout.py), and a step computes their log-probabilities
with the same pictures (objectives/pictures.py). Rewards get the columns of the row as they are in the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_lora.models.image_inputs import ImageInputSpec
from mlx_lora.objectives.base import RunContext
from mlx_lora.objectives.grpo import Policy, policy
from mlx_lora.objectives.pictures import WithPictures
from mlx_lora.rollouts.rewards import reward_folders
from mlx_lora.rollouts.rollout import PictureRollouts
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.losses.cross_entropy import Loss
    from mlx_lora.rollouts.generator import SamplingForm
    from mlx_lora.rollouts.rollout import Rollouts


@dataclass(eq=False)
class VisionPolicy(WithPictures, Policy):
    """An objective whose sampled answers to prompts with pictures are rewarded."""

    def check(self, settings: ObjectiveSettings, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().check(settings, functions)
        if folders := reward_folders(settings):
            raise InputError(
                f"--reward {folders[0]} with --images: a reward model reads text alone; give a function, or another reward"
            )

    def open(self, ctx: RunContext) -> None:
        if ImageInputSpec.of(ctx.base.config).prompt:
            raise InputError(
                f"{self.asked} with a {ctx.base.config.get('model_type')} model: several answers to a prompt that sees itself "
                "cannot be sampled together; choose another model, or --objective dpo"
            )
        super().open(ctx)

    def make_rollouts(self, ctx: RunContext, loss: Loss, form: SamplingForm) -> Rollouts:
        plain = super().make_rollouts(ctx, loss, form)
        return PictureRollouts(**vars(plain), seeing=self)


def vision_policy(settings: ObjectiveSettings) -> Policy:
    """Return grpo or rloo with --images; its options are those without."""
    plain = policy(settings)
    return VisionPolicy(**{one.name: getattr(plain, one.name) for one in dataclasses.fields(plain)})
