"""The settings of `mlx-lora serve`, one row each, as in config.py."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_lora.settings.setting_row import setting

SERVER, LIMITS = "Server", "Limits"  # headings of the help


# fmt: off
@dataclass(frozen=True)
class ServeSettings:
    """A server's settings: what it offers, to whom, and its limits."""

    host: str = setting("127.0.0.1", "Address to listen on; any other than this machine's own requires an API key.",
        SERVER, common=True)
    port: int = setting(8080, "Port to listen on; 0: any free one.", SERVER, common=True, at_least=0, at_most=65535)
    api_key: str | None = setting(None,
        "Key that clients must send as a bearer token; MLX_LORA_API_KEY sets it without showing it in process lists.",
        SERVER, common=True)
    allow_origin: str | None = setting(None,
        "Web origins whose pages may use the server, separated by commas, such as https://example.org; "
        "the server's own pages always may.", SERVER)
    adapters_from: str | None = setting(None,
        "Folder whose subfolders clients may load as adapters (default: none).", SERVER, common=True)
    allow_hub: bool = setting(False, "Let clients load adapters from the hub.", SERVER)
    adapter_memory: str | None = setting(None,
        "Limit on memory for adapters, such as 2GB; the least recently used are evicted (default: no limit).", LIMITS)
    prompt_cache: str = setting("256MB", "Limit on memory for the keys and values of earlier prompts.", LIMITS)
    max_batch: int = setting(16, "Requests that are answered at the same time.", LIMITS, at_least=1, at_most=1024)
    max_waiting: int = setting(64, "Requests that may wait in the queue; further ones get HTTP status 429.",
        LIMITS, at_least=0, at_most=10**6)
    max_tokens: int = setting(2048, "Maximum number of new tokens that a request may ask for.",
        LIMITS, common=True, at_least=1, at_most=10**8)
    max_context: int | None = setting(None,
        "Maximum number of tokens of prompt and answer together (default: the model's own limit).",
        LIMITS, at_least=2, at_most=10**8)
    max_body: str = setting("1MB", "Largest request body.", LIMITS)
    read_timeout: float = setting(10.0, "Seconds within which a request must arrive.",
        LIMITS, more_than=0, at_most=10**6)
    request_timeout: float = setting(300.0, "Seconds within which a request must be answered.",
        LIMITS, more_than=0, at_most=10**6)
# fmt: on
