"""Answer the same few held-out prompts at every validation, always with the likeliest token, so that one sees texts change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_lora.data.encode import EncodedSet
from mlx_lora.models.group_sampling import SamplingOptions, answer_keys, sample_groups
from mlx_lora.objectives.user_rewards import summed
from mlx_lora.training.held_out import spaced_by_length
from mlx_lora.training.rollouts import Answering

LIKELIEST = 1.0  # min-p that leaves only the likeliest token


@dataclass(frozen=True)
class FixedPrompt:
    """A held-out prompt.

    Attributes:
        tokens: up to where the answer begins.
        fact: what rewards see of it.
    """

    tokens: list[int]
    fact: dict[str, Any]


def fixed_prompts(rows: EncodedSet, most: int) -> list[FixedPrompt]:
    """Return up to `most` different prompts of rows with room for answers, spaced evenly by length."""
    found: list[FixedPrompt] = []
    for example in spaced_by_length(rows, min(most, rows.examples)).tolist():
        tokens, mask = rows.row(example * rows.group)
        begun = tokens[: int(np.argmax(mask))].tolist()
        if rows.facts is not None and begun not in [one.tokens for one in found]:
            found.append(FixedPrompt(begun, rows.facts[example]))
    return found


def greedy_answers(answering: Answering, prompts: Sequence[FixedPrompt]) -> list[dict[str, Any]]:
    """Return an answer to each prompt with its rewards, as plain values; no random stream of the run is used.

    Each has `prompt` (as rewards see it), `answer`, `length` in tokens, `truncated`, `reward` (the weighted sum, None
    without one) and `rewards` by name.

    Raises:
        RunError: a reward failed.
    """
    base, most = answering.base, answering.settings.objective.max_new_tokens
    ends, training = frozenset(base.tokenizer.eos_token_ids), base.model.training
    options = SamplingOptions(1, most, min_p=LIKELIEST)
    base.model.eval()
    try:
        tokens = [prompt.tokens for prompt in prompts]
        with answering.form.model_of(base) as model:
            answers, _ = sample_groups(model, tokens, options, ends, answer_keys(0, 0, len(prompts)))
    finally:
        base.model.train(training)
    found = answering.rewards_of([prompt.fact for prompt in prompts], answers)
    names, totals = [reward.name for reward in answering.rewards], summed(found, answering.rewards)
    return [
        {
            "prompt": prompt.fact["prompt"],
            "answer": answering.text_of(answer),
            "length": len(answer),
            "truncated": len(answer) == most and answer[-1] not in ends,
            "reward": _known(total),
            "rewards": {name: _known(value) for name, value in zip(names, own, strict=True)},
        }
        for prompt, answer, total, own in zip(prompts, answers, totals.tolist(), found.tolist(), strict=True)
    ]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
