"""Requests of several clients in one pass: what each gets alone, up to the last bits."""

from __future__ import annotations

import threading
import time

import mlx.core as mx
import numpy as np
import pytest
from training_examples import examples, gradients, loaded, trained_model

from mlx_lora.engine.engine import Stopped
from mlx_lora.training_server.worker import AdamNumbers, JointPass, TokenJob, Worker, WorkerSettings
from mlx_lora.utils.errors import InputError

SAMPLED = {
    "logprobs": lambda random, shape: random.normal(-5.5, 0.4, shape),
    "advantages": lambda random, shape: random.normal(0, 1, shape),
}
# Of three clients: rank, seed, and what they ask for.
CLIENTS = [
    (4, 1, "cross_entropy", {}, {}),
    (6, 2, "ppo", SAMPLED, {}),
    (2, 3, "gspo", {**SAMPLED, "sequence_ratio_mask": lambda random, shape: np.ones(shape)}, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_folder):
    return loaded(tiny_folder)


@pytest.mark.float32("sums of the same rows in another order are compared within float32's rounding")
@pytest.mark.parametrize("most_positions", [4096, 12], ids=["one batch each", "several batches each"])
def test_a_joint_pass_gives_each_model_its_own_numbers(base, most_positions):
    together, alone = ([trained_model(base, rank=rank, seed=seed) for rank, seed, *_ in CLIENTS] for _ in range(2))
    data = [examples(number, **given) for number, (*_, given, _) in enumerate(CLIENTS)]
    for model in (*together, *alone):
        model._most_positions = most_positions
    joint = JointPass(base, dict(enumerate(together)), 4096)
    asked = {
        number: model.prepare(data[number], CLIENTS[number][2], CLIENTS[number][4])
        for number, model in enumerate(together)
    }
    joint.compute(asked)
    for number, (model, judge) in enumerate(zip(together, alone, strict=True)):
        found = model.finish(asked[number])
        wanted = judge.forward_backward(data[number], CLIENTS[number][2], CLIENTS[number][4])
        # A sum of losses of both signs: its rounding is that of its parts.
        assert found.loss_sum == pytest.approx(wanted.loss_sum, rel=1e-6, abs=1e-5)
        assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(found.logprobs, wanted.logprobs, strict=True))
        own, theirs = gradients(model), gradients(judge)
        size = max(mx.abs(value).max().item() for value in theirs.values())
        assert max(mx.abs(own[name] - theirs[name]).max().item() for name in theirs) < 1e-6 * size
        # Parameters are themselves again, and a step moves this model alone.
        before = [other.state() for other in together]
        model.optim_step(AdamNumbers(1e-2, 0.9, 0.95, 1e-8))
        after = [other.state() for other in together]
        moved = [
            any(not mx.array_equal(a[key], b[key]).item() for key in a) for a, b in zip(before, after, strict=True)
        ]
        assert moved == [place == number for place in range(len(together))]


def test_batches_of_very_different_width_stay_apart(base):
    models = {number: trained_model(base, seed=number) for number in range(2)}
    joint = JointPass(base, models, 4096)
    long = [type(one)(np.tile(one.tokens, 40)[:300], np.tile(one.targets, 40)[:300], {}) for one in examples(0)]
    parts = {0: models[0].prepare(long, "cross_entropy", {}), 1: models[1].prepare(examples(1), "cross_entropy", {})}
    joint.compute(parts)
    wanted = [
        trained_model(base, seed=number).forward_backward(data, "cross_entropy", {})
        for number, data in enumerate((long, examples(1)))
    ]
    for number, model in models.items():
        assert model.finish(parts[number]).loss_sum == wanted[number].loss_sum, "alone, to the last bit"


def started(tiny_folder, tmp_path, join: bool) -> Worker:
    return Worker(lambda: loaded(tiny_folder), WorkerSettings(tmp_path, "tiny", join_clients=join))


@pytest.mark.float32("sums of the same rows in another order are compared within float32's rounding")
@pytest.mark.parametrize("join", [True, False])
def test_requests_that_wait_together_are_computed_together(tiny_folder, tmp_path, base, join):
    worker = started(tiny_folder, tmp_path, join)
    try:
        for number in range(3):  # the last adapts the head, which is an embedding here, and is computed alone
            shape = trained_model(base, seed=number, unembed=number == 2).shape
            worker.do(f"m{number}", lambda number=number, shape=shape: worker.create(f"m{number}", shape)).result(60)
        hold = threading.Event()
        worker.do("hold", lambda: hold.wait(60))

        def job(number: int, name: str = "cross_entropy") -> TokenJob:
            data = examples(number)
            return TokenJob(
                lambda: worker.models[f"m{number}"], lambda model: model.prepare(data, name, {}), lambda output: output
            )

        futures = [worker.do(f"m{number}", job(number)) for number in range(3)]
        wrong = worker.do("m0", job(0, "ppo"))
        hold.set()
        for number, future in enumerate(futures):
            model = trained_model(base, move_b=False, seed=number, unembed=number == 2)
            wanted = model.forward_backward(examples(number), "cross_entropy", {})
            assert future.result(60).loss_sum == pytest.approx(wanted.loss_sum, rel=1e-6)
            assert worker.do(f"m{number}", lambda number=number: bool(gradients(worker.models[f"m{number}"]))).result(
                60
            )
        with pytest.raises(InputError, match="ppo needs"):
            wrong.result(60)
        assert list(worker._joint) == ([("m0", "m1")] if join else [])
        worker.do("m0", lambda: worker.forget(["m0"], [])).result(60)
        assert not worker._joint
    finally:
        worker.close()
    assert not worker.alive


@pytest.mark.parametrize("join", [True, False])
def test_a_request_that_fails_unexpectedly_ends_nobody_elses(tiny_folder, tmp_path, base, join, logged):
    worker = started(tiny_folder, tmp_path, join)
    try:
        for number in range(2):
            shape = trained_model(base, seed=number, unembed=False).shape
            worker.do(f"m{number}", lambda number=number, shape=shape: worker.create(f"m{number}", shape)).result(60)
        hold = threading.Event()
        worker.do("hold", lambda: hold.wait(60))

        def job(number: int) -> TokenJob:
            data = examples(number) if number else None  # of the first, an error that nobody foresaw
            return TokenJob(
                lambda: worker.models[f"m{number}"],
                lambda model: model.prepare(list(data), "cross_entropy", {}),
                lambda output: output,
            )

        futures = [worker.do(f"m{number}", job(number)) for number in range(2)]
        hold.set()
        assert futures[1].result(60).loss_sum > 0
        with pytest.raises(TypeError):
            futures[0].result(60)
        assert worker.alive
        assert any("failed" in line for line in logged)
    finally:
        worker.close()


def test_jobs_that_were_canceled_do_not_keep_a_server_from_ending(tiny_folder, tmp_path):
    worker, hold = started(tiny_folder, tmp_path, False), threading.Event()
    worker.do("hold", lambda: hold.wait(60))
    waiting = [worker.do(f"m{number}", lambda: None) for number in range(3)]
    assert waiting[0].cancel()  # as the end of a session does
    ending = threading.Thread(target=worker.close)
    ending.start()
    while worker.alive:
        time.sleep(0.01)
    hold.set()
    ending.join(60)
    assert worker.failure is None
    for future in waiting[1:]:
        with pytest.raises(Stopped):
            future.result(10)
