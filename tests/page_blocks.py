"""The fenced blocks of README.md and docs/, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?P<more>[^`\n]*)$")
TITLE = re.compile(r'title="([^"]+)"')
VARIABLE = re.compile(r"^[A-Z_]+=\S*$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its path from the root.
        line: of its fence.
        language: after the fence; empty without one.
        title: the file name that the page gives it, None without.
        text: without the fences and their indentation.
    """

    page: str
    line: int
    language: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a block, as words; `piped` is the command whose output it reads."""

    block: Block
    words: tuple[str, ...]
    piped: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.block}: {shlex.join(self.words)}"

    @property
    def ours(self) -> tuple[str, ...]:
        """The words after `mlx-lora`, also of `python -m mlx_lora.NAME`; empty for other programs."""
        for place, word in enumerate(self.words):
            if word == "mlx-lora":
                return self.words[place + 1 :]
            if word == "-m" and self.words[place + 1].startswith("mlx_lora."):
                return (self.words[place + 1].removeprefix("mlx_lora."), *self.words[place + 2 :])
        return ()


def blocks_of(path: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    blocks, opened, held, start = [], None, [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        found = FENCE.match(line)
        if opened is None and found:
            opened, held, start = found, [], number
        elif opened is not None and line.strip() == "```":
            title = TITLE.search(opened["more"])
            text = "\n".join(text.removeprefix(opened["indent"]) for text in held)
            page = path.relative_to(ROOT).as_posix()
            blocks.append(Block(page, start, opened["language"], title and title[1], text))
            opened = None
        elif opened is not None:
            held.append(line)
    assert opened is None, f"{path}: the block in line {start} has no end"
    return blocks


def commands_of(block: Block) -> list[Command]:
    """Return the commands of a `bash` block, or of a `console` block's lines that begin with `$`."""
    if block.language not in ("bash", "console"):
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [command for line in lines if (command := _command(block, line))]


def _command(block: Block, line: str) -> Command | None:
    words = shlex.split(line, comments=True)
    while words and VARIABLE.match(words[0]):
        words.pop(0)
    if not words:
        return None
    if "|" in words:
        bar = words.index("|")
        return Command(block, tuple(words[bar + 1 :]), tuple(words[:bar]))
    return Command(block, tuple(words))


def all_blocks() -> list[Block]:
    """Return every fenced block of every page."""
    return [block for page in PAGES for block in blocks_of(page)]
