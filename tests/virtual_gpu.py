"""A pytest plugin that says which GPU the tests run on, and skips by name what a virtual one cannot run.

    PYTHONPATH=tests python -m pytest -p virtual_gpu

GitHub's Macs are virtual machines. Their GPU is an "Apple Paravirtual device": Metal finds it and computes on it, but it has no
counters of its own, 7 GB of memory, an older family of features than any Mac with Apple silicon, and nothing is wired. So
tests marked `metal`, which need a real Apple GPU, and the tests of CANNOT are skipped there, and the last lines name them.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

VIRTUAL = ("paravirtual", "virtual")
REASON = "virtual GPU: "
# The beginning of a test's id -> why a virtual GPU cannot run it. Empty until a runner has shown one that a real Mac passes.
CANNOT: dict[str, str] = {}


def is_virtual(name: str) -> bool:
    """Return whether a GPU of this name is a virtual machine's."""
    return any(word in name.lower() for word in VIRTUAL)


def gpu_name() -> str | None:
    """Return the name of the GPU that MLX computes on by default, None if that is the CPU."""
    # Not at the top: conftest.py loads the fast BLAS before mlx.
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return None  # a processor of a virtual machine may have such a name too
    return str(mx.device_info().get("device_name", "unknown"))


def skip_by_name(items: Sequence[pytest.Item], cannot: dict[str, str]) -> None:
    """Mark what a virtual GPU cannot run as skipped, each with its reason."""
    for item in items:
        reasons = [why for start, why in cannot.items() if item.nodeid.startswith(start)]
        if item.get_closest_marker("metal"):
            reasons.append("needs a real Apple GPU (marked metal)")
        if reasons:
            item.add_marker(pytest.mark.skip(reason=f"{REASON}{reasons[0]}"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip on a virtual GPU, and nowhere else."""
    name = gpu_name()
    if name is not None and is_virtual(name):
        skip_by_name(items, CANNOT)


def pytest_terminal_summary(terminalreporter) -> None:
    """Name the GPU and every test that it was too little for."""
    name = gpu_name()
    kind = "virtual GPU" if name is not None and is_virtual(name) else "GPU"
    terminalreporter.write_line(f"{kind}: {name or 'none, MLX computes on the CPU'}")
    for report in terminalreporter.stats.get("skipped", ()):
        where = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if REASON in where:
            terminalreporter.write_line(f"not run on it: {report.nodeid}: {where.split(REASON, 1)[1]}")
