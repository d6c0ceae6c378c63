"""Choose what computes the tokens that a run samples: the form of frozen quantized weights, and short steps of one token.

The adapter in training is computed as always: only frozen weights may have a float copy (models/decode_weights.py), which
is made for a rollout and dropped after it, so that a training step has the memory to itself.

The choice is made once per run and kept in its checkpoints, because products in another form round differently: a resumed
run must sample the same answers. All ranks use one form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlx_lora.models.decode_weights import (
    ANSWERS,
    AUTO,
    IN_FULL,
    PACKED,
    DecodeWeights,
    choose_weights,
    copied_bytes,
    copy_weights,
    release_weights,
)
from mlx_lora.models.load import Base
from mlx_lora.models.token_steps import TokenSteps
from mlx_lora.system.distributed import Ranks
from mlx_lora.system.errors import InputError

SAMPLED_BY = "sampled_by"  # the key in a checkpoint
FLOATS = "floats"  # its value for a model without quantized layers
AS_THE_MODEL = "the model"  # of checkpoints without the key: packed weights, and mlx-lm's own steps


@dataclass(frozen=True)
class SamplingForm:
    """What computes sampled tokens.

    Attributes:
        weights: the form of quantized weights; None: there are none.
        short_steps: whether steps of one token take fewer operations (models/token_steps.py).
    """

    weights: DecodeWeights | None = None
    short_steps: bool = True

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint."""
        form = FLOATS if self.weights is None else self.weights.form
        return {SAMPLED_BY: form} if self.short_steps else {}

    @property
    def copied_bytes(self) -> int:
        """What float copies take while answers are sampled."""
        return self.weights.copied_bytes if self.weights is not None and self.weights.form == IN_FULL else 0

    def describe(self) -> str:
        """Return a few words for the run header; empty where there is no choice."""
        return "" if self.weights is None else f"answers sampled by {self.weights.describe()}"

    @contextmanager
    def model_of(self, base: Base) -> Iterator[Any]:
        """Yield what is called as the model while answers are sampled; float copies end with the block."""
        if self.copied_bytes:
            copy_weights(base)
        try:
            yield TokenSteps(base.model) if self.short_steps else base.model
        finally:
            if self.copied_bytes:
                release_weights(base.model)


def choose_sampling(
    base: Base,
    rows: int,
    free_bytes: int,
    ranks: Ranks,
    identity: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> SamplingForm:
    """Return what computes the answers of a run.

    Args:
        base: adapted, not yet trained.
        rows: answers that are sampled at a time.
        free_bytes: of memory, while nothing is trained.
        ranks: the processes of the run; copies are used if all of them choose so.
        identity: of the checkpoint to go on from, whose form is kept; None: the run begins.
        say: takes a line if the user asks for another one.

    Raises:
        InputError: the form to keep, or that is asked for, does not fit the memory of one rank.
    """
    known = None if identity is None else identity.get(SAMPLED_BY, AS_THE_MODEL)
    asked, short_steps = base.decode_weights, True
    if known == AS_THE_MODEL and asked in (AUTO, PACKED):
        weights, short_steps = _as_before(base, PACKED), False
    elif known in (PACKED, IN_FULL) and asked in (AUTO, known):
        weights = _as_before(base, known)
    else:
        weights = choose_weights(base, min(rows, ANSWERS), free_bytes)
        if known is not None and weights is not None:
            say(f"--decode-weights {asked}: not the form in which answers were sampled before, so not to the last bit")
    if weights is not None and weights.form == IN_FULL and weights.copied_bytes > free_bytes:
        raise InputError(
            f"--resume: the run samples its answers by dense copies of {weights.copied_bytes / 1e9:.1f} GB, and "
            f"{max(0, free_bytes) / 1e9:.1f} GB are free; free some, or give --decode-weights packed"
        )
    forms, short = zip(*ranks.everyone([weights and weights.form, short_steps]), strict=True)
    if weights is not None and weights.form == IN_FULL and set(forms) != {IN_FULL}:
        other = next(rank for rank, form in enumerate(forms) if form != IN_FULL)
        weights = DecodeWeights(PACKED, f"as rank {other} chose", weights.copied_bytes)
    return SamplingForm(weights, all(short))


def kept_form(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of the form; a resumed run may have another one if it is asked for."""
    return {SAMPLED_BY: identity[SAMPLED_BY]} if SAMPLED_BY in identity else {}


def _as_before(base: Base, form: str) -> DecodeWeights | None:
    copied = copied_bytes(base)
    return DecodeWeights(form, "as the run began", copied) if copied else None
