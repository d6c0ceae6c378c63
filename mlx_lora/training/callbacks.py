"""Tell a user's code what happens during a run; an error in it ends the run after a save, and names the code."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlx_lora.system.errors import InputError, RunError

Facts = dict[str, Any]


class Callback:
    """What a run tells; make a subclass with the methods that you need, and pass an instance to `train(callbacks=...)`.

    Each method takes one plain dict, a copy that it may keep. An exception in a method ends the run as Ctrl-C does:
    the step is finished, adapter and checkpoint are saved, and `train` raises a RunError that names the method.
    """

    def on_start(self, facts: Facts) -> None:
        """Called before the first step.

        Args:
            facts: `settings` (all of the run, as in run.yaml), `steps` of the whole run, `adapter_path`.
        """

    def on_step(self, facts: Facts) -> None:
        """Called after every optimizer step, while the device may still compute it; there is no loss yet.

        Args:
            facts: `step` (from 1), `steps`.
        """

    def on_report(self, facts: Facts) -> None:
        """Called every `steps_per_report` steps, with the means since the last report.

        Args:
            facts: a line of metrics.jsonl: `step`, `epoch`, `loss`, `learning_rate`, `grad_norm`, `tokens_per_s` ...
        """

    def on_validation(self, facts: Facts) -> None:
        """Called after every validation.

        Args:
            facts: a line of metrics.jsonl: `step`, `epoch`, `val_loss`, and what the objective reports.
        """

    def on_save(self, facts: Facts) -> None:
        """Called after the adapter, and with `save_every` a checkpoint, was written.

        Args:
            facts: `step`, `adapter_path`.
        """

    def on_end(self, facts: Facts) -> None:
        """Called once at the end, also of a run that fails; close files here.

        Args:
            facts: `steps` taken, `val_loss`, `interrupted`, `stopped_early`, `adapter_path` and `error` (None, or its
                text; without the first four where the run failed).
        """


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """All callbacks of a run, and what went wrong in one of them."""

    def __init__(self, callbacks: Sequence[Callback] = ()):
        """Check the callbacks.

        Raises:
            InputError: one is no Callback, or has a method `on_...` that a run never calls.
        """
        for callback in callbacks:
            if not isinstance(callback, Callback):
                found = f"{callback.__name__} is a class or function" if callable(callback) and hasattr(
                    callback, "__name__") else f"found {type(callback).__name__}"  # fmt: skip
                raise InputError(f"callbacks: {found}; give instances of a subclass of mlx_lora.Callback")
            for name in dir(callback):
                if name.startswith("on_") and name not in EVENTS:
                    close = difflib.get_close_matches(name, EVENTS, n=1)
                    advice = f"did you mean {close[0]}?" if close else f"a run calls {', '.join(EVENTS)}"
                    raise InputError(f"callbacks: {type(callback).__name__}.{name} is never called; {advice}")
        self._callbacks = callbacks
        self._failed: tuple[str, Exception] | None = None

    def failed(self) -> bool:
        """Tell whether a callback raised an exception, after which none is called except for the end."""
        return self._failed is not None

    def tell(self, event: str, facts: Facts) -> None:
        """Call one method of every callback, one of EVENTS, unless one failed before."""
        for callback in self._callbacks:
            if self._failed is None:
                self._call(callback, event, facts)

    def _call(self, callback: Callback, event: str, facts: Facts) -> None:
        try:
            getattr(callback, event)(dict(facts))
        except Exception as error:  # anything: it is the user's code
            if self._failed is None:
                self._failed = (f"{type(callback).__name__}.{event}", error)

    @contextmanager
    def around(self, steps: int, settings: Facts) -> Iterator[Facts]:
        """Call `on_start`, run what is inside, and call `on_end` of every callback, also of one that failed.

        Args:
            steps: of the whole run.
            settings: as in run.yaml.

        Yields:
            What `on_end` gets; the run inside adds its outcome.
        """
        ending: Facts = {"adapter_path": settings["adapter_path"], "error": None}
        try:
            self.tell("on_start", {"settings": settings, "steps": steps, "adapter_path": settings["adapter_path"]})
            yield ending
        except BaseException as error:
            ending["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            if self._failed is not None:
                ending["error"] = ending["error"] or "{}: {!r}".format(*self._failed)
            for callback in self._callbacks:
                self._call(callback, "on_end", ending)

    def raise_failure(self, kept: str) -> None:
        """Raise the error of a callback, if there was one.

        Args:
            kept: what the run leaves, for the message.

        Raises:
            RunError: it names the callback's method.
        """
        if self._failed is not None:
            name, error = self._failed
            raise RunError(f"callback {name} failed ({type(error).__name__}: {error}); {kept}") from error
