"""A shared block is sent before the block before it is computed, so that sending and computing overlap."""

from __future__ import annotations

import json

import pytest
from ranks import Started

BLOCKS = 4
SENT, END = 100, 101

# In rank 0 a step's messages and the middle of each block are numbers that are sent to rank 1, which notes them. All are in one
# stream, so they are sent in the order in which MLX plans them, however slow the machine is.
PROGRAM = """
import contextlib, json, sys
from types import SimpleNamespace

import mlx_lora
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from conftest import tiny_model
from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.load import train_settings
from mlx_lora.utils import device
from mlx_lora.parallel import sharded_base as base_shards
from mlx_lora.parallel.sharded_base import share_base

device.plan_whole_graphs()
BLOCKS, SENT, END, LEVELS = {blocks}, {sent}, {end}, {levels}
group = mx.distributed.init(strict=True, backend="ring")


def noted(number, like):
    # It depends on what it is added to, as a computation there does.
    [number] = mx.depends([mx.array([number], mx.float32)], [mx.stop_gradient(like)])
    sent = mx.distributed.send(number, 1, group=group, stream=mx.default_stream(mx.default_device()))
    return mx.stop_gradient(0 * sent)


if group.rank() == 1:
    notes = []
    while not notes or notes[-1] != END:
        notes.append(int(mx.distributed.recv((1,), mx.float32, 0, group=group).item()))
    open(sys.argv[1], "w").write(json.dumps(notes))
    sys.exit()

base_shards.LEVELS = LEVELS
model = tiny_model(num_hidden_layers=BLOCKS)
adapt_model(model, train_settings({{"model": "x", "rank": 2}}).adapter, 0)


def gathered(own):
    return mx.stack([own + noted(SENT, own).astype(mx.uint8), own])


share_base(model, SimpleNamespace(rank=0, size=2, gathered=gathered, beside=contextlib.nullcontext))
for number, block in enumerate(model.layers):
    inner = type(block.mlp)

    def call(self, x, number=number, inner=inner):
        return inner.__call__(self, x + noted(number, x))

    block.mlp.__class__ = type("Marked", (inner,), {{"__call__": call}})
model.train()
tokens = mx.array(np.arange(24).reshape(2, 12))
loss, gradients = nn.value_and_grad(model, lambda model, x: model(x).astype(mx.float32).sum())(model, tokens)
leaves = [leaf for _, leaf in tree_flatten(gradients)]
mx.eval(loss, mx.concatenate([leaf.reshape(-1) for leaf in leaves]))
mx.eval(noted(END, mx.array(0.0)))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("levels", "early"), [("base_shards.LEVELS", True), pytest.param("0", False, marks=pytest.mark.slow)]
)
def test_a_block_is_sent_before_the_one_before_it_is_computed(levels, early, tmp_path):
    program = PROGRAM.format(blocks=BLOCKS, sent=SENT, end=END, levels=levels)
    file = tmp_path / "notes.json"
    ended = Started([["-c", program, file]] * 2, tmp_path / "ranks").wait(120)
    assert ended.codes == [0, 0], ended.errs
    notes = json.loads(file.read_text())[:-1]
    computed = [place for place, note in enumerate(notes) if note != SENT]
    assert [notes[place] for place in computed] == [*range(BLOCKS), *reversed(range(BLOCKS))]
    # The embedding is the first message. Between the two passes are those of the head, which is used in both.
    sent = [notes[:place].count(SENT) for place in computed]
    needed = [*range(2, 2 + BLOCKS), *range(4 + BLOCKS, 4 + 2 * BLOCKS)]
    # The last block of either pass has none after it that could be on its way.
    ahead = [one - other for one, other in zip(sent, needed, strict=True)]
    assert ahead == ([1, 1, 1, 0] * 2 if early else [0] * 8)
