"""Convert a model, from GGUF or from a Hugging Face folder, into a folder that mlx-lm loads, and measure what that costs.

`copy_side_files` copies what belongs to a model folder besides weights and config; fusing and exporting use it, too.

    source, target -> weights, config, tokenizer in a temporary folder -> out

By default, GGUF blocks are carried over as they are, and a Hugging Face model is quantized to 4 bits. A run finds its folder
with `folder_of`: the model's own, or one in the cache that the model is converted into the first time. The cost of a
conversion is the perplexity of the float source and of the result on a text.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.config.settings import ModelSettings
from mlx_lora.kernels.quantized_matmul import use_measured_matmul
from mlx_lora.models.config import architecture_of, check_rotation, is_encoder, translate_config
from mlx_lora.models.draft_folder import DRAFTING, keep_draft
from mlx_lora.models.folder import (
    FOREIGN_ERRORS,
    TYPES,
    ShardWriter,
    complete_module,
    fused_mark,
    import_architecture,
    load_weights,
    read_config,
    read_safetensors_header,
    save_tensors,
    write_json,
)
from mlx_lora.models.quantize import AFFINE, QuantFormat, choose_quantization, dequantize_model, quantize_model
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, check_new_folder, check_writable, one_at_a_time, replacing_folder, sha256_of
from mlx_lora.utils.hub import ModelSource
from mlx_lora.utils.parsing import read_json
from mlx_lora.utils.progress import tracked
from mlx_lora.utils.text import format_duration

if TYPE_CHECKING:
    from mlx_lora.gguf.weights import Target

log = logging.getLogger(__name__)

# mlx-lm's architectures whose `sanitize` removes the head if the weights hold none.
TIED_BY_WEIGHTS = ("gemma3_text", "recurrent_gemma")
FLOATS = ("F32", "F16", "BF16")  # safetensors' names


# Conversion


@dataclass(frozen=True)
class Learned:
    """A quantization that is learned from rows, instead of rounding to the nearest codes.

    Attributes:
        quantization: what each layer is quantized to.
        quantize: (float model, config) -> quantized model (models/gptq.py).
    """

    quantization: QuantFormat
    quantize: Callable[[nn.Module, dict[str, Any]], nn.Module]


@dataclass
class Conversion:
    """The result of a conversion.

    Attributes:
        model_type: mlx-lm's.
        lossless, requantized, floats: how many tensors (layers, for a Hugging Face source) were treated in each way.
        rounded: of `lossless`, the tensors whose codes are the file's, but whose scales have more bits than `dtype`.
        dtype: of float weights and of scales.
        errors: source type -> relative error of each tensor that was quantized again.
        stored: source type of a GGUF file -> how its tensors are stored that were quantized again.
        skipped: layers left in float because their width does not divide into groups.
        size_bytes: of all tensors written.
        n_values: the number of weights, counted before packing.
        elapsed_s: wall-clock time.
    """

    model_type: str
    lossless: int = 0
    requantized: int = 0
    floats: int = 0
    rounded: int = 0
    dtype: str = "float32"
    errors: dict[str, list[float]] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    size_bytes: int = 0
    n_values: int = 0
    elapsed_s: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.size_bytes / self.n_values

    def summary(self) -> dict[str, Any]:
        """Return the fields for JSON output, with errors as count, mean and maximum per source type."""
        plain = dataclasses.asdict(self) | {"bits_per_weight": round(self.bits_per_weight, 3)}
        plain["errors"] = {
            kind: {"tensors": len(values), "mean": sum(values) / len(values), "max": max(values)}
            for kind, values in self.errors.items()
        }
        return plain


def convert_model(
    source: ModelSource,
    out: Path,
    *,
    target: Target | Learned | None = None,
    dtype: mx.Dtype = mx.float32,
    force: bool = False,
    measure: bool = False,
    trust_remote_code: bool = False,
) -> Conversion:
    """Write `source` as a model folder; an error leaves nothing half-written.

    Args:
        source: from `resolve_model`.
        out: the folder to make.
        target: how to store the weights; None: a GGUF file's own blocks, else 4 bits in groups of 64.
        dtype: of float weights, norms, scales and biases.
        force: replace an existing model folder.
        measure: compute quantization errors for a Hugging Face source too (reads all weights into memory).
        trust_remote_code: let a Hugging Face folder run its own model code.

    Raises:
        InputError: the source cannot be used, or `out` must not be written.
        RunError: writing failed.
    """
    out, start = out.resolve(), time.perf_counter()
    if target is None and source.kind == "gguf":
        target = "carry"
    check_new_folder(out, force, "config.json")
    check_writable(out, "--out", _least_bytes(source, target, dtype))
    if source.path.resolve().is_relative_to(out):
        raise InputError(f"--out {out}: contains the source {source.path}; give another folder")
    if target == "carry" and source.kind != "gguf":
        raise InputError(f"{source.path}: only the blocks of a GGUF file can be kept; give --bits or --no-quantize")
    if isinstance(target, Learned) and source.kind == "gguf":
        raise InputError(
            f"{source.path}: a quantization is learned of a float folder; convert it with --no-quantize first"
        )
    with replacing_folder(out) as folder:
        if source.kind == "gguf" and not isinstance(target, Learned):
            conversion = _convert_gguf(source, folder, target or "carry", dtype)
        else:
            conversion = _convert_folder(source, folder, target, dtype, measure, trust_remote_code)
        load_weights(folder, trust_remote_code)  # check that mlx-lm can load it before it appears at `out`
    conversion.elapsed_s = time.perf_counter() - start
    return conversion


def _least_bytes(source: ModelSource, target: Target | Learned | None, dtype: mx.Dtype) -> int:
    """Return a lower bound of the bytes to write, from the sizes of the files and of the float tensors in them."""
    target = target.quantization if isinstance(target, Learned) else target
    target = QuantFormat(4, 64) if target is None else target
    if source.kind == "gguf":
        size = source.path.stat().st_size
        return size * target.bits // 32 if isinstance(target, QuantFormat) else size
    bits = target.bits if isinstance(target, QuantFormat) else 8 * dtype.size
    files = list(source.path.glob("model*.safetensors"))  # what the loader reads
    floats = [entry for file in files for entry in read_safetensors_header(file).values() if entry["dtype"] in FLOATS]
    values = sum(math.prod(entry["shape"]) for entry in floats)
    stored = sum(math.prod(entry["shape"]) * TYPES[entry["dtype"]].size for entry in floats)
    packed = sum(file.stat().st_size for file in files) - stored  # at most 32 bits per weight
    return values * bits // 8 + (packed * bits // 32 if isinstance(target, QuantFormat) else packed)


def _convert_gguf(source: ModelSource, folder: Path, target: Target, dtype: mx.Dtype) -> Conversion:
    from mlx_lora.gguf.arch import model_config, weight_map  # a folder's model loads none of these
    from mlx_lora.gguf.reader import read_gguf
    from mlx_lora.gguf.tokenizer import write_tokenizer
    from mlx_lora.gguf.weights import check_shapes, import_weights

    file = read_gguf(source.path)
    config = model_config(file)
    mappings = weight_map(file, config)
    shapes = {name: array.shape for name, array in tree_flatten(build_model(config).parameters())}
    check_shapes(str(file.path), file.tensors, mappings, shapes)
    write_tokenizer(file.metadata, folder)
    conversion, writer = Conversion(config["model_type"], dtype=_dtype_name(dtype)), ShardWriter(folder)
    quantizations: dict[str, QuantFormat] = {}
    imported = import_weights(file.tensors, mappings, target, dtype)
    for tensor in tracked(imported, "Converting", len(mappings), "tensors"):
        writer.add(tensor.parameters)
        mx.eval(tensor.parameters)
        mapping, packed = mappings[tensor.source], tensor.quantization
        conversion.n_values += tensor.n_values
        if packed is None:
            conversion.floats += 1
            could_pack = len(file.tensors[tensor.source].shape) > 1 and target != "float" and not mapping.exact
            if could_pack and tensor.source_type not in FLOATS:
                conversion.skipped.append(tensor.source)
            continue
        quantizations |= dict.fromkeys(mapping.layers, packed)
        if tensor.lossless:
            conversion.lossless += 1
            # GGUF's scales are float16, and those of K types a product with six bits more; MXFP4's are exponents.
            few_bits = {"bfloat16": True, "float16": tensor.source_type.endswith("_K")}.get(conversion.dtype, False)
            conversion.rounded += few_bits and packed.mode == AFFINE
        else:
            conversion.requantized += 1
            conversion.errors.setdefault(tensor.source_type, []).append(tensor.error)
            conversion.stored[tensor.source_type] = str(packed)
    conversion.size_bytes = writer.close()
    config |= quantization_entries(quantizations)
    config["torch_dtype"] = _dtype_name(dtype)
    config["mlx_lora"] = _provenance(source, conversion, config) | {"sha256": sha256_of(source.path)}
    write_json(folder / "config.json", config)
    return conversion


def _dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def quantization_entries(quantizations: dict[str, QuantFormat]) -> dict[str, Any]:
    """Return config.json's `quantization`: the most common one, then that of each layer that differs."""
    if not quantizations:
        return {}
    ((commonest, _),) = Counter(quantizations.values()).most_common(1)
    entries = commonest.layout | {layer: own.layout for layer, own in quantizations.items() if own != commonest}
    return {"quantization": entries, "quantization_config": entries}


def _convert_folder(
    source: ModelSource,
    folder: Path,
    target: Target | Learned | None,
    dtype: mx.Dtype,
    measure: bool,
    trust_remote_code: bool,
) -> Conversion:
    model, config = load_weights(source.path, trust_remote_code)
    heads = {n: value.astype(dtype) for n, value in model.stored_head.items()} if is_encoder(model) else {}
    if target is None:
        if "quantization" in config or "quantization_config" in config:
            choice = "give --bits to quantize it again, or --no-quantize to convert it to floats"
            raise InputError(f"{source.path}: already quantized; {choice}")
        target = QuantFormat(4, 64)
    model, config = dequantize_model(model, config)
    cast_model(model, dtype)
    names = tree_flatten(model.parameters())
    # Before weights are packed, which would hide it; computed when they are written.
    fits = {name: mx.isfinite(array).all() for name, array in names} if dtype == mx.float16 else {}
    n_values = sum(array.size for _, array in names)
    conversion = Conversion(config["model_type"], dtype=_dtype_name(dtype), n_values=n_values)
    if isinstance(target, Learned):
        mx.eval(fits)  # learning reads all weights; they are not kept longer for this
        widths = {path: m.weight.shape[-1] for path, m in model.named_modules() if hasattr(m, "to_quantized")}
        model = target.quantize(model, config)
        kept = {path for path, module in model.named_modules() if hasattr(module, "to_quantized")}
        conversion.skipped = [
            path for path, width in widths.items() if path in kept and not target.quantization.fits(width)
        ]
        packed = [
            (path, layer) for path, layer in model.named_modules() if "scales" in layer and hasattr(layer, "bits")
        ]
        config |= quantization_entries({path: QuantFormat.of(layer) for path, layer in packed})
    elif isinstance(target, QuantFormat):
        model, config, conversion.skipped, errors = quantize_model(model, config, target, measure=measure)
        conversion.errors = {"float": list(errors.values())} if errors else {}
    parameters = dict(tree_flatten(model.parameters())) | heads
    conversion.requantized = sum(name.endswith(".scales") for name in parameters)
    conversion.floats = len(names) - conversion.requantized
    writer = ShardWriter(folder)
    keeps_vision = getattr(model, "of_mlx_vlm", False)
    del model, names
    # One by one, so that the arrays of a written shard are freed; the work is done where an array is computed.
    for name in tracked(list(parameters), "Converting", len(parameters), "tensors"):
        mx.eval(parameters[name], fits.get(name))
        if name in fits and not fits.pop(name).item():
            raise InputError(f"{source.path}: {name}: float16 cannot hold its values; use --dtype bfloat16 or float32")
        writer.add({name: parameters.pop(name)})
    conversion.size_bytes = writer.close()
    config |= dict.fromkeys({"torch_dtype", "dtype"} & config.keys() | {"torch_dtype"}, conversion.dtype)
    config["mlx_lora"] = _provenance(source, conversion, config)
    mlx_lm.utils.save_config(config, folder / "config.json", keep_vision_config=keeps_vision)
    copy_side_files(source.path, folder)
    return conversion


def _provenance(source: ModelSource, conversion: Conversion, config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json's `mlx_lora` entry, which records where the weights come from; mlx-lm ignores it."""
    mark = fused_mark(config)
    return {
        **({"fused": mark} if mark else {}),
        "source": source.model_id,
        "revision": source.revision,
        "carried": {
            "lossless": conversion.lossless,
            "requantized": conversion.requantized,
            "float": conversion.floats,
        },
    }


# mlx-lm's model


def build_model(config: dict[str, Any], names: frozenset[str] | None = None) -> nn.Module:
    """Return mlx-lm's model for a config; its parameters are not computed yet.

    Args:
        config: config.json.
        names: of the stored tensors, if known; they show whether the model has a separate head.

    Raises:
        InputError: mlx-lm cannot build it.
    """
    import_architecture(config)
    origin = f"model_type {config.get('model_type')}"
    config = translate_config(config, origin)
    try:
        model_class, args_class = architecture_of(config)
        model = model_class(args_class.from_dict(config))
    except FOREIGN_ERRORS as error:
        raise InputError(f"{origin}: mlx-lm cannot build this model ({error}); choose another model") from error
    complete_module(model)
    check_rotation(model, config, origin)
    _drop_tied_head(model, config, names)
    return model


def _drop_tied_head(model: nn.Module, config: dict[str, Any], names: frozenset[str] | None) -> None:
    """Remove the head of the few families (TIED_BY_WEIGHTS) that mlx-lm always builds with one.

    mlx-lm removes it when it loads weights without a head, so the stored names decide here too. If they are not known,
    the config decides; its default is tied, as in transformers for these families.
    """
    owner = model.get("language_model", model)  # multimodal wrappers
    if type(owner).__module__.rsplit(".", 1)[-1] not in TIED_BY_WEIGHTS or "lm_head" not in owner:
        return
    if names is not None:
        tied = not any(name.endswith("lm_head.weight") for name in names)
    else:
        tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", True))
    if tied:
        owner.tie_word_embeddings = True
        owner.pop("lm_head")


def cast_model(model: nn.Module, dtype: mx.Dtype, *, keep_float32: bool = False) -> None:
    """Cast float parameters, except those that the model's `cast_predicate` protects, as mlx-lm's converter does.

    This includes scales and biases of quantized weights: published 4-bit files often hold float16 ones, which would otherwise
    decide the activations' dtype. The integer scales of microscaling modes are not floats.

    Args:
        model: changed in place.
        dtype: to cast to.
        keep_float32: leave the float32 parameters of a 16-bit model as they are, which are so on purpose.
    """
    may_cast = model.cast_predicate if hasattr(model, "cast_predicate") else lambda _: True
    floats = [(name, p) for name, p in tree_flatten(model.parameters()) if mx.issubdtype(p.dtype, mx.floating)]
    half_bytes = sum(p.nbytes for _, p in floats if p.dtype != mx.float32)
    keeps = keep_float32 and half_bytes * 2 > sum(p.nbytes for _, p in floats)
    cast = [(n, p.astype(dtype)) for n, p in floats if may_cast(n) and not (keeps and p.dtype == mx.float32)]
    model.update(tree_unflatten(cast))


# The cost of a conversion

REPORT_TOKENS = 2048


def compare_on_text(
    source: ModelSource, out: Path, text: str, trust_remote_code: bool = False, rounded: QuantFormat | None = None
) -> dict[str, Any]:
    """Measure both models on the text's first REPORT_TOKENS tokens, with one model in memory at a time.

    Both compute in this device's dtype, so that only their weights differ.

    Args:
        source: what was converted.
        out: the converted folder, whose tokenizer splits the text.
        text: at least two tokens.
        trust_remote_code: as for `convert_model`.
        rounded: measure the source rounded like this as well.

    Returns:
        {"source": perplexity, "converted": perplexity, "tokens": how many were predicted}, and "rounded" if asked for.

    Raises:
        InputError: the text is too short.
    """
    converted, config = load_weights(out, trust_remote_code)
    tokenizer = load_folder_tokenizer(out, config, trust_remote_code)
    ids = tokenizer.encode(text, add_special_tokens=False)[:REPORT_TOKENS]
    if len(ids) < 2:
        raise InputError(f"--report: the text has {len(ids)} tokens; give a longer one")
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    bos_id = tokenizer.bos_token_id if adds_bos else None
    cast_model(converted, device.compute_dtype())
    use_measured_matmul(converted)
    result = measure_text_loss(converted, ids, bos_id)
    del converted
    mx.clear_cache()
    if source.kind == "gguf":  # as floats, which the conversion is compared with
        from mlx_lora.gguf.arch import model_config, weight_map
        from mlx_lora.gguf.reader import read_gguf
        from mlx_lora.gguf.weights import import_weights

        file = read_gguf(source.path)
        config = model_config(file)
        model = build_model(config)
        imported = import_weights(file.tensors, weight_map(file, config), "float", device.compute_dtype())
        model.load_weights([item for tensor in imported for item in tensor.parameters.items()])
    else:
        model, config = load_weights(source.path, trust_remote_code)
        model, _ = dequantize_model(model, config)
        cast_model(model, device.compute_dtype())
    reference = measure_text_loss(model, ids, bos_id)
    found = {"source": reference.perplexity, "converted": result.perplexity, "tokens": result.tokens}
    if rounded is not None:
        model, *_ = quantize_model(model, {}, rounded)
        use_measured_matmul(model)
        found["rounded"] = measure_text_loss(model, ids, bos_id).perplexity
    return found


@dataclass(frozen=True)
class TextLoss:
    """The summed negative log-likelihood (nats) of `tokens` predicted tokens."""

    loss_sum: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(self.loss_sum / self.tokens)


def measure_text_loss(model: nn.Module, ids: list[int], bos_id: int | None, window_tokens: int = 512) -> TextLoss:
    """Return a text's loss, predicted window by window, each with an empty context.

    Args:
        model: an mlx-lm model.
        ids: the text's tokens, without BOS; at least two.
        bos_id: put before every window, so that its first token is predicted too; None: the first is not predicted.
        window_tokens: tokens per window, BOS included.
    """
    loss_sum, tokens = 0.0, 0
    step = window_tokens if bos_id is None else window_tokens - 1
    for start in range(0, len(ids), step):
        window = ids[start : start + step]
        window = window if bos_id is None else [bos_id, *window]
        if len(window) > 1:
            loss_sum += -token_logprobs(model, window).sum().item()
            tokens += len(window) - 1
    return TextLoss(loss_sum, tokens)


def token_logprobs(model: nn.Module, ids: list[int]) -> mx.array:
    """Return (len(ids) - 1,) float32: the log-probability of each token but the first, given those before it."""
    inputs = mx.array(ids)
    logits = model(inputs[None, :-1])[0].astype(mx.float32)  # (T - 1, V)
    chosen = mx.take_along_axis(logits, inputs[1:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)


# Converted models in the cache

# Part of the cache key of converted models: raise it when the same file would convert differently.
_FORMAT = 2


def folder_of(settings: ModelSettings, source: ModelSource) -> Path:
    """Return the folder to load a model from: its own, or one in the cache that it is converted into the first time.

    Args:
        settings: of the model.
        source: what they name, from `resolve_model`.

    Raises:
        InputError: see `cached_quantized_folder` and `convert_model`.
    """
    if settings.bits is not None:
        dtype = device.compute_dtype(settings.dtype)
        return cached_quantized_folder(source, settings.bits, dtype, settings.trust_remote_code)
    return cached_gguf_folder(source) if source.kind == "gguf" else source.path


def cached_gguf_folder(source: ModelSource) -> Path:
    """Return the cached folder that a GGUF file converts to; the first call converts it.

    Blocks are carried over with float32 scales, so the folder does not depend on the compute dtype.
    The cache key is the file's path, size and modification time.
    """
    stat = source.path.stat()
    key = f"{_FORMAT}|{source.path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    folder = cache_dir("converted") / f"{source.path.stem}-{sha256_of(key)[:12]}"
    with one_at_a_time(folder):
        if not (folder / "config.json").is_file():
            check_writable(folder, f"MLX_LORA_CACHE: converting {source.path.name} into", stat.st_size)
            convert_model(source, folder, target="carry")
    return folder


def cached_quantized_folder(
    source: ModelSource,
    bits: int,
    dtype: mx.Dtype,
    trust_remote_code: bool = False,
) -> Path:
    """Return a model quantized at `bits`, as a folder in the cache; the first call converts it, as `convert --bits` does.

    A folder that already has these bits is returned as it is.

    Args:
        source: from `resolve_model`.
        bits: per weight, in groups of 64.
        dtype: of what stays in float.
        trust_remote_code: as for `convert_model`.

    Raises:
        InputError: MLX has no such bits, or the model is quantized at others.
    """
    target = choose_quantization(bits, None, None)
    if source.kind == "folder" and has_bits(read_config(source.path, trust_remote_code), bits, source.model_id):
        return source.path
    copied = [*source.path.glob("*.*"), *source.path.glob("1_Pooling/*")]
    files = sorted(copied) if source.kind == "folder" else [source.path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    sees = "|tower" if any(name == "preprocessor_config.json" for name, *_ in stats) else ""
    key = sha256_of(f"{_FORMAT}|{source.path.resolve()}|{target}|{dtype}|{stats}{sees}")
    folder = cache_dir("converted") / f"{source.model_id.rstrip('/').rpartition('/')[2]}-{bits}bit-{key[:12]}"
    with one_at_a_time(folder):
        if not (folder / "config.json").is_file():
            log.info(f"Quantizing {source.model_id} to {bits} bits; this is done once, and kept in the cache")
            made = convert_model(source, folder, target=target, dtype=dtype, trust_remote_code=trust_remote_code)
            log.info(f"Quantized: {made.size_bytes / 1e6:.0f} MB, {format_duration(made.elapsed_s)}")
    return folder


def has_bits(config: dict[str, Any], bits: int, model_id: str) -> bool:
    """Return whether a model folder is quantized at these bits already, so that --bits has nothing to do.

    Args:
        config: its config.json.
        bits: as --bits takes them.
        model_id: its name, for the message.

    Raises:
        InputError: it is quantized at others.
    """
    found = config.get("quantization") or config.get("quantization_config")
    if found and found.get("quant_method") == "fp8":
        return False  # as it is published; a conversion makes floats of it first
    if found and found.get("bits") != bits:
        raise InputError(
            f"--bits {bits}: {model_id} is already quantized ({found.get('bits', '?')} bits); leave --bits out, or give the "
            "model that it was made from"
        )
    return bool(found)


# Copy what belongs to a model folder in addition to weights and config, also a vision tower, when the model is converted, fused or exported.

# Keep the tower of a vision-language model when its language model is converted or fused: its tensors stay as they are stored.
#
#     model.safetensors     the language model, quantized or fused
#     tower.safetensors     everything else: tower, connector; under mlx-vlm's names if an adapter that trained them was fused
#
# mlx-lm only reads `model*.safetensors`, so text alone never touches the tower. The index names both, for mlx-vlm.

CONFIG_FILE, TOWER_FILE, INDEX_FILE = "config.json", "tower.safetensors", "model.safetensors.index.json"
# What tensors of a language model begin with, in models with a tower.
OF_LANGUAGE = (
    "language_model.", "model.language_model.", "model.text_model.", "text_model.", "lm_head.", "model.lm_head.",
    "model.layers.", "model.embed_tokens.", "model.norm.",
)  # fmt: skip


def files_with_tower(folder: Path) -> list[Path]:
    """Return the files of a model's weights, but not another form of it beside them, such as consolidated.safetensors."""
    return sorted([*folder.glob("model*.safetensors"), *folder.glob(TOWER_FILE)])


def copy_tower(source: Path, folder: Path, trained: Mapping[str, mx.array] | None = None) -> None:
    """Copy the tensors that are not of the language model, if the source's config has a `vision_config`.

    Args:
        source: a folder with the whole model, or one that was written like this.
        folder: has the language model and its index.
        trained: all of the tower's parameters to write instead, by mlx-vlm's names, in the dtype of the source's.
    """
    config = source / CONFIG_FILE
    vision = read_json(config, "download it again").get("vision_config") if config.is_file() else None
    if not isinstance(vision, dict):
        return
    tensors: dict[str, mx.array] = {}
    for file in files_with_tower(source):
        names = [n for n in read_safetensors_header(file) if not n.startswith(OF_LANGUAGE) and not DRAFTING.search(n)]
        if names:
            stored = mx.load(str(file))  # lazy: the language model is not read
            tensors |= {name: stored[name] for name in names}  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]
    if not tensors:
        return
    if trained:
        usual = max(tensors.values(), key=lambda tensor: tensor.size).dtype
        floats = mx.issubdtype(usual, mx.floating)
        tensors = {
            name: array.astype(usual) if floats and mx.issubdtype(array.dtype, mx.floating) else array
            for name, array in trained.items()
        }
    save_tensors(folder / TOWER_FILE, tensors)
    written = read_json(folder / CONFIG_FILE, "convert the model again")
    write_json(folder / CONFIG_FILE, {**written, "vision_config": vision})  # mlx-lm leaves it out
    index = folder / INDEX_FILE
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] |= dict.fromkeys(sorted(tensors), TOWER_FILE)
        content["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
        write_json(index, content)


# Copy what belongs to a model folder in addition to weights and config, when the model is converted, fused or exported

# Tokenizer, templates, license. Vocabularies have many names: tiktoken.model, spiece.model, rwkv_vocab_v20230424.txt.
_SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "*.txt", "*.model", "*.tiktoken",
    "chat_template*", "*.jinja", "generation_config.json", "LICENSE*", "NOTICE*", "*.py",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
# What sentence-transformers does before and after the model: without it, texts get other vectors.
_EMBEDDING_FILES = (
    "modules.json",
    "1_Pooling/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)


def copy_side_files(source: Path, folder: Path, tower: Mapping[str, mx.array] | None = None) -> None:
    """Copy a model's tokenizer, templates, license, embedding settings, draft head, and what is needed to see.

    A folder with only a SentencePiece model gets a tokenizer.json.

    Args:
        source, folder, tower: as for `copy_tower`.
    """
    for pattern in (*_SIDE_FILES, *_EMBEDDING_FILES):
        for file in source.glob(pattern):
            if file.is_file():
                copied = folder / file.relative_to(source)
                copied.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copied)  # follows links, which the hub cache uses
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        from mlx_lora.models.spm_tokenizer import write_tokenizer_from_spm

        write_tokenizer_from_spm(folder / "tokenizer.model", source, folder)
    copy_tower(source, folder, tower)
    keep_draft(source, folder)
