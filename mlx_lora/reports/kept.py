"""Tell which validation measured the adapter that is in a run's folder, and among how many it was chosen.

The trainer knows its step and writes it into report.json. Folders of earlier versions do not have it; there it is found from the metrics,
by the rules of `Position.validated` and `Position.compare_anew`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_lora.config.sweep import SWEEP_FILE, TRIALS, WINNER
from mlx_lora.trainer.adapter import first_qat_step
from mlx_lora.utils.parsing import parse_json

Record = dict[str, Any]


def rounding_begins(records: Sequence[Record], settings: Mapping[str, Any], known: int | None) -> int:
    """Return the step from which validations are with rounding (--qat 0.3); 0: all of them are, or none.

    Args:
        records: of metrics.jsonl.
        settings: of run.yaml.
        known: what report.json says; None: nothing.
    """
    if known is not None:
        return known
    steps = settings.get("iters") or max((r["step"] for r in records), default=0)
    return first_qat_step(settings.get("qat") or 0.0, steps) or 0


def compared_validations(validations: list[Record], rounded_from: int) -> list[Record]:
    """Return the validations among which the best is looked for: once there are some with rounding, only those."""
    return [r for r in validations if r["step"] >= rounded_from] or validations


def kept_validation(
    validations: list[Record], settings: Mapping[str, Any], known: int | None, rounded_from: int
) -> Record | None:
    """Return the validation of the adapter that a run's end left; None: it is not on record.

    Args:
        validations: at least one.
        settings: of run.yaml.
        known: the step of that adapter; None: an earlier version did not write it.
        rounded_from: see `rounding_begins`.
    """
    last = validations[-1]
    if known is not None:
        found = next((r for r in validations if r["step"] == known), None)
        return last if found is None and known > last["step"] else found
    compared = compared_validations(validations, rounded_from)
    later = [r for r in compared if r["step"]]
    if not settings.get("keep_best") or not later:
        return last
    metric = settings.get("metric_for_best_model") or "loss"
    if metric not in ("loss", "task"):
        return max(later, key=lambda r: (r.get(metric) or 0.0, -r["val_loss"]))
    best = max(compared, key=lambda r: (r.get(metric) or 0.0 if metric == "task" else 0.0, -r["val_loss"]))
    return best if best["step"] else last


def measured_adapter(
    records: Sequence[Record], settings: Mapping[str, Any] | None, known: int | None, rounded_from: int | None
) -> Record | None:
    """Return the last validation, after a run's end that of the adapter in the folder; None: there is none.

    Args:
        records: of metrics.jsonl.
        settings: of run.yaml; None: the run goes on.
        known: see `kept_validation`.
        rounded_from: see `rounding_begins`.
    """
    validations = [r for r in records if r["val_loss"] is not None]
    if settings is None or not validations:
        return validations[-1] if validations else None
    return kept_validation(validations, settings, known, rounding_begins(records, settings, rounded_from))


def choices(validations: list[Record], settings: Mapping[str, Any], rounded_from: int, folder: Path | None) -> int:
    """Return among how many measurements of the held-out rows the adapter was chosen; 1: it was not.

    With --keep-best, all validations after the first count. The other rates of `--learning-rate auto` and the other candidates
    of a sweep count as well.

    Args:
        validations: at least one.
        settings: of run.yaml; `keep_best` counts only once the run has ended.
        rounded_from: see `rounding_begins`.
        folder: of the run; None: not known.
    """
    later = [r for r in compared_validations(validations, rounded_from) if r is not validations[0]]
    count = max(1, len(later)) if settings.get("keep_best") else 1
    if folder is not None:
        sweep = folder.parent if folder.name == WINNER else folder / TRIALS
        with suppress(OSError, ValueError, KeyError, TypeError):
            count += len(parse_json((sweep / SWEEP_FILE).read_bytes())["candidates"]) - 1
    return count
