"""Alpaca's form: a question, what it is about, and the answer."""

from __future__ import annotations

from mlx_lora.data.examples import Conversation, EmptyPart, Fields, as_string
from mlx_lora.data.formats import SYSTEM, opening
from mlx_lora.data.forms import DataForm, need, need_string


def parse(record: Fields) -> Conversation:
    instruction, output = need(record, "instruction", "alpaca"), need_string(record, "output", "alpaca")
    parts = as_string(instruction, "instruction"), as_string(record.get("input", ""), "input")
    question = "\n".join(part for part in parts if part.strip())
    if not question:
        raise EmptyPart("empty instruction")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return Conversation([*opening(record), *turns])


FORM = DataForm(
    "instruction, output (and optionally input, system, history)",
    frozenset(("instruction", "input", "output", *SYSTEM, "history")),
    parse,
    lambda record: "instruction" in record and "output" in record,
    rank=4,
)
