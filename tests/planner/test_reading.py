"""The wait for a base that is read from its files: none from as many tokens as the plan names, and some with fewer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_lora.planner.reading import Reading

READING = Reading((10**8,) * 10, first_trained=4, bytes_per_s=1e9, source="assumed")
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
    assert READING.waiting_s(FORWARD_S, STEP_S) == pytest.approx((0.9 - 0.2) + (0.5 - 0.3))
    assert READING.waiting_s(10.0, 20.0) == 0
