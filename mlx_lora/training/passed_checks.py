"""Remember which checks of a model passed on this machine, so that its second run does not compute them again.

A check is named by all that its result depends on: processor, BLAS and mlx; the source of this package and of the model's
architecture; the model's configuration, fingerprint, types, shapes and dtypes, and what of it is trained; and what was
compared. If anything of that changes, it is another check. Only passed checks are remembered: one that failed is repeated.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.models.fingerprint import base_fingerprint
from mlx_lora.system import device
from mlx_lora.system.measuring import may_measure, read_store, write_store
from mlx_lora.training.in_step import called_together

STORE = "passed_checks"
MOST = 500  # checks that are remembered, the latest ones


def check_name(model: nn.Module, config: dict[str, Any], *compared: Any) -> str:
    """Return the name of a check, 32 hex digits; empty if it may not be left out.

    Nothing is left out if nothing is measured (MLX_LORA_MEASURE_KERNELS=0), or if ranks call the model together: one of them
    would wait for another that remembers.

    Args:
        model: as it is checked, with its adapters.
        config: its config.json.
        compared: what else the result depends on; anything with a `repr` that is the same in every process.
    """
    if not may_measure() or called_together(model):
        return ""
    settings = [
        (path, type(module).__qualname__, sorted((k, v) for k, v in vars(module).items() if _is_setting(v)))
        for path, module in model.named_modules()
    ]
    arrays = [(name, p.shape, str(p.dtype)) for name, p in tree_flatten(model.parameters())]
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    modules = {type(module).__module__ for module in model.modules()}
    sources = sorted((name, _source_sum(Path(sys.modules[name].__file__ or ""))) for name in modules)
    facts = (
        device.measured_on(),
        device.compiles(),
        version("mlx-lm"),
        _package_sum(),
        sources,
        json.dumps(config, sort_keys=True, default=str),
        base_fingerprint(model, config),
        settings,
        arrays,
        trained,
        compared,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def has_passed(name: str) -> bool:
    """Return whether a check has passed before; never if its name is empty."""
    return bool(name) and name in read_store(STORE)


def keep_passed(name: str, words: str) -> None:
    """Remember that a check passed.

    Args:
        name: of the check; empty: it is not remembered.
        words: what was checked, for people who read the file.
    """
    if name:
        known = {**read_store(STORE), name: words}
        write_store(STORE, dict([*known.items()][-MOST:]))


def _is_setting(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, mx.Dtype))


@cache
def _package_sum() -> int:
    """Return a check sum of this package's source: its version alone does not change with each change of it."""
    package = Path(__file__).parents[1]
    total = 0
    for path in sorted(package.rglob("*.py")):
        total = zlib.crc32(path.read_bytes(), total)
    return total


@cache
def _source_sum(path: Path) -> int:
    return zlib.crc32(path.read_bytes()) if path.is_file() else 0
