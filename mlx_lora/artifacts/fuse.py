"""Fold an adapter into its base, and say how much of it is left when the result is quantised or rounded.

A quantised weight moves in steps of its scale; an update smaller than half a step vanishes (mlx-lm#1172). So
for each layer what arrived is compared with what was meant:

    D = scale B A,  R = stored(W + D) - W
    kept  = <R, D> / <D, D>        1 when the update arrived, 0 when none of it did
    error = |R - D| / |D|          rounding noise beside it
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.forms import EMBEDDING_ADAPTERS, base_of
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.adapters.parts import QUANTISED, dense_weight
from mlx_lora.errors import InputError
from mlx_lora.files import check_writable, replacing_folder
from mlx_lora.models.converting import copy_side_files
from mlx_lora.models.load import Base
from mlx_lora.models.quantize import dequantise_model
from mlx_lora.models.saving import ShardWriter, check_out


@dataclass(frozen=True)
class Survival:
    """What became of one layer's update.

    Attributes:
        kept: share of the update that arrived.
        error: what arrived beside it, relative to the update.
    """

    kept: float
    error: float


def fuse_adapter(model: nn.Module, dequantize: bool) -> dict[str, Survival]:
    """Replace every adapter layer of `model` by one layer that holds base and adapter.

    Args:
        model: adapted; changed in place, its base object too.
        dequantize: leave fused layers in float; else a quantised base's are quantised as it was.

    Returns:
        path -> what became of the update. A zero update arrives whole.

    Raises:
        InputError: an embedding whose tied head is not adapted: one weight cannot be both.
    """
    survival, fused = {}, []
    for path, layer in adapter_layers(model).items():
        if isinstance(layer, EMBEDDING_ADAPTERS) and not layer.adapts_head and "lm_head" not in model:
            raise InputError(
                f"{path}: its adapter leaves the tied head alone, and one weight cannot hold both; keep the adapter apart"
            )
        base = base_of(layer)
        whole = layer.fuse()
        if isinstance(base, QUANTISED) and not dequantize:
            own_scale = {"global_scale": True} if "global_scale" in base else {}  # of each nvfp4 expert
            whole = whole.to_quantized(base.group_size, base.bits, base.mode, **own_scale)
        survival[path] = _survival(dense_weight(base), dense_weight(whole), layer.delta())
        fused.append((path, whole))
    model.update_modules(tree_unflatten(fused))
    return survival


def _survival(before: mx.array, after: mx.array, update: mx.array) -> Survival:
    arrived = after.astype(mx.float32) - before.astype(mx.float32)
    size = mx.square(update).sum().item()
    if size == 0:
        return Survival(1.0, 0.0)
    kept = (arrived * update).sum().item() / size
    return Survival(kept, (mx.square(arrived - update).sum().item() / size) ** 0.5)


def write_fused(
    base: Base, out: Path, *, dequantize: bool, force: bool, chat_template: str | None
) -> dict[str, Survival]:
    """Fuse the adapter on `base.model` and write the result as a model folder, all or nothing.

    Args:
        base: adapted; not usable as that base afterwards.
        out: the folder to make.
        dequantize: make the whole model float.
        force: replace an existing model folder.
        chat_template: the adapter's own, which then is the model's.

    Raises:
        InputError: `out` must not be written.
    """
    out = out.resolve()
    check_out(out, force=force)
    stored = sum(p.nbytes for _, p in tree_flatten(base.model.parameters()))
    check_writable(out, "--out", stored)
    if base.folder.resolve().is_relative_to(out):
        raise InputError(f"--out {out}: holds the base {base.folder}; give another folder")
    survival = fuse_adapter(base.model, dequantize)
    model, config = base.model, dict(base.config)
    if dequantize:
        model, config = dequantise_model(model, config)
    with replacing_folder(out) as folder:
        writer = ShardWriter(folder)
        for name, array in tree_flatten(model.parameters()):
            writer.add({name: array})
        writer.close()
        mlx_lm.utils.save_config(_config(config, base), folder / "config.json")
        copy_side_files(base.folder, folder)
        if chat_template:
            (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return survival


def _config(config: dict[str, Any], base: Base) -> dict[str, Any]:
    """Return config.json of the fused model: it says what it was made of."""
    return {**config, "mlx_lora": {"fused": True, "base_model": base.model_id, "base_revision": base.revision}}
