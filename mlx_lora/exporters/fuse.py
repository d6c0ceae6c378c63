"""Fold an adapter into its base, and measure the error that quantizing or rounding adds to it.

A quantized weight changes in steps of its scale; an update smaller than half a step vanishes (mlx-lm#1172). So
for each layer the actual change R is compared with the update D:

    D = scale B A,  R = stored(W + D) - W
    projection = <R, D> / <D, D>   1 if R has the whole update in it, 0 if nothing; blind to what else is in R
    error = |R - D| / |D|          all that was added or lost

Neither is what the adapter's effect lost: that takes data (api/fuse.py).

The folder has the dtypes of the base's files, because a run's compute dtype depends only on the machine. Before it is
put under its final name it is read back as mlx-lm will read it.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.base import LINEAR, QUANTIZED, exact_weight
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.adapters.lora import group_update
from mlx_lora.adapters.qat import FakeQuantized, fused_layer
from mlx_lora.config.rules import check_options
from mlx_lora.exporters.adapter_config import check_fusing, classifier_config, padding_token, set_padding_token
from mlx_lora.exporters.adapter_folder import AdapterInfo
from mlx_lora.exporters.peft import own_path, peft_path
from mlx_lora.exporters.rounding import Budget, CalibrationTokens, choose_bits, compensated_layers, rounded_layer
from mlx_lora.models.config import is_encoder
from mlx_lora.models.convert import copy_side_files
from mlx_lora.models.draft_folder import keep_draft
from mlx_lora.models.folder import ShardWriter, load_weights, merge_mark
from mlx_lora.models.head import SCORE_WEIGHT
from mlx_lora.models.load import Base
from mlx_lora.models.quantize import AFFINE, QuantFormat, dequantize_model
from mlx_lora.models.vision import take_tower
from mlx_lora.utils.errors import InputError, RunError, first_of
from mlx_lora.utils.files import check_new_folder, check_writable, replacing_folder
from mlx_lora.utils.progress import tracked

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rounding:
    """How the fused layers of a quantized base are stored.

    Attributes:
        dequantize: make the whole model float.
        bits: of the fused layers; None: their base's own.
        tokens: to measure layers with, for the two that follow; None: neither is asked for.
        compensate: round for the layers' outputs on the tokens, instead of each weight for itself.
        new_grid: round on a new grid where a weight is rounded for itself, instead of its base's own.
        budget: bytes that the model may take; layers that lose most get more bits within them.
    """

    dequantize: bool = False
    bits: int | None = None
    tokens: CalibrationTokens | None = None
    compensate: bool = False
    new_grid: bool = False
    budget: Budget | None = None

    def check(self, base: Base) -> None:
        """Refuse what the base cannot have, before the work.

        Raises:
            InputError: naming the flag.
        """
        asked = {"dequantize": self.dequantize, "fused_bits": self.bits, "compensate": self.compensate}
        check_options("fuse", asked | {"bits_budget": self.budget})
        layers = adapter_layers(base.model).values()
        if self.bits is not None:
            own = min((layer.base.bits for layer in layers if isinstance(layer.base, QUANTIZED)), default=None)
            if own is None:
                raise InputError(
                    f"--fused-bits {self.bits}: --model is not quantized, and fuses without loss; leave it out"
                )
            if own >= self.bits:
                more = "leave it out" if own >= 8 else "give more, or leave it out"
                raise InputError(f"--fused-bits {self.bits}: the base's layers have {own} bits already; {more}")
        flag = "--compensate" if self.compensate else "--bits-budget" if self.budget else None
        if flag is None:
            return
        if not any(isinstance(layer.base, QUANTIZED) for layer in layers):
            raise InputError(f"{flag}: --model is not quantized, and fuses without loss; leave it out")
        if not any(is_rounded(layer, self) for layer in layers):
            raise InputError(f"{flag}: this adapter fuses without rounding (--qat or --method qa-lora); leave it out")
        if not any(is_rounded(layer, self) and layer.OVER is LINEAR for layer in layers):
            raise InputError(
                f"{flag}: is for linear layers, and this adapter has only others that are rounded (experts, embeddings); "
                "use --fused-bits 8"
            )


@dataclass(frozen=True)
class Survival:
    """What rounding did to one layer's update.

    Attributes:
        projection: the part of the change that points where the update does, relative to the update.
        error: size of the difference of change and update, relative to the update.
        bits: of the layer that was written; None: float.
    """

    projection: float
    error: float
    bits: int | None = None


def fuse_adapter(
    model: nn.Module,
    dequantize: bool,
    bits: int | None = None,
    chosen: Mapping[str, int] | None = None,
    rounded: Mapping[str, nn.Module] | None = None,
    *,
    new_grid: bool = False,
) -> dict[str, Survival]:
    """Replace every adapter layer of `model` by one layer with the adapter folded into its base.

    Args:
        model: adapted; it and its base are changed in place.
        dequantize: leave fused layers in float; else those of a quantized base are quantized like it.
        bits: of the fused layers of a quantized base; None: its own.
        chosen: path -> bits of layers that get others.
        rounded: path -> fused layer, of those that are rounded already.
        new_grid: choose a new grid for affine layers, instead of their base's.

    Returns:
        path -> survival of the update; a zero update counts as one that survived.

    Raises:
        InputError: an embedding's tied head is not adapted, and one weight cannot be both adapted and not.
    """
    survival, fused, rounded = {}, [], rounded or {}
    layers, tied = adapter_layers(model), own_path("lm_head", dict(model.named_modules())) is None
    for path, layer in tracked(layers.items(), "Fusing", len(layers), "layers"):
        layer.check_tied_head(path, tied=tied)
        base, own_bits = layer.base, (chosen or {}).get(path, bits)
        update = None if dequantize or own_bits or path in rounded else group_update(layer)
        if update is not None:
            whole = copy.copy(base)  # packed numbers and scales are the base's
            whole.biases = (base.biases.astype(mx.float32) + update).astype(base.biases.dtype)
            survival[path] = _survival(base.biases, whole.biases, update, base.bits)
        else:
            if path in rounded:
                whole = rounded[path]
                if "bias" in base:
                    whole.bias = base.bias  # it has its stored dtype by now
            elif dequantize or not isinstance(base, QUANTIZED):
                whole = layer.fuse()
            elif own_bits is None and isinstance(layer, FakeQuantized):
                whole = fused_layer(layer)
            else:
                whole = rounded_layer(base, layer.merged(), own_bits, new_grid=new_grid)
            survival[path] = _survival(
                exact_weight(base), exact_weight(whole), layer.delta(), getattr(whole, "bits", None)
            )
        fused.append((path, whole))
    model.update_modules(tree_unflatten(fused))
    return survival


def is_rounded(layer: Any, rounding: Rounding) -> bool:
    """Tell whether an adapter layer's update is rounded when it is fused."""
    if rounding.dequantize or not isinstance(layer.base, QUANTIZED):
        return False
    return rounding.bits is not None or not (isinstance(layer, FakeQuantized) or group_update(layer) is not None)


def _survival(before: mx.array, after: mx.array, update: mx.array, bits: int | None) -> Survival:
    arrived = after.astype(mx.float32) - before.astype(mx.float32)
    size = mx.square(update).sum().item()
    if size == 0:
        return Survival(1.0, 0.0, bits)
    projection = (arrived * update).sum().item() / size
    return Survival(projection, (mx.square(arrived - update).sum().item() / size) ** 0.5, bits)


def write_fused(
    base: Base,
    out: Path,
    info: AdapterInfo,
    rounding: Rounding,
    *,
    force: bool,
    keep_dtype: bool = False,
) -> dict[str, Survival]:
    """Fuse the adapter on `base.model` and write the result as a model folder, atomically.

    Args:
        base: adapted; not usable as the base afterwards.
        out: the folder to write.
        info: of the adapter; its chat template becomes the model's.
        rounding: how fused layers are stored.
        force: replace an existing model folder.
        keep_dtype: write the dtype that the base was cast to on request, not that of its files. A dequantized base
            always keeps it, because its files have no float dtype.

    Raises:
        InputError: `out` must not be written, or the base cannot be rounded so.
        RunError: the written model cannot be read back.
    """
    out, scores = out.resolve(), SCORE_WEIGHT in info.full
    if scores:
        check_fusing(base, rounding.dequantize)
    rounding.check(base)
    check_new_folder(out, force, "config.json")
    stored = sum(p.nbytes for _, p in tree_flatten(base.model.parameters()))
    check_writable(out, "--out", stored)
    if base.folder.resolve().is_relative_to(out):
        raise InputError(f"--out {out}: holds the base {base.folder}; give another folder")
    mark = merge_mark(base.model, base.config)
    dequantize = rounding.dequantize
    chosen, rounded = _measured_rounding(base, rounding, info.full, keep_dtype)
    if not keep_dtype and not (dequantize and base.quantization):
        take_stored_dtypes(base, info.full)
    survival = fuse_adapter(base.model, dequantize, rounding.bits, chosen, rounded, new_grid=rounding.new_grid)
    tower = take_tower(base.model)  # only if the adapter changed it; it has a file of its own
    model, config = base.model, dict(base.config)
    if dequantize:
        model, config = dequantize_model(model, config)
    with replacing_folder(out) as folder:
        writer = ShardWriter(folder)
        parameters = tree_flatten(model.parameters())
        for name, array in tracked(parameters, "Writing", len(parameters), "tensors"):
            mx.eval(array)  # here, so that the progress is that of the work
            if not (scores and name.startswith("lm_head.")):  # a reward model has no other head
                writer.add(
                    {peft_path(name, str(config["model_type"])) if scores and is_encoder(model) else name: array}
                )
        writer.close()
        quantized = {path: one for path, one in model.named_modules() if isinstance(one, QUANTIZED)}
        if "quantization" in config and not quantized:
            config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
        elif "quantization" in config:  # layers with other bits, and float ones, have changed
            others = {path for path, _ in model.named_modules()} - quantized.keys()
            kept = {key: value for key, value in config["quantization"].items() if key not in others}
            for path, layer in quantized.items():
                own = QuantFormat.of(layer).layout
                if own != {name: kept.get(path, kept).get(name, AFFINE) for name in own}:
                    kept[path] = own
            config |= {"quantization": kept, "quantization_config": kept}
        config["mlx_lora"] = {"fused": mark, "base_model": base.model_id, "base_revision": base.revision}
        config |= classifier_config(base, info.head) if scores else {}
        keeps_vision = getattr(model, "of_mlx_vlm", False)
        mlx_lm.utils.save_config(config, folder / "config.json", keep_vision_config=keeps_vision)
        copy_side_files(base.folder, folder, tower)
        if base.adapter is not None:
            keep_draft(base.adapter, folder)
        if info.chat_template:
            (folder / "chat_template.jinja").write_text(info.chat_template, encoding="utf-8")
        if left := _left_out(base.folder, folder):
            log.info(f"Note: {out} is without {first_of(left, 5, ', ')} of the base's folder")
        if scores:  # not a model of mlx-lm's, which could read it back
            set_padding_token(folder, padding_token(base.hf_tokenizer, base.config))
            return survival
        _check_written(folder, model, out, trust_remote_code=_has_own_code(base))
    return survival


REWRITTEN = re.compile(r"[^/]*\.(safetensors|bin|pth?|gguf|index\.json)|README\.md|config\.json|(.*/)?\..*")


def _left_out(base: Path, fused: Path) -> list[str]:
    """Return the files of a base's folder that a fused one has not."""
    files = (file.relative_to(base).as_posix() for file in base.rglob("*") if file.is_file())
    return [name for name in sorted(files) if not REWRITTEN.fullmatch(name) and not (fused / name).exists()]


def _measured_rounding(
    base: Base, rounding: Rounding, full: tuple[str, ...], keep_dtype: bool
) -> tuple[dict[str, int], dict[str, nn.Module]]:
    """Return the bits that layers get within the budget, and the layers that are compensated."""
    tokens, model = rounding.tokens, base.model
    if tokens is None:
        return {}, {}
    untouched = model if keep_dtype else load_weights(base.folder, trust_remote_code=_has_own_code(base))[0]
    modules = dict(untouched.named_modules())
    stored = {
        path: layer.base if keep_dtype else modules[path]
        for path, layer in adapter_layers(model).items()
        if is_rounded(layer, rounding)
    }
    chosen: dict[str, int] = {}
    if rounding.budget is not None:
        # What was trained in full replaces its own arrays, as floats.
        files, now = (dict(tree_flatten(one.parameters())) for one in (untouched, model))
        names = {name: _without_adapter(name) for name in full}
        packed = [name.removesuffix("weight") for name in names.values() if name.endswith(".weight")]
        replaced = {path + part for path in packed for part in ("scales", "biases")} | set(names.values())
        size = sum(p.nbytes for name, p in files.items() if name not in replaced)
        size += sum(now[name].size * _dtype_of(plain, _floats_of(files)).size for name, plain in names.items())
        new_grid = rounding.compensate or rounding.new_grid
        chosen = choose_bits(model, tokens, stored, rounding.budget, size, new_grid=new_grid)
    if not rounding.compensate:
        return chosen, {}
    bits = dict.fromkeys(stored, rounding.bits) if rounding.bits else chosen
    made = compensated_layers(model, tokens, stored, bits)
    plain = len(stored) - len(made.layers)
    rest = f"; {plain} layers of experts or embeddings are rounded plainly" if plain else ""
    log.info(
        f"Compensated {len(made.layers)} layers on {tokens.tokens:,} tokens of {tokens.of}: on these, their outputs have "
        f"{made.kept_error:.0%} of the error that plain rounding makes{rest}"
    )
    return chosen, made.layers


def _floats_of(stored: Mapping[str, mx.array]) -> dict[str, mx.array]:
    return {name: p for name, p in stored.items() if mx.issubdtype(p.dtype, mx.floating)}


def _without_adapter(name: str) -> str:
    """Return a parameter's name in the base's files."""
    return name.replace(".linear.", ".").replace(".embedding.", ".")


def _dtype_of(name: str, floats: Mapping[str, mx.array]) -> mx.Dtype:
    """Return the dtype of a float of the base's files, or if it is none of them, of most of these."""
    if name in floats:
        return floats[name].dtype
    sizes: dict[mx.Dtype, int] = {}
    for p in floats.values():
        sizes[p.dtype] = sizes.get(p.dtype, 0) + p.nbytes
    return max(sizes, key=sizes.__getitem__)


def _has_own_code(base: Base) -> bool:
    """Tell whether the base's folder has Python code, which the user allowed when loading it."""
    return base.config.get("model_file") is not None


def take_stored_dtypes(base: Base, full: tuple[str, ...], casts_full: bool = True) -> None:
    """Restore the base's arrays from its files.

    Loading casts to the compute dtype, for example on a Mac float16 scales and float32 norms to bfloat16.

    Args:
        base: its model is changed in place; it may have an adapter.
        full: names of the parameters that were trained in full.
        casts_full: give these the dtype of those that they replace; else they stay as they are.
    """
    untouched, _ = load_weights(base.folder, trust_remote_code=_has_own_code(base))
    stored, changed = _floats_of(dict(tree_flatten(untouched.parameters()))), []
    for name, p in tree_flatten(base.model.parameters()):
        plain = _without_adapter(name)
        if name == SCORE_WEIGHT:
            continue  # stays float32
        if name in full and not casts_full:
            continue
        if name in full:
            changed.append((name, p.astype(_dtype_of(plain, stored))))
        elif plain in stored and stored[plain].shape == p.shape and stored[plain].dtype != p.dtype:
            changed.append((name, stored[plain]))
    base.model.load_weights(changed, strict=False)


def _check_written(folder: Path, model: nn.Module, out: Path, *, trust_remote_code: bool) -> None:
    """Read a folder back like mlx-lm, and check every name, shape and dtype, and the values of all vectors.

    mlx-lm changes some families' weights while loading (shifted norms, transposed convolutions). It must not change
    the weights of the fused model, which it has already changed once.

    Raises:
        RunError: something differs; the folder is not kept.
    """
    try:
        found, _ = load_weights(folder, trust_remote_code)
    except InputError as error:
        raise RunError(
            f"--out {out}: not written, mlx-lm cannot load the fused model ({error}); keep the adapter separate"
        ) from error
    wanted, read = dict(tree_flatten(model.parameters())), dict(tree_flatten(found.parameters()))
    differ = sorted(wanted.keys() ^ read.keys()) or [
        name
        for name, p in wanted.items()
        if (p.shape, p.dtype) != (read[name].shape, read[name].dtype)
        or (p.ndim == 1 and not mx.array_equal(p, read[name], equal_nan=True).item())
    ]
    if differ:
        raise RunError(
            f"--out {out}: not written, mlx-lm reads {first_of(differ, 3, ', ')} back differently; keep the adapter "
            "separate"
        )
