"""An adapter as a GGUF file that llama.cpp applies to the base GGUF (`llama-cli -m base.gguf --lora FILE`).

Tensors are named after the base's, `blk.0.attn_q.weight.lora_a` (r, in) and `.lora_b` (out, r), both float32.
llama.cpp multiplies their product by alpha / r; rows of B move with the base's where it permuted q and k.

Source: ggml-org/llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGUFWriter

from mlx_lora.adapters.forms import DORA, EMBEDDING_ADAPTERS, EXPERT_ADAPTERS
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.errors import InputError
from mlx_lora.files import replacing_file
from mlx_lora.models.gguf_arch import gguf_places, redo_rope_order


def write_gguf_adapter(
    file: Path, model: nn.Module, config: dict[str, Any], base_name: str, full: tuple[str, ...] = ()
) -> None:
    """Write the adapter on `model` as a LoRA GGUF.

    Args:
        file: replaced whole.
        model: adapted.
        config: its config.json.
        base_name: the base's id, for the metadata.
        full: names of parameters trained in full, which the format has no place for.

    Raises:
        InputError: an architecture, or layers, that llama.cpp's adapters do not know.
    """
    layers = adapter_layers(model)
    architecture, places = gguf_places(config)
    problems = [f"{path} has no tensor in a {architecture} GGUF" for path in layers if f"{path}.weight" not in places]
    problems += [f"{path} is an embedding" for path, layer in layers.items() if isinstance(layer, EMBEDDING_ADAPTERS)]
    problems += [f"{path} is a DoRA layer" for path, layer in layers.items() if isinstance(layer, DORA)]
    problems += [f"{path} adapts experts" for path, layer in layers.items() if isinstance(layer, EXPERT_ADAPTERS)]
    problems += [f"{name} was trained in full" for name in full]
    problems += [] if layers else ["the model has no adapter"]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InputError(f"--to gguf-adapter: {'; '.join(problems[:4])}{more}; fuse it instead, or adapt other layers")
    alphas = {layer.scale * layer.lora_a.shape[1] for layer in layers.values()}
    # One alpha for the whole file: where layers differ, it is the rank and the scale goes into B.
    alpha = alphas.pop() if len(alphas) == 1 else None
    with replacing_file(file) as temporary:
        writer = GGUFWriter(str(temporary), architecture)
        writer.add_type("adapter")
        writer.add_name(base_name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0 if alpha is None else alpha)  # 0: multiply by 1
        for path, layer in layers.items():
            name, heads = places[f"{path}.weight"]
            a = np.array(layer.lora_a.T.astype(mx.float32))  # (r, in)
            b = np.array((layer.lora_b * (layer.scale if alpha is None else 1.0)).T.astype(mx.float32))  # (out, r)
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(redo_rope_order(b, heads) if heads else b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
