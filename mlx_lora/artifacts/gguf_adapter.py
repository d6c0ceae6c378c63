"""Write an adapter as a GGUF file that llama.cpp applies to the base GGUF (`llama-cli -m base.gguf --lora FILE`).

Tensors are named after the base's, `blk.0.attn_q.weight.lora_a` (r, in) and `.lora_b` (out, r), both float32; those of
experts have the experts' axis in front. llama.cpp multiplies their product by alpha / r; rows of B and columns of A are
reordered like the base's.

Source: ggml-org/llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGUFWriter

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.artifacts.peft_experts import joined_experts
from mlx_lora.models.gguf_arch import gguf_weights
from mlx_lora.models.gguf_mapping import TensorMapping
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import replacing_file


def write_gguf_adapter(file: Path, model: nn.Module, base_name: str, full: tuple[str, ...] = ()) -> None:
    """Write the adapter on `model` as a LoRA GGUF.

    Args:
        file: replaced atomically.
        model: adapted.
        base_name: the base's id, for the metadata.
        full: names of parameters trained in full, which the format cannot hold.

    Raises:
        InputError: llama.cpp's adapters do not support the architecture or the layers.
    """
    layers = adapter_layers(model)
    architecture, tensors = gguf_weights(model)
    known = {layer for mapping in tensors.values() for layer in mapping.layers}
    problems = [f"{path} has no tensor in a {architecture} GGUF" for path in layers if path not in known]
    # Newer versions scale the base's product before they add the adapter's, older ones scale the sum.
    scaled = {layer for mapping in tensors.values() if mapping.scaled for layer in mapping.layers}
    problems += [
        f"{path} has a scale for each expert, which only some versions of llama.cpp apply to the adapter"
        for path in layers
        if path in scaled
    ]
    problems += [f"{path} {layer.NOT_IN_GGUF}" for path, layer in layers.items() if layer.NOT_IN_GGUF]
    problems += [f"{name} was trained in full" for name in full]
    problems += [] if layers else ["the model has no adapter"]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InputError(f"--to gguf-adapter: {'; '.join(problems[:4])}{more}; fuse it instead, or adapt other layers")
    alphas = {layer.scale * layer.rank for layer in layers.values()}
    # The file has one alpha: if layers differ, it is the rank, and the scale is multiplied into B.
    alpha = alphas.pop() if len(alphas) == 1 else None
    with replacing_file(file) as temporary:
        writer = GGUFWriter(str(temporary), architecture)
        writer.add_type("adapter")
        writer.add_name(base_name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0 if alpha is None else alpha)  # 0: multiply by 1
        for name, mapping in tensors.items():
            own = [layers.get(path) for path in mapping.layers]
            if name.endswith(".weight") and any(layer is not None for layer in own):
                a, b = _factors(own, alpha, mapping)
                writer.add_tensor(f"{name}.lora_a", a)
                writer.add_tensor(f"{name}.lora_b", b)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _factors(layers: list[Any], alpha: float | None, mapping: TensorMapping) -> tuple[np.ndarray, np.ndarray]:
    """Return A (r, in) and B (out, r), float32, in the base's order; for experts (E, r, in) and (E, out, r).

    Args:
        layers: the adapters of the tensor's parts; of several, None stands for one that is not adapted.
        alpha: the file's; None: the scale is multiplied into B.
        mapping: of the tensor.
    """
    if len(layers) > 1:
        a, b, scale = joined_experts(layers, in_turns=False)
    else:
        (layer,) = layers
        (a, b), scale = layer.transposed_factors(), layer.scale
    b = b * (scale if alpha is None else scale * a.shape[-2] / alpha)
    a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
    a = a if mapping.columns is None else a[..., mapping.columns.to_file(a.shape[-1])]
    b = b if mapping.rows is None else b[mapping.rows.to_file(len(b))]
    return np.ascontiguousarray(a), np.ascontiguousarray(b)
