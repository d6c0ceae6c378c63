"""Which kernels a model trains with here: measured once per (device, mlx, dtype, class of shapes), then known.

    recorded   the model is traced, not computed, at each length the data have: which kernels does it call, in which shapes
    measured   every candidate of every such class that is not in the cache yet (measuring.py)
    chosen     by the rule of `measuring.choose`

`--kernels ours` takes the table's own without asking the clock, `--kernels mlx` leaves everything to mlx and mlx-lm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign
from mlx_lora.models.kernel_row import MLX, Kernel, ShapeClass, size_class
from mlx_lora.models.kernel_table import LONGEST, activation_class, attention_class, kernel_rows
from mlx_lora.models.kernels import training_kernels
from mlx_lora.planner.shapes import KernelTerms, ModelShape
from mlx_lora.system import device
from mlx_lora.system.measuring import Figures, choose, keep_figures, may_measure, measure, read_figures

AUTO, OURS = "auto", "ours"


@dataclass(frozen=True)
class KernelChoice:
    """What was chosen for one model.

    Attributes:
        asked: `auto`, `mlx` or `ours`.
        figures: (kernel's name, class) -> candidates' figures, where they were measured, here or in an earlier run.
        classes: (kernel's name, class) that the model has -> the candidate chosen.
    """

    asked: str
    figures: Mapping[tuple[str, ShapeClass], Mapping[str, Figures]] = field(default_factory=dict)
    classes: Mapping[tuple[str, ShapeClass], str] = field(default_factory=dict)

    def __call__(self, kernel: Kernel, shape: ShapeClass) -> str:
        """Return the candidate for a call: its class's, or that of the same kind whose size is nearest."""
        if self.asked == MLX:
            return MLX
        alike = [known for name, known in self.classes if name == kernel.name and known[1:] == shape[1:]]
        if not alike:
            return kernel.assumed
        return self.classes[kernel.name, min(alike, key=lambda known: (abs(known[0] - shape[0]), known))]

    def terms(self) -> KernelTerms:
        """Return what the planner counts for the chosen kernels."""
        terms, rows = KernelTerms(), {row.name: row for row in kernel_rows()}
        for (kernel, shape), name in self.classes.items():
            known = self.figures.get((kernel, shape), {})
            terms = rows[kernel].count(terms, shape, name, known.get(name))
        return terms

    def of_mlx(self) -> KernelChoice:
        """Return the same with mlx's own kernels throughout."""
        return replace(self, asked=MLX, classes=dict.fromkeys(self.classes, MLX))

    def variants(self) -> list[KernelChoice]:
        """Return choices in which each kernel has one candidate for all shapes, so that each chosen one occurs.

        A check on a few tokens has few shapes; this is how it meets every candidate that the run will use.
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
        """Return `tiled attention` and so on, each once."""
        return sorted({f"{name} {kernel}" for (kernel, _), name in self.classes.items()})

    def describe(self) -> list[str]:
        """Return words for the run header, one for each kernel that the model has."""
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
    say: Callable[[str], None] = lambda line: None,
) -> KernelChoice:
    """Return the kernels that a model trains with on this device; what is not known yet is measured.

    Args:
        model: adapters in place or not; nothing of it is computed.
        lengths: of the rows it will see, in positions.
        asked: --kernels.
        dtype: of its activations.
        say: takes a line before something is measured.
    """
    return choose_among(recorded_calls(model, lengths), asked, dtype, say)


def choose_among(
    calls: Iterable[tuple[Kernel, ShapeClass]], asked: str, dtype: mx.Dtype, say: Callable[[str], None] | None = None
) -> KernelChoice:
    """Return the kernels for some classes of shapes.

    Args:
        calls: rows of the table, with classes.
        asked: --kernels; `mlx` is measured as well, for the planner to know what it takes.
        dtype: of the activations.
        say: takes a line before something is measured; None: nothing is.
    """
    figures: dict[tuple[str, ShapeClass], Mapping[str, Figures]] = {}
    classes: dict[tuple[str, ShapeClass], str] = {}
    for kernel, shape in calls:
        found = None if asked == OURS else known_figures(kernel, shape, dtype)
        if found is None and asked != OURS and say is not None and may_measure():
            say(f"Measuring {kernel.name} for {kernel.words(shape)}, once on this machine")
            found = measured_figures(kernel, shape, dtype)
        if found is not None:
            figures[kernel.name, shape] = found
        best = kernel.assumed if found is None else choose(found) or MLX
        classes[kernel.name, shape] = MLX if asked == MLX else best
    return KernelChoice(asked, figures, classes)


def planned_kernels(model: ModelShape, asked: str, dtype: mx.Dtype) -> KernelChoice:
    """Return the kernels of a model that is not loaded, by what is known of this machine; nothing is measured.

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


def recorded_calls(model: nn.Module, lengths: Iterable[int]) -> list[tuple[Kernel, ShapeClass]]:
    """Return each kernel and class of shapes that the model calls on rows of these lengths."""
    found: dict[tuple[str, ShapeClass], Kernel] = {}

    def record(kernel: Kernel, shape: ShapeClass) -> str:
        found.setdefault((kernel.name, shape), kernel)
        return kernel.assumed

    longest: dict[int, int] = {}
    for length in lengths:
        size = size_class(length, 64, LONGEST)
        longest[size] = max(longest.get(size, 1), length)
    # The model stays as it is: some overwrite weights as they go, dropout draws.
    training, parameters = model.training, model.parameters()
    high, low = mx.random.state[0].tolist()
    model.train()  # some models have a path of their own for it
    try:
        with training_kernels(model, choose=record):
            for length in longest.values():
                model(mx.zeros((1, max(1, length)), mx.int32))
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        return []  # what fails in which form is found out by the checks before the run
    finally:
        model.update(parameters)
        mx.random.seed(high << 32 | low)
        model.train(training)
    return [(kernel, shape) for (_, shape), kernel in found.items()]


def known_figures(kernel: Kernel, shape: ShapeClass, dtype: mx.Dtype) -> Mapping[str, Figures] | None:
    """Return what the cache holds of a class, None when that is nothing, or not of all candidates of today."""
    figures = read_figures(figures_key(kernel.name, shape, dtype))
    return figures if figures is not None and figures.keys() == kernel.candidates.keys() else None


def measured_figures(kernel: Kernel, shape: ShapeClass, dtype: mx.Dtype) -> Mapping[str, Figures]:
    """Measure a class's candidates now, and keep the figures."""
    trial, reference = kernel.trial(shape, dtype)
    figures = measure(kernel.candidates, trial, reference, device.compiling_is_cheap())
    keep_figures(figures_key(kernel.name, shape, dtype), figures)
    return figures


def figures_key(name: str, shape: ShapeClass, dtype: mx.Dtype) -> str:
    """Return what a class's figures are kept under."""
    of = ",".join(map(str, shape))
    return f"{device.measured_on()}|{str(dtype).rpartition('.')[2]}|{name}|{of}"
