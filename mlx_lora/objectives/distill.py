"""Distill from a teacher: what it says about each trained token, computed once before the first step.

    <cache>/teacher/<key>/     the records of one set's rows (data/dataset.py, data/dataset.py)

The key covers everything that decides the bytes: the rows, as the student and as the teacher sees them, the teacher, how
much of its distribution is kept, the temperature, the dtype, the device. So a second run starts at once; rows whose records
are missing or damaged are computed again, in the same batches as before, which gives the same bytes. The teacher is only
loaded if rows are missing, and freed before the student is adapted.

Answers that the student samples itself (--on-policy) are in objectives/on_policy.py.

Shapes: P positions, W bytes of a record.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, TrainSettings
from mlx_lora.data.dataset import RowStore, TableFormat, TeacherTable
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.divergence import (
    FORWARD_KL,
    REVERSE_KL,
    DivergenceOptions,
    distill_arrays,
    distill_loss,
    head_of,
    known_of_batch,
)
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.objectives.base import BoundObjective, Objective, RunContext
from mlx_lora.objectives.teacher import TEACHER, WithTeacher, facts_of, open_teacher, teacher_key, teacher_name
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.files import MOST_KEPT_BYTES, cache_dir, evict, free_on_disk, sha256_of, used_bytes
from mlx_lora.utils.progress import long_task
from mlx_lora.utils.text import counted, gigabytes

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.losses.cross_entropy import Loss

REPORTS = ("kl",)
SENT_BYTES = 16 << 20  # at a time, to ranks on other machines

# The objective


def distill(settings: ObjectiveSettings) -> Objective:
    """Return the objective of --objective distill."""
    name = settings.divergence or (REVERSE_KL if settings.on_policy else FORWARD_KL)
    options = DivergenceOptions(
        name, settings.jsd_beta, settings.distill_temp, settings.teacher_top_k, reports_reverse=settings.on_policy
    )
    words = f"distill: {name}"
    words += f" {settings.jsd_beta:g}" if name == "jsd" else ""
    words += f", temperature {settings.distill_temp:g}" if settings.distill_temp != 1 else ""
    if not settings.on_policy:
        return Distillation(settings, words, options)
    from mlx_lora.objectives.on_policy import on_policy  # sampling is only imported where it is asked for

    return on_policy(settings, options, words)


@dataclass(eq=False)
class Distillation(WithTeacher):
    """Distillation on the data's answers, or on those that the teacher or the base writes before the run.

    Attributes:
        words: for the run header.
        compared: how student and teacher are compared.
    """

    words: str
    compared: DivergenceOptions

    def compare(self, ctx: RunContext, sets: dict[str, EncodedSet]) -> dict[str, EncodedSet]:
        """Return the sets with what the teacher says about each trained token."""
        taught = with_teacher(ctx.settings, ctx.plain_base, sets, self.compared, ctx.strategy.ranks)
        ctx.record.lines.append(taught.words)
        ctx.record.identity |= taught.identity
        return taught.sets

    def bind(self, ctx: RunContext, loss: Loss, rows: EncodedSet) -> BoundObjective:
        whole = distill_loss(loss, ctx.base.model, ctx.base.config, self.compared, rows, self.words)
        return BoundObjective(whole, distill_arrays, reports=REPORTS)


# Before the run


@dataclass(frozen=True)
class Taught:
    """What is known of a run's teacher.

    Attributes:
        sets: name -> rows, with what the teacher says about them.
        words: a line for the run header; empty without a teacher.
        identity: what a resumed run must have in common with its checkpoint.
    """

    sets: dict[str, EncodedSet]
    words: str = ""
    identity: dict[str, Any] = field(default_factory=dict)


def with_teacher(
    settings: TrainSettings,
    base: Base,
    sets: dict[str, EncodedSet],
    options: DivergenceOptions,
    ranks: Ranks = ALONE,
) -> Taught:
    """Return the sets with what the teacher says about each trained token.

    Args:
        settings: of the run.
        base: of the student, not yet adapted: without --teacher, it is the teacher. Their tokenizers have been compared.
        sets: examples, with `teacher` rows if the teacher sees a prompt of its own.
        options: how they are compared.
        ranks: rank 0 computes, and all ranks get the same bytes.

    Raises:
        InputError: the teacher cannot be used, or there is no room on the disk.
        RunError: its probabilities could not be written.
    """
    facts = facts_of(settings, base)
    form = TableFormat.of(facts.vocabulary, options.top_k)
    key = ranks.from_first(teacher_key(settings, facts, form))
    folders = {name: cache_dir(TEACHER) / sha256_of(f"{key} {rows.fingerprint}")[:32] for name, rows in sets.items()}
    evict(cache_dir(TEACHER), MOST_KEPT_BYTES, list(folders.values()))
    seconds = 0.0
    try:
        if ranks.leads:
            stores = {name: _store(folders[name], rows, form) for name, rows in sets.items()}
            left = {name: _missing(stores[name], rows) for name, rows in sets.items()}
            if any(len(rows) for rows in left.values()):
                _check_room(sets, form)
                start = time.perf_counter()
                _compute_missing(settings, base, sets, stores, left, form, options)
                seconds = time.perf_counter() - start
        ranks.meet()
        stores = {name: _store(folders[name], rows, form) for name, rows in sets.items()}
        for name, rows in sets.items():
            _send_missing(stores[name], rows, form, ranks)
    except OSError as error:
        raise RunError(
            f"the teacher's probabilities cannot be kept in {cache_dir(TEACHER)} ({error.strerror or error}); make room "
            "there, give a smaller --teacher-top-k, or name another folder with MLX_LORA_CACHE"
        ) from error
    found = {
        name: replace(rows, table=TeacherTable(stores[name], form, np.arange(len(rows)))) for name, rows in sets.items()
    }
    words = _header_line(settings, base, sets, form, list(folders.values()), seconds)
    return Taught(found, words, {TEACHER: key})


def _store(folder: Path, rows: EncodedSet, form: TableFormat) -> RowStore:
    return RowStore(folder, rows.supervised_counts, form.record_bytes)


def _missing(store: RowStore, rows: EncodedSet) -> np.ndarray:
    """Return the numbers of the rows whose records are absent or damaged."""
    return np.array([row for row in range(len(rows)) if store.read(row) is None], np.int64)


def _check_room(sets: dict[str, EncodedSet], form: TableFormat) -> None:
    """Refuse a table that the disk has no room for, before a teacher is loaded."""
    tokens = sum(int(rows.supervised_counts.sum()) for rows in sets.values())
    needed, free = tokens * form.record_bytes, free_on_disk(cache_dir(TEACHER))
    if needed > free:
        raise InputError(
            f"--teacher-top-k {form.top_k}: {form.record_bytes:,} bytes for each of {tokens:,} tokens are "
            f"{gigabytes(needed)}, and {cache_dir(TEACHER)} has {gigabytes(free)}; give fewer, such as 64"
        )


def _compute_missing(
    settings: TrainSettings,
    base: Base,
    sets: dict[str, EncodedSet],
    stores: dict[str, RowStore],
    left: dict[str, np.ndarray],
    form: TableFormat,
    options: DivergenceOptions,
) -> None:
    """Load the teacher, compute the records of the rows that are left, write them, and let the teacher go."""
    teacher, strategy = open_teacher(settings, base)
    model = teacher.model
    loss = choose_loss(model, teacher.config, settings.loop.kernels, strategy=strategy)
    head, done = head_of(loss, model, teacher.config), 0
    model.eval()
    options = replace(options, vocabulary=form.vocabulary)
    total = sum(int(rows.supervised_counts[left[name]].sum()) for name, rows in sets.items())
    with long_task("Teacher", total, "tokens") as task:
        for name, rows in sets.items():
            seen, wanted = rows.teacher or rows, set(left[name].tolist())
            check_token_ids(teacher, int(seen.tokens.max(initial=0)), f"--teacher {teacher.model_id}")
            plan = BatchPlan(replace(seen, table=None), batch_tokens=DEFAULT_BATCH_TOKENS, batch_size=None, seed=0)
            for index, (_, numbers) in enumerate(plan.layout(0)):
                if wanted.isdisjoint(numbers.tolist()):
                    continue  # but a batch with one missing row is computed as before, so that it gets the same bytes
                batch = plan.batch(0, index)
                parts = [form.pack(*_as_numpy(known)) for known in known_of_batch(model, head, batch, options)]
                done += _write_batch(stores[name], batch, np.concatenate(parts), wanted)
                task.reach(done)
    del teacher, model, head, loss, strategy
    mx.clear_cache()


def _as_numpy(known: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what is known as numpy arrays, which computes it.

    Raises:
        InputError: it is not finite.
    """
    mx.eval(known.logps) if known.ids is None else mx.eval(known.logps, known.ids)
    logps = np.array(known.logps)
    if not np.isfinite(logps).all():
        raise InputError("the teacher's probabilities are not finite; try --dtype float32, or another teacher")
    return logps, None if known.ids is None else np.array(known.ids)


def _write_batch(store: RowStore, batch: Batch, records: np.ndarray, wanted: set[int]) -> int:
    """Write a batch's records, (P, W), row by row, and return how many tokens of wanted rows there were."""
    numbers: Any = batch.numbers  # there are some: the batch is of a set
    start = done = 0
    for number, count in zip(numbers.tolist(), batch.mask.sum(axis=1).tolist(), strict=True):
        own = records[start : start + count]
        start += count
        if number in wanted:
            store.write(number, own)
            done += count
    return done


def _send_missing(store: RowStore, rows: EncodedSet, form: TableFormat, ranks: Ranks) -> None:
    """Send the records to ranks that do not find them in their own cache, because they are on another machine."""
    if ranks.size == 1:
        return
    if not ranks.any(bool(len(_missing(store, rows)))):
        return
    counts, first = rows.supervised_counts, 0
    while first < len(rows):
        last = first + 1
        while last < len(rows) and int(counts[first : last + 1].sum()) * form.record_bytes <= SENT_BYTES:
            last += 1
        own = np.zeros((int(counts[first:last].sum()), form.record_bytes), np.uint8)
        if ranks.leads:
            own = np.concatenate([_written_records(store, row) for row in range(first, last)])
        sent = np.array(ranks.arrays_from_first({TEACHER: mx.array(own)})[TEACHER])
        start = 0
        for row in range(first, last):
            if store.read(row) is None:
                store.write(row, sent[start : start + int(counts[row])])
            start += int(counts[row])
        first = last


def _written_records(store: RowStore, row: int) -> np.ndarray:
    """Return a row's records, which were written just now.

    Raises:
        OSError: the disk does not give them back.
    """
    values = store.read(row)
    if values is None:
        raise OSError("what was just written cannot be read; check that disk")
    return values


def _header_line(
    settings: TrainSettings,
    base: Base,
    sets: dict[str, EncodedSet],
    form: TableFormat,
    folders: list[Path],
    seconds: float,
) -> str:
    """Return the line about the teacher for the run header."""
    tokens = sum(int(rows.supervised_counts.sum()) for rows in sets.values())
    size = sum(used_bytes(folder) for folder in folders)
    kept = (
        f"the {form.top_k} likeliest of {form.vocabulary:,} tokens and the rest as one" if form.top_k else "all tokens"
    )
    when = f"computed in {seconds:.1f} s" if seconds else "from an earlier run"
    return (
        f"Teacher: {teacher_name(settings, base)}; of {counted(tokens, 'token')}, {kept}, in {size / max(1, tokens):,.0f} bytes each "
        f"({size / 1e6:.1f} MB on disk), {when}"
    )
