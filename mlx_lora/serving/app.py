"""Build answers in OpenAI's formats, complete or as chunks of a stream; no error tells clients the paths of the server's machine.

Source: OpenAI's API reference: chat.completion, chat.completion.chunk, text_completion.

Serve OpenAI's completions, the models and adapters, health, metrics and the chat page over HTTP.

    Guard -> routes -> read_chat, read_completion (check the body) -> prompt_tokens -> engine -> EngineResponse -> client

Under /v1/adapters, adapters are listed, loaded and unloaded. A name is never a path. A path is only looked up below one folder that
the operator chose, after following links.

The chat page shows two models side by side in a browser and uses the same endpoints as other clients. It is `pages/chat.html`,
served as a single file, with its scripts `pages/chat.js` and reports/pages/markdown.js and the common tokens.css inside. Its policy
only allows its own script and style to run, whatever a model writes. It has no secrets, so it is served without an API key;
its requests to the server need the key.

Serve adapters with a score head over HTTP: classifiers as vLLM does, and rerankers as clients of Jina and Cohere ask.

    POST /classify, /v1/classify             {"model": NAME, "input": TEXT or [TEXT, ...]}
    POST /v1/decisions                       {"model": NAME, "state": TEXT, "questions": {NAME: {"type": TYPE}}}, as mlx-vlm has it
    POST /rerank, /v1/rerank, /v2/rerank     {"model": NAME, "query": TEXT, "documents": [TEXT or {"text": TEXT}, ...],
                                              "top_n": N, "return_documents": true}

Each adapter is put on a copy of the base's modules, which shares the base's arrays. Texts are scored in the engine's thread, a few
at a time, between two steps of the answers that are being generated.

Serve vectors of texts over HTTP, as OpenAI's clients ask for them: by adapters of --objective embed, and by the base.

    POST /v1/embeddings, /embeddings     {"model": NAME, "input": TEXT, [TEXT, ...], [TOKEN, ...] or [[TOKEN, ...], ...],
                                          "encoding_format": "float" or "base64", "dimensions": N, "input_type": "query"}

The vectors are those of `mlx-lora embed`: normalized, with the pooling and prompts that the adapter or the model was trained with.
OpenAI's request has no word for queries; `input_type` is that of Cohere's, Voyage's and NVIDIA's. Tokens are taken as they
are, without a prompt. The base is served if it is an encoder, or if its folder is sentence-transformers'.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import mlx.core as mx
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from transformers import PreTrainedTokenizerBase

from mlx_lora.api.texts import load_scorer, twin_of
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import LABELED, RANKED
from mlx_lora.config.settings import DataSettings
from mlx_lora.data.chat_template import own_template, template_shows
from mlx_lora.data.examples import Text
from mlx_lora.engine.adapter_store import NAME, AdapterSource, Card, NoRoom, UnknownAdapter, base_name
from mlx_lora.engine.engine import (
    AnswerForms,
    Ask,
    Engine,
    Event,
    PicturePrompt,
    PictureReader,
    QueueFull,
    Request,
    Stopped,
    Usage,
    api_error,
    chat_tokens,
    picture_prompt,
    read_chat,
    read_completion,
)
from mlx_lora.exporters.adapter_folder import with_limits_of_run
from mlx_lora.models.config import is_encoder
from mlx_lora.models.generator import TokenReport
from mlx_lora.objectives.embed import open_embedder, stored_choices
from mlx_lora.objectives.questions import Acting
from mlx_lora.objectives.scored_texts import TextScorer, decision_form, in_order, vllm_form
from mlx_lora.reports import charts
from mlx_lora.rollouts.tool_calls import (
    CallReader,
    Said,
    SaidStream,
)
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.guard import Guard, GuardLimits, error_response, not_here
from mlx_lora.utils.http import ApiError, bad_value, is_number, read_fields, read_json, read_number
from mlx_lora.utils.hub import HUB_ID, resolve_adapter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerLimits:
    """Limits for an answer.

    Attributes:
        max_tokens: the most new tokens.
        max_context: the most tokens of prompt and answer together.
        timeout_s: seconds until it must be complete.
        images_from: folder below which clients may name files of pictures; None: they may name none.
    """

    max_tokens: int
    max_context: int
    timeout_s: float
    images_from: Path | None = None


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, ask: Ask, template: str | None, vocabulary: int) -> list[int]:
    """Return the prompt's tokens.

    Args:
        tokenizer: the base's tokenizer.
        ask: the request.
        template: the adapter's own chat template, which replaces the base's, or None.
        vocabulary: the number of token ids.

    Raises:
        ApiError: a chat has no template, the template refuses it or shows no tools, or a token id does not exist.
    """
    if ask.messages is not None:
        template = template or own_template(tokenizer)
        if not template:
            raise ApiError(400, "this model has no chat template; use /v1/completions", "no_chat_template", "messages")
        try:
            if ask.tools and not template_shows(tokenizer, ask.messages, template, ask.tools):
                message = "tools: this model's chat template does not show them; leave them out"
                raise ApiError(400, message, "no_tools", "tools")
            return chat_tokens(tokenizer, ask.messages, template, vocabulary, ask.tools)
        except InputError as error:
            raise ApiError(400, f"messages: {error}", "template", "messages") from None
    tokens = tokenizer.encode(ask.prompt) if isinstance(ask.prompt, str) else ask.prompt
    if not tokens:
        raise ApiError(400, "prompt: has no tokens; give some text", "invalid_value", "prompt")
    if not all(0 <= token < vocabulary for token in tokens):
        raise ApiError(400, f"prompt: token ids must be from 0 to {vocabulary - 1}", "invalid_value", "prompt")
    return tokens


class ChatReply:
    """Builds the answers of chat/completions; `choices` is what has been told of each, by its index."""

    PREFIX, WHOLE, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: str, reader: CallReader | None = None, parallel: bool = True, counts: Counter | None = None
    ):
        """Begin.

        Args:
            model: its id.
            reader: reads thinking and calls of tools in an answer; None: all of it is text.
            parallel: an answer may have several calls; otherwise the first is told.
            counts: where calls that could not be read are counted.
        """
        self._head = {"id": f"{self.PREFIX}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._reader, self._parallel, self._counts = reader, parallel, Counter() if counts is None else counts
        self._streams: dict[int, SaidStream] = {}
        self._calls: Counter[int] = Counter()
        self._opened: set[int] = set()

    def chunks(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Return the chunks with the new text of a choice, and what else is new in it."""
        pieces = self._pieces(index, event)
        finish = self._finish(event, self._calls[index] > 0)
        return [
            {
                **self._head,
                "object": self.CHUNK,
                "choices": [
                    {
                        "index": index,
                        **piece,
                        "logprobs": None if place else self._logprobs(event.piece.reports),
                        "finish_reason": finish if place == len(pieces) - 1 else None,
                    }
                ],
            }
            for place, piece in enumerate(pieces)
        ]

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk that ends a stream with token counts."""
        return {**self._head, "object": self.CHUNK, "choices": [], "usage": usage_object(usage)}

    def whole(self, answers: Sequence[tuple[str, list[TokenReport], Event]], usage: Usage) -> dict[str, Any]:
        """Return the answers in one piece, each with its text, what is reported of its tokens, and its last event."""
        choices = []
        for index, (text, reports, end) in enumerate(answers):
            content = self._all(index, text)
            finish = self._finish(end, self._calls[index] > 0)
            choices.append({"index": index, **content, "logprobs": self._logprobs(reports), "finish_reason": finish})
        return {**self._head, "object": self.WHOLE, "choices": choices, "usage": usage_object(usage)}

    def _finish(self, event: Event, calls: bool) -> str | None:
        return "tool_calls" if calls and event.finish == "stop" else event.finish

    def _said(self, index: int, text: str, last: bool) -> Said:
        """Return what is new in a choice with some more text, with an id for each call."""
        if self._reader is None:
            return Said(text)
        said = self._streams.setdefault(index, SaidStream(self._reader)).add(text, last)
        if said.unread:
            self._counts[UNREAD] += said.unread
            log.warning("a call of a tool could not be read, and is sent as text: %r", said.content[:200])
        told = self._calls[index]
        calls = said.calls if self._parallel else said.calls[: max(0, 1 - told)]
        self._calls[index] += len(calls)
        made = []
        for place, call in enumerate(calls, told):
            text = call["arguments"]
            text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
            # Of nine letters and digits, as the templates of Mistral want it.
            own = {"index": place, "id": uuid.uuid4().hex[:9], "type": "function"}
            made.append({**own, "function": {"name": call["name"], "arguments": text}})
        return replace(said, calls=made)

    def _pieces(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Return the changes of a choice; the first also has the role, and a call's arguments follow its name."""
        said = self._said(index, event.piece.text, event.last)
        deltas: list[dict[str, Any]] = [{"reasoning_content": said.thinking}] if said.thinking else []
        if said.content or (self._reader is None and not event.last):
            deltas.append({"content": said.content})
        for call in said.calls:
            deltas.append({"tool_calls": [{**call, "function": {**call["function"], "arguments": ""}}]})
            given = {"index": call["index"], "function": {"arguments": call["function"]["arguments"]}}
            deltas.append({"tool_calls": [given]})
        new = index not in self._opened
        if not deltas and (new or event.last or event.piece.reports):
            deltas.append({})
        if new:
            self._opened.add(index)
            deltas[0] = {"role": "assistant", **deltas[0]}
        return [{"delta": delta} for delta in deltas]

    def _all(self, index: int, text: str) -> dict[str, Any]:
        said = self._said(index, text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if said.thinking:
            message["reasoning_content"] = said.thinking
        if said.calls:
            message["content"] = said.content or None
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in said.calls]
        return {"message": message}

    def _logprobs(self, reports: Sequence[TokenReport]) -> dict[str, Any] | None:
        if not reports:
            return None
        content = []
        for report in reports:
            every = [(report.text, report.logprob, report.data), *report.top]
            own, *top = [{"token": text, "logprob": value, "bytes": list(data)} for text, value, data in every]
            content.append({**own, "top_logprobs": top})
        return {"content": content, "refusal": None}


class CompletionReply(ChatReply):
    """Builds the answers of completions."""

    PREFIX, WHOLE, CHUNK = "cmpl", "text_completion", "text_completion"

    def _pieces(self, index: int, event: Event) -> list[dict[str, Any]]:
        return [{"text": event.piece.text}]

    def _all(self, index: int, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, reports: Sequence[TokenReport]) -> dict[str, Any] | None:
        if not reports:
            return None
        return {
            "tokens": [report.text for report in reports],
            "token_logprobs": [report.logprob for report in reports],
            # Texts may be the same, of parts of a character, say: the likeliest of them is kept.
            "top_logprobs": [{text: value for text, value, _ in reversed(report.top)} for report in reports],
            "text_offset": [report.start for report in reports],
        }


def usage_object(usage: Any) -> dict[str, Any]:
    """Return the object with token counts of a Usage, which a last event has."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def client_error(engine: Engine, error: Exception, folders: Iterable[Path] = ()) -> ApiError:
    """Return the error that a client gets, without paths of this machine.

    Args:
        engine: whose base and adapters are known.
        error: of the engine, or one that is an answer already.
        folders: further ones that the text may name.
    """
    told = error if isinstance(error, ApiError) else api_error(error)
    told.args = (without_paths(str(told), engine, folders),)
    return told


def without_paths(text: str, engine: Engine, folders: Iterable[Path] = ()) -> str:
    """Return a text in which the folders of the base and the adapters, and further ones, are only their names."""
    base = engine.base
    known = [*folders, *engine.store.folders, base.folder]
    names = {str(form): folder.name for folder in known for form in (folder, folder.resolve())}
    name = base_name(base)
    names[base.model_id] = Path(name).name if Path(name).is_absolute() else name  # a folder may be gone by now
    for path in sorted((path for path, name in names.items() if name), key=len, reverse=True):
        text = text.replace(path, names[path])
    return text


def make_app(
    engine: Engine,
    guard: GuardLimits,
    limits: AnswerLimits,
    started_s: int,
    more_routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """Return the server as an ASGI application, which closes the engine when it ends.

    Args:
        engine: a running engine.
        guard: limits for requests.
        limits: limits for answers.
        started_s: UNIX time.
        more_routes: routes in addition to the common ones.
    """
    completions, answers = Completions(engine, limits, started_s), Counter()

    async def health(request: HttpRequest) -> Response:
        alive = engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def metrics(request: HttpRequest) -> Response:
        store, prompts = engine.store, engine.prompt_cache
        lines = ["# TYPE mlx_lora_answers_total counter"]
        lines += [
            f'mlx_lora_answers_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(answers.items())
        ]
        totals = {
            **asdict(engine.counts),
            "reused_prompt_tokens": prompts.reused_tokens,
            "adapter_loads": store.loads,
            "adapter_evictions": store.evictions,
            UNREAD: completions.counts[UNREAD],
        }
        now = {
            "running": len(engine.batch),
            "unfinished": engine.unfinished,
            "adapters_known": len(store.cards),
            "adapters_resident": sum(card.resident for card in store.cards.values()),
            "adapter_bytes": store.nbytes,
            "prompt_cache_bytes": prompts.nbytes,
            "prompt_cache_entries": len(prompts),
            "memory_bytes": mx.get_active_memory(),
            "peak_memory_bytes": mx.get_peak_memory(),
        }
        for name, value in totals.items():
            lines += [f"# TYPE mlx_lora_{name}_total counter", f"mlx_lora_{name}_total {value}"]
        for name, value in now.items():
            lines += [f"# TYPE mlx_lora_{name} gauge", f"mlx_lora_{name} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(engine.close)

    cors = Middleware(
        CORSMiddleware,
        allow_origins=guard.origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type"],
    )
    text = (FOLDER / "chat.html").read_text(encoding="utf-8").replace("/* tokens.css */\n", charts.tokens_css())
    for script in SCRIPTS:
        text = text.replace(f"// {script.name}\n", script.read_text(encoding="utf-8"))
    headers = {
        "Content-Security-Policy": policy(text),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",  # frame-ancestors, for old browsers
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }

    async def page(request: HttpRequest) -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    return Starlette(
        routes=[
            Route("/", page, methods=["GET"]),
            Route("/v1/chat/completions", completions.chat, methods=["POST"]),
            Route("/v1/completions", completions.completion, methods=["POST"]),
            Route("/v1/models", completions.models),
            Route("/v1/models/{model:path}", completions.model),
            Route("/health", health),
            Route("/metrics", metrics),
            *more_routes,
        ],
        middleware=[*([cors] if guard.origins else []), Middleware(Guard, limits=guard, answers=answers, known=KNOWN)],
        exception_handlers={ApiError: _as_json, HTTPException: _as_json},
        lifespan=lifespan,
    )


UNREAD = "unread_tool_calls"  # calls of tools that could not be read, and were sent as text


class Completions:
    """The endpoints that generate, and those that list models."""

    def __init__(self, engine: Engine, limits: AnswerLimits, started_s: int):
        self._engine, self._limits = engine, limits
        self._pictures = PictureReader(engine.base, [limits.images_from] if limits.images_from else [])
        self._base_name, self._started_s = base_name(engine.base), started_s
        self._one_at_a_time = anyio.CapacityLimiter(1)  # tokenizers are not thread-safe
        self._forms = AnswerForms(engine)
        self.counts: Counter[str] = Counter()

    async def chat(self, request: HttpRequest) -> EngineResponse:
        """POST /v1/chat/completions."""
        return await self._answer(read_chat(read_json(await request.body())), ChatReply)

    async def completion(self, request: HttpRequest) -> EngineResponse:
        """POST /v1/completions."""
        return await self._answer(read_completion(read_json(await request.body())), CompletionReply)

    async def models(self, request: HttpRequest) -> Response:
        """GET /v1/models."""
        return JSONResponse(
            {"object": "list", "data": [self._model(card) for card in (None, *self._engine.store.cards.values())]}
        )

    async def model(self, request: HttpRequest) -> Response:
        """GET /v1/models/ID."""
        return JSONResponse(self._model(self._card(request.path_params["model"])))

    async def _answer(self, ask: Ask, make_reply: type[ChatReply]) -> EngineResponse:
        if is_encoder(self._engine.base.model):
            message = f"{self._base_name} is an encoder, which writes no text; POST /v1/embeddings has its vectors"
            raise ApiError(400, message, "model_not_supported", "model")
        card = self._card(ask.model)
        tokens, pictures, reader, grammar = await anyio.to_thread.run_sync(
            self._prompt, ask, card, limiter=self._one_at_a_time
        )
        limits, asked = self._limits, ask.max_tokens or 1
        if asked > limits.max_tokens:
            message = f"max_tokens {asked}: this server allows at most {limits.max_tokens}"
            raise ApiError(400, message, "too_many_tokens", "max_tokens")
        room = limits.max_context - len(tokens)
        if room < asked:
            message = f"{len(tokens)} tokens in the prompt and {asked} new ones: the limit is {limits.max_context}"
            raise ApiError(400, message, "context_length_exceeded", "messages")
        most, engine = ask.max_tokens or min(limits.max_tokens, room), self._engine
        if any(token >= engine.vocabulary for token, _ in ask.sampling.logit_bias):
            message = f"logit_bias: token ids must be from 0 to {engine.vocabulary - 1}"
            raise ApiError(400, message, "invalid_value", "logit_bias")
        if ask.n > (queued := engine.limits.max_batch + engine.limits.max_waiting):
            raise ApiError(400, f"n {ask.n}: this server answers at most {queued} at once", "too_many_choices", "n")
        request = Request(
            tokens=tokens,
            adapter=card.name if card else None,
            max_tokens=most,
            sampling=replace(ask.sampling, grammar=grammar),
            stops=ask.stops,
            ignore_eos=ask.ignore_eos,
            continues=ask.messages is None,
            pictures=pictures,
        )
        reply = make_reply(card.name if card else self._base_name, reader, ask.parallel, self.counts)
        return EngineResponse(engine, request, reply, ask, limits.timeout_s)

    def _prompt(
        self, ask: Ask, card: Card | None
    ) -> tuple[list[int], PicturePrompt | None, CallReader | None, str | None]:
        """Return the prompt's tokens and pictures, what reads the answer, and the answer's grammar."""
        template = card.chat_template if card else None
        try:
            if ask.pictures:
                pictures = picture_prompt(self._pictures, ask, template, card.max_pixels if card else None)
                tokens = pictures.tokens
            else:
                pictures = None
                tokens = prompt_tokens(self._engine.base.hf_tokenizer, ask, template, self._engine.vocabulary)
            return tokens, pictures, *self._forms.of(ask, template, tokens)
        except ApiError as error:
            raise client_error(self._engine, error, self._pictures.folders) from None

    def _model(self, card: Card | None) -> dict[str, Any]:
        return {
            "id": card.name if card else self._base_name,
            "object": "model",
            "owned_by": "mlx_lora",
            "created": card.created if card else self._started_s,
            "parent": self._base_name if card else None,
        }

    def _card(self, model: str | None) -> Card | None:
        """Return the adapter that a model id means, None for the base."""
        if model in (None, self._base_name):
            return None
        if model not in self._engine.store.cards:
            raise ApiError(404, f"no model {model!r}; GET /v1/models lists them", "model_not_found", "model")
        return self._engine.store.cards[model]


class EngineResponse:
    """A response that the engine generates, as an ASGI application; its rows are freed when it ends in any way."""

    def __init__(self, engine: Engine, request: Request, reply: ChatReply, ask: Ask, timeout_s: float):
        self._engine, self._request, self._reply, self._ask = engine, request, reply, ask
        self._timeout_s, self._opened = timeout_s, False
        folders = request.pictures.reader.folders if request.pictures else ()
        self._told = partial(client_error, engine, folders=folders)

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Any]) -> None:
        """Answer, all at once or as server-sent events, until the client disconnects.

        Raises:
            ApiError: 429 if the queue is full, 503 if the engine has stopped; or the answer is an error, or is not done in
                time. One after the first event of a stream is sent as an event.
        """
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

        def emit(index: int, event: Event) -> None:
            # The loop is already closed if the process ends while requests are running.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        async def until_gone() -> None:  # after the body, `receive` only tells when the client disconnects
            while (await receive())["type"] != "http.disconnect":
                pass

        tickets = []
        gone = loop.create_task(until_gone())
        answering = loop.create_task(self._stream(send) if self._ask.stream else self._whole(send))
        try:
            for index in range(self._ask.n):
                sampling = self._request.sampling
                if sampling.seed is not None:
                    sampling = replace(sampling, seed=(sampling.seed + index) % 2**63)
                tickets.append(self._engine.submit(replace(self._request, sampling=sampling), partial(emit, index)))
            # A client can also delay the answer by not reading it.
            await asyncio.wait({gone, answering}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
            elif not gone.done():
                message = f"the answer took longer than {self._timeout_s:g} s; ask for fewer tokens"
                raise ApiError(504, message, "timeout")
        except (QueueFull, Stopped) as error:
            raise self._told(error) from None
        except ApiError as error:
            if not self._opened:
                raise
            answering.cancel()
            # The status was already sent, so send the error as an event, unless the client does not read.
            if self._ask.stream:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_sent(send, json.dumps(error.body()), last=True), timeout=1)
        finally:
            for ticket in tickets:
                ticket.canceled.set()
            gone.cancel()
            answering.cancel()

    async def _answer(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events of all choices up to their last ones."""
        left, self._usage = self._ask.n, Usage(0, 0, 0)
        while left:
            index, event = await self._events.get()
            if event.error is not None:
                raise self._told(event.error)
            if event.usage is not None:
                left, own, all_of = left - 1, event.usage, self._usage
                self._usage = Usage(own.prompt, max(own.cached, all_of.cached), own.completion + all_of.completion)
            yield index, event

    async def _whole(self, send: Callable[[Any], Any]) -> None:
        """Send the complete answer at once."""
        events: list[list[Event]] = [[] for _ in range(self._ask.n)]
        async for index, event in self._answer():
            events[index].append(event)
        answers = [
            ("".join(event.piece.text for event in own), [one for event in own for one in event.piece.reports], own[-1])
            for own in events
        ]
        content = json.dumps(self._reply.whole(answers, self._usage)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._opened = True
        await send({"type": "http.response.body", "body": content})

    async def _stream(self, send: Callable[[Any], Any]) -> None:
        """Send the answer as server-sent events; an error before the first event is sent as an ordinary error."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        async for index, event in self._answer():
            if not self._opened:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                self._opened = True
            for chunk in self._reply.chunks(index, event):
                await _sent(send, json.dumps(chunk))
        if self._ask.include_usage:
            await _sent(send, json.dumps(self._reply.usage_chunk(self._usage)))
        await _sent(send, "[DONE]", last=True)


async def _sent(send: Callable[[Any], Any], content: str, last: bool = False) -> None:
    """Send a server-sent event."""
    await send({"type": "http.response.body", "body": f"data: {content}\n\n".encode(), "more_body": not last})


async def _as_json(request: HttpRequest, error: Any) -> Response:
    return error_response(error if isinstance(error, ApiError) else not_here(request, error))


# The chat page

FOLDER = Path(__file__).parent / "pages"
# Each stands in the page where a line names it.
SCRIPTS = (charts.COMMON / "markdown.js", FOLDER / "chat.js")


def policy(text: str) -> str:
    """Return a Content-Security-Policy that allows the page's own inline script and style, and nothing else."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for tag, found in hashes.items():
        for part in re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL):
            found.append(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'")
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(hashes["script"]),
        "style-src": " ".join(hashes["style"]),
        "connect-src": "'self'",
        "img-src": "data:",  # for the empty icon, without which browsers request one
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        # If the page ever used a model's text as markup, the browser would raise an error instead of running it.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


# Counters

# Paths with ids are counted under their prefix, so that clients cannot create new series.
KNOWN = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/adapters", "/health", "/metrics")


# Adapters

ADAPTER_FIELDS = {"name", "path", "hub", "revision", "blend"}
MOST_OF_ID = 200  # characters of a hub id: its two names have at most 96 each


class Adapters:
    """The endpoints."""

    def __init__(self, engine: Engine, base_name: str, folder: Path | None, allow_hub: bool):
        """Prepare the endpoints.

        Args:
            engine: holds the adapters.
            base_name: the base's model id, which no adapter may have as its name.
            folder: its subfolders may be loaded; None: no folder may.
            allow_hub: whether adapters may be loaded from the hub.
        """
        self._engine, self._base_name, self._folder, self._allow_hub = engine, base_name, folder, allow_hub

    def routes(self) -> list[Route]:
        """Return their routes."""
        return [
            Route("/v1/adapters", self.listing, methods=["GET"]),
            Route("/v1/adapters", self.load, methods=["POST"]),
            Route("/v1/adapters/{name}", self.unload, methods=["DELETE"]),
        ]

    async def listing(self, request: HttpRequest) -> Response:
        """GET /v1/adapters."""
        store = self._engine.store
        data = [_described(card) for card in store.cards.values()]
        sizes = {"resident_bytes": store.nbytes, "budget_bytes": store.budget_bytes}
        return JSONResponse({"object": "list", "data": data, **sizes})

    async def load(self, request: HttpRequest) -> Response:
        """POST /v1/adapters: load a new adapter, or reload a known one."""
        body = read_fields(await request.body(), ADAPTER_FIELDS)
        name = body.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name) or name == self._base_name:
            message = "name: must be at most 64 letters, digits, . _ or -, and not the base's name"
            raise ApiError(400, message, "invalid_value", "name")
        given = [key for key in ("path", "hub", "blend") if body.get(key) is not None]
        if len(given) > 1:
            raise ApiError(400, f"{' and '.join(given)}: give only one of them", "invalid_value")
        if not given:
            card = await self._run(lambda store: store.reload(name))
        else:
            source = await self._source(body, given[0])
            card = (await self._run(lambda store: store.add({name: source}), source.folder))[0]
        return JSONResponse(_described(card))

    async def unload(self, request: HttpRequest) -> Response:
        """DELETE /v1/adapters/NAME."""
        name = request.path_params["name"]
        await self._run(lambda store: store.remove(name))
        return JSONResponse({"name": name, "object": "adapter", "deleted": True})

    async def _run(self, function: Any, folder: Path | None = None) -> Any:
        """Run a function on the adapter store in the engine's thread."""
        try:
            return await asyncio.wrap_future(self._engine.call(function))
        except (UnknownAdapter, NoRoom, Stopped, InputError, OSError) as error:
            raise client_error(self._engine, error, [] if folder is None else [folder]) from None

    async def _source(self, body: dict[str, Any], kind: str) -> AdapterSource:
        if kind == "blend":
            blend = body["blend"]
            fits = isinstance(blend, dict) and 0 < len(blend) <= 16
            if not fits or not all(is_number(weight, -100, 100) for weight in blend.values()):
                message = 'blend: must be an object with 1 to 16 adapters, such as {"bard": 0.7, "tutor": 0.3}'
                raise ApiError(400, message, "invalid_value", "blend")
            return AdapterSource(blend={name: float(weight) for name, weight in blend.items()})
        if kind == "path":
            path, flag = body["path"], "--adapters-from"
            if self._folder is None:
                message = f"path: loading from this disk is off; start the server with {flag}"
                raise ApiError(403, message, "path_off", "path")
            if not isinstance(path, str) or not path or "\0" in path:
                raise ApiError(400, f"path: must be a folder below the server's {flag}", "invalid_value", "path")
            root = self._folder.resolve()
            try:
                folder = (root / path).resolve()
                found = folder.is_dir()
            except (OSError, RuntimeError):  # a name that is too long, or a circle of links
                folder, found = root / "missing", False
            if folder == root or not folder.is_relative_to(root):
                raise ApiError(403, f"path: outside the server's {flag}", "path_outside", "path")
            if not found:
                raise ApiError(404, "path: no such folder", "not_found", "path")
            return AdapterSource(folder=folder)
        if not self._allow_hub:
            raise ApiError(403, "hub: loading from the hub is off; start the server with --allow-hub", "hub_off", "hub")
        hub, revision = body["hub"], body.get("revision")
        is_id = isinstance(hub, str) and HUB_ID.fullmatch(hub) and len(hub) <= MOST_OF_ID and not Path(hub).exists()
        if not is_id or not isinstance(revision, (str, type(None))):
            raise ApiError(400, "hub: must be an id such as owner/name", "invalid_value", "hub")
        try:
            return AdapterSource(folder=await anyio.to_thread.run_sync(resolve_adapter, hub, revision))
        except (InputError, RunError, OSError) as error:
            raise ApiError(400, without_paths(str(error), self._engine), "invalid_adapter", "hub") from None


def _described(card: Card) -> dict[str, Any]:
    facts = {name: getattr(card, name) for name in ("name", "source", "method", "rank", "resident", "created")}
    own_template = card.chat_template is not None
    return {**facts, "object": "adapter", "bytes": card.nbytes, "own_chat_template": own_template}


MOST_TEXTS = 2048  # in a request
TOGETHER = 16  # texts that are scored before answers are generated again
DECISION_FIELDS = frozenset(["model", "state", "questions"])
CLASSIFY_FIELDS = frozenset(["model", "input", "answer_above", "coverage", "user"])
# Those of Jina's, Cohere's and vLLM's clients; what is of no effect here is taken, so that they need no change.
RERANK_FIELDS = frozenset(
    ["model", "query", "documents", "top_n", "return_documents", "max_chunks_per_doc", "max_tokens_per_doc", "user"]
)
Score = Callable[[Sequence[Any]], tuple[np.ndarray, int]]
M = TypeVar("M")


def named_model(models: Mapping[str, M], asked: Any, purpose: str, advice: str) -> tuple[str, M]:
    """Return the model that a request names, or the only one.

    Raises:
        ApiError: 404.
    """
    if asked is None and len(models) == 1:
        asked = next(iter(models))
    if not isinstance(asked, str) or asked not in models:
        known = f"there are {', '.join(sorted(models))}" if models else advice
        raise ApiError(404, f"no model {asked!r} for {purpose}; {known}", "model_not_found", "model")
    return asked, models[asked]


class TextModels:
    """The models of a server that score texts or give their vectors, and their endpoints."""

    def __init__(self, engine: Engine, scoring: Mapping[str, Path], embedding: Mapping[str, Path], timeout_s: float):
        """Load the adapters.

        Args:
            engine: holds the base.
            scoring, embedding: name -> folder of the adapters that give scores, and of those that give vectors.
            timeout_s: for a whole request.

        Raises:
            InputError: an adapter does not fit the base, or has the name of the base or of an adapter that generates.
        """
        self._engine, self._timeout_s = engine, timeout_s
        if twice := sorted({base_name(engine.base), *engine.store.cards} & {*scoring, *embedding}):
            raise InputError(f"--adapter {twice[0]}: the base or another adapter has this name; give it another")

        def open_scorer(folder: Path) -> TextScorer:
            data = with_limits_of_run(DataSettings(), (), folder)
            return load_scorer(twin_of(engine.base), folder, data, None, engine.ignore_fingerprint, None)

        self._scorers = {
            name: engine.call(lambda store, folder=folder: open_scorer(folder)).result()
            for name, folder in scoring.items()
        }
        named: dict[str, Path | None] = {**embedding}
        if is_encoder(engine.base.model) or stored_choices(engine.base.folder):
            named = {base_name(engine.base): None, **named}
        settings = train_settings({"model": str(engine.base.folder), "objective": "embed"})
        # Each has a twin of its own, which its adapter changes.
        self._embedders = {
            name: engine.call(
                lambda _, folder=folder: open_embedder(
                    settings, twin_of(engine.base), folder, engine.ignore_fingerprint
                )
            ).result()
            for name, folder in named.items()
        }

    def describe(self) -> list[str]:
        """Return a line about each model."""
        return [
            *(f"scores {name}: {described(scorer.head)}" for name, scorer in self._scorers.items()),
            *(
                f"vectors {name}: {one.embedder.width} numbers, {one.embedder.pooling} pooling"
                for name, one in self._embedders.items()
            ),
        ]

    def routes(self) -> list[Route]:
        """Return the routes."""
        paths = dict.fromkeys(("/classify", "/v1/classify"), self.classify)
        paths |= {"/v1/decisions": self.decisions}
        paths |= dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), self.rerank)
        paths |= dict.fromkeys(("/embeddings", "/v1/embeddings"), self.embeddings)
        return [Route(path, endpoint, methods=["POST"]) for path, endpoint in paths.items()]

    def _of(self, objectives: Collection[str], body: dict[str, Any]) -> tuple[str, TextScorer]:
        own = {name: one for name, one in self._scorers.items() if one.head["objective"] in objectives}
        return named_model(own, body.get("model"), " or ".join(objectives), "start the server with --adapter NAME=DIR")

    async def classify(self, request: HttpRequest) -> Response:
        """POST /classify."""
        body = read_fields(await request.body(), CLASSIFY_FIELDS)
        name, scorer = self._of(LABELED, body)
        given = body.get("input")
        texts = texts_of([given] if isinstance(given, str) else given, "input")
        scores, tokens = await self._scores(scorer, texts)
        acting = Acting(
            read_number(body, "answer_above", 0, 1, whole=False), read_number(body, "coverage", 0, 1, whole=False)
        )
        try:
            answers = scorer.answers(scores, {}, acting)
        except InputError as error:
            raise ApiError(400, str(error), "invalid_value", "coverage") from None
        data = [{"index": number} | vllm_form(answer) for number, answer in enumerate(answers)]
        return JSONResponse(
            {
                "id": f"classify-{uuid.uuid4().hex}",
                "object": "list",
                "created": int(time.time()),
                "model": name,
                "data": data,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    async def _scores(self, scorer: TextScorer, texts: Sequence[Text]) -> tuple[np.ndarray, int]:
        """Return the scores of texts, and the number of tokens that were read."""

        def score(part: Sequence[Text]) -> tuple[np.ndarray, int]:
            encoded, dropped, _ = scorer.encode(part)
            if dropped:
                raise InputError(f"a text cannot be used: {next(iter(dropped.values()))}")
            return scorer.score(encoded, len(part)), sum(map(len, encoded.values()))

        return await a_few_at_a_time(self._engine, self._timeout_s, score, texts)

    async def decisions(self, request: HttpRequest) -> Response:
        """POST /v1/decisions."""
        body = read_fields(await request.body(), DECISION_FIELDS)
        name, scorer = self._of(LABELED, body)
        scores, tokens = await self._scores(scorer, texts_of([body.get("state")], "state"))
        questions = body.get("questions") or {}
        if not isinstance(questions, dict) or not all(isinstance(one, dict) for one in questions.values()):
            raise bad_value("questions", questions, "an object of questions, by their names")
        try:
            answers = decision_form(scorer.head, scorer.answers(scores, {})[0], questions)
        except InputError as error:
            raise ApiError(400, str(error), "invalid_value", "questions") from None
        return JSONResponse({"model": name, "answers": answers, "usage": {"input_tokens": tokens, "output_tokens": 0}})

    async def rerank(self, request: HttpRequest) -> Response:
        """POST /v1/rerank."""
        body = read_fields(await request.body(), RERANK_FIELDS)
        name, scorer = self._of(RANKED, body)
        (query,) = texts_of([body.get("query")], "query")
        given = body.get("documents")
        plain = (
            [one.get("text") if isinstance(one, dict) else one for one in given] if isinstance(given, list) else given
        )
        documents = [one.text for one in texts_of(plain, "documents")]
        top_n = read_number(body, "top_n", 1, 10**9, len(documents))
        scores, tokens = await a_few_at_a_time(
            self._engine, self._timeout_s, lambda part: scorer.rank(query.text, part), documents
        )
        shown = body.get("return_documents") is True
        return JSONResponse(
            {
                "id": f"rerank-{uuid.uuid4().hex}",
                "model": name,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                "results": [
                    {"index": i, "relevance_score": score} | ({"document": {"text": documents[i]}} if shown else {})
                    for i, score in in_order(scores)[:top_n]
                ],
            }
        )

    async def embeddings(self, request: HttpRequest) -> Response:
        """POST /v1/embeddings."""
        body = read_fields(await request.body(), EMBED_FIELDS)
        advice = "start the server with --adapter NAME=DIR of --objective embed"
        name, embedder = named_model(self._embedders, body.get("model"), "embeddings", advice)
        form = body.get("encoding_format")
        if form not in (None, "float", "base64"):
            raise bad_value("encoding_format", form, "float or base64")
        dims = read_number(body, "dimensions", 1, embedder.embedder.width)
        embedder = replace(embedder, how=replace(embedder.how, dims=dims))
        given = body.get("input_type")
        if given not in (None, *QUERY, *DOCUMENT):
            raise bad_value("input_type", given, f"one of {', '.join((*QUERY, *DOCUMENT))}")
        inputs = inputs_of(body.get("input"), embedder.base.token_rows)

        def vectors(part: Sequence[Any]) -> tuple[np.ndarray, int]:
            """Return the vectors of some inputs, and the number of their tokens."""
            texts = [one for one in part if isinstance(one, str)]
            encoded = iter(embedder.form.encode(texts, embedder.base.hf_tokenizer, given in QUERY) if texts else [])
            most = embedder.form.max_length  # tokens that the model takes of a text
            rows = [next(encoded) if isinstance(one, str) else np.array(one[:most], np.int32) for one in part]
            return embedder.of_rows(rows), sum(map(len, rows))

        found, tokens = await a_few_at_a_time(self._engine, self._timeout_s, vectors, inputs)
        rows = found.astype("<f4")
        data = [
            {
                "object": "embedding",
                "index": number,
                "embedding": base64.b64encode(row.tobytes()).decode() if form == "base64" else row.tolist(),
            }
            for number, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})


async def a_few_at_a_time(
    engine: Engine, timeout_s: float, score: Score, texts: Sequence[Any]
) -> tuple[np.ndarray, int]:
    """Return what `score` finds of texts in the engine's thread, and the number of tokens that were read.

    Raises:
        ApiError: it took too long, a text cannot be used, or the engine has stopped.
    """
    found, tokens = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            for start in range(0, len(texts), TOGETHER):
                part = texts[start : start + TOGETHER]
                scores, count = await asyncio.wrap_future(engine.call(lambda store, part=part: score(part)))
                found.append(scores)
                tokens += count
    except TimeoutError:
        raise ApiError(504, f"the texts took longer than {timeout_s:g} s; send fewer of them", "timeout") from None
    except Stopped as error:
        raise api_error(error) from None
    except InputError as error:
        text = without_paths(" ".join(str(error).split()), engine)
        raise ApiError(400, text, "invalid_value") from None
    return np.concatenate(found), tokens


def texts_of(given: Any, name: str) -> list[Text]:
    """Return the texts of a field.

    Raises:
        ApiError: they are not texts, there are none or too many, or one is empty.
    """
    if not isinstance(given, list) or not all(isinstance(one, str) and one.strip() for one in given):
        raise ApiError(400, f"{name}: must be a text or a list of texts, none of them empty", "invalid_value", name)
    if not 0 < len(given) <= MOST_TEXTS:
        raise ApiError(400, f"{name}: {len(given)} texts; send from 1 to {MOST_TEXTS}", "invalid_value", name)
    return [Text(one, ends=False) for one in given]


def described(head: Mapping[str, Any]) -> str:
    """Return in a few words what the scores are."""
    labels = head["labels"]
    more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
    of_number = ", a number" if head["objective"] in LABELED else ""
    return f"{head['objective']}{': ' if labels else of_number}{', '.join(labels[:8])}{more}"


EMBED_FIELDS = frozenset(["model", "input", "encoding_format", "dimensions", "input_type", "user"])
QUERY, DOCUMENT = ("query", "search_query"), ("document", "search_document", "passage")  # values of input_type


_token = partial(is_number, low=0, high=2**31 - 1, whole=True)


def inputs_of(given: Any, vocabulary: int | None) -> list[str | list[int]]:
    """Return the inputs of a request, each a text or its tokens.

    Args:
        given: as the request has it: one of them, or a list.
        vocabulary: tokens that the model has; None: not known.

    Raises:
        ApiError: they are neither, there are none or too many, or one is empty.
    """
    alone = isinstance(given, str) or (isinstance(given, list) and all(map(_token, given)) and bool(given))
    found: Any = [given] if alone else given
    if not isinstance(found, list) or not all(
        (isinstance(one, str) and bool(one.strip())) or (isinstance(one, list) and bool(one) and all(map(_token, one)))
        for one in found
    ):
        message = (
            "input: must be a text, a list of texts, a list of tokens, or a list of such lists, none of them empty"
        )
        raise ApiError(400, message, "invalid_value", "input")
    if not 0 < len(found) <= MOST_TEXTS:
        raise ApiError(400, f"input: {len(found)} inputs; send from 1 to {MOST_TEXTS}", "invalid_value", "input")
    for one in found:
        if not isinstance(one, str) and vocabulary is not None and max(one) >= vocabulary:
            message = f"input: found the token {max(one)}; the model has {vocabulary} (send texts, or its own tokens)"
            raise ApiError(400, message, "invalid_value", "input")
    return found
