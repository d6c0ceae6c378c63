"""The folder of a head that drafts tokens, in mlx-vlm's form: read it, and keep it when a model is converted, fused or exported.

MODEL/mtp, ADAPTER/mtp      config.json, model.safetensors
a model as it is published  has the head among its weights (`mtp.*`, or blocks after the last); mlx-vlm's splitters read it
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.models.folder import FOREIGN_ERRORS, read_safetensors_header, save_tensors, short, write_json
from mlx_lora.models.quantize import AFFINE, QuantFormat
from mlx_lora.utils.errors import InputError, first_of
from mlx_lora.utils.parsing import read_json

log = logging.getLogger(__name__)

FOLDER = "mtp"
TOKENS = "draft_tokens"  # entry of its config: the only tokens that it drafts
KIND = "qwen3_5_mtp"  # mlx-vlm's class of the heads that are used and trained here
DRAFTING = re.compile(r"(^|\.)(mtp\w*|nextn\w*|eagle\w*|medusa\w*)\.")
BLOCK = re.compile(r"(^|\.)layers\.(\d+)\.")


def read_draft(folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]] | None:
    """Return the config and the tensors of a model's or an adapter's draft head in mlx-vlm's form; None: it has none.

    Args:
        folder: has it in a folder of its own, or among the model's weights, as it is published.

    Raises:
        InputError: mlx-vlm is not installed, or has no form for it.
    """
    if (own := folder / FOLDER / "config.json").is_file():
        stored: Any = mx.load(str(own.with_name("model.safetensors")))
        return read_json(own, "convert the model again"), stored
    if not drafting_tensors(folder):
        return None
    try:
        from mlx_vlm.speculative.drafters.mtp_split import detect_mtp_splitter
    except ImportError:
        raise InputError("pip install 'mlx-lora[vision]' keeps it") from None
    splitter = detect_mtp_splitter(folder)
    if splitter is None:
        raise InputError("mlx-vlm has no form for it")
    try:
        return splitter.prepare(folder)
    except FOREIGN_ERRORS as error:
        raise InputError(f"mlx-vlm cannot read it ({short(error)})") from error


def drafting_tensors(folder: Path) -> list[str]:
    """Return the names of a model's tensors that draft tokens, which mlx-lm does not load."""
    if not (folder / "config.json").is_file():  # of an adapter
        return []
    config = read_json(folder / "config.json", "download the model again")
    text = config.get("text_config")
    blocks = {**config, **(text if isinstance(text, dict) else {})}.get("num_hidden_layers") or 10**9
    names = {name for file in folder.glob("*.safetensors") for name in read_safetensors_header(file)}
    after = {name for name in names if (found := BLOCK.search(name)) and int(found[2]) >= blocks}
    return sorted(after | {name for name in names if DRAFTING.search(name)})


def keep_draft(source: Path, folder: Path) -> None:
    """Write the draft head of a model or an adapter into a folder with the model, packed like the model's weights if it is not packed.

    What cannot be kept is named.

    Args:
        source: the model that it is made from, or an adapter.
        folder: has its config.json.
    """
    try:
        found = read_draft(source)
        if found is None:
            return
    except (InputError, *FOREIGN_ERRORS) as error:
        log.info(
            f"Note: without the head of {source} that drafts tokens ({first_of(drafting_tensors(source), 3, ', ')}): {short(error)}"
        )
        return
    config, tensors = found
    packing = read_json(folder / "config.json", "convert the model again").get("quantization")
    if packing and "quantization" not in config:
        wanted = QuantFormat(packing["bits"], packing["group_size"], packing.get("mode", AFFINE))
        config, tensors = packed(config, tensors, wanted)
    write_draft(folder, config, tensors)
    log.info(f"Kept the head that drafts tokens: {FOLDER}/, {sum(p.nbytes for p in tensors.values()) / 1e6:,.1f} MB")


def packed(
    config: dict[str, Any], tensors: dict[str, mx.array], wanted: QuantFormat
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Return a head with its matrices packed, but for the router's."""
    found = dict(tensors)
    for name in [name for name, array in tensors.items() if name.endswith(".weight") and array.ndim > 1]:
        if wanted.fits(tensors[name].shape[-1]) and not name.endswith("mlp.gate.weight"):
            path, arrays = name.removesuffix("weight"), wanted.quantize(tensors[name]).arrays
            found |= {path + part: array for part, array in zip(("weight", "scales", "biases"), arrays, strict=False)}
    return {**config, "quantization": wanted.layout, "quantization_config": wanted.layout}, found


def write_draft(folder: Path, config: dict[str, Any], tensors: dict[str, mx.array]) -> None:
    """Write a draft head into a folder of a model or an adapter."""
    (folder / FOLDER).mkdir(exist_ok=True)
    save_tensors(folder / FOLDER / "model.safetensors", tensors)
    write_json(folder / FOLDER / "config.json", config)
