"""Serve one base and many adapters over OpenAI's HTTP interface, or train adapters on it for clients of Tinker's.

python -m mlx_lora serve --model DIR --adapter bard=runs/bard --adapter tutor=runs/tutor
python -m mlx_lora serve --model DIR --training
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mlx_lora.cli import options as flags
from mlx_lora.cli.chat import begun_engine
from mlx_lora.config.load import serve_settings
from mlx_lora.config.rules import check_options
from mlx_lora.config.settings import ModelSettings, ServeSettings
from mlx_lora.exporters.adapter_config import head_of
from mlx_lora.exporters.adapter_folder import read_adapter_config, run_of
from mlx_lora.models.load import load_base
from mlx_lora.serving.adapter_store import DEFAULT_CONTEXT, NoRoom, base_name, context_of, named_source
from mlx_lora.serving.engine import Engine, Limits, failed_words
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.text import parse_size

# Unfinished answers get this long when the server is asked to end.
SHUTDOWN_S = 5
# Tinker's client refuses other keys.
KEY_PREFIX = "tml-"


@click.command(cls=flags.SettingsCommand)
@flags.settings_options("model", "serve")
@flags.named_adapters_options()
def main(named: flags.NamedAdapters, **given: Any) -> None:
    """Serve --model, with and without each --adapter, until you press Ctrl-C."""
    model, settings = serve_settings(given)
    check_options("serve", {**given, "adapter": named.adapters, "blend": named.blends})
    key = flags.server_key("serve", settings.host, settings.api_key)
    if settings.training:
        serve_training(model, settings, key)
        return
    for flag, folder in (("--adapters-from", settings.adapters_from), ("--images-from", settings.images_from)):
        if folder and not Path(folder).expanduser().is_dir():
            raise InputError(f"{flag} {folder}: no such folder; create it, or leave it out")
    limits = Limits(
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        adapter_bytes=parse_size(settings.adapter_memory) if settings.adapter_memory else None,
        prompt_cache_bytes=parse_size(settings.prompt_cache),
    )
    try:
        own, named = adapters_by_use(named)
        with begun_engine(model, limits, named) as (engine, lines):
            console.echo("\n".join(lines))
            run_server(engine, settings, key, own)
    except NoRoom:
        raise InputError("--adapter-memory: too small for all --adapter; raise it") from None


SCORES, VECTORS = "scores", "vectors"  # of texts
Folders = Mapping[str, Mapping[str, Path]]
"""Use -> name -> folder of the adapters that do not generate."""


def adapters_by_use(named: flags.NamedAdapters) -> tuple[Folders, flags.NamedAdapters]:
    """Return the folders of adapters that give scores or vectors of texts, and what is left to generate with."""
    found: dict[str, dict[str, Path]] = {SCORES: {}, VECTORS: {}}
    left = []
    for given in named.adapters:
        name, source = named_source("--adapter", given)
        use, folder = None, source.folder
        if folder is not None and head_of(read_adapter_config(folder), folder) is not None:
            use = SCORES
        elif folder is not None and run_of(folder).get("objective") == "embed":
            use = VECTORS
        if use is None or folder is None:
            left.append(given)
        elif any(name in own for own in found.values()):
            raise InputError(f"--adapter {given}: there are two adapters of this name; give it another")
        else:
            found[use][name] = folder
    return found, dataclasses.replace(named, adapters=tuple(left))


def run_server(engine: Engine, settings: ServeSettings, key: str | None, own: Folders) -> None:
    """Listen until interrupted.

    Args:
        engine: with the adapters that generate.
        settings: of the server.
        key: for its clients.
        own: the adapters that do not generate.

    Raises:
        InputError: the address is not available, or such an adapter does not fit the base.
        RunError: the engine has failed.
    """
    # Imported here, because packages that they need may not be installed.
    from mlx_lora.serving.app import Adapters, make_app
    from mlx_lora.serving.conversation import AnswerLimits
    from mlx_lora.serving.guard import GuardLimits, is_local
    from mlx_lora.serving.scores import EmbeddingRequests, Scores

    scores = Scores(engine, own[SCORES], settings.request_timeout)
    vectors = EmbeddingRequests(engine, own[VECTORS], settings.request_timeout)
    for line in (*scores.describe(), *vectors.describe()):
        console.echo(line)
    folder = Path(settings.adapters_from).expanduser() if settings.adapters_from else None
    images = Path(settings.images_from).expanduser() if settings.images_from else None
    origins = tuple(origin.strip() for origin in (settings.allow_origin or "").split(",") if origin.strip())
    context = settings.max_context or context_of(engine.base.config) or DEFAULT_CONTEXT
    adapters = Adapters(engine, base_name(engine.base), folder, settings.allow_hub)
    app = make_app(
        engine,
        GuardLimits(key, is_local(settings.host), origins, parse_size(settings.max_body), settings.read_timeout),
        AnswerLimits(settings.max_tokens, context, settings.request_timeout, images),
        int(time.time()),
        [*adapters.routes(), *scores.routes(), *vectors.routes()],
    )
    words = "open it in a browser to chat; OpenAI's API is under /v1"
    run_until_ended(app, settings, engine, settings.max_batch + settings.max_waiting + 64, words)


def run_until_ended(app: Any, settings: ServeSettings, engine: Any, connections: int, words: str) -> None:
    """Listen until interrupted.

    Args:
        app, settings: of the server.
        engine: what computes; the server ends if it fails.
        connections: of all clients, at most.
        words: what the address, {address}, is for.

    Raises:
        InputError: the address is not available.
        RunError: the engine has failed.
    """
    from mlx_lora.serving.guard import run_app

    def ready(server: Any, address: str) -> None:
        use = words.replace("{address}", address)
        console.echo(f"ready  {address} ({use}; Ctrl-C stops the server)")
        engine.on_failure = lambda: setattr(server, "should_exit", True)

    run_app(app, (settings.host, settings.port), ready, settings.read_timeout, SHUTDOWN_S, connections)
    if engine.failure is not None:
        raise RunError(failed_words(engine.failure))
    console.echo("ended")


# Training


def serve_training(model: ModelSettings, settings: ServeSettings, key: str | None) -> None:
    """Train adapters for clients until interrupted.

    Raises:
        InputError: a package is missing, a setting does not fit, or the address is not available.
        RunError: the worker has failed.
    """
    if importlib.util.find_spec("tinker") is None:
        raise InputError("--training: tinker is not installed; pip install 'mlx-lora[tinker]'")
    if key is not None and not key.startswith(KEY_PREFIX):
        raise InputError(f"--api-key: Tinker's client only sends keys that begin with {KEY_PREFIX}; choose such a key")
    # Imported here, because packages that they need may not be installed.
    from mlx_lora.serving.guard import GuardLimits, is_local
    from mlx_lora.training_server.app import BINARY, FILES, SessionLimits, make_app
    from mlx_lora.training_server.worker import Worker, WorkerSettings

    adapter_bytes = parse_size(settings.adapter_memory) if settings.adapter_memory else None
    worker = Worker(
        lambda: load_base(model),
        WorkerSettings(
            Path(settings.checkpoints).expanduser(), settings.model_name, settings.max_batch, settings.max_context,
            adapter_bytes, settings.join_clients,
        ),
    )  # fmt: skip
    console.echo(f"base   {worker.name}: {worker.base.describe()}")
    local, body_bytes = is_local(settings.host), parse_size(settings.max_body)
    guard = GuardLimits(key, local, (), body_bytes, settings.read_timeout, FILES, (), "x-api-key", BINARY)
    limits = SessionLimits(sessions=settings.max_sessions, silence_s=settings.session_timeout)
    app = make_app(worker, guard, limits, settings.max_tokens)
    words = f"Tinker's clients: base_url={{address}}, base_model={worker.name}"
    try:
        # A client holds a connection for each answer that it waits for.
        run_until_ended(app, settings, worker, 128 * settings.max_sessions, words)
    finally:
        worker.close()
