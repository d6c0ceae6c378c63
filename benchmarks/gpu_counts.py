"""Count what a step asks of a Mac's GPU, from its graph and without one: launches, bytes, operations.

    python benchmarks/gpu_counts.py
    python benchmarks/gpu_counts.py --models qwen3-8b-4bit gpt-oss-20b-4bit --widths 256 1024 --out counts.json
    python benchmarks/gpu_counts.py --sides mlx_lora unsloth-zoo mlx_lm.lora    # with that package beside us

MLX lists the graph that Metal would compute (mlx_lora/models/graph.py). Of each operation it is known here what it launches:

    view            nothing: reshape, transpose, slice, broadcast ... share their input's memory
    fused           one launch for a chain of elementwise operations, which compiling joins, and which keeps what is inside in registers
    elementwise     one launch for an elementwise operation alone; all are, in a step that its trainer does not compile
    product         one launch; another for each matrix that must be copied first, and one more if its sum is divided (split-K)
    kernel          one launch: norm, rotation, dequantization
    other           one launch for a reduction, softmax, gather; one for each part of a concatenation

Bytes are those of the arrays that a launch reads and writes, each once: what a kernel reads twice and finds in a cache is not
counted. Operations are those of products; the gradients of experts' factors are kernels here, whose operations are not
counted. The predicted time is that of one launch after the other, each the longest of computing, moving and launching at
the rates of planner/speed.py; nobody has measured it. A model's 4-bit form is named with `-4bit`.
Numbers in parentheses are shares of the last side's. `waits` says how many times in a step the host waits for the GPU. What each
of the other trainers does by default is told in _gpu_sides.py.

Source: mlx/backend/metal/{matmul,reduce,copy,compiled}.cpp, mlx 0.32.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as optim
from _gpu_checkpoints import computed_twice, marked
from _gpu_kernels import WIDTHS, as_on_metal
from _harness import environment, options, record, say, table
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.bench.run import MODELS
from mlx_lora.compat.functions import exchanged, original
from mlx_lora.config.load import train_settings
from mlx_lora.kernels.choose import ATTENTION, Choose, assumed, training_kernels
from mlx_lora.kernels.measure import MLX, Kernel, ShapeClass
from mlx_lora.losses.cross_entropy import TILES
from mlx_lora.losses.fused import head_loss
from mlx_lora.models.graph import (
    ELEMENTWISE,
    PRODUCTS,
    Buffers,
    Graph,
    Node,
    as_on_gpu,
    fused_chains,
    gradient_graph,
    plain_graph,
    row_strides,
    uncollected,
)
from mlx_lora.models.head import find_head, with_last_block
from mlx_lora.models.meta import outline_of_config
from mlx_lora.planner.machine import loss_tile_bytes
from mlx_lora.planner.speed import Ceilings, find_chip, listed_ceilings
from mlx_lora.trainer.step import Step

PACKED = frozenset(["GatherQMM", "QuantizedMatmul"])
# A product of few tiles and a long sum is divided into parts, which a second launch adds up (steel_matmul_axpby and
# steel_gemm_splitk_axpby of matmul.cpp). Max and Ultra divide up to twice as many tiles, which is not counted.
TILE, FEW_TILES, LONG_SUM, MOST_PARTS = 16, 1024, 8, 32
SCALAR_BYTES = 16
CHIPS = ("M1", "M2 Pro", "M4 Max")
MORE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
OPTIONS = (
    (
        "--models",
        ["llama-3.2-1b", "llama-3.2-1b-4bit"],
        "Of bench/run.py, or of gpu_counts.json.",
        [name + form for name in (*MODELS, *MORE) for form in ("", "-4bit")],
    ),
    ("--widths", [256, 1024], "Positions of the step's one row."),
    ("--trained", 1 / 3, "The share of its positions that are trained."),
    ("--checkpoint", False, "Checkpoint blocks, as --grad-checkpoint does in both mlx_lora (block) and mlx_lm.lora."),
    (
        "--sides",
        ["mlx_lora", "mlx_lm.lora"],
        "Trainers.",
        ("mlx_lora", "mlx_lora, tiles", "mlx_lm.lora", "mlx-lm-lora", "unsloth-zoo", "mlx-train-perf", "mlx-vlm"),
    ),
    ("--out", str, "File that gets the counts as JSON."),
)


class Launch(NamedTuple):
    """One launch.

    Attributes:
        kind: of the table above.
        nbytes: that it reads and writes.
        flops: of a product, or of a trainer's own kernel that multiplies.
        number_bytes: of a product's result.
    """

    kind: str
    nbytes: int
    flops: float = 0.0
    number_bytes: int = 4


def launches_of(graph: Graph, compiled: bool = True) -> list[Launch]:
    """Return the launches of a graph that is compiled, or is not."""
    return _Counting(graph, compiled).launches


class _Counting:
    """Counts a graph's launches."""

    def __init__(self, graph: Graph, compiled: bool) -> None:
        self.graph, self.launches = graph, list[Launch]()
        self.buffers = Buffers(graph, fuses=compiled)
        self.maker = {name: number for number, node in enumerate(graph.nodes) for name in node.outputs}
        self.chain, self.inner = fused_chains(graph) if compiled else ({}, set())
        self.inside = set[int]()  # nodes that only say what a kernel's stand-in reads
        self.sources = {n: self._stood_for(n) for n, node in enumerate(graph.nodes) if node.name == "Full"}
        chains: dict[int, list[int]] = defaultdict(list)
        for number, node in enumerate(graph.nodes):
            if number not in self.inside and not self._is_view(number):
                chains[self.chain.get(number, number)].append(number)
            if node.name == "Depends" and self.maker.get(node.inputs[0]) in self.sources:
                self.sources[self.maker[node.inputs[0]]] += node.inputs[1:]
        for numbers in chains.values():
            self._launch(numbers)

    def _is_view(self, number: int) -> bool:
        return all(self.buffers.of[name] != name for name in self.graph.nodes[number].outputs)

    def _stood_for(self, number: int) -> list[str]:
        """Return what the kernel reads for which a filled array stands (`one_kernel` of models/graph.py); nothing: it is a filled array."""
        passed, name = list[int](), self.graph.nodes[number].inputs[0]
        while (maker := self.maker.get(name)) is not None:
            node = self.graph.nodes[maker]
            if node.name != "Broadcast" and math.prod(self.graph.arrays[name].shape) > 1:
                break
            passed.append(maker)
            name = node.inputs[0] if node.inputs else ""
        if not name or math.prod(self.graph.arrays[name].shape) <= 1:
            return []
        self.inside |= set(passed)
        return [name]

    def _launch(self, numbers: list[int]) -> None:
        """Count the launches of one chain, or of one operation, and the arrays that they read and write."""
        nodes = [self.graph.nodes[number] for number in numbers]
        made = {name for node in nodes for name in node.outputs}
        last = nodes[-1]
        read = dict[str, int]()
        for name in (
            name for number in numbers for name in self.sources.get(number) or self.graph.nodes[number].inputs
        ):
            base = self.buffers.of.get(name, name)
            if base not in made:
                read[base] = max(read.get(base, 0), min(self._bytes(name), self._bytes(base)))
        if last.name.startswith("Gather"):  # of a table or of experts, only what is asked for
            table = self.buffers.of.get(last.inputs[0 if last.name in ("Gather", "GatherAxis") else 1])
            read[table] = min(read.get(table, 0), self._gathered(last))
        written = sum(self._bytes(name) for name in made if name not in self.inner and self.buffers.of[name] == name)
        largest = max((self._bytes(name) for name in (*read, *made)), default=0)
        moved = sum(read.values()) + written
        if largest <= SCALAR_BYTES:
            self._add("scalar", moved)
        elif last.name in ELEMENTWISE:
            self._add("fused" if len(nodes) > 1 else "elementwise", moved)
        elif last.name in PRODUCTS | PACKED:
            self._product(numbers[-1], moved)
        elif last.name == "Full":
            self._kernel(self.sources[numbers[-1]], moved)
        elif last.name == "Concatenate":
            for name in last.inputs:
                self._add("copy", 2 * self._bytes(name))
        elif last.name in ("Scatter", "ScatterAxis", "SliceUpdate", "Pad"):
            self._add("copy", 2 * self._bytes(last.outputs[0]))
            self._add("other", moved)
        elif last.name in ("Copy", "Reshape", "Flatten", "Unflatten", "Transpose", "AsStrided", "Contiguous"):
            self._add("copy", moved)
        else:
            self._add("other", moved)

    def _gathered(self, node: Node) -> int:
        """Return the most bytes that a gathering operation reads of its table, or of its experts' weights."""
        out = self.graph.arrays[node.outputs[0]]
        if node.name in ("Gather", "GatherAxis"):
            return out.nbytes
        experts = self.graph.arrays[node.inputs[1]]
        rows = math.prod(out.shape[:-1])
        return experts.nbytes * min(rows, experts.shape[0]) // experts.shape[0]

    def _add(self, kind: str, nbytes: int) -> None:
        self.launches.append(Launch(kind, nbytes))

    def _kernel(self, sources: list[str], moved: int) -> None:
        """Count what a filled array stands for: of a trainer's own kernel, the copies and the products too (`own_kernel`)."""
        products = [shape for name in sources if (shape := self.graph.arrays[name].shape)[:1] == (0,)]
        for name in sources if products else ():
            if self.buffers.strides[name] != row_strides(self.graph.arrays[name].shape):
                self._add("copy", 2 * self._bytes(name))
        flops = sum(2.0 * math.prod(shape[1:]) for shape in products)
        shapes = [self.graph.arrays[name].shape for name in sources]
        if len(shapes) == 3 and {len(shape) for shape in shapes} == {4}:  # MLX's attention: queries, keys, values
            flops = 4.0 * math.prod(shapes[0]) * shapes[1][2]
        self.launches.append(Launch("kernel" if sources else "fill", moved, flops, 2))

    def _product(self, number: int, moved: int) -> None:
        node = self.graph.nodes[number]
        shapes = [self.graph.arrays[name].shape for name in node.inputs[:2]]
        out = self.graph.arrays[node.outputs[0]]
        summed = shapes[0][-1]
        flops = 2.0 * summed * math.prod(out.shape)
        packed = node.name in PACKED
        self.launches.append(Launch("packed product" if packed else "product", moved, flops, out.number_bytes))
        if packed:
            return
        for name in node.inputs[:2]:
            if not self.buffers.multiplies(name):
                self._add("copy", 2 * self._bytes(name))
        # A matrix that all rows share is multiplied once, with the rows of the whole batch.
        batch = 1 if math.prod(shapes[1][:-2]) == 1 else math.prod(out.shape[:-2])
        rows, columns = math.prod(out.shape[:-1]) // batch, out.shape[-1]
        long = summed // TILE >= LONG_SUM and summed >= max(rows, columns)
        if batch == 1 and min(rows, columns) > 1 and long and _tiles(rows, columns, TILE) <= FEW_TILES:
            each = summed // TILE // _tiles(rows, columns, 2 * TILE)
            parts = min(max(2, 1 << max(0, each - 1).bit_length()), MOST_PARTS)
            self._add("split-K sum", 2 * parts * 4 * rows * columns)  # written and read again in float32

    def _bytes(self, name: str) -> int:
        return self.graph.arrays[name].nbytes


def _tiles(rows: int, columns: int, size: int) -> int:
    return math.ceil(rows / size) * math.ceil(columns / size)


# Whole steps


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        model: of bench/run.py or gpu_counts.json.
        packed: whether the base has 4 bits.
        width: positions of a row.
        trained: how many of them are trained.
        checkpoint: whether blocks are computed again in the backward pass; of the others' sides, mlx_lm.lora's and mlx-lm-lora's.
        rows: of the step; this and what follows is read on mlx_lm.lora's side only.
        rank: of the adapter.
        num_layers: of the blocks that are adapted, counted from the last; -1: all.
        keys: the layers of a block that are adapted; None: all linear ones.
    """

    model: str
    packed: bool
    width: int
    trained: int
    checkpoint: bool = False
    rows: int = 1
    rank: int = 16
    num_layers: int = -1
    keys: tuple[str, ...] | None = None

    def outline(self) -> tuple[nn.Module, dict[str, Any]]:
        """Return the model without weights, and its config."""
        of = MODELS.get(self.model, MODELS["qwen3-8b"])
        config = {**MORE.get(self.model, of.config), **({"quantization": of.quantization} if self.packed else {})}
        return outline_of_config(config, mx.bfloat16).model, config


def native(kernel: Kernel, shape: ShapeClass) -> str:
    """Choose MLX's kernel where Metal has one with a gradient, as measuring is likely to do there."""
    if "fused" in kernel.candidates:
        return "fused"
    _, _, _, width, value_width, mask, sinks = shape if kernel.name == ATTENTION else (0, 0, 0, 0, 0, "array", "")
    return MLX if mask in ("causal", "none") and not sinks and width == value_width in WIDTHS else kernel.assumed


def ours(case: Case, choose: Choose = assumed) -> list[Graph]:
    """Return the graphs of our step with its defaults: loss and gradient, and the update; `choose` as of `training_kernels`."""
    model, config = case.outline()
    settings = train_settings({"model": case.model, "data": "rows"})
    adapt_model(model, settings.adapter, seed=0)
    model.train()
    head, _ = with_last_block(find_head(model, config), model)
    loss = head_loss(head, TILES, loss_tile_bytes())
    shape, trained = (1, case.width), (case.trained,)
    arrays = {
        "inputs": mx.zeros(shape, mx.int32),
        "targets": mx.zeros(shape, mx.int32),
        "mask": mx.zeros(shape, mx.bool_),
        "positions": mx.zeros(trained, mx.int32),
        "weights": mx.zeros(trained),
    }
    step = Step(model, optim.AdamW(1e-4), loss.train, max_grad_norm=1.0)
    blocks = type(model.layers[0]), "__call__"
    twice = exchanged({blocks: partial(marked, original(*blocks))} if case.checkpoint else {})
    with training_kernels(model, choose=choose), step.masters.cast(), twice:
        graph = gradient_of(model, lambda: [loss.train(model, arrays)[0]], arrays)
        gradients = model.trainable_parameters()

    def update(values: list[Any]) -> list[mx.array]:
        step.masters.put(values[0])
        step.optimizer.state.update(values[1])
        with step.masters.cast() as factor:
            factors = model.trainable_parameters()
        gathered = tree_map(lambda gradient: factor * gradient, step.masters.gathered(values[2]))
        result = step._update(values[3], values[4], {}, gathered)
        return [value for _, value in tree_flatten([step.masters.arrays, step.optimizer.state, factors, result[:4]])]

    state = [step.masters.arrays, dict(step.optimizer.state), gradients, mx.zeros(()), mx.zeros(())]
    return [computed_twice(graph), plain_of(update, state)]


OURS = {"mlx_lora": native, "mlx_lora, tiles": assumed}


def graphs_of(case: Case, side: str) -> tuple[list[Graph], bool, int]:
    """Return the graphs of a side's step, whether it is compiled, and how many times a step waits for the GPU."""
    if side in OURS:
        return (
            ours(case, OURS[side]),
            True,
            0,
        )  # a report is read when it is there, a step later (mlx_lora/trainer/step.py)
    from _gpu_sides import first_step  # of packages that may have an environment of their own

    return first_step(side, case, gradient_of, plain_of)


def plain_of(function: Callable[[Any], list[mx.array]], tree: Any) -> Graph:
    """Return the graph of a function of a tree of arrays."""

    def of_leaves(*values: mx.array) -> list[mx.array]:
        rest = iter(values)
        return function(tree_map(lambda _: next(rest), tree))

    return plain_graph(of_leaves, [value for _, value in tree_flatten(tree)])


def gradient_of(model: nn.Module, loss: Callable[[], list[mx.array]], arrays: dict[str, mx.array]) -> Graph:
    """Return the graph of a loss of `arrays`, and what is computed with it, and of the gradient of the model's trainable parameters."""
    own = dict(tree_flatten(model.parameters()))
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    names = [*trained, *(name for name in own if name not in set(trained))]
    before = dict(arrays)

    def function(varied: list[mx.array], fixed: list[mx.array]) -> list[mx.array]:
        arrays.update(zip(before, fixed, strict=False))
        values = zip(names, [*varied, *fixed[len(before) :]], strict=True)
        model.update(tree_unflatten(list(values)))
        return loss()

    try:
        frozen = [own[name] for name in names[len(trained) :]]
        return gradient_graph(function, [own[name] for name in trained], [*before.values(), *frozen])
    finally:
        arrays.update(before)
        model.update(tree_unflatten(list(own.items())))


def seconds(launches: Iterable[Launch], ceilings: Ceilings, full_rate: float) -> tuple[float, Counter[str]]:
    """Return a predicted time and how much of it is bound by what: each launch takes the longest of three.

    Args:
        launches: one after the other.
        ceilings: of the chip, with the rate of 16-bit products.
        full_rate: of float32 products.
    """
    bound = Counter[str]()
    for one in launches:
        computing = one.flops / (full_rate if one.number_bytes == 4 else ceilings.flops_per_s)
        times = {"products": computing, "bytes": one.nbytes / ceilings.bytes_per_s, "launches": ceilings.launch_s}
        name = max(times, key=lambda name: times[name])
        bound[name] += times[name]
    return sum(bound.values()), bound


def counted(case: Case, side: str) -> dict[str, Any]:
    """Return what a step of a side asks of a GPU, and the predicted times, in seconds by chip."""
    with as_on_metal(), as_on_gpu(), uncollected():
        graphs, compiled, waits = graphs_of(case, side)
        launches = [one for graph in graphs for one in launches_of(graph, compiled)]
    found: dict[str, Any] = {
        "side": side,
        **vars(case),
        "trained_numbers": sum(math.prod(graphs[0].arrays[name].shape) for name in graphs[0].gradients),
        "host_syncs": waits,
        "launches": len(launches),
        "kinds": Counter(one.kind for one in launches),
        "bytes": sum(one.nbytes for one in launches),
        "flops": sum(one.flops for one in launches),
        "predicted_s": {},
        "bound_by": {},
    }
    for chip in map(find_chip, CHIPS):
        total, bound = seconds(launches, listed_ceilings(chip), listed_ceilings(chip, 4).flops_per_s)
        found["predicted_s"][chip.name] = total
        found["bound_by"][chip.name] = {name: value / total for name, value in bound.items()}
    return found


def as_row(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return a line of the table, with its numbers as a share of the other side's."""
    of = f"{one['model']}{' 4-bit' if one['packed'] else ''}"
    numbers = [
        f"{one['launches']:,} ({one['launches'] / other['launches']:.2f})",
        f"{one['bytes'] / 1e9:.1f} ({one['bytes'] / other['bytes']:.2f})",
        f"{one['flops'] / 1e12:.2f} ({one['flops'] / other['flops']:.2f})",
    ]
    times = [
        f"{1e3 * value:,.0f} ms ({value / other['predicted_s'][chip]:.2f}); launches {one['bound_by'][chip].get('launches', 0):.0%}"
        for chip, value in one["predicted_s"].items()
    ]
    return [of, f"{one['width']:,} ({one['trained']:,})", one["side"], *numbers, str(one["host_syncs"]), *times]


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    asked = options(__doc__, *OPTIONS).parse_args(argv)
    results = []
    for model in asked.models:
        for width in asked.widths:
            trained, packed = max(1, round(asked.trained * width)), model.endswith("-4bit")
            case = Case(model.removesuffix("-4bit"), packed, width, trained, asked.checkpoint)
            results.append([counted(case, side) for side in asked.sides])
            say(f"{model}, {width} positions")
    head = ["model", "row (trained)", "side", "launches", "GB", "TFLOP", "waits", *CHIPS]
    print(table(head, [as_row(one, row[-1]) for row in results for one in row]))
    record(
        {"environment": environment(), "results": [one for row in results for one in row]}, asked.out, ["environment"]
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
