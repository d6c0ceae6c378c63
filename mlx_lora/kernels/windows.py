"""Remember which masks of attention are sliding windows, so that a kernel reads only the keys in the window.

mlx-lm gives a layer with a sliding window a bool array with a number for every query and key, (T, S), which does not say
that most of it is False. All architectures get it from one function, `create_attention_mask`. While a step is traced, that
function is replaced by one that also notes the window of the array that it returns (kernels/table.py). An array that a model
makes or changes by itself is not noted, and is then read as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx


class Windows:
    """The windows of masks, which are told apart by identity."""

    def __init__(self) -> None:
        # The masks themselves, too: while they are here, no other array gets one of their ids.
        self._noted: dict[int, tuple[mx.array, int]] = {}

    def note(self, mask: mx.array, window: int) -> None:
        """Remember that a query sees only itself and the `window` - 1 keys before it."""
        self._noted[id(mask)] = (mask, window)

    def of(self, mask: mx.array | str | None) -> int | None:
        """Return a mask's window, None if it has none that is known."""
        return self._noted.get(id(mask), (None, None))[1]

    def replaced(self, mask: mx.array, by: mx.array) -> None:
        """Remember of an array what is known of the mask that it stands for."""
        window = self.of(mask)
        if window is not None:
            self.note(by, window)

    def noting(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Return mlx-lm's `create_attention_mask` with a note of the windows of what it returns."""

        def made(h: mx.array, cache: Any = None, window_size: int | None = None, return_array: bool = False) -> Any:
            mask = make(h, cache, window_size, return_array)
            # The window of a shared prefix is one of positions, and not of columns.
            if window_size and cache is None and isinstance(mask, mx.array):
                self.note(mask, window_size)
            return mask

        return made
