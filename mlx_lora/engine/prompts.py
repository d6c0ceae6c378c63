"""Turn conversations into the tokens of a prompt, with what a model's tower sees of their pictures.

    messages with marks -> PicturePrompt (tokens, pictures)         any thread, one at a time; no MLX
    PicturePrompt -> PicturePrefill -> keys and values              the engine's thread, which loads the tower once

After its prompt, a row with pictures is like any other: its caches are mlx-lm's, and the next token's position is the number
of tokens before it. Its keys and values are not kept for later prompts, because the same tokens may stand for another picture.
Nothing of a picture is written to disk.

A prompt is encoded in the same way as for `generate`: same template, same sandbox, same encoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.chat_template import encode_chat
from mlx_lora.data.downloads import is_on_web
from mlx_lora.data.examples import FormatError, Message
from mlx_lora.data.image_tokens import ImageProcessor, ImageReader, ImageTable, encode_messages, family_of
from mlx_lora.engine.adapter_store import Routing
from mlx_lora.engine.engine import BatchRow, Prefill
from mlx_lora.engine.requests import Ask
from mlx_lora.models.image_inputs import ImageInputSpec, ModelWithImages
from mlx_lora.models.load import Base
from mlx_lora.models.vision import VisionTower, compute_dtype, image_token, load_tower
from mlx_lora.objectives.vision_encoder import ImageFeatureCache, VisionEncoder, image_template
from mlx_lora.rollouts.generator import TokenSteps
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.http import ApiError


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
