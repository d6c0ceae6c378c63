"""What a base that is read from its files costs: no wait from as many tokens as the plan names, and one with fewer; copies; planning."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_lora.planner.speed import Reading

READING = Reading(
    (10**8,) * 10, first_trained=4, bytes_per_s=1e9, copied_per_s=1e10, source="assumed", block_planned_s=1e-3
)
FORWARD_S, STEP_S = 0.2, 0.5


def test_what_is_read():
    assert READING.forward_bytes == 9 * 10**8  # the first is kept from the batch before
    assert READING.backward_bytes == 5 * 10**8  # the last, from the forward pass


@pytest.mark.parametrize("bytes_per_s", [0.5e9, 1e9, 3e9])
def test_from_as_many_tokens_as_it_names_nothing_waits(bytes_per_s):
    reading = replace(READING, bytes_per_s=bytes_per_s)
    tokens = reading.hidden_from(100, FORWARD_S, STEP_S)
    assert reading.waiting_s(FORWARD_S * tokens / 100, STEP_S * tokens / 100) == pytest.approx(0)
    assert reading.waiting_s(FORWARD_S * (tokens - 2) / 100, STEP_S * (tokens - 2) / 100) > 0


def test_a_pass_waits_for_what_reading_takes_longer():
    assert READING.waiting_s(FORWARD_S, STEP_S) == pytest.approx((0.9 - 0.01 - 0.2) + (0.5 - 0.006 - 0.3))
    assert READING.waiting_s(10.0, 20.0) == 0


def test_what_is_read_is_copied_and_each_block_of_a_pass_is_planned():
    assert READING.copying_s == pytest.approx(1.4e9 / 1e10)
    assert READING.planning_s == pytest.approx((10 + 6) * 1e-3)


def test_planning_alone_may_hide_the_disk():
    slow = replace(READING, block_planned_s=1.0)
    assert slow.hidden_from(100, FORWARD_S, STEP_S) == 1
    assert slow.waiting_s(0.0, 0.0) == 0
