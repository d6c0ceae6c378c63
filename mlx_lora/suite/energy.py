"""Measure the energy of a run if the system allows it to be read without a password."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_lora.suite.machine_facts import answer

PACKAGE_COUNTER = Path("/sys/class/powercap/intel-rapl:0")
SAMPLE_MS = 500
POWER = re.compile(r"Combined Power \(CPU \+ GPU \+ ANE\): (\d+) mW")


class EnergyMeter:
    """Measures the energy of the chip since the start (macOS: CPU, GPU and ANE; Linux: the CPU package).

    Attributes:
        source: what is read, or why nothing can be read.
    """

    def __init__(self, counter: Path = PACKAGE_COUNTER):
        self._counter, self._child, self._joules = counter, None, 0.0
        self._last: int | None = None
        if sys.platform == "darwin":
            self.source = self._start_powermetrics()
        else:
            self._last = self._read_counter()
            readable = self._last is not None
            self.source = "intel-rapl package" if readable else f"none: {counter} does not exist or is not readable"

    def joules(self) -> float | None:
        """Return the energy so far in joules, None if it cannot be read."""
        if self._child is not None:
            return self._joules
        now = self._read_counter() if self._last is not None else None
        if now is None or self._last is None:
            return None
        # The counter wraps around at the end of its range.
        spent = now - self._last if now >= self._last else now - self._last + self._range()
        self._last, self._joules = now, self._joules + spent / 1e6
        return self._joules

    def close(self) -> None:
        """Stop reading."""
        if self._child is not None:
            self._child.terminate()
            self._child.wait(timeout=10)

    def _start_powermetrics(self) -> str:
        """Start powermetrics if we are root, or can be without a password; return the source's name."""
        prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
        if prefix and answer("sudo", "-n", "-l", "powermetrics") is None:
            return "none: powermetrics needs root (run as root, or allow it in sudoers without a password)"
        command = [*prefix, "powermetrics", "--samplers", "cpu_power,gpu_power", "-i", str(SAMPLE_MS)]
        try:
            self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError as error:
            return f"none: powermetrics did not start ({error.strerror})"
        threading.Thread(target=self._follow, daemon=True).start()
        return "powermetrics, combined power"

    def _follow(self) -> None:
        """Add up the samples, each of which is the mean power since the one before."""
        before = time.monotonic()
        for line in (self._child and self._child.stdout) or ():
            if found := POWER.search(line):
                now = time.monotonic()
                self._joules += int(found[1]) / 1000 * (now - before)
                before = now

    def _read_counter(self) -> int | None:
        try:
            return int((self._counter / "energy_uj").read_text())
        except (OSError, ValueError):
            return None

    def _range(self) -> int:
        return int((self._counter / "max_energy_range_uj").read_text())


@contextmanager
def energy_meter() -> Iterator[EnergyMeter]:
    """Yield a meter that is stopped at the end of the block, even after an error."""
    meter = EnergyMeter()
    try:
        yield meter
    finally:
        meter.close()
