"""ShareGPT's form: a list of turns, each with who says it and what; OpenAI's turns may be under its key, too."""

from __future__ import annotations

from mlx_lora.data.examples import Conversation, Fields, as_list, conversation
from mlx_lora.data.formats import SYSTEM, sharegpt_messages, system_text
from mlx_lora.data.forms import DataForm, need

KEYS = ("conversations", "conversation")


def parse(record: Fields) -> Conversation:
    key = next((key for key in KEYS if key in record), KEYS[1])
    turns = as_list(need(record, key, "sharegpt"), key)
    if not (turns and all(isinstance(turn, dict) and "role" in turn and "from" not in turn for turn in turns)):
        turns = sharegpt_messages(turns)
    return conversation(turns, record.get("tools"), system_text(record), record.get("functions"))


FORM = DataForm(
    "conversations: [{from, value}, ...] (and optionally system, tools)",
    frozenset((*KEYS, *SYSTEM, "tools", "functions")),
    parse,
    lambda record: not record.keys().isdisjoint(KEYS),
    rank=2,
)
