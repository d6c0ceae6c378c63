"""A conversation as our sandbox renders it and as transformers itself does."""

from __future__ import annotations

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.sandbox import render_chat

REFUSED = "refused: "


def rendered_by_both(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], template: str, **options: Any
) -> tuple[str, str]:
    """Return our rendering and transformers'; where one refuses, REFUSED and the reason."""

    def ours() -> str:
        return render_chat(tokenizer, messages, template, **options)

    def theirs() -> str:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)

    return _said(ours), _said(theirs)


def _said(render) -> str:
    try:
        return render()
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError) as error:
        return REFUSED + str(error).removeprefix("AttributeError: ")  # which we report as a template's error
