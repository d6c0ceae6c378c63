"""OpenAI's form: a list of turns, each with a role and content."""

from __future__ import annotations

from mlx_lora.data.examples import Conversation, Fields, conversation
from mlx_lora.data.formats import SYSTEM, fits, system_text
from mlx_lora.data.forms import DataForm, need


def parse(record: Fields) -> Conversation:
    system = system_text({name: record[name] for name in SYSTEM if fits(name, record.get(name))})
    return conversation(need(record, "messages", "messages"), record.get("tools"), system, record.get("functions"))


FORM = DataForm(
    "messages: [{role, content}, ...] (and optionally tools)",
    frozenset(("messages", *SYSTEM, "tools", "functions")),
    parse,
    lambda record: "messages" in record,
    rank=1,
)
