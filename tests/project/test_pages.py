"""The pages keep their word: flags exist, quoted errors occur, other trainers' keys mean what the tables say, and every command runs."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from gguf_families import write_folder_with_merges
from make_adapters import make_adapter
from page_blocks import (
    NOT_OURS,
    NOT_RUN,
    NOT_SHOWN,
    PAGES,
    ROOT,
    Block,
    Command,
    Printed,
    all_blocks,
    blocks_of,
    commands_of,
    is_printed,
    printed_of,
    reason_not_shown,
    reason_not_to_run,
)
from run_cli import run, succeeds
from serving_process import Server

from mlx_lora.__main__ import COMMANDS, load_command
from mlx_lora.cli.evaluate import EvaluateCommand
from mlx_lora.config.fields import read_value
from mlx_lora.config.load import OTHER_NAMES
from mlx_lora.config.migrate import DIALECTS
from mlx_lora.config.settings import FIELDS

DOCS = ROOT / "docs"
TYPED = [command for block in all_blocks() for command in commands_of(block)]
SHOWN = [line for page in PAGES for line in printed_of(blocks_of(page)) if not reason_not_shown(line, NOT_OURS)]
SCRIPT = re.compile(r"^(benchmarks|scripts|data|tests)/\w+\.py$")


def test_every_flag_of_every_command_exists():
    ours = [command for command in TYPED if command.ours]
    assert len(ours) > 70
    problems = []
    for command in ours:
        try:
            parse(command.ours)
        except (click.UsageError, ValueError) as error:
            problems.append(f"{command}: {getattr(error, 'message', error)}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "words",
    [("train", "--lora-r", "8"), ("train", "--method", "qlora"), ("tain", "--rank", "8"), ("bench", "run", "--fast")],
)
def test_a_flag_that_does_not_exist_is_found(words):
    with pytest.raises((click.UsageError, ValueError)):
        parse(words)


def test_scripts_of_the_pages_exist_with_their_flags():
    seen = 0
    for command in TYPED:
        for place, word in enumerate(command.words):
            if not SCRIPT.match(word):
                continue
            path = ROOT / word
            assert path.is_file(), command
            source = "".join(p.read_text() for p in [path, *path.parent.glob("_*.py")])
            for flag in command.words[place + 1 :]:
                if flag.startswith("--") and " " not in flag:
                    assert f'"{flag}"' in source, f"{command}: {flag}"
                    seen += 1
    assert seen > 30


def test_a_command_that_is_not_run_has_its_reason():
    without = [str(c) for c in TYPED if not c.ours and not reason_not_to_run(c) and c.words[0] != "curl"]
    assert not without, "\n".join(without)


def test_every_reason_has_a_command():
    idle = [start for start in NOT_RUN if not any(re.match(start, shlex.join(c.words)) for c in TYPED)]
    assert not idle


def test_every_block_says_what_it_is():
    known = {"bash", "console", "json", "python", "swift", "text", "toml", "yaml"}
    for block in all_blocks():
        assert block.language in known, block
    for block in all_blocks():
        if block.language == "python":
            ast.parse(block.text)
        if block.language == "toml":
            tomllib.loads(block.text)


def test_a_block_is_read_with_its_title_and_lines(tmp_path):
    page = ROOT / "docs" / "first-run.md"
    titled = [block for block in blocks_of(page) if block.title]
    assert [block.title for block in titled] == ["my-data.jsonl", "new-questions.jsonl"]
    block = Block(
        "x.md", 1, "bash", None, "A=1 mlx-lora train \\\n  --rank 8   # why\nprintf 'a' | mlx-lora chat --model m"
    )
    first, second = commands_of(block)
    assert first.ours == ("train", "--rank", "8")
    assert (second.ours, second.piped) == (("chat", "--model", "m"), ("printf", "a"))
    python = Command(block, ("mlx.launch", "-n", "2", "--", "python", "-m", "mlx_lora.train", "--rank", "8"))
    assert python.ours == ("train", "--rank", "8")


# Quoted errors.


def messages_of_the_package(starts: set[str]) -> list[str]:
    """Return every string of the files that have one of these beginnings, an f-string with a NUL for each value in it."""
    found = []
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "mlx_lora").rglob("*.py"))
    for text in (text for text in texts if any(start in text for start in starts)):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def parts_of(quoted: str) -> list[str]:
    """Return the parts of a quoted error between the dots, which stand for values."""
    return [part for part in quoted.removeprefix("Error: ").split("...") if part.strip(" ;:,()")]


def occurs(quoted: str, messages: list[str]) -> bool:
    """Tell whether a message has all parts of a quoted error, in order."""
    first, *_ = parts = parts_of(quoted)
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return any(first in message and pattern.search(message) for message in messages)


ERRORS = [block for block in blocks_of(DOCS / "troubleshooting.md") if block.text.startswith("Error: ")]


def test_every_quoted_error_occurs_in_the_package():
    messages = messages_of_the_package({parts_of(block.text)[0][:10] for block in ERRORS})
    assert len(ERRORS) >= 25
    gone = [f"{block} {block.text}" for block in ERRORS if not occurs(block.text, messages)]
    assert not gone, "\n".join(gone)
    assert not occurs("--out ...: exists and is not empty; give a new folder, or two", messages)


# Printed lines.


def test_every_reason_not_to_compare_has_a_line():
    lines = [line for page in PAGES for line in printed_of(blocks_of(page))]
    for reasons in (NOT_SHOWN, NOT_OURS):
        idle = [start for start in reasons if not any(reason_not_shown(line, {start: "this"}) for line in lines)]
        assert not idle


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("step 0/95,  val loss 4.7211", True),
        ("step 0/95, train loss 4.7211", False),
        ("12 steps done, ... in runs/bard", True),
        ("12 steps done; adapter of 9.8 MB in runs/bard", False),
    ],
)
def test_a_line_is_printed_if_its_words_are(line, same):
    output = "step 0/2, val loss 6.1\n2 steps done, loss 5.86; adapter of 96.3 kB in /tmp/bard"
    assert is_printed(line, output) == same


def compared(line: Printed) -> bool:
    """Tell whether a line is compared with what the page's commands print."""
    return not reason_not_shown(line) and not (line.command and reason_not_to_run(line.command))


def test_printed_lines_that_no_run_shows_have_the_packages_words():
    clauses = clauses_of_the_package()
    assert unsaid("Chosen for 9 examples: learning rate 0.1 for a llama of size 576", clauses)
    lines = [line for line in SHOWN if not compared(line) and line.block not in ERRORS]
    wrong = [f"{line} ({words})" for line in lines if (words := unsaid(line.line, clauses))]
    assert not wrong, "\n".join(wrong)


def clauses_of_the_package() -> set[tuple[str, ...]]:
    """Return the clauses of all messages and templates, each as its parts between values and numbers."""
    templates = [path.read_text() for path in (ROOT / "mlx_lora" / "cli" / "pages").glob("*.txt")]
    messages = [re.sub(r"\{[{%#].*?[}%#]\}", "\0", text, flags=re.DOTALL) for text in templates]
    messages += [text for template in templates for text in re.findall(r'"(.*?)"', template)]
    found = set()
    for clause in re.split(r"[.,;:()\n]", "\n".join([*messages_of_the_package({""}), *messages])):
        parts = (" ".join(part.split()) for part in re.split(r"\0|\d[\d,.]*", clause))
        found.add(tuple(part for part in parts if part))
    return {parts for parts in found if max(map(len, parts), default=0) >= 8}


def unsaid(line: str, clauses: set[tuple[str, ...]]) -> str:
    """Return three or more words in a row (12 letters) that are of no clause of the package which this line has; else nothing."""
    text = " ".join(line.split())
    left = list(text)
    for parts in clauses:
        if all(part in text for part in parts):
            for found in re.finditer(".*?".join(rf"(?<!\w)({re.escape(part)})(?!\w)" for part in parts), text):
                for number in range(1, len(parts) + 1):
                    start, end = found.span(number)
                    left[start:end] = "\0" * (end - start)
    runs = (found[0] for found in re.finditer(r"[^\W\d]+( [^\W\d]+){2,}", "".join(left)))
    return next((words for words in runs if len(words) >= 12), "")


MISTAKES = {  # what a newcomer does wrong -> the flags after --model, and files with their bytes
    "no data": ((), {}),
    "no such data": (("--data", "chat.jsonl"), {}),
    "a kind that is not read": (("--data", "a.docx"), {"a.docx": b"x"}),
    "an empty file": (("--data", "a.jsonl"), {"a.jsonl": b""}),
    "empty lines": (("--data", "a.jsonl"), {"a.jsonl": b"\n\n"}),
    "an old CSV": (("--data", "a.csv"), {"a.csv": b"prompt,completion\ncaf\xe9,b\n"}),
    "an old text": (("--data", "a.txt"), {"a.txt": b"caf\xe9"}),
    "a brace missing": (("--data", "a.jsonl"), {"a.jsonl": b'{"text": "a"'}),
    "columns of their own": (("--data", "a.csv"), {"a.csv": b"Frage,Antwort\na,b\n"}),
    "a used folder": (
        ("--data", "good", "--adapter-path", "used"),
        {"used/adapters.safetensors": b"x", "used/adapter_config.json": b"{}"},
    ),
    "no room": (("--data", "good", "--memory-budget", "1e-4"), {}),
    "another's flag": (("--data", "good", "--lora-r", "8"), {}),
    "no such model": (("--model", "Qwen3-0.6B", "--data", "good"), {}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_train_prints_is_on_the_page(mistake, tiny_folder, chats, tmp_path, monkeypatch):
    flags, files = MISTAKES[mistake]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    ran = run("train", "--model", tiny_folder, *(chats if flag == "good" else flag for flag in flags))
    assert ran.code == 2
    printed = ran.lines[-1]
    quoted = [re.escape(block.text.strip()).replace(r"\.\.\.", ".*") for block in ERRORS]
    assert [text for text in quoted if re.match(text, printed)], printed


# Other trainers' names.

BASES = {
    "Axolotl": {"base_model": "m", "datasets": [{"path": "d", "type": "chat_template"}], "adapter": "lora"},
    "LLaMA-Factory": {"model_name_or_path": "m", "stage": "sft", "finetuning_type": "lora"},
    "TRL": {"model_name_or_path": "m", "dataset_name": "d", "use_peft": True},
    "mlx-lm": {"model": "m", "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}},
}


def table_of(page: str, heading: str) -> list[tuple[str, str]]:
    """Return the rows of the tables under a heading whose first column is `there`."""
    section = (DOCS / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)`", section.split("| there | here |")[1], re.MULTILINE)
    return rows


def settings_of(flags: str) -> dict[str, object]:
    """Return what flags set, as their settings' types."""
    words, found = flags.split(), {}
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if name.startswith("no_"):
            found[name.removeprefix("no_")] = False
        elif not words or words[0].startswith("--"):
            found[name] = True
        else:
            found[name] = read_value(FIELDS[name], words.pop(0))
    return found


@pytest.mark.parametrize("trainer", BASES)
def test_keys_of_other_trainers_mean_what_the_page_says(trainer):
    dialect = next(d for d in DIALECTS if d.name == trainer)
    rows = table_of("coming-from.md", trainer)
    assert len(rows) >= 12
    without = dialect.read(dict(BASES[trainer]), "f").found
    for theirs, ours in rows:
        read = dialect.read({**BASES[trainer], **yaml.safe_load(theirs)}, "f").found
        for name, value in settings_of(ours).items():
            got = read.get(name)
            got = ",".join(got) if isinstance(got, list) else got
            assert read_value(FIELDS[name], got) == value, f"{theirs}: {name} {got}"
        assert read != without, f"{theirs} changes nothing, so this row shows nothing"


def test_unsloths_arguments_mean_what_the_page_says():
    rows = table_of("coming-from.md", "Unsloth")
    assert len(rows) >= 12
    for theirs, ours in rows:
        their_name, our_name = theirs.split(" = ")[0], ours.split("=")[0]
        assert our_name in FIELDS
        assert their_name == our_name or OTHER_NAMES[their_name] == our_name


# The pages themselves.


def test_links_between_files_of_the_checkout_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not re.match(r"^(https?:|#|mailto:)", target):
                assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]))
    assert listed == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def test_the_search_order_names_pages_and_sections_that_exist():
    order = module_of(DOCS / "search_order.py")
    assert {*order.PAGES, *order.WORDS} <= {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    sections = re.findall(r"^  - ([^:]+):$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert set(order.SECTIONS) <= set(sections)


def module_of(path: Path):
    """Return a Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_words_to_avoid_are_found_in_prose_and_not_in_code():
    module = module_of(ROOT / "scripts" / "prose.py")
    page = module.prose_of("The licence wants a 95 % share.\n```text\nlicence\n```\nSee `licence` and the license.\n")
    found = [(line, words.split("'")[1]) for _, line, words in module.avoided("page.md", page)]
    assert found == [(1, "licence"), (1, "wants a"), (1, "95 %")]


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    if shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs pip install 'mlx-lora[docs]'")
    copy = tmp_path / "checkout"
    for name in ("docs", "mlx_lora"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)

    def build() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]  # --quiet would hide warnings from --strict
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(copy)}
        return subprocess.run(
            command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    built = build()
    assert built.returncode == 0, built.stdout
    assert (copy / "build" / "site" / "troubleshooting.html").is_file()
    with open(copy / "docs" / "glossary.md", "a") as page:
        page.write("\n[a wrong anchor](memory.md#nowhere)\n")
    assert build().returncode != 0


@pytest.mark.slow
def test_the_table_of_what_fits_is_the_planners():
    printed = subprocess.run(
        [sys.executable, "scripts/fits_table.py"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    for page in (ROOT / "README.md", DOCS / "memory.md"):
        assert printed in page.read_text(), f"{page.name}: run python scripts/fits_table.py and put its table there"


def parse(words: tuple[str, ...]) -> click.Command:
    """Parse `mlx-lora` arguments, flags and values, without running anything.

    Raises:
        click.UsageError, ValueError: an option does not exist, or its value is not allowed.
    """
    if words[0].startswith("-"):
        return click.Command("mlx-lora")
    name, rest = words[0], list(words[1:])
    if name not in COMMANDS:
        raise click.UsageError(f"no command {name}")
    command = load_command(name, rest)
    if isinstance(command, click.Group):
        command = command.commands[rest.pop(0)]
    if isinstance(command, EvaluateCommand):
        command = command.chosen(rest)
    values, _, _ = command.make_parser(click.Context(command)).parse_args(rest)
    for setting, value in values.items():
        if setting in FIELDS and isinstance(value, str):
            read_value(FIELDS[setting], value)
    return command


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
    for of_gallery in (
        "benchmarks/first_result/shop.jsonl",
        "benchmarks/first_result/orders.jsonl",
        "data/preferences/style.jsonl",
    ):
        shutil.copy(ROOT / of_gallery, folder)
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
        self.output = ""
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
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(text, str(block), "exec"), self.names)
        self.output += printed.getvalue()
        self.ran.append(str(block))

    def run(self, command: Command) -> None:
        """Run one command, in this process where it ends by itself."""
        if command.words[0] == "curl":
            words = [word.replace(ADDRESS, self.address) for word in command.words]
            done = subprocess.run([*words, "--fail", "--silent"], check=True, stdout=subprocess.PIPE, text=True)
            self.output += done.stdout
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
        self.output += f"{ran.out}\n{ran.err}\n"
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
        longer = (
            ("--iters", "80") if "--learning-rate auto" in " ".join(words) else ()
        )  # it tries rates in a fifth of its steps
        return beaten(without(words, "--epochs", "--batch-size"), (*(longer or SHORT[:2]), *SHORT[2:], *fewer))
    if name == "train":
        return beaten(words, ("--iters", "3"))
    if name == "evaluate" and "--tasks" not in words:
        return beaten(words, ("--max-seq-length", LONGEST))
    return beaten(words, FEW.get(name, ()))


@pytest.mark.slow
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
    output = "\n".join([reader.output, *(log.read_text() for log in folder.glob("*.log"))])
    lines = [line for line in printed_of(blocks) if compared(line) and not reason_not_shown(line, NOT_OURS)]
    gone = [str(line) for line in lines if not is_printed(line.line, output)]
    assert not gone, "no command of the page prints this; mend it, or name it in NOT_SHOWN:\n" + "\n".join(gone)
    print(f"{page.name}: {len(reader.ran)} run, {len(lines)} lines compared")


@pytest.mark.parametrize("file", sorted((ROOT / "docs/gallery").glob("*.json")), ids=lambda file: file.stem)
def test_the_gallery_shows_its_runs(file, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gallery

    facts, page = json.loads(file.read_text(encoding="utf-8")), (ROOT / "docs/gallery.md").read_text(encoding="utf-8")
    assert facts["after"] != facts["before"]
    assert facts["minutes"] > 0
    assert facts["command"] in " ".join(page.replace("\\\n", " ").split())
    assert f"(gallery/{file.stem}.svg)" in page
    assert file.with_suffix(".svg").read_text(encoding="utf-8") == gallery.draw(facts)
