"""Translate between Tinker's messages and ours. Types and protocol buffers are those of the `tinker` package itself.

forward_backward    bytes of a ForwardBackwardRequest       -> Examples; TokenRequest -> bytes of a ForwardBackwardOutput
asample             SampleRequest                           -> SamplingJob;  SampleTicket -> bytes of a SampleResponse
all others          pydantic types, as JSON

Sessions of clients, with their models, samplers and futures.

    session  a client that sends heartbeats; owns models and samplers, which are freed when it ends or falls silent
    model    runs its requests in the order of their seq_id, whatever order they arrive in
    sampler  weights to sample from: the base, a checkpoint, or a model's factors as they were saved
    pending  a request's answer, now or later; asking for it waits a while and then says "try again"

Ids hold a session's 128 random bits, so nobody finds another's by guessing; and a session only answers requests with the API key that
began it. Everything here is used from the server's event loop alone.

The protocol's lists: training runs, checkpoints, sessions and samplers; and the download of an adapter folder.

A download's address has a random token, valid for an hour, instead of the API key, because the client fetches files without it.

Serve Tinker's protocol over HTTP: the routes, and what each does with sessions and the worker.

    Guard (utils/guard.py) -> route -> read_request -> Registry -> Worker -> answer, by polling

A request that takes time is answered at once with its id; the client then asks `retrieve_future` until the answer is there. What is wrong
in such a request is told there, too, because the client has numbered it and the model waits for the number.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import secrets
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
import numpy as np
import pydantic
from google.protobuf.message import DecodeError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from tinker import types
from tinker.types.try_again_response import TryAgainResponse

from mlx_lora.api.plan_clients import LoraShape
from mlx_lora.compat.foreign import MESSAGES
from mlx_lora.engine.engine import Stopped
from mlx_lora.exporters.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from mlx_lora.models.generator import Sampling
from mlx_lora.training_server.worker import (
    EXTERNAL,
    KINDS,
    MOST_COLUMNS,
    SAMPLER,
    WEIGHTS,
    AdamNumbers,
    Example,
    ModelLimits,
    Place,
    SampleTicket,
    SamplingJob,
    Stored,
    TokenJob,
    TokenRequest,
    TrainedModel,
    Worker,
    check_tokens,
)
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError, first_line
from mlx_lora.utils.guard import Guard, GuardLimits, error_response, not_here
from mlx_lora.utils.http import ApiError, read_json

pb: Any = MESSAGES.of()
M = TypeVar("M", bound=pydantic.BaseModel)
MOST_SAMPLES, MOST_TOP, MOST_STOPS = 256, 20, 64


def read_request(kind: type[M], body: bytes) -> M:
    """Read a request's JSON body.

    Raises:
        ApiError: it is no JSON, or does not have this type's fields.
    """
    try:
        return kind.model_validate(read_json(body))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise ApiError(422, f"{where}: {first['msg']}", "invalid_request") from None


# Training


def examples_of(data: Sequence[Any]) -> list[Example]:
    """Return the examples of a ForwardBackwardRequest.

    Raises:
        InputError: one of them is malformed, or has images.
    """
    found = []
    for number, datum in enumerate(data):
        what, parts = f"data[{number}]", [np.zeros(0, np.int32)]
        for chunk in datum.model_input:
            kind = chunk.WhichOneof("chunk")
            if kind != "encoded_text":
                raise InputError(f"{what}.model_input: has a {kind}; this server takes text alone")
            parts.append(_numbers(chunk.encoded_text.tokens, np.int32, what))
        tokens = np.concatenate(parts)
        given = {
            name: _tensor(tensor, f"{what}.{name[:40]}", len(tokens)) for name, tensor in datum.loss_fn_inputs.items()
        }
        targets = given.pop("target_tokens", None)
        if targets is None:
            raise InputError(f"{what}: target_tokens are missing in loss_fn_inputs")
        if targets.dtype != np.int64:
            raise InputError(f"{what}.target_tokens: are {targets.dtype}; give int64")
        found.append(Example(tokens, targets, {name: value.astype(np.float32) for name, value in given.items()}))
    return found


def read_train_request(body: bytes) -> Any:
    """Read the body of forward_backward, a ForwardBackwardRequest.

    Raises:
        ApiError: it is no such message.
    """
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise ApiError(
            422, "the body is not a ForwardBackwardRequest; use the tinker package", "invalid_request"
        ) from None
    return message


def _numbers(raw: bytes, kind: Any, what: str) -> np.ndarray:
    if len(raw) % np.dtype(kind).itemsize:
        raise InputError(f"{what}: {len(raw)} bytes are no whole number of {np.dtype(kind).name}")
    return np.frombuffer(raw, kind)


def _tensor(message: Any, what: str, most_rows: int) -> np.ndarray:
    """Return a tensor; one that is sparse has zeros where nothing is listed.

    Args:
        message: the tensor.
        what: its name, for errors.
        most_rows: the example's tokens: no tensor has more rows, so a small sparse one cannot claim to be a huge dense one.

    Raises:
        InputError: its parts do not fit together.
    """
    kind = {pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_INT64: np.int64}.get(message.dtype)
    if kind is None:
        raise InputError(f"{what}: must be float32 or int64")
    shape: list[int] = list(message.shape)
    if len(shape) > 2 or any(
        not 0 <= size <= most for size, most in zip(shape, (most_rows, MOST_COLUMNS), strict=False)
    ):
        raise InputError(f"{what}: shape {shape[:4]}; give at most ({most_rows}, {MOST_COLUMNS}), a row for each token")
    if not message.HasField("sparse_csr"):
        values = _numbers(message.dense, kind, what)
        if shape and values.size != int(np.prod(shape)):
            raise InputError(f"{what}: has {values.size} numbers, its shape {shape} says otherwise")
        return values.reshape(shape) if shape else values
    values = _numbers(message.sparse_csr.values, kind, what)
    rows, columns = (
        _numbers(part, np.int64, what) for part in (message.sparse_csr.crow_indices, message.sparse_csr.col_indices)
    )
    fits = len(shape) == 2 and len(rows) == shape[0] + 1 and len(columns) == len(values)
    if not fits or rows[0] != 0 or rows[-1] != len(values) or (np.diff(rows) < 0).any():
        raise InputError(f"{what}: is no sparse matrix of shape {shape}")
    if len(columns) and (columns.min() < 0 or columns.max() >= shape[1]):
        raise InputError(f"{what}: has a column outside its shape {shape}")
    dense = np.zeros(shape, kind)
    dense[np.repeat(np.arange(shape[0]), np.diff(rows)), columns] = values
    return dense


def output_bytes(output: TokenRequest) -> bytes:
    """Return the answer to forward_backward; neighboring examples of one width are one record."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    message.metrics["loss:sum"] = output.loss_sum
    for trailing, group in groupby(output.logprobs, lambda array: array.shape[1:]):
        arrays = [np.ascontiguousarray(array, np.float32) for array in group]
        record = message.loss_fn_outputs.add(num_datums=len(arrays))
        column = record.fields["logprobs"]
        column.data = b"".join(array.tobytes() for array in arrays)
        column.offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64).tobytes()
        column.dtype = pb.DTYPE_FLOAT32
        column.trailing_shape.extend(trailing)
    return message.SerializeToString()


# Sampling


def read_ask(
    request: types.SampleRequest, weights: str | None, model: ModelLimits, most_tokens: int, ends: frozenset[int]
) -> SamplingJob:
    """Return a request for samples.

    Args:
        request: of the client.
        weights: their name; None: the base's.
        model: its limits.
        most_tokens: new ones of a sample.
        ends: tokens that end an answer by themselves.

    Raises:
        InputError: it asks for what this server does not do, or for too much.
    """
    prompt: Any = request.prompt
    for chunk in prompt.chunks:
        if not isinstance(chunk, types.EncodedTextChunk):
            raise InputError(f"prompt: has a {type(chunk).__name__}; this server takes text alone")
    tokens = [token for chunk in prompt.chunks for token in chunk.tokens]
    check_tokens(np.array(tokens or [], np.int64), model, "prompt")
    params = request.sampling_params
    room = model.context - len(tokens)
    most = min(most_tokens, room) if params.max_tokens is None else params.max_tokens
    if not 0 < most <= min(most_tokens, room):
        raise InputError(
            f"max_tokens {most}: with {len(tokens)} tokens in the prompt give 1 to {max(0, min(most_tokens, room))}"
        )
    stop_tokens, stop_texts = _stops(params.stop, ends)
    score = bool(request.prompt_logprobs) or request.topk_prompt_logprobs > 0
    last = request.prompt_logprobs_last_n
    refused = {
        f"num_samples {request.num_samples}: give 1 to {MOST_SAMPLES}": not 0 < request.num_samples <= MOST_SAMPLES,
        f"topk logprobs: give 0 to {MOST_TOP}": not all(
            0 <= k <= min(MOST_TOP, model.vocabulary - 1)
            for k in (request.topk_prompt_logprobs, request.topk_sample_logprobs)
        ),
        "target_prompt_logprobs: not computed here; use forward with target_tokens": request.target_prompt_logprobs
        is not None,
        "prompt_alt_tokens_k: not computed here; leave it out": request.prompt_alt_tokens_k != 0,
        "record_stability_info: not recorded here; use another loss than stable_reinforce": bool(
            request.record_stability_info
        ),
        "prompt_logprobs_last_n: must be 1 to len(prompt) - 1": last is not None and not 0 < last < len(tokens),
        f"temperature {params.temperature}: must be 0 or more": not 0 <= params.temperature < float("inf"),
        f"top_p {params.top_p}: must be 0 to 1": not 0 <= params.top_p <= 1,
    }
    if problems := [words for words, wrong in refused.items() if wrong]:
        raise InputError("; ".join(problems))
    seed = None if params.seed is None else params.seed % 2**63
    sampling = Sampling(params.temperature, params.top_p, max(0, params.top_k), seed, request.topk_sample_logprobs)
    return SamplingJob(
        tokens, weights, request.num_samples, most, sampling, stop_tokens, stop_texts,
        scores=(last or len(tokens)) if score else 0, top_scores=request.topk_prompt_logprobs,
    )  # fmt: skip


def _stops(stop: Any, end_tokens: frozenset[int]) -> tuple[frozenset[int], tuple[str, ...]]:
    """Return the tokens and the texts that end an answer; without any given, the model's own end tokens do."""
    if stop is None:
        return end_tokens, ()
    given = [stop] if isinstance(stop, str) else list(stop)
    if len(given) > MOST_STOPS or "" in given:
        raise InputError(f"stop: give at most {MOST_STOPS} sequences, none of them empty")
    texts = tuple(one for one in given if isinstance(one, str))
    tokens = frozenset(one for one in given if isinstance(one, int))
    # Texts are searched in what is decoded; an answer that the model has ended would go on without its end tokens.
    return (tokens | end_tokens if texts else tokens), texts


def answer_bytes(answer: SampleTicket, top: int) -> bytes:
    """Return the answer to a request for samples.

    Args:
        answer: of the sampler.
        top: how many likeliest tokens were asked for at each sampled one.
    """
    message = pb.SampleResponse()
    for sampled in answer.samples:
        own = message.sequences.add()
        own.stop_reason = pb.STOP_REASON_STOP if sampled.stopped else pb.STOP_REASON_LENGTH
        own.tokens = np.array(sampled.tokens, np.int32).tobytes()
        own.logprobs = np.array(sampled.logprobs, np.float32).tobytes()
        if top:
            ids, values = (np.array([[one[part] for one in row] for row in sampled.top]) for part in (0, 1))
            _put_top(own.topk_sampled_logprobs, ids, values)
    if answer.prompt is not None:
        message.prompt_logprobs = answer.prompt.logprobs.astype(np.float32).tobytes()
        if answer.prompt.top_ids is not None and answer.prompt.top_values is not None:
            _put_top(message.topk_prompt_logprobs, answer.prompt.top_ids, answer.prompt.top_values)
    return message.SerializeToString()


def _put_top(message: Any, ids: np.ndarray, values: np.ndarray) -> None:
    message.token_ids, message.logprobs = ids.astype(np.int32).tobytes(), values.astype(np.float32).tobytes()
    message.length, message.k = ids.shape


def words_of(metadata: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Return a client's metadata as texts, bounded.

    Raises:
        ApiError: it is too large.
    """
    if metadata is None:
        return None
    words = {str(key): str(value) for key, value in metadata.items()}
    if sum(len(key) + len(value) for key, value in words.items()) > 16_384:
        raise ApiError(422, "user_metadata: larger than 16 KB", "invalid_request")
    return words


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
            self.answer(pending, InputError("the session has ended"))
        models, weights = list(session.models), list(session.weights)
        with contextlib.suppress(Stopped):
            # After the jobs of its models that are in their queues.
            for number, model_id in enumerate(models or [""]):
                own = weights if number == 0 else []
                self.worker.do(model_id, lambda model_id=model_id, own=own: self.worker.forget([model_id], own))

    # --- what a session holds

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
        await asyncio.wait([pending.answer], timeout=self.limits.poll_s)
        if not pending.answer.done():
            return None
        pending.fetched = pending.fetched or time.monotonic()
        return pending.answer.result()

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
            fetched = {key: now - one.fetched for key, one in session.pending.items() if one.fetched is not None}
            for key in [key for key, age_s in fetched.items() if age_s > KEPT_S]:
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


# The protocol's lists

FILES = "/files/"
TOKEN_S = 3600.0
MOST_TOKENS = 1000
# The protocol's names of our kinds.
TYPES: dict[str, Any] = dict(zip(KINDS, ("training", "sampler", "external"), strict=True))
Handler = Callable[[Request], Awaitable[Response]]


def _paged(request: Request, values: Sequence[Any]) -> tuple[Sequence[Any], types.Cursor]:
    """Return the part of a list that is asked for, and the cursor that says which."""
    asked = [request.query_params.get(name, default) for name, default in (("offset", "0"), ("limit", "20"))]
    if not all(re.fullmatch(r"\d{1,9}", one) for one in asked):
        raise ApiError(422, "limit and offset must be whole numbers", "invalid_request")
    offset, limit = int(asked[0]), min(int(asked[1]), 1000)
    return values[offset : offset + limit], types.Cursor(offset=offset, limit=limit, total_count=len(values))


def expiry(ttl_seconds: int | None) -> float | None:
    """Return when a checkpoint's time is over, UNIX time; None: never.

    Raises:
        ApiError: it is no time to live.
    """
    if ttl_seconds is None:
        return None
    if not 0 < ttl_seconds < 10**9:
        raise ApiError(422, f"ttl_seconds {ttl_seconds}: must be positive, at most 10 years or so", "invalid_request")
    return time.time() + ttl_seconds


def described(stored: Stored) -> types.Checkpoint:
    """Return a checkpoint as the protocol has it."""
    place = stored.place
    return types.Checkpoint(
        checkpoint_id=f"{place.kind}/{place.name}",
        checkpoint_type=TYPES[place.kind],
        time=datetime.fromtimestamp(stored.created, UTC),
        tinker_path=place.path,
        size_bytes=stored.size_bytes,
        user_metadata=stored.about.get("user_metadata"),
        expires_at=None if stored.expires is None else datetime.fromtimestamp(stored.expires, UTC),
    )


class RestRoutes:
    """The lists."""

    def __init__(self, registry: Registry):
        self._registry, self._worker = registry, registry.worker
        self._tokens: dict[str, tuple[Path, float]] = {}

    def routes(self, api: str) -> list[BaseRoute]:
        """Return the routes below `api`, and those of files."""
        run = f"{api}/training_runs/{{run}}"
        one = f"{run}/checkpoints/{{kind}}/{{name}}"
        rows: list[tuple[str, str, Handler]] = [
            ("GET", f"{api}/training_runs", self.runs), ("GET", run, self.run), ("GET", f"{run}/checkpoints", self.checkpoints_of),
            ("DELETE", one, self.delete), ("PUT", f"{one}/ttl", self.set_ttl), ("GET", f"{one}/external_weights_urls", self.urls),
            ("GET", f"{api}/checkpoints", self.checkpoints), ("POST", f"{api}/weights_info", self.weights_info),
            ("GET", f"{api}/sessions", self.sessions), ("GET", f"{api}/sessions/{{session}}", self.session),
            ("GET", f"{api}/samplers/{{sampler}}", self.sampler), ("GET", f"{FILES}{{token}}/{{name}}", self.file),
        ]  # fmt: skip
        return [Route(path, handler, methods=[method]) for method, path, handler in rows]

    # --- runs and checkpoints

    async def runs(self, request: Request) -> Response:
        """GET training_runs: those that live, and those that left checkpoints."""
        stored = await anyio.to_thread.run_sync(self._worker.checkpoints.listed)
        live = [record.id for session in self._own_sessions(request) for record in session.models.values()]
        ids = list(dict.fromkeys([*reversed(live), *(one.place.run for one in stored)]))
        part, cursor = _paged(request, ids)
        runs = [self._run(request, run_id, stored) for run_id in part]
        return reply(types.TrainingRunsResponse(training_runs=runs, cursor=cursor))

    async def run(self, request: Request) -> Response:
        """GET training_runs/RUN."""
        stored = await anyio.to_thread.run_sync(self._worker.checkpoints.listed)
        return reply(self._run(request, request.path_params["run"], stored))

    def _run(self, request: Request, run_id: str, stored: list[Stored]) -> types.TrainingRun:
        own = [one for one in stored if one.place.run == run_id]
        record = next((s.models[run_id] for s in self._own_sessions(request) if run_id in s.models), None)
        if record is None and not own:
            raise not_found("training run", run_id)
        shape = record.shape if record is not None else own[0].shape
        last = max([one.created for one in own] + ([record.last_request] if record is not None else []))

        def newest(kind: str) -> types.Checkpoint | None:
            return next((described(one) for one in own if TYPES[one.place.kind] == kind), None)

        return types.TrainingRun(
            training_run_id=run_id, base_model=self._worker.name if record is not None else own[0].base_model,
            model_owner="local", is_lora=True, lora_rank=shape.rank if isinstance(shape, LoraShape) else None,
            last_request_time=datetime.fromtimestamp(last, UTC), last_checkpoint=newest("training"),
            last_sampler_checkpoint=newest("sampler"), user_metadata=record.metadata if record is not None else None,
        )  # fmt: skip

    async def checkpoints_of(self, request: Request) -> Response:
        """GET training_runs/RUN/checkpoints."""
        own = await anyio.to_thread.run_sync(self._worker.checkpoints.listed, request.path_params["run"])
        return reply(types.CheckpointsListResponse(checkpoints=[described(one) for one in own]))

    async def checkpoints(self, request: Request) -> Response:
        """GET checkpoints: of all runs."""
        part, cursor = _paged(request, await anyio.to_thread.run_sync(self._worker.checkpoints.listed))
        return reply(types.CheckpointsListResponse(checkpoints=[described(one) for one in part], cursor=cursor))

    async def weights_info(self, request: Request) -> Response:
        """POST weights_info: what a client must know to load a checkpoint."""
        asked = read_json(await request.body())
        stored = await anyio.to_thread.run_sync(
            self._worker.checkpoints.read, Place.parse(str(asked.get("tinker_path")))
        )
        shape = stored.shape
        return reply(
            types.WeightsInfoResponse(
                base_model=stored.base_model,
                is_lora=True,
                lora_rank=shape.rank,
                train_unembed=shape.unembed,
                train_mlp=shape.mlp,
                train_attn=shape.attention,
            )
        )

    async def delete(self, request: Request) -> Response:
        """DELETE a checkpoint."""
        await anyio.to_thread.run_sync(self._worker.checkpoints.delete, _place(request))
        return JSONResponse({})

    async def set_ttl(self, request: Request) -> Response:
        """PUT a checkpoint's time to live."""
        seconds = read_json(await request.body()).get("ttl_seconds")
        if not isinstance(seconds, int | None) or isinstance(seconds, bool):
            raise ApiError(422, "ttl_seconds: must be a whole number or null", "invalid_request")
        await anyio.to_thread.run_sync(self._worker.checkpoints.set_expiry, _place(request), expiry(seconds))
        return JSONResponse({})

    # --- downloads

    async def urls(self, request: Request) -> Response:
        """GET the addresses of an adapter folder's files."""
        place = _place(request)
        if place.kind != EXTERNAL:
            raise ApiError(422, "only checkpoints of save_weights_external can be downloaded", "invalid_request")
        stored = await anyio.to_thread.run_sync(self._worker.checkpoints.read, place)
        folder = await anyio.to_thread.run_sync(self._worker.checkpoints.checked, stored)
        now, token = time.monotonic(), secrets.token_urlsafe(32)
        self._tokens = {key: value for key, value in self._tokens.items() if value[1] > now}
        while len(self._tokens) >= MOST_TOKENS:
            del self._tokens[next(iter(self._tokens))]
        self._tokens[token] = folder, now + TOKEN_S
        start = f"{request.url.scheme}://{request.url.netloc}{FILES}{token}"
        urls = {name: f"{start}/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)}
        return reply(
            types.ExternalWeightsUrlsResponse(urls=urls, expires=datetime.now(UTC) + timedelta(seconds=TOKEN_S))
        )

    async def file(self, request: Request) -> Response:
        """GET a file by its token."""
        folder, until = self._tokens.get(request.path_params["token"], (None, 0.0))
        name = request.path_params["name"]
        if folder is None or until <= time.monotonic() or name not in (CONFIG_FILE, WEIGHTS_FILE):
            raise ApiError(404, "no such file, or its hour is over; ask for its address again", "not_found")
        return FileResponse(folder / name)

    # --- sessions

    async def sessions(self, request: Request) -> Response:
        """GET sessions: this client's own."""
        ids = [session.id for session in self._own_sessions(request)]
        part, _ = _paged(request, ids[::-1])
        return reply(types.ListSessionsResponse(sessions=list(part)))

    async def session(self, request: Request) -> Response:
        """GET sessions/ID."""
        session = self._registry.session(request.path_params["session"], owner(request))
        return reply(
            types.GetSessionResponse(
                training_run_ids=list(session.models),
                sampler_ids=list(session.samplers),
                user_metadata=session.metadata,
                display_name=session.display_name,
            )
        )

    async def sampler(self, request: Request) -> Response:
        """GET samplers/ID."""
        found = self._registry.sampler(request.path_params["sampler"], owner(request))
        return reply(types.GetSamplerResponse(sampler_id=found.id, base_model=self._worker.name, model_path=found.path))

    def _own_sessions(self, request: Request) -> list[Any]:
        own = owner(request)
        return [session for session in self._registry.sessions.values() if session.owner == own]


def _place(request: Request) -> Place:
    return Place.of(*(request.path_params[part] for part in ("run", "kind", "name")))


# Serve Tinker's protocol over HTTP

API = "/api/v1"
PROTOBUF = "application/x-protobuf"
# Bodies of this type instead of JSON; a page of another origin cannot send it without permission either.
BINARY = (f"{API}/forward_backward",)
SWEEP_S = 2.0


def make_app(worker: Worker, guard: GuardLimits, limits: SessionLimits, most_tokens: int) -> Starlette:
    """Return the server as an ASGI application, which closes the worker when it ends.

    Args:
        worker: a running worker.
        guard: limits for requests.
        limits: of what clients may hold.
        most_tokens: new tokens of a sample.
    """
    registry, answers = Registry(worker, limits), Counter()
    training = TrainingRoutes(registry, guard, most_tokens)
    rest = RestRoutes(registry)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(registry))
        yield
        sweeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sweeping
        await anyio.to_thread.run_sync(worker.close)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok" if worker.alive else "failed"}, 200 if worker.alive else 503)

    async def as_json(request: Request, error: Any) -> Response:
        if isinstance(error, InputError):
            return error_response(ApiError(404 if "no such" in str(error) else 422, str(error), "invalid_request"))
        if isinstance(error, Stopped):
            return error_response(ApiError(503, str(error), "ending"))
        return error_response(error if isinstance(error, ApiError) else not_here(request, error))

    handlers = dict.fromkeys((ApiError, HTTPException, InputError, Stopped), as_json)
    routes = [Route("/health", health), Route(f"{API}/healthz", health), *training.routes(), *rest.routes(API)]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, limits=guard, answers=answers)],
        exception_handlers=handlers,
        lifespan=lifespan,
    )


async def _sweep(registry: Registry) -> None:
    """From time to time, end what is over."""
    while True:
        await asyncio.sleep(SWEEP_S)
        for session_id in registry.sweep(time.monotonic()):
            console.echo(
                f"session {session_id[:8]} was silent for {registry.limits.silence_s:g} s; its adapters are freed"
            )
        try:
            gone = await anyio.to_thread.run_sync(registry.worker.checkpoints.delete_expired, time.time())
        except (InputError, OSError) as error:  # deleted by someone else, or a disk that is not there: try again
            console.echo(f"checkpoints whose time is over stay for now: {error}")
            continue
        for place in gone:
            console.echo(f"deleted {place.path}, whose time is over")


def reply(message: Any) -> JSONResponse:
    """Return a message of the protocol as JSON."""
    return JSONResponse(message.model_dump(mode="json"))


def owner(request: Request) -> str:
    """Return whose request it is."""
    return hashlib.sha256((request.headers.get("x-api-key", "")).encode()).hexdigest()


class TrainingRoutes:
    """What a training loop asks for."""

    def __init__(self, registry: Registry, guard: GuardLimits, most_tokens: int):
        self._registry, self._worker, self._guard = registry, registry.worker, guard
        self._most_tokens, self._ends = most_tokens, frozenset(self._worker.base.tokenizer.eos_token_ids)

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        # path, kind of the request, handler, and whether that takes a model or the request's owner
        rows: list[tuple[str, Any, Callable[[Any, Any], Any], bool]] = [
            ("client/config", types.ClientConfigRequest, self.client_config, False),
            ("create_session", types.CreateSessionRequest, self.create_session, False),
            ("session_heartbeat", types.SessionHeartbeatRequest, self.heartbeat, False),
            ("create_model", types.CreateModelRequest, self.create_model, False),
            ("load_weights", types.LoadWeightsRequest, self.load_weights, False),
            ("create_sampling_session", types.CreateSamplingSessionRequest, self.create_sampler, False),
            ("join_sampling_session", types.JoinSamplingSessionRequest, self.join_sampler, False),
            ("asample", types.SampleRequest, self.sample, False),
            ("retrieve_future", types.FutureRetrieveRequest, self.retrieve, False),
            ("cancel_future", types.FutureRetrieveRequest, self.cancel, False),
            ("get_info", types.GetInfoRequest, self.get_info, True),
            ("forward_backward", None, self.forward_backward, True),
            ("optim_step", types.OptimStepRequest, self.optim_step, True),
            ("save_weights", types.SaveWeightsRequest, self.save_weights, True),
            ("save_weights_for_sampler", types.SaveWeightsForSamplerRequest, self.save_for_sampler, True),
            ("save_weights_external", types.SaveWeightsExternalRequest, self.save_external, True),
        ]
        context = self._worker.limits.context
        model = types.SupportedModel(
            model_name=self._worker.name, max_context_length=context, trainable=True, sampleable=True
        )
        settled = {
            ("GET", "get_server_capabilities"): types.GetServerCapabilitiesResponse(supported_models=[model]),
            ("POST", "client/dynamic_config"): types.ClientDynamicConfigResponse(sample_cancel_enabled=True),
            ("POST", "telemetry"): types.TelemetryResponse(status="accepted"),  # and not read
        }
        routes: list[BaseRoute] = [
            Route(f"{API}/{path}", self._endpoint(kind, handler, by_model), methods=["POST"])
            for path, kind, handler, by_model in rows
        ]
        routes += [
            Route(f"{API}/{path}", partial(_always, answer), methods=[method])
            for (method, path), answer in settled.items()
        ]
        return [*routes, Route(f"{API}/sessions/{{session}}/finish", self.finish, methods=["POST"])]

    def _endpoint(self, kind: Any, handler: Callable[[Any, Any], Any], by_model: bool) -> Handler:
        """Return a route's function, which reads the request and answers with a message of the protocol.

        A request that is refused is counted, too: its client has numbered it, and its model waits for the number.

        Args:
            kind: of the request; None: a protocol buffer for a loss.
            handler: takes the request, and its owner or the model that it is of.
            by_model: which of the two.
        """

        async def handle(request: Request) -> Response:
            own, body = owner(request), await request.body()
            try:
                asked = read_train_request(body) if kind is None else read_request(kind, body)
                found = await handler(asked, self._registry.model(asked.model_id, own) if by_model else own)
                return found if isinstance(found, Response) else reply(found)
            except (ApiError, InputError) as error:
                words = {"error": str(error), "category": types.RequestErrorCategory.User.value}
                # The same error comes again if the body is not JSON, the model is unknown, or the client has to try again.
                with contextlib.suppress(ApiError):
                    sent = read_json(body)
                    if isinstance(sent.get("seq_id"), int) and isinstance(sent.get("model_id"), str):
                        self._registry.submit(
                            self._registry.model(sent["model_id"], own), sent["seq_id"], lambda: words
                        )
                raise

        return handle

    # --- the server and its sessions

    async def client_config(self, asked: types.ClientConfigRequest, own: str) -> Any:
        """POST client/config: what the client must know of this server, such as the size of a request's body."""
        return types.ClientConfigResponse(
            parallel_fwdbwd_chunks=True,
            fwdbwd_max_chunk_bytes_count=max(1, self._guard.max_body_bytes // 2),
            sample_max_concurrent_requests=64,
            use_pyqwest_transport=False,
        )

    async def create_session(self, asked: types.CreateSessionRequest, own: str) -> Any:
        """POST create_session."""
        metadata = words_of(asked.user_metadata)
        session = self._registry.begin(own, metadata, (asked.display_name or "")[:200] or None)
        return types.CreateSessionResponse(session_id=session.id)

    async def heartbeat(self, asked: types.SessionHeartbeatRequest, own: str) -> Any:
        """POST session_heartbeat."""
        self._registry.session(asked.session_id, own)
        return types.SessionHeartbeatResponse()

    async def finish(self, request: Request) -> Response:
        """POST sessions/ID/finish."""
        self._registry.end(self._registry.session(request.path_params["session"], owner(request)))
        return JSONResponse({})

    # --- models

    async def create_model(self, asked: types.CreateModelRequest, own: str) -> Any:
        """POST create_model."""
        config = asked.lora_config or types.LoraConfig(rank=32)
        seed = secrets.randbits(31) if config.seed is None else config.seed % 2**63  # one of its own
        shape = LoraShape(config.rank, seed, config.train_attn, config.train_mlp, config.train_unembed)

        def create(record: ModelRecord) -> Any:
            record.shape = self._worker.create(record.id, shape).shape
            return types.CreateModelResponse(model_id=record.id)

        return self._made(asked, own, "create", create)

    async def load_weights(self, asked: types.LoadWeightsRequest, own: str) -> Any:
        """POST load_weights: into a model, or as a new one."""
        checkpoints, worker = self._worker.checkpoints, self._worker
        if asked.session_id is None or asked.model_seq_id is None:
            record = self._registry.model(asked.model_id or "", own)

            def load(model: TrainedModel) -> Any:
                stored = checkpoints.read(Place.parse(asked.path))
                model.restore(worker.checked_arrays(stored), stored.taken, asked.optimizer)
                return types.LoadWeightsResponse(path=asked.path, model_id=record.id)

            return self._submit(record, asked.seq_id, load)

        def create(record: ModelRecord) -> Any:
            stored = checkpoints.read(Place.parse(asked.path))
            record.shape = worker.create(record.id, stored.shape, stored, asked.optimizer).shape
            return types.LoadWeightsResponse(path=asked.path, model_id=record.id)

        return self._made(asked, own, "load", create)

    def _made(self, asked: Any, own: str, what: str, create: Callable[[ModelRecord], Any]) -> Any:
        """Begin a new model, and forget it if that fails.

        Args:
            asked: the request.
            own: its owner.
            what: the request's name in its id.
            create: makes the model, in the worker's thread, and returns the answer.
        """
        session = self._registry.session(asked.session_id, own)
        if asked.base_model is not None:
            self._check_base(asked.base_model)
        if asked.optimizer_config is not None and asked.optimizer_config.type != "adamw":
            kind = asked.optimizer_config.type[:40]
            raise InputError(f"optimizer_config: {kind!r}; this server has Adam alone, so leave it out")
        request_id = f"{session.id}:{what}:{asked.model_seq_id}"
        if request_id in session.pending:
            return promise(session.pending[request_id])
        model_id = f"{session.id}:train:{asked.model_seq_id}"
        if not 0 <= asked.model_seq_id < 10**6 or model_id in session.models:
            raise ApiError(409, f"model_seq_id {asked.model_seq_id}: is taken or out of range", "model_exists")
        if len(session.models) >= self._registry.limits.models:
            raise ApiError(
                403,
                f"the session has {self._registry.limits.models} models, which is the most; begin another",
                "too_many_models",
            )
        record = session.models[model_id] = ModelRecord(model_id, session, words_of(asked.user_metadata))
        pending = self._registry.pending(session, request_id)

        def settle(answer: asyncio.Future[Payload]) -> None:
            if answer.cancelled() or answer.exception() is not None:
                session.models.pop(record.id, None)

        pending.answer.add_done_callback(settle)
        self._registry.run(pending, record.id, lambda: create(record).model_dump(mode="json"))
        return promise(pending)

    def _check_base(self, name: str) -> None:
        """Refuse another base than this server's.

        Raises:
            ApiError: 404.
        """
        if name not in (self._worker.name, self._worker.base.model_id):
            message = (
                f"base_model {name[:120]!r}: this server has {self._worker.name}; use that, or give it --model-name"
            )
            raise ApiError(404, message, "model_not_found")

    async def get_info(self, asked: types.GetInfoRequest, record: ModelRecord) -> Any:
        """POST get_info."""
        name, base = self._worker.name, self._worker.base
        # The tokenizer's id is where the client finds it: a folder of this machine, which only clients on it may see.
        tokenizer = str(base.folder.resolve()) if self._guard.local and not base.revision else base.model_id
        data = types.ModelData(arch=base.config.get("model_type"), model_name=name, tokenizer_id=tokenizer)
        rank = record.shape.rank if record.shape else None
        return types.GetInfoResponse(model_data=data, model_id=record.id, is_lora=True, lora_rank=rank, model_name=name)

    async def forward_backward(self, asked: Any, record: ModelRecord) -> Any:
        """POST forward_backward, with and without the gradient."""
        newer = {
            key: value.text if value.WhichOneof("value") == "text" else value.number
            for key, value in asked.loss_fn_config_v2.items()
        }
        config = newer or dict(asked.loss_fn_config)

        def prepare(model: TrainedModel) -> TokenRequest:
            return model.prepare(examples_of(asked.data), asked.loss_fn, config, not asked.forward_only)

        job = TokenJob(lambda: self._model(record), prepare, output_bytes)
        return promise(self._registry.submit(record, asked.seq_id or None, job))

    async def optim_step(self, asked: types.OptimStepRequest, record: ModelRecord) -> Any:
        """POST optim_step."""

        def step(model: TrainedModel) -> Any:
            params = asked.optim_params
            if not isinstance(params, types.AdamParams):
                kind = type(params).__name__
                raise InputError(f"optim_step: {kind}; this server has Adam alone, so pass AdamParams")
            numbers = AdamNumbers(
                params.learning_rate, params.beta1, params.beta2, params.eps, params.weight_decay, params.grad_clip_norm
            )
            return types.OptimStepResponse(metrics=model.optim_step(numbers))

        return self._submit(record, asked.seq_id, step)

    async def save_weights(self, asked: types.SaveWeightsRequest, record: ModelRecord) -> Any:
        """POST save_weights: a checkpoint from which training goes on."""
        about = {"user_metadata": words_of(asked.user_metadata), "expires": expiry(asked.ttl_seconds)}

        def save(model: TrainedModel) -> Any:
            place = Place.of(record.id, WEIGHTS, asked.path or f"step-{model.taken:06d}")
            stored = self._worker.checkpoints.save(model, place, about, asked.overwrite)
            return types.SaveWeightsResponse(path=stored.place.path)

        return self._submit(record, asked.seq_id, save)

    async def save_external(self, asked: types.SaveWeightsExternalRequest, record: ModelRecord) -> Any:
        """POST save_weights_external: an adapter folder for download."""
        about = {"expires": expiry(asked.ttl_seconds)}

        def save(model: TrainedModel) -> Any:
            if asked.age_encryption_recipients:
                raise InputError("age_encryption_recipients: files are not encrypted here; leave it out")
            stored = self._worker.checkpoints.save(model, Place.of(record.id, EXTERNAL, asked.path), about)
            return types.SaveWeightsExternalResponseInternal(path=stored.place.path, size_bytes=stored.size_bytes)

        return self._submit(record, asked.seq_id, save)

    async def save_for_sampler(self, asked: types.SaveWeightsForSamplerRequest, record: ModelRecord) -> Any:
        """POST save_weights_for_sampler: a checkpoint under a name, or a sampler of the weights as they are now."""
        about = {"user_metadata": words_of(asked.user_metadata), "expires": expiry(asked.ttl_seconds)}
        number = asked.sampling_session_seq_id
        weights = f"{record.id}:{asked.seq_id}:{number}"
        loop = asyncio.get_running_loop()

        def save(model: TrainedModel) -> Any:
            path = sampler_id = None
            if asked.path is not None:
                place = Place.of(record.id, SAMPLER, asked.path)
                path = self._worker.checkpoints.save(model, place, about).place.path
            elif number is None:
                raise InputError("save_weights_for_sampler: give a name, or a sampling_session_seq_id")
            else:
                self._worker.weights.put(weights, model.sampling_factors(self._worker.dtype))
                made = asyncio.run_coroutine_threadsafe(self._sampler_of(record, number, weights, asked.kind), loop)
                sampler_id = made.result(timeout=10)
            return types.SaveWeightsForSamplerResponseInternal(path=path, sampling_session_id=sampler_id)

        return self._submit(record, asked.seq_id, save)

    async def _sampler_of(self, record: ModelRecord, number: int, weights: str, kind: str) -> str:
        """Note a sampler of weights that were just kept."""
        record.session.weights.append(weights)
        if kind != "inflight":
            return self._registry.add_sampler(record.session, number, weights=weights).id
        before, record.inflight = record.inflight, weights
        if before is not None:
            record.session.weights.remove(before)
            self._worker.do(record.id, lambda: self._worker.weights.drop(before))
        return self._registry.add_sampler(record.session, number, inflight_of=record).id

    def _submit(self, record: ModelRecord, seq: int | None, job: Callable[[TrainedModel], Any]) -> Any:
        """Run a job of a model in its turn; it returns a message."""
        return promise(self._registry.submit(record, seq, lambda: job(self._model(record)).model_dump(mode="json")))

    def _model(self, record: ModelRecord) -> TrainedModel:
        """Return a client's model; called in the worker's thread.

        Raises:
            InputError: there is none.
        """
        model = self._worker.models.get(record.id)
        if model is None:
            raise InputError("the model does not exist; its creation failed, or its session has ended")
        return model

    # --- samples

    async def create_sampler(self, asked: types.CreateSamplingSessionRequest, own: str) -> Any:
        """POST create_sampling_session: of the base, or of a checkpoint."""
        session = self._registry.session(asked.session_id, own)
        if asked.base_model is not None:
            self._check_base(asked.base_model)
        what: dict[str, Any] = {}
        if asked.model_path is not None:
            stored = await anyio.to_thread.run_sync(self._worker.checkpoints.read, Place.parse(asked.model_path))
            weights = f"{session.id}:{stored.place.path}:{asked.sampling_session_seq_id}"
            await asyncio.wrap_future(self._worker.do(weights, lambda: self._worker.read_weights(weights, stored)))
            session.weights.append(weights)
            what = {"weights": weights, "path": stored.place.path}
        sampler = self._registry.add_sampler(session, asked.sampling_session_seq_id, **what)
        return types.CreateSamplingSessionResponse(sampling_session_id=sampler.id)

    async def join_sampler(self, asked: types.JoinSamplingSessionRequest, own: str) -> Any:
        """POST join_sampling_session: another process of a client samples, too."""
        session = self._registry.sampler(asked.sampling_session_id, own).session
        session.clones += 1
        return types.JoinSamplingSessionResponse(client_counter=session.clones)

    async def sample(self, asked: types.SampleRequest, own: str) -> Any:
        """POST asample."""
        if asked.sampling_session_id is None or asked.seq_id is None:
            raise ApiError(422, "asample: give sampling_session_id and seq_id", "invalid_request")
        sampler = self._registry.sampler(asked.sampling_session_id, own)
        request_id = f"{sampler.id}:{asked.seq_id}"
        ids = [f"{request_id}:{number}" for number in range(max(0, min(asked.num_samples, MOST_SAMPLES)))]
        known = sampler.session.pending.get(request_id)
        if known is not None:
            return promise(known, ids)
        pending, loop = self._registry.pending(sampler.session, request_id), asyncio.get_running_loop()

        def done(outcome: SampleTicket | Exception) -> None:
            found = outcome if isinstance(outcome, Exception) else answer_bytes(outcome, asked.topk_sample_logprobs)
            loop.call_soon_threadsafe(self._registry.answer, pending, found)

        try:
            model = sampler.inflight_of  # whose weights of now are meant
            weights = sampler.weights if model is None else model.inflight
            ask = read_ask(asked, weights, self._worker.limits, self._most_tokens, self._ends)
            pending.ticket = self._worker.sample(ask, done)
        except (InputError, Stopped) as error:
            self._registry.answer(pending, error)
        return promise(pending, ids)

    async def cancel(self, asked: types.FutureRetrieveRequest, own: str) -> Response:
        """POST cancel_future: samples are no longer wanted."""
        pending = self._registry.session_of(asked.request_id, own).pending.get(asked.request_id)
        if pending is not None and pending.ticket is not None:
            pending.ticket.canceled = True
        return JSONResponse({})

    # --- answers

    async def retrieve(self, asked: types.FutureRetrieveRequest, own: str) -> Any:
        """POST retrieve_future: the answer, a failure, or "try again" after a while."""
        try:
            found = await self._registry.fetch(asked.request_id, own)
        except ApiError:
            raise
        except Exception as error:
            mine = isinstance(error, InputError)
            category = types.RequestErrorCategory.User if mine else types.RequestErrorCategory.Server
            return JSONResponse({"error": str(error) if mine else first_line(error), "category": category.value})
        if found is None:
            return TryAgainResponse(request_id=asked.request_id, queue_state="active")
        return Response(found, media_type=PROTOBUF) if isinstance(found, bytes) else JSONResponse(found)


def promise(pending: Pending, sequence_ids: list[str] | None = None) -> Any:
    """Return the id by which the client asks for the answer."""
    return types.UntypedAPIFuture(request_id=pending.request_id, sample_sequence_ids=sequence_ids)


async def _always(message: Any, request: Request) -> Response:
    """Return a message that is the same for every request."""
    return reply(message)
