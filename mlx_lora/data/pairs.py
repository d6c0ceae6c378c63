"""Read and encode texts that belong together: queries with their documents, with negatives, or with a score.

    sentence-transformers   anchor, positive; anchor, positive, negative (or negative_1, negative_2 ...)
                            sentence1, sentence2, score
    BGE, E5                 query, pos: [...], neg: [...]
    others                  query (question, sentence1 ...), positive (answer, document, passage, sentence2 ...): QUERIES, DOCUMENTS

A query with several documents gives an example with each. Every example of a set has the same number of rows, so one with
fewer negatives than others gets rows of a single token, which are marked as absent and never compared.

    rows of an example    the query, its document, its negatives
    label of a row        a number that equal texts share (`absent` for a row that only fills up); of a query with a score, the score

Shapes: R rows, E examples, K rows of each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.data_sets import DataFile, all_files, find_sets
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import (
    BadRow,
    EmptyRecord,
    Fields,
    FormatError,
    MissingColumn,
    keys_of,
    number_of,
    tokenizable,
)
from mlx_lora.data.file_formats import DOCUMENTS as DOCUMENT_FILES
from mlx_lora.data.file_formats import read_records, without_empty_cells
from mlx_lora.data.load import DataSplits
from mlx_lora.data.mix import joined_groups, split_by_group
from mlx_lora.data.report import MAX_LISTED, DataReport, DroppedRow, Location, SplitReport, cut, reasons
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import sha256_of, shown_data
from mlx_lora.utils.text import counted

# Divide a document into passages for search: its sections, and long ones at blank lines.
#
# A passage begins with the headings that it is under, so that it can be found, and understood, without the rest of its document.

MOST_CHARS = 1200  # of a passage: about 300 tokens, so that encoders with 512 take it whole
HEADING = re.compile(r"(#{1,6})\s+(.+?)\s*#*\s*$")
FENCE = re.compile(r"\s*(```|~~~)")


def passages_of(text: str, most_chars: int = MOST_CHARS) -> list[str]:
    """Return the passages of a Markdown or plain text, none for an empty one.

    Args:
        text: of the document.
        most_chars: of a passage, its headings included; a paragraph that is longer is cut at a space.
    """
    found: list[str] = []
    for headings, body in _sections(text):
        first = " > ".join(headings)
        room = max(most_chars // 2, most_chars - len(first) - 1)
        for part in _parts(body, room):
            found.append(f"{first}\n{part}" if first else part)
    return found


def _sections(text: str) -> list[tuple[list[str], str]]:
    """Return the headings above each section, and the section's text without its own."""
    path: dict[int, str] = {}
    sections: list[tuple[list[str], list[str]]] = [([], [])]
    fenced = False
    for line in text.splitlines():
        fenced ^= bool(FENCE.match(line))
        heading = None if fenced else HEADING.match(line)
        if heading is None:
            sections[-1][1].append(line)
            continue
        level = len(heading[1])
        path = {known: name for known, name in path.items() if known < level} | {level: heading[2]}
        sections.append(([path[known] for known in sorted(path)], []))
    return [(headings, "\n".join(lines).strip()) for headings, lines in sections]


def _parts(body: str, most_chars: int) -> list[str]:
    """Return a section in parts of at most so many characters, cut at blank lines, else at spaces."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", body):
        left = paragraph.strip()
        while left:
            piece = left if len(left) <= most_chars else left[: left.rfind(" ", most_chars // 2, most_chars) + 1]
            piece = piece or left[:most_chars]
            left = left[len(piece) :].strip()
            if parts and len(parts[-1]) + 2 + len(piece) <= most_chars:
                parts[-1] += f"\n\n{piece.strip()}"
            else:
                parts.append(piece.strip())
    return parts


# Read and encode texts that belong together: queries with their documents, with negatives, or with a score

QUERIES = ("anchor", "query", "question", "sentence1", "sentence_a", "text1")
DOCUMENTS = (
    "positive",
    "positives",
    "pos",
    "document",
    "passage",
    "answer",
    "context",
    "sentence2",
    "sentence_b",
    "text2",
)
NEGATIVES = re.compile(r"(hard_)?neg(ative)?s?(_\d+)?")
SCORES = ("score", "similarity", "similarity_score")
LABEL = "label"  # a score, between two sentences
ABSENT = -1.0  # as in losses/scores.py
EXPECTED = "a query (anchor, query, question, sentence1) and its document (positive, pos, answer, sentence2)"
SHOWN_CHARS = 90


@dataclass(frozen=True)
class TextPair:
    """A query and a document that belong together.

    Attributes:
        query, document: the texts.
        negatives: documents that do not answer the query.
        score: how alike the two are; None: they belong together.
    """

    query: str
    document: str
    negatives: tuple[str, ...] = ()
    score: float | None = None


@dataclass(frozen=True)
class TextForm:
    """How texts become rows.

    Attributes:
        query_prompt, document_prompt: are put before the text.
        max_length: most tokens of a row; a longer one is cut at its end.
        needs_negatives: whether an example without a negative is of no use.
        negatives: the most that an example may have; None: any number.
        query_column, document_column: where the data have the texts; None: under the usual names.
    """

    query_prompt: str = ""
    document_prompt: str = ""
    max_length: int = 2048
    needs_negatives: bool = False
    negatives: int | None = None
    query_column: str | None = None
    document_column: str | None = None

    def encode(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, query: bool) -> list[np.ndarray]:
        """Return the token ids of texts, (n,) int32 each, as sentence-transformers gives them to the model.

        Args:
            texts: at least one.
            tokenizer: of the model; it adds what it puts around a text.
            query: whether they are queries, or documents.
        """
        return self.encode_and_tell(texts, tokenizer, query)[0]

    def encode_and_tell(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, query: bool
    ) -> tuple[list[np.ndarray], list[bool]]:
        """Return the token ids of texts as `encode` does, with a fast tokenizer, and whether each text was cut."""
        prompt = self.query_prompt if query else self.document_prompt
        found = tokenizer([prompt + text for text in texts], truncation=True, max_length=self.max_length)
        cut = [bool(one.overflowing) for one in found.encodings or []]
        return [np.array(row, np.int32) for row in found["input_ids"]], cut


def parse_texts(record: Fields, form: TextForm = TextForm()) -> list[TextPair]:
    """Read one record: one example, or one for each of its query's documents.

    Args:
        record: as read from the file.
        form: may name the columns.

    Raises:
        FormatError: the record has no such columns (EmptyRecord: it has, and one is empty).
    """
    known = {str(key).lower().strip().replace("-", "_").replace(" ", "_"): value for key, value in record.items()}
    named = {str(key): value for key, value in record.items()}
    known = {key: value for key, value in (known | named).items() if value is not None}
    asked = [name for name in [form.query_column] if name] or [name for name in QUERIES if name in known]
    found = [name for name in [form.document_column] if name] or [name for name in DOCUMENTS if name in known]
    if missing := [name for name in (*asked[:1], *found[:1]) if name not in known]:
        raise MissingColumn(f"found {keys_of(record)}; it has no column {' and none '.join(missing)}")
    refused = [name for name in known if NEGATIVES.fullmatch(name) and name == name.lower()]
    if not asked or not found:
        missing = "query" if not asked else "document"
        raise MissingColumn(f"found {keys_of(record)}; it has no {missing}: give {EXPECTED}")
    query = _text(known[asked[0]], asked[0])
    documents = _texts(known[found[0]], found[0])
    negatives = [text for name in refused for text in _texts(known[name], name)]
    score = next((known[name] for name in (*SCORES, LABEL) if name in known), None)
    if score is None:
        return [TextPair(query, document, tuple(negatives)) for document in documents]
    value = number_of(score)
    if value is None:
        raise FormatError(f"the score is {score!r}; it must be a number")
    if refused:
        raise FormatError(f"found {keys_of(record)}; a score is for two texts without negatives: leave one of them out")
    return [TextPair(query, document, score=value) for document in documents]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{name} is no text; it must be one")
    if not value.strip():
        raise EmptyRecord(f"{name} is empty; fill it, or remove the row")
    return tokenizable(value)


def _texts(value: Any, name: str) -> list[str]:
    """Return the texts of a column that has one or a list of them."""
    if not isinstance(value, list):
        return [_text(value, name)]
    if not value and not NEGATIVES.fullmatch(name):
        raise EmptyRecord(f"{name} is empty; fill it, or remove the row")
    return [_text(one, name) for one in value]


# A set


@dataclass
class TextRows:
    """The examples of one split, and what was not usable.

    Attributes:
        pairs, locations: the examples, and where each is from.
        dropped: records that cannot be used, with the reason.
        empty, rows_read: how many of these are empty, and how many records there are.
        truncated: examples with a text that was cut.
    """

    pairs: list[TextPair] = field(default_factory=list)
    locations: list[Location] = field(default_factory=list)
    dropped: list[DroppedRow] = field(default_factory=list)
    empty: int = 0
    rows_read: int = 0
    truncated: list[Location] = field(default_factory=list)


def read_texts(files: Sequence[DataFile], form: TextForm, rows: TextRows | None = None) -> TextRows:
    """Read the records of some files.

    Args:
        files: of one split.
        form: whether each needs a negative.
        rows: to add to, and to return; None: new ones.
    """
    rows = TextRows() if rows is None else rows
    for file in files:
        for record in read_records(file.path, file.sheet):
            rows.rows_read += 1
            if isinstance(record, BadRow):
                rows.dropped.append(DroppedRow(file.name, record.line, record.why, record.unit))
                continue
            try:
                found = parse_texts(without_empty_cells(record.value, file.path.name, NEGATIVES), form)
                if form.needs_negatives and not found[0].negatives:
                    raise FormatError(
                        "it has no negative, and --embed-loss triplet compares with one: add it, or use infonce"
                    )
            except FormatError as error:
                rows.empty += isinstance(error, EmptyRecord)
                rows.dropped.append(DroppedRow(file.name, record.line, str(error), record.unit))
                continue
            rows.pairs += [replace(pair, negatives=pair.negatives[: form.negatives]) for pair in found]
            rows.locations += [Location(file.name, record.line, record.unit)] * len(found)
    return rows


def encode_pairs(rows: TextRows, form: TextForm, tokenizer: PreTrainedTokenizerBase, group: int) -> EncodedSet:
    """Return examples as rows, each with one more token behind its last one, which only marks where it ends.

    Args:
        rows: at least one example; what was cut is noted there.
        form: of the rows.
        tokenizer: of the model.
        group: rows of an example, K, which the example with the most negatives needs.
    """
    numbers: dict[str, int] = {}
    labels, queries, documents = [], [], []
    for pair in rows.pairs:
        texts = [pair.document, *pair.negatives]
        own = [float(numbers.setdefault(text, len(numbers))) for text in (pair.query, *texts)]
        if pair.score is not None:
            own[0] = pair.score
        labels += own + [ABSENT] * (group - len(own))
        queries.append(pair.query)
        documents += texts + [""] * (group - 1 - len(texts))
    of_queries = zip(*form.encode_and_tell(queries, tokenizer, True), strict=True)
    wanted = sorted(set(documents) - {""})
    known = {"": (np.zeros(1, np.int32), False)}
    known |= dict(zip(wanted, zip(*form.encode_and_tell(wanted, tokenizer, False), strict=True), strict=True))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for number, query in enumerate(of_queries):
        own = [query, *(known[text] for text in documents[number * (group - 1) : (number + 1) * (group - 1)])]
        if any(cut for _, cut in own):
            rows.truncated.append(rows.locations[number])
        found += [(ids, np.zeros(len(ids), bool)) for ids, _ in own]
    return EncodedSet.from_rows(found).grouped(group, np.array(labels, np.float32)).with_end_scores()


def load_pairs(
    settings: DataSettings, form: TextForm, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[DataSplits, bool]:
    """Return the data of a run of embeddings, encoded and split, and whether the pairs have scores.

    Without a validation file, a share of the examples is held out. Examples with the same query or document are on the same side.

    Args:
        settings: --data, and how much of it is held out.
        form: of the rows.
        tokenizer: a fast tokenizer.
        seed: of the held-out split.

    Raises:
        InputError: there is no usable data, or with --strict, any unusable row.
    """
    parts = _read(settings, form)
    held = _hold_out(parts["train"], settings.valid_fraction, seed) if "valid" not in parts else None
    if held:
        parts["valid"] = held
    scored = _are_scored(settings, *parts.values())
    group = 2 + max(len(pair.negatives) for rows in parts.values() for pair in rows.pairs)
    sets = {name: encode_pairs(rows, form, tokenizer, group) for name, rows in parts.items()}
    report = _report(settings, form, parts, sets, bool(held))
    return DataSplits(sets["train"], sets.get("valid"), sets.get("test"), report, None), scored


def read_eval_pairs(settings: DataSettings, form: TextForm) -> tuple[TextRows, bool]:
    """Return the examples to measure, all of a file, or a folder's test or else validation split; and whether they have scores.

    Raises:
        InputError: there is no usable data.
    """
    parts = _read(settings, form, needs_train=False)
    rows = next(parts[name] for name in ("test", "valid", "train") if name in parts)
    return rows, _are_scored(settings, rows)


def _are_scored(settings: DataSettings, *parts: TextRows) -> bool:
    kinds = {pair.score is not None for rows in parts for pair in rows.pairs}
    if len(kinds) > 1:
        shown = shown_data(settings.data or "")
        raise InputError(f"--data {shown}: some rows have a score and others none; use one kind")
    return kinds == {True}


def _read(settings: DataSettings, form: TextForm, needs_train: bool = True) -> dict[str, TextRows]:
    """Return the rows of each split of all sets."""
    shown = shown_data(settings.data or "")
    if settings.data is None:
        raise InputError("no data given; name a file, a folder or a hub dataset with --data")
    parts: dict[str, TextRows] = {}
    for one in find_sets(settings.data):
        if one.weight != 1:
            raise InputError(f"--data {one.name}={one.weight:g}: pairs of texts have no weights; leave it out")
        for name, files in one.splits.items():
            parts[name] = read_texts(files, form, parts.get(name))
    if needs_train and "train" not in parts:
        raise InputError(f"--data {shown} has no train file, only {', '.join(parts)}; add train.jsonl")
    for name, rows in parts.items():
        if not rows.pairs:
            words = f"{len(rows.dropped)} refused: {reasons(rows.dropped)}" if rows.dropped else "it has no record"
            raise InputError(f"--data {shown}: no usable row in the {name} data, {words}")
        if settings.strict and rows.dropped:
            found = counted(len(rows.dropped), f"unusable {name} row")
            raise InputError(f"--strict: {found}: {reasons(rows.dropped)}; fix or remove them")
    return parts


def _hold_out(train: TextRows, fraction: float, seed: int) -> TextRows | None:
    """Take the examples to validate on out of the training rows; None: there are too few."""
    keys = [sha256_of("\0".join((pair.query, pair.document))) for pair in train.pairs]
    groups = joined_groups([pair.query for pair in train.pairs], [pair.document for pair in train.pairs])
    held = split_by_group(groups.tolist(), keys, fraction, seed).held
    if not held.any():
        return None
    valid = TextRows()
    for rows, wanted in ((valid, held), (train, ~held)):
        chosen = np.flatnonzero(wanted).tolist()
        rows.pairs, rows.locations = [train.pairs[i] for i in chosen], [train.locations[i] for i in chosen]
    return valid


# The report


@dataclass(frozen=True)
class TextReport(DataReport):
    """A report on texts, all of whose tokens are read and none is predicted."""

    def _split_line(self, name: str) -> str:
        split = self.splits.get(name)
        if split is None:
            return f"{name:<10} none"
        source = f", {self.valid_source}" if name == "valid" else ""
        return f"{name:<10} {counted(split.rows, 'example')}, {split.tokens:,} tokens{source}"


def _report(
    settings: DataSettings, form: TextForm, parts: dict[str, TextRows], sets: dict[str, EncodedSet], held_out: bool
) -> TextReport:
    first = parts["train"].pairs[0]
    several, truncated = list(parts.values()), [place for rows in parts.values() for place in rows.truncated]
    kinds = Counter("scored pairs" if p.score is not None else "with negatives" if p.negatives else "pairs"
                    for rows in several for p in rows.pairs)  # fmt: skip
    copies = Counter((pair.query, pair.document) for pair in parts["train"].pairs)
    shown = {"query": form.query_prompt + first.query, "document": form.document_prompt + first.document}
    shown |= {"negative": first.negatives[0]} if first.negatives else {}
    words = [f'{what} "{cut(" ".join(text.split()), SHOWN_CHARS)}"' for what, text in shown.items()]
    words += [f"score {first.score:g}"] if first.score is not None else []
    splits = {}
    for name, rows in sets.items():  # without absent rows, and without what marks a row's end
        there = np.ones(len(rows), bool) if rows.labels is None else rows.labels != ABSENT
        splits[name] = replace(SplitReport.of(rows), tokens=int((rows.lengths[there] - 1).sum()))
    return TextReport(
        data=shown_data(settings.data or ""),
        rows_read=sum(rows.rows_read for rows in several),
        formats=dict(kinds),
        splits=splits,
        valid_source="none" if "valid" not in parts else "held out" if held_out else "file",
        template="none (plain text)",
        max_seq_length=form.max_length,
        truncated=len(truncated),
        empty=sum(rows.empty for rows in several),
        duplicates=sum(copies.values()) - len(copies),
        dropped=sum(len(rows.dropped) for rows in several),
        dropped_rows=[row for rows in several for row in rows.dropped][:MAX_LISTED],
        truncated_rows=truncated[:MAX_LISTED],
        notes=[f"first example: {'; '.join(words)}"],
        records="pairs",
    )


# Texts alone


@dataclass(frozen=True)
class Passage:
    """A text to search for, and the file that it is from, with the column; None: a document."""

    text: str
    file: str
    column: str | None = None


def read_passages(data: str, column: str | None = None, query: bool = False) -> list[Passage]:
    """Return the texts of some files: passages of documents, and of records one column each.

    Args:
        data: a folder, of which all Markdown and text files are taken; or as --data names files.
        column: of the records' text; None: `text`, or a name that a document or a query usually has.
        query: whether queries are meant, whose names then come first.

    Raises:
        InputError: a file cannot be read, a record has no text, or there is none.
    """
    found: list[Passage] = []
    names = [column] if column else [*QUERIES, "text", *DOCUMENTS] if query else ["text", *DOCUMENTS, *QUERIES]
    for file in passage_files(data):
        for record in read_records(file.path, file.sheet):
            if isinstance(record, BadRow):
                if file.path.suffix.lower() in DOCUMENT_FILES:
                    continue  # an empty note
                raise InputError(f"{file.name} {record.unit} {record.line}: {record.why}; fix it, or remove it")
            if column is None and file.path.suffix.lower() in DOCUMENT_FILES:
                found += [Passage(text, file.name) for text in passages_of(str(record.value["text"]))]
            else:
                text, own = _record_text(record.value, names, f"{file.name} {record.unit} {record.line}")
                found.append(Passage(text, file.name, own))
    if not found:
        raise InputError(f"{shown_data(data)}: has no text; give a file or a folder with some")
    return found


def passage_files(data: str) -> list[DataFile]:
    """Return the files to read: all documents in a folder and below it, whatever their names, else as for training."""
    folder = Path(data).expanduser()
    documents = (
        sorted(path for path in folder.rglob("*") if path.suffix.lower() in DOCUMENT_FILES) if folder.is_dir() else []
    )
    own = [path.relative_to(folder) for path in documents]
    if named := [
        DataFile(folder / path, str(path)) for path in own if not any(part.startswith(".") for part in path.parts)
    ]:
        return named
    return all_files(data)


def _record_text(record: Fields, names: Sequence[str], place: str) -> tuple[str, str]:
    """Return a record's text, and the column that has it: the first of these names that it has."""
    name = next((name for name in names if name in record), None)
    value = record[name] if name else None
    if name is None or not isinstance(value, str):
        raise InputError(
            f"{place}: found {keys_of(record)} and no text; rename its column to text, or with embed, give --text-column"
        )
    if not value.strip():
        raise InputError(f"{place}: {name} is empty; fill it, or remove the row")
    return value, name
