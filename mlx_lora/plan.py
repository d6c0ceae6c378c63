"""Predict before a download whether a training run fits, with which settings, and how fast it is.

python -m mlx_lora.plan --model Qwen/Qwen3-4B --chip "M2 Pro" --memory-gb 16
python -m mlx_lora.plan --model smollm2 --rank 64 --max-seq-length 4096 --json
python -m mlx_lora.plan --model config.json --all-chips
python -m mlx_lora.plan --model config.json --macs "M4 Pro:48,M2 Max:32"
"""

from __future__ import annotations

import re
from typing import Any

import click

from mlx_lora.api.plan_text import render
from mlx_lora.api.run_plan import plan_run
from mlx_lora.api.several_macs import LINK_GBIT, parse_macs, plan_on_macs, render_macs
from mlx_lora.settings import flags
from mlx_lora.settings.config import MEMORY
from mlx_lora.settings.resolve import train_settings
from mlx_lora.settings.settings_file import read_settings
from mlx_lora.system import console
from mlx_lora.system.errors import InputError
from mlx_lora.system.units import gigabytes

GIGABYTES = re.compile(r"(?P<number>\d{1,9})(\.0*)?\s*(gb?|gib)?", re.IGNORECASE)
MOST_GB = 4096


@click.command(cls=flags.Command)
@flags.config_option
@click.option("--chip", type=str, default=None, help='Plan for this chip ("M2 Pro") instead of this machine.')
@click.option(
    "--memory-gb",
    type=str,
    default=None,
    metavar="N",
    callback=lambda _, __, text: None if text is None else whole_gigabytes(text),
    help="Memory of the --chip in GB, such as 16 (default: the smallest size sold).",
)
@click.option("--all-chips", is_flag=True, help="Plan for every chip and memory size of the table.")
@click.option(
    "--macs",
    cls=console.Option,
    group=MEMORY,
    common=False,
    type=str,
    default=None,
    metavar="CHIP:GB,...",
    help='Plan for several Macs that share the base (--shard-base), such as "M4 Pro:48,M2 Max:32".',
)
@click.option(
    "--link-gbit",
    cls=console.Option,
    group=MEMORY,
    common=False,
    type=click.FloatRange(0.001, 10_000),
    default=LINK_GBIT,
    show_default=True,
    help="Gbit/s between the --macs, assumed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@flags.settings_options("model", "data", "adapter", "objective", "optimizer", "loop")
def main(
    config_file: str | None,
    chip: str | None,
    memory_gb: int | None,
    all_chips: bool,
    macs: str | None,
    link_gbit: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan the memory and predict the speed of `train` with these flags; no weights are read."""
    given = flags.given(options)
    settings = train_settings(given, read_settings(config_file, given, console.echo))
    if macs is not None:
        if chip or memory_gb or all_chips:
            raise InputError(
                "--macs with --chip, --memory-gb or --all-chips: it names chips and memory; keep one of them"
            )
        planned = plan_on_macs(settings, parse_macs(macs), link_gbit)
        console.print_json(planned) if as_json else click.echo(render_macs(planned))
        return
    result = plan_run(settings, chip, memory_gb, all_chips, console.echo)
    if as_json:
        console.print_json(result)
    elif all_chips:
        click.echo(render_chips(result["chips"]))
    else:
        click.echo(render(result))


def whole_gigabytes(text: str) -> int:
    """Return the number in `16`, `16GB` or `16 GB`.

    Raises:
        InputError: it is not a whole number of gigabytes that a Mac may have.
    """
    found = GIGABYTES.fullmatch(text.strip())
    number = int(found["number"]) if found else 0
    if not 1 <= number <= MOST_GB:
        raise InputError(f"--memory-gb {text}: not a whole number of GB from 1 to {MOST_GB}; write it as 16 or 16GB")
    return number


def render_chips(chips: list[dict[str, Any]]) -> str:
    """Return the table of chips as Markdown."""
    lines = ["| chip | GB | may use | peak | batch tokens | checkpointing | longest row | tokens/s, predicted |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in chips:
        speed = f"{row['tokens_per_s']:,.0f}" if row["fits"] else "does not fit"
        lines.append(
            f"| {row['chip']} | {row['memory_bytes'] >> 30} | {gigabytes(row['budget_bytes'])} "
            f"| {gigabytes(row['peak_bytes'])} | {row['batch_tokens']} | {row['grad_checkpoint']} "
            f"| {row['largest_sequence']:,} | {speed} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
