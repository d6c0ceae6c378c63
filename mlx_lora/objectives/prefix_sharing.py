"""Compute a prompt once for all of its answers: join them in one row where that saves work and the model allows it.

The answers are the two of a pair, or those that are sampled to a prompt. Rows of known length, and those with room for
answers, are joined before the run:

    rows      p p p p a a a         joined    p p p | p a a a | p b b
              p p p p b b           starts            3         7

How long sampled answers are is known only when they are there, so those rows are joined batch by batch. They are inputs, in
which an answer's last token is missing, because it is only a target:

    inputs    p p p a a             joined    p p | p a a | p b
              p p p b               starts          2       5

The prompt's last token is repeated, because it is the one that predicts an answer's first token, and each answer needs that
prediction. models/prefix_attention.py computes such rows.

Before a run joins rows, the model's structure is checked (models/prefix_attention.py). Then a random pair is computed both
ways, with the run's own loss and kernels; the results may differ only by rounding.

Shapes: E examples or prompts, K rows or answers of each; R rows of a set; B rows of a batch (E K, or E where they are
joined), T columns, P slots for trained targets.

The run's layout says whether each answer has its own row, or all lie behind the prompt in one. The rows of pairs are joined
before the run. Those of sampled answers are planned with room for answers, joined where answers of full length would save
work; if only shorter ones may, they are planned apart, and each batch is joined or not when its answers are there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, TrainSettings
from mlx_lora.data.batch import EMPTY, SIZES, SLOTS_STEP, Batch
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.kernels.choose import KernelChoice, training_kernels
from mlx_lora.losses.agree import Probe, choose_compute, disagreement, probe
from mlx_lora.losses.cross_entropy import Loss, token_arrays
from mlx_lora.models.folder import FOREIGN_ERRORS, raise_if_ours, short
from mlx_lora.models.load import embedding_rows
from mlx_lora.models.meta import model_shape
from mlx_lora.models.prefix_attention import rotate_by_token, unshareable
from mlx_lora.planner.fit import budget_of, largest_batch, run_of
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.memory import KernelTerms, MemoryPlan, ModelShape, plan_memory
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import gigabytes

if TYPE_CHECKING:
    from mlx_lora.data.load import DataSplits
    from mlx_lora.objectives.base import RunContext

# Rows of a set


def joined(rows: EncodedSet) -> EncodedSet:
    """Return a set with one row per example, which holds all its rows; labels and references are (E, K)."""
    if rows.group < 2 or not len(rows):
        return rows
    parts, starts = [], []
    for example, shared in enumerate(shared_tokens(rows)):
        edges = rows.offsets[example * rows.group : (example + 1) * rows.group + 1]
        spans = [(edges[0], edges[0] + shared), *((a + shared, b) for a, b in pairwise(edges))]
        parts += [np.arange(*span) for span in spans]
        starts.append(np.cumsum([b - a for a, b in spans[:-1]]))
    order = np.concatenate(parts)
    begins = np.array(starts, np.int32)  # (E, K)
    lengths = [sum(map(len, parts[i : i + rows.group + 1])) for i in range(0, len(parts), rows.group + 1)]

    def by_example(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values.reshape(-1, rows.group)

    return replace(
        rows,
        tokens=rows.tokens[order],
        mask=rows.mask[order],
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        group=1,
        labels=by_example(rows.labels),
        answers=None if rows.answers is None else rows.answers[order],
        reference=by_example(rows.reference),
        starts=begins,
    )


def shared_tokens(rows: EncodedSet) -> np.ndarray:
    """Return how many tokens of each example's rows can be computed once, (E,) int64.

    These are the tokens that all rows begin with, without the one before a row's first answer token.
    """
    trained = rows.mask if rows.answers is None else rows.answers
    found = np.zeros(rows.examples, np.int64)
    for example in range(rows.examples):
        edges = rows.offsets[example * rows.group : (example + 1) * rows.group + 1]
        texts = [rows.tokens[a:b] for a, b in pairwise(edges)]
        most = min(int(np.argmax(trained[a:b])) - 1 for a, b in pairwise(edges))
        alike = np.logical_and.reduce([text[:most] == texts[0][:most] for text in texts])
        found[example] = most if alike.all() else int(np.argmin(alike))
    return found


def saved_share(rows: EncodedSet) -> float:
    """Return the share of positions that joining saves, 0 if nothing can be joined."""
    if rows.group < 2 or not len(rows):
        return 0.0
    saved = int(shared_tokens(rows).sum()) * (rows.group - 1)
    return saved / int((rows.lengths - 1).sum())


# Decision

# What a score costs, in its two products: masks, exponentials and passes over memory included. From eight answers of 100
# tokens to a prompt of 20, which took 19% longer in one row on a CPU (SmolLM2).
SCORE_COST = 4.0
LEAST_SAVED = 0.02  # share of a step's products; a smaller saving is not worth a mask for each row


def layout_problem(asked: str, model: nn.Module, shape: ModelShape, rows: EncodedSet) -> str | None:
    """Return in a few words why the answers to a prompt should stay in separate rows, None if they can share one.

    Args:
        asked: --shared-prefix.
        model: its arrays need not be computed.
        shape: of the model.
        rows: each answer in a row of its own, or room for one.
    """
    problem = f"--shared-prefix {asked}" if asked == "off" else unshareable(model)
    if problem is None and asked == "auto":
        saved = saved_work(shape, rows)
        problem = None if saved >= LEAST_SAVED else f"a shared prompt would save {max(0.0, saved):.0%} of the work"
    return problem


def saved_work(shape: ModelShape, rows: EncodedSet) -> float:
    """Return the share of a pass's products that joining rows saves; it is below 0 if the longer rows cost more.

    Fewer positions are multiplied by the weights, but each attends to a row that also holds the other answers.
    """
    cost = work_of(shape)
    apart = cost(rows.lengths - 1)
    return 1 - cost(joined(rows).lengths - 1) / apart if apart and saved_share(rows) else 0.0


def work_of(shape: ModelShape) -> Callable[[np.ndarray], float]:
    """Return what counts the products of a pass over rows of these numbers of positions, (R,).

    Every position is multiplied by the weights, and its query by the keys before it. Masks and exponentials count as
    SCORE_COST says.
    """
    weights = sum(layer.inputs * layer.outputs * layer.active for block in shape.blocks for layer in block.layers)
    per_score = SCORE_COST * sum(2 * block.heads * block.head_width for block in shape.blocks)

    def cost(positions: np.ndarray) -> float:
        counted = positions.astype(float)
        return float((weights * counted + per_score * counted**2 / 2).sum())

    return cost


# Check on the model

PROMPT_TOKENS, ANSWER_TOKENS = 24, (20, 12)
NEARER = 4.0  # a joined row must be this many times nearer to separate rows than the same tokens read as one text


def sharing_problem(
    model: nn.Module, config: dict[str, Any], loss: Loss, kernels: KernelChoice | None = None
) -> str | None:
    """Return in a few words how this model's results for a joined row are wrong, None if they equal separate rows'.

    Args:
        model: adapted; from this call on, its rotary embeddings take a position for each token.
        config: its config.json.
        loss, kernels: of the run; None: the model's own kernels.
    """
    rotate_by_token(model)
    rows = _random_pair(embedding_rows(model, config) or 256)
    try:
        with nullcontext() if kernels is None else training_kernels(model, choose=kernels):
            both = joined(rows)
            without_starts = EncodedSet(both.tokens, both.mask, both.offsets)
            apart, together, as_one = (_probe(model, loss, one) for one in (rows, both, without_starts))
    except FOREIGN_ERRORS as error:
        raise_if_ours(error)
        return f"fails on a shared prompt: {short(error, 100)}"
    problem = disagreement(model, apart, together)
    if problem:
        return f"a shared prompt {problem}"
    # With 16 bits, rounding is so large that wrong positions could pass as rounding. So the joined row must also be much
    # nearer to the separate rows than a row with wrong positions is.
    difference, wrong = (mx.abs(one.losses - apart.losses).max().item() for one in (together, as_one))
    if difference * NEARER > wrong:
        return "rounding is too large on this model to check a shared prompt"
    return None


def _random_pair(vocabulary: int) -> EncodedSet:
    random = np.random.default_rng(0)
    prompt = random.integers(0, vocabulary, PROMPT_TOKENS).astype(np.int32)
    texts = [np.concatenate([prompt, random.integers(0, vocabulary, n).astype(np.int32)]) for n in ANSWER_TOKENS]
    return EncodedSet.from_rows([(text, np.arange(len(text)) >= PROMPT_TOKENS) for text in texts]).grouped(2)


def _probe(model: nn.Module, loss: Loss, rows: EncodedSet) -> Probe:
    plan = BatchPlan(rows, batch_tokens=2 * int(rows.lengths.max()), batch_size=None, seed=0)
    batch = plan.batch(0, 0)
    found = probe(model, lambda model: loss.tokens(model, token_arrays(batch)))
    return Probe(found.losses[: sum(ANSWER_TOKENS)], found.gradients)  # without padding


# Batches of sampled answers

ROW_STEP = 64  # widths of joined rows are a multiple of this, so that few shapes occur


@dataclass(frozen=True)
class Joining:
    """When the answers to a prompt go into one row.

    Attributes:
        work: returns the work of a training pass over rows of these numbers of positions, (B,).
        always: in every batch; otherwise in each batch where that saves work.
    """

    work: Callable[[np.ndarray], float]
    always: bool

    def __call__(self, batch: Batch, begins: np.ndarray, ends: np.ndarray) -> Batch:
        """Return a batch of sampled answers, joined if that is asked for or saves work.

        Args:
            batch: a row for each answer.
            begins, ends: as for `joined_batch`.
        """
        together = joined_batch(batch, begins, ends)
        return together if self.always or self.saved(batch, together) >= LEAST_SAVED else batch

    def saved(self, batch: Batch, together: Batch) -> float:
        """Return the share of a batch's work that joining its rows saves, padding included; below 0 if it costs more."""
        apart, joined = (self.work(np.full(*one.inputs.shape)) for one in (batch, together))
        return 1 - joined / apart


def joined_batch(batch: Batch, begins: np.ndarray, ends: np.ndarray) -> Batch:
    """Return a batch with one row for each prompt, followed by its answers; what a row does not need is cut.

    Args:
        batch: a row for each answer.
        begins: (B,) the column of each row's first target: that of the prompt's last token.
        ends: (B,) the column after its last target, trained or not; as `begins` in padding.
    """
    group, width = batch.group, batch.inputs.shape[1]
    lengths = (ends - begins).reshape(-1, group)  # (E, K), 0 in padding
    first = begins[::group]
    after = first[:, None] + np.cumsum(lengths, axis=1)
    starts = after - lengths
    longest = -(-int(after.max()) // ROW_STEP) * ROW_STEP
    source = np.full((len(starts), longest), EMPTY)  # where each joined column is in the batch, flat
    for example, row in enumerate(range(0, len(batch.inputs), group)):
        source[example, : first[example]] = row * width + np.arange(first[example])
        for place, (start, end) in enumerate(zip(starts[example], after[example], strict=True)):
            source[example, start:end] = (row + place) * width + first[example] + np.arange(end - start)

    def of(array: np.ndarray) -> np.ndarray:
        return np.where(source == EMPTY, 0, array.ravel()[source]).astype(array.dtype)

    numbers = None
    if batch.numbers is not None:
        numbers = np.where(batch.numbers[::group] == EMPTY, EMPTY, batch.numbers[::group] // group)
    mask, real = of(batch.mask), batch.real[::group]
    columns = {name: of(one) if one.ndim > 1 else one.reshape(-1, group) for name, one in batch.columns.items()}
    columns |= {"lengths": np.where(real, after[:, -1], 0), "starts": starts.astype(np.int32)}
    slots = min(batch.slots, mask.size)
    return Batch(of(batch.inputs), of(batch.targets), mask, slots, numbers=numbers, columns=columns)


def apart(batch: Batch) -> Batch:
    """Return a planned batch with room for answers in joined rows as one with a row for each answer."""
    if batch.starts is None:
        return batch
    group, first = batch.starts.shape[1], batch.starts[:, :1]
    room = int((batch.starts[:, 1] - batch.starts[:, 0]).max()) - 1  # without the repeated token
    columns = int(first.max()) + room
    inside = (np.arange(columns) < first + room) & batch.real[:, None]

    def of(array: np.ndarray) -> np.ndarray:  # all answers are alike: there are none yet
        return np.repeat(np.where(inside, array[:, :columns], 0).astype(array.dtype), group, axis=0)

    numbers = None
    if batch.numbers is not None:
        own = batch.numbers[:, None] * group + np.arange(group)
        numbers = np.where(batch.real[:, None], own, EMPTY).ravel()
    slots = min(batch.slots, len(batch.inputs) * group * columns)
    return Batch.of(of(batch.inputs), of(batch.targets), of(batch.mask), slots, group, numbers)


def slots_of(targets: int, planned: int, positions: int) -> int:
    """Return P of a filled batch: one of few sizes, so that few shapes occur, and little of the head's work is padding.

    Args:
        targets: that are trained.
        planned: P of the planned batch, at least as many.
        positions: B T, the most.
    """
    sizes = (-(-planned * n // SIZES // SLOTS_STEP) * SLOTS_STEP for n in range(1, SIZES + 1))
    return min(next(size for size in sizes if size >= targets), positions)


def sums_of_answers(batch: Batch, values: np.ndarray) -> np.ndarray:
    """Sum (B, T) numbers, which are 0 outside answers, to answers, (E K,)."""
    if batch.starts is None:
        return values.sum(axis=1)
    width = values.shape[1]
    ends = np.append(batch.starts[:, 1:], np.full((len(values), 1), width), axis=1)
    columns = np.arange(width)
    own = (columns >= batch.starts[..., None]) & (columns < ends[..., None])  # (E, K, T)
    return np.where(own, values[:, None], 0).sum(axis=2).ravel()


def by_answer(batch: Batch, answers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return one number for each answer of a batch, in its own layout: (B,), or (E, K) where rows are joined; float32.

    Args:
        batch: of sampled answers.
        answers: (A,) the numbers of the real answers among all.
        values: (A,) theirs; others get 0.
    """
    found = np.zeros(len(batch.inputs) * batch.answers_per_row, np.float32)
    found[answers] = values
    return found if batch.starts is None else found.reshape(batch.starts.shape)


# How the answers of a run lie in rows

KEY, BY_BATCH = "shared_prefix", "where it saves work"  # in a checkpoint; True: every row is joined


@dataclass(frozen=True)
class Layout:
    """How the answers to a prompt lie in rows.

    Attributes:
        shared: whether every row holds a prompt and all its answers.
        words: for the run header; empty where no prompt has several answers.
        joining: puts sampled answers into one row; None: there are none, or each has its own.
    """

    shared: bool = False
    words: str = ""
    joining: Joining | None = None

    def of(self, splits: DataSplits) -> DataSplits:
        """Return the data with the rows to train on in this layout."""
        return replace(splits, train=joined(splits.train)) if self.shared else splits

    def settled(self, settings: TrainSettings) -> TrainSettings:
        """Return the settings with --shared-prefix on where it is."""
        return replace(settings, objective=replace(settings.objective, shared_prefix="on")) if self.shared else settings

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint."""
        if self.shared:
            return {KEY: True}
        return {KEY: BY_BATCH} if self.joining else {}


def lay_out(ctx: RunContext, rows: EncodedSet) -> Layout:
    """Choose loss and kernels (`ctx.compute`), and return whether a prompt is computed once for its answers.

    Args:
        ctx: of the run; a checkpoint's layout is kept.
        rows: to train on, apart.

    Raises:
        InputError: --shared-prefix asks for what the model or the checkpoint does not allow.
    """
    settings, base = ctx.settings, ctx.base
    asked = settings.objective.shared_prefix
    if ctx.resumed is not None:
        before = {True: "on", BY_BATCH: "auto"}.get(ctx.resumed.get(KEY), "off")  # what its run goes on with
        if asked not in (before, "auto"):
            raise InputError(f"--shared-prefix {asked}: the run that you resume has it {before}; leave the flag out")
        asked = before
    sampled = settings.objective.rewarded
    if not settings.objective.shares_prompts:
        ctx.compute = choose_compute(settings, base, rows, ctx.strategy)
        return Layout()
    shape = model_shape(base.model, base.config)
    problem = layout_problem(asked, base.model, shape, rows)
    # Sampled answers may be shorter than their room, so that sharing saves more work than is known here.
    little = problem if sampled and asked == "auto" and layout_problem("on", base.model, shape, rows) is None else None
    if problem is None or little is not None:
        planned, also = (joined(rows), None) if little is None else (rows, joined(rows))
        rotate_by_token(base.model)  # before kernels are recorded on such rows
        ctx.compute = choose_compute(settings, base, planned, ctx.strategy, also)
        problem = sharing_problem(base.model, base.config, ctx.compute.loss, ctx.compute.kernels)
        if problem is None:
            return shared_layout(shape, rows, sampled, little)
    if asked == "on":
        raise InputError(f"--shared-prefix on: {problem}; leave the flag out")
    words = f"{'a row for each answer' if sampled else 'separate rows for both answers'} ({problem})"
    ctx.compute = choose_compute(settings, base, rows, ctx.strategy)
    return Layout(words=words)


def shared_layout(shape: ModelShape, rows: EncodedSet, sampled: bool, little: str | None) -> Layout:
    """Return the layout of a run whose model can share prompts.

    Args:
        shape: of the model.
        rows: to train on, apart.
        sampled: whether answers are sampled.
        little: why answers of full length should stay apart, which shorter ones may not; None: they share a row too.
    """
    share = saved_share(rows)
    if not sampled:
        return Layout(True, f"prompts shared ({share:.0%} fewer positions)")
    joining = Joining(work_of(shape), little is None)
    if little is None:
        return Layout(
            True, f"a prompt shared by its {rows.group} answers (at least {share:.0%} fewer positions)", joining
        )
    return Layout(False, f"a prompt shared by its answers where that saves work ({little} with full answers)", joining)


def that_fits(
    layout: Layout, settings: TrainSettings, shape: ModelShape, rows: EncodedSet, terms: KernelTerms, memory: MemoryPlan
) -> tuple[Layout, MemoryPlan]:
    """Return the layout, and the memory that its rows need; rows that are joined by batch stay apart if they would not fit.

    Args:
        layout: that was chosen.
        settings: of the run, with everything chosen.
        shape, terms: of the model and its kernels.
        rows: to train on, as they are planned.
        memory: that these need.
    """
    if layout.joining is None or layout.shared:
        return layout, memory
    needed = joined_memory(settings, shape, rows, terms)
    if needed.fits or not settings.loop.memory_check:
        return layout, max(memory, needed, key=lambda one: one.needed_bytes)
    return Layout(words=f"a row for each answer (one for all would need {gigabytes(needed.needed_bytes)})"), memory


def joined_memory(settings: TrainSettings, shape: ModelShape, rows: EncodedSet, kernels: KernelTerms) -> MemoryPlan:
    """Return the memory of a run's largest batch if the answers to a prompt share a row.

    Args:
        settings: of the run, with everything chosen for rows with one answer each.
        shape: the adapted model.
        rows: training data, with room for an answer in each row.
        kernels: the memory of the chosen kernels.
    """
    machine = replace(this_machine(settings.model.dtype), kernels=kernels)
    width, tokens = max(1, int(rows.lengths.max(initial=2)) - 1), settings.loop.batch_tokens or DEFAULT_BATCH_TOKENS
    prompts = largest_batch(width, settings, tokens, len(rows))[0] // rows.group
    together = replace(settings, objective=replace(settings.objective, shared_prefix="on"))
    columns = int(joined(rows).lengths.max(initial=2)) - 1
    run = run_of(together, prompts, columns, settings.loop.grad_checkpoint)
    return plan_memory(shape, run, machine, budget_of(settings.loop, machine))
