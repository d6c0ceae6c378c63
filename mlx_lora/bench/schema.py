"""The schema of a result file, version 1: every field with its type and meaning, and a check of files against it.

docs/benchmarks.md has the same table; a test compares the two. A name ending in `[]` means each entry of a list, one
ending in `{}` each value of a mapping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mlx_lora.bench.workloads import digest_of

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
    ("workload", "mapping", "the whole definition (mlx_lora/bench/workloads.py)"),
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
                yield f"{path} is {_short(value)}, not {'a ' if field.kind != 'yes/no' else ''}{field.kind}"


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


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
