"""The state of a migration: a file's keys that are left to read, the settings found, and notes for the user."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.config.aliases import OTHER_NAMES
from mlx_lora.utils.errors import InputError


@dataclass
class Sheet:
    """One file while the rules of its dialect read it; each rule reads the keys that it knows.

    Attributes:
        file: its name, for errors.
        rest: keys that have not been read yet, without empty ones (`wandb_project:`).
        known: names of our settings; a rule may use one that this version does not have.
        objective: the value of the flag --objective, for files that do not name their objective; None: not given.
        found: our settings, with values from the file.
        assumed: those of `found` that the file leaves out, with its trainer's defaults.
        notes: what has another meaning here, one line each.
        left_out: keys whose value has no counterpart.
    """

    file: str
    rest: dict[str, Any]
    known: Collection[str]
    objective: str | None = None
    found: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def take(self, key: str) -> Any:
        """Return a key's value and mark it as read; None if the file does not set it."""
        return self.rest.pop(key, None)

    def number(self, key: str) -> int | float | None:
        """Take a number; a text such as 2e-5, which YAML does not read as a number, is accepted.

        Raises:
            InputError: it is not a number.
        """
        value = self.take(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self.refusal(f"{key} {value!r}: not a number; fix the file")
        return int(number) if number.is_integer() else number

    def switch(self, key: str) -> bool:
        """Take true or false; false if it is left out.

        Raises:
            InputError: it is neither.
        """
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(f"{key} {value!r}: neither true nor false; fix the file")
        return bool(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """Take a mapping; an empty one if it is left out.

        Raises:
            InputError: it is not a mapping.
        """
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(f"{key} {value!r}: not a mapping of names to values; fix the file")
        return value or {}

    def part(self, key: str) -> Sheet:
        """Take a mapping as a separate sheet, to read its keys.

        Raises:
            InputError: it is not a mapping.
        """
        return Sheet(
            self.file, {name: value for name, value in self.mapping(key).items() if not is_empty(value)}, self.known
        )

    def put(self, name: str, value: Any, key: str) -> None:
        """Set one of our settings from `key`; leave the key out if this version has no such setting."""
        if name in self.known:
            self.found[name] = value
        else:
            self.left_out.append(key)

    def assume(self, name: str, value: Any) -> None:
        """Set one of our settings to the other trainer's default, unless the file set it."""
        if name not in self.found:
            self.found[name] = self.assumed[name] = value

    def leave(self, *keys: str) -> None:
        """Leave out keys that have no meaning here, if the file sets them."""
        self.left_out += [key for key in keys if self.take(key) is not None]

    def refusal(self, problem: str) -> InputError:
        """Return the error to raise if the file cannot be migrated."""
        return InputError(f"--config {self.file}: {problem}")

    def note(self, text: str) -> None:
        """Note that something has another meaning here."""
        self.notes.append(text)


Rule = Callable[[Sheet], None]


@dataclass(frozen=True)
class Dialect:
    """One trainer's format of settings files.

    Attributes:
        name: of the trainer.
        recognizes: tells whether a file is this trainer's.
        rules: functions that each read the keys of one topic; they run in order.
        names: keys that mean the same, under our name or one of `other_names`; read after the rules.
        defaults: our setting -> the trainer's default, if it differs from ours and changes the result.
    """

    name: str
    recognizes: Callable[[Mapping[str, Any]], bool]
    rules: tuple[Rule, ...]
    names: tuple[str, ...]
    defaults: Mapping[str, Any]

    def read(
        self, content: Mapping[str, Any], known: Collection[str], file: str, objective: str | None = None
    ) -> Sheet:
        """Return a file of this dialect, read.

        Raises:
            InputError: it asks for another kind of training, or has an invalid value.
        """
        sheet = Sheet(file, {key: value for key, value in content.items() if not is_empty(value)}, known, objective)
        for rule in self.rules:
            rule(sheet)
        for key in self.names:
            if key in sheet.rest:
                sheet.put(OTHER_NAMES.get(key, key), sheet.take(key), key)
        for name, value in self.defaults.items():
            sheet.assume(name, value)
        sheet.left_out += sheet.rest
        return sheet


def is_empty(value: Any) -> bool:
    """Return whether a key's value is empty."""
    return value is None or value in ("", [], {})
