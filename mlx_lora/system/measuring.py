"""Measured once on a machine and kept: which of several functions that compute the same is the best one here.

    correct     every output and every gradient is compared with a float32 reference; who is wrong is out
    fast, lean  forward and backward pass together, as a compiled training step runs them; the candidates take turns
    kept        figures lie in the cache (`measured/`), and the choice is made from them each time

Which device this is, and what it can be asked, is device.py's affair: a key of it comes in as text.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_lora.system.cache import cache_dir

# `0` measures no kernel: what is not in the cache is taken to be as the first candidate of ours (tests, repeatable runs).
SWITCH = "MLX_LORA_MEASURE_KERNELS"
# What a right answer may be off by, in parts of the exact one: float32 sums in another order, 16-bit roundings.
TOLERANCE = {mx.float32: 1e-4, mx.bfloat16: 5e-2, mx.float16: 5e-3}
# The rule of `choose`, in words there.
LAYERS = 16  # of a model, as far as memory is weighed
MOST_MEMORY = 1.5
MUCH_FASTER = 2.0
HOPELESS = 4.0
TOO_LONG_S = 1.5

Outputs = Callable[..., list[mx.array]]


@dataclass(frozen=True)
class Trial:
    """What candidates are tried on.

    Attributes:
        arrays: of the run's dtype; all are differentiated.
        cotangents: of the outputs.
        wrap: turns a candidate into a function of `arrays` alone that returns its outputs, tokens in all axes but the last.
    """

    arrays: list[mx.array]
    cotangents: list[mx.array]
    wrap: Callable[[Callable[..., Any]], Outputs]


@dataclass(frozen=True)
class Figures:
    """What was measured of one candidate.

    Attributes:
        seconds: of a forward and a backward pass, the shortest of some.
        kept_bytes: what it holds from the forward to the backward pass, its output counted, its inputs not.
        peak_bytes: the most it has allocated at a time, the kept counted, the inputs not.
        input_bytes: of the inputs.
        error: of the worst token or gradient, in parts of the reference's.
        tolerance: the largest error of a right answer.
    """

    seconds: float
    kept_bytes: int
    peak_bytes: int
    input_bytes: int
    error: float
    tolerance: float

    @property
    def correct(self) -> bool:
        """Whether it computes what it should."""
        return self.error <= self.tolerance

    def model_bytes(self, layers: int) -> int:
        """What a model of so many such layers holds: each its inputs and what it keeps, one of them what it works with."""
        return layers * (self.input_bytes + self.kept_bytes) + self.peak_bytes - self.kept_bytes


def choose(figures: Mapping[str, Figures], layers: int = LAYERS) -> str | None:
    """Return the best candidate's name, None when all are wrong.

    1. Who is wrong is out.
    2. Of those that hold at most 1.5 times what the leanest holds (in a model of `layers` such layers), the fastest.
    3. Unless one that holds more takes less than half of that one's time: then the fastest of all.
    """
    right = {name: one for name, one in figures.items() if one.correct}
    if not right:
        return None
    held = {name: one.model_bytes(layers) for name, one in right.items()}
    lean = [name for name in right if held[name] <= MOST_MEMORY * min(held.values())]
    best, fastest = (min(names, key=lambda name: right[name].seconds) for names in (lean, right))
    return fastest if MUCH_FASTER * right[fastest].seconds < right[best].seconds else best


def measure(
    candidates: Mapping[str, Callable[..., Any]], trial: Trial, reference: Outputs, compiled: bool
) -> dict[str, Figures]:
    """Try every candidate.

    Args:
        candidates: name -> function.
        trial: see there.
        reference: exact outputs of `trial.arrays` in float32.
        compiled: time them through mx.compile, as a step runs them; where compiling is dear (device.py), as they are.
    """
    exact = [array.astype(mx.float32) for array in trial.arrays]
    mx.eval(trial.arrays, trial.cotangents, exact)
    outputs, gradients = mx.vjp(reference, exact, [c.astype(mx.float32) for c in trial.cotangents])
    mx.eval(outputs, gradients)
    functions = [trial.wrap(function) for function in candidates.values()]
    first = [_try(function, trial, outputs, gradients) for function in functions]
    del outputs, gradients
    # Who took four times as long as another at the first try is not asked again, except where that was compiling.
    bound = math.inf if compiled else HOPELESS * min(one.seconds for one in first)
    again = [number for number, one in enumerate(first) if one.seconds <= bound]
    makers = [_both_passes(functions[number], trial, compiled) for number in again]
    times = dict(zip(again, best_s(makers, warm=compiled, least_rounds=3), strict=True))
    tolerance, inputs = TOLERANCE[trial.arrays[0].dtype], sum(array.nbytes for array in trial.arrays)
    return {
        name: Figures(times.get(number, one.seconds), one.kept_bytes, one.peak_bytes, inputs, one.error, tolerance)
        for number, (name, one) in enumerate(zip(candidates, first, strict=True))
    }


class _Try(NamedTuple):
    seconds: float
    kept_bytes: int
    peak_bytes: int
    error: float


def _both_passes(function: Outputs, trial: Trial, compiled: bool) -> Callable[[], list[mx.array]]:
    def both(arrays: list[mx.array]) -> list[mx.array]:
        outputs, gradients = mx.vjp(function, arrays, trial.cotangents)
        return [*outputs, *gradients]

    run = mx.compile(both) if compiled else both
    return lambda: run(trial.arrays)


def _try(function: Outputs, trial: Trial, expected: list[mx.array], expected_gradients: list[mx.array]) -> _Try:
    """Run both passes once."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    outputs, gradients = mx.vjp(function, trial.arrays, trial.cotangents)
    # The forward pass alone: of what it made, only what the backward pass will ask for is still there.
    mx.eval(outputs)
    kept = mx.get_active_memory() - before
    mx.eval(gradients)
    seconds = time.perf_counter() - start
    peak = mx.get_peak_memory() - before
    errors = [_worst_token(found, exact) for found, exact in zip(outputs, expected, strict=True)]
    errors += [_apart(found, exact) for found, exact in zip(gradients, expected_gradients, strict=True)]
    return _Try(seconds, max(0, kept), max(0, peak), max(errors))


def _worst_token(found: mx.array, exact: mx.array) -> float:
    """Return the largest distance of a token's output from the exact one, in parts of its size.

    Tokens smaller than a hundredth of the mean are taken in parts of that: an exact zero has no size.
    """
    size = mx.sqrt(mx.square(exact).sum(-1))
    distance = mx.sqrt(mx.square(found.astype(mx.float32) - exact).sum(-1))
    return _finite((distance / mx.maximum(size, 0.01 * size.mean() + 1e-30)).max())


def _apart(found: mx.array, exact: mx.array) -> float:
    """Return the distance of a gradient from the exact one, in parts of its size."""
    distance = mx.sqrt(mx.square(found.astype(mx.float32) - exact).sum())
    return _finite(distance / (mx.sqrt(mx.square(exact).sum()) + 1e-30))


def _finite(error: mx.array) -> float:
    value = error.item()
    return value if math.isfinite(value) else 1e30  # JSON has no infinity


def best_s(
    makers: Sequence[Callable[[], list[mx.array]]],
    rounds: int = 20,
    enough_s: float = 0.1,
    warm: bool = True,
    least_rounds: int = 1,
) -> list[float]:
    """Return each maker's shortest time; they take turns, so that another program's load meets all of them.

    Args:
        makers: each returns what is to be computed.
        rounds: at the most.
        enough_s: no further round after so long, all makers together.
        warm: call each once beforehand: the first call pays for kernel compilation.
        least_rounds: not fewer, unless they take longer than `TOO_LONG_S`.
    """
    if warm:
        for make in makers:
            mx.eval(make())
    best = [math.inf] * len(makers)
    begun = time.perf_counter()
    for done in range(1, rounds + 1):
        for number, make in enumerate(makers):
            start = time.perf_counter()
            mx.eval(make())
            best[number] = min(best[number], time.perf_counter() - start)
        spent = time.perf_counter() - begun
        if spent > enough_s and (done >= least_rounds or spent > TOO_LONG_S):
            break
    return best


def may_measure() -> bool:
    """Whether kernels are measured here when they are not known yet."""
    return os.environ.get(SWITCH, "1") != "0"


def read_figures(key: str) -> dict[str, Figures] | None:
    """Return what is known under a key, None when nothing is, or when it cannot be read."""
    entry: Any = read_store("kernels").get(key)
    try:
        return {name: Figures(**one) for name, one in entry.items()}
    except (AttributeError, TypeError):  # unknown, or scribbled over
        return None


def keep_figures(key: str, figures: Mapping[str, Figures]) -> None:
    """Keep what was measured for the next run."""
    write_store("kernels", {**read_store("kernels"), key: {name: asdict(one) for name, one in figures.items()}})


def read_store(name: str) -> dict[str, Any]:
    """Return all that a store of measurements holds."""
    try:
        content = json.loads(_store(name).read_text())
    except (OSError, ValueError):  # missing, or damaged: measure again
        return {}
    return content if isinstance(content, dict) else {}


def write_store(name: str, known: Mapping[str, Any]) -> None:
    """Keep a store's whole content."""
    store = _store(name)
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary = store.with_name(f"{store.name}.{os.getpid()}")
        temporary.write_text(json.dumps(known, indent=1))
        temporary.replace(store)
    except OSError:  # a cache that cannot be written costs a measurement next time, no more
        return


def _store(name: str) -> Path:
    return cache_dir("measured") / f"{name}.json"
