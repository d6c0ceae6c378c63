"""Build answers in OpenAI's formats: complete, or as chunks of a stream.

Source: OpenAI's API reference: chat.completion, chat.completion.chunk, text_completion.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from mlx_lora.serving.requests import Event, Usage
from mlx_lora.serving.text import TokenReport


class ChatReply:
    """Builds answers of chat/completions."""

    def __init__(self, model: str):
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._opened = False

    def chunk(self, event: Event) -> dict[str, Any]:
        """Return a chunk with the new text; the first chunk also has the role."""
        delta = {} if self._opened else {"role": "assistant"}
        self._opened = True
        if event.piece.text or not event.last:
            delta["content"] = event.piece.text
        return self._chunk([_choice({"delta": delta}, _chat_logprobs(event.piece.reports), event.finish)])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk that ends a stream with token counts."""
        return {**self._chunk([]), "usage": usage_object(usage)}

    def whole(self, text: str, reports: list[TokenReport], end: Event) -> dict[str, Any]:
        """Return the answer in one piece."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = _choice({"message": message}, _chat_logprobs(reports), end.finish)
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage_object(end.usage)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}


class CompletionReply:
    """Builds answers of completions."""

    def __init__(self, model: str):
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._offset = 0

    def chunk(self, event: Event) -> dict[str, Any]:
        """Return a chunk with the new text."""
        logprobs = self._logprobs(event.piece.reports)
        return {**self._head, "choices": [_choice({"text": event.piece.text}, logprobs, event.finish)]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk that ends a stream with token counts."""
        return {**self._head, "choices": [], "usage": usage_object(usage)}

    def whole(self, text: str, reports: list[TokenReport], end: Event) -> dict[str, Any]:
        """Return the answer in one piece."""
        choice = _choice({"text": text}, self._logprobs(reports), end.finish)
        return {**self._head, "choices": [choice], "usage": usage_object(end.usage)}

    def _logprobs(self, reports: list[TokenReport] | tuple[TokenReport, ...]) -> dict[str, Any] | None:
        if not reports:
            return None
        offsets = []
        for report in reports:
            offsets.append(self._offset)
            self._offset += len(report.text)
        return {
            "tokens": [report.text for report in reports],
            "token_logprobs": [report.logprob for report in reports],
            "top_logprobs": [dict(report.top) for report in reports],
            "text_offset": offsets,
        }


def usage_object(usage: Any) -> dict[str, Any]:
    """Return the object with token counts of a Usage, which a last event has."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _choice(content: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish}


def _chat_logprobs(reports: list[TokenReport] | tuple[TokenReport, ...]) -> dict[str, Any] | None:
    if not reports:
        return None
    content = [
        {
            **_token(report.text, report.logprob),
            "top_logprobs": [_token(text, logprob) for text, logprob in report.top],
        }
        for report in reports
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
