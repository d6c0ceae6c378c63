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

from mlx_lora.api.plan import choose_machine, plan_run
from mlx_lora.api.plan_macs import LATENCY_S, LINK_GBIT, MacSpec, equal_macs, parse_macs, plan_on_macs, splits_line
from mlx_lora.cli import options as flags
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.settings import MEMORY, TrainSettings
from mlx_lora.config.sweep import BUDGET, read_budget
from mlx_lora.parallel.hosts import macs_of
from mlx_lora.planner.several_macs import Link
from mlx_lora.planner.speed import find_chip
from mlx_lora.training_server.plan import MOST_CLIENTS, plan_training_server
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import counted, gigabytes

GIGABYTES = re.compile(r"(?P<number>\d{1,9})(\.0*)?\s*(gb?|gib)?", re.IGNORECASE)
MOST_GB = 4096
MOST_MACS = 256
# Flags of `train` that apply to a training server.
OF_CLIENTS = {"model", "revision", "bits", "dtype", "rank", "max_seq_length", "memory_budget"}


@click.command(cls=flags.SettingsCommand)
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@flags.settings_options("model", "data", "adapter", "objective", "optimizer", "loop")
def main(
    config_file: str | None, allow_code: bool, chip: str | None, memory_gb: int | None, all_chips: bool, macs: str | None,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Predict the memory and the speed of `train` with these flags, without reading any weights."""
    hostfile, link_gbit = options.pop("hostfile"), options.pop("link_gbit")
    sweep, clients = options.pop("sweep"), options.pop("clients")
    budget = None if sweep is None else read_budget(sweep)
    several = macs is not None or hostfile is not None
    if budget is not None and (several or all_chips):
        raise InputError(
            "--sweep with --macs, --hostfile or --all-chips: it is planned for one machine; leave out one of them"
        )
    if link_gbit is not None and not several:
        raise InputError("--link-gbit: only for --macs or --hostfile; add one of them, or leave it out")
    given = flags.given(options)
    settings = train_settings(given, read_settings(config_file, given, allow_code))
    if clients is not None:
        if config_file or macs or hostfile or all_chips or budget or set(given) - OF_CLIENTS:
            raise InputError(
                "--clients: only --rank, --max-seq-length, --memory-budget, --chip, --memory-gb and the flags of the model (--model, "
                "--revision, --bits, --dtype) apply to a training server, whose clients bring the rest; leave other flags out"
            )
        planned = plan_training_server(settings, clients, choose_machine(settings, chip, memory_gb)[0])
        console.print_json(planned) if as_json else click.echo(render_clients(planned))
        return
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
    if budget is not None:
        result["sweep"] = {"budget": budget, "runs_at_once": result["runs_at_once"]}
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
        given = [MacSpec(find_chip(mac.chip).name, mac.memory_gb, mac.working_set_bytes) for mac in found]
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
        if row["reading"]:
            speed += f", base read from its files ({row['reading']['waiting_share']:.0%} waiting)"
        lines.append(
            f"| {row['chip']} | {row['memory_bytes'] >> 30} | {gigabytes(row['budget_bytes'])} "
            f"| {gigabytes(row['peak_bytes'])} | {row['batch_tokens']} | {row['grad_checkpoint']} "
            f"| {row['largest_sequence']:,} | {speed} |"
        )
    return "\n".join(lines)


# The plan as text

# One machine

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
# Kind of records -> what an objective that scores them computes.
OF_SCORES = {"labeled": "one row for a text", "candidates": "one row for each document of a query"}
# A phase of `MemoryPlan` -> the moment it is.
PHASE_WORDS = {
    "load": "while the model is loaded",
    "check": "in the check before the first step",
    "loss": "while the loss is computed",
    "backward": "in the backward pass",
    "last": "at the end of the backward pass",
    "update": "in the optimizer's update",
    "teacher": "while the teacher is asked",
    "rollout": "while answers are sampled",
}
RATE_WORDS = {"measured here": "from rates measured on this machine"}


def render(result: dict[str, Any]) -> str:
    """Return a plan as text for the terminal."""
    machine, chosen, speed = result["machine"], result["settings"], result["predicted"]
    paired = result["objective"]["records"] == "pairs" and result["objective"]["rows_per_example"] == 2
    verdict = "fits" if result["fits"] else "does not fit"
    if result["not_known"]:
        verdict = f"not known whether it fits; a rough count says that it {verdict}"
    lines = [
        f"{machine['name']}: {verdict}; the run needs {gigabytes(result['needed_bytes'])} of the "
        f"{gigabytes(result['budget_bytes'])} that it may use",
        *_data_words(result),
        f"The most memory is in use {PHASE_WORDS[result['phase']]}:",
        *(f"  {gigabytes(size):>10}  {PART_WORDS.get(name, name)}" for name, size in result["parts"].items()),
        f"  {gigabytes(result['peak_bytes']):>10}  = peak, which a run reports",
        f"  {gigabytes(result['cache_bytes']):>10}  buffers that MLX keeps for reuse, at most",
        f"  {gigabytes(result['needed_bytes']):>10}  = needed",
        "Peak by --grad-checkpoint: "
        + ", ".join(f"{mode} {gigabytes(size)}" for mode, size in result["peak_bytes_by_checkpointing"].items()),
        f"Chosen: --learning-rate {chosen['learning_rate']:g} {_length(result)}{_batch(chosen)} "
        f"({counted(chosen['rows'], 'row')} of {chosen['row_tokens']:,}) "
        f"--grad-checkpoint {chosen['grad_checkpoint']}"
        + ("" if chosen["method"] == "full" else f" --rank {chosen['rank']}"),
        *(
            f"Largest with --grad-checkpoint {mode}: one {'pair of answers' if paired else 'row'} of "
            f"{result['largest_sequence'][mode]:,} tokens{' each' if paired else ''}, "
            f"or {counted(rows, 'pair' if paired else 'row')} of {chosen['max_seq_length']:,}"
            for mode, rows in result["largest_batch_size"].items()
        ),
        f"Predicted: {speed['tokens_per_s']:,.0f} tokens/s, "
        f"{time_words(speed['hours_per_million_tokens'])} per million tokens"
        + (f", about {time_words(speed['hours'])} for this run's steps" if speed["hours"] is not None else "")
        + f" ({RATE_WORDS.get(speed['ceilings'], 'an upper bound: from the rates that the chip is listed with')})",
    ]
    if result["validation"] and result["validation"]["words"]:
        lines.append(result["validation"]["words"])
    if speed["hours"] is not None:
        lines.append("Not counted: loading the model, compiling and measuring kernels, validation, texts of the report")
    if speed["reading"]:
        lines.append(_reading_words(speed["reading"]))
    if "sweep" in result:
        lines.append(_sweep_words(result))
    if result["trunk"]:
        lines.append(f"Frozen blocks: {result['trunk']['words']}")
    lines += [f"Warning: {problem}." for problem in result["warnings"]]
    lines += [f"Not known: what this model's blocks keep in memory ({reason})" for reason in result["not_known"]]
    return "\n".join([*lines, *([f"To fit: {result['advice']}"] if "advice" in result else [])])


def render_clients(result: dict[str, Any]) -> str:
    """Return the plan of a training server as text for the terminal."""
    verdict = "fits" if result["fits"] else "does not fit"
    most, head = result["most_clients"], " and the head" if result["train_unembed"] else ""
    room = (
        f"{most:,} or more fit"
        if most == MOST_CLIENTS
        else f"at most {counted(most, 'client')} fit"
        if most
        else "none fits"
    )
    lines = [
        f"{result['machine']['name']}: a training server with {counted(result['clients'], 'client')} {verdict}; it needs "
        f"{gigabytes(result['needed_bytes'])} of the {gigabytes(result['budget_bytes'])} that it may use",
        f"Planned for: adapters of rank {result['rank']} on all linear layers{head}, rows of {result['max_seq_length']:,} tokens, "
        f"{counted(result['answers'], 'answer')} sampled at a time",
        f"The most memory is in use {PHASE_WORDS[result['phase']]}:",
        *(f"  {gigabytes(size):>10}  {PART_WORDS.get(name, name)}" for name, size in result["parts"].items() if size),
        f"  {gigabytes(result['needed_bytes']):>10}  = needed, with {gigabytes(result['cache_bytes'])} of buffers for reuse",
        f"A further client adds {gigabytes(result['further_client_bytes'])}; {room}",
    ]
    if not most:
        lines.append("To fit: lower --max-seq-length or --rank, or choose a smaller model or fewer bits")
    return "\n".join(
        lines + [f"Not known: what this model's blocks keep in memory ({one})" for one in result["not_known"]]
    )


def _sweep_words(result: dict[str, Any]) -> str:
    """Return what a plan says of a sweep."""
    sweep, hours = result["sweep"], result["predicted"]["hours"]
    lasts = "" if hours is None else f", about {time_words(hours * sweep['budget'])} at the rate of one run"
    return (
        f"Sweep with --budget {sweep['budget']:g}x: the work of {sweep['budget']:g} runs{lasts}, and less where rows are short, because up "
        f"to {counted(sweep['runs_at_once'], 'run')} with these settings fit in memory and share the base's work"
    )


def _reading_words(reading: dict[str, Any]) -> str:
    """Return what a plan says of a base that is read from its files."""
    disk = f"{reading['disk_bytes_per_s'] / 1e9:.2g} GB/s, {reading['disk_source']}"
    share, tokens = reading["waiting_share"], f"{reading['hidden_from_tokens']:,}"
    waiting = f"waits for the disk {share:.0%} of the time" if share >= 0.005 else "does not wait for the disk"
    moved = f", and {gigabytes(reading['activation_bytes'])} of activations are written and read again"
    return (
        f"The base's blocks are not kept in memory, but read from its files when they are used (--offload-base): "
        f"{gigabytes(reading['bytes'])} for each micro-batch{moved if reading['activation_bytes'] else ''}. At the disk's rate ({disk}) the run {waiting}; "
        f"micro-batches of {tokens} tokens or more hide it"
    )


def _length(result: dict[str, Any]) -> str:
    """Return the run's length as flags; empty if it is not known before the data is read."""
    chosen, steps = result["settings"], result["steps"]
    if chosen["iters"] is not None:
        return f"--iters {chosen['iters']} "
    return "" if steps is None else f"--epochs {chosen['epochs']:g} ({counted(steps, 'step')}) "


def _batch(chosen: dict[str, Any]) -> str:
    """Return the size of a batch as the flag that decides it."""
    if chosen["batch_size"] is not None:
        return f"--batch-size {chosen['batch_size']}"
    return f"--batch-tokens {chosen['batch_tokens']}"


def _data_words(result: dict[str, Any]) -> list[str]:
    """Return the lines about the data, and about what an objective other than imitation computes."""
    size, objective = result["data"], result["objective"]
    rated, lines = objective["records"] == "rated", []
    if size:
        kind = {"pairs": "pairs", "rated": "rated answers", "prompts": "prompts"}.get(objective["records"])
        examples = f"{size['rows'] // objective['rows_per_example']:,} {kind} in " if kind else ""
        lines.append(
            f"Data: {examples}{counted(size['rows'], 'row')}, {size['tokens']:,} tokens, the longest row {size['longest']:,}"
        )
    if objective["name"] == "sft":
        return lines
    words = "each answer is compared with another one, in a forward pass" if rated else "two rows for a pair"
    one_row = objective["rows_per_example"] == 1
    if one_row:
        words = "one row for a pair, with the prompt once"
    words = OF_SCORES.get(objective["records"], words)
    seconds = result["predicted"]["reference_s"]
    once = "" if seconds is None else f", {size['measured_tokens']:,} tokens in about {time_words(seconds / 3600)}"
    if objective["teacher"]:
        words = f"the teacher is asked once before the first step{once}, and not in memory while the student is trained"
    if objective["teacher"] and objective["records"] == "prompts":
        words = "the student samples the answers, which is not counted; the teacher stays in memory and scores them"
    if objective["group_size"] and not objective["teacher"]:
        rows = "one row for all of them, with the prompt once" if one_row else "a row for each"
        words = f"{objective['group_size']} answers are sampled to a prompt, {rows}"
    if objective["reference"]:
        words += f"; the reference is measured once before the first step{once}, without a second model in memory"
    if not size:
        words += "; without --data on this disk, each prompt with an answer counts as --max-seq-length tokens"
    return [*lines, f"Objective {objective['name']}: {words}"]


def time_words(hours: float) -> str:
    """Return a predicted time as text, in the usual unit."""
    for unit, size in (("hour", 1.0), ("minute", 1 / 60)):
        if hours >= 1.5 * size:
            return f"{hours / size:,.0f} {unit}s" if hours >= 10 * size else f"{hours / size:.1f} {unit}s"
    return counted(max(1, round(hours * 3600)), "second")


# Several Macs

PREDICTED = "All predicted, from listed rates of the chips and {link}; nothing was measured on a Mac."
ASSUMED = "an assumed rate of the link (--link-gbit)"


def render_macs(plan: dict[str, Any], link: str = ASSUMED) -> str:
    """Return the plan as text for the terminal, with a table in Markdown.

    Args:
        plan: as `plan_on_macs` returns it.
        link: where the link's rate is from.
    """
    speed, count = plan["predicted"], len(plan["macs"])
    verdict = "fits" if plan["fits"] else "does not fit"
    shared = f"{counted(count, 'Mac')} that share the base of {gigabytes(plan['whole_base_bytes'])}"
    if plan["problem"]:
        first = f"{shared}: not possible ({plan['problem']})"
        return "\n".join([first, splits_line(plan["splits"]), PREDICTED.format(link=link)])
    lines = [
        f"{shared}: {verdict}",
        f"Planned for: --shard-base {plan['shard_base']} --rank {plan['rank']} {_batch(plan)} "
        f"--max-seq-length {plan['max_seq_length']} --grad-checkpoint {plan['grad_checkpoint']}",
        "",
        "| Mac | keeps of the base | needs | may use | computing a step |",
        "|---|---|---|---|---|",
        *(
            f"| {mac['name']} | {mac['share']:.0%} | {gigabytes(mac['needed_bytes'])}{'' if mac['fits'] else ', too much'} "
            f"| {gigabytes(mac['budget_bytes'])} | {mac['computing_s']:.1f} s |"
            for mac in plan["macs"]
        ),
        "",
        *(f"Peak of {name}: {words}" for name, words in _peaks(plan).items()),
        f"A step of {plan['batch_tokens']:,} tokens: {speed['computing_s']:.1f} s of computing, {speed['link_s']:.1f} s of sending meanwhile "
        f"({gigabytes(plan['sent_bytes_per_step'])} from each Mac at {plan['link_gbit_per_s']:.3g} Gbit/s), {speed['step_s']:.1f} s in all, "
        f"{speed['tokens_per_s']:,.0f} tokens/s",
        _who_decides(plan),
        splits_line(plan["splits"]),
    ]
    if not plan["fits"]:
        lines.append(_to_fit(plan))
    return "\n".join([*lines, PREDICTED.format(link=link)])


def _peaks(plan: dict[str, Any]) -> dict[str, str]:
    """Return each Mac's peak by part, once for equal Macs."""
    return {
        mac["name"]: ", ".join(
            f"{part} {gigabytes(size)}" for part, size in sorted(mac["parts"].items(), key=lambda part: -part[1])
        )
        for mac in plan["macs"]
    }


def _who_decides(plan: dict[str, Any]) -> str:
    speed, least = plan["predicted"], plan["least_batch_tokens"]
    who = "The link decides" if speed["decides"] == "link" else "The chips decide"
    if least is None:
        return f"{who}: chips wait {speed['waiting_s']:.1f} s a step, and no batch of up to a million tokens hides that"
    if least <= plan["batch_tokens"]:
        return f"{who}, and the link is hidden: chips wait {speed['waiting_s']:.1f} s a step"
    return (
        f"{who}: chips wait {speed['waiting_s']:.1f} s a step; the link is hidden from about --batch-tokens {least} on"
    )


def _to_fit(plan: dict[str, Any]) -> str:
    if plan.get("suggested"):
        return f"To fit: {plan['suggested']}"
    missing = max(mac["needed_bytes"] - mac["budget_bytes"] for mac in plan["macs"])
    return (
        f"To fit: a Mac lacks {gigabytes(missing)}, and no smaller rank, row or batch makes it fit; use Macs with more memory, more "
        "Macs, or fewer bits"
    )


def render_equal_macs(plans: list[dict[str, Any]], link: str = ASSUMED) -> str:
    """Return the table of plans for equal Macs as Markdown."""
    lines = ["| Macs | may use | needs | computing s | sending s | step s | decides | tokens/s, predicted |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for plan in plans:
        mac, speed = plan["macs"][0], plan["predicted"]
        lacking = "not possible" if plan["problem"] else "does not fit"
        end = f"- | {lacking} |" if not plan["fits"] else f"{speed['decides']} | {speed['tokens_per_s']:,.0f} |"
        lines.append(
            f"| {len(plan['macs'])} x {mac['name']} | {gigabytes(mac['budget_bytes'])} | {gigabytes(mac['needed_bytes'])} "
            f"| {speed['computing_s']:.1f} | {speed['link_s']:.1f} | {speed['step_s']:.1f} | {end}"
        )
    return "\n".join([*lines, "", PREDICTED.format(link=link)])
