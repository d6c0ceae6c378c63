"""Encode prompts and conversations with a chat template, or as plain text if there is none."""

from __future__ import annotations

from datetime import date
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.controls import controls_of
from mlx_lora.data.panics import tokenizer_panics
from mlx_lora.data.sandbox import render_chat
from mlx_lora.system.errors import InputError


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    template: str | None,
    system_prompt: str | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Return a prompt's tokens: as a chat turn if there is a template, else as plain text with the tokenizer's BOS.

    Args:
        tokenizer: the base's tokenizer, not mlx-lm's wrapper.
        text: the user's prompt.
        template: Jinja text, or None.
        system_prompt: a system message before it, for templates that support one.
        tools: that the model may call, for templates that show them.

    Raises:
        InputError: there is a system prompt or a tool but no template, or the template refuses these turns or shows no tools.
    """
    if not template:
        if system_prompt:
            raise InputError("--system-prompt: no chat template is in use; put the text into --prompt")
        if tools:
            raise InputError(
                "--tools: no chat template is in use, so the model cannot be shown tools; leave --tools out"
            )
        with tokenizer_panics("--prompt"):
            return tokenizer.encode(text)
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": text})
    if tools and not template_shows(tokenizer, messages, template, tools):
        raise InputError(
            "--tools: the chat template does not show tools; train with --chat-template chatml, which does"
        )
    return encode_chat(
        tokenizer, messages, template, tools, advice="; leave --system-prompt out, or give --ignore-chat-template"
    )


def template_shows(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], template: str, tools: list[dict[str, Any]]
) -> bool:
    """Return whether a template shows tools to the model; True if it refuses the chat, which `encode_chat` reports."""
    try:
        shown = [render_chat(tokenizer, messages, template, some, add_generation_prompt=True) for some in (tools, None)]
    except (jinja2.TemplateError, TypeError, ValueError):
        return True
    return shown[0] != shown[1]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: str,
    tools: list[dict[str, Any]] | None = None,
    advice: str = "",
) -> list[int]:
    """Return a conversation's tokens, up to where the model answers.

    Args:
        tokenizer: the base's tokenizer.
        messages, tools: plain data, which may be untrusted.
        template: Jinja text.
        advice: ends the error message if the template refuses the conversation.

    Raises:
        InputError: the template refuses the conversation, or takes too much time or memory.
    """
    try:
        return chat_tokens(tokenizer, messages, template, tools)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(f"the chat template refuses the conversation ({error}){advice}") from None


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: str,
    tools: list[dict[str, Any]] | None = None,
    day: date | None = None,
    allow_special_tokens: bool = False,
) -> list[int]:
    """Return a conversation's tokens, up to where the model answers.

    Args:
        tokenizer: fast, unless the messages have no control tokens.
        messages, tools: plain data.
        template: Jinja text.
        day: the day that the template shows as today; None: today.
        allow_special_tokens: a message that spells a control token brings that token in.

    Raises:
        jinja2.TemplateError, TypeError, ValueError: the template refuses the conversation.
        InputError: it takes too much time or memory.
    """
    controls = controls_of(tokenizer)
    hidden = controls.hide([] if allow_special_tokens else messages)
    shown = hidden.messages if hidden.names else messages
    text, spans = hidden.shown(render_chat(tokenizer, shown, template, tools, add_generation_prompt=True, day=day))
    # Encode without special tokens: the template has already written its BOS.
    with tokenizer_panics("the conversation"):
        if not spans:
            return tokenizer.encode(text, add_special_tokens=False)
        encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return controls.as_text(text, encoded["input_ids"], encoded["offset_mapping"], spans)[0]
