"""Write the vision tower and the connector of a model as llama.cpp's `mmproj` file, which it loads beside the language model.

    NAME.gguf          language model                       gguf/write.py
    mmproj-NAME.gguf   pixels -> tower -> connector -> embeddings of a picture's tokens

Matrices are F16, or with --gguf-type f32 or bf16, of that type: a tower is small, and quantizing it costs much. If an adapter changed
the tower, its changes are folded in.

A table has the towers, with the names and settings that llama.cpp has for them. Each row is one of its projector types:

    idefics3           SmolVLM, Idefics 3
    gemma3             Gemma 3
    pixtral            Pixtral, Mistral 3
    qwen2vl_merger     Qwen2-VL
    qwen2.5vl_merger   Qwen2.5-VL
    qwen3vl_merger     Qwen3-VL, Qwen3.5

Tensors are those of mlx-vlm's model (models/vision.py), whose names are on the right of each mapping. A convolution's kernel is
(out, rows, columns, in) there and (out, in, rows, columns) in the file; a kernel over two frames becomes two kernels.

Source: ggml-org/llama.cpp, convert_hf_to_gguf.py and tools/mtmd/clip.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.data.image_tokens import ImageProcessor
from mlx_lora.gguf.arch import text_model
from mlx_lora.gguf.mapping import rope_order
from mlx_lora.gguf.write import TYPES, PlannedTensor, TensorSource, add_metadata, merged_parameters, write_tensors
from mlx_lora.models.folder import of_tower
from mlx_lora.models.image_inputs import text_body
from mlx_lora.models.load import Base
from mlx_lora.models.vision import ATTACHED, stored_tower
from mlx_lora.utils.errors import InputError, Problems
from mlx_lora.utils.files import check_writable, replacing_file

Config = Mapping[str, Any]
Keys = dict[str, Any]
# The tanh form of GELU, which is llama.cpp's `use_gelu`.
TANH = ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True)
class VisionTensor:
    """One tensor of an mmproj file.

    Attributes:
        name: of mlx-vlm's parameter.
        change: its values as the file holds them.
        exact: whether it is F32 in every file: norms and biases (which have one axis) are anyway.
    """

    name: str
    change: Callable[[np.ndarray], np.ndarray] = lambda values: values
    exact: bool = False


Tensors = dict[str, VisionTensor]


@dataclass(frozen=True)
class TowerFacts:
    """What a row of the table gets of a model.

    Attributes:
        config: config.json.
        vision: its vision_config, with mlx-vlm's defaults.
        shapes: of the tower's parameters, by mlx-vlm's name.
        processor: settings of the image processor, with transformers' defaults.
        problems: gets what llama.cpp does not support.
    """

    config: Config
    vision: Config
    shapes: Mapping[str, tuple[int, ...]]
    processor: Config
    problems: Problems

    def layers(self, prefix: str) -> int:
        """Return the number of blocks whose parameters begin with a prefix and a number."""
        numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in self.shapes if name.startswith(prefix)]
        return 1 + max(numbers, default=-1)

    def known(self, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
        """Note a problem if a setting has another value than those that llama.cpp computes with."""
        self.problems.note_if(value not in allowed, f"{name} {value}, not {' or '.join(str(one) for one in allowed)}")


@dataclass(frozen=True)
class ProjectorFamily:
    """One projector type: a row of the table.

    Attributes:
        tensors: facts -> {name in the file: tensor}.
        settings: facts -> {key without `clip.`: value} that add to the shared ones.
        patches: mlx-vlm's name of the kernel that makes patches of a picture.
        blocks: the prefix of its blocks' names.
        width: mlx-vlm's name of a parameter whose first axis is the width between a block's two feed-forward layers.
    """

    tensors: Callable[[TowerFacts], Tensors]
    settings: Callable[[TowerFacts], Keys]
    patches: str
    blocks: str
    width: str


def pairs(names: Mapping[str, str], suffixes: tuple[str, ...] = ("weight", "bias")) -> Tensors:
    """Return the tensors of layers, by their name without `.weight` or `.bias`."""
    return {f"{theirs}.{s}": VisionTensor(f"{ours}.{s}") for theirs, ours in names.items() for s in suffixes}


def _kernel(values: np.ndarray) -> np.ndarray:
    """(out, rows, columns, in) -> (out, in, rows, columns)."""
    return values.transpose(0, 3, 1, 2)


def _frame(number: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return what takes the kernel of one frame: (out, frames, rows, columns, in) -> (out, in, rows, columns)."""
    return lambda values: _kernel(values[:, number])


def _rotated(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return what puts rows of queries or keys into llama.cpp's order (see gguf/mapping.py)."""
    return lambda values: values[rope_order(heads).to_file(len(values))]


# SigLIP: SmolVLM, Gemma 3

SIGLIP = {
    "ln1": "layer_norm1", "ln2": "layer_norm2", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_out": "self_attn.out_proj", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}  # fmt: skip
SMOLVLM, GEMMA = "vision_model.", "vision_tower.vision_model."


def _idefics3_settings(facts: TowerFacts) -> Keys:
    shared = _siglip_settings(facts, SMOLVLM)
    facts.known("do_image_splitting", facts.processor.get("do_image_splitting", True), (True,))
    size = facts.processor.get("size") or {}
    return shared | {
        "projector_type": "idefics3",
        "vision.projector.scale_factor": facts.config.get("scale_factor", 2),
        "vision.preproc_image_size": size.get("longest_edge", shared["vision.image_size"]),
    }


def _siglip(facts: TowerFacts, tower: str) -> Tensors:
    """Return what SigLIP's towers share."""
    names = {
        f"v.blk.{i}.{theirs}": f"{tower}encoder.layers.{i}.{ours}"
        for i in range(facts.layers(f"{tower}encoder.layers."))
        for theirs, ours in SIGLIP.items()
    }
    patches, positions = (f"{tower}embeddings.{kind}_embedding" for kind in ("patch", "position"))
    return {
        "v.patch_embd.weight": VisionTensor(f"{patches}.weight", _kernel, exact=True),
        "v.position_embd.weight": VisionTensor(f"{positions}.weight", exact=True),
        **pairs(names | {"v.post_ln": f"{tower}post_layernorm"}),
        "v.patch_embd.bias": VisionTensor(f"{patches}.bias"),
    }


def _siglip_settings(facts: TowerFacts, tower: str) -> Keys:
    """Return what SigLIP's towers share."""
    facts.known("vision_config.hidden_act", facts.vision.get("hidden_act", TANH[0]), TANH)
    patch, positions = facts.vision["patch_size"], facts.shapes[f"{tower}embeddings.position_embedding.weight"]
    return {
        "use_gelu": True,
        "vision.image_size": math.isqrt(positions[0]) * patch,
        "vision.patch_size": patch,
        "vision.attention.head_count": facts.vision["num_attention_heads"],
        "vision.attention.layer_norm_epsilon": float(facts.vision.get("layer_norm_eps") or 1e-6),
    }


def _idefics3(facts: TowerFacts) -> Tensors:
    return _siglip(facts, SMOLVLM) | {"mm.model.fc.weight": VisionTensor("connector.modality_projection.proj.weight")}


def _gemma3(facts: TowerFacts) -> Tensors:
    return _siglip(facts, GEMMA) | {
        "mm.input_projection.weight": VisionTensor("multi_modal_projector.mm_input_projection_weight"),
        "mm.soft_emb_norm.weight": VisionTensor("multi_modal_projector.mm_soft_emb_norm.weight", lambda w: w + 1),
    }


def _gemma3_settings(facts: TowerFacts) -> Keys:
    shared = _siglip_settings(facts, GEMMA)
    across = shared["vision.image_size"] // shared["vision.patch_size"]
    pooled = math.isqrt(facts.config.get("mm_tokens_per_image", 256))
    facts.known("do_pan_and_scan", bool(facts.processor.get("do_pan_and_scan")), (False,))
    return shared | {"projector_type": "gemma3", "vision.projector.scale_factor": across // pooled}


# Pixtral and Mistral 3

PIXTRAL = {
    "ln1": "attention_norm", "ln2": "ffn_norm", "attn_v": "attention.v_proj", "attn_out": "attention.o_proj",
    "ffn_gate": "feed_forward.gate_proj", "ffn_up": "feed_forward.up_proj", "ffn_down": "feed_forward.down_proj",
}  # fmt: skip
# llama.cpp takes the embedding of the token that ends a line of patches from the mmproj.
LINE_END, LINE_TOKEN = "v.token_embd.img_break", "[IMG_BREAK]"


def _pixtral(facts: TowerFacts) -> Tensors:
    blocks, heads = f"{GEMMA}transformer.layers.", facts.vision["num_attention_heads"]
    names = {"v.pre_ln": f"{GEMMA}ln_pre"}
    found: Tensors = {"v.patch_embd.weight": VisionTensor(f"{GEMMA}patch_conv.weight", _kernel)}
    for i in range(facts.layers(blocks)):
        names |= {f"v.blk.{i}.{theirs}": f"{blocks}{i}.{ours}" for theirs, ours in PIXTRAL.items()}
        for kind in "qk":
            ours = f"{blocks}{i}.attention.{kind}_proj.weight"
            found[f"v.blk.{i}.attn_{kind}.weight"] = VisionTensor(ours, _rotated(heads))
    projector = {"mm.1": "multi_modal_projector.linear_1", "mm.2": "multi_modal_projector.linear_2"}
    found |= pairs(names, ("weight",)) | pairs(projector)
    if facts.config.get("model_type") == "mistral3":
        merger = {"mm.input_norm": "norm", "mm.patch_merger": "patch_merger.merging_layer"}
        found |= pairs({theirs: f"multi_modal_projector.{ours}" for theirs, ours in merger.items()}, ("weight",))
    return {name: one for name, one in found.items() if one.name in facts.shapes or not name.endswith(".bias")}


def _pixtral_settings(facts: TowerFacts) -> Keys:
    own: Keys = {"projector_type": "pixtral", "use_silu": True}
    theta = facts.vision.get("rope_theta", 10000.0)
    facts.known("vision_config.rope_theta", theta, (10000.0,))
    if facts.config.get("model_type") == "mistral3":
        own["vision.spatial_merge_size"] = facts.config.get("spatial_merge_size", 2)
    size = facts.processor.get("size") or {}
    return own | {
        "vision.image_size": size.get("longest_edge", facts.vision["image_size"]),
        "vision.patch_size": facts.vision["patch_size"],
        "vision.attention.head_count": facts.vision["num_attention_heads"],
        "vision.attention.layer_norm_epsilon": 1e-5,
    }


# Qwen-VL

QWEN = "vision_tower."


# What differs between the generations: names of a block's feed-forward part and of the connector, and the parameters of a
# norm, which in one has no bias, because it only divides by the size.
QWEN_TENSORS: dict[str, tuple[dict[str, str], dict[str, str], tuple[str, ...]]] = {
    "qwen2_vl": ({"ffn_up": "fc1", "ffn_down": "fc2"}, {"mm.0": "mlp.0", "mm.2": "mlp.2"}, ("weight", "bias")),
    "qwen2_5_vl": (
        {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"},
        {"mm.0": "mlp.0", "mm.2": "mlp.2"},
        ("weight",),
    ),
    "qwen3_vl": (
        {"ffn_up": "linear_fc1", "ffn_down": "linear_fc2"},
        {"v.post_ln": "norm", "mm.0": "linear_fc1", "mm.2": "linear_fc2"},
        ("weight", "bias"),
    ),
}


def _qwen(kind: str, facts: TowerFacts) -> Tensors:
    """Return the tensors of a Qwen-VL's tower; `kind` is a key of QWEN_TENSORS."""
    layers, merger, norms = QWEN_TENSORS[kind]
    patches = f"{QWEN}patch_embed.proj.weight"
    found: Tensors = {
        "v.patch_embd.weight": VisionTensor(patches, _frame(0)),
        "v.patch_embd.weight.1": VisionTensor(patches, _frame(1)),
    }
    for i in range(facts.layers(f"{QWEN}blocks.")):
        theirs, ours = f"v.blk.{i}.", f"{QWEN}blocks.{i}."
        found |= pairs({f"{theirs}ln{n}": f"{ours}norm{n}" for n in (1, 2)}, norms)
        found |= pairs({f"{theirs}attn_out": f"{ours}attn.proj"})
        found |= pairs({theirs + name: f"{ours}mlp.{own}" for name, own in layers.items()})
        for part in ("weight", "bias"):
            joined = f"{ours}attn.qkv.{part}"
            split = {
                f"{theirs}attn_{name}.{part}": VisionTensor(joined, lambda rows, n=n: np.split(rows, 3)[n])
                for n, name in enumerate("qkv")
            }
            found |= {f"{theirs}attn_qkv.{part}": VisionTensor(joined)} if kind == "qwen3_vl" else split
    found |= pairs({theirs: f"{QWEN}merger.{ours}" for theirs, ours in merger.items()})
    return found if kind == "qwen3_vl" else found | pairs({"v.post_ln": f"{QWEN}merger.ln_q"}, norms)


def _qwen_settings(facts: TowerFacts) -> Keys:
    """Return what the towers of Qwen-VL share."""
    patch, merge = facts.vision["patch_size"], facts.vision["spatial_merge_size"]
    facts.known("vision_config.temporal_patch_size", facts.vision.get("temporal_patch_size", 2), (2,))
    size = facts.processor.get("size") or {}
    limits = {
        f"vision.image_{kind}_pixels": size.get(edge)
        for kind, edge in (("min", "shortest_edge"), ("max", "longest_edge"))
    }
    return {
        "vision.image_size": 560,  # llama.cpp only measures memory with it; pictures keep their size
        "vision.patch_size": patch,
        "vision.spatial_merge_size": merge,
        "vision.attention.head_count": facts.vision["num_heads"],
        "vision.attention.layer_norm_epsilon": 1e-6,
        **{key: value for key, value in limits.items() if isinstance(value, int)},
    }


def _qwen2_settings(facts: TowerFacts) -> Keys:
    facts.known("vision_config.hidden_act", facts.vision.get("hidden_act", "quick_gelu"), ("quick_gelu",))
    return _qwen_settings(facts) | {"projector_type": "qwen2vl_merger"}


def _qwen25_settings(facts: TowerFacts) -> Keys:
    facts.known("vision_config.window_size", facts.vision["window_size"], (112,))
    whole = list(facts.vision["fullatt_block_indexes"])
    every = whole[0] + 1 if whole else 0
    # llama.cpp ends if no block has windows.
    facts.problems.note_if(
        every < 2 or whole != list(range(every - 1, facts.layers(f"{QWEN}blocks."), every)),
        f"vision_config.fullatt_block_indexes {whole}, not one in every N blocks",
    )
    return _qwen_settings(facts) | {
        "projector_type": "qwen2.5vl_merger",
        "use_silu": True,
        "vision.n_wa_pattern": every,
    }


def _qwen3(facts: TowerFacts) -> Tensors:
    found = _qwen("qwen3_vl", facts)
    found["v.patch_embd.bias"] = VisionTensor(f"{QWEN}patch_embed.proj.bias")
    found["v.position_embd.weight"] = VisionTensor(f"{QWEN}pos_embed.weight", exact=True)
    deep = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}
    for number, block in enumerate(facts.vision.get("deepstack_visual_indexes") or ()):
        ours = f"{QWEN}deepstack_merger_list.{number}."
        found |= pairs({f"v.deepstack.{block}.{name}": ours + part for name, part in deep.items()})
    return found


def _qwen3_settings(facts: TowerFacts) -> Keys:
    facts.known("vision_config.hidden_act", facts.vision.get("hidden_act", TANH[0]), TANH)
    deep = set(facts.vision.get("deepstack_visual_indexes") or ())
    side = math.isqrt(facts.shapes[f"{QWEN}pos_embed.weight"][0]) * facts.vision["patch_size"]
    return _qwen_settings(facts) | {
        "projector_type": "qwen3vl_merger",
        "use_gelu": True,
        "vision.image_size": side,
        "vision.is_deepstack_layers": [i in deep for i in range(facts.layers(f"{QWEN}blocks."))],
    }


PIXTRAL_ROW = ProjectorFamily(
    _pixtral,
    _pixtral_settings,
    f"{GEMMA}patch_conv.weight",
    f"{GEMMA}transformer.layers.",
    "feed_forward.up_proj.weight",
)
SIGLIP_PATCHES, SIGLIP_BLOCKS, SIGLIP_WIDTH = "embeddings.patch_embedding.weight", "encoder.layers.", "mlp.fc1.weight"
IDEFICS3_ROW = ProjectorFamily(
    _idefics3, _idefics3_settings, SMOLVLM + SIGLIP_PATCHES, SMOLVLM + SIGLIP_BLOCKS, SIGLIP_WIDTH
)
QWEN_PARTS = (f"{QWEN}patch_embed.proj.weight", f"{QWEN}blocks.")
QWEN3_ROW = ProjectorFamily(_qwen3, _qwen3_settings, *QWEN_PARTS, "mlp.linear_fc1.weight")
PROJECTORS: dict[str, ProjectorFamily] = {
    "smolvlm": IDEFICS3_ROW,
    "idefics3": IDEFICS3_ROW,
    "gemma3": ProjectorFamily(_gemma3, _gemma3_settings, GEMMA + SIGLIP_PATCHES, GEMMA + SIGLIP_BLOCKS, SIGLIP_WIDTH),
    "pixtral": PIXTRAL_ROW,
    "mistral3": PIXTRAL_ROW,
    "qwen2_vl": ProjectorFamily(partial(_qwen, "qwen2_vl"), _qwen2_settings, *QWEN_PARTS, "mlp.fc1.weight"),
    "qwen2_5_vl": ProjectorFamily(partial(_qwen, "qwen2_5_vl"), _qwen25_settings, *QWEN_PARTS, "mlp.up_proj.weight"),
    "qwen3_vl": QWEN3_ROW,
    "qwen3_5": QWEN3_ROW,
}


# Why llama.cpp gets no tower of a family that it has, or might be thought to have.
REFUSED = {
    "llava": "llama.cpp 2026.10 reads LLaVA's patches one place too far, so that its answers are another model's",
    "paligemma": "llama.cpp has none for PaliGemma",
}


def mmproj_path(model: Path) -> Path:
    """Return where the tower of a GGUF file is written: beside it, by the name by which llama.cpp and LM Studio find it."""
    return model.with_name(f"mmproj-{model.name}")


@dataclass(frozen=True)
class Mmproj:
    """A tower and a connector, ready to be written.

    Attributes:
        metadata: {key: value}, all but the name.
        tensors: in the file's order.
    """

    metadata: dict[str, Any]
    tensors: list[PlannedTensor] = field(default_factory=list)

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
            write_tensors(writer, self.tensors)
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
    pixtral = kind == "llava" and (base.config.get("vision_config") or {}).get("model_type") == "pixtral"
    family = PROJECTORS.get("pixtral" if pixtral else kind)  # as transformers writes it
    if family is None:
        raise InputError(REFUSED.get(kind, f"no tower of llama.cpp was compared with that of {kind}"))
    model, _ = stored_tower(base.folder)
    sources = dict(merged_parameters(model))
    # What an adapter changed is added to the weights as they are stored, which may be finer than those that a run computes with.
    if ATTACHED in vars(base.model):
        # An adapted layer's bias has the layer's name once more.
        trained = {*full, *(name.replace(".linear.bias", ".bias") for name in full)}
        sources |= {n: one for n, one in merged_parameters(base.model) if of_tower(n) and n in trained}
        for path, layer in adapter_layers(base.model).items():
            if of_tower(path):
                source = sources[f"{path}.weight"]
                sources[f"{path}.weight"] = TensorSource(
                    source.shape, lambda source=source, layer=layer: source.values() + layer.delta()
                )
    given = {name: value for name, value in base.config["vision_config"].items() if value is not None}
    vision = {**vars(model.config.vision_config), **given}
    shapes = {name: source.shape for name, source in sources.items()}
    asked, problems = ImageProcessor(base.folder, base.config).identity, Problems()
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
    planned = []
    for name, one in tensors.items():
        source = sources[one.name]
        shape = one.change(np.broadcast_to(np.float32(0), source.shape)).shape
        own = Kind.F32 if len(shape) == 1 or one.exact else float_kind
        values = TensorSource(shape, lambda one=one, source=source: mx.array(one.change(np.array(source.values()))))
        planned.append(PlannedTensor(name, values, own))
    width = text_model(base.model)[1].args.hidden_size
    if LINE_TOKEN in base.hf_tokenizer.get_vocab() and settings["projector_type"] == "pixtral":
        token = mx.array([base.hf_tokenizer.convert_tokens_to_ids(LINE_TOKEN)])
        embed = text_body(base.model)["embed_tokens"]
        source = TensorSource((width,), lambda: embed(token)[0].astype(mx.float32))
        planned.append(PlannedTensor(LINE_END, source, Kind.F32))
    shared = {
        "has_vision_encoder": True,
        "vision.projection_dim": width,
        "vision.embedding_length": shapes[family.patches][0],
        "vision.feed_forward_length": shapes[f"{family.blocks}0.{family.width}"][0],
        "vision.block_count": facts.layers(family.blocks),
        "vision.image_mean": [float(value) for value in facts.processor["image_mean"]],
        "vision.image_std": [float(value) for value in facts.processor["image_std"]],
    }
    metadata = {f"clip.{key}": value for key, value in {**shared, **settings}.items()}
    return Mmproj({"general.file_type": int(file_type), **metadata}, planned)
