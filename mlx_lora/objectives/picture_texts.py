"""What a report needs of the pictures of a prompt: thumbnails of them, and a model that reads the prompt with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.nn as nn
import numpy as np

from mlx_lora.data.thumbnails import jpeg_url, thumbnail
from mlx_lora.models.image_inputs import ModelWithImages

if TYPE_CHECKING:
    from mlx_lora.objectives.vision_encoder import VisionEncoder


@dataclass(frozen=True)
class PromptPictures:
    """The pictures of a prompt.

    Attributes:
        vision: sees them.
        digests: of them, in order.
    """

    vision: VisionEncoder
    digests: tuple[str, ...]

    def within(self, tokens: Sequence[int]) -> PromptPictures | None:
        """Return those that some of a row's first tokens show; None if these end inside a picture, or show none."""
        left, found = sum(token == self.vision.tower.token for token in tokens), []
        for digest in self.digests:
            if left <= 0:
                break
            found.append(digest)
            left -= self.vision.table.shown[digest].tokens
        return None if left or not found else PromptPictures(self.vision, tuple(found))

    def thumbnails(self) -> dict[str, str]:
        """Return the pictures as data URLs of small JPEGs, by digest.

        Raises:
            InputError: a picture's file has changed.
        """
        pictures = self.vision.table.pictures
        return {digest: jpeg_url(thumbnail(pictures[digest].pixels())) for digest in self.digests}

    def model(self, model: nn.Module, tokens: Sequence[int]) -> ModelWithImages:
        """Return what reads a prompt with the pictures, and then text.

        Args:
            model: as it is now, with or without an adapter.
            tokens: of the prompt.

        Raises:
            InputError: a picture's file has changed.
        """
        arrays = self.vision.shown(self.vision.arrays(np.array([list(tokens)], np.int32), [self.digests]))
        return ModelWithImages(model, self.vision.spec, arrays, tokens)

    def without_places(self, tokens: Sequence[int]) -> list[int]:
        """Return a prompt's tokens without those that stand for pictures, to be read by a person."""
        return [token for token in tokens if token != self.vision.tower.token]
