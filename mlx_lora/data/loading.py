"""Load `--data`: read, encode and split it into training, validation and test sets, and report on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.answers import answers_of, encode_entries
from mlx_lora.data.data_report import MAX_LISTED, DataReport, DroppedRow, Location, SplitReport, example_pieces, reasons
from mlx_lora.data.encode import Encoded, EncodedSet, Encoder
from mlx_lora.data.encoded_cache import entry_folder, read_entry, write_entry
from mlx_lora.data.examples import Completion, Conversation, Text
from mlx_lora.data.preferences import Rated
from mlx_lora.data.reading import Rows, read_rows
from mlx_lora.data.split import content_key, cut_text, hold_out
from mlx_lora.data.templates import resolve_template, shows_date
from mlx_lora.settings.config import DataSettings
from mlx_lora.sources.records import check_file
from mlx_lora.sources.splits import find_splits
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import one_at_a_time
from mlx_lora.system.long_task import long_task
from mlx_lora.system.units import counted


@dataclass(frozen=True)
class DataSplits:
    """The data of a run.

    Attributes:
        train, valid, test: Encoded sets, or None.
        report: What was read, kept and dropped.
        chat_template: Jinja text that the chats were rendered with; None if nothing was rendered.
        chat_day: The day that it shows as today; None if it shows none.
    """

    train: EncodedSet
    valid: EncodedSet | None
    test: EncodedSet | None
    report: DataReport
    chat_template: str | None
    chat_day: date | None = None

    def changed(self, change: Callable[[dict[str, EncodedSet]], dict[str, EncodedSet]]) -> DataSplits:
        """Return the same data with its sets changed; `change` takes and returns those that are there, by name."""
        parts = {name: getattr(self, name) for name in ("train", "valid", "test")}
        return replace(self, **change({name: rows for name, rows in parts.items() if rows}))


def load_data(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
    today: date | None = None,
    records: str = "examples",
) -> DataSplits:
    """Return the data of a run, encoded and split, or taken from the cache of an earlier run.

    Args:
        settings: `--data`, and which of its tokens to train.
        tokenizer: A fast tokenizer, not mlx-lm's wrapper.
        seed: Of the held-out split.
        say: Called with a line from time to time during a long encoding.
        today: The day for templates that show the date, unless the settings name one; None: today.
        records: `examples`, `pairs` or `rated`: what the run's objective trains on.

    Returns:
        The sets and the report. Without a validation file, `valid_fraction` of the rows, or the last part of a single
        long text, is held out of training.

    Raises:
        InputError: there is no data or no usable row, or, with `strict`, any unusable one.
    """
    if settings.data is None:
        raise InputError("no data given; name a file, a folder, a hub dataset or tiny-shakespeare with --data")
    files = _files_of(settings.data)
    if "train" not in files:
        raise InputError(f"--data {settings.data} has no train file, only {', '.join(files)}; add train.jsonl")
    day = _day(settings, tokenizer, today)
    folder = entry_folder(f"{records} splits", files, settings, tokenizer, seed, day)
    with one_at_a_time(folder):  # ranks on one machine encode once
        return replace(_read_or_make_splits(folder, files, settings, tokenizer, seed, say, day, records), chat_day=day)


def _day(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, today: date | None) -> date | None:
    """Return the day that the chat template shows, or None if it shows none.

    Raises:
        InputError: the settings name a day, but the template shows none.
    """
    if shows_date(settings.chat_template, tokenizer):
        return date.fromisoformat(settings.chat_date) if settings.chat_date else today or date.today()
    if settings.chat_date:
        raise InputError(f"--chat-date {settings.chat_date}: the chat template shows no date; leave it out")
    return None


def _read_or_make_splits(
    folder: Path,
    files: dict[str, tuple[Path, ...]],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    say: Callable[[str], None],
    day: date | None,
    records: str,
) -> DataSplits:
    if entry := read_entry(folder):
        sets, details = entry
        report = replace(DataReport.from_dict(details["report"]), data=settings.data)
        return DataSplits(sets["train"], sets.get("valid"), sets.get("test"), report, details["chat_template"])
    splits = _make_splits(files, settings, tokenizer, seed, say, day, records)
    sets = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    details = {"report": splits.report.to_dict(), "chat_template": splits.chat_template}
    _keep(folder, {name: rows for name, rows in sets.items() if rows is not None}, details, say)
    return splits


def _files_of(data: str) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split, after checking that each exists and can be read."""
    files = find_splits(data)
    for paths in files.values():
        for path in paths:
            check_file(path)
    return files


def _keep(folder: Path, sets: dict[str, EncodedSet], details: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write the encoded sets to the cache; if that fails, print a note and continue."""
    try:
        write_entry(folder, sets, details)
    except OSError as error:
        say(f"Note: the encoded data cannot be kept for the next run: {folder.parent}: {error.strerror}")


def _make_splits(
    files: dict[str, tuple[Path, ...]],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    say: Callable[[str], None],
    day: date | None,
    records: str,
) -> DataSplits:
    parts = {name: read_rows(paths, settings, records) for name, paths in files.items()}
    if "valid" not in parts:
        parts |= _cut_single_text(parts["train"], settings.valid_fraction)
    encoder, template, origin = _make_encoder(parts.values(), settings, tokenizer, day)
    encoded = {name: _encode(rows, encoder, say) for name, rows in parts.items()}
    _check(settings, parts, encoded)

    truncated = [location for rows in parts.values() for location in rows.truncated]
    keys = {
        name: [content_key(*answers_of(parts[name].entries[i])) for i in dict.fromkeys(encoded[name].source.tolist())]
        for name in encoded
    }
    doubled = _doubled(parts["train"], encoded["train"], keys["train"])
    sets = {name: part.rows for name, part in encoded.items() if len(part.rows)}
    valid_source = "file" if "valid" in files else "held out"
    if "valid" not in encoded:
        sets |= _hold_out(encoded["train"], keys["train"], settings.valid_fraction, seed)
    pieces = example_pieces(sets["train"], tokenizer)
    report = DataReport(
        data=settings.data or "",
        rows_read=sum(rows.rows_read for rows in parts.values()),
        formats=dict(sum((rows.formats for rows in parts.values()), Counter())),
        splits={name: SplitReport.of(rows) for name, rows in sets.items()},
        valid_source=valid_source if "valid" in sets else "none",
        template=origin,
        max_seq_length=settings.max_seq_length,
        truncated=len(truncated),
        empty=sum(rows.empty for rows in parts.values()),
        duplicates=len(doubled),
        dropped=sum(len(rows.dropped) for rows in parts.values()),
        dropped_rows=[row for rows in parts.values() for row in rows.dropped][:MAX_LISTED],
        truncated_rows=truncated[:MAX_LISTED],
        duplicate_rows=doubled[:MAX_LISTED],
        notes=_notes(parts, encoded, keys, encoder, day if template else None),
        example=pieces[0],
        rejected=[piece for piece in pieces[1] if piece[1]] if records == "pairs" else [],
        records=records,
    )
    return DataSplits(sets["train"], sets.get("valid"), sets.get("test"), report, template)


def load_eval_set(
    data: str,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None] = lambda line: None,
    records: str = "examples",
) -> EncodedSet:
    """Return the encoded set for `evaluate --data`: all rows of a file, or a folder's test or else validation file.

    Args:
        data: As `--data`.
        settings: Format, template, length and mask; its `data` is ignored.
        tokenizer: A fast tokenizer.
        say, records: As for `load_data`.

    Raises:
        InputError: as for `load_data`.
    """
    files = _files_of(data)
    name = next(name for name in ("test", "valid", "train") if name in files)
    if name == "train" and len(files["train"]) == 1 and Path(data).is_dir():
        raise InputError(f"--data {data} has neither a test nor a validation file; name a file inside it")
    day = _day(settings, tokenizer, None)
    folder = entry_folder(f"{records} evaluation", {name: files[name]}, settings, tokenizer, 0, day)
    if entry := read_entry(folder):
        for line in entry[1]["notes"]:
            say(line)
        return entry[0][name]
    parts = {name: read_rows(files[name], settings, records)}
    encoder, _, _ = _make_encoder(parts.values(), settings, tokenizer, day)
    encoded = {name: _encode(parts[name], encoder, say)}
    _check(settings, parts, encoded)
    notes = _evaluation_notes(parts[name], encoded[name])
    for line in notes:
        say(line)
    _keep(folder, {name: encoded[name].rows}, {"notes": notes}, say)
    return encoded[name].rows


def _cut_single_text(train: Rows, fraction: float) -> dict[str, Rows]:
    """Cut the training data in two if it is a single long text, and return the part to validate on."""
    if len(train.entries) != 1 or not isinstance(train.entries[0], Text):
        return {}
    parts = cut_text(train.entries[0], fraction)
    if parts is None:
        return {}
    train.entries[0] = parts[0]
    return {"valid": Rows([parts[1]], list(train.locations))}


def _make_encoder(
    parts: Collection[Rows], settings: DataSettings, tokenizer: PreTrainedTokenizerBase, day: date | None
) -> tuple[Encoder, str | None, str]:
    """Return the encoder, the template's text (None if all data is plain text), and the template's origin."""
    plain_completions = settings.chat_template is None and not tokenizer.chat_template
    rendered = (Conversation,) if plain_completions else (Conversation, Completion)
    template, origin = None, "none (plain text)"
    if any(isinstance(answer, rendered) for rows in parts for entry in rows.entries for answer in answers_of(entry)):
        template, origin = resolve_template(settings.chat_template, tokenizer)
        if origin == "model":
            origin = "the model's own"
        elif plain_completions:
            origin += " (the model has no chat template)"
    encoder = Encoder(
        tokenizer,
        template,
        max_seq_length=settings.max_seq_length,
        mask_prompt=settings.mask_prompt,
        plain_completions=plain_completions,
        day=day,
    )
    return encoder, template, origin


def _encode(rows: Rows, encoder: Encoder, say: Callable[[str], None]) -> Encoded:
    with long_task("Encoding", len(rows.entries), "records", say) as task:
        encoded = encode_entries(encoder, rows.entries, task.reach)
    for number, why in encoded.dropped.items():
        location = rows.locations[number]
        rows.dropped.append(DroppedRow(location.file, location.line, why, location.unit))
    rows.dropped.sort(key=lambda row: (row.file, row.line))
    rows.truncated = [rows.locations[number] for number in encoded.truncated]
    return encoded


def _doubled(rows: Rows, encoded: Encoded, keys: list[str]) -> list[Location]:
    """Return the locations of duplicate rows; `keys` are those of the examples that gave rows."""
    seen: set[str] = set()
    found = []
    for number, key in zip(dict.fromkeys(encoded.source.tolist()), keys, strict=True):
        if key in seen:
            found.append(rows.locations[number])
        seen.add(key)
    return found


def _check(settings: DataSettings, parts: dict[str, Rows], encoded: dict[str, Encoded]) -> None:
    """Raise if a split has no row, or, with `strict`, if any row was dropped."""
    for name, rows in parts.items():
        if len(encoded[name].rows) and not (settings.strict and rows.dropped):
            continue
        found = len(rows.dropped)
        if not found:
            raise InputError(f"the {name} data has no record; it needs at least one")
        if len(encoded[name].rows):
            raise InputError(f"--strict: {found} unusable {name} rows: {reasons(rows.dropped)}; fix or remove them")
        raise InputError(f"no usable row in the {name} data, {found} refused: {reasons(rows.dropped)}")


def _evaluation_notes(rows: Rows, encoded: Encoded) -> list[str]:
    """Return notes on what an evaluation left out or cut, because that changes the loss."""
    notes = []
    if rows.dropped:
        notes.append(f"Note: {len(rows.dropped)} unusable rows left out: {reasons(rows.dropped)}")
    if encoded.truncated:
        notes.append(f"Note: {len(encoded.truncated)} rows cut at --max-seq-length")
    return notes


def _hold_out(encoded: Encoded, keys: list[str], fraction: float, seed: int) -> dict[str, EncodedSet]:
    held = hold_out(keys, fraction, seed)
    if not held.any():
        return {}
    _, example = np.unique(encoded.source, return_inverse=True)  # there is a key for each example that gave rows
    in_valid = held[example]
    return {
        "train": encoded.rows.select(np.flatnonzero(~in_valid)),
        "valid": encoded.rows.select(np.flatnonzero(in_valid)),
    }


def _notes(
    parts: dict[str, Rows],
    encoded: dict[str, Encoded],
    keys: dict[str, list[str]],
    encoder: Encoder,
    day: date | None,
) -> list[str]:
    notes = []
    for name in ("valid", "test"):
        shared = len(set(keys.get(name, [])) & set(keys["train"]))
        if shared:
            notes.append(f"{shared:,} {name} rows are also training rows; the {name} loss will be too low")
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
        notes.append(f"the chat template does not show the tools of {counted(len(with_tools), 'row')} to the model")
    unshown: Counter[str] = Counter()
    for part in encoded.values():
        unshown.update({name: len(numbers) for name, numbers in part.unshown.items()})
    for name, count in sorted(unshown.items()):
        have = "has" if count == 1 else "have"
        notes.append(f"{counted(count, 'row')} {have} {name}, which the chat template does not show; it is not trained")
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
