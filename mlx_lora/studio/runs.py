"""Runs from their folders alone, so that a new server, or a run of a terminal, needs nothing else: states, the list, details.

RUN/run.yaml, metrics.jsonl, report.json ...   as every run leaves them
    .lock                                      held while the run writes; left over if it was killed
    evaluation.json, studio/forgetting.json    what `evaluate` measured of it
    studio/started.json                        of a run that the page started: command, process, what was asked of it
           output.log                          what the command said
           notes.txt

A folder is read again only if one of its files changed.

Start, pause, resume and stop runs, one at a time; those that wait stand in queue.json. A run is a `train` command.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlx_lora.api.evaluate import badges
from mlx_lora.config.fields import flag_words
from mlx_lora.config.load import asked_about, code_of, keep_allowed, read_settings, train_settings, unknown_code
from mlx_lora.config.objectives import LABELED, row_of
from mlx_lora.config.settings import FIELDS
from mlx_lora.data.chat_template import spoken_turns, without_markers
from mlx_lora.data.file_formats import SUFFIXES
from mlx_lora.data.report import has_questions
from mlx_lora.exporters.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from mlx_lora.reports.run_report import (
    ANSWERS_FILE,
    FACTS_FILE,
    has_ended,
    read_answers,
    read_evaluation,
    read_facts,
    read_report,
    shown_evaluation,
)
from mlx_lora.studio.folders import Checker, Folders, safe_name, stamps, whole_model
from mlx_lora.studio.model_stores import files_of_model
from mlx_lora.studio.web import OWN, SWEEP, Tasks, in_page_words, start_child, tail_lines
from mlx_lora.trainer.checkpoint import LOCK_FILE, lock_holder, numbered
from mlx_lora.trainer.run_folder import CHECKPOINTS, KnownRun, forget_run
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replace_text, sha256_of
from mlx_lora.utils.http import ApiError
from mlx_lora.utils.hub import SMALL_MODEL
from mlx_lora.utils.parsing import parse_yaml, read_json
from mlx_lora.utils.text import command_line, model_flags, start_mark

SIDE = "studio"
STARTED_FILE, LOG_FILE, NOTES_FILE = f"{SIDE}/started.json", f"{SIDE}/output.log", f"{SIDE}/notes.txt"
LOG_BYTES, LOG_LINES = 64 << 10, 200
SIGNALED = (-2, -15, 130, 143)  # exit codes of a run that was asked to end
COLOR = re.compile(r"\x1b\[[0-9;]*m")
METRICS, SETTINGS = "metrics.jsonl", "run.yaml"
WATCHED = (SETTINGS, METRICS, FACTS_FILE, STARTED_FILE, CONFIG_FILE, LOCK_FILE)
STEPS = re.compile(r"^Run: ([\d,]+) steps?,|^step \d+/(\d+)[,. ]")
MOST_TEXT, MOST_SAMPLES, MOST_PICTURES = 4000, 60, 4
MOST_RUNS = 5000
MOST_COMPARED_BYTES = 20 << 20  # of data files that are read to see whether two runs have the same
OF_BASE = ("revision", "bits")  # settings that make another base of the same model
RESUMABLE = ("paused", "stopped", "killed", "failed")


@dataclass
class Started:
    """What the page knows of a run that it started.

    Attributes:
        settings: as the page gave them, checked.
        created, at: UNIX time, the second of the last start.
        plan_peak_bytes, steps: of the plan at the start.
        pid, mark: the process, and when it began (see `start_mark`); None: it was not started yet.
        asked: pause or stop, if the page asked for it.
        code: of the process, if this server or an earlier one was there when it ended.
    """

    name: str
    settings: dict[str, Any]
    created: float
    plan_peak_bytes: int | None = None
    steps: int | None = None
    pid: int | None = None
    mark: str | None = None
    asked: str | None = None
    code: int | None = None
    at: float | None = None

    def write(self, folder: Path) -> None:
        """Write it beside the run."""
        replace_text(folder / STARTED_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @property
    def alive(self) -> bool:
        """Whether its process is still there, and not another one with the same number."""
        return self.pid is not None and self.mark is not None and start_mark(self.pid) == self.mark


def read_started(folder: Path) -> Started | None:
    """Return what the page knows of a run; None of one that was started elsewhere. The folder may be a stranger's."""
    try:
        found = json.loads((folder / STARTED_FILE).read_text(encoding="utf-8"))
        settings = {name: value for name, value in found["settings"].items() if name in FIELDS and name not in OWN}
        known = {one.name: found[one.name] for one in fields(Started) if one.name in found}
        return Started(**{**known, "settings": settings})
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def train_words(settings: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the words of the `train` command with these settings.

    Args:
        settings: by name, checked.
        folder: of the run.
    """
    first = {name: settings[name] for name in ("model", "data") if name in settings}
    return ["train", *flag_words({**first, **settings}), "--adapter-path", str(folder)]


def run_id(folder: Path) -> str:
    """Return a run's id, which is not a path."""
    return hashlib.sha256(str(folder).encode()).hexdigest()[:12]


def process_of(folder: Path, started: Started | None) -> int | None:
    """Return the process of a run that goes on; None: it does not. 0: it goes on, but its number is not known."""
    holder = lock_holder(folder)
    if holder is None and started is not None and started.alive:
        return started.pid  # before it locks its folder, and after it released it
    return holder


def state_of(folder: Path, started: Started | None) -> tuple[str, str | None]:
    """Return a run's state, and the reason if it did not end well.

    The state is running, done, paused, stopped, failed, killed, or waiting if its command was never started.
    """
    if process_of(folder, started) is not None:
        return "running", None
    if started is not None and started.pid is None:
        return "waiting", None
    begun = started.at if started is not None else None
    if has_ended(folder) and (begun is None or (folder / FACTS_FILE).stat().st_mtime >= begun):  # in its last start
        return "done", None
    code, asked = (started.code, started.asked) if started else (None, None)
    last = next((line.strip() for line in reversed(log_lines(folder)) if line.strip()), "") if started else ""
    if asked and (code is None or code in (*SIGNALED, 0)):
        return ("paused" if asked == "pause" else "stopped"), None
    if code == 0:
        return "done", None
    if code in SIGNALED or last.startswith("Interrupted after"):
        return "stopped", None
    if (code is not None and code > 0) or last.startswith("Error"):
        return "failed", last.removeprefix("Error: ") or f"it ended with code {code}"
    if started is None and not (folder / LOCK_FILE).exists():
        return "stopped", None
    return (
        "killed",
        "The process ended without a message: it was killed, or the machine ran out of memory or lost power.",
    )


def log_lines(folder: Path) -> list[str]:
    """Return the last lines of what a run's command said, without colors."""
    return [plain_line(line) for line in tail_lines(folder / LOG_FILE, LOG_BYTES, LOG_LINES)]


def plain_line(line: str) -> str:
    """Return a line of a log as a terminal ends up showing it, without colors, cut for the page."""
    return COLOR.sub("", line.rpartition("\r")[2])[:2000]


class RunListing:
    """The runs of a studio."""

    def __init__(self, folders: Folders):
        self._folders = folders
        self._kept: dict[Path, dict[str, Any]] = {}
        self._numbers: dict[Path, RunNumbers] = {}
        self._noted: tuple[Any, dict[Path, KnownRun]] = (None, {})
        self._lock = threading.Lock()

    def folders(self) -> dict[str, Path]:
        """Return the folders of all runs, by id."""
        found: dict[str, Path] = {}
        for root in self._folders.all_runs:
            with contextlib.suppress(OSError):
                for folder in sorted(root.iterdir())[:MOST_RUNS]:
                    is_run = (folder / SETTINGS).is_file() or (folder / STARTED_FILE).is_file()
                    if is_run and not folder.is_symlink():
                        found[run_id(folder)] = folder
        return found | {run_id(folder): folder for folder in self._folders.runs_elsewhere()}

    def elsewhere(self, folder: Path) -> bool:
        """Return whether a run lies outside the studio's folders, and is listed because `train` noted it."""
        return folder.parent not in self._folders.all_runs

    def settings_of(self, folder: Path, started: Started | None) -> dict[str, Any]:
        """Return a run's settings, with a local model as a whole path, and without code that nobody here agreed to.

        A terminal's run may name its model relative to where it began.
        """
        settings, cwd = read_settings_of(folder, started), self.begun_in(folder)
        unknown = unknown_code(folder / SETTINGS, code_of(settings, cwd or ""))
        model = settings.get("model")
        if isinstance(model, str) and (cwd is not None or model == SMALL_MODEL):
            settings = {**settings, "model": whole_model(model, cwd or "")}
        return {**settings, **dict.fromkeys(unknown)}

    def begun_in(self, folder: Path) -> str | None:
        """Return the folder that the names in a run's settings start from, if `train` noted it."""
        version = stamps([self._folders.known_runs] if self._folders.known_runs else [])
        if version != self._noted[0]:  # the list has up to a thousand runs, and this is asked for each of them
            self._noted = (version, self._folders.noted_runs())
        known = self._noted[1].get(folder)
        return known.cwd if known else None

    def bases(self) -> list[Path]:
        """Return the local base models of runs that `train` noted, resolved: those may be talked to as well."""
        noted = self._folders.noted_runs()
        models = [self.summary(folder)["model"] for folder in self.folders().values() if folder in noted]
        return [Path(model).resolve() for model in models if isinstance(model, str) and Path(model).is_absolute()]

    def folder(self, number: str) -> Path:
        """Return a run's folder.

        Raises:
            ApiError: 404, there is no such run.
        """
        found = self.folders().get(number)
        if found is None:
            raise ApiError(404, "no such run; reload the list", "not_found")
        return found

    def listed(self, queued: list[str]) -> list[dict[str, Any]]:
        """Return a line for each run, the newest first; `queued` are the ids of those that wait."""
        found = self.folders()
        with self._lock:
            for gone in self._kept.keys() - set(found.values()):
                del self._kept[gone]
                self._numbers.pop(gone, None)
        lines = [self.summary(folder, number in queued) for number, folder in found.items()]
        return sorted(lines, key=lambda line: line["started"] or 0, reverse=True)

    def summary(self, folder: Path, queued: bool = False) -> dict[str, Any]:
        """Return a run's line."""
        version = [stamps(folder / name for name in WATCHED), self.begun_in(folder)]
        with self._lock:
            kept = self._kept.get(folder)
        if kept is None or kept["version"] != version:
            started = read_started(folder)
            kept = {"version": version, "line": self._read(folder, started), "started": started, "ended": None}
        line, started = kept["line"], kept["started"]
        # A run that does not go on stays as it is until a file of it changes.
        state, reason = kept["ended"] or state_of(folder, started)
        with self._lock:
            self._kept[folder] = {**kept, "ended": None if state == "running" else (state, reason)}
        steps = line["steps"] or (_steps_said(folder) if state == "running" else None)
        ending = started.asked if started is not None and state == "running" else None
        state = "queued" if queued else "stopped" if state == "waiting" else state
        return {**line, "state": state, "reason": reason and in_page_words(reason), "steps": steps, "ending": ending}

    def _read(self, folder: Path, started: Started | None) -> dict[str, Any]:
        with self._lock:
            numbers = self._numbers.setdefault(folder, RunNumbers(folder / METRICS))
        settings, last, facts = self.settings_of(folder, started), numbers.read(), read_facts(folder)
        steps = (started.steps if started else None) or settings.get("iters") or _steps_said(folder)
        step, epoch, epochs = last.get("step") or 0, last.get("epoch") or 0, settings.get("epochs")
        # A run that was started in a terminal says its steps nowhere else. `epoch` has four digits behind the point, so rounding
        # may not tell them.
        if not steps and epoch and isinstance(epochs, int | float):
            whole = step * epochs / epoch
            steps = round(whole) if whole * 0.00005 / epoch < 0.5 else None
        return {
            "id": run_id(folder), "name": folder.name, "path": str(folder), "step": step, "steps": steps or None,
            **{name: last.get(name) for name in ("loss", "val_loss", "val_step", "peak_bytes", "tokens_per_s", "seconds", "step_s")},
            "model": settings.get("model"), "method": settings.get("fine_tune_type") or settings.get("method") or "lora",
            "objective": settings.get("objective") or FIELDS["objective"].default,
            "started": started.created if started else _time(folder / SETTINGS),
            "plan_peak_bytes": facts.get("planned_peak_bytes") or (started.plan_peak_bytes if started else None),
            "in_studio": started is not None, "elsewhere": self.elsewhere(folder),
        }  # fmt: skip

    def detail(self, number: str, queued: bool) -> dict[str, Any]:
        """Return all about a run.

        Raises:
            ApiError: 404, there is no such run.
        """
        folder = self.folder(number)
        line, started, facts = self.summary(folder, queued), read_started(folder), read_facts(folder)
        settings, command = self.settings_of(folder, started), facts.get("command")
        if started and started.settings:
            command = command_line(train_words(started.settings, folder))
        elif not isinstance(command, str) or not command:
            command = command_line(["train", "--config", str(folder / SETTINGS)])  # repeats a run of a terminal
        adapter = folder if (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file() else None
        again = (folder / SETTINGS).is_file() or started is not None
        verdict: Any = facts.get("verdict") if isinstance(facts.get("verdict"), dict) else {}
        said = ("headline", "tone", "name", "figures", "mend", "command")
        return {
            **line,
            "settings": settings,
            "command": command,
            "run_yaml": _text(folder / SETTINGS),
            "metrics": read_columns(folder / METRICS),
            "samples": samples_of(folder, facts, line["step"]),
            "verdict": {name: _cut(verdict.get(name)) for name in said} if verdict.get("headline") else None,
            "log": log_lines(folder),
            "notes": _text(folder / NOTES_FILE),
            **what_was_forgotten(folder, settings),
            **side_by_side(folder, settings, facts.get("data")),
            "checkpoint": next((step for step, _ in numbered(folder / CHECKPOINTS)), None),
            "can_resume": again and line["state"] in RESUMABLE,
            "adapter": str(adapter) if adapter else None,
            "data": facts.get("data"),
            "data_content": self.content_of_data(folder, read_settings_of(folder, started)),
            "answers": shown_answers(folder),
        }

    def content_of_data(self, folder: Path, settings: dict[str, Any]) -> str | None:
        """Return a text that is equal for runs on the same data, wherever its file or folder is; None: it is not known here.

        Files of a run that did not begin on this machine are not read.
        """
        cwd = self.begun_in(folder)
        path = Path(cwd or "", str(settings.get("data") or "")).expanduser()
        files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)
        if cwd is None or not files or sum(file.stat().st_size for file in files) > MOST_COMPARED_BYTES:
            return None
        return sha256_of(" ".join(sha256_of(file) for file in files))

    def going_on(self) -> list[dict[str, Any]]:
        """Return the lines of the runs that go on."""
        return [line for line in self.listed([]) if line["state"] == "running"]

    def adapters(self) -> list[dict[str, Any]]:
        """Return the adapters that finished, stopped or paused runs left, the newest first, and what each can be used for."""
        found = []
        for number, folder in self.folders().items():
            if (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file():
                settings = self.settings_of(folder, None)
                on_disk = files_of_model(str(settings.get("model") or ""), settings.get("revision"))
                one = {"name": folder.name, "path": str(folder), "base": settings.get("model"), "run": number}
                one |= {name: settings.get(name) for name in OF_BASE} | uses_of_adapter(settings)
                one["file"] = None if on_disk is None else str(on_disk)
                found.append((_time(folder / WEIGHTS_FILE) or 0, one))
        return [one for _, one in sorted(found, key=lambda pair: pair[0], reverse=True)]


def uses_of_adapter(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether an adapter can be talked to beside its base (`talks`), whether it sorts texts instead (`sorts`), and what it
    is not exported to, and why (`refused`).

    Args:
        settings: of the run that trained it.
    """
    row, modules = row_of(settings.get("objective")), settings.get("modules_to_save")
    whole, scores = settings.get("method") == "full" or settings.get("qat"), row.scores
    reasons = (
        (whole, "This run changed the weights themselves, so there is no adapter apart from them.",
         ("peft", "hub", "gguf-adapter", "mlx-lm")),
        (modules, "This adapter has whole modules, which this format cannot hold.", ("gguf-adapter", "mlx-lm")),
        (scores, "This adapter gives scores and writes no text, which this program cannot read.",
         ("gguf", "gguf-adapter", "mlx-lm", "ollama")),
    )  # fmt: skip
    refused = {program: why for applies, why, programs in reasons if applies for program in programs}
    return {
        "talks": not (whole or modules or not row.writes), "sorts": settings.get("objective") in LABELED, "refused": refused,
    }  # fmt: skip


def read_settings_of(folder: Path, started: Started | None) -> dict[str, Any]:
    """Return a run's settings from run.yaml, or, before it is written, those that the page gave."""
    found = None
    with contextlib.suppress(ValueError):
        found = parse_yaml(_text(folder / SETTINGS))
    return found if isinstance(found, dict) else dict(started.settings) if started else {}


def samples_of(folder: Path, facts: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """Return the texts before and after training, or of every validation, each with its step, without a template's markers."""
    found = []
    answers = read_answers(folder / ANSWERS_FILE) if (folder / ANSWERS_FILE).exists() else []
    for one in answers[-MOST_SAMPLES:]:
        found.append(_sample(one.get("step"), one, one.get("answer"), facts))
    for one in facts.get("samples") or [] if not found else []:
        found.append(_sample(0, one, one.get("before"), facts))
        if one.get("after") is not None:
            found.append(_sample(step, one, one["after"], facts))
    return found


def _sample(step: int | None, one: dict[str, Any], text: Any, facts: dict[str, Any]) -> dict[str, Any]:
    specials, expected = one.get("specials") or (), one.get("expected")
    turns = spoken_turns(str(one.get("prompt") or ""), specials)
    # Who speaks is told where it is not simply the user's question.
    prompt = "\n\n".join(content if role in ("", "User") else f"{role}: {content}" for role, content in turns)
    said = without_markers(str(text or ""), specials) or "(empty text)"
    more: dict[str, Any] = {} if expected is None else {"expected": _cut(without_markers(str(expected), specials))}
    # The pictures of the prompt as the report keeps them, small JPEGs as data URLs; nothing else is shown.
    kept, digests = facts.get("pictures"), one.get("pictures")
    if isinstance(kept, dict) and isinstance(digests, list):
        urls = [kept[digest] for digest in digests[:MOST_PICTURES] if isinstance(digest, str) and digest in kept]
        found = [url for url in urls if isinstance(url, str) and url.startswith("data:image/jpeg;base64,")]
        more |= {"pictures": found} if found else {}
    return {"step": step, "prompt": _cut(prompt), "text": _cut(said), **more}


def _steps_said(folder: Path) -> int | None:
    """Return how many steps the command said that it takes."""
    for line in reversed(log_lines(folder)):
        if found := STEPS.match(line.strip()):
            return int((found[1] or found[2]).replace(",", ""))
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _time(path: Path) -> float | None:
    return path.stat().st_mtime if path.exists() else None


def _cut(text: Any) -> str:
    text = str(text or "")
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} … ({len(text) - MOST_TEXT:,} more characters)"


# What `evaluate` measured

FACTS = "studio/forgetting.json"
ASKED, MOST_SAID = 20, 2000  # questions, and characters of an answer


def words_of_asking(
    folder: Path, settings: dict[str, Any], report: dict[str, Any] | None, data: str | None = None
) -> list[str]:
    """Return the words of the command that puts base and adapter side by side, on `data` or on what the run held out."""
    words = ["evaluate", *model_flags(settings), *(("--data", data) if data else ()), "--adapter-path", str(folder)]
    asks = data is not None or has_questions((report or {}).get("splits") or {})
    return [*words, "--show", str(ASKED)] if asks else words


def side_by_side(folder: Path, settings: dict[str, Any], report: dict[str, Any] | None) -> dict[str, Any]:
    """Return `evaluation`, as the page shows it, or None; and the command that measures it on held-out rows."""
    facts = read_evaluation(folder)
    found = None if facts is None else shown_evaluation(facts)
    for row in found["rows"] if found else ():
        row["said"] = [{"text": text[:MOST_SAID], "right": right} for text, right in row["said"]]
        row |= {name: row[name][:MOST_SAID] for name in ("question", "expected")}
    return {"evaluation": found, "evaluation_command": command_line(words_of_asking(folder, settings, report))}


def shown_answers(folder: Path) -> list[dict[str, Any]]:
    """Return the questions and answers of a run's end; their numbers are those that `tick` takes."""
    report = read_report(folder)
    return [
        {name: str(one.get(name) or "")[:MOST_SAID] for name in ("question", "expected", "base", "adapter")}
        | {name: one.get(name) for name in ("new_words", "right", "base_right", "ticked")}
        for one in (report.answers if report else ())
    ]


def words_of_measuring(folder: Path, settings: dict[str, Any]) -> list[str] | None:
    """Return the words of the command that measures what a run's adapter forgot, None if its rows are not answers."""
    row = row_of(settings.get("objective"))
    if not row.imitates or settings.get("images"):  # others' rows have no answers to imitate
        return None
    # What an imitating run held out, and not --data: a file of it has the training rows too.
    data = ["--data", str(settings["data"])] if row.taught and settings.get("data") else []
    return ["evaluate", *model_flags(settings), *data, "--adapter-path", str(folder), "--forgetting", "--json"]


def what_was_forgotten(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return `forgetting`, as the page shows it, or None; and the command that measures it, or None."""
    words = words_of_measuring(folder, settings)
    measured_by = {"forgetting_command": words and command_line(words)}
    try:
        facts = read_json(folder / FACTS, "measure it again")
        [about] = badges(facts)
        drifts = [(name, *one["adapters"].values()) for name, one in facts["sets"].items()]
    except (InputError, OSError, KeyError, TypeError, ValueError):
        return {"forgetting": None} | measured_by
    names = (("base", "base_loss"), ("adapter", "loss"), ("change", "change"), ("verdict", "verdict"))
    rows = [{"set": where, **{name: one[key] for name, key in names}} for where, one in drifts]
    right = facts["probes"]["right"]
    probes = {"right": right[about["adapter"]], "base_right": right["base"], "of": facts["probes"]["questions"]}
    return {"forgetting": {"sentence": f"It {about['sentence']}.", "rows": rows, "probes": probes}} | measured_by


# The numbers of a run as they grow: the curves, the last values, the time, and the lines that are new

# metrics.jsonl has a line for each report and each validation. A resumed run cuts it to the step that it continues from, and
# appends; each process of a run counts its time from zero.

MOST_POINTS = 2000  # of a curve
TAIL_BYTES = 64 << 10
MOST_AT_ONCE = 1 << 20  # bytes of new lines that are read at a time
NOT_CURVES = ("shapes",)
MARK_BYTES = 200  # of the last line, by which it is seen whether a file was replaced


def read_columns(path: Path, most: int = MOST_POINTS) -> dict[str, list[Any]]:
    """Return metrics.jsonl by columns of equal length, thinned evenly to `most` rows; validations are kept."""
    rows: list[dict[str, Any]] = []
    kept_of, count = 1, 0
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if (record := parsed(line)) is None:
                continue
            held_out = record.get("loss") is None
            if held_out or count % kept_of == 0:
                rows.append(record)
            count += not held_out
            if len(rows) > 2 * most:  # memory stays the same however long the file is
                rows, kept_of = thinned(rows, most), kept_of * 2
    rows = thinned(rows, most) if len(rows) > most else rows
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_CURVES)
    return {name: [row.get(name) for row in rows] for name in names}


def thinned(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Return at most `most` rows: the validations first, and others at even distances, the first and last among them."""

    def even(places: list[int], most: int) -> list[int]:
        last = (len(places) - 1) / max(1, most - 1)
        return places if len(places) <= most else [places[int(i * last)] for i in range(most)]

    held = even([i for i, row in enumerate(rows) if row.get("val_loss") is not None], most // 2)
    others = even([i for i, row in enumerate(rows) if row.get("val_loss") is None], most - len(held))
    return [rows[i] for i in sorted({*held, *others})]


def parsed(line: str) -> dict[str, Any] | None:
    """Return a line's record; None if it is incomplete, or none of ours."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class Tail:
    """Gives the lines that are added to a file; holds a position, and the bytes before it, by which it sees a new file.

    Attributes:
        anew: whether the last lines were the first ones of the file, which may have been replaced or cut.
    """

    def __init__(self, path: Path, from_end: bool = True):
        """Begin at a file's start, or at its last whole line: one that is being written comes later."""
        self._path, self._at, self._mark, self.anew = path, 0, b"", True
        if from_end:
            with contextlib.suppress(OSError), path.open("rb") as file:
                size = file.seek(0, 2)
                start = file.seek(max(0, size - TAIL_BYTES))
                data = file.read(size - start)
                whole = data.rfind(b"\n") + 1 or len(data)
                self._at, self._mark = start + whole, data[max(0, whole - MARK_BYTES) : whole]

    def earlier_lines(self, size: int) -> list[str]:
        """Return the last lines before this position, of at most `size` bytes; `new_lines` gives none of them again."""
        return tail_lines(self._path, size, end=self._at)

    def new_lines(self) -> list[str]:
        """Return complete lines since the last call, some of them if there are many."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at - len(self._mark))
                if file.read(len(self._mark)) != self._mark:
                    self._at, self._mark = file.seek(0), b""
                self.anew, data = self._at == 0, file.read(MOST_AT_ONCE)
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        if not end and len(data) == MOST_AT_ONCE:
            end = len(data)  # one line longer than that is cut
        self._at, self._mark = self._at + end, (self._mark + data[:end])[-MARK_BYTES:]
        return data[:end].decode("utf-8", "replace").splitlines()


class RunNumbers:
    """The last values of a run, and its time over all its processes; reads each line of metrics.jsonl once."""

    def __init__(self, path: Path):
        self._tail, self._lock = Tail(path, from_end=False), threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._values: dict[str, Any] = {}
        self._earlier_s, self._step_s = 0.0, None  # of the processes before the last one; of a step of the last one
        self._first: tuple[int, float] | None = None  # step and time of the last process's first line
        self._last: tuple[int, float] | None = None

    def read(self) -> dict[str, Any]:
        """Return the last step, losses and speed, the largest peak, the seconds of the whole run, and those of a step.

        The validation before the first step is of the base, and no result of the run: it is left out.
        """
        with self._lock:
            while lines := self._tail.new_lines():
                if self._tail.anew:
                    self._forget()
                for record in filter(None, map(parsed, lines)):
                    self._count(record)
            seconds = None if self._last is None else self._earlier_s + self._last[1]
            return {**self._values, "seconds": seconds, "step_s": self._step_s}

    def _count(self, record: dict[str, Any]) -> None:
        values, step, elapsed = self._values, record["step"], record.get("elapsed_s")
        values["step"] = step
        if record.get("val_loss") is not None and step > 0:
            values["val_loss"], values["val_step"] = record["val_loss"], step
        for name in ("loss", "tokens_per_s", "epoch"):
            if record.get(name) is not None and (record.get("loss") is not None or name != "tokens_per_s"):
                values[name] = record[name]
        peak = record.get("peak_memory_bytes")
        values["peak_bytes"] = max(values.get("peak_bytes") or 0, peak if isinstance(peak, int) else 0) or None
        if not isinstance(elapsed, int | float):
            return
        if self._last is not None and elapsed < self._last[1]:
            self._earlier_s += self._last[1]
            self._first = None
        self._first, self._last = self._first or (step, elapsed), (step, elapsed)
        # Where a process began is not told, so steps are counted from its first line; until it has a second one, those of the
        # process before tell more.
        if steps := step - self._first[0]:
            self._step_s = (elapsed - self._first[1]) / steps
        elif self._step_s is None and step:
            self._step_s = elapsed / step


QUEUE_FILE = "queue.json"
POLL_S = 0.5
MOST_NOTES = 100_000
ASK_AGAIN_S = 10.0  # a second signal ends a run without saving, so it is not sent by a double click


class RunControl:
    """The runs that the page starts, and the queue."""

    def __init__(self, folders: Folders, listing: RunListing, tasks: Tasks, checker: Checker):
        self._folders, self._listing, self._tasks, self._checker = folders, listing, tasks, checker
        self._lock = threading.RLock()
        self._children: dict[Path, subprocess.Popen] = {}
        self._asked: dict[Path, float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mlx-lora-queue", daemon=True)

    def begin(self) -> None:
        """Start to watch the queue."""
        self._thread.start()

    def close(self) -> None:
        """End the watching; runs go on."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(5)

    # --- the queue

    @property
    def queue(self) -> list[str]:
        """The ids of the runs that wait, the next first."""
        try:
            found = json.loads((self._folders.home / QUEUE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []

    def _write_queue(self, queue: list[str]) -> None:
        replace_text(self._folders.home / QUEUE_FILE, json.dumps(queue) + "\n")

    def queued(self) -> dict[str, Any]:
        """Return the lines of the runs that wait."""
        folders = self._listing.folders()
        return {"queue": [self._listing.summary(folders[number], True) for number in self.queue if number in folders]}

    def reorder(self, number: str, to: int | None) -> dict[str, Any]:
        """Put a waiting run at another place, or, with None, take it out: its folder stays, and it can be started later.

        Raises:
            ApiError: 404, it does not wait.
        """
        with self._lock:
            queue = self.queue
            if number not in queue:
                raise ApiError(404, "this run is not waiting in the queue; reload the list", "not_found")
            queue.remove(number)
            if to is not None:
                queue.insert(to, number)
            self._write_queue(queue)
        return self.queued()

    def _watch(self) -> None:
        while not self._end.wait(POLL_S):
            self._note_ends()
            with self._lock:
                queue = self.queue
                if not queue or self.going_on() is not None:
                    continue
                self._write_queue(queue[1:])
                folder = self._listing.folders().get(queue[0])
                if folder is not None and (started := read_started(folder)) is not None:
                    with contextlib.suppress(ApiError, InputError):  # "Resume" says why it does not go on
                        self._launch(folder, started)

    def _note_ends(self) -> None:
        """Write down the exit codes of children that ended; this also frees their entries in the process table."""
        with self._lock:
            for folder, child in list(self._children.items()):
                if child.poll() is not None:
                    del self._children[folder]
                    if (started := read_started(folder)) is not None and started.pid == child.pid:
                        started.code = child.returncode
                        started.write(folder)

    def going_on(self) -> str | None:
        """Return what trains now, in words: a run, also of a terminal, or a search of the learning rate; None: nothing does."""
        names = [f"the run {run['name']}" for run in self._listing.going_on()]
        names += [
            f"the task “{task['title']}”"
            for task in self._tasks.listed()
            if (task["kind"], task["state"]) == (SWEEP, "running")
        ]
        return names[0] if names else None

    # --- runs

    def start(self, settings: dict[str, Any], name: Any, queue: bool, peak_bytes: int | None, steps: int | None) -> str:
        """Start a run, or put it into the queue.

        Args:
            settings: checked, without those at their default.
            name: of the run, and of its folder.
            queue: wait until the runs before it have ended.
            peak_bytes, steps: of its plan.

        Returns:
            Its id.

        Raises:
            ApiError: the name is taken, or another run goes on and `queue` is off.
            InputError: `train` would refuse the settings.
        """
        name = safe_name(name, "Name of the run")
        folder = self._folders.runs / name
        train_settings({**settings, "adapter_path": str(folder)})
        with self._lock:
            if folder.exists():
                raise ApiError(
                    409, f"Name of the run: there is a run {name} already; choose another name", "name_taken", "name"
                )
            busy = self.going_on()
            if busy is not None and not queue:
                raise ApiError(409, f"{busy} is still running; put this run into the queue, or stop that one", "busy")
            started = Started(name, settings, time.time(), peak_bytes, steps)
            started.write(folder)
            keep_allowed(folder / SETTINGS, code_of(settings))
            if busy is None and not self.queue:
                self._launch(folder, started)
            else:
                self._write_queue([*self.queue, run_id(folder)])
        return run_id(folder)

    def _launch(self, folder: Path, started: Started, agreed: Any = None) -> None:
        """Begin a run, or go on with it, by its settings; see `resume`.

        Raises:
            ApiError: it did not begin on this machine, and names files outside the studio's folders, or code.
            InputError: its settings cannot be used.
        """
        # The names in run.yaml are relative to where the run's command was given.
        file, cwd, settings = folder / SETTINGS, self._listing.begun_in(folder), started.settings
        resume = file.exists()
        if resume:
            settings = train_settings({}, read_settings(str(file), {}, allow_code=True)).to_flat()
        code = unknown_code(file, code_of(settings, cwd or ""))
        if cwd is None:
            settings = self._checker.settings({name: value for name, value in settings.items() if name not in OWN})
        if code and agreed != (question := in_page_words(asked_about(file, code))):
            raise ApiError(409, question, "runs_code")
        keep_allowed(file, code)
        again = ["train", "--config", str(file), "--adapter-path", str(folder), "--resume"]
        words = again if resume else train_words(settings, folder)
        child = start_child(words, folder / LOG_FILE, append=resume, cwd=cwd)
        started.pid, started.mark, started.asked, started.code = child.pid, start_mark(child.pid), None, None
        started.at = time.time()
        started.write(folder)
        self._children[folder] = child
        self._asked.pop(folder, None)

    def ask_to_end(self, number: str, how: str) -> None:
        """Ask a run to save and end.

        Args:
            number: its id.
            how: pause or stop; they differ in what the list says.

        Raises:
            ApiError: 409, it does not go on.
        """
        folder = self._listing.folder(number)
        with self._lock:
            if number in self.queue and how == "stop":
                self.reorder(number, None)
                return
            started = read_started(folder)
            process = process_of(folder, started)
            if not process:
                raise ApiError(409, f"{folder.name}: is not running; reload the list", "not_running")
            if time.monotonic() - self._asked.get(folder, -ASK_AGAIN_S) < ASK_AGAIN_S:
                return
            self._asked[folder] = time.monotonic()
            if started is not None:
                started.asked = how
                started.write(folder)
            try:
                os.kill(process, signal.SIGTERM)
            except OSError as error:
                raise ApiError(409, f"{folder.name}: cannot be ended ({error.strerror}); end it where it was started",
                    "not_running") from None  # fmt: skip

    def resume(self, number: str, agreed: Any = None) -> None:
        """Continue a run from its newest checkpoint, with its settings and --resume.

        Args:
            number: its id.
            agreed: the question that a person agreed to, about the code that the run would run.

        Raises:
            ApiError: 409, it goes on, or is done, or another run goes on; or it would run code, and nobody agreed to that: the
                code of the error is then runs_code, and its message the question. Others: as of `_launch`.
        """
        folder = self._listing.folder(number)
        with self._lock:
            self._note_ends()
            started = read_started(folder)
            state, _ = state_of(folder, started)
            if state not in (*RESUMABLE, "waiting"):
                raise ApiError(
                    409, f"{folder.name}: is {state}; only a run that ended early is resumed", "not_resumable"
                )
            busy = self.going_on()
            if busy is not None:
                raise ApiError(409, f"{busy} is still running; wait for it, or stop it first", "busy")
            if started is None:  # of a terminal
                started = Started(folder.name, {}, (folder / SETTINGS).stat().st_mtime)
            self._launch(folder, started, agreed)

    def note(self, number: str, text: Any) -> dict[str, Any]:
        """Keep notes on a run."""
        if not isinstance(text, str) or len(text) > MOST_NOTES:
            raise ApiError(400, f"text: must be text of at most {MOST_NOTES} characters", "invalid_value", "text")
        replace_text(self._listing.folder(number) / NOTES_FILE, text)
        return {"saved": True}

    def delete(self, number: str, confirm: Any) -> dict[str, Any]:
        """Remove a run's folder with all that is in it; of a run elsewhere the folder stays, and it leaves the list.

        Raises:
            ApiError: 409 if it goes on, 400 if the name was not repeated.
        """
        folder = self._listing.folder(number)
        with self._lock:
            if confirm != folder.name:
                raise ApiError(400, "confirm: must be the run's name, because its folder is removed", "not_confirmed")
            if process_of(folder, read_started(folder)) is not None:
                raise ApiError(409, f"{folder.name}: is still running; stop it first", "running")
            if number in self.queue:
                self.reorder(number, None)
            try:
                if self._listing.elsewhere(folder):  # it may have other things in it, even be a project's folder
                    forget_run(folder, self._folders.known_runs)
                else:
                    shutil.rmtree(folder)
            except OSError as error:
                raise ApiError(409, f"{folder.name}: cannot be removed ({error.strerror}); check its permissions",
                    "not_removed") from None  # fmt: skip
        return {"deleted": True}
