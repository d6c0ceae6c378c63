"""Translate between Tinker's messages and ours. Types and protocol buffers are those of the `tinker` package itself.

forward_backward    bytes of a ForwardBackwardRequest       -> TrainRequest; TokenRequest -> bytes of a ForwardBackwardOutput
asample             SampleRequest                           -> SamplingJob;  SampleTicket -> bytes of a SampleResponse
all others          pydantic types, as JSON
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import pydantic
from google.protobuf.message import DecodeError
from tinker import types

from mlx_lora.api.plan_clients import LoraShape
from mlx_lora.compat.foreign import MESSAGES
from mlx_lora.engine.engine import Sampling
from mlx_lora.training_server.models import MOST_COLUMNS, Example, ModelLimits, TokenRequest, check_tokens
from mlx_lora.training_server.worker import SampleTicket, SamplingJob
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.http import ApiError, read_json

pb: Any = MESSAGES.of()
M = TypeVar("M", bound=pydantic.BaseModel)
MOST_SAMPLES, MOST_TOP, MOST_STOPS = 256, 20, 64


def read_request(kind: type[M], body: bytes) -> M:
    """Read a request's JSON body.

    Raises:
        ApiError: it is no JSON, or does not have this type's fields.
    """
    try:
        return kind.model_validate(read_json(body))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise ApiError(422, f"{where}: {first['msg']}", "invalid_request") from None


# Training


@dataclass(frozen=True)
class TrainRequest:
    """A request for a loss, with or without its gradient.

    Attributes:
        model_id, seq: whose it is, and its number.
        loss, config: name and numbers of the loss.
        backward: add the gradient.
        data: the examples, as they came.
    """

    model_id: str
    seq: int
    loss: str
    config: dict[str, float | str]
    backward: bool
    data: Sequence[Any]

    def examples(self) -> list[Example]:
        """Return the examples.

        Raises:
            InputError: one of them is malformed, or has images.
        """
        found = []
        for number, datum in enumerate(self.data):
            what, parts = f"data[{number}]", [np.zeros(0, np.int32)]
            for chunk in datum.model_input:
                kind = chunk.WhichOneof("chunk")
                if kind != "encoded_text":
                    raise InputError(f"{what}.model_input: has a {kind}; this server takes text alone")
                parts.append(_numbers(chunk.encoded_text.tokens, np.int32, what))
            tokens = np.concatenate(parts)
            given = {
                name: _tensor(tensor, f"{what}.{name[:40]}", len(tokens))
                for name, tensor in datum.loss_fn_inputs.items()
            }
            targets = given.pop("target_tokens", None)
            if targets is None:
                raise InputError(f"{what}: target_tokens are missing in loss_fn_inputs")
            if targets.dtype != np.int64:
                raise InputError(f"{what}.target_tokens: are {targets.dtype}; give int64")
            found.append(Example(tokens, targets, {name: value.astype(np.float32) for name, value in given.items()}))
        return found


def read_train_request(body: bytes) -> TrainRequest:
    """Read the body of forward_backward.

    Raises:
        ApiError: it is no such message.
    """
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise ApiError(
            422, "the body is not a ForwardBackwardRequest; use the tinker package", "invalid_request"
        ) from None
    newer = {
        key: value.text if value.WhichOneof("value") == "text" else value.number
        for key, value in message.loss_fn_config_v2.items()
    }
    return TrainRequest(
        message.model_id,
        message.seq_id,
        message.loss_fn,
        newer or dict(message.loss_fn_config),
        not message.forward_only,
        message.data,
    )


def _numbers(raw: bytes, kind: Any, what: str) -> np.ndarray:
    if len(raw) % np.dtype(kind).itemsize:
        raise InputError(f"{what}: {len(raw)} bytes are no whole number of {np.dtype(kind).name}")
    return np.frombuffer(raw, kind)


def _tensor(message: Any, what: str, most_rows: int) -> np.ndarray:
    """Return a tensor; one that is sparse has zeros where nothing is listed.

    Args:
        message: the tensor.
        what: its name, for errors.
        most_rows: the example's tokens: no tensor has more rows, so a small sparse one cannot claim to be a huge dense one.

    Raises:
        InputError: its parts do not fit together.
    """
    kind = {pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_INT64: np.int64}.get(message.dtype)
    if kind is None:
        raise InputError(f"{what}: must be float32 or int64")
    shape: list[int] = list(message.shape)
    if len(shape) > 2 or any(
        not 0 <= size <= most for size, most in zip(shape, (most_rows, MOST_COLUMNS), strict=False)
    ):
        raise InputError(f"{what}: shape {shape[:4]}; give at most ({most_rows}, {MOST_COLUMNS}), a row for each token")
    if not message.HasField("sparse_csr"):
        values = _numbers(message.dense, kind, what)
        if shape and values.size != int(np.prod(shape)):
            raise InputError(f"{what}: has {values.size} numbers, its shape {shape} says otherwise")
        return values.reshape(shape) if shape else values
    values = _numbers(message.sparse_csr.values, kind, what)
    rows, columns = (
        _numbers(part, np.int64, what) for part in (message.sparse_csr.crow_indices, message.sparse_csr.col_indices)
    )
    fits = len(shape) == 2 and len(rows) == shape[0] + 1 and len(columns) == len(values)
    if not fits or rows[0] != 0 or rows[-1] != len(values) or (np.diff(rows) < 0).any():
        raise InputError(f"{what}: is no sparse matrix of shape {shape}")
    if len(columns) and (columns.min() < 0 or columns.max() >= shape[1]):
        raise InputError(f"{what}: has a column outside its shape {shape}")
    dense = np.zeros(shape, kind)
    dense[np.repeat(np.arange(shape[0]), np.diff(rows)), columns] = values
    return dense


def output_bytes(output: TokenRequest) -> bytes:
    """Return the answer to forward_backward; neighboring examples of one width are one record."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    message.metrics["loss:sum"] = output.loss_sum
    for trailing, group in groupby(output.logprobs, lambda array: array.shape[1:]):
        arrays = [np.ascontiguousarray(array, np.float32) for array in group]
        record = message.loss_fn_outputs.add(num_datums=len(arrays))
        field = record.fields["logprobs"]
        field.data = b"".join(array.tobytes() for array in arrays)
        field.offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64).tobytes()
        field.dtype = pb.DTYPE_FLOAT32
        field.trailing_shape.extend(trailing)
    return message.SerializeToString()


def lora_shape(config: types.LoraConfig | None) -> LoraShape:
    """Return what a client's model is to be; without a seed, it gets one of its own."""
    config = config or types.LoraConfig(rank=32)
    seed = secrets.randbits(31) if config.seed is None else config.seed % 2**63
    return LoraShape(config.rank, seed, config.train_attn, config.train_mlp, config.train_unembed)


# Sampling


def read_ask(
    request: types.SampleRequest, weights: str | None, model: ModelLimits, most_tokens: int, ends: frozenset[int]
) -> SamplingJob:
    """Return a request for samples.

    Args:
        request: of the client.
        weights: their name; None: the base's.
        model: its limits.
        most_tokens: new ones of a sample.
        ends: tokens that end an answer by themselves.

    Raises:
        InputError: it asks for what this server does not do, or for too much.
    """
    prompt: Any = request.prompt
    for chunk in prompt.chunks:
        if not isinstance(chunk, types.EncodedTextChunk):
            raise InputError(f"prompt: has a {type(chunk).__name__}; this server takes text alone")
    tokens = [token for chunk in prompt.chunks for token in chunk.tokens]
    check_tokens(np.array(tokens or [], np.int64), model, "prompt")
    params = request.sampling_params
    room = model.context - len(tokens)
    most = min(most_tokens, room) if params.max_tokens is None else params.max_tokens
    if not 0 < most <= min(most_tokens, room):
        raise InputError(
            f"max_tokens {most}: with {len(tokens)} tokens in the prompt give 1 to {max(0, min(most_tokens, room))}"
        )
    stop_tokens, stop_texts = _stops(params.stop, ends)
    score = bool(request.prompt_logprobs) or request.topk_prompt_logprobs > 0
    last = request.prompt_logprobs_last_n
    refused = {
        f"num_samples {request.num_samples}: give 1 to {MOST_SAMPLES}": not 0 < request.num_samples <= MOST_SAMPLES,
        f"topk logprobs: give 0 to {MOST_TOP}": not all(
            0 <= k <= min(MOST_TOP, model.vocabulary - 1)
            for k in (request.topk_prompt_logprobs, request.topk_sample_logprobs)
        ),
        "target_prompt_logprobs: not computed here; use forward with target_tokens": request.target_prompt_logprobs
        is not None,
        "prompt_alt_tokens_k: not computed here; leave it out": request.prompt_alt_tokens_k != 0,
        "record_stability_info: not recorded here; use another loss than stable_reinforce": bool(
            request.record_stability_info
        ),
        "prompt_logprobs_last_n: must be 1 to len(prompt) - 1": last is not None and not 0 < last < len(tokens),
        f"temperature {params.temperature}: must be 0 or more": not 0 <= params.temperature < float("inf"),
        f"top_p {params.top_p}: must be 0 to 1": not 0 <= params.top_p <= 1,
    }
    if problems := [words for words, wrong in refused.items() if wrong]:
        raise InputError("; ".join(problems))
    seed = None if params.seed is None else params.seed % 2**63
    sampling = Sampling(params.temperature, params.top_p, max(0, params.top_k), seed, request.topk_sample_logprobs)
    return SamplingJob(
        tokens, weights, request.num_samples, most, sampling, stop_tokens, stop_texts,
        scores=(last or len(tokens)) if score else 0, top_scores=request.topk_prompt_logprobs,
    )  # fmt: skip


def _stops(stop: Any, end_tokens: frozenset[int]) -> tuple[frozenset[int], tuple[str, ...]]:
    """Return the tokens and the texts that end an answer; without any given, the model's own end tokens do."""
    if stop is None:
        return end_tokens, ()
    given = [stop] if isinstance(stop, str) else list(stop)
    if len(given) > MOST_STOPS or "" in given:
        raise InputError(f"stop: give at most {MOST_STOPS} sequences, none of them empty")
    texts = tuple(one for one in given if isinstance(one, str))
    tokens = frozenset(one for one in given if isinstance(one, int))
    # Texts are searched in what is decoded; an answer that the model has ended would go on without its end tokens.
    return (tokens | end_tokens if texts else tokens), texts


def answer_bytes(answer: SampleTicket, top: int) -> bytes:
    """Return the answer to a request for samples.

    Args:
        answer: of the sampler.
        top: how many likeliest tokens were asked for at each sampled one.
    """
    message = pb.SampleResponse()
    for sampled in answer.samples:
        own = message.sequences.add()
        own.stop_reason = pb.STOP_REASON_STOP if sampled.stopped else pb.STOP_REASON_LENGTH
        own.tokens = np.array(sampled.tokens, np.int32).tobytes()
        own.logprobs = np.array(sampled.logprobs, np.float32).tobytes()
        if top:
            ids, values = (np.array([[one[part] for one in row] for row in sampled.top]) for part in (0, 1))
            _put_top(own.topk_sampled_logprobs, ids, values)
    if answer.prompt is not None:
        message.prompt_logprobs = answer.prompt.logprobs.astype(np.float32).tobytes()
        if answer.prompt.top_ids is not None and answer.prompt.top_values is not None:
            _put_top(message.topk_prompt_logprobs, answer.prompt.top_ids, answer.prompt.top_values)
    return message.SerializeToString()


def _put_top(message: Any, ids: np.ndarray, values: np.ndarray) -> None:
    message.token_ids, message.logprobs = ids.astype(np.int32).tobytes(), values.astype(np.float32).tobytes()
    message.length, message.k = ids.shape


def words_of(metadata: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Return a client's metadata as texts, bounded.

    Raises:
        ApiError: it is too large.
    """
    if metadata is None:
        return None
    words = {str(key): str(value) for key, value in metadata.items()}
    if sum(len(key) + len(value) for key, value in words.items()) > 16_384:
        raise ApiError(422, "user_metadata: larger than 16 KB", "invalid_request")
    return words
