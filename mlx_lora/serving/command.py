"""Serve one base and many adapters over OpenAI's HTTP interface; with --training, training_server/command.py takes its place.

python -m mlx_lora serve --model DIR --adapter bard=runs/bard --adapter tutor=runs/tutor
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.config.load import serve_settings
from mlx_lora.config.rules import check_options
from mlx_lora.config.settings import ServeSettings
from mlx_lora.engine.adapter_store import (
    DEFAULT_CONTEXT,
    NoRoom,
    adapter_sources,
    base_name,
    context_of,
    named_source,
)
from mlx_lora.engine.engine import Engine, Limits, opened_engine
from mlx_lora.exporters.adapter_config import head_of
from mlx_lora.exporters.adapter_folder import read_adapter_config, run_of
from mlx_lora.models.load import load_base
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.http import is_local
from mlx_lora.utils.text import parse_size


@click.command(cls=flags.SettingsCommand)
@flags.settings_options("model", "serve")
@flags.named_adapters_options()
def main(named: flags.NamedAdapters, **given: Any) -> None:
    """Serve --model, with and without each --adapter, until you press Ctrl-C."""
    model, settings = serve_settings(given)
    check_options("serve", {**given, "adapter": named.adapters, "blend": named.blends})
    key = flags.server_key("serve", settings.host, settings.api_key)
    for flag, folder in (("--adapters-from", settings.adapters_from), ("--images-from", settings.images_from)):
        if folder and not Path(folder).expanduser().is_dir():
            raise InputError(f"{flag} {folder}: no such folder; create it, or leave it out")
    limits = Limits(
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        adapter_bytes=parse_size(settings.adapter_memory) if settings.adapter_memory else None,
        prompt_cache_bytes=parse_size(settings.prompt_cache),
        drafts=settings.speculate == "auto",
    )
    try:
        own, named = adapters_by_use(named)
        sources = adapter_sources(named.adapters, named.blends)
        with opened_engine(lambda: load_base(model), limits, sources, named.ignore_fingerprint) as (engine, lines):
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
    from mlx_lora.serving.app import Adapters, AnswerLimits, TextModels, make_app
    from mlx_lora.utils.guard import GuardLimits, serve_engine

    texts = TextModels(engine, own[SCORES], own[VECTORS], settings.request_timeout)
    for line in texts.describe():
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
        [*adapters.routes(), *texts.routes()],
    )
    words = "open it in a browser to chat; OpenAI's API is under /v1"
    serve_engine(
        app,
        (settings.host, settings.port),
        engine,
        settings.read_timeout,
        settings.max_batch + settings.max_waiting + 64,
        words,
    )
