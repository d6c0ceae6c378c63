"""Quantize weights and mlx-lm models, and measure what a layer loses."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from mlx_lora.utils.errors import InputError

AFFINE = "affine"  # the mode whose groups have a scale and a bias; the others are microscaling formats
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
DEFAULT_GROUP = 64  # mlx's default for affine layers
# mlx-lm's architectures whose tied head is `h @ embed_tokens.weight.T`, which a packed weight does not fit.
HEADS_FROM_STORED = ("llama4_text", "minicpm", "seed_oss")


@dataclass(frozen=True)
class QuantFormat:
    """How a weight is packed, as `mx.quantize` takes it.

    Attributes:
        bits: per code.
        group_size: codes that share a scale, along the weight's last axis.
        mode: `affine`, or a microscaling format.
        one, one_scale: the codes of the value 1 and of the scale 1 in a microscaling format.
    """

    bits: int
    group_size: int
    mode: str = AFFINE
    one: int = field(default=0, repr=False, compare=False)
    one_scale: int = field(default=0, repr=False, compare=False)

    @classmethod
    def of(cls, layer: Any) -> QuantFormat:
        """Return the format of a quantized layer."""
        return cls(layer.bits, layer.group_size, layer.mode)

    @property
    def layout(self) -> dict[str, Any]:
        """The keyword arguments of `mx.quantize`, and the entry in config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def fits(self, width: int) -> bool:
        """Return whether rows of `width` values divide into groups."""
        return width % self.group_size == 0

    def stored_bytes(self, numbers: int, scales: mx.Dtype) -> int:
        """Return the bytes of so many packed numbers; `scales` is the dtype of affine scales and biases."""
        return numbers * self.bits // 8 + numbers // self.group_size * (2 * scales.size if self.mode == AFFINE else 1)

    def quantize(self, weight: mx.array) -> PackedWeight:
        """Pack a float weight, (..., in), if `fits(in)`; affine scales get its dtype."""
        return PackedWeight(list(mx.quantize(weight, **self.layout)), self)

    def dequantize(self, weight: mx.array, scales: mx.array, biases: mx.array | None = None) -> mx.array:
        """Return packed codes as floats, (..., in), in the dtype of the scales (bfloat16 for the microscaling formats)."""
        return mx.dequantize(weight, scales, biases, **self.layout)

    def __str__(self) -> str:
        name = f"{self.bits}-bit" if self.mode == AFFINE else self.mode
        return f"{name}, group {self.group_size}"


# The microscaling formats, which have one number of bits and one group size each. Their codes are E2M1 and E4M3, their scales E8M0
# and, in nvfp4, E4M3.
MXFP4 = QuantFormat(4, 32, "mxfp4", one=2, one_scale=127)
MICROSCALING = {
    "mxfp4": MXFP4,
    "mxfp8": QuantFormat(8, 32, "mxfp8", one=0x38, one_scale=127),
    "nvfp4": QuantFormat(4, 16, "nvfp4", one=2, one_scale=0x38),
}
MODES = (AFFINE, *MICROSCALING)


@dataclass(frozen=True)
class PackedWeight:
    """A weight as `mx.quantize` returns it.

    Attributes:
        arrays: `[weight, scales]` or `[weight, scales, biases]`.
        quantization: how it is packed.
    """

    arrays: list[mx.array]
    quantization: QuantFormat

    def dequantize(self) -> mx.array:
        """Return (out, in), see `QuantFormat.dequantize`."""
        return self.quantization.dequantize(*self.arrays)

    def parameters(self, layer: str) -> dict[str, mx.array]:
        """Return the arrays under the names that mlx's quantized layers give them."""
        return {
            f"{layer}.{name}": array for name, array in zip(("weight", "scales", "biases"), self.arrays, strict=False)
        }


def choose_quantization(bits: int | None, group_size: int | None, mode: str | None) -> QuantFormat:
    """Return the quantization that the three flags ask for; the default is affine, 4 bits, groups of 64.

    Raises:
        InputError: MLX does not support a flag's value; the message has all of them.
    """
    mode = mode or AFFINE
    if mode not in MODES:
        raise InputError(f"--mode {mode}: MLX has no such mode; use {', '.join(MODES)}")
    if mode in MICROSCALING:
        quantization = MICROSCALING[mode]
        problems = [
            f"{flag} {given}: {mode} always has {fixed}; leave {flag} out"
            for flag, given, fixed in (
                ("--bits", bits, quantization.bits),
                ("--group-size", group_size, quantization.group_size),
            )
            if given not in (None, fixed)
        ]
    else:
        quantization = QuantFormat(4 if bits is None else bits, 64 if group_size is None else group_size)
        problems = [
            f"{flag} {value}: not one of {', '.join(map(str, allowed))}"
            for flag, value, allowed in (
                ("--bits", quantization.bits, AFFINE_BITS),
                ("--group-size", quantization.group_size, AFFINE_GROUPS),
            )
            if value not in allowed
        ]
    if problems:
        raise InputError("; ".join(problems))
    return quantization


def round_on_grid(
    weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Round a changed weight on the affine grid that it had before the change, and fit scales and biases to its codes.

    `mx.quantize` chooses a new grid for the sum of a quantized weight and an update, so the whole weight is rounded once more,
    which can cost more than the update gains. On the old grid, what was there is kept exactly. An update smaller than half a
    step changes no code, but as far as it is constant within a group, or in proportion to the codes, the fit keeps it:

        q = round((w - bias) / scale),   (scale, bias) = least squares of w over (q, 1) in each group

    Args:
        weight: (..., in), float32.
        scales, biases: (..., in / group), of the weight before the change.
        group_size, bits: of its layout.

    Returns:
        Codes (..., in / group, group), scales and biases (..., in / group), all float32.
    """
    groups = weight.reshape(*scales.shape, group_size)
    s, b = scales.astype(mx.float32)[..., None], biases.astype(mx.float32)[..., None]
    codes = mx.clip(mx.round((groups - b) / mx.where(s == 0, 1.0, s)), 0, 2**bits - 1)
    left = groups - (codes * s + b)  # zero where nothing changed, so that the grid stays as it was
    mean = codes.mean(axis=-1, keepdims=True)
    spread = codes - mean
    squares = mx.square(spread).sum(axis=-1, keepdims=True)
    # A group whose codes are equal has no slope.
    slope = (spread * left).sum(axis=-1, keepdims=True) / mx.where(squares == 0, 1.0, squares)
    fitted = b + left.mean(axis=-1, keepdims=True) - slope * mean
    return codes, (s + slope)[..., 0], fitted[..., 0]


def quantized_like(layer: Any, dense: Any) -> Any:
    """Return a dense layer quantized as another one is, an affine one on its grid (`round_on_grid`).

    Args:
        layer: quantized; its kind, bits, group and mode are kept.
        dense: of the same kind and shape, in float.
    """
    if layer.mode != AFFINE:
        own_scale = {"global_scale": True} if "global_scale" in layer else {}  # nvfp4 experts have one each
        return dense.to_quantized(layer.group_size, layer.bits, layer.mode, **own_scale)
    weight = dense.weight.astype(mx.float32)
    codes, scales, biases = round_on_grid(weight, layer.scales, layer.biases, layer.group_size, layer.bits)
    rounded = copy.copy(layer)
    rounded.weight = mx.array(pack_codes(np.array(codes.reshape(weight.shape).astype(mx.uint8)), layer.bits))
    rounded.scales, rounded.biases = scales.astype(layer.scales.dtype), biases.astype(layer.biases.dtype)
    if "bias" in dense:
        rounded.bias = dense.bias
    return rounded


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes packed as MLX does: one little-endian stream of bits for each row.

    Args:
        codes: (..., width) uint8 below 2^bits; width a multiple of 32.
        bits: of a code.

    Returns:
        (..., width * bits / 32) uint32.
    """
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4")
    if bits == 4:
        return np.ascontiguousarray(codes[..., 0::2] | codes[..., 1::2] << 4).view("<u4")
    # Eight codes fill a whole number of bytes: gather them in one 64-bit word and keep its low bytes.
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    words = np.zeros(eights.shape[:-1], "<u8")
    for i in range(8):
        words |= eights[..., i].astype("<u8") << np.uint64(bits * i)
    stream = words.view(np.uint8).reshape(eights.shape)[..., :bits]
    return np.ascontiguousarray(stream).reshape(*codes.shape[:-1], -1).view("<u4")


def relative_error(found: mx.array, wanted: mx.array) -> float:
    """Return |found - wanted| / |wanted| in Frobenius norm (0 for a zero weight kept as zero)."""
    wanted = wanted.astype(mx.float32)
    difference = mx.linalg.norm((found.astype(mx.float32) - wanted).reshape(-1)).item()
    size = mx.linalg.norm(wanted.reshape(-1)).item()
    return difference / size if size else difference


def quantize_model(
    model: nn.Module, config: dict[str, Any], quantization: QuantFormat, *, measure: bool = False
) -> tuple[nn.Module, dict[str, Any], list[str], dict[str, float]]:
    """Quantize every layer of a float mlx-lm model that the quantization and the model allow.

    Lazy weights stay lazy, unless errors are measured.

    Args:
        model: changed in place. Its own `quant_predicate` is respected; it may keep routers in float, for example.
        config: config.json; not changed.
        quantization: how to pack the layers.
        measure: compute each layer's error, which reads every weight.

    Returns:
        (model, config with its `quantization`, layers skipped because their width does not divide into
        groups, relative error by layer if measured).
    """
    own_predicate = layer_choice(model)
    skipped = [
        path
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized") and not quantization.fits(module.weight.shape[-1])
    ]
    layout = quantization.layout
    errors: dict[str, float] = {}

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        wanted = own_predicate(path, module)
        if wanted is True and "mode" not in inspect.signature(module.to_quantized).parameters:
            # AFM 7B's fused layers only know the affine mode and take no `mode` argument.
            wanted = quantization.mode == AFFINE and {key: layout[key] for key in ("group_size", "bits")}
        if measure and wanted:
            own = QuantFormat(**{**layout, **wanted}) if isinstance(wanted, dict) else quantization
            errors[path] = relative_error(own.quantize(module.weight).dequantize(), module.weight)
        return wanted

    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints, but standard output belongs to the command
        model, config = mlx_lm.utils.quantize_model(model, config, **layout, quant_predicate=predicate)
    return model, config, skipped, errors


def layer_choice(model: nn.Module) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """Return a function that tells whether, and how, a model allows a layer to be quantized.

    It follows the model's own `quant_predicate`, or allows all layers if there is none. It refuses an embedding that
    mlx-lm's head multiplies by as it is stored, and a layer whose `to_quantized` takes no mode, as mlx requires (AFM's).
    """
    own = model.quant_predicate if hasattr(model, "quant_predicate") else None
    owner = model.get("language_model", model)  # multimodal wrappers
    reads_stored = type(owner).__module__.rsplit(".", 1)[-1] in HEADS_FROM_STORED and "lm_head" not in owner

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if reads_stored and path.endswith("embed_tokens"):
            return False
        if "mode" not in inspect.signature(module.to_quantized).parameters:
            return False
        wanted = True if own is None else own(path, module)  # a dense Qwen3.5 has a predicate that is None
        return fitting_choice(wanted, module.weight.shape[-1])

    return choose


def fitting_choice(wanted: bool | dict[str, Any], width: int) -> bool | dict[str, Any]:
    """Return a `quant_predicate`'s result with a group size that divides the layer's width.

    Granite asks for 8 bits in groups of 64 for some layers. RWKV-7 gives no group size; mlx then uses 64, whatever was
    asked for the rest of the model.

    Args:
        wanted: what a `quant_predicate` returned.
        width: of the layer's input.

    Returns:
        The same, with the largest smaller group size that divides the width if needed; False if none does.
    """
    if not isinstance(wanted, dict) or wanted.get("mode", AFFINE) != AFFINE:
        return wanted
    asked = wanted.get("group_size", DEFAULT_GROUP)
    if width % asked == 0:
        return wanted
    smaller = [group for group in AFFINE_GROUPS if group < asked and width % group == 0]
    return {**wanted, "group_size": max(smaller)} if smaller else False


def dequantized_weight(layer: nn.Module) -> mx.array:
    """Return a quantized layer's weight as floats.

    Args:
        layer: mlx's QuantizedLinear or QuantizedEmbedding, or mlx-lm's QuantizedSwitchLinear or QuantizedMultiLinear.

    Returns:
        (out, in), or (E, out, in) for experts and heads, in the dtype of the scales (bfloat16 for the microscaling modes,
        float32 for nvfp4 experts with scales of their own).
    """
    packed = QuantFormat.of(layer)
    if "global_scale" not in layer:
        return packed.dequantize(layer.weight, layer.scales, layer.get("biases"))
    own = zip(layer.weight, layer.scales, layer.global_scale, strict=True)
    return mx.stack([mx.dequantize(weight, scales, global_scale=g, **packed.layout) for weight, scales, g in own])


def dequantize_model(model: nn.Module, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a quantized mlx-lm model with float weights, and its config without `quantization`."""
    plain = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    # mlx-lm's function ignores the scales that nvfp4 experts have of their own.
    scaled = {
        path: dequantized_weight(layer)
        for path, layer in model.named_modules()
        if {"scales", "global_scale"} <= layer.keys()
    }
    model = mlx_lm.utils.dequantize_model(model)
    # It leaves out the products of each head that latent attention has (DeepSeek and its kin).
    heads = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantizedMultiLinear)}
    scaled |= {path: dequantized_weight(layer) for path, layer in heads.items()}
    model.update_modules(tree_unflatten([(path, MultiLinear(1, 1, 1)) for path in heads]))
    model.load_weights([(f"{path}.weight", weight) for path, weight in scaled.items()], strict=False)
    return model, plain
