"""Check the contents of an adapter_config.json (ours, mlx-lm's or PEFT's) before they are used, and describe score heads.

Also what lies beside it: a chat template, and files of an earlier adapter that would make a new one another.

A reward model and a classifier have a score head. transformers calls both sequence classification, a reward model with one label,
and reads the scores at the last token that is not padding. So the padding token must never end a text: if a tokenizer pads with its end token, we choose another token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlx_lora.compat.foreign import CLASSIFIERS
from mlx_lora.config.objectives import LABELED
from mlx_lora.config.presets import PRESETS
from mlx_lora.models.config import ENCODERS
from mlx_lora.models.folder import write_json
from mlx_lora.models.head import SCORE_WEIGHT
from mlx_lora.models.load import Base
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import read_json

# What an adapter_config.json may say

Check = tuple[Callable[[Any], bool], str]
"""(test, description of a valid value)"""
MAX_RANK = 65536  # --rank's own bound
MAX_KEYS = 10_000


def own_entries(config: dict[str, Any]) -> dict[str, Any]:
    """Return our part of the file; another program's has none."""
    own = config.get("mlx_lora")
    return own if isinstance(own, dict) else {}


def shape_problems(shape: dict[str, Any]) -> list[str]:
    """Return what is wrong in `lora_parameters`."""
    wrong = [name for name in ("rank", "scale") if not is_number(shape.get(name)) or shape[name] <= 0]
    if wrong:
        return [f"lora_parameters without a positive {' and '.join(wrong)}"]
    problems = [] if is_rank(shape["rank"]) else [f"lora_parameters.rank {shape['rank']:g} is not a rank"]
    checks = {"dropout": (is_share, "a fraction below 1"), "keys": (is_names, "a list of names")}
    return problems + problems_of(shape, checks, "lora_parameters.")


def own_problems(config: dict[str, Any]) -> list[str]:
    """Return what is wrong in our part of the file, which another program's file does not have."""
    own = config.get("mlx_lora")
    if own is None:
        return []
    if not isinstance(own, dict):
        return ["mlx_lora is not an object"]
    texts = ("base_model", "base_revision", "base_fingerprint", "chat_template", "rounded_to")
    checks: dict[str, Check] = dict.fromkeys(texts, (is_text, "a string"))
    checks |= {
        "method": (lambda value: isinstance(value, str) and value in PRESETS, "a method of this version"),
        "alpha": (is_number, "a number"),
        "full": (is_names, "a list of names"),
        "overlap": (_is_overlap, "in this version's format"),
        "head": (_is_head, "in this version's format"),
    }
    return problems_of(own, checks, "mlx_lora.")


def _is_head(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    labels, thresholds, weights = (value.get(name) or [] for name in ("labels", "thresholds", "weights"))
    return (
        all(is_text(value.get(name)) for name in ("objective", "problem_type"))
        and is_names(labels)
        and all(
            isinstance(numbers, list) and all(is_number(one) for one in numbers) and len(numbers) in (0, len(labels))
            for numbers in (thresholds, weights)
        )
    )


def peft_problems(config: dict[str, Any]) -> list[str]:
    """Return what is wrong in the part of PEFT's file that we read."""
    checks: dict[str, Check] = {
        "r": (is_rank, "a rank"),
        "init_r": (is_rank, "a rank"),
        "lora_alpha": (lambda value: is_number(value) and value > 0, "a positive number"),
        "lora_dropout": (is_share, "a fraction below 1"),
        "modules_to_save": (is_names, "a list of names"),
        "base_model_name_or_path": (is_text, "a string"),
        "bias": (is_text, "a string"),
        "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
        "use_dora": (lambda value: isinstance(value, bool), "true or false"),
        "alpha_pattern": (_is_numbers, "an object with numbers"),
    }
    return problems_of(config, checks, "")


def _is_overlap(value: Any) -> bool:
    names = {"inner", "size", "noise"}
    return isinstance(value, dict) and (
        not value or (value.keys() == names and all(is_number(value[name]) for name in names) and value["size"] > 0)
    )


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_KEYS and all(is_number(n) and n > 0 for n in value.values())


def problems_of(table: dict[str, Any], checks: dict[str, Check], prefix: str) -> list[str]:
    """Return a line for each entry that exists and is not valid.

    Args:
        table: read from a file.
        checks: name -> (test, description of a valid value).
        prefix: of the names, for the message.
    """
    return [
        f"{prefix}{name} {_shown(table[name])} is not {words}"
        for name, (test, words) in checks.items()
        if table.get(name) is not None and not test(table[name])
    ]


def _shown(value: Any) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)[:40] if not isinstance(value, float) or math.isfinite(value) else str(value)
    return f"(a {type(value).__name__})"


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number; JSON's true is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def is_share(value: Any) -> bool:
    """Tell whether a value is a probability below 1."""
    return is_number(value) and 0 <= value < 1


def is_rank(value: Any) -> bool:
    """Tell whether a value is a rank."""
    return type(value) is int and 1 <= value <= MAX_RANK


def is_text(value: Any) -> bool:
    """Tell whether a value is a string."""
    return isinstance(value, str)


def is_names(value: Any) -> bool:
    """Tell whether a value is a list of names."""
    return isinstance(value, list) and len(value) <= MAX_KEYS and all(isinstance(name, str) for name in value)


# What lies beside it

TEMPLATE_FILE = "chat_template.jinja"  # beside PEFT's config, as TRL writes it
LABELS_FILE = "labels.json"  # beside PEFT's config: transformers' names of labels, and ours
# Files, ours or another program's, that decide what an adapter is, or how it is used.
DECIDING = (
    "adapters.safetensors", "adapter_model.safetensors", "adapter_model.bin", LABELS_FILE, "run.yaml", "merge.json",
    TEMPLATE_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json",
)  # fmt: skip
# Files of a model, or of a folder of sentence-transformers with one.
OF_MODEL = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "modules.json")
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*", "*.gguf")


def check_replaceable(folder: Path) -> None:
    """Refuse to write an adapter where something else is that a new one would break: a model, or a run with its checkpoints.

    Raises:
        InputError: it is one.
    """
    if (folder / "checkpoints").is_dir():
        raise InputError(f"--out {folder}: holds a run with its checkpoints; give another folder")
    model = not (folder / "adapter_config.json").exists() and any((folder / name).exists() for name in OF_MODEL)
    if model or any(file for pattern in MODEL_WEIGHTS for file in folder.glob(pattern)):
        raise InputError(f"--out {folder}: holds a model; give another folder for the adapter")


def remove_earlier(folder: Path, *kept: str) -> None:
    """Remove what an earlier adapter left in a folder, so that it changes nothing about a new one; other files stay.

    Args:
        folder: with the new adapter's config; `check_replaceable` found no model there.
        kept: files of the new adapter.
    """
    for name in DECIDING:
        if name not in kept:
            (folder / name).unlink(missing_ok=True)


def template_beside(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> str | None:
    """Return the chat template in a PEFT adapter's folder; None if there is none, or it is the model's own.

    Args:
        folder: of the adapter.
        tokenizer: of the model; None: its own templates are not known.

    Raises:
        InputError: the file is not text.
    """
    file = folder / TEMPLATE_FILE
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); export the adapter again, or remove the file") from None
    own: Any = None if tokenizer is None else tokenizer.chat_template
    return None if text in (own.values() if isinstance(own, dict) else (own,)) else text


# Score heads: reward models and classifiers

SEQ_CLS = "SEQ_CLS"  # PEFT's task
# The families with transformers' names and layouts in mlx-lm; it renames or stacks (experts) others while loading.
SAME_LAYOUT = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


def is_reward_model(config: dict[str, Any]) -> bool:
    """Tell whether an adapter_config.json, ours or PEFT's, is that of a reward model or a classifier."""
    return config.get("task_type") == SEQ_CLS or SCORE_WEIGHT in (own_entries(config).get("full") or [])


def check_use(config: dict[str, Any], origin: Path, scores: bool | None) -> None:
    """Refuse a score head if the caller needs text, and any other adapter if the caller needs scores.

    Args:
        config: of the adapter.
        origin: its file or folder, for the message.
        scores: whether the caller needs scores; None: either.

    Raises:
        InputError: the adapter gives the other one.
    """
    found = is_reward_model(config)
    if found and scores is False:
        if head := head_of(config, origin):
            raise InputError(
                f"{origin}: this adapter is for --objective {head['objective']}, and gives scores, not text; use evaluate, "
                f"{'predict, ' if head['objective'] in LABELED else ''}serve, or export --to peft or hf"
            )
        raise InputError(
            f"{origin}: this adapter is a reward model, which gives scores, not text; use evaluate --objective reward, or "
            "export --to peft or hf"
        )
    if scores and not found:
        raise InputError(
            f"{origin}: has no score head; give an adapter that was trained with --objective reward, classify or rerank"
        )


def classifier_of(kind: str) -> str:
    """Return transformers' class of a reward model.

    Args:
        kind: the config's model_type.

    Raises:
        InputError: transformers has no such class.
    """
    name = CLASSIFIERS.of().get(kind)
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
    if kind not in (*SAME_LAYOUT, *ENCODERS):
        raise InputError(
            f"a fused reward model of {kind}: it has another layout in MLX than in transformers; we can write "
            f"{', '.join(SAME_LAYOUT)}; use export --to peft"
        )
    if base.quantization and not dequantize:
        raise InputError("a fused reward model is for transformers, which needs float weights; give --dequantize")


def head_of(config: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Return what the outputs of an adapter's score head mean, as `Objective.head` has it; None if that is not known.

    Args:
        config: adapter_config.json, ours or PEFT's.
        folder: of the adapter; beside PEFT's config, LABELS_FILE has it, because PEFT's own config has no place for it.

    Raises:
        InputError: LABELS_FILE is not as we write it.
    """
    own = own_entries(config).get("head")
    file = folder / LABELS_FILE
    if own is not None or not file.is_file():
        return own
    found = read_json(file, "export the adapter again").get("mlx_lora")
    if not _is_head(found):
        raise InputError(f"{file}: is not in this version's format; export the adapter again, or remove the file")
    return found


def label_names(head: dict[str, Any] | None) -> dict[str, Any]:
    """Return transformers' `problem_type`, `id2label` and `label2id`; nothing for a reward model."""
    if head is None:
        return {}
    labels = head.get("labels") or ["LABEL_0"]
    names = {
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {n: i for i, n in enumerate(labels)},
    }
    return {"problem_type": head["problem_type"], **names}


def classifier_config(base: Base, head: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the entries of config.json that make a model a reward model or a classifier for transformers."""
    token = padding_token(base.hf_tokenizer, base.config)
    return {
        "architectures": [classifier_of(base.config["model_type"])],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        **label_names(head),
        "pad_token_id": None if token is None else base.hf_tokenizer.convert_tokens_to_ids(token),
    }


def set_padding_token(folder: Path, token: str | None) -> None:
    """Make the tokenizer in a model folder pad with the token that its config names."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if token is not None and file.is_file():
            write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "pad_token": token})
