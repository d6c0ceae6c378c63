"""The only file that knows backends: what this machine is, which dtype it computes in, its memory limits.

Everything else is written against mlx's API alone and asks here.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import mlx.core as mx

from mlx_lora import BLAS
from mlx_lora.errors import InputError

GIB = 1024**3


@dataclass(frozen=True)
class Device:
    """The machine a run uses.

    Attributes:
        backend: `cpu`, `metal` or `cuda`.
        name: chip or processor name.
        memory_bytes: memory the backend can address (unified memory on a Mac).
        working_set_bytes: what a run should stay under; Metal's recommended working set on a Mac.
        blas: the CPU matmul library, for the run header.
    """

    backend: str
    name: str
    memory_bytes: int
    working_set_bytes: int
    blas: str

    def header(self) -> str:
        """One line for the run header."""
        text = f"{self.name}, {self.backend}, {self.memory_bytes / GIB:.0f} GiB"
        return f"{text}, {self.blas}" if self.backend == "cpu" else text


def current_device() -> Device:
    """Describe the default MLX device."""
    info = mx.device_info()
    name = str(info.get("device_name", "unknown"))
    if mx.default_device() == mx.Device(mx.cpu):
        memory = _system_memory_bytes()
        blas = BLAS.name if not BLAS.advice else f"{BLAS.name}: {BLAS.advice}"
        return Device("cpu", name, memory, int(memory * 0.9), blas)
    backend = "metal" if mx.metal.is_available() else "cuda"
    memory = int(info.get("memory_size") or info.get("total_memory") or _system_memory_bytes())
    working = int(info.get("max_recommended_working_set_size") or memory * 0.9)
    return Device(backend, name, memory, working, "")


def _system_memory_bytes() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compute_dtype(name: str = "auto") -> mx.Dtype:
    """Return the dtype a run computes in.

    `auto` is float32 on a CPU, whose 16-bit matmul has no fast kernel, and bfloat16 on a GPU: float16
    overflows in several published models (Gemma), so it is never chosen by itself.

    Raises:
        InputError: for a name that is not a float dtype of ours.
    """
    if name == "auto":
        return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    dtypes = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
    if name not in dtypes:
        raise InputError(f"--dtype {name}: not a dtype we compute in; use auto, {', '.join(dtypes)}")
    return dtypes[name]


def set_cache_limit(limit: str | None) -> int:
    """Bound MLX's buffer cache once for the whole run and return the bound in bytes.

    Args:
        limit: a size such as `2GB`, or None for a third of the working set.
    """
    bound = current_device().working_set_bytes // 3 if limit is None else parse_size(limit)
    mx.set_cache_limit(bound)
    return bound


def wire_working_set() -> None:
    """Let Metal keep the model resident (no effect elsewhere), so that weights are not paged out."""
    if mx.metal.is_available():
        mx.set_wired_limit(current_device().working_set_bytes)


def parse_size(text: str) -> int:
    """Turn `512MB`, `2GB`, `1.5GiB` or plain bytes into a byte count.

    Raises:
        InputError: when the text is no size.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    digits = text.strip().rstrip("KMGIBkmgib ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        size = float(digits) * units[unit]
    except (ValueError, KeyError):
        raise InputError(f"size {text!r}: not a number of bytes; write it as 512MB or 2GB") from None
    if not 0 <= size < 2**63:
        raise InputError(f"size {text!r}: out of range; write it as 512MB or 2GB")
    return int(size)


def process_peak_bytes() -> int:
    """Peak resident size of this process: what the operating system sees, beside MLX's own count."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
