"""Put other wordings of a record's question in its place, and tell whether a wording may stand there.

A model writes the wordings (objectives/rephrase.py). Small models answer the question instead, lose its numbers or invent
others, so what they write counts only if a few rules hold that need no model and no list of words of a language. They are
strict: a wording that is left out costs a moment, and one that asks for something else teaches a wrong answer.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.data_sets import DataFile
from mlx_lora.data.examples import BadRow, Completion, Conversation, Fields
from mlx_lora.data.read import SplitRows, file_records, parse_rows

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Question:
    """A record, its question and answer as text (empty: it has no question of its own), and the question's other wordings."""

    record: Fields
    text: str = ""
    answer: str = ""
    wordings: list[str] = field(default_factory=list)

    def records(self) -> list[Fields]:
        """Return the record, then itself with each wording as its question; everything else stays as it is."""
        return [self.record, *(_with_text(self.record, self.text, wording) for wording in self.wordings)]


def read_questions(files: Iterable[DataFile], settings: DataSettings) -> list[Question]:
    """Return the records of some files of one split, each with the last question that it answers.

    Raises:
        InputError: a file cannot be read.
    """
    found = []
    for file in files:
        for record in file_records(file, settings, SplitRows()):
            if isinstance(record, BadRow):
                log.info(f"Note: {file.name} {record.unit} {record.line} is left out: {record.why}")
                continue
            parse_rows([record], file.name, settings, "examples", rows := SplitRows())
            question = Question(record.value)
            match rows.entries:
                case [Completion(asked, answer)] | [
                    Conversation([*_, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}])
                ]:
                    question = Question(record.value, asked, answer)
            # A question that was joined from several columns stands in none of them.
            whole = question.text.strip() and _with_text(record.value, question.text, "") is not record.value
            found.append(question if whole else Question(record.value))
    return found


def _with_text(value: Any, old: str, new: str) -> Any:
    """Return a value with the last text in it that equals `old` replaced; the value itself if there is none."""
    if not isinstance(value, dict | list):
        return new if value == old else value
    for key, part in reversed(list(value.items() if isinstance(value, dict) else enumerate(value))):
        if (changed := _with_text(part, old, new)) is not part:
            return {**value, key: changed} if isinstance(value, dict) else [*value[:key], changed, *value[key + 1 :]]
    return value


# What a wording must keep

LONGER, SHORTER, MORE_WORDS = 3, 0.3, 5
CAPITALS = 0.2  # share of words inside sentences from which on a capital letter is no sign of a name, as in German
NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
WORD = re.compile(r"\w[\w-]*")
INSIDE = re.compile(r"(?<=[\w,;] )\w[\w-]+")  # words that do not begin a sentence
MARKED = re.compile(
    r"\s*(?:[-*•>#]+|\d{1,2}[.)])\s+|[\w ]{0,30}(?:question|wording|words|version|rephrased)\s*:\s*", re.IGNORECASE
)
THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
QUOTES = "\"'`*_“”„‘’«» \t"


def cleaned(text: str) -> str:
    """Return the wording in what a model wrote: its first line, without an introduction, marks of lists, and quotes."""
    lines = [line for line in THOUGHT.sub("", text).splitlines() if line.strip() and not line.rstrip().endswith(":")]
    return MARKED.sub("", lines[0].strip(QUOTES), count=1).strip(QUOTES) if lines else ""


def plain(text: str) -> str:
    """Return the words of a text in lower case, without marks between them."""
    return " ".join(word.casefold().replace("-", "") for word in WORD.findall(text))


class Wordings:
    """Tells which wordings count, by the questions and answers of the whole data."""

    def __init__(self, questions: Sequence[Question]):
        """Read the data's words: how often each is there, and which are always written with a capital letter."""
        texts = [text for question in questions for text in (question.text, question.answer)]
        inside = [word for text in texts for word in INSIDE.findall(text)]
        self._often = Counter(word for text in texts for word in plain(text).split())
        self._taken = {plain(question.text) for question in questions}
        self._names = _capitalized(texts) - {
            plain(word) for text in texts for word in WORD.findall(text) if word[0].islower()
        }
        if sum(word[0].isupper() for word in inside) > CAPITALS * len(inside):
            self._names = set()

    def take(self, question: Question, wording: str) -> str | None:
        """Add a wording from `cleaned` to a question; if it may not stand for it, return why."""
        asked, answer, found = (plain(text).split() for text in (question.text, question.answer, wording))
        given, numbers = set(NUMBER.findall(question.text)), set(NUMBER.findall(wording))
        # Words of the answer that are rare in the data: one may be chance, two hardly are.
        rare = {word for word in answer if len(word) > 3 and self._often[word] <= 2 + len(self._taken) // 20}
        told = rare.intersection(found).difference(asked)
        # A language is known by what the other records have of it.
        own = Counter(asked + answer)
        known = {word for word in found if self._often[word] > own[word] and not word.isdigit()} - self._names
        checks = {
            "empty": not found,
            "the same": plain(wording) in self._taken,
            "too long or short": not SHORTER * len(asked) <= len(found) <= LONGER * len(asked) + MORE_WORDS,
            "another language": not _scripts(wording) <= _scripts(question.text + question.answer)
            or (len(found) > 3 and not known),
            "gave the answer away": len(told) > 1 or told & self._names or (numbers - given).intersection(NUMBER.findall(question.answer)),
            "lost a number or name": given - numbers or not all(_mentions(found, name) for name in self._names.intersection(asked)),
            "new number or name": numbers - given or not all(_mentions(asked, name) for name in _capitalized([wording])),
        }  # fmt: skip
        why = next((why for why, fails in checks.items() if fails), None)
        if why is None:
            question.wordings.append(wording)
            self._taken.add(plain(wording))
        return why


def _capitalized(texts: Iterable[str]) -> set[str]:
    """Return the words with a capital letter that do not begin a sentence, as `plain` has them."""
    return {plain(word) for text in texts for word in INSIDE.findall(text) if word[0].isupper()}


def _mentions(words: Iterable[str], name: str) -> bool:
    """Tell whether a name is among some words, with or without an ending: Sunday, Sundays."""
    return any(word.startswith(name.rstrip("s")) for word in words)


def _scripts(text: str) -> set[str]:
    """Return the scripts of a text's letters, by the first words of their names in Unicode; Japan's three are one."""
    found = {unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()}
    return {re.sub("HIRAGANA|KATAKANA.*", "CJK", script) for script in found}
