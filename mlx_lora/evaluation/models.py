"""Score and write texts with a base and any number of adapters on it, all in the same batches.

    log-likelihoods    rows of all models beside each other; a context is computed once for all its continuations
    texts              rows join and leave a running batch (models/generator.py), each with its own model's prefix cache

Each row of a batch has its own adapter (engine/adapter_store.py). A row with several continuations has the layout of
models/prefix_attention.py:

    context p p p p, continuations "a a a" and "b b"        p p p | p a a | p b

The context's last token is repeated, because it predicts the first token of each continuation. Continuations that differ in
their last token alone, such as the letters of a multiple choice, share one such part. Only the positions that predict a
continuation reach the head.

Before the first batch, a few random tokens are scored in this way and by the model's plain logits. Where the two differ by
more than rounding, or the model's state passes from token to token, each continuation has its own row and all logits are
computed, which is slower and right.

Shapes: B rows, T columns, K parts of a row, P positions that predict, V vocabulary.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx

from mlx_lora.data.chat_template import own_template
from mlx_lora.engine.adapter_store import AdapterSource, AdapterStore, context_of
from mlx_lora.losses.cross_entropy import log_sum_exp
from mlx_lora.models.config import check_language_model
from mlx_lora.models.generator import (
    ANSWERS,
    BatchRow,
    Prefill,
    PromptCache,
    Routing,
    RunningBatch,
    Sampler,
    Sampling,
    TextStream,
    TokenSteps,
    check_rows,
    held_weights,
    one_row_because,
)
from mlx_lora.models.grammar import Grammars
from mlx_lora.models.head import Head, find_head
from mlx_lora.models.load import Base
from mlx_lora.models.prefix_attention import rotate_by_token, shared_caches, unshareable
from mlx_lora.models.tokenizer import Continuation
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, describe_gpu_failure
from mlx_lora.utils.progress import long_task, tracked

log = logging.getLogger(__name__)

BASE = "base"
DEFAULT_BATCH_TOKENS = 2048
DEFAULT_CONTEXT = 2048  # of a model whose config does not say, as in lm-eval
LOGITS_BYTES = 256 << 20  # of float32 logits that are computed at once
LEAST_SHARED = 8  # tokens of a context, from which on computing it once saves more than the mask costs
MOST_IN_A_ROW = 512  # tokens of continuations behind a context that is shorter than that
MOST_ROWS = 32  # texts that are written at once
MOST_ROW_TOKENS = 32_768  # of all these texts, prompts and room for answers included
PREFILL_TOKENS = 512
PROMPT_CACHE_BYTES = 256 << 20
# The largest difference of a random token's log-probability from that of the plain logits, by dtype.
ROUNDING = {mx.float32: 1e-3, mx.float16: 0.1, mx.bfloat16: 0.5}


class Scored(NamedTuple):
    """A continuation whose log-likelihood is wanted.

    Attributes:
        model: `base`, or the name of an adapter.
        context: token ids, at least one.
        continuation: token ids.
    """

    model: str
    context: tuple[int, ...]
    continuation: tuple[int, ...]


class LogLikelihood(NamedTuple):
    """The log-likelihood of a continuation, and whether greedy decoding would write it."""

    total: float
    greedy: bool


class TextRequest(NamedTuple):
    """A text that a model is to write.

    Attributes:
        model: `base`, or the name of an adapter.
        tokens: of the prompt, at least one.
        max_tokens: the most new tokens.
        stops: texts before which the answer ends, none of them empty.
        sampling: how tokens are drawn; greedy unless given.
        special: whether special tokens are part of the text, as those around calls of tools.
    """

    model: str
    tokens: tuple[int, ...]
    max_tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = Sampling(temperature=0)
    special: bool = False

    @property
    def room(self) -> int:
        """The most tokens of prompt and text together."""
        return len(self.tokens) + self.max_tokens


class Written(NamedTuple):
    """A text that a model wrote, without its stop text, and all its tokens without an end token."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class _Target:
    """Where a continuation's tokens are predicted: `tokens` by consecutive columns of a row, from `column` on."""

    number: int
    column: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class _ScoredRow:
    """One row of a batch: its tokens, the columns at which its parts start (none for one part), and what it predicts."""

    model: str
    tokens: list[int]
    starts: list[int]
    targets: list[_Target]


class Models:
    """A base with adapters; `opened` makes it."""

    def __init__(self, base: Base, sources: Mapping[str, AdapterSource], ignore_fingerprint: bool, batch_tokens: int):
        """Put the adapters on.

        Args:
            base: its layers are replaced by routed ones.
            sources: of the adapters, by name.
            ignore_fingerprint: accept adapters of another base of the same shape.
            batch_tokens: positions of a batch, padding included.

        Raises:
            InputError: an adapter cannot be used.
        """
        self.base, self.batch_tokens = base, batch_tokens
        dtype = base.model(mx.array([[0]])).dtype
        self._routing = Routing()
        store = AdapterStore(base, self._routing, dtype, None, ignore_fingerprint)
        cards = store.add(sources)
        self._numbers: dict[str, int | None] = {BASE: None} | {name: store.acquire(name).number for name in sources}
        own = own_template(base.hf_tokenizer)
        self.templates = {BASE: own} | {card.name: card.chat_template or own for card in cards}
        self._steps = TokenSteps(base.model)
        self._head, self._shares = self._checked(ROUNDING.get(dtype, ROUNDING[mx.bfloat16]))

    @classmethod
    @contextmanager
    def opened(
        cls,
        base: Base,
        sources: Mapping[str, AdapterSource],
        ignore_fingerprint: bool = False,
        batch_tokens: int | None = None,
    ) -> Iterator[Models]:
        """Yield the models; float copies of quantized weights end with the block. Arguments as for `__init__`.

        Raises:
            InputError: the base is an encoder.
        """
        check_language_model(base.model, base.model_id)
        device.set_cache_limit()
        with held_weights(base, ANSWERS):
            yield cls(base, sources, ignore_fingerprint, batch_tokens or DEFAULT_BATCH_TOKENS)

    @property
    def names(self) -> list[str]:
        """`base`, and the adapters in the order in which they were given."""
        return list(self._numbers)

    @property
    def context_tokens(self) -> int:
        """The number of tokens that the model takes."""
        return context_of(self.base.config) or DEFAULT_CONTEXT

    # Log-likelihoods

    def log_likelihoods(
        self, asked: Sequence[Scored], stopped: Callable[[], bool] = lambda: False
    ) -> list[LogLikelihood]:
        """Return the log-likelihood of each continuation, natural logarithm.

        A context that does not fit the model is cut at its left end.

        Args:
            asked: in any order.
            stopped: asked before each batch whether to end.

        Raises:
            InputError: a continuation is longer than the model's context.
            KeyboardInterrupt: it was stopped.
        """
        found = [LogLikelihood(0.0, True)] * len(asked)
        batches = self._batches(self._rows(asked))
        for batch in tracked(batches, "Scoring", len(batches), "batches"):
            if stopped():
                raise KeyboardInterrupt
            for target, likelihood in self._scored(batch, self._head, self._shares):
                found[target.number] = likelihood
        return found

    def _rows(self, asked: Sequence[Scored], shares: bool | None = None) -> list[_ScoredRow]:
        """Return rows for all continuations, those of one context in one row where the model allows it."""
        shares = self._shares if shares is None else shares
        limit = self.context_tokens
        parts: dict[tuple[str, tuple[int, ...]], dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]]] = {}
        for number, (model, context, continuation) in enumerate(asked):
            if not continuation:
                continue
            if len(continuation) > limit:
                raise InputError(
                    f"--tasks: a continuation of {len(continuation)} tokens, and the model takes {limit}; "
                    "leave the task out, or use a model with a longer context"
                )
            kept = context[-max(1, limit + 1 - len(continuation)) :]
            begun = (*kept[-1:], *continuation[:-1])
            parts.setdefault((model, kept), {}).setdefault(begun, []).append((number, continuation))
        rows: list[_ScoredRow] = []
        for (model, context), begun in parts.items():
            shared, room = context[:-1], max(len(context), MOST_IN_A_ROW)
            row: _ScoredRow | None = None
            for part, continuations in begun.items():
                if (
                    row is None
                    or not shares
                    or len(shared) < LEAST_SHARED
                    or len(row.tokens) + len(part) > len(shared) + room
                ):
                    row = _ScoredRow(model, list(shared), [], [])
                    rows.append(row)
                column = len(row.tokens)
                row.starts.append(column)
                row.tokens.extend(part)
                row.targets.extend(_Target(number, column, tokens) for number, tokens in continuations)
        return rows

    def _batches(self, rows: list[_ScoredRow]) -> list[list[_ScoredRow]]:
        """Return batches of rows of similar length, the longest first, with at most `batch_tokens` positions."""
        batches: list[list[_ScoredRow]] = []
        for row in sorted(rows, key=lambda row: -len(row.tokens)):
            if not batches or len(batches[-1][0].tokens) * (len(batches[-1]) + 1) > self.batch_tokens:
                batches.append([])
            batches[-1].append(row)
        return batches

    def _scored(
        self, batch: list[_ScoredRow], head: Head | None, shares: bool
    ) -> Iterator[tuple[_Target, LogLikelihood]]:
        """Compute one batch."""
        width = len(batch[0].tokens)
        inputs = mx.array([row.tokens + [0] * (width - len(row.tokens)) for row in batch])  # (B, T)
        most = max(len(row.starts) for row in batch)
        arrays = {"inputs": inputs}
        if shares and most > 1:  # a part that a row does not have begins behind its end
            padded = [(row.starts if len(row.starts) > 1 else []) for row in batch]
            arrays["starts"] = mx.array([own + [width] * (most - len(own)) for own in padded], mx.int32)  # (B, K)
        places: dict[int, int] = {}  # position -> its number among those that predict
        for number, row in enumerate(batch):
            for target in row.targets:
                for column in range(target.column, target.column + len(target.tokens)):
                    places.setdefault(number * width + column, len(places))
        self._routing.rows = tuple(self._numbers[row.model] for row in batch)
        caches = shared_caches(self.base.model, arrays)
        positions = mx.array(list(places), mx.uint32)
        states = (self.base.model if head is None else head.hidden)(inputs, **caches)
        states = states.reshape(-1, states.shape[-1])[positions]  # (P, D), or (P, V) without a head
        wanted, tokens = [], []
        for number, row in enumerate(batch):
            for target in row.targets:
                begin = number * width + target.column
                wanted += [places[begin + step] for step in range(len(target.tokens))]
                tokens += target.tokens
        values, likeliest = _log_probabilities(states, head, wanted, tokens)
        at = 0
        for row in batch:
            for target in row.targets:
                end = at + len(target.tokens)
                yield target, LogLikelihood(sum(values[at:end]), all(likeliest[at:end]))
                at = end

    def _checked(self, most: float) -> tuple[Head | None, bool]:
        """Return the head to use, None for the model's own logits, and whether continuations share their context."""
        head = find_head(self.base.model, self.base.config)
        head = None if isinstance(head, str) else head
        shares = unshareable(self.base.model) is None
        if shares:
            rotate_by_token(self.base.model)
        vocabulary = min(self.base.token_rows or 100, 1000)
        numbers = [(7 * i * i + 3 * i + 1) % vocabulary for i in range(2 * LEAST_SHARED)]
        context = tuple(numbers[: LEAST_SHARED + 2])
        asked = [Scored(name, context, tuple(numbers[-n:])) for name in self.names for n in (1, 3)]

        def scores(head: Head | None, shares: bool) -> list[float]:
            rows = sorted(self._rows(asked, shares), key=lambda row: -len(row.tokens))
            found = {target.number: value.total for target, value in self._scored(rows, head, shares)}
            return [found[number] for number in range(len(asked))]

        plain = scores(None, False)
        for choice in ((head, shares), (head, False), (None, shares)):
            try:
                same = all(abs(a - b) <= most for a, b in zip(scores(*choice), plain, strict=True))
            except Exception as error:  # of an architecture whose code reads one position for all rows
                if describe_gpu_failure(error):
                    raise
                continue
            if same:
                return choice
        return None, False

    # Texts

    def texts(self, asked: Sequence[TextRequest], stopped: Callable[[], bool] = lambda: False) -> list[Written]:
        """Return what a model writes after each prompt.

        Args:
            asked: in any order.
            stopped: asked before each step whether to end.

        Raises:
            InputError: the model cannot hold several texts at once.
            KeyboardInterrupt: it was stopped.
        """
        if not asked:
            return []
        check_rows(self.base.model, self.base.model_id, "choose tasks of log-likelihoods")
        batch, known = RunningBatch(self._steps, self._routing), PromptCache(PROMPT_CACHE_BYTES)
        self._routing.rows = ()  # the model may be tried now, with rows of its own
        most_rows = 1 if one_row_because(self._steps) else MOST_ROWS
        found, ends = [Written("", ())] * len(asked), frozenset(self.base.tokenizer.eos_token_ids)
        # The longest prompts first.
        waiting = deque(sorted(range(len(asked)), key=lambda at: (-len(asked[at].tokens), asked[at].tokens)))
        with long_task("Writing", len(asked), "texts") as task:
            while waiting or len(batch):
                if stopped():
                    raise KeyboardInterrupt
                while waiting:
                    room = sum(asked[number].room for number in [waiting[0], *(row.owner[0] for row in batch.rows)])
                    if len(batch) and (len(batch) >= most_rows or room > MOST_ROW_TOKENS):
                        break
                    self._join(batch, known, waiting.popleft(), asked)
                leaving = []
                for row, token, _ in batch.step():
                    number, stream = row.owner
                    if row.sampler.failure:
                        raise InputError(f"--schema: too large to be enforced ({row.sampler.failure.splitlines()[0]})")
                    if token in ends or stream.add(token).stopped or len(row.tokens) == asked[number].room:
                        leaving.append(row)
                if leaving:
                    batch.leave(leaving)
                for row in leaving:
                    prompt = asked[row.owner[0]]
                    tokens = row.tokens[len(prompt.tokens) : -1 if row.tokens[-1] in ends else None]
                    said = str(self.base.hf_tokenizer.decode(tokens, skip_special_tokens=not prompt.special))
                    for stop in prompt.stops:
                        said = said.split(stop)[0]
                    found[row.owner[0]] = Written(said, tuple(tokens))
                    task.advance()
        return found

    @cached_property
    def grammars(self) -> Grammars:
        """What makes grammars of texts."""
        return Grammars.of(self.base)

    def _join(self, batch: RunningBatch, known: PromptCache, at: int, asked: Sequence[TextRequest]) -> None:
        """Compute a prompt, and add its row to the batch; the row's owner is its number and its text."""
        prompt = asked[at]
        number, tokens = self._numbers[prompt.model], list(prompt.tokens)
        caches, cached = known.find(number, tokens)
        stream = TextStream(Continuation(self.base.tokenizer), prompt.stops)
        vocabulary = self.base.token_rows or len(self.base.hf_tokenizer)
        grammar = prompt.sampling.grammar
        sampler = Sampler(prompt.sampling, vocabulary, grammar and self.grammars.matcher(grammar))
        row = BatchRow((at, stream), number, sampler, tokens[:cached])
        prefill = Prefill(self._steps, self._routing, row, tokens[cached:], caches)
        while not prefill.done:
            prefill.advance(PREFILL_TOKENS)
        batch.join(prefill)
        known.keep(number, row.tokens, prefill.caches)


def _log_probabilities(
    states: mx.array, head: Head | None, wanted: list[int], tokens: list[int]
) -> tuple[list[float], list[bool]]:
    """Return the log-probability of tokens, and whether each is the likeliest.

    Args:
        states: (P, D) hidden states, or (P, V) logits.
        head: turns hidden states into logits.
        wanted: (N,) numbers of states.
        tokens: (N,) the token that each of these is asked about.
    """
    vocabulary = (states if head is None else head.logits(states[:1])).shape[-1]
    rows = max(1, LOGITS_BYTES // (4 * vocabulary))
    values, likeliest = [0.0] * len(wanted), [False] * len(wanted)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    at = 0
    for first in range(0, states.shape[0], rows):
        logits = states[first : first + rows]
        logits = (logits if head is None else head.logits(logits)).astype(mx.float32)
        total = log_sum_exp(logits)
        best = mx.argmax(logits, axis=-1)
        end = at
        while end < len(order) and wanted[order[end]] < first + rows:
            end += 1
        own = mx.array([wanted[number] - first for number in order[at:end]], mx.uint32)
        ids = mx.array([tokens[number] for number in order[at:end]], mx.uint32)
        picked, same = logits[own, ids] - total[own], best[own] == ids
        mx.eval(picked, same)
        for number, value, greedy in zip(order[at:end], picked.tolist(), same.tolist(), strict=True):  # pyright: ignore[reportArgumentType] # lists of one axis
            values[number], likeliest[number] = value, greedy
        at = end
    return values, likeliest
