"""Write and read result files, compare them, and render comparisons as text.

A file that cannot be read is reported with one line. There is one table per workload, with ratios only if the work and the
versions are equal.

The schema, version 1, has every field with its type and meaning; files are checked against it, and `document` returns it. A name
ending in `[]` means each entry of a list, one ending in `{}` each value of a mapping.

The report page is one HTML file with charts, without network access or scripts.

Full bars are measured. Hollow, dashed bars are the planner's predictions, from listed peaks, for chips without results,
and are always labeled so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from mlx_lora.api.options import render
from mlx_lora.bench.run import TIERS, WORKLOADS, Workload, digest_of, predict_chips, predict_sizes
from mlx_lora.planner.speed import CHIPS
from mlx_lora.reports.charts import Bar, Series, bar_chart, line_chart, render_page
from mlx_lora.utils.errors import InputError, first_of
from mlx_lora.utils.files import replace_text
from mlx_lora.utils.parsing import read_json
from mlx_lora.utils.text import counted

SCHEMA, VERSION = "mlx-lora-bench", 1
STATUSES = ("measured", "not run", "failed")


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        path: dotted.
        kind: `text`, `number` (finite, not negative), `whole`, `yes/no`, `mapping` or `list`.
        meaning: for the documentation.
        may_be_null: whether null is allowed, because the value could not be read or does not exist.
    """

    path: str
    kind: str
    meaning: str
    may_be_null: bool = False


def fields_of(prefix: str, *rows: tuple[str, str, str]) -> tuple[Field, ...]:
    """Return fields with a prefix; a `?` after the kind allows null."""
    return tuple(Field(f"{prefix}{name}", kind.rstrip("?"), text, kind.endswith("?")) for name, kind, text in rows)


def _spread(prefix: str, of: str) -> tuple[Field, ...]:
    return fields_of(
        prefix,
        ("median", "number", f"{of}: median over the counted steps"),
        ("p10", "number", "10th percentile, nearest rank"),
        ("p90", "number", "90th percentile"),
        ("min", "number", "smallest value"),
        ("max", "number", "largest value"),
    )


TOP = fields_of(
    "",
    ("schema", "text", f"`{SCHEMA}`"),
    ("schema_version", "whole", "1"),
    ("created", "text", "local date and time of the start, ISO 8601"),
    ("tiers", "list", "the values of `--tier`"),
    ("machine", "mapping", "hardware and operating system"),
    ("device", "mapping", "the device that MLX computes on"),
    ("software", "mapping", "versions and environment variables"),
    ("rates", "mapping", "speeds of single operations, the best of five measurements"),
    ("results", "list", "one entry per workload"),
)
MACHINE = fields_of(
    "machine.",
    ("chip", "text?", "chip or processor name"),
    ("model", "text?", "the machine's model name"),
    ("architecture", "text", "`arm64`, `x86_64`"),
    ("cpu_cores", "whole?", "number of logical CPU cores"),
    ("performance_cores", "whole?", "number of performance cores; Apple silicon only"),
    ("efficiency_cores", "whole?", "number of efficiency cores; Apple silicon only"),
    ("gpu_cores", "whole?", "number of GPU cores; Apple silicon only"),
    ("memory_bytes", "whole", "the machine's memory"),
    ("system", "text", "`macOS`, `Linux`"),
    ("system_version", "text?", "the version of macOS, or of the Linux kernel"),
    ("system_build", "text?", "the build number of macOS"),
)
DEVICE = fields_of(
    "device.",
    ("name", "text", "the device's name in MLX"),
    ("backend", "text", "`metal`, `cpu` or `cuda`"),
    ("memory_bytes", "whole", "the memory that the device can use"),
    ("working_set_bytes", "whole", "the most memory that a run should use"),
    ("blas", "text?", "the linear algebra library of MLX's CPU backend"),
    ("compute_dtype", "text", "the dtype that all workloads compute in"),
)
SOFTWARE = fields_of(
    "software.",
    (
        "commit",
        "text?",
        "the checkout's git commit, with `-dirty` if files were changed; null for an installed package",
    ),
    ("python", "text", "the version of Python"),
    ("versions", "mapping", "each package's version; null if it is not installed"),
    ("variables", "mapping", "environment variables that affect speed; null if unset"),
    ("removed_variables", "list", "environment variables that the benchmark removed before it measured"),
)
RATES = fields_of(
    "rates.",
    ("gemm_flops_per_s", "mapping", "speed of square matrix products by dtype, at the fastest size"),
    ("gemm_flops_per_s.{}", "number", "speed in this dtype"),
    (
        "quantized_matmul_flops_per_s",
        "mapping",
        "speed of products with 4-bit weights: for 1 row, for 1024 rows, and with the weights dequantized first (`dequantize_then_gemm`)",
    ),
    ("quantized_matmul_flops_per_s.{}", "number", "speed of this kind of product"),
    ("copy_bytes_per_s", "number", "memory bandwidth when one array is read and one is written"),
    ("triad_bytes_per_s", "number", "memory bandwidth when two arrays are read and one is written"),
    ("ceilings", "mapping", "the speeds that predictions are computed from"),
    ("ceilings.dtype", "text", "the dtype of the speeds below"),
    ("ceilings.flops_per_s", "number", "speed of matrix products as a training step computes them"),
    ("ceilings.bytes_per_s", "number", "memory bandwidth of elementwise operations"),
    (
        "ceilings.exponentials_per_s",
        "number?",
        "exponentials per second; null on a GPU, where memory bandwidth is the limit instead",
    ),
    ("ceilings.launch_s", "number", "seconds to start one operation"),
)
RESULT = fields_of(
    "results[].",
    ("workload", "mapping", "the whole definition (mlx_lora/bench/run.py)"),
    ("workload.name", "text", "the value for `--workload`"),
    ("workload.version", "whole", "version of the definition"),
    ("workload.digest", "text", "hash of the definition, which shows whether it was edited"),
    ("workload.tier", "text", "memory size in GB, or `embedded`"),
    ("workload.model", "text", "the model's name in the suite"),
    ("workload.form", "text", "the kind of rows: `chat`, `2k`, `8k` or `dpo`"),
    ("workload.packed", "yes/no", "whether the base is quantized to 4 bits (QLoRA)"),
    ("status", "text", "`measured`, `not run` or `failed`"),
    ("reason", "text?", "why there are no figures"),
    (
        "shortened",
        "yes/no",
        "whether `--steps` or `--seconds` changed the length, so that the result cannot be compared",
    ),
    ("data_sha256", "text", "hash of the training data"),
    ("base", "mapping?", "`model`, `revision` and `fingerprint` of the weights"),
    ("power_before", "mapping", "power and temperature before the workload"),
    ("power_after", "mapping?", "the same fields after the workload"),
    ("figures", "mapping?", "the measurements, if `status` is `measured`"),
    ("predicted", "mapping?", "the planner's prediction for the counted steps, which is not a measurement"),
)
POWER = fields_of(
    "",
    ("source", "text?", "power source: `ac` or `battery`"),
    ("low_power_mode", "yes/no?", "whether macOS's low power mode, or Linux's low-power platform profile, is on"),
    ("thermal_state", "text?", "macOS's thermal state: `nominal`, `fair`, `serious` or `critical`"),
    ("temperature_c", "number?", "temperature of the hottest sensor; Linux only"),
    (
        "load_average",
        "number",
        "system load over a minute: before the first measurement of the whole result; after the workload, with the workload's own load",
    ),
)
FIGURES = (
    *fields_of("", ("tokens_per_s", "mapping", "tokens per second in a step, without padding")),
    *_spread("tokens_per_s.", "tokens/s"),
    *fields_of("", ("supervised_tokens_per_s", "mapping", "trained tokens per second in a step")),
    *_spread("supervised_tokens_per_s.", "trained tokens/s"),
    *fields_of("", ("step_s", "mapping", "seconds per step")),
    *_spread("step_s.", "seconds"),
    *fields_of(
        "",
        (
            "overall_tokens_per_s",
            "number",
            "tokens of all counted steps, without padding, divided by their time; includes steps with new batch shapes",
        ),
        (
            "first_step_s",
            "number",
            "seconds from the start of the process to the end of the first step: imports, loading, compilation and the step",
        ),
        ("warmup_steps", "whole", "steps of the first pass over the rows, which are not counted"),
        ("counted_steps", "whole", "steps after the first pass"),
        ("counted_s", "number", "seconds of the counted steps"),
        ("real_tokens", "whole", "tokens of the counted steps, without padding"),
        ("supervised_tokens", "whole", "how many of these tokens are trained"),
        ("positions", "whole", "tokens of the counted steps, with padding"),
        ("shapes", "mapping", "number of steps for each batch shape (rows x width)"),
        ("peak_memory_bytes", "whole", "peak memory of MLX's allocator over the whole run"),
        ("process_peak_bytes", "whole", "peak resident memory of the process"),
        ("skipped_steps", "whole", "steps that were skipped because the update was not finite"),
        (
            "last_loss",
            "number?",
            "loss of the last step, which only shows that training works, because the texts are random",
        ),
        (
            "useful_flops_per_s",
            "number",
            "operations per second that the model itself needs, without padding and without what checkpointing repeats, at the median speed",
        ),
        ("mfu", "number", "`useful_flops_per_s` divided by the measured speed of matrix products in the compute dtype"),
        (
            "mfu_listed",
            "number?",
            "`useful_flops_per_s` divided by the listed peak of the chip with this machine's GPU cores",
        ),
        ("energy_j", "number?", "energy from the end of the first step to the end of the run, in joules"),
        ("energy_source", "text", "where the energy was read, or why it could not be read"),
    ),
)
PREDICTED = fields_of(
    "",
    ("tokens_per_s", "number", "tokens per second, without padding"),
    ("peak_memory_bytes", "whole", "peak memory of MLX's allocator"),
    ("needed_bytes", "whole", "peak memory and MLX's cache of freed buffers"),
    ("fits", "yes/no", "whether `needed_bytes` is below the device's `working_set_bytes`"),
    ("ceilings", "text", "where the speeds come from: `measured here`"),
)
KINDS = {
    "text": lambda value: isinstance(value, str) and bool(value),
    "number": lambda value: (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    ),
    "whole": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "yes/no": lambda value: isinstance(value, bool),
    "mapping": lambda value: isinstance(value, dict),
    "list": lambda value: isinstance(value, list),
}


def problems_of(content: Any) -> list[str]:
    """Return the problems of a result file's content, a few words each; empty: it is valid."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return [f'foreign: no "schema": "{SCHEMA}" in it']
    version = content.get("schema_version")
    if not isinstance(version, int) or not KINDS["whole"](version):
        return ["schema_version is missing"]
    if version != VERSION:
        advice = "update mlx-lora to read it" if version > VERSION else "run the benchmark again"
        age = "newer" if version > VERSION else "older"
        return [f"schema version {version}, {age} than {VERSION}, which is read here; {advice}"]
    found = [line for fields in (TOP, MACHINE, DEVICE, SOFTWARE, RATES) for line in field_problems(content, fields)]
    for number, entry in enumerate(content["results"] if isinstance(content.get("results"), list) else []):
        found += under(f"results[{number}]", _entry_problems(entry))
    return found


def under(path: str, lines: Iterable[str]) -> list[str]:
    """Return problems with the path of the part that they are in; some are about the part itself (`is missing`)."""
    return [f"{path} {line}" if line.startswith("is ") else f"{path}.{line}" for line in lines]


def _entry_problems(entry: Any) -> Iterator[str]:
    """Yield the problems of one workload's entry."""
    if not isinstance(entry, dict):
        yield "is not a mapping"
        return
    own = [Field(f.path.removeprefix("results[]."), f.kind, f.meaning, f.may_be_null) for f in RESULT]
    yield from field_problems(entry, own)
    for moment in ("power_before", "power_after"):
        if isinstance(entry.get(moment), dict):
            yield from under(moment, field_problems(entry[moment], POWER))
    workload = entry.get("workload")
    if isinstance(workload, dict) and workload.get("digest") != digest_of(workload):
        yield "workload.digest does not belong to the definition: it was edited"
    status = entry.get("status")
    if status not in STATUSES:
        yield f"status is {status!r}, not one of {', '.join(STATUSES)}"
    if status == "measured":
        for part, fields in (("figures", FIGURES), ("predicted", PREDICTED)):
            content = entry.get(part)
            yield from under(part, field_problems(content, fields) if content else ["is missing"])
    elif status in STATUSES and not entry.get("reason"):
        yield "reason is missing"
    figures = entry.get("figures")
    for name in ("tokens_per_s", "step_s", "peak_memory_bytes"):
        value = figures.get(name) if status == "measured" and isinstance(figures, dict) else None
        if value == 0 or (isinstance(value, dict) and value.get("median") == 0):
            yield f"figures.{name} is zero"


def field_problems(content: Any, fields: Any) -> Iterator[str]:
    """Yield the problems of a mapping's fields; fields inside a wrong one are not checked."""
    if not isinstance(content, dict):
        yield "is not a mapping"
        return
    for field in fields:
        for value, path in _values(content, field.path.split("."), ""):
            if value is ABSENT:
                yield f"{path} is missing"
            elif value is None and field.may_be_null:
                continue
            elif not KINDS[field.kind](value):
                shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."
                yield f"{path} is {shown}, not {'a ' if field.kind != 'yes/no' else ''}{field.kind}"


ABSENT = object()


def _values(content: Any, parts: list[str], path: str) -> Iterator[tuple[Any, str]]:
    """Yield the values that a path names, with their own paths."""
    if not parts:
        yield content, path.removeprefix(".")
    elif not isinstance(content, dict):
        return  # the parent was already reported, or is an allowed null
    elif parts[0] == "{}":
        for key, value in content.items():
            yield from _values(value, parts[1:], f"{path}.{key}")
    elif parts[0] in content:
        yield from _values(content[parts[0]], parts[1:], f"{path}.{parts[0]}")
    elif len(parts) == 1:
        yield ABSENT, f"{path}.{parts[0]}".removeprefix(".")


def document() -> str:
    """Return the schema as a Markdown table."""
    parts = (
        *((f.path, f) for fields in (TOP, MACHINE, DEVICE, SOFTWARE, RATES, RESULT) for f in fields),
        *((f"results[].power_before.{f.path}", f) for f in POWER),
        *((f"results[].figures.{f.path}", f) for f in FIGURES if f.path.split(".")[-1] not in ("min", "max")),
        *((f"results[].predicted.{f.path}", f) for f in PREDICTED),
    )
    lines = ["| field | type | meaning |", "|---|---|---|"]
    for path, f in parts:
        lines.append(f"| `{path}` | {f.kind}{' or null' if f.may_be_null else ''} | {f.meaning} |")
    return "\n".join(lines)


# Files

SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class ResultFile:
    """A result that was read and is valid.

    Attributes:
        path: of the file.
        content: as described by the schema.
    """

    path: Path
    content: dict[str, Any]


def machine_name(content: dict[str, Any]) -> str:
    """Return a result's chip, without `Apple`: the GPU's name on a Mac and with CUDA, the processor's on a CPU."""
    name = content["machine"]["chip"] if content["device"]["backend"] == "cpu" else content["device"]["name"]
    return (name or content["device"]["name"]).removeprefix("Apple ")


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Write a result, completely or not at all.

    Raises:
        ValueError: it is not valid, which is a bug of ours.
    """
    if problems := problems_of(content):
        raise ValueError("; ".join(problems))
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def default_path(content: dict[str, Any], root: Path) -> Path:
    """Return `root/<chip>/<date>-<tier>.json`, with a number if that exists."""
    tiers = "-".join(content["tiers"]) or "workloads"
    chip = re.sub(r"[^a-z0-9]+", "-", machine_name(content).lower()).strip("-") or "unknown"
    stem = root / chip / f"{content['created'][:10]}-{tiers}"
    path, number = stem.with_suffix(".json"), 2
    while path.exists():
        path, number = stem.with_name(f"{stem.name}-{number}.json"), number + 1
    return path


def read_result(path: Path) -> ResultFile:
    """Read one result.

    Raises:
        InputError: it is not JSON, not ours, has another schema version, or has fields that are missing or wrong.
    """
    content = read_json(path, "left out")
    if problems := problems_of(content):
        raise InputError(f"{path}: {first_of(problems, SHOWN_PROBLEMS)}; left out")
    return ResultFile(path, content)


def read_results(paths: Iterable[Path]) -> tuple[list[ResultFile], list[str]]:
    """Read files, and all .json files in folders and their subfolders but `measured`, whose files are of another kind.

    Returns:
        The valid results, in the order given (those of a folder by name), and a line for each invalid file.

    Raises:
        InputError: a path does not exist, or there is no valid result.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; give result files or folders of them")
        inside = [one for one in path.rglob("*.json") if one.is_file() and one.parent.name != "measured"]
        found = sorted(inside) if path.is_dir() else [path]
        for one in found:
            files.setdefault(one.resolve(), one)  # a file that is named twice is one result
    results, problems = [], []
    for file in files.values():
        try:
            results.append(read_result(file))
        except InputError as error:
            problems.append(str(error))
    if not results:
        reasons = "; ".join(problems) if problems else "no .json file in it"
        raise InputError(f"no result that can be read ({reasons}); make one with `mlx-lora bench run`")
    return results, problems


# Comparison

# With different versions of these, a ratio would compare software, not machines.
SAME_VERSIONS = ("mlx-lora", "mlx", "mlx-lm")
BUSY_LOAD = 1.0  # of other programs, per core, before a run


@dataclass(frozen=True)
class ResultRow:
    """One machine's figures on one workload.

    Attributes:
        label: of the machine.
        file: the result file.
        entry: the result's entry for the workload.
        mismatch: why there is no ratio to the reference; empty: there is one.
        notes: what a reader should know, a few words each.
        speed_ratio, memory_ratio: to the reference, or None.
    """

    label: str
    file: str
    entry: dict[str, Any]
    mismatch: tuple[str, ...]
    notes: tuple[str, ...]
    speed_ratio: float | None = None
    memory_ratio: float | None = None

    @property
    def measured(self) -> bool:
        """Whether there are figures."""
        return self.entry["status"] == "measured"

    @property
    def speed(self) -> dict[str, float]:
        """Median and spread of tokens per second."""
        return self.entry["figures"]["tokens_per_s"]


@dataclass(frozen=True)
class Table:
    """One workload on all machines.

    Attributes:
        name: of the workload.
        reference: label of the machine that the others are compared with; None: no machine measured it.
        rows: in the order of the files.
    """

    name: str
    reference: str | None
    rows: tuple[ResultRow, ...]


def labels_of(results: Sequence[ResultFile]) -> list[str]:
    """Return a label for each result's machine, as in `M2 Pro, 16 GB`.

    Where machines have one label, the numbers of their cores tell them apart: `M2 Pro, 19 GPU cores, 16 GB`. Results of equal
    machines also get the date, or the part of the path that differs.
    """
    memory = [round(one.content["machine"]["memory_bytes"] / 2**30) for one in results]
    parts = [[machine_name(one.content), f"{size} GB"] for one, size in zip(results, memory, strict=True)]
    for kind in ("GPU", "CPU"):
        cores = [one.content["machine"][f"{kind.lower()}_cores"] for one in results]
        for alike in _alike([", ".join(part) for part in parts]):
            if len({cores[n] for n in alike}) > 1:
                for n in alike:
                    # Not at the end, because charts cut long labels in the middle.
                    parts[n][-1:-1] = [counted(cores[n], f"{kind} core")] if cores[n] else []
    labels = [", ".join(part) for part in parts]
    for alike in _alike(labels):
        dates = [results[n].content["created"][:10] for n in alike]
        names = distinct_names([results[n].path for n in alike])
        for n, day, name in zip(alike, dates, names, strict=True):
            labels[n] += f" · {day if dates.count(day) == 1 else name}"
    return labels


def _alike(labels: Sequence[str]) -> list[list[int]]:
    """Return the positions of each label that occurs several times."""
    found = [[n for n, one in enumerate(labels) if one == label] for label in dict.fromkeys(labels)]
    return [alike for alike in found if len(alike) > 1]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return a short name for each file: its own, or that of a folder if the files have one name in several folders."""
    parts = [path.with_suffix("").parts for path in paths]
    if len(set(parts)) < len(parts):
        return [str(path) for path in paths]
    while len({one[-1] for one in parts}) == 1 and all(Path(*one[:-1]).name not in ("", "..") for one in parts):
        parts = [one[:-1] for one in parts]  # what all have in common, up to a folder that has a name
    names = []
    for mine in parts:
        size = 1
        while sum(one[-size:] == mine[-size:] for one in parts) > 1:
            size += 1
        names.append(Path(*mine[-size:]).as_posix())
    return names


def compare(results: Sequence[ResultFile], across_versions: bool = False) -> list[Table]:
    """Return a table for each workload that any of the results has, in their order.

    Args:
        results: the first that measured a workload is its reference.
        across_versions: give ratios even if versions differ, and note the difference.
    """
    runs: dict[str, list[tuple[str, ResultFile, dict[str, Any]]]] = {}
    for label, one in zip(labels_of(results), results, strict=True):
        for entry in one.content["results"]:
            runs.setdefault(entry["workload"]["name"], []).append((label, one, entry))
    tables = []
    for name, there in runs.items():
        first = next((item for item in there if item[2]["status"] == "measured"), None)
        rows = []
        for label, one, entry in there:
            notes = notes_of(one.content, entry)
            mismatch: list[str] = []
            ratios: dict[str, float] = {}
            if first and entry["status"] == "measured" and entry is not first[2]:
                mismatch = work_differs(entry, first[2])
                versions, others = software_differs(one.content["software"], first[1].content["software"])
                (notes if across_versions else mismatch).extend(versions)
                notes += others
                ours, theirs = entry["figures"], first[2]["figures"]
                if not mismatch:
                    ratios["speed_ratio"] = ours["tokens_per_s"]["median"] / theirs["tokens_per_s"]["median"]
                    ratios["memory_ratio"] = ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
            rows.append(ResultRow(label, str(one.path), entry, tuple(mismatch), tuple(notes), **ratios))
        tables.append(Table(name, first[0] if first else None, tuple(rows)))
    return tables


def work_differs(entry: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Return how the work of two entries with one name differs, a few words per difference."""
    ours, theirs = entry["workload"], reference["workload"]
    same_version = ours["version"] == theirs["version"]
    found = {
        f"workload version {ours['version']} against {theirs['version']}": not same_version,
        "another definition of the workload": same_version and ours["digest"] != theirs["digest"],
        "other training data": entry["data_sha256"] != reference["data_sha256"],
        "other weights": (entry["base"] or {}).get("fingerprint") != (reference["base"] or {}).get("fingerprint"),
        "not run at the workload's length": entry["shortened"] or reference["shortened"],
    }
    return [words for words, differs in found.items() if differs]


def software_differs(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the versions in which two results differ, and what else of their software does: variables, commit."""
    here, there = ours["versions"], theirs["versions"]
    versions = [
        f"{name} {here.get(name)} against {there.get(name)}"
        for name in SAME_VERSIONS
        if here.get(name) != there.get(name)
    ]
    here, there = (  # without those that were removed before measuring
        {name: value for name, value in software["variables"].items() if name not in software["removed_variables"]}
        for software in (ours, theirs)
    )
    others = [
        f"{name} {here.get(name) or 'unset'} against {there.get(name) or 'unset'}"
        for name in dict.fromkeys([*here, *there])
        if (here.get(name) or None) != (there.get(name) or None)
    ]
    others += [f"commit {ours['commit'] or 'unknown'}"] if ours["commit"] != theirs["commit"] else []
    return versions, others


def notes_of(content: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """Return notes on a run: what may have slowed it down, and what else a reader should know."""
    if entry["status"] != "measured":
        return [f"{entry['status']}: {entry['reason']}"]
    moments = [entry["power_before"], entry["power_after"] or {}]
    states = {moment.get("thermal_state") for moment in moments} - {None, "nominal"}
    cores, load = content["machine"]["cpu_cores"] or 1, entry["power_before"]["load_average"]
    skipped = entry["figures"]["skipped_steps"]
    notes = {
        "not run at the workload's length": entry["shortened"],
        "on battery": any(moment.get("source") == "battery" for moment in moments),
        "low-power mode": any(moment.get("low_power_mode") for moment in moments),
        **{f"thermal state {state}": True for state in sorted(states)},
        f"other programs ran (load {load:g} on {cores} cores)": load > BUSY_LOAD * cores,
        f"{skipped} updates were not finite": skipped,
    }
    return [words for words, holds in notes.items() if holds]


# Tables as text (aligned for a terminal, or Markdown) and as JSON

COLUMNS = (
    "machine",
    "tokens/s",
    "10-90%",
    "ratio",
    "peak GB",
    "ratio",
    "process GB",
    "first step s",
    "MFU",
    "predicted tokens/s",
    "predicted GB",
)


def cells_of(row: ResultRow) -> list[str]:
    """Return a row's cells for `COLUMNS`; the planner's figures have their own columns."""
    if not row.measured:
        return [row.label, row.entry["status"], *[""] * (len(COLUMNS) - 2)]
    figures, predicted = row.entry["figures"], row.entry["predicted"]
    return [
        row.label,
        number(row.speed["median"]),
        f"{number(row.speed['p10'])}-{number(row.speed['p90'])}",
        "none" if row.mismatch else _ratio(row.speed_ratio),
        f"{figures['peak_memory_bytes'] / 1e9:.2f}",
        "none" if row.mismatch else _ratio(row.memory_ratio),
        f"{figures['process_peak_bytes'] / 1e9:.2f}",
        f"{figures['first_step_s']:.1f}",
        f"{figures['mfu']:.0%}",
        f"{number(predicted['tokens_per_s'])} ({row.speed['median'] / predicted['tokens_per_s']:.0%} reached)",
        f"{predicted['peak_memory_bytes'] / 1e9:.2f}",
    ]


def remarks_of(table: Table) -> list[str]:
    """Return a line for each note on a table's rows, and for each row without a ratio."""
    found = []
    for row in table.rows:
        if row.mismatch:
            found.append(f"{row.label}: no ratio to {table.reference}: {'; '.join(row.mismatch)}")
        found += [f"{row.label}: {note}" for note in row.notes]
    return found


def render_tables(tables: Sequence[Table], markdown: bool) -> str:
    """Return all tables as text."""
    shown = [(table, [COLUMNS, *map(cells_of, table.rows)], remarks_of(table)) for table in tables]
    return render(PAGES / "compare.txt", {"tables": shown, "markdown": markdown})


def to_json(tables: Sequence[Table]) -> dict[str, Any]:
    """Return the comparison as JSON values."""
    return {
        "comparisons": [
            {
                "workload": table.name,
                "reference": table.reference,
                "rows": [
                    {
                        "machine": row.label,
                        "file": row.file,
                        "status": row.entry["status"],
                        "figures": row.entry["figures"],
                        "predicted": row.entry["predicted"],
                        "speed_ratio": row.speed_ratio,
                        "memory_ratio": row.memory_ratio,
                        "no_ratio_because": list(row.mismatch),
                        "notes": list(row.notes),
                    }
                    for row in table.rows
                ],
            }
            for table in tables
        ]
    }


def number(value: float) -> str:
    """Return a rate with at least three digits, without decimals from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "1" if value is None else f"{value:.2f}"


PAGES = Path(__file__).parent / "pages"
KNOWN = {one.name: one for one in WORKLOADS}


def write_page(
    path: Path, results: Sequence[ResultFile], problems: Sequence[str], across_versions: bool = False
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        results: the valid results.
        problems: a line for each file that was left out.
        across_versions: as in `compare`.
    """
    tables = compare(results, across_versions)
    measured = [table for table in tables if table.reference]
    speeds = [row.speed["median"] for table in measured for row in table.rows if row.measured]
    macs = {machine_name(one.content) for one in results if one.content["device"]["backend"] == "metal"}
    tiers = {tier: {one.name: _chips(one) for one in WORKLOADS if one.tier == tier} for tier in TIERS}
    page = render_page(
        PAGES,
        "bench.html",
        date=date.today().isoformat(),
        tiles=[
            ("results", str(len(results))),
            ("kinds of Macs", str(len(macs)) if macs else "none yet"),
            ("workloads measured", str(len(measured))),
            ("fastest, tokens/s", number(max(speeds)) if speeds else "–"),
        ],
        problems=problems,
        machines=[(label, one.content) for label, one in zip(labels_of(results), results, strict=True)],
        columns=COLUMNS,
        sections=[_section(table, results) for table in measured],
        missing=[(table.name, remarks_of(table)) for table in tables if not table.reference],
        scaling=[_scaling(table, results) for table in measured if table.name in KNOWN],
        tiers=tiers,
        chips=CHIPS,
        number=number,
    )
    replace_text(path, page)


def _section(table: Table, results: Sequence[ResultFile]) -> dict[str, Any]:
    """Return one workload for the page: its table, its description, and charts of what was measured and is predicted."""
    rows = [row for row in table.rows if row.measured]
    speed = [
        Bar(row.label, row.speed["median"], low=row.speed["p10"], high=row.speed["p90"], note="; ".join(row.notes))
        for row in rows
    ]
    memory = []
    for row in rows:
        figures, planned = row.entry["figures"], row.entry["predicted"]["peak_memory_bytes"]
        memory += [
            Bar(row.label, figures["peak_memory_bytes"] / 1e9, note="MLX's allocator"),
            Bar("its process", figures["process_peak_bytes"] / 1e9, color=1, note=row.label),
            Bar("by the plan", planned / 1e9, predicted=True, note=f"{row.label}, MLX's allocator"),
        ]
    measured = [_chart(table, "measured", "tokens per second", speed)]
    measured.append(_chart(table, "measured", "peak memory", memory, " GB"))
    predicted = []
    if workload := KNOWN.get(table.name):
        seen = {machine_name(one.content) for one in results for row in rows if row.file == str(one.path)}
        speed = [
            Bar(
                one["chip"],
                one["tokens_per_s"],
                predicted=True,
                note=f"with {one['memory_gib']} GB; from {one['status']} peaks",
            )
            for one in _chips(workload)
            if one["chip"] not in seen and one["fits"]
        ]
        memory = []
        for size, one in predict_sizes(workload):
            peak, most = one["peak_memory_bytes"] / 1e9, one["working_set_bytes"] / 1e9
            words = f"{peak:.3g} of {most:.0f} GB" if one["fits"] else f"{peak:.3g} GB: too much"
            note = f"MLX's allocator; the GPU may use {most:.1f} GB"
            memory.append(Bar(f"Mac, {size} GB", peak, predicted=True, note=note, words=words))
        predicted = [_chart(table, "predicted", "tokens per second", speed)]
        predicted.append(_chart(table, "predicted", "peak memory", memory, " GB"))
    return {
        "table": table, "workload": table.rows[0].entry["workload"], "predicted": predicted, "measured": measured,
        "cells": [cells_of(row) for row in table.rows], "remarks": remarks_of(table),
    }  # fmt: skip


def _chart(table: Table, kind: str, what: str, bars: Sequence[Bar], unit: str = "") -> dict[str, Any]:
    kinds = dict.fromkeys((bar.color, bar.predicted) for bar in bars)
    words = {(0, False): "measured", (1, False): "measured, process", (0, True): "predicted, not measured"}
    keys = [(color, hollow, words[color, hollow]) for color, hollow in kinds]
    return {
        "title": f"{kind.capitalize()}: {what}",
        "svg": bar_chart(f"{table.name}: {kind} {what}", bars, unit),
        "keys": keys,
    }


def _scaling(table: Table, results: Sequence[ResultFile]) -> dict[str, Any]:
    """Draw tokens per second over GPU cores: a dashed line per generation for predictions, dots for measurements."""
    generations: dict[str, list[tuple[float, float]]] = {}
    for one in _chips(KNOWN[table.name]):
        if one["fits"]:
            points = generations.setdefault(one["chip"].split()[0], [])
            points.append((one["gpu_cores"], one["tokens_per_s"]))
    series = [Series(f"{name}, predicted", sorted(points), dashed=True) for name, points in generations.items()]
    cores = {str(one.path): one.content["machine"]["gpu_cores"] for one in results}
    dots = sorted((cores[row.file], row.speed["median"]) for row in table.rows if row.measured and cores[row.file])
    # NaN makes gaps between the points, because different machines are not on one line.
    apart = [point for cores_there, speed in dots for point in ((cores_there, speed), (cores_there, math.nan))]
    series.append(Series("measured" if dots else "measured: no Mac yet", apart))
    title = f"{table.name}: tokens per second over GPU cores"
    return {"title": table.name, "series": series, "svg": line_chart(title, series, "", True, "cores")}


@cache
def _chips(workload: Workload) -> list[dict[str, Any]]:
    return predict_chips(workload)
