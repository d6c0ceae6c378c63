"""A model cut in two: the body that makes hidden states, and the output head with all that is done to its logits.

mlx-lm's models return logits of every position. Loss without logits needs the hidden states instead, and
must then do itself what each family does after the head: scale (Cohere, Granite), soft cap (Gemma 2), bias.
What the parts are called and which settings hold the factors is read from the tables below. A family that
they do not know, or know wrongly, costs only memory: the cut is checked against the model's own logits
before it is used (training/losses.py).

Shapes: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.models.matmul import packed_arrays

FLOAT_HEADS = (nn.Linear, nn.Embedding)
QUANTIZED_HEADS = (nn.QuantizedLinear, nn.QuantizedEmbedding)
EMBEDDING_HEADS = (nn.Embedding, nn.QuantizedEmbedding)

# What mlx-lm's families call their parts: the first that a model has is taken.
BODIES = ("model.language_model", "model", "transformer", "backbone")
HEADS = ("lm_head", "output")
# The head of a model that has none of its own, in its body.
EMBEDDINGS = ("embed_tokens", "wte", "embeddings", "word_embeddings", "embedding", "tok_embeddings", "token_embeddings")
# Heads that the body itself applies: GPT-NeoX and Pythia, Lille, Gemma 3n.
INNER_HEADS = ("model.embed_out", "transformer.tok_embeddings", "embed_tokens")
# Settings that multiply the logits, and that divide them.
FACTORS = ("logit_scale", "output_multiplier")
DIVISORS = ("logits_scaling",)
# (factor, divisor) that count only where the head is the embedding (Falcon-H1), or only where it is not (MiniCPM).
TIED_RATIO = ("lm_head_multiplier", "embedding_multiplier")
UNTIED_RATIO = ("dim_model_base", "hidden_size")
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
# Soft caps that stand in mlx-lm's code and in no config, by `model_type`.
FIXED_SOFT_CAPS = {"nanochat": 15.0}


@dataclass(frozen=True)
class Head:
    """An output head: logits = cap(scale * (h W^T + bias)).

    Attributes:
        body: maps (B, T) ids to (B, T, D) hidden states; called through `hidden`.
        layer: the module that holds W: a linear layer, or the embedding it is tied to; quantized or not.
        scale: factor on the logits.
        soft_cap: logits become cap * tanh(logits / cap); None for most families.
        inner: whether the body calls the layer itself and returns logits.
    """

    body: nn.Module
    layer: nn.Module
    scale: float = 1.0
    soft_cap: float | None = None
    inner: bool = False

    def hidden(self, inputs: mx.array) -> mx.array:
        """Return the hidden states that the layer makes logits of, (B, T) -> (B, T, D)."""
        if not self.inner:
            return self._run(inputs)
        with _intercepted(self.layer) as seen:
            out = self._run(inputs)  # what becomes of the states after the layer is never computed
        return seen[-1] if seen else out

    def _run(self, inputs: mx.array) -> mx.array:
        """Call the body; some bodies cannot do without a `cache` argument."""
        cache = inspect.signature(type(self.body).__call__).parameters.get("cache")
        return self.body(inputs, cache=None) if cache and cache.default is cache.empty else self.body(inputs)

    @property
    def arrays(self) -> list[mx.array]:
        """The head's weight as it is stored: `[weight]`, or packed `[weight, scales(, biases)]`."""
        return packed_arrays(self.layer) if isinstance(self.layer, QUANTIZED_HEADS) else [self.layer.weight]

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
        if not isinstance(self.layer, QUANTIZED_HEADS):
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
        embeds = isinstance(self.layer, EMBEDDING_HEADS)
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


class _Intercepted:
    """Mixed in front of a head's class: notes the hidden states that come in, and lets them through as they are."""

    def as_linear(self, hidden: mx.array) -> mx.array:
        self.seen.append(hidden)
        return hidden


class _InterceptedLinear(_Intercepted):
    """The same for a linear layer; an embedding's call still embeds."""

    def __call__(self, hidden: mx.array) -> mx.array:
        return self.as_linear(hidden)


@contextmanager
def _intercepted(layer: nn.Module) -> Iterator[list[mx.array]]:
    """Keep a head from making logits inside the block; only the instance's class changes, and changes back."""
    seen: list[mx.array] = []
    own = type(layer)
    mixed = _Intercepted if isinstance(layer, EMBEDDING_HEADS) else _InterceptedLinear
    layer.__class__ = type(own.__name__, (mixed, own), {"seen": seen})
    try:
        yield seen
    finally:
        layer.__class__ = own


def find_head(model: nn.Module, config: dict[str, Any]) -> Head | str:
    """Cut `model` into body and head.

    Args:
        model: an mlx-lm model, adapted or not.
        config: its config.json; a multimodal one keeps the text part under `text_config`.

    Returns:
        The head, or in a few words why there is none: the caller then uses the plain loss and says so.
    """
    config = {**config, **(config.get("text_config") or {})}
    head = _first(model, HEADS)
    for wrapper in ("language_model", "model.language_model"):  # multimodal wrappers pass text straight through
        inside = None if head is not None else _part(model, wrapper)
        if inside is not None:
            return find_head(inside, config)
    layer, body = _first(model, INNER_HEADS), model
    inner = layer is not None
    if not inner:
        body = _first(model, BODIES)
        if body is None:
            return f"the model has no part named {' or '.join(f'`{name}`' for name in BODIES)}"
        layer = _first(body, EMBEDDINGS) if head is None else head
    if layer is None:
        return "its head and its embedding have names that are not known"
    if isinstance(layer, mx.array):
        return "the head is a bare array"
    if not isinstance(layer, FLOAT_HEADS + QUANTIZED_HEADS):
        return f"the head is {type(layer).__name__}"
    if layer.trainable_parameters():
        return "the head is trained itself"  # the fused loss has no gradient for it
    return Head(body, layer, _scale(config, isinstance(layer, EMBEDDING_HEADS)), _soft_cap(config), inner)


def _part(module: nn.Module, path: str) -> nn.Module | mx.array | None:
    """Return what lies at a dotted path of names, None where nothing does."""
    part: Any = module
    for name in path.split("."):
        part = part.get(name) if isinstance(part, nn.Module) else None
    return part


def _first(module: nn.Module, paths: tuple[str, ...]) -> nn.Module | mx.array | None:
    """Return the first part that a module has."""
    return next((part for part in (_part(module, path) for path in paths) if part is not None), None)


def _scale(config: dict[str, Any], tied: bool) -> float:
    """Return the factor on the logits; a setting that is absent, null or 0 has none."""
    factor, divisor = TIED_RATIO if tied else UNTIED_RATIO
    ratio = (factor, divisor) if config.get(factor) else ()
    scale = 1.0
    for name in (*FACTORS, *ratio[:1]):
        scale *= config.get(name) or 1.0
    for name in (*DIVISORS, *ratio[1:]):
        scale /= config.get(name) or 1.0
    return float(scale)


def _soft_cap(config: dict[str, Any]) -> float | None:
    """Return the bound on the logits, None for none."""
    caps = [config[name] for name in SOFT_CAPS if config.get(name)]
    return caps[0] if caps else FIXED_SOFT_CAPS.get(config.get("model_type", ""))
