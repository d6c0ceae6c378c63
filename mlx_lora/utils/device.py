"""Describe this machine: its backend, the dtype that it computes in, its memory limits.

This is the only file that distinguishes backends; all others only use mlx's API and the functions here.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_lora import BLAS
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import GIB, package_version

ROW_PARTS = 64  # of a row, which are added to each other first


@dataclass(frozen=True)
class Device:
    """The machine that a run uses.

    Attributes:
        backend: `cpu`, `metal` or `cuda`.
        name: chip or processor name.
        memory_bytes: memory that the backend can address (unified memory on a Mac).
        working_set_bytes: the most that a run should use; Metal's recommended working set on a Mac.
        blas: the CPU matmul library, for the run header.
    """

    backend: str
    name: str
    memory_bytes: int
    working_set_bytes: int
    blas: str

    def header(self) -> str:
        """Return one line for the run header."""
        text = f"{self.name}, {self.backend}, {self.memory_bytes / GIB:.0f} GiB"
        return f"{text}, {self.blas}" if self.backend == "cpu" else text


def current_device() -> Device:
    """Return the default MLX device."""
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


def free_bytes() -> int:
    """Return the memory that is free now: on Linux what the system says, elsewhere the working set less what MLX uses."""
    if not on_gpu() and sys.platform == "linux":
        with open("/proc/meminfo", encoding="ascii") as lines:
            known = dict(line.split(":", 1) for line in lines)
        return min(int(known["MemAvailable"].split()[0]) * 1024, container_memory()[1])
    return max(0, current_device().working_set_bytes - mx.get_active_memory())


def _system_memory_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(memory, container_memory()[0]) if sys.platform == "linux" else memory


CGROUPS = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 62


def container_memory(folder: Path = CGROUPS) -> tuple[int, int]:
    """Return the memory that a container's limit allows, and what of it is free, in bytes; no limit is a very large one.

    Args:
        folder: where Linux shows this container's group (cgroup v2 or v1).
    """
    for files in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            limit, used, stat = ((folder / name).read_text(encoding="ascii") for name in files)
            # Files that were read and are not in use are given up when memory is needed.
            kept = dict(line.split() for line in stat.splitlines())
            cached = int(kept.get("total_inactive_file", kept.get("inactive_file", 0)))
            return int(limit), max(0, int(limit) - max(0, int(used) - cached))
        except (OSError, ValueError):  # there is no such group, or its limit is "max"
            continue
    return NO_LIMIT, NO_LIMIT


def compute_dtype(name: str = "auto") -> mx.Dtype:
    """Return the dtype that a run computes in.

    `auto` is float32 on a CPU, which has no fast 16-bit matmul kernel, and bfloat16 on a GPU. It is never float16, which
    overflows in several published models (Gemma).

    Raises:
        InputError: the name is not one of these float dtypes.
    """
    if name == "auto":
        return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    dtypes = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
    if name not in dtypes:
        raise InputError(f"--dtype {name}: not supported; use auto, {', '.join(dtypes)}")
    return dtypes[name]


def set_cache_limit(budget_bytes: int | None = None) -> int:
    """Limit MLX's buffer cache to a sixteenth of what the run may use, once for the whole run; return the limit in bytes.

    Batches of many shapes leave buffers behind that no later batch can use, but that still count as the process's memory.

    Args:
        budget_bytes: what the run may use; None: the working set.
    """
    bound = (budget_bytes or current_device().working_set_bytes) // 16
    mx.set_cache_limit(bound)
    return bound


def release_memory() -> None:
    """Give back the memory of a model that nothing refers to any more, and forget the peak that it caused."""
    gc.collect()  # modules refer to each other in circles
    mx.clear_cache()
    mx.reset_peak_memory()


def wait_beyond(bound_bytes: int) -> None:
    """Let MLX on a CPU wait for work on its way, instead of allocating for more of it, while its buffers exceed a bound.

    It otherwise allocates for up to a hundred operations ahead: with small blocks, the weights of several. Slower if the bound
    is too low, and never an error. On a GPU, command buffers bound what is allocated ahead.
    """
    if not on_gpu():
        mx.set_memory_limit(bound_bytes)


@contextmanager
def own_memory_limit() -> Iterator[None]:
    """Bring back MLX's memory limit after this context, which may call `wait_beyond`."""
    before = mx.set_memory_limit(current_device().memory_bytes)
    mx.set_memory_limit(before)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def on_gpu() -> bool:
    """Return whether MLX computes on a GPU."""
    return mx.default_device() != mx.Device(mx.cpu)


# On a CPU, mlx calls g++ to compile a kernel, which takes half a second: about 25 s for all kernels of a step, once per
# machine. Steps are then about 5% faster, with the same bits. A run of fewer steps than this would lose time by it.
COMPILE_FROM_STEPS = 200
NEVER = 1 << 62  # a number that no count reaches
_compiling = _kernels_compiled = "MLX_DISABLE_COMPILE" not in os.environ


def compile_for(steps: int) -> None:
    """Compile functions from now on if a run of `steps` steps gains by it, or on a GPU, unless the user disabled it."""
    global _compiling
    _compiling = "MLX_DISABLE_COMPILE" not in os.environ and (on_gpu() or steps >= COMPILE_FROM_STEPS)
    (mx.enable_compile if _compiling else mx.disable_compile)()


def compiles_from_steps() -> int:
    """Return the number of steps from which a run's step is compiled: 0 on a GPU, NEVER if the user disabled compiling."""
    if "MLX_DISABLE_COMPILE" in os.environ:
        return NEVER
    return 0 if on_gpu() else COMPILE_FROM_STEPS


def compiles_kernels() -> bool:
    """Return whether `compiling_kernels` compiles at this time."""
    return _compiling or _kernels_compiled


def compiles() -> bool:
    """Return whether functions are compiled at this time, which may change the last bit of a result."""
    return _compiling


@contextmanager
def uncompiled() -> Iterator[None]:
    """Do not compile functions inside the block; afterward, they are compiled again if they were before."""
    global _kernels_compiled
    before, _kernels_compiled = _kernels_compiled, False
    mx.disable_compile()
    try:
        yield
    finally:
        _kernels_compiled = before
        if _compiling:
            mx.enable_compile()


@contextmanager
def compiling_kernels() -> Iterator[None]:
    """Compile functions inside the block even in a run that is too short for compiling its whole step.

    This is for the few kernels that pay after one step (kernels/activations.py), not if the user disabled compiling.
    """
    if _compiling or not _kernels_compiled:
        yield
        return
    mx.enable_compile()
    try:
        yield
    finally:
        mx.disable_compile()


def vectorizes_compiled_sums() -> bool:
    """Return whether compiled sums and products are much faster than mlx's own exponential, as on a CPU."""
    return mx.default_device() == mx.Device(mx.cpu)


def multiplies_16_bit_experts() -> bool:
    """Return whether mlx can multiply by 16-bit experts on this device; on a CPU, it can only multiply in float32."""
    return mx.default_device() != mx.Device(mx.cpu)


FUSED_WIDTHS = (64, 80, 128)  # of heads, for which Metal's attention is one kernel


def fuses_attention(width: int, value_width: int) -> bool:
    """Return whether mlx computes attention forward without keeping its scores, for heads of a width: a GPU does for some.

    From mlx's `ScaledDotProductAttention::use_fallback`; not measured on a Mac.
    """
    return on_gpu() and width == value_width and width in FUSED_WIDTHS


def keep_exponentials() -> bool:
    """Return whether the backward pass should keep exponentials instead of computing them again.

    A GPU computes one in the time it takes to read its argument; mlx's CPU backend computes 1e8 per second.
    """
    return mx.default_device() == mx.Device(mx.cpu)


def compiling_is_cheap() -> bool:
    """Return whether a measurement may compile candidates: mlx's CPU backend runs g++, half a second per kernel."""
    return mx.default_device() != mx.Device(mx.cpu)


def trial_flops() -> float:
    """Return the operations that one pass of a trial may take: enough to fill the machine, about a tenth of a second."""
    return 2e9 if mx.default_device() == mx.Device(mx.cpu) else 1e12


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + exp(-x)); on a CPU in float32 as (1 + tanh(x / 2)) / 2, which is three times as fast in mlx.

    The two are equal within 6e-8, the rounding of a float32 near 1; near 0 the relative error is larger.
    """
    if mx.default_device() == mx.Device(mx.cpu) and x.dtype == mx.float32:
        return 0.5 + 0.5 * mx.tanh(0.5 * x)
    return mx.sigmoid(x)


def exponential(x: mx.array) -> mx.array:
    """Return exp(x); on a CPU in float32 as 2^(x log2 e), which is three times as fast in mlx.

    Its relative error is |x| float32 roundings instead of one; it is meant for decays, where x is at most 0.
    """
    if mx.default_device() != mx.Device(mx.cpu) or x.dtype != mx.float32:
        return mx.exp(x)
    # It has its own gradient, because mlx's gradient of a power computes the logarithm of every base.
    power = mx.custom_function(lambda x: mx.power(2.0, x * math.log2(math.e)))
    power.vjp(lambda x, d, result: d * result)
    return power(x)


def row_sums(x: mx.array) -> mx.array:
    """Return the sum of each row of `x` (R, S), as (R, 1).

    MLX's CPU backend adds a row's numbers one after the other: of 32,768 exponentials, small ones are lost beside the sum
    (3e-5 of it), and it takes five times as long as adding parts of the row to each other first.
    """
    rows, size = x.shape
    length = size // ROW_PARTS
    if on_gpu() or not length:
        return x.sum(axis=-1, keepdims=True)
    total = mx.as_strided(x, (rows, ROW_PARTS, length), (size, length, 1)).sum(axis=1).sum(axis=-1, keepdims=True)
    rest = x[:, ROW_PARTS * length :]
    return total + rest.sum(axis=-1, keepdims=True) if rest.size else total


def host_waits_for_peers() -> bool:
    """Return whether the host, not the device, must wait for data from other ranks.

    macOS ends GPU work that waits for about five seconds, and a slower peer may take longer (mlx#4475). A CPU can wait.
    """
    return mx.default_device() != mx.Device(mx.cpu)


def plan_whole_graphs() -> None:
    """Let MLX plan operations in the order in which a step needs them, so that messages are sent early.

    By default MLX plans at most twenty operations side by side, and puts off others, among them messages that the next block
    waits for (parallel/sharded_base.py). This works before MLX's first computation.
    """
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100000")


def message_stream(backend: str) -> mx.Stream | None:
    """Return a stream for messages to other ranks, beside that of the computation; None: mlx's default.

    Args:
        backend: of mx.distributed. NCCL's messages are the GPU's own work, those of the others are the CPU's.
    """
    return None if backend == "nccl" else mx.new_stream(mx.cpu)


def wire_working_set() -> None:
    """Let Metal keep the model resident, so that weights are not paged out; do nothing on other backends.

    If the CPU is MLX's device on a Mac, nothing is wired either: a run may then use nearly all memory, which is more than
    Metal allows to wire.
    """
    if mx.metal.is_available() and mx.default_device() != mx.Device(mx.cpu):
        mx.set_wired_limit(current_device().working_set_bytes)


# Operations and megabytes per Metal command buffer; mlx's own limits are 20 to 50 of each, depending on the chip.
SHORT_BUFFERS = {"MLX_MAX_OPS_PER_BUFFER": "4", "MLX_MAX_MB_PER_BUFFER": "8"}


def restart_with_short_buffers() -> None:
    """On Metal, restart this program with short command buffers, except for variables that the user has set.

    MLX reads these variables once, when it creates its device, which may already have happened during an import.
    macOS kills command buffers that delay the display (mlx#3267). This has not been tested on a Mac yet.
    """
    missing = {name: value for name, value in SHORT_BUFFERS.items() if name not in os.environ}
    if mx.metal.is_available() and missing:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


# macOS's flag of fcntl for a file whose bytes are read once: <sys/fcntl.h>; Python does not name it everywhere.
F_NOCACHE = 48


def open_uncached(path: Path) -> int:
    """Open a file for reading past the system's cache where the system can (macOS), and return its descriptor.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY)
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):  # a file system without it reads through the cache
            fcntl.fcntl(descriptor, F_NOCACHE, 1)
    return descriptor


def drop_cached(descriptor: int, begin: int, size: int) -> None:
    """Tell the system that bytes of a file that were read need not stay in its cache, where it can be told (Linux)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_DONTNEED)


def measured_on() -> str:
    """Return the cache key of this machine's measurements; with another mlx, chip or BLAS they are repeated."""
    return f"{current_device().name}|mlx {package_version('mlx')}|{BLAS.name}"


def end_thread() -> None:
    """Finish this thread's streams and free its compiled functions; every thread that we start calls this last.

    MLX keeps compiled functions, including Python objects, for each thread, and frees them when the system ends the
    thread, which is after `join`. If the interpreter ends in between, the process aborts ("terminate called without an
    active exception", 3 of 10 exits with mlx 0.32.4). `clear_streams` also empties that cache.
    """
    mx.synchronize()
    mx.clear_streams()
