"""Encode a large data set for the page in a process of its own, so that the server goes on answering.

python -m mlx_lora.studio.preview_worker REQUEST.json FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from mlx_lora.studio.preview_index import build_index
from mlx_lora.utils import console
from mlx_lora.utils.files import replacing_file

PROGRESS = "progress.json"


@click.command(cls=console.Command)
@click.argument("request", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
def main(request: Path, folder: Path) -> None:
    """Write the index of the data that REQUEST names into FOLDER."""
    asked = json.loads(request.read_text(encoding="utf-8"))

    def report(done: int, total: int | None) -> None:
        with replacing_file(request.with_name(PROGRESS)) as temporary:
            temporary.write_text(json.dumps([done, total]), encoding="utf-8")

    build_index(asked, folder, report)


if __name__ == "__main__":
    sys.exit(main())
