"""Write and read result files; one that cannot be read is reported with one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora.suite.schema import SCHEMA, VERSION, problems_of
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import replacing_file

MOST_BYTES = 10_000_000
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

    @property
    def chip(self) -> str:
        """The chip's name, without `Apple`."""
        return machine_name(self.content)

    @property
    def label(self) -> str:
        """Chip and memory, as in `M2 Pro, 16 GB`."""
        return f"{self.chip}, {round(self.content['machine']['memory_bytes'] / 2**30)} GB"


def machine_name(content: dict[str, Any]) -> str:
    """Return a result's chip: the GPU's name on a Mac and with CUDA, the processor's on a CPU."""
    name = content["machine"]["chip"] if content["device"]["backend"] == "cpu" else content["device"]["name"]
    return (name or content["device"]["name"]).removeprefix("Apple ")


def slug(name: str) -> str:
    """Return a folder name for a chip."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def new_result(
    created: str, tiers: Sequence[str], machine: dict[str, Any], software: dict[str, Any], probe: dict[str, Any]
) -> dict[str, Any]:
    """Return a result without entries; `probe` holds `device` and `rates`."""
    return {
        "schema": SCHEMA,
        "schema_version": VERSION,
        "created": created,
        "tiers": list(tiers),
        "machine": machine,
        "device": probe["device"],
        "software": software,
        "rates": probe["rates"],
        "results": [],
    }


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Write a result, completely or not at all.

    Raises:
        ValueError: it is not valid, which is a bug of ours.
    """
    problems = problems_of(content)
    if problems:
        raise ValueError("; ".join(problems))
    with replacing_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def default_path(content: dict[str, Any], root: Path) -> Path:
    """Return `root/<chip>/<date>-<tier>.json`, with a number if that exists."""
    tiers = "-".join(content["tiers"]) or "workloads"
    stem = root / slug(machine_name(content)) / f"{content['created'][:10]}-{tiers}"
    path, number = stem.with_suffix(".json"), 2
    while path.exists():
        path, number = stem.with_name(f"{stem.name}-{number}.json"), number + 1
    return path


def read_result(path: Path) -> ResultFile:
    """Read one result.

    Raises:
        InputError: it is not JSON, not ours, has another schema version, or has fields that are missing or wrong.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: {path.stat().st_size / 1e6:.0f} MB, too large for a result file; left out")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); left out") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; left out") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: corrupt, not JSON ({str(error).splitlines()[0]}); left out") from None
    problems = problems_of(content)
    if problems:
        more = f", and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise InputError(f"{path}: {'; '.join(problems[:SHOWN_PROBLEMS])}{more}; left out")
    return ResultFile(path, content)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def read_results(paths: Iterable[Path]) -> tuple[list[ResultFile], list[str]]:
    """Read files, and all .json files in folders and their subfolders.

    Returns:
        The valid results, in the order given (those of a folder by name), and a line for each invalid file.

    Raises:
        InputError: a path does not exist, or there is no valid result.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; give result files or folders of them")
        found = sorted(one for one in path.rglob("*.json") if one.is_file()) if path.is_dir() else [path]
        files += [one for one in found if one not in files]
    results, problems = [], []
    for file in files:
        try:
            results.append(read_result(file))
        except InputError as error:
            problems.append(str(error))
    if not results:
        reasons = "; ".join(problems) if problems else "no .json file in it"
        raise InputError(f"no result that can be read ({reasons}); make one with `mlx-lora bench run`")
    return results, problems
