"""Sessions of clients, with their models, samplers and futures.

    session  a client that sends heartbeats; owns models and samplers, which are freed when it ends or falls silent
    model    runs its requests in the order of their seq_id, whatever order they arrive in
    sampler  weights to sample from: the base, a checkpoint, or a model's factors as they were saved
    pending  a request's answer, now or later; asking for it waits a while and then says "try again"

Ids hold a session's 128 random bits, so nobody finds another's by guessing; and a session only answers requests with the API key that
began it. Everything here is used from the server's event loop alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.serving.engine import Stopped
from mlx_lora.serving.schema import ApiError
from mlx_lora.training_server.models import LoraShape
from mlx_lora.training_server.sampler import SampleTicket
from mlx_lora.training_server.worker import Worker
from mlx_lora.utils.errors import InputError

# What a request's answer is: bytes of a protocol buffer, or a JSON object.
Payload = bytes | dict[str, Any]
# Seconds after which a request that waits for an earlier one, which never came, fails.
GAP_S = 15.0
# Seconds for which an answer that was fetched can be fetched again, in case it was lost on its way.
KEPT_S = 120.0
# Sessions that have ended, whose clients are told so.
MOST_ENDED = 1000


@dataclass(frozen=True)
class SessionLimits:
    """Limits of what clients may hold.

    Attributes:
        sessions: at the same time.
        models: of a session.
        samplers: of a session.
        waiting: requests of a session that have no answer yet.
        silence_s: seconds without a sign of life after which a session ends.
        poll_s: seconds that a question for an answer waits.
    """

    sessions: int = 16
    models: int = 32
    samplers: int = 10_000
    waiting: int = 2048
    silence_s: float = 120.0
    poll_s: float = 20.0


@dataclass(eq=False)
class Pending:
    """A request's answer.

    Attributes:
        request_id: of the request.
        session: that it belongs to.
        answer: set when it is there; an exception is a failed request.
        ticket: of a request for samples, which can be canceled.
        job: of any other, likewise until it runs.
        fetched: time when the client got the answer, None before.
    """

    request_id: str
    session: Session
    answer: asyncio.Future[Payload]
    ticket: SampleTicket | None = None
    job: Future[Any] | None = None
    fetched: float | None = None


@dataclass(eq=False)
class ModelRecord:
    """A client's model.

    Attributes:
        id, session: its id, and whose it is.
        metadata: that the client gave.
        shape: known when the model exists.
        next_seq: the number of the request that runs next.
        held: requests that came early, by number: what begins them, and when they came.
        last_request: UNIX time.
    """

    id: str
    session: Session
    metadata: dict[str, str] | None = None
    shape: LoraShape | None = None
    next_seq: int = 1
    held: dict[int, tuple[Pending, Callable[[], None], float]] = field(default_factory=dict)
    last_request: float = field(default_factory=time.time)
    inflight: str | None = None  # the weights that its inflight samplers share


@dataclass(frozen=True)
class SamplerRecord:
    """Weights to sample from: `weights` is their name, None for the base, and for inflight samplers the model that has them."""

    id: str
    session: Session
    weights: str | None = None
    path: str | None = None
    inflight_of: ModelRecord | None = None

    @property
    def current(self) -> str | None:
        """The name of the weights that a request uses now."""
        return self.inflight_of.inflight if self.inflight_of is not None else self.weights


@dataclass(eq=False)
class Session:
    """A client."""

    id: str
    owner: str
    metadata: dict[str, str] | None
    display_name: str | None
    last_seen: float
    models: dict[str, ModelRecord] = field(default_factory=dict)
    samplers: dict[str, SamplerRecord] = field(default_factory=dict)
    pending: dict[str, Pending] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    clones: int = 0


def owner_of(key: str) -> str:
    """Return what a session keeps of its API key."""
    return hashlib.sha256(key.encode()).hexdigest()


def not_found(what: str, given: str) -> ApiError:
    """Return the error for an id that this client has not."""
    return ApiError(
        404,
        f"{what} {given[:120]!r}: unknown here; a server that was started again knows only checkpoints",
        "not_found",
    )


class Registry:
    """All sessions of a server."""

    def __init__(self, worker: Worker, limits: SessionLimits):
        """Begin without sessions.

        Args:
            worker: runs the requests.
            limits: of what clients may hold.
        """
        self.worker, self.limits = worker, limits
        self.sessions: dict[str, Session] = {}
        self._ended: dict[str, str] = {}
        self._of_session = len(uuid.uuid4().hex)

    # --- sessions

    def begin(self, owner: str, metadata: dict[str, str] | None, display_name: str | None) -> Session:
        """Begin a session.

        Raises:
            ApiError: 429 if there are too many.
        """
        if len(self.sessions) >= self.limits.sessions:
            message = f"{self.limits.sessions} sessions are open; close one, or raise --max-sessions"
            raise ApiError(429, message, "too_many_sessions", retry_after_s=5)
        session = Session(uuid.uuid4().hex, owner, metadata, display_name, time.monotonic())
        self.sessions[session.id] = session
        return session

    def session(self, session_id: str, owner: str) -> Session:
        """Return an open session of this client, which has shown a sign of life.

        Raises:
            ApiError: 404, or 410 if it has ended.
        """
        session = self.sessions.get(session_id)
        if session is None or session.owner != owner:
            if self._ended.get(session_id) == owner:
                raise ApiError(410, "this session has ended; begin a new one and load a checkpoint", "session_ended")
            raise not_found("session", session_id)
        session.last_seen = time.monotonic()
        return session

    def session_of(self, one_id: str, owner: str) -> Session:
        """Return the session that an id of a model, a sampler or a request belongs to.

        Raises:
            ApiError: as for `session`.
        """
        return self.session(one_id[: self._of_session], owner)

    def end(self, session: Session) -> None:
        """End a session and free what it holds."""
        if self.sessions.pop(session.id, None) is None:
            return
        self._ended[session.id] = session.owner
        while len(self._ended) > MOST_ENDED:
            del self._ended[next(iter(self._ended))]
        for pending in session.pending.values():
            if pending.ticket is not None:
                pending.ticket.canceled = True
            if pending.job is not None:
                pending.job.cancel()
            if not pending.answer.done():
                pending.answer.set_exception(InputError("the session has ended"))
                pending.answer.exception()  # read here, so that nobody has to
        models, weights = list(session.models), list(session.weights)
        with contextlib.suppress(Stopped):
            # After the jobs of its models that are in their queues.
            for number, model_id in enumerate(models or [""]):
                own = weights if number == 0 else []
                self.worker.do(model_id, lambda model_id=model_id, own=own: self.worker.forget([model_id], own))

    # --- what a session holds

    def add_model(self, session: Session, number: int, metadata: dict[str, str] | None) -> ModelRecord:
        """Note a new model.

        Raises:
            ApiError: 409 if its number is taken, 429 if the session has too many.
        """
        model_id = f"{session.id}:train:{number}"
        if not 0 <= number < 10**6 or model_id in session.models:
            raise ApiError(409, f"model_seq_id {number}: is taken or out of range", "model_exists")
        if len(session.models) >= self.limits.models:
            raise ApiError(
                403, f"the session has {self.limits.models} models, which is the most; begin another", "too_many_models"
            )
        record = session.models[model_id] = ModelRecord(model_id, session, metadata)
        return record

    def model(self, model_id: str, owner: str) -> ModelRecord:
        """Return a client's model.

        Raises:
            ApiError: 404 or 410.
        """
        record = self.session_of(model_id, owner).models.get(model_id)
        if record is None:
            raise not_found("model", model_id)
        record.last_request = time.time()
        return record

    def add_sampler(self, session: Session, number: int, **what: Any) -> SamplerRecord:
        """Note a new sampler; a number that is known gives the sampler that has it.

        Raises:
            ApiError: 403 if the session has too many.
        """
        sampler_id = f"{session.id}:sample:{number}"
        if sampler_id in session.samplers:
            return session.samplers[sampler_id]
        if len(session.samplers) >= self.limits.samplers:
            raise ApiError(
                403, f"the session has {self.limits.samplers} samplers, which is the most", "too_many_samplers"
            )
        sampler = session.samplers[sampler_id] = SamplerRecord(sampler_id, session, **what)
        return sampler

    def sampler(self, sampler_id: str, owner: str) -> SamplerRecord:
        """Return a client's sampler.

        Raises:
            ApiError: 404 or 410.
        """
        found = self.session_of(sampler_id, owner).samplers.get(sampler_id)
        if found is None:
            raise not_found("sampling session", sampler_id)
        return found

    # --- requests

    def pending(self, session: Session, request_id: str) -> Pending:
        """Note a request.

        Raises:
            ApiError: 429 if too many of the session wait.
        """
        if sum(not one.answer.done() for one in session.pending.values()) >= self.limits.waiting:
            message = f"{self.limits.waiting} requests of this session wait; fetch some answers first"
            raise ApiError(429, message, "too_many_requests", retry_after_s=1)
        made = Pending(request_id, session, asyncio.get_running_loop().create_future())
        session.pending[request_id] = made
        return made

    def submit(self, record: ModelRecord, seq: int | None, job: Callable[[], Payload]) -> Pending:
        """Run a job of a model when its turn has come.

        Args:
            record: the model.
            seq: the request's number, from 1; None: the next one. One that is known gives its request, as when a client repeats it.
            job: runs in the worker's thread.

        Raises:
            ApiError: 410 if the request is over and its answer is gone.
        """
        seq = max([record.next_seq - 1, *record.held]) + 1 if seq is None else seq
        request_id = f"{record.id}:{seq}"
        if request_id in record.session.pending:
            return record.session.pending[request_id]
        if seq < record.next_seq:
            raise ApiError(410, f"request {seq} of this model is over, and its answer is gone", "gone")
        pending = self.pending(record.session, request_id)
        record.held[seq] = pending, lambda: self.run(pending, record.id, job), time.monotonic()
        while record.next_seq in record.held:
            _, begin, _ = record.held.pop(record.next_seq)
            record.next_seq += 1
            begin()
        return pending

    def run(self, pending: Pending, key: str, job: Callable[[], Payload]) -> None:
        """Run a job in the worker, and note its answer."""
        try:
            future = pending.job = self.worker.do(key, job)
        except Stopped as error:
            self.answer(pending, error)
            return
        loop = asyncio.get_running_loop()

        def settle(done: Future[Payload]) -> None:
            error = CancelledError() if done.cancelled() else done.exception()
            loop.call_soon_threadsafe(self.answer, pending, done.result() if error is None else error)

        future.add_done_callback(settle)

    def answer(self, pending: Pending, outcome: Payload | BaseException) -> None:
        """Note the answer of a request."""
        if pending.answer.done():
            return
        if isinstance(outcome, BaseException):
            pending.answer.set_exception(outcome)
            pending.answer.exception()  # read here: a client may never ask
        else:
            pending.answer.set_result(outcome)

    async def fetch(self, request_id: str, owner: str) -> Payload | None:
        """Return the answer of a request, None if it is not there yet.

        Raises:
            ApiError: 404 or 410 if there is no such request.
            Exception: the request failed; this is its error.
        """
        session = self.session_of(request_id, owner)
        pending = session.pending.get(request_id)
        if pending is None:
            raise not_found("request", request_id)
        try:
            found = await asyncio.wait_for(asyncio.shield(pending.answer), self.limits.poll_s)
        except TimeoutError:
            # The answer may come just when the waiting ends; and the request may have failed with a TimeoutError of its own.
            return pending.answer.result() if pending.answer.done() else None
        finally:
            if pending.answer.done():
                pending.fetched = pending.fetched or time.monotonic()
        return found

    # --- from time to time

    def sweep(self, now: float) -> list[str]:
        """End silent sessions, fail requests whose predecessor never came, and drop answers that were fetched.

        Args:
            now: time.monotonic().

        Returns:
            The ids of the sessions that ended.
        """
        silent = [one for one in self.sessions.values() if now - one.last_seen > self.limits.silence_s]
        for session in silent:
            self.end(session)
        for session in self.sessions.values():
            old = [
                key for key, one in session.pending.items() if one.fetched is not None and now - one.fetched > KEPT_S
            ]
            for key in old:
                del session.pending[key]
            for record in session.models.values():
                if not record.held or now - min(since for _, _, since in record.held.values()) <= GAP_S:
                    continue
                why = f"request {record.next_seq} of this model did not arrive, so the ones after it cannot run"
                for pending, _, _ in record.held.values():
                    self.answer(pending, InputError(why))
                record.next_seq = max(record.held) + 1
                record.held.clear()
        return [session.id for session in silent]
