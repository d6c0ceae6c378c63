"""Answer a few held-out prompts greedily at every validation, so that a person sees how the answers change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.objectives.base import FixedPrompt
from mlx_lora.rollouts.rewards import summed
from mlx_lora.rollouts.rollout import Rollouts
from mlx_lora.rollouts.sampler import SamplingOptions, answer_keys, sample_groups

LIKELIEST = 1.0  # min-p that leaves only the likeliest token


def fixed_prompts(rows: EncodedSet, most: int) -> list[FixedPrompt]:
    """Return up to `most` different prompts of rows with room for answers, spaced evenly by length."""
    found: list[FixedPrompt] = []
    for example in spaced_by_length(rows, min(most, rows.examples)).tolist():
        tokens, mask = rows.row(example * rows.group)
        begun = tokens[: int(np.argmax(mask))].tolist()
        if rows.facts is not None and begun not in [one.tokens for one in found]:
            found.append(FixedPrompt(begun, rows.facts[example]))
    return found


def greedy_answers(rollouts: Rollouts, prompts: Sequence[FixedPrompt]) -> list[dict[str, Any]]:
    """Return an answer to each prompt with its rewards, as plain values; no random stream of the run is used.

    Each has `prompt` (as rewards see it), `answer`, `length` in tokens, `truncated`, `reward` (the weighted sum, None
    without one) and `rewards` by name.

    Raises:
        RunError: a reward failed.
    """
    base, most = rollouts.base, rollouts.settings.objective.max_new_tokens
    ends, training = frozenset(base.tokenizer.eos_token_ids), base.model.training
    options = SamplingOptions(1, most, min_p=LIKELIEST)
    base.model.eval()
    try:
        tokens = [prompt.tokens for prompt in prompts]
        with rollouts.form.model_of(base) as model:
            answers, _ = sample_groups(model, tokens, options, ends, answer_keys(0, 0, len(prompts)))
    finally:
        base.model.train(training)
    found = rollouts.rewards_of([prompt.fact for prompt in prompts], answers)
    names, totals = [reward.name for reward in rollouts.rewards], summed(found, rollouts.rewards)
    return [
        {
            "prompt": prompt.fact["prompt"],
            "answer": rollouts.text_of(answer),
            "length": len(answer),
            "truncated": len(answer) == most and answer[-1] not in ends,
            "reward": _finite_or_none(total),
            "rewards": {name: _finite_or_none(value) for name, value in zip(names, own, strict=True)},
        }
        for prompt, answer, total, own in zip(prompts, answers, totals.tolist(), found.tolist(), strict=True)
    ]


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
