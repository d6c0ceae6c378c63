"""Encode a request's prompt in the same way as `generate`: same template, same sandbox, same encoding."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from mlx_lora.data.prompts import encode_chat
from mlx_lora.data.templates import own_template
from mlx_lora.serving.asking import ApiError, Ask
from mlx_lora.system.errors import InputError


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
        try:
            return _chat_tokens(tokenizer, ask, template or own_template(tokenizer), vocabulary)
        except InputError as error:
            raise ApiError(400, f"messages: {error}", "template", "messages") from None
    tokens = tokenizer.encode(ask.prompt) if isinstance(ask.prompt, str) else ask.prompt
    if not tokens:
        raise ApiError(400, "prompt: has no tokens; give some text", "invalid_value", "prompt")
    if not all(0 <= token < vocabulary for token in tokens):
        raise ApiError(400, f"prompt: token ids must be from 0 to {vocabulary - 1}", "invalid_value", "prompt")
    return tokens


def _chat_tokens(tokenizer: PreTrainedTokenizerBase, ask: Ask, template: str | None, vocabulary: int) -> list[int]:
    if not template:
        raise ApiError(400, "this model has no chat template; use /v1/completions", "no_chat_template", "messages")
    if ask.tools and "tools" not in template:
        message = "tools: this model's chat template does not show them; leave them out"
        raise ApiError(400, message, "no_tools", "tools")
    return chat_tokens(tokenizer, ask.messages or [], template, vocabulary, ask.tools)


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
