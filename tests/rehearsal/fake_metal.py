"""What mlx.core answers on a Mac, for the one module that asks: mlx_lora.utils.device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from rehearsal import refusals

GIB = 1 << 30
MEMORY_BYTES = 16 * GIB
# Metal recommends two thirds of up to 36 GiB, and lends one buffer of at most half of the memory and a little (CHIPS).
WORKING_SET_BYTES = MEMORY_BYTES * 2 // 3
LONGEST_BUFFER_BYTES = MEMORY_BYTES * 9 // 16


class FakeMetal:
    """mlx.core with the answers of an M2: its device, its limits, and the errors of what exceeds them.

    Args:
        real: what everything else is asked of.
    """

    def __init__(self, real: Any = mx):
        self._real, self._wired_bytes = real, 0
        self._device = real.Device(real.gpu)
        self.metal = SimpleNamespace(is_available=self._available)
        self._own = {
            "default_device": real.default_device,
            "device_info": real.device_info,
            "set_wired_limit": real.set_wired_limit,
        }
        self._own_available = real.metal.is_available

    def _replaced(self, name: str) -> bool:
        """Return whether a test has put its own answer in the place of mlx's: that one counts."""
        return getattr(self._real, name) is not self._own[name]

    def _available(self) -> bool:
        replaced = self._real.metal.is_available is not self._own_available
        return self._real.metal.is_available() if replaced else True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def default_device(self) -> Any:
        """Return the GPU, what `set_default_device` chose, or inside `with mx.stream(mx.cpu)` the CPU."""
        if self._replaced("default_device"):
            return self._real.default_device()
        return self._real.Device(self._real.cpu) if refusals.on_cpu(None) else self._device

    def set_default_device(self, device: Any) -> None:
        """Choose the device; this build still computes on its CPU."""
        self._device = device if isinstance(device, self._real.Device) else self._real.Device(device)

    def device_info(self, device: Any = None) -> dict[str, Any]:
        """Return what mlx reads from Metal."""
        if self._replaced("device_info"):
            return self._real.device_info()
        if (device or self.default_device()) == self._real.Device(self._real.cpu):
            return {**self._real.device_info(), "device_name": "Apple M2"}
        return {
            "device_name": "Apple M2", "architecture": "applegpu_g14g", "memory_size": MEMORY_BYTES, "resource_limit": 499000,
            "max_recommended_working_set_size": WORKING_SET_BYTES, "max_buffer_length": LONGEST_BUFFER_BYTES,
        }  # fmt: skip

    def set_wired_limit(self, limit: int) -> int:
        """Refuse more than the working set, as Metal does."""
        if self._replaced("set_wired_limit"):
            return self._real.set_wired_limit(limit)
        if limit > WORKING_SET_BYTES:
            raise ValueError(
                "[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size is not allowed."
            )
        before, self._wired_bytes = self._wired_bytes, limit
        return before
