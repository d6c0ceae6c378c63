"""Reads a model folder: its files checked first, then mlx-lm's model and tokenizer built from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer

from mlx_lora.cache import cache_dir
from mlx_lora.errors import InputError
from mlx_lora.files import replacing_folder
from mlx_lora.sources.safetensors import read_safetensors_header
from mlx_lora.sources.spm_tokenizer import write_tokenizer_from_spm


def load_weights(folder: Path, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Check the folder's files, then let mlx-lm build the model lazily."""
    config_file = folder / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{config_file}: cannot be read ({error.strerror}); give a folder with config.json and *.safetensors"
        ) from None
    except ValueError:
        raise InputError(f"{config_file}: not JSON; download the model again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{config_file}: names no model_type; give a language model's folder")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InputError(
            f"{folder}: no model*.safetensors in it; give a folder of safetensors weights, or convert it first"
        )
    for file in files:
        read_safetensors_header(file)
    try:
        return load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        # mlx-lm's words for an unknown model type, a config without a needed field, or foreign tensors.
        raise InputError(
            f"{folder}: mlx-lm cannot build this {config['model_type']} model ({_short(error)})"
        ) from error


def _short(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."


def load_folder_tokenizer(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> TokenizerWrapper:
    extra = {"trust_remote_code": True} if trust_remote_code else None
    try:
        return load_tokenizer(_tokenizer_folder(folder), extra, eos_token_ids=config.get("eos_token_id"))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{folder}: its tokenizer cannot be loaded ({_short(error)}); it needs tokenizer.json or tokenizer.model"
        ) from error


def _tokenizer_folder(folder: Path) -> Path:
    """Return `folder`, or a cached rebuild of its SentencePiece tokenizer: transformers' own is not id-exact."""
    model_file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").exists() or not model_file.exists():
        return folder
    stat = model_file.stat()
    key = f"{model_file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    rebuilt = cache_dir("converted") / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not rebuilt.exists():
        with replacing_folder(rebuilt) as temporary:
            write_tokenizer_from_spm(model_file, folder, temporary)
    return rebuilt
