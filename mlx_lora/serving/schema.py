"""Build answers in OpenAI's formats, complete or as chunks of a stream; no error tells clients the paths of the server's machine.

Source: OpenAI's API reference: chat.completion, chat.completion.chunk, text_completion.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlx_lora.data.chat_template import own_template, template_shows
from mlx_lora.engine.adapter_store import base_name
from mlx_lora.engine.engine import Engine, Event, TokenReport, Usage
from mlx_lora.engine.prompts import chat_tokens
from mlx_lora.engine.requests import Ask, api_error
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.http import ApiError


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
