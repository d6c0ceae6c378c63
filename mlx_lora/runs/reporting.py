"""Send a run's records to the display and log files, and write its model card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_lora.artifacts.adapter import WEIGHTS_FILE, AdapterInfo
from mlx_lora.artifacts.card import CARD_FILE, read_facts, write_card
from mlx_lora.models.load import Base
from mlx_lora.runs.composition import Composed
from mlx_lora.training.progress import LiveProgress, Metrics, MetricsFile, PlainProgress


@contextmanager
def reporting(
    run: Composed, loggers: list[Callable[[Metrics], None]], say: Callable[[str], None], live: bool
) -> Iterator[tuple[Callable[[Metrics], None], Callable[[int], None]]]:
    """Open metrics.jsonl, the display and `loggers`; yield functions that take a record, and a step's number."""
    folder = run.folder
    if not folder.ranks.leads:
        yield lambda record: None, lambda step: None
        return
    metrics = MetricsFile(folder.path / "metrics.jsonl", folder.at.taken if run.found else None)
    progress = LiveProgress(run.steps) if live else PlainProgress(run.steps, say)
    sinks = [metrics, progress.report, *loggers]

    def report(record: Metrics) -> None:
        for sink in sinks:
            sink(record)

    try:
        yield report, progress.step
    finally:
        progress.close()
        metrics.close()


def leave_card(folder: Path, base: Base, info: AdapterInfo, say: Callable[[str], None]) -> None:
    """Write the model card of a run folder that has an adapter."""
    if (folder / WEIGHTS_FILE).exists() and not write_card(folder, "mlx", base, info, read_facts(folder)):
        say(f"{folder / CARD_FILE}: yours, left as it is")
