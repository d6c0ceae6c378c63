"""Divide a machine's cores among the ranks that a launcher has started on it.

A BLAS starts a thread for every core in each process, and a thread that waits for another one spins. Two ranks with two threads
each on two cores took minutes for products of seconds. This file must not import mlx, because it decides before a BLAS is
loaded, and only what is quick to import.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

# What a user may have set; the first one is OpenBLAS's own.
THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
)  # fmt: skip
# The launchers' variables with the number of processes on this machine: Open MPI, MPICH and Intel MPI.
LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def share_cores() -> None:
    """Set the number of BLAS threads to this rank's share of the cores, if there are several ranks here and no user's number."""
    ranks = local_ranks(os.environ)
    if ranks > 1 and not any(os.environ.get(name) for name in THREAD_VARIABLES):
        share = str(max(1, usable_cores() // ranks))
        os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), share))


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_ranks(environment: Mapping[str, str]) -> int:
    """Return how many ranks of this run are on this machine, 1 if that is not known.

    Args:
        environment: os.environ, or a mapping like it. What is wrong in it is reported later (parallel/ranks.py).
    """
    for name in LOCAL_SIZES:
        if environment.get(name, "").isdecimal():
            return max(1, int(environment[name]))
    try:
        hosts = json.loads(Path(environment["MLX_HOSTFILE"]).read_text(encoding="utf-8"))
        addresses = [host[0].rpartition(":")[0] for host in hosts]  # a rank may have several ports at one address
        return addresses.count(addresses[int(environment["MLX_RANK"])])
    except (KeyError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return 1


def share_words() -> str:
    """Return how the ranks of this run share this machine's cores, for the line about them; empty for one rank alone."""
    ranks = local_ranks(os.environ)
    if ranks == 1:
        return ""
    threads = next((os.environ[name] for name in THREAD_VARIABLES if os.environ.get(name)), "all")
    return f"; {ranks} share this machine's {usable_cores()} cores, each with {threads} BLAS thread{'s' * (threads != '1')}"
