"""Write a model, with its adapter folded in, as one GGUF file, or the adapter alone.

A model, for llama.cpp, Ollama and LM Studio:

    base + adapter, float32, one tensor at a time -> llama.cpp's order and offsets -> the chosen type -> file

Types follow llama.cpp's converter: tensors of one axis (norms, biases), routers and convolutions stay F32, and rows
that a block type cannot divide are F16. In files of 4 and 5 bits the output head, or the embedding tied to it, is
Q8_0. MXFP4 weights that no adapter changed are copied bit for bit, except into f32 files.

An adapter, which llama.cpp applies to the base GGUF (`llama-cli -m base.gguf --lora FILE`): tensors are named after the
base's, `blk.0.attn_q.weight.lora_a` (r, in) and `.lora_b` (out, r), both float32; those of experts have the experts' axis
in front. llama.cpp multiplies their product by alpha / r; rows of B and columns of A are reordered like the base's.

Source: ggml-org/llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, LlamaFileType

from mlx_lora.adapters.base import EMBEDDING, QUANTIZED, AdapterLayer, base_dims, exact_weight, joined_experts
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.adapters.lora import group_update
from mlx_lora.adapters.qat import FakeQuantized, fused_layer
from mlx_lora.data.chat_template import own_template
from mlx_lora.gguf.arch import WRITTEN, context_length, gguf_settings, gguf_weights, text_arguments, text_model
from mlx_lora.gguf.mapping import TensorMapping
from mlx_lora.gguf.tokenizer import tokenizer_metadata, tokenizer_vocabulary
from mlx_lora.gguf.weights import MXFP4, affine_blocks, mxfp4_blocks, stored_kind
from mlx_lora.models.draft_folder import KIND, TOKENS, read_draft
from mlx_lora.models.drafts import draft_of
from mlx_lora.models.folder import FUSED_KEY, fused_mark, merge_mark, of_tower
from mlx_lora.models.image_inputs import ImageInputSpec
from mlx_lora.models.load import Base
from mlx_lora.models.quantize import PackedWeight, QuantFormat
from mlx_lora.utils.errors import InputError, first_of
from mlx_lora.utils.files import check_writable, replacing_file
from mlx_lora.utils.progress import tracked

log = logging.getLogger(__name__)

# --gguf-type: the type of matrices, and its number in the file.
TYPES = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (Kind.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q5_0": (Kind.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q5_1": (Kind.Q5_1, LlamaFileType.MOSTLY_Q5_1),
}
# As the base has it: quantized weights keep their codes where ggml has such blocks, the others are F16.
STORED = "stored"
GGUF_TYPES = (*TYPES, STORED)
_FILE_TYPES = dict(TYPES.values())
DEFAULT_TYPE = "f16"  # as in llama.cpp's converter; `llama-quantize` makes K-quants from it
_COARSE = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)


# A model


@dataclass(frozen=True)
class TensorSource:
    """One float parameter of an adapted model, which is not computed yet.

    Attributes:
        shape: of the values, row-major.
        values: computes them, float32.
        packed: the same values as they are packed in the model, if a type of GGUF holds these.
        kind: that type.
    """

    shape: tuple[int, ...]
    values: Callable[[], mx.array]
    packed: PackedWeight | None = None
    kind: Kind | None = None


AS_IT_IS = TensorMapping("")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file: its name, its source, its stored type, and how the file's values differ from the source's."""

    name: str
    source: TensorSource
    kind: Kind
    mapping: TensorMapping = AS_IT_IS

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mapping.file_shape(self.source.shape)

    @property
    def n_bytes(self) -> int:
        return int(np.prod(gguf.quant_shape_to_byte_shape(self.shape, self.kind)))

    def stored(self) -> np.ndarray:
        """Compute the tensor as it is stored in the file.

        Raises:
            InputError: the type cannot hold the values.
        """
        if self.kind is Kind.MXFP4:
            return mxfp4_blocks(self.source.packed)  # pyright: ignore[reportArgumentType] # MXFP4 is always packed
        if self.source.packed is not None and self.kind is self.source.kind:
            blocks = affine_blocks(self.source.packed, self.kind)
            return blocks if self.mapping.rows is None else blocks[self.mapping.rows.to_file(len(blocks))]
        values = self.mapping.to_file(np.array(self.source.values()))  # a copy, so that mlx's buffer is freed
        largest = np.abs(values).max()
        limit = np.inf if self.kind in (Kind.F32, Kind.BF16) else np.finfo(np.float16).max
        if not largest < limit:
            raise InputError(
                f"--gguf-type: {self.name} has {largest:g}, too large for {self.kind.name}; use bf16 or f32"
                if np.isfinite(largest)
                else f"--to gguf: {self.name} has values that are not finite; the adapter or the base is broken"
            )
        return np.ascontiguousarray(gguf.quants.quantize(values, self.kind))


def write_gguf_model(
    file: Path,
    base: Base,
    *,
    gguf_type: str = DEFAULT_TYPE,
    name: str,
    chat_template: str | None = None,
    asked: Path | None = None,
) -> int:
    """Write `base.model` with its adapter, if it has one, as a GGUF model, atomically.

    This takes memory for the base and one float tensor.

    Args:
        file: replaced atomically.
        base: adapted or not; not changed.
        gguf_type: key of TYPES, or STORED.
        name: of the model, for the metadata.
        chat_template: the adapter's, which becomes the model's.
        asked: the value of --out, if that is not `file`.

    Returns:
        The file's size in bytes.

    Raises:
        InputError: llama.cpp does not support the architecture, settings, layers or tokenizer, or the disk is too full.
    """
    kind, file_type = TYPES.get(gguf_type, (None, None))
    architecture, mappings = gguf_weights(base.model)
    settings, extra = gguf_settings(base.model, architecture)
    if architecture in ("qwen2vl", "qwen3vl"):  # by which llama.cpp puts pictures into it
        spec = ImageInputSpec.of(base.config)
        settings["rope.dimension_sections"] = [*(spec.sections or ()), 0]  # time, row, column, and one that nobody uses
        settings |= {"n_deepstack_layers": spec.deep} if architecture == "qwen3vl" else {}
    settings["context_length"] = context_length(base.model, base.config)
    planned = _plan(base.model, architecture, mappings, kind)
    if drafting := _draft_tensors(base, architecture, kind):
        planned += drafting
        settings |= {"block_count": settings["block_count"] + 1, "nextn_predict_layers": 1}
    n_rows = text_model(base.model)[1].args.vocab_size
    template = chat_template or own_template(base.hf_tokenizer)
    ends = sorted(base.tokenizer.eos_token_ids)
    vocabulary = tokenizer_vocabulary(base.hf_tokenizer, n_rows, ends, template, architecture)
    check_writable(asked or file.parent, "--out", sum(tensor.n_bytes for tensor in planned))
    with replacing_file(file) as temporary:
        writer = GGUFWriter(str(temporary), architecture)
        writer.add_type("model")
        writer.add_name(name)
        sizes: Counter[Kind] = Counter()
        for tensor in planned:
            sizes[tensor.kind] += int(np.prod(tensor.shape))
        most = _FILE_TYPES.get(sizes.most_common(1)[0][0], LlamaFileType.GUESSED)  # that most values have
        writer.add_file_type(most if file_type is None else file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in settings.items():
            add_metadata(writer, f"{architecture}.{key}", value)
        for key, value in tokenizer_metadata(vocabulary).items():
            add_metadata(writer, key, value)
        mark = merge_mark(base.model, base.config) if adapter_layers(base.model) else fused_mark(base.config)
        if mark:
            writer.add_string(FUSED_KEY, mark)
        write_tensors(writer, planned, extra)
    return file.stat().st_size


def write_tensors(
    writer: GGUFWriter, planned: Sequence[PlannedTensor], extra: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write the table, which needs only shapes, and then the data, so that one tensor at a time is computed."""
    for name, values in (extra or {}).items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for tensor in planned:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for values in (extra or {}).values():
            writer.write_tensor_data(values)
        for tensor in tracked(planned, "Writing", len(planned), "tensors"):
            writer.write_tensor_data(tensor.stored())
    finally:
        writer.close()


def _plan(
    model: nn.Module, architecture: str, mappings: dict[str, TensorMapping], kind: Kind | None
) -> list[PlannedTensor]:
    """Choose a type for every tensor that the model has, in the file's order.

    Raises:
        InputError: the model has parameters that the file cannot hold, or lacks some that it needs.
    """
    merged = merged_parameters(model, stored=kind is None)
    sources = {name: source for name, source in merged if not of_tower(name)}  # gguf/mmproj.py writes the others
    known = {name for mapping in mappings.values() for name in mapping.names}
    unplaced = [name for name in sources if name not in known]
    if unplaced:
        raise InputError(
            f"--to gguf: {first_of(unplaced, 3, ', ')} have no tensor in a {architecture} GGUF; use --to peft or hf"
        )
    prefix, _ = text_model(model)
    head = next(name for name in ("lm_head.weight", "model.embed_tokens.weight") if prefix + name in sources)
    return _planned(sources, mappings, kind, prefix + head)


def _planned(
    sources: Mapping[str, TensorSource], mappings: dict[str, TensorMapping], kind: Kind | None, head: str
) -> list[PlannedTensor]:
    """Choose a type for each tensor whose parts are there."""
    planned = []
    for name, mapping in mappings.items():
        parts = [sources[part] for part in mapping.names if part in sources]
        if len(parts) == len(mapping.names):
            source = parts[0]
            if len(parts) > 1:  # their rows follow one another
                *before, rows, width = source.shape
                source = TensorSource((*before, rows * len(parts), width), partial(_joined, parts))
            planned.append(PlannedTensor(name, source, _kind(source, mapping, kind, head), mapping))
    return planned


NEXTN = {
    "eh_proj": "fc",
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "shared_head_norm": "norm",
}


def _draft_tensors(base: Base, architecture: str, kind: Kind | None) -> list[PlannedTensor]:
    """Return the tensors of a head that drafts tokens, which llama.cpp has as one more block; none where it has no place for it."""
    try:
        found = (base.adapter and read_draft(base.adapter)) or read_draft(base.folder)
    except InputError as error:
        log.info(f"Note: without the head that drafts tokens: {error}")
        return []
    if found is None:
        return []
    args = text_arguments(base.model)
    if architecture not in ("qwen35", "qwen35moe") or TOKENS in found[0] or found[0]["model_type"] != KIND:
        log.info(f"Note: without the head that drafts tokens: llama.cpp's {architecture} has no place for it")
        return []
    block, full = args["num_hidden_layers"], args["full_attention_interval"] - 1
    mappings = {f"nextn.{theirs}.weight": TensorMapping(f"{ours}.weight") for theirs, ours in NEXTN.items()}
    for name, mapping in WRITTEN[architecture].block(args, full).items():
        own, *then = (f"layers.0.{part}" for part in mapping.names)
        mappings[name] = replace(mapping, name=own, then=tuple(then))
    sources = dict(merged_parameters(draft_of(*found, mx.float32), stored=kind is None))
    return _planned(sources, {f"blk.{block}.{name}": mapping for name, mapping in mappings.items()}, kind, "")


def _joined(parts: list[TensorSource]) -> mx.array:
    return mx.concatenate([part.values() for part in parts], axis=-2)


def _kind(source: TensorSource, mapping: TensorMapping, wanted: Kind | None, head: str) -> Kind:
    """Return the type in which a tensor is stored; `wanted` None: as the model has it."""
    shape = mapping.file_shape(source.shape)
    if len(shape) == 1 or mapping.exact:
        return Kind.F32
    if source.kind is Kind.MXFP4 and wanted is not Kind.F32 and not mapping.moves:
        return Kind.MXFP4
    if wanted is None:
        # Rows of blocks can be reordered, columns within a block cannot.
        changes = mapping.columns or mapping.offset or mapping.values != "plain" or mapping.axis is not None
        return Kind.F16 if changes or source.kind in (None, Kind.MXFP4) else source.kind
    kind = Kind.Q8_0 if mapping.name == head and wanted in _COARSE else wanted
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else Kind.F16


def merged_parameters(model: nn.Module, stored: bool = False) -> Iterator[tuple[str, TensorSource]]:
    """Yield every parameter with its name without adapter and quantization; nothing is computed yet.

    Args:
        model: adapted or not.
        stored: whether to find out which packed weights a type of GGUF holds, for which scales must be read.

    Raises:
        InputError: an embedding's tied head is not adapted, and one weight cannot be both adapted and not.
    """
    adapters, inside = adapter_layers(model), None
    # In this order an adapter's parts follow it directly.
    for path, module in sorted(model.named_modules(), key=lambda item: item[0].split(".")):
        if inside is not None and path.startswith(f"{inside}."):
            continue
        adapter = module if path in adapters else None
        if adapter is not None or isinstance(module, QUANTIZED):
            base, packed = module, (None, None)
            if adapter is not None:
                inside, base = path, adapter.base
                adapter.check_tied_head(path, tied="lm_head" not in text_model(model)[1])
            elif (module.mode, module.group_size) == (MXFP4.mode, MXFP4.group_size):
                packed = PackedWeight([module.weight, module.scales], MXFP4), Kind.MXFP4
            if stored and packed[0] is None:
                packed = _packed(base, adapter)
            width, rows = base_dims(base)
            shape = (width, rows) if isinstance(base, EMBEDDING) else (rows, width)
            shape = (*base.weight.shape[:-2], *shape)  # experts have an axis before
            yield f"{path}.weight", TensorSource(shape, partial(_merged, base, adapter), *packed)
            if "bias" in base:
                yield f"{path}.bias", TensorSource(base.bias.shape, partial(base.bias.astype, mx.float32))
            continue
        for name, value in module.items():
            if isinstance(value, mx.array) and not name.startswith("_"):  # RoPE's frequencies have such names
                own = f"{path}.{name}" if path else name
                yield own, TensorSource(value.shape, partial(value.astype, mx.float32))


def _merged(base: nn.Module, adapter: AdapterLayer | None) -> mx.array:
    weight = exact_weight(base)
    return weight if adapter is None else weight + adapter.delta()


def _packed(base: nn.Module, adapter: AdapterLayer | None) -> tuple[PackedWeight | None, Kind | None]:
    """Return a layer's packed weight with its adapter, and the type of GGUF that holds it; None if none does."""
    if not isinstance(base, QUANTIZED):
        return None, None
    if isinstance(adapter, FakeQuantized):
        base, adapter = fused_layer(adapter), None
    if base.biases is None:
        return None, None
    biases, update = base.biases.astype(mx.float32), None
    if adapter is not None:
        update = group_update(adapter)
        if update is None:
            return None, None
        biases = biases + update
    packed = PackedWeight([base.weight, base.scales, biases], QuantFormat(base.bits, base.group_size))
    kind = stored_kind(packed, symmetric=None if update is None else False)
    return (packed, kind) if kind else (None, None)


def add_metadata(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add one metadata entry with the GGUF type for its Python type."""
    if isinstance(value, list):
        writer.add_array(key, value)  # of int32, bool or text: GGUF takes the first one's type
    else:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)


# An adapter


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
        raise InputError(f"--to gguf-adapter: {first_of(problems, 4)}; fuse it instead, or adapt other layers")
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
