"""Turns a crash inside the tokenizers library into an error with words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_lora.system.errors import InputError


@contextmanager
def tokenizer_panics(what: str) -> Iterator[None]:
    """Name a tokenizer that breaks: a pattern of its own that never ends is given up there with a Rust panic.

    Args:
        what: was being encoded.

    Raises:
        InputError: instead of the panic.
    """
    try:
        yield
    except BaseException as error:
        # The class is made by pyo3 at run time; no module has it, and it is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the model's tokenizer breaks on {what} ({reason}); download the model again") from None
