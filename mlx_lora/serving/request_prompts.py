"""Makes a request's prompt into tokens as `generate` makes its own: same template, same sandbox, same encoding."""

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
        tokenizer: the base's.
        ask: the request.
        template: the adapter's own chat template, which beats the base's.
        vocabulary: token ids are below this.

    Raises:
        ApiError: no template for a chat, one that refuses it or shows no tools, token ids that do not exist.
    """
    if ask.messages is not None:
        try:
            return _chat_tokens(tokenizer, ask, template or own_template(tokenizer), vocabulary)
        except InputError as error:
            raise ApiError(400, f"messages: {error}", "template", "messages") from None
    tokens = tokenizer.encode(ask.prompt) if isinstance(ask.prompt, str) else ask.prompt
    if not tokens:
        raise ApiError(400, "prompt: encodes to no token; give some text", "invalid_value", "prompt")
    if not all(0 <= token < vocabulary for token in tokens):
        raise ApiError(400, f"prompt: token ids are 0 to {vocabulary - 1}", "invalid_value", "prompt")
    return tokens


def _chat_tokens(tokenizer: PreTrainedTokenizerBase, ask: Ask, template: str | None, vocabulary: int) -> list[int]:
    if not template:
        raise ApiError(400, "this model has no chat template; use /v1/completions", "no_chat_template", "messages")
    if ask.tools and "tools" not in template:
        message = "tools: this model's chat template does not show them; leave them out"
        raise ApiError(400, message, "no_tools", "tools")
    return chat_tokens(tokenizer, ask.messages, template, vocabulary, ask.tools)


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: str,
    vocabulary: int,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Return a conversation's tokens, up to where the model answers.

    Args:
        tokenizer: the base's.
        messages, tools: plain data, of strangers.
        template: Jinja text.
        vocabulary: token ids are below this.

    Raises:
        InputError: the template refuses the conversation or makes nothing of it, or there is a token that the model
            has no row for.
    """
    tokens = encode_chat(tokenizer, messages, template, tools)
    if not tokens:
        raise InputError("the chat template renders the conversation to nothing; give some text")
    if max(tokens) >= vocabulary:
        raise InputError(
            f"token {max(tokens)} is in it, and the model has {vocabulary}; its tokenizer is another model's"
        )
    return tokens
