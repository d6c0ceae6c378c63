"""Compare models token by token: the losses of each, and how far their distributions are apart.

    rows -> hidden states of each model at the trained positions -> logits, a few positions at a time -> (P,) numbers of each

Shapes: B rows, T columns, P trained positions, R of them at a time, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.batch import Batch
from mlx_lora.kernels.choose import long_row_kernels
from mlx_lora.losses.cross_entropy import log_sum_exp
from mlx_lora.models.head import Head, find_head
from mlx_lora.models.load import Base
from mlx_lora.planner.machine import loss_tile_bytes

CHECK_TOKENS = 16
FEWEST_READ = 64  # positions; of fewer, most of the time on a CPU is spent on making a quantized head dense


class Readout:
    """Reads a model's hidden states at trained positions, and their logits a few at a time."""

    def __init__(self, base: Base):
        """Split the model, which is in eval mode, at its head, if that gives the model's own logits."""
        head = find_head(base.model, base.config)
        self._model, self._body, self._head = base.model, base.model, None
        if isinstance(head, Head):
            ids = mx.arange(CHECK_TOKENS)[None]  # (1, T)
            own, cut = base.model(ids).astype(mx.float32), head.logits(head.hidden(ids))
            if mx.allclose(cut, own, rtol=1e-2, atol=1e-2 * mx.abs(own).max().item()).item():
                self._body, self._head = head.hidden, head

    def head_alone(self) -> Readout:
        """Return a readout that only has `logits`, so that the model's blocks may be let go."""
        alone = copy.copy(self)
        if self._head is not None:
            alone._model = nn.Module()
            alone._head = replace(self._head, body=nn.Module(), last=None)
            alone._body = alone._head.hidden
        return alone

    def read(self, batch: Batch) -> States:
        """Return the states of a batch at its trained positions; nothing is computed yet."""
        at = np.flatnonzero(batch.mask)
        with long_row_kernels(self._model):
            out = self._body(mx.array(batch.inputs))
        return States(self, out.reshape(-1, out.shape[-1])[mx.array(at)], mx.array(batch.targets.reshape(-1)[at]))

    def logits(self, states: mx.array) -> mx.array:
        """Return (R, V) float32."""
        return states.astype(mx.float32) if self._head is None else self._head.logits(states)


@dataclass(frozen=True)
class States:
    """A model's hidden states of a batch at its trained positions: (P, D), or (P, V) if the head cannot be split off."""

    readout: Readout
    states: mx.array
    targets: mx.array


def token_losses(first: States, others: Sequence[States] = ()) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the first model's loss of each token, and beside it what others have of the same tokens.

    Args:
        first: the model that the others are compared with.
        others: of the same batch.

    Returns:
        (P,) nats, and for each other model (3, P): its loss, its KL from the first one, and whether both have the same most
        likely token; NaN in the last two where the vocabularies differ.
    """
    mx.eval(first.states, [other.states for other in others])
    vocabulary = first.readout.logits(first.states[:1]).shape[-1]
    step = max(FEWEST_READ, loss_tile_bytes() // (4 * vocabulary))
    losses, columns = [np.zeros(0)], [[np.zeros((3, 0))] for _ in others]
    for start in range(0, len(first.targets), step):
        tile = slice(start, start + step)
        targets = first.targets[tile, None]
        logs = [one.readout.logits(one.states[tile]) for one in (first, *others)]
        logs = [one - log_sum_exp(one)[:, None] for one in logs]  # (R, V)
        of_first, *own = [-mx.take_along_axis(one, targets, axis=-1).squeeze(-1) for one in logs]
        losses.append(np.array(of_first))
        for found, loss, other in zip(columns, own, logs[1:], strict=True):
            kl = same = mx.full(loss.shape, mx.nan)
            if other.shape == logs[0].shape:
                kl = (mx.exp(logs[0]) * (logs[0] - other)).sum(axis=-1)
                same = (logs[0].argmax(axis=-1) == other.argmax(axis=-1)).astype(mx.float32)
            found.append(np.array(mx.stack([loss, kl, same])))
    return np.concatenate(losses), [np.concatenate(found, axis=1) for found in columns]
