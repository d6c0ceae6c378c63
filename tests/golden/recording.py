"""Record a tree's results: SHA-256 of every array that its runs wrote, the metrics and the plans."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from golden.cases import CASES, PLANNED_HERE, RATE, STOPPED_AFTER, Case, flags_of, settings_of
from golden.inputs import make_inputs

WORKER = Path(__file__).with_name("worker.py")
# On a busy machine; a run of several processes whose collectives do not match waits forever.
TIMEOUT_S, RANKS_TIMEOUT_S = 3600.0, 600.0
PERTURBED = {"learning_rate": 1.1}  # what --perturb changes, and its factor
PACKAGES = ("mlx", "mlx-lm", "numpy", "scipy-openblas32", "tokenizers", "transformers")
# A plan for a fixed Mac has nothing of this machine. One for this machine is compared without the keys below.
CHIP, MACS = ("--chip", "M2 Pro", "--memory-gb", "16"), ("--macs", "M4 Pro:48,M2 Max:32")
# Times, memory and speed in metrics.jsonl: they differ between two runs of the same tree.
MEASURED = ("disk_wait_share", "elapsed_s", "peak_memory_bytes", "process_peak_bytes", "rollout_share")
MEASURED_ENDINGS = ("_per_s",)
# Of a plan for this machine: its memory, what follows from it, and times from rates that are measured here.
OF_MACHINE = (
    "machine.memory_bytes", "machine.working_set_bytes", "cache_bytes", "needed_bytes", "predicted", "trunk",
)  # fmt: skip
# In every plan: texts for people, whose wording may change.
TEXTS = {"words", "warnings", "note", "not_known", "verdict", "suggested"}


def record(tree: Path, names: list[str] | None = None, perturb: str | None = None) -> dict[str, Any]:
    """Run the cases with a tree's package and return the results, as JSON values; progress goes to standard error.

    Args:
        tree: a folder with `mlx_lora`.
        names: of the cases; None: all.
        perturb: of PERTURBED; all cases run with it changed.
    """
    tree, chosen = tree.resolve(), {name: CASES[name] for name in names or CASES}
    rate = RATE * (PERTURBED[perturb] if perturb else 1.0)
    root = Path(tempfile.mkdtemp(prefix="golden-"))
    try:
        inputs = make_inputs(root / "in")
        print(f"{tree}: {len(chosen)} cases", file=sys.stderr)
        problems = run_cases(tree, root, chosen, rate)
        cases = {name: read_case(root / name, case, problems[name]) for name, case in chosen.items()}
    finally:
        shutil.rmtree(root)
    return {"machine": machine(), "perturbed": perturb, "inputs": inputs, "cases": cases}


def machine() -> dict[str, str]:
    """Return what rounding depends on: the processor, Python's and the packages' versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # OpenBLAS is on Linux only
            versions[name] = "not installed"
    return {"processor": processor(), "system": platform.system(), "python": platform.python_version(), **versions}


def processor() -> str:
    """Return the processor's name."""
    name = platform.processor() or platform.machine()
    if (facts := Path("/proc/cpuinfo")).exists():
        lines = facts.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return name


def actions(name: str, case: Case, rate: float) -> list[tuple[str, dict[str, Any]]]:
    """Return what a single process does for a case: its plans, and without ranks its run and a resumed one."""
    settings = settings_of(case, rate)
    model, data = f"../in/{case.model}", f"../in/{case.data}"
    asked = ["--model", model, "--data", data, *flags_of(settings)]
    todo: list[tuple[str, dict[str, Any]]] = []
    if case.reference:
        first = ["--model", model, "--data", "../in/said.jsonl", *flags_of(settings_of(Case(), rate))]
        todo.append(("command", {"words": ["train", *first, "--adapter-path", "first"]}))
    plans = {"plan-chip": CHIP} if case.ranks == 1 else {"plan-macs": MACS}
    for plan, flags in (plans | ({"plan-here": ()} if name in PLANNED_HERE else {})).items():
        todo.append(("command", {"words": ["plan", *asked, *flags, "--json"], "out": f"{plan}.json"}))
    if case.python:
        todo.append(("train", {"model": model, "data": data, "folder": "run", "settings": settings}))
    elif case.ranks == 1:
        todo.append(train_action(case, rate))
    if case.resumed:
        todo.append(("stop", {"folder": "run", "copy": "resumed", "step": STOPPED_AFTER}))
        todo.append(train_action(case, rate, "resumed", "--resume"))
    return todo


def train_action(case: Case, rate: float, folder: str = "run", *more: str) -> tuple[str, dict[str, Any]]:
    """Return the training command of a case."""
    words = ["--model", f"../in/{case.model}", "--data", f"../in/{case.data}", *flags_of(settings_of(case, rate))]
    return "command", {"words": ["train", *words, "--adapter-path", folder, *more]}


def run_cases(tree: Path, root: Path, chosen: dict[str, Case], rate: float) -> dict[str, list[str]]:
    """Run cases in folders of their own under `root`, write their plans there, and return their problems."""
    problems: dict[str, list[str]] = {name: [] for name in chosen}
    left = [{"name": name, "actions": actions(name, case, rate)} for name, case in chosen.items()]
    while left:  # a case that ends the process does not take the others with it
        code, results = work(tree, root, [left], "all")
        for result in results[0]:
            problems[result["name"]] += problems_of(result, tree)
        left = left[len(results[0]) :]
        if left:
            problems[left[0]["name"]].append(f"the process ended with code {code} in this case")
            left = left[1:]
    for name, case in chosen.items():
        if case.ranks > 1 and not problems[name]:
            todo = [{"name": name, "actions": [train_action(case, rate)]}]
            code, results = work(tree, root, [todo] * case.ranks, name)
            problems[name] += [line for rank in results for one in rank for line in problems_of(one, tree)]
            if code and not problems[name]:
                problems[name].append(f"a process ended with code {code}")
    return problems


def problems_of(result: dict[str, Any], tree: Path) -> list[str]:
    """Return what went wrong in the actions of a case."""
    found = [" / ".join([f"{t['action']} ended with {t['code']}", *t["err"]]) for t in result["taken"] if t["code"]]
    if Path(result["package"]) != tree / "mlx_lora":
        found.append(f"ran {result['package']} instead of {tree / 'mlx_lora'}")
    return found


def work(tree: Path, root: Path, specs: list[Any], name: str) -> tuple[int, list[list[dict[str, Any]]]]:
    """Run one worker per list of cases, together, and return a bad exit code if there is one, and each one's results."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_", "OPENBLAS_", "OMP_"))}
    environment |= {
        "PYTHONPATH": str(tree), "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MLX_LORA_MEASURE_KERNELS": "0",
        "MLX_LORA_CACHE": str(root / "cache"),
    }  # fmt: skip
    if len(specs) > 1:
        hosts = root / f"{name}-hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(specs))]))
        environment["MLX_HOSTFILE"] = str(hosts)
    processes, files = [], []
    for rank, spec in enumerate(specs):
        todo, results = root / f"{name}-{rank}.json", root / f"{name}-{rank}.jsonl"
        todo.write_text(json.dumps(spec))
        results.write_text("")
        files.append(results)
        own = {**environment, "MLX_RANK": str(rank)} if len(specs) > 1 else environment
        words = [sys.executable, "-P", str(WORKER), str(todo), str(results)]
        processes.append(subprocess.Popen(words, cwd=root, env=own, stdout=subprocess.DEVNULL))
    end = time.monotonic() + (RANKS_TIMEOUT_S if len(specs) > 1 else TIMEOUT_S)
    codes = [wait(process, end) for process in processes]
    return max(codes, key=abs), [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def wait(process: subprocess.Popen[bytes], end: float) -> int:
    """Wait until a process has ended, or kill it at a time of the monotonic clock; return its exit code."""
    try:
        return process.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on right now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def read_case(folder: Path, case: Case, problems: list[str]) -> dict[str, Any]:
    """Return a case's arrays, metrics and plans, and its problems."""
    runs = ("first", "run", "resumed")
    files = sorted(path for run in runs for path in (folder / run).rglob("*.safetensors"))
    arrays = {str(path.relative_to(folder)): dict(array_sums(path)) for path in files}
    metrics = {
        f"{run}/metrics.jsonl": read_metrics(folder / run / "metrics.jsonl") for run in runs if (folder / run).is_dir()
    }
    plans = {path.stem: read_plan(path) for path in sorted(folder.glob("plan-*.json"))}
    if case.resumed and not problems:
        for name, found in {**arrays, **metrics}.items():
            whole = {**arrays, **metrics}.get(name.replace("resumed/", "run/"))
            if found != whole:
                problems = [*problems, f"{name} of the resumed run differs from the uninterrupted run's"]
    return {"problems": problems, "arrays": arrays, "metrics": metrics, "plans": plans}


def array_sums(path: Path) -> Iterator[tuple[str, str]]:
    """Yield key, and type, shape, norm and SHA-256 of each array; the file's own metadata may hold times and paths."""
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    for key, entry in sorted(json.loads(content[8:size]).items()):
        if key == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        data = content[size + start : size + end]
        # The norm says how far apart two arrays are that should be equal.
        floats = np.frombuffer(data, "<f4").astype(np.float64) if entry["dtype"] == "F32" else None
        norm = "" if floats is None else f" norm {np.linalg.norm(floats):.9g}"
        yield key, f"{entry['dtype']} {entry['shape']}{norm} sha256 {hashlib.sha256(data).hexdigest()}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl without what is measured anew in every run."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [
        {key: value for key, value in line.items() if key not in MEASURED and not key.endswith(MEASURED_ENDINGS)}
        for line in lines
    ]


def read_plan(path: Path) -> dict[str, Any]:
    """Return a plan as one flat dict, its keys joined with dots, without texts and what the machine decides."""
    dropped = OF_MACHINE if path.stem == "plan-here" else ()
    return {
        key: value
        for key, value in flatten(json.loads(path.read_text()))
        if TEXTS.isdisjoint(key.split(".")) and not any(f"{key}.".startswith(f"{name}.") for name in dropped)
    }


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield key and value of each leaf of a JSON value."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from flatten(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from flatten(inner, f"{key}.{number}")
    else:
        yield key, value
