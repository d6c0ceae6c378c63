"""Compute requests of several clients in one pass of their base.

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
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from mlx_lora.adapters.stacked import Share, holders_of, parts_of, stack_adapters, unstackable
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.models.head import find_head
from mlx_lora.models.load import Base
from mlx_lora.serving.adapter_store import DEFAULT_CONTEXT, base_name, context_of, read_factors
from mlx_lora.serving.engine import ModelThread, Stopped
from mlx_lora.trainer.stacked_step import RunBatch, grouped, joint_arrays
from mlx_lora.training_server.checkpoints import CheckpointFolder, Stored
from mlx_lora.training_server.examples import MicroBatch, ModelLimits
from mlx_lora.training_server.models import POSITIONS, LoraShape, TokenRequest, TrainedModel
from mlx_lora.training_server.sampler import SampleLoop, SampleTicket, SamplingJob, WeightStore
from mlx_lora.utils.errors import InputError, RunError, first_line


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
            logprobs, results = -self._loss.tokens(self._model, *joint_arrays(parts)), []
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

    def create(self, model_id: str, shape: LoraShape) -> TrainedModel:
        """Make a new model.

        Raises:
            InputError: the shape does not fit the base.
        """
        return self._added(model_id, TrainedModel(self.base, shape, self.limits))

    def create_from(self, model_id: str, stored: Stored, optimizer: bool) -> TrainedModel:
        """Make a new model from a checkpoint.

        Raises:
            InputError: it was trained on another base, or is damaged.
        """
        arrays = self.checked_arrays(stored)
        model = TrainedModel(self.base, stored.shape, self.limits)
        model.restore(arrays, stored.taken, optimizer)
        return self._added(model_id, model)

    def _added(self, model_id: str, model: TrainedModel) -> TrainedModel:
        """Keep a model, if there is room."""
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
            InputError: as for `create_from`.
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
            InputError: as for `create_from`.
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
