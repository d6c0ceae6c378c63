"""Makes a request's prompt into tokens as `generate` makes its own: same template, same encoding."""

from __future__ import annotations

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.templates import own_template
from mlx_lora.serving.asking import ApiError, Ask

# What a template can raise on a client's messages: its own words, or Python's where it does arithmetic on them.
RENDERING = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


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
        return _chat_tokens(tokenizer, ask.messages, ask.tools, template or own_template(tokenizer))
    if isinstance(ask.prompt, str):
        tokens = tokenizer.encode(ask.prompt)
        if not tokens:
            raise ApiError(400, "prompt: encodes to no token; give some text", "invalid_value", "prompt")
        return tokens
    if not all(0 <= token < vocabulary for token in ask.prompt):
        raise ApiError(400, f"prompt: token ids are 0 to {vocabulary - 1}", "invalid_value", "prompt")
    return ask.prompt


def _chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    template: str | None,
) -> list[int]:
    if not template:
        raise ApiError(400, "this model has no chat template; use /v1/completions", "no_chat_template", "messages")
    if tools and "tools" not in template:
        raise ApiError(400, "tools: this model's chat template does not show them; leave them out", "no_tools", "tools")
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except RENDERING as error:
        raise ApiError(400, f"messages: the chat template refuses them ({error})", "template", "messages") from None
    # The template wrote its own BOS.
    tokens = tokenizer.encode(rendered, add_special_tokens=False)
    if not tokens:
        raise ApiError(400, "messages: rendered to nothing; give some text", "invalid_value", "messages")
    return tokens
