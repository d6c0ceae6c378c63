"""Loads a base model: the only door to mlx-lm's architectures."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer
from transformers import PreTrainedTokenizerBase

from mlx_lora import device
from mlx_lora.cache import cache_dir
from mlx_lora.config import ModelSettings
from mlx_lora.errors import InputError
from mlx_lora.files import replacing_folder
from mlx_lora.models.fingerprint import base_fingerprint
from mlx_lora.models.matmul import use_measured_matmul
from mlx_lora.sources.hub import ModelSource, resolve_model
from mlx_lora.sources.safetensors import read_safetensors_header
from mlx_lora.sources.spm_tokenizer import write_tokenizer_from_spm


@dataclass(frozen=True)
class Base:
    """A loaded, frozen base model.

    Attributes:
        model: the mlx-lm model, in eval mode, every parameter frozen.
        tokenizer: mlx-lm's wrapper, for generation.
        config: config.json as mlx-lm read it.
        folder: where its files lie (a GGUF's converted form).
        model_id: what the user named: hub id, folder or file.
        revision: the hub commit, if it came from the hub.
        fingerprint: see fingerprint.py.
        dense_from_rows: for each kind of quantised weight, the rows from which its dense product is used.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    folder: Path
    model_id: str
    revision: str | None
    fingerprint: str
    dense_from_rows: dict[str, int]

    @property
    def hf_tokenizer(self) -> PreTrainedTokenizerBase:
        """The transformers tokenizer inside mlx-lm's wrapper."""
        return self.tokenizer._tokenizer

    @property
    def quantisation(self) -> dict[str, Any] | None:
        """The config's quantization entry, None for a float model."""
        return self.config.get("quantization")

    def describe(self) -> str:
        """One line for the run header: type, parameters, stored size, quantisation, dtype."""
        parameters = [p for _, p in tree_flatten(self.model.parameters())]
        size_mb = sum(p.nbytes for p in parameters) / 1e6
        floats = {str(p.dtype).removeprefix("mlx.core.") for p in parameters if mx.issubdtype(p.dtype, mx.floating)}
        q = self.quantisation
        form = f"{q['bits']}-bit {q.get('mode', 'affine')} (group {q['group_size']})" if q else "not quantised"
        return f"{self.config.get('model_type')}, {len(self.model.layers)} blocks, {size_mb:.0f} MB in memory, {form}, {'/'.join(sorted(floats))}"


def load_base(settings: ModelSettings) -> Base:
    """Load the model that `settings.model` names, cast to the compute dtype and frozen.

    A .gguf file is converted into the cache first (blocks kept as they are), once per file.

    Raises:
        InputError: unknown model, architecture or dtype, or damaged files.
    """
    if not settings.model:
        raise InputError("--model: missing; give a hub id, a folder or a .gguf file")
    source = resolve_model(settings.model, settings.revision, trust_remote_code=settings.trust_remote_code)
    folder = _converted_gguf(source) if source.kind == "gguf" else source.path
    model, config = load_weights(folder, settings.trust_remote_code)
    # Before the cast: float32 norms rounded to float16 and then to bfloat16 are not those rounded once.
    fingerprint = base_fingerprint(model, config)
    _cast_floats(model, device.compute_dtype(settings.dtype))
    dense_from_rows = use_measured_matmul(model)
    model.freeze()
    mx.eval(model.parameters())
    tokenizer = load_folder_tokenizer(folder, config, settings.trust_remote_code)
    return Base(model, tokenizer, config, folder, source.model_id, source.revision, fingerprint, dense_from_rows)


def _converted_gguf(source: ModelSource) -> Path:
    from mlx_lora.models.converting import cached_gguf_folder

    return cached_gguf_folder(source)


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


def _cast_floats(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast the model's float parameters to the compute dtype, once.

    Scales and biases of quantised weights count: published 4-bit files often hold float16 ones, which
    would otherwise decide the activations' dtype. What a 16-bit model keeps in float32 on purpose stays,
    as does what mlx-lm's own `cast_predicate` protects. Integer scales (mxfp4 and kin) are not floats.
    """
    floats = [(name, p) for name, p in tree_flatten(model.parameters()) if mx.issubdtype(p.dtype, mx.floating)]
    half_bytes = sum(p.nbytes for _, p in floats if p.dtype != mx.float32)
    mostly_half = half_bytes * 2 > sum(p.nbytes for _, p in floats)
    may_cast = model.cast_predicate if hasattr(model, "cast_predicate") else lambda _: True
    kept = {name for name, p in floats if (mostly_half and p.dtype == mx.float32) or not may_cast(name)}
    cast = [(name, p.astype(dtype)) for name, p in floats if name not in kept and p.dtype != dtype]
    if cast:
        model.update(tree_unflatten(cast))
