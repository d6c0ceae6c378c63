"""A teacher's rows hold the student's answers, token by token, after prompts of its own."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_lora.data.batches import Batch
from mlx_lora.training.teacher_rows import WIDTH_STEP, at_targets, with_prompts

PROMPTS = [[7, 8, 9], [5], [6, 4], [3, 3, 3, 3]]
ANSWERS = [[11, 12], [13, 14, 15], [], [16]]  # the third is not trained


@pytest.fixture
def batch() -> Batch:
    inputs, targets = np.zeros((4, 8), np.int32), np.zeros((4, 8), np.int32)
    mask = np.zeros((4, 8), bool)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        text = prompt + (answer or [1])
        inputs[row, : len(text) - 1], targets[row, : len(text) - 1] = text[:-1], text[1:]
        mask[row, len(prompt) - 1 : len(text) - 1] = bool(answer)
    return Batch.of(inputs, targets, mask, 10, 9)


@pytest.mark.parametrize("longer", [0, 3, 40])
def test_the_same_answers_follow_other_prompts(batch, longer):
    prompts = [[2] * longer + prompt for prompt in PROMPTS]
    found = with_prompts(batch, prompts)
    assert found.inputs.shape[1] % WIDTH_STEP == 0
    assert len(found.positions) == len(batch.positions)
    assert (found.targets[found.mask] == batch.targets[batch.mask]).all()
    for row, (prompt, answer) in enumerate(zip(prompts, ANSWERS, strict=True)):
        assert found.mask[row].sum() == len(answer)
        if answer:
            text = prompt + answer
            assert found.inputs[row, : len(text) - 1].tolist() == text[:-1]
            assert found.mask[row].argmax() == len(prompt) - 1
            assert not found.inputs[row, len(text) - 1 :].any()


def test_values_come_back_to_their_tokens(batch):
    values = np.arange(batch.mask.sum() * 2).reshape(-1, 2)
    found = at_targets(batch, values)
    assert found.shape == (4, 8, 2)
    assert (found[batch.mask] == values).all()
    assert not found[~batch.mask].any()


def test_nothing_trained_is_a_batch_of_padding(batch):
    empty = Batch.of(batch.inputs, batch.targets, np.zeros_like(batch.mask), 0, 4)
    found = with_prompts(empty, PROMPTS)
    assert not found.mask.any()
    assert at_targets(empty, np.zeros((0,))).shape == (4, 8)
