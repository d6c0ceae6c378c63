"""Choose the kernels that a model trains with, by measuring once per (device, mlx version, dtype, shape class).

    record     trace the model, without computing it, at each length of the data, to find the kernels and shapes it uses
    measure    all candidates for every shape class that is not in the cache yet (kernels/measure.py)
    choose     by the rule of `measure.choose`

`--kernels ours` uses the table's `assumed` candidates without measuring; `--kernels mlx` uses those of mlx and mlx-lm.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.kernels.measure import (
    MLX,
    POLYNOMIAL,
    Figures,
    Kernel,
    ShapeClass,
    choose,
    keep_figures,
    may_measure,
    measure,
    read_figures,
    size_class,
)
from mlx_lora.kernels.table import LONGEST, activation_class, attention_class, kernel_rows, training_kernels
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign
from mlx_lora.models.prefix_attention import shared_caches
from mlx_lora.planner.shapes import KernelTerms, ModelShape
from mlx_lora.utils import device
from mlx_lora.utils.progress import long_task

log = logging.getLogger(__name__)

AUTO, OURS = "auto", "ours"


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

    def terms(self) -> KernelTerms:
        """Return the planner's terms for the chosen kernels."""
        terms, rows = KernelTerms(), {row.name: row for row in kernel_rows()}
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
        for kernel in kernel_rows():
            chosen = {shape: name for (other, shape), name in self.classes.items() if other == kernel.name}
            names = sorted(set(chosen.values()))
            if not names:
                continue
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
    calls = [*recorded_calls(model, lengths), *recorded_calls(model, joined_lengths, shared=True)]
    return choose_among(calls, asked, dtype, measure=True)


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
    if asked != OURS:
        known = {(name, shape): known_figures(kernel, shape, dtype) for (name, shape), kernel in kernels.items()}
        figures = {key: found for key, found in known.items() if found is not None}
    missing = {key: kernel for key, kernel in kernels.items() if key not in figures}
    if missing and asked != OURS and measure and may_measure():
        figures |= measured_now(missing, dtype)
    classes: dict[tuple[str, ShapeClass], str] = {}
    for key, kernel in kernels.items():
        best = choose(figures[key]) or MLX if key in figures else kernel.assumed
        classes[key] = MLX if asked == MLX else best
    return KernelChoice(asked, figures, classes)


def measured_now(
    missing: Mapping[tuple[str, ShapeClass], Kernel], dtype: mx.Dtype
) -> dict[tuple[str, ShapeClass], Mapping[str, Figures]]:
    """Measure some shape classes, and say which, and how much is left."""
    figures: dict[tuple[str, ShapeClass], Mapping[str, Figures]] = {}
    # A single one has no progress to show, so that what is around it keeps the screen.
    shown = long_task("Measuring kernels", len(missing), "shapes") if len(missing) > 1 else nullcontext()
    with shown as task:
        for number, ((name, shape), kernel) in enumerate(missing.items(), 1):
            of = f" ({number} of {len(missing)})" if len(missing) > 1 else ""
            log.info(f"Measuring {name} for {kernel.words(shape)}, once on this machine{of}")
            figures[name, shape] = measured_figures(kernel, shape, dtype)
            if task is not None:
                task.advance()
    return figures


def planned_kernels(model: ModelShape, asked: str, dtype: mx.Dtype) -> KernelChoice:
    """Return the kernels of a model that is not loaded, from figures in the cache; nothing is measured.

    Args:
        model: its shape.
        asked: --kernels.
        dtype: of its activations.
    """
    attention, gate = kernel_rows()[:2]
    sizes = [size for size in (1 << n for n in range(6, 11)) if size <= LONGEST]
    calls: dict[tuple[str, ShapeClass], Kernel] = {}
    for block in model.blocks:
        if block.heads:
            of = block.heads, block.key_heads, block.head_width, block.head_width
            calls.update({(attention.name, attention_class(*of, size)): attention for size in sizes})
        for layer in block.layers:
            if block.gated == "silu" and layer.name in ("down_proj", "w2"):
                calls[gate.name, activation_class(layer.inputs)] = gate
    return choose_among([(kernel, shape) for (_, shape), kernel in calls.items()], asked, dtype)


def recorded_calls(model: nn.Module, lengths: Iterable[int], shared: bool = False) -> list[tuple[Kernel, ShapeClass]]:
    """Return each kernel and shape class that the model uses on rows of these lengths; none if its code fails.

    Args:
        model: is not computed.
        lengths: in positions.
        shared: whether a row holds a prompt and several answers.
    """
    longest: dict[int, int] = {}
    for length in lengths:
        size = size_class(length, 64, LONGEST)
        longest[size] = max(longest.get(size, 1), length)
    try:
        return traced_calls(model, longest.values(), shared)
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        return []  # the checks before the run report what fails


def traced_calls(model: nn.Module, lengths: Iterable[int], shared: bool = False) -> list[tuple[Kernel, ShapeClass]]:
    """Return each kernel and shape class that the model uses; arguments as for `recorded_calls`.

    Raises:
        FOREIGN_ERRORS: the model's code fails.
    """
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
            for length in lengths:
                inputs = mx.zeros((1, max(1, length)), mx.int32)
                model(inputs, **shared_caches(model, inputs, mx.array([[1, 1]]) if shared else None))
    finally:
        model.update(parameters)
        mx.random.seed(high << 32 | low)
        model.train(training)
    return [(kernel, shape) for (_, shape), kernel in found.items()]


def known_figures(kernel: Kernel, shape: ShapeClass, dtype: mx.Dtype) -> Mapping[str, Figures] | None:
    """Return a class's figures from the cache, None if they are not there for exactly the current candidates."""
    figures = read_figures(figures_key(kernel.name, shape, dtype))
    return figures if figures is not None and figures.keys() == kernel.candidates.keys() else None


def measured_figures(kernel: Kernel, shape: ShapeClass, dtype: mx.Dtype) -> Mapping[str, Figures]:
    """Measure a class's candidates, store their figures in the cache, and return them."""
    trial, reference = kernel.trial(shape, dtype)
    figures = measure(kernel.candidates, trial, reference, device.compiling_is_cheap(), [POLYNOMIAL])
    keep_figures(figures_key(kernel.name, shape, dtype), figures)
    return figures


def figures_key(name: str, shape: ShapeClass, dtype: mx.Dtype) -> str:
    """Return the cache key of a class's figures."""
    of = ",".join(map(str, shape))
    return f"{device.measured_on()}|{str(dtype).rpartition('.')[2]}|{name}|{of}"
