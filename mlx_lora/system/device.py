"""The only file that knows backends: what this machine is, which dtype it computes in, its memory limits.

Everything else is written against mlx's API alone and asks here.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx

from mlx_lora import BLAS
from mlx_lora.system.errors import InputError
from mlx_lora.system.measuring import best_s, read_store, write_store
from mlx_lora.system.units import GIB, parse_size


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


def set_cache_limit(limit: str | None, budget_bytes: int | None = None) -> int:
    """Bound MLX's buffer cache once for the whole run and return the bound in bytes.

    Args:
        limit: a size such as `2GB`, or None for a sixteenth of what the run may use: batches of many shapes leave
            buffers that fit no later one, and they count in the process all the same.
        budget_bytes: what the run may use; None: the working set.
    """
    share = (budget_bytes or current_device().working_set_bytes) // 16
    bound = share if limit is None else parse_size(limit)
    mx.set_cache_limit(bound)
    return bound


def on_gpu() -> bool:
    """Whether this is a GPU."""
    return mx.default_device() != mx.Device(mx.cpu)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Call functions as they are instead of compiling them; afterwards it is as the user's environment has it."""
    mx.disable_compile()
    try:
        yield
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()


def multiplies_16_bit_experts() -> bool:
    """Tell whether mlx has a product with a mixture's experts in 16 bits here: on a CPU it has one in float32."""
    return mx.default_device() != mx.Device(mx.cpu)


def keep_exponentials() -> bool:
    """Whether the backward pass should keep exponentials rather than make them again.

    A GPU makes one in the time it takes to read its argument; mlx's CPU backend does 1e8 in a second.
    """
    return mx.default_device() == mx.Device(mx.cpu)


def compiling_is_cheap() -> bool:
    """Whether a measurement may compile what it tries: mlx's CPU backend asks g++, half a second a kernel."""
    return mx.default_device() != mx.Device(mx.cpu)


def trial_flops() -> float:
    """Operations that one pass of a trial may take: enough to fill the machine, a tenth of a second or so."""
    return 2e9 if mx.default_device() == mx.Device(mx.cpu) else 1e12


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + exp(-x)), on a CPU in float32 as (1 + tanh(x / 2)) / 2, three times as fast in mlx there.

    The two are equal within 6e-8, the rounding of a float32 near 1; a value near 0 is less exact than that
    relative to itself.
    """
    if mx.default_device() == mx.Device(mx.cpu) and x.dtype == mx.float32:
        return 0.5 + 0.5 * mx.tanh(0.5 * x)
    return mx.sigmoid(x)


def exponential(x: mx.array) -> mx.array:
    """Return exp(x), on a CPU in float32 as 2^(x log2 e), three times as fast in mlx there.

    Its error relative to itself is |x| roundings of a float32 rather than one: meant for decays, where x is at most 0.
    """
    if mx.default_device() != mx.Device(mx.cpu) or x.dtype != mx.float32:
        return mx.exp(x)
    # A gradient of its own: mlx's gradient of a power takes the logarithm of every base.
    power = mx.custom_function(lambda x: mx.power(2.0, x * math.log2(math.e)))
    power.vjp(lambda x, d, result: d * result)
    return power(x)


def host_waits_for_peers() -> bool:
    """Whether the host, not the device, must wait for what other ranks send.

    macOS ends GPU work that waits for some five seconds, and a slower peer may take longer (mlx#4475). A CPU waits.
    """
    return mx.default_device() != mx.Device(mx.cpu)


def wire_working_set() -> None:
    """Let Metal keep the model resident (no effect elsewhere), so that weights are not paged out.

    With the CPU as MLX's device on a Mac nothing is wired either: what a run may use there is nearly all memory, which
    is more than Metal lets anybody wire.
    """
    if mx.metal.is_available() and mx.default_device() != mx.Device(mx.cpu):
        mx.set_wired_limit(current_device().working_set_bytes)


# Operations and megabytes per Metal command buffer; mlx's own bounds are 20 to 50 of each, by chip.
SHORT_BUFFERS = {"MLX_MAX_OPS_PER_BUFFER": "4", "MLX_MAX_MB_PER_BUFFER": "8"}


def restart_with_short_buffers() -> None:
    """On Metal, start this program anew with short command buffers; what the user has set already stays.

    MLX reads these variables once, when it makes its device, which may have happened during an import.
    macOS kills command buffers that keep the display waiting (mlx#3267). Not measured on a Mac yet.
    """
    missing = {name: value for name, value in SHORT_BUFFERS.items() if name not in os.environ}
    if mx.metal.is_available() and missing:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


ROW_COUNTS = (1, 4, 16, 64, 256, 1024)
NEVER = 1 << 62
# Weights are timed in classes of this size: a model's few, and none so large that timing it takes long.
SMALLEST_SIDE, LARGEST_SIDE = 128, 2048


def dense_matmul_from_rows(shape: tuple[int, int], bits: int, group_size: int, mode: str, dtype: mx.Dtype) -> int:
    """Rows from which dequantize-then-GEMM beats `mx.quantized_matmul` here, measured once and cached.

    Args:
        shape: (out, in) of the weight; it is timed as its class, see `shape_class`.
        bits, group_size, mode: as mx.quantize took them.
        dtype: of the scales; the microscaling modes hold integers there, and are timed in `compute_dtype()`.

    Returns:
        One of ROW_COUNTS, or NEVER, which no batch reaches, when the quantized kernel always wins.
    """
    compute = dtype if mx.issubdtype(dtype, mx.floating) else compute_dtype()
    out, width = shape_class(shape)
    layout = f"{bits}|{group_size}|{mode}|{compute}"
    key = f"{measured_on()}|{layout}|{out}x{width}"
    known = read_store("dense_matmul_from_rows")
    if known.get(key) not in (*ROW_COUNTS, NEVER):  # unknown, or scribbled over
        known = {**known, key: _measure_dense_matmul((out, width), bits, group_size, mode, compute)}
        write_store("dense_matmul_from_rows", known)
    return known[key]


def measured_on() -> str:
    """What measurements of this machine are kept under: another mlx, chip or BLAS is measured anew."""
    return f"{current_device().name}|mlx {version('mlx')}|{BLAS.name}"


def shape_class(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the (out, in) that stands for a weight's: the nearest powers of two within the bounds."""
    out, width = (min(max(1 << round(math.log2(side)), SMALLEST_SIDE), LARGEST_SIDE) for side in shape)
    return out, width


def _measure_dense_matmul(shape: tuple[int, int], bits: int, group_size: int, mode: str, dtype: mx.Dtype) -> int:
    """Time both paths on an (out, in) weight, fewest rows first, and stop at the first dense win.

    Timed is what a training step does with a frozen weight: the product, and the gradient for its input.
    """
    layout = {"group_size": group_size, "bits": bits, "mode": mode}
    packed = mx.quantize(mx.random.normal(shape, key=mx.random.key(0)).astype(dtype), **layout)

    def quantized(x: mx.array, cotangent: mx.array) -> list[mx.array]:
        return [
            mx.quantized_matmul(x, *packed, transpose=True, **layout),
            mx.quantized_matmul(cotangent, *packed, transpose=False, **layout),
        ]

    def dense(x: mx.array, cotangent: mx.array) -> list[mx.array]:
        # Dequantized for each of the two, as in matmul.py: nothing dense is kept between them.
        once, again = (mx.dequantize(*packed, **layout).astype(dtype) for _ in range(2))
        return [x @ once.T, cotangent @ again]

    for rows in ROW_COUNTS:
        cotangent, x = (mx.random.normal((rows, side), key=mx.random.key(1)).astype(dtype) for side in shape)
        mx.eval(x, cotangent, packed)
        quantized_s, dense_s = best_s([lambda f=f, x=x, c=cotangent: f(x, c) for f in (quantized, dense)])
        if dense_s < quantized_s:
            return rows
    return NEVER


def end_thread() -> None:
    """Finish this thread's streams and let its compiled functions go; the last that a thread of ours does with MLX.

    MLX keeps compiled functions, Python's among them, for each thread, and drops them when the system ends the thread,
    which is after `join`. An interpreter that ends meanwhile aborts ("terminate called without an active exception", 3
    of 10 exits with mlx 0.32.4). `clear_streams` empties that cache as well.
    """
    mx.synchronize()
    mx.clear_streams()
