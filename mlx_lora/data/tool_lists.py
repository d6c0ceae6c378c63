"""Read the tools that a model is shown from a file: a JSON list of them, or the first row of a data set that has some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lora.data.examples import FormatError
from mlx_lora.data.messages import tools_of
from mlx_lora.system.errors import InputError
from mlx_lora.system.parsing import parse_json


def read_tools(file: str) -> list[dict[str, Any]]:
    """Return the tools in a file, each `{type, function: {name, ...}}`.

    Args:
        file: `.json` with a list, or with an object that has `tools`; `.jsonl`, whose first row with `tools` counts.

    Raises:
        InputError: there is no such file, or it has no tools.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = (
            [parse_json(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else [parse_json(text)]
        )
    except OSError as error:
        raise InputError(
            f"--tools {file}: cannot be read ({error.strerror}); give a JSON file with a list of tools"
        ) from None
    except ValueError as error:
        raise InputError(f"--tools {file}: not valid JSON ({error}); give a JSON file with a list of tools") from None
    lists = [row if isinstance(row, list) else row.get("tools") for row in rows if isinstance(row, list | dict)]
    try:
        found = next((tools for tools in map(tools_of, lists) if tools), None)
    except FormatError as error:
        raise InputError(f"--tools {file}: {error}") from None
    if found is None:
        raise InputError(f"--tools {file}: no tools in it; give a list of objects, or rows with the field tools")
    return found
