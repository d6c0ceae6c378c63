"""The table of Apple's chips, to plan runs for other Macs.

Figures are published theoretical peaks of the full configuration, from secondary sources for M1 to M4 and press reports
of Apple's announcement for M5; `estimate` marks unpublished ones. We measured none of them, so a plan that uses them is
a prediction. Memory is in GiB, as Apple sells it.

Source: published specifications; M4 GEMM at 2.9 of 4.3 TFLOPS, arXiv 2502.05317; M5 at 122 of 153 GB/s, press.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mlx_lora.planner.shapes import Machine
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import GIB

# The fraction of the listed peaks that real products and real passes over memory reach (module docstring).
REACHED_FLOPS = 2.9 / 4.3
REACHED_BANDWIDTH = 122 / 153


@dataclass(frozen=True)
class Chip:
    """One row of the table.

    Attributes:
        name: `M2 Pro`.
        gpu_cores: of the full configuration.
        gb_per_s: listed memory bandwidth.
        tflops: listed float32 peak.
        memory_gib: sizes sold.
        half_rate: rate of a 16-bit product as a multiple of the float32 rate; above 1 only with matrix units.
        status: of the TFLOPS, `listed` or `estimate`.
    """

    name: str
    gpu_cores: int
    gb_per_s: float
    tflops: float
    memory_gib: tuple[int, ...]
    half_rate: float = 1.0
    status: str = "listed"

    def machine(self, memory_gib: int | None = None, number_bytes: int = 2) -> Machine:
        """Return a machine with this chip and memory (by default the smallest size sold)."""
        memory = (memory_gib or self.memory_gib[0]) * GIB
        return Machine(f"{self.name}, {memory // GIB} GB", "metal", memory, working_set(memory), number_bytes)


CHIPS = (
    Chip("M1", 8, 68, 2.6, (8, 16)),
    Chip("M1 Pro", 16, 200, 5.2, (16, 32)),
    Chip("M1 Max", 32, 400, 10.4, (32, 64)),
    Chip("M1 Ultra", 64, 800, 20.8, (64, 128)),
    Chip("M2", 10, 100, 3.6, (8, 16, 24)),
    Chip("M2 Pro", 19, 200, 6.8, (16, 32)),
    Chip("M2 Max", 38, 400, 13.6, (32, 64, 96)),
    Chip("M2 Ultra", 76, 800, 27.2, (64, 128, 192)),
    Chip("M3", 10, 100, 3.6, (8, 16, 24)),
    Chip("M3 Pro", 18, 150, 6.4, (18, 36)),
    Chip("M3 Max", 40, 400, 14.2, (36, 48, 64, 96, 128)),
    Chip("M3 Ultra", 80, 819, 28.0, (96, 256, 512), status="estimate"),
    Chip("M4", 10, 120, 4.3, (16, 24, 32)),
    Chip("M4 Pro", 20, 273, 8.7, (24, 48, 64)),
    Chip("M4 Max", 40, 546, 17.4, (36, 48, 64, 128)),
    # Others measured 3.8 TFLOPS in float32; the 16-bit rate is that of the related A19's matrix units.
    Chip("M5", 10, 153, 3.8, (16, 24, 32), 4.0, "estimate"),
    Chip("M5 Pro", 20, 307, 7.6, (24, 48, 64), 4.0, "estimate"),
    Chip("M5 Max", 40, 614, 18.0, (36, 48, 64, 128), 4.0, "estimate"),
)


def working_set(memory_bytes: int) -> int:
    """Return the bytes that macOS lets the GPU wire by default: about two thirds up to 36 GiB, three quarters above.

    This is an estimate (Metal's `recommendedMaxWorkingSetSize` is exact): macOS allows 65% to 75%, depending on the size.
    """
    share = 2 / 3 if memory_bytes <= 36 * GIB else 3 / 4
    return int(memory_bytes * share)


def find_chip(name: str) -> Chip:
    """Return a chip by name, regardless of spaces and case, with or without `Apple`.

    Raises:
        InputError: there is no such chip; the message has similar names.
    """
    wanted = _plain(name)
    for chip in CHIPS:
        if _plain(chip.name) == wanted:
            return chip
    names = [chip.name for chip in CHIPS]
    near = difflib.get_close_matches(name.removeprefix("Apple ").title(), names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"--chip {name!r}: not a known chip; {hint}the known ones are {', '.join(names)}")


def known_chip(name: str) -> Chip | None:
    """Return the chip with a device's name (`Apple M2 Pro`), None for other machines."""
    return next((chip for chip in CHIPS if _plain(chip.name) == _plain(name)), None)


def _plain(name: str) -> str:
    return name.lower().replace("apple", "").replace(" ", "").replace("-", "")
