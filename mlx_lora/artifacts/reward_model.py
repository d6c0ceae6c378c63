"""How a reward model is stored: how its adapter is recognized, and what transformers needs to load it.

transformers calls it sequence classification with one label, and reads the score at the last token that is not padding. So
the padding token must never end a text: if a tokenizer pads with its end token, we choose another token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from mlx_lora.adapters.score_head import SCORE_WEIGHT
from mlx_lora.artifacts.adapter_config import own_entries
from mlx_lora.models.load import Base
from mlx_lora.models.saving import write_json
from mlx_lora.system.errors import InputError

SEQ_CLS = "SEQ_CLS"  # PEFT's task
# The families with transformers' names and layouts in mlx-lm; it renames or stacks (experts) others while loading.
SAME_LAYOUT = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


def is_reward_model(config: dict[str, Any]) -> bool:
    """Tell whether an adapter_config.json, ours or PEFT's, is that of a reward model."""
    return config.get("task_type") == SEQ_CLS or SCORE_WEIGHT in (own_entries(config).get("full") or [])


def check_use(config: dict[str, Any], origin: Path, scores: bool | None) -> None:
    """Refuse a reward model if the caller needs text, and any other adapter if the caller needs scores.

    Args:
        config: of the adapter.
        origin: its file or folder, for the message.
        scores: whether the caller needs scores; None: either.

    Raises:
        InputError: the adapter gives the other one.
    """
    found = is_reward_model(config)
    if found and scores is False:
        raise InputError(
            f"{origin}: this adapter is a reward model, which gives scores, not text; use evaluate --objective reward, or "
            "export --to peft or hf"
        )
    if scores and not found:
        raise InputError(f"{origin}: has no score head; give an adapter that was trained with --objective reward")


def classifier_of(kind: str) -> str:
    """Return transformers' class of a reward model.

    Args:
        kind: the config's model_type.

    Raises:
        InputError: transformers has no such class.
    """
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(kind)
    if not isinstance(name, str):
        raise InputError(f"a reward model of {kind}: transformers has no such class; use it with mlx-lora evaluate")
    return name


def padding_token(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]) -> str | None:
    """Return the token to pad with, which must not end a text; None if there is no such token."""
    ends = config.get("eos_token_id")
    ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    candidates = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *special]
    return next((t for t in candidates if t and tokenizer.convert_tokens_to_ids(t) not in ends), None)


def check_fusing(base: Base, dequantize: bool) -> None:
    """Refuse a base whose fused reward model transformers could not read.

    Raises:
        InputError: with the reason.
    """
    kind = str(base.config.get("model_type"))
    classifier_of(kind)
    if kind not in SAME_LAYOUT:
        raise InputError(
            f"a fused reward model of {kind}: it has another layout in MLX than in transformers; we can write "
            f"{', '.join(SAME_LAYOUT)}; use export --to peft"
        )
    if base.quantization and not dequantize:
        raise InputError("a fused reward model is for transformers, which needs float weights; give --dequantize")


def classifier_config(base: Base) -> dict[str, Any]:
    """Return the entries of config.json that make a model a reward model for transformers."""
    token = padding_token(base.hf_tokenizer, base.config)
    return {
        "architectures": [classifier_of(base.config["model_type"])],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": None if token is None else base.hf_tokenizer.convert_tokens_to_ids(token),
    }


def set_padding_token(folder: Path, token: str | None) -> None:
    """Make the tokenizer in a model folder pad with the token that its config names."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if token is not None and file.is_file():
            write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "pad_token": token})
