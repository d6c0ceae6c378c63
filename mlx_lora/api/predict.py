"""Label texts with a classifier and order documents with a reranker, from Python, and read files that are to be labeled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_lora.api.base import Base as PublicBase
from mlx_lora.api.base import PathLike, as_base
from mlx_lora.api.errors import speaks_python
from mlx_lora.api.train import run_settings
from mlx_lora.config.settings import DataSettings
from mlx_lora.data.examples import BadRow, Conversation, Fields, FormatError, Text
from mlx_lora.data.files import all_files
from mlx_lora.data.labeled import parse_labeled
from mlx_lora.data.records import read_records
from mlx_lora.exporters.adapter_folder import load_adapter, with_limits_of_run
from mlx_lora.models.load import Base
from mlx_lora.objectives.scored_texts import ERROR, TextScorer, in_order
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_adapter

CHUNK = 256  # texts that are scored together, so that a file may be longer than memory


@speaks_python(adapter_path="adapter")
def predict(
    base: PublicBase | PathLike,
    texts: str | Sequence[str | dict[str, Any]],
    adapter: PathLike,
    *,
    batch_tokens: int | None = None,
    ignore_fingerprint: bool = False,
    **settings: Any,
) -> Any:
    """Return what a classifier predicts of texts, in their order.

    Args:
        base: from `load`, or a model's name; it stays as it is.
        texts: a text, or a list of texts, or of records as they were trained on.
        adapter: folder or hub id of an adapter that was trained with `objective="classify"`, here or by PEFT.
        batch_tokens: tokens per batch, padding included; None: the default.
        ignore_fingerprint: use an adapter that was trained on another base of the same shape.
        settings: of data, as for `train`: `text_column`, `max_seq_length` (default: that of the adapter's run), `chat_template`.

    Returns:
        For a text, a dictionary; for a list, a list of them. Of one label, `predicted` is its name, and `probability` its own;
        of several, `predicted` is a list of names; of a number, the number. `probabilities` has those of all labels.

    Raises:
        InputError: base, adapter or a setting that cannot be used, or an empty text.
    """
    base = as_base(base, "predict")
    data = run_settings(base.settings, {**settings, "objective": "classify"}, of=("data", "objective")).data
    given: list[Any] = [texts] if isinstance(texts, str) else list(texts)
    examples = []
    for number, one in enumerate(given):
        found = example_of(
            {"text": one} if isinstance(one, str) else one,
            replace(data, text_column=None) if isinstance(one, str) else data,
        )
        if isinstance(found, str):
            raise InputError(f"texts: number {number}: {found}")
        examples.append(found)
    folder: Any = resolve_adapter(os.fspath(adapter), None)
    data = with_limits_of_run(data, settings, folder)
    with base.loaded.lent() as lent:
        scorer = load_scorer(lent, folder, data, batch_tokens, ignore_fingerprint)
        answers = scorer.predict(examples)
    for number, answer in enumerate(answers):
        if ERROR in answer:
            raise InputError(f"texts: number {number}: {answer[ERROR]}")
    return answers[0] if isinstance(texts, str) else answers


def load_scorer(
    base: Base,
    folder: Path,
    data: DataSettings,
    batch_tokens: int | None = None,
    ignore_fingerprint: bool = False,
    objective: str = "classify",
) -> TextScorer:
    """Put the adapter of an objective on a base, and return what scores texts with it.

    Raises:
        InputError: it does not fit the base, or has no score head.
    """
    info = load_adapter(base, folder, ignore_fingerprint, scores=True)
    if info.chat_template and not data.chat_template:
        base.hf_tokenizer.chat_template = info.chat_template
    scorer = TextScorer.of(base, info.head, data, batch_tokens)
    if info.head is None and objective == "rerank" and len(scorer.head["labels"]) == 0:
        scorer = replace(scorer, head=scorer.head | {"objective": objective})  # PEFT does not say what one output means
    if scorer.head["objective"] != objective:
        raise InputError(f"{folder}: was trained with --objective {scorer.head['objective']}; give one of {objective}")
    return scorer


@speaks_python(adapter_path="adapter")
def rerank(
    base: PublicBase | PathLike,
    query: str,
    documents: Sequence[str],
    adapter: PathLike,
    *,
    top_n: int | None = None,
    batch_tokens: int | None = None,
    ignore_fingerprint: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Return documents in the order of how well they answer a query, the best first.

    Args:
        base: from `load`, or a model's name; it stays as it is.
        query: the query.
        documents: texts.
        adapter: folder or hub id of an adapter that was trained with `objective="rerank"`.
        top_n: how many to return; None: all.
        batch_tokens: tokens per batch, padding included; None: the default.
        ignore_fingerprint: use an adapter that was trained on another base of the same shape.
        settings: of data, as for `train`: `max_seq_length` (default: that of the adapter's run).

    Returns:
        For each, its `index` in `documents`, its `score` between 0 and 1, and the `document`.

    Raises:
        InputError: base, adapter or a setting that cannot be used, or an empty text.
    """
    base = as_base(base, "rerank")
    data = run_settings(base.settings, {**settings, "objective": "rerank"}, of=("data", "objective")).data
    if not all(isinstance(text, str) and text.strip() for text in (query, *documents)):
        raise InputError("rerank: the query and each document must be a text that is not empty")
    folder: Any = resolve_adapter(os.fspath(adapter), None)
    data = with_limits_of_run(data, settings, folder)
    with base.loaded.lent() as lent:
        scorer = load_scorer(lent, folder, data, batch_tokens, ignore_fingerprint, "rerank")
        scores, _ = scorer.rank(query, documents)
    return [{"index": i, "score": score, "document": documents[i]} for i, score in in_order(scores)[:top_n]]


def example_of(record: Fields, data: DataSettings) -> Text | Conversation | str:
    """Return the text of a record, or why there is none."""
    try:
        return parse_labeled(record, data, needs_label=False).example
    except FormatError as error:
        return str(error)


def predicted_records(scorer: TextScorer, data: DataSettings) -> Iterator[tuple[Fields, bool]]:
    """Yield the records of --data with what is predicted of each, and whether that failed; then it has `error`.

    Raises:
        InputError: --data is a folder, or cannot be read.
    """
    records = records_of(data)
    while chunk := list(islice(records, CHUNK)):
        read = [one if isinstance(one, str) else example_of(one, data) for one in chunk]
        places = [number for number, one in enumerate(read) if not isinstance(one, str)]
        answers = dict(zip(places, scorer.predict([one for one in read if not isinstance(one, str)]), strict=True))
        for number, (record, found) in enumerate(zip(chunk, read, strict=True)):
            answer = answers.get(number, {ERROR: found})
            yield {**(record if isinstance(record, dict) else {}), **answer}, ERROR in answer


def records_of(data: DataSettings) -> Iterator[Fields | str]:
    """Yield the records of --data, or why one is none."""
    name = data.data or ""
    if Path(name).expanduser().is_dir():
        raise InputError(f"--data {name}: is a folder; name a file in it")
    for file in all_files(name):
        for record in read_records(file.path, file.sheet):
            yield record.why if isinstance(record, BadRow) else record.value


def data_columns(data: DataSettings) -> dict[str, None]:
    """Return the names of the columns that the records of --data have, in order; errors as of `predicted_records`."""
    return {str(name): None for record in records_of(data) if isinstance(record, dict) for name in record}
