"""Read OpenAI's request bodies and build answers in its formats, complete or as chunks of a stream.

Every field is checked, and fields that would be ignored are refused.

Source: OpenAI's API reference: chat/completions and completions; chat.completion, chat.completion.chunk, text_completion.

Turn the engine's errors into answers to clients, which must not learn the paths of the server's machine.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora.data.images import mark
from mlx_lora.serving.adapter_store import NoRoom, UnknownAdapter, base_name
from mlx_lora.serving.engine import Engine, Event, QueueFull, Sampling, Stopped, TokenReport, Usage
from mlx_lora.utils.errors import InputError

# Requests

MAX_STOPS, MAX_TOP_LOGPROBS = 16, 20
ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields that both endpoints, or one of them, read.
_COMMON = {
    "model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "logprobs",
    "ignore_eos",
}  # fmt: skip
_CHAT = _COMMON | {"messages", "tools", "tool_choice", "max_completion_tokens", "top_logprobs"}
_COMPLETION = _COMMON | {"prompt"}
# Fields that do not change an answer.
_HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
}
# Fields that are not supported, except with these values.
_NEUTRAL = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": (None, ""), "presence_penalty": (0,),
    "frequency_penalty": (0,), "logit_bias": ({},), "response_format": ({"type": "text"},),
}  # fmt: skip


class ApiError(Exception):
    """An error answer in OpenAI's format."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after_s: int | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the JSON object."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Ask:
    """A request to either endpoint.

    Attributes:
        model: id of the base or of an adapter; None: the base.
        messages, tools: of a chat; None for a completion.
        pictures: what the marks of pictures in the messages stand for: file names or data URLs.
        prompt: text or token ids of a completion; None for a chat.
        max_tokens: None: as many as allowed.
        sampling, stops, ignore_eos: as in the engine's Request.
        stream: send pieces as they come.
        include_usage: end a stream with the token counts.
    """

    model: str | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    prompt: str | list[int] | None
    max_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    pictures: Mapping[str, str | bytes] = field(default_factory=dict)


def read_json(raw: bytes) -> dict[str, Any]:
    """Return a body's JSON object.

    Raises:
        ApiError: it is not a JSON object, or has text that is not valid Unicode.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=refuse)
        json.dumps(body, ensure_ascii=False).encode()  # refuses half a surrogate pair, which escapes can write
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8 ({error}); send a JSON object", "invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}; send an object", "invalid_json")
    return body


def read_fields(raw: bytes, known: Collection[str]) -> dict[str, Any]:
    """Return a body's JSON object, which has no other fields than these.

    Raises:
        ApiError: it has, or is no JSON object.
    """
    body = read_json(raw)
    if strange := body.keys() - known:
        raise ApiError(400, f"{', '.join(sorted(strange))}: not a field of this endpoint", "unknown_parameter")
    return body


def read_chat(body: dict[str, Any]) -> Ask:
    """Return the request of a chat/completions body.

    Raises:
        ApiError: 400, naming the field.
    """
    _check_fields(body, _CHAT)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", messages, "a list with at least one message")
    wanted = _typed(body, "logprobs", bool, False)
    top = _number(body, "top_logprobs", int, 0, MAX_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise ApiError(
            400, "top_logprobs without logprobs: nothing is reported; set logprobs to true", "invalid", "logprobs"
        )
    most = _number(body, "max_completion_tokens", int, 1, 10**9)
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise _bad("tool_choice", choice, "none or auto: the template shows the tools, and the model decides")
    tools = _typed(body, "tools", list, []) if choice != "none" else []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _bad("tools", tool, 'objects such as {"type": "function", "function": {"name": ...}}')
    pictures: dict[str, str | bytes] = {}
    return Ask(
        messages=[_message(n, message, pictures) for n, message in enumerate(messages)],
        pictures=pictures,
        tools=tools or None,
        prompt=None,
        **_common(body, most, (top or 0) if wanted else None),
    )


def read_completion(body: dict[str, Any]) -> Ask:
    """Return the request of a completions body.

    Raises:
        ApiError: 400, naming the field.
    """
    _check_fields(body, _COMPLETION)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not is_number(prompt[0], -math.inf, math.inf, True):
        prompt = prompt[0]
    tokens = isinstance(prompt, list) and prompt and all(is_number(one, -math.inf, math.inf, True) for one in prompt)
    if not (tokens or (isinstance(prompt, str) and prompt)):
        raise _bad("prompt", prompt, "one string or one list of token ids, not empty")
    top = _number(body, "logprobs", int, 0, MAX_TOP_LOGPROBS)
    return Ask(messages=None, tools=None, prompt=prompt, **_common(body, None, top, default_tokens=16))


def _common(
    body: dict[str, Any], most: int | None, top_logprobs: int | None, default_tokens: int | None = None
) -> dict[str, Any]:
    most = most or _number(body, "max_tokens", int, 1, 10**9) or default_tokens
    options = _typed(body, "stream_options", dict, {})
    stream = _typed(body, "stream", bool, False)
    temperature, top_p = _number(body, "temperature", float, 0, 100), _number(body, "top_p", float, 0, 1)
    stops = body.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _bad("stop", body["stop"], f"a string or up to {MAX_STOPS} of them, none empty")
    return {
        "model": _typed(body, "model", str, None),
        "max_tokens": most,
        "sampling": Sampling(
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,  # 0: the smallest nucleus, so greedy, as in llama.cpp
            top_k=_number(body, "top_k", int, 0, 10**9) or 0,
            seed=_number(body, "seed", int, -(2**63), 2**63 - 1, fold=2**63),
            top_logprobs=top_logprobs,
        ),
        "stops": tuple(stops),
        "ignore_eos": _typed(body, "ignore_eos", bool, False),
        "stream": stream,
        "include_usage": stream and bool(_typed(options, "include_usage", bool, False)),
    }


def _check_fields(body: dict[str, Any], known: set[str]) -> None:
    for name, value in body.items():
        if name in known or name in _HARMLESS or value is None:
            continue
        if name not in _NEUTRAL:
            raise ApiError(400, f"{name}: not a field of this endpoint; leave it out", "unknown_parameter", name)
        if value not in _NEUTRAL[name]:
            raise ApiError(
                400,
                f"{name} {_shown(value)}: this server does not support that; leave it out",
                "unsupported_parameter",
                name,
            )


def _message(index: int, message: Any, pictures: dict[str, str | bytes]) -> dict[str, Any]:
    """Return a message in the format of templates: content as one text, arguments of calls as objects.

    A user's pictures become marks in the text; what they stand for is put into `pictures`.
    """
    name = f"messages[{index}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise _bad(name, message, f"an object with a role of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        sees, texts = message["role"] == "user", []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            image = part.get("image_url") if kind in ("image_url", "input_image") and sees else None
            text = part.get("text") if kind == "text" else image.get("url") if isinstance(image, dict) else image
            if not isinstance(text, str) or not (text or kind == "text"):
                kinds = "text, and of a user image_url with a url" if sees else "text"
                raise _bad(f"{name}.content", content, f"a string or parts of type {kinds}")
            texts.append(text if kind == "text" else mark(text, pictures))
        content = "".join(texts)
    calls = message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise _bad(f"{name}.content", content, "a string or parts of type text")
    role = "system" if message["role"] == "developer" else message["role"]
    plain = {**message, "role": role, "content": content or ""}
    if calls is None:
        return plain
    try:
        functions = [call["function"] for call in calls]
        read = [{**one, "arguments": json.loads(one.get("arguments") or "{}")} for one in functions]
        return {**plain, "tool_calls": [{**call, "function": one} for call, one in zip(calls, read, strict=True)]}
    except (TypeError, KeyError, AttributeError, ValueError):
        raise _bad(f"{name}.tool_calls", calls, "calls with a function's name and JSON arguments") from None


def is_number(value: Any, low: float, high: float, whole: bool = False) -> bool:
    """Tell whether a value of a body is a number, no truth value, in a range."""
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high


def _number(body: dict[str, Any], name: str, kind: type, low: float, high: float, fold: int | None = None) -> Any:
    """Return a number after checking it, or None if it is not given."""
    value = body.get(name)
    if value is None:
        return None
    if not is_number(value, low, high, kind is int):
        raise _bad(name, value, f"{'a whole number' if kind is int else 'a number'} from {low:g} to {high:g}")
    return value % fold if fold else kind(value)


def _typed(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        words = {bool: "true or false", str: "a string", dict: "an object", list: "a list"}
        raise _bad(name, value, words[kind])
    return value


def _bad(name: str, value: Any, wanted: str) -> ApiError:
    return ApiError(400, f"{name} {_shown(value)}: must be {wanted}", "invalid_value", name)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Answers


class ChatReply:
    """Builds the answers of chat/completions."""

    PREFIX, WHOLE, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str):
        self._head = {"id": f"{self.PREFIX}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._opened = False

    def chunk(self, event: Event) -> dict[str, Any]:
        """Return a chunk with the new text."""
        choice = {**self._piece(event), "logprobs": self._logprobs(event.piece.reports)}
        choices = [{"index": 0, **choice, "finish_reason": event.finish}]
        return {**self._head, "object": self.CHUNK, "choices": choices}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk that ends a stream with token counts."""
        return {**self._head, "object": self.CHUNK, "choices": [], "usage": usage_object(usage)}

    def whole(self, text: str, reports: list[TokenReport], end: Event) -> dict[str, Any]:
        """Return the answer in one piece."""
        choice = {**self._all(text), "logprobs": self._logprobs(reports)}
        choices = [{"index": 0, **choice, "finish_reason": end.finish}]
        return {**self._head, "object": self.WHOLE, "choices": choices, "usage": usage_object(end.usage)}

    def _piece(self, event: Event) -> dict[str, Any]:
        """Return the new text; the first chunk also has the role."""
        delta = {} if self._opened else {"role": "assistant"}
        self._opened = True
        return {"delta": {**delta, **({"content": event.piece.text} if event.piece.text or not event.last else {})}}

    def _all(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

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

    def _piece(self, event: Event) -> dict[str, Any]:
        return {"text": event.piece.text}

    def _all(self, text: str) -> dict[str, Any]:
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


RETRY_AFTER_S = 1


def api_error(error: Exception) -> ApiError:
    """Return the error that a client gets for an error of the engine."""
    if isinstance(error, UnknownAdapter):
        words = f"no model or adapter {str(error)!r}; GET /v1/models lists them"
        return ApiError(404, words, "model_not_found", "model")
    if isinstance(error, QueueFull | NoRoom):
        status, code = (429, "queue_full") if isinstance(error, QueueFull) else (503, "no_room")
        return ApiError(status, f"{error}; try again later", code, retry_after_s=RETRY_AFTER_S)
    if isinstance(error, Stopped):
        return ApiError(503, f"{error}", "shutting_down")
    if isinstance(error, (InputError, OSError)):
        return ApiError(400, " ".join(str(error).split()), "invalid_adapter")
    raise error


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
