"""Write the vision tower and the connector of a model as llama.cpp's `mmproj` file, which it loads beside the language model.

    NAME.gguf          language model                       gguf/write.py
    mmproj-NAME.gguf   pixels -> tower -> connector -> embeddings of a picture's tokens

Matrices are F16, or with --gguf-type f32 or bf16, of that type: a tower is small, and quantizing it costs much. If an adapter changed
the tower, its changes are folded in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, LlamaFileType

from mlx_lora.adapters.base import AdapterLayer
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.data.image_tokens import ImageProcessor
from mlx_lora.gguf.arch import text_model
from mlx_lora.gguf.vision import LINE_END, LINE_TOKEN, REFUSED, ProjectorFamily, TowerFacts, VisionTensor, projector_of
from mlx_lora.gguf.write import TYPES, TensorSource, add_metadata, merged_parameters
from mlx_lora.models.image_inputs import text_body
from mlx_lora.models.load import Base
from mlx_lora.models.tower_files import of_tower
from mlx_lora.models.vision import ATTACHED, stored_tower
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import check_writable, replacing_file


def mmproj_path(model: Path) -> Path:
    """Return where the tower of a GGUF file is written: beside it, by the name by which llama.cpp and LM Studio find it."""
    return model.with_name(f"mmproj-{model.name}")


@dataclass(frozen=True)
class PlannedVisionTensor:
    """One tensor of the file, which is not computed yet.

    Attributes:
        name: in the file.
        values: computes it, float32 in the file's shape.
        shape: of it.
        kind: its stored type.
    """

    name: str
    values: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    kind: Kind

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape)) * gguf.GGML_QUANT_SIZES[self.kind][1]

    def stored(self) -> np.ndarray:
        """Compute the tensor as it is stored in the file.

        Raises:
            InputError: the type cannot hold the values.
        """
        values = np.ascontiguousarray(self.values(), np.float32)
        largest = np.abs(values).max()
        if not np.isfinite(largest):
            raise InputError(
                f"--to gguf: {self.name} has values that are not finite; the adapter or the base is broken"
            )
        if self.kind is Kind.F16 and largest > np.finfo(np.float16).max:
            raise InputError(f"--gguf-type: {self.name} has {largest:g}, too large for F16; use bf16 or f32")
        return np.ascontiguousarray(gguf.quants.quantize(values, self.kind))


@dataclass(frozen=True)
class Mmproj:
    """A tower and a connector, ready to be written.

    Attributes:
        metadata: {key: value}, all but the name.
        tensors: in the file's order.
    """

    metadata: dict[str, Any]
    tensors: list[PlannedVisionTensor] = field(default_factory=list)

    def write(self, file: Path, name: str, asked: Path | None = None) -> int:
        """Write the file, atomically, one tensor at a time.

        Args:
            file: replaced.
            name: of the model, for the metadata.
            asked: the value of --out, if that is not in `file`'s folder.

        Returns:
            The file's size in bytes.

        Raises:
            InputError: a value does not fit, or the disk is too full.
        """
        check_writable(asked or file.parent, "--out", sum(tensor.n_bytes for tensor in self.tensors))
        with replacing_file(file) as temporary:
            writer = GGUFWriter(str(temporary), "clip")
            writer.add_type("mmproj")
            writer.add_name(name)
            for key, value in self.metadata.items():
                add_metadata(writer, key, value)
            for one in self.tensors:
                writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.n_bytes, raw_dtype=one.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            try:
                for one in self.tensors:
                    writer.write_tensor_data(one.stored())
            finally:
                writer.close()
        return file.stat().st_size


def mmproj_of(base: Base, gguf_type: str, full: tuple[str, ...] = ()) -> Mmproj:
    """Return what the mmproj file of a vision-language model holds, with the changes of an adapter on its tower folded in.

    Args:
        base: adapted or not; not changed.
        gguf_type: as for the language model.
        full: names of parameters that the adapter trained in full.

    Raises:
        InputError: llama.cpp does not have such a tower, or mlx-vlm, which loads it, is missing.
    """
    kind = str(base.config.get("model_type"))
    family = projector_of(base.config)
    if family is None:
        raise InputError(REFUSED.get(kind, f"no tower of llama.cpp was compared with that of {kind}"))
    sources, vision = _tower_sources(base, full)
    shapes = {name: source.shape for name, source in sources.items()}
    asked, problems = ImageProcessor(base.folder, base.config).identity, []
    facts = TowerFacts(base.config, vision, shapes, asked["processor"], problems)
    settings, tensors = family.settings(facts), family.tensors(facts)
    for name in ("do_rescale", "do_normalize"):
        facts.known(name, asked["processor"].get(name, True), (True,))
    used = {one.name for one in tensors.values()}
    problems += [f"{name} missing" for name in sorted(used - shapes.keys())[:3]]
    problems += [f"{name} has no tensor" for name in sorted(shapes.keys() - used)[:3]]
    if problems:
        raise InputError(f"llama.cpp's tower for {kind} does not support this: {'; '.join(problems)}")
    float_kind, file_type = TYPES[gguf_type if gguf_type in ("f32", "bf16") else "f16"]
    planned = [_planned(name, one, sources[one.name], float_kind) for name, one in tensors.items()]
    if LINE_TOKEN in base.hf_tokenizer.get_vocab() and settings["projector_type"] == "pixtral":
        planned.append(_line_end(base))
    return Mmproj(_metadata(base, family, facts, settings, file_type), planned)


def _tower_sources(base: Base, full: tuple[str, ...]) -> tuple[dict[str, TensorSource], dict[str, Any]]:
    """Return the parameters of a base's tower and connector by mlx-vlm's names, and its vision_config with defaults.

    What an adapter changed is added to the weights as they are stored, which may be finer than those that a run computes with.
    """
    model, _ = stored_tower(base.folder)
    sources = dict(merged_parameters(model))
    if ATTACHED in vars(base.model):
        # An adapted layer's bias has the layer's name once more.
        trained = {*full, *(name.replace(".linear.bias", ".bias") for name in full)}
        sources |= {n: one for n, one in merged_parameters(base.model) if of_tower(n) and n in trained}
        for path, layer in adapter_layers(base.model).items():
            if of_tower(path):
                sources[f"{path}.weight"] = _with_update(sources[f"{path}.weight"], layer)
    given = {name: value for name, value in base.config["vision_config"].items() if value is not None}
    return sources, {**vars(model.config.vision_config), **given}


def _with_update(source: TensorSource, layer: AdapterLayer) -> TensorSource:
    return TensorSource(source.shape, lambda: source.values() + layer.delta())


def _planned(name: str, tensor: VisionTensor, source: TensorSource, kind: Kind) -> PlannedVisionTensor:
    shape = tensor.change(np.broadcast_to(np.float32(0), source.shape)).shape
    exact = len(shape) == 1 or tensor.exact
    return PlannedVisionTensor(
        name, lambda: tensor.change(np.array(source.values())), shape, Kind.F32 if exact else kind
    )


def _line_end(base: Base) -> PlannedVisionTensor:
    """Return the embedding of the token that ends a line of patches, which llama.cpp reads here."""
    token = base.hf_tokenizer.convert_tokens_to_ids(LINE_TOKEN)
    embed = text_body(base.model)["embed_tokens"]
    width = text_model(base.model)[1].args.hidden_size
    return PlannedVisionTensor(
        LINE_END, lambda: np.array(embed(mx.array([token]))[0].astype(mx.float32)), (width,), Kind.F32
    )


def _metadata(
    base: Base, family: ProjectorFamily, facts: TowerFacts, own: dict[str, Any], file_type: LlamaFileType
) -> dict[str, Any]:
    """Return the file's settings."""
    settings = {
        "has_vision_encoder": True,
        "vision.projection_dim": text_model(base.model)[1].args.hidden_size,
        "vision.embedding_length": facts.shapes[family.patches][0],
        "vision.feed_forward_length": facts.shapes[f"{family.blocks}0.{family.width}"][0],
        "vision.block_count": facts.layers(family.blocks),
        "vision.image_mean": [float(value) for value in facts.processor["image_mean"]],
        "vision.image_std": [float(value) for value in facts.processor["image_std"]],
        **own,
    }
    return {"general.file_type": int(file_type), **{f"clip.{key}": value for key, value in settings.items()}}
