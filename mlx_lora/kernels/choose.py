"""List the kernels that training may replace, measure and choose among them for a model, and replace them while a step is traced.

mlx-lm's architectures share one attention function, one gated activation and one function for each common recurrence,
which each imports by name. A row of the table names one of these functions and the functions that may replace it, and tells
how to classify a call by its shapes and how to try out a class. Calls from the modules of this model's classes are taken while
the step is traced, in the thread that traces it (compat/functions.py), so generation does not change, nor any other thread, and
of measuring a loss only long rows do (`long_row_kernels`). A call's shapes decide which function takes it.

Candidates are chosen by measuring once per (device, mlx version, dtype, shape class):

    record     trace the model, without computing it, at each length of the data, to find the kernels and shapes it uses
    measure    all candidates for every shape class that is not in the cache yet (`measured/`): time and memory of a forward and
               a backward pass, as in a compiled training step, and the error of every output and gradient against float32
    choose     by the rule of `choose`, from the figures in the cache

`--kernels ours` uses the table's `assumed` candidates without measuring; `--kernels mlx` uses those of mlx and mlx-lm.

The candidates for the loss are in losses/fused.py. Recurrences, of which those of a single architecture have no row (ours always
replace them), are in kernels/recurrent.py, which only their models load. Norms and rotations have no row either: models call
mx.fast.rms_norm and mx.fast.rope, and ours would not be faster (docs/development/decisions.md).

A shape class is (size, ...): a size rounded to a power of two, then properties that must be equal.

Shapes: B batch, H query heads, N key heads, T positions, d head width, F width of the gated activation.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, base

from mlx_lora.compat.foreign import RECURRENCES, Foreign
from mlx_lora.compat.functions import Place, exchanged, original
from mlx_lora.kernels.activations import lean_swiglu, polynomial_swiglu
from mlx_lora.kernels.attention import AttentionCall, Tiles, Windows, attend
from mlx_lora.kernels.measure import (
    MLX,
    POLYNOMIAL,
    Figures,
    Kernel,
    Kernels,
    Outputs,
    ShapeClass,
    TimingInputs,
    choose,
    figures_key,
    keep_figures,
    may_measure,
    measure,
    modules_of,
    read_figures,
    size_class,
)  # fmt: skip
from mlx_lora.models.folder import FOREIGN_ERRORS, raise_if_ours
from mlx_lora.models.prefix_attention import SharedPrefix, shared_caches
from mlx_lora.planner.memory import KernelTerms, ModelShape, tile_queries
from mlx_lora.utils import device
from mlx_lora.utils.progress import long_task

log = logging.getLogger(__name__)

AUTO, OURS = "auto", "ours"
# Recurrences by the last part of their names.
RECURRENCES_BY_NAME = {one.name: [other for other in RECURRENCES if other.name == one.name] for one in RECURRENCES}
TRIAL_POSITIONS = 1024
TRIAL_NUMBERS = 1 << 20  # of one array of an elementwise trial
LONGEST = 1024  # keys of a trial; beyond that, the times of both kernels grow at the same rate
# Memory does not: mlx's attention keeps all scores on a CPU, which decides for longer rows than this. They are tried with so many.
LONG_ROW = 4096
# A row of more windows than this is a shape class of its own: a kernel that skips what no query sees computes far less then.
MANY_WINDOWS = 4
MAKES_MASKS = "create_attention_mask"  # mlx-lm's name, under which its architectures import it
ATTENTION, ACTIVATION = "attention", "gated activation"
# Kernels without a state that passes from token to token.
POSITIONWISE = frozenset({ATTENTION, ACTIVATION})
ROWS = (ATTENTION, ACTIVATION, "gated delta", "state space")
Choose = Callable[[Kernel, ShapeClass], str]
"""(row of the table, shape class of a call) -> name of the candidate that takes the call."""


# Table


def kernel_rows(
    attend: AttentionCall = attend, windows: Windows | None = None, names: Collection[str] = ROWS
) -> tuple[Kernel, ...]:
    """Return rows of the table.

    Args:
        attend: computes attention by the kernel that its `Tiles` name; a checkpointing tape has its own.
        windows: of the masks that attention will get; None: none is known.
        names: of the rows.
    """
    windows = Windows() if windows is None else windows
    swiglu, polynomial = original(activations, "swiglu"), polynomial_candidates()
    rows = (
        Kernel(
            name=ATTENTION,
            shared="scaled_dot_product_attention",
            theirs=original(base, "scaled_dot_product_attention"),
            candidates={kernel: _attention(attend, kernel, windows) for kernel in (MLX, "tiled", *polynomial)},
            assumed="tiled",
            class_of=_attention_classes(windows),
            trial=partial(_attention_trial, windows),
            words=_attention_words,
            count=_count_attention,
        ),
        Kernel(
            name=ACTIVATION,
            shared="swiglu",
            theirs=swiglu,
            candidates={
                MLX: swiglu,
                "lean": partial(lean_swiglu, True),
                "leanest": partial(lean_swiglu, False),
                **dict.fromkeys(polynomial, polynomial_swiglu),
            },
            assumed="lean" if device.keep_exponentials() else "leanest",
            class_of=lambda gate, up: activation_class(gate.shape[-1]),
            trial=_swiglu_trial,
            words=lambda shape: f"{shape[0]:,} wide",
            count=_count_swiglu,
        ),
    )
    if not POSITIONWISE.issuperset(names):
        from mlx_lora.kernels.recurrent import recurrent_rows  # which few models need

        rows += recurrent_rows()
    return tuple(row for row in rows if row.name in names)


def polynomial_candidates() -> tuple[str, ...]:
    """Return the name of the candidates with polynomials for exponentials (kernels/activations.py), if this device has any."""
    return (POLYNOMIAL,) if device.vectorizes_compiled_sums() else ()


# Replacement


def assumed(kernel: Kernel, shape: ShapeClass) -> str:
    """Return the candidate that is used without measuring, which is ours."""
    return kernel.assumed


@contextmanager
def training_kernels(
    model: nn.Module,
    attend: AttentionCall | None = attend,
    choose: Choose = assumed,
    windows: Windows | None = None,
) -> Iterator[list[str]]:
    """Let the model's layers use the chosen kernels inside the block, in this thread.

    Args:
        model: any mlx-lm model; layers that do not use the shared functions keep their own.
        attend: computes attention by the kernel that its `Tiles` name; None: the model keeps all of its own kernels.
        choose: returns the candidate for a call.
        windows: of masks that are made outside of the block; those of masks that the model makes inside it are added.

    Yields:
        The names of the kernels that the model uses, those of the table first.
    """
    if attend is None:
        yield []
        return
    windows = Windows() if windows is None else windows
    recurrences, scans = _recurrences(model), {}
    if recurrences:
        from mlx_lora.kernels.recurrent import SCANS

        scans = {place: SCANS[of] for place, of in recurrences.items() if of in SCANS}
    takers, names = _takers(model, kernel_rows(attend, windows, ROWS if recurrences else POSITIONWISE), choose, windows)
    names += sorted({words for place, (words, _) in scans.items() if place not in takers})
    with exchanged({place: partial(scan, original(*place)) for place, (_, scan) in scans.items()} | takers):
        yield names


def exchanging(attend: AttentionCall | None, choose: Choose = assumed) -> Kernels:
    """Return what exchanges a model's kernels while it computes, as a step takes it; arguments as for `training_kernels`."""
    return lambda model: training_kernels(model, attend, choose)


def _takers(
    model: nn.Module, rows: Iterable[Kernel], choose: Choose, windows: Windows
) -> tuple[dict[Place, Callable[..., Any]], list[str]]:
    """Return what takes the calls of functions of some rows in the modules of the model's classes, and those rows' names."""
    homes = [sys.modules[name] for name in {type(module).__module__ for module in modules_of(model)}]
    takers: dict[Place, Callable[..., Any]] = {}
    names = []
    for row in rows:
        found = [(home, row.shared) for home in homes if original(home, row.shared) is row.theirs]
        takers |= dict.fromkeys(found, partial(_by_shape, row, choose))
        names += [row.name] if found else []
    makes = original(base, MAKES_MASKS)
    noting = windows.noting(makes)
    return takers | {(home, MAKES_MASKS): noting for home in homes if original(home, MAKES_MASKS) is makes}, names


def _by_shape(row: Kernel, choose: Choose, /, *args: Any, **kwargs: Any) -> Any:
    """Take a call of mlx-lm's function, by the candidate that is chosen for its shapes."""
    shape = row.class_of(*args, **kwargs)
    return (row.theirs if shape is None else row.candidates[choose(row, shape)])(*args, **kwargs)


def _recurrences(model: nn.Module) -> dict[Place, Foreign]:
    """Return the functions of a model's recurrent layers: each in the module that imports it, or the class that it belongs to."""
    classes = {cls for kind in {type(module) for module in modules_of(model)} for cls in kind.__mro__}
    found = {}
    for owner in (*classes, *{sys.modules[cls.__module__] for cls in classes}):
        for name in RECURRENCES_BY_NAME.keys() & vars(owner).keys():
            own = original(owner, name)
            if isinstance(own, FunctionType):
                known = {one.qualified: one for one in RECURRENCES_BY_NAME[name]}
                one = known.get(f"{own.__module__}.{own.__qualname__}")
                found |= {} if one is None else {(owner, name): one}
    return found


def has_recurrence(model: nn.Module) -> bool:
    """Return whether any layer has a recurrence that we have a kernel for."""
    return bool(_recurrences(model))


# Attention


def _attention(attend: AttentionCall, kernel: str, windows: Windows) -> Callable[..., mx.array]:
    """Return a function that computes attention with mlx-lm's signature; only calls that have a shape class get there."""

    def attention(
        queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
    ) -> mx.array:
        window = windows.of(mask)
        head_bytes = 0 if device.keep_exponentials() else keys.shape[2] * queries.dtype.size
        most = tile_queries(window, queries.shape[1], head_bytes)
        tiles = Tiles(scale, mask, most, kernel, isinstance(cache, SharedPrefix), window)
        return attend(queries, keys, values, tiles, sinks)

    return attention


def attention_class(
    heads: int, key_heads: int, width: int, value_width: int, keys: int, mask: str = "causal", sinks: bool = False
) -> ShapeClass:
    """Return the shape class of an attention.

    Args:
        heads, key_heads: H and N.
        width, value_width: d of queries and keys, and of values.
        keys: the number of keys of the longest row.
        mask: `causal`, `array`, `window` for a row of many windows, or `none`.
        sinks: whether logits without a value take part in the softmax.
    """
    return keys_class(keys), heads, key_heads, width, value_width, mask, "sinks" if sinks else ""


def keys_class(keys: int) -> int:
    """Return the size class of a number of keys."""
    return size_class(keys, 64, LONGEST) if keys < LONG_ROW else LONG_ROW


def _attention_classes(windows: Windows) -> Callable[..., ShapeClass | None]:
    """Return a function that classifies a call of attention, with mlx-lm's signature."""

    def class_of(
        queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
    ) -> ShapeClass | None:
        # A float mask may carry a gradient (DeepSeek's position scores); any other cache means generation.
        if not isinstance(cache, SharedPrefix | None) or (isinstance(mask, mx.array) and mask.dtype != mx.bool_):
            return None
        (_, heads, _, width), (_, key_heads, seen, _) = queries.shape, keys.shape
        window = windows.of(mask)
        kind = "array" if isinstance(mask, mx.array) else mask or "none"
        kind = "window" if window is not None and seen > MANY_WINDOWS * window else kind
        return attention_class(heads, key_heads, width, values.shape[-1], seen, kind, sinks is not None)

    return class_of


def _attention_words(shape: ShapeClass) -> str:
    keys, heads, key_heads, width, value_width, mask, sinks = shape
    wide = f"{width}" if width == value_width else f"{width}/{value_width}"
    kinds = {"causal": "", "array": ", windowed", "window": ", a window of few of them", "none": ", all keys seen"}
    extra = kinds[mask] + (", sinks" if sinks else "")
    return f"{keys:,} keys, {heads}/{key_heads} heads of {wide}{extra}"


def _attention_trial(windows: Windows, shape: ShapeClass, dtype: mx.Dtype) -> tuple[TimingInputs, Outputs]:
    """Return a trial with rows of the class's length, and its exact outputs."""
    length, heads, key_heads, width, value_width, mask, sinks = shape
    group, (rows, n) = heads // key_heads, _trial_rows(shape)
    h, scale = n * group, width**-0.5
    keys = mx.random.split(mx.random.key(0), 5)
    sizes = [(rows, h, length, width), (rows, n, length, width), (rows, n, length, value_width)] + [(h,)] * bool(sinks)
    arrays = [mx.random.normal(size, key=key).astype(dtype) for size, key in zip(sizes, keys, strict=False)]
    cotangent = mx.random.normal((rows, h, length, value_width), key=keys[4]).astype(dtype)
    before = mx.arange(length)[:, None] - mx.arange(length)
    share = MANY_WINDOWS if mask == "window" else 2
    window = max(1, length // share) if mask in ("array", "window") else length
    seen = before == before if mask == "none" else (before >= 0) & (before < window)
    given = {"none": None, "causal": "causal"}.get(mask, seen)
    if mask == "window":
        windows.note(seen, window)

    def wrap(function: Callable[..., mx.array]) -> Outputs:
        return lambda q, k, v, *s: [function(q, k, v, None, scale, given, *s)]

    return TimingInputs(arrays, [cotangent], wrap), partial(_naive_attention, scale, seen)


def _trial_rows(shape: ShapeClass) -> tuple[int, int]:
    """Return the rows and key heads of a trial, as many as `device.trial_flops` allows."""
    length, heads, key_heads, width, value_width, *_ = shape
    # The forward pass, and a backward pass that computes the scores again.
    one = 7 * (heads // key_heads) * length**2 * (width + value_width)
    products = max(1, int(device.trial_flops() / one))
    n = min(key_heads, products)
    return min(max(1, TRIAL_POSITIONS // length), max(1, products // n)), n


def _naive_attention(
    scale: float, seen: mx.array, q: mx.array, k: mx.array, v: mx.array, sinks: mx.array | None = None
) -> list[mx.array]:
    """Return attention by its definition: softmax(scale Q K^T) V where `seen` (T, S); a sink adds a logit per row."""
    k, v = (mx.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = mx.where(seen, scale * q @ k.swapaxes(-1, -2), -mx.inf)  # (B, H, T, S)
    if sinks is not None:
        sunk = mx.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        scores = mx.concatenate([scores, sunk], axis=-1)
    return [mx.softmax(scores, axis=-1)[..., : k.shape[2]] @ v]


def _count_attention(terms: KernelTerms, shape: ShapeClass, name: str, figures: Figures | None) -> KernelTerms:
    """Count our kernel by the tile (planner/memory.py), mlx's by the arrays of scores that it kept and used when measured."""
    if name != MLX:
        return replace(terms, tiled=(*terms.tiled, shape[0]))
    if figures is None:
        [(_, *arrays)] = KernelTerms.of_mlx(device.current_device().backend).attention
        return replace(terms, attention=(*terms.attention, (shape[0], *arrays)))
    length, heads, key_heads, width, value_width, *_ = shape
    rows, n = _trial_rows(shape)
    group = heads // key_heads
    number_bytes = figures.input_bytes / (rows * n * length * (group * width + width + value_width))
    scores = rows * n * group * length**2 * number_bytes
    output = rows * n * group * length * value_width * number_bytes
    kept = max(0.0, figures.kept_bytes - output) / scores
    ahead = (figures.peak_bytes - figures.kept_bytes) / scores
    return replace(terms, attention=(*terms.attention, (shape[0], kept, ahead)))


# Gated activation


def activation_class(width: int) -> ShapeClass:
    """Return the shape class of a gated activation of width F."""
    return (size_class(width, 256, 8192),)


def _swiglu_trial(shape: ShapeClass, dtype: mx.Dtype) -> tuple[TimingInputs, Outputs]:
    width = shape[0]
    rows = max(1, min(TRIAL_POSITIONS, TRIAL_NUMBERS // width))
    *arrays, cotangent = (3 * mx.random.normal((rows, width), key=mx.random.key(n)).astype(dtype) for n in range(3))

    def naive(gate: mx.array, up: mx.array) -> list[mx.array]:
        return [gate / (1 + mx.exp(-gate)) * up]

    return TimingInputs(arrays, [cotangent], lambda function: lambda gate, up: [function(gate, up)]), naive


def _count_swiglu(terms: KernelTerms, shape: ShapeClass, name: str, figures: Figures | None) -> KernelTerms:
    """Count the arrays that are kept in addition to gate, up and the product; the most of all classes counts."""
    assumed = {MLX: 2.0, "lean": 1.0, "leanest": 0.0, POLYNOMIAL: 0.0}[name]
    arrays = assumed if figures is None else max(0.0, 2 * figures.kept_bytes / figures.input_bytes - 1)
    return replace(terms, gate_arrays=max(arrays, terms.gate_arrays or 0.0))


# The choice


@dataclass(frozen=True)
class KernelChoice:
    """The kernels chosen for one model.

    Attributes:
        asked: `auto`, `mlx` or `ours`.
        figures: (kernel's name, shape class) -> the candidates' figures, if measured now or in an earlier run.
        classes: (kernel's name, shape class) that the model uses -> the candidate chosen.
    """

    asked: str
    figures: Mapping[tuple[str, ShapeClass], Mapping[str, Figures]] = field(default_factory=dict)
    classes: Mapping[tuple[str, ShapeClass], str] = field(default_factory=dict)

    def __call__(self, kernel: Kernel, shape: ShapeClass) -> str:
        """Return the candidate for a call: that of its class, or of the class that only differs in size, and least."""
        if self.asked == MLX:
            return MLX
        alike = [known for name, known in self.classes if name == kernel.name and known[1:] == shape[1:]]
        if not alike:
            return kernel.assumed
        return self.classes[kernel.name, min(alike, key=lambda known: (abs(known[0] - shape[0]), known))]

    def _rows(self) -> tuple[Kernel, ...]:
        return kernel_rows(names={name for name, _ in self.classes})

    def terms(self) -> KernelTerms:
        """Return the planner's terms for the chosen kernels."""
        terms, rows = KernelTerms(), {row.name: row for row in self._rows()}
        for (kernel, shape), name in self.classes.items():
            known = self.figures.get((kernel, shape), {})
            terms = rows[kernel].count(terms, shape, name, known.get(name))
        return terms

    def of_mlx(self) -> KernelChoice:
        """Return the same choice with mlx's kernels everywhere."""
        return replace(self, asked=MLX, classes=dict.fromkeys(self.classes, MLX))

    def variants(self) -> list[KernelChoice]:
        """Return choices with one candidate per kernel for all shapes, which together have every chosen candidate.

        A check on a few tokens has few shapes; with these choices it tests every candidate that the run will use.
        """
        names: dict[str, list[str]] = {}
        for (kernel, _), name in self.classes.items():
            if name not in names.setdefault(kernel, []):
                names[kernel].append(name)
        most = max(map(len, names.values()), default=1)
        return [
            KernelChoice(
                self.asked,
                classes={key: names[key[0]][min(n, len(names[key[0]]) - 1)] for key in self.classes},
            )
            for n in range(most)
        ]

    def names(self) -> list[str]:
        """Return the chosen kernels' names, such as `tiled attention`, each once."""
        return sorted({f"{name} {kernel}" for (kernel, _), name in self.classes.items()})

    def describe(self) -> list[str]:
        """Return descriptions for the run header, one for each kernel that the model uses."""
        words = []
        for kernel in self._rows():
            chosen = {shape: name for (other, shape), name in self.classes.items() if other == kernel.name}
            names = sorted(set(chosen.values()))
            unmeasured = [shape for shape in chosen if (kernel.name, shape) not in self.figures]
            how = f"--kernels {self.asked}" if self.asked != AUTO else "not measured" if unmeasured else "measured"
            if len(names) == 1:
                words.append(f"{names[0]} {kernel.name} ({how})")
                continue
            by_name = {name: [kernel.words(shape) for shape in chosen if chosen[shape] == name] for name in names}
            parts = "; ".join(f"{name} for {' and '.join(shapes)}" for name, shapes in by_name.items())
            words.append(f"{kernel.name} by shape: {parts} ({how})")
        return words


def choose_model_kernels(
    model: nn.Module,
    lengths: Iterable[int],
    asked: str,
    dtype: mx.Dtype,
    joined_lengths: Iterable[int] = (),
) -> KernelChoice:
    """Return the kernels that a model trains with on this device, after measuring what is not in the cache.

    Args:
        model: with or without adapters; it is not computed.
        lengths: of the rows with one text that it will be trained on, in positions.
        asked: --kernels.
        dtype: of its activations.
        joined_lengths: of the rows that hold a prompt and several answers.
    """
    calls = [*(recorded_calls(model, lengths) or []), *(recorded_calls(model, joined_lengths, shared=True) or [])]
    return choose_among(calls, asked, dtype, measure=True)  # the checks before the run report what fails


def choose_among(
    calls: Iterable[tuple[Kernel, ShapeClass]], asked: str, dtype: mx.Dtype, measure: bool = False
) -> KernelChoice:
    """Return the kernels for some shape classes.

    Args:
        calls: rows of the table, with shape classes.
        asked: --kernels; with `mlx` kernels are measured too, because the planner needs their memory.
        dtype: of the activations.
        measure: measure what is not in the cache.
    """
    kernels = {(kernel.name, shape): kernel for kernel, shape in calls}
    figures: dict[tuple[str, ShapeClass], Mapping[str, Figures]] = {}
    for (name, shape), kernel in kernels.items() if asked != OURS else ():
        found = read_figures(figures_key(name, shape, dtype))
        if found is not None and found.keys() == kernel.candidates.keys():  # of exactly the current candidates
            figures[name, shape] = found
    missing = {key: kernel for key, kernel in kernels.items() if key not in figures}
    if missing and asked != OURS and measure and may_measure():
        # A single one has no progress to show, so that what is around it keeps the screen.
        with long_task("Measuring kernels", len(missing), "shapes") if len(missing) > 1 else nullcontext() as task:
            for number, ((name, shape), kernel) in enumerate(missing.items(), 1):
                of = f" ({number} of {len(missing)})" if len(missing) > 1 else ""
                log.info(f"Measuring {name} for {kernel.words(shape)}, once on this machine{of}")
                figures[name, shape] = measured_figures(kernel, shape, dtype)
                if task is not None:
                    task.advance()
    classes: dict[tuple[str, ShapeClass], str] = {}
    for key, kernel in kernels.items():
        best = choose(figures[key]) or MLX if key in figures else kernel.assumed
        classes[key] = MLX if asked == MLX else best
    return KernelChoice(asked, figures, classes)


def measured_figures(kernel: Kernel, shape: ShapeClass, dtype: mx.Dtype) -> Mapping[str, Figures]:
    """Measure a class's candidates, store their figures in the cache, and return them."""
    trial, reference = kernel.trial(shape, dtype)
    figures = measure(kernel.candidates, trial, reference, device.compiling_is_cheap(), [POLYNOMIAL])
    keep_figures(figures_key(kernel.name, shape, dtype), figures)
    return figures


def planned_kernels(model: ModelShape, asked: str, dtype: mx.Dtype) -> KernelChoice:
    """Return the kernels of a model that is not loaded, from figures in the cache; nothing is measured.

    Args:
        model: its shape.
        asked: --kernels.
        dtype: of its activations.
    """
    attention, gate = kernel_rows(names=POSITIONWISE)
    sizes = [*(size for size in (1 << n for n in range(6, 11)) if size <= LONGEST), LONG_ROW]
    calls: dict[tuple[str, ShapeClass], Kernel] = {}
    for block in model.blocks:
        if block.heads:
            of = block.heads, block.key_heads, block.head_width, block.head_width
            calls.update({(attention.name, attention_class(*of, size)): attention for size in sizes})
        for layer in block.layers:
            if block.gated == "silu" and layer.name in ("down_proj", "w2"):
                calls[gate.name, activation_class(layer.inputs)] = gate
    return choose_among([(kernel, shape) for (_, shape), kernel in calls.items()], asked, dtype)


def recorded_calls(
    model: nn.Module, lengths: Iterable[int], shared: bool = False
) -> list[tuple[Kernel, ShapeClass]] | None:
    """Return each kernel and shape class that the model uses on rows of these lengths; None if its code fails.

    Args:
        model: is not computed.
        lengths: in positions; of those in one size class, the longest is tried.
        shared: whether a row holds a prompt and several answers.
    """
    longest: dict[int, int] = {}
    for length in lengths:
        size = keys_class(length)
        longest[size] = max(longest.get(size, 1), length)
    found: dict[tuple[str, ShapeClass], Kernel] = {}

    def record(kernel: Kernel, shape: ShapeClass) -> str:
        found.setdefault((kernel.name, shape), kernel)
        return kernel.assumed

    # Restore the model afterwards: some overwrite weights in a forward pass, and dropout draws random numbers.
    training, parameters = model.training, model.parameters()
    high, low = mx.random.state[0].tolist()
    model.train()  # some models compute differently in training
    try:
        with training_kernels(model, choose=record):
            for length in longest.values():
                inputs = mx.zeros((1, length), mx.int32)
                arrays = {"inputs": inputs} | ({"starts": mx.array([[1, 1]])} if shared else {})
                model(inputs, **shared_caches(model, arrays))
    except FOREIGN_ERRORS as error:
        raise_if_ours(error)
        return None
    finally:
        model.update(parameters)
        mx.random.seed(high << 32 | low)
        model.train(training)
    return [(kernel, shape) for (_, shape), kernel in found.items()]


# Compute the attention of long rows in tiles where a loss is measured without its gradient.
#
# mlx's attention keeps the scores of all queries and keys wherever it has no fused kernel: always on a CPU, and on a GPU for
# some widths of heads. A validation would then take more memory than the step, whose attention is tiled: 9 heads of 16,384 positions have
# 9.7 GB of scores. Shorter rows keep mlx's attention, which is as fast, so their losses keep their bits.


@contextmanager
def long_row_kernels(model: nn.Module) -> Iterator[None]:
    """Let a model compute attention to `LONG_ROW` keys and more in tiles inside the block, unless mlx has a fused kernel for it.

    Args:
        model: any mlx-lm model; layers that do not use the shared function keep their own.
    """
    windows = Windows()
    takers, _ = _takers(model, kernel_rows(attend, windows, [ATTENTION]), _by_length, windows)
    with exchanged(takers):
        yield


def _by_length(kernel: Kernel, shape: ShapeClass) -> str:
    """Return the candidate for a shape class of attention."""
    keys, _, _, width, value_width, mask, _ = shape
    # A fused kernel computes what a window hides, too, and reads a mask of all queries and keys.
    fused = mask != "window" and device.fuses_attention(width, value_width)
    return MLX if keys < LONG_ROW or fused else kernel.assumed
