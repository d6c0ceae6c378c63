"""The losses that a client may name, as functions of the log-probabilities of its target tokens.

Every loss is a sum over tokens, and tokens of one micro-batch lie one behind the other, so a client's request may be cut anywhere
between its examples. With p = exp(logprob) under the adapter and q under the policy that sampled the token, A its advantage:

    cross_entropy         -w log p
    importance_sampling   -(p / q) A
    ppo                   -min((p / q) A, clip(p / q, low, high) A)                 arXiv 1707.06347, equation 7, per token
    cispo                 -sg[clip(p / q, low, high)] A log p                       arXiv 2506.13585, equation 4
    dro                   -(A log p - beta / 2 (log p - log q)^2)                   arXiv 2405.19107
    gspo                  -min(s A, clip(s, low, high) A), s = sg[exp(mean of log p / q over the example's masked tokens)] p / sg[p]
                                                                                    arXiv 2507.18071, equation 13 (GSPO-token)

sg has no gradient. The formulas and names are those of Tinker's documentation (tinker-docs.thinkingmachines.ai/tinker/losses).

Shapes: P target tokens of a micro-batch, D its examples.

Check the examples of a request, and put them into micro-batches.

An example is one row: its input tokens, and as many targets. Targets may have K columns, alternatives at each position, as in
distillation from a teacher's likeliest tokens; then it is K rows with the same inputs, because a row of a batch has one target at each
position. Rows of similar length share a micro-batch, padded on the right, which a causal model does not see.

Shapes: N tokens of an example, K columns; B rows, T columns and P targets of a micro-batch.

A client's model: an adapter over the server's base, its summed gradients, and its Adam.

    base.model (shared, frozen) --copy of modules, not of arrays--> adapted model
    forward_backward   adds the gradient of a request's loss to the sum
    optim_step         Adam with the numbers of the request; the sum begins again

As in Tinker, losses are sums and nothing is averaged; two requests before a step are one request with the examples of both.

Adam is `torch.optim.AdamW`: with the gradient g, step t, and weights w,

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
    w = w - rate decay w - rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Write and read the checkpoints of clients' models, below one folder.

    tinker://RUN/weights/NAME            ROOT/RUN/weights/NAME            the adapter, with moments and steps: training goes on exactly
    tinker://RUN/sampler_weights/NAME    ROOT/RUN/sampler_weights/NAME    the adapter alone
    tinker://RUN/external_weights/NAME   ROOT/RUN/external_weights/NAME   the adapter alone, for download

    adapters.safetensors, adapter_config.json   an adapter folder, as `train` writes it: generate, serve, fuse and export read it
    state.safetensors                           factors and moments by name, float32 (weights only)
    state.json                                  what the model is, its steps, and a checksum of each file
    about.json                                  time, expiry and the client's metadata, which may change later

RUN is a model's id with a dot for each colon. Names never become paths unless they have the form that is checked here, so no request
reaches a file outside ROOT. Folders are written under another name, flushed to disk and renamed: a kill leaves the earlier ones whole.

Sample answers for clients, several requests and adapters in one batch, between the requests that train.

    SamplingJob -> prompt, computed once for all samples of a request -> rows of the running batch -> SampleTicket

The rows are those of the serving engine (engine/engine.py): each has its own adapter and random stream, so an answer depends on its
prompt, weights, settings and seed, and not on what else is sampled. Log-probabilities are those of the model, at temperature 1 and
before top-k and top-p: the ones that a policy loss compares with. A token that ends an answer is its last token.

Weights are factors as they were when a client saved them. The least recently used go to files when there are many.

Shapes: T tokens of a prompt, V vocabulary, k likeliest tokens.

Compute requests of several clients in one pass of their base.

    model 0   micro-batch (B0, T0)  --.                                                    .-->  loss and gradient of model 0
    model 1   micro-batch (B1, T1)  --+--> joint batch (U, T) --> stacked model --> (P,)  --+-->  loss and gradient of model 1

The layers that compute the rows of several adapters at once, and the rule for which batches are worth it, are those of several training runs
(adapters/stacked.py, trainer/stacked_step.py). A joint pass rounds differently than each model alone, in the last bits of float32.

Shapes: U rows of all models, T the widest micro-batch's columns, P all target tokens.

The one thread that uses MLX: it trains the clients' models, a request at a time, and samples between two requests.

    do(model, function) -> its queue -> run here -> Future
    sample(ask, done)   -> SampleLoop: some tokens between two jobs -> done(answer)

Each model has a queue of its own, and the thread takes the next job of one queue after the other, so a client that sends a hundred
requests at once does not make another wait for all of them. Within a queue, jobs run in their order.

With `join_clients`, requests for a loss that are next in several queues are computed in one pass.

A job that fails gives its error to the future, and the thread goes on: no client can end the work of another.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import re
import shutil
import tempfile
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from mlx_lora import __version__
from mlx_lora.adapters.inject import Targets, adapt_layers, adapter_layers, targets_of
from mlx_lora.adapters.stacked import Share, holders_of, parts_of, stack_adapters, unstackable
from mlx_lora.api.plan_clients import ALPHA, MOST_RESIDENT, POSITIONS, LoraShape, chosen_paths, most_positions
from mlx_lora.engine.adapter_store import (
    DEFAULT_CONTEXT,
    LayerFactors,
    base_name,
    context_of,
    read_factors,
    route,
    unrouted_twin,
)
from mlx_lora.engine.engine import ModelThread, Stopped
from mlx_lora.exporters.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, AdapterInfo, save_adapter
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.choose import AUTO, choose_model_kernels, exchanging
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.losses.agree import activation_dtype, check_kernels, choose_loss
from mlx_lora.losses.cross_entropy import PLAIN, PLAIN_LOGITS, TOKEN_ARRAYS, Arrays
from mlx_lora.models.folder import read_safetensors_header, save_tensors
from mlx_lora.models.generator import (
    BatchRow,
    Likelihoods,
    Prefill,
    Routing,
    RunningBatch,
    Sampler,
    Sampling,
    TokenSteps,
    one_row_because,
    rowless,
)
from mlx_lora.models.head import find_head
from mlx_lora.models.load import Base
from mlx_lora.trainer.optimizer import Masters, clip_scale
from mlx_lora.trainer.stacked_step import RunBatch, grouped, joint_arrays
from mlx_lora.utils.errors import InputError, RunError, first_line, refuse
from mlx_lora.utils.files import flush_to_disk, replace_text, replacing_folder, sha256_of
from mlx_lora.utils.parsing import read_json

Given = Mapping[str, mx.array]
"""What an example brings beside its targets, by the protocol's names: (P,) float32, and `datum`, (P,) int32, its number."""
TokenLoss = Callable[[mx.array, Given, Mapping[str, float]], mx.array]
"""(logprobs (P,), given, config) -> (P,) float32, whose sum is the loss."""

LOW, HIGH = "clip_low_threshold", "clip_high_threshold"
RATIO_MASK = "sequence_ratio_mask"
SAMPLED = ("logprobs", "advantages")


def cross_entropy(logprobs: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    """Return the weighted cross-entropy; weights may have any sign, which is how a client differentiates a loss of its own."""
    return -logprobs * given["weights"]


def importance_sampling(logprobs: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    """Return REINFORCE, corrected for the policy that sampled."""
    return -mx.exp(logprobs - given["logprobs"]) * given["advantages"]


def ppo(logprobs: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    """Return PPO's clipped objective, token by token."""
    return _clipped(mx.exp(logprobs - given["logprobs"]), given, config)


def cispo(logprobs: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    """Return REINFORCE whose weight is the clipped ratio, so a clipped token still has a gradient."""
    low, high = _bounds(given, config)
    ratio = mx.clip(mx.exp(logprobs - given["logprobs"]), low, high)
    return -mx.stop_gradient(ratio) * logprobs * given["advantages"]


def dro(logprobs: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    """Return the advantage-weighted likelihood with a quadratic penalty on the log-ratio."""
    away = mx.square(logprobs - given["logprobs"])
    return -(logprobs * given["advantages"] - 0.5 * config["beta"] * away)


def gspo(logprobs: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    """Return PPO's objective with the ratio of the whole example, which every token carries with its own gradient."""
    held = mx.stop_gradient(logprobs)
    inside = (given[RATIO_MASK] != 0).astype(mx.float32)  # (P,)
    datum = given["datum"]
    own = (datum[None, :] == mx.arange(int(datum.max().item()) + 1)[:, None]).astype(mx.float32)  # (D, P)
    log_ratio = (own @ ((held - given["logprobs"]) * inside)) / mx.maximum(own @ inside, 1.0)  # (D,)
    return _clipped(mx.exp(log_ratio[datum] + logprobs - held), given, config)


def _clipped(ratio: mx.array, given: Given, config: Mapping[str, float]) -> mx.array:
    low, high = _bounds(given, config)
    advantages = given["advantages"]
    return -mx.minimum(ratio * advantages, mx.clip(ratio, low, high) * advantages)


def _bounds(given: Given, config: Mapping[str, float]) -> tuple[mx.array | float, mx.array | float]:
    """Return the bounds of a ratio: an example's own, one for each token, come before those of the request."""
    return given.get(LOW, config[LOW]), given.get(HIGH, config[HIGH])


@dataclass(frozen=True)
class LossRow:
    """A loss by name.

    Attributes:
        of_tokens: the function.
        needs: the inputs that every example must bring.
        may: inputs that it may bring.
        config: the numbers that a request may set, with their defaults; None: it must set it.
    """

    of_tokens: TokenLoss
    needs: tuple[str, ...] = SAMPLED
    may: tuple[str, ...] = ()
    config: Mapping[str, float | None] | None = None


# PPO's and CISPO's bounds are Tinker's. Its documentation does not say those of GSPO, so they are those of the paper's section 5.1.
PPO_BOUNDS, GSPO_BOUNDS = {LOW: 0.8, HIGH: 1.2}, {LOW: 1 - 3e-4, HIGH: 1 + 4e-4}
LOSSES: Mapping[str, LossRow] = {
    "cross_entropy": LossRow(cross_entropy, needs=(), may=("weights",)),
    "importance_sampling": LossRow(importance_sampling),
    "ppo": LossRow(ppo, may=(LOW, HIGH), config=PPO_BOUNDS),
    "cispo": LossRow(cispo, may=(LOW, HIGH), config=PPO_BOUNDS),
    "dro": LossRow(dro, config={"beta": None}),
    "gspo": LossRow(gspo, (*SAMPLED, RATIO_MASK), (LOW, HIGH), GSPO_BOUNDS),
}
# Names that Tinker's client knows and this server does not compute.
NOT_HERE = {
    "stable_reinforce": "its formula is not published; use importance_sampling, ppo, cispo or gspo",
    "custom": "custom losses run in the client; give forward_backward_custom a function",
}


def find_loss(name: str, config: Mapping[str, float | str]) -> tuple[LossRow, dict[str, float]]:
    """Return a loss and its numbers.

    Raises:
        InputError: there is no such loss, or its config has something else than the numbers that it takes.
    """
    row = LOSSES.get(name)
    if row is None:
        raise InputError(f"loss_fn {name[:40]!r}: {NOT_HERE.get(name, 'no such loss; use ' + ', '.join(LOSSES))}")
    known = dict(row.config or {})
    strange = [key for key, value in config.items() if key not in known or isinstance(value, str)]
    if strange:
        takes = ", ".join(known) or "nothing"
        raise InputError(
            f"loss_fn_config of {name}: {strange[0][:40]!r} is not a number that it takes; it takes {takes}"
        )
    numbers = {**known, **{key: float(value) for key, value in config.items()}}
    missing = [key for key, value in numbers.items() if value is None]
    if missing:
        raise InputError(
            f"loss_fn_config of {name}: {missing[0]} is missing; give loss_fn_config={{{missing[0]!r}: 0.05}}"
        )
    return row, {key: value for key, value in numbers.items() if value is not None}


# Check the examples of a request, and put them into micro-batches

MOST_COLUMNS = 64


@dataclass(frozen=True)
class Example:
    """One example of a request.

    Attributes:
        tokens: (N,) int32, the inputs.
        targets: (N,) or (N, K) int64, what to predict at each position.
        given: the loss's other inputs by name, each float32 and shaped like `targets`.
    """

    tokens: np.ndarray
    targets: np.ndarray
    given: dict[str, np.ndarray]


@dataclass(frozen=True)
class ModelLimits:
    """What a model can take: its vocabulary, and the most tokens of a row."""

    vocabulary: int
    context: int


def check_tokens(tokens: np.ndarray, limits: ModelLimits, what: str) -> None:
    """Refuse token ids without a row in the embedding, which MLX would read from beyond it.

    Raises:
        InputError: there are such ids, or too many or no tokens.
    """
    if not 0 < len(tokens) <= limits.context:
        raise InputError(f"{what}: has {len(tokens)} tokens; give 1 to {limits.context}")
    if tokens.min() < 0 or tokens.max() >= limits.vocabulary:
        wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise InputError(
            f"{what}: token {wrong} is not in the model's vocabulary of {limits.vocabulary}; check the tokenizer"
        )


def check_examples(examples: Sequence[Example], name: str, row: LossRow, limits: ModelLimits) -> None:
    """Refuse what a loss cannot be computed of.

    Raises:
        InputError: names the first example that is wrong, by its place in the request.
    """
    if not examples:
        raise InputError("data: empty; give at least one example")
    for number, example in enumerate(examples):
        what = f"data[{number}]"
        check_tokens(example.tokens, limits, f"{what}.model_input")
        shape = example.targets.shape
        if len(shape) not in (1, 2) or shape[0] != len(example.tokens):
            raise InputError(
                f"{what}: target_tokens are {shape}, model_input has {len(example.tokens)} tokens; give as many"
            )
        if len(shape) == 2 and (name != "cross_entropy" or not 0 < shape[1] <= MOST_COLUMNS):
            raise InputError(
                f"{what}: target_tokens are {shape}; several columns, at most {MOST_COLUMNS}, go with cross_entropy"
            )
        check_tokens(
            example.targets.reshape(-1), ModelLimits(limits.vocabulary, example.targets.size), f"{what}.target_tokens"
        )
        missing = ", ".join(one for one in row.needs if one not in example.given)
        strange = ", ".join(repr(key[:40]) for key in example.given if key not in (*row.needs, *row.may))
        odd = ", ".join(f"{key} are {value.shape}" for key, value in example.given.items() if value.shape != shape)
        uneven = ", ".join(one for one in row.may if (one in example.given) != (one in examples[0].given))
        refuse(
            {
                f"{what}: {name} needs {missing} in loss_fn_inputs": missing,
                f"{what}: {name} does not take {strange} in loss_fn_inputs; leave it out": strange,
                f"{what}: {odd}, target_tokens {shape}; give one for each target": odd,
                f"{what}: {uneven} is in some examples' loss_fn_inputs only; give it in all or none": uneven,
            }
        )
        if RATIO_MASK in row.needs and not example.given[RATIO_MASK].any():
            raise InputError(f"{what}: {RATIO_MASK} marks no token; mark the sampled ones")


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a request, with the names of a run's batch, so that a joint pass takes it as one.

    Attributes:
        inputs, targets, mask: (B, T).
        positions, weights: (P,), all tokens of the rows, in order, and ones.
        given: the loss's inputs at these positions, (P,) on the device, and `datum`, each position's row.
        rows: (example, column, tokens) of each row.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    given: dict[str, mx.array]
    rows: list[tuple[int, int, int]]
    answers_per_row: ClassVar[int] = 1
    starts: ClassVar[None] = None


def micro_batches(examples: Sequence[Example], row: LossRow, most_positions: int) -> Iterator[MicroBatch]:
    """Yield all rows of a request, the longest first.

    Args:
        examples: checked.
        row: of the loss.
        most_positions: of a micro-batch, padding included; a row that is longer has one of its own.
    """
    rows = [
        (number, column, len(example.tokens))
        for number, example in enumerate(examples)
        for column in range(example.targets.shape[1] if example.targets.ndim == 2 else 1)
    ]
    rows.sort(key=lambda one: -one[2])  # stable: equal requests have equal batches
    names = [name for name in (*row.needs, *row.may) if name in examples[0].given]
    names += ["weights"] if "weights" in row.may and "weights" not in names else []
    while rows:
        count = max(1, most_positions // rows[0][2])
        own, rows = rows[:count], rows[count:]
        shape = (len(own), own[0][2])
        inputs, targets, mask = (np.zeros(shape, kind) for kind in (np.int32, np.int32, bool))
        given: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for place, (number, column, length) in enumerate(own):
            example = examples[number]
            inputs[place, :length], mask[place, :length] = example.tokens, True
            targets[place, :length] = example.targets.reshape(length, -1)[:, column]
            for name in names:
                values = example.given.get(name, np.ones_like(example.targets, np.float32))
                given[name].append(values.reshape(length, -1)[:, column])
        positions = np.flatnonzero(mask).astype(np.int32)
        datum = np.repeat(np.arange(len(own), dtype=np.int32), [length for _, _, length in own])
        flat = {name: mx.array(np.concatenate(values).astype(np.float32)) for name, values in given.items()}
        weights = np.ones(len(positions), np.float32)
        yield MicroBatch(inputs, targets, mask, positions, weights, {**flat, "datum": mx.array(datum)}, own)


# A client's model

MOST_RANK = 1024
# Rows of these lengths decide which kernels are measured; those of other lengths are of the same classes, or get the assumed one.
LENGTHS = (64, 256, 1024)


@dataclass(frozen=True)
class AdamNumbers:
    """The numbers of one optimizer step."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0

    def check(self) -> None:
        """Raise InputError for numbers that would break the adapter."""
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value >= 0 and (value < 1 or name not in ("beta1", "beta2"))):
                given = "grad_clip_norm" if name == "max_grad_norm" else name
                raise InputError(f"adam_params: {given} {value} is out of range; see Tinker's AdamParams")


@dataclass
class TokenRequest:
    """A request for a loss under way.

    Attributes:
        examples, row, numbers, backward: what is asked.
        batches: its rows.
        logprobs: of each example's targets, filled batch by batch.
        loss_sum, sums: of the batches so far: the loss, and the gradient laid out like the masters.
    """

    examples: Sequence[Example]
    row: LossRow
    numbers: dict[str, float]
    batches: list[MicroBatch]
    backward: bool
    logprobs: list[np.ndarray]
    loss_sum: float = 0.0
    sums: dict[str, mx.array] | None = None

    def add(self, batch: MicroBatch, loss_sum: mx.array, logprobs: mx.array, grads: dict[str, mx.array] | None) -> None:
        """Add the results of a micro-batch, which are computed here: one micro-batch's activations at a time."""
        if grads is not None:
            self.sums = grads if self.sums is None else tree_map(mx.add, self.sums, grads)
        mx.eval(loss_sum, logprobs, self.sums or {})
        self.loss_sum += loss_sum.item()
        values, start = np.array(logprobs), 0
        for number, column, length in batch.rows:
            self.logprobs[number].reshape(length, -1)[:, column] = values[start : start + length]
            start += length


class TrainedModel:
    """One adapter that is trained.

    Attributes:
        shape: as it was created.
        taken: optimizer steps.
        exchanged: returns the context in which a model with these layers computes with the kernels of training.
    """

    def __init__(self, base: Base, shape: LoraShape, limits: ModelLimits):
        """Put new factors around a copy of the base's modules.

        Raises:
            InputError: the shape does not fit this base.
        """
        if not 0 < shape.rank <= MOST_RANK:
            raise InputError(f"lora_config: rank {shape.rank}; give 1 to {MOST_RANK}")
        self.shape, self.taken, self._base, self._limits = shape, 0, base, limits
        self.model = copy.deepcopy(base.model)  # copies modules, not their arrays
        paths = chosen_paths(self.model, base.config, shape)
        self.targets: Targets = targets_of(self.model, paths)
        adapt_layers(self.model, dict.fromkeys(self.targets.paths, (shape.rank, ALPHA / shape.rank)), seed=shape.seed)
        self.model.train()
        self._loss = choose_loss(self.model, base.config)
        lengths = [length for length in LENGTHS if length <= limits.context]
        chosen = choose_model_kernels(self.model, lengths, AUTO, activation_dtype(self.model))
        kernels, _ = check_kernels(self.model, base.config, self._loss, chosen)
        self.exchanged = exchanging(None) if kernels is None else exchanging(attend, kernels)
        self.masters = Masters(self.model, flat=True)
        self.masters.hand_out()
        self.moments = [tree_map(mx.zeros_like, self.masters.arrays) for _ in range(2)]
        self._gradients: dict[str, mx.array] | None = None
        self._most_positions = most_positions(self._loss.kernel == PLAIN_LOGITS, limits.vocabulary)
        mx.eval(self.masters.arrays, self.moments)

    @property
    def nbytes(self) -> int:
        """Bytes of its factors and moments."""
        return 3 * sum(array.nbytes for array in self.masters.arrays.values())

    def info(self) -> AdapterInfo:
        """Return the facts of its adapter folder."""
        scale = ALPHA / self.shape.rank
        return AdapterInfo(
            method="lora", rank=self.shape.rank, alpha=ALPHA, scale=scale, dropout=0.0,
            num_layers=self.targets.num_layers, keys=self.targets.keys, base_model=self._base.model_id,
            base_revision=self._base.revision, base_fingerprint=self._base.fingerprint,
        )  # fmt: skip

    def forward_backward(
        self, examples: Sequence[Example], name: str, config: Mapping[str, float | str], backward: bool = True
    ) -> TokenRequest:
        """Compute the summed loss of examples alone, and add its gradient to the sum; arguments as for `prepare`."""
        return self.run(self.prepare(examples, name, config, backward))

    def run(self, request: TokenRequest) -> TokenRequest:
        """Compute a request alone."""
        for batch in request.batches:
            self.compute(request, batch)
        return self.finish(request)

    def prepare(
        self, examples: Sequence[Example], name: str, config: Mapping[str, float | str], backward: bool = True
    ) -> TokenRequest:
        """Check a request for a loss and its gradient, and cut it into micro-batches.

        Args:
            examples: of the request.
            name, config: the loss and its numbers.
            backward: False: only the loss, and no gradient.

        Raises:
            InputError: the loss cannot be computed of these examples.
        """
        row, numbers = find_loss(name, config)
        check_examples(examples, name, row, self._limits)
        batches = list(micro_batches(examples, row, self._most_positions))
        logprobs = [np.zeros(example.targets.shape, np.float32) for example in examples]
        return TokenRequest(examples, row, numbers, batches, backward, logprobs)

    def compute(self, request: TokenRequest, batch: MicroBatch) -> None:
        """Compute one micro-batch of a request."""

        def loss(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array]:
            logprobs = -self._loss.tokens(model, arrays)
            return request.row.of_tokens(logprobs, batch.given, request.numbers).sum(), logprobs

        arrays = {name: mx.array(getattr(batch, name)) for name in TOKEN_ARRAYS}
        with left_unchanged(self.model), self.exchanged(self.model):
            if not request.backward:
                request.add(batch, *loss(self.model, arrays), None)
                return
            (loss_sum, logprobs), grads = nn.value_and_grad(self.model, loss)(self.model, arrays)
            request.add(batch, loss_sum, logprobs, self.masters.gathered(grads))

    def finish(self, request: TokenRequest) -> TokenRequest:
        """Add a request's gradient to the sum. Only now: one that fails in the middle leaves the sum as it was."""
        if request.sums is not None:
            before = self._gradients
            self._gradients = request.sums if before is None else tree_map(mx.add, before, request.sums)
            mx.eval(self._gradients)
        return request

    def optim_step(self, numbers: AdamNumbers) -> dict[str, float]:
        """Update the factors by the summed gradient, and return numbers to report.

        Raises:
            InputError: there is no gradient, or it is not finite; then nothing changes, except that the sum begins again.
        """
        numbers.check()
        gradients, self._gradients = self._gradients, None
        if gradients is None:
            raise InputError("optim_step: there is no gradient; call forward_backward first")
        norm, factor = clip_scale(gradients, numbers.max_grad_norm)
        if not math.isfinite(norm.item()):
            raise InputError(
                "optim_step: the gradient is not finite, so the model stays as it is; check advantages and weights"
            )
        self.taken += 1
        moved = {
            name: adamw(value, factor * gradients[name], [moment[name] for moment in self.moments], numbers, self.taken)
            for name, value in self.masters.arrays.items()
        }
        self.masters.put({name: one[0] for name, one in moved.items()})
        self.moments = [{name: one[place] for name, one in moved.items()} for place in (1, 2)]
        self.masters.hand_out()
        mx.eval(self.masters.arrays, self.moments, self.model.trainable_parameters())
        return {"unclipped_grad_l2:mean": norm.item(), "optim_step:max": float(self.taken)}

    # --- what is kept of it

    def sampling_factors(self, dtype: mx.Dtype) -> dict[str, LayerFactors]:
        """Return the factors as they are now, for sampling; later steps do not change them."""
        layers = adapter_layers(self.model)
        factors = {
            path: LayerFactors(*layer.serving_factors(dtype), adapts_head=layer.adapts_head)
            for path, layer in layers.items()
        }
        mx.eval([(one.a, one.b) for one in factors.values()])
        return factors

    def state(self) -> dict[str, mx.array]:
        """Return the arrays from which the next steps follow; gradients that wait for a step are not among them."""
        trees = {"masters": self.masters.arrays, "m": self.moments[0], "v": self.moments[1]}
        return {
            f"{part}.{name}": value
            for part, tree in trees.items()
            for name, value in self.masters.by_name(tree).items()
        }

    def restore(self, state: Mapping[str, mx.array], taken: int, optimizer: bool) -> None:
        """Continue from what `state` returned.

        Args:
            state: of a model with the same layers and rank.
            taken: its optimizer steps.
            optimizer: restore moments and steps as well; otherwise Adam begins anew.

        Raises:
            InputError: names or shapes differ.
        """
        own = self.state()
        wrong = [name for name, value in own.items() if name not in state or state[name].shape != value.shape]
        if wrong or state.keys() - own.keys():
            raise InputError(
                f"load_weights: the checkpoint has other layers than this model ({(wrong or ['more'])[0]})"
            )
        parts: dict[str, dict[str, mx.array]] = {"masters": {}, "m": {}, "v": {}}
        for key in own:
            part, _, name = key.partition(".")
            parts[part][name] = state[key] if optimizer or part == "masters" else mx.zeros_like(state[key])
        masters, *self.moments = (self.masters.from_names(part) for part in parts.values())
        self.masters.put(masters)
        self.taken, self._gradients = taken if optimizer else 0, None
        self.masters.hand_out()
        mx.eval(self.masters.arrays, self.moments, self.model.trainable_parameters())


def adamw(
    value: mx.array, gradient: mx.array, moments: Sequence[mx.array], numbers: AdamNumbers, step: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Return a parameter and its two moments after one step; see the module.

    Args:
        value, gradient, moments: of one shape, float32.
        numbers: of the step.
        step: from 1.
    """
    first, second = moments
    first = numbers.beta1 * first + (1 - numbers.beta1) * gradient
    second = numbers.beta2 * second + (1 - numbers.beta2) * mx.square(gradient)
    root = mx.sqrt(second) / math.sqrt(1 - numbers.beta2**step) + numbers.eps
    value = value * (1 - numbers.learning_rate * numbers.weight_decay)
    # A number without a gradient so far stays where it is, also with eps = 0.
    move = mx.where(root > 0, first / mx.where(root > 0, root, 1.0), 0.0)
    return value - numbers.learning_rate / (1 - numbers.beta1**step) * move, first, second


# Checkpoints

WEIGHTS, SAMPLER, EXTERNAL = "weights", "sampler_weights", "external_weights"
KINDS = (WEIGHTS, SAMPLER, EXTERNAL)
SCHEME = "tinker://"
# A model's id is SESSION:train:N, and a session's id is hexadecimal.
RUN = re.compile(r"[0-9a-f]{32}:train:\d{1,6}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
STATE, ARRAYS, ABOUT = "state.json", "state.safetensors", "about.json"
VERSION = 1


@dataclass(frozen=True)
class Place:
    """A checkpoint's name: the model that wrote it, its kind, and its own name; all checked."""

    run: str
    kind: str
    name: str

    @property
    def path(self) -> str:
        """As clients write it."""
        return f"{SCHEME}{self.run}/{self.kind}/{self.name}"

    @classmethod
    def of(cls, run: str, kind: str, name: str) -> Place:
        """Check the three parts.

        Raises:
            InputError: one of them has another form.
        """
        unknown_run = f"training run {run[:80]!r}: no such run on this server; GET /api/v1/training_runs lists them"
        refuse(
            {
                unknown_run: not RUN.fullmatch(run),
                f"checkpoint {kind[:40]!r}/...: must be one of {', '.join(KINDS)}": kind not in KINDS,
                f"checkpoint name {name[:80]!r}: must be at most 128 letters, digits, . _ or -": not NAME.fullmatch(
                    name
                ),
            }
        )
        return cls(run, kind, name)

    @classmethod
    def parse(cls, path: str) -> Place:
        """Read tinker://RUN/KIND/NAME.

        Raises:
            InputError: it has another form.
        """
        parts = path.removeprefix(SCHEME).split("/")
        if not path.startswith(SCHEME) or len(parts) != 3:
            raise InputError(f"checkpoint {path[:120]!r}: write it as {SCHEME}RUN/weights/NAME, as a save returned it")
        return cls.of(*parts)


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk.

    Attributes:
        place: its name.
        shape: of the model.
        base_model: the name that clients give the base.
        fingerprint: of the base.
        taken: optimizer steps.
        sums: checksums by file name.
        about: time, expiry and metadata.
        size_bytes: of its files.
        created, expires: UNIX times, None for never.
    """

    place: Place
    shape: LoraShape
    base_model: str
    fingerprint: str
    taken: int
    sums: dict[str, str]
    about: dict[str, Any]
    size_bytes: int
    created: float
    expires: float | None


class CheckpointFolder:
    """All checkpoints of a server."""

    def __init__(self, root: Path, base_model: str):
        """Use a folder, which may not exist yet.

        Args:
            root: the folder.
            base_model: the name that clients give the base.
        """
        self._root, self._base_model = root, base_model

    def save(self, model: TrainedModel, place: Place, about: dict[str, Any], overwrite: bool = False) -> Stored:
        """Write a checkpoint.

        Args:
            model: to save.
            place: its name.
            about: `expires` and `user_metadata`.
            overwrite: replace an earlier one of the same name.

        Raises:
            InputError: the name is taken.
            RunError: the disk is full.
        """
        folder = self._folder(place)
        if folder.exists() and not overwrite:
            raise InputError(f"{place.path}: exists already; choose another name, or pass overwrite=True")
        with replacing_folder(folder) as temporary:
            save_adapter(temporary, model.model, model.info())
            if place.kind == WEIGHTS:
                save_tensors(temporary / ARRAYS, model.state())
            sums = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
            state = {
                "version": VERSION, "program": __version__, "base_model": self._base_model,
                "base_fingerprint": model.info().base_fingerprint, "shape": asdict(model.shape), "taken": model.taken, "sha256": sums,
            }  # fmt: skip
            (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            (temporary / ABOUT).write_text(json.dumps({"created": time.time(), **about}) + "\n", encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                flush_to_disk(path)
        flush_to_disk(folder.parent)
        return self.read(place)

    def read(self, place: Place) -> Stored:
        """Return what a checkpoint is, without its arrays.

        Raises:
            InputError: there is none, or its state is damaged.
        """
        folder = self._folder(place)
        if not (folder / STATE).is_file():
            raise InputError(f"{place.path}: no such checkpoint on this server; list_checkpoints shows what there is")
        state, about = (
            read_json(folder / STATE, "use another checkpoint"),
            read_json(folder / ABOUT, "use another checkpoint"),
        )
        try:
            shape, taken = LoraShape(**state["shape"]), int(state["taken"])
            sums = {str(key): str(value) for key, value in state["sha256"].items()}
            base_model, fingerprint = str(state["base_model"]), str(state["base_fingerprint"])
            created, expires = float(about.get("created", 0.0)), about.get("expires")
            words = about.get("user_metadata") or {}
            for moment in (created, 0.0 if expires is None else expires):
                datetime.fromtimestamp(moment, UTC)
            kinds = [type(value) for value in (*asdict(shape).values(), *words.values())]
            if state["version"] != VERSION or kinds != [int, int, bool, bool, bool] + [str] * len(words):
                raise ValueError("another version, or values of other types")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError):
            raise InputError(
                f"{place.path}: its {STATE} or {ABOUT} is damaged or of another version; use another checkpoint"
            ) from None
        size = sum(path.stat().st_size for path in folder.iterdir())
        return Stored(place, shape, base_model, fingerprint, taken, sums, about, size, created, expires)

    def arrays(self, stored: Stored) -> dict[str, mx.array]:
        """Return the arrays of a checkpoint from which training can go on, after checking the files.

        Raises:
            InputError: a file is damaged, or it is a checkpoint for sampling.
        """
        folder = self.checked(stored)
        if ARRAYS not in stored.sums:
            raise InputError(f"{stored.place.path}: is for sampling only; load one of save_state, under {WEIGHTS}/")
        read_safetensors_header(folder / ARRAYS)
        return mx.load(str(folder / ARRAYS))  # pyright: ignore[reportReturnType] # of a safetensors file: a dict

    def checked(self, stored: Stored) -> Path:
        """Return a checkpoint's folder, whose files are as they were written.

        Raises:
            InputError: a file is missing or damaged.
        """
        folder = self._folder(stored.place)
        for name in {CONFIG_FILE, WEIGHTS_FILE, *stored.sums}:
            path = folder / Path(name).name
            if not path.is_file() or sha256_of(path) != stored.sums.get(name):
                raise InputError(f"{stored.place.path}: {name} is missing or damaged; use another checkpoint")
        return folder

    def delete(self, place: Place) -> None:
        """Delete a checkpoint.

        Raises:
            InputError: there is none.
        """
        self.read(place)
        shutil.rmtree(self._folder(place))

    def set_expiry(self, place: Place, expires: float | None) -> None:
        """Set when a checkpoint may be deleted: UNIX time, None for never.

        Raises:
            InputError: there is none.
        """
        about = {**self.read(place).about, "expires": expires}
        replace_text(self._folder(place) / ABOUT, json.dumps(about) + "\n")

    def listed(self, run: str | None = None) -> list[Stored]:
        """Return all whole checkpoints, of one run or of all, the newest first."""
        found = []
        for own in sorted(self._root.glob("*.train.*/*/*")):
            try:
                place = Place.of(own.parts[-3].replace(".", ":"), own.parts[-2], own.name)
                if run in (None, place.run):
                    found.append(self.read(place))
            except InputError:
                continue  # another program's folder, or a damaged one: loading it says so
        return sorted(found, key=lambda one: -one.created)

    def delete_expired(self, now: float) -> list[Place]:
        """Delete the checkpoints whose time is over, as their clients asked, and return them."""
        gone = [one.place for one in self.listed() if one.expires is not None and one.expires <= now]
        for place in gone:
            self.delete(place)
        return gone

    def _folder(self, place: Place) -> Path:
        return self._root / place.run.replace(":", ".") / place.kind / place.name


# Tokens of a prompt that are computed at once; with their log-probabilities, all logits of so many are in memory.
PROMPT_PART, SCORED_PART = 512, 128
# The last tokens of an answer in which a stop text is searched, at least.
STOP_WINDOW = 48

# Requests


@dataclass(frozen=True)
class SamplingJob:
    """A request for samples.

    Attributes:
        tokens: the prompt.
        weights: the name of the weights, None for the base.
        samples: how many answers.
        max_tokens: of an answer.
        sampling: how tokens are drawn; sample i has the seed plus i.
        stop_tokens: each ends an answer.
        stop_texts: likewise.
        scores: return the log-probabilities of the prompt, of the last so many tokens; 0: none.
        top_scores: and of so many likeliest tokens at each of them.
    """

    tokens: Sequence[int]
    weights: str | None
    samples: int
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    stop_texts: tuple[str, ...] = ()
    scores: int = 0
    top_scores: int = 0


@dataclass
class SampledSequence:
    """One answer: its tokens, their log-probabilities, the k likeliest tokens at each, and whether it ended by itself."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    stopped: bool = False


@dataclass(frozen=True)
class PromptScores:
    """The log-probabilities of a prompt's tokens, (T,) with NaN where there is none, and (T, k) ids and values, or None."""

    logprobs: np.ndarray
    top_ids: np.ndarray | None = None
    top_values: np.ndarray | None = None


@dataclass(eq=False)
class SampleTicket:
    """A request under way.

    Attributes:
        ask: the request.
        done: is called once, in the worker's thread, with the answer or the error.
        canceled: the answer is no longer wanted.
    """

    ask: SamplingJob
    done: Callable[[SampleTicket | Exception], None]
    canceled: bool = False
    samples: list[SampledSequence] = field(default_factory=list)
    left: int = 0
    prompt: PromptScores | None = None
    number: int | None = None


# Weights


class WeightStore:
    """The weights that can be sampled from, by name; those in use have a number in the routed model."""

    def __init__(self, base: Base):
        """Begin without weights.

        Args:
            base: its arrays are shared; its modules stay as they are.
        """
        self.model = unrouted_twin(base.model)
        self.model.eval()
        self.routing, self._folder = Routing(), Path(tempfile.mkdtemp(prefix="mlx-lora-weights-"))
        self._factors: OrderedDict[str, dict[str, LayerFactors] | Path] = OrderedDict()
        self._numbers: dict[str, int] = {}
        self._users, self._dropped = Counter[str](), set[str]()
        self._layers: dict[int, dict[str, Any]] = {}
        self._next = itertools.count()

    def __contains__(self, name: str) -> bool:
        return name in self._factors

    def put(self, name: str, factors: dict[str, LayerFactors]) -> None:
        """Keep weights under a name that was not used before."""
        self._factors[name] = factors
        resident = [one for one, value in self._factors.items() if not isinstance(value, Path)]
        for old in resident[: max(0, len(resident) - MOST_RESIDENT)]:
            file, arrays = self._folder / f"{next(self._next)}.safetensors", {}
            for path, one in self._factors[old].items():  # pyright: ignore[reportAttributeAccessIssue] # in memory
                arrays |= {f"{path}.a": one.a, f"{path}.b": one.b, f"{path}.head": mx.array(one.adapts_head)}
            save_tensors(file, arrays)
            self._factors[old] = file

    def drop(self, name: str) -> None:
        """Forget weights; requests that reserved them keep them."""
        if self._users[name]:
            self._dropped.add(name)
            return
        kept = self._factors.pop(name, None)
        if isinstance(kept, Path):
            kept.unlink(missing_ok=True)

    def reserve(self, name: str) -> None:
        """Keep weights for one more request, also if they are dropped meanwhile, until `release`."""
        self._users[name] += 1

    def number(self, name: str) -> int:
        """Return the number by which rows use weights, which are in the layers from now on.

        Raises:
            InputError: there are none of this name.
        """
        kept = self._factors.get(name)
        if kept is None:
            raise InputError("sample: these weights are gone, because their session has ended; save them again")
        self._factors.move_to_end(name)
        if name not in self._numbers:
            if isinstance(kept, Path):
                arrays: Any = mx.load(str(kept))
                kept = {
                    path: LayerFactors(
                        *(arrays[f"{path}.{part}"] for part in "ab"), adapts_head=arrays[f"{path}.head"].item()
                    )
                    for path in sorted({name.rpartition(".")[0] for name in arrays})
                }
            number = self._numbers[name] = next(self._next)
            layers: dict[str, Any] = route(self.model, list(kept), self.routing)
            self._layers[number] = layers
            for path, layer in layers.items():
                layer.pools.put(number, kept[path])
                layer.pools.settle()
        return self._numbers[name]

    def release(self, name: str) -> None:
        """End what `reserve` began for a request; weights without one leave the layers."""
        self._users[name] -= 1
        if self._users[name]:
            return
        if (number := self._numbers.pop(name, None)) is not None:
            for layer in self._layers.pop(number).values():
                layer.pools.drop(number)
        if name in self._dropped:
            self._dropped.remove(name)
            self.drop(name)

    def close(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._folder, ignore_errors=True)


# Sampling


class SampleLoop:
    """Answers requests for samples, a step at a time."""

    def __init__(self, base: Base, weights: WeightStore, most_rows: int):
        """Prepare.

        Args:
            base: has the tokenizer.
            weights: what is sampled from.
            most_rows: of the running batch.
        """
        self.weights, self._most_rows, self._tokenizer = weights, most_rows, base.hf_tokenizer
        self._model = TokenSteps(weights.model)
        self._waiting: deque[SampleTicket] = deque()
        self._fresh: deque[tuple[SampleTicket, int, list[Any]]] = deque()  # samples whose prompt is computed
        self._batch = RunningBatch(self._model, weights.routing)
        kind = rowless(weights.model)
        self._refusal = f"mlx-lm keeps this model's state in a {kind}, without rows" if kind else ""
        try:
            if not kind and one_row_because(weights.model):
                self._most_rows = 1
        except InputError as error:  # training goes on without samples
            self._refusal = first_line(error)
        self.vocabulary = weights.model(mx.array([[0]])).shape[-1]

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._fresh or len(self._batch))

    def submit(self, ticket: SampleTicket) -> None:
        """Queue a request."""
        if ticket.ask.weights is not None:
            self.weights.reserve(ticket.ask.weights)
        self._waiting.append(ticket)

    def give_up(self, error: Exception) -> None:
        """Answer all requests with an error."""
        tickets = [*self._waiting, *(one[0] for one in self._fresh), *(row.owner[0] for row in self._batch.rows)]
        for ticket in {id(ticket): ticket for ticket in tickets}.values():
            ticket.done(error)

    def step(self) -> None:
        """Compute one prompt, or one token of every row.

        An error of one prompt is its request's answer. An error of a step ends the requests of the batch, and the loop goes on.
        """
        if not self._fresh and self._waiting and len(self._batch) < self._most_rows:
            self._begin(self._waiting.popleft())
        while self._fresh and len(self._batch) < self._most_rows:
            ticket, sample, caches = self._fresh.popleft()
            if not ticket.canceled:
                ask, settings = ticket.ask, ticket.ask.sampling
                seed = None if settings.seed is None else (settings.seed + sample) % 2**63
                sampler, tokens = Sampler(replace(settings, seed=seed), self.vocabulary), list(ask.tokens)
                own = BatchRow((ticket, sample), ticket.number, sampler, tokens[:-1])
                self._batch.join(Prefill(self._model, self.weights.routing, own, tokens[-1:], caches))
            else:
                self._finish(ticket)
        if len(self._batch):
            try:
                leaving: list[BatchRow] = []
                for row, token, likelihoods in self._batch.step():
                    ticket, number = row.owner
                    if ticket.canceled or self._ends(ticket.samples[number], ticket.ask, token, likelihoods):
                        leaving.append(row)
                if leaving:
                    self._batch.leave(leaving)
                for row in leaving:
                    self._finish(row.owner[0])
            except Exception as error:
                tickets = {id(row.owner[0]): row.owner[0] for row in self._batch.rows}
                self._batch = RunningBatch(self._model, self.weights.routing)
                self._fresh = deque(one for one in self._fresh if id(one[0]) not in tickets)
                for ticket in tickets.values():
                    self._answer(ticket, error)

    def _begin(self, ticket: SampleTicket) -> None:
        """Compute a request's prompt, with its log-probabilities if they are wanted."""
        ask = ticket.ask
        try:
            if self._refusal:
                raise InputError(f"sample: {self._refusal}; such a model can only be trained here")
            if ticket.canceled:
                raise InputError("sample: canceled")
            if ask.weights is not None:
                ticket.number = self.weights.number(ask.weights)
            ticket.samples, ticket.left = [SampledSequence() for _ in range(ask.samples)], ask.samples
            caches, ticket.prompt = self._prompt(ask, ticket.number)
        except Exception as error:
            self._answer(ticket, error)
            return
        self._fresh.extend((ticket, sample, caches) for sample in range(ask.samples))

    def _prompt(self, ask: SamplingJob, number: int | None) -> tuple[list[Any], PromptScores | None]:
        """Return the caches of all tokens of a prompt but the last, and its log-probabilities."""
        caches, tokens = make_prompt_cache(self._model.model), list(ask.tokens)
        logprobs = np.full(len(tokens), np.nan, np.float32)
        ids = np.zeros((len(tokens), ask.top_scores), np.int32)
        values = np.full((len(tokens), ask.top_scores), -99999.0, np.float32)  # the protocol's mark of an empty place
        first_scored = len(tokens) - ask.scores if ask.scores else len(tokens)
        start = 0
        while start < len(tokens) - 1:
            scored = start + 1 >= first_scored
            size = SCORED_PART if scored else min(PROMPT_PART, max(first_scored - 1 - start, 1))
            part = tokens[start : min(start + size, len(tokens) - 1)]
            self.weights.routing.rows = (number,)
            logits = self._model(mx.array([part]), cache=caches)
            if scored:
                after = slice(start + 1, start + 1 + len(part))
                logprobs[after], ids[after], values[after] = _scores(logits[0], tokens[after], ask.top_scores)
            mx.eval([cache.state for cache in caches])
            start += len(part)
        if not ask.scores:
            return caches, None
        return caches, PromptScores(logprobs, *((ids, values) if ask.top_scores else ()))

    def _ends(self, sampled: SampledSequence, ask: SamplingJob, token: int, likelihoods: Likelihoods | None) -> bool:
        """Add a token to an answer, and return whether it is the last."""
        sampled.tokens.append(token)
        if likelihoods is not None:
            sampled.logprobs.append(likelihoods.token.item())
            sampled.top.append(likelihoods.top())
        sampled.stopped = token in ask.stop_tokens
        if ask.stop_texts and not sampled.stopped:
            window = max(STOP_WINDOW, *(len(stop.encode()) + 8 for stop in ask.stop_texts))
            text = str(self._tokenizer.decode(sampled.tokens[-window:]))
            sampled.stopped = any(stop in text for stop in ask.stop_texts)
        return sampled.stopped or len(sampled.tokens) >= ask.max_tokens

    def _finish(self, ticket: SampleTicket) -> None:
        """Count an ended row, and answer the request after its last one."""
        ticket.left -= 1
        if not ticket.left:
            self._answer(ticket, InputError("sample: canceled") if ticket.canceled else ticket)

    def _answer(self, ticket: SampleTicket, outcome: SampleTicket | Exception) -> None:
        if ticket.ask.weights is not None:
            self.weights.release(ticket.ask.weights)
        ticket.done(outcome)


def _scores(logits: mx.array, following: list[int], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the log-probabilities of the following tokens, and the likeliest ones, best first, with theirs.

    Args:
        logits: (T, V) of any float dtype.
        following: T tokens.
        count: k.
    """
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.take_along_axis(logprobs, mx.array(following)[:, None], axis=-1)[:, 0]
    if not count:
        return np.array(own), np.zeros((len(following), 0), np.int32), np.zeros((len(following), 0), np.float32)
    ids = mx.argsort(-logprobs, axis=-1)[:, :count]
    return np.array(own), np.array(ids).astype(np.int32), np.array(mx.take_along_axis(logprobs, ids, axis=-1))


# Compute requests of several clients in one pass of their base


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
            batches = {number: one.batches[place] for number, one in requests.items() if place < len(one.batches)}
            together = [number for number in batches if requests[number].backward]
            # A position counts one byte: the room is that of a joint batch, padding included.
            parts = [
                RunBatch(number, batches[number], 1.0)  # pyright: ignore[reportArgumentType] # it has the names of a batch
                for number in together
            ]
            groups = [[part.run for part in group] for group in grouped(parts, self._most_positions)]
            for numbers in [*groups, *([number] for number in batches if number not in together)]:
                if len(numbers) > 1:
                    self._together({number: (requests[number], batches[number]) for number in numbers})
                else:
                    self._models[numbers[0]].compute(requests[numbers[0]], batches[numbers[0]])

    def _together(self, group: Mapping[int, tuple[TokenRequest, MicroBatch]]) -> None:
        """Compute some micro-batches, by the model's number, in one pass."""
        parts = [
            RunBatch(number, batch)  # pyright: ignore[reportArgumentType]
            for number, (_, batch) in group.items()
        ]
        lengths = [len(part.batch.positions) for part in parts]
        shares = [Share(part.run, part.rows, part.width, slots) for part, slots in zip(parts, lengths, strict=True)]
        holders = [self._holders[number] for number in group]
        own = [[layer[name] for _, layer, name in held] for held in holders]

        def loss(parameters: list[list[mx.array]]) -> tuple[mx.array, list[tuple[mx.array, mx.array]]]:
            for held, arrays in zip(holders, parameters, strict=True):
                for (_, layer, name), array in zip(held, arrays, strict=True):
                    layer[name] = array
            logprobs, results = -self._loss.tokens(self._model, joint_arrays(parts)), []
            for (request, batch), piece in zip(group.values(), parts_of(logprobs, lengths), strict=True):
                losses = request.row.of_tokens(piece, batch.given, request.numbers)
                results.append((losses.sum(), piece))
            return mx.stack([one[0] for one in results]).sum(), results

        with self._routing.to(shares, {}), left_unchanged(self._model), self._exchanged(self._model):
            (_, results), gradients = mx.value_and_grad(loss)(own)
        for number, held, (loss_sum, logprobs), grads in zip(group, holders, results, gradients, strict=True):
            named, (request, batch) = {name: one for (name, _, _), one in zip(held, grads, strict=True)}, group[number]
            request.add(batch, loss_sum, logprobs, self._models[number].masters.from_names(named))


# The one thread that uses MLX

log = logging.getLogger(__name__)
T = TypeVar("T")
# Tokens per row that are sampled between two jobs.
STEPS_BETWEEN_JOBS = 8
JOBS_PER_CLEARING = 64
# Models that share a pass, and sets of models that are kept ready for one.
MOST_JOINED, MOST_JOINT_PASSES = 8, 4


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker is set up.

    Attributes:
        model_name: what clients call the base; None: its own name.
        root: folder of the checkpoints.
        most_rows: that are sampled at once.
        max_context: the most tokens of a row; None: the model's own limit.
        adapter_bytes: the most that factors and moments of all models take; None: no limit.
        join_clients: compute requests of several clients in one pass; their last bits then depend on what else is asked.
    """

    root: Path
    model_name: str | None = None
    most_rows: int = 16
    max_context: int | None = None
    adapter_bytes: int | None = None
    join_clients: bool = False


@dataclass(frozen=True)
class TokenJob:
    """A job that computes a loss, which may share a pass with others of its kind.

    Attributes:
        model: returns the model.
        prepare: makes the request.
        answer: makes the job's result.
    """

    model: Callable[[], TrainedModel]
    prepare: Callable[[TrainedModel], TokenRequest]
    answer: Callable[[TokenRequest], Any]

    def __call__(self) -> Any:
        """Compute it alone."""
        model = self.model()
        return self.answer(model.run(self.prepare(model)))


@dataclass(eq=False)
class _Job:
    run: Callable[[], Any]
    future: Future[Any]


class Worker(ModelThread):
    """Holds the base and the clients' models.

    Attributes:
        base, name, limits, checkpoints: set before the constructor returns, and never changed.
        models: by id; only the thread reads and changes them.
    """

    def __init__(self, load: Callable[[], Base], settings: WorkerSettings):
        """Start the thread and wait for the base.

        Args:
            load: loads the base; runs in the thread.
            settings: of the worker.

        Raises:
            InputError: raised by `load`.
        """
        self.models: dict[str, TrainedModel] = {}
        self._settings, self._run_jobs = settings, 0
        self._queues: OrderedDict[str, deque[_Job]] = OrderedDict()
        self._joint: OrderedDict[tuple[str, ...], JointPass] = OrderedDict()
        super().__init__(load, "mlx-lora-training")

    # --- called from any thread

    def do(self, key: str, function: Callable[[], T]) -> Future[T]:
        """Run a function in the thread, after all earlier ones of the same key.

        Raises:
            Stopped: the worker is ending, or has failed.
        """
        future: Future[T] = Future()
        self._send((key, _Job(function, future)))
        return future

    def sample(self, ask: SamplingJob, done: Callable[[SampleTicket | Exception], None]) -> SampleTicket:
        """Queue a request for samples; `done` is called in the thread.

        Raises:
            Stopped: as for `do`.
        """
        ticket = SampleTicket(ask, done)
        self._send(ticket)
        return ticket

    # --- run in the thread, as jobs

    def create(
        self, model_id: str, shape: LoraShape, stored: Stored | None = None, optimizer: bool = False
    ) -> TrainedModel:
        """Make a new model, if there is room.

        Args:
            model_id: names it.
            shape: of its adapter.
            stored: a checkpoint with its weights; None: they are new.
            optimizer: whether it goes on with the checkpoint's moments, too.

        Raises:
            InputError: the shape does not fit the base, or the checkpoint was trained on another base, or is damaged.
        """
        arrays = self.checked_arrays(stored) if stored else {}
        model = TrainedModel(self.base, shape, self.limits)
        if stored:
            model.restore(arrays, stored.taken, optimizer)
        most, held = self._settings.adapter_bytes, sum(one.nbytes for one in self.models.values())
        if most is not None and held + model.nbytes > most:
            raise InputError(
                f"the model takes {model.nbytes / 1e6:.1f} MB beside {held / 1e6:.1f} MB of others, --adapter-memory is "
                f"{most / 1e6:.1f} MB; lower the rank, or end another session"
            )
        self.models[model_id] = model
        return model

    def checked_arrays(self, stored: Stored) -> dict[str, mx.array]:
        """Return the arrays of a checkpoint of this base.

        Raises:
            InputError: as for `create`.
        """
        if stored.fingerprint != self.base.fingerprint:
            raise InputError(
                f"{stored.place.path}: was trained on {stored.base_model} (fingerprint {stored.fingerprint}), this server "
                f"has {self.name} ({self.base.fingerprint}); start a server with that model"
            )
        return self.checkpoints.arrays(stored)

    def read_weights(self, name: str, stored: Stored) -> None:
        """Keep the factors of a checkpoint, to sample from.

        Raises:
            InputError: as for `create`.
        """
        folder = self.checkpoints.checked(stored)
        self.weights.put(name, read_factors(self.base, folder, self.dtype).layers)

    def forget(self, model_ids: list[str], weights: list[str]) -> None:
        """Free models and weights of a session that has ended."""
        for model_id in model_ids:
            self.models.pop(model_id, None)
            for key in [key for key in self._joint if model_id in key]:
                del self._joint[key]
        for name in weights:
            self.weights.drop(name)
        mx.clear_cache()

    # --- the thread

    def _work(self) -> None:
        self._run_one()
        for _ in range(STEPS_BETWEEN_JOBS):
            if self._samples.busy:
                self._samples.step()

    def _prepare(self, base: Base) -> None:
        settings = self._settings
        self.name = settings.model_name or base_name(base)
        self.checkpoints = CheckpointFolder(settings.root, self.name)
        self.dtype = base.model(mx.array([[0]])).dtype
        self.weights = WeightStore(base)
        self._samples = SampleLoop(base, self.weights, settings.most_rows)
        rows = base.token_rows or self._samples.vocabulary
        context = settings.max_context or context_of(base.config) or DEFAULT_CONTEXT
        self.limits = ModelLimits(min(rows, self._samples.vocabulary), context)

    @property
    def _idle(self) -> bool:
        return not self._queues and not self._samples.busy

    def _take(self, message: tuple[str, _Job] | SampleTicket) -> None:
        if isinstance(message, SampleTicket):
            self._samples.submit(message)
        else:
            self._queues.setdefault(message[0], deque()).append(message[1])

    def _run_one(self) -> None:
        """Run the next job of the queue whose turn it is."""
        if not self._queues:
            return
        key, job = self._next(next(iter(self._queues)))
        joined = {key: job}
        if self._settings.join_clients and isinstance(job.run, TokenJob):
            ready = [other for other, waiting in self._queues.items() if isinstance(waiting[0].run, TokenJob)]
            joined |= dict(self._next(other) for other in ready[: MOST_JOINED - 1] if other != key)
        joined = {key: job for key, job in joined.items() if job.future.set_running_or_notify_cancel()}
        if len(joined) > 1:
            self._run_joined(joined)
        else:
            for job in joined.values():
                self._settle(job, job.run)
        self._run_jobs += 1
        if self._run_jobs % JOBS_PER_CLEARING == 0:
            mx.clear_cache()

    def _next(self, key: str) -> tuple[str, _Job]:
        """Take the next job of a queue, which then waits for its next turn."""
        waiting = self._queues[key]
        job = waiting.popleft()
        if waiting:
            self._queues.move_to_end(key)
        else:
            del self._queues[key]
        return key, job

    def _settle(self, job: _Job, run: Callable[[], Any]) -> None:
        """Give a job's future what `run` returns or raises."""
        try:
            job.future.set_result(run())
        except Exception as error:
            self._fail(job, error)

    @staticmethod
    def _fail(job: _Job, error: Exception) -> None:
        """Give a job's future an error, and log one that is not the client's; called where it is handled."""
        if not isinstance(error, (InputError, RunError)):
            log.exception(f"A request of a client failed: {first_line(error)}")
        job.future.set_exception(error)

    def _run_joined(self, jobs: dict[str, _Job]) -> None:
        """Compute requests for a loss of several models, in one pass where their rows can be stacked."""
        requests: dict[str, TokenRequest] = {}
        for key, job in list(jobs.items()):
            work: TokenJob = job.run  # pyright: ignore[reportAssignmentType] # only such jobs are joined
            try:
                model = work.model()
                if unstackable(model.model) is None:
                    requests[key] = work.prepare(model)
            except Exception as error:  # of one client: the others' requests go on
                self._fail(job, error)
                del jobs[key]
        names = tuple(sorted(requests))
        if len(names) > 1:
            try:
                if names not in self._joint:
                    models = {number: self.models[name] for number, name in enumerate(names)}
                    self._joint[names] = JointPass(self.base, models, POSITIONS)
                    if len(self._joint) > MOST_JOINT_PASSES:
                        self._joint.popitem(last=False)
                self._joint[names].compute({number: requests[name] for number, name in enumerate(names)})
            except Exception as error:
                log.warning(f"Requests of {len(names)} clients are computed one by one: {first_line(error)}")
                self._joint.pop(names, None)
                names = ()
        for key, job in jobs.items():
            work = job.run  # pyright: ignore[reportAssignmentType]
            done = key in names and len(names) > 1
            self._settle(
                job, (lambda work=work, key=key: work.answer(work.model().finish(requests[key]))) if done else work
            )

    def _give_up(self) -> None:
        self._samples.give_up(Stopped("the server is ending"))
        self.weights.close()
        for waiting in self._queues.values():
            for job in waiting:
                if job.future.set_running_or_notify_cancel():  # jobs of a session that has ended are canceled
                    job.future.set_exception(Stopped("the server is ending"))
