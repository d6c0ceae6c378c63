"""llama.cpp's own words on a tiny GGUF file, token by token, beside ours."""

from __future__ import annotations

import importlib
import json
import urllib.request
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

NEW_TOKENS = 24
N_PRINTABLE = 94  # the first ids of tests/byte_tokenizer.py: llama.cpp tells no probability of half a character
LIKELY = -8.0  # log-probabilities below are of no token that anyone would see


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Attributes:
        same, n_tokens: tokens that greedy decoding here gives too, of all that llama.cpp gave.
        worst, median: difference of log-probabilities: of all likely tokens over all steps, and of the steps' worst.
        n_distinct: different tokens among them.
    """

    same: int
    n_tokens: int
    worst: float
    median: float
    n_distinct: int


def listen(server: Any, prompts: list[list[int]]) -> list[tuple[list[int], list[int], list[dict[int, float]]]]:
    """Return, per prompt, llama.cpp's greedy tokens, those among printable characters, and the latter's likelihoods."""
    heard = []
    others = [[i, False] for i in range(N_PRINTABLE, 288)]
    for prompt in prompts:
        free = _ask(server, prompt)["tokens"]
        told = _ask(server, prompt, logit_bias=others, n_probs=60)
        steps = [
            {top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in told["completion_probabilities"]
        ]
        assert len(steps) == len(told["tokens"]) == NEW_TOKENS
        heard.append((free, told["tokens"], steps))
    return heard


def _ask(server: Any, prompt: list[int], **more: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0, "cache_prompt": False, "return_tokens": True}
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body | more).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def compare(model: nn.Module, prompts: list[list[int]], heard: list[Any]) -> Verdict:
    """Give the model the same tokens, and see whether it finds them as likely."""
    same, n_tokens, apart, tokens = 0, 0, [], []
    for prompt, (free, printable, steps) in zip(prompts, heard, strict=True):
        same += sum(a == b for a, b in zip(_here(model, prompt, free).argmax(-1), free, strict=True))
        ours = _here(model, prompt, printable)
        same += sum(a == b for a, b in zip(ours[:, :N_PRINTABLE].argmax(-1), printable, strict=True))
        n_tokens += len(free) + len(printable)
        tokens += free + printable
        for row, step in zip(ours, steps, strict=True):
            apart.append(max(abs(row[i] - value) for i, value in step.items() if value > LIKELY))
    return Verdict(int(same), n_tokens, float(max(apart)), float(np.median(apart)), len(set(tokens)))


def _here(model: nn.Module, prompt: list[int], new: list[int]) -> np.ndarray:
    """Return the log-probabilities of what follows the prompt and each new token but the last, (new, vocabulary)."""
    logits = model(mx.array([prompt + new]))[0, len(prompt) - 1 : -1]
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def prompts(lengths: tuple[int, ...] = (5, 30, 70)) -> list[list[int]]:
    """Return random prompts, one beyond every window and every short context of the tiny models."""
    rng = np.random.default_rng(3)
    return [[int(i) for i in rng.integers(0, 256, length)] for length in lengths]


@pytest.fixture
def judge() -> Any:
    """parity/llamacpp.py, which starts llama.cpp."""
    pytest.importorskip("xllamacpp")
    return importlib.import_module("parity.llamacpp")
