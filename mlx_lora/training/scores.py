"""Score given answers with a reward model.

Shapes: N answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_lora.adapters.score_head import SCORE
from mlx_lora.data.encode import Encoder
from mlx_lora.data.examples import Completion, Conversation
from mlx_lora.data.templates import resolve_template
from mlx_lora.models.load import Base
from mlx_lora.settings.config import DEFAULT_BATCH_TOKENS, DataSettings
from mlx_lora.system.errors import InputError
from mlx_lora.training.objective_loss import row_log_probabilities, score_loss


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
    """
    if SCORE not in base.model:
        raise InputError(f"--model {base.model_id}: has no score head; load the adapter of a reward model")
    tokenizer = base.hf_tokenizer
    plain = data.chat_template is None and not tokenizer.chat_template
    template = None if plain else resolve_template(data.chat_template, tokenizer)[0]
    encoder = Encoder(tokenizer, template, max_seq_length=data.max_seq_length, plain_completions=plain)
    encoded = encoder.encode(answers)
    for number, why in encoded.dropped.items():
        raise InputError(f"answer {number}: {why}")
    scores = row_log_probabilities(
        base.model, score_loss(base.model).tokens, encoded.rows.with_end_scores(), batch_tokens
    )
    last = dict(zip(encoded.source.tolist(), scores.tolist(), strict=True))  # earlier rows are a chat's earlier turns
    return np.array([last[number] for number in range(len(answers))], np.float32)
