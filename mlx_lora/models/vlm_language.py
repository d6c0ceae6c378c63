"""Build the language model of an architecture that mlx-vlm has and mlx-lm has not, such as Cohere 2 MoE.

`Model` is what mlx-lm's modules have under this name: a call returns logits, `sanitize` takes the tensors of a published folder, and
parameters have mlx-vlm's names, `language_model.model.layers.0 ...`. mlx-vlm has copies of mlx-lm's layers for experts and caches.
Here they become mlx-lm's, so that adapters, kernels and batches of rows see what they know.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as caches
from mlx_lm.models import switch_layers
from mlx_lm.models.base import BaseModelArgs

from mlx_lora.compat.functions import become

# mlx-vlm's class of a cache -> mlx-lm's, as new as the one given.
CACHES: dict[str, Callable[[Any], Any]] = {
    "KVCache": lambda made: caches.KVCache(),
    "RotatingKVCache": lambda made: caches.RotatingKVCache(made.max_size, made.keep),
}
# Parts of a config that have a class of their own.
PARTS = ("text", "vision", "perceiver", "projector", "audio")


def package_of(config: Mapping[str, Any]) -> ModuleType:
    """Return mlx-vlm's package of an architecture.

    Raises:
        ValueError: mlx-vlm is not installed, or has no such architecture.
    """
    kind = config.get("model_type")
    if find_spec("mlx_vlm") is None:
        raise ValueError(f"mlx-lm has no {kind}; if mlx-vlm has it: pip install 'mlx-lora[vision]'")
    name = str(import_module("mlx_vlm.utils").get_model_type(dict(config)))
    if not name.isidentifier() or find_spec(f"mlx_vlm.models.{name}") is None:
        raise ValueError(f"neither mlx-lm nor mlx-vlm has {kind}")
    return import_module(f"mlx_vlm.models.{name}")


@dataclass
class ModelArgs(BaseModelArgs):
    """A config.json as it is; mlx-vlm's classes read it."""

    model_type: str
    config: dict[str, Any]

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> ModelArgs:
        """Keep all keys."""
        return cls(params["model_type"], params)

    @staticmethod
    def read_by(config: Mapping[str, Any]) -> tuple[type | None, type | None]:
        """Return mlx-vlm's classes that read a config and its text part, which may be one of the whole's own keys."""
        package = package_of(config)
        whole, text = (getattr(package, name, None) for name in ("ModelConfig", "TextConfig"))
        return whole if text is None or "text_config" in config else text, text


class Model(nn.Module):
    """The language model of one of mlx-vlm's architectures."""

    of_mlx_vlm = True  # others look here for it; its class reads `vision_config`, though it has no tower

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.language_model = self._whole().language_model
        for layer in self.language_model.modules():
            for name, value in [*layer.items()]:
                if name.startswith("_") and isinstance(value, dict):  # what it has computed, which MLX takes for layers
                    setattr(layer, name, UserDict(value))
            # In long rows, DeepSeek V4 would choose keys by blocks, and compute them within a gradient.
            if hasattr(layer, "index_block"):
                layer.index_block = 0
            if hasattr(layer, "build_mask"):  # Qwen4-Exp's indexer
                layer.build_mask = partial(_mask_of_blocks, layer.build_mask)
            if type(layer).__module__ == "mlx_vlm.models.switch_layers" and hasattr(
                switch_layers, type(layer).__name__
            ):
                become(layer, getattr(switch_layers, type(layer).__name__))

    def _whole(self) -> nn.Module:
        """Return mlx-vlm's model, whose parameters are not computed.

        Raises:
            ValueError: it writes no text from left to right.
        """
        config = {"vision_config": {}, "audio_config": {}, **self.args.config}
        config.setdefault("text_config", config.get("llm_config", {}))
        package = package_of(config)
        if not hasattr(package, "ModelConfig"):
            raise ValueError("it writes no text")
        made = import_module("mlx_vlm.utils").update_module_configs(
            package.ModelConfig.from_dict(config), package, config, PARTS
        )
        whole = package.Model(made)
        if not isinstance(getattr(whole, "language_model", None), nn.Module):
            raise ValueError("mlx-vlm's has no language model")
        masks = (
            getattr(made, "mask_token_id", None) is not None and getattr(made, "default_generation_mode", "") != "ar"
        )
        if masks and callable(getattr(whole.language_model, "generate", None)):
            raise ValueError("it fills in masked tokens (diffusion), and training here is on the next token")
        return whole

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        given = {} if input_embeddings is None else {"inputs_embeds": input_embeddings}
        if hasattr(
            self.language_model, "_rope_deltas"
        ):  # left by the rows of the last call, which may have had pictures
            self.language_model._position_ids, self.language_model._rope_deltas = None, mx.zeros((1, 1), mx.int32)
        return self.language_model(inputs, cache=cache, **given).logits

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the language model's tensors, under the names of this model's parameters."""
        whole = self._whole()
        if hasattr(whole, "sanitize"):
            weights = whole.sanitize(weights)
        return {name: value for name, value in weights.items() if name.startswith("language_model.")}

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks."""
        return self.language_model.layers

    def make_cache(self) -> list[Any]:
        """Return a cache for each block, of mlx-lm's classes."""
        if not hasattr(self.language_model, "make_cache"):
            return [caches.KVCache() for _ in self.layers]
        return [own_cache(made) for made in self.language_model.make_cache()]


def _mask_of_blocks(build: Callable[[Any], mx.array], selection: Any) -> mx.array:
    """Return the mask of the chosen blocks of keys, where -1 stands for none.

    mlx-vlm 0.7.10 scatters by that -1 as well. It is before the array's memory if the row is shorter than a block, and MLX writes there.
    """
    chosen = mx.where(selection.selected_blocks < 0, selection.key_len, selection.selected_blocks)
    return build(SimpleNamespace(**(vars(selection) | {"selected_blocks": chosen})))


def own_cache(made: Any) -> Any:
    """Return mlx-lm's cache in place of a new one of mlx-vlm's; one that only mlx-vlm has stays."""
    return CACHES.get(type(made).__name__, lambda made: made)(made)
