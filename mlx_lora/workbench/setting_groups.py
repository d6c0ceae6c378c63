"""Describe all settings of a run to the page, and turn three presets into settings that fit this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_lora.objectives.objective_table import OBJECTIVES, OWN_OPTIONS
from mlx_lora.settings.config import FIELDS, ROWS
from mlx_lora.settings.setting_row import field_type, flag_of
from mlx_lora.system.errors import InputError
from mlx_lora.system.units import gigabytes
from mlx_lora.workbench.page_words import help_words, label_of

# What the studio decides itself: where a run goes, and whether it continues one.
OWN = frozenset(("adapter_path", "resume", "force", "train", "fine_tune_type", "trust_remote_code"))
TYPES = {str: "text", int: "int", float: "float", bool: "bool"}
LEAST_LENGTH = 256  # tokens; a preset that fits only with shorter rows is said not to fit
# Rank and steps grow from one preset to the next, everything else stays at the defaults, whose sources config.py names.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"rank": 8, "alpha": 16.0, "iters": 100, "max_seq_length": 1024},
    "balanced": {"rank": 16, "alpha": 32.0, "epochs": 1.0, "max_seq_length": 2048},
    "thorough": {"rank": 32, "alpha": 64.0, "epochs": 3.0, "max_seq_length": 4096, "keep_best": True},
}
WORDS = {
    "quick": "A first look: rank 8, 100 steps",
    "balanced": "The usual choice: rank 16, one pass over the data",
    "thorough": "The most: rank 32, three passes, the best adapter is kept",
}
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


def presets(
    model: str | None, objective: str, plan: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the three presets, with rows shortened until the planner says that they fit.

    Args:
        model: as `--model`; None: nothing is planned.
        objective: of the run.
        plan: returns the plan of settings, as `mlx-lora plan --json` prints it.
    """
    found = []
    for name, wanted in PRESETS.items():
        settings = dict(wanted) if objective == "sft" else {**wanted, "objective": objective}
        line = WORDS[name]
        if model:
            try:
                settings, more = _fitted({**settings, "model": model}, plan)
                line = f"{line}; {more}"
            except InputError as error:
                line = f"{line}; not planned: {error}"
            settings.pop("model", None)
        found.append({"name": name, "line": f"{line}.", "settings": settings})
    return found


def _fitted(settings: dict[str, Any], plan: Callable[[dict[str, Any]], dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return settings whose rows are as long as fit, and words on the plan."""
    planned = plan(settings)
    asked = settings["max_seq_length"]
    if not planned["fits"]:
        longest = max((value or 0 for value in planned["largest_sequence"].values()), default=0)
        shorter = max(LEAST_LENGTH, 1 << max(0, int(longest).bit_length() - 1))
        if shorter < asked:
            settings = {**settings, "max_seq_length": shorter}
            planned = plan(settings)
    peak = f"peak {gigabytes(planned['peak_bytes'])} of {gigabytes(planned['budget_bytes'])}"
    if not planned["fits"]:
        return settings, f"does not fit: {peak}; {planned.get('advice', 'take a smaller or quantized model')}"
    rows = f"rows up to {settings['max_seq_length']:,} tokens"
    cut = f", shortened from {asked:,} to fit" if settings["max_seq_length"] < asked else ""
    return settings, f"{rows}{cut}; {peak}, about {planned['predicted']['tokens_per_s']:,.0f} tokens/s (predicted)"
