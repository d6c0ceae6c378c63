"""Compute the reference of preference training: each answer's log-probability under the untrained or another adapter.

It is computed once, before the first step, and stored on disk. So no second model is in memory, and a second run starts
immediately. An untrained adapter changes nothing, so the model with it is the base.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_lora.adapters.inject import remove_adapters
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, TrainSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.exporters.adapter_config import own_entries
from mlx_lora.exporters.adapter_folder import (
    AdapterInfo,
    adapter_files,
    check_base,
    load_adapter,
    read_adapter_config,
    resume_file,
)
from mlx_lora.kernels.table import KernelChoice, training_kernels
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.cross_entropy import Loss
from mlx_lora.models.folder import model_sample
from mlx_lora.models.load import Base
from mlx_lora.models.prefix_attention import unshareable
from mlx_lora.objectives.answers import row_log_probabilities
from mlx_lora.objectives.prefix_sharing import joined, sharing_problem
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, replacing_file, sha256_of
from mlx_lora.utils.progress import long_task

log = logging.getLogger(__name__)


def with_reference(
    settings: TrainSettings,
    base: Base,
    sets: dict[str, EncodedSet],
    strategy: Strategy = SINGLE_DEVICE,
    loss: Loss | None = None,
    kernels: KernelChoice | None = None,
) -> dict[str, EncodedSet]:
    """Return the sets with each answer's log-probability under the reference.

    Args:
        settings: of the run; with --reference-adapter, that adapter is the reference instead of the untrained model.
        base: not yet adapted if there is a --reference-adapter, otherwise adapted but not yet trained.
        sets: pairs or rated answers.
        strategy: rank 0 computes the reference, or all in lockstep, and all get the same numbers.
        loss: the loss to compute it with, that of the run's steps; None: choose one.
        kernels: the kernels to compute it with; None: the model's own.

    Raises:
        InputError: the reference adapter does not fit the base, or has parameters trained in full.
    """
    folder = settings.objective.reference_adapter
    if folder:
        info = _put_reference(base, Path(folder))
        if info.full:
            raise InputError(
                f"--reference-adapter {folder}: trained {info.full[0]} in full, which cannot be removed from the "
                "base again; fuse it and train on the fused model"
            )
    found = {
        name: replace(rows, reference=_logps_of(settings, base, rows, strategy, loss, kernels))
        for name, rows in sets.items()
    }
    if folder:
        remove_adapters(base.model)
    return found


def _put_reference(base: Base, folder: Path) -> AdapterInfo:
    """Put the reference's adapter on the base; for an adapter of another base, the advice is not that of other commands."""
    config = read_adapter_config(folder)
    try:
        check_base(base, config, folder)
    except InputError:
        raise InputError(
            f"--reference-adapter {folder}: was trained on another base, {own_entries(config).get('base_model')}; "
            f"give an adapter of --model {base.model_id}, or leave it out to compare with the model as it is"
        ) from None
    return load_adapter(base, folder)


def _logps_of(
    settings: TrainSettings,
    base: Base,
    rows: EncodedSet,
    strategy: Strategy,
    loss: Loss | None,
    kernels: KernelChoice | None,
) -> np.ndarray:
    """Return the reference's log-probabilities of rows, (R,) float32, from the cache or computed."""
    file = cache_dir("reference") / f"{_key(settings, base, rows, kernels)}.npy"
    ranks, together = strategy.ranks, strategy.lockstep  # then a rank alone cannot compute
    kept = _read(file, len(rows)) if ranks.leads else None
    logps = np.zeros(len(rows), np.float32) if kept is None else kept
    if kept is not None:
        log.info(f"Reference: {len(rows):,} answers from an earlier run")
    computes = ranks.from_first(kept is None) if together else ranks.leads and kept is None
    if computes:
        start = time.perf_counter()
        with nullcontext() if kernels is None else training_kernels(base.model, choose=kernels):
            logps = _compute(settings, base, rows, loss, strategy if together else SINGLE_DEVICE)
        log.info(f"Reference: {len(rows):,} answers computed in {time.perf_counter() - start:.2f} s")
        if ranks.leads:
            _keep(file, logps)
    return np.array(ranks.arrays_from_first({"logps": mx.array(logps)})["logps"])


def _compute(
    settings: TrainSettings, base: Base, rows: EncodedSet, loss: Loss | None, strategy: Strategy
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
            of_tokens = loss.measure_tokens or loss.tokens
            return row_log_probabilities(base.model, of_tokens, rows, tokens, task.reach, strategy=strategy)
    except ArithmeticError as error:
        raise InputError(f"the reference cannot be computed: {error}; try --dtype float32, or another base") from None


def _shares(settings: TrainSettings) -> bool:
    """Tell whether a pair's answers share a row, which the run has decided by now."""
    return settings.objective.shared_prefix == "on"


def _key(settings: TrainSettings, base: Base, rows: EncodedSet, kernels: KernelChoice | None) -> str:
    """Return a name for everything that the numbers depend on."""
    adapter, files = settings.adapter, []
    if settings.objective.reference_adapter:
        # Its config has the scale, and the layers that its factors belong to.
        folder = Path(settings.objective.reference_adapter)
        files = [sha256_of(file) for file in adapter_files(folder)]
    elif adapter.resume_adapter_file:
        start = resume_file(adapter.resume_adapter_file)
        files = [sha256_of(file) for file in (start, *adapter_files(start.parent))] + [adapter.rank, adapter.alpha]
    facts = [base.fingerprint, model_sample(base.folder), base.describe(), rows.fingerprint]
    facts += [str(device.compute_dtype(settings.model.dtype))]
    facts += [settings.loop.kernels, adapter.method, device.measured_on(), _shares(settings)]
    facts += [kernels and kernels.names(), *files]
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
