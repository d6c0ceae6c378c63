"""Compute requests of several clients in one pass of their base.

    model 0   micro-batch (B0, T0)  --.                                                    .-->  loss and gradient of model 0
    model 1   micro-batch (B1, T1)  --+--> joint batch (U, T) --> stacked model --> (P,)  --+-->  loss and gradient of model 1

The layers that compute the rows of several adapters at once, and the rule for which batches are worth it, are those of several training runs
(adapters/stacked.py, trainer/stacked_step.py). A joint pass rounds differently than each model alone, in the last bits of float32.

Shapes: U rows of all models, T the widest micro-batch's columns, P all target tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_lora.adapters.stacked import Share, holders_of, parts_of, stack_adapters
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.cross_entropy import PLAIN, TOKEN_ARRAYS, Arrays
from mlx_lora.models.head import find_head
from mlx_lora.models.load import Base
from mlx_lora.trainer.stacked_step import SAVED_POSITIONS
from mlx_lora.training_server.examples import MicroBatch
from mlx_lora.training_server.models import TokenRequest, TrainedModel


class RequestBatch(NamedTuple):
    """One micro-batch of a model's request."""

    number: int
    request: TokenRequest
    batch: MicroBatch

    @property
    def rows(self) -> int:
        return self.batch.arrays["inputs"].shape[0]

    @property
    def width(self) -> int:
        return self.batch.arrays["inputs"].shape[1]


class JointPass:
    """Computes requests of certain models together."""

    def __init__(self, base: Base, models: Mapping[int, TrainedModel], most_positions: int):
        """Put the models' adapters on one copy of the base.

        Args:
            base: of all of them.
            models: number -> a model whose rows can be stacked (`unstackable`).
            most_positions: of a joint batch, padding included.
        """
        self._models, self._most_positions = dict(models), most_positions
        self._model = copy.deepcopy(base.model)
        self._model.train()
        alone = choose_loss(self._model, base.config)
        self._routing = stack_adapters(self._model, {number: model.model for number, model in models.items()})
        # A model may adapt the head.
        self._loss = PLAIN if isinstance(find_head(self._model, base.config), str) else alone
        self._exchanged = next(iter(models.values())).exchanged
        self._holders = {number: holders_of(model.model) for number, model in models.items()}

    def compute(self, requests: Mapping[int, TokenRequest]) -> None:
        """Compute all micro-batches of one request of each model; those of similar width share a pass."""
        for place in range(max(len(request.batches) for request in requests.values())):
            parts = [
                RequestBatch(number, request, request.batches[place])
                for number, request in requests.items()
                if place < len(request.batches)
            ]
            for group in self._grouped(parts):
                if len(group) > 1:
                    self._together(group)
                else:
                    self._models[group[0].number].compute(group[0].request, group[0].batch)

    def _grouped(self, parts: list[RequestBatch]) -> list[list[RequestBatch]]:
        """Group the parts that one pass computes faster than several do."""
        groups: list[list[RequestBatch]] = []
        for part in sorted(parts, key=lambda part: (-part.width, part.number)):
            last = groups[-1] if groups else []
            width = last[0].width if last else 0
            positions = width * (sum(one.rows for one in last) + part.rows)
            fits = part.request.backward and all(one.request.backward for one in last)
            if (
                last
                and fits
                and (width - part.width) * part.rows <= SAVED_POSITIONS
                and positions <= self._most_positions
            ):
                last.append(part)
            else:
                groups.append([part])
        return groups

    def _together(self, group: Sequence[RequestBatch]) -> None:
        """Compute some micro-batches, each of another model, in one pass."""
        lengths = [len(part.batch.arrays["positions"]) for part in group]
        shares = [Share(part.number, part.rows, part.width, slots) for part, slots in zip(group, lengths, strict=True)]
        holders = [self._holders[part.number] for part in group]
        own = [[layer[name] for _, layer, name in held] for held in holders]

        def loss(parameters: list[list[mx.array]]) -> tuple[mx.array, list[tuple[mx.array, mx.array]]]:
            for held, arrays in zip(holders, parameters, strict=True):
                for (_, layer, name), array in zip(held, arrays, strict=True):
                    layer[name] = array
            logprobs, results = -self._loss.tokens(self._model, joint_arrays(group)), []
            for part, piece in zip(group, parts_of(logprobs, lengths), strict=True):
                losses = part.request.row.of_tokens(piece, part.batch.given, part.request.numbers)
                results.append((losses.sum(), piece))
            return mx.stack([one[0] for one in results]).sum(), results

        with self._routing.to(shares, {}), left_unchanged(self._model), self._exchanged(self._model):
            (_, results), gradients = mx.value_and_grad(loss)(own)
        for part, held, (loss_sum, logprobs), grads in zip(group, holders, results, gradients, strict=True):
            named = {name: gradient for (name, _, _), gradient in zip(held, grads, strict=True)}
            part.request.add(part.batch, loss_sum, logprobs, self._models[part.number].masters.from_names(named))


def joint_arrays(group: Sequence[RequestBatch]) -> Arrays:
    """Return the arrays of a joint batch: the rows of one model after those of another, padded on the right."""
    width, first = max(part.width for part in group), 0
    columns: dict[str, list[np.ndarray]] = {name: [] for name in TOKEN_ARRAYS}
    for part in group:
        arrays, missing = part.batch.arrays, ((0, 0), (0, width - part.width))
        for name in ("inputs", "targets", "mask"):
            columns[name].append(np.pad(np.array(arrays[name]), missing))
        row, column = np.divmod(np.array(arrays["positions"]), part.width)
        columns["positions"].append(((first + row) * width + column).astype(np.int32))
        columns["weights"].append(np.array(arrays["weights"]))
        first += part.rows
    return {name: mx.array(np.concatenate(values)) for name, values in columns.items()}
