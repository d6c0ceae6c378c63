"""Alpaca's form with its input in a section of its own, for the built-in alpaca template: Stanford's text, as Axolotl writes it."""

from __future__ import annotations

from mlx_lora.data.examples import Conversation, Fields
from mlx_lora.data.forms import DataForm, alpaca

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request."
)


def parse(record: Fields) -> Conversation:
    whole = alpaca.parse({key: record[key] for key in ("instruction", "output") if key in record})
    given = record.get("input")
    if not given:
        return whole
    question, answer = whole.messages
    asked = {"role": "user", "content": f"{question['content']}\n\n### Input:\n{given}"}
    return Conversation([{"role": "system", "content": WITH_INPUT}, asked, answer])


# It is Alpaca's form, which recognizes such records: this one has to be asked for.
FORM = DataForm("instruction, output (and optionally input)", alpaca.FORM.columns, parse, lambda _: False, rank=9)
