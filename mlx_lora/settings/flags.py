"""Click options made from the settings: one per field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from mlx_lora.settings import config


def settings_options(*sections: str, leave_out: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Add one click option per field of the named settings sections.

    Options that are not given arrive as nothing at all (see `given`), so that a YAML file can set them
    and the default stays in config.py alone.

    Args:
        sections: keys of config.SECTIONS or config.COMMAND_SECTIONS.
        leave_out: fields that mean nothing to this command: no flag is accepted and then ignored.
    """

    def decorate(function: Callable) -> Callable:
        for section in reversed(sections):
            for f in reversed(dataclasses.fields((config.SECTIONS | config.COMMAND_SECTIONS)[section])):
                function = function if f.name in leave_out else _option(f)(function)
        return function

    return decorate


def _option(f: dataclasses.Field) -> Callable[[Callable], Callable]:
    kind, help_text = config.field_type(f), f.metadata["help"]
    flag = config.flag_of(f.name)
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", f.name, default=None, help=_with_default(help_text, f.default))
    choices, alone = f.metadata.get("choices"), f.metadata.get("flag_value")
    return click.option(
        flag,
        f.name,
        **({"is_flag": False, "flag_value": alone} if alone else {}),
        type=click.Choice(choices) if choices else kind,
        default=None,
        help=_with_default(help_text, f.default),
    )


def _with_default(text: str, default: Any) -> str:
    if default is None:
        return text
    shown = {True: "on", False: "off"}.get(default, default) if isinstance(default, bool) else default
    return f"{text} [default: {shown}]"


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}
