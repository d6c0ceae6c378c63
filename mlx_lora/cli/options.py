"""The command line of the settings: one click option per row, and advice on unknown options."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_lora.config.fields import SettingRow, field_type, flag_of, row_of
from mlx_lora.config.load import instead_of, recipe_names
from mlx_lora.config.settings import COMMAND_SECTIONS, FIELDS, MODEL, SECTIONS
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError

METAVARS = {str: "TEXT", int: "N", float: "X"}


class Command(console.LongCommand):
    """A command with all settings of a run; its errors answer another trainer's flags with ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return _parsed(self, ctx, lambda: super(Command, self).parse_args(ctx, args), "--help-all")


class ShortCommand(console.Command):
    """A command with few options, and the same errors."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return _parsed(self, ctx, lambda: super(ShortCommand, self).parse_args(ctx, args), "--help")


# Where a value belongs that was given without a flag, in this order: those that the command has.
_ALONE = ("--data", "--prompt", "--adapter-path", "--adapter", "--model")


def _parsed(command: click.Command, ctx: click.Context, parse: Callable[[], list[str]], listing: str) -> list[str]:
    """Parse a command line, with advice on unknown flags and on values without a flag.

    Raises:
        InputError: there is one.
    """
    flags = [flag for param in command.get_params(ctx) for flag in (*param.opts, *param.secondary_opts)]
    ctx.allow_extra_args = True  # they are refused here
    try:
        left = parse()
    except click.NoSuchOption as error:
        spelled = {flag.lstrip("-").replace("-", "_"): flag for flag in flags}
        advice = instead_of(error.option_name.lstrip("-").replace("-", "_"), spelled, spelled.__getitem__, listing)
        raise InputError(f"{error.option_name}: no such option here; {advice}") from None
    if left:
        advice = f"{listing} lists the options"
        if flag := _flag_for(left[0], flags):
            advice = f"write {shlex.join([flag, left[0]])}"
        raise InputError(f"{left[0]}: found without an option before it; {advice}")
    return left


def _flag_for(value: str, flags: list[str]) -> str | None:
    """Return the flag that a value without one was probably meant for; None: the command has none of them."""
    path = Path(value).expanduser()
    meant = [flag for flag in _ALONE if flag in flags]
    if (path / "adapter_config.json").is_file():
        meant.sort(key=lambda flag: not flag.startswith("--adapter"))
    elif path.suffix.lower() == ".gguf" or (path / "config.json").is_file():
        meant.sort(key=lambda flag: flag != "--model")
    return meant[0] if meant else None


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


class AdapterOption(click.Option):
    """The option of a command that reads one adapter: a folder or hub id, with or without the NAME= of chat and serve."""

    repeated = (
        "give one; `mlx-lora chat` and `mlx-lora serve` take several, and blend them with --blend; to merge two into one "
        "model, see docs/merge-adapters.md"
    )

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        text = super().type_cast_value(ctx, value)
        return adapter_source(text) if isinstance(text, str) else text


def adapter_source(text: str) -> str:
    """Return DIR of NAME=DIR, and any other text as it is."""
    name, equals, source = text.partition("=")
    named = bool(name and equals and source) and "/" not in name  # a path may have = in it
    return source if named and not Path(text).expanduser().exists() else text


def adapter_option(help: str, required: bool = False) -> Callable[[Callable], Callable]:
    """Add the option of a command that reads one adapter, under both names that commands have for it."""
    names = ("--adapter-path", "--adapter", "adapter_path")
    return click.option(*names, cls=AdapterOption, type=str, default=None, required=required, help=help)


ignore_fingerprint_option = click.option(
    "--ignore-fingerprint",
    is_flag=True,
    help="Use an adapter even if it was trained on another base of the same shape.",
)


def settings_options(*sections: str, leave_out: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Add one click option per field of the named settings sections.

    Options that the user does not give are left out (see `given`), so that a YAML file can set them. The defaults are
    only in config/settings.py.

    Args:
        sections: keys of SECTIONS or COMMAND_SECTIONS.
        leave_out: fields that this command does not use, and therefore must not accept.
    """

    def decorate(function: Callable) -> Callable:
        for section in reversed(sections):
            for f in reversed(dataclasses.fields((SECTIONS | COMMAND_SECTIONS)[section])):
                function = function if f.name in leave_out else _option(f)(function)
        return function

    return decorate


def setting_option(name: str) -> Callable[[Callable], Callable]:
    """Add the click option of one setting."""
    return _option(FIELDS[name])


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
    spellings = [flag, row.also] if row.also else [flag]
    return click.option(*spellings, f.name, type=kind, metavar=metavar, **shown)


def _help(row: SettingRow, default: Any) -> str:
    notes = [f"one of {', '.join(row.choices)}"] if row.choices else []
    if default is not None:
        notes.append(f"default: {('off', 'on')[default] if isinstance(default, bool) else default}")
    return f"{row.help} [{'; '.join(notes)}]" if notes else row.help


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}
