"""Time a step of one run, and a step of the first N runs together, in one process: called by benchmarks/several_runs.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mlx_lora.config.load import read_settings, train_settings  # before mlx: it loads the fast BLAS
from mlx_lora.trainer.several_runs import SeveralRuns
from mlx_lora.trainer.step import Step

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten
from shared import read_job, write_result


def timed(function: Callable[[], Any]) -> dict[str, float]:
    """Return wall clock, processor seconds and peak memory of a function whose arrays are computed."""
    mx.clear_cache()
    mx.reset_peak_memory()
    wall, processor = time.perf_counter(), time.process_time()
    mx.eval(function())
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - processor,
        "peak_bytes": float(mx.get_peak_memory()),
    }


def state_bytes(step: Step) -> int:
    """Return the bytes of a run's factors and of its optimizer."""
    found = tree_flatten([step.model.trainable_parameters(), step.masters.arrays, step.optimizer.state])
    return sum(
        array.nbytes for array in {id(array): array for _, array in found if isinstance(array, mx.array)}.values()
    )


def main() -> None:
    job = read_job()
    started = time.process_time()
    runs = SeveralRuns.open([train_settings({}, read_settings(file, {})) for file in job["files"]])
    found: dict[str, list[dict[str, float]]] = {"alone": [], **{str(count): [] for count in job["runs"]}}
    with runs.begun():
        prepared_cpu_s = time.process_time() - started
        wanted = {number: member.wanted for number, member in enumerate(runs.members) if member.wanted is not None}
        joint = runs.joint
        if joint is None:
            raise ValueError("these runs cannot be stacked")

        def alone() -> Any:
            first = wanted[0]
            return first.trainer.step(*first[1:])

        def together(count: int) -> Any:
            own = {number: step for number, step in wanted.items() if number < count}
            if len(joint.joined(own)) != count:
                raise ValueError(f"of {count} runs, only {joint.joined(own)} share a product")
            sums = joint.sums(own, {})
            return [step.trainer.step.optim_step(sums[number]) for number, step in own.items()]

        for repeat in range(job["rounds"] + 1):  # the first one traces and is not counted
            for count in job["runs"] if repeat % 2 else job["runs"][::-1]:
                figures = timed(alone)  # beside each, so that both have the same drift
                both = [
                    ("alone", figures),
                    (str(count), timed(lambda count=count: together(count)) if count > 1 else figures),
                ]
                for name, figure in both if repeat else []:
                    found[name].append({**figure, "beside": count, "repeat": repeat})
        result = {
            "found": found,
            "state_bytes": [state_bytes(wanted[number].trainer.step) for number in sorted(wanted)],
            "prepared_cpu_s": prepared_cpu_s,
            "held_bytes": mx.get_active_memory(),
            "positions": sum(batch.inputs.size for batch in wanted[0].batches),
        }
    write_result(job, result)


if __name__ == "__main__":
    main()
