"""Find placeholders that were left in the data: `{{name}}`, `<insert ...>`, and `{name}` in prose.

Data about templates, and code, have such braces on purpose, so text between code fences or backticks does not count, and
`{name}` does not where its line has other signs of code. It is a note, and never an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mlx_lora.data.answers import Entry, answers_of
from mlx_lora.data.data_report import MAX_LISTED, Location, where
from mlx_lora.data.examples import Completion, Conversation, Example
from mlx_lora.data.reading import Rows
from mlx_lora.system.units import counted

CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
# Not after what makes it LaTeX (\frac{{a}}{{b}}), HTML or a longer run of braces.
DOUBLE = re.compile(r"(?<![\\{$>\w}^])\{\{ ?[A-Za-z][\w .-]{1,40}\}\}(?![}<{])")
INSERT = re.compile(r"(?i)[<\[]insert (?:your |the |an? )?[\w' -]{2,60}[>\]]")
SINGLE = re.compile(r"(?<![\\{$\w}^])\{[a-z][a-z_]{2,30}\}(?![\w{}^])")
CODE_LINE = re.compile(r"""["=;$\\<>|&#]|(?<!\w)'|\bf'|[({\[]\s*$""")
MAX_NAMED = 3


def placeholder_notes(parts: dict[str, Rows]) -> list[str]:
    """Return a note on the rows with placeholders, with their locations; nothing if there are none."""
    found: dict[str, None] = {}
    locations: dict[Location, None] = {}
    for rows in parts.values():
        for entry, location in zip(rows.entries, rows.locations, strict=True):
            for text in placeholders(entry):
                found[text] = None
                locations[location] = None
    if not locations:
        return []
    named = ", ".join(list(found)[:MAX_NAMED])
    have = "has a placeholder" if len(locations) == 1 else "have placeholders"
    first = where(list(locations)[:MAX_LISTED], len(locations))
    return [f"{counted(len(locations), 'row')} {have} such as {named}: {first}; fill them in, or remove the rows"]


def placeholders(entry: Entry) -> list[str]:
    """Return the placeholders in the texts of an entry."""
    return [match for text, is_prose in _texts(entry) for match in _found(text, is_prose)]


def _texts(entry: Entry) -> Iterator[tuple[str, bool]]:
    """Yield the texts of an entry, each with whether people talk in it."""
    for answer in answers_of(entry):
        yield from _texts_of(answer)


def _texts_of(example: Example) -> Iterator[tuple[str, bool]]:
    if isinstance(example, Conversation):
        for message in example.messages:
            if message["role"] != "tool":
                yield message.get("content") or "", True
    elif isinstance(example, Completion):
        yield example.prompt, True
        yield example.completion, True
    else:
        yield example.text, False


def _found(text: str, is_prose: bool) -> Iterator[str]:
    if "{" not in text and "insert" not in text.lower():
        return
    text = CODE.sub("", text)
    yield from DOUBLE.findall(text)
    yield from INSERT.findall(text)
    if is_prose:
        for line in text.splitlines():
            if "{" in line and not CODE_LINE.search(line):
                yield from SINGLE.findall(line)
