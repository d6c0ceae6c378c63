"""Show pictures to a served model: read those of a conversation, and compute a prompt with what the tower sees of them.

    messages with marks -> PicturePrompt (tokens, pictures)         any thread, one at a time; no MLX
    PicturePrompt -> PicturePrefill -> keys and values              the engine's thread, which loads the tower once

After its prompt, a row with pictures is like any other: its caches are mlx-lm's, and the next token's position is the number
of tokens before it. Its keys and values are not kept for later prompts, because the same tokens may stand for another picture.
Nothing of a picture is written to disk.

Hold a chat with one base and its adapters: the turns so far, the adapter that answers next, and its answers.

    turns + question -> the adapter's chat template -> tokens -> engine -> ChatAnswer -> turns

A prompt is encoded in the same way as for `generate`: same template, same sandbox, same encoding. This module uses neither
terminal nor HTTP: cli/chat.py handles what a user types, and app.py what a client sends.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.chat_template import encode_chat, own_template, template_shows
from mlx_lora.data.downloads import ImageDownloads, is_on_web
from mlx_lora.data.examples import FormatError, Message
from mlx_lora.data.image_tokens import ImageProcessor, ImageReader, ImageTable, encode_messages, family_of
from mlx_lora.data.images import MARK, mark
from mlx_lora.models.image_inputs import ImageInputSpec, ModelWithImages
from mlx_lora.models.load import Base
from mlx_lora.models.vision import VisionTower, compute_dtype, image_token, load_tower
from mlx_lora.objectives.vision_encoder import ImageFeatureCache, VisionEncoder, image_template
from mlx_lora.rollouts.generator import TokenSteps
from mlx_lora.serving.adapter_store import Routing, base_name
from mlx_lora.serving.engine import BatchRow, Engine, Event, Prefill, Request, Sampling, Stopped, Usage, failed_words
from mlx_lora.serving.schema import ApiError, Ask
from mlx_lora.utils.errors import InputError, RunError, first_line


class PictureReader:
    """Reads the pictures of conversations for one base."""

    def __init__(self, base: Base, folders: Sequence[Path] = ()):
        """Prepare; nothing is loaded yet.

        Args:
            base: that is served.
            folders: that files may be read from; data URLs need none.
        """
        self.base, self.folders = base, folders
        self._processors: dict[int | None, ImageProcessor] = {}
        self._tower: VisionTower | None = None

    def check(self) -> None:
        """Check that the model can be shown pictures, before one is read.

        Raises:
            InputError: it cannot.
        """
        kind = self.base.config.get("model_type")
        if family_of(self.base.config) is None:
            raise InputError(f"a {kind} model sees no pictures; leave them out")
        if ImageInputSpec.of(self.base.config).prompt:
            raise InputError(f"a {kind} model is not served with pictures; use mlx-lora generate --image")

    def prompt(
        self,
        messages: list[Message],
        sources: Mapping[str, str | bytes],
        template: str | None,
        folders: Sequence[Path] = (),
        max_pixels: int | None = None,
    ) -> PicturePrompt:
        """Return a conversation as a prompt.

        Args:
            messages: pictures are marks in their content (data/images.py).
            sources: what the marks stand for: file names, data URLs.
            template: the adapter's own; None: the model's.
            folders: further ones that files may be read from.
            max_pixels: to which larger pictures are shrunk; None: only the model's own limits.

        Raises:
            InputError: the model sees no pictures, or one cannot be used.
        """
        self.check()
        base = self.base
        if max_pixels not in self._processors:
            self._processors[max_pixels] = ImageProcessor(base.folder, base.config, max_pixels)
        processor = self._processors[max_pixels]
        template = template or image_template(base.hf_tokenizer, base.folder, processor.family)
        if template is None:
            raise InputError("the model has no chat template, so it cannot be asked about pictures")
        table = ImageTable.empty()
        reader = ImageReader(processor, [*self.folders, *folders], table, image_token(base.config))
        try:
            tokens, digests = encode_messages(reader, base.hf_tokenizer, template, messages, sources)
        except FormatError as error:
            raise InputError(str(error)) from None
        return PicturePrompt(self, tokens, digests, table, processor)

    def arrays(self, prompt: PicturePrompt) -> tuple[ImageInputSpec, list[mx.array]]:
        """Return how the model reads pictures, and a prompt's arrays for that; in the engine's thread.

        Raises:
            InputError: the tower cannot be loaded, or fails.
        """
        if self._tower is None:
            self._tower = load_tower(self.base.folder, compute_dtype(self.base))
        seen = ImageFeatureCache(self._tower, prompt.processor, prompt.table, writes=False)
        spec = ImageInputSpec.of(self.base.config)
        vision = VisionEncoder(self._tower, prompt.processor, spec, prompt.table, seen)
        return spec, vision.prompt_arrays(prompt.tokens, prompt.digests)


@dataclass(frozen=True)
class PicturePrompt:
    """A prompt with pictures.

    Attributes:
        reader: that read it.
        tokens: up to where the model answers.
        digests: of its pictures, in order.
        table: that has them.
        processor: that made their pixels.
    """

    reader: PictureReader
    tokens: list[int]
    digests: tuple[str, ...]
    table: ImageTable
    processor: ImageProcessor

    def prefill(self, model: TokenSteps, routing: Routing, row: BatchRow) -> Prefill:
        """Return what computes the prompt; what the tower sees is computed here, in the engine's thread.

        Raises:
            InputError: see `PictureReader.arrays`.
        """
        spec, arrays = self.reader.arrays(self)
        return PicturePrefill(model, routing, row, self.tokens, ModelWithImages(model.model, spec, arrays))


class PicturePrefill(Prefill):
    """A prompt with pictures, which is computed at once: the tokens of a picture may have to see one another."""

    def __init__(self, model: TokenSteps, routing: Routing, row: BatchRow, tokens: list[int], shown: ModelWithImages):
        """Prepare; arguments as of `Prefill`.

        Args:
            model, routing, row, tokens: see there.
            shown: the model, with what it reads in place of image tokens.
        """
        super().__init__(model, routing, row, tokens, None)
        self._shown = shown

    def advance(self, most: int) -> None:
        """Compute the prompt except for its last token, which is text."""
        part, self.rest = self.rest[:-1], self.rest[-1:]
        self._routing.rows = (self.row.adapter,)
        self.caches = self._shown.prefilled(part)
        self.row.tokens += part


# Hold a chat with one base and its adapters

BASE = "base"  # another name of the base, in addition to its own


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are generated.

    Attributes:
        max_tokens: the most new tokens of one answer.
        context: the most tokens of conversation and answer together.
        sampling: how tokens are drawn.
    """

    max_tokens: int
    context: int
    sampling: Sampling


@dataclass(frozen=True)
class AnswerLimits:
    """Limits for an answer.

    Attributes:
        max_tokens: the most new tokens.
        max_context: the most tokens of prompt and answer together.
        timeout_s: seconds until it must be complete.
        images_from: folder below which clients may name files of pictures; None: they may name none.
    """

    max_tokens: int
    max_context: int
    timeout_s: float
    images_from: Path | None = None


class ChatAnswer:
    """One answer, which may not be complete yet.

    Attributes:
        name: what answers, `base` or an adapter.
        text: the text so far.
        finish: `stop`, `length`, `stopped` by the user; None before that.
        usage: token counts at its end; None if it was stopped.
        cut_by_context: the context limits its length more than `max_tokens` does.
    """

    def __init__(self, engine: Engine, request: Request, cut_by_context: bool):
        """Submit the request.

        Raises:
            QueueFull: too many requests are waiting.
            Stopped: the engine is ending, or has failed.
        """
        self.name = request.adapter or BASE
        self.text, self.finish, self.usage = "", None, None
        self.cut_by_context = cut_by_context
        self._stopping = False
        self._first_s = self._last_s = 0.0
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._engine, self._ticket = engine, engine.submit(request, self._take)

    def _take(self, event: Event) -> None:
        """Queue an event in the engine's thread, so that its time is when it came, not when it is read."""
        self._last_s = time.monotonic()
        self._first_s = self._first_s or self._last_s
        self._events.put(event)

    def __iter__(self) -> Iterator[str]:
        """Yield its text piece by piece, until it ends or is stopped.

        Raises:
            UnknownAdapter, InputError: the adapter is no longer available.
            RunError: the engine has failed.
        """
        while self.finish is None:
            event = None if self._stopping else self._events.get()
            if event is None:
                self._ticket.canceled.set()
                self.finish = "stopped"
                return
            if isinstance(event.error, Stopped):
                raise RunError(failed_words(self._engine.failure))
            if isinstance(event.error, OSError):
                where = f" {event.error.filename}" if event.error.filename else ""
                why = event.error.strerror or first_line(event.error)
                raise InputError(f"{self.name}: its files{where} cannot be read ({why}); /load NAME=DIR loads it again")
            if event.error is not None:
                raise event.error
            self.text += event.piece.text
            self.finish, self.usage = event.finish, event.usage
            if event.piece.text:
                yield event.piece.text

    def stop(self) -> None:
        """End the answer as it is; a signal handler may call this, so it takes no lock."""
        self._stopping = True
        self._events.put(None)

    def cancel(self) -> None:
        """Free its row, if it still has one."""
        if self.finish is None:
            self._ticket.canceled.set()

    def figures(self, alone: bool = True) -> str:
        """Return one line with its length, its speed, and how much of the prompt was cached from earlier turns.

        Args:
            alone: nothing else was answered at the same time; otherwise the speed would be misleading, and is left out.
        """
        usage: Usage | None = self.usage
        if usage is None:
            return f"{self.name}: stopped"
        speed = ""
        if alone and usage.completion > 1 and self._last_s > self._first_s:
            speed = f", {(usage.completion - 1) / (self._last_s - self._first_s):.1f} tokens/s"
        prompt = f"{usage.prompt} tokens in the prompt, {usage.cached} of them cached"
        return f"{self.name}: {usage.completion} tokens{speed}; {prompt}"

    @property
    def span_s(self) -> tuple[float, float]:
        """The times of its first and its last event, on the monotonic clock."""
        return self._first_s, self._last_s


def figures_together(answers: list[ChatAnswer]) -> str:
    """Return one line with the total length and speed of answers that were generated at the same time."""
    done = [answer for answer in answers if answer.usage is not None]
    tokens = sum(answer.usage.completion for answer in done if answer.usage)
    line = f"{len(done)} answers at once: {tokens} tokens"
    spans = [answer.span_s for answer in done]
    seconds = max((last for _, last in spans), default=0.0) - min((first for first, _ in spans), default=0.0)
    return line + (f", {(tokens - len(done)) / seconds:.1f} tokens/s together" if seconds > 0 else "")


class ChatSession:
    """The turns of one chat, with an engine that has any number of adapters.

    Attributes:
        adapter: the adapter that answers next, None for the base.
        system: the system prompt, or None.
        turns: questions and answers, in the format of chat templates; pictures are marks in them.
        attached: marks of pictures that the next question will begin with.
    """

    def __init__(self, engine: Engine, settings: AnswerSettings, system: str | None = None):
        self.engine, self.settings, self.system = engine, settings, system
        self.adapter: str | None = None
        self.turns: list[dict[str, str]] = []
        self.attached = ""
        self._sources: dict[str, str | bytes] = {}
        self._reader = PictureReader(engine.base)

    @property
    def name(self) -> str:
        """The name of what answers next."""
        return self.adapter or BASE

    @property
    def names(self) -> list[str]:
        """The names of the base and of all adapters."""
        return [BASE, *self.engine.store.cards]

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names that mean the base."""
        return BASE, base_name(self.engine.base)

    def adapter_named(self, name: str) -> str | None:
        """Return the adapter that a name means, None for the base.

        Raises:
            InputError: there is no such adapter.
        """
        if name in self.base_names:
            return None
        if name not in self.engine.store.cards:
            raise InputError(f"no adapter {name!r}; there are {', '.join(self.names)}, and /load NAME=DIR loads one")
        return name

    def ask(self, question: str, adapter: str | None) -> ChatAnswer:
        """Return an adapter's answer to a further question; `keep` can add both to the conversation.

        Raises:
            InputError: there is no chat template, it refuses the conversation, or the context is too short.
            RunError: the engine has failed.
        """
        tokens, pictures = self._tokens(self.attached + question, adapter)
        room = self.settings.context - len(tokens)
        if room < 1:
            raise InputError(
                f"with this question, the conversation has {len(tokens)} tokens, and the model's context is "
                f"{self.settings.context}; the question was not added, and /reset empties the conversation"
            )
        most = min(self.settings.max_tokens, room)
        request = Request(tokens, adapter, most, self.settings.sampling, pictures=pictures)
        try:
            return ChatAnswer(self.engine, request, cut_by_context=room < self.settings.max_tokens)
        except Stopped:
            raise RunError(failed_words(self.engine.failure)) from None

    def keep(self, question: str, answer: ChatAnswer) -> None:
        """Add a question and its answer to the turns, unless the answer was stopped before its first word."""
        if answer.text or answer.finish != "stopped":
            question, self.attached = self.attached + question, ""
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]

    def attach(self, picture: str | Path) -> None:
        """Show a picture with the next question.

        Args:
            picture: a file, or a web address, from which it is downloaded.

        Raises:
            InputError: it cannot be used, or the model sees no pictures.
        """
        self._reader.check()
        try:
            file = ImageDownloads().file(str(picture)) if is_on_web(str(picture)) else Path(picture)
        except FormatError as error:
            raise InputError(f"/image {picture}: {error}") from None
        path = file.expanduser().resolve()
        if not path.is_file():
            raise InputError(f"/image {picture}: there is no such file; give the path of a picture")
        found = mark(str(path), self._sources)
        self._rendered([{"role": "user", "content": found + "x"}], self.adapter)
        self.attached += found

    def reset(self) -> None:
        """Empty the conversation."""
        self.turns.clear()
        self._sources.clear()
        self.attached = ""

    def has_template(self, name: str) -> bool:
        """Tell whether the base or adapter of that name has a chat template."""
        try:
            return bool(self._template(self.adapter_named(name)))
        except InputError:
            return False

    def check_system(self) -> None:
        """Check that the current chat template supports the system prompt.

        Raises:
            InputError: the chat template refuses it, or does not show it.
        """
        self._tokens("x", self.adapter, "leave it out")

    def _tokens(
        self, question: str, adapter: str | None, advice: str = "remove it with /system"
    ) -> tuple[list[int], PicturePrompt | None]:
        messages = [*self.turns, {"role": "user", "content": question}]
        if not self.system:
            return self._rendered(messages, adapter)
        try:
            prompt = self._rendered([{"role": "system", "content": self.system}, *messages], adapter)
        except InputError as error:
            self._rendered(messages, adapter)  # raises its own error if the system prompt is not the cause
            raise InputError(f"{error} with the system prompt, but not without it; {advice}") from None
        try:
            shown = self._rendered(messages, adapter)[0] != prompt[0]
        except InputError:
            shown = True  # the template requires a system prompt
        if not shown:
            raise InputError(f"{adapter or BASE}: its chat template does not show a system prompt; {advice}")
        return prompt

    def _rendered(self, messages: list[dict[str, str]], adapter: str | None) -> tuple[list[int], PicturePrompt | None]:
        if any(MARK.search(str(message.get("content") or "")) for message in messages):
            card = self.engine.store.cards[adapter] if adapter else None
            folders = list({Path(str(source)).parent for source in self._sources.values()})
            own, pixels = (card.chat_template, card.max_pixels) if card else (None, None)
            pictures = self._reader.prompt(messages, self._sources, own, folders, pixels)
            return pictures.tokens, pictures
        template = self._template(adapter)
        return chat_tokens(self.engine.base.hf_tokenizer, messages, template, self.engine.vocabulary), None

    def _template(self, adapter: str | None) -> str:
        own = self.engine.store.cards[adapter].chat_template if adapter else None
        template = own or own_template(self.engine.base.hf_tokenizer)
        if not template:
            raise InputError(f"{adapter or BASE}: has no chat template; ask an adapter that was trained with one")
        return template


# The tokens of a prompt


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, ask: Ask, template: str | None, vocabulary: int) -> list[int]:
    """Return the prompt's tokens.

    Args:
        tokenizer: the base's tokenizer.
        ask: the request.
        template: the adapter's own chat template, which replaces the base's, or None.
        vocabulary: the number of token ids.

    Raises:
        ApiError: a chat has no template, the template refuses it or shows no tools, or a token id does not exist.
    """
    if ask.messages is not None:
        template = template or own_template(tokenizer)
        if not template:
            raise ApiError(400, "this model has no chat template; use /v1/completions", "no_chat_template", "messages")
        try:
            if ask.tools and not template_shows(tokenizer, ask.messages, template, ask.tools):
                message = "tools: this model's chat template does not show them; leave them out"
                raise ApiError(400, message, "no_tools", "tools")
            return chat_tokens(tokenizer, ask.messages, template, vocabulary, ask.tools)
        except InputError as error:
            raise ApiError(400, f"messages: {error}", "template", "messages") from None
    tokens = tokenizer.encode(ask.prompt) if isinstance(ask.prompt, str) else ask.prompt
    if not tokens:
        raise ApiError(400, "prompt: has no tokens; give some text", "invalid_value", "prompt")
    if not all(0 <= token < vocabulary for token in tokens):
        raise ApiError(400, f"prompt: token ids must be from 0 to {vocabulary - 1}", "invalid_value", "prompt")
    return tokens


def picture_prompt(
    reader: PictureReader, ask: Ask, template: str | None, max_pixels: int | None = None
) -> PicturePrompt:
    """Return the prompt of a chat with pictures.

    Args:
        reader: of the base.
        ask: the request.
        template: the adapter's own; None: the model's.
        max_pixels: of the pictures in the adapter's run; None: it had no limit of its own.

    Raises:
        ApiError: 400: a picture cannot be used, a web address or a file that is not below the server's folder among them, or
            the model sees none.
    """
    if ask.tools:
        raise ApiError(
            400, "tools with pictures: not supported; leave one of the two out", "unsupported_parameter", "tools"
        )
    try:
        reader.check()
        for source in ask.pictures.values():
            if is_on_web(source):
                raise InputError(
                    "a picture on the web, and this server downloads none; send it as a data URL "
                    "(data:image/png;base64,...), or name a file of serve --images-from"
                )
            if not reader.folders and isinstance(source, str) and source[:5].lower() != "data:":
                raise InputError(
                    "a picture as a file, and this server reads none (serve --images-from FOLDER); send it as a data URL "
                    "(data:image/png;base64,...)"
                )
        return reader.prompt(ask.messages or [], ask.pictures, template, max_pixels=max_pixels)
    except InputError as error:
        raise ApiError(400, f"messages: {error}", "invalid_image", "messages") from None


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: str,
    vocabulary: int,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Return a conversation's tokens, up to where the model answers.

    Args:
        tokenizer: the base's tokenizer.
        messages, tools: plain data, which may be untrusted.
        template: Jinja text.
        vocabulary: the number of token ids.

    Raises:
        InputError: the template refuses the conversation or renders no text, or the model has no row for a token.
    """
    tokens = encode_chat(tokenizer, messages, template, tools)
    if not tokens:
        raise InputError("the chat template renders no text for this conversation; give some text")
    if max(tokens) >= vocabulary:
        raise InputError(
            f"the conversation has token {max(tokens)}, but the model has only {vocabulary} tokens; the tokenizer belongs "
            "to another model"
        )
    return tokens
