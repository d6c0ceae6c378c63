"""Where a run's records go while it runs, and what it leaves to read at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_lora.artifacts.adapter import WEIGHTS_FILE, AdapterInfo
from mlx_lora.artifacts.card import CARD_FILE, read_facts, write_card
from mlx_lora.models.load import Base
from mlx_lora.settings.config import LoopSettings
from mlx_lora.system.distributed import Ranks, leads
from mlx_lora.training.progress import Metrics, MetricsFile, make_progress


@contextmanager
def reporting(
    loop: LoopSettings,
    steps: int,
    resumed_at: int | None,
    ranks: Ranks | None,
    loggers: list[Callable[[Metrics], None]],
    say: Callable[[str], None],
) -> Iterator[tuple[Callable[[Metrics], None], Callable[[int], None]]]:
    """Open where a run's records go: metrics.jsonl, the display, `loggers`; yield what takes a record, and a step."""
    if not leads(ranks):
        yield lambda record: None, lambda step: None
        return
    metrics = MetricsFile(Path(loop.adapter_path) / "metrics.jsonl", resumed_at)
    progress = make_progress(steps, say)
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
