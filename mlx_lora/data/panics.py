"""Turn a crash inside the tokenizers library into an error with a message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_lora.system.errors import InputError


@contextmanager
def tokenizer_panics(what: str) -> Iterator[None]:
    """Report a tokenizer that crashes: the library panics if one of its patterns takes too long.

    Args:
        what: what is being encoded.

    Raises:
        InputError: instead of the panic.
    """
    try:
        yield
    except BaseException as error:
        # pyo3 makes this class at run time, so it cannot be imported; it does not derive from Exception.
        if type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the model's tokenizer crashes on {what} ({reason}); download the model again") from None
