"""The reference that an objective compares the model with: each answer's log-probability under it, computed once and kept on disk; and the sums over answers that both models are compared by.

It is the model as it was before training, or --reference-adapter. So no second model is in memory, and a second run starts
immediately. An untrained adapter changes nothing, so the model with it is the base.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.qat import begin_qat, is_rounded
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, TrainSettings
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.exporters.adapter_config import own_entries
from mlx_lora.exporters.adapter_folder import (
    AdapterInfo,
    adapter_files,
    check_base,
    load_adapter,
    read_adapter_config,
    resume_file,
    start_folder,
)
from mlx_lora.kernels.choose import KernelChoice, long_row_kernels, training_kernels
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.cross_entropy import Arrays, Loss, TokenLosses, token_arrays
from mlx_lora.models.folder import model_sample
from mlx_lora.models.prefix_attention import answers_at, unshareable
from mlx_lora.objectives.base import RunContext, WholeSet
from mlx_lora.objectives.prefix_sharing import joined, sharing_problem
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, replacing_file, sha256_of
from mlx_lora.utils.progress import long_task

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.models.load import Base
    from mlx_lora.objectives.pictures import Pictures

log = logging.getLogger(__name__)


class Compared(Protocol):
    """An objective whose answers have a log-probability under a reference."""

    pictures: Any

    def sums_of(self, tokens: TokenLosses) -> Callable[[nn.Module, Batch], Any]:
        """Return what computes the sums of a batch's answers, of which `logps` are their log-probabilities."""
        ...


def row_log_probabilities(
    model: nn.Module,
    sums: Callable[[nn.Module, Batch], Any],
    rows: EncodedSet,
    batch_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
    finite: bool = True,
    strategy: Strategy = SINGLE_DEVICE,
) -> np.ndarray:
    """Return the log-probability of each answer, (A,) float32, in the order of the rows.

    Args:
        model: is put in eval mode meanwhile.
        sums: computes those of a batch's answers, without a gradient.
        rows: rows with one answer each, or joined rows with several.
        batch_tokens: the most positions of a batch.
        on_progress: called with the number of finished answers after each batch.
        finite: raise ArithmeticError if one is not finite.
        strategy: how the ranks that call this divide the batches; all get all answers.
    """
    apart = replace(rows, group=1)
    found = np.zeros((len(rows), 1 if rows.starts is None else rows.starts.shape[1]), np.float32)
    training, done = model.training, 0
    model.eval()
    plan = BatchPlan(apart, batch_tokens=batch_tokens, batch_size=None, seed=0)
    for batch in strategy.held_out(plan, -1):
        logps = np.array(sums(model, batch).logps).reshape(-1, found.shape[1])
        numbers: Any = batch.numbers  # there are some: the batch is of a set
        found[numbers[batch.real]] = logps[batch.real]
        done += logps[batch.real].size
        on_progress(min(strategy.ranks.size * done, found.size))
    found = np.array(strategy.ranks.sum(mx.array(found.ravel())))  # a rank has zeros for the others' answers
    model.train(training)
    if finite and not np.isfinite(found).all():
        bad = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ArithmeticError(f"answer {bad}: its log-probability under the reference is {found[bad]}")
    return found


def put_reference(ctx: RunContext) -> None:
    """Put the reference's adapter on the plain base: --reference-adapter, or where one is measured, the one its run began with.

    Raises:
        InputError: the adapter is gone, does not fit the base, or has parameters trained in full that would stay on it.
    """
    named, adapter, base = ctx.settings.objective.reference_adapter, ctx.settings.adapter, ctx.plain_base
    if named:
        info = _load_reference(ctx, Path(named), f"--reference-adapter {named}")
        if info.full and ctx.untrained is None:
            raise InputError(
                f"--reference-adapter {named}: trained {info.full[0]} in full, which cannot be removed from the "
                "base again; fuse it and train on the fused model"
            )
    elif start := adapter.resume_adapter_file:
        _load_reference(ctx, start_folder(start), f"the adapter that the run began with, {start}")
        log.info(f"Reference: {start}, with which the run began")
        if adapter.qat == 1:
            begin_qat(base.model)


def with_reference(
    objective: Compared,
    settings: TrainSettings,
    base: Base,
    sets: dict[str, EncodedSet],
    strategy: Strategy = SINGLE_DEVICE,
    loss: Loss | None = None,
    kernels: KernelChoice | None = None,
) -> dict[str, EncodedSet]:
    """Return the sets with each answer's log-probability under the reference.

    Args:
        objective: of the run.
        settings: of the run.
        base: the reference: the model with another adapter, or adapted but not yet trained.
        sets: pairs or rated answers.
        strategy: rank 0 computes the reference, or all in lockstep, and all get the same numbers.
        loss: the loss to compute it with, that of the run's steps; None: choose one.
        kernels: the kernels to compute it with; None: the model's own.
    """
    return {
        name: replace(rows, reference=_logps_of(objective, settings, base, rows, strategy, loss, kernels))
        for name, rows in sets.items()
    }


def _load_reference(ctx: RunContext, folder: Path, given: str) -> AdapterInfo:
    """Put the reference's adapter on the base; for an adapter of another base, the advice is not that of other commands."""
    config, base = read_adapter_config(folder), ctx.plain_base
    try:
        if not ctx.ignore_fingerprint:
            check_base(base, config, folder)
    except InputError:
        raise InputError(
            f"{given}: was trained on another base, {own_entries(config).get('base_model')}; give one of --model "
            f"{base.model_id} as --reference-adapter, or train without one to compare with the model as it is"
        ) from None
    return load_adapter(base, folder, ctx.ignore_fingerprint)


def _logps_of(
    objective: Compared,
    settings: TrainSettings,
    base: Base,
    rows: EncodedSet,
    strategy: Strategy,
    loss: Loss | None,
    kernels: KernelChoice | None,
) -> np.ndarray:
    """Return the reference's log-probabilities of rows, (R,) float32, from the cache or computed."""
    file = cache_dir("reference") / f"{_key(objective, settings, base, rows, kernels)}.npy"
    ranks, together = strategy.ranks, strategy.lockstep  # then a rank alone cannot compute
    kept = _read(file, len(rows)) if ranks.leads else None
    logps = np.zeros(len(rows), np.float32) if kept is None else kept
    if kept is not None:
        log.info(f"Reference: {len(rows):,} answers from an earlier run")
    computes = ranks.from_first(kept is None) if together else ranks.leads and kept is None
    if computes:
        start = time.perf_counter()
        with long_row_kernels(base.model) if kernels is None else training_kernels(base.model, choose=kernels):
            logps = _compute(objective, settings, base, rows, loss, strategy if together else SINGLE_DEVICE)
        log.info(f"Reference: {len(rows):,} answers computed in {time.perf_counter() - start:.2f} s")
        if ranks.leads:
            _keep(file, logps)
    return np.array(ranks.arrays_from_first({"logps": mx.array(logps)})["logps"])


def _compute(
    objective: Compared,
    settings: TrainSettings,
    base: Base,
    rows: EncodedSet,
    loss: Loss | None,
    strategy: Strategy,
) -> np.ndarray:
    answers, shares = len(rows), _shares(settings)
    if loss is None:  # before the run has chosen, and tried, its own
        loss = choose_loss(base.model, base.config, settings.loop.kernels, measure=True, strategy=strategy)
        shares = shares and not (unshareable(base.model) or sharing_problem(base.model, base.config, loss))
    if shares:
        rows = joined(rows)
    tokens = settings.loop.batch_tokens or DEFAULT_BATCH_TOKENS
    try:
        with long_task("Reference", answers, "answers") as task:
            sums = objective.sums_of(loss.measure_tokens or loss.tokens)
            return row_log_probabilities(base.model, sums, rows, tokens, task.reach, strategy=strategy)
    except ArithmeticError as error:
        raise InputError(f"the reference cannot be computed: {error}; try --dtype float32, or another base") from None


def _shares(settings: TrainSettings) -> bool:
    """Tell whether a pair's answers share a row, which the run has decided by now."""
    return settings.objective.shared_prefix == "on"


def _key(
    objective: Compared, settings: TrainSettings, base: Base, rows: EncodedSet, kernels: KernelChoice | None
) -> str:
    """Return a name for everything that the numbers depend on."""
    adapter, files = settings.adapter, []
    if settings.objective.reference_adapter:
        # Its config has the scale, and the layers that its factors belong to.
        folder = Path(settings.objective.reference_adapter)
        files = [sha256_of(file) for file in adapter_files(folder)]
    elif adapter.resume_adapter_file:
        start = resume_file(adapter.resume_adapter_file)
        files = [sha256_of(file) for file in (start, *adapter_files(start.parent))]
        files += [adapter.rank, adapter.alpha, adapter.rank_pattern, adapter.alpha_pattern]
    facts = [base.fingerprint, model_sample(base.folder), base.describe(), rows.fingerprint]
    facts += [str(device.compute_dtype(settings.model.dtype))]
    facts += [settings.loop.kernels, adapter.method, device.measured_on(), _shares(settings)]
    facts += [kernels and kernels.names(), is_rounded(base.model), *files]
    facts += [] if objective.pictures is None else objective.pictures.facts
    return sha256_of(json.dumps(facts))[:32]


def _read(file: Path, rows: int) -> np.ndarray | None:
    """Return the numbers that an earlier run stored, None if they are missing or damaged."""
    try:
        found = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (rows,) and found.dtype == np.float32 and np.isfinite(found).all() else None


def _keep(file: Path, logps: np.ndarray) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as temporary, temporary.open("wb") as out:
            np.save(out, logps)
    except OSError as error:
        log.info(f"Note: the reference is not stored for the next run, because {file.parent}: {error.strerror}")


# Sum the losses of tokens to answers, for losses of whole answers (objectives/dpo.py, objectives/ratings.py).
#
# The fused head computes the loss of each trained position and its gradient in one forward pass. Here, positions are summed
# to answers; in the backward pass, the cotangent brings the answer's weight to each position. So no objective needs logits,
# and a step takes as much memory as one of imitation.
#
# Some losses are not means over examples: a likelihood is a mean over tokens (ORPO, CPO, RPO), KTO compares each answer with
# the mean divergence of others, and AOT sorts all margins. A mean over batches of these depends on the batches. So for a
# held-out set a batch only gives the sums of its answers, a few numbers each, and the loss is computed once, at the end.
#
# Shapes: B rows of a batch, A answers (B, or B K where a row holds K), E examples, T columns, P positions; N answers of a set.


@dataclass(frozen=True)
class AnswerSums:
    """The inputs of an objective's loss; arrays are (B,) float32.

    Attributes:
        logps: summed log-probability of each row's answer under the policy; of a reward model, its score.
        tokens: number of the answer's tokens.
        likelihood: negative log-likelihood of each row's trained tokens, weighted so that its sum over a step's rows,
            divided by the step's examples, is the mean over tokens.
        reference: the answer's log-probability under the reference, 0 without one.
        labels: from the data: the margin that a pair should have, or 1 for a good answer and 0 for a bad one.
        real: 1 for a row, 0 for padding.
        divergence: scalar: the mean log-ratio of policy to reference, on other answers (KTO); no gradient goes through it.
    """

    logps: mx.array
    tokens: mx.array
    likelihood: mx.array
    reference: mx.array
    labels: mx.array
    real: mx.array
    divergence: mx.array

    def side(self, number: int, group: int = 2) -> AnswerSums:
        """Return the sums of each example's row `number`, (E,)."""
        names = ("logps", "tokens", "likelihood", "reference", "labels", "real")
        return replace(self, **{name: getattr(self, name)[number::group] for name in names})


LossOfAnswers = Callable[[AnswerSums], tuple[mx.array, dict[str, mx.array]]]
"""AnswerSums -> ((E,) losses, name -> (E,) numbers to report as means)."""


class LossIsOfAnswers(Protocol):
    """What is needed of an objective here; see `Preference` of objectives/dpo.py."""

    loss: LossOfAnswers
    likelihood: str
    divergence: bool

    @property
    def rated(self) -> bool:
        """Whether an example is one rated answer, with a second row that only tells the divergence."""
        ...


# Binding

FIRST, SECOND = 0, 1  # rows of an example
BatchSums = Callable[[nn.Module, "Batch"], AnswerSums]
"""Computes the sums of a batch's answers under a model, outside of a compiled step."""


def batch_sums(tokens: TokenLosses, pictures: Pictures | None = None) -> BatchSums:
    """Return what computes the sums of a batch's answers, from the losses of tokens, outside of a step."""

    def sums(model: nn.Module, batch: Batch) -> AnswerSums:
        with nullcontext() if pictures is None else pictures.shown(model, batch):
            return array_sums(model, tokens, arrays_of(batch))

    return sums


def prepared(
    objective: LossIsOfAnswers, sums: BatchSums, model: nn.Module, batches: list[Batch], strategy: Strategy
) -> list[Batch]:
    """Compute what depends on the whole step, before the step is divided into parts and among ranks.

    These are the factor that makes the likelihood a mean over the step's tokens, and the divergence, for which rated
    answers have a second row. All ranks get the same numbers.
    """
    share = divergence = 0.0
    if objective.likelihood != "none":
        examples = sum(b.examples for b in batches)
        tokens = sum(b.first_targets for b in batches)
        share = examples / max(1, tokens)
    if objective.divergence:
        others = (_only(batch, SECOND) for batch in batches)
        divergence = mean_log_ratio(model, sums, others, strategy)
    if objective.rated:
        batches = [_only(batch, FIRST) for batch in batches]
    return [
        batch.with_columns(shares=np.full((len(batch.inputs), 2), (share, divergence), np.float32)) for batch in batches
    ]


def _only(batch: Batch, row: int) -> Batch:
    """Return a batch of each example's row `row` alone."""
    rows = np.arange(row, len(batch.inputs), batch.group)
    # Keep the whole batch's number of slots: the number that this row's targets need differs from epoch to epoch.
    slots = min(batch.slots, batch.mask[rows].size)
    return replace(batch.take(rows, slots), group=1)


def mean_log_ratio(
    model: nn.Module, sums_of: BatchSums, batches: Iterable[Batch], strategy: Strategy = SINGLE_DEVICE
) -> float:
    """Return the mean log-ratio of policy to reference over rows, at least 0 (KTO's estimate of the divergence)."""
    total, count = mx.array(0.0), mx.array(0.0)
    training = model.training
    model.eval()
    for batch in strategy.dealt(list(batches)):
        sums = sums_of(model, batch)
        total = total + ((sums.logps - sums.reference) * sums.real).sum()
        count = count + sums.real.sum()
        mx.eval(total, count)
    total, count = strategy.ranks.sum(mx.stack([total, count]))
    model.train(training)
    return max(0.0, total.item() / count.item()) if count.item() else 0.0


# Sums of answers


def arrays_of(batch: Batch) -> Arrays:
    """Copy a batch of answers to the device.

    Returns:
        In addition to `token_arrays`: `answers` (P,) float32, 1 where a position belongs to an answer; `labels`, `reference`,
        `real` (A,) float32, see `AnswerSums`; `shares` (2,) float32, the factor on the likelihood and the divergence.
    """
    answers, columns = batch.weights, batch.columns
    if "answers" in columns:
        answers = columns["answers"].ravel()[batch.positions] * batch.weights
    real = np.repeat(batch.real, batch.answers_per_row).astype(np.float32)
    none = np.zeros_like(real)
    own = {
        "answers": answers.astype(np.float32),
        "labels": columns.get("labels", none).ravel(),
        "reference": columns.get("reference", none).ravel(),
        "real": real,
        "shares": columns["shares"][0] if "shares" in columns else np.zeros(2, np.float32),
    }
    return token_arrays(batch) | {name: mx.array(values) for name, values in own.items()}


def answer_sums(losses: mx.array, arrays: Arrays) -> AnswerSums:
    """Sum the losses of positions, (P,), to answers, (A,)."""
    own = answers_at(arrays)[None, :] == mx.arange(len(arrays["real"]))[:, None]  # (A, P)

    def by_answer(values: mx.array) -> mx.array:
        return mx.where(own, values[None, :], 0.0).sum(axis=1)

    logps, tokens = by_answer(-losses * arrays["answers"]), by_answer(arrays["answers"])
    share, divergence = arrays["shares"]
    likelihood = by_answer(losses * arrays["weights"]) * share
    return AnswerSums(
        logps, tokens, likelihood, arrays["reference"], arrays["labels"], arrays["real"], mx.stop_gradient(divergence)
    )


def array_sums(model: nn.Module, tokens: TokenLosses, arrays: Arrays) -> AnswerSums:
    """Return the sums of a batch that `arrays_of` put on the device."""
    return answer_sums(tokens(model, arrays), arrays)


# Whole sets

SUM_NAMES = ("logps", "tokens", "likelihood", "reference", "labels", "real")
UNWEIGHTED = (1.0, 0.0)  # the column `shares` of sums whose likelihood is not yet divided by tokens


def whole_set(objective: LossIsOfAnswers, tokens: TokenLosses) -> WholeSet:
    """Return how an objective is measured on a whole set, whose answers give a few numbers each.

    Args:
        objective: of pairs or rated answers.
        tokens: the losses of tokens.
    """

    def compute(model: nn.Module, arrays: Arrays) -> mx.array:
        sums = array_sums(model, tokens, arrays | {"shares": mx.array(UNWEIGHTED)})
        return mx.stack([getattr(sums, name) for name in SUM_NAMES])  # (6, A)

    def examples(found: np.ndarray, batch: Batch, arrays: Arrays) -> np.ndarray:
        rows = found[:, found[-1] > 0].T.reshape(-1, 2, len(SUM_NAMES))  # both answers of an example, without padding
        targets = np.zeros((*rows.shape[:2], 1), np.float32)
        targets[:1, 0] = batch.first_targets  # of the whole batch
        return np.concatenate([rows, targets], axis=2)

    def measured(rows: np.ndarray) -> tuple[float, dict[str, float]]:
        found = rows.reshape(-1, rows.shape[-1]).T
        named = dict(zip(SUM_NAMES, found, strict=False))
        divergence = 0.0
        if objective.divergence:
            ratios = (named["logps"] - named["reference"])[SECOND::2]
            divergence = max(0.0, float(ratios.mean(dtype=np.float64)))
        share = len(rows) / max(1, int(found[-1].sum(dtype=np.float64)))
        named["likelihood"] = named["likelihood"] * np.float32(share)
        sums = AnswerSums(**{name: mx.array(values) for name, values in named.items()}, divergence=mx.array(divergence))
        losses, reports = objective.loss(sums.side(FIRST) if objective.rated else sums)
        return _mean(losses), {name: _mean(values) for name, values in reports.items()}

    return WholeSet(compute, examples, measured)


def _mean(values: mx.array) -> float:
    return float(np.array(values).mean(dtype=np.float64))
