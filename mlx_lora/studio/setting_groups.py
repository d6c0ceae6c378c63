"""Describe all settings of a run to the page."""

from __future__ import annotations

from typing import Any

from mlx_lora.config.fields import field_type, flag_of
from mlx_lora.config.settings import FIELDS, ROWS
from mlx_lora.objectives.table import OBJECTIVES, OWN_OPTIONS
from mlx_lora.studio.page_words import help_words, label_of

# What the studio decides itself: where a run goes, and whether it continues one.
OWN = frozenset(("adapter_path", "resume", "force", "train", "fine_tune_type", "trust_remote_code"))
TYPES = {str: "text", int: "int", float: "float", bool: "bool"}
UNBOUNDED = 10**12  # the upper bound of a setting without one


def setting_groups() -> list[dict[str, Any]]:
    """Return every setting that the page may offer, in the groups of --help-all."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, field in FIELDS.items():
        row = ROWS[name]
        if name in OWN:
            continue
        low = row.more_than if row.at_least is None else row.at_least
        bounds = None if low is None else [low, None if row.at_most >= UNBOUNDED else row.at_most]
        choices = tuple(OBJECTIVES) if name == "objective" else row.choices
        groups.setdefault(row.group, []).append({
            "name": name, "label": label_of(name), "flag": flag_of(name), "type": "choice" if choices else TYPES[field_type(field)],
            "default": field.default, "choices": choices, "range": bounds, "exclusive": row.more_than is not None,
            "help": help_words(name, row.help), "common": row.common, "method": row.method, "objectives": OWN_OPTIONS.get(name),
        })  # fmt: skip
    return [{"name": name, "settings": settings} for name, settings in groups.items()]
