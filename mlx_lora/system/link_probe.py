"""Measure the connection between ranks: how long a small message takes, and how fast a large one goes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import mlx.core as mx

from mlx_lora.system.distributed import SeveralRanks

SMALL_ROUNDS, LARGE_ROUNDS = 20, 5
LARGE_BYTES = 1 << 25


@dataclass(frozen=True)
class LinkRates:
    """What was measured.

    Attributes:
        latency_s: of a small message to all ranks and back.
        bytes_per_s: that each rank sends while it receives as many.
    """

    latency_s: float
    bytes_per_s: float


def probe_link(ranks: SeveralRanks, large_bytes: int = LARGE_BYTES) -> LinkRates:
    """Return the rates of the connection; every rank must call this.

    Args:
        ranks: all ranks.
        large_bytes: of a large message.
    """
    small, large = mx.zeros((1,), mx.uint8), mx.zeros((large_bytes,), mx.uint8)
    mx.eval(small, large)
    latency_s = _median_s(ranks, small, SMALL_ROUNDS)
    return LinkRates(latency_s, (ranks.size - 1) * large_bytes / _median_s(ranks, large, LARGE_ROUNDS))


def _median_s(ranks: SeveralRanks, message: mx.array, rounds: int) -> float:
    """Return the median seconds of gathering a message, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        ranks.meet()
        start = time.perf_counter()
        mx.eval(ranks.gathered(message))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
