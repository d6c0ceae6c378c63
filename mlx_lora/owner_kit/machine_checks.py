"""Check what may slow this machine down or change its numbers: power, heat, other programs, a virtual GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from mlx_lora.owner_kit.kit_check import Finding, Kit, KitCheck
from mlx_lora.suite.fresh_process import run_process
from mlx_lora.suite.machine_facts import describe_machine, describe_power
from mlx_lora.system import device
from mlx_lora.system.versions import package_versions

PEERS = ("torch", "peft", "transformers")
BUSY_LOAD = 1.0  # per core
HOT = ("serious", "critical")
HOT_C = 95.0
# What a virtual GPU must be able to compute, or no check can run: a product, its gradient, 16 bits, random numbers.
PROBE = """
import mlx_lora, mlx.core as mx
x = mx.random.normal((64, 64)).astype(mx.bfloat16)
mx.eval(mx.grad(lambda w: mx.softmax(x @ w, axis=-1).square().sum())(x), mx.fast.rms_norm(x, x[0], 1e-5))
"""


def machine_checks() -> list[KitCheck]:
    """Return the checks of the machine itself; the short doctor has others."""
    return [KitCheck("machine", "GPU", check_gpu), KitCheck("machine", "power and load", check_power)]


def peer_versions() -> dict[str, str | None]:
    """Return the versions of packages that training is compared with; None for those that are not installed."""
    return package_versions(PEERS)


def is_virtual(here: device.Device) -> bool:
    """Return whether the GPU is that of a virtual machine, as on GitHub's runners (`Apple Paravirtual device`)."""
    return here.backend != "cpu" and "virtual" in here.name.lower()


def virtual_words(here: device.Device) -> str:
    """Return what is said of a virtual GPU."""
    return f"a virtual GPU ({here.name})"


def gpu_problem(kit: Kit) -> str:
    """Return why the GPU cannot compute, empty if it can; asked in a process of its own, which it may end."""
    ended = run_process([sys.executable, "-c", PROBE], kit.work / "probe.log")
    return "" if ended.code == 0 else f"a probe ended with code {ended.code}, {ended.last_words}"


def check_gpu(kit: Kit) -> Iterator[Finding]:
    """Say which device computes, and whether it is a real one."""
    if is_virtual(kit.here):
        words = f"{virtual_words(kit.here)}: its memory and speed are not those of a chip, so they are left out"
        yield Finding("device", "warning", words, advice="run this on a Mac itself for memory and speed")
    elif kit.on_gpu:
        cores = describe_machine()["gpu_cores"]
        yield Finding("device", "ok", f"{kit.here.header()}{f', {cores} GPU cores' if cores else ''}")
    else:
        words = f"{kit.here.header()}: no GPU, so functions are compared with their definitions on the CPU"
        yield Finding("device", "ok", words)


def check_power(kit: Kit) -> Iterator[Finding]:
    """Say what slows measurements down now."""
    power, cores = describe_power(), describe_machine()["cpu_cores"] or 1
    yield _power_line("source", power["source"] == "battery", power["source"] or "not known", "plug in the charger")
    low = power["low_power_mode"]
    words = "not known" if low is None else "on" if low else "off"
    yield _power_line("low-power mode", low is True, words, "turn it off before you compare speeds")
    heat, state = power["temperature_c"], power["thermal_state"]
    hot = state in HOT or (heat is not None and heat > HOT_C)
    words = state or ("not known" if heat is None else f"{heat:.0f} °C at the hottest sensor")
    yield _power_line("heat", hot, words, "let the machine cool, then run --again --group speed")
    load = power["load_average"]
    words = f"load {load:g} over the last minute on {cores} cores"
    yield _power_line(
        "other programs", load > BUSY_LOAD * cores, words, "close other programs before you compare speeds"
    )


def _power_line(name: str, slows: bool, words: str, advice: str) -> Finding:
    return Finding(name, "warning" if slows else "ok", words, advice=advice if slows else "")
