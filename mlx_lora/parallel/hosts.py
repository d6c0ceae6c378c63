"""Ask the machines of a host file over ssh what they are, and measure the connection between ranks.

A host file is read as mlx.launch reads it. Of a connection it is measured how long a small message takes, and how fast a
large one goes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import GIB, counted

if TYPE_CHECKING:
    from mlx_lora.parallel.ranks import SeveralRanks

# Machines

SSH_S = 10
HERE = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class HostMac:
    """What is known of a Mac.

    Attributes:
        chip: as macOS names it, `Apple M4 Pro`.
        memory_gb: of it.
        working_set_bytes: that a run may use; None: not asked.
    """

    chip: str
    memory_gb: int
    working_set_bytes: int | None = None


def hosts_of(file: Path) -> list[str]:
    """Return the names by which ssh reaches the machines of a host file.

    Raises:
        InputError: it is not a host file.
    """
    entries = _read_file(file)
    entries = entries.get("hosts", entries) if isinstance(entries, dict) else entries
    try:
        hosts = [str(entry["ssh"]) for entry in entries]
    except (KeyError, TypeError):
        raise InputError(
            f'--hostfile {file}: not a JSON list of machines; write [{{"ssh": "first.local", "ips": ["10.0.0.1"]}}, ...]'
        ) from None
    if len(hosts) < 2:
        raise InputError(f"--hostfile {file}: {counted(len(hosts), 'machine')}; name two or more")
    return hosts


def macs_of(file: Path) -> tuple[list[HostMac], dict[str, float] | None]:
    """Return the Macs of a host file, and the link that was measured between them.

    Args:
        file: as mlx.launch reads it: each Mac is asked over ssh, and no link is known. Or what `mlx-lora cluster --json`
            printed, which has all of it.

    Raises:
        InputError: it is neither, or a machine cannot be asked.
    """
    found = _read_file(file)
    if isinstance(found, dict) and "machines" in found:
        try:
            macs = [
                HostMac(str(one["device"]), round(one["memory_bytes"] / GIB), int(one["working_set_bytes"]))
                for one in found["machines"]
            ]
            link = found["link"] and {name: float(found["link"][name]) for name in ("bytes_per_s", "latency_s")}
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"--hostfile {file}: not what `mlx-lora cluster --json` prints; run that again, or name a host file"
            ) from None
        return macs, link
    return [ask(host, file) for host in hosts_of(file)], None


def ask(host: str, file: Path) -> HostMac:
    """Return a Mac's chip and memory.

    Raises:
        InputError: it cannot be reached, or is no Mac.
    """
    words = ["sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize"]
    with suppress(OSError, ValueError, subprocess.TimeoutExpired):
        ran = subprocess.run([*_ssh_words(host), *words], capture_output=True, text=True, timeout=2 * SSH_S)
        chip, memory = ran.stdout.split("\n")[:2] if ran.returncode == 0 else ("", "")
        if memory.isdecimal():
            return HostMac(chip.strip(), round(int(memory) / GIB))
    raise InputError(
        f"--hostfile {file}: {host} cannot be asked for its chip and memory (`ssh {host} sysctl -n machdep.cpu.brand_string`); "
        "make sure that it is a Mac and that ssh asks no question, or name chips and memory with --macs"
    )


def reachable(host: str) -> bool:
    """Return whether ssh reaches a machine without a question; this machine is always reachable."""
    try:
        return subprocess.run([*_ssh_words(host), "true"], capture_output=True, timeout=2 * SSH_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _ssh_words(host: str) -> list[str]:
    """Return the words that come before a command on a machine."""
    return [] if host in HERE else ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_S}", "--", host]


def _read_file(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--hostfile {file}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise InputError(
            f'--hostfile {file}: not a JSON list of machines; write [{{"ssh": "first.local", "ips": ["10.0.0.1"]}}, ...]'
        ) from None


# Connection

SMALL_ROUNDS, LARGE_ROUNDS = 20, 5
LARGE_BYTES = 1 << 25


@dataclass(frozen=True)
class LinkRates:
    """What was measured.

    Attributes:
        latency_s: of a small message to all ranks and back.
        bytes_per_s: that each rank sends while it receives as many.
    """

    latency_s: float
    bytes_per_s: float


def probe_link(ranks: SeveralRanks, large_bytes: int = LARGE_BYTES) -> LinkRates:
    """Return the rates of the connection; every rank must call this.

    Args:
        ranks: all ranks.
        large_bytes: of a large message.
    """
    small, large = mx.zeros((1,), mx.uint8), mx.zeros((large_bytes,), mx.uint8)
    mx.eval(small, large)
    latency_s = _median_s(ranks, small, SMALL_ROUNDS)
    return LinkRates(latency_s, (ranks.size - 1) * large_bytes / _median_s(ranks, large, LARGE_ROUNDS))


def _median_s(ranks: SeveralRanks, message: mx.array, rounds: int) -> float:
    """Return the median seconds of gathering a message, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        ranks.meet()
        start = time.perf_counter()
        mx.eval(ranks.gathered(message))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
