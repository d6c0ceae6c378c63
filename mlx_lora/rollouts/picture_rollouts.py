"""Sample answers to prompts with pictures.

A prompt is computed at once, with what the tower sees of its pictures, and its keys and values are copied for each of its
answers. Nothing of it is shared with other prompts, whose image tokens are the same and stand for other pictures. From the
last token of the prompt on, sampling is that of text (rollouts/sampler.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import mlx.nn as nn
import numpy as np

from mlx_lora.data.batch import Batch
from mlx_lora.models.image_inputs import ModelWithImages
from mlx_lora.rollouts.environment import Facts
from mlx_lora.rollouts.kept_caches import KeptCaches
from mlx_lora.rollouts.rollout import Rollouts
from mlx_lora.rollouts.row_batches import merge_rows

if TYPE_CHECKING:
    from mlx_lora.data.image_tokens import ImageTable
    from mlx_lora.objectives.vision_encoder import VisionEncoder


class Seeing(Protocol):
    """What shows pictures to a model: the objective of the run."""

    table: ImageTable

    @property
    def vision(self) -> VisionEncoder:
        """The tower and what belongs to it."""
        ...

    def shown(self, model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
        """Let a model read the pictures of a batch inside the context."""
        ...


@dataclass(frozen=True)
class PictureRollouts(Rollouts):
    """Samples answers to the prompts of planned batches, which may have pictures.

    Attributes:
        seeing: shows their pictures.
    """

    seeing: Seeing | None = None

    @property
    def _seeing(self) -> Seeing:
        if self.seeing is None:
            raise ValueError("rollouts with pictures, and nothing that shows them")
        return self.seeing

    def computed_prompts(self, facts: Sequence[Facts], group: int) -> KeptCaches:
        rows = [self._seeing.table.rows[fact["pictures"]] for fact in facts]
        return PromptsWithPictures(vision=self._seeing.vision, digests=rows, group=group)

    def token_logps(self, batch: Batch) -> np.ndarray:
        with self._seeing.shown(self.base.model, batch):
            return super().token_logps(batch)


@dataclass
class PromptsWithPictures(KeptCaches):
    """Computes prompts with pictures for the sampler, which asks for caches that hold them; it keeps nothing of them.

    Attributes:
        vision: sees the pictures.
        digests: of the pictures of each prompt.
        group: answers to each prompt.
    """

    vision: VisionEncoder | None = None
    digests: Sequence[tuple[str, ...]] = ()
    group: int = 1

    def joined(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[Any]:
        """Return caches of a row for each answer, which hold its prompt without the last token.

        Args:
            model: that computes single tokens (rollouts/decode.py); the one in it computes the prompts.
            prompts: token ids.
        """
        if self.vision is None:
            raise ValueError("prompts with pictures, and nothing that sees them")
        found = []
        for prompt, digests in zip(prompts, self.digests, strict=True):
            arrays = self.vision.prompt_arrays(prompt, digests)
            shown = ModelWithImages(model.model, self.vision.spec, arrays)
            found.append(shown.prefilled(prompt[:-1]))
        return merge_rows(model, [caches for caches in found for _ in range(self.group)])

    def keep(self, row: int, place: int, tokens: int, caches: Sequence[Any]) -> None:
        """Keep nothing: an episode is one answer."""
