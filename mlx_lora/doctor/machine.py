"""Check what may slow this machine down or change its numbers (power, heat, other programs, a virtual GPU), and the planner.

The planner is checked with eight runs: their peak memory as planned before the run and as measured by MLX's allocator. Each run
is `mlx-lora train` in a process of its own, on a model of random weights, with rows that are full.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lora.bench.machine import describe_machine, describe_power
from mlx_lora.bench.run import run_process
from mlx_lora.bench.workloads import LLAMA_1B, SMOLLM2, chat_rows, pair_rows
from mlx_lora.doctor.check import CheckFinding, Kit, KitCheck
from mlx_lora.doctor.models import write_model
from mlx_lora.doctor.runs import train_child
from mlx_lora.utils import device
from mlx_lora.utils.text import package_versions

# The machine

PEERS = ("torch", "peft", "transformers")
BUSY_LOAD = 1.0  # per core
HOT = ("serious", "critical")
HOT_C = 95.0
# What a virtual GPU must be able to compute, or no check can run: a product, its gradient, 16 bits, random numbers.
PROBE = """
import mlx_lora, mlx.core as mx
x = mx.random.normal((64, 64)).astype(mx.bfloat16)
mx.eval(mx.grad(lambda w: mx.softmax(x @ w, axis=-1).square().sum())(x), mx.fast.rms_norm(x, x[0], 1e-5))
"""


def machine_checks() -> list[KitCheck]:
    """Return the checks of the machine itself; the short doctor has others."""
    return [KitCheck("machine", "GPU", check_gpu), KitCheck("machine", "power and load", check_power)]


def peer_versions() -> dict[str, str | None]:
    """Return the versions of packages that training is compared with; None for those that are not installed."""
    return package_versions(PEERS)


def is_virtual(here: device.Device) -> bool:
    """Return whether the GPU is that of a virtual machine, as on GitHub's runners (`Apple Paravirtual device`)."""
    return here.backend != "cpu" and "virtual" in here.name.lower()


def virtual_words(here: device.Device) -> str:
    """Return what is said of a virtual GPU."""
    return f"a virtual GPU ({here.name})"


def gpu_problem(kit: Kit) -> str:
    """Return why the GPU cannot compute, empty if it can; asked in a process of its own, which it may end."""
    ended = run_process([sys.executable, "-c", PROBE], kit.work / "probe.log")
    return "" if ended.code == 0 else f"a probe ended with code {ended.code}, {ended.last_words}"


def check_gpu(kit: Kit) -> Iterator[CheckFinding]:
    """Say which device computes, and whether it is a real one."""
    if is_virtual(kit.here):
        words = f"{virtual_words(kit.here)}: its memory and speed are not those of a chip, so they are left out"
        yield CheckFinding("device", "warning", words, advice="run this on a Mac itself for memory and speed")
    elif kit.on_gpu:
        cores = describe_machine()["gpu_cores"]
        yield CheckFinding("device", "ok", f"{kit.here.header()}{f', {cores} GPU cores' if cores else ''}")
    else:
        words = f"{kit.here.header()}: no GPU, so functions are compared with their definitions on the CPU"
        yield CheckFinding("device", "ok", words)


def check_power(kit: Kit) -> Iterator[CheckFinding]:
    """Say what slows measurements down now."""
    power, cores = describe_power(), describe_machine()["cpu_cores"] or 1
    yield _power_line("source", power["source"] == "battery", power["source"] or "not known", "plug in the charger")
    low = power["low_power_mode"]
    words = "not known" if low is None else "on" if low else "off"
    yield _power_line("low-power mode", low is True, words, "turn it off before you compare speeds")
    heat, state = power["temperature_c"], power["thermal_state"]
    hot = state in HOT or (heat is not None and heat > HOT_C)
    words = state or ("not known" if heat is None else f"{heat:.0f} °C at the hottest sensor")
    yield _power_line("heat", hot, words, "let the machine cool, then run --again --group speed")
    load = power["load_average"]
    words = f"load {load:g} over the last minute on {cores} cores"
    yield _power_line(
        "other programs", load > BUSY_LOAD * cores, words, "close other programs before you compare speeds"
    )


def _power_line(name: str, slows: bool, words: str, advice: str) -> CheckFinding:
    return CheckFinding(name, "warning" if slows else "ok", words, advice=advice if slows else "")


# The planner

BOUND = 0.10  # of the measured peak
LAYOUT = {"group_size": 64, "bits": 4, "mode": "affine"}
ADVICE = "give --memory-budget with some room; docs/planner.md says how the plan counts; report it with these numbers"
# SmolLM2's and Llama 3.2 1B's widths. In a much smaller model, what the plan rounds up is more than a tenth.
ON_CPU = {**SMOLLM2.config, "num_hidden_layers": 6}
ON_GPU = {**LLAMA_1B.config, "num_hidden_layers": 8}


@dataclass(frozen=True)
class PlannedRun:
    """One run: rank, rows per step, --grad-checkpoint, method, whether the base is in 4 bits, and the objective."""

    rank: int
    rows: int
    checkpointing: str
    method: str = "lora"
    packed: bool = False
    objective: str = "sft"

    @property
    def words(self) -> str:
        """Its name in the result."""
        kind = "dpo" if self.objective == "dpo" else self.method
        base = "4-bit" if self.packed else "float"
        return f"{kind}, {base} base, rank {self.rank}, {self.rows} rows, checkpointing {self.checkpointing}"


RUNS = (
    PlannedRun(8, 2, "none"),
    PlannedRun(64, 2, "none"),
    PlannedRun(8, 2, "block"),
    PlannedRun(16, 4, "block"),
    PlannedRun(16, 4, "none", packed=True),
    PlannedRun(16, 4, "block", "dora", packed=True),
    PlannedRun(8, 2, "none", objective="dpo"),
    PlannedRun(8, 4, "block", packed=True, objective="dpo"),
)


def memory_checks() -> list[KitCheck]:
    """Return a check for each run."""
    return [
        KitCheck("memory", one.words, partial(check_peak, one), quick=number == 4) for number, one in enumerate(RUNS)
    ]


def check_peak(one: PlannedRun, kit: Kit) -> Iterator[CheckFinding]:
    """Compare the planned with the measured peak of one run."""
    positions = 1024 if kit.on_gpu else 256
    folder = kit.work / f"memory{'-4bit' if one.packed else ''}"
    config = ON_GPU if kit.on_gpu else ON_CPU
    model = write_model(folder, config, device.compute_dtype(), LAYOUT if one.packed else None)
    settings, data = _settings(one, positions), _data(kit.work, one, positions)
    planned, measured = _peaks(kit, one, model, data, settings)
    if planned is not None and abs(planned / measured - 1) > BOUND:
        # The first run of a shape on a machine also measures kernels, and the plan is for the run alone.
        planned, measured = _peaks(kit, one, model, data, settings)
    if planned is None:
        yield CheckFinding("peak", "failed", "the run was not planned", advice=ADVICE)
        return
    ratio = planned / measured
    good = abs(ratio - 1) <= BOUND
    words = f"planned {planned / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB: {ratio:.3f} times"
    yield CheckFinding(
        "peak", "ok" if good else "warning", words, abs(ratio - 1), BOUND, "of the measured peak",
        "" if good else ADVICE, {"planned GB": planned / 1e9, "measured GB": measured / 1e9},
    )  # fmt: skip


def _peaks(kit: Kit, one: PlannedRun, model: Path, data: Path, settings: dict[str, Any]) -> tuple[int | None, int]:
    """Return the planned and the measured peak of one run, in bytes."""
    run = train_child(kit, f"memory-{RUNS.index(one)}", model, data, settings)
    return run.facts["planned_peak_bytes"], max(record["peak_memory_bytes"] for record in run.records)


def _settings(one: PlannedRun, positions: int) -> dict[str, Any]:
    toward = {"objective": "dpo"} if one.objective == "dpo" else {"mask_prompt": False}
    return {
        **toward, "method": one.method, "rank": one.rank, "batch_size": one.rows, "iters": 3,
        "grad_checkpoint": one.checkpointing, "max_seq_length": positions + 1,
    }  # fmt: skip


def _data(work: Path, one: PlannedRun, positions: int) -> Path:
    """Write texts that each fill a row, or pairs of answers that nearly do; a token is a byte."""
    path = work / f"memory-{one.objective}.jsonl"
    if one.objective == "dpo":
        words = positions // 8  # of an answer, at about five bytes each, with the prompt and the template beside them
        path.write_text(pair_rows(16, (4, 5), (words, words), 0), encoding="utf-8")
    else:
        rows = [json.loads(line) for line in chat_rows(16, (4, 5), (positions, positions), 0).splitlines()]
        texts = [json.dumps({"text": row["messages"][1]["content"][:positions]}) for row in rows]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path
