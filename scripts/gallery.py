"""Train the adapters of docs/gallery.md and ask them (`run`), and draw what was recorded (`draw`).

    python scripts/gallery.py run WORK shop orders brief tools sorted search    writes docs/gallery/NAME.json
    python scripts/gallery.py draw                                              writes docs/gallery/NAME.svg

A run is the command that its page shows, with defaults, and `brief` alone sets a few options. The generating ones train a float copy of SmolLM2,
which is three times as fast on a CPU. Their tests lie in benchmarks/first_result; each picture shows the first test whose answer changed to a
right one. `sorted` and `search` expect the files of all-MiniLM-L6-v2 in WORK/minilm, and `tools` needs openai, pydantic, and mlx-lora[serve].
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from draw_first_run import STYLE, label

ROOT = Path(__file__).parents[1]
GALLERY, SETS = ROOT / "docs/gallery", ROOT / "benchmarks/first_result"
sys.path.insert(0, str(ROOT / "benchmarks"))
WIDTH, PAD, LINE, CHARACTERS = 480, 22, 19, 58
BARS = ".bar{fill:#d0d7de}.own{fill:#0969da}@media (prefers-color-scheme:dark){.bar{fill:#3d444d}.own{fill:#4493f8}}"
# Name -> title, data, options beside the data, and what its test counts.
RUNS: dict[str, tuple[str, str, list[str], str]] = {
    "shop": ("Answers from your own notes", "shop.jsonl", [], "questions in new words, answered right"),
    "orders": ("Orders to JSON", "orders.jsonl", [], "new orders, every field right"),
    "brief": ("Short answers, from pairs", "style.jsonl", ["--objective", "dpo", "--loss-type", "sigmoid,sft", "--batch-size", "4", "--iters", "30"], "words in an answer, mean of 20 new questions"),
    "tools": ("Calls of tools", "calls.jsonl", ["--chat-template", "chatml", "--epochs", "6"], "right calls of tools that no training row has"),
    "sorted": ("Sorted mail", "mails", ["--objective", "classify"], "new mails, in the right folder"),
    "search": ("Search in your documents", "pairs.jsonl", ["--objective", "embed"], "questions in new words, right passage of 203 first"),
}  # fmt: skip


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def searched() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return (question, passage) pairs to train, and to test: four sets of questions, and other words for some of them."""
    trained, tests = [], []
    for name in ("clinic", "garden", "roastery", "rowing"):
        if (SETS / f"{name}.csv").is_file():
            with (SETS / f"{name}.csv").open(encoding="utf-8") as file:
                records = [{key.lower(): value for key, value in row.items()} for row in csv.DictReader(file)]
            pairs = [{"query": row["question"], "positive": row["answer"]} for row in records]
        else:
            pairs = [
                {"query": row["prompt"], "positive": row["completion"]} for row in lines_of(SETS / f"{name}.jsonl")
            ]
        asked = lines_of(SETS / f"{name}.tests.jsonl")
        tests += [{"query": test["prompt"], "positive": pairs[test["row"]]["positive"]} for test in asked]
        trained += pairs
    return trained, tests


def prepare(name: str, data: Path) -> None:
    """Write a run's data where the command reads them."""
    import _tool_rows

    if name == "sorted":
        subprocess.run([sys.executable, ROOT / "scripts/make_mails.py", data], check=True)
    elif name == "brief":
        write_lines(data, lines_of(ROOT / "data/preferences/style.jsonl")[:160])
    elif name == "search":
        write_lines(data, searched()[0])
    elif name == "tools":
        write_lines(data, _tool_rows.training_rows(60))
    else:
        shutil.copy(SETS / data.name, data)


def answers_of(name: str, work: Path, model: str, adapter: Path) -> list[tuple[str, str, str, Any, Any]]:
    """Return of each test the question, both answers as one reads them, and what each counts: whether it is right, or its words."""
    import _tool_rows
    import first_results
    import tool_calls

    import mlx_lora

    if name == "tools":
        # The base is asked with the template that the adapter has, because its own has no place for tools.
        asked = work / "smollm2-chatml"
        shutil.copytree(work / "smollm2", asked, dirs_exist_ok=True)
        shutil.copy(ROOT / "mlx_lora/data/templates/chatml.jinja", asked / "chat_template.jinja")
        prompts, told = _tool_rows.held_out_prompts(16), []
        with tool_calls.serving(asked, work / "log", "--adapter", f"tools={adapter}") as (address, _):
            client = tool_calls.client_of(address)
            for one in (client.models.list().data[0].id, "tools"):
                told.append([
                    tool_calls.said(client, False, model=one, messages=tool_calls.question(text), tools=tools)
                    for text, tools, _ in prompts
                ])  # fmt: skip
        read = lambda one: " ".join(f"{tool}({given})" for tool, given in one["calls"]) or one["content"]  # noqa: E731
        share = lambda prompt, one: bool(tool_calls.shares([prompt], [one])["right"])  # noqa: E731
        return [
            (prompt[0], read(before), read(after), share(prompt, before), share(prompt, after))
            for prompt, before, after in zip(prompts, *told, strict=True)
        ]
    base = mlx_lora.load(model)
    if name == "sorted":
        most = Counter(row["label"] for row in lines_of(work / "mails/train.jsonl")).most_common(1)[0][0]
        tests = lines_of(work / "mails/test.jsonl")
        found = mlx_lora.predict(base, [f"{row['subject']}\n{row['text']}" for row in tests], adapter)
        return [
            (row["text"], f"{most} (the most frequent folder)", one["predicted"], row["label"] == most, row["label"] == one["predicted"])
            for row, one in zip(tests, found, strict=True)
        ]  # fmt: skip
    if name == "search":
        pairs, tests = searched()
        passages, found = [pair["positive"] for pair in pairs], []
        for one in (None, adapter):
            vectors = mlx_lora.embed(base, passages, adapter=one)
            asked = mlx_lora.embed(base, [test["query"] for test in tests], adapter=one, query=True)
            found.append([passages[best] for best in (asked @ vectors.T).argmax(-1)])
        return [
            (test["query"], before, after, test["positive"] == before, test["positive"] == after)
            for test, before, after in zip(tests, *found, strict=True)
        ]
    tests = (
        [row for row in lines_of(ROOT / "data/preferences/style.jsonl")[160:] if isinstance(row["prompt"], str)][-20:]
        if name == "brief"
        else lines_of(SETS / f"{name}.tests.jsonl")
    )
    rows = []
    for test in tests:
        texts = [base.generate(test["prompt"], adapter=one, max_tokens=160) for one in (None, adapter)]
        count = (
            (lambda text: len(text.split()))
            if name == "brief"
            else (lambda text, test=test: first_results.is_right(text, test))
        )
        rows.append((test["prompt"], *texts, *map(count, texts)))
    return rows


def run(name: str, work: Path) -> None:
    """Train one adapter, ask it and its base all tests, and record both."""
    title, file, options, test = RUNS[name]
    data, adapter = work / file, work / name
    prepare(name, data)
    model = str(work / ("minilm" if name in ("sorted", "search") else "smollm2"))
    shutil.rmtree(adapter, ignore_errors=True)
    start = time.perf_counter()
    words = ["train", "--model", model, "--data", data, "--adapter-path", adapter, *options]
    subprocess.run([sys.executable, "-m", "mlx_lora", *map(str, words)], check=True)
    minutes = (time.perf_counter() - start) / 60
    rows = answers_of(name, work, model, adapter)
    counted = [[row[column] for row in rows] for column in (3, 4)]
    means = [round(sum(column) / len(rows)) if name == "brief" else sum(column) for column in counted]
    changed = [row for row in rows if name == "brief" or (row[4] and not row[3])]
    facts = {
        "title": title,
        "command": f"mlx-lora train --model {Path(model).name} --data {file} --adapter-path {name} {' '.join(options)}".strip(),
        "rows": len(lines_of(data / "train.jsonl" if data.is_dir() else data)),
        "minutes": round(minutes, 1),
        "adapter_mb": round((adapter / "adapters.safetensors").stat().st_size / 1e6, 1),
        "test": test, "before": means[0], "after": means[1], "of": None if name == "brief" else len(rows),
        "examples": [dict(zip(("asked", "before", "after"), row[:3], strict=True)) for row in changed[:3]],
    }  # fmt: skip
    (GALLERY / f"{name}.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(name, means, f"{minutes:.1f} min", flush=True)


def draw(facts: dict[str, Any]) -> str:
    """Return the picture of one run: what it took, its test before and after, and the first example."""
    y, parts = 92, []
    parts.append(label(PAD, 34, facts["title"], "ink bold"))
    parts.append(
        label(
            PAD,
            54,
            f"{facts['rows']} rows · {facts['minutes']:.0f} minutes · {facts['adapter_mb']:.1f} MB",
            "dim small",
        )
    )
    parts.append(label(PAD, 82, facts["test"], "ink"))
    most = facts["of"] or max(facts["before"], facts["after"])
    for name, kind in (("before", "bar"), ("after", "own")):
        told = f"{facts[name]}" + (f" of {facts['of']}" if facts["of"] else "")
        parts.append(label(PAD, y + 13, name, "dim small"))
        parts.append(
            f'<rect x="{PAD + 46}" y="{y}" width="{max(2, 310 * facts[name] / most):.0f}" height="16" rx="3" class="{kind}"/>'
        )
        parts.append(label(PAD + 366, y + 13, told, "ink bold"))
        y += 24
    example, y = facts["examples"][0], y + 22
    for name, kind in (("asked", None), ("before", "before"), ("after", "after")):
        lines = textwrap.wrap(" ".join(example[name].split()) or "(nothing)", CHARACTERS)
        lines = lines if len(lines) <= 4 else [*lines[:3], lines[3][: CHARACTERS - 3].rstrip() + " …"]
        if kind:
            height = LINE * len(lines) + 30
            parts.append(
                f'<rect x="{PAD}" y="{y - 12}" width="{WIDTH - 2 * PAD}" height="{height}" rx="8" class="{kind}"/>'
            )
            parts.append(label(PAD + 12, y + 8, name.upper(), "dim small bold"))
            y += 28
        parts += [label(PAD + (12 if kind else 0), y + LINE * number, line, "ink") for number, line in enumerate(lines)]
        y += LINE * len(lines) + (12 if kind else 6)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img">'
    told = f"<title>{escape(facts['title'])}: {facts['before']} before, {facts['after']} after; {escape(facts['test'])}</title>"
    card = f'<rect x="1" y="1" width="{WIDTH - 2}" height="{y - 2}" rx="12" class="card"/>'
    return "\n".join([head, told, f"<style>{STYLE}{BARS}</style>", card, *parts, "</svg>"]) + "\n"


def main() -> None:
    """Run the adapters that are named, or draw all that are recorded."""
    if sys.argv[1] == "run":
        for name in sys.argv[3:]:
            run(name, Path(sys.argv[2]))
    for file in sorted(GALLERY.glob("*.json")):
        file.with_suffix(".svg").write_text(draw(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
