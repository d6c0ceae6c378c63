"""Read LLaMA-Factory's dataset_info.json: where each data set is, and what its columns, fields and roles are called.

    {"shop": {"file_name": "shop.json", "columns": {"prompt": "frage", "query": "dazu", "response": "antwort"}},
     "chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "dialog"},
               "tags": {"role_tag": "wer", "content_tag": "was", "user_tag": "kunde", "assistant_tag": "shop"}}}

`--data FOLDER` reads the table of a folder, too: its only set, or `--data FOLDER/NAME`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from mlx_lora.config.migration.column_keys import put_turn_names
from mlx_lora.config.migration.sheet import Sheet
from mlx_lora.config.objectives import WITHOUT_PAIRS
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import hashable, read_json
from mlx_lora.utils.text import did_you_mean

TABLE = "dataset_info.json"
SOURCES = ("file_name", "hf_hub_url", "ms_hub_url", "script_url")
# What a set's columns and tags may say without a word from us, because we detect it.
COLUMNS = {
    "messages": ("conversations", "conversation", "messages", "completion"),
    "prompt": ("instruction", "question", "prompt", "input"),
    "query": ("input",),
    "response": ("output", "completion"),
    "history": ("history",),
    "system": ("system",),
    "tools": ("tools",),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "kto_tag": ("kto_tag", "label"),
}
TAGS = {
    "role_tag": ("role", "from"),
    "content_tag": ("content", "value"),
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}
# A tag -> our role.
ROLES = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}


def find_dataset(sheet: Sheet, name: str, folder: Path) -> str | None:
    """Look up a set in a folder's table, and set what it says of columns, fields and roles.

    Args:
        sheet: Written.
        name: Of the set.
        folder: With the table.

    Returns:
        A file or a hub id; None if the table or the entry is missing.

    Raises:
        InputError: the table is not a JSON object.
    """
    table = folder / TABLE
    if not table.is_file():
        return None
    entry = read_json(table, "fix it, or give --data").get(name)
    if not isinstance(entry, dict):
        return None
    source = entry.get("file_name") or entry.get("hf_hub_url")
    if source is not None and not isinstance(source, str):
        raise InputError(f"{table}: the source of {name} is not a text; fix it, or give --data")
    for key in ("subset", "split", "num_samples"):
        if entry.get(key) and (key, entry[key]) != ("split", "train"):
            sheet.left_out.append(f"{TABLE} {name}.{key}")
    pairs = bool(entry.get("ranking")) or sheet.found.get("objective", "sft") not in WITHOUT_PAIRS
    put_columns(sheet, name, entry.get("columns") or {}, pairs)
    put_tags(sheet, name, entry.get("tags") or {})
    return str(folder / source) if source and entry.get("file_name") else source


def put_columns(sheet: Sheet, name: str, columns: Any, pairs: bool) -> None:
    """Set our columns from those of a set, unless all are recognized by themselves.

    Args:
        sheet: Written.
        name: Of the set.
        columns: LLaMA-Factory's name of a column -> the column.
        pairs: Whether the set has pairs of answers, of which only the prompt's column can have any name.
    """
    key = f"{TABLE} {name}.columns"
    if _are_detected(columns, COLUMNS):
        return
    if not isinstance(columns, dict) or not all(isinstance(value, str) for value in columns.values()):
        sheet.left_out.append(key)
        return
    if sheet.found.get("data_format") == "text":  # LLaMA-Factory's prompt is the text there
        put_text(sheet, columns.get("prompt", "text"), key)
        return
    rest = dict(columns)
    asked = [rest.pop(part, None) for part in ("prompt", "query")]
    asked = [column for column in asked if column]
    if pairs:
        rest.pop("response", None)
        answer, chat, system = None, None, rest.pop("system", None)
    else:
        answer, chat, system = (rest.pop(part, None) for part in ("response", "messages", "system"))
    if chat:
        sheet.put("chat_column", chat, key)
    if asked:
        sheet.put("prompt_column", ",".join(asked), key)
    if answer or (asked and not pairs):
        sheet.put("completion_column", answer or "output", key)
    if answer and not asked:
        sheet.put("prompt_column", "instruction", key)
    if system:
        sheet.put("system_column", system, key)
    sheet.found.pop("data_format", None)  # the columns tell it
    unread = [part for part, column in rest.items() if column not in COLUMNS.get(part, ())]
    sheet.left_out += [f"{key}.{part}" for part in unread]


def put_text(sheet: Sheet, column: str, key: str) -> None:
    """Set the column of plain text."""
    if column != "text":
        sheet.put("text_column", column, key)
        sheet.found.pop("data_format", None)  # the column tells it


def put_tags(sheet: Sheet, name: str, tags: Any) -> None:
    """Set the names of a turn's fields and roles, unless all are recognized by themselves."""
    key = f"{TABLE} {name}.tags"
    if _are_detected(tags, TAGS):
        return
    if not isinstance(tags, dict) or not all(isinstance(value, str) for value in tags.values()):
        sheet.left_out.append(key)
        return
    fields = {tag.removesuffix("_tag"): tags[tag] for tag in ("role_tag", "content_tag") if tag in tags}
    put_turn_names(sheet, fields, {role: tags[tag] for tag, role in ROLES.items() if tag in tags}, key)
    unread = [tag for tag, value in tags.items() if tag not in ("role_tag", "content_tag", *ROLES)]
    sheet.left_out += [f"{key}.{tag}" for tag in unread if tags[tag] not in TAGS.get(tag, ())]


def _are_detected(given: Any, known: dict[str, tuple[str, ...]]) -> bool:
    """Tell whether names need not be read, because we detect them from the records."""
    return isinstance(given, dict) and all(hashable(name) in known.get(part, ()) for part, name in given.items())


def settings_of_table(data: str, known: Collection[str]) -> dict[str, Any]:
    """Return the settings that a folder's table has for `--data`: the set's file and its columns.

    Args:
        data: As given: a folder with a table, or such a folder and the name of a set in it.
        known: Names of our settings.

    Returns:
        Empty if `data` is anything else.

    Raises:
        InputError: the table has several sets and none is named, or no such set.
    """
    path = Path(data).expanduser()
    folder, name = (path, None) if path.is_dir() else (path.parent, path.name)
    if path.is_file() or not (folder / TABLE).is_file() or any(folder.glob("train[.-]*")):
        return {}
    entries = read_json(folder / TABLE, "fix it, or name a data file as --data")
    sets = [one for one, entry in entries.items() if isinstance(entry, dict) and any(key in entry for key in SOURCES)]
    if not sets:  # datasets writes a file of this name too
        return {}
    if name is None:
        here = [one for one in sets if (folder / str(entries[one].get("file_name", ""))).is_file()]
        if len(here) != 1:
            listed = ", ".join(sets[:8]) + (f" and {len(sets) - 8} more" if len(sets) > 8 else "")
            raise InputError(f"--data {data}: {TABLE} there has the sets {listed}; name one as {folder / sets[0]}")
        name = here[0]
    elif name not in sets:
        if not path.suffix and folder != Path() and (hint := did_you_mean(name, sets)):
            raise InputError(f"--data {data}: no set {name!r} in {folder / TABLE}{hint}")
        return {}  # another file of that folder, or no name of a set at all
    sheet = Sheet(str(folder / TABLE), {}, known)
    source = find_dataset(sheet, name, folder)
    if source is None:
        raise InputError(f"--data {data}: {TABLE} there names no file and no hub id for {name}; name a data file")
    return {**sheet.found, "data": source}
