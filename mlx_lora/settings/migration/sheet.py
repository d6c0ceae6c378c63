"""A foreign settings file on its way to ours: what is left to read, what it became, what must be said."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.settings.other_names import OTHER_NAMES
from mlx_lora.system.errors import InputError


@dataclass
class Sheet:
    """Holds one file while the rules of its dialect read it, each rule the keys it knows.

    Attributes:
        file: its name, for errors.
        rest: keys that nothing has read yet. An empty key (`wandb_project:`) says nothing and is not here.
        known: names of our settings; a rule may know one that this version does not have.
        found: our settings, as the file has them.
        assumed: those of `found` that the file leaves out: its trainer's defaults, where ours differ.
        notes: what means something else here, one line each.
        left_out: keys with a value that nothing here takes.
    """

    file: str
    rest: dict[str, Any]
    known: Collection[str]
    found: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def take(self, key: str) -> Any:
        """Return a key's value and mark it as read; None when the file does not set it."""
        return self.rest.pop(key, None)

    def number(self, key: str) -> int | float | None:
        """Take a number; YAML reads 2e-5 as text, so numbers in text are taken.

        Raises:
            InputError: it is no number.
        """
        value = self.take(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self.refusal(f"{key} {value!r}: not a number; mend the file")
        return int(number) if number.is_integer() else number

    def switch(self, key: str) -> bool:
        """Take true or false, false when it is left out.

        Raises:
            InputError: it is neither.
        """
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(f"{key} {value!r}: neither true nor false; mend the file")
        return bool(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """Take a mapping, empty when it is left out.

        Raises:
            InputError: it is something else.
        """
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(f"{key} {value!r}: not a mapping of names to values; mend the file")
        return value or {}

    def part(self, key: str) -> Sheet:
        """Take a mapping as a sheet of its own, to read keys within it.

        Raises:
            InputError: it is no mapping.
        """
        return Sheet(
            self.file, {name: value for name, value in self.mapping(key).items() if not is_empty(value)}, self.known
        )

    def put(self, name: str, value: Any, key: str) -> None:
        """Set one of our settings from `key`; where this version has no such setting, the key is left out."""
        if name in self.known:
            self.found[name] = value
        else:
            self.left_out.append(key)

    def assume(self, name: str, value: Any) -> None:
        """Set one of our settings to the other trainer's default, unless the file set it."""
        if name not in self.found:
            self.found[name] = self.assumed[name] = value

    def leave(self, *keys: str) -> None:
        """Leave out keys that the file sets and that mean nothing here."""
        self.left_out += [key for key in keys if self.take(key) is not None]

    def refusal(self, problem: str) -> InputError:
        """Return the error to raise when the file cannot be read as ours."""
        return InputError(f"--config {self.file}: {problem}")

    def note(self, text: str) -> None:
        """Say that something means another thing here."""
        self.notes.append(text)


Rule = Callable[[Sheet], None]


@dataclass(frozen=True)
class Dialect:
    """One trainer's way to write a settings file.

    Attributes:
        name: of the trainer.
        recognizes: tells whether a file is its own.
        rules: each reads the keys of one theme; they run in order.
        names: keys that mean the same, under our name or one of `other_names`; read after the rules.
        defaults: ours -> its default, where that differs from ours and changes the result.
    """

    name: str
    recognizes: Callable[[Mapping[str, Any]], bool]
    rules: tuple[Rule, ...]
    names: tuple[str, ...]
    defaults: Mapping[str, Any]

    def read(self, content: Mapping[str, Any], known: Collection[str], file: str) -> Sheet:
        """Read a file of this dialect.

        Raises:
            InputError: it asks for another kind of training, or holds a value that cannot be read.
        """
        sheet = Sheet(file, {key: value for key, value in content.items() if not is_empty(value)}, known)
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
    """Tell a key that is written down and says nothing."""
    return value is None or value in ("", [], {})
