"""Sample answers to held-out prompts with and without adapters, and reward them part by part.

    python benchmarks/sides/reward_parts.py JOB.json      (reward_learning.py runs this)

Every adapter answers the same prompts with the same random streams. A part is one `--reward`; the mean of their
weighted sum is the reward that training saw. Answers are sampled as in training, and once more greedily.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx_lora  # noqa: F401  # isort: skip  (first: it gives MLX a fast BLAS)
from shared import read_job, write_result

from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import load_eval_set
from mlx_lora.models.load import Base, load_base
from mlx_lora.objectives.table import objective_of
from mlx_lora.rollouts.rewards import rewards_for, rewards_of, summed
from mlx_lora.rollouts.sampler import SamplingOptions, answer_keys, sample_groups
from mlx_lora.trainer.build import put_adapter

PROMPTS_AT_ONCE = 8
GREEDY = 1e-4  # a temperature at which the likeliest token is drawn
SHOWN = 3  # prompts whose greedy answers are kept as texts


def answers_to(base: Base, rows: EncodedSet, options: SamplingOptions, seed: int) -> list[list[int]]:
    """Return the tokens of G answers to each prompt, in the prompts' order."""
    ends = frozenset(base.tokenizer.eos_token_ids)
    prompts = [rows.row(number)[0].tolist() for number in range(len(rows))]
    found = []
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = prompts[first : first + PROMPTS_AT_ONCE]
        found += sample_groups(base.model, some, options, ends, answer_keys(seed, first, len(some) * options.group))[0]
    return found


def rewarded(base: Base, rows: EncodedSet, settings: TrainSettings, answers: list[list[int]]) -> dict[str, Any]:
    """Return the mean of each reward and of their weighted sum, and the texts of the first prompts' first answers."""
    facts = rows.facts or ()
    group = len(answers) // len(facts)
    of_rows = [fact for fact in facts for _ in range(group)]
    texts = [base.hf_tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    columns = {name: [fact["columns"].get(name) for fact in of_rows] for name in facts[0]["columns"]}
    columns.pop("prompt", None)
    prompts = [fact["prompt"] for fact in of_rows]
    arguments = {**columns, "prompts": prompts, "completions": texts, "completion_ids": answers}
    rewards = rewards_of(settings.objective)
    values = rewards_for(rewards, arguments, settings.objective, print)
    return {
        "reward": float(summed(values, rewards).mean()),
        "parts": dict(zip((reward.name for reward in rewards), values.mean(axis=0).tolist(), strict=True)),
        "tokens": sum(map(len, answers)) / len(answers),
        "texts": {str(facts[number]["prompt"]): texts[number * group] for number in range(min(SHOWN, len(facts)))},
    }


def measure(job: dict[str, Any], adapter: str | None) -> dict[str, Any]:
    """Return what the base with an adapter gets, sampled and greedy."""
    settings = train_settings({"model": job["model"]}, read_settings(job["config"], {}, print))
    objective, data = objective_of(settings.objective), settings.data
    base = load_base(settings.model)
    rows = load_eval_set(data.data or "", data, base.hf_tokenizer, records=objective.records)
    if adapter:
        put_adapter(base, Path(adapter), data, objective)
    base.model.eval()
    given, found = settings.objective, {}
    for name, group, temperature in (("sampled", job["answers"], given.temp), ("greedy", 1, GREEDY)):
        options = SamplingOptions(group, given.max_new_tokens, temperature)
        found[name] = rewarded(base, rows, settings, answers_to(base, rows, options, job["seed"]))
    return found | {"prompts": len(rows)}


def main() -> None:
    """Do the job."""
    job = read_job()
    write_result(job, {name: measure(job, adapter) for name, adapter in job["adapters"].items()})


if __name__ == "__main__":
    main()
