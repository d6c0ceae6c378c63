"""One prompt as a chat turn, or as plain text where there is no template."""

from __future__ import annotations

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.panics import tokenizer_panics
from mlx_lora.data.sandbox import render_chat
from mlx_lora.errors import InputError


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, template: str | None, system_prompt: str | None = None
) -> list[int]:
    """Encode a prompt as a chat turn with a template, without one as plain text with the tokenizer's BOS.

    Args:
        tokenizer: the base's, not mlx-lm's wrapper.
        text: the user's prompt.
        template: Jinja text, or None.
        system_prompt: a system message before it, for templates that take one.

    Raises:
        InputError: a system prompt that nothing can show, or a template that refuses these turns.
    """
    if not template:
        if system_prompt:
            raise InputError("--system-prompt: there is no chat template in use; put the text into --prompt")
        with tokenizer_panics("--prompt"):
            return tokenizer.encode(text)
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": text})
    # Rendered first, encoded without special tokens: the template already wrote its own BOS.
    try:
        rendered = render_chat(tokenizer, messages, template, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"the chat template refuses this prompt ({error}); leave --system-prompt out, or give --ignore-chat-template"
        ) from None
    with tokenizer_panics("--prompt"):
        return tokenizer.encode(rendered, add_special_tokens=False)
