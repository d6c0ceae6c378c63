"""Generate answers about pictures, with a vision-language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from mlx_lm.generate import GenerationResponse, stream_generate

from mlx_lora.api.base import TextSettings
from mlx_lora.config.settings import DataSettings
from mlx_lora.data.downloads import is_on_web
from mlx_lora.data.image_tokens import ImageReader, ImageTable, encode_question
from mlx_lora.models.generator import hold_weights
from mlx_lora.models.image_inputs import ModelWithImages
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.models.vision import open_tower
from mlx_lora.objectives.vision_encoder import VisionEncoder, image_template
from mlx_lora.utils.errors import InputError


def image_answer_pieces(
    base: Base,
    question: str,
    pictures: Sequence[str | Path],
    template: str | None,
    system_prompt: str | None,
    settings: TextSettings,
    max_pixels: int | None = None,
) -> Iterator[GenerationResponse]:
    """Yield mlx-lm's responses to a question about pictures, each with a piece of the text.

    Args:
        base: with or without an adapter.
        question: its text, which follows the pictures.
        pictures: files or web addresses, at least one; whoever names an address here wants it downloaded.
        template: Jinja text of the chat template; None: the model's own.
        system_prompt: a system message before it.
        settings: how.
        max_pixels: of a picture; a larger one is made smaller.

    Raises:
        InputError: a picture cannot be used, or the model sees none.
    """
    names = [
        str(picture) if is_on_web(str(picture)) else str(Path(picture).expanduser().resolve()) for picture in pictures
    ]
    table = ImageTable.empty()
    vision = VisionEncoder.of(base, DataSettings(max_pixels=max_pixels), table, open_tower(base))
    template = template or image_template(base.hf_tokenizer, base.folder, vision.processor.family)
    if template is None:
        raise InputError(f"--model {base.model_id}: has no chat template, so it cannot be asked about pictures")
    roots = [Path(name).parent for name in names if not is_on_web(name)]
    reader = ImageReader(vision.processor, roots, table, vision.tower.token).fetching(True)
    tokens, digests = encode_question(reader, base.hf_tokenizer, template, question, names, system_prompt)
    check_token_ids(base, max(tokens), "--prompt")
    arrays = vision.shown(vision.arrays(np.array([tokens], np.int32), [digests]))
    sampler = settings.sampler(base)
    hold_weights(base)
    model = ModelWithImages(base.model, vision.spec, arrays, tokens)
    yield from stream_generate(
        model,  # pyright: ignore[reportArgumentType] # mlx-lm only calls it
        base.tokenizer,
        tokens,
        max_tokens=settings.max_tokens,
        sampler=sampler,
        prompt_cache=model.caches(),
        prefill_step_size=len(tokens),  # the tokens of a picture may have to see one another
    )
