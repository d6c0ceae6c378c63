"""The versions of the packages that results depend on."""

from __future__ import annotations

import platform
from importlib import metadata

from mlx_lora import __version__

PACKAGES = ("mlx", "mlx-metal", "mlx-lm", "transformers", "tokenizers", "huggingface-hub", "numpy", "gguf")


def installed_versions() -> dict[str, str | None]:
    """Return the versions of the packages that matter, None for those not installed."""
    versions: dict[str, str | None] = {"mlx-lora": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions
