"""Measure the speed of training and of mlx_lm.lora's trainer and torch on the same rows, and after some minutes of load.

Each program runs in a process of its own, one after the other. The first pass over the rows, which compiles, is not counted.
Seconds of the counted passes are compared; tokens per second are theirs, without padding.

The models have the widths of published ones, random weights, and no more blocks than take seconds. Ratios between programs are
those of the model; tokens per second are not, because blocks are left out.
"""

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

from mlx_lora.bench.machine import describe_power
from mlx_lora.bench.run import run_process
from mlx_lora.bench.workloads import AFFINE, LLAMA_1B, QWEN3_4B, QWEN3_8B, SMOLLM2, chat_rows
from mlx_lora.doctor.check import CheckFinding, Kit, KitCheck
from mlx_lora.doctor.machine import peer_versions
from mlx_lora.doctor.models import write_model
from mlx_lora.doctor.runs import train_child
from mlx_lora.utils import device
from mlx_lora.utils.errors import RunError
from mlx_lora.utils.text import GIB

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
    model, length = speed_models(kit)[number], ON_GPU if kit.on_gpu else ON_CPU
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
    for name, module in PEERS.items():
        yield _beside(kit, model, name, module, length, Ours(folder, data, tokens, ours, ends[-1]))


PEERS = {"mlx_lm.lora": "mlx_lora.doctor.peer_mlx_lm", "torch": "mlx_lora.doctor.peer_torch"}


@dataclass(frozen=True)
class Ours:
    """Our own run, which a peer is compared with.

    Attributes:
        folder, data: its model and rows.
        tokens: of the counted passes, without padding.
        tokens_per_s: in them.
        all_s: seconds of all passes.
    """

    folder: Path
    data: Path
    tokens: int
    tokens_per_s: float
    all_s: float


def _beside(
    kit: Kit,
    model: SpeedModel,
    name: str,
    module: str,
    length: SpeedLength,
    ours: Ours,
) -> CheckFinding:
    """Return how much faster we are than a peer.

    Args:
        kit, model, length: what is measured.
        name, module: of the peer.
        ours: our run.
    """
    label = f"{model.words}: {name}"
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
    command = [sys.executable, "-m", module, str(kit.work / "job.json")]
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
    settings = {"batch_size": BATCH, "rank": RANK, "iters": 100_000, "steps_per_report": 10 if kit.on_gpu else 1}
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
    if not kit.on_gpu:
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
