"""Serve adapters with a score head over HTTP: classifiers as vLLM does, and rerankers as clients of Jina and Cohere ask.

    POST /classify, /v1/classify             {"model": NAME, "input": TEXT or [TEXT, ...]}
    POST /rerank, /v1/rerank, /v2/rerank     {"model": NAME, "query": TEXT, "documents": [TEXT or {"text": TEXT}, ...],
                                              "top_n": N, "return_documents": true}

Each adapter is put on a copy of the base's modules, which shares the base's arrays. Texts are scored in the engine's thread, a few
at a time, between two steps of the answers that are being generated.

Serve vectors of texts over HTTP, as OpenAI's clients ask for them: by adapters of --objective embed, and by the base.

    POST /v1/embeddings, /embeddings     {"model": NAME, "input": TEXT, [TEXT, ...], [TOKEN, ...] or [[TOKEN, ...], ...],
                                          "encoding_format": "float" or "base64", "dimensions": N, "input_type": "query"}

The vectors are those of `mlx-lora embed`: normalized, with the pooling and prompts that the adapter or the model was trained with.
OpenAI's request has no word for queries; `input_type` is that of Cohere's, Voyage's and NVIDIA's. Tokens are taken as they
are, without a prompt. The base is served if it is an encoder, or if its folder is sentence-transformers'.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import DataSettings
from mlx_lora.data.examples import Text
from mlx_lora.engine.adapter_store import base_name, unrouted_twin
from mlx_lora.engine.engine import Engine, Stopped
from mlx_lora.engine.requests import api_error
from mlx_lora.exporters.adapter_folder import load_adapter, with_limits_of_run
from mlx_lora.models.encoder import is_encoder
from mlx_lora.models.load import Base
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.embed import TextEmbedder, open_embedder, stored_choices
from mlx_lora.objectives.scored_texts import ERROR, PREDICTED, TextScorer, in_order
from mlx_lora.serving.schema import without_paths
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.http import ApiError, is_number, read_fields

MOST_TEXTS = 2048  # in a request
TOGETHER = 16  # texts that are scored before answers are generated again
CLASSIFY_FIELDS = frozenset(["model", "input", "user"])
# Those of Jina's, Cohere's and vLLM's clients; what is of no effect here is taken, so that they need no change.
RERANK_FIELDS = frozenset(
    ["model", "query", "documents", "top_n", "return_documents", "max_chunks_per_doc", "max_tokens_per_doc", "user"]
)
Score = Callable[[Sequence[Any]], tuple[np.ndarray, int]]
M = TypeVar("M")


def check_names(engine: Engine, folders: Mapping[str, Path]) -> None:
    """Refuse an adapter that has the name of the base or of an adapter that generates.

    Raises:
        InputError: one has.
    """
    if twice := sorted({base_name(engine.base), *engine.store.cards} & set(folders)):
        raise InputError(f"--adapter {twice[0]}: the base or another adapter has this name; give it another")


def named_model(models: Mapping[str, M], asked: Any, purpose: str, advice: str) -> tuple[str, M]:
    """Return the model that a request names, or the only one.

    Raises:
        ApiError: 404.
    """
    if asked is None and len(models) == 1:
        asked = next(iter(models))
    if not isinstance(asked, str) or asked not in models:
        known = f"there are {', '.join(sorted(models))}" if models else advice
        raise ApiError(404, f"no model {asked!r} for {purpose}; {known}", "model_not_found", "model")
    return asked, models[asked]


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

    def _of(self, objective: str, body: dict[str, Any]) -> tuple[str, TextScorer]:
        own = {name: one for name, one in self._scorers.items() if one.head["objective"] == objective}
        return named_model(own, body.get("model"), objective, "start the server with --adapter NAME=DIR")

    async def classify(self, request: HttpRequest) -> Response:
        """POST /classify."""
        body = read_fields(await request.body(), CLASSIFY_FIELDS)
        name, scorer = self._of("classify", body)
        given = body.get("input")
        texts = texts_of([given] if isinstance(given, str) else given, "input")

        def score(part: Sequence[Text]) -> tuple[np.ndarray, int]:
            encoded, dropped = scorer.encode(part)
            if dropped:
                raise InputError(f"a text cannot be used: {next(iter(dropped.values()))}")
            return scorer.score(encoded, len(part)), sum(map(len, encoded.values()))

        scores, tokens = await a_few_at_a_time(self._engine, self._timeout_s, score, texts)
        data = []
        for number, answer in enumerate(scorer.answers(scores, {})):
            if ERROR in answer:
                raise ValueError(answer[ERROR])
            # As vLLM has it; `labels` for several labels, `value` for a number.
            chances = list(answer.get("probabilities", {}).values())
            named = "value" if not chances else "labels" if isinstance(answer[PREDICTED], list) else "label"
            data.append({"index": number, named: answer[PREDICTED], "probs": chances, "num_classes": len(chances)})
        return JSONResponse(
            {
                "id": f"classify-{uuid.uuid4().hex}",
                "object": "list",
                "created": int(time.time()),
                "model": name,
                "data": data,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    async def rerank(self, request: HttpRequest) -> Response:
        """POST /v1/rerank."""
        body = read_fields(await request.body(), RERANK_FIELDS)
        name, scorer = self._of("rerank", body)
        (query,) = texts_of([body.get("query")], "query")
        given = body.get("documents")
        plain = (
            [one.get("text") if isinstance(one, dict) else one for one in given] if isinstance(given, list) else given
        )
        documents = [one.text for one in texts_of(plain, "documents")]
        top_n = len(documents) if body.get("top_n") is None else body["top_n"]
        if not is_number(top_n, 1, math.inf, whole=True):
            raise ApiError(400, f"top_n: found {top_n!r}; send a number of at least 1", "invalid_value", "top_n")
        scores, tokens = await a_few_at_a_time(
            self._engine, self._timeout_s, lambda part: scorer.rank(query.text, part), documents
        )
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
                scores, count = await asyncio.wrap_future(engine.call(lambda store, part=part: score(part)))
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


def described(head: Mapping[str, Any]) -> str:
    """Return in a few words what the scores are."""
    labels = head["labels"]
    more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
    of_number = ", a number" if head["objective"] == "classify" else ""
    return f"{head['objective']}{': ' if labels else of_number}{', '.join(labels[:8])}{more}"


FIELDS = frozenset(["model", "input", "encoding_format", "dimensions", "input_type", "user"])
QUERY, DOCUMENT = ("query", "search_query"), ("document", "search_document", "passage")  # values of input_type
OBJECTIVE = "embed"


class EmbeddingRequests:
    """The models of a server that give vectors, and their endpoint."""

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
        named: dict[str, Path | None] = {**folders}
        if is_encoder(engine.base.model) or stored_choices(engine.base.folder):
            named = {base_name(engine.base): None, **named}
        settings = train_settings({"model": str(engine.base.folder), "objective": OBJECTIVE})
        self._embedders = {}
        for name, folder in named.items():
            opened = engine.call(
                lambda store, folder=folder: open_embedder(
                    settings, twin_of(engine.base), folder, engine.ignore_fingerprint
                )
            )
            self._embedders[name] = opened.result()

    def describe(self) -> list[str]:
        """Return a line about each model."""
        return [
            f"vectors {name}: {one.embedder.width} numbers, {one.embedder.pooling} pooling"
            for name, one in self._embedders.items()
        ]

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [Route(path, self.embeddings, methods=["POST"]) for path in ("/v1/embeddings", "/embeddings")]

    async def embeddings(self, request: HttpRequest) -> Response:
        """POST /v1/embeddings."""
        body = read_fields(await request.body(), FIELDS)
        advice = "start the server with --adapter NAME=DIR of --objective embed"
        name, embedder = named_model(self._embedders, body.get("model"), "embeddings", advice)
        form = body.get("encoding_format")
        if form not in (None, "float", "base64"):
            raise ApiError(
                400, f"encoding_format: found {form!r}; send float or base64", "invalid_value", "encoding_format"
            )
        dims, width = body.get("dimensions"), embedder.embedder.width
        if dims is not None and not is_number(dims, 1, width, whole=True):
            message = f"dimensions: found {dims!r}; send a number from 1 to {width}"
            raise ApiError(400, message, "invalid_value", "dimensions")
        embedder = replace(embedder, how=replace(embedder.how, dims=dims))
        given = body.get("input_type")
        if given not in (None, *QUERY, *DOCUMENT):
            known = ", ".join((*QUERY, *DOCUMENT))
            raise ApiError(400, f"input_type: found {given!r}; send one of {known}", "invalid_value", "input_type")
        inputs = inputs_of(body.get("input"), embedder.base.token_rows)

        def vectors(part: Sequence[Any]) -> tuple[np.ndarray, int]:
            """Return the vectors of some inputs, and the number of their tokens."""
            rows = rows_of(embedder, part, given in QUERY)
            return embedder.of_rows(rows), sum(map(len, rows))

        found, tokens = await a_few_at_a_time(self._engine, self._timeout_s, vectors, inputs)
        rows = found.astype("<f4")
        data = [
            {
                "object": "embedding",
                "index": number,
                "embedding": base64.b64encode(row.tobytes()).decode() if form == "base64" else row.tolist(),
            }
            for number, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})


_token = partial(is_number, low=0, high=2**31 - 1, whole=True)


def inputs_of(given: Any, vocabulary: int | None) -> list[str | list[int]]:
    """Return the inputs of a request, each a text or its tokens.

    Args:
        given: as the request has it: one of them, or a list.
        vocabulary: tokens that the model has; None: not known.

    Raises:
        ApiError: they are neither, there are none or too many, or one is empty.
    """
    alone = isinstance(given, str) or (isinstance(given, list) and all(map(_token, given)) and bool(given))
    found: Any = [given] if alone else given
    if not isinstance(found, list) or not all(
        (isinstance(one, str) and bool(one.strip())) or (isinstance(one, list) and bool(one) and all(map(_token, one)))
        for one in found
    ):
        message = (
            "input: must be a text, a list of texts, a list of tokens, or a list of such lists, none of them empty"
        )
        raise ApiError(400, message, "invalid_value", "input")
    if not 0 < len(found) <= MOST_TEXTS:
        raise ApiError(400, f"input: {len(found)} inputs; send from 1 to {MOST_TEXTS}", "invalid_value", "input")
    for one in found:
        if not isinstance(one, str) and vocabulary is not None and max(one) >= vocabulary:
            message = f"input: found the token {max(one)}; the model has {vocabulary} (send texts, or its own tokens)"
            raise ApiError(400, message, "invalid_value", "input")
    return found


def rows_of(embedder: TextEmbedder, inputs: Sequence[str | list[int]], query: bool) -> list[np.ndarray]:
    """Return the token ids of inputs in their order, at most as many as the model takes of a text."""
    texts = [one for one in inputs if isinstance(one, str)]
    encoded = iter(embedder.form.encode(texts, embedder.base.hf_tokenizer, query) if texts else [])
    most = embedder.form.max_length
    return [next(encoded) if isinstance(one, str) else np.array(one[:most], np.int32) for one in inputs]
