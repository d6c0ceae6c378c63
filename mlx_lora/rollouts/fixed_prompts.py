"""Answer a few held-out prompts greedily at every validation, so that a person sees how the answers change."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.objectives.base import FixedPrompt
from mlx_lora.rollouts.environment import play, seeds_of
from mlx_lora.rollouts.rewards import summed
from mlx_lora.rollouts.rollout import Rollouts
from mlx_lora.rollouts.sampler import SamplingOptions, answer_keys

log = logging.getLogger(__name__)

LIKELIEST = 1.0  # min-p that leaves only the likeliest token


def fixed_prompts(rows: EncodedSet, most: int) -> list[FixedPrompt]:
    """Return up to `most` different prompts of rows with room for answers, spaced evenly by length."""
    found: list[FixedPrompt] = []
    for example in spaced_by_length(rows, min(most, rows.examples)).tolist():
        tokens, mask = rows.row(example * rows.group)
        begun = tokens[: int(np.argmax(mask))].tolist()
        if rows.facts is None:
            continue
        prompt = FixedPrompt(begun, rows.facts[example])
        if _asked(prompt) not in map(_asked, found):
            found.append(prompt)
    return found


def _asked(prompt: FixedPrompt) -> tuple[list[int], Any]:
    """Return what tells prompts apart: the same question may be asked about several pictures."""
    return prompt.tokens, prompt.fact.get("pictures")


def greedy_answers(rollouts: Rollouts, prompts: Sequence[FixedPrompt]) -> list[dict[str, Any]]:
    """Return an answer to each prompt with its rewards, as plain values; no random stream of the run is used.

    Each has `prompt` (as rewards see it), `answer`, `length` in tokens, `truncated`, `reward` (the weighted sum, None
    without one) and `rewards` by name; of an episode with tools also `messages`, and `answer` shows calls and results.

    Raises:
        RunError: a reward failed.
    """
    base, env = rollouts.base, rollouts.env
    training, count = base.model.training, len(prompts)
    tokens, facts = [prompt.tokens for prompt in prompts], [prompt.fact for prompt in prompts]
    options = SamplingOptions(1, rollouts.settings.objective.max_new_tokens, min_p=LIKELIEST)
    greedy = rollouts.agent(options, lambda turn: answer_keys(0, 0, count, turn), facts)
    base.model.eval()
    try:
        played = play(env, greedy, tokens, facts, seeds_of(0, 0, range(count)), group=1)
    finally:
        base.model.train(training)
    for note in played.notes:
        log.info(note)
    names, totals = [reward.name for reward in env.rewards], summed(played.rewards, env.rewards)
    return [
        {
            "prompt": prompt.fact["prompt"],
            "answer": talk_text(episode.messages) if episode.messages else env.text_of(episode.tokens),
            **({"messages": episode.messages} if episode.messages else {}),
            "length": int(episode.sampled.sum()),
            "truncated": episode.truncated,
            "reward": _finite_or_none(total),
            "rewards": {name: _finite_or_none(value) for name, value in zip(names, own, strict=True)},
        }
        for prompt, episode, total, own in zip(
            prompts, played.episodes, totals.tolist(), played.rewards.tolist(), strict=True
        )
    ]


def talk_text(messages: Sequence[dict[str, Any]]) -> str:
    """Return the turns of an episode with tools as a person reads them: a call after an arrow, its result or a reply after another."""
    lines = []
    for message in messages:
        if message["role"] in ("tool", "user"):
            lines.append(f"← {message['content']}")
            continue
        lines += [message["content"]] if message["content"].strip() else []
        for call in message.get("tool_calls", ()):
            function = call["function"]
            lines.append(f"→ {function['name']} {json.dumps(function['arguments'], ensure_ascii=False, default=str)}")
    return "\n".join(lines)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
