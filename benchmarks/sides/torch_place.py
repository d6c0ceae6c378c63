"""Where torch's sides compute, and in what: the GPU in bfloat16 where there is one, as ours do, else the CPU in float32.

No torch is imported here: the functions take it as an argument, so that a test can give them another.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
DEVICES = ("mps", "cuda", "cpu")


@dataclass
class TorchPlace:
    """A device and a dtype that torch computes in, and the most memory that was seen on it.

    Attributes:
        torch: the package.
        device: mps, cuda or cpu.
        dtype: of the base's weights and of the products, float32 or bfloat16. Factors and optimizer state are float32.
    """

    torch: Any
    device: str
    dtype: str
    _live_bytes: int = 0
    _driver_bytes: int = 0

    @property
    def torch_dtype(self) -> Any:
        """Return torch's own name of the dtype."""
        return getattr(self.torch, self.dtype)

    def computing(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass: in 16 bits torch's autocast, as in transformers' Trainer with `bf16`."""
        if self.dtype == "float32":
            return nullcontext()
        return self.torch.autocast(device_type=self.device, dtype=self.torch_dtype)

    def wait(self) -> None:
        """Wait for the device, so that a clock that is read next counts work that is done, not work that was asked for."""
        if self.device == "mps":
            self.torch.mps.synchronize()
        elif self.device == "cuda":
            self.torch.cuda.synchronize()

    def note_memory(self) -> None:
        """Look at MPS's counters, which know no peak; call it where much is alive."""
        if self.device == "mps":
            self._live_bytes = max(self._live_bytes, self.torch.mps.current_allocated_memory())
            self._driver_bytes = max(self._driver_bytes, self.torch.mps.driver_allocated_memory())

    def peak_bytes(self) -> int | None:
        """Return the most bytes of live tensors: on CUDA the peak, on MPS the most that was seen, None on a CPU."""
        if self.device == "cuda":
            return self.torch.cuda.max_memory_allocated()
        return self._live_bytes or None

    def facts(self) -> dict[str, Any]:
        """Return what a result says of a side that computes here."""
        where = {"device": self.device, "dtypes": [self.dtype], "threads": self.torch.get_num_threads()}
        found: dict[str, Any] = {"blas": f"torch on {self.device}", "fast_blas": True, **where}
        if self.device == "cpu":
            found["blas"] = f"torch ({'MKL' if self.torch.backends.mkl.is_available() else 'other'})"
        if self.device == "mps":
            # With what the allocator keeps for reuse; the live tensors are the side's peak.
            found["most_driver_bytes"] = self._driver_bytes or None
        return found


def torch_place(torch: Any, device: str = AUTO, dtype: str = AUTO) -> TorchPlace:
    """Return where to compute.

    Device `auto` takes the first of mps, cuda and cpu that is available; dtype `auto` takes what ours computes in there.

    Raises:
        ValueError: the device is not available.
    """
    available = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    found = next(name for name in DEVICES if available[name]) if device == AUTO else device
    if not available[found]:
        there = ", ".join(name for name in DEVICES if available[name])
        raise ValueError(f"--torch-device {device}: torch {torch.__version__} finds only {there}; give one of these")
    return TorchPlace(torch, found, ("float32" if found == "cpu" else "bfloat16") if dtype == AUTO else dtype)
