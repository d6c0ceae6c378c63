"""The pages keep their word: flags exist, quoted errors occur, other trainers' keys mean what the tables say."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from page_blocks import NOT_RUN, PAGES, ROOT, Block, Command, all_blocks, blocks_of, commands_of, reason_not_to_run
from page_parsing import parse
from run_cli import run

from mlx_lora.config.fields import read_value
from mlx_lora.config.load import OTHER_NAMES
from mlx_lora.config.migrate import DIALECTS
from mlx_lora.config.settings import FIELDS

DOCS = ROOT / "docs"
COMMANDS = [command for block in all_blocks() for command in commands_of(block)]
SCRIPT = re.compile(r"^(benchmarks|scripts|data|tests)/\w+\.py$")


def test_every_flag_of_every_command_exists():
    ours = [command for command in COMMANDS if command.ours]
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
    for command in COMMANDS:
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
    without = [str(c) for c in COMMANDS if not c.ours and not reason_not_to_run(c) and c.words[0] != "curl"]
    assert not without, "\n".join(without)


def test_every_reason_has_a_command():
    idle = [start for start in NOT_RUN if not any(re.match(start, shlex.join(c.words)) for c in COMMANDS)]
    assert not idle


def test_every_block_says_what_it_is():
    known = {"bash", "console", "json", "python", "text", "toml", "yaml"}
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


def messages_of_the_package() -> list[str]:
    """Return every string of the package, an f-string with a NUL for each value in it."""
    found = []
    for path in (ROOT / "mlx_lora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def occurs(quoted: str, messages: list[str]) -> bool:
    """Tell whether a message has all parts of a quoted error, in order; dots stand for values."""
    parts = [part for part in quoted.split("...") if part.strip(" ;:,()")]
    return any(in_order(parts, message) for message in messages if parts[0] in message)


def in_order(parts: list[str], message: str) -> bool:
    """Tell whether the parts stand in a message one after the other."""
    place = 0
    for part in parts:
        place = message.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_every_quoted_error_occurs_in_the_package():
    messages = messages_of_the_package()
    blocks = [block for block in blocks_of(DOCS / "troubleshooting.md") if block.text.startswith("Error: ")]
    assert len(blocks) >= 25
    gone = [str(b) + " " + b.text for b in blocks if not occurs(b.text.removeprefix("Error: "), messages)]
    assert not gone, "\n".join(gone)
    assert not occurs("--out ...: exists and is not empty; give a new folder, or two", messages)


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
    blocks = [
        block.text.strip() for block in blocks_of(DOCS / "troubleshooting.md") if block.text.startswith("Error: ")
    ]
    quoted = [re.escape(text).replace(r"\.\.\.", ".*") for text in blocks]
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
    shutil.copy(ROOT / "mkdocs.yml", copy)

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
