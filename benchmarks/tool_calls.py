"""Measure calls of tools and answers in a schema, through the server and OpenAI's own client.

    python benchmarks/tool_calls.py learn  --model smollm2 --folder work    share of right calls before and after training
    python benchmarks/tool_calls.py peer   --model smollm2 --folder work    the same requests to mlx_lm.server
    python benchmarks/tool_calls.py schema --model smollm2 --folder work    100 answers in a nested schema at temperature 1
    python benchmarks/tool_calls.py cost   --model smollm2 --folder work    tokens/s with and without masks, 1, 8 and 32 rows
    python benchmarks/tool_calls.py soak   --model smollm2 --folder work    1,000 requests, many canceled: no text may change

`learn` comes first: it makes the folders that `peer` and `soak` use. Each part ends with one JSON line. Needs openai,
pydantic, and mlx-lora[serve].
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
from _harness import options, say, table
from _tool_rows import HELD_OUT, TAUGHT, held_out_prompts, schema_of, training_rows
from pydantic import BaseModel, Field

from mlx_lora.evaluation.metrics import _allowed

OPTIONS = (
    ("part", ..., "What is measured.", ("learn", "peer", "schema", "cost", "soak")),
    ("--model", "smollm2", "The base."),
    ("--folder", "tool-calls", "Where models, adapters and logs are written."),
    ("--prompts", 50, "learn, peer: held-out prompts."),
    ("--rows", 200, "learn: training rows."),
    ("--iters", 40, "learn: steps of 1,024 tokens; 0: as many as `mlx-lora train` chooses."),
    ("--requests", 1000, "soak: how many; schema: a tenth of it."),
)


@contextmanager
def server(words: Sequence[object], log: Path) -> Iterator[tuple[str, int]]:
    """Start a server, and yield its address and process."""
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", *map(str, words)], stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(1800):
            text = log.read_text()
            for line in text.splitlines():
                if line.startswith("ready"):
                    yield line.split()[1], process.pid
                    return
                if "Starting httpd" in line:
                    yield f"http://127.0.0.1:{words[-1]}", process.pid
                    return
            if process.poll() is not None:
                raise SystemExit(text)
            time.sleep(0.1)
        raise SystemExit(text)
    finally:
        process.terminate()
        process.wait()


def serving(base: Path, log: Path, *more: object) -> Any:
    """Return our server of a base."""
    return server(["mlx_lora", "serve", "--model", base, *more, "--port", 0], log)


def client_of(address: str) -> openai.OpenAI:
    """Return OpenAI's client for a server."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)


def said(client: openai.OpenAI, stream: bool, **asked: Any) -> dict[str, Any]:
    """Return an answer's content, calls and finish reason, put together from a stream if it is one."""
    answer = client.chat.completions.create(**{"temperature": 0, "max_tokens": 128, "stream": stream, **asked})
    if not stream:
        [choice] = answer.choices
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        return {"content": choice.message.content or "", "calls": calls, "finish": choice.finish_reason}
    content, calls, finish = "", {}, None
    for chunk in answer:
        for choice in chunk.choices:
            content, finish = content + (choice.delta.content or ""), choice.finish_reason or finish
            for part in choice.delta.tool_calls or []:
                call = calls.setdefault(part.index, ["", ""])
                call[0] += part.function.name or ""
                call[1] += part.function.arguments or ""
    return {"content": content, "calls": [tuple(call) for call in calls.values()], "finish": finish}


# Learning to call


def learn(asked: Any, folder: Path) -> dict[str, Any]:
    """Train on made rows, and measure calls of tools that they do not have."""
    base = folder / "base"
    if not base.exists():
        converted = folder / "converted"
        if Path(asked.model).is_dir():
            shutil.copytree(asked.model, converted)
        else:
            run("convert", "--model", asked.model, "--out", converted)
        template = (resources.files("mlx_lora.data") / "templates" / "chatml.jinja").read_text(encoding="utf-8")
        (converted / "chat_template.jinja").write_text(template)
        converted.rename(base)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in training_rows(asked.rows)))
    if not (folder / "adapter/adapters.safetensors").exists():
        steps = ["--iters", asked.iters, "--batch-tokens", 1024] if asked.iters else []
        run("train", "--model", base, "--data", rows, "--adapter-path", folder / "adapter", *steps)
    prompts, results, loops = held_out_prompts(asked.prompts), {}, {}
    with serving(base, folder / "log", "--adapter", f"tools={folder / 'adapter'}") as (address, _):
        client = client_of(address)
        name = client.models.list().data[0].id
        for label, model, choice in (
            ("before", name, "auto"), ("after", "tools", "auto"), ("after, required", "tools", "required"),
            ("before, required", name, "required"),
        ):  # fmt: skip
            answers = {
                stream: each(
                    lambda prompt, stream=stream, model=model, choice=choice: said(
                        client, stream, model=model, messages=question(prompt[0]), tools=prompt[1], tool_choice=choice
                    ),
                    prompts,
                )
                for stream in (False, True)
            }
            results[label] = {**shares(prompts, answers[False]), "streamed_equal": answers[False] == answers[True]}
        for label, (choice, *tasks) in LOOPS.items():
            whole, streamed = (loop(client, "tools", stream, choice, *tasks) for stream in (False, True))
            say(f"{label}:\n" + "\n".join(f"    {line}" for line in whole))
            calls = [(name, json_of(text)) for one in whole if isinstance(one, list) for name, text in one]
            right = sum(call in calls for call in ((name, given) for _, name, given in tasks))
            loops[label] = {"calls": len(calls), "right": right, "streamed_equal": whole == streamed}
    body = [
        [label, f"{one['well_formed']:.0%}", f"{one['right']:.0%}", one["streamed_equal"]]
        for label, one in results.items()
    ]
    print(table(["", "well-formed", "right", "streamed is equal"], body))
    print(
        table(
            ["a chat that needs three calls", "calls", "right", "streamed is equal"],
            [[label, *one.values()] for label, one in loops.items()],
        )
    )
    return {**results, "loops": loops}


def run(*words: object) -> None:
    """Run one of our commands."""
    say(" ".join(map(str, ("mlx-lora", *words))))
    subprocess.run([sys.executable, "-m", "mlx_lora", *map(str, words)], check=True, stdout=sys.stderr)


def question(text: str) -> list[dict[str, Any]]:
    """Return a chat of one question."""
    return [{"role": "user", "content": text}]


def each(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Call a function on all items, eight at a time."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(function, items))


def json_of(text: str) -> Any:
    """Return what a text is as JSON, or the text: an answer may end within its arguments."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def shares(prompts: Sequence[Any], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of answers that are one well-formed call of a shown tool, and that are the right one."""
    formed = right = 0
    for (_, tools, wanted), answer in zip(prompts, answers, strict=True):
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        calls = [(name, json_of(text)) for name, text in answer["calls"]]
        formed += bool(calls) and all(name in schemas and _allowed(schemas[name], given) for name, given in calls)
        right += calls == [wanted]
    return {"well_formed": formed / len(prompts), "right": right / len(prompts)}


LOOPS = {
    "taught tools, auto": (
        "auto",
        ("What is the weather in Oslo in celsius?", "get_weather", {"city": "Oslo", "unit": "celsius"}),
        ("Set a timer for 12 minutes.", "set_timer", {"minutes": 12}),
        ("Tell me in fahrenheit how warm Lima is.", "get_weather", {"city": "Lima", "unit": "fahrenheit"}),
    ),
    "held-out tools, required": (
        "required",
        ("Open a EUR account for Ann.", "open_account", {"name": "Ann", "currency": "EUR"}),
        ("What time is it in Oslo?", "get_time", {"city": "Oslo"}),
        ("Tell me the time in Lima.", "get_time", {"city": "Lima"}),
    ),
}


def loop(client: openai.OpenAI, model: str, stream: bool, choice: str, *tasks: Any) -> list[Any]:
    """Run a chat with two tools as an agent does: each call is answered, up to two in a row; return all that the model said."""
    tools = [schema_of(tool) for tool in (*TAUGHT, *HELD_OUT) if tool[0] in {task[1] for task in tasks}]
    messages, told = [], []
    for text, *_ in tasks:
        messages += question(text)
        for now in (choice, "auto", "none"):
            answer = said(
                client, stream, model=model, messages=messages, tools=tools, tool_choice=now, parallel_tool_calls=False
            )
            told.append(answer["calls"] or answer["content"])
            if not answer["calls"]:
                messages.append({"role": "assistant", "content": answer["content"]})
                break
            [(name, given)] = answer["calls"]
            call = {"id": f"call{len(told):05}", "type": "function", "function": {"name": name, "arguments": given}}
            messages += [
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": call["id"], "content": json.dumps({"result": 10 + len(told)})},
            ]
    return told


# The same requests to mlx_lm.server


def peer(asked: Any, folder: Path) -> dict[str, Any]:
    """Compare answers of a fused model, served by mlx-lm and by us."""
    fused = folder / "fused"
    if not fused.exists():
        run("fuse", "--model", folder / "base", "--adapter-path", folder / "adapter", "--out", fused, "--dequantize")
    prompts, answers = held_out_prompts(asked.prompts), []
    ours = serving(fused, folder / "log", "--decode-weights", "packed")
    theirs = server(["mlx_lm.server", "--model", fused, "--port", 8123], folder / "log-peer")
    for name, opened in (("fused", ours), (str(fused), theirs)):
        with opened as (address, _):
            client = client_of(address)
            answers.append([
                said(client, stream, model=name, messages=question(prompt[0]), tools=prompt[1], max_tokens=48)
                for prompt in prompts for stream in (False, True)
            ])  # fmt: skip
    calls = [[[(name, json_of(given)) for name, given in one["calls"]] for one in side] for side in answers]
    rest = [[(one["content"].strip(), one["finish"]) for one in side] for side in answers]
    equal = [a == b and c == d for a, b, c, d in zip(*calls, *rest, strict=True)]
    for number, same in enumerate(equal):
        if not same:
            say(f"{prompts[number // 2][0]}: {answers[0][number]} | {answers[1][number]}")
    print(table(["requests", "equal", "with calls"], [[len(equal), sum(equal), sum(map(bool, calls[0]))]]))
    return {"requests": len(equal), "equal": sum(equal), "with_calls": sum(map(bool, calls[0]))}


# Schemas


class Maker(BaseModel):
    """Who made it."""

    name: str = Field(max_length=16)
    country: Literal["DE", "FR", "JP", "US"]


class Product(BaseModel):
    """Eight fields, nested, with enums."""

    title: str = Field(max_length=24)
    kind: Literal["tool", "toy", "food"]
    price: int = Field(ge=0, le=9999)
    in_stock: bool
    maker: Maker
    tags: list[Literal["new", "sale", "old"]] = Field(max_length=3)


def schema(asked: Any, folder: Path) -> dict[str, Any]:
    """Parse answers in a nested schema from the untrained base, and time the first token of a schema seen before and not."""
    count, valid, first = asked.requests // 10, 0, {"seen": [], "new": [], "none": []}
    with serving(Path(asked.model), folder / "log") as (address, _):
        client = client_of(address)
        name = client.models.list().data[0].id

        def parsed(seed: int) -> bool:
            answer = client.chat.completions.parse(
                model=name, messages=question("Invent a product, as JSON."), response_format=Product, temperature=1, seed=seed,
                max_tokens=300,
            )  # fmt: skip
            return isinstance(answer.choices[0].message.parsed, Product) and answer.choices[0].finish_reason == "stop"

        valid = sum(each(parsed, range(count)))
        for number in range(20):
            shape = Product.model_json_schema()
            for label in first:
                if label == "new":
                    shape = json.loads(json.dumps(shape).replace('"title"', f'"title{number}"'))
                form = {"type": "json_schema", "json_schema": {"name": "product", "schema": shape}}
                given = {} if label == "none" else {"response_format": form}
                begun = time.perf_counter()
                stream = client.chat.completions.create(
                    model=name, messages=question("A product."), stream=True, max_tokens=2, temperature=0, **given
                )
                next(iter(stream))
                first[label].append((time.perf_counter() - begun) * 1000)
                stream.close()
    medians = {label: statistics.median(times) for label, times in first.items()}
    head = ["answers", "valid", *(f"first token, schema {label}" for label in medians)]
    print(table(head, [[count, f"{valid / count:.0%}", *(f"{value:.1f} ms" for value in medians.values())]]))
    return {"answers": count, "valid": valid, "first_token_ms": medians}


def cost(asked: Any, folder: Path) -> dict[str, Any]:
    """Time steps of rows without a schema, with one, and half of them with one, in turns in one process."""
    import mlx_lora  # noqa: F401  loads the BLAS before mlx.core
    from mlx_lora.config.settings import ModelSettings
    from mlx_lora.models.generator import (
        BatchRow,
        Prefill,
        Routing,
        RunningBatch,
        Sampler,
        Sampling,
        TokenSteps,
        hold_weights,
    )
    from mlx_lora.models.grammar import Grammars
    from mlx_lora.models.load import load_base

    base = load_base(ModelSettings(model=asked.model))
    hold_weights(base, 8)
    grammars, tokenizer, model, routing = Grammars.of(base), base.hf_tokenizer, TokenSteps(base.model), Routing()
    item = {"type": "object", "additionalProperties": {"type": "string"}}
    grammar = grammars.of_schema({"type": "array", "items": item}, "schema")
    prompt, steps, found = tokenizer.encode("Write a list of objects as JSON:"), 24, {}
    for rows in (1, 8, 32):
        times: dict[str, list[float]] = {"none": [], "half": [], "all": []}
        for turn in range(6):
            for label in random.Random(turn).sample(list(times), 3):
                batch = RunningBatch(model, routing)
                for row in range(rows):
                    formed = label == "all" or (label == "half" and row % 2 == 0)
                    settings = Sampling(temperature=1.0, seed=row, grammar=grammar if formed else None)
                    sampler = Sampler(
                        settings, base.token_rows or len(tokenizer), grammars.matcher(grammar) if formed else None
                    )
                    prefill = Prefill(model, routing, BatchRow(row, None, sampler), list(prompt))
                    prefill.advance(512)
                    batch.join(prefill)
                batch.step()
                begun = time.perf_counter()
                for _ in range(steps):
                    batch.step()
                if turn:  # the first compiles
                    times[label].append(time.perf_counter() - begun)
        ratios = {
            label: statistics.median(a / b for a, b in zip(times["none"], times[label], strict=True))
            for label in ("half", "all")
        }
        found[rows] = {"tokens_per_s": rows * steps / statistics.median(times["none"]), **ratios}
    head = ["rows", "tokens/s without", "half of the rows masked", "all masked"]
    body = [
        [rows, f"{one['tokens_per_s']:.1f}", f"{one['half']:.3f}x", f"{one['all']:.3f}x"] for rows, one in found.items()
    ]
    print(table(head, body))
    return {str(rows): one for rows, one in found.items()}


# Many at once


def soak(asked: Any, folder: Path) -> dict[str, Any]:
    """Ask two adapters for answers in two schemas, 16 at once, cancel at random, and compare texts and memory."""
    second = folder / "adapter-2"
    if not second.exists():
        rows = folder / "rows-2.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in training_rows(60, seed=9)))
        run("train", "--model", folder / "base", "--data", rows, "--adapter-path", second, "--iters", 10)
    schemas = [Product.model_json_schema(), Maker.model_json_schema()]
    words = [
        "--adapter",
        f"one={folder / 'adapter'}",
        "--adapter",
        f"two={second}",
        "--request-timeout",
        3000,
        "--max-batch",
        16,
        "--dtype",
        "float32",
    ]
    with serving(folder / "base", folder / "log", *words) as (address, process):
        client, http = client_of(address), httpx.Client(base_url=address)

        def text(case: tuple[str, int, int], most: float = 1e9) -> str:
            model, number, seed = case
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schemas[number]}}
            chunks, found = client.chat.completions.create(
                model=model, messages=question(f"Invent one, number {seed}."), response_format=form, temperature=0.7, seed=seed,
                max_tokens=60, stream=True,
            ), ""  # fmt: skip
            for place, chunk in enumerate(chunks):
                if place >= most:
                    chunks.close()
                    return ""
                found += chunk.choices[0].delta.content or "" if chunk.choices else ""
            return found

        def metric(name: str) -> float:
            lines = http.get("/metrics").text.splitlines()
            return next(float(line.split()[1]) for line in lines if line.startswith(f"mlx_lora_{name} "))

        cases = [(model, number, seed) for model in ("one", "two") for number in (0, 1) for seed in range(4)]
        alone = {case: text(case) for case in cases}
        draw, lock, memory, wrong = random.Random(0), threading.Lock(), [], []

        def one(number: int) -> None:
            with lock:
                case, most = draw.choice(cases), draw.choice((3, 10, 1e9, 1e9))
            found = text(case, most)
            if most == 1e9 and found != alone[case]:
                wrong.append((case, found))
            if number % 25 == 0:
                shown = subprocess.run(
                    ["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True, check=True
                )
                memory.append((number, metric("memory_bytes") / 1e6, int(shown.stdout) / 1e3))

        with ThreadPoolExecutor(16) as threads:
            list(threads.map(one, range(asked.requests)))
        time.sleep(1)
        left = metric("unfinished")
    memory.sort()
    sizes = {
        label: [statistics.median(line[column] for line in quarter) for quarter in quarters(memory)]
        for column, label in ((1, "MLX"), (2, "process"))
    }
    for case, found in wrong[:3]:
        say(f"{case}: {found!r} is not {alone[case]!r}")
    print(table(["requests", "different texts", "unfinished"], [[asked.requests, len(wrong), left]]))
    head = ["MB, median of each quarter", *("first", "second", "third", "fourth")]
    print(table(head, [[label, *(f"{size:.0f}" for size in four)] for label, four in sizes.items()]))
    return {"requests": asked.requests, "different": len(wrong), "unfinished": left, "memory_mb": sizes}


def quarters(items: Sequence[Any]) -> list[Sequence[Any]]:
    """Return four parts, the same number in each."""
    size = len(items) // 4
    return [items[size * part : size * (part + 1)] for part in range(4)]


def main(words: Sequence[str] | None = None) -> None:
    """Measure one part."""
    asked = options(__doc__, *OPTIONS).parse_args(words)
    folder = Path(asked.folder)
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"part": asked.part, **globals()[asked.part](asked, folder)}))


if __name__ == "__main__":
    main()
