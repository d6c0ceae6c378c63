"""Run workloads, each as `python -m mlx_lora.train` in a fresh process with a clean environment, and compute their figures.

A step's time is the wall-clock time from the end of the step before it to its own end, data and host work included. The
first pass over the rows is left out, because it compiles every batch shape; medians also leave out later steps with a
new shape. Tokens do not include padding. Energy is measured if the system allows it to be read without a password.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import mlx_lora
from mlx_lora.bench.machine import DROPPED_VARIABLES, answer, describe_power
from mlx_lora.bench.workloads import Workload, batches_of, listed_flops, measured_machine, predict
from mlx_lora.config.fields import flag_of
from mlx_lora.utils.errors import InputError, RunError, first_line
from mlx_lora.utils.files import sha256_of
from mlx_lora.utils.hub import SMOLLM2_GGUF, embedded_model

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


class Watch:
    """Watches a run's metrics.jsonl to time its first step, and to interrupt the run when its time is over.

    Attributes:
        first_step_s: from the start of the process to the end of its first step; None before that.
        joules: energy at that moment.
    """

    def __init__(self, metrics: Path, seconds: float | None, meter: EnergyMeter | None = None):
        self._metrics, self._seconds, self._meter = metrics, seconds, meter
        self._begun, self._interrupted = time.perf_counter(), False
        self.first_step_s: float | None = None
        self.joules: float | None = None

    def __call__(self, child: subprocess.Popen) -> None:
        if self._interrupted or not self._metrics.exists():
            return
        spent = time.perf_counter() - self._begun
        if self.first_step_s is None and self._metrics.stat().st_size:
            self.first_step_s, self.joules = spent, self._meter and self._meter.joules()
        if self.first_step_s is None or self._seconds is None or spent - self.first_step_s < self._seconds:
            return
        if len(self._metrics.read_text(encoding="utf-8").splitlines()) > LEAST_STEPS:
            child.send_signal(signal.SIGINT)  # it ends its step, saves, and exits with 130
            self._interrupted = True


def measure_rates(work: Path) -> dict[str, Any]:
    """Run bench/machine.py in a process of its own, and return the device and the rates.

    Raises:
        RunError: it failed.
    """
    ended = run_process([sys.executable, "-m", "mlx_lora.bench.machine"], work / "rates.log")
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
    gguf = embedded_model(SMOLLM2_GGUF)
    command = [sys.executable, "-m", "mlx_lora", "convert", "--model", str(gguf), "--out", str(folder)]
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
    result: dict[str, Any],
    work: Path,
    length: Length,
    load_before: float,
    model: str | None = None,
) -> dict[str, Any]:
    """Run one workload and return its entry of the result; if it cannot run, the entry has the reason.

    Args:
        workload: the workload.
        result: its `machine`, `device` and `rates` are read.
        work: folder for data, models and run folders.
        length: the workload's own, or another.
        load_before: the load average before anything was measured.
        model: train this instead of the workload's own model (for tests).
    """
    text = workload.text()
    entry = {
        "workload": workload.definition(),
        "status": "not run",
        "reason": None,
        "shortened": length != Length(),
        "data_sha256": sha256_of(text),
        "base": None,
        # The load now is that of the micro-benchmarks or of the workload before, and would pass for other programs.
        "power_before": {**describe_power(), "load_average": load_before},
        "power_after": None,
        "figures": None,
        "predicted": None,
    }
    try:
        entry |= _outcome(workload, result, work, length, text, model)
    except (OSError, RunError) as error:  # a full disk, for example; other workloads may still run
        entry |= {"status": "failed", "reason": first_line(error)}
    if entry["reason"]:  # results are published, and must not contain a user's name
        entry["reason"] = entry["reason"].replace(str(Path.home()), "~")
    return entry


def _outcome(
    workload: Workload, result: dict[str, Any], work: Path, length: Length, text: str, model: str | None
) -> dict[str, Any]:
    """Run a workload on the training data `text`, and return what changes in its entry."""
    folder = work / workload.name
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "train.jsonl"
    data.write_text(text, encoding="utf-8")
    try:
        embedded = workload.tier == "embedded" and not model
        source = str(prepare_embedded(workload.packed, work)) if embedded else model or workload.source
    except (InputError, RunError) as error:
        return {"reason": str(error)}
    run = folder / "run"
    with closing(EnergyMeter()) as meter:
        watch = Watch(run / "metrics.jsonl", length.seconds, meter)
        ended = run_process(train_command(workload, source, data, run, length), folder / "log.txt", watch)
        joules = meter.joules()
    after = {"power_after": describe_power()}
    if ended.code == BAD_INPUT:
        return {**after, "reason": ended.last_words}
    if ended.code not in (0, INTERRUPTED) or watch.first_step_s is None:
        how = f"signal {-ended.code}" if ended.code < 0 else f"code {ended.code}"
        return {**after, "status": "failed", "reason": f"train ended with {how}: {ended.last_words}"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    try:
        figures = run_figures(records, watch.first_step_s)
    except ValueError as error:
        return {**after, "status": "failed", "reason": str(error)}
    figures["energy_j"] = None if joules is None or watch.joules is None else joules - watch.joules
    figures["energy_source"] = meter.source
    predicted = _against_plan(workload, result, records, figures)
    own = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))["mlx_lora"]
    base = {
        "model": workload.source if workload.tier == "embedded" else own["base_model"],
        "revision": own["base_revision"],
        "fingerprint": own["base_fingerprint"],
    }
    return {**after, "status": "measured", "base": base, "figures": figures, "predicted": predicted}


def _against_plan(
    workload: Workload, result: dict[str, Any], records: Sequence[dict[str, Any]], figures: dict[str, Any]
) -> dict[str, Any]:
    """Return the planner's figures for the counted steps, and add the utilization to the measured `figures`."""
    _, counted = counted_records(records)
    where, ceilings = measured_machine(result["device"], result["rates"]["ceilings"])
    expected = predict(workload, where, ceilings, batches_of(counted))
    useful = expected.pop("flops_per_token") * figures["tokens_per_s"]["median"]
    listed = listed_flops(result["device"], result["machine"]["gpu_cores"])
    figures["useful_flops_per_s"] = useful
    figures["mfu"] = useful / result["rates"]["gemm_flops_per_s"][result["device"]["compute_dtype"]]
    figures["mfu_listed"] = None if listed is None else useful / listed
    return {**expected, "ceilings": ceilings.source}


# Figures, from a run's metrics

LEAST_STEPS = 2
Record = dict[str, Any]


def counted_records(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return (warm-up, counted) steps from the lines of metrics.jsonl, each with its `seconds`.

    In a run that ended before its second pass, only the first step is warm-up.

    Raises:
        ValueError: fewer than two steps would be counted.
    """
    steps = [record for record in records if record["positions"]]
    before = [0.0, *(record["elapsed_s"] for record in steps)]
    timed = [{**step, "seconds": step["elapsed_s"] - start} for step, start in zip(steps, before, strict=False)]
    warm = sum(step["epoch"] <= 1 + 1e-9 for step in timed)
    if len(timed) - warm < LEAST_STEPS:
        warm = 1
    if len(timed) - warm < LEAST_STEPS:
        raise ValueError(f"{len(timed)} steps were run; at least {LEAST_STEPS} are needed after the warm-up")
    return timed[:warm], timed[warm:]


def run_figures(records: Sequence[Record], first_step_s: float) -> dict[str, Any]:
    """Return the figures of one run.

    Args:
        records: lines of metrics.jsonl, one per step.
        first_step_s: from the start of the process to the end of its first step.

    Raises:
        ValueError: there are too few steps.
    """
    warm, counted = counted_records(records)
    seen = {tuple(step["shapes"]) for step in warm}
    steady = []
    for step in counted:
        steady += [step] if tuple(step["shapes"]) in seen else []
        seen.add(tuple(step["shapes"]))
    if len(steady) < LEAST_STEPS:
        steady = counted
    spent = sum(step["seconds"] for step in counted)
    total = {key: sum(step[key] for step in counted) for key in ("real_tokens", "supervised_tokens", "positions")}
    losses = [step["loss"] for step in counted if step["loss"] is not None]
    return {
        "tokens_per_s": spread([step["real_tokens"] / step["seconds"] for step in steady]),
        "supervised_tokens_per_s": spread([step["supervised_tokens"] / step["seconds"] for step in steady]),
        "step_s": spread([step["seconds"] for step in steady]),
        "overall_tokens_per_s": total["real_tokens"] / spent,
        "first_step_s": first_step_s,
        "warmup_steps": len(warm),
        "counted_steps": len(counted),
        "counted_s": spent,
        "real_tokens": total["real_tokens"],
        "supervised_tokens": total["supervised_tokens"],
        "positions": total["positions"],
        "shapes": dict(sorted(Counter("+".join(step["shapes"]) for step in counted).items())),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "process_peak_bytes": max(record["process_peak_bytes"] for record in records),
        "skipped_steps": records[-1]["skipped_steps"],
        "last_loss": losses[-1] if losses else None,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, 10th and 90th percentile (nearest rank), minimum and maximum."""
    ordered = sorted(values)
    p10, p90 = (ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in (0.1, 0.9))
    return {"median": statistics.median(ordered), "p10": p10, "p90": p90, "min": ordered[0], "max": ordered[-1]}


# Processes

POLL_S = 0.02


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit code; negative if a signal ended it.
        log: everything that it printed.
    """

    code: int
    log: str

    @property
    def last_words(self) -> str:
        """The error that it printed, or its last line."""
        lines = [line.strip() for line in self.log.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("Error: ")]
        return errors[-1].removeprefix("Error: ") if errors else lines[-1] if lines else "it printed nothing"


def clean_environment() -> dict[str, str]:
    """Return this process's environment without the variables that would change OpenBLAS."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED_VARIABLES}
    # The child must find this package, even if it is a checkout that is not installed.
    root = str(Path(mlx_lora.__file__).resolve().parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")]))
    return {**kept, "TOKENIZERS_PARALLELISM": "true", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}


def run_process(command: list[str], log: Path, watch: Callable[[subprocess.Popen], None] = lambda child: None) -> Ended:
    """Run a command until it ends.

    Args:
        command: program and arguments.
        log: the file for its standard output and error.
        watch: called every 20 ms with the process, to check what it wrote or to interrupt it.
    """
    with log.open("w", encoding="utf-8") as output:
        # A new session, so that Ctrl-C does not reach the child directly as well.
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=clean_environment(), start_new_session=True
        )
        try:
            while child.poll() is None:
                watch(child)
                time.sleep(POLL_S)
        except BaseException:
            child.send_signal(signal.SIGKILL)
            child.wait()
            raise
    return Ended(child.returncode, log.read_text(encoding="utf-8", errors="replace"))


# Energy

PACKAGE_COUNTER = Path("/sys/class/powercap/intel-rapl:0")
SAMPLE_MS = 500
POWER = re.compile(r"Combined Power \(CPU \+ GPU \+ ANE\): (\d+) mW")


class EnergyMeter:
    """Measures the energy of the chip since the start (macOS: CPU, GPU and ANE; Linux: the CPU package).

    Attributes:
        source: what is read, or why nothing can be read.
    """

    def __init__(self, counter: Path = PACKAGE_COUNTER):
        self._counter, self._child, self._joules = counter, None, 0.0
        self._last: int | None = None
        self._closed = False
        if sys.platform == "darwin":
            self.source = self._start_powermetrics()
        else:
            self._last = self._read_counter()
            readable = self._last is not None
            self.source = "intel-rapl package" if readable else f"none: {counter} does not exist or is not readable"

    def joules(self) -> float | None:
        """Return the energy so far in joules, None if it cannot be read."""
        if self._child is not None:
            return self._joules
        now = self._read_counter() if self._last is not None else None
        if now is None or self._last is None:
            return None
        spent = now - self._last
        if spent < 0:  # the counter wraps around at the end of its range
            spent += int((self._counter / "max_energy_range_uj").read_text())
        self._last, self._joules = now, self._joules + spent / 1e6
        return self._joules

    def close(self) -> None:
        """Stop reading."""
        if self._child is None:
            return
        with suppress(PermissionError, ProcessLookupError):  # under sudo it is root's, and only root may end it
            self._child.terminate()
        self._closed = True  # nobody reads its next sample, which ends it
        with suppress(subprocess.TimeoutExpired):  # it holds no figures
            self._child.wait(timeout=10)

    def _start_powermetrics(self) -> str:
        """Start powermetrics if we are root, or can be without a password; return the source's name."""
        prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
        if prefix and answer("sudo", "-n", "-l", "powermetrics") is None:
            return "none: powermetrics needs root (run as root, or allow it in sudoers without a password)"
        command = [*prefix, "powermetrics", "--samplers", "cpu_power,gpu_power", "-i", str(SAMPLE_MS)]
        try:
            self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError as error:
            return f"none: powermetrics did not start ({error.strerror})"
        threading.Thread(target=self._follow, args=(self._child.stdout,), daemon=True).start()
        return "powermetrics, combined power"

    def _follow(self, samples: IO[str]) -> None:
        """Add up the samples, each of which is the mean power since the one before, until the meter is closed."""
        before = time.monotonic()
        with samples:
            for line in samples:
                if self._closed:
                    return
                if found := POWER.search(line):
                    now = time.monotonic()
                    self._joules += int(found[1]) / 1000 * (now - before)
                    before = now

    def _read_counter(self) -> int | None:
        try:
            return int((self._counter / "energy_uj").read_text())
        except (OSError, ValueError):
            return None
