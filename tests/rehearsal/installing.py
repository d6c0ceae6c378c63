"""Install the rehearsal in this process, once mlx_lora is imported."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

SWITCH = "MLX_LORA_REHEARSE"  # set: programs that a test starts are rehearsed too (site/sitecustomize.py)
FLOAT32 = "MLX_LORA_REHEARSE_FLOAT32"  # set while a test of exact equality runs: it and its programs compute in float32

_installed: list[str] = []


def install_all() -> None:
    """Let this process be a Mac, and import what has to know."""
    from rehearsal import kernels, system

    # Only here: a program that a test starts should not wait for mlx-lm, and no such test has these models.
    kernels.install()
    modules = [importlib.import_module(name) for name in system.PLATFORM_READERS]
    install()
    for module in modules:
        system.tell(module)


def install() -> None:
    """Let this process be a Mac, except for the modules that read its platform: each is told when it is imported."""
    if SWITCH in _installed:
        return
    _installed.append(SWITCH)
    from mlx_lora.utils import device
    from rehearsal import fake_metal, refusals, system

    refusals.install()
    device.mx = fake_metal.FakeMetal()
    # What follows from a GPU's speed, which this machine does not have: how much work a trial may take.
    device.trial_flops = lambda: 2e9
    device.compile_for(0)
    system.install()
    _obey_float32()
    os.environ[SWITCH] = "1"
    # A program that asks for short command buffers starts itself anew, which a test's process must not.
    for name in device.SHORT_BUFFERS:
        os.environ.setdefault(name, device.SHORT_BUFFERS[name])
    paths = [str(Path(__file__).parent / "site"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))


def _obey_float32() -> None:
    """Let `compute_dtype("auto")` answer float32 while FLOAT32 is set, also where a module has imported the function."""
    from mlx_lora.utils import device

    plain = device.compute_dtype

    def compute_dtype(name: str = "auto") -> Any:
        return plain("float32" if name == "auto" and FLOAT32 in os.environ else name)

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("mlx_lora") and vars(module).get("compute_dtype") is plain:
            module.compute_dtype = compute_dtype
