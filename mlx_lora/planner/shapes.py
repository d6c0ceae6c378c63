"""The records that planning is done with: a model's shape, a machine, a run's largest batch. No mlx.

Filled in from a module tree by adapters/model_shape.py, from a device by device.py, from a table by chips.py.

Shapes: T positions of a batch (rows x width), P trained positions, D model width, V vocabulary, A trained numbers.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Layer:
    """One matrix of a block.

    Attributes:
        parent: path of the module it stands in, within the block (`self_attn`).
        name: `q_proj`.
        inputs, outputs: widths.
        experts: how many matrices of this shape there are; 1 for a plain layer.
        active: how many of them a position goes through.
        packed: whether it is quantized.
        rank: of its adapter; 0 without one.
    """

    parent: str
    name: str
    inputs: int
    outputs: int
    experts: int = 1
    active: int = 1
    packed: bool = False
    rank: int = 0

    @property
    def numbers(self) -> int:
        """Weights of all its matrices."""
        return self.inputs * self.outputs * self.experts

    @property
    def is_end(self) -> bool:
        """Whether its output goes straight to the residual stream: nothing keeps it."""
        return self.name in BRANCH_ENDS


# How mlx-lm's architectures name the last layer of a branch.
BRANCH_ENDS = frozenset(
    [
        "o_proj",
        "out_proj",
        "wo",
        "dense",
        "down_proj",
        "w2",
        "c_proj",
        "fc2",
        "fc_out",
        "dense_4h_to_h",
        "linear_out",
        "output_linear",
        "ff_out",
        "proj_out",
    ]
)


class NotKnown(Exception):
    """What a block takes cannot be told; the message says which block and why."""


@dataclass(frozen=True)
class BlockBytes:
    """What one block takes for one batch.

    Attributes:
        kept: from its forward to its backward pass, when nothing is repeated.
        window: of its backward pass at its peak, beside that.
        ends: its input and attention's output: what a checkpointed block keeps.
        nodes: operations of its graph.
    """

    kept: float
    window: float
    ends: float
    nodes: float = 0

    def plus(self, other: BlockBytes) -> BlockBytes:
        """Add, field by field."""
        return BlockBytes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, factor: float) -> BlockBytes:
        """Multiply each field."""
        return BlockBytes(*(factor * a for a in astuple(self)))

    def minus(self, other: BlockBytes) -> BlockBytes:
        """Subtract, field by field; never below zero."""
        return BlockBytes(*(max(0.0, a - b) for a, b in zip(astuple(self), astuple(other), strict=True)))


class BlockMemory(Protocol):
    """Tells what a block takes for a batch."""

    def at(self, rows: int, width: int, on_gpu: bool) -> BlockBytes:
        """Return it, or raise NotKnown."""


@dataclass(frozen=True)
class Block:
    """One block of the model.

    Attributes:
        layers: its matrices.
        norms: widths of its norms, each as often as it occurs.
        heads, key_heads, head_width: of its attention; 0 heads for a block without one that we know.
        gated: `silu` (our lean kernel) or `other` (mlx's own operations).
        window: keys a query sees at the most; None for all before it.
        memory: what it takes, read from its graph; None: counted from its matrices, as those of a llama.
    """

    layers: tuple[Layer, ...]
    norms: tuple[int, ...] = ()
    heads: int = 0
    key_heads: int = 0
    head_width: int = 0
    gated: str = "silu"
    window: int | None = None
    memory: BlockMemory | None = field(default=None, compare=False)

    @property
    def widths(self) -> int:
        """Widths in and out of the matrices a position goes through, summed."""
        return sum((layer.inputs + layer.outputs) * layer.active for layer in self.layers)


@dataclass(frozen=True)
class ModelShape:
    """What of a model and its adapter decides memory and speed.

    Attributes:
        model_type: mlx-lm's.
        width: D.
        vocabulary: V.
        blocks: in order.
        base_bytes: frozen parameters, as they will lie in memory.
        trained: A, numbers that are trained.
        trained_arrays: how many arrays they are.
        frozen_adapter_bytes: what a method keeps beside them (PiSSA's start).
        first_trained: the first block that the backward pass goes through; all before keep nothing.
        head_packed: whether the output head is quantized.
        plain_loss: whether the model's own logits are needed whole, for all positions.
        source_bytes: the weights as they are stored, where they are cast on loading; else 0.
        not_known: kinds of blocks whose memory could not be read, each with the reason.
    """

    model_type: str
    width: int
    vocabulary: int
    blocks: tuple[Block, ...]
    base_bytes: int
    trained: int
    trained_arrays: int = 1
    frozen_adapter_bytes: int = 0
    first_trained: int = 0
    head_packed: bool = False
    plain_loss: bool = False
    source_bytes: int = 0
    not_known: tuple[str, ...] = ()

    @property
    def numbers(self) -> int:
        """Weights of the blocks and one output head."""
        return sum(layer.numbers for block in self.blocks for layer in block.layers) + self.width * self.vocabulary


@dataclass(frozen=True)
class KernelTerms:
    """What of the kernels that a run trains with decides memory; the default: ours (models/kernel_choice.py).

    Attributes:
        attention: (keys, kept, ahead) of each size of rows that mlx's attention takes: arrays of scores, one number for
            each query and key of each head, that a block keeps for the backward pass, and that this allocates beside them.
        tiled: sizes of rows that our attention takes.
        gate_arrays: what a gated activation keeps beside its inputs and its product, in arrays of its width; None: one
            where exponentials are dear, else none.
        loss: `tiles` or `rows`, how logits are made (training/loss_choice.py).
    """

    attention: tuple[tuple[int, float, float], ...] = ()
    tiled: tuple[int, ...] = ()
    gate_arrays: float | None = None
    loss: str = "tiles"

    @classmethod
    def of_mlx(cls, backend: str) -> KernelTerms:
        """Return the terms of mlx's own kernels where nobody measured them.

        On a CPU attention keeps about all scores, as measured on one; a GPU's backward pass is blocked since mlx 0.32.4
        and keeps none (predicted: no Mac has measured it).
        """
        return cls(attention=((1024, 1.1, 2.3) if backend == "cpu" else (1024, 0.0, 0.0),), gate_arrays=2.0)

    def scores(self, width: int) -> tuple[float, float] | None:
        """Return (kept, ahead) where mlx's attention takes rows of this width, None where ours does: the nearest size's."""
        ours = [(abs(keys - width), None) for keys in self.tiled]
        theirs = [(abs(keys - width), (kept, ahead)) for keys, kept, ahead in self.attention]
        return min([*theirs, *ours], key=lambda one: one[0], default=(0, None))[1]


@dataclass(frozen=True)
class Machine:
    """What of a machine decides memory.

    Attributes:
        name: chip or processor.
        backend: `cpu`, `metal` or `cuda`.
        memory_bytes: of the machine.
        working_set_bytes: what a run should stay under.
        number_bytes: of an activation: 4 on a CPU, 2 on a GPU, unless --dtype says otherwise.
        kernels: what the kernels that were chosen there take.
    """

    name: str
    backend: str
    memory_bytes: int
    working_set_bytes: int
    number_bytes: int
    kernels: KernelTerms = KernelTerms()

    @property
    def keeps_exponentials(self) -> bool:
        """Whether exponentials are kept for the backward pass: they are dear on mlx's CPU backend alone."""
        return self.backend == "cpu"

    @property
    def dense_copies(self) -> int:
        """Arrays of a whole weight that dequantizing it takes: a kernel of its own on a GPU, operations on a CPU."""
        return 2 if self.backend == "cpu" else 1

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile of the fused loss's logits.

        Large enough that a tile's products fill the machine, and small, since several are there at a time.
        """
        return min(16 << 20, self.working_set_bytes // 64)

    @property
    def cache_bytes(self) -> int:
        """Bound on MLX's buffer cache: batches of many shapes leave buffers that fit no later one."""
        return self.working_set_bytes // 16

    @property
    def dense_experts_bytes(self) -> int:
        """Bytes that one layer's experts may take in float while they are multiplied by."""
        return self.working_set_bytes // 16


@dataclass(frozen=True)
class Run:
    """What of a run's settings decides memory.

    Attributes:
        rows, width: of the largest batch; T is their product.
        trained_positions: P at the most; None: all.
        checkpointing: `none`, `selective`, `block` or n.
        optimizer: its name.
        form: `lora` or `dora`.
        dropout: whether the adapters' inputs are dropped from.
        accumulates: whether a step has several micro-batches, whose gradients are added up.
    """

    rows: int
    width: int
    trained_positions: int | None = None
    checkpointing: str = "none"
    optimizer: str = "adamw"
    form: str = "lora"
    dropout: bool = False
    accumulates: bool = False

    @property
    def positions(self) -> int:
        """T."""
        return self.rows * self.width

    @property
    def places(self) -> int:
        """P."""
        return self.positions if self.trained_positions is None else min(self.trained_positions, self.positions)
