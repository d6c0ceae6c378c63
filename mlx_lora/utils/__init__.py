"""Wraps the machine and the operating system: devices, files, caches, processes, the hub."""
