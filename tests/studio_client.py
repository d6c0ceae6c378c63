"""A studio in this process, with a tiny model and data in its home, and run folders as a run leaves them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from starlette.testclient import TestClient

from mlx_lora.studio.app import make_studio
from mlx_lora.studio.folders import Folders
from mlx_lora.utils.guard import GuardLimits

ADDRESS = "http://127.0.0.1:8090"
UPLOAD = "/api/data/upload"


@contextmanager
def studio(home: Path, key: str | None = None, most: int = 10**7, **folders: tuple[Path, ...]) -> Iterator[TestClient]:
    """Yield a client of a studio with this home."""
    known = Folders(home.resolve(), **folders)
    known.make()
    guard = GuardLimits(key, True, open_folder="/static/", streamed=(UPLOAD,))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with TestClient(make_studio(known, guard, most), base_url=ADDRESS, headers=headers) as client:
        yield client


def furnish(home: Path, model: Path, chats: Path | None = None) -> tuple[str, str]:
    """Put a model and data into a studio's home, and return both as requests name them."""
    shutil.copytree(model, home / "models" / "tiny")
    data = home / "data" / "chats.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    if chats is not None:
        shutil.copyfile(chats, data)
    return str((home / "models" / "tiny").resolve()), str(data.resolve())


def upload(client: TestClient, name: str, content: bytes, kind: str = "application/octet-stream") -> Any:
    """Upload a file, and return the answer."""
    return client.post(UPLOAD, params={"name": name}, content=content, headers={"Content-Type": kind})


def metric(step: int, **values: Any) -> dict[str, Any]:
    """Return a line of metrics.jsonl."""
    line = {
        "step": step, "epoch": step / 10, "loss": 2.0 - step / 1e5, "val_loss": None, "learning_rate": 1e-4, "grad_norm": 1.0,
        "supervised_tokens_per_s": 90.0, "tokens_per_s": 100.0, "examples": 4, "supervised_tokens": 40, "real_tokens": 50,
        "positions": 60, "shapes": ["2x32"], "padding_fraction": 0.1, "skipped_steps": 0, "peak_memory_bytes": 10**8,
        "process_peak_bytes": 2 * 10**8, "elapsed_s": step / 10,
    }  # fmt: skip
    return {**line, **values}


def write_run(folder: Path, steps: int = 10, ended: bool = True, **settings: Any) -> Path:
    """Write a run folder of a terminal."""
    folder.mkdir(parents=True)
    content = {
        "model": "org/model",
        "data": "a.jsonl",
        "method": "lora",
        "objective": "sft",
        "iters": steps,
        **settings,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    lines = [json.dumps(metric(step)) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    facts = {"command": "mlx-lora train --model org/model", "planned_peak_bytes": 10**8, "ended": ended}
    facts["samples"] = [{"prompt": "Say 1", "before": "<script>alert(1)</script>", "after": "1", "specials": []}]
    (folder / "report.json").write_text(json.dumps(facts))
    (folder / "adapters.safetensors").write_bytes(b"")
    (folder / "adapter_config.json").write_text("{}")
    return folder


def wait_for(found: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Return what `found` returns as soon as it is true."""
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.1)
    return value


def state_of(client: TestClient, number: str) -> str:
    """Return a run's state as the list has it."""
    return next(run["state"] for run in client.get("/api/runs").json()["runs"] if run["id"] == number)
