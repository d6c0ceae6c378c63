"""Traces that tests remember are those that would be made again."""

from __future__ import annotations

import mlx.core as mx
import pytest
from architectures.build import tiny_config
from traced_blocks import TRACE, remembered

from mlx_lora.config.load import train_settings
from mlx_lora.models.meta import outline_of_config
from mlx_lora.trainer import fit as model_shape
from mlx_lora.trainer.fit import outlined_shape
from mlx_lora.utils import device


def memory_of(name: str, rows: int = 3, **flags: object) -> list:
    outline = outline_of_config(tiny_config(name), device.compute_dtype())
    shape = outlined_shape(outline, train_settings({"model": "x", "rank": 4, **flags}))
    return [block.memory.at(rows, 48, False) for block in shape.blocks]


@pytest.fixture
def known():
    with remembered() as found:
        yield found


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_remembered_trace_is_that_of_the_block(name, known, monkeypatch):
    first = memory_of(name)
    count = len(known)
    assert memory_of(name) == first
    assert len(known) == count > 0
    monkeypatch.setattr(model_shape, "_read_block", TRACE)
    assert memory_of(name) == first


@pytest.mark.parametrize(
    ("changed", "differs"),
    [({"rank": 8}, True), ({"method": "dora"}, True), ({"learning_rate": 0.5}, False)],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_adapter_is_another_trace(changed, differs, known):
    memory_of("llama")
    count = len(known)
    memory_of("llama", **changed)
    assert (len(known) > count) == differs


def test_a_trace_that_draws_random_numbers_is_made_again(known):
    states = []
    for _ in range(2):
        mx.random.seed(3)
        memory_of("llama", dropout=0.1)
        states.append(mx.random.state[0].tolist())
    mx.random.seed(3)
    assert states[0] == states[1] != mx.random.state[0].tolist()
    assert not known
