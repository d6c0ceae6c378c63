"""Rehearse a program that a rehearsed test started: Python imports this first, from PYTHONPATH."""

import importlib.abc
import importlib.util
import os
import sys

DEVICE = "mlx_lora.utils.device"


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Installs the rehearsal when the device module is imported, and tells the modules that read the platform."""

    def __init__(self):
        self._loaders, self._busy = {}, set()

    def find_spec(self, name, path=None, target=None):
        if name not in NAMES or name in self._busy:
            return None
        self._busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy.discard(name)
        if spec is not None and spec.loader is not None:
            self._loaders[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self._loaders[spec.name].create_module(spec)

    def exec_module(self, module):
        self._loaders[module.__name__].exec_module(module)
        module.__spec__.loader = module.__loader__ = self._loaders[module.__name__]
        if module.__name__ == DEVICE:
            installing.install()
        system.tell(module)


if os.environ.get("MLX_LORA_REHEARSE"):
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))  # tests/
    from rehearsal import installing, system

    NAMES = system.PLATFORM_READERS
    sys.meta_path.insert(0, _AfterImport())
