"""Measure how much of an adapter's gain a fused model keeps: the loss of the base, with the adapter, and fused.

The error of rounding does not tell it. An update is small and of low rank, the error is large and spread over all
directions, and a model bears one better than the other: in one model, rounding by 51 times the update left a third of the gain.

    kept = (loss of the base - loss of the fused model) / (loss of the base - loss with the adapter)
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lora.api.run_data import data_of_run, with_columns_of_run
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import LoopSettings, ModelSettings
from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.data.load import load_eval_set
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.models.load import Base, check_token_ids, load_base
from mlx_lora.objectives.base import RunContext
from mlx_lora.objectives.table import objective_of
from mlx_lora.trainer.adapter import adapter_template
from mlx_lora.trainer.held_out import held_out_loss, held_out_plan

ROWS = 32  # measured, at most
LEAST_ROWS = 16  # of them, on a slow machine too: on fewer rows the share is chance
BASE_S = 20.0  # seconds for the base; with the adapter and fused, the same rows take about as long each
BATCH_TOKENS = 1024
MOST_DATA_BYTES = 20_000_000  # larger data of a run is only read on request (--data)
LEAST_GAIN = 0.02  # nats per token; a share of less is a share of noise


@dataclass(frozen=True)
class Gain:
    """Mean losses on the same rows.

    Attributes:
        loss_base, loss_adapter, loss_fused: in nats per supervised token.
        rows: how many were measured.
        of: where they come from, in words.
    """

    loss_base: float
    loss_adapter: float
    loss_fused: float
    rows: int
    of: str

    @property
    def kept(self) -> float | None:
        """The share of the adapter's gain that the fused model has; None: the adapter gains nothing on these rows."""
        gain = self.loss_base - self.loss_adapter
        return (self.loss_base - self.loss_fused) / gain if gain > LEAST_GAIN else None

    def facts(self) -> dict[str, Any]:
        """Return the numbers by name, for JSON."""
        return {**asdict(self), "kept": self.kept}

    def words(self) -> str:
        """Return the measurement as one sentence."""
        losses = f"base {self.loss_base:.2f}, with adapter {self.loss_adapter:.2f}, fused {self.loss_fused:.2f}"
        if self.kept is None:
            return f"the adapter does not lower the loss on {self.of} ({losses}); measure on others with --data FILE"
        share = "all" if self.kept >= 1 else "nothing" if self.kept <= 0 else f"{self.kept:.0%}"
        return f"the fused model keeps {share} of the adapter's gain in loss ({losses}; {self.of})"


NOT_MEASURED = {**dict.fromkeys(("loss_base", "loss_adapter", "loss_fused", "kept")), "rows": 0, "of": None}


def measure_gain(
    model: ModelSettings,
    adapter: Path,
    fused: Path,
    data: str | None,
    ignore_fingerprint: bool = False,
) -> Gain | str:
    """Measure the three losses on some rows.

    Args:
        model: the base.
        adapter: the adapter's folder.
        fused: the folder of the fused model.
        data: as `evaluate --data` takes it; None: what the adapter's run held out, if that is on this disk.
        ignore_fingerprint: as for load_adapter.

    Returns:
        The losses, or why there are none.

    Raises:
        InputError: `data` cannot be used.
    """
    base = load_base(model)
    if template := adapter_template(adapter):
        base.hf_tokenizer.chat_template = template
    rows, of = _given_rows(data, adapter, base) if data else _rows_of_run(adapter, base)
    if rows is None:
        return of
    rows = rows.select(spaced_by_length(rows, min(ROWS, rows.examples)))
    loop = replace(train_settings({}).loop, batch_tokens=BATCH_TOKENS, test_batches=1)
    _loss(base, rows, loop)  # compares kernels and compiles
    start = time.perf_counter()
    _loss(base, rows, loop)
    plan, batches = held_out_plan(rows, loop), max(1, int(BASE_S / (time.perf_counter() - start)))
    while len(plan.examples_of(batches)) < min(LEAST_ROWS, rows.examples):
        batches += 1
    measured, loop = len(plan.examples_of(batches)), replace(loop, test_batches=batches)
    loss_base = _loss(base, rows, loop)
    load_adapter(base, adapter, ignore_fingerprint)
    loss_adapter = _loss(base, rows, loop)
    del base  # two models at once may be too large
    loss_fused = _loss(load_base(replace(model, model=str(fused), revision=None, bits=None)), rows, loop)
    return Gain(loss_base, loss_adapter, loss_fused, measured, f"{measured} {of}")


def _loss(base: Base, rows: EncodedSet, loop: LoopSettings) -> float:
    settings = replace(train_settings({}), loop=loop)
    return held_out_loss(RunContext(settings, objective_of(settings.objective), base, trains=False), rows).loss


def _given_rows(data: str, adapter: Path, base: Base) -> tuple[EncodedSet, str]:
    """Return the rows of --data, read with the columns of the run that trained the adapter."""
    settings = with_columns_of_run(train_settings({"data": data}), ("data",), adapter)
    rows = load_eval_set(data, settings.data, base.hf_tokenizer)
    check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {data}")
    return rows, f"rows of {data}"


def _rows_of_run(adapter: Path, base: Base) -> tuple[EncodedSet | None, str]:
    """Return the rows that the adapter's run held out, or None and why there are none."""
    splits = data_of_run(adapter, base.hf_tokenizer, MOST_DATA_BYTES)
    if isinstance(splits, str):
        return None, splits
    held_out = splits.test or splits.valid
    return held_out or splits.train, f"{'held-out' if held_out else 'training'} rows of its run"
