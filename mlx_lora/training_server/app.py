"""Serve Tinker's protocol over HTTP: the routes, and what each does with sessions and the worker.

    Guard (serving/guard.py) -> route -> read_request (protocol.py) -> Registry (sessions.py) -> Worker -> answer, by polling

A request that takes time is answered at once with its id; the client then asks `retrieve_future` until the answer is there. What is wrong
in such a request is told there, too, because the client has numbered it and the model waits for the number.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from tinker import types
from tinker.types.try_again_response import TryAgainResponse

from mlx_lora.serving.guard import Guard, GuardLimits, error_response, not_here
from mlx_lora.serving.schema import ApiError
from mlx_lora.training_server import protocol
from mlx_lora.training_server.checkpoints import EXTERNAL, SAMPLER, WEIGHTS, Place
from mlx_lora.training_server.models import TokenRequest, TrainedModel
from mlx_lora.training_server.rest import FILES, RestRoutes, expiry
from mlx_lora.training_server.sampler import SampleResult
from mlx_lora.training_server.sessions import (
    ModelRecord,
    Payload,
    Pending,
    Registry,
    SessionLimits,
    failure_words,
    owner_of,
)
from mlx_lora.training_server.worker import TokenJob, Worker, WorkerEnded
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError

API = "/api/v1"
PROTOBUF = "application/x-protobuf"
# Bodies of this type instead of JSON; a page of another origin cannot send it without permission either.
BINARY = (f"{API}/forward_backward",)
SWEEP_S = 2.0
Handler = Callable[[Request], Awaitable[Response]]


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
        if isinstance(error, WorkerEnded):
            return error_response(ApiError(503, str(error), "ending"))
        return error_response(error if isinstance(error, ApiError) else not_here(request, error))

    handlers = dict.fromkeys((ApiError, HTTPException, InputError, WorkerEnded), as_json)
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
    return owner_of(request.headers.get("x-api-key", ""))


class TrainingRoutes:
    """What a training loop asks for."""

    def __init__(self, registry: Registry, guard: GuardLimits, most_tokens: int):
        self._registry, self._worker, self._guard = registry, registry.worker, guard
        ends = frozenset(self._worker.base.tokenizer.eos_token_ids)
        self._sample_limits = protocol.SampleLimits(self._worker.limits, most_tokens, ends)

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        posts: dict[str, Handler] = {
            "client/config": self.client_config, "client/dynamic_config": self.dynamic_config, "telemetry": self.telemetry,
            "create_session": self.create_session, "session_heartbeat": self.heartbeat, "create_model": self.create_model,
            "get_info": self.get_info, "forward_backward": self.forward_backward, "optim_step": self.optim_step,
            "save_weights": self.save_weights, "save_weights_for_sampler": self.save_for_sampler,
            "save_weights_external": self.save_external, "load_weights": self.load_weights,
            "create_sampling_session": self.create_sampler, "join_sampling_session": self.join_sampler, "asample": self.sample,
            "retrieve_future": self.retrieve, "cancel_future": self.cancel, "sessions/{session}/finish": self.finish,
        }  # fmt: skip
        return [
            Route(f"{API}/get_server_capabilities", self.capabilities),
            *(Route(f"{API}/{path}", self._in_turn(handler), methods=["POST"]) for path, handler in posts.items()),
        ]

    def _in_turn(self, handler: Handler) -> Handler:
        """Count a request that is refused, too: its client has numbered it, and its model waits for the number."""

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except (ApiError, InputError) as error:
                words = {"error": str(error), "category": types.RequestErrorCategory.User.value}
                # The same error comes again if the body is not JSON, the model is unknown, or the client has to try again.
                with contextlib.suppress(ApiError):
                    asked = protocol.read_json(await request.body())
                    if isinstance(asked.get("seq_id"), int) and isinstance(asked.get("model_id"), str):
                        record = self._registry.model(asked["model_id"], owner(request))
                        self._registry.submit(record, asked["seq_id"], lambda: words)
                raise

        return handle

    # --- the server and its sessions

    async def capabilities(self, request: Request) -> Response:
        """GET get_server_capabilities: the one model."""
        context = self._worker.limits.context
        model = types.SupportedModel(
            model_name=self._worker.name, max_context_length=context, trainable=True, sampleable=True
        )
        return reply(types.GetServerCapabilitiesResponse(supported_models=[model]))

    async def client_config(self, request: Request) -> Response:
        """POST client/config: what the client must know of this server, such as the size of a request's body."""
        protocol.read_request(types.ClientConfigRequest, await request.body())
        return reply(
            types.ClientConfigResponse(
                parallel_fwdbwd_chunks=True,
                fwdbwd_max_chunk_bytes_count=max(1, self._guard.max_body_bytes // 2),
                sample_max_concurrent_requests=64,
                use_pyqwest_transport=False,
            )
        )

    async def dynamic_config(self, request: Request) -> Response:
        """POST client/dynamic_config."""
        return reply(types.ClientDynamicConfigResponse(sample_cancel_enabled=True))

    async def telemetry(self, request: Request) -> Response:
        """POST telemetry: accepted, and not read."""
        return reply(types.TelemetryResponse(status="accepted"))

    async def create_session(self, request: Request) -> Response:
        """POST create_session."""
        asked = protocol.read_request(types.CreateSessionRequest, await request.body())
        metadata = protocol.words_of(asked.user_metadata)
        session = self._registry.begin(owner(request), metadata, (asked.display_name or "")[:200] or None)
        return reply(types.CreateSessionResponse(session_id=session.id))

    async def heartbeat(self, request: Request) -> Response:
        """POST session_heartbeat."""
        asked = protocol.read_request(types.SessionHeartbeatRequest, await request.body())
        self._registry.session(asked.session_id, owner(request))
        return reply(types.SessionHeartbeatResponse())

    async def finish(self, request: Request) -> Response:
        """POST sessions/ID/finish."""
        self._registry.end(self._registry.session(request.path_params["session"], owner(request)))
        return JSONResponse({})

    # --- models

    async def create_model(self, request: Request) -> Response:
        """POST create_model."""
        asked = protocol.read_request(types.CreateModelRequest, await request.body())
        session = self._registry.session(asked.session_id, owner(request))
        self._check_base(asked.base_model)
        protocol.check_optimizer(asked.optimizer_config)
        shape = protocol.lora_shape(asked.lora_config)
        request_id = f"{session.id}:create:{asked.model_seq_id}"
        if request_id in session.pending:
            return self._promise(session.pending[request_id])
        record = self._registry.add_model(session, asked.model_seq_id, protocol.words_of(asked.user_metadata))

        def create() -> Payload:
            record.shape = self._worker.create(record.id, shape).shape
            return types.CreateModelResponse(model_id=record.id).model_dump(mode="json")

        return self._promise(self._made(record, request_id, create))

    async def get_info(self, request: Request) -> Response:
        """POST get_info."""
        asked = protocol.read_request(types.GetInfoRequest, await request.body())
        record = self._registry.model(asked.model_id, owner(request))
        name = self._worker.name
        # The tokenizer's id is where the client finds it: a folder of this machine, which only clients on it may see.
        base = self._worker.base
        tokenizer = str(base.folder.resolve()) if self._guard.local and not base.revision else base.model_id
        data = types.ModelData(arch=base.config.get("model_type"), model_name=name, tokenizer_id=tokenizer)
        rank = record.shape.rank if record.shape else None
        return reply(
            types.GetInfoResponse(model_data=data, model_id=record.id, is_lora=True, lora_rank=rank, model_name=name)
        )

    async def forward_backward(self, request: Request) -> Response:
        """POST forward_backward, with and without the gradient."""
        asked = protocol.read_train_request(await request.body())
        record = self._registry.model(asked.model_id, owner(request))

        def prepare(model: TrainedModel) -> TokenRequest:
            return model.prepare(asked.examples(), asked.loss, asked.config, asked.backward)

        job = TokenJob(lambda: self._model(record), prepare, protocol.output_bytes)
        return self._promise(self._registry.submit(record, asked.seq or None, job))

    async def optim_step(self, request: Request) -> Response:
        """POST optim_step."""
        asked = protocol.read_request(types.OptimStepRequest, await request.body())
        record = self._registry.model(asked.model_id, owner(request))

        def step(model: TrainedModel) -> Payload:
            metrics = model.optim_step(protocol.adam_numbers(asked.optim_params))
            return types.OptimStepResponse(metrics=metrics).model_dump(mode="json")

        return self._promise(self._submit(record, asked.seq_id, step))

    async def save_weights(self, request: Request) -> Response:
        """POST save_weights: a checkpoint from which training goes on."""
        asked = protocol.read_request(types.SaveWeightsRequest, await request.body())
        record = self._registry.model(asked.model_id, owner(request))
        about = {"user_metadata": protocol.words_of(asked.user_metadata), "expires": expiry(asked.ttl_seconds)}

        def save(model: TrainedModel) -> Payload:
            place = Place.of(record.id, WEIGHTS, asked.path or f"step-{model.taken:06d}")
            stored = self._worker.checkpoints.save(model, place, about, asked.overwrite)
            return types.SaveWeightsResponse(path=stored.place.path).model_dump(mode="json")

        return self._promise(self._submit(record, asked.seq_id, save))

    async def save_external(self, request: Request) -> Response:
        """POST save_weights_external: an adapter folder for download."""
        asked = protocol.read_request(types.SaveWeightsExternalRequest, await request.body())
        record = self._registry.model(asked.model_id, owner(request))
        about = {"expires": expiry(asked.ttl_seconds)}

        def save(model: TrainedModel) -> Payload:
            if asked.age_encryption_recipients:
                raise InputError("age_encryption_recipients: files are not encrypted here; leave it out")
            stored = self._worker.checkpoints.save(model, Place.of(record.id, EXTERNAL, asked.path), about)
            answer = types.SaveWeightsExternalResponseInternal(path=stored.place.path, size_bytes=stored.size_bytes)
            return answer.model_dump(mode="json")

        return self._promise(self._submit(record, asked.seq_id, save))

    async def save_for_sampler(self, request: Request) -> Response:
        """POST save_weights_for_sampler: a checkpoint under a name, or a sampler of the weights as they are now."""
        asked = protocol.read_request(types.SaveWeightsForSamplerRequest, await request.body())
        record = self._registry.model(asked.model_id, owner(request))
        about = {"user_metadata": protocol.words_of(asked.user_metadata), "expires": expiry(asked.ttl_seconds)}
        number = asked.sampling_session_seq_id
        weights = f"{record.id}:{asked.seq_id}:{number}"
        loop = asyncio.get_running_loop()

        def save(model: TrainedModel) -> Payload:
            path = sampler_id = None
            if asked.path is not None:
                place = Place.of(record.id, SAMPLER, asked.path)
                path = self._worker.checkpoints.save(model, place, about).place.path
            elif number is None:
                raise InputError("save_weights_for_sampler: give a name, or a sampling_session_seq_id")
            else:
                self._worker.keep_weights(weights, model)
                made = asyncio.run_coroutine_threadsafe(self._sampler_of(record, number, weights, asked.kind), loop)
                sampler_id = made.result(timeout=10)
            answer = types.SaveWeightsForSamplerResponseInternal(path=path, sampling_session_id=sampler_id)
            return answer.model_dump(mode="json")

        return self._promise(self._submit(record, asked.seq_id, save))

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

    async def load_weights(self, request: Request) -> Response:
        """POST load_weights: into a model, or as a new one."""
        asked = protocol.read_request(types.LoadWeightsRequest, await request.body())
        checkpoints, worker = self._worker.checkpoints, self._worker

        def answer(record: ModelRecord) -> Payload:
            return types.LoadWeightsResponse(path=asked.path, model_id=record.id).model_dump(mode="json")

        if asked.session_id is None or asked.model_seq_id is None:
            record = self._registry.model(asked.model_id or "", owner(request))

            def load(model: TrainedModel) -> Payload:
                stored = checkpoints.read(Place.parse(asked.path))
                model.restore(worker.checked_arrays(stored), stored.taken, asked.optimizer)
                return answer(record)

            return self._promise(self._submit(record, asked.seq_id, load))
        session = self._registry.session(asked.session_id, owner(request))
        if asked.base_model is not None:
            self._check_base(asked.base_model)
        protocol.check_optimizer(asked.optimizer_config)
        request_id = f"{session.id}:load:{asked.model_seq_id}"
        if request_id in session.pending:
            return self._promise(session.pending[request_id])
        record = self._registry.add_model(session, asked.model_seq_id, protocol.words_of(asked.user_metadata))

        def create() -> Payload:
            stored = checkpoints.read(Place.parse(asked.path))
            record.shape = worker.create_from(record.id, stored, asked.optimizer).shape
            return answer(record)

        return self._promise(self._made(record, request_id, create))

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

    def _made(self, record: ModelRecord, request_id: str, create: Callable[[], Payload]) -> Pending:
        """Run what makes a model, and forget the model if that fails."""
        pending = self._registry.pending(record.session, request_id)

        def settle(answer: asyncio.Future[Payload]) -> None:
            if answer.cancelled() or answer.exception() is not None:
                record.session.models.pop(record.id, None)

        pending.answer.add_done_callback(settle)
        self._registry.run(pending, record.id, create)
        return pending

    def _submit(self, record: ModelRecord, seq: int | None, job: Callable[[TrainedModel], Payload]) -> Pending:
        """Run a job of a model in its turn."""

        return self._registry.submit(record, seq, lambda: job(self._model(record)))

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

    async def create_sampler(self, request: Request) -> Response:
        """POST create_sampling_session: of the base, or of a checkpoint."""
        asked = protocol.read_request(types.CreateSamplingSessionRequest, await request.body())
        session = self._registry.session(asked.session_id, owner(request))
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
        return reply(types.CreateSamplingSessionResponse(sampling_session_id=sampler.id))

    async def join_sampler(self, request: Request) -> Response:
        """POST join_sampling_session: another process of a client samples, too."""
        asked = protocol.read_request(types.JoinSamplingSessionRequest, await request.body())
        session = self._registry.sampler(asked.sampling_session_id, owner(request)).session
        session.clones += 1
        return reply(types.JoinSamplingSessionResponse(client_counter=session.clones))

    async def sample(self, request: Request) -> Response:
        """POST asample."""
        asked = protocol.read_request(types.SampleRequest, await request.body())
        if asked.sampling_session_id is None or asked.seq_id is None:
            raise ApiError(422, "asample: give sampling_session_id and seq_id", "invalid_request")
        sampler = self._registry.sampler(asked.sampling_session_id, owner(request))
        request_id = f"{sampler.id}:{asked.seq_id}"
        ids = [f"{request_id}:{number}" for number in range(max(0, min(asked.num_samples, protocol.MOST_SAMPLES)))]
        known = sampler.session.pending.get(request_id)
        if known is not None:
            return self._promise(known, ids)
        pending, loop = self._registry.pending(sampler.session, request_id), asyncio.get_running_loop()

        def done(outcome: SampleResult | Exception) -> None:
            found = (
                outcome
                if isinstance(outcome, Exception)
                else protocol.answer_bytes(outcome, asked.topk_sample_logprobs)
            )
            loop.call_soon_threadsafe(self._registry.answer, pending, found)

        try:
            ask = protocol.read_ask(asked, sampler.current, self._sample_limits)
            pending.ticket = self._worker.sample(ask, done)
        except (InputError, WorkerEnded) as error:
            self._registry.answer(pending, error)
        return self._promise(pending, ids)

    async def cancel(self, request: Request) -> Response:
        """POST cancel_future: samples are no longer wanted."""
        asked = protocol.read_request(types.FutureRetrieveRequest, await request.body())
        pending = self._registry.session_of(asked.request_id, owner(request)).pending.get(asked.request_id)
        if pending is not None and pending.ticket is not None:
            pending.ticket.canceled = True
        return JSONResponse({})

    # --- answers

    def _promise(self, pending: Pending, sequence_ids: list[str] | None = None) -> Response:
        """Return the id by which the client asks for the answer."""
        return reply(types.UntypedAPIFuture(request_id=pending.request_id, sample_sequence_ids=sequence_ids))

    async def retrieve(self, request: Request) -> Response:
        """POST retrieve_future: the answer, a failure, or "try again" after a while."""
        asked = protocol.read_request(types.FutureRetrieveRequest, await request.body())
        try:
            found = await self._registry.fetch(asked.request_id, owner(request))
        except ApiError:
            raise
        except Exception as error:
            words, own = failure_words(error)
            category = types.RequestErrorCategory.User if own else types.RequestErrorCategory.Server
            return JSONResponse({"error": words, "category": category.value})
        if found is None:
            return reply(TryAgainResponse(request_id=asked.request_id, queue_state="active"))
        return Response(found, media_type=PROTOBUF) if isinstance(found, bytes) else JSONResponse(found)


__all__ = ["API", "BINARY", "FILES", "make_app"]
