"""Parse the arguments of `mlx-lora` as the pages have them, without running anything."""

from __future__ import annotations

import click

from mlx_lora.__main__ import COMMANDS, load_command
from mlx_lora.cli.evaluate import EvaluateCommand
from mlx_lora.config.fields import read_value
from mlx_lora.config.settings import FIELDS


def parse(words: tuple[str, ...]) -> click.Command:
    """Parse `mlx-lora` arguments, flags and values, without running anything.

    Raises:
        click.UsageError, ValueError: an option does not exist, or its value is not allowed.
    """
    if words[0].startswith("-"):
        return click.Command("mlx-lora")
    name, rest = words[0], list(words[1:])
    if name not in COMMANDS:
        raise click.UsageError(f"no command {name}")
    command = load_command(name, rest)
    if isinstance(command, click.Group):
        command = command.commands[rest.pop(0)]
    if isinstance(command, EvaluateCommand):
        command = command.chosen(rest)
    values, _, _ = command.make_parser(click.Context(command)).parse_args(rest)
    for setting, value in values.items():
        if setting in FIELDS and isinstance(value, str):
            read_value(FIELDS[setting], value)
    return command
