"""Run workloads, each as `python -m mlx_lora.train` in a fresh process, as a user would."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora.settings.setting_row import flag_of
from mlx_lora.sources.embedded_models import SMOLLM2_GGUF, embedded_model
from mlx_lora.sources.hub import model_file
from mlx_lora.suite.energy import EnergyMeter, energy_meter
from mlx_lora.suite.figures import LEAST_STEPS, counted_records, run_figures
from mlx_lora.suite.fresh_process import Ended, run_process
from mlx_lora.suite.machine_facts import describe_power
from mlx_lora.suite.prediction import batches_of, listed_flops, measured_machine, predict
from mlx_lora.suite.workloads import Workload
from mlx_lora.system import console
from mlx_lora.system.errors import InputError, RunError
from mlx_lora.system.files import sha256_of

BAD_INPUT, INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Length:
    """How long each workload runs; if it is changed, the result cannot be compared.

    Attributes:
        steps: total optimizer steps; None: the workload's own number.
        seconds: interrupt it this long after its first step; None: never.
    """

    steps: int | None = None
    seconds: float | None = None

    @property
    def changed(self) -> bool:
        """Whether a workload runs for another length than its own."""
        return self.steps is not None or self.seconds is not None


class Watch:
    """Watches a run's metrics.jsonl to time its first step, and to interrupt the run when its time is over.

    Attributes:
        first_step_s: from the start of the process to the end of its first step; None before that.
        joules: energy at that moment.
    """

    def __init__(self, metrics: Path, seconds: float | None, meter: EnergyMeter):
        self._metrics, self._seconds, self._meter = metrics, seconds, meter
        self._begun, self._interrupted = time.perf_counter(), False
        self.first_step_s: float | None = None
        self.joules: float | None = None

    def __call__(self, child: subprocess.Popen) -> None:
        if self._interrupted or not self._metrics.exists():
            return
        spent = time.perf_counter() - self._begun
        if self.first_step_s is None and self._metrics.stat().st_size:
            self.first_step_s, self.joules = spent, self._meter.joules()
        if self.first_step_s is None or self._seconds is None or spent - self.first_step_s < self._seconds:
            return
        if len(self._metrics.read_text(encoding="utf-8").splitlines()) > LEAST_STEPS:
            child.send_signal(signal.SIGINT)  # it ends its step, saves, and exits with 130
            self._interrupted = True


def measure_rates(work: Path) -> dict[str, Any]:
    """Run suite/rates.py in a process of its own, and return the device and the rates.

    Raises:
        RunError: it failed.
    """
    ended = run_process([sys.executable, "-m", "mlx_lora.suite.rates"], work / "rates.log")
    try:
        return json.loads(ended.log.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise RunError(f"micro-benchmarks: ended with code {ended.code} ({ended.last_words}); report it") from None


def prepare_embedded(packed: bool, work: Path) -> Path:
    """Return the embedded model as a folder, its 4-bit blocks carried over or made floats.

    Raises:
        InputError: it cannot be fetched.
        RunError: it cannot be converted.
    """
    folder = work / f"embedded-{'packed' if packed else 'float'}"
    if folder.exists():
        return folder
    gguf = embedded_model(SMOLLM2_GGUF, say=console.echo, hub=model_file)
    command = [sys.executable, "-m", "mlx_lora.convert", "--model", str(gguf), "--out", str(folder)]
    ended = run_process([*command, *([] if packed else ["--no-quantize"])], work / f"{folder.name}.log")
    if ended.code:
        raise RunError(f"{gguf}: could not be converted ({ended.last_words}); report it")
    return folder


def train_command(workload: Workload, model: str, data: Path, folder: Path, length: Length) -> list[str]:
    """Return the command of one workload, which reports each step, and does not hold out, validate or save anything."""
    settings = {
        "model": model,
        "data": data,
        "adapter_path": folder,
        **workload.flags(),
        "valid_fraction": 0,
        "val_batches": 0,
        "steps_per_eval": 0,
        "save_every": 0,
        "steps_per_report": 1,
        **({"iters": length.steps} if length.steps is not None else {"epochs": 1 + workload.epochs}),
    }
    words = [word for name, value in settings.items() for word in (flag_of(name), str(value))]
    return [sys.executable, "-m", "mlx_lora.train", *words]


def run_workload(
    workload: Workload,
    machine: dict[str, Any],
    work: Path,
    length: Length,
    model: str | None = None,
) -> dict[str, Any]:
    """Run one workload and return its entry of the result; if it cannot run, the entry has the reason.

    Args:
        workload: the workload.
        machine: `device` and `rates` from `measure_rates`.
        work: folder for data, models and run folders.
        length: the workload's own, or another.
        model: train this instead of the workload's own model (for tests).
    """
    folder = work / workload.name
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "train.jsonl"
    entry = _new_entry(workload, length, data)
    try:
        source = model or _model_of(workload, work)
    except (InputError, RunError) as error:
        return {**entry, "reason": _without_home(str(error))}
    run = folder / "run"
    with energy_meter() as meter:
        watch = Watch(run / "metrics.jsonl", length.seconds, meter)
        ended = run_process(train_command(workload, source, data, run, length), folder / "log.txt", watch)
        joules = meter.joules()
    entry["power_after"] = describe_power()
    if ended.code not in (0, INTERRUPTED) or watch.first_step_s is None:
        return {**entry, **_failure(ended)}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    try:
        figures = run_figures(records, watch.first_step_s)
    except ValueError as error:
        return {**entry, "status": "failed", "reason": str(error)}
    figures["energy_j"] = None if joules is None or watch.joules is None else joules - watch.joules
    figures["energy_source"] = meter.source
    predicted = _against_plan(workload, machine, records, figures)
    return {**entry, "status": "measured", "base": _base_of(run, workload), "figures": figures, "predicted": predicted}


def _new_entry(workload: Workload, length: Length, data: Path) -> dict[str, Any]:
    """Write the training data, and return an entry for a workload that has not run."""
    text = workload.shape.rows.text()
    data.write_text(text, encoding="utf-8")
    return {
        "workload": workload.definition(),
        "status": "not run",
        "reason": None,
        "shortened": length.changed,
        "data_sha256": sha256_of(data),
        "base": None,
        "power_before": describe_power(),
        "power_after": None,
        "figures": None,
        "predicted": None,
    }


def _model_of(workload: Workload, work: Path) -> str:
    """Return what --model is given."""
    return str(prepare_embedded(workload.packed, work)) if workload.tier == "embedded" else workload.source


def _failure(ended: Ended) -> dict[str, Any]:
    """Return the status and the reason of a run without figures: it was refused before it began, or failed."""
    if ended.code == BAD_INPUT:
        return {"status": "not run", "reason": _without_home(ended.last_words)}
    how = f"signal {-ended.code}" if ended.code < 0 else f"code {ended.code}"
    return {"status": "failed", "reason": f"train ended with {how}: {_without_home(ended.last_words)}"}


def _without_home(text: str) -> str:
    """Return a text without the home folder: results are published, and must not contain a user's name."""
    return text.replace(str(Path.home()), "~")


def _base_of(run: Path, workload: Workload) -> dict[str, Any]:
    """Return the base weights, as the adapter's config names them."""
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))["mlx_lora"]
    return {
        "model": workload.source if workload.tier == "embedded" else config["base_model"],
        "revision": config["base_revision"],
        "fingerprint": config["base_fingerprint"],
    }


def _against_plan(
    workload: Workload, machine: dict[str, Any], records: Sequence[dict[str, Any]], figures: dict[str, Any]
) -> dict[str, Any]:
    """Return the planner's figures for the counted steps, and add the utilization to the measured `figures`."""
    _, counted = counted_records(records)
    where, ceilings = measured_machine(machine["device"], machine["rates"]["ceilings"])
    expected = predict(workload, where, ceilings, batches_of(counted))
    useful = expected.pop("flops_per_token") * figures["tokens_per_s"]["median"]
    listed = listed_flops(machine["device"])
    figures["useful_flops_per_s"] = useful
    figures["mfu"] = useful / machine["rates"]["gemm_flops_per_s"][machine["device"]["compute_dtype"]]
    figures["mfu_listed"] = None if listed is None else useful / listed
    return {**expected, "ceilings": ceilings.source}
