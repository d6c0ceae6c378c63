"""The row of a setting: its attributes in addition to name, type and default, and the check of a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field
from typing import Any
from urllib.parse import urlencode

KIND_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class SettingRow:
    """Everything that the program needs to know about a setting.

    Attributes:
        help: the text for `--help` and `--help-all`.
        group: the heading above it there.
        common: whether `--help` shows it; `--help-all` shows every setting.
        choices: the only values allowed; None: any.
        at_least: the smallest value allowed.
        more_than: instead of `at_least`, an exclusive lower bound. Without either there is no range.
        at_most: the largest value allowed.
        may_change: whether a resumed run may have another value than before.
        per_machine: whether the ranks of a distributed run may have different values.
        method: the only --method that has this setting; None: all have it.
        only: the objectives that have this setting; empty: all have it.
        alone: the value of a flag without a value, and of `true` in a settings file.
        also: mlx-lm's spelling of the flag, which the command line takes too.
        word: a word that is allowed instead of a number.
        runs: a pattern of the values that run Python (config/load.py); empty: none does.
    """

    help: str
    group: str
    common: bool = False
    choices: tuple[str, ...] | None = None
    at_least: float | None = None
    more_than: float | None = None
    at_most: float = 10**12
    may_change: bool = False
    per_machine: bool = False
    method: str | None = None
    only: tuple[str, ...] = ()
    alone: str | None = None
    also: str | None = None
    word: str | None = None
    runs: str = ""

    def check(self, value: Any) -> None:
        """Check a value of the right type.

        Raises:
            ValueError: it cannot be converted, or is not allowed.
        """
        if self.choices and value not in self.choices:
            raise ValueError(f"{value!r}: not one of {', '.join(self.choices)}")
        low = self.more_than if self.at_least is None else self.at_least
        if low is None:
            return
        above = low < value if self.at_least is None else low <= value
        if not (above and value <= self.at_most):  # NaN too
            bound = "more than" if self.at_least is None else "at least"
            most = int(self.at_most) if self.at_most == int(self.at_most) else f"{self.at_most:g}"
            raise ValueError(f"{value}: must be {bound} {low} and at most {most}")


def setting(default: Any, help: str, group: str, **rules: Any) -> Any:
    """Return a dataclass field with its row; `rules` are the other attributes of `SettingRow`."""
    return field(default=default, metadata={"row": SettingRow(help, group, **rules)})


def row_of(f: Field) -> SettingRow:
    """Return the row of a field made by `setting`."""
    return f.metadata["row"]


def field_type(f: Field) -> type:
    """Return the plain type of a settings field, without its `| None`."""
    return {"str": str, "int": int, "float": float, "bool": bool}[str(f.type).split(" |")[0]]


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def source_text(source: Mapping[str, Any]) -> str:
    """Return a data set as --data names it: `{path: a/b, split: train, weight: 2}` is `a/b?split=train=2`."""
    options = {key: value for key, value in source.items() if key not in ("path", "weight")}
    query = urlencode(options, safe="[]:/").replace("%25", "%") if options else ""
    weight = source.get("weight", 1)
    return f"{source.get('path')}{'?' * bool(query)}{query}" + (f"={weight:g}" if weight != 1 else "")


def flag_words(settings: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that give settings, by name, their values."""
    words = []
    for name, value in settings.items():
        flag = flag_of(name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif str(value).startswith("-"):
            words.append(f"{flag}={value}")  # else it would be read as a flag
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)]
    return words


def read_value(f: Field, value: Any) -> Any:
    """Convert a value from the command line or a settings file to its setting's type.

    YAML reads 2e-4 as text, so numbers in text are accepted.

    Raises:
        ValueError: it cannot be converted, or is not allowed.
    """
    row, kind = row_of(f), field_type(f)
    if row.alone and isinstance(value, bool):  # grad_checkpoint: true, as in mlx-lm
        off = "none" if kind is str and f.default is not None else f.default
        value = row.alone if value else off
    if value is None and "None" in str(f.type):
        return None
    if row.word and value == row.word:
        return value
    if kind is str and isinstance(value, dict):  # rank_pattern: {q_proj: 32}
        value = ",".join(f"{name}={number}" for name, number in value.items())
    if kind is str and isinstance(value, list):  # target_modules: [q_proj, v_proj]
        value = ",".join(source_text(item) if isinstance(item, dict) else str(item) for item in value)
    try:
        if value is None or (kind is bool and not isinstance(value, bool)) or (kind is int and isinstance(value, bool)):
            raise ValueError
        if kind is int and not isinstance(value, int):
            value = float(value)  # 1e3 is a whole number too; an int stays exact beyond 2^53
            if not value.is_integer():
                raise ValueError
        value = kind(value)
    except (TypeError, ValueError, OverflowError):
        allowed = f"{KIND_WORDS[kind]}, or {row.word}" if row.word else KIND_WORDS[kind]
        raise ValueError(f"{value!r}: not {allowed}") from None
    row.check(value)
    return value
