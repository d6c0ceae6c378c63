"""Generate text with a loaded model, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_sampler

from mlx_lora.data.prompts import encode_prompt
from mlx_lora.models.continuation import continued
from mlx_lora.models.decode_weights import hold_weights
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign, short
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.models.token_steps import TokenSteps
from mlx_lora.system.errors import InputError
from mlx_lora.training.base_shards import is_shared
from mlx_lora.training.shared_use import await_messages, first_ranks_choice, unshareable_words


@dataclass(frozen=True)
class TextSettings:
    """How a text is generated.

    Attributes:
        max_tokens: the most to generate.
        temperature: 0 is greedy.
        top_p: nucleus sampling from this share of the probability; 1: all tokens, 0: the likeliest token.
        top_k: sample from the k most likely tokens; 0: all.
        seed: of the sampling; None: MLX's random state as it is.
    """

    max_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError for numbers out of range, all at once."""
        rules = {
            f"--max-tokens {self.max_tokens}: must be at least 1": self.max_tokens >= 1,
            f"--temp {self.temperature}: not a finite number of at least 0; give 0 for greedy, or about 0.7": (
                math.isfinite(self.temperature) and self.temperature >= 0
            ),
            f"--top-p {self.top_p}: must be from 0 to 1": 0 <= self.top_p <= 1,
            f"--top-k {self.top_k}: must be at least 0": self.top_k >= 0,
            f"--seed {self.seed}: must be from 0 to 2^63 - 1": self.seed is None or 0 <= self.seed < 2**63,
        }
        if problems := [words for words, kept in rules.items() if not kept]:
            raise InputError("; ".join(problems))


def text_pieces(
    base: Base,
    prompt: str,
    template: str | None,
    system_prompt: str | None,
    settings: TextSettings,
    tools: list[dict[str, Any]] | None = None,
) -> Iterator[GenerationResponse]:
    """Yield mlx-lm's responses, at least one, each with a piece of the text.

    Args:
        base: with or without an adapter.
        prompt: not empty.
        template: Jinja text of the chat template; None: the model continues the prompt.
        system_prompt: a system message for the template.
        settings: how.
        tools: that the model may call, as OpenAI has them.

    Raises:
        InputError: the prompt cannot be encoded, or mlx-lm cannot generate with this model.
    """
    if not prompt:
        raise InputError("--prompt: empty; give some text")
    tokens = encode_prompt(base.hf_tokenizer, prompt, template, system_prompt, tools)
    check_token_ids(base, max(tokens, default=0), "--prompt")
    if settings.seed is not None:
        mx.random.seed(settings.seed)
    # mlx-lm's top_k must be below the vocabulary's size; a larger one means all tokens, which is 0.
    top_k = settings.top_k if settings.top_k < len(base.hf_tokenizer) else 0
    top_p = settings.top_p if settings.top_p < 1 else 0.0
    greedy = settings.top_p == 0  # the smallest nucleus, as in llama.cpp; mlx-lm's 0 turns it off
    sampler = make_sampler(temp=0.0 if greedy else settings.temperature, top_p=top_p, top_k=top_k)
    responses = generated(base, tokens, settings.max_tokens, sampler)
    yield from responses if template else continued(responses, base.tokenizer)


def generated(
    base: Base, tokens: list[int], max_tokens: int, sampler: Callable[[mx.array], mx.array]
) -> Iterator[GenerationResponse]:
    """Yield mlx-lm's generated text; the base keeps the form of its weights that is the fastest for it.

    Ranks that share the base must all read it to its end.

    Raises:
        InputError: mlx-lm cannot generate with this model; a few models can only be trained.
    """
    if not is_shared(base.model):
        hold_weights(base)
    model: Any = TokenSteps(base.model)  # mlx-lm only calls it
    sampler = first_ranks_choice(base.model, sampler)
    try:
        for response in stream_generate(model, base.tokenizer, tokens, max_tokens=max_tokens, sampler=sampler):
            if is_shared(base.model) and mx.isnan(response.logprobs).any().item():
                raise InputError(unshareable_words(base.config))
            yield response
        await_messages(base.model)
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        raise InputError(
            f"--model {base.model_id}: mlx-lm's {base.config.get('model_type')} cannot generate here ({short(error)}); "
            "try a newer mlx-lm, or choose another model"
        ) from error
