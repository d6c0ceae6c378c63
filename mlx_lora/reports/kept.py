"""Tell which validation measured the adapter that is in a run's folder.

The trainer knows its step and writes it into report.json. Folders of earlier versions do not have it; there it is found from the metrics,
by the rules of `Position.validated` and `Position.compare_anew`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lora.trainer.adapter import first_qat_step

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
