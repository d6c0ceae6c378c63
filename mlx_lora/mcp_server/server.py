"""The tools of the server: each is a command with --json, in a process of its own.

In one process they would be in each other's way: a plan exchanges functions of MLX while it reads the graph of a step, and MLX
ends a process that runs out of memory. A training run that is no longer wanted gets SIGTERM, and saves what it has.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import Any, Literal

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from mlx_lora import __version__
from mlx_lora.config.fields import flag_words
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import COLUMNS
from mlx_lora.data.data_sets import all_files
from mlx_lora.utils.console import printable
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import HUB_ID, SMALL_MODEL

# Settings that an assistant may give. None of them names a file, an address or code.
SETTINGS = (
    *COLUMNS, "data_format", "mask_prompt", "max_seq_length", "valid_fraction", "bits", "dtype", "method", "rank", "alpha", "dropout",
    "learning_rate", "lr_schedule", "warmup", "weight_decay", "epochs", "iters", "batch_size", "batch_tokens", "steps_per_eval",
    "steps_per_report", "keep_best", "early_stopping_patience", "rephrase", "sample_tokens", "seed", "memory_budget",
)  # fmt: skip
Settings = dict[str, str | int | float | bool]
Format = Literal["peft", "mlx-lm", "mlx-swift", "hf", "gguf-adapter", "gguf", "ollama"]
MOST_BYTES = 2**26  # of a line of JSON
INSTRUCTIONS = """Train a LoRA adapter for a person, on this machine. All paths are in {root}.
1. check_data: read data_report (dropped, duplicates, notes, example), and tell the person what is wrong before you train.
2. plan: train only if fits is true; predicted.hours says how long it takes. If it does not fit, do what advice says.
3. train into a new folder. Give questions in other words, with their answers, as `questions`: they decide the verdict.
4. If verdict is not learned, do what mend says, into another folder. Report numbers, not impressions.
5. ask: answer a prompt, or count the right answers of base and adapter to a file of questions. 6. export for another program."""


class Tools:
    """The tools, and the folder that they may use.

    Args:
        root: the folder, without links in its name.
    """

    def __init__(self, root: Path):
        self.root = root

    def server(self) -> MCPServer:
        """Return the server."""
        about = INSTRUCTIONS.format(root=self.root)
        server = MCPServer("mlx-lora", version=__version__, instructions=about, log_level="WARNING")
        for tool in (self.plan, self.check_data, self.train, self.status, self.ask, self.export):
            server.tool()(tool)
        return server

    async def plan(self, model: str, data: str = "", settings: Settings | None = None) -> dict[str, Any]:
        """Predict whether a run fits in memory, and how long it takes. Read fits, advice, steps, predicted.hours, warnings."""
        return await self._run("plan", *self._of_run(model, data, settings))

    async def check_data(self, model: str, data: str, settings: Settings | None = None) -> dict[str, Any]:
        """Read the data as a run would, and plan the run; nothing is trained. Read data_report."""
        with tempfile.TemporaryDirectory() as folder:  # without an earlier run
            return await self._run(
                "train", *self._of_run(model, data, settings), "--dry-run", f"--adapter-path={folder}"
            )

    async def train(
        self, model: str, data: str, out: str, ctx: Context, questions: str = "", settings: Settings | None = None
    ) -> dict[str, Any]:
        """Train an adapter into the new folder `out`. Read verdict, headline, right_in_new_words, mend.

        `questions` is a file of test questions in other words, with their answers. A run takes as long as `plan` says.
        """
        asked = [f"--ask={self._data('questions', questions)}"] if questions else []
        folder = f"--adapter-path={self._path('out', out)}"
        return await self._run("train", *self._of_run(model, data, settings), *asked, folder, ctx=ctx)

    async def status(self, adapter: str) -> dict[str, Any]:
        """Tell how a run goes, or what became of it. Read state, verdict, headline, mend, next_commands."""
        return await self._run("status", f"--adapter-path={self._path('adapter', adapter)}")

    async def ask(self, model: str, adapter: str = "", prompt: str = "", questions: str = "") -> dict[str, Any]:
        """Answer a prompt (read text), or a file of questions with answers, with base and adapter (read right, examples)."""
        if bool(prompt) == bool(questions):
            raise ToolError("prompt and questions: one of the two is needed; give a prompt, or a file of questions")
        words = [f"--model={self._model(model)}"]
        words += [f"--adapter-path={self._path('adapter', adapter)}"] if adapter else []
        if prompt:
            return await self._run("generate", *words, f"--prompt={prompt}")
        return await self._run("evaluate", *words, f"--data={self._data('questions', questions)}", "--show=100")

    async def export(self, model: str, adapter: str, to: Format, out: str) -> dict[str, Any]:
        """Write an adapter, or the model with it, for another program. Read files, next_commands."""
        words = [f"--adapter-path={self._path('adapter', adapter)}", f"--to={to}", f"--out={self._path('out', out)}"]
        return await self._run("export", f"--model={self._model(model)}", *words)

    def _path(self, name: str, text: str) -> Path:
        """Return the whole path of a file or folder.

        Raises:
            ToolError: it is outside of the root, or a link leads out, also one in the folder.
        """
        whole = self.root / text
        inside = all(one.resolve().is_relative_to(self.root) for one in (whole, *whole.rglob("*")))
        if not inside or ".." in Path(text).parts:
            raise ToolError(f"{name} {printable(text)}: outside of {self.root}; name what is in it, without ..")
        return whole.resolve()

    def _model(self, text: str) -> str:
        """Return a model's folder or file, or its id on the hub."""
        on_hub = HUB_ID.fullmatch(text) and ".." not in text and not (self.root / text).exists()
        return text if on_hub or text == SMALL_MODEL else str(self._path("model", text))

    def _data(self, name: str, text: str) -> Path:
        """Return a data file or folder.

        Raises:
            ToolError: it is not there, or some of its files are outside of the root.
        """
        whole = self._path(name, text)
        if not whole.exists():
            raise ToolError(f"{name} {printable(text)}: no such file or folder in {self.root}; put the data there")
        try:  # a folder's table of data sets may name files elsewhere
            for file in all_files(train_settings({"data": str(whole)}).data.data or ""):
                self._path(name, str(file.path))
        except InputError as error:
            raise ToolError(printable(str(error))) from None
        return whole

    def _of_run(self, model: str, data: str, settings: Settings | None) -> list[str]:
        """Return the flags of a run.

        Raises:
            ToolError: a setting is none of SETTINGS.
        """
        if refused := [name for name in settings or {} if name not in SETTINGS]:
            raise ToolError(
                f"settings {printable(', '.join(refused))}: not among those that cannot name code, files or addresses; leave "
                f"them out, or ask the person to run the command. There are {', '.join(SETTINGS)}"
            )
        given = [f"--data={self._data('data', data)}"] if data else []
        return [f"--model={self._model(model)}", *given, *flag_words(settings or {})]

    async def _run(self, *words: str, ctx: Context | None = None) -> dict[str, Any]:
        """Run a command, tell the progress of training, and return the last object that it prints.

        Raises:
            ToolError: it failed; with the command's own line.
        """
        # With a safe path, Python files in the root do not take the place of packages.
        command, safe = [sys.executable, "-m", "mlx_lora", *words, "--json"], {**os.environ, "PYTHONSAFEPATH": "1"}
        found, steps = dict[str, Any](), None
        with tempfile.TemporaryFile() as log:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=self.root, env=safe, stdin=DEVNULL, stdout=PIPE, stderr=log, limit=MOST_BYTES
            )
            try:
                while process.stdout and (line := await process.stdout.readline()):
                    found = json.loads(line)
                    steps = found["steps"] if found.get("event") == "start" else steps
                    if ctx is not None and found.get("event") == "report":
                        names = [name for name in ("loss", "val_loss") if found[name] is not None]
                        said = ", ".join(f"{name} {found[name]:.4f}" for name in names)
                        await ctx.report_progress(found["step"], steps, said)
                code = await process.wait()
            except BaseException:  # nobody waits for it any more
                process.terminate()
                raise
            log.seek(0)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        if code or not found:
            raise ToolError(printable(lines[-1].removeprefix("Error: ") if lines else f"it ended with code {code}"))
        return found
