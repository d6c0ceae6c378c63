"""Read and write model folders: check their files, build mlx-lm's model from them, and tell which base they hold.

MLX trusts a safetensors file's header, and the header may be wrong, so a file is checked before MLX maps it. The safetensors
library checks the format's own rules (sizes that fit the file, no gaps, no overlaps); here is what MLX needs beyond them.

A base model's fingerprint is computed from what no quantization changes, so that a QLoRA adapter fits its float base:

    0123456789abcdef               a model as it was published, at any quantization and dtype
    0123456789abcdef+89abcdef      the same with an adapter fused into it, which changes its matrices but not its vectors
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import traceback
import zlib
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub.errors import StrictDataclassError
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from safetensors import SafetensorError, safe_open

import mlx_lora
from mlx_lora.compat import functions
from mlx_lora.compat.functions import become
from mlx_lora.models.config import (
    architecture_of,
    check_config,
    check_rotation,
    names_encoder,
    translate_config,
)
from mlx_lora.utils.errors import InputError, RunError, first_line
from mlx_lora.utils.parsing import read_json

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"


# Reading

OURS = Path(mlx_lora.__file__).parent
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# The errors that third-party code raises when it builds a model or a tokenizer from unexpected files: Python's ordinary
# errors on unexpected data. Catch them only around such calls, or, with `raise_if_ours`, around a model's own code if there
# is a fallback.
FOREIGN_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, NameError, ArithmeticError, AssertionError, RuntimeError,
    ImportError, OSError, StrictDataclassError,
)  # fmt: skip


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
        classes = architecture_of if watched is None else watched.classes
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
    for (
        path,
        layer,
    ) in model.named_modules():  # mx.load gives the bytes of fp8 weights, which some models bring without scales
        if hasattr(layer, "to_quantized") and not mx.issubdtype(layer.weight.dtype, mx.floating):
            raise InputError(
                f"{folder}: {path}.weight is {str(layer.weight.dtype).removeprefix('mlx.core.')}, not float; use the model's bfloat16 weights"
            )
    check_config(config, folder / GENERATION_FILE, n_tensors)  # mlx-lm has merged that file's end ids into the config
    return model, config


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


def _translation(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the entries of config.json that differ in mlx-lm's form (models/config.py)."""
    translated = translate_config(config, folder / CONFIG_FILE)
    return {key: value for key, value in translated.items() if key not in config or config[key] != value}


def import_architecture(config: dict[str, Any]) -> None:
    """Import mlx-lm's module of a model; OLMo 1's ends the process if a package is missing, which is caught here.

    Raises:
        InputError: the module tried to end the process.
    """
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            architecture_of(config)
    except SystemExit as end:
        raise InputError(
            f"mlx-lm's {config.get('model_type')}: cannot be used here ({short(ValueError(said.getvalue()))}); install "
            "what it asks for, or choose another model"
        ) from end
    except FOREIGN_ERRORS:
        return  # building the model raises the same error, and is reported there


def complete_module(model: nn.Module) -> None:
    """Call `nn.Module.__init__` if the model's class did not, as in mlx-lm's Griffin, which could not be frozen."""
    if not vars(nn.Module()).keys() <= vars(model).keys():
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
    if is_classifier(config) and not names_encoder(config):
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


def is_classifier(config: dict[str, Any]) -> bool:
    """Tell whether a config.json is that of transformers' sequence classification, as reward models are stored."""
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or [])


def inside(name: Any) -> bool:
    """Return whether a name read from a file is a plain file name, which cannot point outside the folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def is_foreign(error: BaseException) -> bool:
    """Return whether one of FOREIGN_ERRORS may come from code other than ours, so that it may not be a bug here.

    mlx raises ValueError and RuntimeError for shapes, types and gradients that it does not support, whoever calls it.
    For the others, the traceback tells which file raised them.
    """
    if isinstance(error, (ValueError, RuntimeError, OSError)) or error.__traceback__ is None:
        return True
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    innermost = next(file for file in reversed(files) if file != functions.__file__)  # which only hands calls on
    return not Path(innermost).is_relative_to(OURS)


def raise_if_ours(error: BaseException) -> None:
    """Raise one of FOREIGN_ERRORS again that only a bug here can be."""
    if not is_foreign(error):
        raise error


def short(error: BaseException, limit: int = 300) -> str:
    """Return an error's text on one line, of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."


# Headers of safetensors files

MAX_DIM = 2**31 - 1  # MLX's shapes are 32-bit
MAX_DIMS = 32
# The types that mx.load supports.
READABLE = [
    "BOOL", "U8", "I8", "F8_E4M3", "F8_E8M0", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "C64",
]  # fmt: skip
MAX_SHOWN = 200  # characters of the library's message, which may quote a name of any length


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Return the tensor table of `path` after checking every size in it against the file.

    Returns:
        {name: {"dtype", "shape"}}, without the metadata entry.

    Raises:
        InputError: the file cannot be read or is truncated, or its header does not fit it.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            header = {name: {"dtype": part.get_dtype(), "shape": part.get_shape()} for name, part in slices.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); check the path") from None
    except SafetensorError as error:
        found = first_line(error).removeprefix("Error while deserializing header: ")[:MAX_SHOWN]
        raise InputError(f"{path}: truncated or damaged safetensors ({found}); download or save it again") from None
    for name, entry in header.items():
        if entry["dtype"] not in READABLE:
            found = f"{name[:MAX_SHOWN]} is {entry['dtype']}"
            raise InputError(f"{path}: {found}, which MLX cannot read; save it as float32 or bfloat16")
        if len(entry["shape"]) > MAX_DIMS or max(entry["shape"], default=0) > MAX_DIM:
            raise InputError(f"{path}: the shape of {name[:MAX_SHOWN]} is larger than MLX can read; save it again")
    return header


# Writing

MAX_SHARD_BYTES = 5 << 30  # what mlx-lm and the hub use


def save_tensors(path: Path, tensors: dict[str, mx.array], file_format: str = "mlx") -> None:
    """Write a safetensors file and check that it is complete.

    Args:
        path: of the file.
        tensors: by name.
        file_format: its "format" entry: mlx, or pt for files that PEFT and transformers read.

    Raises:
        RunError: the disk is full or disconnected.
    """
    mx.eval(tensors)
    try:
        mx.save_safetensors(str(path), tensors, metadata={"format": file_format})
        read_safetensors_header(path)  # a disk that filled up leaves a short file
    except (RuntimeError, InputError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise RunError(
            f"{path}: writing {size / 1e6:.1f} MB failed, with {free / 1e6:.1f} MB free ({error})"
        ) from error


class ShardWriter:
    """Collect parameters and write them as safetensors shards with an index.

    Memory holds one shard. The names are mlx-lm's: `model.safetensors`, or `model-00001-of-0000N.safetensors`.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self.shard: dict[str, mx.array] = {}
        self.shard_bytes = self.total_bytes = 0
        self.names: list[list[str]] = []

    def add(self, parameters: dict[str, mx.array]) -> None:
        """Add parameters; they are evaluated when their shard is written, at the latest."""
        size = sum(array.nbytes for array in parameters.values())
        if self.shard and self.shard_bytes + size > self.max_shard_bytes:
            self._write()
        self.shard |= parameters
        self.shard_bytes += size
        self.total_bytes += size

    def close(self) -> int:
        """Write the last shard, rename all to their final names, write the index; return the bytes of all tensors."""
        self._write()
        count = len(self.names)
        weight_map = {}
        for i, names in enumerate(self.names):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            (self.folder / f"part-{i}.safetensors").rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)
        return self.total_bytes

    def _write(self) -> None:
        save_tensors(self.folder / f"part-{len(self.names)}.safetensors", self.shard)
        self.names.append(list(self.shard))
        self.shard, self.shard_bytes = {}, 0


def write_json(path: Path, content: object) -> None:
    """Write one JSON file, indented, UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Which model it is

FUSED_KEY = "mlx_lora.fused"  # in a GGUF file's metadata
PIECES, PIECE_BYTES = 512, 4096  # of each file of weights, in the sample that tells two folders apart


def base_fingerprint(model: nn.Module, config: dict[str, Any]) -> str:
    """Return 16 hex digits that are the same at every quantization and dtype, and the mark of what is fused into it.

    The hash covers the model type and every one-dimensional float parameter (norm weights, biases of norms), rounded
    to bfloat16: converters quantize matrices and leave these alone. Two fine-tunes of one base differ in them, so adapters
    of one are not taken for adapters of the other. Adapter factors are two-dimensional and not included.

    Args:
        model: an mlx-lm model, adapted or not.
        config: its config.json.
    """
    digest = hashlib.sha256(str(config.get("model_type")).encode())
    vectors = [
        (name, p) for name, p in tree_flatten(model.parameters()) if p.ndim == 1 and mx.issubdtype(p.dtype, mx.floating)
    ]
    for name, value in sorted(vectors):
        rounded = value.astype(mx.bfloat16).view(mx.uint16)
        digest.update(name.replace(".linear.", ".").encode())  # an adapted layer has its bias one level deeper
        digest.update(np.array(rounded).tobytes())
    mark = fused_mark(config)
    return digest.hexdigest()[:16] + (f"+{mark}" if mark else "")


def without_mark(fingerprint: str) -> str:
    """Return the fingerprint without the mark, as earlier versions wrote it."""
    return fingerprint.partition("+")[0]


def fused_mark(config: dict[str, Any]) -> str:
    """Return config.json's mark of what is fused into the model, empty for a model as it was published."""
    own = config.get("mlx_lora")
    mark = own.get("fused") if isinstance(own, dict) else None
    return mark[:40] if isinstance(mark, str) else "fused" if mark else ""  # earlier versions wrote true


def merge_mark(model: nn.Module, config: dict[str, Any]) -> str:
    """Return 8 hex digits that identify the adapter on `model` and whatever was fused into its base before.

    Args:
        model: adapted.
        config: its base's config.json.
    """
    digest = hashlib.sha256(fused_mark(config).encode())
    for path, layer in model.named_modules():
        for name in ("lora_a", "lora_b", "m"):
            if isinstance(layer.get(name), mx.array):
                digest.update(f"{path}.{name}".encode())
                digest.update(np.array(layer[name].astype(mx.float32)).tobytes())
    return digest.hexdigest()[:8]


def model_sample(folder: Path) -> str:
    """Return a hash of a folder's config.json and of pieces of its weights, evenly spaced, with their files' sizes.

    What is computed with a model and kept for later runs is kept under it. A base's fingerprint is the same for all
    quantizations, and for what other programs fused into it. This is not, and it takes no time, however large the model is.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("config.json")):
        digest.update(path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for piece in range(PIECES):
                file.seek(piece * max(0, size - PIECE_BYTES) // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def parameter_sums(model: nn.Module, without: Collection[int] = ()) -> dict[str, int]:
    """Return a check sum of the bytes of each parameter, which any change of dtype, quantization or weights changes.

    Args:
        model: its arrays are read once, about a second per gigabyte.
        without: ids of arrays to leave out.
    """
    sums = {}
    for name, value in tree_flatten(model.parameters()):
        if id(value) not in without:
            # numpy has no bfloat16; other views are not copied
            array = np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value, copy=False)
            sums[f"{name} {value.dtype} {value.shape}"] = zlib.crc32(np.ascontiguousarray(array).data)
    return sums


# Rows of stored tensors

# MLX reads a tensor of a safetensors file in whole, even if only some rows are needed. A vocabulary's table is too large for
# that on a machine that keeps a part of the base. Its rows are read from the file, if the model has the tensor as it is
# stored; if mlx-lm changes it while loading (a few families do), it is read in whole.

# safetensors' names of the types of weights.
TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U16": mx.uint16, "U8": mx.uint8,
         "I32": mx.int32, "I8": mx.int8}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored.

    Attributes:
        file: a safetensors file.
        name: in that file.
        begin: of its bytes there.
        shape, dtype: as it is stored.
    """

    file: Path
    name: str
    begin: int
    shape: tuple[int, ...]
    dtype: mx.Dtype

    def check_sum(self) -> int:
        """Return the check sum of its bytes in the file."""
        with self.file.open("rb") as file:
            file.seek(self.begin)
            return zlib.crc32(file.read(self.bytes))

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return self.count * self.dtype.size

    def part(self, rows: slice) -> StoredTensor:
        """Return where some rows are stored."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.size
        begin, count = self.begin + rows.start * row_bytes, rows.stop - rows.start
        return replace(self, begin=begin, shape=(count, *self.shape[1:]))

    def rows(self, rows: slice) -> mx.array:
        """Read rows, and return them in their stored dtype."""
        at = self.part(rows)
        content = np.fromfile(self.file, np.uint8, at.bytes, offset=at.begin)
        return mx.array(content).view(self.dtype).reshape(at.shape)


class Watched:
    """Sees the tensors that mlx-lm loads, before it changes them for its model."""

    def __init__(self) -> None:
        self._own: type[nn.Module] | None = None
        self._loaded: dict[str, mx.array] = {}

    def classes(self, config: dict[str, Any]) -> tuple[type, type]:
        """Return mlx-lm's classes of a model; `load_model` takes this function."""
        own, arguments = architecture_of(config)
        if not hasattr(own, "sanitize"):
            return own, arguments
        loaded = self._loaded

        def sanitize(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            loaded.update(weights)
            return own.sanitize(self, weights)  # pyright: ignore[reportAttributeAccessIssue]

        self._own = own
        return type(own.__name__, (own,), {"sanitize": sanitize, "__module__": own.__module__}), arguments

    def unchanged(self, model: nn.Module, folder: Path) -> dict[str, StoredTensor]:
        """Give the model its own class, and return where its parameters are stored, by path; those that are as stored.

        Args:
            model: as `load_model` returned it.
            folder: with its files.
        """
        stored = stored_tensors(folder)
        if self._own is None:  # mlx-lm changes nothing: the names are the paths
            return {path: stored[path] for path, _ in tree_flatten(model.parameters()) if path in stored}
        become(model, self._own)
        names = {id(array): name for name, array in self._loaded.items()}
        found = {path: names.get(id(array)) for path, array in tree_flatten(model.parameters())}
        self._loaded.clear()
        return {path: stored[name] for path, name in found.items() if name in stored}


def read_rows(path: str, array: mx.array, rows: slice, stored: Mapping[str, StoredTensor]) -> mx.array:
    """Return some rows of a parameter, read from its file if possible.

    Args:
        path: of the parameter.
        array: the parameter, which may be lazy.
        rows: of its first axis.
        stored: where parameters are stored, see `Watched`.
    """
    at = stored.get(path)
    if at is None or at.shape != array.shape:
        return array[rows]
    return at.rows(rows).astype(array.dtype)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model folder's safetensors files, which have been checked, by name."""
    found = {}
    for file in folder.glob("model*.safetensors"):
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(size))
        header.pop("__metadata__", None)
        found |= {
            name: StoredTensor(
                file, name, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), TYPES[entry["dtype"]]
            )
            for name, entry in header.items()
            if entry["dtype"] in TYPES
        }
    return found


# The tower of a vision-language model

# mlx-vlm's names of what a vision-language model has beside its language model, and the parts of paths that are of a connector.
TOWER_PARTS = ("vision_tower", "vision_model", "connector", "multi_modal_projector", "embed_vision")
CONNECTORS = frozenset({"connector", "multi_modal_projector", "merger", "deepstack_merger_list", "embed_vision"})


def of_tower(path: str) -> bool:
    """Return whether a module or a parameter is of a tower or a connector, by mlx-vlm's name."""
    return path.split(".", 1)[0] in TOWER_PARTS


def of_connector(path: str) -> bool:
    """Return whether a module or a parameter is of a connector, by mlx-vlm's name."""
    return of_tower(path) and not CONNECTORS.isdisjoint(path.split("."))
