"""Test a server under load: many clients, random adapters, cancellations, malformed bodies, loads and unloads.

    python benchmarks/serving_load.py --model DIR --adapter bard=DIR --adapter tutor=DIR --seconds 600
    python benchmarks/serving_load.py --seconds 60

Without --model a small random model and five adapters are written. Every greedy answer is compared with its adapter's
answer before the load; `guest` is loaded alternately from two folders and unloaded, so its answers may be those of
either, or the error that there is no such model. The faults are:

    unmeant    a response that was not meant to be (500, a broken connection, 4xx on a good request)
    wrong      an answer of another adapter, or of none
    leaks      unfinished requests at the end; bytes of adapters or of MLX that grew between the first minute and the last

Ends with one line of JSON; the exit code is 1 if there is any fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from _environment import environment

PROMPTS = ("Tell me of the sea.", "How do I boil an egg?", "O Romeo,", "1, 2, 3,")
MALFORMED = (
    b"{",
    b"[]",
    b"\xff",
    b'{"prompt": NaN}',
    b'{"prompt": "x", "max_tokens": -1}',
    b'{"messages": [{}]}',
    b"[" * 999,
)
CONTENT = {"Content-Type": "application/json"}


class Load:
    """The clients' actions, and the faults in the answers."""

    def __init__(self, url: str, names: list[str], guests: dict[str, Path], tokens: int, seed: int):
        self.client = httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=64))
        self.names, self.guests, self.tokens = names, guests, tokens
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.examples: list[str] = []
        self.meant: dict[tuple[str, str], str] = {}
        self.times: list[float] = []

    def fault(self, kind: str, what: str) -> None:
        self.faults[kind] += 1
        if len(self.examples) < 10:
            self.examples.append(f"{kind}: {what}")

    def body(self, model: str, prompt: str, **more: Any) -> dict[str, Any]:
        return {"model": model, "prompt": prompt, "max_tokens": self.tokens, "temperature": 0, **more}

    async def learn(self, model: str, as_name: str | None = None) -> None:
        """Return a model's answer without other load."""
        for prompt in PROMPTS:
            answer = await self.client.post("/v1/completions", json=self.body(model, prompt))
            self.meant[as_name or model, prompt] = answer.json()["choices"][0]["text"]

    def check(self, model: str, prompt: str, text: str) -> None:
        wanted = [self.meant[name, prompt] for name in (self.guests if model == "guest" else [model])]
        if text in wanted:
            return
        owner = next((name for (name, asked), said in self.meant.items() if asked == prompt and said == text), "nobody")
        self.fault("wrong", f"{model} answered {prompt!r} as {owner}: {text!r}, not {wanted!r}")

    async def whole(self, model: str, prompt: str) -> None:
        start = time.perf_counter()
        answer = await self.client.post("/v1/completions", json=self.body(model, prompt))
        self.times.append(time.perf_counter() - start)
        if answer.status_code == 200:
            self.check(model, prompt, answer.json()["choices"][0]["text"])
        elif not (model == "guest" and answer.status_code == 404):
            self.fault("unmeant", f"{model} got {answer.status_code}: {answer.text[:200]}")

    async def stream(self, model: str, prompt: str, leave_after: int | None) -> None:
        text, request = "", self.body(model, prompt, stream=True)
        async with self.client.stream("POST", "/v1/completions", json=request) as answer:
            if answer.status_code != 200:
                if not (model == "guest" and answer.status_code == 404):
                    self.fault("unmeant", f"{model} got {answer.status_code}")
                return
            events = 0
            async for line in answer.aiter_lines():
                content = line.removeprefix("data: ")
                if not line or content == "[DONE]":
                    continue
                chunk = json.loads(content)
                if "error" in chunk:
                    if not (model == "guest" and chunk["error"]["code"] == "model_not_found"):
                        self.fault("unmeant", content[:200])
                    return
                text += chunk["choices"][0]["text"]
                events += 1
                if leave_after is not None and events >= leave_after:
                    return
        self.check(model, prompt, text)

    async def malformed(self) -> None:
        answer = await self.client.post(
            self.random.choice(("/v1/completions", "/v1/chat/completions", "/v1/adapters")),
            content=self.random.choice(MALFORMED),
            headers=CONTENT,
        )
        if answer.status_code != 400:
            self.fault("unmeant", f"a malformed body got {answer.status_code}")

    async def exchange_guest(self) -> None:
        if self.random.random() < 0.3:
            answer, meant = await self.client.delete("/v1/adapters/guest"), (200, 404)
        else:
            folder = self.random.choice(list(self.guests.values()))
            body = {"name": "guest", "path": folder.name}
            answer, meant = await self.client.post("/v1/adapters", json=body), (200,)
        if answer.status_code not in meant:
            self.fault("unmeant", f"exchanging guest got {answer.status_code}: {answer.text[:200]}")

    async def client_loop(self, until: float) -> None:
        while time.monotonic() < until:
            model, prompt = self.random.choice([*self.names, "guest"]), self.random.choice(PROMPTS)
            kind = self.random.choices(("whole", "stream", "cancel", "malformed", "exchange"), (40, 25, 20, 10, 5))[0]
            try:
                if kind == "whole":
                    await self.whole(model, prompt)
                elif kind in ("stream", "cancel"):
                    await self.stream(model, prompt, self.random.randint(1, 4) if kind == "cancel" else None)
                elif kind == "malformed":
                    await self.malformed()
                else:
                    await self.exchange_guest()
            except httpx.HTTPError as error:
                self.fault("unmeant", f"{kind}: {error!r}")
            self.done[kind] += 1

    async def gauges(self) -> dict[str, float]:
        lines = (await self.client.get("/metrics")).text.splitlines()
        return {
            line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#") and "{" not in line
        }


def resident_bytes(pid: int) -> int | None:
    """Return a process's resident size, if /proc has it."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def small_model(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Write a random model and five adapters in another process, so that this one stays small."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "from conftest import tiny_model, write_folder; from make_adapters import make_adapter\n"
        "root = Path(sys.argv[1]); c = {'tie_word_embeddings': False}\n"
        "m = write_folder(root / 'model', tiny_model(**c), c)\n"
        "for n, rank in enumerate((4, 4, 8, 16, 3)): make_adapter(m, root / 'adapters' / f'a{n}', rank=rank, seed=n + 1)\n"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, check=True)
    return folder / "model", {f"a{n}": folder / "adapters" / f"a{n}" for n in range(5)}


async def run(arguments: argparse.Namespace, url: str, adapters: dict[str, Path], pid: int) -> dict[str, Any]:
    """Load the server and return the figures."""
    guests = {f"guest as {name}": path for name, path in list(adapters.items())[:2]}
    load = Load(url, [*adapters, Path(arguments.model).name], guests, arguments.tokens, arguments.seed)
    for name in load.names:
        await load.learn(name)
    for name, path in guests.items():
        await load.client.post("/v1/adapters", json={"name": "guest", "path": path.name})
        await load.learn("guest", name)
    samples: list[tuple[float, int | None]] = []
    end = time.monotonic() + arguments.seconds

    async def watch() -> None:
        while time.monotonic() < end:
            samples.append(((await load.gauges())["mlx_lora_memory_bytes"], resident_bytes(pid)))
            await asyncio.sleep(max(arguments.seconds / 60, 0.5))

    before = await load.gauges()
    await asyncio.gather(watch(), *(load.client_loop(end) for _ in range(arguments.clients)))
    await load.client.request("DELETE", "/v1/adapters/guest")
    await asyncio.sleep(1)
    after = await load.gauges()
    if after["mlx_lora_unfinished"] or after["mlx_lora_running"]:
        load.fault("leaks", f"{after['mlx_lora_unfinished']:.0f} requests unfinished")
    own = sum(a["bytes"] for a in (await load.client.get("/v1/adapters")).json()["data"])
    if after["mlx_lora_adapter_bytes"] != own:
        load.fault("leaks", f"{after['mlx_lora_adapter_bytes']:.0f} bytes of adapters, {own} are known")
    await load.client.aclose()
    times = sorted(load.times)
    third = max(len(samples) // 3, 1)
    memory, process = ([s[n] for s in samples if s[n] is not None] for n in (0, 1))
    return {
        "seconds": arguments.seconds,
        "clients": arguments.clients,
        "requests": dict(load.done),
        "faults": {kind: load.faults[kind] for kind in ("unmeant", "wrong", "leaks")},
        "examples": load.examples,
        "answer_s_median": statistics.median(times) if times else None,
        "answer_s_p95": times[int(0.95 * len(times))] if times else None,
        "generated_tokens": after["mlx_lora_generated_tokens_total"] - before["mlx_lora_generated_tokens_total"],
        "canceled": after["mlx_lora_canceled_total"],
        "loads": after["mlx_lora_adapter_loads_total"],
        "memory_mb_first_and_last_third": [statistics.median(p) / 1e6 for p in (memory[:third], memory[-third:])],
        "process_mb_first_and_last_third": [statistics.median(p) / 1e6 for p in (process[:third], process[-third:])]
        if process
        else None,
    }


def main() -> None:
    """Start a server, put it under load, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--adapter", action="append", default=[], help="NAME=DIR; all of one folder's")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = {text.partition("=")[0]: Path(text.partition("=")[2]) for text in arguments.adapter}
        if not arguments.model:
            arguments.model, adapters = small_model(Path(folder))
        root = next(iter(adapters.values())).resolve().parent
        command = [sys.executable, "-m", "mlx_lora", "serve", "--model", str(arguments.model), "--port", "0"]
        command += ["--adapters-from", str(root), "--max-batch", "8"]
        command += [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]
        log = Path(folder) / "log"
        with open(log, "w") as out:
            server = subprocess.Popen(command, stderr=out, stdout=out, env=dict(os.environ))
        while "ready" not in log.read_text() and server.poll() is None:
            time.sleep(0.2)
        url = next((line.split()[1] for line in log.read_text().splitlines() if line.startswith("ready")), None)
        if url is None:
            sys.exit(log.read_text())
        try:
            figures = asyncio.run(run(arguments, url, adapters, server.pid))
        finally:
            server.send_signal(signal.SIGINT)
            code = server.wait(timeout=60)
        figures |= {"server_exit_code": code, "log_has_traceback": "Traceback" in log.read_text()}
        if figures["log_has_traceback"]:
            print(log.read_text(), file=sys.stderr)
    print(json.dumps({**figures, "environment": environment()}))
    sys.exit(1 if any(figures["faults"].values()) or code or figures["log_has_traceback"] else 0)


if __name__ == "__main__":
    main()
