"""Find the folder that a model is loaded from: its own, or one in the cache that it is converted into the first time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.models.converting import convert_model
from mlx_lora.models.folder import read_config
from mlx_lora.models.quantize import choose_quantization
from mlx_lora.settings.config import ModelSettings
from mlx_lora.sources.hub import ModelSource
from mlx_lora.system import device
from mlx_lora.system.cache import cache_dir
from mlx_lora.system.console import echo
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import check_writable, one_at_a_time, sha256_of
from mlx_lora.system.units import format_duration

# Part of the cache key of converted models: raise it when the same file would convert differently.
_FORMAT = 1


def folder_of(settings: ModelSettings, source: ModelSource, say: Callable[[str], None] = echo) -> Path:
    """Return the folder to load a model from: its own, or one in the cache that it is converted into the first time.

    Args:
        settings: of the model.
        source: what they name, from `resolve_model`.
        say: takes a line before a model is quantized, and one after it.

    Raises:
        InputError: see `cached_quantized_folder` and `convert_model`.
    """
    if settings.bits is not None:
        dtype = device.compute_dtype(settings.dtype)
        return cached_quantized_folder(source, settings.bits, dtype, settings.trust_remote_code, say)
    return cached_gguf_folder(source) if source.kind == "gguf" else source.path


def cached_gguf_folder(source: ModelSource) -> Path:
    """Return the cached folder that a GGUF file converts to; the first call converts it.

    Blocks are carried over with float32 scales, so the folder does not depend on the compute dtype.
    The cache key is the file's path, size and modification time.
    """
    stat = source.path.stat()
    key = f"{_FORMAT}|{source.path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    folder = cache_dir("converted") / f"{source.path.stem}-{sha256_of(key)[:12]}"
    with one_at_a_time(folder):
        if not (folder / "config.json").is_file():
            check_writable(folder, f"MLX_LORA_CACHE: converting {source.path.name} into", stat.st_size)
            convert_model(source, folder, target="carry")
    return folder


def cached_quantized_folder(
    source: ModelSource,
    bits: int,
    dtype: mx.Dtype,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Return a model quantized at `bits`, as a folder in the cache; the first call converts it, as `convert --bits` does.

    A folder that already has these bits is returned as it is.

    Args:
        source: from `resolve_model`.
        bits: per weight, in groups of 64.
        dtype: of what stays in float.
        trust_remote_code: as for `convert_model`.
        say: takes a line before the conversion, and one after it.

    Raises:
        InputError: MLX has no such bits, or the model is quantized at others.
    """
    target = choose_quantization(bits, None, None)
    if source.kind == "folder" and has_bits(read_config(source.path, trust_remote_code), bits, source.model_id):
        return source.path
    files = sorted(source.path.glob("*.*")) if source.kind == "folder" else [source.path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = sha256_of(f"{_FORMAT}|{source.path.resolve()}|{target}|{dtype}|{stats}")
    folder = cache_dir("converted") / f"{source.model_id.rstrip('/').rpartition('/')[2]}-{bits}bit-{key[:12]}"
    with one_at_a_time(folder):
        if not (folder / "config.json").is_file():
            say(f"Quantizing {source.model_id} to {bits} bits; this is done once, and kept in the cache")
            made = convert_model(source, folder, target=target, dtype=dtype, trust_remote_code=trust_remote_code)
            say(f"Quantized: {made.size_bytes / 1e6:.0f} MB, {format_duration(made.elapsed_s)}")
    return folder


def has_bits(config: dict[str, Any], bits: int, model_id: str) -> bool:
    """Return whether a model folder is quantized at these bits already, so that --bits has nothing to do.

    Args:
        config: its config.json.
        bits: as --bits takes them.
        model_id: its name, for the message.

    Raises:
        InputError: it is quantized at others.
    """
    found = config.get("quantization") or config.get("quantization_config")
    if found and found.get("bits") != bits:
        raise InputError(
            f"--bits {bits}: {model_id} is already quantized ({found.get('bits', '?')} bits); leave --bits out, or give the "
            "model that it was made from"
        )
    return bool(found)
