"""Predict before a download whether a training run fits, with which settings, and how fast it is.

python -m mlx_lora.plan --model Qwen/Qwen3-4B --chip "M2 Pro" --memory-gb 16
python -m mlx_lora.plan --model smollm2 --rank 64 --max-seq-length 4096 --json
python -m mlx_lora.plan --model config.json --all-chips
"""

from __future__ import annotations

from typing import Any

import click

from mlx_lora.api.run_plan import plan_run
from mlx_lora.settings import flags
from mlx_lora.settings.resolve import train_settings
from mlx_lora.settings.settings_file import read_settings
from mlx_lora.system import console
from mlx_lora.system.units import counted, gigabytes


@click.command(cls=flags.Command)
@flags.config_option
@click.option("--chip", type=str, default=None, help='Plan for this chip ("M2 Pro") instead of this machine.')
@click.option(
    "--memory-gb", type=click.IntRange(1, 4096), default=None, help="Memory of the --chip (default: the least sold)."
)
@click.option("--all-chips", is_flag=True, help="Plan for every chip and memory size of the table.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@flags.settings_options("model", "data", "adapter", "objective", "optimizer", "loop")
def main(
    config_file: str | None, chip: str | None, memory_gb: int | None, all_chips: bool, as_json: bool, **options: Any
) -> None:
    """Plan the memory and predict the speed of `train` with these flags; no weights are read."""
    given = flags.given(options)
    settings = train_settings(given, read_settings(config_file, given, console.echo))
    result = plan_run(settings, chip, memory_gb, all_chips, console.echo)
    if as_json:
        console.print_json(result)
    elif all_chips:
        click.echo(render_chips(result["chips"]))
    else:
        click.echo(render(result))


def render(result: dict[str, Any]) -> str:
    """Return a plan as text for the terminal."""
    machine, chosen, speed = result["machine"], result["settings"], result["predicted"]
    paired = result["objective"]["records"] == "pairs" and result["objective"]["rows_per_example"] == 2
    verdict = "fits" if result["fits"] else "does not fit"
    if result["not_known"]:
        verdict = f"not known whether it fits; a rough count says that it {verdict}"
    lines = [
        f"{machine['name']}: {verdict}, {gigabytes(result['needed_bytes'])} of {gigabytes(result['budget_bytes'])}, "
        f"peak in phase {result['phase']}",
        *_data_words(result),
        *(f"  {gigabytes(size):>10}  {name}" for name, size in result["parts"].items()),
        f"  {gigabytes(result['peak_bytes']):>10}  peak (MLX's allocator), plus {gigabytes(result['cache_bytes'])} of buffer cache",
        "Checkpointing: "
        + ", ".join(f"{mode} {gigabytes(size)}" for mode, size in result["peak_bytes_by_checkpointing"].items()),
        f"Settings: --batch-tokens {chosen['batch_tokens']} ({chosen['rows']} x {chosen['max_seq_length']}) "
        f"--grad-checkpoint {chosen['grad_checkpoint']} --rank {chosen['rank']}",
        "Largest: "
        + "; ".join(
            f"checkpointing {mode}: one {'pair of answers' if paired else 'row'} of {result['largest_sequence'][mode]:,} "
            f"tokens{' each' if paired else ''}, {counted(rows, 'pair' if paired else 'row')} of {chosen['max_seq_length']:,}"
            for mode, rows in result["largest_batch_size"].items()
        ),
        f"Predicted (ceilings {speed['ceilings']}): {speed['tokens_per_s']:,.0f} tokens/s, "
        f"{time_words(speed['hours_per_million_tokens'])} per million tokens"
        + (f", about {time_words(speed['hours'])} for this run" if speed["hours"] is not None else ""),
    ]
    lines += [f"Not known: what this model's blocks keep in memory ({reason})" for reason in result["not_known"]]
    return "\n".join([*lines, *([f"To fit: {result['advice']}"] if "advice" in result else [])])


def _data_words(result: dict[str, Any]) -> list[str]:
    """Return the lines about the data, and about what an objective other than imitation computes."""
    size, objective = result["data"], result["objective"]
    rated, lines = objective["records"] == "rated", []
    if size:
        kind = {"pairs": "pairs", "rated": "rated answers"}.get(objective["records"])
        examples = f"{size['rows'] // objective['rows_per_example']:,} {kind} in " if kind else ""
        lines.append(
            f"Data: {examples}{size['rows']:,} rows, {size['tokens']:,} tokens, the longest row {size['longest']:,}"
        )
    if objective["name"] == "sft":
        return lines
    words = "each answer is compared with another one, in a forward pass" if rated else "two rows for a pair"
    if objective["rows_per_example"] == 1:
        words = "one row for a pair, with the prompt once"
    if objective["reference"]:
        seconds = result["predicted"]["reference_s"]
        once = "" if seconds is None else f", {size['measured_tokens']:,} tokens in about {time_words(seconds / 3600)}"
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
