"""Turn the engine's errors into answers to clients, which must not learn the paths of the server's machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlx_lora.serving.adapter_store import NoRoom, UnknownAdapter, base_name
from mlx_lora.serving.engine import Engine, QueueFull, Stopped
from mlx_lora.serving.schema import ApiError
from mlx_lora.utils.errors import InputError

RETRY_AFTER_S = 1


def api_error(error: Exception) -> ApiError:
    """Return the error that a client gets for an error of the engine."""
    if isinstance(error, UnknownAdapter):
        return ApiError(
            404, f"no model or adapter {str(error)!r}; GET /v1/models lists them", "model_not_found", "model"
        )
    if isinstance(error, QueueFull):
        return ApiError(429, f"{error}; try again later", "queue_full", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, NoRoom):
        return ApiError(503, f"{error}; try again later", "no_room", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, Stopped):
        return ApiError(503, f"{error}", "shutting_down")
    if isinstance(error, (InputError, OSError)):
        return ApiError(400, " ".join(str(error).split()), "invalid_adapter")
    raise error


def client_error(engine: Engine, error: Exception, folders: Iterable[Path] = ()) -> ApiError:
    """Return the error that a client gets, without paths of this machine.

    Args:
        engine: whose base and adapters are known.
        error: of the engine, or one that is an answer already.
        folders: further ones that the text may name.
    """
    told = error if isinstance(error, ApiError) else api_error(error)
    told.args = (without_paths(str(told), engine, folders),)
    return told


def without_paths(text: str, engine: Engine, folders: Iterable[Path] = ()) -> str:
    """Return a text in which the folders of the base and the adapters, and further ones, are only their names."""
    base = engine.base
    known = [*folders, *engine.store.folders, base.folder]
    names = {str(form): folder.name for folder in known for form in (folder, folder.resolve())}
    name = base_name(base)
    names[base.model_id] = Path(name).name if Path(name).is_absolute() else name  # a folder may be gone by now
    for path in sorted((path for path, name in names.items() if name), key=len, reverse=True):
        text = text.replace(path, names[path])
    return text
