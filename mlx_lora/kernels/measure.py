"""Measure which of several equivalent functions is the best on this machine, once, and cache the figures.

    correct     every output and gradient is compared with a float32 reference; wrong candidates are excluded
    fast, lean  forward and backward pass are measured together, as in a compiled training step; candidates alternate
    cached      figures are stored in the cache (`measured/`), and the choice is made from them each time

`Kernel` is the type of the rows in the table of kernels (kernels/choose.py). A shape class is (size, ...): a size rounded to a
power of two, then properties that must be equal.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.compat.functions import exchanged, original
from mlx_lora.utils import device
from mlx_lora.utils.files import read_store, write_store

if TYPE_CHECKING:
    from mlx_lora.planner.memory import KernelTerms

# `0`: measure no kernel, and use the `assumed` candidate for what is not in the cache (tests, repeatable runs).
SWITCH = "MLX_LORA_MEASURE_KERNELS"
MLX, POLYNOMIAL = "mlx", "polynomial"
NO_NUMBER = 1e30  # as an error; JSON has no infinity
# The largest relative error of a correct result: float32 sums in another order, 16-bit roundings.
TOLERANCE = {mx.float32: 1e-4, mx.bfloat16: 5e-2, mx.float16: 5e-3}
# The constants of the rule in `choose`.
LAYERS = 16  # layers of a model, for comparing memory
MOST_MEMORY = 1.5
MUCH_FASTER = 2.0
HOPELESS = 4.0
BEHIND = 2.0  # for candidates that take long: this far behind the fastest, they are not timed again
TOO_LONG_S = 1.5
# Private names that belong to mlx's Module.
MODULE_OWN = vars(nn.Module()).keys()
ShapeClass = tuple[Any, ...]  # of numbers and words
Outputs = Callable[..., list[mx.array]]
Kernels = Callable[[nn.Module], AbstractContextManager]
"""model -> the context in which it computes with other kernels than its own."""


@dataclass(frozen=True)
class TimingInputs:
    """The arguments with which candidates are measured.

    Attributes:
        arrays: in the run's dtype; all are differentiated.
        cotangents: of the outputs.
        wrap: turns a candidate into a function of only `arrays`, whose outputs have tokens in all axes but the last.
    """

    arrays: list[mx.array]
    cotangents: list[mx.array]
    wrap: Callable[[Callable[..., Any]], Outputs]


@dataclass(frozen=True)
class Figures:
    """The measurements of one candidate.

    Attributes:
        seconds: of a forward and a backward pass, the shortest of several.
        kept_bytes: held from the forward to the backward pass, with the output, beyond the size of the inputs.
        peak_bytes: the most that is allocated at a time, with the kept bytes, without the inputs.
        input_bytes: of the inputs.
        error: the largest relative error of a token or gradient.
        tolerance: the largest error of a correct result.
    """

    seconds: float
    kept_bytes: int
    peak_bytes: int
    input_bytes: int
    error: float
    tolerance: float

    @property
    def correct(self) -> bool:
        """Whether its results are correct."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: shown to users, and used in the cache's keys.
        shared: the name under which mlx-lm's architectures import the function.
        theirs: mlx-lm's own function.
        candidates: name -> function of the same signature; `mlx` is the same as `theirs`.
        assumed: the candidate of ours that is used if nothing was measured.
        class_of: takes a call's arguments and returns its shape class, or None if the call always uses `theirs`.
        trial: takes a shape class and a dtype, returns the trial to measure and a function for its exact float32 outputs.
        words: describes a shape class to users.
        count: adds a candidate's memory for a shape class to the planner's terms, from its figures, or defaults if None.
    """

    name: str
    shared: str
    theirs: Callable[..., Any]
    candidates: Mapping[str, Callable[..., Any]]
    assumed: str
    class_of: Callable[..., ShapeClass | None]
    trial: Callable[[ShapeClass, mx.Dtype], tuple[TimingInputs, Outputs]]
    words: Callable[[ShapeClass], str]
    count: Callable[[KernelTerms, ShapeClass, str, Figures | None], KernelTerms]


def size_class(size: int, least: int, most: int) -> int:
    """Return the power of two nearest to a size, within bounds."""
    return min(max(1 << round(math.log2(max(1, size))), least), most)


def choose(figures: Mapping[str, Figures], layers: int = LAYERS) -> str | None:
    """Return the best candidate's name, None if all are wrong.

    1. Wrong candidates are excluded.
    2. The fastest of those that need at most 1.5 times the least memory (in a model of `layers` such layers) is chosen.
    3. But if a candidate that needs more memory takes less than half of its time, the fastest of all is chosen.
    """
    right = {name: one for name, one in figures.items() if one.correct}
    if not right:
        return None
    # Of a model with so many such layers: the inputs and kept bytes of all, the peak of one.
    held = {
        name: layers * (one.input_bytes + one.kept_bytes) + one.peak_bytes - one.kept_bytes
        for name, one in right.items()
    }
    lean = [name for name in right if held[name] <= MOST_MEMORY * min(held.values())]
    best, fastest = (min(names, key=lambda name: right[name].seconds) for names in (lean, right))
    return fastest if MUCH_FASTER * right[fastest].seconds < right[best].seconds else best


# Measuring


def measure(
    candidates: Mapping[str, Callable[..., Any]],
    trial: TimingInputs,
    reference: Outputs,
    compiled: bool,
    own_kernels: Collection[str] = (),
) -> dict[str, Figures]:
    """Return the figures of every candidate.

    Args:
        candidates: name -> function.
        trial: the arguments.
        reference: returns the exact outputs for `trial.arrays` in float32.
        compiled: time them through mx.compile, as in a step; False if compiling is expensive (utils/device.py).
        own_kernels: names of candidates that compile kernels of their own in their first call (kernels/activations.py).
    """
    exact = [array.astype(mx.float32) for array in trial.arrays]
    mx.eval(trial.arrays, trial.cotangents, exact)
    outputs, gradients = mx.vjp(reference, exact, [c.astype(mx.float32) for c in trial.cotangents])
    mx.eval(outputs, gradients)
    functions = [trial.wrap(function) for function in candidates.values()]
    first = [_try(function, trial, outputs, gradients) for function in functions]
    # Do not repeat a candidate that took much longer than another, unless the time was spent compiling.
    fastest = min(one.seconds for one in first)
    bound = math.inf if compiled else fastest * (HOPELESS if fastest * len(first) < TOO_LONG_S else BEHIND)
    if not compiled and fastest > TOO_LONG_S:  # each first call is long enough to compare by
        bound = TOO_LONG_S
    for number, (name, one) in enumerate(zip(candidates, first, strict=True)):
        if one.seconds > bound and name in own_kernels:
            first[number] = _try(functions[number], trial, outputs, gradients)
    del outputs, gradients
    again = [number for number, one in enumerate(first) if one.seconds <= bound]
    makers = [_both_passes(functions[number], trial, compiled) for number in again]
    for number, seconds in zip(again, best_s(makers, warm=compiled, least_rounds=3), strict=True):
        first[number] = replace(first[number], seconds=seconds)
    return dict(zip(candidates, first, strict=True))


def _both_passes(function: Outputs, trial: TimingInputs, compiled: bool) -> Callable[[], list[mx.array]]:
    def both(arrays: list[mx.array]) -> list[mx.array]:
        outputs, gradients = mx.vjp(function, arrays, trial.cotangents)
        return [*outputs, *gradients]

    run = mx.compile(both) if compiled else both
    return lambda: run(trial.arrays)


def _try(
    function: Outputs, trial: TimingInputs, expected: list[mx.array], expected_gradients: list[mx.array]
) -> Figures:
    """Run both passes once."""
    inputs_bytes = sum(array.nbytes for array in trial.arrays)
    mx.synchronize()
    before = mx.get_active_memory() + inputs_bytes
    inputs = [array * 1 for array in trial.arrays]  # of its own: a candidate may not keep them
    mx.eval(inputs)
    mx.reset_peak_memory()
    start = time.perf_counter()
    outputs, gradients = mx.vjp(function, inputs, trial.cotangents)
    del inputs
    # Evaluate only the forward pass: afterwards, memory only has what the backward pass needs.
    mx.eval(outputs)
    kept = mx.get_active_memory() - before
    mx.eval(gradients)
    seconds = time.perf_counter() - start
    peak = mx.get_peak_memory() - before
    errors = [_worst_token(found, exact) for found, exact in zip(outputs, expected, strict=True)]
    errors += [_apart(found, exact) for found, exact in zip(gradients, expected_gradients, strict=True)]
    error = max(error if math.isfinite(error) else NO_NUMBER for error in errors)
    return Figures(seconds, max(0, kept), max(0, peak), inputs_bytes, error, TOLERANCE[trial.arrays[0].dtype])


def _worst_token(found: mx.array, exact: mx.array) -> float:
    """Return the largest relative error of a token's output.

    For tokens smaller than a hundredth of the mean, the error is relative to that, because an exact zero has no size.
    """
    size = mx.sqrt(mx.square(exact).sum(-1))
    distance = mx.sqrt(mx.square(found.astype(mx.float32) - exact).sum(-1))
    return (distance / mx.maximum(size, 0.01 * size.mean() + 1e-30)).max().item()


def _apart(found: mx.array, exact: mx.array) -> float:
    """Return the relative error of a gradient."""
    distance = mx.sqrt(mx.square(found.astype(mx.float32) - exact).sum())
    return (distance / (mx.sqrt(mx.square(exact).sum()) + 1e-30)).item()


def best_s(
    makers: Sequence[Callable[[], list[mx.array]]],
    rounds: int = 20,
    enough_s: float = 0.1,
    warm: bool = True,
    least_rounds: int = 1,
) -> list[float]:
    """Return each maker's shortest time; they alternate, so that other programs slow all of them alike.

    Args:
        makers: each returns the arrays to compute.
        rounds: the most rounds.
        enough_s: stop after this many seconds in total for all makers.
        warm: call each maker once beforehand, because the first call compiles kernels.
        least_rounds: the fewest rounds, unless they take longer than `TOO_LONG_S`.
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


# Stored figures


def may_measure() -> bool:
    """Return whether kernels that are not in the cache are measured."""
    return os.environ.get(SWITCH, "1") != "0"


def read_figures(key: str) -> dict[str, Figures] | None:
    """Return the figures for a key, None if there are none that say anything, or if they cannot be read."""
    entry: Any = read_store("kernels").get(key)
    try:
        found = {name: Figures(**one) for name, one in entry.items()}
        return found if _tell_something(found) else None
    except (AttributeError, TypeError):  # unknown, or damaged
        return None


def _tell_something(figures: Mapping[str, Figures]) -> bool:
    """Return whether some result was a number: if none was, the inputs were none, and no kernel is to blame."""
    return any(one.error < NO_NUMBER for one in figures.values())


def keep_figures(key: str, figures: Mapping[str, Figures]) -> None:
    """Store figures for later runs, if they say anything."""
    if _tell_something(figures):
        write_store("kernels", {**read_store("kernels"), key: {name: asdict(one) for name, one in figures.items()}})


def figures_key(name: str, shape: ShapeClass, dtype: mx.Dtype) -> str:
    """Return the cache key of a class's figures."""
    of = ",".join(map(str, shape))
    return f"{device.measured_on()}|{str(dtype).rpartition('.')[2]}|{name}|{of}"


# A model that is only tried


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return a model and its modules in some order: what `model.modules()` tells, in a tenth of its time.

    Kernels are exchanged some 70 times before a run's first step, and each time this is asked.
    """
    found, left = [], [model]
    while left:
        value: Any = left.pop()
        if isinstance(value, nn.Module):
            found.append(value)
        if isinstance(value, dict):  # a module is one, too
            left += value.values()
        elif isinstance(value, list):
            left += value
    return found


INDICES = ("argmax", "argmin", "argpartition", "argsort", "where")  # the functions that choose


def _constant(choose: Callable[..., mx.array], *args: Any, **kwargs: Any) -> mx.array:
    found = choose(*args, **kwargs)
    return found if mx.issubdtype(found.dtype, mx.inexact) else mx.stop_gradient(found)


@contextmanager
def left_unchanged(model: nn.Module) -> Iterator[None]:
    """Let a model be differentiated in the block, and restore its parameters and its modules' private attributes at its end.

    MLX has no gradient by indices and refuses one, so those that a model chooses (experts, keys) are constants here, as they
    are in torch. Differentiation leaves traced arrays in trainable parameters. mlx-lm's forward passes leave others, which are
    meaningless outside of the trace: Gemma 3n overwrites frozen weights, and Kimi K3 keeps products of them for the next
    generation.
    """
    parameters = model.parameters()
    private = [
        (module, name, module[name] if name in module else vars(module)[name])
        for module in modules_of(model)
        for name in {*module, *vars(module)}
        if name.startswith("_") and name not in MODULE_OWN
    ]
    try:
        with exchanged({(mx, name): partial(_constant, original(mx, name)) for name in INDICES}):
            yield
    finally:
        model.update(parameters)
        for module, name, value in private:
            setattr(module, name, value)
