"""Preference objectives: pairs of a chosen and a rejected answer (DPO, ORPO, SimPO, CPO), rated answers (KTO), reward models.

The loss is computed from the summed log-probability of each answer (losses/preference.py), which for a reward model is the
score of its last token. A pair's answers may share their prompt (objectives/prefix_sharing.py). The reference is the model as it
was before training, or --reference-adapter: each answer's log-probability under it is computed once, before the first step, and
stored on disk. So no second model is in memory, and a second run starts
immediately. An untrained adapter changes nothing, so the model with it is the base.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.inject import remove_adapters
from mlx_lora.adapters.qat import begin_qat, is_rounded
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, TrainSettings
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
from mlx_lora.kernels.long_rows import long_row_kernels
from mlx_lora.kernels.table import KernelChoice, training_kernels
from mlx_lora.losses import preference as pair_losses
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.preference import (
    PAIR_LOSSES,
    RATED_LOSSES,
    PairLoss,
    PairOptions,
    Pairs,
    RatedOptions,
    Ratings,
    bradley_terry,
    preferred,
)
from mlx_lora.models.folder import model_sample
from mlx_lora.models.prefix_attention import unshareable
from mlx_lora.objectives.answers import BatchSums, batch_sums, bind_answers, row_log_probabilities
from mlx_lora.objectives.base import AnswerSums, BoundObjective, Objective, RunContext
from mlx_lora.objectives.prefix_sharing import Layout, joined, lay_out, sharing_problem
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, replacing_file, sha256_of
from mlx_lora.utils.progress import long_task
from mlx_lora.utils.text import unknown_name

if TYPE_CHECKING:
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.load import DataSplits
    from mlx_lora.data.sampler import BatchPlan
    from mlx_lora.losses.cross_entropy import Loss, TokenLosses
    from mlx_lora.models.load import Base
    from mlx_lora.planner.shapes import ModelShape

log = logging.getLogger(__name__)

REWARD_REPORTS: tuple[str, ...] = ("accuracy", "margin", "chosen_rewards", "rejected_rewards")
PAIR_REPORTS = (*REWARD_REPORTS, "chosen_logps", "rejected_logps")
RATED_REPORTS = ("rewards_good", "rewards_bad", "good", "divergence")
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # the losses of DPO's family that use --label-smoothing
SORTING = ("aot", "aot_unpaired")  # those of a pair whose loss depends on the other pairs of its batch


@dataclass(eq=False)
class Preference(Objective):
    """An objective whose loss is of whole answers that the data have."""

    layout: Layout = field(default_factory=Layout)

    @property
    def shares_prompts(self) -> bool:
        return self.records == "pairs"

    def compare(self, ctx: RunContext, sets: dict[str, EncodedSet]) -> dict[str, EncodedSet]:
        if not self.reference or (ctx.trains and not ctx.settings.objective.reference_adapter):
            return sets  # the untrained model is the reference, which a run computes in batches that fit
        put_reference(ctx)
        found = with_reference(self, ctx.settings, ctx.plain_base, sets, ctx.strategy)
        remove_adapters(ctx.plain_base.model)
        return found

    def lay_out(self, ctx: RunContext, rows: EncodedSet) -> None:
        self.layout = lay_out(ctx, self, rows)

    def settled(self, settings: TrainSettings) -> TrainSettings:
        return self.layout.settled(settings)

    def arrange(self, data: DataSplits) -> DataSplits:
        return self.layout.of(data)

    def after_fit(self, ctx: RunContext, data: DataSplits, shape: ModelShape) -> DataSplits:
        ctx.record.identity |= self.layout.identity
        if not self.reference or data.train.reference is not None:
            return data
        of = ctx.chosen.loss, ctx.chosen.kernels  # in batches that fit, so that its peak is below a step's
        return data.changed(lambda sets: with_reference(self, ctx.settings, ctx.base, sets, ctx.strategy, *of))

    def header_words(self, plan: BatchPlan, ctx: RunContext) -> list[str]:
        return [self.layout.words]

    def bind(self, loss: Loss, model: nn.Module) -> BoundObjective:
        return bind_answers(self, loss, model, self.sums_of)

    def sums_of(self, tokens: TokenLosses) -> BatchSums:
        """Return what computes the sums of a batch's answers, from the losses of tokens."""
        return batch_sums(tokens)

    @property
    def reference_facts(self) -> list[Any]:
        """What the reference's numbers depend on besides model, tokens and settings, as JSON values."""
        return []


def dpo(settings: ObjectiveSettings) -> Preference:
    names = _names(settings.loss_type, PAIR_LOSSES)
    weights = _weights(settings.loss_weights, names)
    smoothed = [name for name in names if name in SMOOTHED]
    if settings.label_smoothing and not smoothed:
        raise InputError(
            f"--label-smoothing with --loss-type {settings.loss_type}: only {', '.join(SMOOTHED)} use it; leave it out"
        )
    if settings.discopop_tau != ObjectiveSettings.discopop_tau and "discopop" not in names:
        raise InputError(f"--discopop-tau with --loss-type {settings.loss_type}: only discopop uses it; leave it out")
    if "exo_pair" in names and not settings.label_smoothing:
        raise InputError("--loss-type exo_pair requires --label-smoothing above 0 (the paper uses 0.001)")
    parts = [(weight, PAIR_LOSSES[name]) for name, weight in zip(names, weights, strict=True)]
    words = " + ".join(
        name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(names, weights, strict=True)
    )
    likelihood = "answers" if "sft" in names else "none"
    objective = _pairwise("dpo", settings, words, parts, reference=True, likelihood=likelihood)
    objective.sorts = " and ".join(name for name in names if name in SORTING)
    return objective


def orpo(settings: ObjectiveSettings) -> Preference:
    parts = [(1.0, pair_losses.odds_ratio), (1.0, pair_losses.sft)]
    return _pairwise("orpo", settings, "odds ratio and likelihood", parts, likelihood="rows", per_token=True)


def simpo(settings: ObjectiveSettings) -> Preference:
    return _pairwise("simpo", settings, f"margin {settings.simpo_gamma:g}", [(1.0, pair_losses.simpo)], per_token=True)


def cpo(settings: ObjectiveSettings) -> Preference:
    parts = [(1.0, pair_losses.cpo)] + ([(settings.cpo_alpha, pair_losses.sft)] if settings.cpo_alpha else [])
    words = f"likelihood weight {settings.cpo_alpha:g}"
    return _pairwise("cpo", settings, words, parts, likelihood="answers" if settings.cpo_alpha else "none")


def kto(settings: ObjectiveSettings) -> Preference:
    name, *others = _names("kto" if settings.loss_type == "sigmoid" else settings.loss_type, RATED_LOSSES)
    if others:
        raise InputError(
            f"--loss-type {settings.loss_type}: --objective kto has one loss; give {' or '.join(RATED_LOSSES)}"
        )
    options = RatedOptions(settings.beta, settings.desirable_weight, settings.undesirable_weight)
    function = RATED_LOSSES[name]

    def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
        ratings = Ratings(sums.logps - sums.reference, sums.labels, sums.divergence)
        rewards = options.beta * ratings.ratio
        divergence = mx.broadcast_to(sums.divergence, rewards.shape)
        reports = (rewards * sums.labels, rewards * (1 - sums.labels), sums.labels, divergence)
        return function(ratings, options), dict(zip(RATED_REPORTS, reports, strict=True))

    words = f"kto: {name}, beta {settings.beta:g}"
    return Preference(
        "kto", "rated", words, loss, True, divergence=name == "kto", reports=RATED_REPORTS, finish=_rated_means
    )


def _rated_means(means: dict[str, float]) -> dict[str, float]:
    """Convert means over all answers to the mean reward of the good answers and of the bad ones; NaN without any."""
    good = means["good"]
    chosen = means["rewards_good"] / good if good else math.nan
    rejected = means["rewards_bad"] / (1 - good) if good < 1 else math.nan
    return {
        "margin": chosen - rejected,
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
        "divergence": means["divergence"],
    }


def reward(settings: ObjectiveSettings) -> Preference:
    center = settings.center_rewards

    def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
        chosen, rejected = sums.side(0), sums.side(1)
        good, bad = chosen.logps, rejected.logps
        reports = (preferred(good, bad, mx.abs(good) + mx.abs(bad)), good - bad, good, bad)
        named = dict(zip(REWARD_REPORTS, reports, strict=True))
        return bradley_terry(good, bad, chosen.labels, center), named

    words = "reward: Bradley-Terry" + (f", centered with weight {center:g}" if center else "")
    return Preference("reward", "pairs", words, loss, scores=True, reports=REWARD_REPORTS)


def _pairwise(
    name: str,
    settings: ObjectiveSettings,
    words: str,
    parts: list[tuple[float, PairLoss]],
    reference: bool = False,
    likelihood: str = "none",
    per_token: bool = False,
) -> Preference:
    """Return an objective whose loss is a weighted sum of pairwise losses; with `per_token`, rewards are means per token."""
    options = PairOptions(settings.beta, settings.label_smoothing, settings.simpo_gamma, settings.discopop_tau)

    def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
        chosen, rejected = sums.side(0), sums.side(1)
        pairs = Pairs(
            chosen.logps, rejected.logps, chosen.reference, rejected.reference, chosen.tokens, rejected.tokens,
            chosen.likelihood, chosen.real,
        )  # fmt: skip
        losses = [weight * function(pairs, options) for weight, function in parts]
        of_good, of_bad = (
            options.beta / (mx.maximum(tokens, 1) if per_token else 1)
            for tokens in (pairs.chosen_tokens, pairs.rejected_tokens)
        )
        good, bad = of_good * pairs.chosen_ratio, of_bad * pairs.rejected_ratio
        magnitude = of_good * (mx.abs(pairs.chosen) + mx.abs(pairs.reference_chosen))
        magnitude += of_bad * (mx.abs(pairs.rejected) + mx.abs(pairs.reference_rejected))
        reports = (preferred(good, bad, magnitude), good - bad, good, bad, pairs.chosen, pairs.rejected)
        named = {name: report.astype(mx.float32) for name, report in zip(PAIR_REPORTS, reports, strict=True)}
        return sum(losses[1:], losses[0]), named

    description = f"{name}: {words}, beta {settings.beta:g}"
    return Preference(name, "pairs", description, loss, reference, likelihood, reports=PAIR_REPORTS)


def _names(text: str, known: dict) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(f"--loss-type {name!r}: {unknown_name(name, known)}")
    if not names:
        raise InputError(f"--loss-type is empty; give one of {', '.join(known)}")
    return names


def _weights(text: str | None, names: list[str]) -> list[float]:
    if text is None:
        return [1.0] * len(names)
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--loss-weights {text!r}: write numbers separated by commas, as in 0.8,0.2") from None
    if len(weights) != len(names) or not all(0 <= weight < 1e6 for weight in weights):
        raise InputError(f"--loss-weights {text!r}: give {len(names)} numbers of at least 0, one for each --loss-type")
    return weights


# The reference: each answer's log-probability under the untrained or another adapter


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
    objective: Preference,
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
    objective: Preference,
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
    objective: Preference,
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
    objective: Preference, settings: TrainSettings, base: Base, rows: EncodedSet, kernels: KernelChoice | None
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
    facts += [kernels and kernels.names(), is_rounded(base.model), *files, *objective.reference_facts]
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
