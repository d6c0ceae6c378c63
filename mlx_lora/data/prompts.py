"""Read records whose prompts a model answers during training, and encode the prompts, also the one that only a teacher sees.

A record is a prompt alone (TRL: `prompt`, a text or messages; messages that end with the user's turn), or any record that
has an answer too, in a format that imitation reads. The answer is not trained. Rewards see it, and every other column of
the record.

A teacher may see the same rows with a system message that the student does not see: before the row's own system message, if
it has one. Where the chat template shows no system message, it stands in front of the first user turn; where there is no
template, in front of the prompt. What follows is the same text, so the trained tokens are the same ones in the same order; a
row where they are not is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from mlx_lora.data.chat_template import controls_of, tokens_after_turn
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import (
    Completion,
    Conversation,
    Example,
    Fields,
    FormatError,
    Message,
    Text,
    as_conversation,
    keys_of,
)
from mlx_lora.data.formats import GIVEN, QUESTIONS, fitting, opened, opening, parse_record, usual_names
from mlx_lora.data.tokenize import Encoded, Encoder
from mlx_lora.utils.errors import InputError

NO_LIMIT = 10**9  # tokens; the prompt makes the teacher's rows longer than --max-seq-length, but trains nothing more
MOST_BYTES = 1 << 20  # of the prompt's file: a page, a manual; not a corpus
BETWEEN = "\n\n"
Row = tuple[np.ndarray, np.ndarray]
"""Tokens (n,) int32 and the mask (n,) bool of those that are trained."""


def read_teacher_prompt(file: str | None) -> str | None:
    """Return the text of --teacher-prompt, without white space at its ends; None if there is none.

    Raises:
        InputError: there is no such file, or it is not a text.
    """
    if file is None:
        return None
    path = Path(file).expanduser()
    try:
        with path.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig").strip()
    except OSError as error:
        raise InputError(f"--teacher-prompt {file}: cannot be read ({error.strerror}); give a text file") from None
    except UnicodeDecodeError:
        raise InputError(f"--teacher-prompt {file}: not UTF-8; save it as UTF-8") from None
    if len(content) > MOST_BYTES:
        raise InputError(f"--teacher-prompt {file}: more than {MOST_BYTES >> 20} MiB; give a page of text")
    if not text:
        raise InputError(f"--teacher-prompt {file}: is empty; write what the teacher should be told")
    return text


def seen_by_teacher(example: Example, prompt: str, encoder: Encoder) -> Conversation | Completion:
    """Return an example as the teacher sees it.

    Args:
        example: as the student sees it.
        prompt: the text of --teacher-prompt.
        encoder: of the student's rows; it knows the template.

    Raises:
        FormatError: there is no turn that the prompt could precede.
    """
    if isinstance(example, Text):
        raise FormatError("a text without turns; --teacher-prompt is for chats, and for prompts with answers")
    if isinstance(example, Completion):
        if encoder.plain:
            return Completion(prompt + BETWEEN + example.prompt, example.completion)
        example = as_conversation(example)
    shown = encoder.renderer is None or encoder.renderer.shows_system
    return replace(example, messages=with_prompt(example.messages, prompt, shown))


def with_prompt(messages: Sequence[Message], prompt: str, shows_system: bool = True) -> list[Message]:
    """Return turns that begin with a prompt.

    Args:
        messages: the turns.
        prompt: its text.
        shows_system: whether the chat template shows system messages; if not, the first user turn begins with it.

    Raises:
        FormatError: there is no user turn.
    """
    first, *others = messages
    if shows_system:
        if first["role"] in ("system", "developer"):
            return [{**first, "content": prompt + BETWEEN + first["content"]}, *others]
        return [{"role": "system", "content": prompt}, *messages]
    for number, turn in enumerate(messages):
        if turn["role"] == "user":
            spoken = {**turn, "content": prompt + BETWEEN + turn["content"]}
            return [*messages[:number], spoken, *messages[number + 1 :]]
    raise FormatError("no user turn that --teacher-prompt could precede, and the chat template shows no system message")


def with_teacher_rows(encoded: Encoded, examples: Sequence[Example], prompt: str, encoder: Encoder) -> Encoded:
    """Add to each row the same row as the teacher sees it.

    Args:
        encoded: the student's rows of `examples`.
        examples: all of them.
        prompt: the text of --teacher-prompt.
        encoder: of the student's rows.

    Returns:
        The rows that have a teacher's row with the same trained tokens; the others' examples are dropped.
    """
    dropped, seen = dict(encoded.dropped), {}
    for number in dict.fromkeys(encoded.source.tolist()):
        try:
            seen[number] = seen_by_teacher(examples[number], prompt, encoder)
        except FormatError as error:
            dropped[number] = str(error)
    unlimited = Encoder(
        encoder.tokenizer,
        encoder.template,
        max_seq_length=NO_LIMIT,
        plain_completions=encoder.plain,
        day=encoder.day,
        allow_special_tokens=encoder.allow_special_tokens,
    )
    theirs = unlimited.encode(list(seen.values()))
    numbers = list(seen)
    dropped |= {numbers[i]: f"with --teacher-prompt: {why}" for i, why in theirs.dropped.items()}
    candidates: dict[int, list[int]] = {}
    for row, i in enumerate(theirs.source.tolist()):
        candidates.setdefault(numbers[i], []).append(row)
    left = {number: iter(rows) for number, rows in candidates.items()}
    own, other, source = [], [], []
    for row, number in enumerate(encoded.source.tolist()):
        pairs = _paired(encoded.rows.row(row), theirs.rows, left.get(number, iter(())))
        if not pairs:
            dropped.setdefault(number, "its answer has other tokens after --teacher-prompt")
        own += [mine for mine, _ in pairs]
        other += [seen_row for _, seen_row in pairs]
        source += [number] * len(pairs)
    for number in set(source) & dropped.keys():  # as in Encoder: only what has no row left counts as dropped
        del dropped[number]
    rows = replace(EncodedSet.from_rows(own), teacher=EncodedSet.from_rows(other))
    return replace(encoded, rows=rows, source=np.array(source, np.int64), dropped=dict(sorted(dropped.items())))


def prompt_notes(encoder: Encoder, prompt: str | None) -> list[str]:
    """Return a note where the teacher's prompt is not a system message."""
    if prompt is None:
        return []
    if encoder.renderer is None:
        return ["--teacher-prompt stands in front of each prompt: there is no chat template"]
    if not encoder.renderer.shows_system:
        return ["--teacher-prompt stands in front of the first user turn: the chat template shows no system message"]
    return []


def _paired(row: Row, theirs: EncodedSet, candidates: Iterable[int]) -> list[tuple[Row, Row]]:
    """Return a row with the teacher's row that has its trained tokens; nothing if there is none.

    A chat may be one row for the student and several for the teacher: some templates show a system message only at the last
    question, so that each answer needs a row of its own. Then the student's row is divided in the same way.

    Args:
        row: tokens and mask of the student's.
        theirs: the teacher's rows.
        candidates: the numbers of those of the same example that are not taken yet, in order.
    """
    tokens, mask = row
    at, found, done = np.flatnonzero(mask), [], 0
    for candidate in candidates:
        their_tokens, their_mask = theirs.row(candidate)
        their_at = np.flatnonzero(their_mask)[: len(at) - done]
        part = at[done : done + len(their_at)]
        if not np.array_equal(their_tokens[their_at], tokens[part]):
            if done:
                return []
            continue  # of a row that was cut away for the student
        seen = _until(their_tokens, their_at)
        if len(part) == len(at):
            return [(row, seen)]
        found.append((_until(tokens, part), seen))
        done += len(part)
        if done == len(at):
            return found
    return []


def _until(tokens: np.ndarray, targets: np.ndarray) -> Row:
    """Return the tokens up to the last of these targets, which are trained."""
    mask = np.zeros(int(targets[-1]) + 1, bool)
    mask[targets] = True
    return tokens[: len(mask)], mask


# The teacher's own prompt
ANSWER_MARK = "the-answer-before"  # stands for an answer, whose end is searched for in a rendered text
STAND_IN = "."  # for the answer of a record without one, so that the parsers of chats read it
PROMPT_EXPECTED = "prompt, messages that end with the user's turn, or a question and its answer"


@dataclass(frozen=True)
class Prompt:
    """A prompt that the model answers during training.

    Attributes:
        example: the prompt as a conversation or a completion, with the record's own answer or a stand-in.
        columns: the record's columns, for rewards, with None where it has nothing; `answer` is its answer, if it has one under
            any usual name.
        chat: whether the record has the prompt as messages; rewards then get messages, as in TRL.
        answered: whether the record has an answer of its own.
    """

    example: Conversation | Completion
    columns: dict[str, Any]
    chat: bool
    answered: bool = False

    def fact(self, example: Conversation | Completion) -> dict[str, Any]:
        """Return what rewards see of the prompt, which was encoded as this example."""
        return {"prompt": prompt_of(self), "chat": self.chat, "columns": self.columns, "example": example}


def parse_prompt(record: Fields) -> Prompt:
    """Read one record as a prompt.

    Raises:
        FormatError: it has no prompt.
    """
    columns = dict(record)
    record = {key: value for key, value in record.items() if value is not None}
    plain = usual_names(record)
    chat = any(isinstance(record.get(name), list) for name in ("prompt", "messages", "conversations"))
    answered = _as_example(record)
    example = answered or _as_example(_with_stand_in(plain))
    if example is None:
        raise FormatError(f"found {keys_of(record)}; a prompt needs {PROMPT_EXPECTED}")
    if answered is not None and columns.get("answer") is None:
        is_text = isinstance(answered, Completion)
        columns["answer"] = answered.completion if is_text else str(answered.messages[-1]["content"])
    return Prompt(example, columns, chat, answered is not None)


def with_answer(prompt: Prompt, text: str | None) -> Fields:
    """Return a prompt as a record that imitation reads, with this answer; None: with its own."""
    example = prompt.example
    if isinstance(example, Completion):
        return {"prompt": example.prompt, "completion": example.completion if text is None else text}
    answer = example.messages[-1] if text is None else {"role": "assistant", "content": text}
    record: Fields = {"messages": [*example.messages[:-1], answer]}
    return record | ({"tools": example.tools} if example.tools else {})


def prompt_of(prompt: Prompt) -> str | list[Message]:
    """Return the prompt as rewards see it: messages, or a text."""
    if isinstance(prompt.example, Completion):
        return prompt.example.prompt
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in prompt.example.messages[:-1]]
    return turns if prompt.chat else str(turns[-1]["content"])


def example_with_answer(example: Conversation | Completion, text: str) -> Conversation | Completion:
    """Return a prompt's example with this answer instead of its own."""
    if isinstance(example, Completion):
        return replace(example, completion=text)
    return replace(example, messages=[*example.messages[:-1], {"role": "assistant", "content": text}])


def with_observation(example: Conversation | Completion, text: str) -> Conversation | Completion:
    """Return a prompt's example with a text after its last message before the answer."""
    if isinstance(example, Completion):
        return replace(example, prompt=example.prompt + text)
    *turns, last = example.messages[:-1]
    return replace(example, messages=[*turns, {**last, "content": last["content"] + text}, example.messages[-1]])


def observation_tokens(encoder: Encoder, example: Conversation | Completion, text: str) -> list[int]:
    """Return the tokens between an answer's end token and the next answer, where an observation is the user's turn.

    Args:
        encoder: of the prompts.
        example: of the prompt; after one that is not rendered, the text stands as it is.
        text: the observation.

    Raises:
        InputError: the chat template refuses a second turn of the user.
    """
    tokenizer: Any = encoder.tokenizer
    if encoder.template is None or (encoder.plain and isinstance(example, Completion)):
        return tokenizer.encode(text, add_special_tokens=False)
    turns = [
        {"role": "user", "content": STAND_IN},
        {"role": "assistant", "content": ANSWER_MARK},
        {"role": "user", "content": text},
    ]
    try:
        return tokens_after_turn(
            tokenizer, turns, ANSWER_MARK, encoder.template, encoder.day, encoder.allow_special_tokens
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"--environment: the chat template refuses an observation as the user's turn ({error}); give another with "
            "--chat-template"
        ) from None


def with_tools(example: Conversation | Completion, tools: Sequence[dict[str, Any]]) -> Conversation:
    """Return a prompt as a conversation that shows these tools, in place of the record's own."""
    return replace(as_conversation(example), tools=list(tools))


def encode_prompts(
    encoder: Encoder,
    prompts: Sequence[Prompt],
    teacher_prompt: str | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
    on_rows: Callable[[int], None] = lambda done: None,
) -> Encoded:
    """Encode prompts up to where the answer begins; no token is a target.

    A prompt that leaves no room for an answer within the encoder's length is dropped.

    Args:
        encoder: how.
        prompts: what to encode.
        teacher_prompt: each prompt is also encoded as a teacher sees it, with this text before it.
        tools: schemas that each prompt shows, in place of its record's own.
        on_rows: called with the number of prompts done.

    Raises:
        InputError: there are tools, and no chat template.
    """
    if tools and encoder.template is None:
        raise InputError(
            "--tools or --environment: the model has no chat template, so it cannot be shown tools; give --chat-template chatml"
        )
    rows, source, dropped, facts, seen, pictures = [], [], {}, [], [], []
    controls: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        example = with_tools(prompt.example, tools) if tools else prompt.example
        try:
            tokens = encoder.prompt_tokens(example)
            theirs = tokens
            if teacher_prompt is not None:
                theirs = encoder.prompt_tokens(seen_by_teacher(example, teacher_prompt, encoder))
        except FormatError as error:
            dropped[number] = str(error)
            continue
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            dropped[number] = f"the chat template refuses the prompt ({error})"
            continue
        if len(tokens) >= encoder.max_tokens:
            dropped[number] = f"the prompt has {len(tokens)} tokens, and --max-seq-length is {encoder.max_tokens}"
            continue
        if not (isinstance(example, Completion) and encoder.plain):
            for name in controls_of(encoder.tokenizer).found(as_conversation(example).messages[:-1]):
                controls.setdefault(name, []).append(number)
        rows.append((np.array(tokens, np.int32), np.zeros(len(tokens), bool)))
        seen.append((np.array(theirs, np.int32), np.zeros(len(theirs), bool)))
        source.append(number)
        fact, shown = prompt.fact(example), encoder.picture_number(example)
        facts.append(fact if shown is None else {**fact, "pictures": shown})
        pictures += [] if shown is None else [shown]
        on_rows(number + 1)
    teacher = None if teacher_prompt is None else EncodedSet.from_rows(seen)
    encoded = replace(EncodedSet.from_rows(rows).with_facts(facts), teacher=teacher)
    if pictures:
        encoded = replace(encoded, pictures=np.array(pictures, np.int32))
    return Encoded(encoded, np.array(source, np.int64), dropped, [], {}, [], controls)


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
    record = fitting(record)
    tools = {name: record[name] for name in ("tools", "functions") if record.get(name)}
    for name in ("messages", "prompt"):
        if isinstance(record.get(name), list):
            return {"messages": [*opened(record, record[name]), stand_in], **tools}
    asked = next((name for name in QUESTIONS if name in record), None)
    if asked is None or not isinstance(record[asked], str):
        return record
    given = [
        record[name] for name in record if name in GIVEN and isinstance(record[name], str) and record[name].strip()
    ]
    if not (given or tools or opening(record)):
        return {"prompt": record[asked], "completion": STAND_IN}
    question = "\n".join(part for part in (record[asked], *given) if part.strip())
    return {"messages": [*opening(record), {"role": "user", "content": question}, stand_in], **tools}
