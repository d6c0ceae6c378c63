"""Turn prompts with pictures into tokens up to where the model answers: single questions, conversations, and a data set's prompts.

A data set's prompts are answered during training (data/prompts.py has the forms of text). Rewards see the columns of a record as
they are in the file. In the prompt that they see, a picture is a part of its message, as in TRL, or `<image>` in a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.chat_template import controls_of, tokens_of_rendered
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion, Conversation, Example, Fields, FormatError, Message, OwnEntry
from mlx_lora.data.formats import NamedColumns
from mlx_lora.data.image_tokens import ImageReader, ImageRenderer, ImageRowEncoder, expanded
from mlx_lora.data.images import COLUMNS, MARK, PLACE, QUESTIONS, TURNS, ImageConversation, mark, with_marks
from mlx_lora.data.prompts import Prompt, parse_prompt, prompt_of
from mlx_lora.data.render import Rendered
from mlx_lora.data.tokenize import Encoded
from mlx_lora.utils.errors import InputError


def encode_question(
    reader: ImageReader,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    text: str,
    pictures: Sequence[str],
    system_prompt: str | None = None,
) -> tuple[list[int], tuple[str, ...]]:
    """Return the tokens of a question about pictures, up to where its answer begins, and the pictures' digests.

    Args:
        reader: of the model; its folders have the pictures.
        tokenizer: of the model.
        template: Jinja text.
        text: the question; the pictures come first.
        pictures: their files.
        system_prompt: a system message before it.

    Raises:
        InputError: a picture cannot be used, or the template refuses the question.
    """
    sources: dict[str, str | bytes] = {}
    marks = "".join(mark(picture, sources) for picture in pictures)
    messages: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": marks + text})
    try:
        return encode_messages(reader, tokenizer, template, messages, sources)
    except FormatError as error:
        raise InputError(f"--image: {error}") from error


def encode_messages(
    reader: ImageReader,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[Message],
    sources: Mapping[str, str | bytes],
) -> tuple[list[int], tuple[str, ...]]:
    """Return the tokens of a conversation with pictures, up to where the model answers, and the pictures' digests.

    Args:
        reader, tokenizer, template: as for `encode_question`.
        messages: pictures are marks in their content.
        sources: what the marks stand for.

    Raises:
        FormatError: a picture cannot be used.
        InputError: the template shows no pictures, or refuses the conversation.
    """
    renderer = ImageRenderer(tokenizer, template, reader.processor.family.place)
    return _tokens_before_answer(reader, tokenizer, renderer, messages, sources)


def _tokens_before_answer(
    reader: ImageReader,
    tokenizer: PreTrainedTokenizerBase,
    renderer: ImageRenderer,
    messages: list[Message],
    sources: Mapping[str, str | bytes],
    allow_special_tokens: bool = False,
) -> tuple[list[int], tuple[str, ...]]:
    """Return what `encode_messages` does; a message may bring in control tokens if that is allowed."""
    digests = reader.open_all([name for one in messages for name in MARK.findall(one["content"])], sources)
    hidden = controls_of(tokenizer).hide([] if allow_special_tokens else messages)
    rendered, ordinary = hidden.shown(renderer.text_of(hidden.messages if hidden.names else messages))
    shown = [reader.table.shown[digest].text for digest in digests]
    row = expanded(Rendered(rendered, [], ordinary=ordinary), reader.processor.family.place, shown)
    return list(tokens_of_rendered(tokenizer, row.text, row.ordinary)), tuple(digests)


# Prompts of a data set


@dataclass(frozen=True)
class ImagePrompt(OwnEntry):
    """A prompt that the model answers during training, with or without pictures.

    Attributes:
        example: the prompt with an answer or a stand-in; pictures are marks in its messages.
        fact: what rewards see: `prompt`, `chat`, `columns` and `example`, as in data/prompts.py. In an encoded set, `pictures`
            is the number of its pictures in the table.
    """

    example: ImageConversation
    fact: dict[str, Any]

    @property
    def shown(self) -> Example:
        return self.example

    @property
    def columns(self) -> dict[str, Any]:
        return self.fact["columns"]

    @classmethod
    def parse(cls, record: Fields, settings: DataSettings) -> ImagePrompt:
        whole, record = record, {key: value for key, value in record.items() if value is not None}
        named = NamedColumns.of(settings)
        asking = {*TURNS, *QUESTIONS, *COLUMNS, (settings.prompt_column or "").split(",")[0].strip()}
        if isinstance(record.get("completion"), str):
            asking.discard("completion")  # an answer has no places
        asked = {key: value for key, value in record.items() if key in asking}
        sources: dict[str, str | bytes] = {}
        marked = {key: value for key, value in record.items() if key not in asked} | with_marks(
            asked, settings, sources
        )
        prompt = parse_prompt(named.renamed(marked, "prompts")[1])
        example = _as_conversation(prompt.example)
        if any(MARK.search(str(turn.get("content"))) for turn in example.messages if turn["role"] == "assistant"):
            raise FormatError("a picture in an answer; vision-language models cannot write pictures")
        columns = {**whole, **({"answer": prompt.columns["answer"]} if "answer" in prompt.columns else {})}
        shown = replace(prompt, example=_without_marks(prompt.example))
        asked_as = _with_parts(prompt) if prompt.chat else prompt_of(shown)
        fact = {"prompt": asked_as, "chat": prompt.chat, "columns": columns, "example": shown.example}
        illustrated = ImageConversation(
            example.messages, example.tools, example.reasoning_field, example.unread, sources
        )
        return cls(illustrated, fact)

    @classmethod
    def encode(
        cls, encoder: Any, entries: Sequence[ImagePrompt], on_rows: Callable[[int], None] = lambda done: None
    ) -> Encoded:
        """Encode prompts up to where the answer begins; no token is a target.

        Args:
            encoder: how.
            entries: what to encode.
            on_rows: called with the number of prompts done.
        """
        rows, source, facts, pictures, dropped = [], [], [], [], {}
        controls: dict[str, list[int]] = {}
        for number, entry in enumerate(entries):
            turns = entry.example.messages[:-1]
            try:
                tokens, shown = _before_answer(encoder, turns, entry.example)
            except FormatError as error:
                dropped[number] = str(error)
                continue
            except (jinja2.TemplateError, TypeError, ValueError) as error:
                dropped[number] = f"the chat template refuses the prompt ({error})"
                continue
            if len(tokens) >= encoder.max_tokens:
                dropped[number] = f"the prompt has {len(tokens)} tokens, and --max-seq-length is {encoder.max_tokens}"
                continue
            for name in controls_of(encoder.tokenizer).found(turns):
                controls.setdefault(name, []).append(number)
            rows.append((np.array(tokens, np.int32), np.zeros(len(tokens), bool)))
            source.append(number)
            facts.append({**entry.fact, "pictures": shown})
            pictures.append(shown)
            on_rows(number + 1)
        found = replace(EncodedSet.from_rows(rows).with_facts(facts), pictures=np.array(pictures, np.int32))
        return Encoded(found, np.array(source, np.int64), dropped, [], {}, [], controls)


def _before_answer(encoder: ImageRowEncoder, turns: list[Message], example: ImageConversation) -> tuple[list[int], int]:
    """Return the tokens of turns up to where the model answers, and the number of their pictures in the table.

    Raises:
        FormatError: a picture cannot be used, or the prompt shows tools.
        InputError: there is no chat template.
    """
    renderer = encoder.renderer
    if not isinstance(renderer, ImageRenderer):
        raise InputError("prompts with pictures require a chat template, and the model has none; give --chat-template")
    if example.tools:
        raise FormatError("a prompt with tools; with --images, prompts have none")
    tokens, digests = _tokens_before_answer(
        encoder.reader, encoder.tokenizer, renderer, turns, example.sources, encoder.allow_special_tokens
    )
    return tokens, encoder.reader.table.number_of(digests)


def _as_conversation(example: Conversation | Completion) -> Conversation:
    if isinstance(example, Conversation):
        return example
    turns = [("user", example.prompt), ("assistant", example.completion)]
    return Conversation([{"role": role, "content": content} for role, content in turns])


def _without_marks(example: Conversation | Completion) -> Conversation | Completion:
    """Return an example with `<image>` in place of marks, as rewards see it."""
    if isinstance(example, Completion):
        return replace(example, prompt=MARK.sub(PLACE, example.prompt))
    return replace(example, messages=[{**one, "content": MARK.sub(PLACE, one["content"])} for one in example.messages])


def _with_parts(prompt: Prompt) -> list[Message]:
    """Return a prompt as messages; one with pictures has a list of parts as its content."""
    found = []
    for turn in _as_conversation(prompt.example).messages[:-1]:
        content: Any = turn["content"]
        if MARK.search(content):
            pieces = enumerate(re.split(MARK, content))
            content = [
                {"type": "image"} if number % 2 else {"type": "text", "text": piece}
                for number, piece in pieces
                if number % 2 or piece
            ]
        found.append({"role": turn["role"], "content": content})
    return found
