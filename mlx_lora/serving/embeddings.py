"""Serve vectors of texts over HTTP, as OpenAI's clients ask for them: by adapters of --objective embed, and by the base.

    POST /v1/embeddings, /embeddings     {"model": NAME, "input": TEXT, [TEXT, ...], [TOKEN, ...] or [[TOKEN, ...], ...],
                                          "encoding_format": "float" or "base64", "dimensions": N, "input_type": "query"}

The vectors are those of `mlx-lora embed`: normalized, with the pooling and prompts that the adapter or the model was trained with.
OpenAI's request has no word for queries; `input_type` is that of Cohere's, Voyage's and NVIDIA's. Tokens are taken as they
are, without a prompt. The base is served if it is an encoder, or if its folder is sentence-transformers'.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_lora.config.load import train_settings
from mlx_lora.models.encoder import is_encoder
from mlx_lora.objectives.embed import stored_choices
from mlx_lora.objectives.text_vectors import TextEmbedder, open_embedder
from mlx_lora.serving.adapter_store import base_name
from mlx_lora.serving.engine import Engine
from mlx_lora.serving.schema import ApiError, read_json
from mlx_lora.serving.scores import MOST_TEXTS, a_few_at_a_time, check_names, twin_of

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
        self._embedders = {
            name: engine.call(lambda store, folder=folder: load_embedder(engine, folder)).result()
            for name, folder in named.items()
        }

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
        body = read_json(await request.body())
        if strange := body.keys() - FIELDS:
            raise ApiError(400, f"{', '.join(sorted(strange))}: not a field of this endpoint", "unknown_parameter")
        name, embedder = self._embedder(body.get("model"))
        form = body.get("encoding_format")
        if form not in (None, "float", "base64"):
            raise ApiError(
                400, f"encoding_format: found {form!r}; send float or base64", "invalid_value", "encoding_format"
            )
        dims = dimensions_of(body.get("dimensions"), embedder.embedder.width)
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

    def _embedder(self, model: Any) -> tuple[str, TextEmbedder]:
        """Return the model that a request names, or the only one."""
        if model is None and len(self._embedders) == 1:
            model = next(iter(self._embedders))
        if not isinstance(model, str) or model not in self._embedders:
            known = ", ".join(sorted(self._embedders))
            advice = f"there are {known}" if known else "start the server with --adapter NAME=DIR of --objective embed"
            raise ApiError(404, f"no model {model!r} for embeddings; {advice}", "model_not_found", "model")
        return model, self._embedders[model]


def load_embedder(engine: Engine, folder: Path | None) -> TextEmbedder:
    """Return the base of the engine as an embedder, with an adapter if its folder is given.

    Raises:
        InputError: the adapter does not fit the base.
    """
    settings = train_settings({"model": str(engine.base.folder), "objective": OBJECTIVE})
    return open_embedder(settings, twin_of(engine.base), folder, engine.ignore_fingerprint)


def dimensions_of(given: Any, width: int) -> int | None:
    """Return how many numbers of each vector are wanted; None: all.

    Raises:
        ApiError: it is not such a number.
    """
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= width:
        raise ApiError(
            400, f"dimensions: found {given!r}; send a number from 1 to {width}", "invalid_value", "dimensions"
        )
    return given


def inputs_of(given: Any, vocabulary: int | None) -> list[str | list[int]]:
    """Return the inputs of a request, each a text or its tokens.

    Args:
        given: as the request has it: one of them, or a list.
        vocabulary: tokens that the model has; None: not known.

    Raises:
        ApiError: they are neither, there are none or too many, or one is empty.
    """
    alone = isinstance(given, str) or (isinstance(given, list) and all(map(_is_token, given)) and bool(given))
    found: Any = [given] if alone else given
    if not isinstance(found, list) or not all(_is_text(one) or _is_tokens(one) for one in found):
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


def _is_token(one: Any) -> bool:
    return isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**31


def _is_text(one: Any) -> bool:
    return isinstance(one, str) and bool(one.strip())


def _is_tokens(one: Any) -> bool:
    return isinstance(one, list) and bool(one) and all(map(_is_token, one))


def rows_of(embedder: TextEmbedder, inputs: Sequence[str | list[int]], query: bool) -> list[np.ndarray]:
    """Return the token ids of inputs in their order, at most as many as the model takes of a text."""
    texts = [one for one in inputs if isinstance(one, str)]
    encoded = iter(embedder.form.encode(texts, embedder.base.hf_tokenizer, query) if texts else [])
    most = embedder.form.max_length
    return [next(encoded) if isinstance(one, str) else np.array(one[:most], np.int32) for one in inputs]
