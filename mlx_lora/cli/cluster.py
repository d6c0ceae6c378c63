"""Check several Macs before a run on all of them: reachable, the same versions and model files, disk, and their link.

python -m mlx_lora cluster --hostfile macs.json
python -m mlx_lora cluster --hostfile macs.json --backend jaccl --model ~/models/llama-70b --json
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from huggingface_hub import snapshot_download

from mlx_lora.api import options as flags
from mlx_lora.cli import PAGES
from mlx_lora.parallel.hosts import hosts_of, probe_link, reachable
from mlx_lora.parallel.ranks import SeveralRanks, find_launch, together
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, free_on_disk
from mlx_lora.utils.text import installed_versions

HEADER_BYTES = 1 << 20  # of each file: names, shapes and dtypes of a safetensors file's tensors
# What must be equal on all machines, in addition to the model's files.
SAME = ("mlx-lora", "mlx", "mlx-lm", "python")


@click.command(cls=flags.ShortCommand)
@click.option(
    "--hostfile", type=str, default=None, metavar="FILE", help="JSON list of the machines, in mlx.launch's format."
)
@click.option(
    "--backend",
    type=click.Choice(["ring", "jaccl"]),
    default="ring",
    show_default=True,
    help="How the machines communicate, as for mlx.launch: ring (TCP) or jaccl (RDMA over Thunderbolt 5).",
)
@click.option("--model", type=str, default=None, help="A model whose files all machines should have: a path or hub id.")
@flags.json_option({
    "machines": "array: each with host, device, memory_bytes, working_set_bytes, free_bytes, versions and model",
    "link": "object|null: the link between them, as it was measured",
    "problems": "array: what is wrong, a sentence each",
})  # fmt: skip
def main(hostfile: str | None, backend: str, model: str | None, as_json: bool) -> int:
    """Check that the machines of a host file are ready to train together; the exit code is 1 if something is wrong."""
    if find_launch(dict(os.environ)) is None:
        if hostfile is None:
            raise InputError("--hostfile is required: a JSON list of machines, as docs/distributed.md shows")
        unreachable = [host for host in hosts_of(Path(hostfile)) if not reachable(host)]
        if unreachable:
            raise InputError(
                f"--hostfile {hostfile}: `ssh {unreachable[0]} true` asks a question or fails; allow Remote Login there, "
                f"and copy your key with `ssh-copy-id {unreachable[0]}`"
            )
        here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        if (launch := shutil.which("mlx.launch", path=here)) is None:
            raise InputError("mlx.launch: not found beside this Python; reinstall mlx")
        words = [
            launch,
            "--backend",
            backend,
            "--hostfile",
            hostfile,
            "--",
            sys.executable,
            "-m",
            "mlx_lora",
            "cluster",
        ]
        words += [*(["--model", model] if model else []), *(["--json"] if as_json else [])]
        return subprocess.run(words).returncode
    with together(console.describe_error) as ranks:
        machines = ranks.everyone(facts_here(model))
        rates = probe_link(ranks) if isinstance(ranks, SeveralRanks) else None
        problems = problems_of(machines)
        facts = {"machines": machines, "link": rates and asdict(rates), "problems": problems}
        if ranks.leads:
            console.print_json(facts) if as_json else click.echo(flags.render(PAGES / "cluster.txt", facts))
        ranks.meet()
    return 1 if problems else 0


def facts_here(model: str | None) -> dict[str, Any]:
    """Return what this machine says of itself.

    `free_bytes` are on the disk of the cache; `model` is a check sum of the model's files, empty if it does not have them.
    """
    here = device.current_device()
    return {
        "host": socket.gethostname(), "device": here.name, "memory_bytes": here.memory_bytes,
        "working_set_bytes": here.working_set_bytes, "free_bytes": free_on_disk(cache_dir("models")),
        "versions": installed_versions(), "model": None if model is None else files_sum(model),
    }  # fmt: skip


def files_sum(model: str) -> str:
    """Return a check sum of a model's files: names, sizes, and how each begins; empty if they are not on this disk."""
    path = Path(model).expanduser()
    if not path.exists():
        try:
            path = Path(snapshot_download(model, local_files_only=True))
        except (OSError, ValueError):
            return ""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("config.json")])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(HEADER_BYTES))
    return digest.hexdigest()[:16] if files else ""


def problems_of(machines: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for everything that would keep the machines from one run."""
    problems, first = [], machines[0]
    for rank, machine in enumerate(machines):
        who = f"rank {rank} ({machine['host']})"
        for name in SAME:
            own, other = machine["versions"].get(name), first["versions"].get(name)
            if own != other:
                problems.append(f"{who}: {name} {own}, and rank 0 has {other}; install the same version")
        if machine["model"] == "":
            problems.append(f"{who}: does not have the model's files; copy them there, or download them")
        elif machine["model"] != first["model"] and first["model"]:
            problems.append(f"{who}: has other model files than rank 0; copy rank 0's there")
    return problems
