"""The one thread that uses MLX: it trains the clients' models, a request at a time, and samples between two requests.

    do(model, function) -> its queue -> run here -> Future
    sample(ask, done)   -> SampleLoop: some tokens between two jobs -> done(answer)

Each model has a queue of its own, and the thread takes the next job of one queue after the other, so a client that sends a hundred
requests at once does not make another wait for all of them. Within a queue, jobs run in their order.

With `join_clients`, requests for a loss that are next in several queues are computed in one pass (joint.py).

A job that fails gives its error to the future, and the thread goes on: no client can end the work of another.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from mlx_lora.adapters.stacked import unstackable
from mlx_lora.models.load import Base
from mlx_lora.serving.adapter_store import DEFAULT_CONTEXT, base_name, context_of, read_factors
from mlx_lora.training_server.checkpoints import CheckpointFolder, Stored
from mlx_lora.training_server.examples import ModelLimits
from mlx_lora.training_server.joint import JointPass
from mlx_lora.training_server.models import POSITIONS, LoraShape, PassOutput, TokenRequest, TrainedModel
from mlx_lora.training_server.sampler import SampleLoop, SampleResult, SampleTicket, SamplingJob, WeightStore
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, RunError, first_line

log = logging.getLogger(__name__)
T = TypeVar("T")
# Tokens per row that are sampled between two jobs.
STEPS_BETWEEN_JOBS = 8
JOBS_PER_CLEARING = 64
# Models that share a pass, and sets of models that are kept ready for one.
MOST_JOINED, MOST_JOINT_PASSES = 8, 4


class WorkerEnded(Exception):
    """The worker takes no more jobs."""


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
    answer: Callable[[PassOutput], Any]

    def __call__(self) -> Any:
        """Compute it alone."""
        model = self.model()
        request = self.prepare(model)
        for batch in request.batches:
            model.compute(request, batch)
        return self.answer(model.finish(request))


@dataclass(eq=False)
class _Job:
    run: Callable[[], Any]
    future: Future[Any]


class Worker:
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
        self._settings = settings
        self._inbox: queue.SimpleQueue[tuple[str, _Job] | SampleTicket | None] = queue.SimpleQueue()
        self._queues: OrderedDict[str, deque[_Job]] = OrderedDict()
        self._joint: OrderedDict[tuple[str, ...], JointPass] = OrderedDict()
        self._lock, self._ending, self._run_jobs = threading.Lock(), False, 0
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(load, ready), name="mlx-lora-training", daemon=True)
        self._thread.start()
        ready.result()

    # --- called from any thread

    def do(self, key: str, function: Callable[[], T]) -> Future[T]:
        """Run a function in the thread, after all earlier ones of the same key.

        Raises:
            WorkerEnded: the worker is ending, or has failed.
        """
        future: Future[T] = Future()
        self._send((key, _Job(function, future)))
        return future

    def sample(self, ask: SamplingJob, done: Callable[[SampleResult | Exception], None]) -> SampleTicket:
        """Queue a request for samples; `done` is called in the thread.

        Raises:
            WorkerEnded: as for `do`.
        """
        ticket = SampleTicket(ask, done)
        self._send(ticket)
        return ticket

    def close(self, timeout_s: float = 30.0) -> None:
        """End the thread; jobs that wait fail."""
        with self._lock:
            self._ending = True
        self._inbox.put(None)
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and not self._ending

    def _send(self, message: tuple[str, _Job] | SampleTicket) -> None:
        with self._lock:
            if self._ending:
                raise WorkerEnded("the server is ending")
            self._inbox.put(message)

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

    def keep_weights(self, name: str, model: TrainedModel) -> None:
        """Keep a model's factors as they are now, to sample from."""
        self.weights.put(name, model.sampling_factors(self._dtype))

    def read_weights(self, name: str, stored: Stored) -> None:
        """Keep the factors of a checkpoint, to sample from.

        Raises:
            InputError: as for `create_from`.
        """
        folder = self.checkpoints.checked(stored)
        self.weights.put(name, read_factors(self.base, folder, self._dtype).layers)

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

    def _run(self, load: Callable[[], Base], ready: Future[None]) -> None:
        try:
            self._prepare(load())
        except BaseException as error:
            device.end_thread()
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            while self._take_messages():
                self._run_one()
                for _ in range(STEPS_BETWEEN_JOBS):
                    if self._samples.busy:
                        self._samples.step()
        except BaseException as error:
            self.failure = error
            self.on_failure()
            raise
        finally:
            self._give_up()
            device.end_thread()

    def _prepare(self, base: Base) -> None:
        device.set_cache_limit()
        settings = self._settings
        self.base = base
        self.name = settings.model_name or base_name(base)
        self.checkpoints = CheckpointFolder(settings.root, self.name)
        self._dtype = base.model(mx.array([[0]])).dtype
        self.weights = WeightStore(base)
        self._samples = SampleLoop(base, self.weights, settings.most_rows)
        rows = base.token_rows or self._samples.vocabulary
        context = settings.max_context or context_of(base.config) or DEFAULT_CONTEXT
        self.limits = ModelLimits(min(rows, self._samples.vocabulary), context)

    def _take_messages(self) -> bool:
        """Handle the messages in the inbox, and wait for one if there is nothing else to do; return False to end."""
        idle = not self._queues and not self._samples.busy
        while True:
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if message is None:
                return False
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
                self._joint_pass(names).compute({number: requests[name] for number, name in enumerate(names)})
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

    def _joint_pass(self, names: tuple[str, ...]) -> JointPass:
        """Return the pass of some models, by their queues, which are their ids."""
        if names not in self._joint:
            models = {number: self.models[name] for number, name in enumerate(names)}
            self._joint[names] = JointPass(self.base, models, POSITIONS)
            if len(self._joint) > MOST_JOINT_PASSES:
                self._joint.popitem(last=False)
        return self._joint[names]

    def _give_up(self) -> None:
        """Fail all jobs that wait."""
        with self._lock:
            self._ending = True
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, tuple):
                self._queues.setdefault(message[0], deque()).append(message[1])
            elif isinstance(message, SampleTicket):
                message.done(WorkerEnded("the server is ending"))
        self._samples.give_up(WorkerEnded("the server is ending"))
        self.weights.close()
        for waiting in self._queues.values():
            for job in waiting:
                if job.future.set_running_or_notify_cancel():  # jobs of a session that has ended are canceled
                    job.future.set_exception(WorkerEnded("the server is ending"))
