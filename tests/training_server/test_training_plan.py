"""plan --clients: the memory of a training server, against the server itself."""

from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest
from run_cli import succeeds

from mlx_lora.api.plan_clients import LoraShape, plan_training_server
from mlx_lora.config.load import train_settings
from mlx_lora.models.generator import Sampling
from mlx_lora.models.load import load_base
from mlx_lora.planner.machine import this_machine
from mlx_lora.training_server.worker import AdamNumbers, Example, SamplingJob, Worker, WorkerSettings
from mlx_lora.utils.errors import InputError

CLIENTS, RANK, WIDTH = 3, 32, 128


def planned(folder, clients=CLIENTS, **settings):
    asked = train_settings({"model": str(folder), "rank": RANK, "max_seq_length": WIDTH, **settings})
    return plan_training_server(asked, clients, this_machine("auto"))


def use_all(worker: Worker, plan: dict) -> None:
    """Let every client train on the largest request, let answers be sampled from all of them, and take a step."""
    rng, models = np.random.default_rng(0), [f"m{number}" for number in range(CLIENTS)]

    def request(name):
        rows = [rng.integers(1, worker.limits.vocabulary, WIDTH + 1) for _ in range(plan["rows"])]
        examples = [Example(row[:-1].astype(np.int32), row[1:], {}) for row in rows]
        return worker.models[name].forward_backward(examples, "cross_entropy", {})

    for number, name in enumerate(models):
        worker.do(name, lambda name=name, number=number: worker.create(name, LoraShape(RANK, number))).result(60)
    for name in (*models, models[0]):
        worker.do(name, lambda name=name: request(name)).result(60)
    for name in models:
        worker.do(
            name, lambda name=name: worker.weights.put(f"w-{name}", worker.models[name].sampling_factors(worker.dtype))
        ).result(60)
    answered = threading.Semaphore(0)
    prompt = rng.integers(1, worker.limits.vocabulary, WIDTH // 2).tolist()
    for number in range(plan["answers"]):
        ask = SamplingJob(prompt, f"w-{models[number % CLIENTS]}", 1, WIDTH // 2, Sampling(1.0), frozenset())
        worker.sample(ask, lambda found: answered.release())
    assert all(answered.acquire(timeout=60) for _ in range(plan["answers"]))
    numbers = AdamNumbers(1e-4, 0.9, 0.95, 1e-8)
    worker.do(models[0], lambda: worker.models[models[0]].optim_step(numbers)).result(60)


@pytest.mark.long
@pytest.mark.cpu("the peak is that of a CPU, whose kernels keep other arrays than the planned GPU's")
def test_the_planned_peak_is_the_measured_one(tiny_folder, tmp_path):
    plan = planned(tiny_folder)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    worker = Worker(
        lambda: load_base(train_settings({"model": str(tiny_folder)}).model), WorkerSettings(tmp_path, "tiny")
    )
    try:
        use_all(worker, plan)
        assert plan["peak_bytes"] == pytest.approx(mx.get_peak_memory() - before, rel=0.2)
    finally:
        worker.close()


def test_more_clients_take_more_and_the_most_that_fit_are_counted(tiny_folder):
    one, two = planned(tiny_folder, 1), planned(tiny_folder, 2)
    assert two["peak_bytes"] > one["peak_bytes"]
    limit = 1.1 * planned(tiny_folder, 5)["peak_bytes"] / 1e9
    found = planned(tiny_folder, 5, memory_budget=limit)["most_clients"]
    assert planned(tiny_folder, found, memory_budget=limit)["fits"]
    assert not planned(tiny_folder, found + 1, memory_budget=limit)["fits"]


def test_the_command_says_how_many_clients_fit(tiny_folder):
    ran = succeeds("plan", "--model", tiny_folder, "--clients", 2, "--rank", RANK, "--chip", "M1", "--memory-gb", 8)
    assert "2 clients fits" in ran.out


def test_a_model_is_required():
    with pytest.raises(InputError, match="--model"):
        plan_training_server(train_settings({}), 2, this_machine("auto"))
