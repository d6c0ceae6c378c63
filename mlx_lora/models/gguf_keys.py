"""Read a GGUF file's settings, and turn them into the config.json fields that all architectures share."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_lora.models.config_check import MOST_BLOCKS
from mlx_lora.sources.gguf_reader import GGUFFile


class Settings:
    """A GGUF file's settings under its architecture's prefix, with the problems found while reading them."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.architecture = file, architecture
        self.problems: list[str] = []

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
        if value != int(value):
            self.problems.append(f"{self.architecture}.{key} is {value}, not a whole number")
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
        if found != value:
            self.problems.append(f"{self.architecture}.{key} is {found}, but the model needs {value}")


def shared_fields(settings: Settings) -> dict[str, Any]:
    """Return the config fields that all architectures have, under Hugging Face's names."""
    hidden, heads = settings.count("embedding_length"), settings.count("attention.head_count")
    head_dim = settings.count("attention.key_length", max(1, hidden // heads))
    if settings.count("attention.value_length", head_dim) != head_dim:
        settings.problems.append(f"{settings.architecture}.attention.value_length differs from key_length")
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


def whole_heads_rotate(settings: Settings, config: dict[str, Any]) -> None:
    """Note a problem if RoPE only rotates a part of each head."""
    if settings.count("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        settings.problems.append(
            f"{settings.architecture}.rope.dimension_count is not the whole head ({config['head_dim']})"
        )


def feed_forward(settings: Settings) -> dict[str, Any]:
    """Return the field for the feed-forward width of blocks without experts."""
    return {"intermediate_size": settings.count("feed_forward_length")}


def same_key_heads(settings: Settings, config: dict[str, Any]) -> None:
    """Note a problem if layers differ in their number of key heads."""
    found = settings.per_layer("attention.head_count_kv", config["num_hidden_layers"])
    if found and len(set(found)) > 1:
        settings.problems.append(
            f"{settings.architecture}.attention.head_count_kv is {str(found)[:40]}, not one number"
        )


def experts(settings: Settings, config: dict[str, Any]) -> tuple[int, int, int]:
    """Return the number of experts, the number used per token, and the width of each.

    The number must match the file's tensors: otherwise a wrong number could make mlx-lm build a huge model.
    """
    n_experts, used = settings.count("expert_count"), settings.count("expert_used_count")
    router = settings.file.tensors.get("blk.0.ffn_gate_inp.weight")
    held = router.shape[0] if router is not None and router.shape else 0
    if n_experts != held or used > n_experts:
        settings.problems.append(
            f"{settings.architecture}.expert_count is {n_experts} with {used} in use, but the file has {held} experts"
        )
        n_experts, used = 1, 1
    return n_experts, used, settings.count("expert_feed_forward_length", config["intermediate_size"])
