"""One rank of benchmarks/shared_memory.py: trains as `mlx_lora.train` does, and writes down what its memory was.

    python benchmarks/_rank_memory.py RESULT.json TRAIN-FLAGS
    python benchmarks/_rank_memory.py --make FOLDER TOKENIZER-FOLDER      a random Qwen 3 with 91 million weights

Sizes are MLX's peaks (all its buffers), and the process's resident size beyond what it was before the model was loaded.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

import mlx.core as mx  # isort: skip
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from mlx_lora.cli.train import main
from mlx_lora.models.head import find_head
from mlx_lora.parallel.sharded_base import frozen_bytes
from mlx_lora.parallel.sharded_tables import units_of
from mlx_lora.planner.several_macs import TENSOR
from mlx_lora.trainer import build as composition
from mlx_lora.trainer import run as training_run
from mlx_lora.utils import text as process

FEW_TOKENS = 8


def resident_bytes() -> int:
    """Return the process's resident size now, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def base_alone_bytes(model: nn.Module, config: dict[str, Any]) -> int:
    """Return MLX's peak during the forward and backward pass of a few tokens, whose own arrays are next to nothing."""
    layers = [module for module in model.modules() if "dense_from_rows" in vars(module)]
    before = [layer.dense_from_rows for layer in layers]
    for layer in layers:
        layer.dense_from_rows = FEW_TOKENS + 1  # floats of a packed weight are no part of the base
    head, ids = find_head(model, config), mx.zeros((1, FEW_TOKENS), mx.int32)

    def loss(model: nn.Module) -> mx.array:
        hidden = model(ids) if isinstance(head, str) else head.hidden(ids)
        return hidden.astype(mx.float32).sum()

    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(model, loss)(model))
    peak = mx.get_peak_memory()
    for layer, rows in zip(layers, before, strict=True):
        layer.dense_from_rows = rows
    mx.reset_peak_memory()
    return peak


def measured(result: Path, flags: list[str]) -> None:
    """Train, and write `result`."""
    found: dict[str, Any] = {"resident_before_bytes": resident_bytes()}
    share_among, compose = composition.share_among, training_run.compose

    def sharing(settings: Any, base: Any, ranks: Any) -> Any:
        found["base_bytes"] = frozen_bytes(base.model)
        found["resident_before_sharing_bytes"] = resident_bytes()
        if settings.loop.parallel == TENSOR:  # an array is read whole, and then a rank's part of it
            largest = max(array.nbytes for _, array in tree_flatten(base.model.parameters()))
            found["unit_bytes"], found["two_largest_bytes"] = 0, 2 * largest
        else:
            units = units_of(base.model)
            found["unit_bytes"], found["two_largest_bytes"] = units.bytes, units.largest
        mx.reset_peak_memory()
        shared = share_among(settings, base, ranks)
        mx.eval(base.model.parameters())
        found["share"] = shared[1].share
        found["own_bytes"] = frozen_bytes(base.model)
        found["adapter_bytes"] = sum(array.nbytes for _, array in tree_flatten(base.model.trainable_parameters()))
        found["loading_bytes"] = mx.get_peak_memory()
        found["resident_loading_bytes"] = process.peak_bytes()
        found["held_bytes"] = mx.get_active_memory()
        found["base_alone_bytes"] = base_alone_bytes(base.model, base.config)
        return shared

    def composing(*args: Any) -> Any:
        run = compose(*args)
        found["planned_bytes"], found["phase"] = run.memory.peak_bytes, run.memory.phase
        found["phases"], found["parts"] = run.memory.phases, run.memory.parts
        found["before_steps_bytes"] = mx.get_peak_memory()
        return run

    composition.share_among, training_run.compose = sharing, composing
    code = main(flags, standalone_mode=False)
    found["peak_bytes"], found["resident_bytes"] = mx.get_peak_memory(), process.peak_bytes()
    result.write_text(json.dumps(found), encoding="utf-8")
    sys.exit(code)


def make_model(folder: Path, tokenizer: Path) -> None:
    """Write a random model with an untied head, which memory does not tell from a trained one.

    Args:
        folder: to write; it must not exist.
        tokenizer: a model's folder, whose tokenizer is copied.
    """
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    config = {
        "model_type": "qwen3", "hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1536, "head_dim": 64,
        "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": vocabulary,
        "max_position_embeddings": 4096, "rope_theta": 1e6, "tie_word_embeddings": False,
    }  # fmt: skip
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in (*tokenizer.glob("tokenizer*"), *tokenizer.glob("special_tokens_map.json")):
        shutil.copy(file, folder)


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make_model(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        measured(Path(sys.argv[1]), sys.argv[2:])
