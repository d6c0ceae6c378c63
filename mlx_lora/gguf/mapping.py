"""The parts that a row of the table of architectures is made of: settings, tensors and RoPE scaling, in both directions.

llama.cpp's converter reorders rows and columns, adds an offset to norms, joins tensors and drops axes of length one. A
`TensorMapping` records which of these were applied to a tensor. Reordering moves whole rows, or whole groups of columns,
so packed weights keep their bits.

RoPE scaling for long contexts is stored in several ways:

    linear, YaRN   settings under rope.scaling
    Llama 3        rope_freqs.weight, (head_dim / 2,) divisors of the frequencies
    LongRoPE       rope_factors_short.weight and rope_factors_long.weight, the same for short and long contexts
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlx_lora.gguf.reader import GGUFFile
from mlx_lora.models.config import MOST_BLOCKS
from mlx_lora.utils.errors import Problems

# Settings


class Settings:
    """A GGUF file's settings under its architecture's prefix, with the problems found while reading them."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.architecture = file, architecture
        self.problems = Problems()

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> Any:
        """Return one number; note a problem if it is missing without a default, or is not a positive number.

        Args:
            key: without the architecture's prefix.
            default: returned if the file has no such key.
            zero: whether 0 is allowed.
        """
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
            value = value.flat[0].item()  # one value per layer, all the same
        wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value)
        if wrong or value < 0 or (value == 0 and not zero):
            found = "missing" if value is None else f"{str(value)[:40]}, not one positive number"
            self.problems.append(f"{self.architecture}.{key} is {found}")
            return 1
        # The file holds float32; its shortest decimal (1e-05) is what the original config says.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def count(self, key: str, default: int | None = None, *, zero: bool = False) -> int:
        """Return one whole number; problems are noted as in `number`."""
        value = self.number(key, default, zero=zero)
        self.problems.note_if(value != int(value), f"{self.architecture}.{key} is {value}, not a whole number")
        return max(0 if zero else 1, int(value))

    def per_layer(self, key: str, n_layers: int) -> list[Any] | None:
        """Return one whole number or bool per layer, or None if the file has no such list."""
        value = self.file.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "iub":
            return None
        if len(value) < n_layers:
            self.problems.append(f"{self.architecture}.{key} has {len(value)} values for {n_layers} layers")
            return [value.flat[0].item() if value.size else 0] * n_layers
        return value[:n_layers].tolist()

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.metadata

    def text(self, key: str, default: str) -> str:
        return str(self.file.metadata.get(f"{self.architecture}.{key}", default))

    def values(self, tensor: str) -> np.ndarray | None:
        """Return a tensor that holds a setting as flat float32, or None if the file has no such tensor."""
        found = self.file.tensors.get(tensor)
        return None if found is None else found.dequantize().ravel()

    def same(self, key: str, value: int, default: int | None = None) -> None:
        """Note a problem if a key has another value than `value`."""
        found = self.count(key, value if default is None else default)
        self.problems.note_if(found != value, f"{self.architecture}.{key} is {found}, but the model needs {value}")


def shared_fields(settings: Settings) -> dict[str, Any]:
    """Return the config fields that all architectures have, under Hugging Face's names."""
    hidden, heads = settings.count("embedding_length"), settings.count("attention.head_count")
    head_dim = settings.count("attention.key_length", max(1, hidden // heads))
    settings.problems.note_if(
        settings.count("attention.value_length", head_dim) != head_dim,
        f"{settings.architecture}.attention.value_length differs from key_length",
    )
    # Extra layers that predict several tokens at once are not part of mlx-lm's models.
    n_layers = settings.count("block_count") - settings.count("nextn_predict_layers", 0, zero=True)
    if not 0 < n_layers <= min(len(settings.file.tensors), MOST_BLOCKS):
        settings.problems.append(f"{settings.architecture}.block_count is {n_layers}, more than the file's tensors")
        n_layers = 1
    embedding = settings.file.tensors.get("token_embd.weight")
    tokens = {key: settings.file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos")}
    key_heads = settings.per_layer("attention.head_count_kv", n_layers)
    return {
        "hidden_size": hidden,
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads,
        # A layer without attention has 0; the family's `fields` notes a problem if attention layers differ.
        "num_key_value_heads": max(max(key_heads), 1)
        if key_heads
        else settings.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0] if embedding and embedding.shape else 0,
        "max_position_embeddings": settings.count("context_length"),
        "rope_theta": settings.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in settings.file.tensors,
        **{f"{key}_token_id": number for key, number in tokens.items() if isinstance(number, int)},
    }


def same_key_heads(settings: Settings, config: dict[str, Any]) -> None:
    """Note a problem if layers differ in their number of key heads."""
    found = settings.per_layer("attention.head_count_kv", config["num_hidden_layers"])
    settings.problems.note_if(
        found and len(set(found)) > 1,
        f"{settings.architecture}.attention.head_count_kv is {str(found)[:40]}, not one number",
    )


def whole_heads_rotate(settings: Settings, config: dict[str, Any]) -> None:
    """Note a problem if RoPE only rotates a part of each head."""
    size = config["head_dim"]
    settings.problems.note_if(
        settings.count("rope.dimension_count", size) != size,
        f"{settings.architecture}.rope.dimension_count is not the whole head ({size})",
    )


def experts(settings: Settings) -> tuple[int, int]:
    """Return the number of experts, and the number used per token.

    The number must match the file's tensors: otherwise a wrong number could make mlx-lm build a huge model.
    """
    n_experts, used = settings.count("expert_count"), settings.count("expert_used_count")
    router = settings.file.tensors.get("blk.0.ffn_gate_inp.weight")
    held = router.shape[0] if router is not None and router.shape else 0
    if n_experts == held and used <= n_experts:
        return n_experts, used
    settings.problems.append(
        f"{settings.architecture}.expert_count is {n_experts} with {used} in use, but the file has {held} experts"
    )
    return 1, 1


# Tensors


@dataclass(frozen=True)
class Order:
    """A reordering of an axis: its entries are split into (outer, first, second, inner) and the middle two are swapped.

    One of the four sizes may be -1, which numpy infers from the axis' length.

    Attributes:
        outer, first, second, inner: the split in mlx-lm's weight; the file has (outer, second, first, inner).
        start: the first entry that moves.
    """

    outer: int
    first: int
    second: int
    inner: int
    start: int = 0

    def to_file(self, length: int) -> np.ndarray:
        """Return the index into mlx-lm's axis for each entry of the file's axis, (length,) int64."""
        split = np.arange(self.start, length).reshape(self.outer, self.first, self.second, self.inner)
        return np.concatenate([np.arange(self.start), split.swapaxes(1, 2).ravel()])

    def from_file(self, length: int) -> np.ndarray:
        """Return the index into the file's axis for each entry of mlx-lm's axis, (length,) int64."""
        return np.argsort(self.to_file(length))

    def in_groups(self, size: int) -> Order | None:
        """Return the same reordering in groups of `size` entries, or None if it would split a group."""
        if self.inner < 0 or self.inner % size or self.start % size:
            return None
        return Order(self.outer, self.first, self.second, self.inner // size, self.start // size)


def rope_order(n_heads: int) -> Order:
    """Return llama.cpp's order of q and k rows: within each head, (half, pair) becomes (pair, half)."""
    return Order(n_heads, 2, -1, 1)


@dataclass(frozen=True)
class TensorMapping:
    """The mlx-lm parameters that one GGUF tensor holds, and how it stores them.

    Attributes:
        name: mlx-lm's parameter, such as `model.layers.0.self_attn.q_proj.weight`.
        then: further parameters of the same shape, whose rows follow those of `name` in the file.
        rows, columns: how the file reorders them; None: not at all.
        offset: what the file adds to the values (1 for Gemma's norms).
        axis: an axis of length one that mlx-lm's parameter has and the file's tensor lacks.
        values: `plain`, or `minus_exp` if the file holds -exp(value).
        exact: whether it always stays float: routers, convolutions, biases of experts.
        scaled: whether another tensor multiplies this layer's output.
    """

    name: str
    then: tuple[str, ...] = ()
    rows: Order | None = None
    columns: Order | None = None
    offset: float = 0.0
    axis: int | None = None
    values: Literal["plain", "minus_exp"] = "plain"
    exact: bool = False
    scaled: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all its parameters."""
        return (self.name, *self.then)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that these weights belong to."""
        return tuple(name.removesuffix(".weight") for name in self.names)

    @property
    def moves(self) -> bool:
        """Whether the file's values, or their order, differ from mlx-lm's."""
        return bool(self.rows or self.columns or self.offset or self.values != "plain")

    def file_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that the file's tensor has for a parameter of shape `ours`."""
        if self.axis is None:
            return ours
        return tuple(size for axis, size in enumerate(ours) if axis != self.axis % len(ours))

    def to_file(self, values: np.ndarray) -> np.ndarray:
        """Return a parameter's values as the file holds them.

        Args:
            values: float32, in the parameter's shape.

        Returns:
            float32, in the file's shape.
        """
        values = values if self.axis is None else np.squeeze(values, self.axis)
        values = -np.exp(values) if self.values == "minus_exp" else values
        values = values if self.rows is None else values[self.rows.to_file(len(values))]
        values = values if self.columns is None else values[..., self.columns.to_file(values.shape[-1])]
        return values + np.float32(self.offset) if self.offset else values

    def from_file(self, values: np.ndarray) -> np.ndarray:
        """Return a tensor's values as mlx-lm's parameter holds them: the inverse of `to_file`."""
        values = values - np.float32(self.offset) if self.offset else values
        values = values if self.columns is None else values[..., self.columns.from_file(values.shape[-1])]
        values = values if self.rows is None else values[self.rows.from_file(len(values))]
        values = np.log(-values) if self.values == "minus_exp" else values
        return values if self.axis is None else np.expand_dims(values, self.axis)


Block = dict[str, TensorMapping]
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
MLP = {
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
POST_NORM = {"ffn_norm.weight": "post_attention_layernorm.weight"}
HEAD_NORMS = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
QKV_BIASES = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}
ATTENTION_BIASES = {**QKV_BIASES, "attn_output.bias": "self_attn.o_proj.bias"}


def plain(names: dict[str, str], **how: Any) -> Block:
    """Return a mapping for each {GGUF name: mlx-lm's name}, all with the same further attributes `how`."""
    return {tensor: TensorMapping(name, **how) for tensor, name in names.items()}


# A row of the table of architectures

Written = tuple[dict[str, Any], dict[str, np.ndarray]]


@dataclass(frozen=True)
class GgufFamily:
    """One architecture: a row of the table in gguf/arch.py.

    Attributes:
        model_type: mlx-lm's.
        model_class: transformers' class, which tells llama.cpp's converter and others what the folder holds.
        block: (config, layer) -> {GGUF name without `blk.N.`: mapping to parameters within the block}.
        fields: (settings, config so far) -> config fields that add to the shared ones.
        settings: (model's arguments, problems) -> GGUF settings that add to or replace the shared ones, and tensors
            that hold settings.
        top: config -> {GGUF name: mlx-lm's parameter} outside of blocks.
        prefix: of all of mlx-lm's names.
        norm_offset: what the file adds to norm weights.
        absorbed: tensors that `fields` turns into config fields.
        spare: (config, tensor) -> whether a file may have a tensor that mlx-lm's model does not use.
        also: further model types with the same files.
    """

    model_type: str
    model_class: str
    block: Callable[[dict[str, Any], int], Block]
    fields: Callable[[Settings, dict[str, Any]], dict[str, Any]]
    settings: Callable[[dict[str, Any], Problems], Written]
    top: Callable[[dict[str, Any]], dict[str, str]] = lambda config: TOP
    prefix: str = ""
    norm_offset: float = 0.0
    absorbed: tuple[str, ...] = ()
    spare: Callable[[dict[str, Any], str], bool] = lambda config, tensor: False
    also: tuple[str, ...] = ()


# RoPE scaling

ROPE_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# llama.cpp fixes these fields of YaRN to these values, and GGUF files have no keys for them. GPT-OSS' `truncate` is not
# here because neither mlx-lm nor llama.cpp reads it.
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0, "attention_factor": None}
Values = dict[str, Any]


def read_scaling(settings: Settings) -> dict[str, Any]:
    """Return the config's field for linear or YaRN scaling, {} if the file has none."""
    kind = settings.text("rope.scaling.type", "none")
    if kind == "none":
        return {}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": settings.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = settings.count("rope.scaling.original_context_length")
    elif kind != "linear":
        settings.problems.append(f"{settings.architecture}.rope.scaling.type is {kind!r}, not linear or yarn")
    return {"rope_scaling": scaling}


def refuse_scaling(settings: Settings, model_type: str) -> None:
    """Note a problem if the file scales RoPE, for a model type that does not support it in mlx-lm."""
    kind = settings.text("rope.scaling.type", "none")
    settings.problems.note_if(
        kind != "none",
        f"{settings.architecture}.rope.scaling.type is {kind!r}, but mlx-lm's {model_type} has no scaling",
    )


def kind_of(args: Values) -> str:
    """Return the kind of scaling in a model's arguments, `default` if there is none."""
    scaling = args.get("rope_scaling") or {}
    return scaling.get("type") or scaling.get("rope_type") or "default"


def write_scaling(args: Values, problems: Problems) -> Values:
    """Return linear or YaRN scaling as GGUF settings; note a problem for another kind."""
    kind, scaling = kind_of(args), args.get("rope_scaling") or {}
    if kind == "default":
        return {}
    if kind not in ("linear", "yarn"):
        problems.append(f"rope_scaling {kind}")
        return {}
    settings = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        # mlx-lm's default if the config has none.
        settings["rope.scaling.original_context_length"] = scaling.get("original_max_position_embeddings", 4096)
        problems += [
            f"rope_scaling.{key} {scaling[key]}"
            for key, value in YARN_DEFAULTS.items()
            if scaling.get(key, value) != value
        ]
    return settings


def read_llama3_scaling(settings: Settings, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config's field for Llama 3's scaling, derived from the file's frequency divisors."""
    factors = settings.values(ROPE_FACTORS)
    if factors is None or (factors == 1).all():
        return {}
    factor = float(factors.max())
    expected = llama3_rope_factors(config["head_dim"], config["rope_theta"], factor)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        settings.problems.append(f"{ROPE_FACTORS} is not Llama 3's RoPE scaling by {factor:g}")
        return {}
    return {"rope_scaling": {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}}


def llama3_factors(args: Values, problems: Problems) -> dict[str, np.ndarray]:
    """Return Llama 3's scaling as {tensor name: frequency divisors}."""
    scaling = args["rope_scaling"]
    problems += [
        f"rope_scaling.{key} {scaling[key]}, not {value:g}"
        for key, value in LLAMA3_ROPE.items()
        if scaling.get(key, value) != value
    ]
    factors = llama3_rope_factors(args["head_dim"], args["rope_theta"], scaling["factor"])
    return {ROPE_FACTORS: factors.astype(np.float32)}


def llama3_rope_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """Return the divisors that llama.cpp's converter stores as rope_freqs.weight for Llama 3's scaling.

    Returns:
        (head_dim / 2,) float64: 1 for short wavelengths, `factor` for long ones, and a smooth transition between.
    """
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    context = LLAMA3_ROPE["original_max_position_embeddings"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def read_longrope(settings: Settings, config: dict[str, Any]) -> dict[str, Any]:
    """Return Phi-3's config fields for LongRoPE: the original context, and the factors if the file has any."""
    short, long = settings.values(SHORT_FACTORS), settings.values(LONG_FACTORS)
    whole = config["max_position_embeddings"]
    original = settings.count("rope.scaling.original_context_length", whole)
    fields: dict[str, Any] = {"original_max_position_embeddings": original}
    if short is None and long is None:
        return fields
    pairs = settings.count("rope.dimension_count", config["head_dim"]) // 2
    if original < 2:
        settings.problems.append(f"{settings.architecture}.rope.scaling.original_context_length is {original}")
        return fields
    if short is None or long is None or not len(short) == len(long) == pairs:
        settings.problems.append(f"{SHORT_FACTORS} and {LONG_FACTORS} are not {pairs} numbers each")
        return fields
    wanted = longrope_attention_factor(whole, original)
    found = settings.number("rope.scaling.attn_factor", 1.0)
    settings.problems.note_if(
        not math.isclose(found, wanted, rel_tol=1e-4),
        f"{settings.architecture}.rope.scaling.attn_factor is {found}, not {wanted:.6g}",
    )
    # float32's shortest decimal is the number that the config had.
    lists = {
        name: [float(str(value)) for value in values]
        for name, values in (("short_factor", short), ("long_factor", long))
    }
    return fields | {"rope_scaling": {"type": "longrope", **lists}}


def write_longrope(args: Values, problems: Problems) -> tuple[Values, dict[str, np.ndarray]]:
    """Return LongRoPE as GGUF settings and the two tensors of factors (none without scaling)."""
    original, whole = args["original_max_position_embeddings"], args["max_position_embeddings"]
    settings: Values = {"rope.scaling.original_context_length": original}
    kind, scaling = kind_of(args), args.get("rope_scaling") or {}
    if kind == "default":
        return settings, {}
    if kind not in ("longrope", "su"):
        problems.append(f"rope_scaling {kind}")
        return settings, {}
    settings["rope.scaling.attn_factor"] = longrope_attention_factor(whole, original)
    factors = {SHORT_FACTORS: scaling["short_factor"], LONG_FACTORS: scaling["long_factor"]}
    return settings, {name: np.array(values, np.float32) for name, values in factors.items()}


def longrope_attention_factor(whole: int, original: int) -> float:
    """Return the factor for queries and keys in a model extended from `original` to `whole` positions.

    Source: LongRoPE, arXiv 2402.13753; the factor is that of Phi-3's published code.
    """
    ratio = whole / original
    return math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
