"""The environment of a Python process that a test starts."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def child_environment(*folders: Path, **variables: str) -> dict[str, str]:
    """Return this process's environment, in which Python finds this repository before an installed package.

    What PYTHONPATH has already stays: a rehearsal of Metal reaches the child by it.

    Args:
        folders: to find modules in, too.
        variables: to set.
    """
    paths = [str(REPOSITORY), *map(str, folders), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
