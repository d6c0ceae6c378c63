"""Manage a run folder: set an earlier run's results aside, resume from a checkpoint, save results, and list the runs.

A checkpoint must fit the run that goes on from it; all differences are told at once.

The list of this user's runs is in the cache, so that the studio finds those that were started in a terminal. Its file
runs.jsonl has one line for each run folder: `path`, `cwd` (names in its run.yaml are relative to it) and `at`, a UNIX time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import yaml

from mlx_lora.adapters.qat import is_rounded
from mlx_lora.config.load import code_of, keep_allowed
from mlx_lora.config.presets import START_ANEW
from mlx_lora.config.rules import is_day
from mlx_lora.config.settings import FIELDS, ROWS, LoopSettings, TrainSettings
from mlx_lora.config.sweep import TRIALS
from mlx_lora.exporters.adapter_config import head_of, own_entries
from mlx_lora.exporters.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterInfo,
    measure_overlap,
    read_adapter_config,
    save_adapter,
)
from mlx_lora.exporters.card import CARD_FILE
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.reports.run_report import ANSWERS_FILE, CLASSES_FILE, EVALUATION_FILE, FACTS_FILE, REPORT_FILE, ROWS_FILE
from mlx_lora.trainer.checkpoint import (
    Checkpoint,
    differences,
    finite,
    locked,
    newest_checkpoint,
    numbered,
    read_checkpoint,
    restore_arrays,
    run_arrays,
    send_first_ranks,
    thin_out,
    write_checkpoint,
)
from mlx_lora.trainer.guards import LOSS, Diverged, Position, score_words
from mlx_lora.utils.errors import InputError, RunError, describe_gpu_failure
from mlx_lora.utils.files import cache_dir, check_writable, one_at_a_time, replacing_file, replacing_folder
from mlx_lora.utils.parsing import parse_yaml
from mlx_lora.utils.supervise import RESTARTS_LEFT, restarts
from mlx_lora.utils.text import command_line

if TYPE_CHECKING:
    from mlx_lora.data.sampler import BatchPlan
    from mlx_lora.parallel.strategy import Strategy
    from mlx_lora.trainer.step import Step

log = logging.getLogger(__name__)

# Results

CHECKPOINTS = "checkpoints"
WRITTEN = "written"  # records that models wrote for the run
# A run's results, and the folder that keeps an earlier run's results until this run has saved something.
RESULTS = (
    WEIGHTS_FILE, CONFIG_FILE, "run.yaml", "metrics.jsonl", ROWS_FILE, ANSWERS_FILE, CLASSES_FILE, REPORT_FILE, FACTS_FILE, CHECKPOINTS,
    WRITTEN, EVALUATION_FILE,
)  # fmt: skip
# What is appended to, and cut to the step of a checkpoint where a run goes on from it.
HISTORY = ("metrics.jsonl", ROWS_FILE, ANSWERS_FILE, CLASSES_FILE)
ASIDE = "earlier-run"


@contextmanager
def own_folder(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Lock a run folder; if this run ends before it saves anything, restore the earlier run's results.

    They stay aside if a supervisor starts the run again at once: it must not go on from the earlier run's checkpoints.
    """
    with locked(folder) if ranks.leads else nullcontext():
        begins_again = False
        try:
            yield
        except RuntimeError as error:
            begins_again = describe_gpu_failure(error) is not None and restarts(RESTARTS_LEFT) > 0
            raise
        finally:
            if ranks.leads and not begins_again:
                _end_aside(folder)


def _end_aside(folder: Path) -> None:
    """Remove an earlier run's results if this run has an adapter, else restore them."""
    if not (folder / ASIDE).exists():
        return
    if not (folder / WEIGHTS_FILE).exists():
        remove_results(folder)
        for path in (folder / ASIDE).iterdir():
            path.replace(folder / path.name)
    shutil.rmtree(folder / ASIDE, ignore_errors=True)


def _set_aside(folder: Path) -> None:
    """Set an earlier run's results aside, unless a run that was killed before it saved anything already did so."""
    if (folder / ASIDE).exists() and not (folder / WEIGHTS_FILE).exists():
        remove_results(folder)
        return
    shutil.rmtree(folder / ASIDE, ignore_errors=True)
    found = [name for name in RESULTS if (folder / name).exists()]
    if found:
        (folder / ASIDE).mkdir()
    for name in found:
        (folder / name).rename(folder / ASIDE / name)


def remove_results(folder: Path) -> None:
    """Remove what a run leaves in its folder."""
    for path in (folder / name for name in RESULTS):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@dataclass(frozen=True)
class RunFolder:
    """Writes a run's results.

    Attributes:
        settings: of the run; they decide where and how often it saves, and how many checkpoints are kept.
        info: the facts about the adapter.
        identity: of the run.
        strategy: of its ranks, only the first writes, while the others wait.
        step: has everything that is trained, and the adapted model.
        at: the run's position, which the loop keeps up to date.
        head: returns what the score head's outputs mean now, because a validation may choose thresholds.
    """

    settings: TrainSettings
    info: AdapterInfo
    identity: dict[str, Any]
    strategy: Strategy
    step: Step
    at: Position
    head: Callable[[], dict[str, Any] | None] = lambda: None

    @property
    def path(self) -> Path:
        """The folder of the results."""
        return Path(self.settings.loop.adapter_path)

    @property
    def kept_step(self) -> int:
        """The step whose adapter a run's end leaves: the best one's with --keep-best, if any was better, else the last one's."""
        return (self.settings.loop.keep_best and self.at.best_at) or self.at.taken

    def begin(self, found: Checkpoint | None, steps: int, written: Path | None = None) -> None:
        """Restore a checkpoint, or without --resume set an earlier run's results aside, and write run.yaml.

        Args:
            found: a checkpoint of this run, if there is one.
            steps: of the whole run.
            written: a folder of records that models wrote for the run, which is copied, so that a person finds them.
        """
        done = found is not None and self.at.taken >= steps
        if found:
            restore_arrays(self.step, found.arrays)
            self.step.taken = self.at.taken  # the optimizer does not count skipped updates
            left = f"; all {steps} steps are done, so raise --iters or --epochs to train further" if done else ""
            log.info(f"Resuming from step {self.at.taken} ({found.folder}){left}")
        loop, ranks = self.settings.loop, self.strategy.ranks
        elsewhere = found is not None and bool(ranks.from_first(not continues_here(loop)))
        best = self._best_beside(found.folder.parent) if found is not None and elsewhere else None
        if not ranks.leads:
            return
        self._clear_leftovers()
        here = found is not None and not elsewhere
        # A run that was killed before its first checkpoint, and begins again, has nothing to lose.
        if not here and (found is not None or loop.resume is None or holds_adapter(self.path)):
            _set_aside(self.path)
        if found is not None and elsewhere and (run := run_of_checkpoint(found.folder)):
            self._copy_history(run)
        if best is not None:
            with replacing_folder(self.path / CHECKPOINTS / best.name) as copied:
                shutil.copytree(best, copied, dirs_exist_ok=True)
        if (
            here
            and found is not None
            and (later := [n for n, _ in numbered(self.path / CHECKPOINTS) if n > self.at.taken])
        ):
            log.info(
                f"Checkpoints after step {self.at.taken} ({', '.join(map(str, later))}) are removed at the next save"
            )
        if done and found is not None:
            self._save_adapter(self.path, self._overlap_of(found.folder))
        with replacing_file(self.path / "run.yaml") as temporary:  # `--config run.yaml` repeats the run
            # Repeating a run neither continues nor overwrites one.
            repeated = {**self.settings.to_flat(), "resume": None, "force": False}
            text = yaml.safe_dump(repeated, sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")
        if self.path.parent.name != TRIALS:
            note_run(self.path)
            keep_allowed(self.path / "run.yaml", code_of(repeated))
        if written is not None and written.resolve() != (self.path / WRITTEN).resolve():
            with replacing_folder(self.path / WRITTEN) as copied:
                for file in written.iterdir():
                    shutil.copyfile(file, copied / file.name)

    def _best_beside(self, room: Path) -> Path | None:
        """Return the best checkpoint of a run that goes on in this folder; if it is gone, every rank looks for the best anew."""
        at = self.at
        if not at.best_at or not self.settings.loop.keep_best:
            return None
        best = room / f"step-{at.best_at:06d}"
        if self.strategy.ranks.from_first(best.is_dir()):
            return best
        log.info(f"{best}, the best checkpoint so far, is not there; the best is chosen from here on")
        at.compare_anew()
        return None

    def _copy_history(self, run: Path) -> None:
        """Copy what another run folder has of the steps so far; where these files are opened, later steps are cut off."""
        for name in HISTORY:
            if (run / name).is_file():
                with replacing_file(self.path / name) as temporary:
                    shutil.copyfile(run / name, temporary)

    def _clear_leftovers(self) -> None:
        """Remove the temporary files of killed runs; no other process writes here while the folder is locked."""
        for path in (self.path / CHECKPOINTS).glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)
        # Only names that replacing_file uses; the user's files stay.
        for name in (
            WEIGHTS_FILE,
            CONFIG_FILE,
            "run.yaml",
            *HISTORY,
            REPORT_FILE,
            FACTS_FILE,
            CARD_FILE,
            EVALUATION_FILE,
        ):
            for path in self.path.glob(f".{name}.*"):
                path.unlink(missing_ok=True)

    def _save_adapter(self, folder: Path, overlap: dict[str, float] | None, checkpoint: Path | None = None) -> None:
        """Write the adapter; one that comes from a checkpoint has the head's facts from there."""
        config = read_adapter_config(checkpoint) if checkpoint else {}
        head = head_of(config, checkpoint) if checkpoint else self.head()
        info = replace(self.info, head=head)
        if not (own_entries(config).get("qat") if checkpoint else is_rounded(self.step.model)):
            info = replace(info, qat=False, rounded_to=None)  # --qat 0.3 has not begun: it is an ordinary adapter
        save_adapter(folder, self.step.model, info, overlap=overlap)

    def _overlap_of(self, checkpoint: Path | None) -> dict[str, float] | None:
        """Return the overlap that a checkpoint's adapter has on record if ranks measure it together; None: measure it again."""
        if not self.strategy.lockstep:
            return None
        own = own_entries(read_adapter_config(checkpoint)) if checkpoint else {}
        return own.get("overlap") or {}

    @contextmanager
    def kept_if_it_fails(self) -> Iterator[None]:
        """Report what was kept if writing fails: a full disk, or a folder that became read-only or was removed.

        Raises:
            RunError: instead of the operating system's error.
        """
        if not self.strategy.ranks.leads:
            yield  # rank 0 reports it
            return
        try:
            yield
        except Diverged:
            raise
        except OSError as error:
            prefix = f"{error.filename}: " if error.filename else ""
            raise RunError(f"{prefix}{error.strerror or error}; {self._kept()}") from error
        except RunError as error:
            raise RunError(f"{error}; {self._kept()}") from error

    def _kept(self) -> str:
        for _, folder in numbered(self.path / CHECKPOINTS):
            return f"{folder} is complete: fix the cause, then continue from it with --resume"
        return "no checkpoint had been written"

    def save(self) -> None:
        """Write the adapter and, with --save-every, a checkpoint of the whole run.

        Raises:
            Diverged: a parameter is not finite; such parameters are never saved.
        """
        if not finite(self.step):
            raise Diverged(self.at)
        overlap = measure_overlap(self.step.model) if self.strategy.lockstep else None  # by all ranks
        if self.strategy.ranks.leads:
            # The checkpoint first: a run that is killed between the two goes on from it.
            if self.settings.loop.save_every:
                room = self.path / CHECKPOINTS
                name = f"step-{self.at.taken:06d}"
                save = partial(self._save_adapter, overlap=overlap)
                write_checkpoint(room / name, self.at, self.identity, run_arrays(self.step), save)
                thin_out(room, self.settings.loop.keep, self.at.best_at, self.at.taken)
            self._save_adapter(self.path, overlap)
            _end_aside(self.path)
        self.strategy.ranks.meet()  # wait until everything is on disk

    def roll_back(self, diverged: Diverged) -> RunError:
        """Restore the last good checkpoint's adapter after a divergence, and return the error that ends the run.

        Later checkpoints are removed, so that `--resume` finds it. Without a checkpoint, the parameters from before the
        skipped updates are saved, if they are finite.
        """
        try:
            return RunError(f"{diverged}{self._roll_back() if self.strategy.ranks.leads else ''}")
        finally:
            self.strategy.ranks.meet()

    def _roll_back(self) -> str:
        """Restore the adapter, and return what is left of the run, with advice."""
        advice = "start a new run with a lower --learning-rate, or with --dtype float32"
        for _, folder in numbered(self.path / CHECKPOINTS):
            try:
                good = read_checkpoint(folder)
            except InputError:
                continue
            if good.position.skipped_in_a_row or not all(mx.isfinite(a).all().item() for a in good.arrays.values()):
                shutil.rmtree(folder)
                continue
            restore_arrays(self.step, good.arrays)
            self._save_adapter(self.path, self._overlap_of(folder), folder)
            return f"; the adapter of step {good.position.taken} ({folder}) is restored; {advice}"
        if finite(self.step):
            self._save_adapter(self.path, self._overlap_of(None))
            return f"; the adapter from before these steps is saved; {advice}"
        return f"; no checkpoint was written before, so no adapter is saved; {advice}"

    def put_best(self) -> str | None:
        """Restore the adapter with the best validation (--keep-best) on all ranks, and return rank 0's sentence about it."""
        if not self.settings.loop.keep_best:
            return None
        words = self._put_best() if self.strategy.ranks.leads else None
        send_first_ranks(self.strategy, self.step)
        return words

    def _put_best(self) -> str:
        """Restore the best adapter on this rank and in the folder, and return a sentence about it."""
        at = self.at
        if not at.best_at:
            return "no validation was better than the one before training, so the last adapter is kept"
        if at.best_at != at.taken:
            best = self.path / CHECKPOINTS / f"step-{at.best_at:06d}"
            restore_arrays(self.step, read_checkpoint(best).arrays)
            self._save_adapter(self.path, self._overlap_of(best), best)
        words = f"lowest held-out loss, {at.best_loss:.4f}"
        metric = self.settings.loop.metric_for_best_model
        if metric != LOSS and at.best_score is not None:
            name = score_words(metric)
            words = f"highest {name}, {at.best_score:.3f}, and loss {at.best_loss:.4f}"
        return f"the adapter is that of step {at.best_at}, with the {words}"


def check_room(loop: LoopSettings, steps: int, adapter_bytes: int) -> None:
    """Refuse a disk without space for the run's checkpoints, each with adapter, masters, and for Adam two moments."""
    checkpoints = (
        min(steps // int(loop.save_every) + 1, loop.keep + 1 if loop.keep else steps) if loop.save_every else 0
    )
    check_writable(Path(loop.adapter_path), "--adapter-path", adapter_bytes * (4 * checkpoints + 1))


# Resuming


def holds_adapter(folder: Path) -> bool:
    """Tell whether a run folder has results that another run would replace."""
    return (folder / CONFIG_FILE).exists() or (folder / WEIGHTS_FILE).exists()


def continues_here(loop: LoopSettings) -> bool:
    """Tell whether --resume goes on with the run of this folder, and not with a checkpoint of another folder."""
    if loop.resume in (None, "auto"):
        return loop.resume == "auto"
    return Path(loop.resume or "").resolve().parent == (Path(loop.adapter_path) / CHECKPOINTS).resolve()


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """Return the run folder that a checkpoint is in; None for one that was moved out of it."""
    room = checkpoint.resolve().parent
    return room.parent if room.name == CHECKPOINTS else None


def find_checkpoint(loop: LoopSettings, ranks: Ranks) -> Checkpoint | None:
    """Return the checkpoint for `--resume`, None without `--resume` or if there is no checkpoint yet.

    Rank 0 reads it and sends it to all ranks with its arrays: the other machines need not have the run folder.

    Raises:
        InputError: on rank 0, if a named checkpoint is damaged or missing, or there is none beside a trained adapter.
    """
    found = None
    if ranks.leads and loop.resume == "auto":
        room = Path(loop.adapter_path) / CHECKPOINTS
        found = newest_checkpoint(room)
        # A supervised run that died between its adapter and its first checkpoint begins again.
        if found is None and holds_adapter(Path(loop.adapter_path)) and not (loop.force or restarts()):
            raise InputError(
                f"--resume: {loop.adapter_path} holds an adapter, and no complete checkpoint to go on from; begin another run "
                f"from it with --resume-adapter-file {loop.adapter_path}, or replace it with --force"
            )
        if found is None:
            log.info(f"--resume: no complete checkpoint in {room}; the run starts at the beginning")
    elif ranks.leads and loop.resume is not None:
        found = read_checkpoint(Path(loop.resume))
    facts = ranks.from_first(found and [str(found.folder), asdict(found.position), found.identity])
    if facts is None:
        return None
    folder, position, identity = facts
    arrays = ranks.arrays_from_first(found.arrays if found else {})
    return Checkpoint(Path(folder), Position(**position), identity, arrays)


def first_day(loop: LoopSettings, ranks: Ranks = ALONE) -> date:
    """Return the date for chat templates: the day on which the resumed run began, else today.

    Rank 0 decides, by its clock and its run folder.
    """
    day = date.today().isoformat()
    if loop.resume is not None and ranks.leads:
        folder = Path(loop.adapter_path) if loop.resume == "auto" else Path(loop.resume).parent.parent
        try:
            settings = parse_yaml((folder / "run.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            settings = None  # no run yet, or another kind of run; find_checkpoint reports other problems
        known = str(settings.get("chat_date")) if isinstance(settings, dict) else ""
        day = known if is_day(known) else day
    return date.fromisoformat(ranks.from_first(day))


def identity_of(
    settings: TrainSettings,
    base_fingerprint: str,
    data_fingerprint: str,
    plan: BatchPlan,
    price_epochs: float,
    updates: int = 1,
) -> dict[str, Any]:
    """Return everything that a resumed run must have in common with its checkpoint, as JSON values."""
    own = {name: value for name, value in settings.to_flat().items() if not ROWS[name].may_change}
    shapes = hashlib.sha256(repr((len(plan) * updates, sorted(plan.shapes))).encode()).hexdigest()[:16]
    facts = {"base": base_fingerprint, "rows": data_fingerprint, "batches": shapes, "price_epochs": price_epochs}
    return {**facts, **own}


# Parts of a run's identity that are hashes -> what a reader calls a change of them.
HASHED = {"base": "the base model has changed", "rows": "the rows of the data have changed"}
HASHED |= {"batches": "the batches have other shapes"}


def flags_to_go_on(run: Path) -> list[str] | None:
    """Return what a new run needs, beside the settings of an earlier one, to start from its adapter (--resume-adapter-file).

    None: it cannot, because layers have ranks, or the run has settings, that another method does not take.
    """
    try:
        settings = parse_yaml((run / "run.yaml").read_text(encoding="utf-8"))
        rank = read_adapter_config(run)["lora_parameters"]["rank"]
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return []
    method = settings.get("method")
    if method == "pissa":  # it stores plain factors, of twice the rank
        return ["--method", "lora", "--rank", str(rank)]
    return None if method in START_ANEW else ["--qat"] if settings.get("qat") else []


def check_continuation(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Refuse to resume from another run's checkpoint.

    Raises:
        InputError: the runs differ; the message has all differences.
    """
    # A setting that the checkpoint's version did not have yet was at its default.
    then = {name: FIELDS[name].default for name in identity.keys() & ROWS.keys()} | checkpoint.identity
    differ = differences(then, identity)
    if not differ:
        return
    hashed = {name: words for name, words in HASHED.items() if then.get(name) != identity.get(name)}
    shown = [*hashed.values(), *(one for one in differ if one.partition(" was ")[0] not in HASHED)]
    advice = "use the same settings, or start a new run"
    if "rows" in hashed:
        run = checkpoint.folder.parents[1]
        again = ["train", "--config", str(run / "run.yaml"), "--data", "NEW.jsonl", "--resume-adapter-file"]
        flags = flags_to_go_on(run)
        again += [str(run / WEIGHTS_FILE), "--adapter-path", f"{run}-2", *(flags or [])]
        start = (
            "fuse it, and train on the fused model"
            if flags is None
            else f"start a new run from it: {command_line(again)}"
        )
        advice = (
            f"--resume goes on with the same rows only; to train this adapter further on other or more data, {start}"
        )
    raise InputError(f"--resume {checkpoint.folder}: it is from another run: {'; '.join(shown)}; {advice}")


# The list of runs

MOST_RUNS = 1000  # the newest


@dataclass(frozen=True)
class KnownRun:
    """A run folder, the folder in which its command was given, and when it began."""

    path: str
    cwd: str
    at: float

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.path)


def runs_file() -> Path:
    """Return where the list is."""
    return cache_dir("runs") / "runs.jsonl"


def note_run(folder: Path) -> None:
    """Put a run at the end of the list; a cache that cannot be written costs the run its place there, and nothing else."""
    new = KnownRun(str(folder.resolve()), os.getcwd(), time.time())
    with contextlib.suppress(OSError):
        _change_list(runs_file(), lambda known: [*(one for one in known if one.path != new.path), new])


def forget_run(folder: Path, file: Path | None = None) -> None:
    """Take a run off the list; its folder stays."""
    _change_list(file or runs_file(), lambda known: [one for one in known if one.path != str(folder)])


def known_runs(file: Path) -> list[KnownRun]:
    """Return the runs whose folder is still there: the folder itself, not a link to another one."""
    return [one for one in _read_list(file) if _is_there(one)]


def _change_list(file: Path, change: Callable[[list[KnownRun]], list[KnownRun]]) -> None:
    """Write the changed list, without the runs that are gone."""
    with one_at_a_time(file):
        kept = [one for one in change(_read_list(file)) if _is_there(one)][-MOST_RUNS:]
        with replacing_file(file) as temporary:
            temporary.write_text("".join(f"{json.dumps(asdict(one))}\n" for one in kept), encoding="utf-8")


def _read_list(file: Path) -> list[KnownRun]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            one = KnownRun(**json.loads(line))
            if isinstance(one.path, str) and isinstance(one.cwd, str):
                found.append(one)
    return found


def _is_there(one: KnownRun) -> bool:
    try:
        return (one.folder / "run.yaml").is_file() and str(one.folder.resolve()) == one.path
    except (OSError, RuntimeError, ValueError):
        return False
