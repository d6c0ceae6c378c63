"""Send a run's records to the display, metrics.jsonl and callbacks, and write its model card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_lora.artifacts.adapter import WEIGHTS_FILE, AdapterInfo
from mlx_lora.artifacts.card import CARD_FILE, read_facts, write_card
from mlx_lora.data.batches import Batch
from mlx_lora.models.load import Base
from mlx_lora.runs.composition import Composed
from mlx_lora.runs.report_page import RunPage
from mlx_lora.training.callbacks import Callbacks
from mlx_lora.training.held_out_rows import ROWS_FILE, RowsFile
from mlx_lora.training.progress import Metrics, MetricsFile, PlainProgress, Progress

Watch = Callable[[Iterable[Batch], int], Iterable[Batch]]


@contextmanager
def reporting(
    run: Composed,
    told: Callbacks,
    say: Callable[[str], None],
    show: Callable[[int], Progress] | None,
    page: RunPage | None = None,
) -> Iterator[tuple[Callable[[Metrics], None], Callable[[int], None], Watch]]:
    """Open metrics.jsonl and the display; yield functions that take a record, a step's number, and a validation's batches.

    Args:
        run: ready for its first step.
        told: the callbacks, which are told of both.
        say: takes a line per report where there is no display.
        show: makes a display from the number of steps; None: there is none.
        page: answers its fixed prompts after each validation; only the first rank has one.
    """
    folder = run.folder

    def answered(record: Metrics) -> None:
        if record.val_loss is None or not folder.settings.objective.samples:
            return
        if page is not None:
            page.validated(record.step)
        folder.ranks.meet()  # the others wait for the first rank's answers

    if not folder.ranks.leads:
        yield answered, lambda step: None, lambda batches, count: batches
        return
    resumed_at = folder.at.taken if run.found else None
    metrics = MetricsFile(folder.path / "metrics.jsonl", resumed_at)
    rows = RowsFile(folder.path / ROWS_FILE, resumed_at)
    if page is not None:
        page.begin_answers(resumed_at)
    progress = show(run.steps) if show else PlainProgress(run.steps, say)

    def report(record: Metrics) -> None:
        metrics(record)
        rows(record.step, record.rows)
        progress.report(record)
        told.tell("on_report" if record.val_loss is None else "on_validation", record.to_flat())
        answered(record)

    def step(number: int) -> None:
        progress.step(number)
        told.tell("on_step", {"step": number, "steps": run.steps})

    try:
        yield report, step, progress.validating
    finally:
        progress.close()
        metrics.close()
        rows.close()


def leave_card(folder: Path, base: Base, info: AdapterInfo, say: Callable[[str], None]) -> None:
    """Write the model card of a run folder that has an adapter."""
    if (folder / WEIGHTS_FILE).exists() and not write_card(folder, "mlx", base, info, read_facts(folder)):
        say(f"{folder / CARD_FILE}: your own file, left as it is")
