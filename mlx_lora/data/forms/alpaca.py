"""Alpaca's form: a question, what it is about, and the answer."""

from __future__ import annotations

from mlx_lora.data.examples import Conversation, EmptyPart, Fields, as_string
from mlx_lora.data.formats import SYSTEM, opening
from mlx_lora.data.forms import DataForm, need_string


def parse(record: Fields) -> Conversation:
    instruction, output = (need_string(record, key, "alpaca") for key in ("instruction", "output"))
    given = as_string(record.get("input", ""), "input")
    if not output.strip():
        raise EmptyPart("empty output")
    question = "\n".join(part for part in (instruction, given) if part.strip())
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
