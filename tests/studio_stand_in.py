"""A stand-in for the studio's server, with as many runs, rows and live numbers as a test of the page wants.

The page, its files, and the headers of every answer are the real ones; only what lies under /api is made up. A real run gives
neither 200 runs nor an hour of numbers in the seconds of a test.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mlx_lora.studio.app import find_places, page_routes
from mlx_lora.studio.web import SafeHeaders, setting_groups

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">&lt;b&gt;'
STATES = ("done", "done", "done", "stopped", "failed", "killed", "paused", "queued")
PARTS = (("base", 760e6), ("adapter", 40e6), ("optimizer", 80e6), ("activations", 3.1e9), ("work ahead", 0.4e9))
GB = 10**9


def run_row(n: int, state: str | None = None) -> dict[str, Any]:
    """A row of the list of runs."""
    return {
        "id": f"run-{n:03}", "name": f"tutor-qwen3-0.6b-{n:03}", "path": f"/home/me/mlx-lora-studio/runs/run-{n:03}",
        "state": state or STATES[n % len(STATES)], "step": 120 + n, "steps": 240, "loss": 1.1 + 0.01 * n, "val_loss": 1.2 + 0.01 * n,
        "model": "Qwen/Qwen3-0.6B", "method": ("lora", "dora")[n % 2], "objective": "sft", "started": 1795700000 - 3600 * n,
        "seconds": 600.0 + n, "step_s": 1.5, "peak_bytes": 3 * GB, "tokens_per_s": 610.0 + n, "adapter": True,
    }  # fmt: skip


def metrics_row(step: int, run: int = 0) -> dict[str, Any]:
    """A row of the metrics.jsonl of one of several runs, which are a little different."""
    slow = 1 + 0.08 * run
    return {
        "step": step, "loss": 1.1 + 1.4 * math.exp(-step / 30 / slow) + 0.03 * math.sin(2.1 * step + run), "tokens_per_s": 600 + 8 * math.sin(step / 3 + run) + 9 * run,
        "val_loss": 1.25 + 1.2 * math.exp(-step / 28 / slow) if step % 20 == 0 else None,
        "learning_rate": 2e-4 * min(1, step / 8) * (0.5 + 0.5 * math.cos(math.pi * min(1, step / 240))),
        "peak_memory_bytes": (3.1 + 0.05 * run) * GB + step % 7 * 1e6, "elapsed_s": 2.5 * step,
    }  # fmt: skip


class StandIn:
    """The server in a thread, until the block ends.

    Args:
        n_runs: in the list; the first one is running.
        events: of the running run, all sent as fast as the page takes them.
        hostile: what stands in a row of the data and in an answer.
        running: whether the first run goes on.
        answers: to more requests than those of the page's own places, by their path under /api.
    """

    def __init__(
        self,
        n_runs: int = 12,
        events: tuple[dict[str, Any], ...] = (),
        hostile: str = HOSTILE,
        running: bool = True,
        answers: dict[str, Any] | None = None,
    ):
        self.runs = [run_row(n, "running" if n == 0 and running else None) for n in range(n_runs)]
        self._events, self._hostile, self.asked = events, hostile, [("", {})]
        self._answers = answers or {}
        routes = [
            *page_routes(find_places()),
            Route("/api/tasks/events", self._quiet),
            Route("/api/runs/{id}/events", self._live),
            Route("/api/talk", self._talk, methods=["POST"]),
            Route("/api/{path:path}", self._answer, methods=["GET", "POST", "PUT", "DELETE"]),
        ]
        app = Starlette(routes=routes, middleware=[Middleware(SafeHeaders)])
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> StandIn:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()

    async def _quiet(self, request: Request) -> Response:
        async def nothing() -> AsyncIterator[bytes]:
            while not self._server.should_exit:
                yield b": alive\n\n"
                await asyncio.sleep(1)

        return StreamingResponse(nothing(), media_type="text/event-stream")

    async def _live(self, request: Request) -> Response:
        async def lines() -> AsyncIterator[bytes]:
            for event in self._events:
                yield b"data: " + json.dumps(event).encode() + b"\n\n"
                await asyncio.sleep(0)
            while not self._server.should_exit:
                yield b": alive\n\n"
                await asyncio.sleep(1)

        return StreamingResponse(lines(), media_type="text/event-stream")

    async def _talk(self, request: Request) -> Response:
        asked = await request.json()
        self.asked.append(("talk", asked))
        words = [
            "Boil ",
            "the egg ",
            "for **seven** ",
            "minutes.\n\n",
            "1. Heat the water\n",
            "2. Add the egg\n",
            self._hostile,
        ]

        async def lines() -> AsyncIterator[bytes]:
            for word in words:
                for column in range(len(asked["columns"])):
                    yield f"data: {json.dumps({'column': column, 'text': word})}\n\n".encode()
                await asyncio.sleep(0.01)
            for column in range(len(asked["columns"])):
                end = {
                    "column": column,
                    "done": True,
                    "tokens": 31,
                    "tokens_per_s": 41.5 - column,
                    "first_token_s": 0.21,
                }
                yield f"data: {json.dumps(end)}\n\n".encode()

        return StreamingResponse(lines(), media_type="text/event-stream")

    async def _answer(self, request: Request) -> Response:
        path, method = request.path_params["path"], request.method
        raw = await request.body()
        body = json.loads(raw) if raw and request.headers.get("content-type") == "application/json" else {}
        self.asked.append((path, body))
        if path.startswith("runs/"):
            return self._run(path.split("/")[1:], method, body)
        answer = {
            "example": EXAMPLE, "state": STATE, "tasks": {"tasks": []}, "models": {"models": MODELS, "stores": STORES}, "models/search": SEARCH, "models/plan": plan_of(body),
            "data/sets": {"sets": SETS}, "data/upload": {"path": "/home/me/mlx-lora-studio/data/" + request.query_params.get("name", "")},
            "data/preview": preview(self._hostile), "settings": {"groups": setting_groups()}, "train/rule": {"cards": RULE},
            "train/plan": run_plan_of(body),
            "train/start": {"run": self.runs[0]["id"]}, "queue": {"queue": [run for run in self.runs if run["state"] == "queued"][:3]},
            "runs": {"runs": self.runs}, "adapters": {"adapters": ADAPTERS}, "talk/close": {}, "talk/model": {"sees": True}, "export/needs": NEEDS,
            "export": {"task": "t1", "command": "mlx-lora export --to gguf"}, **self._answers,
        }.get(path)  # fmt: skip
        return (
            JSONResponse({"error": {"message": f"{path}: no such place"}}, 404)
            if answer is None
            else JSONResponse(answer)
        )

    def _run(self, path: list[str], method: str, body: dict[str, Any]) -> Response:
        found = next((run for run in self.runs if run["id"] == path[0]), None)
        if found is None:
            return JSONResponse({"error": {"message": f"run {path[0]}: there is no such run; reload the list"}}, 404)
        if method == "DELETE":
            self.runs.remove(found)
            return JSONResponse({})
        if path[1:] == ["evaluation"]:
            task = {"id": "t2", "kind": "evaluation", "title": "Questions", "state": "running", "done": 0, "total": None, "unit": "", "seconds_left": None, "message": "", "result": None}  # fmt: skip
            return JSONResponse({"task": task, "command": f"mlx-lora evaluate --data {body.get('data', 'held out')}"})
        if path[1:] == ["resume"]:
            found["state"] = "running"
        if method != "GET":
            return JSONResponse(found)
        live = found["state"] == "running"
        rows = [metrics_row(step, int(path[0][-3:])) for step in range(2, found["step"] + 2, 2)]
        return JSONResponse({
            **found, "metrics": {key: [row[key] for row in rows] for key in rows[0]}, "samples": SAMPLES, "notes": "", "adapter": "adapters.safetensors",
            "settings": {"rank": 8 + 8 * (int(path[0][-3:]) % 2), "alpha": 32, "learning_rate": 2e-4, "model": found["model"], "method": found["method"], "seed": 0},
            "command": f"mlx-lora train --config {found['path']}/run.yaml", "run_yaml": "rank: 16\n", "log": [f"step {row['step']:>5}  loss {row['loss']:.3f}" for row in rows],
            "forgetting": FORGETTING if not live else None, "forgetting_command": "mlx-lora evaluate --forgetting", "objective": "sft", "data": {"splits": {"valid": {"rows": 24}}},
            "evaluation": EVALUATION if path[0] == "run-001" else None, "answers": [{**one, "adapter": f"Run {path[0]}"} for one in SAID], "verdict": VERDICT, "evaluation_command": "mlx-lora evaluate --show 20", "can_resume": not live and found["state"] != "done",
            "reason": "The process ended without a message: it was killed, or the machine ran out of memory or lost power." if found["state"] == "killed" else "", "plan_peak_bytes": 4.4 * GB,
        })  # fmt: skip


def plan_of(body: dict[str, Any]) -> dict[str, Any]:
    """The plan of a small model, or of a large one by name."""
    model = body.get("model") or body.get("settings", {}).get("model") or ""
    rank, large = body.get("settings", {}).get("rank", 16), 12 if "70B" in model or "32B" in model else 1
    parts = [
        {"name": name, "bytes": size * large * (rank / 16 if name in ("adapter", "optimizer") else 1)}
        for name, size in PARTS
    ]
    peak = sum(part["bytes"] for part in parts)
    line = f"Peak {peak / GB:.2f} GB of 12.70 GB; about {640 // large} tokens/s (predicted)."
    return {"fits": peak < 12.7e9, "peak_bytes": peak, "limit_bytes": 12.7e9, "parts": parts, "tokens_per_s": 640 / large, "predicted": True, "line": line, "problems": []}  # fmt: skip


def run_plan_of(body: dict[str, Any]) -> dict[str, Any]:
    """The plan of a card's run: half or twice the steps of the usual one."""
    card, settings = body.get("card") or "balanced", body.get("settings", {})
    factor, rank = {"quick": (0.5, 8), "balanced": (1, 16), "thorough": (2, 32)}[card]
    own = {} if card == "balanced" else {"rank": rank, "epochs": 2.0 * factor}
    plan = plan_of({"settings": {"rank": rank, **settings}})
    steps = settings.get("iters") or round(240 * factor)
    chosen = {
        "learning_rate": settings.get("learning_rate", 5e-4),
        "epochs": 2.0 * factor,
        "iters": settings.get("iters"),
        "rank": rank,
    }
    warnings = (
        ["“Learning rate” 1: the run will probably diverge; about 0.0005 suits this model"]
        if settings.get("learning_rate") == 1
        else []
    )
    return {
        **plan, "card": card, "own": {k: v for k, v in own.items() if k not in settings}, "task": None, "waits": False, "chosen": chosen, "steps": steps, "seconds": 2.75 * steps,
        "command": "mlx-lora train --model Qwen/Qwen3-0.6B --data tutor.jsonl", "run_yaml": "rank: 16\nmodel: Qwen/Qwen3-0.6B\n",
        "said": {}, "warnings": warnings, "warned": {"learning_rate": warnings[0]} if warnings else {},
    }  # fmt: skip


def preview(hostile: str) -> dict[str, Any]:
    """Twenty rows, a hostile one first."""
    rows = [
        {"index": n, "file": "/home/me/tutor.jsonl", "line": n + 1, "form": "chat", "tokens": 90 + n, "trained_tokens": 40 + n, "cut": n == 2, "doubled_of": {"file": "tutor.jsonl", "line": 1, "unit": "line"} if n == 3 else None, "unit": "line", "part": "", "split": "train", "why": None, "more_characters": 0, "more_tokens": 0,
         "spans": [{"text": "<|im_start|>user\n" + (hostile if n == 0 and hostile else f"Why is the sky blue? ({n})") + "<|im_end|>\n<|im_start|>assistant\n", "trained": False},
                   {"text": "What color is sunlight, before it meets the air? " * (1 + n % 3) + "<|im_end|>", "trained": True}]}
        for n in range(20)
    ]  # fmt: skip
    counts = {
        "rows": 1200,
        "trained_tokens": 61200,
        "tokens": 118400,
        "cut": 14,
        "doubled": 3,
        "refused": 2,
        "empty": 0,
    }
    bars = [{"from": 32 * n, "to": 32 * n + 32, "count": round(200 * math.exp(-((n - 4) ** 2) / 9))} for n in range(20)]
    problems = [{"file": "/home/me/tutor.jsonl", "line": 17, "message": "not JSON: Expecting ',' at column 41; mend the line or delete it"}, {"file": "/home/me/tutor.jsonl", "line": 408, "message": "no answer: the last turn is the user's; add an assistant turn"}]  # fmt: skip
    return {"total": 1200, "forms": {"chat": 1200}, "counts": counts, "histogram": bars, "rows": rows, "problems": problems, "notes": [], "task": None}  # fmt: skip


def hour() -> tuple[dict[str, Any], ...]:
    """What an hour of a run sends when it reports every second: the clock is simulated, the events are 3,600 of each kind."""
    events: list[dict[str, Any]] = []
    for second in range(3600):
        step = 122 + second
        events += [
            {"type": "metrics", "metrics": metrics_row(step)},
            {"type": "log", "lines": [f"step {step:>5}  loss {1.1:.3f} " + "." * 60]},
        ]
        if second % 60 == 0:
            events.append(
                {
                    "type": "sample",
                    "samples": [
                        {"step": step, "prompt": f"Prompt {n}", "text": f"text at {step} " * 12} for n in range(3)
                    ],
                }
            )
        events.append(
            {
                "type": "state",
                "state": "running",
                "step": step,
                "steps": 4000,
                "loss": 1.1,
                "seconds": float(second),
                "step_s": 1.0,
            }
        )
    return tuple(events)


STATE = {"version": "0.0", "machine": {"chip": "Apple M2 Pro", "memory_bytes": 16 * GB, "working_set_bytes": 12.7e9, "device": "gpu"}, "home": "/home/me/mlx-lora-studio", "key_required": False, "tasks_running": 0}  # fmt: skip
MODELS = [
    {"id": id, "name": id, "kind": kind, "path": f"/home/me/.cache/{id}", "bytes": size, "architecture": family, "parameters": count, "bits": bits, "trainable": why is None, "why_not": why}
    for id, kind, size, family, count, bits, why in (
        ("Qwen/Qwen3-0.6B", "hub", 1.2e9, "qwen3", 596e6, 16, None), ("mlx-community/Llama-3.2-3B-Instruct-4bit", "hub", 1.8e9, "llama", 3.2e9, 4, None), ("SmolLM2-135M-Instruct.Q4_1.gguf", "gguf", 94e6, "llama", 135e6, 5.6, None),
        ("gemma3:4b", "ollama", 3.3e9, "gemma3", 4.3e9, 4.5, None), ("Qwen/Qwen3-32B", "lmstudio", 65e9, "qwen3", 32.8e9, 16, None), ("whisper-large", "folder", 3e9, "whisper", 1.5e9, 16, "mlx-lm cannot build whisper; choose a language model"),
    )
]  # fmt: skip
STORES = [{"kind": "hub", "path": "/home/me/.cache/huggingface/hub", "exists": True}, {"kind": "lmstudio", "path": "/home/me/.lmstudio/models", "exists": False}]  # fmt: skip
EXAMPLE = {
    "model": "/home/me/.cache/mlx_lora/models/SmolLM2.gguf",
    "here": False,
    "mb": 94,
    "data": "bard",
    "settings": {"iters": 24},
    "questions": ["What makes the wind blow?", "How do I write my first poem?"],
}
SEARCH = {"results": [{"id": "Qwen/Qwen3-70B-4bit", "downloads": 12345, "likes": 67, "here": False}, {"id": "Qwen/Qwen3-0.6B", "downloads": 987654, "likes": 321, "here": True}], "offline": None}  # fmt: skip
SETS = [
    {"name": "tutor.jsonl", "path": "/home/me/mlx-lora-studio/data/tutor.jsonl", "bytes": 412000, "changed": 1795700000}
]
RULE = {card: {"steps": steps, "epochs": epochs, "rank": rank, "learning_rate": 5e-4} for card, steps, epochs, rank in (("quick", 118, 1.0, 8), ("balanced", 236, 2.0, 16), ("thorough", 472, 4.0, 32))}  # fmt: skip
ADAPTERS = [{"name": f"tutor-{n}", "path": f"/home/me/mlx-lora-studio/runs/tutor-{n}", "base": "Qwen/Qwen3-0.6B", "run": f"run-{n:03}"} for n in range(3)]  # fmt: skip
NEEDS = {name: {"needs": needs, "ok": not needs.startswith("log")} for name, needs in (("peft", "nothing more"), ("gguf-adapter", "the base as GGUF beside it"), ("gguf", "nothing more"), ("hf", "1.2 GB of disk"), ("ollama", "Ollama, to run it"), ("hub", "log in first: hf auth login"))}  # fmt: skip
SAMPLES = [{"step": step, "prompt": "Why does ice float?", "text": text} for step, text in ((0, "Ice floats because it is less dense than water."), (20, "Good question! What happens to water's volume when it freezes?"))]  # fmt: skip
EVALUATION = {
    "source": "24 rows that the run held out of tutor.jsonl", "date": "2026-11-28", "loss": "Base 2.4100 → adapter 1.1200, perplexity 72% lower (95% interval 66% to 78%, 24 rows)",
    "right": "Right answers to the 1 question that can be checked: base 0, adapter 1", "seen": "2 of 24 rows repeat rows that the run trained on, such as “Why does ice float?”", "models": ["base", "adapter"],
    "rows": [
        {"question": "What melts at 0 °C?", "expected": "Ice.", "said": [{"text": "Many things melt.", "right": False}, {"text": "Ice", "right": True}]},
        {"question": HOSTILE, "expected": "A long answer " * 12, "said": [{"text": HOSTILE, "right": None}, {"text": "x" * 300, "right": None}]},
    ],
}  # fmt: skip
SAID = [
    {"question": f"What melts at {n} °C?", "expected": "Ice.", "base": "Many things.", "new_words": n > 9, "right": n % 2 == 0, "base_right": None, "ticked": None}
    for n in range(12)
]  # fmt: skip
VERDICT = {"headline": "Learned: 6 of 12 right", "figures": "Held-out perplexity 9.3 to 5.1.", "tone": "good", "name": "learned", "mend": "", "command": ""}  # fmt: skip
FORGETTING = {"sentence": "The task was learned, general text was kept", "rows": [{"set": "task", "base": 2.41, "adapter": 1.12, "change": -1.29, "verdict": "learned"}, {"set": "general text", "base": 2.9, "adapter": 2.93, "change": 0.03, "verdict": "slightly forgotten"}], "probes": {"right": 17, "base_right": 18, "of": 20}}  # fmt: skip
