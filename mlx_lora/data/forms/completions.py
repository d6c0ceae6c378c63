"""A prompt and what follows it: two texts, or TRL's two lists of messages."""

from __future__ import annotations

from mlx_lora.data.examples import Completion, Conversation, EmptyPart, Fields, FormatError, conversation
from mlx_lora.data.formats import SYSTEM, fitting, opened, opening, system_text
from mlx_lora.data.forms import DataForm, need


def parse(record: Fields) -> Conversation | Completion:
    record = fitting(record)
    prompt, completion = (need(record, key, "completions") for key in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise EmptyPart("empty completion")
        if not (opening(record) or record.get("tools") or record.get("functions")):
            return Completion(prompt, completion)
        # Only a chat can have these.
        prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise FormatError("prompt and completion must both be strings, or both lists of messages")
    # Only the completion is trained, whatever roles the prompt has.
    context = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in opened(record, prompt)]
    return conversation(context + completion, record.get("tools"), system_text(record), record.get("functions"))


FORM = DataForm(
    "prompt, completion",
    frozenset(("prompt", "completion", *SYSTEM, "history", "tools", "functions")),
    parse,
    lambda record: "prompt" in record and "completion" in record,
    rank=3,
)
