"""Score given answers with a reward model.

Shapes: N answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date

import numpy as np

from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, DataSettings
from mlx_lora.data.chat_template import resolve_template
from mlx_lora.data.examples import Completion, Conversation
from mlx_lora.data.tokenize import Encoder
from mlx_lora.models.head import SCORE
from mlx_lora.models.load import Base
from mlx_lora.objectives.answers import row_log_probabilities, score_loss
from mlx_lora.utils.errors import InputError


def score_answers(
    base: Base,
    answers: Sequence[Conversation | Completion],
    data: DataSettings = DataSettings(),  # noqa: B008 (frozen)
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> np.ndarray:
    """Return a reward model's score of each answer with its prompt, (N,) float32.

    Args:
        base: with a reward model's adapter.
        answers: conversations that end with the answer, or prompts with completions.
        data: the template, and the most tokens of a row.
        batch_tokens: the most positions of a batch, padding included.

    Raises:
        InputError: there is no score head, or an answer gives no row: the template cannot render it, or none of it is left after
            cutting the row to its maximum length.
        ArithmeticError: a score is not finite.
    """
    scores, dropped = known_scores(base, answers, data, batch_tokens)
    for number, why in dropped.items():
        raise InputError(f"answer {number}: {why}")
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ArithmeticError(f"answer {bad}: its score is {scores[bad]}")
    return scores


def known_scores(
    base: Base,
    answers: Sequence[Conversation | Completion],
    data: DataSettings,
    batch_tokens: int,
    day: date | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Return scores, (N,) float32, NaN for answers that give no row; and why they give none, by number.

    Args:
        base, answers, data, batch_tokens: as for `score_answers`.
        day: that the template shows as today; None: today.

    Raises:
        InputError: there is no score head.
    """
    if SCORE not in base.model:
        raise InputError(f"--model {base.model_id}: has no score head; load the adapter of a reward model")
    tokenizer = base.hf_tokenizer
    plain = data.chat_template is None and not tokenizer.chat_template
    rendered = not plain or any(isinstance(answer, Conversation) for answer in answers)
    template = resolve_template(data.chat_template, tokenizer)[0] if rendered else None
    encoder = Encoder(
        tokenizer,
        template,
        max_seq_length=data.max_seq_length,
        plain_completions=plain,
        day=day,
        allow_special_tokens=data.allow_special_tokens,
    )
    encoded = encoder.encode(answers)
    scores = row_log_probabilities(
        base.model, score_loss(base.model).tokens, encoded.rows.with_end_scores(), batch_tokens, finite=False
    )
    last = dict(zip(encoded.source.tolist(), scores.tolist(), strict=True))  # earlier rows are a chat's earlier turns
    found = [last.get(number, math.nan) for number in range(len(answers))]
    return np.array(found, np.float32), encoded.dropped
