"""Reads a model folder: its files checked first, then mlx-lm's model and tokenizer built from them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import StrictDataclassError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer

from mlx_lora.cache import cache_dir
from mlx_lora.errors import InputError
from mlx_lora.files import replacing_folder
from mlx_lora.models.config_check import check_config
from mlx_lora.parsing import read_json
from mlx_lora.sources.safetensors import read_safetensors_header
from mlx_lora.sources.spm_tokenizer import write_tokenizer_from_spm

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# What third-party code that builds a model or a tokenizer from files raises when the files are not as it expects:
# the errors of ordinary Python on data of another form. Only around those two calls.
FOREIGN_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, NameError, ArithmeticError, AssertionError, RuntimeError,
    ImportError, OSError, StrictDataclassError,
)  # fmt: skip


def load_weights(folder: Path, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Check the folder's files, then let mlx-lm build the model lazily.

    Args:
        folder: with config.json and model*.safetensors.
        trust_remote_code: let the folder's own Python build the model.

    Raises:
        InputError: a file that is missing, damaged, or does not fit the others.
    """
    config = read_config(folder, trust_remote_code)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        found = f" ({pickles[0]} is a pickle, which can run code when loaded)" if pickles else ""
        raise InputError(
            f"{folder}: no model*.safetensors in it{found}; give a folder of safetensors weights, or convert it first"
        )
    n_tensors = sum(len(read_safetensors_header(file)) for file in files)
    check_config(config, folder / CONFIG_FILE, n_tensors)
    try:
        model, config = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
        # Builds the graph of two tokens and computes nothing: settings that no weight shows (heads, RoPE, norms) are
        # looked at here, not in the middle of a run.
        model(mx.zeros((1, 2), mx.int32))
    except FOREIGN_ERRORS as error:
        # An unknown model type, a config without a needed field or with one of another kind, foreign tensors.
        raise InputError(
            f"{folder}: mlx-lm cannot build this {config['model_type']} model ({_short(error)})"
        ) from error
    check_config(config, folder / GENERATION_FILE, n_tensors)  # mlx-lm takes the end ids from there
    return model, config


def read_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Return config.json.

    Raises:
        InputError: it is not there, is no model's, or asks for code of its own that was not allowed.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"{file}: cannot be read (no such file); give a folder with config.json and *.safetensors")
    config = read_json(file, "download the model again")
    if "model_type" not in config:
        raise InputError(f"{file}: names no model_type; give a language model's folder")
    if config.get("model_file") is not None:
        if not trust_remote_code:
            raise InputError(
                f"{file}: the model needs code of its own ({str(config['model_file'])[:80]}); read it, then give "
                "--trust-remote-code"
            )
        if not inside(folder, config["model_file"]):
            raise InputError(
                f"{file}: model_file {str(config['model_file'])[:80]} is not in that folder; mend the file"
            )
    return config


def inside(folder: Path, name: Any) -> bool:
    """Tell whether a name that a file gives is that of a file in the folder, and of none elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def _short(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."


def load_folder_tokenizer(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> TokenizerWrapper:
    """Load a folder's tokenizer through transformers.

    Args:
        folder: the model's.
        config: its config.json, for the end tokens.
        trust_remote_code: let the repository's own tokenizer code run.

    Raises:
        InputError: it cannot be loaded, or needs code that was not allowed.
    """
    check_tokenizer_config(folder, trust_remote_code)
    # Said in so many words: left out, transformers asks on the terminal whether to run the code.
    extra = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = load_tokenizer(_tokenizer_folder(folder), extra, eos_token_ids=config.get("eos_token_id"))
        tokenizer._tokenizer("x")
    except InputError:
        raise
    except Exception as error:
        # The tokenizers library raises plain Exception; anything more special than that, and foreign, is a bug.
        if not isinstance(error, FOREIGN_ERRORS) and type(error) is not Exception:
            raise
        raise InputError(
            f"{folder}: its tokenizer cannot be loaded ({_short(error)}); it needs tokenizer.json or tokenizer.model"
        ) from error
    return tokenizer


def check_tokenizer_config(folder: Path, trust_remote_code: bool) -> None:
    """Look at the tokenizer's settings before transformers acts on them.

    Raises:
        InputError: they ask for code that was not allowed, or name files outside their folder.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    settings = read_json(file, "download the model again")
    own_code = isinstance(settings.get("auto_map"), (dict, list)) and settings["auto_map"]
    if own_code and not trust_remote_code and not (folder / "tokenizer.json").is_file():
        raise InputError(f"{file}: the tokenizer needs code of its own; read it, then give --trust-remote-code")
    named = {key: value for key, value in settings.items() if key.endswith("_file") and isinstance(value, str)}
    versions = settings.get("fast_tokenizer_files")
    for number, name in enumerate(versions if isinstance(versions, list) else []):
        named[f"fast_tokenizer_files[{number}]"] = name
    # Many published files name a path of their author's machine, which says nothing; one that exists here would be read.
    outside = [key for key, name in named.items() if not inside(folder, name) and (folder / str(name)).exists()]
    if outside:
        raise InputError(f"{file}: {outside[0]} names a file outside the folder; remove the key")


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
