"""Sample answers for clients, several requests and adapters in one batch, between the requests that train.

    SamplingJob -> prompt, computed once for all samples of a request -> rows of the running batch -> SampleTicket

The rows are those of the serving engine (serving/engine.py): each has its own adapter and random stream, so an answer depends on its
prompt, weights, settings and seed, and not on what else is sampled. Log-probabilities are those of the model, at temperature 1 and
before top-k and top-p: the ones that a policy loss compares with. A token that ends an answer is its last token.

Weights are factors as they were when a client saved them. The least recently used go to files when there are many.

Shapes: T tokens of a prompt, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_lora.models.folder import save_tensors
from mlx_lora.models.load import Base
from mlx_lora.rollouts.generator import TokenSteps, one_row_because, rowless
from mlx_lora.serving.adapter_store import LayerFactors, Routing, route, unrouted_twin
from mlx_lora.serving.engine import BatchRow, Likelihoods, Prefill, RunningBatch, Sampler, Sampling
from mlx_lora.utils.errors import InputError, first_line

# Tokens of a prompt that are computed at once; with their log-probabilities, all logits of so many are in memory.
PROMPT_PART, SCORED_PART = 512, 128
# The last tokens of an answer in which a stop text is searched, at least.
STOP_WINDOW = 48
# Sets of weights in memory, beyond which the least recently used are written to files.
MOST_RESIDENT = 8

# Requests


@dataclass(frozen=True)
class SamplingJob:
    """A request for samples.

    Attributes:
        tokens: the prompt.
        weights: the name of the weights, None for the base.
        samples: how many answers.
        max_tokens: of an answer.
        sampling: how tokens are drawn; sample i has the seed plus i.
        stop_tokens: each ends an answer.
        stop_texts: likewise.
        scores: return the log-probabilities of the prompt, of the last so many tokens; 0: none.
        top_scores: and of so many likeliest tokens at each of them.
    """

    tokens: Sequence[int]
    weights: str | None
    samples: int
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    stop_texts: tuple[str, ...] = ()
    scores: int = 0
    top_scores: int = 0


@dataclass
class SampledSequence:
    """One answer: its tokens, their log-probabilities, the k likeliest tokens at each, and whether it ended by itself."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    stopped: bool = False


@dataclass(frozen=True)
class PromptScores:
    """The log-probabilities of a prompt's tokens, (T,) with NaN where there is none, and (T, k) ids and values, or None."""

    logprobs: np.ndarray
    top_ids: np.ndarray | None = None
    top_values: np.ndarray | None = None


@dataclass(eq=False)
class SampleTicket:
    """A request under way.

    Attributes:
        ask: the request.
        done: is called once, in the worker's thread, with the answer or the error.
        canceled: the answer is no longer wanted.
    """

    ask: SamplingJob
    done: Callable[[SampleTicket | Exception], None]
    canceled: bool = False
    samples: list[SampledSequence] = field(default_factory=list)
    left: int = 0
    prompt: PromptScores | None = None
    number: int | None = None


# Weights


class WeightStore:
    """The weights that can be sampled from, by name; those in use have a number in the routed model."""

    def __init__(self, base: Base):
        """Begin without weights.

        Args:
            base: its arrays are shared; its modules stay as they are.
        """
        self.model = unrouted_twin(base.model)
        self.model.eval()
        self.routing, self._folder = Routing(), Path(tempfile.mkdtemp(prefix="mlx-lora-weights-"))
        self._factors: OrderedDict[str, dict[str, LayerFactors] | Path] = OrderedDict()
        self._numbers: dict[str, int] = {}
        self._uses: dict[str, int] = {}
        self._expected, self._dropped = Counter[str](), set[str]()
        self._layers: dict[int, dict[str, Any]] = {}
        self._next = itertools.count()

    def __contains__(self, name: str) -> bool:
        return name in self._factors

    def put(self, name: str, factors: dict[str, LayerFactors]) -> None:
        """Keep weights under a name that was not used before."""
        self._factors[name] = factors
        resident = [one for one, value in self._factors.items() if not isinstance(value, Path)]
        for old in resident[: max(0, len(resident) - MOST_RESIDENT)]:
            file, arrays = self._folder / f"{next(self._next)}.safetensors", {}
            for path, one in self._factors[old].items():  # pyright: ignore[reportAttributeAccessIssue] # in memory
                arrays |= {f"{path}.a": one.a, f"{path}.b": one.b, f"{path}.head": mx.array(one.adapts_head)}
            save_tensors(file, arrays)
            self._factors[old] = file

    def drop(self, name: str) -> None:
        """Forget weights; requests that use them, or wait for their turn to, keep them."""
        if self._expected[name]:
            self._dropped.add(name)
            return
        kept = self._factors.pop(name, None)
        if isinstance(kept, Path):
            kept.unlink(missing_ok=True)

    def expect(self, name: str) -> None:
        """Keep weights for a request that waits, also if they are dropped meanwhile, until `arrived`."""
        self._expected[name] += 1

    def arrived(self, name: str) -> None:
        """Note that a request that waited has acquired the weights, or no longer wants them."""
        self._expected[name] -= 1
        if not self._expected[name] and name in self._dropped:
            self._dropped.remove(name)
            self.drop(name)

    def acquire(self, name: str) -> int:
        """Return the number of weights for one more request.

        Raises:
            InputError: there are none of this name.
        """
        kept = self._factors.get(name)
        if kept is None:
            raise InputError("sample: these weights are gone, because their session has ended; save them again")
        self._factors.move_to_end(name)
        if name not in self._numbers:
            if isinstance(kept, Path):
                arrays: Any = mx.load(str(kept))
                kept = {
                    path: LayerFactors(
                        *(arrays[f"{path}.{part}"] for part in "ab"), adapts_head=arrays[f"{path}.head"].item()
                    )
                    for path in sorted({name.rpartition(".")[0] for name in arrays})
                }
            number = self._numbers[name] = next(self._next)
            layers: dict[str, Any] = route(self.model, list(kept), self.routing)
            self._layers[number] = layers
            for path, layer in layers.items():
                layer.pools.put(number, kept[path])
                layer.pools.settle()
        self._uses[name] = self._uses.get(name, 0) + 1
        return self._numbers[name]

    def release(self, name: str) -> None:
        """Give back what `acquire` returned; weights that no request uses leave the layers."""
        self._uses[name] -= 1
        if self._uses[name]:
            return
        del self._uses[name]
        number = self._numbers.pop(name)
        for layer in self._layers.pop(number).values():
            layer.pools.drop(number)

    def close(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._folder, ignore_errors=True)


# Sampling


class SampleLoop:
    """Answers requests for samples, a step at a time."""

    def __init__(self, base: Base, weights: WeightStore, most_rows: int):
        """Prepare.

        Args:
            base: has the tokenizer.
            weights: what is sampled from.
            most_rows: of the running batch.
        """
        self.weights, self._most_rows, self._tokenizer = weights, most_rows, base.hf_tokenizer
        self._model = TokenSteps(weights.model)
        self._waiting: deque[SampleTicket] = deque()
        self._fresh: deque[tuple[SampleTicket, int, list[Any]]] = deque()  # samples whose prompt is computed
        self._batch = RunningBatch(self._model, weights.routing)
        kind = rowless(weights.model)
        self._refusal = f"mlx-lm keeps this model's state in a {kind}, without rows" if kind else ""
        try:
            if not kind and one_row_because(weights.model):
                self._most_rows = 1
        except InputError as error:  # training goes on without samples
            self._refusal = first_line(error)
        self.vocabulary = weights.model(mx.array([[0]])).shape[-1]

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._fresh or len(self._batch))

    def submit(self, ticket: SampleTicket) -> None:
        """Queue a request."""
        if ticket.ask.weights is not None:
            self.weights.expect(ticket.ask.weights)
        self._waiting.append(ticket)

    def give_up(self, error: Exception) -> None:
        """Answer all requests with an error."""
        tickets = [*self._waiting, *(one[0] for one in self._fresh), *(row.owner[0] for row in self._batch.rows)]
        for ticket in {id(ticket): ticket for ticket in tickets}.values():
            ticket.done(error)

    def step(self) -> None:
        """Compute one prompt, or one token of every row.

        An error of one prompt is its request's answer. An error of a step ends the requests of the batch, and the loop goes on.
        """
        if not self._fresh and self._waiting and len(self._batch) < self._most_rows:
            self._begin(self._waiting.popleft())
        while self._fresh and len(self._batch) < self._most_rows:
            ticket, sample, caches = self._fresh.popleft()
            if not ticket.canceled:
                ask, settings = ticket.ask, ticket.ask.sampling
                seed = None if settings.seed is None else (settings.seed + sample) % 2**63
                sampler, tokens = Sampler(replace(settings, seed=seed), self.vocabulary), list(ask.tokens)
                own = BatchRow((ticket, sample), ticket.number, sampler, tokens[:-1])
                self._batch.join(Prefill(self._model, self.weights.routing, own, tokens[-1:], caches))
            else:
                self._finish(ticket)
        if len(self._batch):
            try:
                leaving: list[BatchRow] = []
                for row, token, likelihoods in self._batch.step():
                    ticket, number = row.owner
                    if ticket.canceled or self._ends(ticket.samples[number], ticket.ask, token, likelihoods):
                        leaving.append(row)
                if leaving:
                    self._batch.leave(leaving)
                for row in leaving:
                    self._finish(row.owner[0])
            except Exception as error:
                tickets = {id(row.owner[0]): row.owner[0] for row in self._batch.rows}
                self._batch = RunningBatch(self._model, self.weights.routing)
                self._fresh = deque(one for one in self._fresh if id(one[0]) not in tickets)
                for ticket in tickets.values():
                    self._give_up(ticket, error)

    def _begin(self, ticket: SampleTicket) -> None:
        """Compute a request's prompt, with its log-probabilities if they are wanted."""
        ask = ticket.ask
        try:
            if self._refusal:
                raise InputError(f"sample: {self._refusal}; such a model can only be trained here")
            if ticket.canceled:
                raise InputError("sample: canceled")
            if ask.weights is not None:
                ticket.number = self.weights.acquire(ask.weights)
            ticket.samples, ticket.left = [SampledSequence() for _ in range(ask.samples)], ask.samples
            caches, ticket.prompt = self._prompt(ask, ticket.number)
        except Exception as error:
            self._give_up(ticket, error)
            return
        finally:
            if ask.weights is not None:
                self.weights.arrived(ask.weights)
        self._fresh.extend((ticket, sample, caches) for sample in range(ask.samples))

    def _prompt(self, ask: SamplingJob, number: int | None) -> tuple[list[Any], PromptScores | None]:
        """Return the caches of all tokens of a prompt but the last, and its log-probabilities."""
        caches, tokens = make_prompt_cache(self._model.model), list(ask.tokens)
        logprobs = np.full(len(tokens), np.nan, np.float32)
        ids = np.zeros((len(tokens), ask.top_scores), np.int32)
        values = np.full((len(tokens), ask.top_scores), -99999.0, np.float32)  # the protocol's mark of an empty place
        first_scored = len(tokens) - ask.scores if ask.scores else len(tokens)
        start = 0
        while start < len(tokens) - 1:
            scored = start + 1 >= first_scored
            size = SCORED_PART if scored else min(PROMPT_PART, max(first_scored - 1 - start, 1))
            part = tokens[start : min(start + size, len(tokens) - 1)]
            self.weights.routing.rows = (number,)
            logits = self._model(mx.array([part]), cache=caches)
            if scored:
                after = slice(start + 1, start + 1 + len(part))
                logprobs[after], ids[after], values[after] = _scores(logits[0], tokens[after], ask.top_scores)
            mx.eval([cache.state for cache in caches])
            start += len(part)
        if not ask.scores:
            return caches, None
        return caches, PromptScores(logprobs, *((ids, values) if ask.top_scores else ()))

    def _ends(self, sampled: SampledSequence, ask: SamplingJob, token: int, likelihoods: Likelihoods | None) -> bool:
        """Add a token to an answer, and return whether it is the last."""
        sampled.tokens.append(token)
        if likelihoods is not None:
            sampled.logprobs.append(likelihoods.token.item())
            sampled.top.append(likelihoods.top())
        sampled.stopped = token in ask.stop_tokens
        if ask.stop_texts and not sampled.stopped:
            window = max(STOP_WINDOW, *(len(stop.encode()) + 8 for stop in ask.stop_texts))
            text = str(self._tokenizer.decode(sampled.tokens[-window:]))
            sampled.stopped = any(stop in text for stop in ask.stop_texts)
        return sampled.stopped or len(sampled.tokens) >= ask.max_tokens

    def _finish(self, ticket: SampleTicket) -> None:
        """Count an ended row, and answer the request after its last one."""
        ticket.left -= 1
        if ticket.left:
            return
        if ticket.ask.weights is not None:
            self.weights.release(ticket.ask.weights)
        ticket.done(InputError("sample: canceled") if ticket.canceled else ticket)

    def _give_up(self, ticket: SampleTicket, error: Exception) -> None:
        if ticket.number is not None and ticket.ask.weights is not None:
            self.weights.release(ticket.ask.weights)
        ticket.done(error)


def _scores(logits: mx.array, following: list[int], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the log-probabilities of the following tokens, and the likeliest ones, best first, with theirs.

    Args:
        logits: (T, V) of any float dtype.
        following: T tokens.
        count: k.
    """
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.take_along_axis(logprobs, mx.array(following)[:, None], axis=-1)[:, 0]
    if not count:
        return np.array(own), np.zeros((len(following), 0), np.int32), np.zeros((len(following), 0), np.float32)
    ids = mx.argsort(-logprobs, axis=-1)[:, :count]
    return np.array(own), np.array(ids).astype(np.int32), np.array(mx.take_along_axis(logprobs, ids, axis=-1))
