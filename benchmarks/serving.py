"""Measure serving many adapters: speed of mixed batches, switching, memory, and agreement with `generate`.

    python benchmarks/serving.py --model DIR
    python benchmarks/serving.py --model DIR --ranks 4,8,16,32 --adapters 32 --batch 8

Writes --adapters adapters with random factors over all linear layers, serves them from one engine, and measures

    agreement   greedy text and log-probabilities of every adapter, in mixed batches, against the adapter put on the
                model as in `generate`
    speed       tokens/s of a batch whose rows use one adapter, all different ones, and none: in alternating rounds, so
                that other load slows all alike; the ratio is the median of the rounds' ratios. The same by CPU time,
                which other load disturbs less; this needs OPENBLAS_NUM_THREADS=1, because waiting threads count too
    switching   the cost of a batch with new adapters: the index arrays of all layers, and a whole step with new
                adapters less a step with known ones
    memory      MLX's active bytes with all adapters, less the base's, relative to the adapters' bytes

A round is --tokens steps of --batch rows, prompts cached, end tokens ignored. Ends with one line of JSON.

"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

import mlx.core as mx  # isort: skip
from _environment import environment
from mlx_lm.generate import generate_step

from mlx_lora.adapters.inject import adapter_parameters, inject
from mlx_lora.adapters.targets import select_targets
from mlx_lora.config.settings import ModelSettings
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, save_adapter
from mlx_lora.models.load import Base, load_base
from mlx_lora.serving.adapter_store import AdapterStore, Source
from mlx_lora.serving.engine import Engine, Event, Limits, Request
from mlx_lora.serving.pools import ROUTED, unrouted_twin
from mlx_lora.serving.sampling import Sampling

PROMPT = "Write a short letter to a friend about the weather. Number"
MB = 1e6


def write_adapter(base: Base, folder: Path, rank: int, seed: int) -> Path:
    """Write an adapter with random factors, large enough to change answers and small enough that they stay text."""
    twin = Base(**{**vars(base), "model": unrouted_twin(base.model)})
    chosen = select_targets(twin.model, "all-linear")
    inject(twin.model, chosen.paths, rank, 2.0, seed=seed)
    mx.random.seed(seed)
    moved = [
        (name, 0.05 * mx.random.normal(value.shape) / rank**0.5)
        for name, value in adapter_parameters(twin.model).items()
        if name.endswith("lora_b")
    ]
    twin.model.load_weights(moved, strict=False)
    info = AdapterInfo(
        "lora", rank, 2.0 * rank, 2.0, 0.0, chosen.num_layers, chosen.keys, "base", None, base.fingerprint
    )
    save_adapter(folder, twin.model, info)
    return folder


class Serving:
    """An engine and its adapters."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        settings = ModelSettings(model=arguments.model)
        limits = Limits(max_batch=arguments.batch, max_waiting=4096, prompt_cache_bytes=2 * 10**9)
        self.engine = Engine(lambda: load_base(settings), limits)
        self.names = [f"a{n}" for n in range(arguments.adapters)]
        ranks = [int(rank) for rank in arguments.ranks.split(",")]

        def write(store: AdapterStore) -> dict[str, Path]:
            base = self.engine.base
            return {
                name: write_adapter(base, folder / name, ranks[n % len(ranks)], n) for n, name in enumerate(self.names)
            }

        self.folders = self.engine.call(write).result()
        self.base_bytes = self._active()
        start = time.perf_counter()
        sources = {name: Source(path) for name, path in self.folders.items()}
        self.engine.call(lambda store: store.add(sources)).result()
        self.load_s = time.perf_counter() - start
        self.all_bytes = self._active()
        self.tokenizer = self.engine.base.hf_tokenizer

    def _active(self) -> int:
        def measured(store: AdapterStore) -> int:
            mx.clear_cache()
            return mx.get_active_memory()

        return self.engine.call(measured).result()

    def run(
        self, adapters: list[str | None], tokens: int, top_logprobs: int | None = None
    ) -> tuple[float, list[list[Event]]]:
        """Generate one row per entry in one batch, and return seconds and the rows' events."""
        queues: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in adapters]
        sampling = Sampling(temperature=0, top_logprobs=top_logprobs)
        start = time.perf_counter()
        for row, (name, events) in enumerate(zip(adapters, queues, strict=True)):
            prompt = self.tokenizer.encode(f"{PROMPT} {row}.")
            self.engine.submit(Request(prompt, name, tokens, sampling, ignore_eos=True), events.put)
        answers: list[list[Event]] = []
        for events in queues:
            answers.append([events.get()])
            while not answers[-1][-1].last:
                answers[-1].append(events.get())
        return time.perf_counter() - start, answers


def agreement(serving: Serving, batch: int, tokens: int) -> dict[str, Any]:
    """Compare every adapter in mixed batches with the same adapter put on the model as in `generate`."""

    def alone(name: str, row: int) -> tuple[list[int], list[float]]:
        def work(store: AdapterStore) -> tuple[list[int], list[float]]:
            base = serving.engine.base
            twin = Base(**{**vars(base), "model": unrouted_twin(base.model)})
            load_adapter(twin, serving.folders[name])
            prompt = mx.array(serving.tokenizer.encode(f"{PROMPT} {row}."))
            steps = [(t, p[t].item()) for t, p in generate_step(prompt, twin.model, max_tokens=tokens)]
            return [t for t, _ in steps], [p for _, p in steps]

        return serving.engine.call(work).result()

    equal, apart = 0, 0.0
    for start in range(0, len(serving.names), batch):
        names = serving.names[start : start + batch]
        _, answers = serving.run(names, tokens, top_logprobs=0)
        for row, (name, events) in enumerate(zip(names, answers, strict=True)):
            reports = [report for event in events for report in event.piece.reports]
            meant_tokens, meant = alone(name, row)
            texts = [serving.tokenizer.decode([token]) for token in meant_tokens]
            equal += texts == [report.text for report in reports]
            apart = max(apart, *(abs(r.logprob - m) for r, m in zip(reports, meant, strict=True)))
    return {"adapters": len(serving.names), "equal_texts": equal, "largest_logprob_difference": apart}


def speed(serving: Serving, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Time the kinds of batches alternately."""
    kinds: dict[str, list[str | None]] = {
        "one": [serving.names[0]] * batch,
        "mixed": list(serving.names[:batch]),
        "base": [None] * batch,
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    work: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 1):
        order = list(kinds) if turn % 2 else list(kinds)[::-1]
        for kind in order:
            before = time.process_time()
            seconds, _ = serving.run(kinds[kind], tokens)
            if turn:  # the first round fills caches
                times[kind].append(seconds)
                work[kind].append(time.process_time() - before)
            print(f"round {turn} {kind}: {batch * tokens / seconds:.1f} tokens/s", file=sys.stderr, flush=True)
    ratios = {
        f"{kind}_over_one": statistics.median(o / k for o, k in zip(times["one"], times[kind], strict=True))
        for kind in ("mixed", "base")
    }
    ratios["mixed_over_one_by_cpu_time"] = statistics.median(
        o / k for o, k in zip(work["one"], work["mixed"], strict=True)
    )
    per_s = {f"{kind}_tokens_per_s": batch * tokens / statistics.median(t) for kind, t in times.items()}
    return {**per_s, **ratios, "rounds": rounds, "ratio_of_each_round": [
        round(o / m, 3) for o, m in zip(times["one"], times["mixed"], strict=True)]}  # fmt: skip


def switching(serving: Serving, batch: int, rounds: int) -> dict[str, Any]:
    """Time the cost of new adapters in a batch: planning alone, and within a step."""

    def work(store: AdapterStore) -> tuple[list[float], list[float]]:
        model, routing = serving.engine.base.model, serving.engine._routing
        layers = [module for module in model.modules() if isinstance(module, ROUTED)]
        numbers = list(range(len(serving.names)))
        inputs = mx.zeros((batch, 1), mx.int32)
        planning, added = [], []
        for turn in range(rounds):
            routing.rows = tuple(numbers[(turn * 3 + row) % len(numbers)] for row in range(batch))
            start = time.perf_counter()
            for layer in layers:
                layer.pools.groups()
            planning.append(time.perf_counter() - start)
            routing.rows = tuple(numbers[(turn * 5 + row * 3 + 1) % len(numbers)] for row in range(batch))
            steps = []
            for _ in range(3):  # the first plans
                start = time.perf_counter()
                mx.eval(model(inputs))
                steps.append(time.perf_counter() - start)
            added.append(steps[0] - statistics.median(steps[1:]))
        return planning, added

    planning, added = serving.engine.call(work).result()
    return {
        "planning_ms": 1e3 * statistics.median(planning),
        "planning_ms_worst": 1e3 * max(planning),
        "step_added_ms": 1e3 * statistics.median(added),
    }


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--ranks", default="16", help="ranks, separated by commas, assigned to the adapters in turn")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--agreement-tokens", type=int, default=24, help="0 skips the comparison")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        serving = Serving(arguments, Path(folder))
        own_bytes = serving.engine.store.nbytes
        figures: dict[str, Any] = {
            "model": Path(arguments.model).name,
            "ranks": arguments.ranks,
            "adapters": arguments.adapters,
            "load_s": serving.load_s,
            "base_mb": serving.base_bytes / MB,
            "adapters_own_mb": own_bytes / MB,
            "adapters_taken_mb": (serving.all_bytes - serving.base_bytes) / MB,
            "memory_over_own_bytes": (serving.all_bytes - serving.base_bytes) / own_bytes,
        }
        figures |= switching(serving, arguments.batch, arguments.rounds)
        if arguments.agreement_tokens:
            figures |= agreement(serving, arguments.batch, arguments.agreement_tokens)
        figures |= speed(serving, arguments.batch, arguments.tokens, arguments.rounds)
        serving.engine.close()
    for name, value in figures.items():
        print(f"{name:32} {value}", file=sys.stderr)
    print(json.dumps({**figures, "environment": environment()}))


if __name__ == "__main__":
    main()
