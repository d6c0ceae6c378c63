"""Heads that draft tokens, so that a model checks several in one pass: load, make and use them (draft_folder.py has their files).

A draft is a folder in the form of mlx-vlm's drafters: MODEL/mtp of a model that was published with one, ADAPTER/mtp of an adapter
whose words one has learned (`train --train-mtp`). The head and the embedding are the model's own.

    h_t = block(fc[norm(embed(x_{t+1})), norm(H_t)])     drafts x_{t+2}; H are the model's states behind its last norm
    h_{t,2} = the same of x_{t+2} and h_t                drafts x_{t+3}, and so on

A token is drawn from the model's own probabilities wherever it stands, and a draft is used while it is the token drawn. So texts
are those without drafts, at any temperature, but for the rounding of products of several rows.

Source: multi-token prediction, arXiv 2412.19437, section 2.2 (DeepSeek-V3); checking in one pass, arXiv 2211.17192.

Shapes: T tokens, D width, K drafts, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, wired_limit
from mlx_lm.models.cache import ArraysCache, make_prompt_cache
from mlx_lm.utils import get_total_parameters

from mlx_lora.models.draft_folder import KIND, TOKENS, read_draft
from mlx_lora.models.folder import FOREIGN_ERRORS, short
from mlx_lora.models.head import EMBEDDINGS, Head, find_head
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.models.load import Base

log = logging.getLogger(__name__)

MOST_OF_BASE = 0.05  # of the base's weights, for a head that is made here
PREFILL_TOKENS = 2048  # as in mlx-lm
DRAFTS = 3  # tokens that a head made here drafts at once


@dataclass(frozen=True)
class Target:
    """What mlx-vlm binds a drafter to: the model's embedding and head, and the likeliest of the few tokens that a head drafts."""

    embed_tokens: nn.Module
    lm_head: Callable[[mx.array], mx.array]
    speculative_argmax_from_hidden: Callable[[mx.array], mx.array] | None = None

    @classmethod
    def of(cls, head: Head, tokens: list[int] | None = None) -> Target:
        """Return it for a model's head.

        Args:
            head: from `head_of`.
            tokens: that are drafted; None: all.

        Raises:
            ValueError, TypeError: these are no tokens of the model.
        """
        embedding = embedding_of(head)
        if tokens is None:
            return cls(embedding, head.logits)
        if not tokens or not all(0 <= one < head.vocabulary for one in tokens):
            raise ValueError(f"its {TOKENS} are not tokens of this model")
        ids = mx.array(tokens)
        weight = head.dense([array[ids] for array in head.arrays], mx.float32)

        def logits(hidden: mx.array) -> mx.array:
            return head.finish(hidden @ weight.T, ids)

        return cls(embedding, logits, lambda hidden: ids[mx.argmax(logits(hidden), axis=-1)])


def embedding_of(head: Head) -> Any:
    """Return the embedding of a head's model; None: it has an unknown name."""
    named = {path.rpartition(".")[2]: module for path, module in head.body.named_modules()}
    return next((named[name] for name in EMBEDDINGS if name in named), None)


def head_of(base: Base) -> Head:
    """Return the head that a model's drafts share.

    Raises:
        InputError: it has none that can be shared.
    """
    head = find_head(base.model, base.config)
    if isinstance(head, Head) and embedding_of(head) is not None:
        return head
    raise InputError(
        f"--model {base.model_id}: a head that drafts tokens cannot be used with it, because "
        + (head if isinstance(head, str) else "its embedding has an unknown name")
    )


def drafted(draft: Any, target: Target, hidden: mx.array, tokens: mx.array) -> mx.array:
    """Return the states (B, T, D) of a draft head, which its model's head turns into logits.

    Args:
        draft: of KIND.
        target: of its model.
        hidden: (B, T, D) of the model, or of the draft before.
        tokens: (B, T), each one after the token of its state.
    """
    embedded = draft.pre_fc_norm_embedding(target.embed_tokens(tokens).astype(hidden.dtype))
    states = draft.fc(mx.concatenate([embedded, draft.pre_fc_norm_hidden(hidden)], axis=-1))
    for layer in draft.layers:
        states = layer(states, mask="causal", cache=None, position_ids=mx.arange(tokens.shape[1])[None])
    return draft.norm(states)


def new_config(base: Base, head: Head) -> dict[str, Any]:
    """Return the config of a head for a model without one: of one block, and at most MOST_OF_BASE of the model's weights."""
    args = {**base.config, **(base.config.get("text_config") or {})}
    width = embedding_of(head)(mx.array([0])).shape[-1]
    heads = args.get("num_attention_heads") or max(1, width // 64)
    kv, head_dim = args.get("num_key_value_heads") or heads, args.get("head_dim") or width // heads
    own = 2 * width * width + width * head_dim * (3 * heads + 2 * kv)
    fits = int((MOST_OF_BASE * get_total_parameters(base.model) - own) / (3 * width)) // 64 * 64
    return {
        "model_type": KIND, "block_size": DRAFTS + 1, "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_5_text", "hidden_size": width, "num_hidden_layers": 1, "mtp_num_hidden_layers": 1,
            "intermediate_size": max(64, min(args.get("intermediate_size") or fits, fits)), "num_attention_heads": heads,
            "num_key_value_heads": kv, "head_dim": head_dim, "vocab_size": head.vocabulary,
            "rms_norm_eps": args.get("rms_norm_eps", 1e-6), "full_attention_interval": 1, "layer_types": ["full_attention"],
            "linear_num_value_heads": 1, "linear_num_key_heads": 1, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
            "linear_conv_kernel_dim": 4, "max_position_embeddings": args.get("max_position_embeddings", 32768),
            "tie_word_embeddings": True,
            "rope_parameters": {
                "type": "default", "rope_theta": args.get("rope_theta", 10000.0), "partial_rotary_factor": 1.0,
                "mrope_section": [head_dim // 2, 0, 0],
            },
        },
    }  # fmt: skip


def new_draft(config: dict[str, Any]) -> Any:
    """Return a head with random weights, which at first passes the model's states through."""
    draft = built(config)
    width = config["text_config"]["hidden_size"]
    draft.fc.weight = mx.concatenate([0.02 * mx.random.normal((width, width)), mx.eye(width)], axis=1)
    return draft


def built(config: dict[str, Any]) -> Any:
    """Return mlx-vlm's drafter for a config, with random weights.

    Raises:
        InputError: mlx-vlm is not installed.
    """
    try:
        from mlx_vlm.speculative.drafters import qwen3_5_mtp
    except ImportError:
        raise InputError("heads that draft tokens are mlx-vlm's; pip install 'mlx-lora[vision]'") from None
    if config["text_config"].get("mtp_num_hidden_layers", 1) not in range(1, 9):
        raise ValueError("a head that drafts tokens has 1 to 8 blocks")
    return qwen3_5_mtp.Model(qwen3_5_mtp.ModelConfig.from_dict(config))


def held_draft(base: Base) -> Drafts | None:
    """Return the head that drafts for a model with its adapter; it is kept with the base, and loaded again for another model."""
    if base.draft is None or base.draft[0] is not base.model or base.draft[1] != base.adapter:
        base.draft = base.model, base.adapter, load_draft(base, base.adapter)
    return base.draft[2]


def load_draft(base: Base, adapter: Path | None = None) -> Drafts | None:
    """Return the head that drafts for a model, the adapter's before the model's own; None: there is none that is used here.

    Args:
        base: the model, with or without the adapter.
        adapter: its folder.
    """
    for folder in filter(None, (adapter, base.folder)):
        try:
            head, found = head_of(base), read_draft(folder)
            if found and found[0].get("model_type") == KIND:
                dtype = embedding_of(head)(mx.array([0])).dtype
                return Drafts(head, draft_of(*found, dtype), found[0].get(TOKENS))
        except InputError:  # without mlx-vlm, or of another form
            continue
        except FOREIGN_ERRORS as error:  # its files may be a stranger's
            log.info(f"Note: without the head of {folder} that drafts tokens: {short(error)}")
    return None


def draft_of(config: dict[str, Any], tensors: dict[str, mx.array], dtype: mx.Dtype) -> Any:
    """Return mlx-vlm's drafter for a config and tensors, as `read_draft` gives them, whose floats have a dtype."""
    draft = built(config)
    if packing := config.get("quantization"):
        layout = {name: packing[name] for name in ("group_size", "bits", "mode") if name in packing}
        nn.quantize(draft, **layout, class_predicate=lambda path, _: f"{path}.scales" in tensors)
    floats = {n: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a for n, a in tensors.items()}
    draft.load_weights(list(floats.items()))
    draft.eval()
    return draft


# Drafting for a row while it is generated

# Steps without drafts and with them, by which it is decided what is faster, after so many of either kind that are not measured.
PLAIN, CHECKED, WARM = 4, 12, 2


class Drafts:
    """A head with what it is bound to, for one row at a time.

    Attributes:
        head: of the model.
        draft: of KIND.
        tokens: the only ones that it drafts; None: all.
        target: what it is bound to.
        count: K.
        row: that it drafts for.
        always: whether it drafts at each step, however long that takes.
    """

    def __init__(self, head: Head, draft: Any, tokens: list[int] | None):
        """Bind a head that drafts."""
        self.head, self.draft, self.tokens, self.target = head, draft, tokens, Target.of(head, tokens)
        self.count: int = draft.config.block_size - 1
        self.row: Drafting | None = None
        self.always = False
        self._took: tuple[list[tuple[float, int]], ...] = ([], [])

    @property
    def drafts_next(self) -> bool:
        """Whether the next step is one with drafts."""
        return self.always or (self.count > 0 and len(self._took[0]) >= PLAIN + WARM)

    def took(self, seconds: float, tokens: int, checked: bool) -> None:
        """Take the time of a step, and draft no more if steps without drafts give more tokens in that time."""
        steps = self._took[checked]
        steps.append((seconds, tokens))
        if checked and len(steps) == CHECKED + WARM and not self.always:
            plain, with_drafts = (sum(s for s, _ in one[WARM:]) / sum(n for _, n in one[WARM:]) for one in self._took)
            self.count *= plain > with_drafts


class Drafting:
    """What is known of one row to draft its tokens.

    Attributes:
        drafts: the head.
        rounds, made: passes of the model in which drafts were checked, and the tokens that they gave.
    """

    def __init__(self, drafts: Drafts):
        """Begin a row; all passes of the model over it have to be `see` and `step`, or its drafts get worse."""
        self.drafts = drafts
        self.rounds = self.made = 0
        self._tokens: list[int] = []  # that the model has seen and the draft has not, and their states
        self._hidden: list[mx.array] = []
        self._late: list[int] = []  # tokens of the row that its caches have not

    def see(self, tokens: list[int], caches: list[Any]) -> None:
        """Compute tokens of the prompt."""
        hidden = self.drafts.head.hidden(mx.array([tokens]), cache=caches)
        mx.eval(hidden, [cache.state for cache in caches])
        self._tokens += tokens
        self._hidden.append(hidden)

    def _found(self, token: int) -> list[int]:
        """Return the tokens that may follow a token of the row that the model has not seen."""
        draft, hidden = self.drafts.draft, mx.concatenate(self._hidden, axis=1)
        tokens, self._tokens, self._hidden = [*self._tokens[1:], token], [], []
        if self.drafts.row is not self:
            self.drafts.row = self
            draft.reset(self.drafts.target)
            draft.prefill_from_target_hidden(mx.array([[0, *tokens[:-1]]]), hidden, token, None, greedy=True)
        else:
            before = mx.array([tokens[:-1]], mx.int32)
            draft.accept_verified_tokens(hidden, before, len(tokens) - 1, tokens[-1:], None, greedy=True)
        found = draft.draft_block(token, hidden[:, -1:], None, self.drafts.count + 1, None, greedy=True)[0].tolist()
        # What was drafted is forgotten, and seen again with the model's states.
        draft.accept_verified_tokens(hidden, None, 0, [], None)
        return found

    def step(self, token: int, caches: list[Any], draw: Callable[[mx.array, list[int]], list[int]]) -> list[int]:
        """Compute a token of the row, and return the tokens after it, of which the caches have all but the last.

        Args:
            token: the row's last one.
            caches: of the row, which `fits`.
            draw: draws a token from each row of logits (K + 1, V) float32 until one is not the draft, (K,), in its place.
        """
        start = time.perf_counter()
        drafts = self._found(token) if self._hidden and self.drafts.drafts_next else []
        late, self._late = self._late, []
        before = [_state_of(cache) for cache in caches]
        tokens = [*late, token, *drafts]
        hidden = self.drafts.head.hidden(mx.array([tokens]), cache=caches)[:, len(late) :]
        found = draw(self.drafts.head.logits(hidden)[0], drafts)
        self._tokens += [token, *found[:-1]]
        self._hidden.append(hidden[:, : len(found)])
        if wrong := len(drafts) + 1 - len(found):
            recurrent = any(state is not None for state in before)
            for cache, state in zip(caches, before, strict=True):
                if state is not None:
                    cache.state = state
                else:
                    cache.trim(len(tokens) if recurrent else wrong)
            self._late = tokens[:-wrong] if recurrent else []
        self.rounds, self.made = self.rounds + bool(drafts), self.made + len(found) * bool(drafts)
        self.drafts.took(time.perf_counter() - start, len(found), bool(drafts))
        return found

    def fits(self, caches: list[Any]) -> bool:
        """Return whether a step with drafts can be taken back: no cache of a window may reach its end."""
        needed = len(self._late) + 1 + self.drafts.count
        return self.drafts.count > 0 and all(
            isinstance(cache, ArraysCache)
            or (cache.is_trimmable() and cache.size() + needed < getattr(cache, "max_size", math.inf))
            for cache in caches
        )

    def catch_up(self, caches: list[Any]) -> None:
        """Compute what the caches lack of the row; then they may be used without it."""
        late, self._late = self._late, []
        if late:
            self.drafts.head.hidden(mx.array([late]), cache=caches)


def _state_of(cache: Any) -> Any:
    """Return a copy of what a recurrent layer's cache holds, which no step changes; None for other layers."""
    if not isinstance(cache, ArraysCache):
        return None
    cells, *numbers = cache.state
    return list(cells), *(one if one is None else one + 0 for one in numbers)


def until_wrong(tokens: list[int], drafts: list[int]) -> list[int]:
    """Return drawn tokens, (K + 1,), up to the first that is not the draft in its place."""
    right = next((at for at, draft in enumerate(drafts) if tokens[at] != draft), len(drafts))
    return tokens[: right + 1]


# A text


def drafted_tokens(
    model: Any, prompt: list[int], sampler: Callable[[mx.array], mx.array], drafting: Drafting
) -> Iterator[tuple[int, mx.array, bool]]:
    """Yield a text's tokens without end, their log-probabilities (V,), and whether they were drafted, as mlx-lm's steps do.

    Args:
        model: what mlx-lm's generators take.
        prompt: its tokens.
        sampler: returns a token (1,) for log-probabilities (1, V); it draws from MLX's random state, if at all.
        drafting: of the text, new.
    """
    caches = make_prompt_cache(model)
    for start in range(0, len(prompt) - 1, PREFILL_TOKENS):
        drafting.see(prompt[start : min(start + PREFILL_TOKENS, len(prompt) - 1)], caches)

    def draw(logits: mx.array, drafts: list[int]) -> list[int]:
        nonlocal logprobs
        logprobs, states, drawn = logits - mx.logsumexp(logits, axis=-1, keepdims=True), [], []
        for row in logprobs:
            drawn.append(sampler(row[None]))
            states.append(mx.random.state[0])
        found = until_wrong(mx.concatenate(drawn).tolist(), drafts)
        high, low = states[len(found) - 1].tolist()  # the tokens that were not used drew no number
        mx.random.seed(high << 32 | low)
        return found

    token, logprobs = prompt[-1], mx.array(0.0)
    while drafting.fits(caches):
        found = drafting.step(token, caches, draw)
        token = found[-1]
        yield from zip(found, logprobs, [True] * (len(found) - 1) + [False], strict=False)
    drafting.catch_up(caches)
    while True:
        logits = model(mx.array([[token]]), cache=caches)[:, -1].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = sampler(logprobs).item()
        yield token, logprobs[0], False


def drafted_text(
    base: Base, model: Any, prompt: list[int], max_tokens: int, sampler: Callable[[mx.array], mx.array], drafts: Drafts
) -> Iterator[GenerationResponse]:
    """Yield what mlx-lm's `stream_generate` yields for a prompt, with tokens that a head drafts."""
    text, ends, start = base.tokenizer.detokenizer, base.tokenizer.eos_token_ids, time.perf_counter()
    begun, steps = start, drafted_tokens(model, prompt, sampler, Drafting(drafts))
    with wired_limit(base.model):
        for count, (token, logprobs, from_draft) in enumerate(steps, start=1):
            begun = time.perf_counter() if count == 1 else begun
            ended = "stop" if token in ends else "length" if count == max_tokens else None
            if token not in ends:
                text.add_token(token)
            if ended:
                text.finalize()
            yield GenerationResponse(
                text.last_segment, token, logprobs, from_draft, len(prompt), len(prompt) / (begun - start + 1e-9), count,
                count / (time.perf_counter() - begun + 1e-9), mx.get_peak_memory() / 1e9, ended,
            )  # fmt: skip
            if ended:
                return
