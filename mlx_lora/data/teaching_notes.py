"""Say what the data teaches and what it does not: plain text teaches no answering, and a template may not show tools."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

from mlx_lora.data.answers import answers_of
from mlx_lora.data.encode import Encoder
from mlx_lora.data.examples import Conversation, Text
from mlx_lora.data.reading import Rows
from mlx_lora.data.render import ADVICE
from mlx_lora.settings.config import DataSettings
from mlx_lora.sources.splits import TINY_SHAKESPEARE
from mlx_lora.system.errors import InputError
from mlx_lora.system.units import counted

LOOKED_AT = 1000  # records
# A text that was rendered with a template before: it has turns, and teaches answering.
RENDERED = re.compile(
    r"### ?(?:Response|Assistant)\b|\[/INST\]|<\|?(?:im_start|start_of_turn|turn|assistant|start_header_id)\b"
)
OUR_TEMPLATE = "--chat-template chatml"


class ToolsNotShown(InputError):
    """All rows of a set were refused, some of them because the chat template does not show their tool calls.

    Attributes:
        rows: How many of them.
    """

    def __init__(self, message: str, rows: int):
        super().__init__(message)
        self.rows = rows


def teaching_notes(parts: dict[str, Rows], settings: DataSettings, encoder: Encoder) -> list[str]:
    """Return notes on what a chat model will not learn from the data.

    Args:
        parts: `train`, `valid`, `test` -> what was read.
        settings: Of the data; who asks for a text by `--data-format` or a column knows that it is one.
        encoder: Of the rows; a model without a chat template is expected to continue text.
    """
    notes = []
    names_text = settings.data_format == "text" or settings.text_column or TINY_SHAKESPEARE in (settings.data or "")
    tokenizer: Any = encoder.tokenizer
    if tokenizer.chat_template and not names_text and is_plain_text(parts["train"]):
        notes.append(
            "plain text teaches the model style and words, but not to answer questions about it; for answers, write rows of a "
            'prompt and a completion, or give a chat export with --speaker NAME (docs/data.md, "Text or answers")'
        )
    for name, rows in parts.items():
        if refused := refused_tools(rows):
            notes.append(
                f"{counted(refused, f'{name} row')} with tool calls left out, because the chat template does not show them; "
                f"{OUR_TEMPLATE} trains them"
            )
    return notes


def is_plain_text(rows: Rows) -> bool:
    """Tell whether all records are plain texts, and none has turns in it."""
    texts = [entry.text for entry in rows.entries if isinstance(entry, Text)]
    return bool(texts) and len(texts) == len(rows.entries) and not any(map(RENDERED.search, texts[:LOOKED_AT]))


def refused_tools(rows: Rows) -> int:
    """Return how many records were dropped because the chat template does not show their tool calls."""
    return sum(row.why.endswith(ADVICE) for row in rows.dropped)


def called_functions(rows: Rows) -> frozenset[str]:
    """Return the names of the functions that the first records call."""
    return frozenset(
        call["function"]["name"]
        for entry in islice(rows.entries, LOOKED_AT)
        for answer in answers_of(entry)
        if isinstance(answer, Conversation)
        for message in answer.messages
        for call in message.get("tool_calls", ())
    )
