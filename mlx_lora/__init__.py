"""LoRA and QLoRA training on MLX, for Apple silicon.

    import mlx_lora

    base = mlx_lora.load("Qwen/Qwen3-0.6B", bits=4)
    run = mlx_lora.train(base, [{"prompt": "Who are you?", "completion": "A small model."}], epochs=3)
    print(run.losses, base.generate("Who are you?", adapter=run.adapter))

Importing this package loads neither MLX nor a model: each name below is imported when it is first used. On Linux it
does load a fast BLAS, which must come before the first `import mlx.core`; so import mlx_lora before mlx.core.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlx_lora.system.blas import load_fast_blas
from mlx_lora.system.cores import share_cores

if TYPE_CHECKING:
    from mlx_lora.api.base import Base, generate, load
    from mlx_lora.api.evaluation import evaluate
    from mlx_lora.api.exporting import export
    from mlx_lora.api.python_errors import InputError
    from mlx_lora.api.run import Run, train
    from mlx_lora.api.run_plan import plan
    from mlx_lora.system.errors import RunError
    from mlx_lora.training.callbacks import Callback
    from mlx_lora.training.loggers import SwanLab, TensorBoard, Trackio, Wandb

__version__ = "0.1.0"
__all__ = [
    "BLAS", "Base", "Callback", "InputError", "Run", "RunError", "SwanLab", "TensorBoard", "Trackio", "Wandb", "evaluate",
    "export", "generate", "load", "plan", "train",
]  # fmt: skip

# Before a BLAS is loaded, and anything imports mlx.core: see cores.py and blas.py.
share_cores()
BLAS = load_fast_blas()

# Public name -> the module that defines it.
_HOMES = {
    "Base": "mlx_lora.api.base",
    "Callback": "mlx_lora.training.callbacks",
    "InputError": "mlx_lora.api.python_errors",
    "Run": "mlx_lora.api.run",
    "RunError": "mlx_lora.system.errors",
    "SwanLab": "mlx_lora.training.loggers",
    "TensorBoard": "mlx_lora.training.loggers",
    "Trackio": "mlx_lora.training.loggers",
    "Wandb": "mlx_lora.training.loggers",
    "evaluate": "mlx_lora.api.evaluation",
    "export": "mlx_lora.api.exporting",
    "generate": "mlx_lora.api.base",
    "load": "mlx_lora.api.base",
    "plan": "mlx_lora.api.run_plan",
    "train": "mlx_lora.api.run",
}


class _Package(ModuleType):
    """This package; `mlx_lora.train` stays the function, even after the command's module of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):  # Python sets an imported submodule on its package
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use finds it at once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
