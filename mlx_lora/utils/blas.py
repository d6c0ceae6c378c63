"""Load a fast BLAS for MLX's Linux CPU backend, and divide the cores among the ranks, before the first `import mlx.core`.

MLX's Linux wheel includes the reference BLAS. Symbols of a library loaded with RTLD_GLOBAL come first in the dynamic
linker's search, so MLX's `cblas_sgemm` is then OpenBLAS's, 30 to 60 times faster in float32. This file must not import
mlx, and at its top only what is quick to import, because every `import mlx_lora` runs it.

`MLX_LORA_BLAS` = `auto` (default), `off`, or the path of a BLAS library to load.

A BLAS starts a thread for every core in each process, and a thread that waits for another one spins. Two ranks with two
threads each on two cores took minutes for products of seconds.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlx_lora.utils.files import cache_dir

SYSTEM_OPENBLAS = "libopenblas.so.0"
SHIM_SOURCE = Path(__file__).with_name("blas.c")
SLOW = "bundled reference BLAS (float32 matmul 30-60x slower)"


class Blas(NamedTuple):
    """The BLAS of MLX's CPU backend.

    Attributes:
        name: shown to users, such as `OpenBLAS (scipy-openblas32 0.3.34)`.
        fast: False if the bundled reference BLAS is used on Linux.
        advice: what to do if it is not fast, otherwise empty.
    """

    name: str
    fast: bool
    advice: str = ""


def load_fast_blas() -> Blas:
    """Load OpenBLAS for MLX on Linux (on macOS, MLX uses Accelerate), and return what is used."""
    if sys.platform != "linux":
        return Blas("Accelerate", fast=True)
    wish = os.environ.get("MLX_LORA_BLAS", "auto")
    if wish == "off":
        return Blas(SLOW, fast=False, advice="turned off by MLX_LORA_BLAS=off")
    if "mlx.core" in sys.modules:
        return Blas(SLOW, fast=False, advice="import mlx_lora before mlx.core to change that")
    if wish != "auto":
        try:
            ctypes.CDLL(wish, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return Blas(SLOW, fast=False, advice=f"MLX_LORA_BLAS={wish} did not load: {error}")
        return Blas(f"MLX_LORA_BLAS={wish}", fast=True)
    # Prefer the shim: it has only the names that MLX needs. A system library has all of OpenBLAS's, which torch then finds
    # before its own; its batched products of four dimensions end with a segmentation fault (torch 2.13, OpenBLAS 0.3.29).
    found = _load_pypi_openblas()
    if found.fast:
        return found
    try:
        ctypes.CDLL(SYSTEM_OPENBLAS, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return found
    return Blas(f"OpenBLAS ({SYSTEM_OPENBLAS})", fast=True)


def _load_pypi_openblas() -> Blas:
    """Load scipy-openblas32, and a compiled shim that gives its functions their standard names."""
    import platform
    import shutil
    import subprocess
    import tempfile
    from importlib.metadata import version

    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        return Blas(SLOW, fast=False, advice="pip install scipy-openblas32")
    library = Path(spec.origin).parent / "lib" / "libscipy_openblas.so"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++") or shutil.which("clang")
    # Named after library and source, so that an upgrade compiles a new one.
    source = zlib.crc32(SHIM_SOURCE.read_bytes())
    stamp = f"{library.stat().st_size:x}-{zlib.crc32(str(library).encode(), source):x}"
    shim = cache_dir("blas") / f"shim-{platform.machine()}-{stamp}.so"
    try:
        if not shim.exists():
            if compiler is None:
                return Blas(SLOW, fast=False, advice="install a C++ compiler (Debian: apt install g++)")
            shim.parent.mkdir(parents=True, exist_ok=True)
            # Compile under a temporary name and rename: another process must not load an incomplete file.
            with tempfile.TemporaryDirectory(dir=shim.parent) as folder:
                out = Path(folder) / "shim.so"
                command = [compiler, "-x", "c", "-shared", "-fPIC", str(SHIM_SOURCE), "-x", "none", str(library)]
                command += [f"-Wl,-rpath,{library.parent}", "-o", str(out)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                out.replace(shim)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.CalledProcessError) as error:
        text = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        lines = [type(error).__name__, *(text or str(error)).splitlines()]
        why = [line.strip() for line in lines if line.strip()][-1]
        advice = f"the OpenBLAS shim failed ({why}); apt install libopenblas0-pthread"
        return Blas(SLOW, fast=False, advice=advice)
    return Blas(f"OpenBLAS (scipy-openblas32 {version('scipy-openblas32')})", fast=True)


# The ranks' cores
# What a user may have set; the first one is OpenBLAS's own.
THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
)  # fmt: skip
# The launchers' variables with the number of processes on this machine: Open MPI, MPICH and Intel MPI.
LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def share_cores() -> None:
    """Set the number of BLAS threads to this rank's share of the cores, if there are several ranks here and no user's number."""
    ranks = local_ranks(os.environ)
    if ranks > 1 and not any(os.environ.get(name) for name in THREAD_VARIABLES):
        share = str(max(1, usable_cores() // ranks))
        os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), share))


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_ranks(environment: Mapping[str, str]) -> int:
    """Return how many ranks of this run are on this machine, 1 if that is not known.

    Args:
        environment: os.environ, or a mapping like it. What is wrong in it is reported later (parallel/ranks.py).
    """
    for name in LOCAL_SIZES:
        if environment.get(name, "").isdecimal():
            return max(1, int(environment[name]))
    try:
        hosts = json.loads(Path(environment["MLX_HOSTFILE"]).read_text(encoding="utf-8"))
        addresses = [host[0].rpartition(":")[0] for host in hosts]  # a rank may have several ports at one address
        return addresses.count(addresses[int(environment["MLX_RANK"])])
    except (KeyError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return 1


def share_words() -> str:
    """Return how the ranks of this run share this machine's cores, for the line about them; empty for one rank alone."""
    ranks = local_ranks(os.environ)
    if ranks == 1:
        return ""
    threads = next((os.environ[name] for name in THREAD_VARIABLES if os.environ.get(name)), "all")
    return f"; {ranks} share this machine's {usable_cores()} cores, each with {threads} BLAS thread{'s' * (threads != '1')}"
