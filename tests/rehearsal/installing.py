"""Install the rehearsal in this process, once mlx_lora is imported."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

SWITCH = "MLX_LORA_REHEARSE"  # set: programs that a test starts are rehearsed too (site/sitecustomize.py)

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
    os.environ[SWITCH] = "1"
    # A program that asks for short command buffers starts itself anew, which a test's process must not.
    for name in device.SHORT_BUFFERS:
        os.environ.setdefault(name, device.SHORT_BUFFERS[name])
    paths = [str(Path(__file__).parent / "site"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
