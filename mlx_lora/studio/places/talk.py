"""The Talk place: one conversation answered in several columns, each with its adapters, over one base in memory; texts that a
classifier sorts, over the same base; and exports."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import importlib.util
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import mlx.core as mx
from huggingface_hub import get_token
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_lora.api.export import FORMATS, ExportSettings
from mlx_lora.api.texts import load_scorer, twin_of
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import row_of
from mlx_lora.config.settings import DataSettings, ModelSettings
from mlx_lora.data.chat_template import own_template
from mlx_lora.data.examples import Text
from mlx_lora.engine.adapter_store import DEFAULT_CONTEXT, AdapterSource, AdapterStore, context_of
from mlx_lora.engine.engine import (
    Ask,
    Engine,
    Event,
    Limits,
    PicturePrompt,
    PictureReader,
    Request,
    Ticket,
    api_error,
    chat_tokens,
    picture_prompt,
    read_chat,
)
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE, with_limits_of_run
from mlx_lora.gguf.write import TYPES
from mlx_lora.models.load import Base, load_base
from mlx_lora.models.vision import has_tower
from mlx_lora.objectives.scored_texts import TextScorer
from mlx_lora.studio.app import Studio
from mlx_lora.studio.folders import free_path, safe_name
from mlx_lora.studio.model_stores import bytes_in_memory, files_of_model, json_of
from mlx_lora.studio.runs import OF_BASE, read_settings_of
from mlx_lora.studio.web import events, json_route
from mlx_lora.utils.device import current_device
from mlx_lora.utils.http import ApiError, is_number, read_json
from mlx_lora.utils.text import command_line, gigabytes, model_flags

TALK = "/api/talk"
MOST_TALK_BYTES = 32 * 10**6  # of a conversation, which has its pictures in it
MOST_COLUMNS, MOST_PARTS = 4, 8
MOST_TEXTS, MOST_CHARACTERS = 1000, 20_000  # that are sorted at once, and of each of them
TOGETHER = 16  # texts that are scored before answers are written again
MOST_WEIGHT = 100.0
ADAPTER_BYTES = 4 * 10**9  # of adapters in memory; those used longest ago leave it
WAIT_S = 0.5  # for a piece, before it is seen whether the server ends
ROOM = 1.1  # a loaded base takes about this much of its files' size


class Talk:
    """The model that the page talks to: one at a time, loaded when first asked."""

    def __init__(self, running: Callable[[], list[dict[str, Any]]], working_set_bytes: int):
        """Prepare to load a model.

        Args:
            running: returns the lines of runs that go on.
            working_set_bytes: the most that this machine should use.
        """
        self._running, self._limit = running, working_set_bytes
        self._engine: Engine | None = None
        self._base: ModelSettings | None = None
        self._lock = threading.RLock()
        self._pictures: PictureReader | None = None
        self._scorer: tuple[Any, TextScorer] | None = None  # of the classifier that was asked last
        self._one_at_a_time = anyio.CapacityLimiter(1)  # tokenizers are not thread-safe

    def close(self) -> None:
        """End the engine, and give its memory back; a module's parts know each other, so they are collected now."""
        with self._lock:
            if self._engine is None:
                return
            self._engine.close()
            self._engine = self._base = self._pictures = self._scorer = None
            gc.collect()
            mx.clear_cache()

    async def answer(
        self, base: ModelSettings, columns: list[Any], body: dict[str, Any], own: list[Any]
    ) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the pieces of all columns' answers, as they come.

        Args:
            base: the model, its revision and bits, checked.
            columns: lists of (folder, weight), checked.
            body: messages and sampling, as OpenAI's chat has them.
            own: of each column the messages of its own conversation; None: those of the body.
        """
        try:
            asks = [read_chat({**body, "messages": messages} if messages else body) for messages in own]
            if self._base != base:
                if warning := await anyio.to_thread.run_sync(self._memory_warning, base):
                    yield {"warning": warning}
                bits = f" in {base.bits} bits" if base.bits else ""
                yield {"status": f"Loading {Path(base.model or '').name}{bits}"}
            engine = await anyio.to_thread.run_sync(self._ready, base)
            names = await asyncio.wrap_future(engine.call(lambda store: _named(store, columns)))
            limit = context_of(engine.base.config) or DEFAULT_CONTEXT
            prompts = [
                await anyio.to_thread.run_sync(self._prompt, engine, ask, name, limit, limiter=self._one_at_a_time)
                for ask, name in zip(asks, names, strict=True)
            ]
            async for piece in _pieces(engine, asks[0], names, prompts):
                yield piece
        except Exception as error:  # api_error raises what is nobody's input
            yield {"error": str(error if isinstance(error, ApiError) else api_error(error))}

    def _prompt(
        self, engine: Engine, ask: Ask, adapter: str | None, limit: int
    ) -> tuple[list[int], PicturePrompt | None]:
        """Return a conversation's tokens, and what is needed of its pictures; None: it has none.

        Raises:
            ApiError: the model's context is too short for it, or a picture cannot be used.
            InputError: the template refuses it.
        """
        card, pictures, tokenizer = engine.store.cards[adapter] if adapter else None, None, engine.base.hf_tokenizer
        template, messages = card and card.chat_template, ask.messages or []
        if ask.pictures:
            with self._lock:
                reader = self._pictures = self._pictures or PictureReader(engine.base)
            pictures = picture_prompt(reader, ask, template, card.max_pixels if card else None)
            tokens = pictures.tokens
        elif template := template or own_template(tokenizer):
            tokens = chat_tokens(tokenizer, messages, template, engine.vocabulary)
        else:
            tokens = tokenizer.encode("\n".join(message["content"] for message in messages))
        if not tokens or len(tokens) + 1 > limit:
            raise ApiError(400, f"messages: {len(tokens):,} tokens, and this model takes {limit:,}; begin a new conversation",
                "context_length_exceeded", "messages")  # fmt: skip
        return tokens, pictures

    def sort(self, base: ModelSettings, folder: Path, texts: list[str]) -> dict[str, Any]:
        """Return what a classifier says of texts, in their order, each with its `doubt`.

        Args:
            base: the model, its revision and bits, checked.
            folder: of the adapter, checked.
            texts: checked.

        Raises:
            ApiError: base or adapter cannot be used.
        """
        warning, rows = None if self._base == base else self._memory_warning(base), list[dict[str, Any]]()
        try:
            engine = self._ready(base)
            scorer = engine.call(lambda store: self._open_scorer(engine.base, folder)).result()
            for start in range(0, len(texts), TOGETHER):
                part = [Text(text, ends=False) for text in texts[start : start + TOGETHER]]
                rows += engine.call(lambda store, part=part: scorer.predict(part)).result()
        except Exception as error:  # api_error raises what is nobody's input
            raise api_error(error) from None
        calibrated = all("calibration" in one for one in scorer.head.get("questions") or [scorer.head])
        told = [row | {"doubt": scorer.doubt(row)} for row in rows]
        return {"warning": warning, "calibrated": calibrated, "rows": told}

    def _open_scorer(self, base: Base, folder: Path) -> TextScorer:
        """Return what scores texts with an adapter, in the engine's thread; the last one is kept."""
        stamp, kept = (folder, (folder / WEIGHTS_FILE).stat().st_mtime_ns), self._scorer
        if kept is None or kept[0] != stamp:
            self._scorer = None  # its arrays go before the next ones come
            data = with_limits_of_run(DataSettings(), (), folder)
            kept = self._scorer = stamp, load_scorer(twin_of(base), folder, data)
        return kept[1]

    def _ready(self, base: ModelSettings) -> Engine:
        """Return the engine of a base; another one is freed first."""
        with self._lock:
            if self._engine is not None and (self._base != base or not self._engine.alive):
                self.close()
            if self._engine is None:
                limits = Limits(max_batch=MOST_COLUMNS * 2, max_waiting=16, adapter_bytes=ADAPTER_BYTES)
                self._engine = Engine(lambda: load_base(base), limits)
                self._base = base
            return self._engine

    def _memory_warning(self, base: ModelSettings) -> str | None:
        """Return a line if a run that goes on leaves too little memory for the model."""
        runs, files = self._running(), files_of_model(base.model or "", base.revision)
        if not runs or files is None:
            return None
        needed = ROOM * bytes_in_memory(files, base.bits)
        taken = sum(run.get("peak_bytes") or run.get("plan_peak_bytes") or 0 for run in runs)
        if needed + taken <= self._limit:
            return None
        return (
            f"The run {runs[0]['name']} takes {gigabytes(taken)}, this model about {gigabytes(needed)}, and this machine "
            f"should use at most {gigabytes(self._limit)} (predicted): both may become slow, or the run may end."
        )


def _named(store: AdapterStore, columns: list[list[tuple[Path, float]]]) -> list[str | None]:
    """Load what the columns need, in the engine's thread, and return each column's name of adapter or blend."""
    names: list[str | None] = []
    for parts in columns:
        # Trained further, the same folder is another adapter.
        stamps = [[str(folder), (folder / WEIGHTS_FILE).stat().st_mtime_ns] for folder, _ in parts]
        weights = {f"a-{_hash(stamp)}": weight for stamp, (_, weight) in zip(stamps, parts, strict=True)}
        folders = dict(zip(weights, (folder for folder, _ in parts), strict=True))
        if new := {name: AdapterSource(folder=folders[name]) for name in weights if name not in store.cards}:
            store.add(new)
        if list(weights.values()) in ([], [1]):
            names.append(next(iter(weights), None))
            continue
        blend = f"b-{_hash(sorted(weights.items()))}"
        if blend not in store.cards:
            store.add({blend: AdapterSource(blend=weights)})
        names.append(blend)
    return names


async def _pieces(
    engine: Engine, ask: Ask, names: list[str | None], prompts: list[tuple[list[int], PicturePrompt | None]]
) -> AsyncIterator[dict[str, Any] | None]:
    """Submit a request for each column, and yield their events in the order in which they come."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
    tickets: list[Ticket] = []
    limit = context_of(engine.base.config) or DEFAULT_CONTEXT
    begun, first = time.perf_counter(), dict[int, float]()

    def emit(column: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the server ends
            loop.call_soon_threadsafe(events.put_nowait, (column, event))

    try:
        for column, (name, (tokens, pictures)) in enumerate(zip(names, prompts, strict=True)):
            most = min(ask.max_tokens or 512, limit - len(tokens))
            request = Request(tokens, name, most, ask.sampling, ask.stops, pictures=pictures)
            tickets.append(engine.submit(request, partial(emit, column)))
        left = len(tickets)
        while left:
            try:
                column, event = await asyncio.wait_for(events.get(), WAIT_S)
            except TimeoutError:
                yield None
                continue
            now = time.perf_counter()
            first.setdefault(column, now - begun)
            if event.piece.text:
                yield {"column": column, "text": event.piece.text}
            if event.error is not None:
                left -= 1
                yield {"column": column, "done": True, "error": " ".join(str(event.error).split())}
            elif event.usage is not None:
                left -= 1
                made, spent = event.usage.completion, now - begun - first[column]
                speed = (made - 1) / spent if made > 1 and spent > 0 else None
                yield {
                    "column": column, "done": True, "tokens": made, "tokens_per_s": speed, "first_token_s": first[column],
                    "prompt_tokens": event.usage.prompt, "finish": event.finish,
                }  # fmt: skip
    finally:
        for ticket in tickets:
            ticket.canceled.set()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]


# Routes

FIELDS = ("messages", "max_tokens", "temperature", "seed", "top_p", "top_k", "stop")
HUB, FUSE = "hub", "fuse"
OPTIONS = {"gguf_type": "--gguf-type", "base_id": "--base-id", "ollama_base": "--ollama-base"}


def routes(studio: Studio) -> list[BaseRoute]:
    """Return the routes of talk and of export."""
    talk = Talk(studio.listing.going_on, current_device().working_set_bytes)
    studio.closing.callback(talk.close)
    return [
        Route(TALK, partial(answer, studio, talk), methods=["POST"]),
        json_route("/api/talk/model", partial(about_model, studio), "POST"),
        json_route(f"{TALK}/sort", partial(sort, studio, talk), "POST"),
        json_route("/api/talk/close", lambda request, body: talk.close() or {"closed": True}, "POST"),
        json_route("/api/export", partial(export, studio), "POST"),
        json_route("/api/export/needs", lambda request, body: needs()),
    ]


def about_model(studio: Studio, request: HttpRequest, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/talk/model: whether a model sees pictures, from its config alone."""
    files = files_of_model(studio.checker.model(body.get("model")), body.get("revision"))
    config = json_of(files / "config.json") if files else None
    return {"sees": isinstance(config, dict) and has_tower(config)}


async def answer(studio: Studio, talk: Talk, request: HttpRequest) -> Response:
    """POST /api/talk: server-sent events of all columns."""
    body = read_json(await request.body())
    columns, base = await anyio.to_thread.run_sync(_columns, studio, body)
    asked = {name: body[name] for name in FIELDS if body.get(name) is not None}
    own = [column.get("messages") for column in body["columns"]]
    if system := body.get("system"):
        first = {"role": "system", "content": system}
        said = [messages if isinstance(messages, list) else [] for messages in (asked.get("messages"), *own)]
        asked["messages"] = [first, *said[0]]
        own = [given and [first, *messages] for given, messages in zip(own, said[1:], strict=True)]
    return events(request, talk.answer(base, columns, asked, own))


def sort(studio: Studio, talk: Talk, request: HttpRequest, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/talk/sort: what a classifier says of texts, and the `column` of its data that has the label, if its run named it.

    Raises:
        ApiError: 400, the texts are none, too many or too long, or one is empty.
    """
    texts = body.get("texts")
    if not isinstance(texts, list) or not 1 <= len(texts) <= MOST_TEXTS:
        raise ApiError(400, f"texts: must be a list of 1 to {MOST_TEXTS:,} texts", "invalid_value", "texts")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str) or not text.strip() or len(text) > MOST_CHARACTERS:
            raise ApiError(
                400, f"texts: number {number} must be text of 1 to {MOST_CHARACTERS:,} characters", "invalid_value", "texts"
            )  # fmt: skip
    (((folder, _),),), base = _columns(studio, {**body, "columns": [{"adapters": [{"path": body.get("adapter")}]}]})
    return {"column": read_settings_of(folder, None).get("label_column"), **talk.sort(base, folder, texts)}


def _columns(studio: Studio, body: dict[str, Any]) -> tuple[list[list[tuple[Path, float]]], ModelSettings]:
    """Return the columns of a request, each a list of adapters with weights, and their base.

    The base has the revision and bits that the request names, else those of the adapters' runs.

    Raises:
        ApiError: they are malformed, or a folder is not one of this studio's, or the adapters were trained on several bases; one
            is in memory at a time.
        InputError: there are no such bits.
    """
    model, given = studio.checker.model(body.get("model")), body.get("columns")
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_COLUMNS:
        raise ApiError(400, f"columns: must be a list of 1 to {MOST_COLUMNS}", "invalid_value", "columns")
    columns = []
    for column in given:
        parts = column.get("adapters", []) if isinstance(column, dict) else None
        if not isinstance(parts, list) or len(parts) > MOST_PARTS or not all(isinstance(p, dict) for p in parts):
            message = f"columns: each must be {{adapters: [{{path, weight}}]}}, {MOST_PARTS} at most"
            raise ApiError(400, message, "invalid_value")
        weights = [part.get("weight", 1.0) for part in parts]
        if not all(is_number(weight, -MOST_WEIGHT, MOST_WEIGHT) for weight in weights):
            message = f"weight: must be a number from -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}"
            raise ApiError(400, message, "invalid_value", "weight")
        folders = [studio.checker.adapter(part.get("path")) for part in parts]
        columns.append(list(dict(zip(folders, map(float, weights), strict=True)).items()))
    runs = [studio.listing.settings_of(folder, None) for parts in columns for folder, _ in parts]
    bases = {tuple(run.get(name) for name in OF_BASE) for run in runs if run.get("model") == model}
    if body.keys() & set(OF_BASE):
        bases = {tuple(body.get(name) for name in OF_BASE)}
    if len(bases) > 1:
        raise ApiError(
            400, "columns: these adapters were trained on several revisions or bits of the model; talk to one after the other",
            "invalid_value", "columns",
        )  # fmt: skip
    of_base = dict(zip(OF_BASE, bases.pop(), strict=True)) if bases else {}
    return columns, train_settings(studio.checker.settings({"model": model, **of_base})).model


def export(studio: Studio, request: HttpRequest, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/export: a command that exports or fuses, as a task; the last line of `fuse` says how much of the adapter is kept."""
    model, to, name = studio.checker.model(body.get("model")), body.get("to"), safe_name(body.get("out"), "out")
    adapter = studio.checker.adapter(body["adapter"]) if body.get("adapter") else None
    options = body.get("options") or {}
    if not isinstance(options, dict) or not all(isinstance(value, (str, bool)) for value in options.values()):
        raise ApiError(400, "options: must be an object of texts", "invalid_value", "options")
    kind = "peft" if to == HUB else to
    if kind not in (*FORMATS, FUSE):
        raise ApiError(400, f"to: must be one of {', '.join((*FORMATS, FUSE, HUB))}", "invalid_value", "to")
    repo = str(options.get("repo") or "") if to == HUB else None
    if repo == "":
        raise ApiError(400, "options.repo: must be the hub id to upload to, owner/name", "invalid_value", "options")
    if kind in ("gguf", "gguf-adapter") and not name.endswith(".gguf"):
        name += ".gguf"
    out, force = studio.folders.exports / name, bool(options.get("force"))
    if to == HUB:  # the page names the repository, not the folder
        out = free_path(out)
    if out.exists() and not force:
        raise ApiError(409, f"out: there is {out.name} already; choose another name", "name_taken", "out")
    run = read_settings_of(adapter, None) if adapter else {}
    revision = run.get("revision") if run.get("model") == model else None
    # A fused model is read back as it was trained; an export says what it rounds to.
    bits = run.get("bits") if kind == FUSE or run.get("qat") else None
    words = [FUSE if kind == FUSE else "export", *model_flags({"model": model, "revision": revision, "bits": bits})]
    words += ["--adapter-path", str(adapter)] if adapter else []
    words += ["--to", kind] if kind != FUSE else []
    words += ["--out", str(out), *(["--force"] if force else [])]
    if kind == FUSE:
        if adapter is None:
            raise ApiError(400, "adapter: a model is fused with one; give its folder", "invalid_value", "adapter")
        words += ["--dequantize"] if row_of(run.get("objective")).scores else []
        title, following = f"Fuse {adapter.name}", f"mlx-lora chat --model {out}"
    else:
        given = {option: str(options[option]) for option in OPTIONS if options.get(option)}
        for option, value in given.items():
            flag = OPTIONS[option]
            words += [f"{flag}={value}"] if value.startswith("-") else [flag, value]
        private = bool(options.get("private") and repo)
        words += [f"--push-to-hub={repo}", *(["--private"] if private else [])] if repo else []
        ExportSettings(
            kind, out, given.get("base_id"), given.get("gguf_type"), given.get("ollama_base"), force, repo, private
        ).check(adapter is not None)
        if given.get("ollama_base", "").endswith(".gguf"):
            studio.checker.model(given["ollama_base"])
        title, following = (
            f"Export {adapter.name if adapter else Path(model).name} for {to}",
            FORMATS[kind].reader.format(out=out),
        )
    result = {"path": str(out), "to": to, "next": following}
    return {"task": studio.tasks.child("export", title, words, result).public(), "command": command_line(words)}


def needs() -> dict[str, Any]:
    """Return what each kind of export needs, and whether it is here."""
    ollama, token = shutil.which("ollama"), get_token()
    peft = importlib.util.find_spec("peft") is not None
    return {
        "peft": {"needs": "An adapter. PEFT can load the result, and need not be installed here.", "ok": True, "installed": peft},
        "mlx-lm": {"needs": "An adapter. Stock mlx-lm reads it.", "ok": True},
        FUSE: {
            "needs": "An adapter, and minutes for a quantized model: it is rounded so that it keeps what the adapter learned, "
            "and measured.",
            "ok": True,
        },
        "hf": {"needs": "Disk space for the whole model in its stored dtype.", "ok": True},
        "gguf-adapter": {"needs": "An adapter, and for llama.cpp the base as GGUF.", "ok": True},
        "gguf": {
            "needs": "Disk space for the whole model; llama.cpp and LM Studio read it.", "ok": True, "types": list(TYPES),
        },
        "ollama": {
            "needs": "Ollama, to create the model from the folder"
            + ("." if ollama else "; it is not installed here, the folder is written anyway."),
            "ok": ollama is not None,
        },
        "hub": {
            "needs": "A token with write access" + ("." if token else ": run `hf auth login` first."),
            "ok": token is not None,
        },
    }  # fmt: skip
