"""A model cut in two: the body that makes hidden states, and the output head with all that is done to its logits.

mlx-lm's models return logits of every position. Loss without logits needs the hidden states instead, and
must then do itself what each family does after the head: scale (Cohere, Granite), soft cap (Gemma 2), bias.
The cut is checked against the model's own logits before it is used (training/losses.py).

Shapes: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.models.matmul import packed_arrays

FLOAT_HEADS = (nn.Linear, nn.Embedding)
QUANTISED_HEADS = (nn.QuantizedLinear, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class Head:
    """An output head: logits = cap(scale * (h W^T + bias)).

    Attributes:
        body: maps (B, T) ids to (B, T, D) hidden states; called through `hidden`.
        layer: the module that holds W: a linear layer, or the embedding it is tied to; quantised or not.
        scale: factor on the logits.
        soft_cap: logits become cap * tanh(logits / cap); None for most families.
    """

    body: nn.Module
    layer: nn.Module
    scale: float = 1.0
    soft_cap: float | None = None

    def hidden(self, inputs: mx.array) -> mx.array:
        """Return the body's hidden states, (B, T) -> (B, T, D); some bodies cannot do without a `cache` argument."""
        cache = inspect.signature(type(self.body).__call__).parameters.get("cache")
        return self.body(inputs, cache=None) if cache and cache.default is cache.empty else self.body(inputs)

    @property
    def arrays(self) -> list[mx.array]:
        """The head's weight as it is stored: `[weight]`, or packed `[weight, scales(, biases)]`."""
        return packed_arrays(self.layer) if isinstance(self.layer, QUANTISED_HEADS) else [self.layer.weight]

    @property
    def bias(self) -> mx.array | None:
        """(V,) or None."""
        return self.layer.get("bias")

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.layer.weight.shape[0]

    def dense(self, arrays: list[mx.array], dtype: mx.Dtype) -> mx.array:
        """Return rows of W as floats.

        Args:
            arrays: `self.arrays`, or any same selection of rows of each.
            dtype: of the result.

        Returns:
            (rows, D).
        """
        if not isinstance(self.layer, QUANTISED_HEADS):
            return arrays[0].astype(dtype)
        layout = {"group_size": self.layer.group_size, "bits": self.layer.bits, "mode": self.layer.mode}
        return mx.dequantize(*arrays, **layout).astype(dtype)

    def finish(self, products: mx.array, columns: slice | mx.array) -> mx.array:
        """Turn products h W^T into logits: bias, scale, soft cap.

        Args:
            products: (R, S) float32.
            columns: which tokens the columns are: a slice of the vocabulary, or each row's own ids (R, 1).
        """
        if self.bias is not None:
            products = products + self.bias[columns].astype(products.dtype)
        return self._scaled(products)

    def logits(self, hidden: mx.array) -> mx.array:
        """Return all logits of hidden states, through the layer as the model itself uses it.

        Args:
            hidden: (..., D).

        Returns:
            (..., V) float32.
        """
        embeds = isinstance(self.layer, (nn.Embedding, nn.QuantizedEmbedding))
        products = self.layer.as_linear(hidden) if embeds else self.layer(hidden)  # a linear layer adds its own bias
        return self._scaled(products.astype(mx.float32))

    def _scaled(self, logits: mx.array) -> mx.array:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * mx.tanh(logits / self.soft_cap)
        return logits

    def slope(self, logits: mx.array) -> mx.array:
        """Return the soft cap's derivative, by what it made of its input: 1 - (l / cap)^2."""
        return 1 - mx.square(logits / self.soft_cap)


def find_head(model: nn.Module, config: dict[str, Any]) -> Head | str:
    """Cut `model` into body and head.

    Args:
        model: an mlx-lm model, adapted or not.
        config: its config.json; a multimodal one keeps the text part under `text_config`.

    Returns:
        The head, or in a few words why there is none: the caller then uses the plain loss and says so.
    """
    if "language_model" in model:  # multimodal wrappers pass text straight through
        return find_head(model["language_model"], {**config, **config.get("text_config", {})})
    body = model.get("model")
    if body is None:
        return "the model has no part named `model`"
    layer = body.get("embed_tokens") if model.get("lm_head") is None else model["lm_head"]
    if layer is None:
        return "the model has neither lm_head nor embed_tokens"
    if isinstance(layer, mx.array):
        return "the head is a bare array"
    if not isinstance(layer, FLOAT_HEADS + QUANTISED_HEADS):
        return f"the head is {type(layer).__name__}"
    if layer.trainable_parameters():
        return "the head is trained itself"  # the fused loss has no gradient for it
    scale = config.get("logit_scale") or 1 / (config.get("logits_scaling") or 1.0)
    return Head(body, layer, float(scale), config.get("final_logit_softcapping"))
