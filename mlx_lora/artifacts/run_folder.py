"""A run folder over time: what `--resume` finds in it, whether this run may go on from there, and what each save writes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import yaml

from mlx_lora.artifacts.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterInfo, save_adapter
from mlx_lora.artifacts.card import CARD_FILE
from mlx_lora.artifacts.checkpoint import (
    Checkpoint,
    differences,
    locked,
    newest_checkpoint,
    numbered,
    read_checkpoint,
    thin_out,
    write_checkpoint,
)
from mlx_lora.artifacts.run_report import FACTS_FILE, REPORT_FILE
from mlx_lora.data.batches import BatchPlan
from mlx_lora.settings.checks import is_day
from mlx_lora.settings.config import ROWS, LoopSettings, TrainSettings
from mlx_lora.system.distributed import Ranks, leads
from mlx_lora.system.errors import InputError, RunError
from mlx_lora.system.files import check_writable, replacing_file
from mlx_lora.system.parsing import parse_yaml
from mlx_lora.training.state import Diverged, Position, finite, restore_arrays, run_arrays
from mlx_lora.training.step import Step

# What a run leaves in its folder, and where an earlier run's lies until this one has saved something of its own.
RESULTS = (WEIGHTS_FILE, CONFIG_FILE, "run.yaml", "metrics.jsonl", REPORT_FILE, FACTS_FILE, "checkpoints")
ASIDE = "earlier-run"


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run folder; where this run ends before it saves anything, put the earlier one's back."""
    with locked(folder):
        try:
            yield
        finally:
            _end_aside(folder)


def _set_aside(folder: Path) -> None:
    """Move an earlier run's results out of the way, unless they are: a run that was killed had saved nothing."""
    if (folder / ASIDE).exists() and not (folder / WEIGHTS_FILE).exists():
        _remove_results(folder)
        return
    shutil.rmtree(folder / ASIDE, ignore_errors=True)
    found = [name for name in RESULTS if (folder / name).exists()]
    if found:
        (folder / ASIDE).mkdir()
    for name in found:
        (folder / name).rename(folder / ASIDE / name)


def _remove_results(folder: Path) -> None:
    for path in (folder / name for name in RESULTS):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _end_aside(folder: Path) -> None:
    """Remove an earlier run's results where this run has an adapter, else put them back."""
    if not (folder / ASIDE).exists():
        return
    if not (folder / WEIGHTS_FILE).exists():
        _remove_results(folder)
        for path in (folder / ASIDE).iterdir():
            path.replace(folder / path.name)
    shutil.rmtree(folder / ASIDE, ignore_errors=True)


def room_of(loop: LoopSettings) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(loop.adapter_path) / "checkpoints"


def find_checkpoint(loop: LoopSettings, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint that `--resume` asks for, None when it is not asked for or there is none yet.

    Raises:
        InputError: a named checkpoint that is damaged or missing.
    """
    if loop.resume is None:
        return None
    if loop.resume != "auto":
        return read_checkpoint(Path(loop.resume))
    found = newest_checkpoint(room_of(loop), say)
    if found is None:
        say(f"--resume: no whole checkpoint in {room_of(loop)}; the run starts at the beginning")
    return found


def first_day(loop: LoopSettings, ranks: Ranks | None = None) -> date:
    """Return what chat templates take for today: the day that the run to go on with began, else today.

    Rank 0's word counts: its clock, and its run folder.
    """
    day = date.today().isoformat()
    if loop.resume is not None and leads(ranks):
        folder = Path(loop.adapter_path) if loop.resume == "auto" else Path(loop.resume).parent.parent
        try:
            settings = parse_yaml((folder / "run.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            settings = None  # no run yet, or of another kind; what else is wrong is found by find_checkpoint
        known = str(settings.get("chat_date")) if isinstance(settings, dict) else ""
        day = known if is_day(known) else day
    return date.fromisoformat(ranks.from_first(day) if ranks else day)


def found_by_first(find: Callable[[], Checkpoint | None], ranks: Ranks | None) -> Checkpoint | None:
    """Return what rank 0 finds, arrays included: the other machines need not hold the run folder.

    Args:
        find: looks for a checkpoint on this machine.
        ranks: who wants it; None for a single process.

    Raises:
        InputError: whatever `find` raises, on rank 0.
    """
    if ranks is None:
        return find()
    found = find() if ranks.leads else None
    facts = ranks.from_first(found and [str(found.folder), asdict(found.position), found.identity])
    if facts is None:
        return None
    folder, position, identity = facts
    arrays = ranks.arrays_from_first(found.arrays if found else {})
    return Checkpoint(Path(folder), Position(**position), identity, arrays)


def identity_of(
    settings: TrainSettings, base_fingerprint: str, data_fingerprint: str, plan: BatchPlan, price_epochs: float
) -> dict[str, Any]:
    """Return everything that a continuation must have in common with its run, as JSON can hold it."""
    own = {name: value for name, value in settings.to_flat().items() if not ROWS[name].may_change}
    shapes = hashlib.sha256(repr((len(plan), sorted(plan.shapes))).encode()).hexdigest()[:16]
    facts = {"base": base_fingerprint, "rows": data_fingerprint, "batches": shapes, "price_epochs": price_epochs}
    return {**facts, **own}


def check_continuation(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run than this would be.

    Raises:
        InputError: with everything that differs.
    """
    differ = differences(checkpoint.identity, identity)
    if differ:
        raise InputError(
            f"--resume {checkpoint.folder}: another run than this: {'; '.join(differ)}; use the same settings, or start anew"
        )


def check_room(loop: LoopSettings, steps: int, adapter_bytes: int) -> None:
    """Refuse a disk that cannot take the run's checkpoints: each holds adapter, masters, and for Adam two moments."""
    checkpoints = min(steps // loop.save_every + 1, loop.keep + 1 if loop.keep else steps) if loop.save_every else 0
    check_writable(Path(loop.adapter_path), "--adapter-path", adapter_bytes * (4 * checkpoints + 1))


def write_settings(folder: Path, settings: TrainSettings) -> None:
    """Write run.yaml: every resolved setting; `--config run.yaml` repeats the run."""
    with replacing_file(folder / "run.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(settings.to_flat(), sort_keys=False, allow_unicode=True), encoding="utf-8")


@dataclass(frozen=True)
class RunFolder:
    """Writes a run's results.

    Attributes:
        loop: says where, how often, and how many are kept.
        info: what the adapter is.
        identity: of the run.
        ranks: of which only the first writes, while the others wait; None for a single process.
    """

    loop: LoopSettings
    info: AdapterInfo
    identity: dict[str, Any]
    ranks: Ranks | None = None

    def start_anew(self) -> None:
        """Set an earlier run's results aside (--force), which would pass for this one's."""
        if leads(self.ranks):
            _set_aside(Path(self.loop.adapter_path))

    def clear_leftovers(self) -> None:
        """Remove what killed runs left half written; nobody else writes here while the folder is locked."""
        if not leads(self.ranks):
            return
        folder = Path(self.loop.adapter_path)
        for path in room_of(self.loop).glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)
        # As replacing_file calls them; a user's own files stay.
        for name in (WEIGHTS_FILE, CONFIG_FILE, "run.yaml", REPORT_FILE, FACTS_FILE, CARD_FILE):
            for path in folder.glob(f".{name}.*"):
                path.unlink(missing_ok=True)

    @contextmanager
    def kept_if_it_fails(self) -> Iterator[None]:
        """Say what is left when writing fails: a full disk, a folder that became read-only or went away.

        Raises:
            RunError: in place of what the operating system reported.
        """
        if not leads(self.ranks):
            yield  # what is left is rank 0's to say
            return
        try:
            yield
        except Diverged:
            raise
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise RunError(f"{place}{error.strerror or error}; {self._kept()}") from error
        except RunError as error:
            raise RunError(f"{error}; {self._kept()}") from error

    def _kept(self) -> str:
        for _, folder in numbered(room_of(self.loop)):
            return f"{folder} is whole: mend the cause, then go on from it with --resume"
        return "no checkpoint was written before"

    def save(self, model: nn.Module, step: Step, at: Position) -> None:
        """Write the adapter and, with --save-every, a checkpoint of the whole run.

        Raises:
            Diverged: a parameter is not finite: what is saved never is.
        """
        if not finite(step):
            raise Diverged(at)
        if leads(self.ranks):
            self._write(model, step, at)
        if self.ranks is not None:
            self.ranks.meet()  # what is saved is on the disk before any rank goes on, or ends

    def _write(self, model: nn.Module, step: Step, at: Position) -> None:
        save_adapter(Path(self.loop.adapter_path), model, self.info)
        if not self.loop.save_every:
            _end_aside(Path(self.loop.adapter_path))
            return
        write_checkpoint(
            room_of(self.loop) / f"step-{at.taken:06d}",
            at,
            self.identity,
            run_arrays(step, model),
            lambda place: save_adapter(place, model, self.info),
        )
        thin_out(room_of(self.loop), self.loop.keep, at.best_at)
        _end_aside(Path(self.loop.adapter_path))

    def roll_back(self, model: nn.Module, step: Step, diverged: Diverged) -> RunError:
        """Put the last good checkpoint's adapter back after a divergence, and return the error that ends the run.

        Checkpoints behind it are removed, so that `--resume` finds it. Where there is none, the parameters from before
        the skipped updates are saved, if they are finite.
        """
        if not leads(self.ranks):
            self.ranks.meet()
            return RunError(str(diverged))
        try:
            return self._roll_back(model, step, diverged)
        finally:
            if self.ranks is not None:
                self.ranks.meet()

    def _roll_back(self, model: nn.Module, step: Step, diverged: Diverged) -> RunError:
        advice = "nothing was lowered: start anew with a lower --learning-rate, or --dtype float32"
        for _, folder in numbered(room_of(self.loop)):
            try:
                good = read_checkpoint(folder)
            except InputError:
                continue
            if good.position.skipped_in_a_row or not all(mx.isfinite(a).all().item() for a in good.arrays.values()):
                shutil.rmtree(folder)
                continue
            restore_arrays(step, model, good.arrays)
            save_adapter(Path(self.loop.adapter_path), model, self.info)
            return RunError(f"{diverged}; the adapter of step {good.position.taken} ({folder}) is put back; {advice}")
        if finite(step):
            save_adapter(Path(self.loop.adapter_path), model, self.info)
            return RunError(f"{diverged}; the adapter as it was before them is saved; {advice}")
        return RunError(f"{diverged}, and no checkpoint was written before; no adapter is saved; {advice}")

    def put_best(self, model: nn.Module, step: Step, at: Position) -> str | None:
        """Put the adapter of the lowest validation loss back (--keep-best), and return words on it."""
        if not self.loop.keep_best or not leads(self.ranks):
            return None
        if not at.best_at:
            return "no validation was better than before the training: the last adapter is kept"
        if at.best_at != at.taken:
            best = read_checkpoint(room_of(self.loop) / f"step-{at.best_at:06d}")
            restore_arrays(step, model, best.arrays)
            save_adapter(Path(self.loop.adapter_path), model, self.info)
        return f"the adapter is that of step {at.best_at}, with the lowest held-out loss, {at.best_loss:.4f}"
