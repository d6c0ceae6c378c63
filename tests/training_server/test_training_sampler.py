"""Samples whose weights are dropped, or whose client leaves, while they wait for their turn."""

from __future__ import annotations

import mlx.core as mx
import pytest
from training_examples import loaded, trained_model

from mlx_lora.models.generator import Sampling
from mlx_lora.training_server.worker import SampleLoop, SampleTicket, SamplingJob, WeightStore
from mlx_lora.utils.errors import InputError


@pytest.fixture(scope="module")
def base(tiny_folder):
    return loaded(tiny_folder)


def asked(base, rows: int, count: int) -> tuple[SampleLoop, list[SampleTicket], list]:
    """Return a loop with a request for each of so many samples, of which it computes some at once, and their answers."""
    weights, found = WeightStore(base), []
    weights.put("mine", trained_model(base, seed=1).sampling_factors(mx.float32))
    loop = SampleLoop(base, weights, rows)
    job = SamplingJob([5, 9, 7], "mine", 1, 3, Sampling(temperature=0.0, top_logprobs=0), frozenset())
    tickets = [SampleTicket(job, found.append) for _ in range(count)]
    for ticket in tickets:
        loop.submit(ticket)
    return loop, tickets, found


def run(loop: SampleLoop) -> None:
    while loop.busy:
        loop.step()


def test_requests_that_wait_keep_weights_that_are_replaced(base):
    """Weights of an inflight sampler are dropped as soon as newer ones are saved."""
    loop, _, found = asked(base, rows=1, count=3)
    loop.step()
    loop.weights.drop("mine")
    run(loop)
    assert [type(one) for one in found] == [SampleTicket] * 3
    assert len({tuple(one.samples[0].tokens) for one in found}) == 1
    assert "mine" not in loop.weights
    assert not loop.weights._numbers
    with pytest.raises(InputError, match="gone"):
        loop.weights.number("mine")
    loop.weights.close()


def test_requests_that_are_canceled_while_they_wait_leave_nothing(base):
    loop, tickets, found = asked(base, rows=1, count=3)
    loop.step()
    for ticket in tickets:
        ticket.canceled = True
    loop.weights.drop("mine")
    run(loop)
    assert all(isinstance(one, InputError) for one in found)
    assert len(found) == 3
    assert "mine" not in loop.weights
    loop.weights.close()
