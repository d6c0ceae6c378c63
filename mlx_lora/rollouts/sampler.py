"""Sample texts after many prompts at once, with the model as it is: G answers to each, or one text after each.

A prompt is computed once, and its keys and values are copied for each of its answers; the beginning that all prompts have
in common, such as a system text, is computed once for all of them. Each text draws from a random stream of its own, so it
does not depend on which others are sampled beside it, apart from rounding.

Shapes: N prompts, G answers to each, A = N G answers, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import apply_min_p, apply_top_p

from mlx_lora.rollouts.decode import TokenSteps, held_weights
from mlx_lora.rollouts.kept_caches import KeptCaches
from mlx_lora.rollouts.row_batches import check_rows, extract_row, merge_rows, one_row_because

if TYPE_CHECKING:
    from mlx_lora.models.load import Base

PREFILL_TOKENS = 512  # of a prompt that are computed at once
LEAST_SHARED = 16  # tokens that prompts have in common, from which on these are computed once
# Rows that have ended stay in the batch until they are this share of it: taking rows out copies all keys and values.
ENDED_SHARE = 0.25
STEPS_PER_CLEARING = 256  # steps after which unused buffers are freed
MOST_ROWS = 32  # texts that `write_texts` samples at once
# Tokens of all these texts, prompts included. Not a share of the free memory: rounding, and so now and then a text,
# depends on which texts are batched, and should be the same on another day.
MOST_TOKENS = 16_384


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are sampled.

    Attributes:
        group: G.
        max_new_tokens: of an answer, with its end token.
        temperature: 0: the likeliest token each time.
        top_p: sample from the nucleus with this mass at the temperature; 1 is off.
        min_p: leave out tokens less likely at the temperature than this share of the likeliest; 0 is off.
    """

    group: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0


def check_groups(model: nn.Module, model_id: str) -> None:
    """Refuse a model whose keys and values cannot be held for several rows.

    Raises:
        InputError: its caches cannot be merged.
    """
    check_rows(model, model_id, "choose another model, or --objective dpo or sft")


def sample_groups(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    ends: frozenset[int],
    keys: mx.array,
    limits: Sequence[int] | None = None,
    kept: KeptCaches | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Sample G answers to each prompt.

    Args:
        model: in eval mode, with or without an adapter.
        prompts: token ids, at least one each.
        options: how.
        ends: tokens that end an answer.
        keys: (A, 2) uint32, the key of each answer's random stream.
        limits: (A,) the most tokens of each answer; None: as the options say.
        kept: has what earlier turns of the same rows left, and gets what this one leaves; the group is then 1 after the first.

    Returns:
        The tokens of each answer, (A,) lists, with its end token if it ended; and the log-probability of each token at the
        temperature, before top_p and min_p.
    """
    last = [prompt[-1] for prompt in prompts for _ in range(options.group)]
    limits = [options.max_new_tokens] * len(last) if limits is None else limits
    one_by_one = len(last) > 1 and bool(one_row_because(model))
    if one_by_one and kept is not None and kept.begun:  # it would compute the turn's tokens for all rows together
        kept = None
    caches = kept.joined(model, prompts) if kept else None
    caches = caches or _group_caches(model, prompts, options.group)
    if not one_by_one:
        held = [len(prompt) - 1 for prompt in prompts for _ in range(options.group)]
        return _sampled(model, caches, last, (options, ends), keys, limits, None if kept is None else (kept, held))
    answers, found = [], []
    for row, token in enumerate(last):
        own = merge_rows(model, [[extract_row(cache, row) for cache in caches]])
        got = _sampled(model, own, [token], (options, ends), keys[row : row + 1], limits[row : row + 1])
        answers, found = answers + got[0], found + got[1]
    return answers, found


def _sampled(
    model: nn.Module,
    caches: list[Any],
    last: Sequence[int],
    how: tuple[SamplingOptions, frozenset[int]],
    keys: mx.array,
    limits: Sequence[int],
    kept: tuple[KeptCaches, Sequence[int]] | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Sample an answer in each row, as `sample_groups`, from caches that hold the prompts without their `last` tokens.

    Args:
        model, caches, last: see there.
        how: options, and the tokens that end an answer.
        keys, limits: of the rows.
        kept: gets the rows that end; and the tokens that the caches hold of each at first.
    """
    options, ends = how
    answers: list[list[int]] = [[] for _ in last]
    found: list[list[float]] = [[] for _ in last]
    tokens = mx.array(list(last), mx.uint32)
    rows, ended = list(range(len(answers))), [False] * len(answers)
    for step in range(max(limits, default=0)):
        logits = model(tokens[:, None], cache=caches)[:, -1]  # (rows, V)
        keys, tokens, logps = _drawn(logits, keys, options)
        mx.eval(tokens, keys, logps)
        for place, (token, logp) in enumerate(zip(tokens.tolist(), logps.tolist(), strict=True)):
            if not ended[place]:
                answers[rows[place]].append(token)
                found[rows[place]].append(logp)
                ended[place] = token in ends or len(answers[rows[place]]) == limits[rows[place]]
                if kept is not None and token in ends:
                    row = rows[place]
                    kept[0].keep(row, place, kept[1][row] + len(answers[row]), caches)
        if all(ended):
            break
        if sum(ended) >= ENDED_SHARE * len(ended):
            keep = [place for place, done in enumerate(ended) if not done]
            chosen = mx.array(keep)
            for cache in caches:
                cache.filter(chosen)
            tokens, keys = tokens[chosen], keys[chosen]
            rows, ended = [rows[place] for place in keep], [False] * len(keep)
        if step % STEPS_PER_CLEARING == STEPS_PER_CLEARING - 1:
            mx.clear_cache()
    return answers, found


def write_texts(
    base: Base,
    prompts: Sequence[Sequence[int]],
    numbers: Collection[int],
    options: SamplingOptions,
    ends: frozenset[int],
    keys: mx.array,
    take: Callable[[list[int], list[list[int]]], None],
) -> None:
    """Sample one text after each prompt.

    Args:
        base: without an adapter, or with one.
        prompts: token ids, at least one each.
        numbers: of the prompts to write after.
        options: how; the group is 1.
        ends: tokens that end a text.
        keys: (prompts, 2) uint32, the key of each text's random stream.
        take: called after each batch with its numbers and the tokens of its texts.

    Raises:
        InputError: the model cannot hold several texts at once.
    """
    check_groups(base.model, base.model_id)
    order = sorted(numbers, key=lambda number: (len(prompts[number]), number))
    if not order:
        return
    rows = max(1, min(MOST_ROWS, MOST_TOKENS // (len(prompts[order[-1]]) + options.max_new_tokens)))
    training = base.model.training
    base.model.eval()
    try:
        with held_weights(base, rows):
            model = TokenSteps(base.model)
            for start in range(0, len(order), rows):
                batch = order[start : start + rows]
                texts, _ = sample_groups(model, [prompts[n] for n in batch], options, ends, keys[mx.array(batch)])  # pyright: ignore[reportArgumentType] # it is called as a model
                take(batch, texts)
    finally:
        base.model.train(training)


def answer_keys(seed: int, rollout: int, count: int, turn: int = 0) -> mx.array:
    """Return the keys of a rollout's answers at a turn, (count, 2) uint32; they differ in every rollout of a run."""
    state = np.random.SeedSequence([seed, rollout], spawn_key=(turn,) if turn else ()).generate_state(1, np.uint64)[0]
    return mx.random.split(mx.random.key(int(state)), count)


def _group_caches(model: nn.Module, prompts: Sequence[Sequence[int]], group: int) -> list[Any]:
    """Compute each prompt without its last token, and return caches of A rows."""
    common, of_prompts = _common_beginning(prompts), []
    begun = make_prompt_cache(model)
    _compute(model, common, begun)
    for prompt in prompts:
        caches = copy.deepcopy(begun) if common else make_prompt_cache(model)  # copies no array
        _compute(model, prompt[len(common) : -1], caches)
        of_prompts.append(caches)
    return merge_rows(model, [caches for caches in of_prompts for _ in range(group)])


def _common_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens that all of several prompts begin with, without any prompt's last; empty if they are few."""
    shortest = min(map(len, prompts)) - 1
    count = next((n for n in range(shortest) if len({prompt[n] for prompt in prompts}) > 1), shortest)
    return list(prompts[0][:count]) if len(prompts) > 1 and count >= LEAST_SHARED else []


def _compute(model: nn.Module, tokens: Sequence[int], caches: list[Any]) -> None:
    """Put the keys and values of tokens into caches."""
    for start in range(0, len(tokens), PREFILL_TOKENS):
        model(mx.array([tokens[start : start + PREFILL_TOKENS]]), cache=caches)
        mx.eval([cache.state for cache in caches])


def _drawn(logits: mx.array, keys: mx.array, options: SamplingOptions) -> tuple[mx.array, mx.array, mx.array]:
    """Return the next keys (rows, 2), a token for each row (rows,), and its log-probability."""
    logits = logits.astype(mx.float32)
    tempered = nn.log_softmax(logits if options.temperature in (0, 1) else logits / options.temperature, axis=-1)
    left = tempered  # of the tempered distribution, as transformers, and so TRL, filter it; mlx-lm filters before
    if options.top_p < 1:
        left = apply_top_p(left, options.top_p)
    if options.min_p > 0:
        left = apply_min_p(left, options.min_p)
    pairs = mx.vmap(mx.random.split)(keys)  # (rows, 2, 2)
    tokens = _categorical(left, pairs[:, 1]) if options.temperature else mx.argmax(logits, axis=-1).astype(mx.uint32)
    return pairs[:, 0], tokens, mx.take_along_axis(tempered, tokens[:, None], axis=-1)[:, 0]


def _categorical(logits: mx.array, keys: mx.array) -> mx.array:
    return mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(logits, keys)
