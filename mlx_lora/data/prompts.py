"""Read records whose prompts a model answers during training, and encode the prompts.

A record is a prompt alone (TRL: `prompt`, a text or messages; messages that end with the user's turn), or any record that
has an answer too, in a format that imitation reads. The answer is not trained. Rewards see it, and every other column of
the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
import numpy as np

from mlx_lora.data.chat_template import chat_tokens
from mlx_lora.data.columns import usual_names
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion, Conversation, Fields, FormatError, Message
from mlx_lora.data.formats import parse_record
from mlx_lora.data.messages import keys_of
from mlx_lora.data.sandbox import CLOCK
from mlx_lora.data.special_tokens import controls_of
from mlx_lora.data.teacher_prompt import seen_by_teacher
from mlx_lora.data.tokenize import Encoded, Encoder
from mlx_lora.utils.errors import InputError

STAND_IN = "."  # for the answer of a record without one, so that the parsers of chats read it
PROMPT_EXPECTED = "prompt, messages that end with the user's turn, or a question and its answer"


@dataclass(frozen=True)
class Prompt:
    """A prompt that the model answers during training.

    Attributes:
        example: the prompt as a conversation or a completion, with the record's own answer or a stand-in.
        columns: the record's columns, for rewards; `answer` is its answer, if it has one under any usual name.
        chat: whether the record has the prompt as messages; rewards then get messages, as in TRL.
        answered: whether the record has an answer of its own.
    """

    example: Conversation | Completion
    columns: dict[str, Any]
    chat: bool
    answered: bool = False


def parse_prompt(record: Fields) -> Prompt:
    """Read one record as a prompt.

    Raises:
        FormatError: it has no prompt.
    """
    record = {key: value for key, value in record.items() if value is not None}
    plain, chat = usual_names(record), _has_turns(record)
    answered = _as_example(record)
    example = answered or _as_example(_with_stand_in(plain))
    if example is None:
        raise FormatError(f"found {keys_of(record)}; a prompt needs {PROMPT_EXPECTED}")
    columns = dict(record)
    if answered is not None and "answer" not in columns:
        columns["answer"] = _answer_of(answered)
    return Prompt(example, columns, chat, answered is not None)


def with_answer(prompt: Prompt, text: str | None) -> Fields:
    """Return a prompt as a record that imitation reads, with this answer; None: with its own."""
    example = prompt.example
    if isinstance(example, Completion):
        return {"prompt": example.prompt, "completion": example.completion if text is None else text}
    answer = example.messages[-1] if text is None else {"role": "assistant", "content": text}
    record: Fields = {"messages": [*_before_answer(example), answer]}
    return record | ({"tools": example.tools} if example.tools else {})


def prompt_of(prompt: Prompt) -> str | list[Message]:
    """Return the prompt as rewards see it: messages, or a text."""
    if isinstance(prompt.example, Completion):
        return prompt.example.prompt
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in _before_answer(prompt.example)]
    return turns if prompt.chat else str(turns[-1]["content"])


def example_with_answer(example: Conversation | Completion, text: str) -> Conversation | Completion:
    """Return a prompt's example with this answer instead of its own."""
    if isinstance(example, Completion):
        return replace(example, completion=text)
    return replace(example, messages=[*_before_answer(example), {"role": "assistant", "content": text}])


def encode_prompts(encoder: Encoder, prompts: Sequence[Prompt], teacher_prompt: str | None = None) -> Encoded:
    """Encode prompts up to where the answer begins; no token is a target.

    A prompt that leaves no room for an answer within the encoder's length is dropped. With `teacher_prompt`, each prompt
    is also encoded as a teacher sees it, with that text before it.
    """
    rows, source, dropped, facts, seen = [], [], {}, [], []
    controls: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        example = prompt.example
        try:
            tokens = _tokens(encoder, example)
            theirs = tokens
            if teacher_prompt is not None:
                theirs = _tokens(encoder, seen_by_teacher(example, teacher_prompt, encoder))
        except FormatError as error:
            dropped[number] = str(error)
            continue
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            dropped[number] = f"the chat template refuses the prompt ({error})"
            continue
        if len(tokens) >= encoder.max_tokens:
            dropped[number] = f"the prompt has {len(tokens)} tokens, and --max-seq-length is {encoder.max_tokens}"
            continue
        for name in _controls(encoder, example):
            controls.setdefault(name, []).append(number)
        rows.append(_untrained(tokens))
        seen.append(_untrained(theirs))
        source.append(number)
        facts.append(
            {"prompt": prompt_of(prompt), "chat": prompt.chat, "columns": prompt.columns, "example": prompt.example}
        )
    teacher = None if teacher_prompt is None else EncodedSet.from_rows(seen)
    encoded = replace(EncodedSet.from_rows(rows).with_facts(facts), teacher=teacher)
    return Encoded(encoded, np.array(source, np.int64), dropped, [], {}, [], controls)


def _untrained(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(tokens, np.int32), np.zeros(len(tokens), bool)


def _controls(encoder: Encoder, example: Conversation | Completion) -> tuple[str, ...]:
    """Return the control tokens that the turns of a rendered prompt have as content."""
    if isinstance(example, Completion):
        turns = [] if encoder.plain else [{"role": "user", "content": example.prompt}]
    else:
        turns = _before_answer(example)
    return controls_of(encoder.tokenizer).found(turns)


def _tokens(encoder: Encoder, example: Conversation | Completion) -> list[int]:
    """Return the tokens up to where the answer begins."""
    tokenizer: Any = encoder.tokenizer
    if isinstance(example, Completion):
        if encoder.plain:
            return tokenizer.encode(example.prompt)
        example = Conversation(
            [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": STAND_IN}]
        )
    if encoder.template is None:
        raise InputError("conversations require a chat template, but none was given; give one with --chat-template")
    turns = _before_answer(example)
    with CLOCK.held():
        return chat_tokens(tokenizer, turns, encoder.template, example.tools, encoder.day, encoder.allow_special_tokens)


def _as_example(record: Fields) -> Conversation | Completion | None:
    """Return what imitation reads in a record, None if it reads no prompt in it."""
    try:
        example = parse_record(record)[1]
    except FormatError:
        return None
    if isinstance(example, Conversation):
        return example if example.messages[-1]["role"] == "assistant" and len(example.messages) > 1 else None
    return example if isinstance(example, Completion) else None


def _with_stand_in(record: Fields) -> Fields:
    """Return a record that has only a prompt with an answer after it."""
    stand_in = {"role": "assistant", "content": STAND_IN}
    for name in ("messages", "prompt"):
        if isinstance(record.get(name), list):
            return {"messages": [*record[name], stand_in], "tools": record.get("tools")}
    asked = next((name for name in ("prompt", "question", "instruction", "query", "problem") if name in record), None)
    if asked is None or not isinstance(record[asked], str):
        return record
    if "system" in record or "input" in record:
        given = {name: record[name] for name in ("system", "input") if name in record}
        return {**given, "instruction": record[asked], "output": STAND_IN}
    return {"prompt": record[asked], "completion": STAND_IN}


def _has_turns(record: Fields) -> bool:
    return any(isinstance(record.get(name), list) for name in ("prompt", "messages", "conversations"))


def _before_answer(example: Conversation) -> list[Message]:
    """Return the turns before the last answer, which the model is to give."""
    return example.messages[:-1]


def _answer_of(example: Conversation | Completion) -> str:
    if isinstance(example, Completion):
        return example.completion
    return str(example.messages[-1]["content"])
