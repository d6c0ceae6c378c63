"""Serve one base and many adapters over OpenAI's HTTP interface.

python -m mlx_lora serve --model DIR --adapter bard=runs/bard --adapter tutor=runs/tutor
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import time
from pathlib import Path
from typing import Any

import click

from mlx_lora.cli import options as flags
from mlx_lora.config.load import serve_settings
from mlx_lora.config.settings import ServeSettings
from mlx_lora.models.load import load_base
from mlx_lora.serving.adapter_store import DEFAULT_CONTEXT, NoRoom, adapter_sources, base_name, check_names, context_of
from mlx_lora.serving.engine import Engine, Limits, failed_words
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.text import parse_size

KEY_VARIABLE = "MLX_LORA_API_KEY"
# Unfinished answers get this long when the server is asked to end.
SHUTDOWN_S = 5


@click.command(cls=flags.SettingsCommand)
@flags.settings_options("model", "serve")
@click.option(
    "--adapter",
    "--adapter-path",
    "adapters",
    multiple=True,
    help="Adapter: DIR, NAME=DIR, or NAME=OWNER/NAME of the hub; may be repeated.",
)
@click.option(
    "--blend",
    "blends",
    multiple=True,
    help="Blend of loaded adapters: NAME=ADAPTER:WEIGHT,ADAPTER:WEIGHT ...; may be repeated.",
)
@flags.ignore_fingerprint_option
def main(adapters: tuple[str, ...], blends: tuple[str, ...], ignore_fingerprint: bool, **options: Any) -> None:
    """Serve --model, with and without each --adapter, until you press Ctrl-C."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serve: {' and '.join(missing)} not installed; pip install 'mlx-lora[serve]'")
    # Imported here, because packages that they need may not be installed.
    from mlx_lora.serving.guard import is_local

    model, settings = serve_settings(flags.given(options))
    key = settings.api_key or os.environ.get(KEY_VARIABLE) or None
    if not is_local(settings.host) and not key:
        raise InputError(
            f"--host {settings.host}: reachable from other machines and no API key; set {KEY_VARIABLE}, or use 127.0.0.1"
        )
    if settings.adapters_from and not Path(settings.adapters_from).expanduser().is_dir():
        raise InputError(f"--adapters-from {settings.adapters_from}: no such folder; create it, or leave it out")
    sources = adapter_sources(adapters, blends)
    limits = Limits(
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        adapter_bytes=parse_size(settings.adapter_memory) if settings.adapter_memory else None,
        prompt_cache_bytes=parse_size(settings.prompt_cache),
    )
    body_bytes = parse_size(settings.max_body)
    engine = Engine(lambda: load_base(model), limits, ignore_fingerprint)
    try:
        check_names("--adapter", sources, (base_name(engine.base),))
        cards = engine.call(lambda store: store.add(sources)).result()
        console.echo(f"base   {base_name(engine.base)}: {engine.base.describe()}")
        if engine.weights:
            console.echo(f"weights {engine.weights.describe()}")
        for card in cards:
            console.echo(f"model  {card.name}: {card.describe()}")
        run_server(engine, settings, key, body_bytes)
    except NoRoom:
        raise InputError("--adapter-memory: too small for all --adapter; raise it") from None
    finally:
        engine.close()


def run_server(engine: Engine, settings: ServeSettings, key: str | None, body_bytes: int) -> None:
    """Listen until interrupted.

    Raises:
        InputError: the address is not available.
        RunError: the engine has failed.
    """
    import uvicorn

    from mlx_lora.serving.adapters_api import Adapters
    from mlx_lora.serving.app import AnswerLimits, listen, make_app
    from mlx_lora.serving.guard import GuardLimits, is_local, timed_protocol

    folder = Path(settings.adapters_from).expanduser() if settings.adapters_from else None
    origins = tuple(origin.strip() for origin in (settings.allow_origin or "").split(",") if origin.strip())
    context = settings.max_context or context_of(engine.base.config) or DEFAULT_CONTEXT
    app = make_app(
        engine,
        GuardLimits(key, is_local(settings.host), origins, body_bytes, settings.read_timeout),
        AnswerLimits(settings.max_tokens, context, settings.request_timeout),
        int(time.time()),
        Adapters(engine, base_name(engine.base), folder, settings.allow_hub).routes(),
    )
    config = uvicorn.Config(
        app,
        http=timed_protocol(settings.read_timeout),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=SHUTDOWN_S,
        limit_concurrency=settings.max_batch + settings.max_waiting + 64,
    )
    socket, address = listen(settings.host, settings.port)
    console.echo(f"ready  {address} (open it in a browser to chat; OpenAI's API is under /v1; Ctrl-C stops the server)")
    # uvicorn raises the signal that ended it again; for a server this is the normal end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = uvicorn.Server(config)
    engine.on_failure = lambda: setattr(server, "should_exit", True)
    with socket, contextlib.suppress(KeyboardInterrupt):
        server.run([socket])
    if engine.failure is not None:
        raise RunError(failed_words(engine.failure))
    console.echo("ended")
