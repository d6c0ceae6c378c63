"""Serve adapters with a score head over HTTP: classifiers as vLLM does, and rerankers as clients of Jina and Cohere ask.

    POST /classify, /v1/classify             {"model": NAME, "input": TEXT or [TEXT, ...]}
    POST /rerank, /v1/rerank, /v2/rerank     {"model": NAME, "query": TEXT, "documents": [TEXT or {"text": TEXT}, ...],
                                              "top_n": N, "return_documents": true}

Each adapter is put on a copy of the base's modules, which shares the base's arrays. Texts are scored in the engine's thread, a few
at a time, between two steps of the answers that are being generated.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.examples import Text
from mlx_lora.exporters.adapter_folder import load_adapter, with_limits_of_run
from mlx_lora.models.load import Base
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.scored_texts import ERROR, PREDICTED, TextScorer, in_order
from mlx_lora.serving.adapter_store import base_name
from mlx_lora.serving.client_errors import api_error, without_paths
from mlx_lora.serving.engine import Engine, Stopped
from mlx_lora.serving.pools import unrouted_twin
from mlx_lora.serving.schema import ApiError, read_json
from mlx_lora.utils.errors import InputError

MOST_TEXTS = 2048  # in a request
TOGETHER = 16  # texts that are scored before answers are generated again
CLASSIFY_FIELDS = frozenset(["model", "input", "user"])
# Those of Jina's, Cohere's and vLLM's clients; what is of no effect here is taken, so that they need no change.
RERANK_FIELDS = frozenset(
    ["model", "query", "documents", "top_n", "return_documents", "max_chunks_per_doc", "max_tokens_per_doc", "user"]
)
Score = Callable[[Sequence[Any]], tuple[np.ndarray, int]]


def check_names(engine: Engine, folders: Mapping[str, Path]) -> None:
    """Refuse an adapter that has the name of the base or of an adapter that generates.

    Raises:
        InputError: one has.
    """
    if twice := sorted({base_name(engine.base), *engine.store.cards} & set(folders)):
        raise InputError(f"--adapter {twice[0]}: the base or another adapter has this name; give it another")


class Scores:
    """The adapters of a server that score texts, and their endpoints."""

    def __init__(self, engine: Engine, folders: Mapping[str, Path], timeout_s: float):
        """Load the adapters.

        Args:
            engine: holds the base.
            folders: name -> folder.
            timeout_s: for a whole request.

        Raises:
            InputError: an adapter does not fit the base, or has the name of another model.
        """
        self._engine, self._timeout_s = engine, timeout_s
        check_names(engine, folders)
        self._scorers = {
            name: engine.call(lambda store, folder=folder: load_scorer(engine, folder)).result()
            for name, folder in folders.items()
        }

    def describe(self) -> list[str]:
        """Return a line about each adapter."""
        return [f"scores {name}: {described(scorer.head)}" for name, scorer in self._scorers.items()]

    def routes(self) -> list[Route]:
        """Return the routes."""
        paths = {"/classify": self.classify, "/v1/classify": self.classify}
        paths |= dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), self.rerank)
        return [Route(path, endpoint, methods=["POST"]) for path, endpoint in paths.items()]

    async def classify(self, request: HttpRequest) -> Response:
        """POST /classify."""
        body = read_json(await request.body())
        if strange := body.keys() - CLASSIFY_FIELDS:
            raise ApiError(400, f"{', '.join(sorted(strange))}: not a field of this endpoint", "unknown_parameter")
        name, scorer = self._scorer(body.get("model"), "classify")
        given = body.get("input")
        texts = texts_of([given] if isinstance(given, str) else given, "input")
        scores, tokens = await self._score(lambda part: score_texts(scorer, part), texts)
        answers = scorer.answers(scores, {})
        return JSONResponse(
            {
                "id": f"classify-{uuid.uuid4().hex}",
                "object": "list",
                "created": int(time.time()),
                "model": name,
                "data": [classified(number, answer) for number, answer in enumerate(answers)],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    async def rerank(self, request: HttpRequest) -> Response:
        """POST /v1/rerank."""
        body = read_json(await request.body())
        if strange := body.keys() - RERANK_FIELDS:
            raise ApiError(400, f"{', '.join(sorted(strange))}: not a field of this endpoint", "unknown_parameter")
        name, scorer = self._scorer(body.get("model"), "rerank")
        (query,) = texts_of([body.get("query")], "query")
        given = body.get("documents")
        plain = (
            [one.get("text") if isinstance(one, dict) else one for one in given] if isinstance(given, list) else given
        )
        documents = [one.text for one in texts_of(plain, "documents")]
        top_n = len(documents) if body.get("top_n") is None else body["top_n"]
        if isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1:
            raise ApiError(400, f"top_n: found {top_n!r}; send a number of at least 1", "invalid_value", "top_n")
        scores, tokens = await self._score(lambda part: scorer.rank(query.text, part), documents)
        shown = body.get("return_documents") is True
        return JSONResponse(
            {
                "id": f"rerank-{uuid.uuid4().hex}",
                "model": name,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                "results": [
                    {"index": i, "relevance_score": score} | ({"document": {"text": documents[i]}} if shown else {})
                    for i, score in in_order(scores)[:top_n]
                ],
            }
        )

    def _scorer(self, model: Any, objective: str) -> tuple[str, TextScorer]:
        """Return the adapter that a request names, or the only one for an objective."""
        own = {name: one for name, one in self._scorers.items() if one.head["objective"] == objective}
        if model is None and len(own) == 1:
            model = next(iter(own))
        if not isinstance(model, str) or model not in own:
            known = f"; there are {', '.join(sorted(own))}" if own else "; start the server with --adapter NAME=DIR"
            raise ApiError(404, f"no model {model!r} for {objective}{known}", "model_not_found", "model")
        return model, own[model]

    async def _score(self, score: Score, texts: Sequence[Any]) -> tuple[np.ndarray, int]:
        """Return the scores of texts, and the number of tokens that were read; `score` gets a few texts at a time."""
        return await a_few_at_a_time(self._engine, self._timeout_s, score, texts)


async def a_few_at_a_time(
    engine: Engine, timeout_s: float, score: Score, texts: Sequence[Any]
) -> tuple[np.ndarray, int]:
    """Return what `score` finds of texts in the engine's thread, and the number of tokens that were read.

    Raises:
        ApiError: it took too long, a text cannot be used, or the engine has stopped.
    """
    found, tokens = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            for start in range(0, len(texts), TOGETHER):
                part = texts[start : start + TOGETHER]
                scores, count = await asyncio.wrap_future(engine.call(_without_store(score, part)))
                found.append(scores)
                tokens += count
    except TimeoutError:
        raise ApiError(504, f"the texts took longer than {timeout_s:g} s; send fewer of them", "timeout") from None
    except Stopped as error:
        raise api_error(error) from None
    except InputError as error:
        text = without_paths(" ".join(str(error).split()), engine)
        raise ApiError(400, text, "invalid_value") from None
    return np.concatenate(found), tokens


def score_texts(scorer: TextScorer, part: Sequence[Text]) -> tuple[np.ndarray, int]:
    """Return the scores of texts, (N, K), and the number of their tokens.

    Raises:
        InputError: a text has no token.
    """
    encoded, dropped = scorer.encode(part)
    if dropped:
        raise InputError(f"a text cannot be used: {next(iter(dropped.values()))}")
    return scorer.score(encoded, len(part)), sum(map(len, encoded.values()))


def _without_store(function: Score, part: Sequence[Any]) -> Callable[[Any], Any]:
    """Return a function of the adapter store, which it does not need."""
    return lambda store: function(part)


def twin_of(base: Base) -> Base:
    """Return a base on its own modules, with a tokenizer of its own, because tokenizers are not thread-safe; arrays are shared."""
    tokenizer = load_folder_tokenizer(base.folder, base.config, False)
    return dataclasses.replace(base, model=unrouted_twin(base.model), tokenizer=tokenizer)


def load_scorer(engine: Engine, folder: Path) -> TextScorer:
    """Return an adapter over the engine's base.

    Raises:
        InputError: it does not fit the base.
    """
    twin = twin_of(engine.base)
    info = load_adapter(twin, folder, engine.ignore_fingerprint, scores=True)
    if info.chat_template:
        twin.hf_tokenizer.chat_template = info.chat_template
    return TextScorer.of(twin, info.head, with_limits_of_run(DataSettings(), (), folder))


def texts_of(given: Any, name: str) -> list[Text]:
    """Return the texts of a field.

    Raises:
        ApiError: they are not texts, there are none or too many, or one is empty.
    """
    if not isinstance(given, list) or not all(isinstance(one, str) and one.strip() for one in given):
        raise ApiError(400, f"{name}: must be a text or a list of texts, none of them empty", "invalid_value", name)
    if not 0 < len(given) <= MOST_TEXTS:
        raise ApiError(400, f"{name}: {len(given)} texts; send from 1 to {MOST_TEXTS}", "invalid_value", name)
    return [Text(one, ends=False) for one in given]


def classified(number: int, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is predicted of a text as vLLM has it; `labels` for several labels, `value` for a number."""
    if ERROR in answer:
        raise ValueError(answer[ERROR])
    chances = list(answer.get("probabilities", {}).values())
    named = "value" if not chances else "labels" if isinstance(answer[PREDICTED], list) else "label"
    return {"index": number, named: answer[PREDICTED], "probs": chances, "num_classes": len(chances)}


def described(head: Mapping[str, Any]) -> str:
    """Return in a few words what the scores are."""
    labels = head["labels"]
    more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
    of_number = ", a number" if head["objective"] == "classify" else ""
    return f"{head['objective']}{': ' if labels else of_number}{', '.join(labels[:8])}{more}"
