"""Start, pause, resume and stop runs, one at a time; those that wait stand in queue.json. A run is a `train` command."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from mlx_lora.config.load import asked_about, code_of, keep_allowed, read_settings, train_settings, unknown_code
from mlx_lora.studio.folders import Checker, Folders, safe_name
from mlx_lora.studio.run_folders import (
    LOG_FILE,
    NOTES_FILE,
    RESUMABLE,
    SETTINGS,
    RunListing,
    Started,
    process_of,
    read_started,
    run_id,
    state_of,
    train_words,
)
from mlx_lora.studio.tasks import SWEEP, Tasks, start_child
from mlx_lora.studio.web import OWN, in_page_words
from mlx_lora.trainer.run_folder import forget_run
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replace_text
from mlx_lora.utils.http import ApiError
from mlx_lora.utils.text import start_mark

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
