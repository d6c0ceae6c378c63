"""Check text generation: a row in a batch must get the numbers that it gets alone, with and without an adapter.

Logits are compared while both decode the same tokens, so that a rounding that turns one token does not make the rest
differ. In float32 the served texts must be equal, too: there, nothing is near enough to a tie.
"""

from __future__ import annotations

import queue
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_lora.api.base import load
from mlx_lora.config.settings import ModelSettings
from mlx_lora.doctor.check import CheckFinding, Kit, KitCheck, apart, bounded, dtype_name
from mlx_lora.doctor.models import tiny_folder
from mlx_lora.doctor.runs import train_tiny
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.kernels.measure import TOLERANCE
from mlx_lora.models.load import Base, load_base
from mlx_lora.serving.adapter_store import AdapterSource
from mlx_lora.serving.engine import Engine, Event, Limits, Request
from mlx_lora.serving.sampling import Sampling
from mlx_lora.utils import device

PROMPTS = ("O Romeo", "wherefore art thou, and why", "Deny thy father and refuse thy name; or if thou wilt not")
TOKENS = 16
WAIT_S = 120.0
ADVICE = "serve one request at a time (--max-batch 1) and report it; mlx_lora/serving/batch.py makes the batches"


def decode_checks() -> list[KitCheck]:
    """Return a check for a float base and one for a quantized one."""
    return [
        KitCheck("decode", "float base", partial(check_decode, False)),
        KitCheck("decode", "4-bit base", partial(check_decode, True), quick=False),
    ]


def check_decode(packed: bool, kit: Kit) -> Iterator[CheckFinding]:
    """Compare rows of a batch with single rows, first without an adapter, then with one."""
    folder, dtype = tiny_folder(kit.work, packed), device.compute_dtype()
    adapter = _adapter(kit, packed)
    for words, path in (("without an adapter", None), ("with an adapter", adapter)):
        base = load_base(ModelSettings(model=str(folder)))
        if path is not None:
            load_adapter(base, path)
        error = _batch_error(base)
        what = f"{dtype_name(dtype)} logits of {len(PROMPTS)} rows, {TOKENS} tokens each, in a batch against alone"
        yield bounded(f"logits {words}", error, TOLERANCE[dtype], what, ADVICE)
    yield from _served(folder, adapter)


def _adapter(kit: Kit, packed: bool) -> Path:
    """Train an adapter that changes what the model says."""
    folder = Path(kit.work) / f"spoken{'-4bit' if packed else ''}"
    shutil.rmtree(folder, ignore_errors=True)
    train_tiny(kit, "sft", folder, 6, packed=packed, learning_rate=3e-2)
    return folder


def _batch_error(base: Base) -> float:
    """Return the largest relative distance of a row's logits in a batch from those alone, over all rows and tokens."""
    base.model.eval()
    prompts = [base.hf_tokenizer.encode(text) for text in PROMPTS]
    alone = [_decode_alone(base.model, prompt) for prompt in prompts]
    caches = _merged([cache for _, _, cache in alone])
    tokens = [tokens for _, tokens, _ in alone]
    worst = 0.0
    for step in range(TOKENS):
        logits = base.model(mx.array([row[step] for row in tokens])[:, None], cache=caches)[:, -1]  # (rows, V)
        worst = max(worst, *(apart(logits[n], alone[n][0][step]) for n in range(len(prompts))))
    return worst


def _decode_alone(model: nn.Module, prompt: list[int]) -> tuple[list[mx.array], list[int], list[Any]]:
    """Return the logits of each step, the tokens that each step is given, and the caches of the prompt before the first."""
    caches = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=caches)
    begun = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=begun)
    mx.eval([cache.state for cache in (*caches, *begun)])
    token, found, given = prompt[-1], [], []
    for _ in range(TOKENS):
        given.append(token)
        logits = model(mx.array([[token]]), cache=caches)[0, -1]
        mx.eval(logits)
        found.append(logits)
        token = int(mx.argmax(logits).item())
    return found, given, begun


def _merged(rows: list[list[Any]]) -> list[Any]:
    """Return one cache per layer, which holds all rows."""
    return [layer[0].merge(list(layer)) for layer in zip(*rows, strict=True)]


def _served(folder: Path, adapter: Path) -> Iterator[CheckFinding]:
    """Compare the texts of a server that answers all at once with those of `generate`, in float32."""
    base = load(folder, dtype="float32")
    names: tuple[str | None, ...] = (None, "adapter")
    wanted = {
        (name, prompt): base.generate(prompt, adapter if name else None, max_tokens=TOKENS, ignore_chat_template=True)
        for name in names
        for prompt in PROMPTS
    }
    engine = Engine(lambda: load_base(ModelSettings(model=str(folder), dtype="float32")), Limits())
    try:
        engine.call(lambda store: store.add({"adapter": AdapterSource(adapter)})).result(WAIT_S)
        waiting = {key: _asked(engine, *key) for key in wanted}
        found = {key: _answer(events) for key, events in waiting.items()}
    finally:
        engine.close()
    other = [key for key in wanted if found[key] != wanted[key]]
    plain = [wanted[None, prompt] for prompt in PROMPTS]
    adapted = [wanted["adapter", prompt] for prompt in PROMPTS]
    words = f"{len(wanted) - len(other)} of {len(wanted)} texts in one batch are those of `generate`"
    good = not other and plain != adapted
    if plain == adapted:
        words += "; the adapter changes none of them"
    yield CheckFinding("served texts", "ok" if good else "failed", words, advice="" if good else ADVICE)


def _asked(engine: Engine, name: str | None, prompt: str) -> queue.SimpleQueue[Event]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    tokens = engine.base.hf_tokenizer.encode(prompt)
    engine.submit(Request(tokens, name, TOKENS, sampling=Sampling(temperature=0), continues=True), events.put)
    return events


def _answer(events: queue.SimpleQueue[Event]) -> str:
    pieces: list[str] = []
    while True:
        event = events.get(timeout=WAIT_S)
        pieces.append(event.piece.text)
        if event.last:
            return "".join(pieces)
