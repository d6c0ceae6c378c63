"""Say what each key of another trainer's settings file becomes here, and write the file with our names.

python -m mlx_lora migrate axolotl.yml --out run.yaml
"""

from __future__ import annotations

from pathlib import Path

import click
import yaml

from mlx_lora.api import options as flags
from mlx_lora.config.load import read_yaml
from mlx_lora.config.migrate import table
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError


@click.command(cls=flags.ShortCommand)
@click.argument("settings", metavar="FILE")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Settings file to write, for train --config."
)
@click.option("--force", is_flag=True, help="Replace --out.")
@flags.json_option({
    "trainer": "string: whose file it is",
    "keys": "object: each key of the file -> what it becomes here",
    "settings": "object: what train would take",
    "assumed": "object: those of the settings that are the trainer's defaults",
    "notes": "array: what is said in other words here, a sentence each",
    "refused": "array: keys that ask for what is not here, each with the reason",
})  # fmt: skip
def main(settings: str, out: Path | None, force: bool, as_json: bool) -> None:
    """Print what each key of a file of Axolotl, LLaMA-Factory, TRL, torchtune, Unsloth, mlx-lm, or mlx-lm-lora becomes."""
    content = read_yaml(settings)
    dialect, sheet, decides = table(content, settings)
    if out is not None:
        flags.NewFile(out, force).check([Path(settings)])

    def told(key: str) -> str:
        refused = [line for line in sheet.refused if line.split(" ")[0].split(".")[0] == key]
        ours = [f"{name} {value}" for name, value in decides[key].items()]
        harmless = any(name.split(".")[0] == key for name in sheet.harmless)
        return "; ".join([*refused, *ours]) or ("changes no result" if harmless else f"{dialect.name}'s default")

    rows = {key: told(key) for key in content}
    if as_json:
        lines = {"notes": sheet.notes, "refused": sheet.refused}
        console.print_json(
            {"trainer": dialect.name, "keys": rows, "settings": sheet.found, "assumed": sheet.assumed} | lines
        )
    else:
        assumed = ", ".join(f"{name} {value}" for name, value in sheet.assumed.items())
        width = max(map(len, rows))
        click.echo("\n".join(f"{key:<{width}}  {text}" for key, text in rows.items()))
        click.echo(
            "\n".join(
                ["", f"{dialect.name}'s defaults for what it leaves out: {assumed}" * bool(assumed), *sheet.notes]
            )
        )
    if sheet.refused:
        raise InputError(
            f"{settings} asks for what is not here: {'; '.join(sheet.refused)}. A copy without these keys can be trained"
        )
    if out is not None:
        out.write_text(yaml.safe_dump(sheet.found, sort_keys=False, allow_unicode=True), encoding="utf-8")
