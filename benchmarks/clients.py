"""Measure requests of several clients of the training server: in one pass of the base (--join-clients), or one after another.

    python benchmarks/clients.py --model smollm2                       two and four clients, rows of 30 and 200 tokens

Each client trains an adapter of its own, and asks for the loss of --examples examples and its gradient; the server's own code computes
it, without HTTP. Both ways take turns; times are processor seconds, medians of --rounds after a round that is not counted. Ends
with one line of JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from _harness import cell, environment, options, paired_ratio, record, say, spread, table

OPTIONS = (
    ("--model", str, "Folder of the model."),
    ("--clients", [2, 4], "Numbers of clients."),
    ("--tokens", [30, 200], "Lengths of a row."),
    ("--examples", 4, "Of each request."),
    ("--rank", 16, "Of each adapter."),
    ("--rounds", 3, "Of each point."),
)


def point(args: Any, base: Any, clients: int, tokens: int) -> dict[str, Any]:
    """Return the seconds of both ways, and by how much their losses differ."""
    import numpy as np

    from mlx_lora.training_server.examples import Example, ModelLimits
    from mlx_lora.training_server.joint import JointPass
    from mlx_lora.training_server.models import POSITIONS, LoraShape, TrainedModel

    limits = ModelLimits(len(base.hf_tokenizer), tokens + 1)
    models = {n: TrainedModel(base, LoraShape(rank=args.rank, seed=n, unembed=False), limits) for n in range(clients)}
    random, asked = np.random.default_rng(0), {}
    for number in models:
        rows = random.integers(0, limits.vocabulary, (args.examples, tokens + 1)).astype(np.int32)
        asked[number] = [
            Example(row[:-1], row[1:].astype(np.int64), {"weights": np.ones(tokens, np.float32)}) for row in rows
        ]
    joint = JointPass(base, models, POSITIONS)
    found: dict[str, list[float]] = {"together": [], "in turn": []}
    losses: dict[str, list[float]] = {}
    for _ in range(args.rounds + 1):
        for way, seconds in found.items():
            start = time.process_time()
            requests = {number: model.prepare(asked[number], "cross_entropy", {}) for number, model in models.items()}
            if way == "together":
                joint.compute(requests)
            else:
                for number, model in models.items():
                    for batch in requests[number].batches:
                        model.compute(requests[number], batch)
            losses[way] = [models[number].finish(request).loss_sum for number, request in requests.items()]
            seconds.append(time.process_time() - start)
    apart = max(abs(a / b - 1) for a, b in zip(losses["together"], losses["in turn"], strict=True))
    return {
        "clients": clients,
        "tokens": tokens,
        "apart": apart,
        **{way: seconds[1:] for way, seconds in found.items()},
    }


def main(argv: Sequence[str]) -> int:
    """Print a table of all points, and one line of JSON."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    from mlx_lora.config.settings import ModelSettings
    from mlx_lora.models.load import load_base

    base, points = load_base(ModelSettings(model=args.model)), []
    for clients in args.clients:
        for tokens in args.tokens:
            points.append(point(args, base, clients, tokens))
            say(f"{clients} clients, {tokens} tokens: {points[-1]}")
    rows = [
        (
            one["clients"], f"{args.examples} x {one['tokens']}", cell(spread(one["together"])), cell(spread(one["in turn"])),
            cell(paired_ratio(one["in turn"], one["together"]), digits=2), f"{one['apart']:.0e}",
        )
        for one in points
    ]  # fmt: skip
    print(table(("clients", "rows x tokens", "together, s", "in turn, s", "times as fast", "losses apart"), rows))
    record({"points": points, "settings": vars(args), "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
