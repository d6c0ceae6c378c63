"""The versions of the packages that results depend on."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata

from mlx_lora import __version__

PACKAGES = ("mlx", "mlx-metal", "mlx-lm", "transformers", "tokenizers", "huggingface-hub", "numpy", "gguf")


def installed_versions() -> dict[str, str | None]:
    """Return the versions of the packages that matter, None for those not installed."""
    return {"mlx-lora": __version__, "python": platform.python_version(), **package_versions(PACKAGES)}


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of these packages, None for those not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions
