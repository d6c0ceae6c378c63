"""Rows of the serving engine: what is asked, and how an answer arrives."""

from __future__ import annotations

import queue

from byte_tokenizer import byte_tokenizer

from mlx_lora.config.settings import ModelSettings
from mlx_lora.engine.adapter_store import AdapterSource
from mlx_lora.engine.engine import Engine, Limits, Request
from mlx_lora.models.generator import Sampling
from mlx_lora.models.load import load_base

PROMPT = "O Romeo, wherefore art thou"
GREEDY = Sampling(temperature=0)


class Answer:
    """Collects a request's events."""

    def __init__(self, engine: Engine, request: Request):
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self.ticket = engine.submit(request, self._events.put)
        self.pieces, self.reports, self.end = [], [], None

    def wait(self) -> Answer:
        while self.end is None:
            event = self._events.get(timeout=60)
            self.pieces.append(event.piece.text)
            self.reports += event.piece.reports
            self.end = event if event.last else None
        return self

    def first(self) -> Answer:
        event = self._events.get(timeout=60)
        self.pieces.append(event.piece.text)
        self.end = event if event.last else None
        return self

    @property
    def text(self) -> str:
        return "".join(self.wait().pieces)


def started(folder, named=(), **limits) -> Engine:
    engine = Engine(lambda: load_base(ModelSettings(model=str(folder))), Limits(**limits))
    engine.call(lambda store: store.add({name: AdapterSource(path) for name, path in dict(named).items()})).result(60)
    return engine


def tokens_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text)


def asked(name, prompt=PROMPT, count=24, **changes) -> Request:
    return Request(tokens_of(prompt), name, count, **{"sampling": GREEDY, "continues": True, **changes})
