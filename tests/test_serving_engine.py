"""The engine: every row its own adapter, and each answers as `generate` does."""

from __future__ import annotations

import queue
import shutil

import mlx.core as mx
import pytest
from conftest import write_folder, tiny_model
from make_adapters import make_adapter
from run_cli import run

from mlx_lora.config import ModelSettings
from mlx_lora.errors import InputError
from mlx_lora.models.load import load_base
from mlx_lora.serving.engine import Engine, Limits
from mlx_lora.serving.requests import QueueFull, Request, Stopped
from mlx_lora.serving.sampling import Sampling
from mlx_lora.serving.store import Source, UnknownAdapter

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a head of its own: a tied one repeats its prompt's last token, whatever the adapter."""
    model = tiny_model(tie_word_embeddings=False)
    return write_folder(tmp_path_factory.mktemp("untied"), model, {"tie_word_embeddings": False})


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Adapters of every served kind, by name."""
    root = tmp_path_factory.mktemp("adapters")
    kinds = {
        "four": {"rank": 4, "seed": 1},
        "four-too": {"rank": 4, "seed": 2},
        "eleven": {"rank": 11, "seed": 3},
        "one-block": {"rank": 2, "seed": 4, "num_layers": 1},
        "dora": {"rank": 4, "seed": 5, "form": "dora", "strength": 4.0},
        "peft": {"rank": 3, "seed": 6, "peft": True},
        "embedding": {"rank": 4, "seed": 7, "targets": "all-linear,embed_tokens", "strength": 0.1},
    }
    return {name: make_adapter(folder, root / name, **kind) for name, kind in kinds.items()}


def started(folder, named=(), **limits) -> Engine:
    engine = Engine(lambda: load_base(ModelSettings(model=str(folder))), Limits(**limits))
    engine.call(lambda store: store.add({name: Source(path) for name, path in dict(named).items()})).result(60)
    return engine


@pytest.fixture(scope="module")
def engine(folder, adapters):
    engine = started(folder, adapters)
    yield engine
    engine.close()


def tokens_of(text: str) -> list[int]:
    from byte_tokenizer import byte_tokenizer

    return byte_tokenizer().encode(text)


PROMPT = "O Romeo, wherefore art thou"


def generated(folder, adapter, prompt=PROMPT, count=24) -> str:
    """What the command says."""
    extra = ("--adapter-path", adapter) if adapter else ()
    ran = run(
        "generate", "--model", folder, *extra, "--prompt", prompt, "-m", count, "--ignore-chat-template", "--json"
    )
    import json

    return json.loads(ran.out)["text"]


def asked(name, prompt=PROMPT, count=24, **changes) -> Request:
    return Request(tokens_of(prompt), name, count, **{"sampling": GREEDY, **changes})


def test_alone_and_mixed_every_adapter_says_what_generate_says(engine, folder, adapters):
    names = [None, *adapters]
    meant = {name: generated(folder, adapters.get(name)) for name in names}
    assert len(set(meant.values())) == len(names), "the adapters must differ for this to show anything"
    assert {name: Answer(engine, asked(name)).text for name in names} == meant
    mixed = [(name, Answer(engine, asked(name))) for name in [*names, *reversed(names)]]
    assert [(name, answer.text) for name, answer in mixed] == [(name, meant[name]) for name, _ in mixed]
