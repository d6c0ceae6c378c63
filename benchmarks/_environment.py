"""Describe the environment of a benchmark: versions, commit, machine, threads."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from _processes import DROPPED_ENVIRONMENT


def environment() -> dict[str, Any]:
    """Return the environment, without what the child processes report."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    versions = {}
    for name in ("mlx", "mlx-lm", "torch", "peft", "trl", "transformers", "scipy-openblas32"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit.stdout.strip() or None,
        "versions": {**versions, "python": platform.python_version()},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "thread_variables": threads,
        "removed_variables": {name: os.environ.get(name) for name in DROPPED_ENVIRONMENT},
    }
