"""Train adapters on one base for clients of Tinker's; the command `serve` without --training is that of serving/command.py.

python -m mlx_lora serve --model DIR --training
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.config.load import serve_settings
from mlx_lora.config.rules import check_options
from mlx_lora.models.load import load_base
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.http import is_local
from mlx_lora.utils.text import parse_size

KEY_PREFIX = "tml-"  # Tinker's client refuses other keys


@click.command(cls=flags.SettingsCommand)
@flags.settings_options("model", "serve")
@flags.named_adapters_options()
def main(named: flags.NamedAdapters, **given: Any) -> None:
    """Train adapters on --model for clients, until you press Ctrl-C."""
    model, settings = serve_settings(given)
    check_options("serve", {**given, "adapter": named.adapters, "blend": named.blends})
    key = flags.server_key("serve", settings.host, settings.api_key)
    if importlib.util.find_spec("tinker") is None:
        raise InputError("--training: tinker is not installed; pip install 'mlx-lora[tinker]'")
    if key is not None and not key.startswith(KEY_PREFIX):
        raise InputError(f"--api-key: Tinker's client only sends keys that begin with {KEY_PREFIX}; choose such a key")
    # Imported here, because packages that they need may not be installed.
    from mlx_lora.training_server.app import BINARY, FILES, SessionLimits, make_app
    from mlx_lora.training_server.worker import Worker, WorkerSettings
    from mlx_lora.utils.guard import GuardLimits, serve_engine

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
        serve_engine(
            app, (settings.host, settings.port), worker, settings.read_timeout, 128 * settings.max_sessions, words
        )
    finally:
        worker.close()
