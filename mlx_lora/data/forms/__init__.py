"""Forms of plain records, a file each with a `FORM`: a new file here is a new form, and a value of --data-format.

# forms/trivia.py
FORM = DataForm("riddle, reply", frozenset(("riddle", "reply")), lambda record: Completion(record["riddle"], record["reply"]))
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from mlx_lora.data.examples import EmptyPart, Example, Fields, MissingColumn, as_string, keys_of


@dataclass(frozen=True)
class DataForm:
    """One form of records.

    Attributes:
        expected: its columns in words, for messages.
        columns: those that it reads.
        parse: returns the example that a record holds, which has no absent values; raises FormatError.
        recognizes: tells whether a record has this form; None: it has the columns.
        rank: where several recognize a record, that with the lowest counts.
    """

    expected: str
    columns: frozenset[str]
    parse: Callable[[Fields], Example]
    recognizes: Callable[[Fields], bool] | None = None
    rank: int = 5

    def fits(self, record: Fields) -> bool:
        """Tell whether a record has this form."""
        return self.columns <= record.keys() if self.recognizes is None else self.recognizes(record)


@cache
def forms() -> Mapping[str, DataForm]:
    """Return all forms by name, in the order in which they are tried."""
    names = [one.name for one in pkgutil.iter_modules(__path__)]
    found = {name: import_module(f"{__name__}.{name}").FORM for name in names}
    return dict(sorted(found.items(), key=lambda item: item[1].rank))


def need(record: Fields, key: str, form: str) -> Any:
    """Return a column that a form requires."""
    if key not in record:
        raise MissingColumn(f"found {keys_of(record)}; the {form} format requires {forms()[form].expected}")
    return record[key]


def need_string(record: Fields, key: str, form: str) -> str:
    """Return the text of a column that a form requires, and that must not be empty."""
    text = as_string(need(record, key, form), key)
    if not text.strip():
        raise EmptyPart(f"empty {key}")
    return text
