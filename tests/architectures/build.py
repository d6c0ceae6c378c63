"""Builds the tiny models: random weights that keep every path's gradient alive, and folders as they are published."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from byte_tokenizer import CHATML, byte_tokenizer
from mlx.utils import tree_flatten

from architectures.configs import CONFIGS, TIED_BY_THE_WEIGHTS
from architectures.vlm import vlm_config
from mlx_lora.models.config import architecture_of

# Standard deviations of what is not a product's weight: enough to tell places apart, too little to saturate.
SPREAD = 0.1
PACKAGES = {"olmo": "hf_olmo"}
# Softplus of these is a time step of about 0.1 to 0.5: a state that remembers, and forgets.
TIME_STEP_BIAS = (-2.0, -0.5)


def tiny_config(name: str, tied: bool = False) -> dict[str, Any]:
    """Return the config of an architecture, its `tie_word_embeddings` written as transformers 5 writes it.

    Args:
        name: of mlx-lm's module, or of mlx-vlm's package.
        tied: whether the head is the embedding.
    """
    config = copy.deepcopy(CONFIGS[name]) if name in CONFIGS else vlm_config(name)
    for part in (config, config.get("text_config")):
        if part is not None and (name in CONFIGS or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = tied
    if name == "openelm":
        config["share_input_output_layers"] = tied
    if name == "olmo":
        config["weight_tying"] = tied
    return config


def tiny_architecture(name: str, tied: bool = False, seed: int = 0, config: dict[str, Any] | None = None) -> nn.Module:
    """Return an architecture's model in float32 with random weights, in eval mode.

    Args:
        name, tied: as `tiny_config` takes them.
        seed: of the weights.
        config: another one than `tiny_config`'s, such as `scaled` returns.
    """
    config = config or tiny_config(name, tied)
    with package_of(name):
        model_class, args_class = architecture_of(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    weights = dict(tree_flatten(model.parameters()))
    if tied and name in TIED_BY_THE_WEIGHTS:  # these give the head up when they see weights without one
        model.sanitize({key: value for key, value in weights.items() if "lm_head" not in key})
        weights = dict(tree_flatten(model.parameters()))
    model.load_weights([(key, _random(key, value)) for key, value in sorted(weights.items())])
    model.eval()
    mx.eval(model.parameters())
    return model


@contextmanager
def package_of(name: str) -> Iterator[None]:
    """Stand in for the package that mlx-lm's module asks for and does not use (OLMo 1), for as long as it is imported."""
    package = PACKAGES.get(name)
    if package is None or package in sys.modules or importlib.util.find_spec(package):
        yield
        return
    sys.modules[package] = ModuleType(package)
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.pop(f"mlx_lm.models.{name}", None)


def _random(name: str, value: mx.array) -> mx.array:
    """Return a parameter's random value from the one that mlx-lm starts it with.

    Weights of products keep theirs. Norms, biases, gates and all else that starts as zeros or ones would be a special
    case in every cell: they get a spread around it.
    """
    last = name.rpartition(".")[2]
    if value.dtype == mx.uint32:  # packed codes
        return mx.random.randint(0, 2**31 - 1, value.shape).astype(mx.uint32)
    if last in ("scales", "biases"):
        return 0.03 * mx.random.normal(value.shape).astype(value.dtype)
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    if last == "A_log":
        return mx.log(mx.random.uniform(1.0, 4.0, value.shape)).astype(value.dtype)
    if last == "dt_bias" or name.endswith("dt_proj.bias"):
        return mx.random.uniform(*TIME_STEP_BIAS, value.shape).astype(value.dtype)
    if value.size > 1 and mx.all(value == value.reshape(-1)[0]).item():
        # A matrix of zeros is a product's weight that awaits its values; a vector is a norm, a bias or a scale.
        deviation = 1 / math.sqrt(value.shape[-1]) if value.ndim > 1 and not value.reshape(-1)[0].item() else SPREAD
        return value + deviation * mx.random.normal(value.shape).astype(value.dtype)
    if value.ndim == 1:
        return value + SPREAD * mx.random.normal(value.shape).astype(value.dtype)
    return value


def write_architecture(
    folder: Path, name: str, tied: bool = False, seed: int = 0, config: dict[str, Any] | None = None
) -> Path:
    """Write an architecture as a model folder: config.json, model.safetensors and the byte tokenizer's files.

    Returns:
        The folder.
    """
    model = tiny_architecture(name, tied, seed, config)
    return write_model(folder, model, config or tiny_config(name, tied))


def write_model(folder: Path, model: nn.Module, config: dict[str, Any]) -> Path:
    """Write a model with its config and the byte tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(chat_template=CHATML)
    tokenizer.save_pretrained(folder)
    content = {**config, "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    return folder
