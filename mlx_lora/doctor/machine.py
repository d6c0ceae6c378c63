"""Check what may slow this machine down or change its numbers (power, heat, other programs, a virtual GPU), memory, and speed.

The planner is checked with eight runs: their peak memory as planned before the run and as measured by MLX's allocator. Each run
is `mlx-lora train` in a process of its own, on a model of random weights, with rows that are full.

The speed of training is compared with that of mlx_lm.lora's trainer and torch on the same rows, and with that after some minutes
of load. Each program runs in a process of its own, one after the other. The first pass over the rows, which compiles, is not
counted. Seconds of the counted passes are compared; tokens per second are theirs, without padding. The models have the widths of
published ones, and no more blocks than take seconds. Ratios between programs are those of the model; tokens per second are not,
because blocks are left out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lora.bench.machine import describe_machine, describe_power
from mlx_lora.bench.run import run_process
from mlx_lora.bench.workloads import AFFINE, LLAMA_1B, QWEN3_4B, QWEN3_8B, SMOLLM2, chat_rows, pair_rows
from mlx_lora.doctor.check import CheckFinding, Kit, KitCheck, write_model
from mlx_lora.doctor.runs import train_child
from mlx_lora.utils import device
from mlx_lora.utils.errors import RunError
from mlx_lora.utils.text import GIB, package_versions

# The machine

PEER_PACKAGES = ("torch", "peft", "transformers")
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
    return package_versions(PEER_PACKAGES)


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
MODEL_ON_CPU = {**SMOLLM2.config, "num_hidden_layers": 6}
MODEL_ON_GPU = {**LLAMA_1B.config, "num_hidden_layers": 8}


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
    positions = 1024 if kit.as_fast_as_a_gpu else 256
    folder = kit.work / f"memory{'-4bit' if one.packed else ''}"
    config = MODEL_ON_GPU if kit.as_fast_as_a_gpu else MODEL_ON_CPU
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


# Speed

BATCH, RANK = 4, 16
FASTER = 0.95  # of a peer's speed: within the noise of two runs
STEADY = 1.10  # first speed over last
MODELS = 4


@dataclass(frozen=True)
class SpeedLength:
    """How much is run: rows, passes that are counted after the first, words of an answer, and a peer's longest time."""

    rows: int
    passes: int
    words: tuple[int, int]
    limit_s: float


ON_CPU, ON_GPU = SpeedLength(8, 1, (4, 14), 60.0), SpeedLength(16, 3, (60, 200), 120.0)


def speed_checks() -> list[KitCheck]:
    """Return a check for each model and one for the steady load."""
    checks = [
        KitCheck("speed", f"model {number + 1} of {MODELS}", partial(check_speed, number), quick=number == 0)
        for number in range(MODELS)
    ]
    return [*checks, KitCheck("speed", "steady load", check_steady, quick=False)]


def check_speed(number: int, kit: Kit) -> Iterator[CheckFinding]:
    """Compare our speed with the peers' on one model."""
    model, length = speed_models(kit)[number], ON_GPU if kit.as_fast_as_a_gpu else ON_CPU
    folder, data = model.write(kit), kit.work / "speed.jsonl"
    data.write_text(chat_rows(length.rows, (3, 6), length.words, 0), encoding="utf-8")
    settings = {
        "batch_size": BATCH,
        "rank": RANK,
        "alpha": 2.0 * RANK,
        "max_seq_length": 2048,
        "epochs": 1 + length.passes,
    }
    run = train_child(kit, f"speed-{number}", folder, data, {**settings, "grad_checkpoint": "none"})
    each = length.rows // BATCH
    ends = [record["elapsed_s"] for record in run.records]
    tokens = sum(record["real_tokens"] for record in run.records[each:])
    if len(ends) != each * (1 + length.passes):
        raise RunError(f"{len(ends)} steps were reported, not {each * (1 + length.passes)}")
    ours = tokens / (ends[-1] - ends[each - 1])
    yield CheckFinding(
        f"{model.words}: mlx-lora", "ok", f"{ours:,.0f} tokens/s", ours, None, "tokens/s", values={"mlx-lora": ours}
    )
    mine = OwnSpeed(folder, data, length, tokens, ours, ends[-1])
    for name in PEERS:
        yield _against_peer(kit, model, name, mine)


PEERS = {"mlx_lm.lora": "mlx-lm", "torch": "torch"}  # name -> argument of peers.py


@dataclass(frozen=True)
class OwnSpeed:
    """Our own run, which a peer is compared with.

    Attributes:
        folder, data, length: its model and rows.
        tokens: of the counted passes, without padding.
        tokens_per_s: in them.
        all_s: seconds of all passes.
    """

    folder: Path
    data: Path
    length: SpeedLength
    tokens: int
    tokens_per_s: float
    all_s: float


def _against_peer(kit: Kit, model: SpeedModel, name: str, ours: OwnSpeed) -> CheckFinding:
    """Return how much faster our run was than a peer's on the same model and rows."""
    label, length = f"{model.words}: {name}", ours.length
    if name == "torch" and (missing := [one for one in ("torch", "peft") if peer_versions()[one] is None]):
        return CheckFinding(label, "skipped", f"{' and '.join(missing)} not installed (pip install torch peft)")
    each = length.rows // BATCH
    job = {
        "model": str(ours.folder), "data": str(ours.data), "batch_size": BATCH, "rank": RANK, "steps": each * (1 + length.passes),
        "ends": str(kit.work / "peer-steps.txt"),
    }  # fmt: skip
    (kit.work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    Path(job["ends"]).unlink(missing_ok=True)
    watch = Stopper(length.limit_s)
    command = [sys.executable, "-m", "mlx_lora.doctor.peers", PEERS[name], str(kit.work / "job.json")]
    ended = run_process(command, kit.work / "peer.log", watch)
    lines = Path(job["ends"]).read_text(encoding="utf-8").splitlines() if Path(job["ends"]).exists() else []
    if watch.stopped and len(lines) < job["steps"]:
        words = f"stopped after {length.limit_s:.0f} s, start included, at step {len(lines)} of {job['steps']}"
        return CheckFinding(label, "ok", f"{words}; mlx-lora's steps took {ours.all_s:.1f} s")
    if len(lines) < job["steps"]:
        return CheckFinding(label, "warning", f"it ended with code {ended.code}: {ended.last_words}"[:300])
    theirs = ours.tokens / (float(lines[-1]) - float(lines[each - 1]))
    ratio = ours.tokens_per_s / theirs
    note = " in float weights, as it has no 4-bit base here" if name == "torch" and model.packed else ""
    words = f"{theirs:,.0f} tokens/s{note}; mlx-lora is {ratio:.2f} times as fast"
    slower = ratio < FASTER
    advice = "run it again on a quiet machine (--again --group speed); report it with these numbers" if slower else ""
    return CheckFinding(
        label, "warning" if slower else "ok", words, ratio, None, "times as fast", advice, {name: theirs}
    )


class Stopper:
    """Ends a process after some time."""

    def __init__(self, seconds: float):
        self._end, self.stopped = time.perf_counter() + seconds, False

    def __call__(self, child: subprocess.Popen) -> None:
        if not self.stopped and time.perf_counter() > self._end:
            self.stopped = True
            child.kill()


def check_steady(kit: Kit) -> Iterator[CheckFinding]:
    """Compare the speed of the first minute of a steady load with that of its last minute."""
    model = speed_models(kit)[0]
    data = kit.work / "steady.jsonl"
    # Rows of one length: every step has the same shape.
    data.write_text(chat_rows(1, (6, 6), (30, 30), 0) * (8 * BATCH), encoding="utf-8")
    settings = {
        "batch_size": BATCH,
        "rank": RANK,
        "iters": 100_000,
        "steps_per_report": 10 if kit.as_fast_as_a_gpu else 1,
    }
    run = train_child(kit, "steady", model.write(kit), data, settings, seconds=60 * kit.minutes)
    after = describe_power()
    first, last = steady_speeds(run.records, 60 * kit.minutes)
    ratio = first / last
    state = after["thermal_state"] or (f"{after['temperature_c']:.0f} °C" if after["temperature_c"] else "not known")
    words = (
        f"{model.words}: {first:,.0f} tokens/s at first and {last:,.0f} after {kit.minutes:g} minutes, "
        f"{ratio:.2f} times as fast at first; heat afterwards: {state}"
    )
    slower = ratio > STEADY
    advice = "heat, the charger or another program: see the lines of the group machine" if slower else ""
    yield CheckFinding(
        "first over last", "warning" if slower else "ok", words, ratio, STEADY, "times", advice,
        {"first minute": first, "last minute": last},
    )  # fmt: skip


def steady_speeds(records: list[dict], seconds: float) -> tuple[float, float]:
    """Return the tokens per second of the first and of the last minute, or of halves of a shorter load.

    Args:
        records: lines of metrics.jsonl; the first two, which compile, are left out.
        seconds: of the load.

    Raises:
        RunError: there are too few steps.
    """
    steady, window = records[1:], min(60.0, seconds / 2)
    if len(steady) < 4:
        raise RunError(f"{len(records)} reports in {seconds:.0f} s are too few to compare; give more --minutes")
    begin, end = steady[0]["elapsed_s"], steady[-1]["elapsed_s"]
    early = [one for one in steady[1:] if one["elapsed_s"] <= begin + window] or steady[1:2]
    late = [one for one in steady[1:] if one["elapsed_s"] > end - window] or steady[-1:]
    before_late = steady[steady.index(late[0]) - 1]["elapsed_s"]
    return (
        sum(one["real_tokens"] for one in early) / (early[-1]["elapsed_s"] - begin),
        sum(one["real_tokens"] for one in late) / (end - before_late),
    )


# Models

SMALL_QWEN = {
    **QWEN3_4B.config,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
}
SMALL_GEMMA = {
    "model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    "sliding_window": 512, "sliding_window_pattern": 6, "max_position_embeddings": 32768,
}  # fmt: skip
MEMORY_FOR_LARGE = 30 * GIB  # from here, an 8B model's widths


@dataclass(frozen=True)
class SpeedModel:
    """A model.

    Attributes:
        name: as it is published.
        config: of the whole model.
        blocks: that are kept.
        packed: whether it is in 4 bits.
    """

    name: str
    config: dict[str, Any]
    blocks: int
    packed: bool

    @property
    def words(self) -> str:
        """Its name in the result."""
        whole = self.config["num_hidden_layers"]
        cut = "" if self.blocks == whole else f", {self.blocks} of {whole} blocks"
        return f"{self.name}, {'4-bit' if self.packed else 'float'}{cut}"

    def write(self, kit: Kit) -> Path:
        """Return a folder with it, written once."""
        config = {**self.config, "num_hidden_layers": self.blocks}
        folder = kit.work / f"speed-{self.name}-{self.blocks}{'-4bit' if self.packed else ''}"
        return write_model(folder, config, device.compute_dtype(), AFFINE if self.packed else None)


def speed_models(kit: Kit) -> list[SpeedModel]:
    """Return four models for this machine."""
    if not kit.as_fast_as_a_gpu:
        return [
            SpeedModel("SmolLM2-135M", SMOLLM2.config, 4, False),
            SpeedModel("SmolLM2-135M", SMOLLM2.config, 4, True),
            SpeedModel("Gemma-3-270M", SMALL_GEMMA, 6, False),  # its pattern of windows is six blocks long
            SpeedModel("Qwen3-0.6B", SMALL_QWEN, 2, True),
        ]
    large = QWEN3_8B if kit.here.working_set_bytes >= MEMORY_FOR_LARGE else QWEN3_4B
    return [
        SpeedModel("SmolLM2-135M", SMOLLM2.config, 30, False),
        SpeedModel("Gemma-3-270M", SMALL_GEMMA, 18, False),
        SpeedModel("Llama-3.2-1B", LLAMA_1B.config, 8, True),
        SpeedModel(large.name, large.config, 6, True),
    ]
