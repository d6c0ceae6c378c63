"""Read an adapter into factors for a row of a served batch, and blend several into one.

Adapters that cannot differ between the rows of a batch are refused with a reason: those with parameters trained in full or
of a mixture's experts (`fuse` folds them into a model, which can then be the base), and DoRA on embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.artifacts.adapter import load_adapter
from mlx_lora.models.load import Base
from mlx_lora.serving.pools import LayerFactors
from mlx_lora.serving.routed import unrouted_twin
from mlx_lora.system.errors import InputError


@dataclass(frozen=True)
class AdapterFactors:
    """An adapter, ready to be served.

    Attributes:
        layers: path -> its factors.
        method: the method that trained it.
        chat_template: the Jinja text that it was trained with, if that is not the base's own.
    """

    layers: dict[str, LayerFactors]
    method: str
    chat_template: str | None

    @property
    def nbytes(self) -> int:
        """The bytes of all its factors."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(layer.a.shape[1] for layer in self.layers.values())


def read_factors(base: Base, folder: Path, dtype: mx.Dtype, ignore_fingerprint: bool = False) -> AdapterFactors:
    """Read an adapter folder from us, mlx-lm or PEFT.

    Args:
        base: the served base; its model may be routed, and is not changed.
        folder: of the adapter.
        dtype: of the activations; the factors are rounded to it, as `generate` does in each call.
        ignore_fingerprint: allow an adapter that was trained on another base of the same shape.

    Raises:
        InputError: it does not fit this base, or cannot differ by row.
    """
    twin = dataclasses.replace(base, model=unrouted_twin(base.model))
    info = load_adapter(twin, folder, ignore_fingerprint)
    layers = adapter_layers(twin.model)
    problems = [f"trains {len(info.full)} parameters in full ({info.full[0]} ...)"] if info.full else []
    problems += sorted({layer.NOT_FOR_A_ROW for layer in layers.values() if layer.NOT_FOR_A_ROW})
    if problems:
        raise InputError(
            f"{folder}: {' and '.join(problems)}, which cannot differ by row of a batch; "
            "fuse it with mlx-lora fuse and serve the result as a base"
        )
    factors = {
        path: LayerFactors(*layer.serving_factors(dtype), adapts_head=layer.adapts_head)
        for path, layer in layers.items()
    }
    mx.eval([(f.a, f.b) if f.gain is None else (f.a, f.b, f.gain) for f in factors.values()])
    return AdapterFactors(factors, info.method, info.chat_template)


def blend_factors(parts: Sequence[tuple[str, AdapterFactors, float]]) -> AdapterFactors:
    """Return the adapter that adds sum_i w_i D_i: its factors are concatenated, with the weights in B, so ranks add up.

    Args:
        parts: name, adapter and weight of each.

    Raises:
        InputError: there are no parts, a DoRA, whose update is not a sum, or embeddings that do not adapt the same.
    """
    if not parts:
        raise InputError("a blend without adapters; name adapters and their weights")
    doras = [name for name, part, _ in parts if any(layer.gain is not None for layer in part.layers.values())]
    if doras:
        raise InputError(f"blend with {', '.join(doras)}: a DoRA's update is not a sum; blend LoRA adapters")
    layers: dict[str, LayerFactors] = {}
    for path in {path: None for _, part, _ in parts for path in part.layers}:
        own = [(part.layers[path], weight) for _, part, weight in parts if path in part.layers]
        if len({layer.adapts_head for layer, _ in own}) > 1:
            raise InputError(f"blend: {path} is adapted as the output head by some and not by others; leave one out")
        a = mx.concatenate([layer.a for layer, _ in own], axis=1)
        b = mx.concatenate([weight * layer.b for layer, weight in own], axis=0)
        layers[path] = LayerFactors(a, b, adapts_head=own[0][0].adapts_head)
    mx.eval([(layer.a, layer.b) for layer in layers.values()])
    templates = {part.chat_template for _, part, _ in parts}
    return AdapterFactors(layers, "blend", templates.pop() if len(templates) == 1 else None)
