"""Show a teacher the same rows with a prompt that the student does not see.

The text is a system message in the teacher's row: before the row's own system message, if it has one. Where the chat
template shows no system message, it stands in front of the first user turn; where there is no template, in front of the
prompt. What follows is the same text, so the trained tokens are the same ones in the same order; a row where they are not
is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion, Conversation, Example, FormatError, Message, Text
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
        turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]
        example = Conversation(turns)
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
    theirs = teacher_encoder(encoder).encode(list(seen.values()))
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


def teacher_encoder(encoder: Encoder) -> Encoder:
    """Return the encoder of the teacher's rows: the student's, without a limit on their length."""
    return Encoder(
        encoder.tokenizer,
        encoder.template,
        max_seq_length=NO_LIMIT,
        plain_completions=encoder.plain,
        day=encoder.day,
        allow_special_tokens=encoder.allow_special_tokens,
    )


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
