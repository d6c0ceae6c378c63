"""Distill from a teacher: what it says about each trained token, and the loss of answers that the student samples itself.

For data with answers, the teacher's records are computed once, before the first step:

    <cache>/teacher/<key>/     the records of one set's rows (data/teacher_table.py, data/teacher_table.py)

The key covers everything that decides the bytes: the rows, as the student and as the teacher sees them, the teacher, how
much of its distribution is kept, the temperature, the dtype, the device. So a second run starts at once; rows whose records
are missing or damaged are computed again, in the same batches as before, which gives the same bytes. The teacher is only
loaded if rows are missing, and freed before the student is adapted.

For the student's own answers (--on-policy), the teacher stays in memory:

    --divergence forward_kl | reverse_kl | jsd    the teacher's likeliest tokens at each sampled position, compared with the
                                                  student's distribution there (GKD with lambda 1, arXiv 2306.13649); the
                                                  gradient goes through the whole distribution
    --divergence sampled_kl                       the teacher's log-probability of the sampled token alone, as the advantage
                                                  of a policy gradient (losses/divergence.py)

It is asked right after a rollout, and its numbers stay with the batch, so that further updates on the same answers do not
ask again. No gradient goes through the choice of the tokens.

Shapes: B rows, T columns, P positions, N bins, k likeliest tokens, V vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, TrainSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.data.teacher_table import MOST_KEPT_BYTES, RowStore, TableFormat, TeacherTable, evict, used_bytes
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.cross_entropy import Arrays, Loss, LossFunction
from mlx_lora.losses.divergence import (
    KL,
    SAMPLED_KL,
    DivergenceOptions,
    distill_loss,
    head_of,
    known_of_batch,
    sampled_kl,
)
from mlx_lora.models.head import Head
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.objectives.policy_task import LENGTHS, OLD, TRUNCATED
from mlx_lora.objectives.table import objective_of
from mlx_lora.objectives.teacher import Teacher, TeacherFacts, as_seen, facts_of, load_teacher
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.rollouts.sharing import of_own_rows
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.files import cache_dir, free_on_disk, sha256_of
from mlx_lora.utils.progress import long_task
from mlx_lora.utils.text import counted, gigabytes

# Before the run

TEACHER = "teacher"  # in a checkpoint's identity, and the folder in the cache
FORMAT = 1  # part of the key: raise it if the same teacher would give other bytes
SENT_BYTES = 16 << 20  # at a time, to ranks on other machines


@dataclass(frozen=True)
class Taught:
    """What is known of a run's teacher.

    Attributes:
        sets: name -> rows, with what the teacher says about them.
        words: a line for the run header; empty without a teacher.
        identity: what a resumed run must have in common with its checkpoint.
        scorer: the teacher in memory, which scores sampled answers; None: what it says is on disk.
    """

    sets: dict[str, EncodedSet]
    words: str = ""
    identity: dict[str, Any] = field(default_factory=dict)
    scorer: Scorer | None = None


def with_teacher(
    settings: TrainSettings,
    base: Base,
    sets: dict[str, EncodedSet],
    ranks: Ranks = ALONE,
) -> Taught:
    """Return the sets with what the teacher says about each trained token; about sampled ones, the teacher itself.

    Args:
        settings: of the run.
        base: of the student, not yet adapted: without --teacher, it is the teacher. Their tokenizers have been compared.
        sets: examples or prompts, with `teacher` rows if the teacher sees a prompt of its own.
        ranks: rank 0 computes, and all ranks get the same bytes.

    Raises:
        InputError: the teacher cannot be used, or there is no room on the disk.
        RunError: its probabilities could not be written.
    """
    objective = objective_of(settings.objective)
    options = objective.distills
    if options is None:
        return Taught(sets)
    if objective.samples:
        return _in_memory(settings, base, sets, options, ranks)
    facts = facts_of(settings, base)
    form = TableFormat.of(facts.vocabulary, options.top_k)
    key = ranks.from_first(_key(settings, facts, form))
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
                _compute_missing(settings, base, sets, stores, left, form)
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


def _in_memory(
    settings: TrainSettings, base: Base, sets: dict[str, EncodedSet], options: DivergenceOptions, ranks: Ranks
) -> Taught:
    """Return the teacher of answers that are sampled during the run."""
    facts, teacher = facts_of(settings, base), Teacher.of(settings, base)
    seen = [rows.teacher or rows for rows in sets.values()]
    highest = max((int(rows.tokens.max(initial=0)) for rows in seen), default=0)
    check_token_ids(teacher.base, highest, f"--teacher {teacher.base.model_id}")
    key = ranks.from_first(_key(settings, facts, TableFormat.of(facts.vocabulary, options.top_k)))
    held = (
        f"{gigabytes(teacher.base.size_bytes)} beside the student"
        if settings.objective.teacher
        else "no copy of weights"
    )
    words = f"Teacher: {_name(settings, base)}; stays in memory ({held}) and scores each sampled token"
    return Taught(sets, words, {TEACHER: key}, Scorer.of(teacher, options, facts.vocabulary))


def _key(settings: TrainSettings, facts: TeacherFacts, form: TableFormat) -> str:
    """Return a name for everything that the records depend on, except the rows."""
    parts = [FORMAT, facts.identity, form.vocabulary, form.top_k, settings.objective.distill_temp]
    parts += [str(device.compute_dtype(settings.model.dtype)), settings.loop.kernels, device.measured_on()]
    return sha256_of(json.dumps(parts))[:32]


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
) -> None:
    """Load the teacher, compute the records of the rows that are left, write them, and let the teacher go."""
    teacher = load_teacher(settings, base)
    model, options = teacher.model, objective_of(settings.objective).distills
    loss = choose_loss(model, teacher.config, settings.loop.kernels)
    head, done = head_of(loss, model, teacher.config), 0
    model.eval()
    if options is None:
        raise ValueError("an objective without a teacher")
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
    del teacher, model, head, loss
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
        f"Teacher: {_name(settings, base)}; of {counted(tokens, 'token')}, {kept}, in {size / max(1, tokens):,.0f} bytes each "
        f"({size / 1e6:.1f} MB on disk), {when}"
    )


def _name(settings: TrainSettings, base: Base) -> str:
    """Return the teacher's name for the run header, and whether it sees a prompt of its own."""
    objective = settings.objective
    name = objective.teacher or f"{base.model_id} as it is"
    return f"{name}, with a prompt of its own" if objective.teacher_prompt else name


# The student's own answers

# What a batch of sampled answers has of the teacher: (B, T) of each target, or (B, T, N) and (B, T, k).
LOGP, BINS, IDS = "teacher_logp", "teacher_bins", "teacher_ids"
FACTS = slice(5, 8)  # of the arrays of a batch: after `Arrays`


@dataclass(frozen=True)
class Scorer:
    """A teacher that scores sampled answers.

    Attributes:
        teacher: its model.
        options: what is compared, and of how many tokens, which both models have.
        vocabulary: their number.
        head: of its model; None: its own logits are used.
    """

    teacher: Teacher
    options: DivergenceOptions
    vocabulary: int
    head: Head | None

    @classmethod
    def of(cls, teacher: Teacher, options: DivergenceOptions, vocabulary: int) -> Scorer:
        """Return it for a number of tokens that teacher and student have."""
        head = head_of(teacher.loss, teacher.base.model, teacher.base.config)
        return cls(teacher, replace(options, vocabulary=vocabulary), vocabulary, head)

    @property
    def uses_old(self) -> bool:
        """Whether further updates need the probabilities with which the answers were sampled."""
        return self.options.divergence == SAMPLED_KL

    @property
    def bins(self) -> tuple[int, int]:
        """The numbers N and k of one position; k is 0 if every token is known, or the sampled one alone."""
        top_k = self.options.top_k
        if self.uses_old:
            return 1, 0
        return (top_k + 1, top_k) if 0 < top_k < self.vocabulary - 1 else (self.vocabulary, 0)

    def scored(self, batch: Batch, rows: EncodedSet, own: np.ndarray, ranks: Ranks) -> Batch:
        """Return a batch of sampled answers with what the teacher says about them.

        Args:
            batch: with answers.
            rows: the set that its row numbers are of.
            own: the rows that this rank asks about.
            ranks: that ask about the others.

        Raises:
            RunError: the student sampled a token that the teacher does not have, or the teacher's answer is not finite.
        """
        self._check(batch)
        bins, top_k = self.bins

        def ask(part: Batch) -> np.ndarray:
            return self.teacher.logps(part, rows)[..., None] if self.uses_old else self._distributions(part, rows)

        found = of_own_rows(ask, batch, own, ranks, (bins + top_k,))
        if not np.isfinite(found).all():
            raise RunError("the teacher's probabilities are not finite; try --dtype float32, or another teacher")
        sampled = dict(batch.sampled or {})
        sampled[LOGP if self.uses_old else BINS] = found[..., 0] if self.uses_old else found[..., :bins]
        if top_k:
            sampled[IDS] = found[..., bins:].astype(np.int32)
        return replace(batch, sampled=sampled)

    def _check(self, batch: Batch) -> None:
        """Refuse a sampled token that the teacher's embedding has no row for: MLX would read memory beyond it."""
        rows, highest = self.teacher.base.token_rows, int(batch.targets[batch.mask].max(initial=0))
        if rows is not None and highest >= rows:
            raise RunError(
                f"the model sampled token {highest}, and the teacher only has {rows} tokens; give a teacher with as many as "
                "the student, or --min-p 0.01"
            )

    def _distributions(self, batch: Batch, rows: EncodedSet) -> np.ndarray:
        """Return the log-probabilities and the ids that they are of at each trained target, (B, T, N + k) float32.

        An id is exact as a float32: there are fewer than 2^24.
        """
        seen = batch if rows.teacher is None else as_seen(batch, rows)
        parts = []
        for known in known_of_batch(self.teacher.base.model, self.head, seen, self.options):
            columns = [known.logps] if known.ids is None else [known.logps, known.ids.astype(mx.float32)]
            parts.append(np.array(mx.concatenate(columns, axis=-1)))
        found = np.zeros((*batch.mask.shape, sum(self.bins)), np.float32)
        if parts:
            found[batch.mask] = np.concatenate(parts)
        return found


class AnswerFacts(NamedTuple):
    """What is reported of the answers of a batch, on the device.

    Attributes:
        lengths, truncated, real: (B,) float32.
    """

    lengths: mx.array
    truncated: mx.array
    real: mx.array

    def sums(self) -> dict[str, mx.array]:
        """Return sums over real answers, by the names of reports."""
        return {
            "length": (self.lengths * self.real).sum(),
            "truncated": (self.truncated * self.real).sum(),
            "answers": self.real.sum(),
        }


def taught_arrays(batch: Batch) -> tuple[mx.array, ...]:
    """Copy a batch of sampled answers with what a teacher says about them to the device.

    Returns:
        `Arrays`, `AnswerFacts`; then the teacher's log-probability of each position, that of the student as it sampled it
        (P,) and whether that is the student's own (1,); or the teacher's bins (P, N) and, unless it has all tokens, their
        ids (P, k).
    """
    sampled = batch.sampled
    if sampled is None:
        raise ValueError("a batch without sampled answers")

    def at_positions(name: str) -> mx.array:
        values = sampled[name]
        return mx.array(values.reshape(-1, *values.shape[2:])[batch.positions])

    facts = [mx.array(sampled[name]) for name in (LENGTHS, TRUNCATED)]
    both = (*Arrays.of(batch), *facts, mx.array(batch.real.astype(np.float32)))
    if LOGP not in sampled:
        return (*both, *(at_positions(name) for name in (BINS, IDS) if name in sampled))
    teacher, is_own = at_positions(LOGP), OLD not in sampled
    return (*both, teacher, mx.zeros_like(teacher) if is_own else at_positions(OLD), mx.array([float(is_own)]))


def taught_loss(loss: Loss, model: nn.Module, config: dict[str, Any], options: DivergenceOptions, words: str) -> Loss:
    """Return the loss of sampled answers that a teacher scored; a mean over tokens.

    Args:
        loss: of tokens, at the temperature of distillation.
        model, config: the model and its config.json.
        options: what is compared.
        words: on the objective, for the run header.
    """
    if options.divergence == SAMPLED_KL:
        measure = _sampled(loss.measure_tokens or loss.tokens)
        return replace(loss, train=_sampled(loss.tokens), measure=measure, description=f"{words}; {loss.description}")
    whole = distill_loss(loss, model, config, options, None, words)
    return replace(whole, train=_compared(whole.train), measure=_compared(whole.measure))


def _compared(of_tokens: LossFunction) -> LossFunction:
    """Return a loss of distributions that also reports facts about answers."""

    def summed(model: nn.Module, *batch: mx.array) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        total, count, reports = of_tokens(model, *batch[: FACTS.start], *batch[FACTS.stop :])
        return total, count, reports | AnswerFacts(*batch[FACTS]).sums()

    return summed


def _sampled(tokens: Callable[..., mx.array]) -> LossFunction:
    """Return the loss of the sampled tokens' log-probabilities, from the losses of tokens."""

    def summed(model: nn.Module, *batch: mx.array) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        arrays, (teacher, old, is_own) = Arrays(*batch[:5]), batch[FACTS.stop :]
        logps = -tokens(model, *arrays)  # (P,)
        losses = sampled_kl(logps, mx.where(is_own > 0, mx.stop_gradient(logps), old), teacher)
        real = arrays.weights > 0
        kl = mx.where(real, mx.stop_gradient(logps) - teacher, 0.0).sum()
        return mx.where(real, losses, 0.0).sum(), arrays.weights.sum(), {KL: kl} | AnswerFacts(*batch[FACTS]).sums()

    return summed
