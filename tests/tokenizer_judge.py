"""llama.cpp's own token ids of a text, beside ours."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def llama_cpp(path: Path) -> Iterator:
    """Yield a function text -> ids that asks llama.cpp, special tokens added and parsed."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.port = str(path), 128, False, 0
    server = xllamacpp.Server(params)

    def tokenize(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(
            server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["tokens"]

    yield tokenize


def differing(path: Path, tokenizer, strings: list[str]) -> list[str]:
    """Return the strings whose token ids are not llama.cpp's."""
    with llama_cpp(path) as tokenize:
        return [text for text in strings if tokenizer.encode(text).ids != tokenize(text)]
