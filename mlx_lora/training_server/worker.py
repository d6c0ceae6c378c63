"""Sample answers for clients, several requests and adapters in one batch, between the requests that train.

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

With `join_clients`, requests for a loss that are next in several queues are computed in one pass (joint.py).

A job that fails gives its error to the future, and the thread goes on: no client can end the work of another.
"""

from __future__ import annotations

import copy
import itertools
import logging
import shutil
import tempfile
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_lora.adapters.stacked import Share, holders_of, parts_of, stack_adapters, unstackable
from mlx_lora.api.plan_clients import MOST_RESIDENT, POSITIONS, LoraShape
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
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.models.folder import save_tensors
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
from mlx_lora.trainer.stacked_step import RunBatch, grouped, joint_arrays
from mlx_lora.training_server.models import (
    CheckpointFolder,
    MicroBatch,
    ModelLimits,
    Stored,
    TokenRequest,
    TrainedModel,
)
from mlx_lora.utils.errors import InputError, RunError, first_line

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
        while not self._inbox.empty():
            if (message := self._inbox.get()) is not None:
                self._take(message)
        self._samples.give_up(Stopped("the server is ending"))
        self.weights.close()
        for waiting in self._queues.values():
            for job in waiting:
                if job.future.set_running_or_notify_cancel():  # jobs of a session that has ended are canceled
                    job.future.set_exception(Stopped("the server is ending"))
