"""One side of benchmarks/rollouts.py that samples: load a model with an adapter in place, then answer as often as asked.

    rollout_side.py {ours,mlx-lm} '{"model": ..., "rank": 8, "scale": 2.0}'

Each line of input is {"prompt_tokens": 30, "group": 8, "tokens": 48, "temperature": 1.0, "seed": 0, "shared": false};
each line of output that begins with @ is the answer. Both sides get the same prompt, and the same factors by name.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import mlx_lora  # isort: skip  (first: it gives both sides the same fast BLAS)
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

TEXT = "Write a long story about a child who lives by the sea and finds a letter in a bottle. "
FACTOR = 0.05  # deviation of the factors: large enough that an adapter that is not used shows in the greedy texts
GREEDY = 1e-4  # a temperature at which the likeliest token is drawn

Answers = Callable[[list[int], dict[str, Any]], list[list[int]]]


def ours(settings: dict[str, Any]) -> tuple[Any, Any, Answers]:
    """Load a base of ours, and sample as a training step does."""
    from mlx_lora.adapters.inject import inject
    from mlx_lora.adapters.targets import select_targets
    from mlx_lora.config.load import train_settings
    from mlx_lora.models.load import load_base
    from mlx_lora.rollouts.sampler import SamplingOptions, answer_keys, sample_groups

    base = load_base(train_settings({"model": settings["model"]}).model)
    inject(base.model, select_targets(base.model).paths, settings["rank"], settings["scale"])

    def answers(prompt: list[int], asked: dict[str, Any]) -> list[list[int]]:
        options = SamplingOptions(asked["group"], asked["tokens"], temperature=asked["temperature"] or GREEDY)
        return sample_groups(base.model, [prompt], options, frozenset(), answer_keys(asked["seed"], 0, asked["group"]))[
            0
        ]

    return base.model, base.hf_tokenizer, answers


def mlx_lm(settings: dict[str, Any]) -> tuple[Any, Any, Answers]:
    """Load a model with mlx-lm in float32, as ours, and sample with its batch_generate."""
    import mlx_lm as peer
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, tokenizer, *_ = peer.load(settings["model"])
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": settings["rank"], "scale": settings["scale"], "dropout": 0.0})
    model.set_dtype(mx.float32)
    tokenizer._eos_token_ids = set()

    def answers(prompt: list[int], asked: dict[str, Any]) -> list[list[int]]:
        mx.random.seed(asked["seed"])
        prompts, caches = [prompt] * asked["group"], None
        if asked["shared"]:  # batch_generate takes caches, so a user can compute the prompt once
            cache = make_prompt_cache(model)
            model(mx.array([prompt[:-1]]), cache=cache)
            mx.eval([layer.state for layer in cache])
            prompts, caches = [prompt[-1:]] * asked["group"], [copy.deepcopy(cache) for _ in prompts]
        sampler = make_sampler(temp=asked["temperature"])
        more = {"max_tokens": asked["tokens"], "sampler": sampler, "return_token_ids": True}
        return peer.batch_generate(model, tokenizer, prompts, prompt_caches=caches, **more).token_ids

    return model, tokenizer._tokenizer, answers


def set_factors(model: Any) -> int:
    """Fill the adapter with values that depend on the factors' names only, and return how many there are."""
    factors = [(name, p) for name, p in tree_flatten(model.trainable_parameters())]
    made = []
    for name, p in factors:
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(p.shape, np.float32)
        made.append((name, mx.array(FACTOR * values)))
    model.load_weights(made, strict=False)
    model.eval()
    mx.eval(model.parameters())
    return sum(p.size for _, p in factors)


def prompt_of(tokenizer: Any, tokens: int) -> list[int]:
    """Return a prompt of so many tokens."""
    found: list[int] = []
    while len(found) < tokens:
        found += tokenizer.encode(TEXT, add_special_tokens=False)
    return found[:tokens]


def main() -> None:
    """Load, then answer."""
    load = {"ours": ours, "mlx-lm": mlx_lm}[sys.argv[1]]
    model, tokenizer, answers = load(json.loads(sys.argv[2]))
    facts = {"trainable": set_factors(model), "blas": mlx_lora.BLAS.name}
    print("@" + json.dumps(facts), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompt = prompt_of(tokenizer, asked["prompt_tokens"])
        begun, cpu = time.perf_counter(), time.process_time()
        found = answers(prompt, asked)
        seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
        answer = {"tokens": sum(map(len, found)), "lengths": [len(one) for one in found], "seconds": seconds}
        answer |= {"cpu_seconds": cpu_s, "first": found[0], "prompt_sum": sum(prompt)}
        print("@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
