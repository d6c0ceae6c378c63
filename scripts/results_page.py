"""Check results that people submit, and write the table of docs/results.md from those in benchmarks/results.

python scripts/results_page.py --check result.json    # one line for each file that cannot be taken, and why; exits with 1
python scripts/results_page.py --add result.json      # check it, put it into benchmarks/results, and write the table
python scripts/results_page.py                        # check what is in benchmarks/results, and write the table

`mlx-lora bench run --tier embedded --out result.json` makes such a file. The schema is that of mlx_lora/bench/results.py; beyond
it, this script asks whether the values are possible and whether the machine was fit to be measured.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlx_lora.bench.results import default_path, machine_name, notes_of, number, read_result, write_result
from mlx_lora.bench.run import TIERS, WORKLOADS
from mlx_lora.utils.errors import InputError, first_of
from mlx_lora.utils.text import GIB

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"  # scripts/results_page.py writes what is between them
ADDRESS = "https://github.com/mlx-lora/mlx-lora/blob/main"
COLUMNS = ("machine", "memory", "workload", "tokens/s", "peak GB", "version", "date")
SHOWN = 3  # problems of a file
MOST_BYTES = 10**6
VERSIONS = {one.name: one.version for one in WORKLOADS}
APPLE_CHIP = re.compile(r"(Apple )?M\d{1,2}( Pro| Max| Ultra)?")
NAME = re.compile(r"[\w@().,+/ -]{1,80}")  # of a chip, a system, a version; becomes a cell of the table
PRIVATE = re.compile(r"/(?:Users|home|root|private)/|[A-Za-z]:\\|[\w.+-]+@[\w-]+\.\w")
FIRST_DAY = "2026-01-01"  # no result is older
ROUNDING = 1.05
MOST_OFF = 10  # times the planner's prediction, which is made of speeds that were measured in the same minutes


def texts(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts(one)


def machine_problems(content: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a valid result's machine, software and time."""
    machine, device, software = content["machine"], content["device"], content["software"]
    shown = [machine["chip"], machine["system"], device["name"], *software["versions"].values()]
    yield from (
        f"{one!r} is no name of a chip, a system or a version" for one in shown if one and not NAME.fullmatch(one)
    )
    if unknown := [one for one in content["tiers"] if one not in TIERS]:  # they are part of the file's name
        yield f"tiers has {unknown[0]!r}, which is none of {', '.join(TIERS)}"
    if found := next((one for one in texts(content) if PRIVATE.search(one)), None):
        yield f"{found[:40]!r} looks like a path or an address; remove what is private and measure again"
    if not 2 * GIB <= machine["memory_bytes"] <= 4096 * GIB:
        yield f"machine.memory_bytes is {machine['memory_bytes'] / GIB:.3g} GiB"
    if device["memory_bytes"] > machine["memory_bytes"] and device["backend"] != "cuda":
        yield "device.memory_bytes is more than the machine has"
    if device["backend"] == "metal" and (machine["system"] != "macOS" or machine["architecture"] != "arm64"):
        yield f"device.backend is metal on {machine['system']}, {machine['architecture']}"
    if device["backend"] == "metal" and not APPLE_CHIP.fullmatch(machine_name(content)):
        yield f"{machine_name(content)!r} is no Apple chip; a virtual machine's GPU is not a Mac's"
    try:
        created = datetime.fromisoformat(content["created"])
        late = created.astimezone(UTC) > datetime.now(UTC) + timedelta(days=1)
        if late or content["created"] < FIRST_DAY:
            yield f"created is {content['created'][:10]}; set the clock and measure again"
    except ValueError:
        yield f"created is {content['created'][:30]!r}, not a date and time of ISO 8601"
    if (software["commit"] or "").endswith("-dirty"):
        yield "software.commit says that files of the checkout were changed; measure on a clean one"
    if not any(one["status"] == "measured" for one in content["results"]):
        yield "no workload was measured"


def entry_problems(content: dict[str, Any], entry: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a measured workload of a valid result."""
    workload, figures = entry["workload"], entry["figures"]
    if VERSIONS.get(workload["name"]) != workload["version"]:
        yield f"version {workload['version']} is not in the suite of this checkout; update mlx-lora and measure again"
    yield from (f"{note}; measure again without" for note in notes_of(content, entry))
    for name in ("tokens_per_s", "supervised_tokens_per_s", "step_s"):
        spread = [figures[name][one] for one in ("min", "p10", "median", "p90", "max")]
        if spread != sorted(spread):
            yield f"{name}: minimum, percentiles and maximum are not in order"
    if not 0 < figures["supervised_tokens"] <= figures["real_tokens"] <= figures["positions"]:
        yield "supervised_tokens, real_tokens and positions are not in order"
    if (steps := sum(figures["shapes"].values())) != figures["counted_steps"]:
        yield f"shapes have {steps} steps, and {figures['counted_steps']} were counted"
    overall = figures["real_tokens"] / max(figures["counted_s"], 1e-9)
    if not 1 / ROUNDING <= overall / max(figures["overall_tokens_per_s"], 1e-9) <= ROUNDING:
        yield f"overall_tokens_per_s is not real_tokens over counted_s, which is {number(overall)}"
    speed, predicted = figures["tokens_per_s"]["median"], entry["predicted"]["tokens_per_s"]
    if not figures["tokens_per_s"]["min"] / ROUNDING <= overall <= figures["tokens_per_s"]["max"] * ROUNDING:
        yield "tokens_per_s does not agree with overall_tokens_per_s"
    if not predicted / MOST_OFF <= speed <= predicted * MOST_OFF:
        yield f"{number(speed)} tokens/s, and the speeds of single operations predict {number(predicted)}"
    if figures["mfu"] > ROUNDING:
        yield f"mfu is {figures['mfu']:.2f}: faster than the matrix products of this machine"
    for name, part in (("peak_memory_bytes", "device"), ("process_peak_bytes", "machine")):
        if figures[name] > content[part]["memory_bytes"]:
            yield f"{name} is more than the memory of the {part}"


def read_submission(path: Path) -> dict[str, Any]:
    """Return a result that may go into the table.

    Raises:
        InputError: it may not; the message is one line that says why.
    """
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path}: larger than a result can be ({MOST_BYTES:,} bytes); give what `bench run` wrote")
    content = read_result(path).content
    problems = list(machine_problems(content))
    for entry in content["results"]:
        if entry["status"] == "measured":
            problems += [f"{entry['workload']['name']}: {one}" for one in entry_problems(content, entry)]
    if problems:
        raise InputError(f"{path}: {first_of(problems, SHOWN)}")
    return content


def rows_of(path: Path, content: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a result, as texts for `COLUMNS`."""
    machine, versions = content["machine"], content["software"]["versions"]
    kind, cores = ("GPU", machine["gpu_cores"]) if machine["gpu_cores"] else ("CPU", machine["cpu_cores"])
    label = machine_name(content) + (f", {cores} {kind} cores" if cores else "")
    where = f"{ADDRESS}/{path.relative_to(ROOT).as_posix()}"
    for entry in content["results"]:
        if entry["status"] != "measured":
            continue
        figures, speed = entry["figures"], entry["figures"]["tokens_per_s"]
        yield (
            f"[{label}]({where})",
            f"{round(machine['memory_bytes'] / GIB)} GB",
            entry["workload"]["name"],
            f"{number(speed['median'])} ({number(speed['p10'])}-{number(speed['p90'])})",
            f"{figures['peak_memory_bytes'] / 1e9:.2f}",
            f"{versions.get('mlx-lora')}, mlx {versions.get('mlx')}",
            content["created"][:10],
        )


def table(results: dict[Path, dict[str, Any]]) -> str:
    """Return the table as Markdown: by workload, the fastest first."""
    order = {name: place for place, name in enumerate(VERSIONS)}
    rows = [row for path, content in results.items() for row in rows_of(path, content)]
    rows.sort(key=lambda row: (order[row[2]], -float(row[3].split()[0].replace(",", "")), row))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---:|---|---:|---:|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def page(text: str, made: str, macs: int) -> str:
    """Return the page with its table, and with how many results of Macs there are."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin
    assert end
    some = f"Results of Macs: {macs}." if macs else "**Nobody has sent a result of a Mac yet**; yours is the first."
    return f'{before}{BEGIN}\n\n{some}\n\n<div class="sortable" markdown>\n\n{made}\n\n</div>\n\n{END}{after}'


def written(text: str) -> str:
    """Return the page as the results in the folder make it.

    Raises:
        InputError: one of them may not be there.
    """
    results = {path: read_submission(path) for path in sorted(RESULTS.rglob("2*.json"))}  # by their dates
    return page(text, table(results), sum(one["device"]["backend"] == "metal" for one in results.values()))


def main(argv: list[str]) -> int:
    """Check, add, or write the page; returns 1 if a file cannot be taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, nargs="+", metavar="FILE", help="only say what is wrong with these files")
    parser.add_argument("--add", type=Path, metavar="FILE", help="check a file, and put it into benchmarks/results")
    options = parser.parse_args(argv)
    bad = 0
    for path in options.check or ():
        try:
            read_submission(path)
            print(f"{path}: can be taken")
        except InputError as problem:
            bad += 1
            print(problem)
    if options.check:
        return int(bad > 0)
    try:
        if options.add:
            content = read_submission(options.add)
            target = default_path(content, RESULTS)
            write_result(target, content)
            print(f"Written to {target.relative_to(ROOT)}")
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    except InputError as problem:
        sys.exit(f"Error: {problem}")
    print(f"Written to {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
