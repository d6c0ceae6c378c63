"""Show a run's data as it will be trained: pages of rows with the trained text marked, from an index on disk."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora.data.files import find_sets
from mlx_lora.data.report import row_pieces
from mlx_lora.gguf.tokenizer import gguf_tokenizer_folder
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.serving.schema import ApiError
from mlx_lora.studio.model_stores import local_model
from mlx_lora.studio.page_words import in_page_words
from mlx_lora.studio.preview_index import CUT, DOUBLED, FILE, FORM, LINE, META, PROGRESS, SPLIT, SPLITS, build_index
from mlx_lora.studio.tasks import Cancelled, Task, Tasks, ended_words, last_line, start_child
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.files import cache_dir, sha256_of
from mlx_lora.utils.hub import HUB_ID, resolve_config, resolve_tokenizer
from mlx_lora.utils.parsing import read_json

VERSION = 1
AT_ONCE_BYTES = 1_000_000  # files up to here are encoded while the page waits
KEPT_FOLDERS, KEPT_OPEN, KEPT_TOKENIZERS = 8, 4, 2
MOST_ROW_TOKENS, MOST_ROW_CHARS = 4096, 20_000
POLL_S = 0.2
FILTERS = ("all", "cut", "doubled", "refused")
# The settings that decide how data is encoded; others do not make another index.
COUNTED = (
    "data", "data_format", "prompt_column", "completion_column", "system_column", "chat_column", "text_column", "turn_names",
    "speaker", "conversation_gap", "max_seq_length", "mask_prompt", "chat_template", "chat_date", "pairs", "objective", "teacher_prompt", "on_policy",
)  # fmt: skip


class Index:
    """One data set's index, mapped into memory."""

    def __init__(self, folder: Path):
        self.meta = json.loads((folder / META).read_text(encoding="utf-8"))
        self.tokens, self.mask, self.offsets, self.examples = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "mask", "offsets", "examples")
        )

    @cached_property
    def chosen(self) -> dict[str, np.ndarray]:
        """The numbers of the examples of each filter."""
        return {
            "cut": np.flatnonzero(self.examples[:, CUT]),
            "doubled": np.flatnonzero(self.examples[:, DOUBLED] >= 0),
        }

    def place(self, example: int) -> dict[str, Any]:
        """Return where an example is from."""
        row = self.examples[example]
        file = self.meta["files"][int(row[FILE])]
        return {"file": file["name"], "unit": file["unit"], "line": int(row[LINE]), "split": SPLITS[int(row[SPLIT])]}

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's tokens and mask."""
        part = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        return np.asarray(self.tokens[part]), np.asarray(self.mask[part])


class Previews:
    """Previews of data, by data, tokenizer and settings."""

    def __init__(self, tasks: Tasks, logs: Path):
        self._tasks, self._logs = tasks, logs
        self._open: OrderedDict[str, Index] = OrderedDict()
        self._tokenizers: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()  # tokenizers are not thread-safe
        self._building: dict[str, Task] = {}

    def page(self, settings: dict[str, Any], offset: int, limit: int, chosen: str) -> dict[str, Any]:
        """Return a page of rows, or the task that encodes the data.

        Args:
            settings: of the run by name, checked, with `model` and `data`.
            offset, limit: of the page.
            chosen: one of FILTERS.

        Raises:
            InputError: the data or the model's tokenizer cannot be used.
        """
        if chosen not in FILTERS:
            raise ApiError(400, f"filter: must be one of {', '.join(FILTERS)}", "invalid_value", "filter")
        tokenizer = tokenizer_folder(local_model(settings["model"]))
        asked = {name: settings[name] for name in COUNTED if name in settings} | {"tokenizer": str(tokenizer)}
        key, size = _key(asked)
        folder = cache_dir("previews") / key
        if not (folder / META).is_file():
            if size > AT_ONCE_BYTES:
                return {"task": self._begin(key, asked, folder).public(), **_nothing()}
            with self._lock:
                build_index(asked, folder)
            _evict(folder.parent)
        with self._lock:
            index = self._index(key, folder)
            return self._page(index, self._tokenizer(tokenizer), offset, limit, chosen)

    def _begin(self, key: str, asked: dict[str, Any], folder: Path) -> Task:
        with self._lock:
            task = self._building.get(key)
            if task is None or task.state != "running":
                self._building = {key: one for key, one in self._building.items() if one.state == "running"}
                task = self._building[key] = self._tasks.begin(
                    "data", "Reading the data", lambda task: self._build(task, asked, folder), "records"
                )
            return task

    def _build(self, task: Task, asked: dict[str, Any], folder: Path) -> None:
        """Encode in a child process, and pass on how far it is."""
        room = self._logs / f"data-{task.id}"
        room.mkdir(parents=True)
        (room / "request.json").write_text(json.dumps(asked), encoding="utf-8")
        child = start_child(["studio.preview_index", str(room / "request.json"), str(folder)], room / "log")
        while child.poll() is None:
            if not task.wanted.is_set():
                child.kill()
                child.wait()
                shutil.rmtree(room, ignore_errors=True)
                raise Cancelled
            try:
                done, total = json.loads((room / PROGRESS).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                pass
            else:
                if (done, total) != (task.done, task.total):
                    said = f"{done:,} records read" if total is None else "Encoding"
                    self._tasks.change(task, done=done, total=total, message=said)
            time.sleep(POLL_S)
        said = last_line(room / "log")
        shutil.rmtree(room, ignore_errors=True)
        if child.returncode:
            raise RunError(ended_words(child.returncode, said))
        self._tasks.change(task, done=task.total or 0, message="")
        _evict(folder.parent)

    def _index(self, key: str, folder: Path) -> Index:
        if key not in self._open:
            self._open[key] = Index(folder)
        self._open.move_to_end(key)
        while len(self._open) > KEPT_OPEN:
            self._open.popitem(last=False)
        return self._open[key]

    def _tokenizer(self, folder: Path) -> Any:
        key = str(folder)
        if key not in self._tokenizers:
            config = read_json(folder / "config.json", "download the model again")
            self._tokenizers[key] = load_folder_tokenizer(folder, config, False)._tokenizer
        self._tokenizers.move_to_end(key)
        while len(self._tokenizers) > KEPT_TOKENIZERS:
            self._tokenizers.popitem(last=False)
        return self._tokenizers[key]

    def _page(self, index: Index, tokenizer: Any, offset: int, limit: int, chosen: str) -> dict[str, Any]:
        meta, rows = index.meta, []
        shown = meta["shown"]
        if chosen == "refused":
            total = len(meta["refused"])
            for number, one in enumerate(meta["refused"][offset : offset + limit], offset):
                rows.append({**_row(number, one), "form": "", "why": in_page_words(one["message"])})
        else:
            numbers = index.chosen.get(chosen)
            examples = len(index.examples) if numbers is None else len(numbers)
            total = examples * shown
            for at in range(offset, min(total, offset + limit)):
                example = at // shown if numbers is None else int(numbers[at // shown])
                rows.append(_encoded_row(index, tokenizer, example, at % shown))
        return {
            "task": None, "total": total, "forms": meta["form_counts"], "counts": meta["counts"],
            "histogram": meta["histogram"], "rows": rows,
            "problems": [{**one, "message": in_page_words(one["message"])} for one in meta["refused"][:200]],
            "notes": [in_page_words(note) for note in meta["notes"]],
            "max_seq_length": meta["max_seq_length"],
        }  # fmt: skip


def _row(number: int, place: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": number, "file": place["file"], "line": place["line"], "unit": place["unit"], "split": place["split"],
        "form": "", "part": "", "tokens": 0, "trained_tokens": 0, "cut": False, "doubled_of": None, "spans": [],
        "more_characters": 0, "why": None,
    }  # fmt: skip


def _encoded_row(index: Index, tokenizer: Any, example: int, part: int) -> dict[str, Any]:
    """Return an example's row, with its text in pieces; a long one is cut for the page."""
    facts, group = index.examples[example], index.meta["group"]
    tokens, mask = index.row(example * group + part)
    pieces = row_pieces(tokens[:MOST_ROW_TOKENS], mask[:MOST_ROW_TOKENS], tokenizer)
    spans, left, more = [], MOST_ROW_CHARS, 0
    for text, trained in pieces:
        if left > 0:
            spans.append({"text": text[:left], "trained": trained})
        more += max(0, len(text) - max(0, left))
        left -= len(text)
    doubled = int(facts[DOUBLED])
    return {
        **_row(example, index.place(example)),
        "form": index.meta["forms"][int(facts[FORM])],
        "part": ("chosen", "rejected")[part] if index.meta["shown"] == 2 else "",
        "tokens": len(tokens), "trained_tokens": int(mask.sum()), "cut": bool(facts[CUT]),
        "doubled_of": None if doubled < 0 else index.place(doubled), "spans": spans,
        "more_characters": more, "more_tokens": max(0, len(tokens) - MOST_ROW_TOKENS),
    }  # fmt: skip


def tokenizer_folder(model: str) -> Path:
    """Return a folder with config.json and the tokenizer of a model, without its weights.

    Raises:
        InputError: there is none.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return gguf_tokenizer_folder(path)
    if path.is_dir():
        return path
    found = HUB_ID.fullmatch(model)
    if found and found["pick"]:
        raise InputError(f"model {model!r}: a GGUF file on the hub has its tokenizer inside; download it first")
    folder = resolve_tokenizer(model) if found else resolve_config(model)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise InputError(f"model {model!r}: has no tokenizer.json; choose another model")
    return folder


def _key(asked: dict[str, Any]) -> tuple[str, int]:
    """Return the name of an index, which changes with the files, and the bytes of the data."""
    files = [file.path for one in find_sets(asked["data"]) for part in one.splits.values() for file in part]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = sha256_of(json.dumps([VERSION, sorted(asked.items()), stats], default=str))
    return key[:32], sum(size for _, size, _ in stats)


def _nothing() -> dict[str, Any]:
    return {"total": None, "forms": {}, "counts": None, "histogram": [], "rows": [], "problems": [], "notes": []}


def _evict(room: Path) -> None:
    """Keep the newest indexes."""
    folders = [path for path in room.iterdir() if (path / META).is_file()]
    for path in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT_FOLDERS:]:
        shutil.rmtree(path, ignore_errors=True)
