"""Convert a model, from GGUF or from a Hugging Face folder, into a folder that mlx-lm loads.

    source, target -> weights, config, tokenizer in a temporary folder -> out

By default, GGUF blocks are carried over as they are, and a Hugging Face model is quantized to 4 bits.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.models.fingerprint import fused_mark
from mlx_lora.models.folder import FOREIGN_ERRORS, complete_module, import_architecture, load_weights
from mlx_lora.models.gguf_arch import model_config, weight_map
from mlx_lora.models.gguf_weights import Imported, Target, check_shapes, import_weights
from mlx_lora.models.quantize import Quantization, dequantize_model, quantize_model
from mlx_lora.models.saved_config import check_rotation, translate_config
from mlx_lora.models.saving import ShardWriter, check_out, write_json
from mlx_lora.sources.gguf_reader import read_gguf
from mlx_lora.sources.gguf_tokenizer import write_tokenizer
from mlx_lora.sources.hub import ModelSource
from mlx_lora.sources.spm_tokenizer import write_tokenizer_from_spm
from mlx_lora.system.console import echo
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import check_writable, replacing_folder, sha256_of
from mlx_lora.system.long_task import tracked

# The files beside weights and config that belong to a model folder: tokenizer, templates, license.
_SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template*", "*.jinja", "*.tiktoken", "generation_config.json", "LICENSE*", "NOTICE*", "*.py",
)  # fmt: skip
# mlx-lm's architectures whose `sanitize` removes the head if the weights hold none.
TIED_BY_WEIGHTS = ("gemma3_text", "recurrent_gemma")


@dataclass
class Conversion:
    """The result of a conversion.

    Attributes:
        model_type: mlx-lm's.
        lossless, requantized, floats: how many tensors (layers, for a Hugging Face source) were treated in each way.
        errors: source type -> relative error of each tensor that was quantized again.
        skipped: layers left in float because their width does not divide into groups.
        size_bytes: of all tensors written.
        n_values: the number of weights, counted before packing.
        elapsed_s: wall-clock time.
    """

    model_type: str
    lossless: int = 0
    requantized: int = 0
    floats: int = 0
    errors: dict[str, list[float]] = field(default_factory=dict)
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
    target: Target | None = None,
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
    check_out(out, force=force)
    check_writable(out, "--out", _least_bytes(source, target))
    if source.path.resolve().is_relative_to(out):
        raise InputError(f"--out {out}: contains the source {source.path}; give another folder")
    if target == "carry" and source.kind != "gguf":
        raise InputError(f"{source.path}: only the blocks of a GGUF file can be kept; give --bits or --no-quantize")
    with replacing_folder(out) as folder:
        if source.kind == "gguf":
            conversion = _convert_gguf(source, folder, target or "carry", dtype)
        else:
            conversion = _convert_folder(source, folder, target, dtype, measure, trust_remote_code)
        load_weights(folder, trust_remote_code)  # check that mlx-lm can load it before it appears at `out`
    conversion.elapsed_s = time.perf_counter() - start
    return conversion


def _least_bytes(source: ModelSource, target: Target | None) -> int:
    """Return a lower bound of the bytes to write, from file sizes; a float source has at most 32 bits per weight."""
    files = [source.path] if source.path.is_file() else source.path.glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    bits = target.bits if isinstance(target, Quantization) else 4 if target is None else 32
    return size * bits // 32 if source.kind == "folder" or isinstance(target, Quantization) else size


def load_float_model(source: ModelSource, dtype: mx.Dtype, trust_remote_code: bool = False) -> nn.Module:
    """Return a source's model with float weights, as the reference that a conversion is compared with."""
    if source.kind == "gguf":
        file = read_gguf(source.path)
        config = model_config(file)
        model = build_model(config)
        imported = import_weights(file.tensors, weight_map(file, config), "float", dtype)
        model.load_weights([item for tensor in imported for item in tensor.parameters.items()])
        return model
    model, config = load_weights(source.path, trust_remote_code)
    model, _ = dequantize_model(model, config)
    cast_model(model, dtype)
    return model


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
        model_class, args_class = mlx_lm.utils._get_classes(config)
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


def cast_model(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast float parameters, except those that the model's `cast_predicate` protects, as mlx-lm's converter does."""
    may_cast = model.cast_predicate if hasattr(model, "cast_predicate") else lambda _: True
    cast = [
        (name, array.astype(dtype))
        for name, array in tree_flatten(model.parameters())
        if mx.issubdtype(array.dtype, mx.floating) and may_cast(name)
    ]
    model.update(tree_unflatten(cast))


def _convert_gguf(source: ModelSource, folder: Path, target: Target, dtype: mx.Dtype) -> Conversion:
    file = read_gguf(source.path)
    config = model_config(file)
    mappings = weight_map(file, config)
    shapes = {name: array.shape for name, array in tree_flatten(build_model(config).parameters())}
    check_shapes(str(file.path), file.tensors, mappings, shapes)
    write_tokenizer(file.metadata, folder)
    conversion, writer = Conversion(config["model_type"]), ShardWriter(folder)
    quantizations: dict[str, Quantization] = {}
    imported = import_weights(file.tensors, mappings, target, dtype)
    for tensor in tracked(imported, "Converting", len(mappings), "tensors", echo):
        writer.add(tensor.parameters)
        mx.eval(tensor.parameters)
        mapping = mappings[tensor.source]
        could_pack = len(file.tensors[tensor.source].shape) > 1 and target != "float" and not mapping.exact
        _count(conversion, tensor, could_pack)
        if tensor.quantization is not None:
            quantizations |= dict.fromkeys(mapping.layers, tensor.quantization)
    conversion.size_bytes = writer.close()
    config |= quantization_entries(quantizations)
    config["torch_dtype"] = str(dtype).removeprefix("mlx.core.")
    config["mlx_lora"] = _provenance(source, conversion, config) | {"sha256": sha256_of(source.path)}
    write_json(folder / "config.json", config)
    return conversion


def _count(conversion: Conversion, tensor: Imported, could_pack: bool) -> None:
    conversion.n_values += tensor.n_values
    if tensor.quantization is None:
        conversion.floats += 1
        if could_pack and tensor.source_type not in ("F32", "F16", "BF16"):
            conversion.skipped.append(tensor.source)
    elif tensor.lossless:
        conversion.lossless += 1
    else:
        conversion.requantized += 1
        conversion.errors.setdefault(tensor.source_type, []).append(tensor.error)


def quantization_entries(quantizations: dict[str, Quantization]) -> dict[str, Any]:
    """Return config.json's `quantization`: the most common one, then that of each layer that differs."""
    if not quantizations:
        return {}
    ((commonest, _),) = Counter(quantizations.values()).most_common(1)
    entries = commonest.layout | {layer: own.layout for layer, own in quantizations.items() if own != commonest}
    return {"quantization": entries, "quantization_config": entries}


def _convert_folder(
    source: ModelSource,
    folder: Path,
    target: Target | None,
    dtype: mx.Dtype,
    measure: bool,
    trust_remote_code: bool,
) -> Conversion:
    model, config = load_weights(source.path, trust_remote_code)
    if target is None:
        if "quantization" in config or "quantization_config" in config:
            choice = "give --bits to quantize it again, or --no-quantize to convert it to floats"
            raise InputError(f"{source.path}: already quantized; {choice}")
        target = Quantization(4, 64)
    model, config = dequantize_model(model, config)
    cast_model(model, dtype)
    names = tree_flatten(model.parameters())
    conversion = Conversion(config["model_type"], n_values=sum(array.size for _, array in names))
    if isinstance(target, Quantization):
        model, config, conversion.skipped, errors = quantize_model(model, config, target, measure=measure)
        conversion.errors = {"float": list(errors.values())} if errors else {}
    parameters = dict(tree_flatten(model.parameters()))
    conversion.requantized = sum(name.endswith(".scales") for name in parameters)
    conversion.floats = len(names) - conversion.requantized
    writer = ShardWriter(folder)
    del model, names
    # One by one, so that the arrays of a written shard are freed; the work is done where an array is computed.
    for name in tracked(list(parameters), "Converting", len(parameters), "tensors", echo):
        mx.eval(parameters[name])
        writer.add({name: parameters.pop(name)})
    conversion.size_bytes = writer.close()
    config["mlx_lora"] = _provenance(source, conversion, config)
    mlx_lm.utils.save_config(config, folder / "config.json")
    copy_side_files(source.path, folder)
    return conversion


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, templates and license, and write a tokenizer.json if the source only has a SentencePiece model."""
    for pattern in _SIDE_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)  # follows links, which the hub cache uses
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        write_tokenizer_from_spm(folder / "tokenizer.model", source, folder)


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
