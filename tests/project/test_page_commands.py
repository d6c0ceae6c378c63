"""Every command and every Python block of the pages, run in page order on a tiny model (slow).

Each page has a folder of its own with a tiny model under the names that the pages use, the checkout's data and recipes, and a
random adapter wherever a page uses one that another page trained. Blocks with a title are written there as files. Runs are cut
to two steps. What is not run is in page_blocks.py, with the reason.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_families import write_folder_with_merges
from make_adapters import make_adapter
from page_blocks import PAGES, ROOT, Block, Command, blocks_of, commands_of, reason_not_to_run
from run_cli import run, succeeds
from serving_process import Server

pytestmark = pytest.mark.slow

ADDRESS = "127.0.0.1:8080"
GGUF = "tiny.gguf"
# A name of the pages, as a regular expression of a whole word of a command -> what stands for it here.
STAND_INS = {
    r"(Qwen|HuggingFaceTB|meta-llama)/[\w.-]+": "smollm2",
    r"QuantFactory/[\w.:-]+": GGUF,
    r"~/\.cache/mlx_lora/models/[\w.-]+\.gguf": GGUF,
    r"model(\.Q4_K_M)?\.gguf": GGUF,
    r"config\.json": "smollm2/config.json",
    r"someone/their-adapter": "my-adapter",
    r"checkpoints/RUN/weights/\w+": "runs/bard",
    r"tinyshakespeare\.txt": "data/text/train.txt",
    r"report\.html": "report.html",
}
MODELS = ("smollm2", "smollm2-f32")
ADAPTERS = {"my-adapter": 1, "runs/bard": 1, "runs/tutor": 2, "runs/bard-full": 3}
# What makes a run short: two steps on short rows. It takes the place of the page's own values.
SHORT = ("--iters", "2", "--batch-tokens", "256", "--max-seq-length", "128", "--sample-tokens", "0")
FEW = {"generate": ("--max-tokens", "4"), "chat": ("--max-tokens", "4"), "doctor": ("--no-hub",)}
LONGEST = "128"  # tokens of a row where a command measures


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """The folder that each page's folder is a copy of."""
    folder = tmp_path_factory.mktemp("stock")
    write_folder_with_merges(folder / "smollm2")
    shutil.copytree(folder / "smollm2", folder / "smollm2-f32")
    for name, seed in ADAPTERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_adapter(folder / "smollm2", folder / name, seed=seed)
    succeeds("export", "--model", folder / "smollm2", "--to", "gguf", "--out", folder / GGUF)
    shutil.copytree(ROOT / "data", folder / "data")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    # What continues it needs the settings of its run.
    (folder / "my-adapter" / "run.yaml").write_text("model: smollm2\ndata: chats.jsonl\nrank: 4\n")
    for name in ("chats.jsonl", "more.jsonl", "new-questions.jsonl"):
        shutil.copy(ROOT / "data" / "messages" / "train.jsonl", folder / name)
    (folder / "benchmarks").mkdir()
    shutil.copytree(ROOT / "benchmarks" / "results", folder / "benchmarks" / "results")
    for name in ("model.gguf", "FILE.gguf"):
        shutil.copy(folder / GGUF, folder / name)
    return folder


class Reader:
    """A reader who types what a page says, in the page's own folder."""

    def __init__(self, folder: Path):
        self.folder, self.names, self.stack, self.address = (
            folder,
            {"__name__": "page"},
            contextlib.ExitStack(),
            ADDRESS,
        )
        self.ran: list[str] = []
        self.own = {path.name for path in folder.iterdir()} | set(ADAPTERS)

    def take(self, block: Block) -> None:
        """Write, run or skip a block."""
        if block.title:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text + "\n", encoding="utf-8")
        elif block.language == "python":
            self.python(block)
        for command in commands_of(block):
            if reason_not_to_run(command) is None:
                self.run(command)

    def python(self, block: Block) -> None:
        """Run a Python block; blocks of one page share their names."""
        text = block.text.replace(ADDRESS, self.address)
        exec(compile(text, str(block), "exec"), self.names)
        self.ran.append(str(block))

    def run(self, command: Command) -> None:
        """Run one command, in this process where it ends by itself."""
        if command.words[0] == "curl":
            words = [word.replace(ADDRESS, self.address) for word in command.words]
            subprocess.run([*words, "--fail", "--silent"], check=True, stdout=subprocess.PIPE)
            return
        name, *words = [stand_in(word) for word in command.ours]
        if name.startswith("-"):
            return
        words = shortened(name, words)
        self.make_room(name, words)
        if name in ("serve", "studio"):
            flags = without(words, "--port", "--host")
            flags += ["--home", self.folder / "studio", "--no-browser"] if name == "studio" else []
            server = Server(*flags, log=self.folder / f"{name}.log", cwd=self.folder, command=name)
            self.address = self.stack.enter_context(server).url.removeprefix("http://").rstrip("/")
            self.ran.append(str(command))
            return
        if name == "chat":
            typed = b"Hello\n/compare Hello\n/quit\n"
            self.stack.enter_context(typing(typed))
        ran = run(name, *words)
        assert ran.code == 0, f"{command}\n{' '.join(words)}\n{ran.err}"
        self.ran.append(str(command))

    def make_room(self, name: str, words: list[str]) -> None:
        """Remove what the stock holds where this command writes; a page's own results stay, as they would for a reader."""
        flag = "--adapter-path" if name == "train" else "--out"
        places = [words[place + 1] for place, word in enumerate(words) if word == flag]
        if name == "train" and "--config" in words and not places:
            places = [f"runs/{words[words.index('--config') + 1]}"]
        for place in places:
            if place in self.own and "--resume" not in words:
                self.own.discard(place)
                shutil.rmtree(self.folder / place, ignore_errors=True)


@contextlib.contextmanager
def typing(text: bytes) -> Iterator[None]:
    """Put text on standard input."""
    before = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(text))
    try:
        yield
    finally:
        sys.stdin = before


def stand_in(word: str) -> str:
    """Return what stands for a word of a page."""
    return next((there for name, there in STAND_INS.items() if re.fullmatch(name, word)), word)


def without(words: list[str], *flags: str) -> list[str]:
    """Return the words without flags and their values."""
    kept = list(words)
    for flag in flags:
        while flag in kept:
            place = kept.index(flag)
            del kept[place : place + 2]
    return kept


def beaten(words: list[str], by: tuple[str, ...]) -> list[str]:
    """Return the words with flags that beat those of the page; a command refuses an option that is given twice."""
    return [*without(words, *(word for word in by if word.startswith("--"))), *by]


def shortened(name: str, words: list[str]) -> list[str]:
    """Return a command's words with what makes it short."""
    if name == "train" and "--resume" not in words:
        fewer = ("--num-layers", "1") if "--num-layers" in words else ()  # the tiny model has two
        return beaten(without(words, "--epochs", "--batch-size"), (*SHORT, *fewer))
    if name == "train":
        return beaten(words, ("--iters", "3"))
    if name == "evaluate":
        return beaten(words, ("--max-seq-length", LONGEST))
    return beaten(words, FEW.get(name, ()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_runs(page, stock, tmp_path, monkeypatch):
    blocks = blocks_of(page)
    if not any(commands_of(block) or block.language == "python" for block in blocks):
        pytest.skip("the page has no command")
    folder = tmp_path / "here"
    shutil.copytree(stock, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reader = Reader(folder)
    with reader.stack:
        for block in blocks:
            reader.take(block)
    print(f"{page.name}: {len(reader.ran)} run")
