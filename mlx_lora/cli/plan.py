"""Predict before a download whether a training run fits, with which settings, and how fast it is.

python -m mlx_lora plan --model Qwen/Qwen3-4B --chip "M2 Pro" --memory-gb 16
python -m mlx_lora plan --model smollm2 --rank 64 --max-seq-length 4096 --json
python -m mlx_lora plan --model config.json --all-chips
python -m mlx_lora plan --model config.json --macs "M4 Pro:48,M2 Max:32"
python -m mlx_lora plan --model config.json --macs 2 --all-chips
python -m mlx_lora plan --config run.yaml --sweep 4x
python -m mlx_lora plan --model smollm2 --clients 4 --rank 32
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.api.plan import (
    LATENCY_S,
    LINK_GBIT,
    MacSpec,
    choose_machine,
    equal_macs,
    parse_macs,
    plan_on_macs,
    plan_run,
)
from mlx_lora.api.plan_clients import MOST_CLIENTS, plan_training_server
from mlx_lora.cli import PAGES
from mlx_lora.cli.forms import PLAN
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.rules import check_options
from mlx_lora.config.settings import MEMORY, TrainSettings
from mlx_lora.config.sweep import BUDGET, read_budget
from mlx_lora.parallel.hosts import macs_of
from mlx_lora.planner.several_macs import Link
from mlx_lora.planner.speed import find_chip
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import counted

GIGABYTES = re.compile(r"(?P<number>\d{1,9})(\.0*)?\s*(gb?|gib)?", re.IGNORECASE)
MOST_GB = 4096
MOST_MACS = 256


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


@click.command(cls=flags.SettingsCommand)
@flags.config_option
@click.option("--chip", type=str, default=None, help='Plan for this chip ("M2 Pro") instead of this machine.')
@click.option(
    "--memory-gb",
    type=str,
    default=None,
    metavar="N",
    callback=lambda _, __, text: text and whole_gigabytes(text),
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
@click.option(
    "--sweep",
    cls=console.Option,
    group=MEMORY,
    common=False,
    type=str,
    default=None,
    is_flag=False,
    flag_value=f"{BUDGET:g}x",
    metavar="[Nx]",
    help=f"Plan a sweep of the run with this budget, as `mlx-lora sweep --budget` takes it (default: {BUDGET:g}x).",
)
@click.option(
    "--clients",
    cls=console.Option,
    group=MEMORY,
    common=False,
    type=click.IntRange(1, MOST_CLIENTS),
    default=None,
    metavar="N",
    help="Plan a training server (`serve --training`) with this many clients, each with an adapter of --rank.",
)
@flags.json_option(
    PLAN,
    {"macs": "array: the parts of several Macs (--macs, --hostfile); other names are as in this object"},
    {"clients": "integer: of a training server (--clients)"},
)
@flags.settings_options("model", "data", "adapter", "objective", "optimizer", "loop")
def main(
    config_file: str | None, allow_code: bool, chip: str | None, memory_gb: int | None, all_chips: bool, macs: str | None,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Predict the memory and the speed of `train` with these flags, without reading any weights."""
    hostfile, link_gbit = given.pop("hostfile"), given.pop("link_gbit")
    sweep, clients = given.pop("sweep"), given.pop("clients")
    asked = {
        "config": config_file,
        "allow_code": allow_code,
        "chip": chip,
        "memory_gb": memory_gb,
        "all_chips": all_chips,
        "macs": macs,
    }
    asked |= {"hostfile": hostfile, "link_gbit": link_gbit, "sweep": sweep, "clients": clients, **given}
    check_options("plan", asked)
    budget = None if sweep is None else read_budget(sweep)
    settings = train_settings(given, read_settings(config_file, given, allow_code))
    if clients is not None:
        planned = plan_training_server(settings, clients, choose_machine(settings, chip, memory_gb)[0])
        text = render_plan("clients", planned, ceiling=MOST_CLIENTS)
    elif macs is not None or hostfile is not None:
        planned, text = plan_several(settings, macs or "", hostfile, link_gbit)
    else:
        planned = plan_run(settings, chip, memory_gb, all_chips)
        if budget is not None:
            planned["sweep"] = {"budget": budget, "runs_at_once": planned["runs_at_once"]}
        text = render_plan("chips" if all_chips else "plan", planned)
    console.print_json(planned) if as_json else click.echo(text)


def plan_several(
    settings: TrainSettings, macs: str, hostfile: Path | None, link_gbit: float | None
) -> tuple[dict[str, Any], str]:
    """Return a plan for several Macs, as JSON values and as text.

    Args:
        settings: of the run.
        macs, hostfile: the Macs as one of the two flags gives them; --macs 2 is every pair of equal ones.
        link_gbit: Gbit/s between them; None: as measured, or the default.
    """
    link, source = Link((link_gbit or LINK_GBIT) * 1e9 / 8, LATENCY_S), "an assumed rate of the link (--link-gbit)"
    if macs.isdecimal():
        if not 2 <= int(macs) <= MOST_MACS:
            raise InputError(f"--macs {macs}: from 2 to {MOST_MACS} equal Macs can be planned")
        planned = {"macs": equal_macs(settings, int(macs), link)}
        return planned, render_plan("equal_macs", planned, link=source)
    if hostfile is None:
        given = parse_macs(macs)
    else:
        found, measured = macs_of(hostfile)
        given = [MacSpec(find_chip(mac.chip).name, mac.memory_gb, mac.working_set_bytes) for mac in found]
        if measured and link_gbit is None:
            link, source = Link(**measured), "the link's rate as `mlx-lora cluster` measured it"
    planned = plan_on_macs(settings, given, link)
    lacking = max(mac["needed_bytes"] - mac["budget_bytes"] for mac in planned["macs"])
    return planned, render_plan("macs", planned, link=source, lacking_bytes=lacking)


# The plan as text

# A part of `MemoryPlan` -> what a reader calls it.
PART_WORDS = {
    "base": "base model",
    "other models": "other models (of rewards, or the tower of a vision-language model)",
    "adapter": "adapter",
    "optimizer": "optimizer's state",
    "weights being cast": "weights that are being converted",
    "activations": "activations",
    "gradients": "gradients",
    "logits": "scores of the vocabulary",
    "block": "activations of one block",
    "work ahead": "working memory of one block",
    "new state": "new values of the update",
    "teacher": "teacher",
    "records": "teacher's probabilities of a batch",
    "keys and values": "keys and values of answers",
    "copies of them": "copies of these while they grow",
    "kept from turn to turn": "keys and values kept until the next turn",
    "other clients": "adapters and optimizers of the other clients",
    "gradients that wait": "gradients of other clients, until their step",
    "weights to sample from": "adapters to sample from",
}
# A phase of `MemoryPlan` -> the moment it is.
PHASE_WORDS = {
    "load": "while the model is loaded",
    "check": "in the check before the first step",
    "loss": "while the loss is computed",
    "backward": "in the backward pass",
    "last": "at the end of the backward pass",
    "measure": "while losses are measured without a gradient",
    "update": "in the optimizer's update",
    "teacher": "while the teacher is asked",
    "rollout": "while answers are sampled",
}


def time_words(hours: float) -> str:
    """Return a predicted time as text, in the usual unit."""
    for unit, size in (("hour", 1.0), ("minute", 1 / 60)):
        if hours >= 1.5 * size:
            return f"{hours / size:,.0f} {unit}s" if hours >= 10 * size else f"{hours / size:.1f} {unit}s"
    return counted(max(1, round(hours * 3600)), "second")


def render_plan(template: str, plan: dict[str, Any], **more: Any) -> str:
    """Return a plan as text for the terminal; see `flags.render`."""
    words = {"part_words": PART_WORDS, "phase_words": PHASE_WORDS, "lasting": time_words}
    return flags.render(PAGES / f"{template}.txt", plan, **words, **more)
