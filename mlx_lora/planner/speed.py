"""Predict the seconds of a training step, part by part, with a roofline model.

Each part has floating-point operations, bytes of its passes over memory, and exponentials, each with the machine's rate.
On a GPU a part takes the longer of computing and moving; on a CPU it takes the sum of all three. Parts run one after
another. Real kernels are slower than listed peaks; the table of chips has the fraction that they reach.

The predictions also decide whether to keep the output of the frozen blocks on disk. With --num-layers, the blocks below the
first adapted one compute the same numbers in every epoch. Kept on disk, they are read instead of computed from the second
epoch on. An epoch then costs only the adapted part, and reading.

The figures of Apple's chips, to plan runs for other Macs, are published theoretical peaks of the full configuration, from
secondary sources for M1 to M4 and press reports of Apple's announcement for M5; `estimate` marks unpublished ones. We measured
none of them, so a plan that uses them is a prediction. Memory is in GiB, as Apple sells it.

Shapes: T positions, D width, F width of the gated activation, P trained positions, V vocabulary, A trained numbers.
Source: roofline, Williams et al. 2009 (CACM 52:4); published specifications; M5 at 122 of 153 GB/s, press.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite

from mlx_lora.config.settings import checkpoint_every
from mlx_lora.planner.memory import (
    SINGLE,
    Block,
    Machine,
    ModelShape,
    Numbers,
    RunShape,
    planned_queries,
    probabilities,
    tile_queries,
)
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import GIB, counted, gigabytes

# The fraction of the listed peaks that real products and real passes over memory reach (module docstring). That of products is by
# generation the median of LoRA runs that others published (docs/development/performance.md); the M5's is the M4's, in its matrix units.
REACHED_FLOPS = {"M1": 0.44, "M2": 0.54, "M3": 0.36, "M4": 0.68, "M5": 0.68}
REACHED_BANDWIDTH = 122 / 153


@dataclass(frozen=True)
class Chip:
    """One row of the table.

    Attributes:
        name: `M2 Pro`.
        gpu_cores: of the full configuration.
        gb_per_s: listed memory bandwidth.
        tflops: listed float32 peak.
        memory_gib: sizes sold.
        half_rate: rate of a 16-bit product as a multiple of the float32 rate; above 1 only with matrix units.
        status: of the TFLOPS, `listed` or `estimate`.
    """

    name: str
    gpu_cores: int
    gb_per_s: float
    tflops: float
    memory_gib: tuple[int, ...]
    half_rate: float = 1.0
    status: str = "listed"

    def machine(self, memory_gib: int | None = None, number_bytes: int = 2) -> Machine:
        """Return a machine with this chip and memory (by default the smallest size sold)."""
        gib = memory_gib or self.memory_gib[0]
        # About what macOS lets the GPU wire by default: it allows 65% to 75%, depending on the size, and Metal's
        # `recommendedMaxWorkingSetSize` is exact.
        working_set = int(gib * GIB * (2 / 3 if gib <= 36 else 3 / 4))
        return Machine(f"{self.name}, {gib} GB", "metal", gib * GIB, working_set, number_bytes)


CHIPS = (
    Chip("M1", 8, 68, 2.6, (8, 16)),
    Chip("M1 Pro", 16, 200, 5.2, (16, 32)),
    Chip("M1 Max", 32, 400, 10.4, (32, 64)),
    Chip("M1 Ultra", 64, 800, 20.8, (64, 128)),
    Chip("M2", 10, 100, 3.6, (8, 16, 24)),
    Chip("M2 Pro", 19, 200, 6.8, (16, 32)),
    Chip("M2 Max", 38, 400, 13.6, (32, 64, 96)),
    Chip("M2 Ultra", 76, 800, 27.2, (64, 128, 192)),
    Chip("M3", 10, 100, 3.6, (8, 16, 24)),
    Chip("M3 Pro", 18, 150, 6.4, (18, 36)),
    Chip("M3 Max", 40, 400, 14.2, (36, 48, 64, 96, 128)),
    Chip("M3 Ultra", 80, 819, 28.0, (96, 256, 512), status="estimate"),
    Chip("M4", 10, 120, 4.3, (16, 24, 32)),
    Chip("M4 Pro", 20, 273, 8.7, (24, 48, 64)),
    Chip("M4 Max", 40, 546, 17.4, (36, 48, 64, 128)),
    # Others measured 3.8 TFLOPS in float32; the 16-bit rate is that of the related A19's matrix units.
    Chip("M5", 10, 153, 3.8, (16, 24, 32), 4.0, "estimate"),
    Chip("M5 Pro", 20, 307, 7.6, (24, 48, 64), 4.0, "estimate"),
    Chip("M5 Max", 40, 614, 18.0, (36, 48, 64, 128), 4.0, "estimate"),
)


def find_chip(name: str) -> Chip:
    """Return a chip by name, regardless of spaces and case, with or without `Apple`.

    Raises:
        InputError: there is no such chip; the message has similar names.
    """
    if chip := known_chip(name):
        return chip
    names = [chip.name for chip in CHIPS]
    near = difflib.get_close_matches(name.removeprefix("Apple ").title(), names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"--chip {name!r}: not a known chip; {hint}the known ones are {', '.join(names)}")


def known_chip(name: str) -> Chip | None:
    """Return the chip with a device's name (`Apple M2 Pro`), None for other machines."""
    return next((chip for chip in CHIPS if _plain(chip.name) == _plain(name)), None)


def _plain(name: str) -> str:
    return name.lower().replace("apple", "").replace(" ", "").replace("-", "")


# Chips
LAUNCH_S = 5e-6  # the host's time to launch one operation on a GPU
LAUNCHES_PER_BLOCK = 170  # in rows of 256, by benchmarks/gpu_counts.py: 166 to 198 with SmolLM2, Llama and Gemma
# What --qat adds for each of a layer's weights, in passes over the dense weight in single precision (adapters/qat.py): computing
# the fused weight, and the gradient by an affine one. A CPU's are what it took (its cache helps), a GPU's are counted: its
# compiled step does a chain of operations in one pass.
FUSED_PASSES, FIT_PASSES = {"cpu": 20, "gpu": 14}, {"cpu": 6, "gpu": 9}
CPU_FP4_PASSES = 340  # MLX's CPU code rounds to 4-bit floats one number after the other
# Assumed, not measured: what was just written comes from the system's page cache as long as it fits there.
DISK_BYTES_PER_S = 0.5e9
# `auto` leaves the rest of the free disk to others, and does not fill a disk for a small gain.
MOST_OF_FREE = 0.25
LEAST_SAVED = 0.03  # of the run's predicted time
ROOM_LEFT_BYTES = 10**9  # what `on` leaves free


@dataclass(frozen=True)
class Ceilings:
    """A machine's peak rates.

    Attributes:
        flops_per_s: of a large product in the compute dtype.
        bytes_per_s: of an elementwise pass.
        exponentials_per_s: infinite on a GPU, where they take no longer than reading their argument.
        launch_s: of each operation.
        source: `measured here` or `listed`.
    """

    flops_per_s: float
    bytes_per_s: float
    exponentials_per_s: float = float("inf")
    launch_s: float = 0.0
    source: str = "listed"


def listed_ceilings(chip: Chip, number_bytes: int = 2) -> Ceilings:
    """Return a chip's listed peaks times the fraction that real work reaches."""
    rate = (chip.half_rate if number_bytes == 2 else 1.0) * REACHED_FLOPS[chip.name.split()[0]]
    return Ceilings(chip.tflops * 1e12 * rate, chip.gb_per_s * 1e9 * REACHED_BANDWIDTH, launch_s=LAUNCH_S)


@dataclass(frozen=True)
class Count(Numbers):
    """The work of one part of a step.

    Attributes:
        flops, moved_bytes, exponentials: of all blocks, forward and backward.
    """

    flops: float = 0.0
    moved_bytes: float = 0.0
    exponentials: float = 0.0

    def seconds(self, ceilings: Ceilings) -> float:
        """Return how long it takes."""
        computing, moving = self.flops / ceilings.flops_per_s, self.moved_bytes / ceilings.bytes_per_s
        if isfinite(ceilings.exponentials_per_s):
            # A CPU does these one after another: products on all cores, passes and exponentials on one.
            return computing + moving + self.exponentials / ceilings.exponentials_per_s
        return max(computing, moving)


def step_seconds(
    shape: ModelShape, run: RunShape, machine: Machine, ceilings: Ceilings
) -> tuple[float, dict[str, float]]:
    """Return the predicted seconds of a step and of each part."""
    parts = {name: count.seconds(ceilings) for name, count in count_step(shape, run, machine).items()}
    total = sum(parts.values())
    # The host launches operations while the device computes: only the time by which launching takes longer counts.
    launching = ceilings.launch_s * LAUNCHES_PER_BLOCK * len(shape.blocks)
    if launching > total:
        parts["waiting for launches"] = launching - total
    return max(total, launching), parts


def forward_seconds(shape: ModelShape, run: RunShape, machine: Machine, ceilings: Ceilings) -> float:
    """Return the predicted seconds of the forward pass alone, which is how a reference computes its answers."""
    frozen = replace(shape, first_trained=len(shape.blocks), trained=0)
    counts = count_step(frozen, replace(run, checkpointing="none"), machine)
    # Half of the loss's products and passes are for its gradient.
    loss = counts.pop("loss")
    half = Count(loss.flops / 2, loss.moved_bytes / 2, loss.exponentials)
    return sum(count.seconds(ceilings) for count in (half, *counts.values()))


def count_step(shape: ModelShape, run: RunShape, machine: Machine) -> dict[str, Count]:
    """Return the work of a step, part by part; with --qat for a share of the steps, that of the mean step.

    Each position is multiplied by a frozen weight twice (output, input gradient), and by a factor three times; the
    forward pass of a checkpointed block runs again. Blocks before the first adapted layer have no backward pass.
    """
    size, tokens = machine.number_bytes, run.positions
    every = checkpoint_every(run.checkpointing)
    base = adapter = attention = scores_exp = scores_bytes = dense = gate_exp = 0.0
    moved = adapter_bytes = 0.0
    rounding = Count()
    for index, block in enumerate(shape.blocks):
        trained = index >= shape.first_trained
        again = trained and every is not None and index % every == 0
        products = 1 + trained + (again and run.checkpointing != "selective")
        weights = sum(layer.inputs * layer.outputs * layer.active for layer in block.layers)
        factors = sum((layer.inputs + layer.outputs) * layer.rank * layer.active for layer in block.layers)
        base += 2 * weights * tokens * products
        dense += products * sum(layer.numbers for layer in block.layers if layer.packed)
        rounding = rounding.plus(_fake_quantization(block, tokens, products, trained, machine))
        adapter += 2 * factors * tokens * (1 + 2 * trained + again)
        adapter_bytes += (2 + 2 * trained) * sum(
            (layer.inputs + layer.outputs) * layer.active for layer in block.layers if layer.rank
        )
        scores = _scores(block, run, machine)
        kept = bool(probabilities(block, run, machine)) and not again
        attention += 2 * block.head_width * scores * (2 + trained * (4 + (not kept)))
        scores_exp += scores * (1 + trained * (not kept))
        scores_bytes += scores * size * (8 + 12 * trained)
        gate = max((layer.inputs * layer.active for layer in block.layers if layer.is_end), default=0)  # F
        passes = 6 + 9 * trained + 6 * again
        gate_exp += gate * tokens * (1 + again)
        moved += passes * (gate + 4 * (block.layers[0].inputs if block.layers else 0) + block.heads * block.head_width)
    logits = run.slots * shape.vocabulary
    return {
        "products": Count(base, size * dense * 3),
        "adapters": Count(adapter, size * tokens * adapter_bytes),
        **({"fake quantization": rounding.times(shape.rounded_share)} if rounding.moved_bytes else {}),
        "attention": Count(attention, scores_bytes, scores_exp),
        "elementwise": Count(0.0, size * tokens * moved, gate_exp),
        "loss": Count(4 * logits * shape.width, SINGLE * 9 * logits, logits),
        "optimizer": Count(0.0, SINGLE * 14 * shape.trained),
    }


def _fake_quantization(block: Block, tokens: int, products: int, trained: bool, machine: Machine) -> Count:
    """Return the work of computing a block's layers with their fused weights, beyond that of their products.

    Args:
        block: its layers.
        tokens: of the batch.
        products: how often each fused weight is computed.
        trained: whether a gradient reaches the block.
        machine: to run on.
    """
    flops = passes = 0.0
    kind = "cpu" if machine.backend == "cpu" else "gpu"
    for layer in block.layers:
        if layer.rounds_to is None:
            continue
        fitted = trained and layer.rounds_to == "affine"
        once = CPU_FP4_PASSES if kind == "cpu" and layer.rounds_to in ("mxfp4", "nvfp4") else FUSED_PASSES[kind]
        passes += layer.numbers * (products * once + fitted * FIT_PASSES[kind])
        flops += 2 * layer.numbers * layer.rank * products
        # The gradient by the weight, and by the factors from it.
        flops += 2 * fitted * (layer.inputs * layer.outputs * layer.active * tokens + 2 * layer.numbers * layer.rank)
    return Count(flops, SINGLE * passes)


def _scores(block: Block, run: RunShape, machine: Machine) -> float:
    """Return the number of attention scores that are computed: about half of queries x keys, or the window of each query."""
    if block.window and run.width > block.window:
        keys = block.window + tile_queries(block.window)  # of a tile; those of the first window have half on average
        return run.rows * block.heads * keys * (run.width - block.window / 2)
    return run.rows * block.heads * run.width * (run.width + planned_queries(block, run, machine)) / 2


# The frozen blocks' output on disk


def no_use(blocks: int, epochs: float, asked: str) -> str | None:
    """Return in a few words why there is nothing to keep, or nothing that is read again; None if there is.

    Args:
        blocks: frozen ones, below the first adapted one.
        epochs: of the run.
        asked: --cache-trunk.
    """
    if not blocks:
        return "no block below the first trained parameters; give --num-layers N to adapt only the last N blocks"
    if asked == "auto" and epochs <= 1:
        return "one epoch, in which nothing is read again"
    return None


@dataclass(frozen=True)
class TrunkPlan:
    """The costs of keeping the frozen blocks' output, all predicted.

    Attributes:
        blocks: the number of frozen blocks below the first adapted one.
        of_blocks: the number of all blocks.
        disk_bytes: for all rows.
        free_bytes: on the disk of the cache, without what is already kept there for this run.
        epochs: of the run.
        epoch_s: an epoch that computes everything, as the first does.
        later_s: an epoch that reads the frozen blocks' output.
        write_s: what writing adds to the first epoch.
    """

    blocks: int
    of_blocks: int
    disk_bytes: int
    free_bytes: int
    epochs: float
    epoch_s: float
    later_s: float
    write_s: float

    @property
    def saved_s(self) -> float:
        """The seconds by which the run is shorter; below 0 if it is longer."""
        return max(0.0, self.epochs - 1) * (self.epoch_s - self.later_s) - self.write_s

    def problem(self, asked: str) -> str | None:
        """Return in a few words why nothing should be kept, None if it should.

        Args:
            asked: --cache-trunk.
        """
        if (unused := no_use(self.blocks, self.epochs, asked)) is not None:
            return unused
        need = f"{gigabytes(self.disk_bytes)} are needed"
        if self.disk_bytes > self.free_bytes - ROOM_LEFT_BYTES:
            return f"{need} on the cache's disk, which has {gigabytes(self.free_bytes)} free"
        if asked == "on":
            return None
        if self.disk_bytes > MOST_OF_FREE * self.free_bytes:
            return f"{need}, more than {MOST_OF_FREE:.0%} of the {gigabytes(self.free_bytes)} free on the cache's disk"
        run_s = self.epochs * self.epoch_s  # if everything is computed in every epoch
        if self.saved_s < LEAST_SAVED * run_s:
            return f"it would save {max(0.0, self.saved_s / run_s):.0%} of the run's time"
        return None

    def words(self) -> str:
        """Return what is kept and what that saves, for a header or a plan."""
        return (
            f"output of the {counted(self.blocks, 'frozen block')} kept on disk ({gigabytes(self.disk_bytes)}), epochs after the first "
            f"predicted {self.epoch_s / self.later_s:.1f}x as fast"
        )


def plan_trunk(
    shape: ModelShape,
    run: RunShape,
    machine: Machine,
    ceilings: Ceilings,
    positions: int,
    epochs: float,
    free_bytes: int,
) -> TrunkPlan:
    """Return the costs of keeping the frozen blocks' output.

    Args:
        shape: the model with its adapter.
        run: its largest batch and settings.
        machine, ceilings: to predict seconds.
        positions: of an epoch, without padding.
        epochs: of the run.
        free_bytes: on the cache's disk.
    """
    blocks = shape.first_trained
    size = positions * shape.width * machine.number_bytes
    share = positions / max(1, run.positions)
    above = replace(shape, blocks=shape.blocks[blocks:], first_trained=0)
    epoch_s, above_s = (share * step_seconds(one, run, machine, ceilings)[0] for one in (shape, above))
    moved_s = size / DISK_BYTES_PER_S
    return TrunkPlan(blocks, len(shape.blocks), size, free_bytes, epochs, epoch_s, above_s + moved_s, moved_s)


# A base that is read from its files (--offload-base).
#
#     plan    the host plans a block in Python, and waits for it: no operation of the next block is planned meanwhile
#     wait    a block is read while the block before it is planned and computed, so a pass waits only for what reading takes longer
#     copy    what was read is copied into the device's arrays, while nothing is computed or read
#
# The blocks are read in the forward pass and, where something is trained, in the backward pass. The last block stays between
# the two passes, and the first one between two batches.

# Of a Mac's SSD, reading large blocks; not measured. Published figures are from 1.5 (M2 with 256 GB) to 7 GB/s.
ASSUMED_BYTES_PER_S = 3e9
# Of a Mac's memory, copied by one thread; not measured.
ASSUMED_COPIED_PER_S = 20e9
# The Python of a block in one pass: measured on a 2-core x86 processor (docs/development/measured.md), assumed for any other.
BLOCK_PLANNED_S = 6e-3


@dataclass(frozen=True)
class Reading:
    """The reading of one micro-batch.

    Attributes:
        blocks: bytes of each; a mixture's with all of its experts, which are read in whole.
        first_trained: the first block that has a backward pass.
        bytes_per_s: of the disk.
        copied_per_s: bytes per second, from the buffer that is read into to arrays.
        source: of these two: `measured here` or `assumed`.
        block_planned_s: seconds of Python for a block in one pass.
        head: bytes of the head, which is read between the two passes, a slice at a time.
    """

    blocks: Sequence[int]
    first_trained: int
    bytes_per_s: float
    copied_per_s: float
    source: str
    block_planned_s: float = BLOCK_PLANNED_S
    head: int = 0

    @property
    def forward_bytes(self) -> int:
        """Read in the forward pass, with the head."""
        return sum(self.blocks[1:]) + self.head

    @property
    def backward_bytes(self) -> int:
        """Read in the backward pass."""
        return sum(self.blocks[self.first_trained : -1])

    @property
    def copying_s(self) -> float:
        """Seconds of a micro-batch in which weights are copied."""
        return (self.forward_bytes + self.backward_bytes) / self.copied_per_s

    @property
    def planning_s(self) -> float:
        """Seconds of a micro-batch in which blocks are planned."""
        return sum(self._planning())

    def waiting_s(self, forward_s: float, step_s: float) -> float:
        """Return the seconds of a micro-batch in which only the disk works.

        Args:
            forward_s, step_s: of computing the forward pass alone, and everything.
        """
        return sum(
            max(0.0, reading_s - planning_s - computing_s)
            for reading_s, planning_s, computing_s in self._passes(forward_s, step_s)
        )

    def hidden_from(self, positions: int, forward_s: float, step_s: float) -> int:
        """Return from how many positions a micro-batch never waits, if computing grows with them; arguments as above."""
        longest = max(
            (reading_s - planning_s) / computing_s
            for reading_s, planning_s, computing_s in self._passes(forward_s, step_s)
            if computing_s > 0
        )
        return max(1, ceil(positions * longest))

    def _planning(self) -> tuple[float, float]:
        blocks = len(self.blocks)
        return blocks * self.block_planned_s, (blocks - self.first_trained) * self.block_planned_s

    def _passes(self, forward_s: float, step_s: float) -> list[tuple[float, float, float]]:
        """Return the seconds of reading, planning and computing of both passes."""
        read = self.forward_bytes / self.bytes_per_s, self.backward_bytes / self.bytes_per_s
        return list(zip(read, self._planning(), (forward_s, step_s - forward_s), strict=True))
