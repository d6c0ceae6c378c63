"""LoRA and QLoRA training on MLX, for Apple silicon.

    import mlx_lora

    base = mlx_lora.load("Qwen/Qwen3-0.6B", bits=4)
    run = mlx_lora.train(base, [{"prompt": "Who are you?", "completion": "A small model."}], epochs=3)
    print(run.losses, base.generate("Who are you?", adapter=run.adapter))

Importing this package loads neither MLX nor a model: each name below is imported when it is first used. On Linux it
does load a fast BLAS, which must come before the first `import mlx.core`; so import mlx_lora before mlx.core.
"""

from typing import TYPE_CHECKING, Any

from mlx_lora.utils.blas import load_fast_blas, share_cores

if TYPE_CHECKING:
    from mlx_lora.api.base import Base, InputError, generate, load
    from mlx_lora.api.evaluate import evaluate, evaluate_tasks
    from mlx_lora.api.export import export
    from mlx_lora.api.fuse import merge
    from mlx_lora.api.plan import plan
    from mlx_lora.api.texts import embed, predict, rerank
    from mlx_lora.api.train import Run, sweep, train, train_several
    from mlx_lora.trainer.callbacks import Callback, SwanLab, TensorBoard, Trackio, Wandb
    from mlx_lora.utils.errors import RunError

__version__ = "0.1.0"
__all__ = [
    "BLAS", "Base", "Callback", "InputError", "Run", "RunError", "SwanLab", "TensorBoard", "Trackio", "Wandb", "embed", "evaluate",
    "evaluate_tasks", "export", "generate", "load", "merge", "plan", "predict", "rerank", "sweep", "train", "train_several",
]  # fmt: skip

# Before a BLAS is loaded, and anything imports mlx.core: see utils/blas.py.
share_cores()
BLAS = load_fast_blas()

# Public name -> the module that defines it.
_HOMES = {
    "Base": "mlx_lora.api.base",
    "Callback": "mlx_lora.trainer.callbacks",
    "InputError": "mlx_lora.api.base",
    "Run": "mlx_lora.api.train",
    "RunError": "mlx_lora.utils.errors",
    "SwanLab": "mlx_lora.trainer.callbacks",
    "TensorBoard": "mlx_lora.trainer.callbacks",
    "Trackio": "mlx_lora.trainer.callbacks",
    "Wandb": "mlx_lora.trainer.callbacks",
    "embed": "mlx_lora.api.texts",
    "evaluate": "mlx_lora.api.evaluate",
    "evaluate_tasks": "mlx_lora.api.evaluate",
    "export": "mlx_lora.api.export",
    "generate": "mlx_lora.api.base",
    "load": "mlx_lora.api.base",
    "merge": "mlx_lora.api.fuse",
    "plan": "mlx_lora.api.plan",
    "predict": "mlx_lora.api.texts",
    "rerank": "mlx_lora.api.texts",
    "sweep": "mlx_lora.api.train",
    "train": "mlx_lora.api.train",
    "train_several": "mlx_lora.api.train",
}


# Names of other libraries -> what does it here.
_TRAIN = "mlx_lora.train(mlx_lora.load('MODEL'), 'FILE', adapter_path='FOLDER')"
_ELSEWHERE = {
    **dict.fromkeys(("FastLanguageModel", "FastModel", "AutoModelForCausalLM"), "mlx_lora.load('MODEL', bits=4)"),
    **dict.fromkeys(("LoraConfig", "get_peft_model"), "rank, alpha, method and target_modules of mlx_lora.train"),
    **dict.fromkeys(("SFTConfig", "Trainer", "TrainingArguments"), _TRAIN),
    **dict.fromkeys(("PeftModel", "pipeline"), "mlx_lora.load('MODEL').generate('TEXT', adapter='FOLDER')"),
}


def __getattr__(name: str) -> Any:
    # No AttributeError: `from mlx_lora import` would not tell its text.
    if name in _ELSEWHERE or name.endswith("Trainer"):
        raise ImportError(
            f"mlx_lora has no {name}; use {_ELSEWHERE.get(name, f'{_TRAIN[:-1]}, objective={name[:-7].lower()!r})')}"
        )
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use finds it at once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
