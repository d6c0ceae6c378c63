"""The command line of the settings: one click option per row, and advice on unknown options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from mlx_lora.settings.config import COMMAND_SECTIONS, MODEL, SECTIONS
from mlx_lora.settings.named_recipes import recipe_names
from mlx_lora.settings.other_names import instead_of
from mlx_lora.settings.setting_row import Row, field_type, flag_of, row_of
from mlx_lora.system import console
from mlx_lora.system.errors import InputError

METAVARS = {str: "TEXT", int: "N", float: "X"}


class Command(console.LongCommand):
    """A command with all settings of a run; if a flag has another trainer's name, its error names ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            spelled = {
                name.lstrip("-").replace("-", "_"): name for p in self.params for name in (*p.opts, *p.secondary_opts)
            }
            asked = error.option_name.lstrip("-").replace("-", "_")
            advice = instead_of(asked, spelled, spelled.__getitem__)
            raise InputError(f"{error.option_name}: no such option here; {advice}") from None


config_option = click.option(
    "-c",
    "--config",
    "config_file",
    cls=console.Option,
    group=MODEL,
    metavar="FILE",
    help="YAML file of settings, ours, mlx-lm's, mlx-lm-lora's, TRL's, Axolotl's or LLaMA-Factory's, or a recipe's name "
    f"({', '.join(recipe_names())}); flags override it.",
)


def settings_options(*sections: str, leave_out: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Add one click option per field of the named settings sections.

    Options that the user does not give are left out (see `given`), so that a YAML file can set them. The defaults are
    only in config.py.

    Args:
        sections: keys of config.SECTIONS or config.COMMAND_SECTIONS.
        leave_out: fields that this command does not use, and therefore must not accept.
    """

    def decorate(function: Callable) -> Callable:
        for section in reversed(sections):
            for f in reversed(dataclasses.fields((SECTIONS | COMMAND_SECTIONS)[section])):
                function = function if f.name in leave_out else _option(f)(function)
        return function

    return decorate


def _option(f: dataclasses.Field) -> Callable[[Callable], Callable]:
    row, kind, flag = row_of(f), field_type(f), flag_of(f.name)
    shown = {
        "cls": console.Option,
        "group": row.group,
        "common": row.common,
        "default": None,
        "help": _help(row, f.default),
    }
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", f.name, **shown)
    metavar = "NAME" if row.choices else METAVARS[kind]
    if row.alone:
        shown |= {"is_flag": False, "flag_value": row.alone}
        metavar = f"[{metavar}]"
    return click.option(flag, f.name, type=kind, metavar=metavar, **shown)


def _help(row: Row, default: Any) -> str:
    notes = [f"one of {', '.join(row.choices)}"] if row.choices else []
    if default is not None:
        notes.append(f"default: {('off', 'on')[default] if isinstance(default, bool) else default}")
    return f"{row.help} [{'; '.join(notes)}]" if notes else row.help


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}
