"""Tell how a run goes, or what became of it.

python -m mlx_lora status --adapter-path my-adapter
python -m mlx_lora status --adapter-path my-adapter --json
"""

from __future__ import annotations

from pathlib import Path

import click

from mlx_lora.api import options as flags
from mlx_lora.cli.forms import RESULT
from mlx_lora.utils import console


@click.command(cls=flags.ShortCommand)
@click.option("--adapter-path", type=click.Path(path_type=Path), required=True, help="The run's folder.")
@flags.json_option(RESULT)
def main(adapter_path: Path, as_json: bool) -> None:
    """Tell how a run goes, or what became of it: its verdict, the numbers behind it, and what to do next."""
    from mlx_lora.reports.run_report import read_result  # slow to import, and --help does not need it

    found = read_result(adapter_path)
    if as_json:
        console.print_json(found)
        return
    lines = [f"{found['state']}, {found['steps']:,} steps", found["headline"], *(found["notes"] or ())]
    for line in filter(None, [*lines, found["mend"], found["mend_command"], *found["next_commands"]]):
        click.echo(line)
