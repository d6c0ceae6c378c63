"""Train the head that drafts an adapter's tokens (`train --train-mtp`), and measure how many tokens it gives by decoding.

The model and its adapter stay as they are. The head learns what the model says itself: its answers to the prompts of the rows, the
likeliest and some at a temperature, and its likeliest tokens in the rows' own answers. The model's states are computed once and
kept. K drafts follow from one another, so the head learns from its own states what it drafts after them:

    h_1 = block(x_{t+1}, H_t)    learns the model's token t + 2
    h_2 = block(x_{t+2}, h_1)    learns its token t + 3, and so on, with equal weights

A model that was published with a head keeps it, and it learns by LoRA; for others one is made, of one block.

Source: arXiv 2412.19437, section 2.2; learning from what was drafted: EAGLE-3, arXiv 2503.01840, section 3.2.

Shapes: B rows, T tokens, D width, P positions that are learned, S tokens that a head drafts.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.settings import AdapterSettings
from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.exporters.fuse import fuse_adapter
from mlx_lora.models.draft_folder import KIND, TOKENS, packed, read_draft, write_draft
from mlx_lora.models.drafts import (
    Drafting,
    Drafts,
    Target,
    draft_of,
    drafted,
    drafted_tokens,
    embedding_of,
    head_of,
    new_config,
    new_draft,
)
from mlx_lora.models.generator import PROMPT, SamplingOptions, answer_keys, held_weights, write_texts
from mlx_lora.models.head import Head
from mlx_lora.models.quantize import QuantFormat
from mlx_lora.trainer.callbacks import before_answer, row_answer
from mlx_lora.utils.progress import tracked
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.data.load import DataSplits
    from mlx_lora.models.load import Base

log = logging.getLogger(__name__)

MOST_PROMPTS, MOST_HELD_OUT = 250, 20
MOST_BYTES = 10**9  # of the states of all texts
TEMPERATURES = (0.0, 0.7, 0.7, 0.7)  # of the model's answers to each prompt
MOST_TOKENS = 96  # of an answer
MEASURED_TOKENS = 64
ROWS, PASSES = 8, 4  # rows of a batch, and passes over all of them
PLAIN_TEXT = 32  # tokens of a text without a prompt after which the model goes on
PACKED = QuantFormat(8, 64)  # a head for a model that is packed
MADE_RATE, LORA_RATE, RANK = 1e-3, 2e-4, 16

Text = tuple[list[int], list[int]]  # prompt and answer


@dataclass(frozen=True)
class States:
    """A batch as the head learns it.

    Attributes:
        tokens: (B, T) int32.
        hidden: (B, T, D), the model's states.
        likeliest: (B, T) int32, the model's token after each, as a place among those that are drafted; -1: none of them.
        learned: (B, T) bool, where that token is one of an answer.
    """

    tokens: mx.array
    hidden: mx.array
    likeliest: mx.array
    learned: np.ndarray


def train_draft(base: Base, data: DataSplits, folder: Path, seed: int) -> dict[str, float]:
    """Train a head and write it into an adapter's folder.

    Args:
        base: the model with the adapter, as it writes texts.
        data: of the run.
        folder: of the adapter.
        seed: of the answers, the head and the order.

    Returns:
        `before` and `after`: tokens a pass of the model in decoding held-out prompts; a model without a head gives 1.

    Raises:
        InputError: the model's head cannot be shared, or mlx-vlm is not installed.
    """
    head, published, training = head_of(base), read_draft(base.folder), base.model.training
    rows, valid = rows_of(data.train, MOST_PROMPTS), rows_of(data.valid, MOST_HELD_OUT)
    rows, valid = (rows, valid) if valid else (rows[:-MOST_HELD_OUT] or rows, rows[-MOST_HELD_OUT:])
    prompts, held_out = ([prompt for prompt, _ in one] for one in (rows, valid))
    log.info(
        f"Draft head: the model answers {len(prompts):,} prompts {len(TEMPERATURES)} times, and learns its own words"
    )
    dtype = embedding_of(head)(mx.array([0])).dtype
    ids, before, stored = None, 1.0, {}
    base.model.eval()
    try:
        with held_weights(base, PROMPT):
            texts = [text for at, heat in enumerate(TEMPERATURES) for text in answers(base, prompts, heat, (seed, at))]
            texts = that_fit(texts + rows, head, seed)
            mx.random.seed(seed)
            if published and published[0]["model_type"] == KIND:
                config, stored = published
                draft = draft_of(config, stored, dtype)
                before = tokens_a_pass(base, Drafts(head, draft, None), held_out)
                draft.freeze()
                adapt_model(draft, AdapterSettings(rank=RANK), seed)
                _learn(head, draft, _states(head, texts, None), None, LORA_RATE, seed)
                fuse_adapter(draft, dequantize=False)
            else:
                ids = sorted({token for _, answer in texts for token in answer})
                config = {**new_config(base, head), TOKENS: ids}
                draft = new_draft(config)
                _learn(head, draft, _states(head, texts, ids), ids, MADE_RATE, seed)
            tensors = {
                n: p.astype(stored[n].dtype if n in stored else mx.bfloat16)
                if mx.issubdtype(p.dtype, mx.floating)
                else p
                for n, p in tree_flatten(draft.parameters())
            }
            if base.quantization and "quantization" not in config:
                config, tensors = packed(config, tensors, PACKED)
            after = tokens_a_pass(base, Drafts(head, draft_of(config, tensors, dtype), ids), held_out)
    finally:
        base.model.train(training)
    write_draft(folder, config, tensors)
    log.info(
        f"Draft head: {before:.2f} to {after:.2f} tokens a pass on {counted(len(held_out), 'held-out prompt')}, "
        f"{sum(p.nbytes for p in tensors.values()) / 1e6:.1f} MB"
    )
    return {"before": before, "after": after}


def that_fit(texts: list[Text], head: Head, seed: int) -> list[Text]:
    """Return as many of some texts, drawn, as have states of at most MOST_BYTES."""
    drawn = random.Random(seed).sample(texts, len(texts))
    ends = np.cumsum([sum(map(len, text)) for text in drawn]) * embedding_of(head)(mx.array([0])).nbytes
    return drawn[: max(1, int(np.searchsorted(ends, MOST_BYTES)))]


def rows_of(rows: EncodedSet | None, most: int) -> list[Text]:
    """Return the prompts and answers of rows, spaced by length; of plain text, its first tokens and the rest."""
    if rows is None or not rows.examples:
        return []
    chosen = (spaced_by_length(rows, min(most, rows.examples)) * rows.group).tolist()  # of pairs, the better ones
    found = [(before_answer(rows, n), row_answer(rows, n), rows.row(n)[0].tolist()) for n in chosen]
    return [
        (prompt, answer) if answer or len(prompt) > 1 else (whole[:PLAIN_TEXT], whole[PLAIN_TEXT:])
        for prompt, answer, whole in found
        if len(whole) > 1
    ]


def answers(base: Base, prompts: Sequence[list[int]], temperature: float, seed: tuple[int, int]) -> list[Text]:
    """Return the prompts, each with what the model says."""
    found = dict[int, list[int]]()
    options = SamplingOptions(1, MOST_TOKENS, temperature=temperature)
    ends, keys = frozenset(base.tokenizer.eos_token_ids), answer_keys(*seed, len(prompts))
    write_texts(
        base, prompts, range(len(prompts)), options, ends, keys, lambda n, said: found.update(zip(n, said, strict=True))
    )
    return [(prompt, found[number]) for number, prompt in enumerate(prompts)]


def _states(head: Head, texts: list[Text], ids: list[int] | None) -> list[States]:
    """Compute the model's states in all texts."""
    place = np.arange(head.vocabulary, dtype=np.int32)
    if ids is not None:
        place = np.full(head.vocabulary, -1, np.int32)
        place[ids] = np.arange(len(ids))
    places, ordered, batches = mx.array(place), sorted(texts, key=lambda text: sum(map(len, text))), []
    starts = range(0, len(ordered), ROWS)
    for start in tracked(starts, "Computing states", len(starts), "batches"):
        rows = ordered[start : start + ROWS]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        tokens, learned = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for row, (prompt, answer) in enumerate(rows):
            tokens[row, : len(prompt) + len(answer)] = prompt + answer
            learned[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
        hidden = head.hidden(mx.array(tokens))
        at = np.flatnonzero(learned)
        said = mx.argmax(head.logits(hidden.reshape(-1, hidden.shape[-1])[mx.array(at)]), axis=-1)
        likeliest = np.full(tokens.size, -1, np.int32)
        likeliest[at] = np.array(places[said])
        batches.append(States(mx.array(tokens), hidden, mx.array(likeliest.reshape(tokens.shape)), learned))
        mx.eval(hidden)
    return batches


def _learn(head: Head, draft: Any, batches: list[States], ids: list[int] | None, rate: float, seed: int) -> None:
    """Train what a head has to train."""
    target, count, steps = Target.of(head, ids), draft.config.block_size - 1, PASSES * len(batches)

    def loss(draft: Any, of: States) -> mx.array:
        hidden, total, width = of.hidden, mx.array(0.0), of.tokens.shape[1]
        for ahead in range(1, min(count, width - 2) + 1):
            hidden = drafted(draft, target, hidden[:, : width - ahead], of.tokens[:, ahead:])
            at = mx.array(np.flatnonzero(of.learned[:, ahead:]).astype(np.int32))
            said = of.likeliest[:, ahead:].reshape(-1)[at]
            logits = target.lm_head(hidden.reshape(-1, hidden.shape[-1])[at].astype(mx.float32))
            losses = nn.losses.cross_entropy(logits, mx.maximum(said, 0)) * (said >= 0)
            total = total + losses.sum() / mx.maximum((said >= 0).sum(), 1)
        return total / count

    gradient = nn.value_and_grad(draft, loss)
    optimizer = optim.AdamW(optim.cosine_decay(rate, steps), weight_decay=0.01)
    order = [batch for turn in range(PASSES) for batch in random.Random(seed + turn).sample(batches, len(batches))]
    draft.train()
    for batch in tracked(order, "Training the draft head", steps, "steps"):
        value, gradients = gradient(draft, batch)
        optimizer.update(draft, optim.clip_grad_norm(gradients, 1.0)[0])
        mx.eval(value, draft.trainable_parameters(), optimizer.state)
    draft.eval()


def tokens_a_pass(base: Base, drafts: Drafts, prompts: Sequence[list[int]]) -> float:
    """Return how many tokens the model's passes with drafts give, on average, in its likeliest answers to prompts."""
    drafts.always, rounds, made, ends = True, 0, 0, base.tokenizer.eos_token_ids
    for prompt in tracked(prompts, "Measuring drafts", len(prompts), "prompts"):
        drafting = Drafting(drafts)
        for count, (token, _, _) in enumerate(
            drafted_tokens(base.model, prompt, lambda row: mx.argmax(row, axis=-1), drafting), 1
        ):
            if token in ends or count >= MEASURED_TOKENS:
                break
        rounds, made = rounds + drafting.rounds, made + drafting.made
    return made / max(1, rounds)
