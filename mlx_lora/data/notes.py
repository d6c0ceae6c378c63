"""Say what a person should know about the data before training, in addition to the counts of the report.

Among the notes are two on what the data teaches: plain text teaches no answering, and a template may not show tools.

Another is on placeholders that were left in the data: `{{name}}`, `<insert ...>`, and `{name}` in prose. Data about
templates, and code, have such braces on purpose, so text between code fences or backticks does not count, and `{name}`
does not where its line has other signs of code. It is a note, and never an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from datetime import date
from itertools import islice
from typing import Any

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion, Conversation, Example, Text
from mlx_lora.data.files import TINY_SHAKESPEARE
from mlx_lora.data.mix import Mixed
from mlx_lora.data.preferences import Rated
from mlx_lora.data.read import SplitRows, answers_of
from mlx_lora.data.render import ADVICE
from mlx_lora.data.report import MAX_LISTED, Location, reasons, where
from mlx_lora.data.tokenize import Encoded, Encoder
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import counted

MAX_CONTROLS = 5  # control tokens that get a note of their own
MAX_NAMED = 3  # placeholders that a note names
LOOKED_AT = 1000  # records
# A text that was rendered with a template before: it has turns, and teaches answering.
RENDERED = re.compile(
    r"### ?(?:Response|Assistant)\b|\[/INST\]|<\|?(?:im_start|start_of_turn|turn|assistant|start_header_id)\b"
)
OUR_TEMPLATE = "--chat-template chatml"
# Placeholders, and code, in which they are none.
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
# Not after what makes it LaTeX (\frac{{a}}{{b}}), HTML or a longer run of braces.
DOUBLE = re.compile(r"(?<![\\{$>\w}^])\{\{ ?[A-Za-z][\w .-]{1,40}\}\}(?![}<{])")
INSERT = re.compile(r"(?i)[<\[]insert (?:your |the |an? )?[\w' -]{2,60}[>\]]")
SINGLE = re.compile(r"(?<![\\{$\w}^])\{[a-z][a-z_]{2,30}\}(?![\w{}^])")
CODE_LINE = re.compile(r"""["=;$\\<>|&#]|(?<!\w)'|\bf'|[({\[]\s*$""")


def data_notes(
    parts: dict[str, SplitRows],
    encoded: dict[str, Encoded],
    keys: dict[str, list[str]],
    encoder: Encoder,
    day: date | None,
) -> list[str]:
    """Return notes on a run's data, a sentence each.

    Args:
        parts: `train`, `valid`, `test` -> what was read.
        encoded: The same, encoded.
        keys: Of the content of each record that gave rows.
        encoder: Encoded them.
        day: The day that the chat template shows; None if it shows none.
    """
    notes = [chat.words for rows in parts.values() for chat in rows.chats]
    notes += [note for rows in parts.values() for note in rows.transcripts]
    notes += placeholder_notes(parts) + _left_out(parts)
    for name in ("valid", "test"):
        shared = len(set(keys.get(name, [])) & set(keys["train"]))
        if shared:
            also = "row is also a training row" if shared == 1 else "rows are also training rows"
            notes.append(f"{shared:,} {name} {also}; the {name} loss will be too low")
    train = parts["train"].entries
    ratings = {train[i].good for i in encoded["train"].source.tolist() if isinstance(train[i], Rated)}
    if len(ratings) == 1:
        kind = "bad" if ratings == {True} else "good"
        notes.append(f"no answer is rated {kind}, so the run has nothing to compare with; add {kind} answers")
    kept = [
        answer
        for name, part in encoded.items()
        for i in set(part.source.tolist())
        for answer in answers_of(parts[name].entries[i])
    ]
    chats = [example for example in kept if isinstance(example, Conversation)]
    with_tools = [chat for chat in chats if chat.tools]
    if with_tools and not encoder.shows_tools(with_tools[0]):
        notes.append(
            f"the chat template does not show the tools of {counted(len(with_tools), 'row')} to the model; "
            "--chat-template chatml does"
        )
    unshown: Counter[str] = Counter()
    for part in encoded.values():
        unshown.update({name: len(numbers) for name, numbers in part.unshown.items()})
    for name, count in sorted(unshown.items()):
        have = "has" if count == 1 else "have"
        notes.append(f"{counted(count, 'row')} {have} {name}, which the chat template does not show; it is not trained")
    notes += _control_notes(parts, encoded, encoder.allow_special_tokens)
    unread = Counter(name for chat in chats for name in chat.unread)
    if unread:
        named = ", ".join(f"{name} ({counted(count, 'row')})" for name, count in unread.most_common(8))
        notes.append(f"fields of messages that are not read: {named}")
    divided = sum(len(part.divided) for part in encoded.values())
    if divided:
        notes.append(
            f"{counted(divided, 'chat')} {'gives' if divided == 1 else 'give'} several rows: the chat template hides "
            "thinking or tools of earlier turns, and each turn is trained as the model writes it"
        )
    if day and chats:
        notes.append(f"the chat template shows a date: {day.isoformat()}, kept for --resume (--chat-date)")
    return notes


def _control_notes(parts: dict[str, SplitRows], encoded: dict[str, Encoded], allowed: bool) -> list[str]:
    """Return notes on control tokens that messages spell, one for each token."""
    places: dict[str, list[Location]] = {}
    for name, part in encoded.items():
        for token, numbers in part.controls.items():
            places.setdefault(token, []).extend(parts[name].locations[number] for number in numbers)
    done = (
        "it is a control token there, as --allow-special-tokens asks"
        if allowed
        else "it is encoded as ordinary text there; remove it, or make it a control token with --allow-special-tokens"
    )
    notes = []
    for token, found in sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_CONTROLS]:
        found = list(dict.fromkeys(found))
        lines = where(found[:MAX_LISTED], len(found))
        notes.append(f"{token} in messages of {counted(len(found), 'row')} ({lines}): {done}")
    if len(places) > MAX_CONTROLS:
        notes.append(f"{len(places) - MAX_CONTROLS} more control tokens in messages")
    return notes


def _left_out(parts: dict[str, SplitRows]) -> list[str]:
    """Return notes on what the records have that is not trained."""
    notes = []
    ignored = sum((rows.ignored for rows in parts.values()), Counter())
    if ignored:
        named = ", ".join(f"{name} ({counted(count, 'row')})" for name, count in ignored.most_common(8))
        more = f" and {len(ignored) - 8} more" if len(ignored) > 8 else ""
        notes.append(f"columns that are not read: {named}{more}")
    unasked = [
        location
        for rows in parts.values()
        for entry, location in zip(rows.entries, rows.locations, strict=True)
        if isinstance(entry, Completion) and not entry.prompt.strip()
    ]
    if unasked:
        first, have = where(unasked[:MAX_LISTED], len(unasked)), "has" if len(unasked) == 1 else "have"
        notes.append(f"{counted(len(unasked), 'row')} {have} an empty prompt, and only the answer is trained: {first}")
    for what, count in sum((rows.without for rows in parts.values()), Counter()).items():
        notes.append(f"{what} of {counted(count, 'file')} is left out, and not trained")
    return notes


def evaluation_notes(rows: SplitRows, encoded: Encoded) -> list[str]:
    """Return notes on what an evaluation left out or cut, because that changes the loss."""
    notes = [chat.words for chat in rows.chats]
    if rows.dropped:
        notes.append(f"{counted(len(rows.dropped), 'unusable row')} left out: {reasons(rows.dropped)}")
    if encoded.truncated:
        notes.append(f"{counted(len(encoded.truncated), 'row')} cut at --max-seq-length")
    return notes


# Rows that are held out


def split_notes(mixed: Mixed, train: SplitRows, valid: EncodedSet | None, fraction: float) -> list[str]:
    """Return notes on the rows that are held out.

    Args:
        mixed: The training data, split.
        train: What was read of it.
        valid: All rows to validate on.
        fraction: The share to hold out that was asked for.
    """
    rows, held, notes = mixed.train.examples, mixed.held.examples if mixed.held else 0, []
    if fraction and not valid:
        notes.append("no row is held out, because that requires two different rows; this run has no held-out loss")
    elif held and held > 2 * fraction * (rows + held):
        is_held = "rows is" if held == 1 else "rows are"
        notes.append(
            f"{held:,} of {rows + held:,} {is_held} held out to measure the loss, the least that is possible: one row "
            "with its duplicates and those of its prompt; --valid-fraction 0 trains on all rows"
        )
    if divided := [train.locations[number] for number in mixed.divided]:
        notes.append(
            f"{len(divided):,} rows share their prompt with so many others that they are held out one by one, not by prompt "
            f"({where(divided[:MAX_LISTED], len(divided))}); the held-out loss is of known prompts with new answers"
        )
    return notes


# What the data teaches


def teaching_notes(parts: dict[str, SplitRows], settings: DataSettings, encoder: Encoder) -> list[str]:
    """Return notes on what a chat model will not learn from the data.

    Args:
        parts: `train`, `valid`, `test` -> what was read.
        settings: Of the data; who asks for a text by `--data-format` or a column knows that it is one.
        encoder: Of the rows; a model without a chat template is expected to continue text.
    """
    notes = []
    names_text = settings.data_format == "text" or settings.text_column or TINY_SHAKESPEARE in (settings.data or "")
    tokenizer: Any = encoder.tokenizer
    texts = [entry.text for entry in parts["train"].entries if isinstance(entry, Text)]
    plain = len(texts) == len(parts["train"].entries) and not any(map(RENDERED.search, texts[:LOOKED_AT]))
    if tokenizer.chat_template and not names_text and texts and plain:
        notes.append(
            "plain text teaches the model style and words, but not to answer questions about it; for answers, write rows of a "
            'prompt and a completion, or give a chat export with --speaker NAME (docs/data.md, "Text or answers")'
        )
    for name, rows in parts.items():
        if refused := refused_tools(rows):
            notes.append(
                f"{counted(refused, f'{name} row')} with tool calls left out, because the chat template does not show them; "
                f"{OUR_TEMPLATE} trains them"
            )
    return notes


def refused_tools(rows: SplitRows) -> int:
    """Return how many records were dropped because the chat template does not show their tool calls."""
    return sum(row.why.endswith(ADVICE) for row in rows.dropped)


def called_functions(rows: SplitRows) -> frozenset[str]:
    """Return the names of the functions that the first records call."""
    return frozenset(
        call["function"]["name"]
        for entry in islice(rows.entries, LOOKED_AT)
        for answer in answers_of(entry)
        if isinstance(answer, Conversation)
        for message in answer.messages
        for call in message.get("tool_calls", ())
    )


class ToolsNotShown(InputError):
    """All rows of a set were refused, some of them because the chat template does not show their tool calls.

    Attributes:
        rows: How many of them.
    """

    def __init__(self, message: str, rows: int):
        super().__init__(message)
        self.rows = rows


# Placeholders


def placeholder_notes(parts: dict[str, SplitRows]) -> list[str]:
    """Return a note on the rows with placeholders, with their locations; nothing if there are none."""
    found: dict[str, None] = {}
    locations: dict[Location, None] = {}
    for rows in parts.values():
        for entry, location in zip(rows.entries, rows.locations, strict=True):
            for text, is_prose in (one for answer in answers_of(entry) for one in _texts_of(answer)):
                for placeholder in _found(text, is_prose):
                    found[placeholder] = None
                    locations[location] = None
    if not locations:
        return []
    named = ", ".join(list(found)[:MAX_NAMED])
    have = "has a placeholder" if len(locations) == 1 else "have placeholders"
    first = where(list(locations)[:MAX_LISTED], len(locations))
    return [f"{counted(len(locations), 'row')} {have} such as {named}: {first}; fill them in, or remove the rows"]


def _texts_of(example: Example) -> Iterator[tuple[str, bool]]:
    """Yield the texts of an example, each with whether people talk in it."""
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
