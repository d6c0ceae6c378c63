"""(model shape, run, machine) -> the bytes that training will hold at its peak, by part. No mlx: arithmetic alone.

A run passes through phases, and its peak is the largest of them:

    load       the weights, and what casts and checks hold for a moment
    check      the plain loss and its gradient on a few tokens, whose logits are whole (training/losses.py)
    loss       all that the blocks have kept, and tiles of logits (training/fused.py)
    backward   all that the blocks have kept, and the gradients of one block on their way
    last       the adapter's gradients, and one block
    update     gradients and the new optimizer state beside the old

Throughout: the base, the adapter's float32 masters, the optimizer's moments. What a block keeps, and what its backward
pass has allocated at a time, is read from the block's own graph (training/block_memory.py) and comes in as
`Block.memory`. The formulas here count blocks whose graph cannot be read, as those of a llama, and the plan then says
that it does not know. docs/planner.md has predicted beside measured.

Shapes: T positions of a batch (rows x width), P trained positions, D model width, V vocabulary, A trained numbers.
Source: arXiv 2205.05198, section 4 (activations of a block).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_lora.planner.shapes import Block, Layer, Machine, ModelShape, Run
from mlx_lora.settings.checks import checkpoint_every
from mlx_lora.settings.optimizers import OPTIMIZERS

SINGLE = 4  # bytes of a float32
# Tokens of the check of losses and kernels before the first step (two tiles of attention).
CHECK_TOKENS = 128
# Of them, those whose gradient mlx-lm's own recurrences make: it keeps several states for each.
RECURRENT_CHECK_TOKENS = 8
# On Metal a product over a 256k inner dimension has aborted the process (mlx#1363, Gemma).
MAX_SLICE = 32768
# Rows of a tile beyond this fill no machine better, and would make its slices of the vocabulary narrow.
MAX_ROWS = 2048
# Queries of one tile of attention: small enough that half of the scores lie above the diagonal and are left out even
# in short rows, large enough that a tile's products fill the machine.
TILE_QUERIES = 64
# Where exponentials are dear (device.py), rows up to so many keys keep their probabilities: then these are no
# more than the block's other activations.
MAX_KEPT_KEYS = 512

# What MLX has allocated at a time, of work it has not run: fitted on a CPU, see the module's docstring.
TILES_AHEAD = 6.1  # tiles of a float head's loss
PACKED_TILES_AHEAD = 3.2  # of a quantized head's: dequantizing a slice is operations too
ROW_ARRAYS = 5.0  # of a chunk's logits where they are made by whole rows,
PACKED_COPIES = 3  # and of a quantized head as floats
BACKWARD_AHEAD = 1.45  # of a block's layers, widths in and out summed, per position
ATTENTION_AHEAD = 30.0  # tile-sized arrays of scores

# Fitted likewise: what mlx's own operations keep, in arrays of their width.
GATE_ARRAYS = 3.1  # of a gated activation that is not the lean one (GELU by tanh), beside inputs and product
NORM_ARRAYS = 2.0  # of a norm behind a branch
HEAD_NORM_ARRAYS = 2.5  # of the norms of queries and keys
DROPPED_ARRAYS = 1.2  # of a dropped input: what is left of it, and its mask
# Trained numbers up to which an elementwise optimizer gets them as one flat array: modules trained in full are large
# arrays already, and another copy of all of them would only take memory.
FLAT_UP_TO = 1 << 25
ARRAYS_AHEAD = 23  # updated at a time where each is updated by itself


@dataclass(frozen=True)
class MemoryPlan:
    """The peak and what it is made of.

    Attributes:
        phase: in which the peak falls.
        parts: part -> bytes at that moment; they sum to the peak.
        phases: phase -> its own peak.
        cache_bytes: what MLX's buffer cache may hold beside the peak.
        budget_bytes: what the run may use.
        not_known: kinds of blocks of which this is a rough count only, each with the reason.
    """

    phase: str
    parts: dict[str, int]
    phases: dict[str, int] = field(default_factory=dict)
    cache_bytes: int = 0
    budget_bytes: int = 0
    not_known: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """What MLX's allocator will have handed out at the most: `peak_memory_bytes` of a run's reports."""
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        """The peak and the buffer cache."""
        return self.peak_bytes + self.cache_bytes

    @property
    def fits(self) -> bool:
        """Whether that is within the budget."""
        return self.needed_bytes <= self.budget_bytes


def plan_memory(shape: ModelShape, run: Run, machine: Machine, budget_bytes: int | None = None) -> MemoryPlan:
    """Plan one run.

    Args:
        shape: the model with its adapter.
        run: its largest batch and settings.
        machine: where it will run.
        budget_bytes: what it may use; default: the machine's working set.
    """
    masters = SINGLE * shape.trained
    optimizer = OPTIMIZERS[run.optimizer]
    copies = optimizer.update_copies
    if not optimizer.elementwise or shape.trained > FLAT_UP_TO:
        copies *= min(1.0, ARRAYS_AHEAD / max(1, shape.trained_arrays))
    budget = machine.working_set_bytes if budget_bytes is None else min(budget_bytes, machine.working_set_bytes)
    held = {
        "base": shape.base_bytes,
        "adapter": masters + shape.frozen_adapter_bytes,
        "optimizer": optimizer.state_copies * masters,
    }
    kept, most = _kept_by_blocks(shape, run, machine)
    activations = {"activations": kept, "gradients": masters * run.accumulates}
    ahead = _backward_window(shape, run, machine)
    one_block = max((_kept(block, run, machine) for block in shape.blocks), default=0)
    check, logits = sum(_kept_by_blocks(shape, Run(1, CHECK_TOKENS), machine)), _check_bytes(shape, machine)
    again = 0 if run.checkpointing == "none" else most
    last_tile = 0 if shape.plain_loss else min(2 * machine.tile_bytes, 2 * SINGLE * run.places * shape.vocabulary)
    phases = {
        "load": {"base": shape.base_bytes, "weights being cast": _load_window(shape)},
        "check": {**held, "optimizer": 0, "activations": check, "gradients": 2 * masters, "logits": logits},
        "loss": {**held, **activations, "logits": _loss_window(shape, run, machine)},
        "backward": {**held, **activations, "block": again, "work ahead": ahead + (0 if again else last_tile)},
        "last": {**held, "gradients": masters, "block": one_block, "work ahead": ahead},
        "update": {**held, "gradients": masters, "new state": int(copies * masters)},
    }
    sums = {name: sum(parts.values()) for name, parts in phases.items()}
    peak = max(sums, key=sums.__getitem__)
    parts = {name: size for name, size in phases[peak].items() if size}
    return MemoryPlan(peak, parts, sums, min(machine.cache_bytes, budget // 16), budget, shape.not_known)


def _kept(block: Block, run: Run, machine: Machine) -> float:
    """Return the bytes that a block keeps for the backward pass when nothing is repeated, attention's probabilities included."""
    if block.memory is not None:
        return block.memory.at(run.rows, run.width, machine.backend != "cpu").kept
    own = block_numbers(block, run, machine) * run.positions + probabilities(block, run, machine) * run.rows
    return own * machine.number_bytes


def _ends(block: Block, run: Run, machine: Machine) -> float:
    """Return the bytes of a block's input and of attention's output."""
    if block.memory is not None:
        return block.memory.at(run.rows, run.width, machine.backend != "cpu").ends
    return (_width(block) + block.heads * block.head_width) * run.positions * machine.number_bytes


def block_numbers(block: Block, run: Run, machine: Machine) -> float:
    """Return the numbers per position that a block keeps for the backward pass when nothing is repeated.

    The residual stream twice; of each layer its input once for all that share it, its output unless that only
    goes on to the residual stream; attention's output twice, in its own order and in the next layer's; of a gated
    activation its exponential; of further norms their inputs.
    """
    kept = 2.0 * _width(block)
    for parent in dict.fromkeys(layer.parent for layer in block.layers):
        layers = [layer for layer in block.layers if layer.parent == parent]
        first = [layer for layer in layers if not layer.is_end]
        kept += max((layer.inputs * layer.active for layer in first), default=0)
        kept += sum(layer.outputs * layer.active for layer in first)
        kept += sum(layer.inputs * layer.active for layer in layers if layer.is_end)
        # Experts' outputs are weighted, and the weights have a gradient; then they are put back in order.
        kept += sum(2 * layer.outputs * layer.active for layer in layers if layer.is_end and layer.active > 1)
        if len(first) > 1 and "attn" not in parent and "attention" not in parent:
            kept += first[0].outputs * first[0].active * _activation_arrays(block, machine)
        # Some adapters also keep the output that they scale; dropout keeps what it left of each input.
        kept += sum(layer.active * (layer.rank + layer.outputs * layer.keeps_product) for layer in layers)
        kept += DROPPED_ARRAYS * sum(layer.active * layer.inputs for layer in layers if layer.rank and run.dropout)
    kept += block.heads * block.head_width
    return kept + _norm_numbers(block)


def _activation_arrays(block: Block, machine: Machine) -> float:
    """Return what a gated activation keeps beside its two inputs and its product, in arrays of its width."""
    if block.gated == "other":
        return GATE_ARRAYS
    chosen = machine.kernels.gate_arrays
    return float(machine.keeps_exponentials) if chosen is None else chosen


def _norm_numbers(block: Block) -> float:
    """Return what norms beyond the two at the branches' starts keep."""
    width = _width(block)
    further = max(0, sum(norm == width for norm in block.norms) - 2) * width
    heads = any(norm == block.head_width != width for norm in block.norms)
    return NORM_ARRAYS * further + HEAD_NORM_ARRAYS * heads * (block.heads + block.key_heads) * block.head_width


def _width(block: Block) -> int:
    """Return D: what the branches start from."""
    return block.layers[0].inputs if block.layers else 0


def probabilities(block: Block, run: Run, machine: Machine) -> float:
    """Return attention's probabilities of one row and layer, where they are kept: tiles of 64 queries by what they see.

    mlx's own attention keeps what it was measured to: on a CPU about all scores.
    """
    own = machine.kernels.scores(run.width)
    if own is not None:
        return own[0] * block.heads * run.width * run.width
    if not machine.keeps_exponentials or run.width > MAX_KEPT_KEYS:
        return 0.0
    tiles = max(1, round(run.width / TILE_QUERIES))
    return block.heads * run.width * run.width * (tiles + 1) / (2 * tiles)


def _kept_by_blocks(shape: ModelShape, run: Run, machine: Machine) -> tuple[int, int]:
    """Return the bytes that all blocks keep, and the most that one repeated block makes again."""
    every = checkpoint_every(run.checkpointing)
    kept, most = 0.0, 0.0
    for index, block in enumerate(shape.blocks):
        if index < shape.first_trained:
            continue
        everything = _kept(block, run, machine)
        if every is None or index % every:
            kept += everything
            continue
        kept += _ends(block, run, machine)
        if run.checkpointing == "selective":  # every layer's output too, but the last product is not needed again
            products = sum(layer.outputs * layer.active for layer in block.layers) - _width(block)
            kept += products * run.positions * machine.number_bytes
        most = max(most, everything)
    return int(kept), int(most)


def _backward_window(shape: ModelShape, run: Run, machine: Machine) -> int:
    """Return what a block's backward pass has allocated at a time, beside what the blocks have kept."""
    return int(max((_window(block, run, machine) for block in shape.blocks), default=0))


def _window(block: Block, run: Run, machine: Machine) -> float:
    if block.memory is not None:
        return block.memory.at(run.rows, run.width, machine.backend != "cpu").window
    size = machine.number_bytes
    layers = BACKWARD_AHEAD * block.widths * run.positions * size
    scores = _scores_ahead(run, machine) * run.rows * block.heads * run.width * size
    packed = sum(layer.numbers for layer in block.layers if layer.packed and _dense_path(layer, machine))
    return max(layers + packed * size, scores)


def _scores_ahead(run: Run, machine: Machine) -> float:
    """Return the scores of each key that attention's backward pass has allocated at a time."""
    own = machine.kernels.scores(run.width)
    if own is None:
        return ATTENTION_AHEAD * min(TILE_QUERIES, run.width)
    kept, ahead = own
    return (ahead if run.checkpointing == "none" else kept + ahead) * run.width


def _dense_path(layer: Layer, machine: Machine) -> bool:
    """Whether a quantized layer is multiplied by as floats: experts only where all of them together are small."""
    return layer.experts == 1 or layer.numbers * machine.number_bytes <= machine.dense_experts_bytes


def _loss_window(shape: ModelShape, run: Run, machine: Machine) -> int:
    """Return the bytes of the loss: tiles of logits and exponentials, slices of the head, sums of the gradient."""
    places, size = run.places, machine.number_bytes
    if shape.plain_loss:
        # Logits, their gradient and what the softmax makes of them.
        return int(run.positions * shape.vocabulary * (3 * SINGLE + (size if size < SINGLE else 0)))
    if not places:
        return 0
    if machine.kernels.loss == "rows":
        rows = chunk_rows(places, shape.vocabulary, machine.tile_bytes)
        dense = PACKED_COPIES * shape.vocabulary * shape.width * size if shape.head_packed else 0
        return int(ROW_ARRAYS * rows * shape.vocabulary * SINGLE + dense + 2 * places * shape.width * size)
    rows, columns = tile_shape(places, shape.vocabulary, machine.tile_bytes)
    tiles = -(-places // rows) * -(-shape.vocabulary // columns)
    logits = rows * columns * (2 * SINGLE + (2 * size if size < SINGLE else 0))
    pulled = 2 * rows * shape.width * SINGLE
    dense = columns * shape.width * size * machine.dense_copies if shape.head_packed else 0
    ahead = min(tiles, PACKED_TILES_AHEAD if shape.head_packed else TILES_AHEAD)
    return int(ahead * (logits + pulled + dense) + 2 * places * shape.width * size)


def _check_bytes(shape: ModelShape, machine: Machine) -> int:
    """Return what the plain loss on the check's tokens and its gradient take: whole logits twice, a quantized head as floats."""
    dense = shape.vocabulary * shape.width * machine.number_bytes * machine.dense_copies if shape.head_packed else 0
    logits = (
        2 * CHECK_TOKENS * shape.vocabulary * (SINGLE + (machine.number_bytes if machine.number_bytes < SINGLE else 0))
    )
    return dense + logits


def _load_window(shape: ModelShape) -> int:
    """Return the stored weights that wait for their cast: about a third of them, MLX reading ahead."""
    return shape.source_bytes // 3


def tile_shape(positions: int, vocabulary: int, tile_bytes: int) -> tuple[int, int]:
    """Return (rows, columns) of a tile of the fused loss: within the byte budget, and all tiles about equal."""
    rows = _even(positions, MAX_ROWS)
    return rows, _even(vocabulary, min(MAX_SLICE, tile_bytes // (4 * rows)))


def chunk_rows(positions: int, vocabulary: int, tile_bytes: int) -> int:
    """Return the rows of a chunk of the loss that makes whole rows of logits (training/row_loss.py)."""
    return _even(positions, min(MAX_ROWS, tile_bytes // (4 * vocabulary)))


def _even(length: int, most: int) -> int:
    """Return the size of the fewest equal parts of `length` that are no larger than `most`."""
    parts = max(1, -(-length // max(1, most)))
    return max(1, -(-length // parts))
