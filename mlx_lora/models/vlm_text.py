"""Build the text part of vision-language models that mlx-lm does not know, such as SmolVLM, from its own text architectures.

mlx-lm has classes for some models with a tower that sees (Qwen-VL, Gemma 3, Mistral 3): the text model of each, without the
tower. `Model` is the same for the others: the text model that `text_config` describes, under the names that mlx-lm gives
such a part.

    stored by transformers                     here
    model.text_model.layers.0 ...              language_model.model.layers.0 ...      SmolVLM, Idefics 3
    model.language_model.layers.0 ...          language_model.model.layers.0 ...      written by transformers 5
    language_model.model.layers.0 ...          language_model.model.layers.0 ...
    lm_head.weight                             language_model.lm_head.weight
    model.vision_model ..., connector ...      left out (models/vision.py has the tower)
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma, gemma2, llama, qwen2, qwen3
from mlx_lm.models.base import BaseModelArgs

from mlx_lora.compat.functions import become

TEXT_ARCHITECTURES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,  # PaliGemma, and 2
    "gemma2": gemma2,
}
# What tensors of the text part begin with, the longest ones first, and what stays of it.
PREFIXES = (
    ("model.text_model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),  # as mlx-vlm writes Idefics 3
    ("lm_head.", "lm_head."),
)


class TanhMLP(gemma.MLP):
    """Gemma's with the tanh form of GELU, as in transformers; mlx-lm's has the exact one."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


@dataclass
class ModelArgs(BaseModelArgs):
    """The config of a vision-language model.

    Attributes:
        model_type: of the whole model.
        text_config: of its text part.
    """

    model_type: str
    text_config: dict[str, Any]


class Model(nn.Module):
    """The text model of a vision-language model."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        kind = str(args.text_config.get("model_type", "llama"))
        if kind not in TEXT_ARCHITECTURES:
            raise ValueError(f"its text part is a {kind}")
        text = TEXT_ARCHITECTURES[kind]
        self.language_model = text.Model(text.ModelArgs.from_dict(args.text_config))
        for block in self.language_model.layers if text is gemma else ():
            become(block.mlp, TanhMLP)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        given = {} if input_embeddings is None else {"input_embeddings": input_embeddings}  # Gemma takes none
        return self.language_model(inputs, cache=cache, **given)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the text part's tensors, under the names of this model's parameters."""
        found = {}
        for name, value in weights.items():
            prefix, kept = next((pair for pair in PREFIXES if name.startswith(pair[0])), ("", ""))
            if prefix:
                found[kept + name.removeprefix(prefix)] = value
        if hasattr(self.language_model, "sanitize"):
            found = self.language_model.sanitize(found)
        if "lm_head" not in self.language_model:  # Gemma's head is its embedding
            found.pop("lm_head.weight", None)
        return {f"language_model.{name}": value for name, value in found.items()}

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks."""
        return self.language_model.model.layers
