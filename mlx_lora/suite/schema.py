"""The schema of a result file, version 1: every field with its type and meaning, and a check of files against it.

docs/benchmarks.md has the same table; a test compares the two. A name ending in `[]` means each entry of a list, one
ending in `{}` each value of a mapping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mlx_lora.suite.workloads import digest_of

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


def _fields(prefix: str, *rows: tuple[str, str, str]) -> tuple[Field, ...]:
    """Return fields with a prefix; a `?` after the kind allows null."""
    return tuple(Field(f"{prefix}{name}", kind.rstrip("?"), text, kind.endswith("?")) for name, kind, text in rows)


def _spread(prefix: str, of: str) -> tuple[Field, ...]:
    return _fields(
        prefix,
        ("median", "number", f"{of}: median of the steady steps"),
        ("p10", "number", "10th percentile, nearest rank"),
        ("p90", "number", "90th percentile"),
        ("min", "number", "least"),
        ("max", "number", "largest"),
    )


TOP = _fields(
    "",
    ("schema", "text", f"`{SCHEMA}`"),
    ("schema_version", "whole", "1"),
    ("created", "text", "local date and time of the start, ISO 8601"),
    ("tiers", "list", "what was asked for: `--tier`"),
    ("machine", "mapping", "hardware and system"),
    ("device", "mapping", "the device as MLX has it"),
    ("software", "mapping", "what ran"),
    ("rates", "mapping", "micro-benchmarks, best of five"),
    ("results", "list", "one entry per workload"),
)
MACHINE = _fields(
    "machine.",
    ("chip", "text?", "chip or processor name"),
    ("model", "text?", "the machine's model name"),
    ("architecture", "text", "`arm64`, `x86_64`"),
    ("cpu_cores", "whole?", "logical"),
    ("performance_cores", "whole?", "of Apple silicon"),
    ("efficiency_cores", "whole?", "of Apple silicon"),
    ("gpu_cores", "whole?", "of Apple silicon"),
    ("memory_bytes", "whole", "of the machine"),
    ("system", "text", "`macOS`, `Linux`"),
    ("system_version", "text?", "of macOS, or the kernel's"),
    ("system_build", "text?", "of macOS"),
)
DEVICE = _fields(
    "device.",
    ("name", "text", "as the backend calls it"),
    ("backend", "text", "`metal`, `cpu` or `cuda`"),
    ("memory_bytes", "whole", "that it can address"),
    ("working_set_bytes", "whole", "that a run should stay under"),
    ("blas", "text?", "of the CPU backend"),
    ("compute_dtype", "text", "of all workloads"),
)
SOFTWARE = _fields(
    "software.",
    ("commit", "text?", "of the checkout, `-dirty` if files differ; null when installed"),
    ("python", "text", "version"),
    ("versions", "mapping", "package to version, null where it is not installed"),
    ("variables", "mapping", "environment variables that change speed, null where unset"),
    ("removed_variables", "list", "names that were removed from every measured process"),
)
RATES = _fields(
    "rates.",
    ("gemm_flops_per_s", "mapping", "square products, the best size, by dtype"),
    ("gemm_flops_per_s.{}", "number", "of one dtype"),
    ("quantized_matmul_flops_per_s", "mapping", "4-bit weights by 1 and 1024 rows, and `dequantize_then_gemm`"),
    ("quantized_matmul_flops_per_s.{}", "number", "of one way"),
    ("copy_bytes_per_s", "number", "one array read, one written"),
    ("triad_bytes_per_s", "number", "two arrays read, one written"),
    ("ceilings", "mapping", "what predictions are made from"),
    ("ceilings.dtype", "text", "of the three below"),
    ("ceilings.flops_per_s", "number", "of a step's products"),
    ("ceilings.bytes_per_s", "number", "of elementwise passes"),
    ("ceilings.exponentials_per_s", "number?", "null where they hide behind memory (a GPU)"),
    ("ceilings.launch_s", "number", "of one operation"),
)
RESULT = _fields(
    "results[].",
    ("workload", "mapping", "the whole definition (mlx_lora/suite/workloads.py)"),
    ("workload.name", "text", "as `--workload` takes it"),
    ("workload.version", "whole", "of the definition"),
    ("workload.digest", "text", "of the definition: a changed one is found out"),
    ("workload.tier", "text", "memory size in GB, or `embedded`"),
    ("workload.model", "text", "which model"),
    ("workload.form", "text", "`chat`, `2k`, `8k` or `dpo`"),
    ("workload.packed", "yes/no", "4-bit base (QLoRA)"),
    ("status", "text", "`measured`, `not run` or `failed`"),
    ("reason", "text?", "why there are no figures"),
    ("shortened", "yes/no", "`--steps` or `--seconds` was given: not comparable"),
    ("data_sha256", "text", "of the training data"),
    ("base", "mapping?", "`model`, `revision` and `fingerprint` of the weights"),
    ("power_before", "mapping", "as below, at the start"),
    ("power_after", "mapping?", "at the end"),
    ("figures", "mapping?", "when measured"),
    ("predicted", "mapping?", "by the planner, of the steps that were counted; not a measurement"),
)
POWER = _fields(
    "",
    ("source", "text?", "`ac` or `battery`"),
    ("low_power_mode", "yes/no?", "of macOS; on Linux the low-power platform profile"),
    ("thermal_state", "text?", "of macOS: `nominal`, `fair`, `serious`, `critical`"),
    ("temperature_c", "number?", "hottest zone, Linux"),
    ("load_average", "number", "over the last minute: other programs, and at the end this one"),
)
FIGURES = (
    *_fields("", ("tokens_per_s", "mapping", "real tokens (padding not counted) per second of a step")),
    *_spread("tokens_per_s.", "tokens/s"),
    *_fields("", ("supervised_tokens_per_s", "mapping", "the same of trained tokens")),
    *_spread("supervised_tokens_per_s.", "trained tokens/s"),
    *_fields("", ("step_s", "mapping", "seconds of a step")),
    *_spread("step_s.", "seconds"),
    *_fields(
        "",
        ("overall_tokens_per_s", "number", "real tokens of all counted steps over their time, new shapes included"),
        ("first_step_s", "number", "from the start of the process: imports, model, data, compilation, one step"),
        ("warmup_steps", "whole", "left out: the first pass over the rows"),
        ("counted_steps", "whole", "after them"),
        ("counted_s", "number", "seconds of the counted steps"),
        ("real_tokens", "whole", "of the counted steps"),
        ("supervised_tokens", "whole", "of these, trained"),
        ("positions", "whole", "of the counted steps, padding included"),
        ("shapes", "mapping", "batch shape, rows x width, to steps"),
        ("peak_memory_bytes", "whole", "MLX's allocator, whole run"),
        ("process_peak_bytes", "whole", "largest resident size of the process"),
        ("skipped_steps", "whole", "updates that were not finite"),
        ("last_loss", "number?", "of the last step: a sign of life, the text means nothing"),
        ("useful_flops_per_s", "number", "work of the model without repeats and padding, at the median speed"),
        ("mfu", "number", "that over the measured product in the compute dtype"),
        ("mfu_listed", "number?", "that over the chip's listed peak"),
        ("energy_j", "number?", "from the first step's end to the run's end"),
        ("energy_source", "text", "what was read, or why nothing was"),
    ),
)
PREDICTED = _fields(
    "",
    ("tokens_per_s", "number", "real tokens"),
    ("peak_memory_bytes", "whole", "MLX's allocator"),
    ("needed_bytes", "whole", "with the buffer cache"),
    ("fits", "yes/no", "in the working set"),
    ("ceilings", "text", "whose rates: `measured here`"),
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
        advice = "update mlx_lora to read it" if version > VERSION else "run the benchmark again"
        age = "newer" if version > VERSION else "older"
        return [f"schema version {version}, {age} than {VERSION}, which is read here; {advice}"]
    found = [line for fields in (TOP, MACHINE, DEVICE, SOFTWARE, RATES) for line in _check(content, fields)]
    for number, entry in enumerate(content["results"] if isinstance(content.get("results"), list) else []):
        found += _under(f"results[{number}]", _entry_problems(entry))
    return found


def _under(path: str, lines: Iterable[str]) -> list[str]:
    """Return problems with the path of the part that they are in; some are about the part itself (`is missing`)."""
    return [f"{path} {line}" if line.startswith("is ") else f"{path}.{line}" for line in lines]


def _entry_problems(entry: Any) -> Iterator[str]:
    """Yield the problems of one workload's entry."""
    if not isinstance(entry, dict):
        yield "is not a mapping"
        return
    own = [Field(f.path.removeprefix("results[]."), f.kind, f.meaning, f.may_be_null) for f in RESULT]
    yield from _check(entry, own)
    for moment in ("power_before", "power_after"):
        if isinstance(entry.get(moment), dict):
            yield from _under(moment, _check(entry[moment], POWER))
    workload = entry.get("workload")
    if isinstance(workload, dict) and workload.get("digest") != digest_of(workload):
        yield "workload.digest does not belong to the definition: it was edited"
    status = entry.get("status")
    if status not in STATUSES:
        yield f"status is {status!r}, not one of {', '.join(STATUSES)}"
    if status == "measured":
        for part, fields in (("figures", FIGURES), ("predicted", PREDICTED)):
            content = entry.get(part)
            yield from _under(part, _check(content, fields) if content else ["is missing"])
    elif status in STATUSES and not entry.get("reason"):
        yield "reason is missing"
    figures = entry.get("figures")
    for name in ("tokens_per_s", "step_s", "peak_memory_bytes"):
        value = figures.get(name) if status == "measured" and isinstance(figures, dict) else None
        if value == 0 or (isinstance(value, dict) and value.get("median") == 0):
            yield f"figures.{name} is zero"


def _check(content: Any, fields: Any) -> Iterator[str]:
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
