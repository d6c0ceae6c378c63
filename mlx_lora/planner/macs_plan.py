"""Plan a run whose base several Macs share: each Mac's memory, what goes over the link, and which of the two decides.

A step sends every unit (a block, the embedding, the head) once for the forward pass, and each trained block once more for the
backward pass. All Macs compute their own rows meanwhile, so a step takes the longer of computing and sending, and the
first message, which nothing hides. At the end the adapter's gradients are added up.

Nothing here was measured on a Mac: computing is predicted from listed rates, and the link's rate is an assumption.

Shapes: N Macs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_lora.planner.memory import SINGLE, MemoryPlan, plan_memory
from mlx_lora.planner.shapes import Machine, ModelShape, Run
from mlx_lora.planner.speed import Ceilings, step_seconds

MOST_TOKENS = 1 << 20  # of a batch that is looked for


@dataclass(frozen=True)
class Units:
    """The bytes that are sent as one message each.

    Attributes:
        blocks: of each block's frozen weights.
        tables: of the embedding, and of the head where it is not the same.
        tied: whether the embedding is the head too, and so is sent twice.
    """

    blocks: tuple[int, ...]
    tables: tuple[int, ...] = ()
    tied: bool = False

    @property
    def bytes(self) -> int:
        """Of all units."""
        return sum(self.blocks) + sum(self.tables)

    @property
    def largest(self) -> int:
        """Of the two largest units, which are in memory while one is computed and the next one comes in."""
        return sum(sorted((*self.blocks, *self.tables))[-2:])

    def of_step(self, first_trained: int) -> list[int]:
        """Return the bytes of each message of a micro-batch."""
        return [*self.tables, *(self.tables if self.tied else ()), *self.blocks, *self.blocks[first_trained:]]


@dataclass(frozen=True)
class Link:
    """A network between Macs.

    Attributes:
        bytes_per_s: that one Mac sends while it receives as many.
        latency_s: of a message.
    """

    bytes_per_s: float
    latency_s: float = 5e-5

    def gather_s(self, messages: Sequence[int], shares: Sequence[float]) -> float:
        """Return the seconds in which all Macs get all parts of some units.

        Around the ring, in N - 1 turns, each Mac passes on a part as large as the largest.
        """
        turns = len(shares) - 1
        return sum(turns * (size * max(shares) / self.bytes_per_s + self.latency_s) for size in messages)

    def sum_s(self, size: int, macs: int) -> float:
        """Return the seconds in which all Macs add up an array."""
        return 2 * (macs - 1) * (size / macs / self.bytes_per_s + self.latency_s)


@dataclass(frozen=True)
class Sending:
    """What goes over the link in a step.

    Attributes:
        link_s: seconds in which the base is sent.
        first_s: of the first message, which nothing hides.
        sum_s: of adding up the gradients.
        sent_bytes: that each Mac sends.
    """

    link_s: float
    first_s: float
    sum_s: float
    sent_bytes: int

    def step_s(self, computing_s: Sequence[float]) -> float:
        """Return the seconds of a step, from each Mac's seconds of computing: messages are sent meanwhile."""
        return max(*computing_s, self.link_s) + self.first_s + self.sum_s


def sending(units: Units, first_trained: int, gradient_bytes: int, shares: Sequence[float], link: Link) -> Sending:
    """Return what goes over the link in a step of one micro-batch.

    Args:
        units: of the model.
        first_trained: the first block with an adapter.
        gradient_bytes: of all adapters, in float32.
        shares: each Mac's part of the base, which add up to 1.
        link: between the Macs.
    """
    messages, count = units.of_step(first_trained), len(shares)
    sent = int((count - 1) * max(shares) * sum(messages)) + 2 * (count - 1) * gradient_bytes // count
    first = max([*units.tables, *units.blocks[:1]], default=0)
    return Sending(
        link.gather_s(messages, shares), link.gather_s([first], shares), link.sum_s(gradient_bytes, count), sent
    )


@dataclass(frozen=True)
class Mac:
    """One of the Macs.

    Attributes:
        machine: its memory.
        ceilings: its rates.
    """

    machine: Machine
    ceilings: Ceilings


@dataclass(frozen=True)
class MacsPlan:
    """A run on several Macs.

    Attributes:
        shares: each Mac's part of every unit, from 0 to 1.
        memory: each Mac's plan.
        computing_s: each Mac's seconds of a step, predicted.
        sending: what goes over the link in a step.
    """

    shares: tuple[float, ...]
    memory: tuple[MemoryPlan, ...]
    computing_s: tuple[float, ...]
    sending: Sending

    @property
    def fits(self) -> bool:
        """Whether each Mac's part fits."""
        return all(plan.fits for plan in self.memory)

    @property
    def step_s(self) -> float:
        """The seconds of a step."""
        return self.sending.step_s(self.computing_s)

    @property
    def link_decides(self) -> bool:
        """Whether sending takes longer than computing."""
        return self.sending.link_s > max(self.computing_s)


def rank_part(shape: ModelShape, units: Units, share: float) -> ModelShape:
    """Return the shape of one Mac's part of a model: its share of each unit, and the two largest units in whole.

    Args:
        shape: of the whole model.
        units: of it.
        share: from 0 to 1.
    """
    kept = shape.base_bytes - units.bytes + int(share * units.bytes)
    # Read a unit at a time.
    return replace(shape, base_bytes=kept + units.largest, source_bytes=units.largest if shape.source_bytes else 0)


def memory_shares(macs: Sequence[Machine]) -> list[float]:
    """Return parts in proportion to what each Mac may use."""
    whole = sum(mac.working_set_bytes for mac in macs)
    return [mac.working_set_bytes / whole for mac in macs]


def plan_macs(
    shape: ModelShape, units: Units, run: Run, macs: Sequence[Mac], shares: Sequence[float], link: Link
) -> MacsPlan:
    """Return the plan of a run.

    Args:
        shape: the whole model with its adapter.
        units: of it.
        run: the largest batch of all Macs together; its rows are dealt evenly.
        macs, link: what it runs on.
        shares: each Mac's part of the base, which add up to 1.
    """
    count = len(macs)
    slots = None if run.trained_positions is None else -(-run.trained_positions // count)
    own = replace(run, rows=-(-run.rows // count), trained_positions=slots)
    memory = [
        plan_memory(rank_part(shape, units, share), own, mac.machine) for mac, share in zip(macs, shares, strict=True)
    ]
    computing = [step_seconds(shape, own, mac.machine, mac.ceilings)[0] for mac in macs]
    sent = sending(units, shape.first_trained, SINGLE * shape.trained, shares, link)
    return MacsPlan(tuple(shares), tuple(memory), tuple(computing), sent)


def least_tokens(
    shape: ModelShape, units: Units, run: Run, macs: Sequence[Mac], shares: Sequence[float], link: Link
) -> int | None:
    """Return about how many tokens a batch must have for the link to be hidden behind computing; None: over a million.

    Args:
        As for `plan_macs`; the rows of `run` are replaced.
    """

    def hidden(rows: int) -> bool:
        trained = run.slots * rows // run.rows
        larger = replace(run, rows=rows, trained_positions=trained)
        return not plan_macs(shape, units, larger, macs, shares, link).link_decides

    low, high = 0, len(macs)
    while not hidden(high):
        low, high = high, 2 * high
        if high * run.width > MOST_TOKENS:
            return None
    while high - low > len(macs):
        middle = (low + high) // 2
        low, high = (low, middle) if hidden(middle) else (middle, high)
    return high * run.width
