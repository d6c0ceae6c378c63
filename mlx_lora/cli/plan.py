"""Predict before a download whether a training run fits, with which settings, and how fast it is.

python -m mlx_lora plan --model Qwen/Qwen3-4B --chip "M2 Pro" --memory-gb 16
python -m mlx_lora plan --model smollm2 --rank 64 --max-seq-length 4096 --json
python -m mlx_lora plan --model config.json --all-chips
python -m mlx_lora plan --model config.json --macs "M4 Pro:48,M2 Max:32"
python -m mlx_lora plan --model config.json --macs 2 --all-chips
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from mlx_lora.api.plan import plan_run
from mlx_lora.api.plan_macs import LATENCY_S, LINK_GBIT, Given, equal_macs, parse_macs, plan_on_macs
from mlx_lora.api.plan_text import ASSUMED, render, render_equal_macs, render_macs
from mlx_lora.cli import options as flags
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.settings import MEMORY, TrainSettings
from mlx_lora.parallel.hosts import macs_of
from mlx_lora.planner.several_macs import Link
from mlx_lora.planner.speed import find_chip
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import gigabytes

GIGABYTES = re.compile(r"(?P<number>\d{1,9})(\.0*)?\s*(gb?|gib)?", re.IGNORECASE)
MOST_GB = 4096
MOST_MACS = 256


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
@click.option("--all-chips", is_flag=True, help="Plan for every Mac chip, with every memory size sold.")
@click.option(
    "--macs",
    cls=console.Option,
    group=MEMORY,
    common=False,
    type=str,
    default=None,
    metavar="CHIP:GB,...",
    help='Plan for several Macs that share the base (--shard-base), such as "M4 Pro:48,M2 Max:32" or "2 x M4 Max:64"; with '
    "--all-chips, how many equal Macs.",
)
@click.option(
    "--hostfile",
    cls=console.Option,
    group=MEMORY,
    common=False,
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="Plan for the Macs of a host file, which are asked over ssh, or of what `mlx-lora cluster --json` printed.",
)
@click.option(
    "--link-gbit",
    cls=console.Option,
    group=MEMORY,
    common=False,
    type=click.FloatRange(0.001, 10_000),
    default=None,
    help=f"Gbit/s between the Macs (default: as measured by `mlx-lora cluster`, otherwise {LINK_GBIT:g}, assumed).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@flags.settings_options("model", "data", "adapter", "objective", "optimizer", "loop")
def main(
    config_file: str | None,
    chip: str | None,
    memory_gb: int | None,
    all_chips: bool,
    macs: str | None,
    hostfile: Path | None,
    link_gbit: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Predict the memory and the speed of `train` with these flags, without reading any weights."""
    given = flags.given(options)
    settings = train_settings(given, read_settings(config_file, given))
    if macs is not None or hostfile is not None:
        if chip or memory_gb or (all_chips and not (macs or "").isdecimal()) or (macs and hostfile):
            raise InputError(
                "--macs, --hostfile, --chip, --memory-gb, --all-chips: they exclude each other; keep one, or write --macs 2 --all-chips "
                "for pairs"
            )
        planned, text = plan_several(settings, macs, hostfile, link_gbit)
        console.print_json(planned) if as_json else click.echo(text)
        return
    result = plan_run(settings, chip, memory_gb, all_chips)
    if as_json:
        console.print_json(result)
    elif all_chips:
        click.echo(render_chips(result["chips"]))
    else:
        click.echo(render(result))


def plan_several(
    settings: TrainSettings, macs: str | None, hostfile: Path | None, link_gbit: float | None
) -> tuple[dict[str, Any], str]:
    """Return a plan for several Macs, as JSON values and as text.

    Args:
        settings: of the run.
        macs, hostfile: the Macs as one of the two flags gives them; --macs 2 is every pair of equal ones.
        link_gbit: Gbit/s between them; None: as measured, or the default.
    """
    link, source = Link((link_gbit or LINK_GBIT) * 1e9 / 8, LATENCY_S), ASSUMED
    if macs and macs.isdecimal():
        if not 2 <= int(macs) <= MOST_MACS:
            raise InputError(f"--macs {macs} --all-chips: from 2 to {MOST_MACS} equal Macs can be planned")
        planned = equal_macs(settings, int(macs), link)
        return {"macs": planned}, render_equal_macs(planned)
    if hostfile is None:
        given = parse_macs(macs or "")
    else:
        found, measured = macs_of(hostfile)
        given = [Given(find_chip(mac.chip).name, mac.memory_gb, mac.working_set_bytes) for mac in found]
        if measured and link_gbit is None:
            link, source = Link(**measured), "the link's rate as `mlx-lora cluster` measured it"
    planned = plan_on_macs(settings, given, link)
    return planned, render_macs(planned, source)


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
