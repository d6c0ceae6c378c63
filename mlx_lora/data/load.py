"""Load `--data`: read, encode and split it into training, validation and test sets, and report on them.

Encoded data is cached on disk, so that the same data is only encoded once.

    <cache>/encoded/<key>/entry.json                 fingerprints, and details that the caller stores
                          train.tokens.npy ...       the arrays of each set, mapped into memory when read

The key covers everything that decides the arrays: the data files' bytes, tokenizer, templates, settings, seed, and the
code in `data/`. An entry is written completely or not at all, and a damaged entry counts as absent. At most MAX_ENTRIES
entries and MAX_BYTES are kept, the most recently used ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.chat_template import OWN, resolve_template, shows_date
from mlx_lora.data.data_sets import DataSet, find_sets, source
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion, Conversation
from mlx_lora.data.mix import content_key, joined_sets, mix, read_sets
from mlx_lora.data.notes import (
    ToolsNotShown,
    called_functions,
    data_notes,
    evaluation_notes,
    find_repeats,
    refused_tools,
    repeat_notes,
    split_notes,
    teaching_notes,
)
from mlx_lora.data.prompts import prompt_notes
from mlx_lora.data.read import (
    OWN_ENTRIES,
    SplitRows,
    answers_of,
    check_speaker,
    cut_repeated_prompts,
    encode_entries,
    read_rows,
    repeated_notes,
    share_columns,
)
from mlx_lora.data.report import (
    MAX_LISTED,
    DataReport,
    DroppedRow,
    Location,
    NearDuplicates,
    SplitReport,
    example_pieces,
    reasons,
)
from mlx_lora.data.tokenize import Encoded, Encoder
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, evict, one_at_a_time, replacing_folder, sha256_of, shown_data
from mlx_lora.utils.progress import long_task
from mlx_lora.utils.text import counted, package_version

if TYPE_CHECKING:
    from mlx_lora.data.image_tokens import ImageReader

log = logging.getLogger(__name__)

EVALUATION = "evaluation"  # what errors call the data that is only measured
NOT_KEPT = ("prompts", *OWN_ENTRIES)  # records whose columns are needed in addition to their tokens


@dataclass(frozen=True)
class DataSplits:
    """The data of a run.

    Attributes:
        train, valid, test: Encoded sets, or None.
        report: What was read, kept and dropped.
        chat_template: Jinja text that the chats were rendered with; None if nothing was rendered.
        chat_day: The day that it shows as today; None if it shows none.
        written: The folder of what models wrote for the run, in the same splits; None: nothing.
        asked: The questions of --ask, which are never trained; None: there are none.
    """

    train: EncodedSet
    valid: EncodedSet | None
    test: EncodedSet | None
    report: DataReport
    chat_template: str | None
    chat_day: date | None = None
    written: Path | None = None
    asked: EncodedSet | None = None

    @property
    def sets(self) -> dict[str, EncodedSet]:
        """The sets that are there, by name."""
        parts = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: rows for name, rows in parts.items() if rows}

    def changed(self, change: Callable[[dict[str, EncodedSet]], dict[str, EncodedSet]]) -> DataSplits:
        """Return the same data with its sets changed; `change` takes and returns those that are there, by name."""
        return replace(self, **change(self.sets))


@dataclass(frozen=True)
class Seen:
    """What is seen beside the records.

    Attributes:
        teacher_prompt: A text that only a teacher sees (--teacher-prompt); the rows then have its rows beside them.
        tools: Schemas of tools that prompts show.
        pictures: Turns pictures into tokens, for records that may have some.
    """

    teacher_prompt: str | None = None
    tools: Sequence[dict[str, Any]] | None = None
    pictures: ImageReader | None = None

    @property
    def key(self) -> str:
        """What tells rows with a teacher's prompt apart, for the key of encoded data."""
        return "" if self.teacher_prompt is None else f", seen with {sha256_of(self.teacher_prompt)}"

    def fetching(self, images: bool) -> Seen:
        """Return the same, with or without fetching pictures from the network."""
        return self if self.pictures is None else replace(self, pictures=self.pictures.fetching(images))


NOTHING_ELSE = Seen()


def load_data(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    today: date | None = None,
    records: str = "examples",
    seen: Seen = NOTHING_ELSE,
) -> DataSplits:
    """Return the data of a run, encoded and split, or taken from the cache of an earlier run.

    Args:
        settings: `--data`, and which of its tokens to train.
        tokenizer: A fast tokenizer, not mlx-lm's wrapper.
        seed: Of the held-out split.
        today: The day for templates that show the date, unless the settings name one; None: today.
        records: `examples`, `pairs`, `rated`, `prompts`, or another kind of data/read.py: what the run's objective trains on.
        seen: What is seen beside the records.

    Returns:
        The sets and the report. Without a validation file, `valid_fraction` of the rows, or the last part of a single
        long text, is held out of training.

    Raises:
        InputError: there is no data or no usable row, or, with `strict`, any unusable one.
    """
    if settings.data is None:
        raise InputError("no data given; name a file, a folder, a hub dataset or tiny-shakespeare with --data")
    sets = find_sets(settings.data)
    for one in sets:
        if "train" not in one.splits and (len(sets) == 1 or "as" not in source(one.name)[1]):
            raise InputError(f"--data {one.name} has no train file, only {', '.join(one.splits)}; add train.jsonl")
    day = chat_day(settings, tokenizer, today)
    kind = f"{records} splits{seen.key}"
    folder = entry_folder(kind, _paths(sets), settings, tokenizer, seed, day, _mixed(sets))
    with one_at_a_time(folder):  # ranks on one machine encode once
        kept = records not in NOT_KEPT and seen.pictures is None
        if kept and (entry := read_entry(folder)):
            rows, details = entry
            report = replace(DataReport.from_dict(details["report"]), data=shown_data(settings.data or ""))
            splits = DataSplits(rows["train"], rows.get("valid"), rows.get("test"), report, details["chat_template"])
        else:
            splits = _make_splits(sets, settings, tokenizer, seed, day, records, seen.fetching(settings.fetch_images))
            if kept:
                rows = {"train": splits.train, "valid": splits.valid, "test": splits.test}
                details = {"report": splits.report.to_dict(), "chat_template": splits.chat_template}
                _keep(folder, {name: part for name, part in rows.items() if part is not None}, details)
        return replace(splits, chat_day=day)


def chat_day(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, today: date | None) -> date | None:
    """Return the day that the chat template shows, or None if it shows none.

    Raises:
        InputError: the settings name a day, but the template shows none.
    """
    if shows_date(settings.chat_template, tokenizer):
        return date.fromisoformat(settings.chat_date) if settings.chat_date else today or date.today()
    if settings.chat_date:
        raise InputError(f"--chat-date {settings.chat_date}: the chat template shows no date; leave it out")
    return None


def _paths(sets: Sequence[DataSet]) -> dict[str, list[Path]]:
    """Return the files of each split, of all sets."""
    names = [name for name in ("train", "valid", "test") if any(name in one.splits for one in sets)]
    return {name: [file.path for one in sets for file in one.splits.get(name, ())] for name in names}


def _mixed(sets: Sequence[DataSet]) -> list[Any]:
    """Return what the cache must tell apart in addition to the files' content: weights, sheets, and which file is whose."""
    parts = [
        [
            one.weight,
            {key: [(f.name, f.sheet, str(f.part), dict(f.own)) for f in files] for key, files in one.splits.items()},
        ]
        for one in sets
    ]
    return [*parts, [one.name for one in sets] if _are_mixed(sets) else None]


def _are_mixed(sets: Sequence[DataSet]) -> bool:
    return sum("train" in one.splits for one in sets) > 1 or sets[0].weight != 1


def _keep(folder: Path, sets: dict[str, EncodedSet], details: dict[str, Any]) -> None:
    """Write the encoded sets to the cache; if that fails, print a note and continue."""
    try:
        write_entry(folder, sets, details)
    except OSError as error:
        log.info(f"Note: the encoded data cannot be kept for the next run: {folder.parent}: {error.strerror}")


def _make_splits(
    sets: Sequence[DataSet],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    day: date | None,
    records: str,
    seen: Seen,
) -> DataSplits:
    parts, train_parts, repeated = read_sets(sets, settings, records, seen.pictures is not None)
    encoder, template, origin = _make_encoder(parts.values(), settings, tokenizer, day)
    encoded = {name: _encode(rows, encoder, seen) for name, rows in parts.items()}
    _check(settings, parts, encoded)

    keys = {
        name: [content_key(*answers_of(parts[name].entries[i])) for i in dict.fromkeys(part.source.tolist())]
        for name, part in encoded.items()
    }
    truncated = [location for rows in parts.values() for location in rows.truncated]
    doubled = _doubled(parts["train"], encoded["train"], keys["train"])
    repeats = find_repeats(parts, encoded, keys, settings.valid_fraction)
    trained = [one for one in sets if "train" in one.splits]
    mixed = mix(encoded["train"], keys["train"], repeats.groups, train_parts, settings.valid_fraction, seed)
    train, held = mixed.train, mixed.held
    for one in mixed.sets if len(trained) > 1 else ():
        if not one.rows:
            raise InputError(f"no usable row in --data {one.name}, {one.rows_read} read; fix it, or leave it out")
    # Wordings that are held out are meant to be near the trained ones.
    near = NearDuplicates() if settings.rephrase else repeats.across(mixed.held_records)
    rows = {name: part.rows for name, part in encoded.items() if len(part.rows)} | {"train": train}
    cut = len(trained) == len(sets) and any(
        not part.held_out and "valid" not in one.splits for part, one in zip(train_parts, trained, strict=True)
    )
    own = ["file"] * any("valid" in one.splits for one in sets) + ["held out"] * bool(held or cut)
    if valid := joined_sets(rows.get("valid"), held):
        rows["valid"] = valid
    pieces = example_pieces(train, tokenizer, called_functions(parts["train"]))
    report = DataReport(
        data=shown_data(settings.data or ""),
        rows_read=sum(rows.rows_read for rows in parts.values()),
        formats=dict(sum((rows.formats for rows in parts.values()), Counter())),
        splits={name: SplitReport.of(part) for name, part in rows.items()},
        valid_source=" and ".join(own) if "valid" in rows else "none",
        template=origin,
        max_seq_length=settings.max_seq_length,
        truncated=len(truncated),
        empty=sum(rows.empty for rows in parts.values()),
        duplicates=len(doubled),
        dropped=sum(len(rows.dropped) for rows in parts.values()),
        dropped_rows=[row for rows in parts.values() for row in rows.dropped][:MAX_LISTED],
        truncated_rows=truncated[:MAX_LISTED],
        duplicate_rows=doubled[:MAX_LISTED],
        notes=[
            *repeated_notes(repeated),
            *teaching_notes(parts, settings, encoder),
            *data_notes(parts, encoded, keys, encoder, day if template else None),
            *prompt_notes(encoder, seen.teacher_prompt),
            *repeat_notes(near, repeats.too_many, held is not None),
            *split_notes(mixed, parts["train"], valid, settings.valid_fraction),
        ],
        example=pieces[0],
        rejected=[piece for piece in pieces[1] if piece[1]] if records == "pairs" else [],
        records=records,
        sets=mixed.sets if _are_mixed(sets) else [],
        near_duplicates=near,
    )
    return DataSplits(train, rows.get("valid"), rows.get("test"), report, template)


def load_eval_set(
    data: str,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    records: str = "examples",
    seen: Seen = NOTHING_ELSE,
) -> EncodedSet:
    """Return the encoded set for `evaluate --data`: all rows of a file, or a folder's test or else validation file.

    Args:
        data: As `--data`.
        settings: Format, template, length and mask; its `data` is ignored.
        tokenizer: A fast tokenizer.
        records, seen: As for `load_data`.

    Raises:
        InputError: as for `load_data`.
    """
    sets = find_sets(data)
    files = _paths(sets)
    name = next(name for name in ("test", "valid", "train") if name in files)
    if name == "train" and len(files["train"]) == 1 and Path(data).is_dir():
        raise InputError(f"--data {data} has neither a test nor a validation file; name a file inside it")
    for one in sets:
        if one.weight != 1:
            raise InputError(f"--data {one.name}={one.weight:g}: a weight is for training; leave it out")
        if name not in one.splits:
            raise InputError(f"--data {one.name} has no {name} file, and others have; name the files themselves")
    day = chat_day(settings, tokenizer, None)
    chosen = {name: files[name]}
    kind = f"{records} evaluation{seen.key}"
    folder = entry_folder(kind, chosen, settings, tokenizer, 0, day, _mixed(sets))
    cached = records not in NOT_KEPT and seen.pictures is None
    if cached and (entry := read_entry(folder)):
        for line in entry[1]["notes"]:
            log.info(line)
        return entry[0][name]
    settings = replace(settings, data=data)
    chosen_files = [file for one in sets for file in one.splits[name]]
    parts = {EVALUATION: read_rows(chosen_files, settings, records, pictures=seen.pictures is not None)}
    repeated = cut_repeated_prompts([(parts[EVALUATION], 0)])
    check_speaker(parts.values(), settings)
    share_columns(parts.values())
    encoder, _, _ = _make_encoder(parts.values(), settings, tokenizer, day)
    encoded = {EVALUATION: _encode(parts[EVALUATION], encoder, seen.fetching(settings.fetch_images))}
    _check(settings, parts, encoded)
    found = [*repeated_notes([repeated]), *evaluation_notes(parts[EVALUATION], encoded[EVALUATION])]
    notes = [f"Note: {note}" for note in found]
    for line in notes:
        log.info(line)
    if cached:
        _keep(folder, {name: encoded[EVALUATION].rows}, {"notes": notes})
    return encoded[EVALUATION].rows


def _make_encoder(
    parts: Collection[SplitRows], settings: DataSettings, tokenizer: PreTrainedTokenizerBase, day: date | None
) -> tuple[Encoder, str | None, str]:
    """Return the encoder, the template's text (None if all data is plain text), and the template's origin."""
    for name, wanted in (part.partition("=")[::2] for part in (settings.special_tokens or "").split(",") if part):
        if (own := getattr(tokenizer, name, None)) != wanted:
            raise InputError(
                f"--special-tokens {name}={wanted}: the model's is {own}, which a run does not change; leave it out"
            )
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
        allow_special_tokens=settings.allow_special_tokens,
    )
    encoder.long_rows, encoder.whole_chats = settings.long_rows, settings.whole_chats
    encoder.train_line_break, encoder.last_answer = settings.train_line_break, settings.last_answer
    return encoder, template, origin


def prompt_encoder(
    rows: SplitRows, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, today: date | None
) -> Encoder:
    """Return what encodes prompts before a run has its data, as `load_data` would; arguments and errors as there."""
    return _make_encoder([rows], settings, tokenizer, chat_day(settings, tokenizer, today))[0]


def _encode(rows: SplitRows, encoder: Encoder, seen: Seen) -> Encoded:
    encoder = encoder if seen.pictures is None else seen.pictures.encoder(encoder)
    with long_task("Encoding", len(rows.entries), "records") as task:
        encoded = encode_entries(encoder, rows.entries, task.reach, seen.teacher_prompt, seen.tools)
    for number, why in encoded.dropped.items():
        location = rows.locations[number]
        rows.dropped.append(DroppedRow(location.file, location.line, why, location.unit))
    rows.dropped.sort(key=lambda row: (row.file, row.line))
    rows.truncated = [rows.locations[number] for number in encoded.truncated]
    return encoded


def _doubled(rows: SplitRows, encoded: Encoded, keys: list[str]) -> list[Location]:
    """Return the locations of duplicate rows; `keys` are those of the examples that gave rows."""
    seen: set[str] = set()
    found = []
    for number, key in zip(dict.fromkeys(encoded.source.tolist()), keys, strict=True):
        if key in seen:
            found.append(rows.locations[number])
        seen.add(key)
    return found


def _check(settings: DataSettings, parts: dict[str, SplitRows], encoded: dict[str, Encoded]) -> None:
    """Raise if a split has no row, or, with `strict`, if any row was dropped."""
    refused, read = (
        refused_tools(parts["train"]) if "train" in parts else 0,
        len(parts.get("train", SplitRows()).entries),
    )
    if settings.chat_template in (None, OWN) and read > refused > read / 2:
        raise ToolsNotShown(
            f"--data {shown_data(settings.data or '')}: {refused:,} of {read:,} rows have tool calls, which the model's chat "
            "template does not show; train with --chat-template chatml, which does, or remove these rows",
            refused,
        )
    for name, rows in parts.items():
        if len(encoded[name].rows) and not (settings.strict and rows.dropped):
            continue
        found = len(rows.dropped)
        if not found:
            raise InputError(
                f"--data {shown_data(settings.data or '')}: the {name} data has no record; it needs at least one"
            )
        if len(encoded[name].rows):
            raise InputError(
                f"--strict: {counted(found, f'unusable {name} row')}: {reasons(rows.dropped)}; fix or remove them"
            )
        words = f"no usable row in the {name} data, {found} refused: {reasons(rows.dropped)}"
        if found == 1 and (settings.data or "").lower().endswith(".json"):  # the whole file was taken for one row
            words += "; if that is the whole file, write a list of rows: [{...}, ...]"
        raise ToolsNotShown(words, refused_tools(rows)) if refused_tools(rows) else InputError(words)


# The cache of encoded rows

MAX_ENTRIES = 20
MAX_BYTES = 4 * 10**9
ARRAYS = {"tokens": np.int32, "mask": np.bool_, "offsets": np.int64, "labels": np.float32}  # labels may be absent
ENTRY_FILE = "entry.json"
TEACHER = ".teacher"  # after the name of a set: its rows as a teacher sees them


def entry_folder(
    kind: str,
    files: Mapping[str, Sequence[Path]],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    day: date | None = None,
    mixed: Sequence[Any] = (),
) -> Path:
    """Return the folder for this data, encoded in this way; it may not exist yet.

    Args:
        kind: The purpose of the data: a training run's splits or one evaluation set.
        files: Split name -> its data files.
        settings: How to encode them; `data` itself does not count, only the content of the files.
        tokenizer: A fast tokenizer, with its chat template.
        seed: Of the held-out split.
        day: The day that the chat template shows; None if it shows none.
        mixed: What else decides which rows of which files there are, and how often.
    """
    named = Path(settings.chat_template).expanduser() if settings.chat_template else None
    template = named if named and named.is_file() else None  # a built-in one is a part of the code
    parts = {
        "kind": kind,
        "files": {name: [(path.name, sha256_of(path)) for path in paths] for name, paths in files.items()},
        "settings": {**asdict(settings), "data": None, "ask": None, "chat_date": day and day.isoformat()},
        "template": template and sha256_of(template),
        "tokenizer": _tokenizer_hash(tokenizer),
        "seed": seed,
        "mixed": mixed,
        "code": _code_hash(),
        "packages": [package_version(name) for name in ("transformers", "tokenizers", "jinja2")],
    }
    return cache_dir("encoded") / sha256_of(json.dumps(parts, sort_keys=True, default=str))[:32]


def read_entry(folder: Path) -> tuple[dict[str, EncodedSet], dict[str, Any]] | None:
    """Return an entry's sets, mapped into memory, and its details; None if it is absent or damaged.

    Args:
        folder: From `entry_folder`.
    """
    try:
        entry = json.loads((folder / ENTRY_FILE).read_text(encoding="utf-8"))
        sets = {name: _read_set(folder, name, *entry["groups"][name]) for name in entry["groups"]}
        sets = {
            name: replace(rows, teacher=sets.get(name + TEACHER)) for name, rows in sets.items() if TEACHER not in name
        }
        if {name: rows.fingerprint for name, rows in sets.items()} != entry["fingerprints"]:
            return None
        os.utime(folder)  # the most recently used entries are kept
        return sets, entry["details"]
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # what a damaged file can raise
        return None


def write_entry(folder: Path, sets: dict[str, EncodedSet], details: dict[str, Any]) -> None:
    """Write an entry, completely or not at all, and remove the entries beyond the limits.

    Args:
        folder: From `entry_folder`.
        sets: Name -> encoded set.
        details: Plain values for JSON, returned by `read_entry`.

    Raises:
        OSError: there is no space or no permission.
    """
    # What a teacher sees of a set's rows is a set of its own.
    seen = {name + TEACHER: rows.teacher for name, rows in sets.items() if rows.teacher is not None}
    with replacing_folder(folder) as temporary:
        for name, rows in {**sets, **seen}.items():
            for array, kind in ARRAYS.items():
                if (values := getattr(rows, array)) is not None:
                    np.save(temporary / f"{name}.{array}.npy", np.asarray(values, kind))
        entry = {
            "fingerprints": {name: rows.fingerprint for name, rows in sets.items()},
            "groups": {name: (rows.group, rows.trained_rows) for name, rows in {**sets, **seen}.items()},
            "details": details,
        }
        (temporary / ENTRY_FILE).write_text(json.dumps(entry), encoding="utf-8")
    evict(folder.parent, MAX_BYTES, [folder], MAX_ENTRIES)


def _read_set(folder: Path, name: str, group: int, trained_rows: int | None) -> EncodedSet:
    # Use a plain array: each slice of a memmap object would cost more than reading the row.
    parts = {
        array: np.load(file, mmap_mode="r").view(np.ndarray)
        for array in ARRAYS
        if (file := folder / f"{name}.{array}.npy").exists() or array != "labels"
    }
    for array, values in parts.items():
        if values.dtype != ARRAYS[array] or values.ndim != 1:
            raise ValueError(f"{name}.{array} has another dtype or shape")
    return EncodedSet(**parts, group=group, trained_rows=trained_rows)


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything in a tokenizer that ids, masks and rendered chats depend on."""
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    core = tokenizer.backend_tokenizer.to_str() if fast else type(tokenizer).__name__
    special = [tokenizer.special_tokens_map, tokenizer.all_special_tokens, tokenizer.eos_token_id]
    return sha256_of(json.dumps([core, tokenizer.chat_template, special], sort_keys=True, default=str))


def _code_hash() -> str:
    """Return a hash of the code that reads and encodes data: if it changes, old arrays must not be used."""
    digest = hashlib.sha256()
    folder = resources.files("mlx_lora.data")
    for part, suffix in ((folder, ".py"), (folder / "forms", ".py"), (folder / "templates", ".jinja")):
        for file in part.iterdir():
            if file.name.endswith(suffix):
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
