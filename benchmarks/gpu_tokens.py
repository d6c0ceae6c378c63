"""Count what one generated token asks of a Mac's GPU, with an adapter on all linear layers, from its graph and without a GPU.

    python benchmarks/gpu_tokens.py
    python benchmarks/gpu_tokens.py --models qwen3-8b-4bit --kept 1024

Each row has so many tokens in its cache, and gets the likeliest next one. How launches, bytes and times are counted is told in
gpu_counts.py. A model is called for each token without compiling, as both trainers do. Sampling 32 tokens for 8 answers, as
GRPO does before a step, is 32 times the count of 8 rows; the host waits once for each token.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

import mlx.core as mx  # isort: skip
from _gpu_kernels import as_on_metal
from _harness import options, say, table
from gpu_counts import CHIPS, Case, launches_of, plain_of, seconds
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import KVCache
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.load import train_settings
from mlx_lora.models.generator import cast_factors
from mlx_lora.models.graph import as_on_gpu, uncollected
from mlx_lora.planner.speed import find_chip, listed_ceilings

ROWS = (1, 8)
SIDES = ("mlx_lora", "mlx_lora, cast for each token", "mlx_lm")
OPTIONS = (
    ("--models", ["llama-3.2-1b", "llama-3.2-1b-4bit", "qwen3-8b-4bit"], "Of gpu_counts.py, without windows or recurrences."),
    ("--kept", 256, "Tokens in the cache of each row."),
)  # fmt: skip


def counted(model_name: str, rows: int, kept: int, side: str) -> list[str]:
    """Return a row of the table."""
    model, _ = Case(model_name.removesuffix("-4bit"), model_name.endswith("-4bit"), 1, 1).outline()
    if side == "mlx_lm":
        model.freeze()
        linear_to_lora_layers(model, -1, {"rank": 16, "scale": 2.0, "dropout": 0.0})
    else:
        adapt_model(model, train_settings({"model": model_name, "data": "rows"}).adapter, seed=0)
    model.eval()
    of = model.args
    width = getattr(of, "head_dim", None) or of.hidden_size // of.num_attention_heads
    empty = mx.zeros((rows, of.num_key_value_heads, -(-(kept + 1) // KVCache.step) * KVCache.step, width), mx.bfloat16)

    def next_token(values: list[Any]) -> list[mx.array]:
        model.update(tree_unflatten(list(values[0].items())))
        caches = [KVCache() for _ in values[1]]
        for cache, (cache.keys, cache.values) in zip(caches, values[1], strict=True):
            cache.offset = kept
        token = model(values[2], cache=caches)[:, -1].argmax(axis=-1)
        return [token, *(array for cache in caches for array in (cache.keys, cache.values))]

    def listed() -> list[Any]:
        parameters = dict(tree_flatten(model.parameters()))
        given = [parameters, [(empty, empty + 0) for _ in model.layers], mx.zeros((rows, 1), mx.int32)]
        return launches_of(plain_of(next_token, given), compiled=False)

    with as_on_metal(), as_on_gpu(), uncollected():
        if side == "mlx_lora":
            with cast_factors(model):
                launches = listed()
        else:
            launches = listed()
    say(f"{model_name}, {rows} rows, {side}")
    ceilings = [(listed_ceilings(chip), listed_ceilings(chip, 4).flops_per_s) for chip in map(find_chip, CHIPS)]
    times = [f"{1e3 * seconds(launches, *rates)[0]:.1f} ms" for rates in ceilings]
    return [
        model_name,
        str(rows),
        side,
        f"{len(launches):,}",
        f"{sum(one.nbytes for one in launches) / 1e9:.2f}",
        *times,
    ]


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    asked = options(__doc__, *OPTIONS).parse_args(argv)
    found = [counted(model, rows, asked.kept, side) for model in asked.models for rows in ROWS for side in SIDES]
    print(table(["model", "rows", "side", "launches", "GB", *CHIPS], found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
