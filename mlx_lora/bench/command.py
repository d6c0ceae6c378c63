"""Measure training on this machine with fixed workloads, and compare results of several machines.

python -m mlx_lora bench run --tier embedded
python -m mlx_lora bench compare mine.json theirs.json
python -m mlx_lora bench report benchmarks/results --out report.html
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click

from mlx_lora.bench.machine import describe_machine, describe_power, describe_software
from mlx_lora.bench.results import (
    BUSY_LOAD,
    SCHEMA,
    VERSION,
    compare,
    default_path,
    number,
    read_results,
    render_tables,
    to_json,
    write_page,
    write_result,
)
from mlx_lora.bench.run import TIERS, Length, Workload, choose_workloads, measure_rates, run_workload
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import check_writable
from mlx_lora.utils.text import counted

RESULTS = Path("benchmarks/results")


@click.group(cls=console.Group)
def main() -> None:
    """Measure training with fixed workloads, and compare machines."""


@main.command("run", cls=console.Command)
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    type=click.Choice(TIERS),
    help="Run the workloads for this memory size in GB, or embedded, the smallest ones; may be repeated [default: embedded].",
)
@click.option("--workload", "names", multiple=True, help="Run this workload; may be repeated.")
@click.option("--out", type=str, default=str(RESULTS), help=f"File (.json) or folder [default: {RESULTS}].")
@click.option(
    "--steps",
    type=click.IntRange(3, 10**6),
    help="Run this many steps instead of the workload's own number; the result is then marked as not comparable.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 10**6),
    help="End each workload this many seconds after its first step; the result is then marked as not comparable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result on standard output.")
def run_command(
    tiers: tuple[str, ...], names: tuple[str, ...], out: str, steps: int | None, seconds: float | None, as_json: bool
) -> int:
    """Run workloads and write one result file."""
    if not tiers and not names:
        tiers = ("embedded",)
    workloads = choose_workloads(tiers, names)
    check_out(Path(out))
    length = Length(steps, seconds)
    created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    machine, power = describe_machine(), describe_power()
    if power["load_average"] > BUSY_LOAD * (machine["cpu_cores"] or 1):
        console.echo(f"Other programs are running (load {power['load_average']:g}): the figures will be too low")
    if power["source"] == "battery" or power["low_power_mode"]:
        console.echo("On battery or in low-power mode: the figures will be too low, and are marked")
    code = 0
    with tempfile.TemporaryDirectory(prefix="mlx-lora-bench-") as folder:
        console.echo("Micro-benchmarks")
        probe = measure_rates(Path(folder))
        result: dict[str, Any] = {
            "schema": SCHEMA, "schema_version": VERSION, "created": created, "tiers": list(tiers), "machine": machine,
            "device": probe["device"], "software": describe_software(), "rates": probe["rates"], "results": [],
        }  # fmt: skip
        path = Path(out) if out.endswith(".json") else default_path(result, Path(out))
        check_out(path)  # a chip's folder may be another user's, if an earlier run measured energy as root
        try:
            for workload in workloads:
                result["results"].append(run_one(workload, result, Path(folder), length, power["load_average"]))
                write_result(path, result)  # a tier takes an hour: what is measured must outlive what may follow
        except KeyboardInterrupt:
            code = 130
            if result["results"]:  # it may have come before the last one was written
                write_result(path, result)
    if not result["results"]:
        console.echo("Interrupted before the first workload ended, so no result was written")
        return 130
    console.echo(f"Written to {path}{' (interrupted: workloads are missing)' if code else ''}")
    if as_json:
        console.print_json(result)
    return code


def check_out(out: Path) -> None:
    """Refuse a file that exists, or a place that cannot be written, before anything is measured.

    Raises:
        InputError: it is one.
    """
    if out.name.endswith(".json"):
        if out.exists():
            raise InputError(
                f"--out {out}: exists; give another name, or a folder, where each result gets its own name"
            )
        out = out.absolute().parent
    check_writable(out, "--out", needed_bytes=1_000_000)


def run_one(
    workload: Workload, result: dict[str, Any], folder: Path, length: Length, load_before: float
) -> dict[str, Any]:
    """Run a workload, and print its result."""
    console.echo(f"{workload.name} ...")
    entry = run_workload(workload, result, folder, length, load_before)
    figures = entry["figures"]
    if figures is None:
        console.echo(f"  {entry['status']}: {entry['reason']}")
        return entry
    speed, predicted = figures["tokens_per_s"], entry["predicted"]
    console.echo(
        f"  {number(speed['median'])} tokens/s ({number(speed['p10'])}-{number(speed['p90'])}), predicted "
        f"{number(predicted['tokens_per_s'])}; peak {figures['peak_memory_bytes'] / 1e9:.2f} GB, predicted "
        f"{predicted['peak_memory_bytes'] / 1e9:.2f}; first step after {figures['first_step_s']:.1f} s; "
        f"{figures['counted_steps']} steps counted"
    )
    return entry


@main.command("compare", cls=console.Command)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
@click.option("--across-versions", is_flag=True, help="Also give ratios between different versions of mlx or mlx_lora.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare_command(paths: tuple[Path, ...], markdown: bool, across_versions: bool, as_json: bool) -> None:
    """Compare result files, or folders of them. Ratios are relative to the first."""
    results, problems = read_results(paths)
    for line in problems:
        console.echo(line)
    tables = compare(results, across_versions)
    if as_json:
        console.print_json({**to_json(tables), "left_out": problems})
    else:
        click.echo(render_tables(tables, markdown))


@main.command("report", cls=console.Command)
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("bench-report.html"),
    show_default=True,
    help="HTML file to write.",
)
@click.option("--across-versions", is_flag=True, help="Also give ratios between different versions of mlx or mlx_lora.")
def report_command(paths: tuple[Path, ...], out: Path, across_versions: bool) -> None:
    """Write an HTML page from result files, or folders of them (default: benchmarks/results)."""
    if not paths and not RESULTS.exists():
        raise InputError(f"no result named, and there is no {RESULTS}; name files or folders")
    # Another file may be a result, such as the one that is read.
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out}: a page is written there; give a name that ends in .html")
    results, problems = read_results(paths or (RESULTS,))
    for line in problems:
        console.echo(line)
    write_page(out, results, problems, across_versions)
    console.echo(f"{counted(len(results), 'result')} in {out}")
