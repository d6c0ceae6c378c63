"""Render the server's counters in Prometheus' text format."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx

from mlx_lora.serving.engine import Engine

# Paths with ids are counted under their prefix, so that clients cannot create new series.
KNOWN = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/adapters", "/health", "/metrics")


def metrics_text(engine: Engine, answers: Counter[tuple[str, int]]) -> str:
    """Return all metrics.

    Args:
        engine: read without a lock, because numbers of different steps do no harm.
        answers: (path, status) -> count.
    """
    counts, store, prompts = engine.counts, engine.store, engine.prompt_cache
    lines = ["# TYPE mlx_lora_answers_total counter"]
    by_route: Counter[tuple[str, int]] = Counter()
    for (path, status), count in answers.items():
        by_route[next((known for known in KNOWN if path.startswith(known)), "other"), status] += count
    lines += [
        f'mlx_lora_answers_total{{path="{path}",status="{status}"}} {count}'
        for (path, status), count in sorted(by_route.items())
    ]
    totals = {
        "prompt_tokens": counts.prompt_tokens,
        "reused_prompt_tokens": prompts.reused_tokens,
        "generated_tokens": counts.generated_tokens,
        "steps": counts.steps,
        "finished": counts.finished,
        "canceled": counts.canceled,
        "failed": counts.failed,
        "adapter_loads": store.loads,
        "adapter_evictions": store.evictions,
    }
    now = {
        "running": engine.running,
        "unfinished": engine.unfinished,
        "adapters_known": len(store.cards),
        "adapters_resident": sum(card.resident for card in store.cards.values()),
        "adapter_bytes": store.nbytes,
        "prompt_cache_bytes": prompts.nbytes,
        "prompt_cache_entries": len(prompts),
        "memory_bytes": mx.get_active_memory(),
        "peak_memory_bytes": mx.get_peak_memory(),
    }
    for name, value in totals.items():
        lines += [f"# TYPE mlx_lora_{name}_total counter", f"mlx_lora_{name}_total {value}"]
    for name, value in now.items():
        lines += [f"# TYPE mlx_lora_{name} gauge", f"mlx_lora_{name} {value}"]
    return "\n".join(lines) + "\n"
