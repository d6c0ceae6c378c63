"""Write a base's own files with the adapter in the weights that it changes, for architectures that MLX lays out in another way.

Everything else stays byte for byte as it was published: a vision tower, and a head that drafts tokens (`mtp.*`), too. A weight
is changed where its name is the one that PEFT has for the layer, and its values are the layer's.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.adapters.base import LINEAR, exact_weight
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.exporters.adapter_folder import AdapterInfo
from mlx_lora.exporters.peft import SHIFTED_KINDS, SHIFTED_NORMS, peft_path
from mlx_lora.models.draft_folder import FOLDER, KIND, read_draft
from mlx_lora.models.folder import merge_mark, read_safetensors_header, save_tensors, write_json
from mlx_lora.models.load import Base
from mlx_lora.utils.errors import InputError, first_of
from mlx_lora.utils.files import check_new_folder, check_writable, replacing_folder

log = logging.getLogger(__name__)

CLOSE = 0.01  # of a weight's largest value, by which it may differ from the file's: the base may compute in 16 bits


def write_published_layout(base: Base, out: Path, info: AdapterInfo, *, force: bool) -> None:
    """Write the merged model in the layout of the base's files, atomically.

    Args:
        base: adapted.
        out: the folder to write.
        info: of the adapter; its chat template becomes the model's.
        force: replace an existing model folder.

    Raises:
        InputError: the base's files have not transformers' layout, or what was trained has no place in them.
    """
    kind, layers = str(base.config["model_type"]), adapter_layers(base.model)
    files = sorted(base.folder.glob("*.safetensors"))
    stored = {name for file in files for name in read_safetensors_header(file)}
    places = {f"{peft_path(path, kind)}.weight": layer for path, layer in layers.items()}
    missing = [name for name, layer in places.items() if name not in stored or layer.OVER is not LINEAR] + list(
        info.full
    )
    if missing or not layers:
        raise InputError(
            f"--to hf: {first_of(missing, 2, ', ')} is no matrix in the files of {base.folder}; the base has to be the folder as it "
            "is published, in float, with an adapter of linear layers; use --to peft and merge in PEFT"
        )
    check_new_folder(out, force, "config.json")
    check_writable(out, "--out", sum(file.stat().st_size for file in files))
    with replacing_folder(out.resolve()) as folder:
        for file in base.folder.iterdir():
            if file.is_file() and file not in files and not file.name.startswith(("README", ".")):
                shutil.copyfile(file, folder / file.name)
        for file in files:
            tensors: Any = mx.load(str(file))
            for name in places.keys() & tensors.keys():
                save, layer = tensors[name], places[name]
                own, published = exact_weight(layer.base), save.astype(mx.float32)
                if own.shape != save.shape or mx.abs(own - published).max() > CLOSE * mx.abs(published).max():
                    raise InputError(
                        f"--to hf: {name} has other values in MLX than in {file}; use --to peft and merge in PEFT"
                    )
                tensors[name] = (published + layer.delta()).astype(save.dtype)
            if base.adapter and (base.adapter / FOLDER).is_dir():
                tensors |= _draft(base.adapter, kind, tensors)
            save_tensors(folder / file.name, tensors, "pt")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["mlx_lora"] = {"fused": merge_mark(base.model, base.config), "base_model": base.model_id}
        write_json(folder / "config.json", config)
        if info.chat_template:
            (folder / "chat_template.jinja").write_text(info.chat_template, encoding="utf-8")


def _draft(adapter: Path, kind: str, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return those of a file's tensors that an adapter's own draft head replaces, as they are published."""
    config, own = read_draft(adapter) or ({}, {})
    fits = config.get("model_type") == KIND and not config.get("quantization") and kind in SHIFTED_KINDS
    found = {f"mtp.{name}": array for name, array in own.items() if fits and f"mtp.{name}" in tensors}
    if not found and any(name.startswith("mtp.") for name in tensors):
        log.info("Note: with the base's head that drafts tokens; the adapter's has no place in these files")
    norms = (*SHIFTED_NORMS, "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    shifted = {name for name in found if name.removesuffix(".weight").endswith(norms)}
    return {n: (a - 1 if n in shifted else a).astype(tensors[n].dtype) for n, a in found.items()}
