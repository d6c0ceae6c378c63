"""A training server in a thread of this process, and Tinker's own client, unmodified, that talks to it."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import warnings
from asyncio.selector_events import _SelectorTransport
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tinker", reason="pip install '.[tinker]'")
pytest.importorskip("starlette")

import numpy as np
import tinker
import uvicorn
from tinker import types
from tinker.lib.internal_client_holder import _internal_client_holder_thread_singleton, sessionless_holder_cache
from training_examples import loaded

from mlx_lora.training_server.app import BINARY, FILES, SessionLimits, make_app
from mlx_lora.training_server.worker import Example, Worker, WorkerSettings
from mlx_lora.utils.guard import GuardLimits, timed_protocol
from mlx_lora.utils.http import listen

KEY = "tml-correct-horse"
# For the tests of a file that uses the package: see `forget_clients`.
IGNORED = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning")
]


class TrainingServer:
    """`mlx-lora serve --training`, but in a thread, until the block ends."""

    def __init__(
        self,
        folder: Path,
        checkpoints: Path,
        key: str | None = None,
        limits: SessionLimits | None = None,
        body_bytes: int = 10**6,
        most_tokens: int = 64,
    ):
        self.worker = Worker(lambda: loaded(folder), WorkerSettings(checkpoints, "tiny"))
        guard = GuardLimits(key, True, (), body_bytes, 2.0, FILES, (), "x-api-key", BINARY)
        app = make_app(self.worker, guard, limits or SessionLimits(), most_tokens)
        config = uvicorn.Config(
            app, http=timed_protocol(10.0), ws="none", log_level="warning", timeout_graceful_shutdown=1
        )
        self._clients: list[tinker.ServiceClient] = []
        self._server, self.checkpoints = uvicorn.Server(config), checkpoints
        self._socket, self.url = listen("127.0.0.1", 0)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> TrainingServer:
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close("success").result(60)
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()
        forget_clients()
        assert not self.worker.alive

    def client(self, key: str = KEY) -> tinker.ServiceClient:
        """Return a new session of the package's client."""
        self._clients.append(tinker.ServiceClient(base_url=self.url, api_key=key))
        return self._clients[-1]

    def rest(self, key: str = KEY) -> tinker.RestClient:
        """Return the package's client for lists."""
        return tinker.RestClient(base_url=self.url, api_key=key)


def forget_clients() -> None:
    """Close the connections that the package keeps for its process, of which Python would complain at the end.

    Its servers must have ended: only then does its loop let go of connections that it never closes.
    """
    for holder in sessionless_holder_cache._holders.values():
        asyncio.run_coroutine_threadsafe(holder.aclose(), holder.get_loop()).result(60)
    sessionless_holder_cache._holders.clear()
    asyncio.run_coroutine_threadsafe(closed_connections(), _internal_client_holder_thread_singleton.get_loop()).result(
        60
    )
    with warnings.catch_warnings():
        # The package never closes the connection over which it first asks a server for its settings.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


async def closed_connections() -> None:
    """Close what is left open in this loop: Python would complain of it in some later test, of another file."""
    loop = asyncio.get_running_loop()
    for one in gc.get_objects():
        if (
            issubclass(type(one), _SelectorTransport) and one._loop is loop
        ):  # isinstance asks objects of torch, which warn
            one.abort()
    await asyncio.sleep(0.1)  # until the loop has let go of them


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    """Wait for something that another thread does."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def trainer(client: tinker.ServiceClient, **changes: Any) -> tinker.TrainingClient:
    """Return a new model, as `trained_model(base, move_b=False)` makes it here."""
    shape = {"rank": 4, "seed": 3, "train_unembed": False, **changes}
    return client.create_lora_training_client(base_model="tiny", **shape).result(120)


def datums(examples: list[Example]) -> list[types.Datum]:
    """Return examples as the client has them."""
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(one.tokens.tolist()),
            loss_fn_inputs={"target_tokens": one.targets.astype(np.int64), **one.given},
        )
        for one in examples
    ]


def adam(**changes: float) -> types.AdamParams:
    """Return the numbers of a step."""
    return types.AdamParams(**{"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, **changes})
