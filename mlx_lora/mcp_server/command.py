"""Let an assistant train in one folder, through the Model Context Protocol: mlx-lora mcp --root FOLDER."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from mlx_lora.api import options as flags
from mlx_lora.utils.errors import InputError


@click.command(cls=flags.ShortCommand)
@click.option(
    "--root", type=click.Path(path_type=Path), required=True,
    help="Folder with data, models and runs. Tools read and write nothing else, but for the caches of models.",
)  # fmt: skip
def main(root: Path) -> None:
    """Serve tools that plan, look at data, train, ask and export, on standard input and output."""
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder; make it, and put the data there")
    if importlib.util.find_spec("mcp") is None:
        raise InputError("mcp: the package mcp is not installed; pip install 'mlx-lora[mcp]'")
    from mlx_lora.mcp_server.server import Tools  # needs that package

    Tools(root.resolve()).server().run()
