"""Read the requests of OpenAI's clients, and turn the engine's errors into answers.

Every field is checked, and fields that would be ignored are refused.

Source: OpenAI's API reference: chat/completions and completions.

Turn conversations into the tokens of a prompt, with what a model's tower sees of their pictures.

    messages with marks -> PicturePrompt (tokens, pictures)         any thread, one at a time; no MLX
    PicturePrompt -> Prefill -> keys and values                     the engine's thread, which loads the tower once

After its prompt, a row with pictures is like any other: its caches are mlx-lm's, and the next token's position is the number
of tokens before it. Its keys and values are not kept for later prompts, because the same tokens may stand for another picture.
Nothing of a picture is written to disk.

A prompt is encoded in the same way as for `generate`: same template, same sandbox, same encoding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.chat_template import encode_chat
from mlx_lora.data.downloads import is_on_web
from mlx_lora.data.examples import FormatError, Message
from mlx_lora.data.image_tokens import ImageProcessor, ImageReader, ImageTable, encode_messages, family_of
from mlx_lora.data.images import mark
from mlx_lora.engine.adapter_store import NoRoom, UnknownAdapter
from mlx_lora.engine.engine import QueueFull, Stopped
from mlx_lora.models.generator import Sampling
from mlx_lora.models.image_inputs import ImageInputSpec, ModelWithImages
from mlx_lora.models.load import Base
from mlx_lora.models.vision import VisionTower, compute_dtype, image_token, load_tower
from mlx_lora.objectives.vision_encoder import ImageFeatureCache, VisionEncoder, image_template
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.http import ApiError, bad_value, is_number, read_number, read_typed, shown_value

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


def read_chat(body: dict[str, Any]) -> Ask:
    """Return the request of a chat/completions body.

    Raises:
        ApiError: 400, naming the field.
    """
    _check_fields(body, _CHAT)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_value("messages", messages, "a list with at least one message")
    wanted = read_typed(body, "logprobs", bool, False)
    top = read_number(body, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise ApiError(
            400, "top_logprobs without logprobs: nothing is reported; set logprobs to true", "invalid", "logprobs"
        )
    most = read_number(body, "max_completion_tokens", 1, 10**9)
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise bad_value("tool_choice", choice, "none or auto: the template shows the tools, and the model decides")
    tools = read_typed(body, "tools", list, []) if choice != "none" else []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_value("tools", tool, 'objects such as {"type": "function", "function": {"name": ...}}')
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
        raise bad_value("prompt", prompt, "one string or one list of token ids, not empty")
    top = read_number(body, "logprobs", 0, MAX_TOP_LOGPROBS)
    return Ask(messages=None, tools=None, prompt=prompt, **_common(body, None, top, default_tokens=16))


def _common(
    body: dict[str, Any], most: int | None, top_logprobs: int | None, default_tokens: int | None = None
) -> dict[str, Any]:
    most = most or read_number(body, "max_tokens", 1, 10**9) or default_tokens
    options = read_typed(body, "stream_options", dict, {})
    stream = read_typed(body, "stream", bool, False)
    seed = read_number(body, "seed", -(2**63), 2**63 - 1)
    stops = body.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise bad_value("stop", body["stop"], f"a string or up to {MAX_STOPS} of them, none empty")
    return {
        "model": read_typed(body, "model", str, None),
        "max_tokens": most,
        "sampling": Sampling(
            temperature=read_number(body, "temperature", 0, 100, 1.0, whole=False),
            # 0: the smallest nucleus, so greedy, as in llama.cpp
            top_p=read_number(body, "top_p", 0, 1, 1.0, whole=False),
            top_k=read_number(body, "top_k", 0, 10**9, 0),
            seed=None if seed is None else seed % 2**63,
            top_logprobs=top_logprobs,
        ),
        "stops": tuple(stops),
        "ignore_eos": read_typed(body, "ignore_eos", bool, False),
        "stream": stream,
        "include_usage": stream and bool(read_typed(options, "include_usage", bool, False)),
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
                f"{name} {shown_value(value)}: this server does not support that; leave it out",
                "unsupported_parameter",
                name,
            )


def _message(index: int, message: Any, pictures: dict[str, str | bytes]) -> dict[str, Any]:
    """Return a message in the format of templates: content as one text, arguments of calls as objects.

    A user's pictures become marks in the text; what they stand for is put into `pictures`.
    """
    name = f"messages[{index}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise bad_value(name, message, f"an object with a role of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        sees, texts = message["role"] == "user", []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            image = part.get("image_url") if kind in ("image_url", "input_image") and sees else None
            text = part.get("text") if kind == "text" else image.get("url") if isinstance(image, dict) else image
            if not isinstance(text, str) or not (text or kind == "text"):
                kinds = "text, and of a user image_url with a url" if sees else "text"
                raise bad_value(f"{name}.content", content, f"a string or parts of type {kinds}")
            texts.append(text if kind == "text" else mark(text, pictures))
        content = "".join(texts)
    calls = message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise bad_value(f"{name}.content", content, "a string or parts of type text")
    role = "system" if message["role"] == "developer" else message["role"]
    plain = {**message, "role": role, "content": content or ""}
    if calls is None:
        return plain
    try:
        functions = [call["function"] for call in calls]
        read = [{**one, "arguments": json.loads(one.get("arguments") or "{}")} for one in functions]
        return {**plain, "tool_calls": [{**call, "function": one} for call, one in zip(calls, read, strict=True)]}
    except (TypeError, KeyError, AttributeError, ValueError):
        raise bad_value(f"{name}.tool_calls", calls, "calls with a function's name and JSON arguments") from None


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


class PictureReader:
    """Reads the pictures of conversations for one base."""

    def __init__(self, base: Base, folders: Sequence[Path] = ()):
        """Prepare; nothing is loaded yet.

        Args:
            base: that is served.
            folders: that files may be read from; data URLs need none.
        """
        self.base, self.folders = base, folders
        self._processors: dict[int | None, ImageProcessor] = {}
        self.tower: VisionTower | None = None

    def check(self) -> None:
        """Check that the model can be shown pictures, before one is read.

        Raises:
            InputError: it cannot.
        """
        kind = self.base.config.get("model_type")
        if family_of(self.base.config) is None:
            raise InputError(f"a {kind} model sees no pictures; leave them out")
        if ImageInputSpec.of(self.base.config).prompt:
            raise InputError(f"a {kind} model is not served with pictures; use mlx-lora generate --image")

    def prompt(
        self,
        messages: list[Message],
        sources: Mapping[str, str | bytes],
        template: str | None,
        folders: Sequence[Path] = (),
        max_pixels: int | None = None,
    ) -> PicturePrompt:
        """Return a conversation as a prompt.

        Args:
            messages: pictures are marks in their content (data/images.py).
            sources: what the marks stand for: file names, data URLs.
            template: the adapter's own; None: the model's.
            folders: further ones that files may be read from.
            max_pixels: to which larger pictures are shrunk; None: only the model's own limits.

        Raises:
            InputError: the model sees no pictures, or one cannot be used.
        """
        self.check()
        base = self.base
        if max_pixels not in self._processors:
            self._processors[max_pixels] = ImageProcessor(base.folder, base.config, max_pixels)
        processor = self._processors[max_pixels]
        template = template or image_template(base.hf_tokenizer, base.folder, processor.family)
        if template is None:
            raise InputError("the model has no chat template, so it cannot be asked about pictures")
        table = ImageTable.empty()
        reader = ImageReader(processor, [*self.folders, *folders], table, image_token(base.config))
        try:
            tokens, digests = encode_messages(reader, base.hf_tokenizer, template, messages, sources)
        except FormatError as error:
            raise InputError(str(error)) from None
        return PicturePrompt(self, tokens, digests, table, processor)


@dataclass(frozen=True)
class PicturePrompt:
    """A prompt with pictures.

    Attributes:
        reader: that read it.
        tokens: up to where the model answers.
        digests: of its pictures, in order.
        table: that has them.
        processor: that made their pixels.
    """

    reader: PictureReader
    tokens: list[int]
    digests: tuple[str, ...]
    table: ImageTable
    processor: ImageProcessor

    def seen_by(self, model: nn.Module) -> ModelWithImages:
        """Return a model with what the tower sees of the pictures, which is computed here, in the engine's thread.

        Raises:
            InputError: the tower cannot be loaded, or fails.
        """
        base = self.reader.base
        if self.reader.tower is None:
            self.reader.tower = load_tower(base.folder, compute_dtype(base))
        seen = ImageFeatureCache(self.reader.tower, self.processor, self.table, writes=False)
        spec = ImageInputSpec.of(base.config)
        vision = VisionEncoder(self.reader.tower, self.processor, spec, self.table, seen)
        return ModelWithImages(model, spec, vision.prompt_arrays(self.tokens, self.digests))


def picture_prompt(
    reader: PictureReader, ask: Ask, template: str | None, max_pixels: int | None = None
) -> PicturePrompt:
    """Return the prompt of a chat with pictures.

    Args:
        reader: of the base.
        ask: the request.
        template: the adapter's own; None: the model's.
        max_pixels: of the pictures in the adapter's run; None: it had no limit of its own.

    Raises:
        ApiError: 400: a picture cannot be used, a web address or a file that is not below the server's folder among them, or
            the model sees none.
    """
    if ask.tools:
        raise ApiError(
            400, "tools with pictures: not supported; leave one of the two out", "unsupported_parameter", "tools"
        )
    try:
        reader.check()
        for source in ask.pictures.values():
            if is_on_web(source):
                raise InputError(
                    "a picture on the web, and this server downloads none; send it as a data URL "
                    "(data:image/png;base64,...), or name a file of serve --images-from"
                )
            if not reader.folders and isinstance(source, str) and source[:5].lower() != "data:":
                raise InputError(
                    "a picture as a file, and this server reads none (serve --images-from FOLDER); send it as a data URL "
                    "(data:image/png;base64,...)"
                )
        return reader.prompt(ask.messages or [], ask.pictures, template, max_pixels=max_pixels)
    except InputError as error:
        raise ApiError(400, f"messages: {error}", "invalid_image", "messages") from None


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: str,
    vocabulary: int,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Return a conversation's tokens, up to where the model answers.

    Args:
        tokenizer: the base's tokenizer.
        messages, tools: plain data, which may be untrusted.
        template: Jinja text.
        vocabulary: the number of token ids.

    Raises:
        InputError: the template refuses the conversation or renders no text, or the model has no row for a token.
    """
    tokens = encode_chat(tokenizer, messages, template, tools)
    if not tokens:
        raise InputError("the chat template renders no text for this conversation; give some text")
    if max(tokens) >= vocabulary:
        raise InputError(
            f"the conversation has token {max(tokens)}, but the model has only {vocabulary} tokens; the tokenizer belongs "
            "to another model"
        )
    return tokens
