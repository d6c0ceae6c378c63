"""Read preferences whose prompts have pictures: pairs of a chosen and a rejected answer, and rated answers.

    {"images": ["a.png"], "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    {"images": ["a.png"], "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", ...}]}],
     "chosen": [{"role": "assistant", "content": [...]}], "rejected": [...]}                               TRL
    {"images": ["a.png"], "chosen": [whole dialogue], "rejected": [whole dialogue]}                         TRL
    {"image": "a.png", "prompt": "What is it?", "completion": "A cat.", "label": true}                      KTO

The forms of text are those of data/preferences.py, and pictures are found as in data/images.py. Both answers are about the same
pictures, in the same order; an answer has none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.examples import Completion, Conversation, Fields, FormatError
from mlx_lora.data.formats import NamedColumns
from mlx_lora.data.images import (
    ANSWERING,
    COLUMNS,
    MARK,
    PLACE,
    QUESTIONS,
    TURNS,
    ImageConversation,
    with_marks,
)
from mlx_lora.data.preferences import OUR_NAMES, Answer, Pair, Rated, parse_pairs, parse_rated

SIDES = ("chosen", "rejected")
Sources = Mapping[str, str | bytes]


def parse_preferences(
    record: Fields, settings: DataSettings, named: NamedColumns, kind: str
) -> Sequence[Pair] | Sequence[Rated]:
    """Return a record's pairs or rated answers; without pictures, they are those of text.

    Args:
        record: as read from the file.
        settings: of the data.
        named: the columns and names of turns that they give.
        kind: `pairs` or `rated`.

    Raises:
        FormatError: it cannot be used, or its pictures have no place.
    """
    sources: dict[str, str | bytes] = {}
    marked = _marked({key: value for key, value in record.items() if value is not None}, settings, sources)
    _, value = named.renamed(marked, kind)
    if kind == "rated":
        rated = parse_rated(value)
        return [replace(one, answer=_illustrated(one.answer, sources)) for one in rated] if sources else rated
    pairs = parse_pairs(value, settings.pairs == "all")
    return [_illustrated_pair(pair, sources) for pair in pairs] if sources else pairs


def _marked(record: Fields, settings: DataSettings, sources: dict[str, str | bytes]) -> Fields:
    """Return a record with marks for pictures; each answer that is a whole dialogue has its own."""
    record = {OUR_NAMES.get(key, key): value for key, value in record.items()}
    given = record.get("input")
    if isinstance(given, dict):  # OpenAI's
        beside = {"tools": given["tools"]} if given.get("tools") else {}
        record = {**{key: value for key, value in record.items() if key != "input"}, **beside}
        record["messages"] = given.get("messages")
    asking = (*TURNS, *QUESTIONS, "input", (settings.prompt_column or "").split(",")[0].strip())
    asked = {name: record[name] for name in asking if name in record}
    if isinstance(record.get("completion"), str):
        del asked["completion"]  # an answer has no places
    pictures = {name: record[name] for name in COLUMNS if name in record}
    kept = {name: value for name, value in record.items() if name not in pictures}
    whole = {name: record[name] for name in SIDES if _is_dialogue(record.get(name))}
    if len(whole) < len(SIDES):
        return {**_without(kept, asked), **with_marks(_with_a_question(asked, pictures), settings, sources)}
    for name, value in {**asked, **whole}.items():
        if isinstance(value, list):
            kept |= _dialogue(name, value, pictures, settings, sources)
        elif isinstance(value, str):
            kept[name] = value.replace(PLACE, "")  # a question of the dialogues, which have its pictures
    return kept


def _without(record: Fields, names: Collection[str]) -> Fields:
    return {name: value for name, value in record.items() if name not in names}


def _dialogue(
    name: str, turns: list[Any], pictures: Fields, settings: DataSettings, sources: dict[str, str | bytes]
) -> Fields:
    """Return a column of turns with marks for all pictures of the record."""
    try:
        return with_marks({**pictures, name: turns}, settings, sources, (name,))
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error


def _is_dialogue(turns: Any) -> bool:
    """Tell whether these are turns that begin with a question, and no answer alone."""
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    return bool(first) and str(first.get("role", first.get("from"))).lower() not in ANSWERING


def _with_a_question(asked: Fields, pictures: Fields) -> Fields:
    """Return the columns that ask and those with pictures; without a question, the answers are captions."""
    asked = asked if asked or not pictures else {"prompt": [{"role": "user", "content": ""}]}
    return {**asked, **pictures}


def _illustrated_pair(pair: Pair, sources: Sources) -> Pair:
    chosen, rejected = (_illustrated(answer, sources) for answer in (pair.chosen, pair.rejected))
    if chosen.marks != rejected.marks:
        counts = [len(one.marks) for one in (chosen, rejected)]
        found = (
            f"{counts[0]} pictures and rejected {counts[1]}"
            if counts[0] != counts[1]
            else "other pictures than rejected"
        )
        raise FormatError(f"chosen has {found}; both must answer the same prompt")
    return replace(pair, chosen=chosen, rejected=rejected, repeats=None)


def _illustrated(answer: Answer, sources: Sources) -> ImageConversation:
    """Return an answer as a conversation with pictures.

    Raises:
        FormatError: an answer has a picture.
    """
    if isinstance(answer, Completion):
        turns = [("user", answer.prompt), ("assistant", answer.completion)]
        answer = Conversation([{"role": role, "content": content} for role, content in turns])
    if any(MARK.search(message["content"]) for message in answer.messages if message["role"] == "assistant"):
        raise FormatError("a picture in an answer; vision-language models cannot write pictures")
    return ImageConversation(answer.messages, answer.tools, answer.reasoning_field, answer.unread, sources)
