"""Check the planner: the peak memory of eight runs, as planned before the run and as measured by MLX's allocator.

Each run is `mlx-lora train` in a process of its own, on a model of random weights, with rows that are full.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lora.owner_kit.child_runs import train_child
from mlx_lora.owner_kit.kit_check import Finding, Kit, KitCheck
from mlx_lora.owner_kit.kit_models import write_model
from mlx_lora.suite.rows import chat_rows, pair_rows
from mlx_lora.suite.workload_models import LLAMA_1B, SMOLLM2
from mlx_lora.system import device

BOUND = 0.10  # of the measured peak
LAYOUT = {"group_size": 64, "bits": 4, "mode": "affine"}
ADVICE = "give --memory-budget with some room; docs/planner.md says how the plan counts; report it with these numbers"
# SmolLM2's and Llama 3.2 1B's widths. In a much smaller model, what the plan rounds up is more than a tenth.
ON_CPU = {**SMOLLM2.config, "num_hidden_layers": 6}
ON_GPU = {**LLAMA_1B.config, "num_hidden_layers": 8}


@dataclass(frozen=True)
class Planned:
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
    Planned(8, 2, "none"),
    Planned(64, 2, "none"),
    Planned(8, 2, "block"),
    Planned(16, 4, "block"),
    Planned(16, 4, "none", packed=True),
    Planned(16, 4, "block", "dora", packed=True),
    Planned(8, 2, "none", objective="dpo"),
    Planned(8, 4, "block", packed=True, objective="dpo"),
)


def memory_checks() -> list[KitCheck]:
    """Return a check for each run."""
    return [
        KitCheck("memory", one.words, partial(check_peak, one), quick=number == 4) for number, one in enumerate(RUNS)
    ]


def check_peak(one: Planned, kit: Kit) -> Iterator[Finding]:
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
        yield Finding("peak", "failed", "the run was not planned", advice=ADVICE)
        return
    ratio = planned / measured
    good = abs(ratio - 1) <= BOUND
    words = f"planned {planned / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB: {ratio:.3f} times"
    yield Finding(
        "peak", "ok" if good else "warning", words, abs(ratio - 1), BOUND, "of the measured peak",
        "" if good else ADVICE, {"planned GB": planned / 1e9, "measured GB": measured / 1e9},
    )  # fmt: skip


def _peaks(kit: Kit, one: Planned, model: Path, data: Path, settings: dict[str, Any]) -> tuple[int | None, int]:
    """Return the planned and the measured peak of one run, in bytes."""
    run = train_child(kit, f"memory-{RUNS.index(one)}", model, data, settings)
    return run.facts["planned_peak_bytes"], max(record["peak_memory_bytes"] for record in run.records)


def _settings(one: Planned, positions: int) -> dict[str, Any]:
    toward = {"objective": "dpo"} if one.objective == "dpo" else {"mask_prompt": False}
    return {
        **toward, "method": one.method, "rank": one.rank, "batch_size": one.rows, "iters": 3,
        "grad_checkpoint": one.checkpointing, "max_seq_length": positions + 1,
    }  # fmt: skip


def _data(work: Path, one: Planned, positions: int) -> Path:
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
