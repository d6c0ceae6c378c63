"""`mlx-lora X` and `python -m mlx_lora X`: the group of all commands, each loaded when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import PurePath
from shlex import quote

import click

from mlx_lora import __version__
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError

COMMANDS = {
    "convert": "Convert a model from the hub, a folder or a GGUF file to MLX's format.",
    "plan": "Predict whether a run fits in memory, and how fast it is.",
    "train": "Train an adapter.",
    "migrate": "Say what another trainer's settings file means here, and write it with our names.",
    "evaluate": "Measure base and adapter on a data file, side by side.",
    "generate": "Generate text.",
    "predict": "Label texts with a classifier.",
    "chat": "Chat with a model and its adapters in the terminal.",
    "bench": "Measure training with fixed workloads, and compare machines.",
    "serve": "Serve a model and many adapters through OpenAI's HTTP API.",
    "studio": "Open a local page for models, data, training, runs, chat and export.",
    "fuse": "Merge an adapter into its base model.",
    "sweep": "Find good settings with many short runs.",
    "embed": "Compute the vectors of texts, for search.",
    "rephrase": "Write other wordings of the questions in a data file, to look at and edit before training.",
    "mine": "Find documents that look like answers but are not, to train embeddings with.",
    "merge": "Merge several adapters of one base into one adapter.",
    "demo": "Train a small model to answer in verse. This takes two to six minutes.",
    "status": "Tell how a run goes, or what became of it.",
    "mcp": "Let an assistant train in one folder, through the Model Context Protocol.",
    "doctor": "Check that this machine is ready to train.",
    "cluster": "Check that several machines are ready to train together.",
    "export": "Export an adapter, or a model with it, for PEFT, transformers, llama.cpp or Ollama.",
}
# What people of other trainers type first -> what to type here.
OTHER_WORDS = {
    **dict.fromkeys(("finetune", "fine-tune", "lora", "qlora"), "train --model MODEL --data FILE"),
    **dict.fromkeys(("eval", "test"), "evaluate --model MODEL --adapter-path FOLDER"),
    **dict.fromkeys(("preprocess", "validate", "data"), "train --model MODEL --data FILE --dry-run"),
    **dict.fromkeys(("config-schema", "generate-cli-config-options", "agent-docs", "schema"), "--json-schema train"),
    **dict.fromkeys(
        ("quant", "dwq", "awq", "gptq", "dynamic_quant", "fetch", "delinearize-llama4"),
        "convert --model MODEL --bits 4",
    ),
    **dict.fromkeys(("claude", "codex", "hermes", "openclaw", "opencode", "pi"), "mcp --root FOLDER"),
    **dict.fromkeys(("setup", "update", "verify-install", "env", "desktop-capabilities"), "doctor"),
    **dict.fromkeys(("ls", "cp", "cat"), "train --help"),
    **dict.fromkeys(("stop", "reset-password", "provision-desktop-auth"), "studio --help"),
    "merge-sharded-fsdp-weights": "fuse --model MODEL --adapter-path FOLDER --out FOLDER",
    "vllm-serve": "serve --model MODEL",
    **dict.fromkeys(("infer", "inference", "ask"), "generate --model MODEL --prompt TEXT"),
    "run": "chat --model MODEL",
    **dict.fromkeys(("quantize", "download", "pull"), "convert --model MODEL --bits 4"),
    **dict.fromkeys(("server", "api"), "serve --model MODEL"),
    **dict.fromkeys(("webui", "webchat", "gui", "ui", "app"), "studio"),
    **dict.fromkeys(("merge-lora", "merge_lora"), "fuse --model MODEL --adapter-path FOLDER --out FOLDER"),
    **dict.fromkeys(("push", "upload"), "export --adapter-path FOLDER --to peft --out FOLDER --push-to-hub REPO"),
    **dict.fromkeys(("env", "check", "info"), "doctor"),
}
# The commands of other applications than cli.
ELSEWHERE = {
    "bench": "bench.command",
    "doctor": "bench.doctor.command",
    "mcp": "mcp_server.command",
    "serve": "serving.command",
    "serve --training": "training_server.command",
    "studio": "studio.command",
}


def load_command(name: str, args: Sequence[str] = ()) -> click.Command:
    """Import a command.

    Args:
        name: one of COMMANDS.
        args: what follows the name: `serve --training` is another application than `serve`.
    """
    training = [arg for arg in args if arg in ("--training", "--no-training")][-1:] == ["--training"]
    home = ELSEWHERE.get("serve --training" if name == "serve" and training else name, f"cli.{name}")
    return importlib.import_module(f"mlx_lora.{home}").main


def meant_by(word: str) -> str | None:
    """Return the command for a first word that is none: an objective, a file, or another program's word; None: it is not known."""
    from mlx_lora.config.objectives import OBJECTIVES

    end, row = PurePath(word).suffix.lower(), OBJECTIVES.get(word)
    if row is not None:
        needed = " --reward REWARD" if row.rewarded else " --teacher MODEL" if row.taught else ""
        return f"train --model MODEL --data FILE --objective {word}{needed}"
    flag = "--config" if end in (".yaml", ".yml") else "--model MODEL --data"
    is_file = end in (".yaml", ".yml", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".xlsx")
    return f"train {flag} {quote(word)}" if is_file else OTHER_WORDS.get(word)


class LazyGroup(console.Group):
    """Imports a command's module only when it runs, so that --help is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["help"]:  # mlx-lora help train
            args = [*args[1:2], "--help"]
        elif args == ["version"]:
            args = ["--version"]
        elif args and not args[0].startswith("-") and args[0] not in COMMANDS and (meant := meant_by(args[0])):
            raise InputError(f"{args[0]}: no such command; write mlx-lora {meant}")
        elif args[1:] and args[0] in COMMANDS:
            from mlx_lora.api.options import look_at_flags  # --version needs none of it

            look_at_flags(args[0], args[1:])
        ctx.meta["args"] = args[1:]
        return super().parse_args(ctx, args)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return load_command(name, ctx.meta.get("args", ())) if name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))
        formatter.write_paragraph()
        formatter.write_text("mlx-lora help COMMAND, or mlx-lora COMMAND --help, describes one command.")


def print_schema(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
    """Print what --json-schema asks for, and end."""
    if name is not None:
        from mlx_lora.api.options import command_schema  # --version needs none of it

        console.print_json(command_schema(name, load_command(name)))
        ctx.exit()


@click.command(cls=LazyGroup)
@click.version_option(__version__)
@click.option(
    "--json-schema", type=click.Choice([*COMMANDS]), metavar="COMMAND", is_eager=True, expose_value=False,
    callback=print_schema, help="Print JSON schemas of a command's options, and of what its --json prints.",
)  # fmt: skip
def main() -> None:
    """Train LoRA and QLoRA adapters with MLX. To see how it works, run mlx-lora demo."""


if __name__ == "__main__":
    main(prog_name="mlx-lora")
