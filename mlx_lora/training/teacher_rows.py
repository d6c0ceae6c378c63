"""The rows that a teacher reads: sampled answers after prompts of its own.

    student   prompt, answer
    teacher   its system prompt, prompt, answer        (--teacher-prompt)

The same tokens are trained targets in both, in the same order, so what the teacher says of its n-th target is put at the
student's n-th.

Shapes: B rows, T columns of the student's batch and W of the teacher's, N trained targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_lora.data.batches import Batch

WIDTH_STEP = 32  # widths of the teacher's batches are a multiple of this, so that few shapes occur


def with_prompts(batch: Batch, prompts: Sequence[Sequence[int]]) -> Batch:
    """Return a batch of the same trained answers after other prompts.

    Args:
        batch: (B, T); the trained targets of a row, if it has any, are one answer.
        prompts: B of them, at least one token each; that of a row without trained targets is not used.

    Returns:
        (B, W).
    """
    answers = [row[trained] for row, trained in zip(batch.targets, batch.mask, strict=True)]
    needed = [len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True) if len(answer)]
    shape = len(answers), max(1, -(-max(needed, default=1) // WIDTH_STEP)) * WIDTH_STEP
    inputs, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if len(answer):
            text, begin = np.concatenate([prompt, answer]), len(prompt) - 1
            inputs[row, : len(text) - 1], targets[row, : len(text) - 1] = text[:-1], text[1:]
            mask[row, begin : len(text) - 1] = True
    return Batch.of(inputs, targets, mask, sum(needed), len(batch.positions), numbers=batch.numbers)


def at_targets(batch: Batch, values: np.ndarray) -> np.ndarray:
    """Put values at a batch's trained targets.

    Args:
        batch: (B, T).
        values: (N, ...), in the order of the targets.

    Returns:
        (B, T, ...), 0 elsewhere.
    """
    found = np.zeros((*batch.mask.shape, *values.shape[1:]), values.dtype)
    found[batch.mask] = values
    return found
