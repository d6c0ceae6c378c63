"""Write an adapter of a vision-language model for stock mlx-vlm.

It is mlx-lm's form with two differences: `keys` are the layers' whole paths, and a few models have other names there.

    here, and in mlx-lm                                mlx-vlm
    language_model.model.layers.0.self_attn.q_proj     language_model.layers.0.self_attn.q_proj       SmolVLM, Idefics 3
                                                       the same path                                  all others
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import AdapterLayer
from mlx_lora.exporters.adapter_folder import CONFIG_FILE, AdapterInfo, save_adapter
from mlx_lora.models.folder import save_tensors, write_json
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import read_json

WEIGHTS_FILE = "adapters.safetensors"
# model_type -> our prefix, mlx-vlm's.
NAMES: dict[str, tuple[str, str]] = dict.fromkeys(("smolvlm", "idefics3"), ("language_model.model.", "language_model."))


# Layers whose `weight` mlx-vlm's own code reads, which its adapter layers do not have.
READ = ("vision_tower.patch_embedder.input_proj",)  # Gemma 4


def write_mlx_vlm(folder: Path, model: nn.Module, info: AdapterInfo, kind: str) -> None:
    """Write an adapter folder that mlx-vlm's `load` takes as `adapter_path`.

    Args:
        folder: to write.
        model: adapted.
        info: of the adapter.
        kind: model_type of the base.

    Raises:
        InputError: the adapter has more than low-rank factors on layers, or is on a layer that mlx-vlm cannot adapt.
    """
    if info.full or info.qat:
        raise InputError(
            "--to mlx-vlm: the adapter has whole trained parts, or rounding; fuse it instead (mlx-lora fuse)"
        )
    modules = dict(model.named_modules())
    if unfit := [path for path in READ if isinstance(modules.get(path), AdapterLayer)]:
        raise InputError(f"--to mlx-vlm: it cannot adapt {unfit[0]}; fuse the adapter instead (mlx-lora fuse)")
    save_adapter(folder, model, info, same_rank=True)
    ours, theirs = NAMES.get(kind, ("", ""))
    stored = mx.load(str(folder / WEIGHTS_FILE))
    if not isinstance(stored, dict):
        raise ValueError(f"{WEIGHTS_FILE} is no file of tensors")
    named = {
        theirs + name.removeprefix(ours) if ours and name.startswith(ours) else name: array
        for name, array in stored.items()
    }
    mx.eval(named)
    save_tensors(folder / WEIGHTS_FILE, named)
    config = read_json(folder / CONFIG_FILE, "export it again")
    config["lora_parameters"]["keys"] = sorted({name.rpartition(".")[0] for name in named})
    write_json(folder / CONFIG_FILE, config)
