"""Plain text, every token of which is trained."""

from __future__ import annotations

from mlx_lora.data.examples import Fields, Text
from mlx_lora.data.formats import has_question_and_answer
from mlx_lora.data.forms import DataForm, need_string


def parse(record: Fields) -> Text:
    return Text(need_string(record, "text", "text"))


# Last: Alpaca's own set, and many others, repeat each row as one text.
FORM = DataForm(
    "text",
    frozenset(("text",)),
    parse,
    lambda record: "text" in record and not has_question_and_answer(record),
    rank=9,
)
