"""Plan a run of several processes, such as on several Macs: what each holds, what they send, and how best to divide the run.

    data, whole base     a rank computes its rows; the gradients are added up once a step
    data, shared base    the same, and each block's weights go around once or twice in each batch, while blocks compute

A whole base sends least, if it fits.

With a shared base, a step sends every unit (a block, a slice of the embedding or of the head) once for the forward pass, and
each trained block once more for the backward pass. On a CPU, sending and computing take turns. On a GPU, a unit is taken to
be on its way while the one before it is computed (predicted), so a step is a pipeline of two stages: the first units wait
for the link, and later ones wait for the link or for the chips, whichever takes longer. At the end the adapter's gradients
are added up.

Nothing here was measured on a Mac: computing is predicted from listed rates, and the link's rate is an assumption.

Shapes: N ranks, T tokens of a batch, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_lora.planner.memory import SINGLE, Machine, MemoryPlan, ModelShape, RunShape, plan_memory
from mlx_lora.planner.speed import Ceilings, step_seconds
from mlx_lora.utils.text import gigabytes

MOST_TOKENS = 1 << 20  # of a batch that is looked for
EQUAL = 1e-6  # parts that differ less are equal
LEAST_ROW = 128  # tokens of a row of that batch, if rows are not shorter
HIDDEN = 1.1  # a link is hidden if a step takes at most this many times as long as computing


# The link


@dataclass(frozen=True)
class Units:
    """The bytes that are gathered and dropped together.

    Attributes:
        blocks: of each block's frozen weights.
        tables: of each slice of the embedding, and of the head where it is not the same.
        tied: whether the embedding is the head too, and so is sent twice.
        head_rows: tokens of a slice of the head; 0: it is not shared.
    """

    blocks: tuple[int, ...]
    tables: tuple[int, ...] = ()
    tied: bool = False
    head_rows: int = 0

    @property
    def bytes(self) -> int:
        """Of all units."""
        return sum(self.blocks) + sum(self.tables)

    @property
    def largest(self) -> int:
        """Of the two largest units, which are in memory while one is computed and the next one comes in."""
        return sum(sorted((*self.blocks, *self.tables))[-2:])

    @property
    def head_bytes(self) -> int:
        """Of the head's slices."""
        return sum(self.tables if self.tied else self.tables[len(self.tables) // 2 :])

    def in_order(self, first_trained: int) -> list[tuple[int, int]]:
        """Return each message of a micro-batch: its bytes, and how many products of each of its weights wait for it.

        A product of the forward pass, or two: the fused loss computes its gradient at once, and a checkpointed block is
        computed again. An embedding has none.
        """
        # Embedding and head have as many slices each, unless they are the same.
        middle = 0 if self.tied else len(self.tables) // 2
        embedding, head = (self.tables, self.tables) if self.tied else (self.tables[:middle], self.tables[middle:])
        return [
            *((size, 0) for size in embedding),
            *((size, 1) for size in self.blocks),
            *((size, 2) for size in head),
            *((size, 2) for size in reversed(self.blocks[first_trained:])),
        ]


def sent_of_unit(size: int, shares: Sequence[float]) -> float:
    """Return the bytes that each Mac sends until all have a unit.

    Args:
        size: bytes of the unit.
        shares: each Mac's part of it, which add up to 1.
    """
    count = len(shares)
    even = min(shares) * count
    return size * (count - 1) / count * (even + 2 * (1 - even))


@dataclass(frozen=True)
class Link:
    """A network between Macs.

    Attributes:
        bytes_per_s: that one Mac sends while it receives as many.
        latency_s: of a message.
    """

    bytes_per_s: float
    latency_s: float = 5e-5

    def gather_s(self, size: int, shares: Sequence[float]) -> float:
        """Return the seconds in which all Macs get all parts of a unit.

        What all keep equal parts of goes around the ring in N - 1 turns. The rest is added to the others' zeros, in twice as
        many turns.
        """
        return sent_of_unit(size, shares) / self.bytes_per_s + self.latency_s * (
            len(shares) - 1 if max(shares) - min(shares) < EQUAL else 3 * (len(shares) - 1)
        )

    def sum_s(self, size: int, macs: int) -> float:
        """Return the seconds in which all Macs add up an array."""
        return 2 * (macs - 1) * (size / macs / self.bytes_per_s + self.latency_s)


@dataclass(frozen=True)
class Sending:
    """What goes over the link in a step.

    Attributes:
        units: seconds and weight (bytes times products) of each message of the base, in order.
        sum_s: of adding up the gradients.
        sent_bytes: that each Mac sends.
        beside: whether messages go out while units are computed. On a CPU they did not: a step was as long as computing and
            sending in turn (docs/development/distributed.md, mlx 0.32.4), because the threads of mlx's ring keep all cores
            busy while they send. A GPU leaves those cores free, which nobody has measured.
    """

    units: tuple[tuple[float, int], ...] = ()
    sum_s: float = 0.0
    sent_bytes: int = 0
    beside: bool = True

    @property
    def link_s(self) -> float:
        """Seconds in which the base is sent."""
        return sum(seconds for seconds, _ in self.units)

    def step_s(self, computing_s: float) -> float:
        """Return the seconds of a step.

        A message is sent as soon as the one before has arrived and the unit before can be computed; a unit is computed as
        soon as it has arrived and the one before is computed.

        Args:
            computing_s: of the slowest Mac, for which the others wait.
        """
        if not self.beside:
            return computing_s + self.link_s + self.sum_s
        whole = sum(weight for _, weight in self.units) or 1
        arrived = computed = could_begin = 0.0
        for seconds, weight in self.units:
            arrived = max(arrived, could_begin) + seconds
            could_begin = computed
            computed = max(arrived, computed) + computing_s * weight / whole
        return computed + self.sum_s


def sending(shape: ModelShape, units: Units, shares: Sequence[float], link: Link, beside: bool = True) -> Sending:
    """Return what goes over the link in a step of one micro-batch.

    Args:
        shape, units: of the model; the gradients of its adapter are float32.
        shares: each Mac's part of the base, which add up to 1.
        link: between the Macs.
        beside: see `Sending`.
    """
    messages, count, gradient_bytes = units.in_order(shape.first_trained), len(shares), SINGLE * shape.trained
    base = sum(sent_of_unit(size, shares) for size, _ in messages)
    return Sending(
        tuple((link.gather_s(size, shares), size * products) for size, products in messages),
        link.sum_s(gradient_bytes, count),
        round(base) + 2 * (count - 1) * gradient_bytes // count,
        beside,
    )


# Ways to divide a run


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
class Split:
    """One way to divide a run among Macs, and what is predicted of it.

    Attributes:
        shared: whether the base is in parts.
        tokens: of a batch of all Macs.
        memory: each Mac's plan.
        computing_s: each Mac's seconds of a step, predicted.
        sending: what goes over the link in a step.
        problem: why it cannot be used; empty if it can.
    """

    shared: bool = False
    tokens: int = 0
    memory: tuple[MemoryPlan, ...] = ()
    computing_s: tuple[float, ...] = (0.0,)
    sending: Sending = Sending()
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether it fits each Mac."""
        return all(plan.fits for plan in self.memory)

    @property
    def tokens_per_s(self) -> float:
        """Of all Macs together."""
        computing_s = max(self.computing_s)
        waiting_s = self.sending.step_s(computing_s) - computing_s if self.shared else self.sending.sum_s
        return self.tokens / (computing_s + waiting_s) if self.tokens else 0.0

    @property
    def most_needed_bytes(self) -> int:
        """By the Mac that needs most."""
        return max((plan.needed_bytes for plan in self.memory), default=0)

    @property
    def words(self) -> str:
        """Its name for messages."""
        return f"data with {'a shared' if self.shared else 'a whole'} base"

    @property
    def verdict(self) -> str:
        """Its speed, or why it cannot be used."""
        if self.problem:
            return f"not possible ({self.problem})"
        if not self.fits:
            least = min(plan.budget_bytes for plan in self.memory)
            return f"does not fit (needs {gigabytes(self.most_needed_bytes)} of {gigabytes(least)})"
        return f"{self.tokens_per_s:,.0f} tokens/s"


def best(splits: Sequence[Split]) -> Split:
    """Return the fastest split that fits; if none does, the one that needs least."""
    possible = [split for split in splits if not split.problem]
    fitting = [split for split in possible if split.fits]
    if fitting:
        return max(fitting, key=lambda split: split.tokens_per_s)
    return min(possible, key=lambda split: split.most_needed_bytes)


def plan_macs(
    shape: ModelShape,
    run: RunShape,
    macs: Sequence[Mac],
    link: Link,
    units: Units | None = None,
    shares: Sequence[float] = (),
) -> Split:
    """Return what is predicted of rows that are dealt.

    Args:
        shape: the whole model with its adapter.
        run: the largest batch of all Macs together; its rows are dealt evenly.
        macs, link: what it runs on.
        units: of the model, of whose base each Mac has a part; None: each Mac has the whole base.
        shares: each Mac's part of every unit of the base, which add up to 1.
    """
    own, parts = _own_part(run, len(macs)), [shape] * len(macs)
    sent = Sending(sum_s=link.sum_s(SINGLE * shape.trained, len(macs)))
    if units is not None:
        parts = [rank_part(shape, units, share) for share in shares]
        sent = _sent_in_step(shape, units, macs, shares, link)
    memory = tuple(plan_memory(part, own, mac.machine) for part, mac in zip(parts, macs, strict=True))
    computing_s = tuple(step_seconds(shape, own, mac.machine, mac.ceilings)[0] for mac in macs)
    return Split(units is not None, run.positions, memory, computing_s, sent)


def rank_part(shape: ModelShape, units: Units, share: float) -> ModelShape:
    """Return the shape of one Mac's part of a model: its share of each unit, and the two largest units in whole.

    Args:
        shape: of the whole model.
        units: of it.
        share: from 0 to 1.
    """
    kept = shape.base_bytes - units.bytes + int(share * units.bytes)
    # Read a unit at a time.
    source_bytes = units.largest if shape.source_bytes else 0
    return replace(
        shape, base_bytes=kept + units.largest, source_bytes=source_bytes, shared=True, head_rows=units.head_rows
    )


def memory_shares(macs: Sequence[Machine]) -> list[float]:
    """Return parts in proportion to what each Mac may use."""
    whole = sum(mac.working_set_bytes for mac in macs)
    return [mac.working_set_bytes / whole for mac in macs]


def _own_part(run: RunShape, count: int) -> RunShape:
    """Return what one of `count` Macs computes of a batch."""
    slots = None if run.trained_positions is None else -(-run.trained_positions // count)
    return replace(run, rows=-(-run.rows // count), trained_positions=slots)


def _sent_in_step(shape: ModelShape, units: Units, macs: Sequence[Mac], shares: Sequence[float], link: Link) -> Sending:
    """Return what these Macs send in a step."""
    return sending(shape, units, shares, link, beside=all(mac.machine.backend != "cpu" for mac in macs))


def least_tokens(
    shape: ModelShape, units: Units, run: RunShape, macs: Sequence[Mac], shares: Sequence[float], link: Link
) -> int | None:
    """Return about how many tokens a batch must have for the link to be hidden behind computing; None: over a million.

    Args:
        As for `plan_macs`; the rows of `run` are replaced.
    """
    sent = _sent_in_step(shape, units, macs, shares, link)
    width = min(run.width, LEAST_ROW)

    def hidden(rows: int) -> bool:
        trained = run.slots * rows * width // run.positions
        larger = replace(run, rows=rows, width=width, trained_positions=trained)
        own = _own_part(larger, len(macs))
        computing_s = max(step_seconds(shape, own, mac.machine, mac.ceilings)[0] for mac in macs)
        return sent.step_s(computing_s) <= HIDDEN * computing_s

    low, high = 0, len(macs)
    while not hidden(high):
        low, high = high, 2 * high
        if high * width > MOST_TOKENS:
            return None
    while high - low > len(macs):
        middle = (low + high) // 2
        low, high = (low, middle) if hidden(middle) else (middle, high)
    return high * width
