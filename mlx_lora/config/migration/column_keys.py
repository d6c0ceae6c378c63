"""What other trainers' names of columns, and of the fields and roles of a turn, become here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lora.config.migration.sheet import Sheet

# mlx-lm's key -> our setting, and the column that mlx-lm takes without the key.
FEATURES = {
    "prompt_feature": ("prompt_column", "prompt"),
    "completion_feature": ("completion_column", "completion"),
    "chat_feature": ("chat_column", "messages"),
    "text_feature": ("text_column", "text"),
}
# Fields and roles that are recognized by themselves.
USUAL = {
    "role": ("role", "from"),
    "content": ("content", "value"),
    "system": ("system",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "chatgpt"),
    "tool": ("tool", "observation"),
}
ROLES = ("system", "user", "assistant", "tool")


def take_columns(sheet: Sheet, source: dict[str, Any], names: Mapping[str, tuple[str, Any]], prefix: str) -> None:
    """Set our column settings from keys of a data set, and remove these keys.

    Args:
        sheet: Written.
        source: The data set's keys.
        names: Its key -> our setting, and the names that we recognize without it.
        prefix: Of the key in messages.
    """
    for key, (ours, known) in names.items():
        value = source.get(key)
        if value is None or not isinstance(value, str):
            continue
        del source[key]
        if value not in ((known,) if isinstance(known, str) else known):
            sheet.put(ours, value, f"{prefix}{key}")
            sheet.found.pop("data_format", None)  # the columns tell it


def join_paths(paths: list[Any]) -> str:
    """Return several data sets as one value of --data."""
    return ",".join(str(path) for path in paths if path)


def take_features(sheet: Sheet, source: dict[str, Any], prefix: str) -> None:
    """Set our columns from mlx-lm's features; of a pair of which one is named, the other keeps mlx-lm's name."""
    given = {key: source[key] for key in FEATURES if isinstance(source.get(key), str)}
    take_columns(sheet, source, FEATURES, prefix)
    pair = ("prompt_column", "completion_column")
    if any(name in sheet.found for name in pair):
        for key, name in zip(FEATURES, pair, strict=False):
            sheet.assume(name, given.get(key, FEATURES[key][1]))


def put_turn_names(sheet: Sheet, fields: Mapping[str, Any], roles: Mapping[str, Any], key: str) -> None:
    """Set the names of a turn's fields and roles, where they are not those that we recognize.

    Args:
        sheet: Written.
        fields: `role` and `content` -> the field in the data.
        roles: Our role -> its name or names in the data.
        key: Of the file, for what cannot be read.
    """
    parts = [f"{ours}={theirs}" for ours, theirs in fields.items() if theirs not in USUAL[ours]]
    for ours, theirs in roles.items():
        names = theirs if isinstance(theirs, list) else [theirs]
        parts += [f"{ours}={name}" for name in names if str(name).lower() not in USUAL.get(ours, ())]
    if not parts:
        return
    if any("," in part or part.count("=") > 1 for part in parts) or not set(roles) <= set(ROLES):
        sheet.left_out.append(key)
        return
    before = sheet.found.get("turn_names")
    sheet.put("turn_names", ",".join([*([before] if before else []), *parts]), key)
