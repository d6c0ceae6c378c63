"""Choose settings with which a run fits in memory, or advise other settings if it does not fit.

The arithmetic is in planner/memory.py, which is called repeatedly with different settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.rules import problems_with
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, LoopSettings, TrainSettings
from mlx_lora.planner.memory import (
    ROLLOUT,
    Machine,
    MemoryPlan,
    ModelShape,
    Rollout,
    RunShape,
    held_bytes,
    most_that_fit,
    plan_memory,
)
from mlx_lora.planner.speed import Ceilings, Reading, forward_seconds, step_seconds
from mlx_lora.utils.errors import DoesNotFitError
from mlx_lora.utils.text import gigabytes

# Fastest first. Checkpointing is tried before smaller batches, because it does not change the run's results.
AUTO_MODES = ("none", "selective", "block")
SMALLEST_BATCH = 64
FEWEST_NEW_TOKENS = 32  # of an answer, that the advice goes down to
LONGEST_SEQUENCE = 1 << 20


Batches = Callable[[int], tuple[int, Sequence[tuple[int, int, int]]]]
"""Tokens of a batch -> into how many batches the data are divided, and their (rows, width, slots for trained targets)."""
Prompts = Sequence[tuple[int, int]]
"""Lengths of the prompts that answers are sampled to, in tokens, each with how many prompts are no longer."""


@dataclass(frozen=True)
class DataLimits:
    """What the data allow a batch to be.

    Attributes:
        most_rows: the number of rows in the data; None: not known.
        prompts: that answers are sampled to; without any, that of the longest row.
        most_tokens: of a batch that suits the data (config/defaults.py).
        batches: that the data are divided into; None: not known, so that a batch is taken to be full of the longest row.
    """

    most_rows: int | None = None
    prompts: Prompts = ()
    most_tokens: int = DEFAULT_BATCH_TOKENS
    batches: Batches | None = None


NO_DATA = DataLimits()


@dataclass(frozen=True)
class Fitted:
    """The settings that were chosen, and their memory.

    Attributes:
        batch_tokens: of a micro-batch.
        checkpointing: the mode.
        memory: the plan for the batch that takes the most.
        rows, width: of that batch; its trained rows, and the positions of the longest.
    """

    batch_tokens: int
    checkpointing: str
    memory: MemoryPlan
    rows: int = 1
    width: int = 1


def largest_batch(
    width: int, settings: TrainSettings, batch_tokens: int, most_rows: int | None = None
) -> tuple[int, int]:
    """Return (trained rows, width) of the largest batch whose longest row has `width` positions.

    Args:
        width: positions of the longest row.
        settings: may set the number of examples per batch, and decide how many rows an example has.
        batch_tokens: of a batch, if the settings do not set its examples.
        most_rows: the number of rows in the data; None: not known.
    """
    objective = settings.objective
    together = objective.rows_per_example
    examples = settings.loop.batch_size or max(1, batch_tokens // (together * width))
    if most_rows is not None:
        examples = max(1, min(examples, most_rows // together))
    return objective.trained_rows_per_example * examples, width


def run_of(settings: TrainSettings, rows: int, width: int, mode: str, slots: int | None = None) -> RunShape:
    """Return the settings that decide memory, for one batch shape with `slots` trained positions.

    With --batch-parts, this is the largest part of the batch; the rows of an example stay together in one part.
    """
    loop, objective = settings.loop, settings.objective
    together, rollout = objective.trained_rows_per_example, None
    if objective.samples:  # to a batch whose rows have room for the answers
        prompt = max(1, width - answer_room(objective))
        answers = objective.answers_per_prompt, prompt, objective.max_new_tokens, objective.has_episodes
        rollout = Rollout(rows // together, *answers)
    return RunShape(
        rows=-(-rows // (together * loop.batch_parts)) * together,
        width=width,
        trained_positions=slots,
        checkpointing=mode,
        optimizer=settings.optimizer.optimizer,
        dropout=settings.adapter.dropout > 0,
        accumulates=loop.grad_accumulation_steps * loop.batch_parts > 1,
        teacher_top_k=objective.teacher_top_k if objective.row.taught else None,
        rollout=rollout,
        steps=loop.iters,
        offloads_activations=loop.offload_activations,
        measures=objective.row.reference or loop.val_batches != 0,
    )


def largest_rollout(settings: TrainSettings, batch_tokens: int, prompts: Prompts) -> Rollout | None:
    """Return the batch of prompts whose answers take the most; None without prompts.

    Short prompts may take more than long ones: more of them fit into a batch, and mlx-lm's caches grow in large steps.
    """
    objective, found = settings.objective, []
    for tokens, count in prompts:
        most_rows = count * objective.rows_per_example
        rows, _ = largest_batch(tokens + answer_room(objective), settings, batch_tokens, most_rows)
        batch = rows // objective.trained_rows_per_example
        found.append(
            Rollout(batch, objective.answers_per_prompt, tokens, objective.max_new_tokens, objective.has_episodes)
        )
    return max(found, key=lambda one: one.prompts * one.cached_tokens, default=None)


def answer_room(objective: ObjectiveSettings) -> int:
    """Return the positions of a row beyond its prompt's tokens, with answers of full length (EncodedSet.with_room)."""
    if objective.rows_per_example > 1:
        return objective.max_new_tokens - 1
    return (
        objective.answers_per_prompt * (1 + objective.max_new_tokens) - 2
    )  # each answer begins with the prompt's last token


def budget_of(loop: LoopSettings, machine: Machine) -> int:
    """Return the bytes a run may use: --memory-budget, at most the machine's working set."""
    given = machine.working_set_bytes if loop.memory_budget is None else int(loop.memory_budget * 1e9)
    return min(given, machine.working_set_bytes)


def fit(
    settings: TrainSettings,
    shape: ModelShape,
    machine: Machine,
    width: int,
    data: DataLimits = NO_DATA,
    ranks: int = 1,
) -> Fitted:
    """Choose batch tokens and checkpointing if the settings leave them open.

    The first choice that fits is returned: the data's `most_tokens`, then halves of it, each with the fastest mode first. If nothing
    fits, the smallest is returned, and its plan says that it does not fit.

    Args:
        settings: --batch-tokens and --grad-checkpoint may be open (None, auto).
        shape, machine: the model and the machine.
        width: positions of the longest row.
        data: bounds a batch.
        ranks: processes that a batch's examples are dealt to.
    """
    budget, together = budget_of(settings.loop, machine), settings.objective.trained_rows_per_example
    for tokens, mode in _choices(settings.loop, width * settings.objective.rows_per_example, data.most_tokens):
        found: Fitted | None = None
        for rows, columns, slots in _batches(data, width, settings, tokens):
            rows = -(-rows // (together * ranks)) * together
            run = run_of(settings, rows, columns, mode, slots if ranks * settings.loop.batch_parts == 1 else None)
            run = replace(run, rollout=largest_rollout(settings, tokens, data.prompts) or run.rollout)
            one = Fitted(tokens, mode, plan_memory(shape, run, machine, budget), rows, columns)
            if found is None or one.memory.peak_bytes > found.memory.peak_bytes:
                found = one
        assert found is not None
        if found.memory.fits:
            break
    return found


def _batches(data: DataLimits, width: int, settings: TrainSettings, tokens: int) -> list[tuple[int, int, int | None]]:
    """Return (trained rows, width, slots) of the batches that may take the most; without known shapes, slots are None.

    None has both fewer positions and a shorter row than another.
    """
    largest = (*largest_batch(width, settings, tokens, data.most_rows), None)
    if data.batches is None or settings.objective.samples:
        return [largest]
    objective, wide = settings.objective, 0
    trained = [
        (rows // objective.rows_per_example * objective.trained_rows_per_example, columns, slots)
        for rows, columns, slots in data.batches(tokens)[1]
    ]
    found = []
    for rows, columns, slots in sorted(trained, key=lambda one: (one[0] * one[1], one[1], one[2]), reverse=True):
        if columns > wide:
            found.append((rows, columns, slots))
            wide = columns
    return found or [largest]


def _choices(loop: LoopSettings, longest: int, most_tokens: int) -> Iterator[tuple[int, str]]:
    """Yield (batch tokens, mode), the preferred ones first; `longest` is the positions of the longest example."""
    modes = AUTO_MODES if loop.grad_checkpoint == "auto" else (loop.grad_checkpoint,)
    tokens = loop.batch_tokens or most_tokens
    while True:
        yield from ((tokens, mode) for mode in modes)
        if loop.batch_tokens or loop.batch_size or tokens // 2 < max(SMALLEST_BATCH, longest):
            return  # an example that is longer than the budget gets its own batch anyway
        tokens //= 2


def largest_that_fits(fits: Callable[[int], bool], most: int, step: int = 32) -> int:
    """Return the largest multiple of `step` up to `most` that fits, 0 if none does; `fits` must be monotone."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step


def largest_sequence(
    settings: TrainSettings, shape: ModelShape, machine: Machine, mode: str, most: int = LONGEST_SEQUENCE
) -> int:
    """Return the longest row that fits in a batch of one example, in positions; a pair has two rows of that length."""
    budget, rows = budget_of(settings.loop, machine), settings.objective.trained_rows_per_example
    return largest_that_fits(
        lambda width: plan_memory(shape, run_of(settings, rows, width, mode), machine, budget).fits,
        min(most, shape.most_tokens or most),
    )


def largest_batch_size(settings: TrainSettings, shape: ModelShape, machine: Machine, mode: str, width: int) -> int:
    """Return how many examples with rows of `width` positions fit into one batch."""
    budget, rows = budget_of(settings.loop, machine), settings.objective.trained_rows_per_example
    return largest_that_fits(
        lambda examples: plan_memory(shape, run_of(settings, rows * examples, width, mode), machine, budget).fits,
        max(1, LONGEST_SEQUENCE // width),
        step=1,
    )


def planned_words(memory: MemoryPlan) -> str:
    """Return the planned memory for the run's header, or that it is not known."""
    if memory.not_known:
        limit = gigabytes(memory.budget_bytes)
        return f"memory use not known in advance ({memory.not_known[0]}), so the run is watched against {limit}"
    moment = " while answers are sampled" if memory.phase == ROLLOUT else ""
    return f"planned peak {gigabytes(memory.peak_bytes)}{moment}, limit {gigabytes(memory.budget_bytes)}"


def check_fits(
    settings: TrainSettings,
    fitted: Fitted,
    shape: ModelShape,
    machine: Machine,
    width: int,
    quantized: Callable[[], ModelShape | None] = lambda: None,
    data: DataLimits = NO_DATA,
) -> None:
    """Refuse a run that does not fit, unless --no-memory-check is given.

    Args:
        settings: of the run.
        fitted: the result of `fit`.
        shape, machine, width, data: as for `fit`.
        quantized: returns the shape with a 4-bit base, or None if it is already quantized.

    Raises:
        DoesNotFitError: the run does not fit; the message has the nearest settings that do.
    """
    memory = fitted.memory
    if memory.fits or not settings.loop.memory_check or shape.not_known:
        return  # memory that is not known is watched during the run (trainer/guards.py)
    limit = "--memory-budget" if settings.loop.memory_budget else f"the working set of {machine.name}"
    moment = "while answers are sampled" if memory.phase == ROLLOUT else "at its peak"
    reads = settings.loop.offload_base != "on" and not problems_with(settings.to_flat(), "offload_base", "on")
    disk = ", or --offload-base to read the base from the disk" if reads else ""
    raise DoesNotFitError(
        f"this run: needs {gigabytes(memory.needed_bytes)} {moment} by the plan, but {limit} is "
        f"{gigabytes(memory.budget_bytes)}; {advice(settings, shape, machine, width, quantized, data)}{disk}, or "
        "--no-memory-check to try it anyway"
    )


def advice(
    settings: TrainSettings,
    shape: ModelShape,
    machine: Machine,
    width: int,
    quantized: Callable[[], ModelShape | None] = lambda: None,
    data: DataLimits = NO_DATA,
) -> str:
    """Return the settings that fit and change the run least, as flags."""
    for model, words in ((lambda: shape, []), (quantized, ["--bits 4"])):
        found = model()
        if found is None:
            continue
        flags = _nearest(settings, found, machine, width, data)
        if flags is not None:
            return " ".join(["try", *words, *flags])
    smaller = "--teacher, or one with fewer bits" if shape.teacher is not None else "model"
    return f"even short sequences and small batches do not fit: choose a smaller {smaller}"


def _nearest(
    settings: TrainSettings, shape: ModelShape, machine: Machine, width: int, data: DataLimits
) -> list[str] | None:
    """Return the flags with which the run fits (empty: it fits as it is), or None if there are none."""
    asked, limits = settings.loop, DataLimits(data.most_rows, data.prompts if settings.objective.samples else ())
    for eased, columns in _easier(settings, shape, machine, width, limits):
        found = fit(eased, shape, machine, columns, limits)
        if not found.memory.fits:
            continue
        loop, objective = eased.loop, eased.objective
        changed = {
            f"--grad-checkpoint {found.checkpointing}": asked.grad_checkpoint not in ("auto", found.checkpointing),
            f"--batch-size {loop.batch_size}": asked.batch_size != loop.batch_size,
            f"--batch-tokens {found.batch_tokens}": asked.batch_tokens != loop.batch_tokens,
            f"--max-seq-length {columns + 1}": columns < width and not objective.samples,
            f"--max-new-tokens {objective.max_new_tokens}": objective.max_new_tokens
            != settings.objective.max_new_tokens,
            f"--group-size {objective.group_size}": objective.group_size != settings.objective.group_size,
        }
        return [flag for flag, differs in changed.items() if differs]
    return None


def _easier(
    settings: TrainSettings, shape: ModelShape, machine: Machine, width: int, data: DataLimits
) -> Iterator[tuple[TrainSettings, int]]:
    """Yield settings that take less and less memory, each with the positions of the longest row.

    First more checkpointing and smaller batches, of examples where these are counted, and then the same with shorter rows. A run
    that samples answers has fewer prompts in a batch, then shorter answers, then fewer.
    """
    loop = settings.loop
    auto = replace(loop, grad_checkpoint="auto")

    def of_examples(count: int) -> TrainSettings:
        return replace(settings, loop=replace(auto, batch_size=count))

    def fits(columns: int, examples: int) -> bool:
        return fit(of_examples(examples), shape, machine, columns, data).memory.fits

    if settings.objective.samples:
        prompt = max(1, width - answer_room(settings.objective))
        for objective in _fewer_answers(settings.objective):
            for batch_size in dict.fromkeys((loop.batch_size, 1)):
                eased = replace(settings, objective=objective, loop=replace(auto, batch_size=batch_size))
                yield eased, prompt + answer_room(objective)
        return
    widths = [width]
    while widths[-1] > SMALLEST_BATCH:
        widths.append(max(SMALLEST_BATCH, widths[-1] // 2))
    for columns in widths:
        yield replace(settings, loop=auto), columns
        if loop.batch_size is not None:  # which --batch-tokens does not change
            most = largest_that_fits(partial(fits, columns), loop.batch_size - 1, step=1)
            yield of_examples(max(1, most)), columns
        else:
            yield replace(settings, loop=replace(auto, batch_tokens=None)), columns
            smallest = max(2, min(columns, SMALLEST_BATCH))
            yield replace(settings, loop=replace(loop, grad_checkpoint="block", batch_tokens=smallest)), columns


def _fewer_answers(objective: ObjectiveSettings) -> Iterator[ObjectiveSettings]:
    """Yield settings with shorter and shorter answers, then the same with half as many of them, and so on."""
    group = objective.answers_per_prompt
    while group >= 2:
        tokens = objective.max_new_tokens
        yield replace(objective, group_size=group)
        while tokens > FEWEST_NEW_TOKENS:
            tokens = max(FEWEST_NEW_TOKENS, tokens // 2)
            yield replace(objective, group_size=group, max_new_tokens=tokens)
        group //= 2


def runs_at_once(shape: ModelShape, optimizer: str, memory: MemoryPlan, most: int) -> int:
    """Return how many runs with one run's settings fit in memory together.

    Args:
        shape, optimizer, memory: of the run.
        most: where to stop counting.
    """
    held = held_bytes(shape, optimizer)
    step = max(0, memory.peak_bytes - shape.base_bytes - held)
    return most_that_fit(shape.base_bytes, [held] * most, [step] * most, memory.budget_bytes - memory.cache_bytes)


def hidden_from(
    reading: Reading, settings: TrainSettings, shape: ModelShape, machine: Machine, ceilings: Ceilings, width: int
) -> int:
    """Return from how many positions a micro-batch of a run never waits for the disk.

    Args:
        reading: of the base.
        settings: of the run.
        shape: of the adapted model.
        machine, ceilings: what it runs on.
        width: positions of the longest row.
    """
    rows, width = largest_batch(width, settings, DEFAULT_BATCH_TOKENS)
    run = run_of(settings, rows, width, "block")
    step_s, _ = step_seconds(shape, run, machine, ceilings)
    return reading.hidden_from(run.positions, forward_seconds(shape, run, machine, ceilings), step_s)
