"""What GGUF calls a model's tensors and settings, and what mlx-lm calls them, per architecture.

llama.cpp's converter changes two things that are undone here (see `Weight`):
    llama   rows of q and k are permuted within each head, from [half, pair] to [pair, half] order
    gemma3  norm weights carry +1, where mlx-lm's norms multiply by (1 + w)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_lora.errors import InputError
from mlx_lora.models.config_check import MOST_BLOCKS
from mlx_lora.models.fingerprint import FUSED_KEY
from mlx_lora.sources.gguf import GGUFFile


@dataclass(frozen=True)
class Weight:
    """Where one GGUF tensor goes.

    Attributes:
        name: mlx-lm's parameter, e.g. `model.layers.0.self_attn.q_proj.weight`.
        rope_heads: for rows permuted within heads, how many heads; 0: rows are in mlx-lm's order.
        offset: what the file added to the values (1 for Gemma's norms).
    """

    name: str
    rope_heads: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """One row of the table: names and config fields beside those that all share.

    Attributes:
        model_type: mlx-lm's.
        model_class: transformers' class, which tells llama.cpp's converter and others what the folder holds.
        block: tensor names within a block, beyond the shared ones, to mlx-lm's.
        biases: bias tensors every block has, or (optional) all blocks may have.
        biases_optional: whether a model without those biases is complete.
        permuted: whether q and k rows are in llama.cpp's RoPE order.
        norm_offset: what the file added to norm weights.
        fields: config fields beyond the shared ones.
    """

    model_type: str
    model_class: str
    block: dict[str, str]
    fields: Callable[[Settings, dict[str, Any]], dict[str, Any]]
    biases: dict[str, str]
    biases_optional: bool = False
    permuted: bool = False
    norm_offset: float = 0.0


_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_POST_NORM = {"ffn_norm.weight": "post_attention_layernorm.weight"}
_HEAD_NORMS = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
_QKV_BIASES = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}
_ATTENTION_BIASES = {**_QKV_BIASES, "attn_output.bias": "self_attn.o_proj.bias"}
ROPE_FACTORS = "rope_freqs.weight"  # (head_dim / 2,) divisors of Llama 3's RoPE frequencies
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Settings:
    """A GGUF file's settings under its architecture's prefix, with the problems found on the way."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.architecture = file, architecture
        self.problems: list[str] = []

    def number(self, key: str, default: float | None = None) -> Any:
        """Return one number; a missing key without default, or another kind of value, is a problem."""
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
            value = value.flat[0].item()  # one value per layer, all the same
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value) or value <= 0:
            found = "missing" if value is None else f"{str(value)[:40]}, not one positive number"
            self.problems.append(f"{self.architecture}.{key} is {found}")
            return 1
        # The file holds float32; its shortest spelling (1e-05) is what the original config says.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def count(self, key: str, default: int | None = None) -> int:
        """Return one whole number."""
        value = self.number(key, default)
        if value != int(value):
            self.problems.append(f"{self.architecture}.{key} is {value}, not a whole number")
        return max(1, int(value))

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.metadata

    def text(self, key: str, default: str) -> str:
        return str(self.file.metadata.get(f"{self.architecture}.{key}", default))


def _llama_fields(settings: Settings, shared: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_traditional": False, "mlp_bias": False}
    fields["attention_bias"] = "blk.0.attn_q.bias" in settings.file.tensors
    if settings.has("attention.sliding_window"):
        fields["sliding_window"] = settings.count("attention.sliding_window")
    factors = settings.file.tensors.get(ROPE_FACTORS)
    if factors is not None:
        fields |= _llama3_scaling(settings, factors.dequantise().ravel(), shared)
    return fields


def _llama3_scaling(settings: Settings, factors: np.ndarray, shared: dict[str, Any]) -> dict[str, Any]:
    """Turn the file's frequency divisors back into the config they were computed from."""
    factor = float(factors.max(initial=1.0))
    if (factors == 1).all():
        return {}
    expected = llama3_rope_factors(shared["head_dim"], shared["rope_theta"], factor)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        settings.problems.append(f"{ROPE_FACTORS} is not Llama 3's RoPE scaling by {factor:g}")
        return {}
    return {"rope_scaling": {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}}


def llama3_rope_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """Return what llama.cpp's converter stores as rope_freqs.weight for Llama 3's scaling.

    Returns:
        (head_dim / 2,) float64: 1 for short wavelengths, `factor` for long ones, between them in between.
    """
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    context = LLAMA3_ROPE["original_max_position_embeddings"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _qwen2_fields(settings: Settings, shared: dict[str, Any]) -> dict[str, Any]:
    if shared["head_dim"] * shared["num_attention_heads"] != shared["hidden_size"]:
        settings.problems.append(f"{settings.architecture} heads of {shared['head_dim']} do not make up the width")
    return {"rope_traditional": False}


def _qwen3_fields(settings: Settings, shared: dict[str, Any]) -> dict[str, Any]:
    return {}


def _gemma3_fields(settings: Settings, shared: dict[str, Any]) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": gemma3_attention_scalar(shared),
        "sliding_window": settings.count("attention.sliding_window"),
        "sliding_window_pattern": settings.count("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": settings.number("rope.freq_base_swa", 10000.0),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def gemma3_attention_scalar(config: dict[str, Any]) -> float:
    """Return what attention is scaled by (its square root): llama.cpp derives it from the size class."""
    if config["num_hidden_layers"] == 62:  # only the 27B scales by width per head
        return config["hidden_size"] / config["num_attention_heads"]
    return config["head_dim"]


ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        _BLOCK | _POST_NORM,
        _llama_fields,
        _ATTENTION_BIASES,
        biases_optional=True,
        permuted=True,
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _BLOCK | _POST_NORM, _qwen2_fields, _QKV_BIASES),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _BLOCK | _POST_NORM | _HEAD_NORMS, _qwen3_fields, {}),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _BLOCK
        | _HEAD_NORMS
        | {
            "post_attention_norm.weight": "post_attention_layernorm.weight",
            "ffn_norm.weight": "pre_feedforward_layernorm.weight",
            "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
        },
        _gemma3_fields,
        {},
        norm_offset=1.0,
    ),
}


def gguf_architecture(file: GGUFFile) -> Architecture:
    """Return the table's row for a file.

    Raises:
        InputError: for an architecture without one, or one part of a split file.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        shown = f"{str(name)[:40]!r}"
        raise InputError(f"{file.path}: architecture {shown}, known from GGUF are {known}; use its Hugging Face form")
    if str(file.metadata.get("split.count", 0)) not in ("0", "1"):
        raise InputError(f"{file.path}: one part of a split model; join the parts with llama-gguf-split --merge")
    return ARCHITECTURES[name]


def model_config(file: GGUFFile) -> dict[str, Any]:
    """Return the config.json that mlx-lm builds this file's model from, without quantisation.

    Raises:
        InputError: naming every setting that is missing or that mlx-lm's model cannot express.
    """
    architecture = gguf_architecture(file)
    settings = Settings(file, file.metadata["general.architecture"])
    config = _shared_fields(settings)
    config |= {"model_type": architecture.model_type, "architectures": [architecture.model_class]}
    config |= _rope_scaling(settings)
    config |= architecture.fields(settings, config)
    if FUSED_KEY in file.metadata:
        config["mlx_lora"] = {"fused": file.metadata[FUSED_KEY]}
    if settings.problems:
        raise InputError(f"{file.path}: {'; '.join(settings.problems)}; use the model's Hugging Face form")
    return config


def _shared_fields(settings: Settings) -> dict[str, Any]:
    """Read the fields that all architectures have, under Hugging Face's names."""
    hidden, heads = settings.count("embedding_length"), settings.count("attention.head_count")
    head_dim = settings.count("attention.key_length", hidden // heads)
    if settings.count("attention.value_length", head_dim) != head_dim:
        settings.problems.append(f"{settings.architecture}.attention.value_length differs from key_length")
    if settings.count("rope.dimension_count", head_dim) != head_dim:
        settings.problems.append(f"{settings.architecture}.rope.dimension_count is not the whole head ({head_dim})")
    if settings.has("expert_count"):
        settings.problems.append(f"{settings.architecture}.expert_count: mixtures of experts are not read from GGUF")
    n_layers = settings.count("block_count")
    if n_layers > min(len(settings.file.tensors), MOST_BLOCKS):
        settings.problems.append(f"{settings.architecture}.block_count is {n_layers}, more than the file's tensors")
    embedding = settings.file.tensors.get("token_embd.weight")
    tokens = {key: settings.file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos")}
    return {
        "hidden_size": hidden,
        "num_hidden_layers": n_layers,
        "intermediate_size": settings.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0] if embedding and embedding.shape else 0,
        "max_position_embeddings": settings.count("context_length"),
        "rope_theta": settings.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in settings.file.tensors,
        **{f"{key}_token_id": number for key, number in tokens.items() if isinstance(number, int)},
    }


def _rope_scaling(settings: Settings) -> dict[str, Any]:
    kind = settings.text("rope.scaling.type", "none")
    if kind == "none":
        return {}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": settings.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = settings.count("rope.scaling.original_context_length")
    elif kind != "linear":
        settings.problems.append(f"{settings.architecture}.rope.scaling.type is {kind!r}, known are linear and yarn")
    return {"rope_scaling": scaling}


def weight_map(file: GGUFFile, config: dict[str, Any]) -> dict[str, Weight]:
    """Return where each tensor of the file goes.

    Args:
        file: the GGUF file.
        config: from `model_config`.

    Returns:
        {GGUF name: Weight}, in the file's order; tensors already turned into config are left out.

    Raises:
        InputError: naming all tensors that mlx-lm's model has no place for, and all that it lacks.
    """
    architecture = gguf_architecture(file)
    biased = not architecture.biases_optional or bool(config.get("attention_bias"))
    places = _places(architecture, config, biased)
    if config["tie_word_embeddings"]:
        del places["output.weight"]
    absorbed = {ROPE_FACTORS} if config["model_type"] == "llama" else set()
    unknown = [name for name in file.tensors if name not in places and name not in absorbed]
    missing = [name for name in places if name not in file.tensors]
    problems = [f"tensors missing: {_listed(missing)}"] if missing else []
    problems += [f"tensors unknown to {architecture.model_type}: {_listed(unknown)}"] if unknown else []
    if problems:
        raise InputError(f"{file.path}: {'; '.join(problems)}; download it again or use its Hugging Face form")
    return {name: places[name] for name in file.tensors if name in places}


def gguf_places(config: dict[str, Any]) -> tuple[str, dict[str, tuple[str, int]]]:
    """Return llama.cpp's name of a model's architecture, and where each of our weights stands in its files.

    Args:
        config: config.json, from GGUF or Hugging Face.

    Returns:
        The architecture, and {our parameter: (tensor, heads whose rows are permuted)}.

    Raises:
        InputError: an architecture that is not in the table.
    """
    name, places = gguf_weights(config)
    return name, {weight.name: (tensor, weight.rope_heads) for tensor, weight in places.items()}


def gguf_weights(config: dict[str, Any]) -> tuple[str, dict[str, Weight]]:
    """Return llama.cpp's name of a model's architecture, and every tensor that its files may have.

    Args:
        config: config.json, from GGUF or Hugging Face.

    Returns:
        The architecture, and {GGUF name: Weight} in the order of a file; a model has those it has.

    Raises:
        InputError: an architecture that is not in the table.
    """
    kind = {"mistral": "llama"}.get(config.get("model_type"), config.get("model_type"))
    found = [name for name, row in ARCHITECTURES.items() if row.model_type == kind]
    if not found:
        known = ", ".join(row.model_type for row in ARCHITECTURES.values())
        raise InputError(f"{config.get('model_type')}: not among the models we write as GGUF ({known})")
    key_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return found[0], _places(ARCHITECTURES[found[0]], {**config, "num_key_value_heads": key_heads}, biased=True)


def _places(architecture: Architecture, config: dict[str, Any], biased: bool) -> dict[str, Weight]:
    """Return every tensor of an architecture's files, with or without the biases, and its place."""
    block = architecture.block | (architecture.biases if biased else {})
    places = {name: _weight(architecture, name, target, config) for name, target in _TOP.items()}
    for layer in range(config["num_hidden_layers"]):
        for name, target in block.items():
            place = _weight(architecture, name, f"model.layers.{layer}.{target}", config)
            places[f"blk.{layer}.{name}"] = place
    return places


def _weight(architecture: Architecture, name: str, target: str, config: dict[str, Any]) -> Weight:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    permuted_heads = heads.get(name.split(".")[0], 0) if architecture.permuted else 0
    return Weight(target, permuted_heads, architecture.norm_offset if "norm" in name else 0.0)


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def undo_rope_order(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Put the rows of a q or k weight back from llama.cpp's RoPE order into Hugging Face's.

    Args:
        rows: (heads * head_dim, ...), of any dtype: packed rows move as they are.
        n_heads: heads that the rows belong to.

    Returns:
        The same rows, reordered.
    """
    head_dim = len(rows) // n_heads
    split = rows.reshape(n_heads, head_dim // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def redo_rope_order(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Put the rows of a q or k weight into llama.cpp's RoPE order: the inverse of `undo_rope_order`."""
    head_dim = len(rows) // n_heads
    split = rows.reshape(n_heads, 2, head_dim // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)
