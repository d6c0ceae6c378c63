"""Read records of texts with labels, and of queries with graded documents; encode the texts as transformers' tokenizers do.

A record has a text, or several columns that are one text (a mail's subject and body, a premise and a hypothesis), which are
joined with line breaks; or a chat as `messages`, which the chat template renders up to where the
model would answer. `--text-column` names other columns.
What the label means is the objective's business.

A record with pictures, in any of the forms of data/images.py, is a question to the model about them, with or without a text.

Each text is one row. Its tokens are those of `tokenizer(text)`, with the tokens that the tokenizer puts before a text, so that
transformers computes the same with them; a longer text is cut at its end.

The tokenizers of encoders end a text with a separator, and have a form for two texts: [CLS] first [SEP] second [SEP]. The columns
in PAIRS, and a reranker's query and document, are read in this form, as sentence-transformers' CrossEncoder does. A longer
text or pair is cut so that these tokens stay, of a pair the longer text first; and a text that spells one of them has its letters.

Queries with documents that answer them more or less well are read for a reranker:

    query, positive(s), negative(s)     texts or lists of texts; also negative_1, negative_2 ...
    query, documents, labels            a list of texts, and a list of numbers, higher for what answers better
    query, document, label              one document; the records of one query are put together

Names are recognized in any case, also those of sentence-transformers' sets (anchor, question; passage, docs, answer; score).

Each query is one example. What its documents' rows are is the objective's business: the encoded row is that of its best
document, and the fact of the example has the tokens and labels of all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jinja2
import numpy as np

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import (
    Completion,
    Conversation,
    EmptyPart,
    Example,
    Fields,
    FormatError,
    MissingColumn,
    OwnEntry,
    Text,
    conversation,
    tokenizable,
)
from mlx_lora.data.formats import columns_of, not_there, sharegpt_messages, usual_names
from mlx_lora.data.sandbox import tokenizer_panics
from mlx_lora.data.tokenize import Encoded, Encoder
from mlx_lora.utils.errors import InputError

# The usual columns of a text, the first that a record has; several are one text.
TEXTS = (
    ("subject", "body"), ("subject", "text"), ("title", "text"), ("title", "body"), ("title", "content"),
    ("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("text",), ("sentence",), ("content",), ("body",), ("message",), ("review",), ("document",), ("mail",), ("email",),
    ("comment",), ("prompt",), ("question",), ("query",), ("input",),
)  # fmt: skip
PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
)  # which encoders read as two texts
CHATS = ("messages", "conversations")
LABELS = ("label", "labels")
LABEL = "label"  # of a row's facts
ASKED = re.compile(r"(?P<name>[^:=]+)(:(?P<kind>[^:=]+))?(=(?P<weight>(?=.*[1-9])\d{1,4}(\.\d+)?))?")
ANSWER = {"role": "assistant", "content": "."}  # stands for one, so that the parser of chats reads a chat without


@dataclass(frozen=True)
class AskedColumn:
    """A column of --label-columns, which has the answers to one question.

    Attributes:
        name: of the column.
        kind: of the answers, as it is written; empty: as the answers are.
        weight: of the question in the loss.
    """

    name: str
    kind: str = ""
    weight: float = 1.0


def asked_columns(text: str | None) -> list[AskedColumn]:
    """Return the columns that --label-columns names.

    Raises:
        InputError: it cannot be read.
    """
    found = []
    for part in text.split(",") if text else ():
        column = ASKED.fullmatch(part.strip())
        if column is None or any(column["name"] == one.name for one in found):
            raise InputError(
                f"--label-columns {text}: write columns, each once, with the kind of answer and a weight if you like, as in "
                "folder,urgent:yes/no,mood:1-5=2"
            )
        found.append(AskedColumn(column["name"], column["kind"] or "", float(column["weight"] or 1)))
    return found


@dataclass(frozen=True)
class Labeled(OwnEntry):
    """A text with its label.

    Attributes:
        example: the text, or a chat.
        label: as the record has it, or of several columns by their names; None: there is none.
    """

    example: Text | Conversation
    label: Any = None

    @property
    def shown(self) -> Example:
        return self.example

    @classmethod
    def parse(cls, record: Fields, settings: DataSettings, needs_label: bool = True) -> Labeled:
        record = {key: value for key, value in record.items() if value is not None}
        label = label_of(record, settings) if needs_label else None
        return cls(_example(record, usual_names(record), settings), label)

    @classmethod
    def encode(
        cls, encoder: Encoder, entries: Sequence[Labeled], on_rows: Callable[[int], None] = lambda done: None
    ) -> Encoded:
        """Encode texts, one row each; nothing is a target, and each row's fact is its label."""
        found, dropped, truncated, shown = encode_texts(encoder, [entry.example for entry in entries])
        on_rows(len(entries))
        rows = [(tokens, np.zeros(len(tokens), bool)) for tokens in found.values()]
        facts = [{LABEL: entries[number].label} for number in found]
        encoded = EncodedSet.from_rows(rows).with_facts(facts)
        if shown:
            encoded = replace(encoded, pictures=np.array([shown.get(number, 0) for number in found], np.int32))
        return Encoded(encoded, np.array(list(found), np.int64), dropped, truncated, {}, [])


class Pictured(Labeled):
    """A question about pictures, with its label; of a record without pictures, a text."""

    @classmethod
    def parse(cls, record: Fields, settings: DataSettings, needs_label: bool = True) -> Labeled:
        from mlx_lora.data.images import COLUMNS, SUFFIXES, ImageConversation, with_marks  # a run of texts imports none

        have = {key: value for key, value in record.items() if value not in (None, "")}
        named = [name for name in COLUMNS if name in have]
        if named[:1] == ["file_name"] and not str(have["file_name"]).lower().endswith(SUFFIXES):
            named = []
        rest = {key: value for key, value in have.items() if key not in named}
        turns = next((rest[name] for name in (settings.chat_column, *CHATS) if name in rest), None)
        if turns is None and named:
            try:
                text = _example(rest, usual_names(rest), settings)
            except MissingColumn:
                if settings.text_column:
                    raise
                text = Text("")
            turns = [{"role": "user", "content": text.text if isinstance(text, Text) else ""}]
        sources: dict[str, str | bytes] = {}
        pictures = {name: have[name] for name in named[:1]}
        marked = with_marks({"messages": turns, **pictures}, settings, sources) if isinstance(turns, list) else {}
        if not sources:
            return Labeled.parse(record, settings, needs_label)
        plain = replace(settings, text_column=None, chat_column=None)
        chat: Any = _example({**rest, **marked}, marked, plain)
        label = label_of(have, settings) if needs_label else None
        return cls(ImageConversation(chat.messages, chat.tools, chat.reasoning_field, chat.unread, sources), label)


def label_of(record: Fields, settings: DataSettings) -> Any:
    """Return the label of a record, or with --label-columns the labels by the names of their columns, None where one is empty.

    Raises:
        MissingColumn: it has no such column.
        EmptyPart: all of them are empty.
    """
    if names := [one.name for one in asked_columns(settings.label_columns)]:
        if not any(name in record for name in names):
            raise MissingColumn(not_there(record, "--label-columns", *names))
        labels = {name: None if record.get(name) in ("", None) else record[name] for name in names}
        if not any(value is not None for value in labels.values()):
            raise EmptyPart("no answer in the label columns")
        return labels
    name = settings.label_column or next((name for name in record if str(name).lower() in LABELS), None)
    if name is None:
        raise MissingColumn(f"found {columns_of(record)}; name the label's with --label-column")
    if name not in record:
        raise MissingColumn(not_there(record, "--label-column", name))
    return record[name]


def _example(record: Fields, plain: Fields, settings: DataSettings) -> Text | Conversation:
    """Return the text, or the chat, of a record."""
    if settings.text_column:
        names = [name.strip() for name in settings.text_column.split(",") if name.strip()]
        if lost := [name for name in names if name not in record]:
            raise MissingColumn(not_there(record, "--text-column", *lost))
        return _text([record[name] for name in names], names)
    chat = settings.chat_column or next((name for name in CHATS if name in plain), None)
    if chat is not None and (turns := {**plain, **record}.get(chat)) is not None:
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
            turns = sharegpt_messages(turns)
        answered = not isinstance(turns, list) or any(
            isinstance(turn, dict) and turn.get("role") == "assistant" for turn in turns
        )
        found = conversation(turns if answered else [*turns, ANSWER], record.get("tools"), None)
        tokenizable("".join(turn["content"] for turn in found.messages))
        return found if answered else replace(found, messages=found.messages[:-1])
    names = next((names for names in TEXTS if all(name in plain for name in names)), None)
    if names is None:
        raise MissingColumn(f"found {columns_of(record)}; name the text's with --text-column")
    return _text([plain[name] for name in names], names)


def _text(values: Sequence[Any], names: Sequence[str]) -> Text:
    """Join the cells of a text with line breaks."""
    for value, name in zip(values, names, strict=True):
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise FormatError(f"{name} is a {type(value).__name__}, not a text")
    texts = tuple(map(str, values))
    text = "\n".join(part for part in texts if part.strip())
    if not text.strip():
        raise EmptyPart("empty text")
    return Text(tokenizable(text), ends=False, pair=texts if tuple(names) in PAIRS else None)  # pyright: ignore[reportArgumentType]


def encode_texts(
    encoder: Encoder, examples: Sequence[Example]
) -> tuple[dict[int, np.ndarray], dict[int, str], list[int], dict[int, int]]:
    """Return number -> tokens (n,) int32 of texts and chats, number -> why there are none, which were cut, and number -> that of
    their pictures in the run's table.
    """
    tokenizer: Any = encoder.tokenizer
    ids: dict[int, list[int]] = {}
    dropped: dict[int, str] = {}
    texts = {number: example for number, example in enumerate(examples) if isinstance(example, Text)}
    cut: list[int] = []
    shown: dict[int, int] = {}
    if texts:
        with tokenizer_panics("the data"):
            if has_pairs(tokenizer):
                encoded, shorter = _in_form_of_encoders(tokenizer, list(texts.values()), encoder.max_tokens)
                ids = {number: encoded[place] for place, number in enumerate(texts)}
                cut = [number for place, number in enumerate(texts) if place in shorter]
            else:
                plain = [example.text for example in texts.values()]
                ids = dict(zip(texts, tokenizer(plain, return_attention_mask=False)["input_ids"], strict=True))
    for number, example in enumerate(examples):
        if isinstance(example, Conversation):
            if encoder.template is None:
                raise InputError("chats require a chat template, but none was given; give one with --chat-template")
            try:
                asked = replace(example, messages=[*example.messages, ANSWER])
                ids[number] = encoder.prompt_tokens(asked)
                if pictures := encoder.picture_number(asked):
                    shown[number] = pictures
            except FormatError as error:
                dropped[number] = str(error)
            except (jinja2.TemplateError, TypeError, ValueError) as error:
                dropped[number] = f"the chat template refuses it ({error})"
    dropped |= {
        number: f"longer than --max-seq-length {encoder.max_tokens}, which would cut its pictures; make it longer"
        for number in shown
        if len(ids[number]) > encoder.max_tokens
    }
    dropped |= {number: "no token" for number, tokens in ids.items() if not tokens}
    longer = (n for n, tokens in ids.items() if len(tokens) > encoder.max_tokens and n not in dropped)
    truncated = sorted([*cut, *longer])
    found = {
        number: np.array(ids[number][: encoder.max_tokens], np.int32)
        for number in sorted(ids)
        if ids[number] and number not in dropped
    }
    return found, dict(sorted(dropped.items())), truncated, shown


def has_pairs(tokenizer: Any) -> bool:
    """Return whether a tokenizer is an encoder's, which puts a text between a first token and a separator."""
    first, separator = tokenizer.cls_token_id, tokenizer.sep_token_id
    if first is None or separator is None:
        return False
    tokens = tokenizer("a")["input_ids"]
    return len(tokens) > 2 and (tokens[0], tokens[-1]) == (first, separator)


def _in_form_of_encoders(tokenizer: Any, texts: Sequence[Text], most: int) -> tuple[dict[int, list[int]], set[int]]:
    """Return the tokens of texts and pairs by their places, at most so many, and the places of those that were cut.

    Raises:
        InputError: not one token of a text would be left.
    """
    tokens: dict[int, list[int]] = {}
    cut: set[int] = set()
    sides = [text.pair or (text.text,) for text in texts]
    form = {"return_attention_mask": False, "split_special_tokens": True, "verbose": False}
    try:
        for count in (1, 2):
            places = [place for place, own in enumerate(sides) if len(own) == count]
            fewest = tokenizer.num_special_tokens_to_add(pair=count == 2) + count
            if places and most < fewest:
                raise InputError(f"--max-seq-length {most} leaves no token of a text; use {fewest} or more")
            for shorter in (
                {},
                {"truncation": "longest_first", "max_length": most},
            ):  # the second time, what is too long
                if places:
                    asked = map(list, zip(*(sides[place] for place in places), strict=True))
                    tokens |= zip(places, tokenizer(*asked, **form, **shorter)["input_ids"], strict=True)
                places = [place for place in places if len(tokens[place]) > most]
                cut |= set(places)
    finally:  # other calls of this tokenizer are not to be cut, nor to lose its special tokens
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.encode_special_tokens = False
    return tokens, cut


# Queries and their documents

QUERIES = ("query", "question", "anchor", "prompt")
POSITIVES = ("positive", "positives", "pos")
NEGATIVES = re.compile(r"negatives?(_\d+)?|neg")
LISTS = ("documents", "docs", "passages", "candidates")
SINGLES = ("document", "passage", "doc", "text", "answer", "response")
GRADED = ("labels", "label", "scores", "score", "relevance")
# Of an example's facts.
ROWS, GRADES = "rows", "grades"


@dataclass(frozen=True)
class Candidates(OwnEntry):
    """A query and its documents.

    Attributes:
        query: its text.
        documents: their texts.
        grades: a number for each, higher for what answers better, at least 0.
    """

    optional: ClassVar[re.Pattern[str] | None] = NEGATIVES

    query: str
    documents: tuple[str, ...]
    grades: tuple[float, ...]

    @property
    def shown(self) -> Completion:
        """The query and its best document."""
        return Completion(self.query, self.documents[int(np.argmax(self.grades))])

    @classmethod
    def parse(cls, record: Fields, settings: DataSettings) -> Candidates:
        record = usual_names({key: value for key, value in record.items() if value is not None})
        query = next((name for name in QUERIES if name in record), None)
        if query is None:
            raise MissingColumn(f"found {columns_of(record)}; a query is in {', '.join(QUERIES)}")
        positives = [name for name in POSITIVES if name in record]
        if positives:
            good = [text for name in positives for text in _texts_of_cell(record[name], name)]
            bad = [text for name in record if NEGATIVES.fullmatch(name) for text in _texts_of_cell(record[name], name)]
            if not bad:
                raise FormatError("a query without a negative; add documents that do not answer it")
            documents, grades = [*good, *bad], [1.0] * len(good) + [0.0] * len(bad)
        else:
            documents, grades = _graded(record)
        return cls(_texts_of_cell(record[query], query)[0], tuple(documents), tuple(grades))

    @classmethod
    def encode(
        cls, encoder: Encoder, entries: Sequence[Candidates], on_rows: Callable[[int], None] = lambda done: None
    ) -> Encoded:
        """Encode queries, one row each, with the tokens and grades of all their documents as facts.

        A query whose documents are all equally good is dropped: nothing can be learned from their order.

        Args:
            encoder: whose tokenizer and length are used; a long document is cut at its end, a long pair as `encode_texts` does.
            entries: records; those of one query are put together, as the first of them.
            on_rows: called with the number of records that are done.
        """
        places: dict[str, list[int]] = {}
        for number, entry in enumerate(entries):
            places.setdefault(entry.query, []).append(number)
        texts, owners, grades = [], [], []
        for numbers in places.values():
            for number in numbers:
                texts += [query_with(entries[number].query, one) for one in entries[number].documents]
                owners += [number] * len(entries[number].documents)
                grades += entries[number].grades
        found, _, cut, _ = encode_texts(encoder, texts)
        rows, facts, source, dropped = [], [], [], {}
        first = 0
        for numbers in places.values():
            count = sum(len(entries[number].documents) for number in numbers)
            own = grades[first : first + count]
            if max(own) == min(own):
                dropped |= dict.fromkeys(numbers, "all documents of the query are equally good")
            else:
                tokens = [found[i] for i in range(first, first + count)]
                best = tokens[int(np.argmax(own))]
                rows.append((best, np.zeros(len(best), bool)))
                facts.append({ROWS: tokens, GRADES: own})
                source.append(numbers[0])
            first += count
        on_rows(len(entries))
        encoded = EncodedSet.from_rows(rows).with_facts(facts)
        truncated = sorted({owners[number] for number in cut})
        return Encoded(encoded, np.array(source, np.int64), dict(sorted(dropped.items())), truncated, {}, [])


def query_with(query: str, document: str) -> Text:
    """Return what a reranker reads: the pair, or where the tokenizer has no form for pairs, one text."""
    return Text(pair_text(query, document), ends=False, pair=(query, document))


def pair_text(query: str, document: str) -> str:
    """Return the text that a reranker reads if it is a language model."""
    return f"Query: {query}\nDocument: {document}"


def _graded(record: Fields) -> tuple[list[str], list[float]]:
    """Return documents with the numbers that a record gives them."""
    name = next((name for name in (*LISTS, *SINGLES) if name in record), None)
    label = next((name for name in GRADED if name in record), None)
    if name is None or label is None:
        raise MissingColumn(
            f"found {columns_of(record)}; a query needs positive and negative, documents and labels, or document and label"
        )
    documents, given = _texts_of_cell(record[name], name), record[label]
    given = given if isinstance(given, list) else [given]
    try:
        grades = [float(one) for one in given]
    except (TypeError, ValueError):
        grades = [-1.0]
    if not all(0 <= one < 1e6 for one in grades):
        raise FormatError(f"{label} has something else than numbers of at least 0")
    if len(documents) != len(grades):
        raise FormatError(f"{len(documents)} {name} and {len(grades)} {label}; each needs one")
    return documents, grades


def _texts_of_cell(value: Any, name: str) -> list[str]:
    """Return the texts of a cell, one or a list."""
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise FormatError(f"{name} has something else than texts")
    if not all(text.strip() for text in texts):
        raise EmptyPart(f"{name} has an empty text")
    return list(map(tokenizable, texts))
