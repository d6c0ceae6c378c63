"""Fenced blocks of the pages, the commands and the printed lines in them, and why some are not run or not compared."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKILL = ROOT / "skills" / "mlx-lora" / "SKILL.md"
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", SKILL, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?P<more>[^`\n]*)$")
TITLE = re.compile(r'title="([^"]+)"')
VARIABLE = re.compile(r"^[A-Z_]+=\S*$")
TYPED = re.compile(
    r"(from|import) \w|%pip |mlx-lora "
)  # how a text begins that nothing prints: a reader types it elsewhere


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


@dataclass(frozen=True)
class Printed:
    """A line that a page shows as printed; `command` is the last one that the page gives before it, None before the first."""

    block: Block
    command: Command | None
    line: str

    def __str__(self) -> str:
        return f"{self.block}: {self.line}"


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


def printed_of(blocks: list[Block]) -> list[Printed]:
    """Return the lines of a page's blocks that are shown as printed: those of `text` without a title, and of `console`."""
    found: list[Printed] = []
    command = None
    for block in blocks:
        shown = block.language == "console" or (block.language == "text" and not block.title)
        if not shown or TYPED.match(block.text):
            command = [command, *commands_of(block)][-1]
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            if block.language == "console" and line.startswith("$ "):
                command = _command(block, line[2:])
            elif line.strip(" ."):
                found.append(Printed(block, command, line.strip()))
    return found


def skeleton(line: str) -> str:
    """Return a printed line with what may differ made equal: numbers, their bytes' thousands, paths, spaces."""
    line = re.sub(r"[\w.~-]*/[\w./-]+", "/", line)
    line = re.sub(r"\d[\d,.]*(e[+-]?\d+)?", "#", line)
    return " ".join(re.sub(r"# [kMGT]B\b", "# B", line).split())


def is_printed(line: str, output: str) -> bool:
    """Tell whether a line of an output has the words of a page's line in order; `...` stands for any."""
    wanted = re.compile(re.escape(skeleton(line)).replace(r"\.\.\.", ".*"))
    return any(wanted.search(skeleton(text)) for text in output.splitlines())


def all_blocks() -> list[Block]:
    """Return every fenced block of every page."""
    return [block for page in PAGES for block in blocks_of(page)]


# The beginning of a command, as a regular expression -> why no test runs it.
NOT_RUN = {
    r"(pip|pipx|uv tool) install|uvx|brew install": "installs from the network; the wheel's own test installs it",
    r"make setup|python3 -m venv|source ": "makes the environment that the tests run in",
    r"make (fuzz|gate|golden|soak|demo|test|rehearse)": "takes from minutes to an hour",
    r"mlx-lora demo": "downloads a model and trains for minutes; the demo's own test runs it on a tiny one",
    r"mlx-lora train .*--own-prompts": "needs a model that can write prompts; test_persona.py runs it on a tiny one",
    r"mlx-lora (train|generate) .*(tools|calls)\.jsonl": "tools are longer than the tests' short rows; test_data_report.py has such rows",
    r"mlx-lora (train|evaluate) .*prices\.jsonl": "schemas of tools are longer than the tests' short rows; test_tool_run.py has them",
    r"mlx-lora (train|evaluate) .*--data mails(/| |$)": "needs the mails that a script makes; test_scores.py has others",
    r"mlx-lora train .*reasoning-gym:": "needs an extra; test_task_sets.py has a stand-in for it",
    r"(PYTHONPATH=\S+ )?mlx-lora train .*verifiers:": "needs an extra; test_verifiers_run.py runs others where it is installed",
    r"mlx-lora evaluate .*--tasks (arc_easy|list)": "needs the network, or reads 14,000 files; test_harness.py runs tasks with local data",
    r"mlx-lora \w+ .*(all-MiniLM-L6-v2|--model minilm )": "needs an encoder; test_embed_command.py and test_sentence_transformers.py have tiny ones",
    r"mlx-lora \w+ .*(ModernBERT|cross-encoder/)": "needs an encoder; test_encoder_heads_parity.py has tiny ones",
    r"mlx-lora \w+ .*(SmolVLM|small-vlm)": "needs a vision-language model and pictures; test_vision_run.py and its neighbors have tiny ones",
    r"curl .*/v1/embeddings": "needs an encoder; test_serving_embeddings.py asks a server with one",
    r"mlx-lora bench (run|compare|report)": "measures for minutes; test_suite.py runs a tiny workload",
    r"mlx-lora doctor --full": "checks for minutes; test_owner_kit.py runs the parts",
    r"mlx-lora mcp ": "serves until its client ends; test_mcp_server.py drives it",
    r"mlx-lora serve .*--adapter tool-adapter": "needs the adapter of the rows with tools; test_tool_run.py has one",
    r"mlx-lora sweep .*--vary": "trains dozens of runs; test_sweep.py has smaller ones",
    r"mlx-lora serve .*--training": "needs Tinker's client; test_training_client.py runs it against such a server",
    r"mlx-lora fuse .*--(compensate|bits-budget)": "needs a quantized base; test_compensate.py has one",
    r"mlx-lora export .*--push-to-hub": "needs an account on the hub; test_hub.py uploads to a stand-in",
    r"mlx-lora export .*--to (lmstudio|mlx-swift|ollama .*--create)": "needs another program; test_other_apps.py has stand-ins",
    r"ollama ": "needs Ollama; test_ollama.py reads its Modelfile",
    r"llama-(cli|server) ": "needs llama.cpp; test_gguf_adapter.py judges with its library",
    r"lms ": "needs LM Studio; test_other_apps.py has directories laid out like its own",
    r"llama-mtmd-cli ": "needs llama.cpp; test_gguf_mmproj_llamacpp.py judges with its library",
    r"hf upload": "needs an account on the hub",
    r"(ssh|ssh-keygen|ssh-copy-id|rsync|git clone|cd|ibv_devices)( |$)": "sets up two Macs",
    r"mlx-lora (cluster|plan .*--hostfile) ?": "needs two Macs; test_cluster.py and test_macs_plan.py run it in two processes",
    r"mlx-lora convert .*~/models/": "converts a 70B model",
    r"caffeinate ": "needs two Macs",
    r"(env .*)?mlx\.(launch|distributed_config)": "needs two Macs; test_distributed.py runs two ranks on one machine",
    r"python (benchmarks|scripts)/": "measures for minutes, or needs a real model",
    r"python -m tinker_cookbook\.": "needs the cookbook, a server and minutes",
    r"python -m architectures\.": "trains dozens of models; a test of each architecture has a smaller one",
    r"python -m parity\.": "needs a real model and minutes; test_benchmarks.py and test_parity_families.py run it on tiny ones",
    r"(python -m )?pytest": "is a test itself",
    r"(PYTHONPATH=\S+ )?python -m golden": "takes minutes; test_golden.py runs it",
}


def reason_not_to_run(command: Command) -> str | None:
    """Return why no test runs a command; None if one does."""
    text = shlex.join(command.words)
    return next((why for start, why in NOT_RUN.items() if re.match(start, text)), None)


# The beginning of a printed line, or of the command that prints it, as a regular expression -> why the short run on the stand-in does
# not print it. The package must still have its words.
NOT_SHOWN = {
    r"(Error|ImportError|Warning): |note  ": "is printed when something is wrong, or for such rows; other tests bring it about",
    r"Chosen for ": "the tests' runs are given their length; test_defaults.py has what is chosen",
    r"Learned|Knows |Overfitted |Held-out ": "judges a run that is long enough; test_answer_counts.py has the verdicts",
    r"mine .*better|base .*interval": "needs more rows, and an adapter that is better",
    r"Predicted: ": "is said of a larger model on a Mac",
    r"mlx-lora plan .*Qwen": "plans a larger model than the stand-in",
}
# The same, of lines whose words are not the package's -> who says them.
NOT_OURS = {
    r"mlx-lora (generate|chat) ": "a model",
    r".*(↵|⟧|lines …)$": "a row of the data",
    r"pytest ": "the tests",
}


def reason_not_shown(printed: Printed, reasons: dict[str, str] = NOT_SHOWN) -> str | None:
    """Return why the tests' run of a command does not print a line, or the block that it is in; None if it does."""
    texts = (printed.line, printed.block.text, shlex.join(printed.command.words) if printed.command else "")
    return next((why for start, why in reasons.items() if any(re.match(start, text) for text in texts)), None)
