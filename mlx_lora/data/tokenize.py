"""Encode examples as token ids with an exact loss mask, in flat arrays.

Shapes: N tokens of all rows together, R rows. Each text is tokenized once as a whole, and the tokenizer's alignment turns
character spans into token masks; a token that holds any trained character is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlx_lora.data.chat_template import chat_tokens, controls_of, plain_backend, prefix_tokens
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion, Conversation, Example, FormatError, Text, as_conversation, tokenizable
from mlx_lora.data.render import Rendered, Renderer, Rendering
from mlx_lora.data.sandbox import tokenizer_panics
from mlx_lora.utils.errors import InputError

BATCH_ROWS, BATCH_CHARACTERS = 1000, 1_000_000  # a batch ends with the first row that makes it longer
AHEAD_ROWS = 100


@dataclass(frozen=True)
class Encoded:
    """The rows of some examples, and what happened to each example.

    Attributes:
        rows: the encoded set.
        source: (R,) int64, the example that a row comes from (a long text gives several rows, and so does a chat whose
            template hides the thinking of earlier turns).
        dropped: example number -> why it gave no row.
        truncated: numbers of the examples that were cut at the maximum length.
        unshown: field with content that the chat template does not show -> numbers of the examples that have it.
        divided: numbers of the chats that gave several rows.
        controls: control token that content spells -> numbers of the examples.
    """

    rows: EncodedSet
    source: np.ndarray
    dropped: dict[int, str] = field(default_factory=dict)
    truncated: list[int] = field(default_factory=list)
    unshown: dict[str, list[int]] = field(default_factory=dict)
    divided: list[int] = field(default_factory=list)
    controls: dict[str, list[int]] = field(default_factory=dict)


class Encoder:
    """Encodes examples with a tokenizer, a template and the settings that decide what is trained.

    Attributes:
        long_rows: What becomes of rows that are too long (--long-rows).
        train_line_break: Whether the line break after an answer's end is trained with it.
        last_answer: Whether only the last answer of a chat is trained.
        whole_chats: Whether all of a chat is trained, though of a prompt with an answer only the answer is.
    """

    long_rows = "divide"
    whole_chats = train_line_break = last_answer = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        *,
        max_seq_length: int,
        mask_prompt: bool = True,
        plain_completions: bool = False,
        day: date | None = None,
        allow_special_tokens: bool = False,
    ):
        """Prepare to encode.

        Args:
            tokenizer: A fast tokenizer (one with offsets), not mlx-lm's wrapper.
            template: Chat template, Jinja text; None if only plain text will be encoded.
            max_seq_length: The most tokens per row.
            mask_prompt: Only train assistant turns and completions; otherwise every token but the first.
            plain_completions: Join prompt and completion as they are, for models without a template.
            day: The day that a template shows as today; None: today.
            allow_special_tokens: A message that spells a control token brings that token in.

        Raises:
            InputError: the tokenizer gives no offsets, or the length leaves no room for a target.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise InputError(
                f"the tokenizer is a {type(tokenizer).__name__}, which does not give the positions of tokens in the "
                "text; training requires a fast tokenizer (a tokenizer.json)"
            )
        self.prefix = prefix_tokens(tokenizer)
        if max_seq_length < (fewest := len(self.prefix) + 2):
            raise InputError(f"--max-seq-length {max_seq_length} leaves no token to train; use {fewest} or more")
        self.renderer = None if template is None else Renderer(tokenizer, template, day, allow_special_tokens)
        self.allow_special_tokens = allow_special_tokens
        self.tokenizer, self.template, self.day, self.max_tokens = tokenizer, template, day, max_seq_length
        self._mask_prompt = mask_prompt
        self.plain = plain_completions
        self._eos: Any = tokenizer.eos_token_id
        self._backend = plain_backend(tokenizer)

    def encode(self, examples: Sequence[Example], on_rows: Callable[[int], None] = lambda done: None) -> Encoded:
        """Encode examples in order.

        Args:
            examples: What to encode.
            on_rows: Called from time to time with the number of examples done.

        Returns:
            Every row has at least one trained target; examples without any are in `dropped`.
        """
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        source: list[int] = []
        found = Encoded(EncodedSet.from_rows(rows), np.array(source, np.int64))
        # The tokenizer uses all cores without Python's lock, so the next batch can be rendered at the same time.
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting: tuple[list[tuple[int, Rendered]], Future[list[Encoding]]] | None = None
            start = 0
            while start < len(examples):
                stop, rendered = self._render_batch(examples, start, found)
                texts = [text.text for _, text in rendered]
                ahead = pool.submit(self._backend.encode_batch, texts, add_special_tokens=False)
                if waiting:
                    self._add_rows(examples, *waiting, found, rows, source)
                    on_rows(start)
                waiting, start = (rendered, ahead), stop
            if waiting:
                self._add_rows(examples, *waiting, found, rows, source)
        # An example only counts as dropped if none of its rows is left.
        dropped = {number: found.dropped[number] for number in sorted(found.dropped.keys() - set(source))}
        truncated = sorted(set(found.truncated))
        encoded = EncodedSet.from_rows(rows)
        return replace(found, rows=encoded, source=np.array(source, np.int64), dropped=dropped, truncated=truncated)

    def _render_batch(
        self, examples: Sequence[Example], start: int, found: Encoded
    ) -> tuple[int, list[tuple[int, Rendered]]]:
        """Return where a batch ends, and (number, text) of its examples; those that cannot be rendered are dropped."""
        rendered, chats, written = [], [], 0
        for number in range(start, min(start + BATCH_ROWS, len(examples))):
            if number >= start + len(chats):
                ahead = examples[number : number + AHEAD_ROWS]
                own = [as_conversation(one) if isinstance(one, Completion) and not self.plain else one for one in ahead]
                chats += [with_last_answer(one) if self.last_answer else one for one in own]
                if self.renderer is not None:
                    self.renderer.render_ahead([one for one in chats[number - start :] if type(one) is Conversation])
            try:
                rendering = self._render(chats[number - start])
                for row in rendering.rows:
                    tokenizable(row.text)
            except FormatError as error:
                found.dropped[number] = str(error)
                continue
            rendered += [(number, row) for row in rendering.rows]
            if len(rendering.rows) > 1:
                found.divided.append(number)
            for name in rendering.unshown:
                found.unshown.setdefault(name, []).append(number)
            for name in rendering.controls:
                found.controls.setdefault(name, []).append(number)
            written += sum(len(row.text) for row in rendering.rows)
            if written > BATCH_CHARACTERS:
                return number + 1, rendered
        return min(start + BATCH_ROWS, len(examples)), rendered

    def _add_rows(
        self,
        examples: Sequence[Example],
        rendered: list[tuple[int, Rendered]],
        encodings: Future[list[Encoding]],
        found: Encoded,
        rows: list[tuple[np.ndarray, np.ndarray]],
        source: list[int],
    ) -> None:
        """Turn one batch's encodings into rows, and note in `found` what was left out."""
        with tokenizer_panics("the data"):
            found_encodings = encodings.result()
        for (number, text), encoding in zip(rendered, found_encodings, strict=True):
            example = examples[number]
            plain = isinstance(example, Text) or (isinstance(example, Completion) and self.plain)
            tokens, mask = self._row(text, encoding, plain)
            if self.whole_chats and isinstance(example, Conversation):
                mask[1:] |= not any("weight" in turn for turn in example.messages)
            if isinstance(example, Text):
                pieces = windows(tokens, mask, self.max_tokens, len(self.prefix))
                pieces = pieces[:1] if self.long_rows == "cut" else pieces
            else:
                pieces = [(tokens[: self.max_tokens].copy(), mask[: self.max_tokens].copy())]  # without the rest
                if len(tokens) > self.max_tokens and self.long_rows == "drop":
                    found.dropped[number] = f"more than {self.max_tokens} tokens (--long-rows drop)"
                    continue
                if len(tokens) > self.max_tokens:
                    found.truncated.append(number)
            pieces = [piece for piece in pieces if piece[1].any()]
            if not pieces:
                found.dropped[number] = f"no trained token among the first {self.max_tokens} (--max-seq-length)"
            rows += pieces
            source += [number] * len(pieces)

    def shows_tools(self, conversation: Conversation) -> bool:
        """Return whether the template shows the conversation's tools to the model."""
        return self.renderer is not None and self.renderer.shows_tools(conversation)

    def prompt_tokens(self, example: Conversation | Completion) -> list[int]:
        """Return the tokens up to where an example's answer begins.

        Raises:
            FormatError: it is too long for the tokenizer.
            InputError: it has turns, and there is no chat template.
            jinja2.TemplateError, TypeError, ValueError: the template refuses it.
        """
        if isinstance(example, Completion) and self.plain:
            return self.tokenizer.encode(tokenizable(example.prompt))
        if self.template is None:
            raise InputError("conversations require a chat template, but none was given; give one with --chat-template")
        chat = as_conversation(example)
        turns = chat.messages[:-1]
        tokenizable("".join(turn["content"] for turn in turns))
        return chat_tokens(self.tokenizer, turns, self.template, chat.tools, self.day, self.allow_special_tokens)

    def picture_number(self, example: Example) -> int | None:
        """Return the number of a prompt's pictures in the run's table; None: pictures are not read."""
        return None

    def _render(self, example: Example) -> Rendering:
        if isinstance(example, Text):
            return Rendering([Rendered(example.text, [(0, len(example.text))], append_eos=example.ends)])
        if isinstance(example, Completion):
            prompt, completion = example.prompt, example.completion
            text = prompt + completion
            return Rendering([Rendered(text, [(len(prompt), len(text))], append_eos=True)])
        if self.renderer is None:
            raise InputError("conversations require a chat template, but none was given; give one with --chat-template")
        return self.renderer.render(example)

    def _row(self, rendered: Rendered, encoding: Encoding, plain: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and mask (n,) of one text, before it is cut."""
        ids = np.array(encoding.ids, np.int32)
        mask = np.zeros(len(ids), bool)
        for start, end in rendered.spans:
            end += self.train_line_break and rendered.text[end : end + 1] == "\n"
            mask[slice(*token_range(encoding, (start, end), len(rendered.text)))] = True
        if rendered.ordinary:
            controls = controls_of(self.tokenizer)
            found, origin = controls.as_text(rendered.text, encoding.ids, encoding.offsets, rendered.ordinary)
            ids, mask = np.array(found, np.int32), mask[origin]
        eos_missing = len(ids) == 0 or ids[-1] != self._eos
        if rendered.append_eos and self._eos is not None and eos_missing:
            ids, mask = np.append(ids, np.int32(self._eos)), np.append(mask, True)
        if plain and self.prefix:
            # A plain text may itself begin with the BOS text. A chat only has a BOS if its template writes one.
            have = ids[: len(self.prefix)].tolist() == self.prefix
            prefix = np.array([] if have else self.prefix, np.int32)
            ids = np.concatenate([prefix, ids])
            mask = np.concatenate([np.zeros(len(prefix), bool), mask])
            mask[: len(self.prefix)] = False
        if not self._mask_prompt:
            mask = np.ones(len(ids), bool)
        mask[:1] = False
        return ids, mask


def with_last_answer(example: Example) -> Example:
    """Return an example of whose answers only the last is trained."""
    if not isinstance(example, Conversation):
        return example
    answers = [number for number, turn in enumerate(example.messages) if turn["role"] == "assistant"]
    turns = [{**turn, "weight": 0} if number in answers[:-1] else turn for number, turn in enumerate(example.messages)]
    return replace(example, messages=turns)


def windows(
    tokens: np.ndarray, mask: np.ndarray, max_tokens: int, prefix: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return a long row as windows that together keep every target.

    Each window repeats the row's first `prefix` tokens (a BOS), then the last token of the window before it as context
    for its first target; neither is a target there.

    Args:
        tokens: (n,) int32.
        mask: (n,) bool.
        max_tokens: Tokens per window.
        prefix: Number of tokens at the row's start that every window repeats.

    Returns:
        (tokens, mask) per window; together they hold each of the row's targets once.
    """
    if len(tokens) <= max_tokens:
        return [(tokens, mask)]
    head = tokens[:prefix], mask[:prefix] & False
    found = [(tokens[:max_tokens], mask[:max_tokens])]
    start = max_tokens - 1  # the overlapping token
    while start + 1 < len(tokens):
        stop = start + max_tokens - prefix
        part = mask[start:stop].copy()
        part[0] = False
        found.append((np.concatenate([head[0], tokens[start:stop]]), np.concatenate([head[1], part])))
        start = stop - 1
    return found


def token_range(encoding: Encoding, span: tuple[int, int], text_chars: int) -> tuple[int, int]:
    """Return the range of tokens that hold any character of `span`.

    Args:
        encoding: The encoding of the whole text, with untrimmed offsets.
        span: Characters [start, end).
        text_chars: Length of the text.
    """
    start, end = span
    # A normalizer may remove characters, which then belong to no token: try the next character.
    held = (token for char in range(start, end) if (token := encoding.char_to_token(char)) is not None)
    first = next(held, None)
    if first is None:
        return 0, 0
    after = (token for char in range(end, text_chars) if (token := encoding.char_to_token(char)) is not None)
    stop = next(after, len(encoding.ids))
    if stop < len(encoding.ids) and (held_by := encoding.token_to_chars(stop)) and held_by[0] < end:
        stop += 1  # this token straddles the span's end
    return first, stop
