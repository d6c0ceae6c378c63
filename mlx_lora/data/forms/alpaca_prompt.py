"""Alpaca's form with Stanford's whole text as the question, for any chat template: as torchtune writes it."""

from __future__ import annotations

from mlx_lora.data.examples import Conversation, Fields
from mlx_lora.data.forms import DataForm, alpaca, alpaca_sections

WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


def parse(record: Fields) -> Conversation:
    turns = alpaca_sections.parse(record).messages
    intro = turns[0]["content"] if len(turns) > 2 else WITHOUT_INPUT
    question = f"{intro}\n\n### Instruction:\n{turns[-2]['content']}\n\n### Response:\n"
    return Conversation([{"role": "user", "content": question}, turns[-1]])


FORM = DataForm("instruction, output (and optionally input)", alpaca.FORM.columns, parse, lambda _: False, rank=9)
