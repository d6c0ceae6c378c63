"""Say in the page's words what the settings say in the command's: labels instead of flags, and all settings in groups.

The command shown on the page keeps its flags, and so does anything between backticks.
"""

from __future__ import annotations

import re
from typing import Any

from mlx_lora.config.fields import field_type, flag_of
from mlx_lora.config.settings import FIELDS, ROWS
from mlx_lora.objectives.table import OBJECTIVES, OWN_OPTIONS

# Labels that are not simply the setting's name.
LABELS = {
    "iters": "Steps",
    "epochs": "Passes over the data",
    "lr_schedule": "Learning rate schedule",
    "max_seq_length": "Longest row, in tokens",
    "mask_prompt": "Train on answers only",
    "batch_size": "Rows per micro-batch",
    "batch_tokens": "Tokens per micro-batch",
    "grad_accumulation_steps": "Micro-batches per step",
    "max_grad_norm": "Largest gradient norm",
    "num_layers": "Adapted blocks, from the last",
    "val_batches": "Batches per validation",
    "valid_fraction": "Share of rows held out",
    "prompt_column": "Column of the prompt",
    "completion_column": "Column of the answer",
    "system_column": "Column of a system prompt",
    "chat_column": "Column of a chat",
    "text_column": "Column of plain text",
    "speaker": "Speaker to learn from",
    "temp": "Sampling temperature",
    "resume_adapter_file": "Start from adapter",
    "loraplus_lr_ratio": "LoRA+ learning rate ratio",
    "cpo_alpha": "CPO alpha",
    "simpo_gamma": "SimPO gamma",
    "kl_beta": "KL beta",
    "jsd_beta": "JSD beta",
    "grpo_loss": "GRPO loss",
}
# Help whose own words read badly where there are no flags.
HELP = {
    "iters": "Number of optimizer steps, instead of passes over the data.",
    "mask_prompt": "Train on the assistant's turns. Off: on every token, prompts too.",
    "memory_check": "Refuse a run that does not fit by the plan. Off: try it anyway.",
}
_ONLY_THERE = re.compile(r"[;,]? ?\(?(?:also |as )?the flag without a value\)?(?=[,);])|, as convert --bits does")
_FLAG = re.compile(r"`[^`]*`|(?<![\w-])--(no-)?([a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])")
# What the studio decides itself: where a run goes, and whether it continues one.
OWN = frozenset(("adapter_path", "resume", "force", "train", "trust_remote_code"))
TYPES = {str: "text", int: "int", float: "float", bool: "bool"}
UNBOUNDED = 10**12  # the upper bound of a setting without one


def label_of(name: str) -> str:
    """Return what the page calls a setting."""
    return LABELS.get(name) or name.replace("_", " ").capitalize()


def in_page_words(text: str) -> str:
    """Return a message with fields instead of the flags of settings; other flags stay.

    “Steps” and “Passes over the data”: both given; keep one
    """

    def said(found: re.Match[str]) -> str:
        name = (found[2] or "").replace("-", "_")
        if name not in FIELDS:
            return found[0]
        return f"“{label_of(name)}”{' off' if found[1] else ''}"

    return _FLAG.sub(said, text)


def help_words(name: str, text: str) -> str:
    """Return a setting's help without what only a command line has.

    Args:
        name: of the setting.
        text: the help of its flag.
    """
    return HELP.get(name) or in_page_words(_ONLY_THERE.sub("", text))


def fields_in(text: str) -> list[str]:
    """Return the settings whose flags a message names, each once, in its order."""
    names = [found[2].replace("-", "_") for found in _FLAG.finditer(text) if found[2]]
    return [name for name in dict.fromkeys(names) if name in FIELDS and f"--{name}".replace("_", "-") == flag_of(name)]


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
