"""Read what a result records about the machine, its power and the software; None for what cannot be read.

This file does not import mlx: suite/rates.py asks the backend in a process of its own. On macOS, facts come from
`sysctl`, `ioreg`, `sw_vers`, `pmset` and, for the thermal state, `osascript`, all of which are part of macOS; on Linux,
from /proc and /sys.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx_lora

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
    common = {"architecture": platform.machine(), "cpu_cores": os.cpu_count(), "memory_bytes": memory_bytes()}
    return {**common, **(_mac() if sys.platform == "darwin" else _linux())}


def memory_bytes() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mac() -> dict[str, Any]:
    return {
        "chip": answer("sysctl", "-n", "machdep.cpu.brand_string"),
        "model": answer("sysctl", "-n", "hw.model"),
        "gpu_cores": gpu_core_count(answer("ioreg", "-rc", "AGXAccelerator", "-d", "1") or ""),
        "performance_cores": _whole(answer("sysctl", "-n", "hw.perflevel0.physicalcpu")),
        "efficiency_cores": _whole(answer("sysctl", "-n", "hw.perflevel1.physicalcpu")),
        "system": "macOS",
        "system_version": answer("sw_vers", "-productVersion"),
        "system_build": answer("sw_vers", "-buildVersion"),
    }


def gpu_core_count(registry: str) -> int | None:
    """Return the number of GPU cores in the output of `ioreg`."""
    found = re.search(r'"gpu-core-count" = (\d+)', registry)
    return int(found[1]) if found else None


def _linux() -> dict[str, Any]:
    name = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return {
        "chip": name[1].strip() if name else None,
        "model": _read("/sys/devices/virtual/dmi/id/product_name"),
        "gpu_cores": None,
        "performance_cores": None,
        "efficiency_cores": None,
        "system": platform.system(),
        "system_version": platform.release(),
        "system_build": None,
    }


def describe_power() -> dict[str, Any]:
    """Return what may slow the machine down now: power source, low-power mode, heat, other programs."""
    readings = _mac_power() if sys.platform == "darwin" else _linux_power(Path("/sys"))
    return {**readings, "load_average": round(os.getloadavg()[0], 2)}


def _mac_power() -> dict[str, Any]:
    """Return macOS's readings; it does not tell users' programs the temperature."""
    return {
        "source": mac_source(answer("pmset", "-g", "batt") or ""),
        "low_power_mode": mac_low_power(answer("pmset", "-g") or ""),
        "thermal_state": thermal_state(answer("osascript", "-l", "JavaScript", "-e", THERMAL_SCRIPT)),
        "temperature_c": None,
    }


def mac_source(batteries: str) -> str | None:
    """Return `ac` or `battery`, given the output of `pmset -g batt`."""
    found = re.search(r"Now drawing from '(AC|Battery) Power'", batteries)
    return {"AC": "ac", "Battery": "battery"}[found[1]] if found else None


def mac_low_power(settings: str) -> bool | None:
    """Tell whether the output of `pmset -g` has `lowpowermode` 1, or `powermode` 1 on Macs that also have a high mode."""
    found = re.search(r"^\s*(?:lowpowermode|powermode)\s+(\d)", settings, re.MULTILINE)
    return found[1] == "1" if found else None


def thermal_state(number: str | None) -> str | None:
    """Return the name of a thermal state of NSProcessInfo."""
    value = _whole(number)
    return THERMAL_STATES[value] if value is not None and 0 <= value < len(THERMAL_STATES) else None


def _linux_power(system: Path) -> dict[str, Any]:
    """Return Linux's readings.

    Args:
        system: /sys, or a replacement in tests.
    """
    supplies = {
        (_read(one / "type") or "", _read(one / "online")) for one in (system / "class" / "power_supply").glob("*")
    }
    online = {state for kind, state in supplies if kind in ("Mains", "USB")}
    source = "ac" if "1" in online else "battery" if any(kind == "Battery" for kind, _ in supplies) else None
    profile = _read(system / "firmware" / "acpi" / "platform_profile")
    zones = [_whole(_read(file)) for file in (system / "class" / "thermal").glob("thermal_zone*/temp")]
    heat = [zone for zone in zones if zone is not None]
    return {
        "source": source,
        "low_power_mode": None if profile is None else profile == "low-power",
        "thermal_state": None,
        "temperature_c": max(heat) / 1000 if heat else None,
    }


def describe_software() -> dict[str, Any]:
    """Return versions, the commit of a checkout, and the environment variables that change speed."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "variables": {name: os.environ.get(name) for name in RECORDED_VARIABLES},
        "removed_variables": list(DROPPED_VARIABLES),
    }


def commit() -> str | None:
    """Return the commit of the checkout that runs, with `-dirty` if files differ; None if the package is installed."""
    root = Path(mlx_lora.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    return answer("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


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
