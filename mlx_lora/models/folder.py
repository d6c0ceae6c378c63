"""Read a model folder: check its files, then build mlx-lm's model from them."""

from __future__ import annotations

import io
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from huggingface_hub.errors import StrictDataclassError
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import mlx_lora
from mlx_lora.models.config_check import check_config
from mlx_lora.models.saved_config import check_rotation, translate_config
from mlx_lora.models.stored_rows import Watched
from mlx_lora.sources.safetensors import read_safetensors_header
from mlx_lora.system.errors import InputError
from mlx_lora.system.parsing import read_json

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
OURS = Path(mlx_lora.__file__).parent
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# The errors that third-party code raises when it builds a model or a tokenizer from unexpected files: Python's ordinary
# errors on unexpected data. Catch them only around such calls, or, with `is_foreign`, around a model's own code if there
# is a fallback.
FOREIGN_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, NameError, ArithmeticError, AssertionError, RuntimeError,
    ImportError, OSError, StrictDataclassError,
)  # fmt: skip


def is_foreign(error: BaseException) -> bool:
    """Return whether one of FOREIGN_ERRORS may come from code other than ours, so that it may not be a bug here.

    mlx raises ValueError and RuntimeError for shapes, types and gradients that it does not support, whoever calls it.
    For the others, the traceback tells which file raised them.
    """
    if isinstance(error, (ValueError, RuntimeError, OSError)) or error.__traceback__ is None:
        return True
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return not Path(innermost.f_code.co_filename).is_relative_to(OURS)


def load_weights(
    folder: Path, trust_remote_code: bool, watched: Watched | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Check the folder's files, then return mlx-lm's model, with lazy weights, and its config.

    Args:
        folder: with config.json and model*.safetensors.
        trust_remote_code: let the folder's own Python code build the model.
        watched: sees which tensors become parameters as they are stored.

    Raises:
        InputError: a file is missing or damaged, or does not fit the others.
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
    import_architecture(config)
    changes = _translation(config, folder)
    try:
        classes = mlx_lm.utils._get_classes if watched is None else watched.classes
        model, config = load_model(
            folder, lazy=True, model_config=changes, get_model_classes=classes, trust_remote_code=trust_remote_code
        )
        complete_module(model)
        # Build the graph for two tokens and compute nothing: this finds wrong settings that no weight's shape shows
        # (heads, RoPE, norms) now, not in the middle of a run.
        model(mx.zeros((1, 2), mx.int32))
    except FOREIGN_ERRORS as error:
        # An unknown model type, a config with a field missing or of another type, or tensors of another model.
        if "No Metal back-end" in str(error):
            raise InputError(
                f"{folder}: mlx-lm needs Metal for {config['model_type']} models, and this machine does not have it; "
                "use a Mac with Apple silicon, or choose another model"
            ) from error
        raise InputError(f"{folder}: mlx-lm cannot build this {config['model_type']} model ({short(error)})") from error
    check_rotation(model, config, folder / CONFIG_FILE)
    check_config(config, folder / GENERATION_FILE, n_tensors)  # mlx-lm has merged that file's end ids into the config
    return model, config


def _translation(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the entries of config.json that differ in mlx-lm's form (see saved_config.py)."""
    translated = translate_config(config, folder / CONFIG_FILE)
    return {key: value for key, value in translated.items() if key not in config or config[key] != value}


def is_classifier(config: dict[str, Any]) -> bool:
    """Tell whether a config.json is that of transformers' sequence classification, as reward models are stored."""
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or [])


def load_classifier_weights(folder: Path, score: str) -> tuple[nn.Module, dict[str, Any], mx.array]:
    """Return mlx-lm's model of a reward model's folder, its config, and the weight of its score head, (1, D).

    Args:
        folder: with config.json and model*.safetensors as transformers writes them; weights are lazy.
        score: the stored name of the head's weight.

    Raises:
        InputError: a file is missing or damaged, or this is no reward model of transformers' layout.
    """
    config = read_json(folder / CONFIG_FILE, "download the model again")
    headers = {file: read_safetensors_header(file) for file in sorted(folder.glob("model*.safetensors"))}
    stored = {name: (file, entry) for file, header in headers.items() for name, entry in header.items()}
    shape = stored[score][1]["shape"] if score in stored else []
    if len(shape) != 2 or shape[0] != 1:
        raise InputError(f"{folder}: its {score} is {tuple(shape) or 'missing'}; a reward model has one of (1, width)")
    check_config(config, folder / CONFIG_FILE, len(stored))
    import_architecture(config)
    try:
        # Without a language model's head, which is not there. Names are compared below.
        changes = {**_translation(config, folder), "tie_word_embeddings": True}
        model, config = load_model(folder, lazy=True, strict=False, model_config=changes)
        complete_module(model)
        model(mx.zeros((1, 2), mx.int32))
    except FOREIGN_ERRORS as error:
        raise InputError(
            f"{folder}: mlx-lm cannot build this {config.get('model_type')} model ({short(error)})"
        ) from error
    check_rotation(model, config, folder / CONFIG_FILE)
    needed = {name for name, _ in tree_flatten(model.parameters())}
    beyond = {score, "lm_head.weight", *(name for name in stored if name.endswith("rotary_emb.inv_freq"))}
    if differing := sorted(needed ^ (stored.keys() - beyond)):
        raise InputError(
            f"{folder}: its tensors are not those of mlx-lm's {config['model_type']} ({', '.join(differing[:3])}); use "
            "the adapter that it was made from, with its base"
        )
    return model, config, mx.load(str(stored[score][0]))[score]


def import_architecture(config: dict[str, Any]) -> None:
    """Import mlx-lm's module of a model; OLMo 1's ends the process if a package is missing, which is caught here.

    Raises:
        InputError: the module tried to end the process.
    """
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            mlx_lm.utils._get_classes(config)
    except SystemExit as end:
        raise InputError(
            f"mlx-lm's {config.get('model_type')}: cannot be used here ({short(ValueError(said.getvalue()))}); install "
            "what it asks for, or choose another model"
        ) from end
    except FOREIGN_ERRORS:
        return  # building the model raises the same error, and is reported there


def complete_module(model: nn.Module) -> None:
    """Call `nn.Module.__init__` if the model's class did not, as in mlx-lm's Griffin, which could not be frozen."""
    if not hasattr(model, "_no_grad"):
        nn.Module.__init__(model)


def read_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Return config.json.

    Raises:
        InputError: it is missing, is not a model's, or asks for code that was not allowed.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"{file}: cannot be read (no such file); give a folder with config.json and *.safetensors")
    config = read_json(file, "download the model again")
    if "model_type" not in config:
        raise InputError(f"{file}: has no model_type; give a language model's folder")
    if is_classifier(config):
        raise InputError(
            f"{file}: a classifier or reward model, which gives scores, not text; give the language model that it was "
            "made from, with its adapter"
        )
    if config.get("model_file") is not None:
        if not trust_remote_code:
            raise InputError(
                f"{file}: the model requires its own code ({str(config['model_file'])[:80]}); read it, then give "
                "--trust-remote-code"
            )
        if not inside(config["model_file"]):
            raise InputError(f"{file}: model_file {str(config['model_file'])[:80]} is not in that folder; fix the file")
    return config


def inside(name: Any) -> bool:
    """Return whether a name read from a file is a plain file name, which cannot point outside the folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def short(error: BaseException, limit: int = 300) -> str:
    """Return an error's text on one line, of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."
