"""Read what a result records about the machine, its power and the software, and measure the machine's peak rates.

Facts that cannot be read are None. On macOS, they come from `sysctl`, `ioreg`, `sw_vers`, `pmset` and, for the thermal state,
`osascript`, all of which are part of macOS; on Linux, from /proc and /sys.

The rates are measured in a process of its own: `python -m mlx_lora.bench.machine` prints one JSON object with the device, as
MLX describes it, and the rates. Each rate is the best of several rounds, since other programs can only slow it down. Products
grow until one takes long enough to be timed well, so that a slow dtype does not take minutes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_lora
from mlx_lora.kernels.measure import best_s
from mlx_lora.planner.machine import measure_ceilings
from mlx_lora.utils import device
from mlx_lora.utils.text import package_versions

# Facts

# Both change OpenBLAS's kernels or block sizes, and figures must not depend on them.
DROPPED_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
RECORDED_VARIABLES = (
    *DROPPED_VARIABLES,
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "MLX_LORA_BLAS",
    "MLX_MAX_OPS_PER_BUFFER",
    "MLX_MAX_MB_PER_BUFFER",
    "MLX_METAL_FAST_SYNCH",
)
PACKAGES = ("mlx-lora", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy", "scipy-openblas32")
THERMAL_STATES = ("nominal", "fair", "serious", "critical")
# NSProcessInfo has the state; JavaScript for Automation can read it without a package.
THERMAL_SCRIPT = 'ObjC.import("Foundation"); $.NSProcessInfo.processInfo.thermalState'


def answer(*command: str, timeout_s: float = 10) -> str | None:
    """Return what a system program prints, None if it does not exist, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def describe_machine() -> dict[str, Any]:
    """Return facts about the hardware and the operating system."""
    common: dict[str, Any] = {"architecture": platform.machine(), "cpu_cores": os.cpu_count()}
    common["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "darwin":
        cores = re.search(r'"gpu-core-count" = (\d+)', answer("ioreg", "-rc", "AGXAccelerator", "-d", "1") or "")
        return {
            **common,
            "chip": answer("sysctl", "-n", "machdep.cpu.brand_string"),
            "model": answer("sysctl", "-n", "hw.model"),
            "gpu_cores": int(cores[1]) if cores else None,
            "performance_cores": _whole(answer("sysctl", "-n", "hw.perflevel0.physicalcpu")),
            "efficiency_cores": _whole(answer("sysctl", "-n", "hw.perflevel1.physicalcpu")),
            "system": "macOS",
            "system_version": answer("sw_vers", "-productVersion"),
            "system_build": answer("sw_vers", "-buildVersion"),
        }
    name = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return {
        **common,
        "chip": name[1].strip() if name else None,
        "model": _read("/sys/devices/virtual/dmi/id/product_name"),
        "gpu_cores": None,
        "performance_cores": None,
        "efficiency_cores": None,
        "system": platform.system(),
        "system_version": platform.release(),
        "system_build": None,
    }


def describe_power(system: Path = Path("/sys")) -> dict[str, Any]:
    """Return what may slow the machine down now: power source, low-power mode, heat, other programs.

    Args:
        system: Linux's /sys, or a replacement in tests.
    """
    if sys.platform == "darwin":
        drawn = re.search(r"Now drawing from '(AC|Battery) Power'", answer("pmset", "-g", "batt") or "")
        # Macs that also have a high mode say `powermode`.
        saves = re.search(r"^\s*(?:lowpowermode|powermode)\s+(\d)", answer("pmset", "-g") or "", re.MULTILINE)
        state = _whole(answer("osascript", "-l", "JavaScript", "-e", THERMAL_SCRIPT))
        readings = {
            "source": {"AC": "ac", "Battery": "battery"}[drawn[1]] if drawn else None,
            "low_power_mode": saves[1] == "1" if saves else None,
            "thermal_state": None if state is None else dict(enumerate(THERMAL_STATES)).get(state),
            "temperature_c": None,  # macOS does not tell it to users' programs
        }
    else:
        supplies = {
            (_read(one / "type") or "", _read(one / "online")) for one in (system / "class" / "power_supply").glob("*")
        }
        online = {state for kind, state in supplies if kind in ("Mains", "USB")}
        profile = _read(system / "firmware" / "acpi" / "platform_profile")
        zones = [_whole(_read(file)) for file in (system / "class" / "thermal").glob("thermal_zone*/temp")]
        heat = [zone for zone in zones if zone is not None]
        readings = {
            "source": "ac" if "1" in online else "battery" if any(kind == "Battery" for kind, _ in supplies) else None,
            "low_power_mode": None if profile is None else profile == "low-power",
            "thermal_state": None,
            "temperature_c": max(heat) / 1000 if heat else None,
        }
    return {**readings, "load_average": round(os.getloadavg()[0], 2)}


def describe_software() -> dict[str, Any]:
    """Return versions, the commit of a checkout, and the environment variables that change speed."""
    root = Path(mlx_lora.__file__).resolve().parents[1]
    checkout = ("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12")
    return {
        "commit": answer(*checkout) if (root / ".git").exists() else None,
        "python": platform.python_version(),
        "versions": package_versions(PACKAGES),
        "variables": {name: os.environ.get(name) for name in RECORDED_VARIABLES},
        "removed_variables": list(DROPPED_VARIABLES),
    }


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _whole(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None


# Peak rates

SIDES = (512, 1024, 2048, 4096)
ENOUGH_S = 0.1
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
QUANTIZED_SIDE = 2048
# Larger than every cache of a GPU. On a CPU, MLX allocates large outputs anew each time, and their page faults would be
# measured.
PASS_BYTES, CPU_PASS_BYTES = 256 << 20, 16 << 20
LAYOUT: dict[str, Any] = {"group_size": 64, "bits": 4}


def measure_rates(rounds: int = 5, sides: tuple[int, ...] = SIDES, pass_bytes: int | None = None) -> dict[str, Any]:
    """Return the rates of this machine.

    Args:
        rounds: of each measurement.
        sides: of the square products, smallest first.
        pass_bytes: size of the array that bandwidth is measured on; default: 256 MB, on a CPU 16 MB.

    Returns:
        `gemm_flops_per_s` by dtype; `quantized_matmul_flops_per_s` of 4-bit weights by rows (`1` is limited by reading
        weights, `1024` by computing) and of `dequantize_then_gemm`; `copy_bytes_per_s` and `triad_bytes_per_s` (read
        and written); `ceilings`: the rates that predictions use (mlx_lora/planner/machine.py).
    """
    kind = device.compute_dtype()
    on_cpu = device.current_device().backend == "cpu"
    pass_bytes = pass_bytes or (CPU_PASS_BYTES if on_cpu else PASS_BYTES)
    ceilings = measure_ceilings(rounds=rounds)
    return {
        "gemm_flops_per_s": {name: _gemm(dtype, rounds, sides) for name, dtype in DTYPES.items()},
        "quantized_matmul_flops_per_s": _quantized(kind, rounds, min(QUANTIZED_SIDE, max(sides))),
        "copy_bytes_per_s": _pass(lambda a, b: a + 1, 2, kind, rounds, pass_bytes),
        "triad_bytes_per_s": _pass(lambda a, b: a + b, 3, kind, rounds, pass_bytes),
        "ceilings": {
            "dtype": str(kind).removeprefix("mlx.core."),
            "flops_per_s": ceilings.flops_per_s,
            "bytes_per_s": ceilings.bytes_per_s,
            # On a GPU they take no longer than reading their argument; JSON has no infinity.
            "exponentials_per_s": ceilings.exponentials_per_s if math.isfinite(ceilings.exponentials_per_s) else None,
            "launch_s": ceilings.launch_s,
        },
    }


def describe_device() -> dict[str, Any]:
    """Return the default device as MLX describes it."""
    here = device.current_device()
    facts = {name: getattr(here, name) for name in ("name", "backend", "memory_bytes", "working_set_bytes")}
    return {**facts, "blas": here.blas or None, "compute_dtype": str(device.compute_dtype()).removeprefix("mlx.core.")}


def _gemm(dtype: mx.Dtype, rounds: int, sides: tuple[int, ...]) -> float:
    """Return the best rate over square products, in floating-point operations per second."""
    best = 0.0
    for side in sides:
        a, b = (mx.random.normal((side, side), key=mx.random.key(n)).astype(dtype) for n in (0, 1))
        mx.eval(a, b)
        [spent] = best_s([lambda a=a, b=b: [a @ b]], rounds, math.inf)
        best = max(best, 2 * side**3 / spent)
        if spent > ENOUGH_S:
            break
    return best


def _quantized(dtype: mx.Dtype, rounds: int, side: int) -> dict[str, float]:
    """Return the rates of both ways to multiply by a 4-bit weight (side, side)."""
    packed = mx.quantize(mx.random.normal((side, side), key=mx.random.key(0)).astype(dtype), **LAYOUT)
    mx.eval(packed)
    rates = {}
    for rows in (1, 1024):
        x = mx.random.normal((rows, side), key=mx.random.key(1)).astype(dtype)
        mx.eval(x)
        # The packed kernel takes a second for 1,024 rows on a CPU; fewer rows give the same rate.
        few = x[:64] if rows > 1 and device.current_device().backend == "cpu" else x
        make = lambda x=few: [mx.quantized_matmul(x, *packed, transpose=True, **LAYOUT)]  # noqa: E731
        [spent] = best_s([make], rounds, math.inf)
        rates[str(rows)] = 2 * len(few) * side**2 / spent
    [spent] = best_s([lambda x=x: [x @ mx.dequantize(*packed, **LAYOUT).T]], rounds, math.inf)
    rates["dequantize_then_gemm"] = 2 * len(x) * side**2 / spent
    return rates


def _pass(make: Callable, passes: int, dtype: mx.Dtype, rounds: int, pass_bytes: int) -> float:
    """Return the bytes per second of an elementwise operation over `pass_bytes`."""
    a, b = (mx.random.normal((pass_bytes // dtype.size,), key=mx.random.key(n)).astype(dtype) for n in (0, 1))
    mx.eval(a, b)
    return passes * a.nbytes / best_s([lambda: [make(a, b)]], rounds, math.inf)[0]


if __name__ == "__main__":
    print(json.dumps({"device": describe_device(), "rates": measure_rates()}))
