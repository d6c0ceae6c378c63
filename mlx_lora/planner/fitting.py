"""From a run's settings and a model's shape to what will fit: the choice of settings, and advice where nothing does.

The arithmetic is memory.py's and speed.py's; here it is asked again and again with other settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mlx_lora.planner.memory import MemoryPlan, plan_memory
from mlx_lora.planner.shapes import Machine, ModelShape, Run
from mlx_lora.settings.config import DEFAULT_BATCH_TOKENS, LoopSettings, TrainSettings
from mlx_lora.system.errors import InputError
from mlx_lora.system.units import gigabytes

# Fastest first. Checkpointing changes no number of the run, fewer tokens a step do: it is tried before them.
AUTO_MODES = ("none", "selective", "block")
SMALLEST_BATCH = 64
LONGEST_SEQUENCE = 1 << 20


@dataclass(frozen=True)
class Fitted:
    """Settings that were chosen, and what they need.

    Attributes:
        batch_tokens: of a micro-batch.
        checkpointing: mode.
        memory: the plan of the largest batch.
    """

    batch_tokens: int
    checkpointing: str
    memory: MemoryPlan


def largest_batch(width: int, loop: LoopSettings, batch_tokens: int, most_rows: int | None = None) -> tuple[int, int]:
    """Return (rows, width) of the largest batch whose longest row has `width` positions.

    Args:
        width: positions of the longest row.
        loop: may name the rows of a batch.
        batch_tokens: of a batch, where it does not.
        most_rows: in all the data; None: not known.
    """
    rows = loop.batch_size or max(1, batch_tokens // width)
    return (rows if most_rows is None else max(1, min(rows, most_rows))), width


def run_of(settings: TrainSettings, rows: int, width: int, mode: str, places: int | None = None) -> Run:
    """Return what of the settings decides memory, for one batch shape."""
    loop = settings.loop
    return Run(
        rows=-(-rows // loop.batch_parts),
        width=width,
        trained_positions=places,
        checkpointing=mode,
        optimizer=settings.optimizer.optimizer,
        dropout=settings.adapter.dropout > 0,
        accumulates=loop.grad_accumulation_steps * loop.batch_parts > 1,
    )


def budget_of(loop: LoopSettings, machine: Machine) -> int:
    """Return the bytes a run may use: --memory-budget, at most the machine's working set."""
    given = machine.working_set_bytes if loop.memory_budget is None else int(loop.memory_budget * 1e9)
    return min(given, machine.working_set_bytes)


def fit(
    settings: TrainSettings, shape: ModelShape, machine: Machine, width: int, most_rows: int | None = None
) -> Fitted:
    """Choose batch tokens and checkpointing where the settings leave them open.

    The first that fits: 2,048 tokens or halves of it, and for each the fastest mode. Where nothing fits, the
    smallest is returned, whose plan says so.

    Args:
        settings: --batch-tokens and --grad-checkpoint may be open (None, auto).
        shape, machine: the model and where it runs.
        width: positions of the longest row.
        most_rows: in all the data; None: not known.
    """
    loop = settings.loop
    budget = budget_of(loop, machine)
    for tokens, mode in _choices(loop, width):
        rows, columns = largest_batch(width, loop, tokens, most_rows)
        found = Fitted(tokens, mode, plan_memory(shape, run_of(settings, rows, columns, mode), machine, budget))
        if found.memory.fits:
            break
    return found


def _choices(loop: LoopSettings, width: int) -> Iterator[tuple[int, str]]:
    """Yield (batch tokens, mode), the preferred first."""
    modes = AUTO_MODES if loop.grad_checkpoint == "auto" else (loop.grad_checkpoint,)
    tokens = loop.batch_tokens or DEFAULT_BATCH_TOKENS
    while True:
        yield from ((tokens, mode) for mode in modes)
        if loop.batch_tokens or loop.batch_size or tokens // 2 < max(SMALLEST_BATCH, width):
            return  # a row longer than the budget stands alone anyway
        tokens //= 2


def largest_that_fits(fits: Callable[[int], bool], most: int, step: int = 32) -> int:
    """Return the largest multiple of `step` up to `most` that fits, 0 for none; what fits must be monotone."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step


def largest_sequence(
    settings: TrainSettings, shape: ModelShape, machine: Machine, mode: str, most: int = LONGEST_SEQUENCE
) -> int:
    """Return the longest single row that fits, in positions."""
    budget = budget_of(settings.loop, machine)
    return largest_that_fits(
        lambda width: plan_memory(shape, run_of(settings, 1, width, mode), machine, budget).fits, most
    )


def largest_rows(settings: TrainSettings, shape: ModelShape, machine: Machine, mode: str, width: int) -> int:
    """Return how many rows of `width` fit into one batch."""
    budget = budget_of(settings.loop, machine)
    return largest_that_fits(
        lambda rows: plan_memory(shape, run_of(settings, rows, width, mode), machine, budget).fits,
        max(1, LONGEST_SEQUENCE // width),
        step=1,
    )


def planned_words(memory: MemoryPlan) -> str:
    """Say in the run's header what was planned, or that nothing could be promised."""
    if memory.not_known:
        limit = gigabytes(memory.budget_bytes)
        return f"memory not known beforehand, watched against {limit} while it runs ({memory.not_known[0]})"
    return f"{gigabytes(memory.peak_bytes)} planned at the peak, of {gigabytes(memory.budget_bytes)}"


def check_fits(
    settings: TrainSettings,
    fitted: Fitted,
    shape: ModelShape,
    machine: Machine,
    width: int,
    quantized: Callable[[], ModelShape | None] = lambda: None,
    most_rows: int | None = None,
) -> None:
    """Refuse a run that does not fit, unless it is forced.

    Args:
        settings: of the run.
        fitted: what `fit` chose.
        shape, machine, width, most_rows: as in `fit`.
        quantized: returns the shape with a 4-bit base, None where it is quantized already.

    Raises:
        InputError: with the nearest settings that do fit.
    """
    memory = fitted.memory
    if memory.fits or not settings.loop.memory_check or shape.not_known:
        return  # what is not known is watched while it runs (training/memory_guard.py)
    limit = "--memory-budget" if settings.loop.memory_budget else f"the working set of {machine.name}"
    raise InputError(
        f"this run: needs {gigabytes(memory.needed_bytes)} at its peak by the plan, and {limit} is "
        f"{gigabytes(memory.budget_bytes)}; {advice(settings, shape, machine, width, quantized, most_rows)}, or "
        "--no-memory-check to try it all the same"
    )


def advice(
    settings: TrainSettings,
    shape: ModelShape,
    machine: Machine,
    width: int,
    quantized: Callable[[], ModelShape | None] = lambda: None,
    most_rows: int | None = None,
) -> str:
    """Return the nearest settings that fit, as flags: what changes the run least comes first."""
    for model, words in ((lambda: shape, []), (quantized, ["a 4-bit base"])):
        found = model()
        if found is None:
            continue
        flags = _nearest(settings, found, machine, width, most_rows)
        if flags is not None:
            return "try " + " and ".join(filter(None, [*words, " ".join(flags)]))
    return "no sequence or batch is small enough: choose a smaller model"


def _nearest(
    settings: TrainSettings, shape: ModelShape, machine: Machine, width: int, most_rows: int | None
) -> list[str] | None:
    """Return flags with which the run fits, None where there are none; empty: as it is."""
    widths = [width]
    while widths[-1] > SMALLEST_BATCH:
        widths.append(max(SMALLEST_BATCH, widths[-1] // 2))
    for columns in widths:
        for loop in _easier(settings.loop, columns):
            eased = replace(settings, loop=loop)
            found = fit(eased, shape, machine, columns, most_rows)
            if found.memory.fits:
                return _flags(settings.loop, loop, found, columns if columns < width else None)
    return None


def _easier(loop: LoopSettings, width: int) -> Iterator[LoopSettings]:
    """Yield the settings with ever fewer rows to a batch and more repeated."""
    yield replace(loop, grad_checkpoint="auto")
    yield replace(loop, grad_checkpoint="auto", batch_size=None, batch_tokens=None)
    yield replace(loop, grad_checkpoint="block", batch_size=None, batch_tokens=max(2, min(width, SMALLEST_BATCH)))


def _flags(before: LoopSettings, after: LoopSettings, found: Fitted, width: int | None) -> list[str]:
    flags = []
    if before.grad_checkpoint not in ("auto", found.checkpointing):
        flags.append(f"--grad-checkpoint {found.checkpointing}")
    if (before.batch_size, before.batch_tokens) != (after.batch_size, after.batch_tokens):
        flags.append(f"--batch-tokens {found.batch_tokens}")
    if width is not None:
        flags.append(f"--max-seq-length {width + 1}")
    return flags
