"""How much of a small data set a model knows after training: defaults against other ways, on questions in new words.

    python benchmarks/first_results.py --model smollm2 --sets shop,persona --ways defaults,old,grid --out results.jsonl
    python benchmarks/first_results.py --table results.jsonl

Seven sets of 40 to 200 rows lie in benchmarks/first_result/. Each cell trains in a process of its own and then asks the
held-out questions, greedily; a cell that is in the file already is not run again. Ways: `base` trains nothing, `defaults`
gives --model, --data and --adapter-path only, `old` has the defaults until November 2026 (one epoch of 2,048 tokens a step,
rate 2e-4), `mlx-lm` has those of mlx_lm.lora (see MLX_LM), `1e-3x8` is one point of a grid: that rate for 8 epochs with four
rows a step, and `grid` is all of GRID.

On a CPU a float copy of a quantized model (`mlx-lora convert --no-quantize`) gives the same numbers in a third of the time,
since dequantizing is what takes long there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SETS = ("shop", "second_shop", "glossary", "persona", "style", "orders", "messages")
OLD = {"learning_rate": 2e-4, "epochs": 1, "batch_tokens": 2048}
# What mlx_lm.lora does if nothing is given, in this trainer: rank 8, scale 20, 16 blocks, a constant rate, no clip.
MLX_LM = {
    "learning_rate": 1e-5, "iters": 1000, "batch_size": 4, "rank": 8, "alpha": 160, "num_layers": 16,
    "lr_schedule": "constant", "warmup": 0, "max_grad_norm": 0, "optimizer": "adam",
}  # fmt: skip
GRID = ("5e-4x8", "1e-3x8", "2e-3x8", "4e-3x8", "1e-3x4", "1e-3x16")
MOST_TOKENS = 48  # of an answer


def ways(names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield each way's name with the settings it gives; None: nothing is trained."""
    for name in names:
        if name == "grid":
            yield from ways(GRID)
        elif point := re.fullmatch(r"([\d.e-]+)x(\d+)", name):
            rate, epochs = float(point[1]), int(point[2])
            yield f"lr {rate:g}, {epochs} epochs", {"learning_rate": rate, "epochs": epochs, "batch_size": 4}
        else:
            yield name, {"base": None, "defaults": {}, "old": OLD, "mlx-lm": MLX_LM}[name]


def is_right(answer: str, test: Mapping[str, Any], form: re.Pattern | None) -> bool:
    """Say whether an answer has the words, the object or the form that its question asks for."""
    if "want" in test:
        return any(re.search(rf"\b{re.escape(word)}", answer.lower()) for word in test["want"])
    if "json" in test:
        found = re.search(r"\{[^{}]*\}", answer)
        try:
            return found is not None and json.loads(found[0]) == test["json"]
        except ValueError:
            return False
    return form is not None and form.match(answer.strip().split("\n\n")[0]) is not None


def run_cell(model: str, name: str, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Train on one set in one way and ask its questions; returns what is measured."""
    import mlx_lora  # in a process of its own

    sys.path.insert(0, str(Path(__file__).parent))
    part = importlib.import_module(f"first_result.{name}")
    base = mlx_lora.load(model)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        adapter = None
        if settings is not None:
            data = Path(folder) / f"{name}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in part.rows()))
            started = time.perf_counter()
            run = mlx_lora.train(base, str(data), adapter_path=f"{folder}/run", sample_tokens=0, **settings)
            adapter = run.adapter
            found = {"train_s": round(time.perf_counter() - started, 1)}
            lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
            losses = [one for one in lines if one.get("loss") is not None]
            held_out = [round(one["val_loss"], 4) for one in lines if one.get("val_loss") is not None]
            found |= {"steps": lines[-1]["step"], "loss": losses[-1]["loss"], "val_losses": held_out}
        tests = part.tests()
        answers = [base.generate(test["prompt"], adapter, max_tokens=MOST_TOKENS) for test in tests]
    right = [is_right(answer, test, getattr(part, "FORM", None)) for answer, test in zip(answers, tests, strict=True)]
    return found | {"right": sum(right), "of": len(tests), "answers": answers[:6]}


def table(results: list[dict[str, Any]]) -> str:
    """Return the share of right answers: a row for each model and set, a column for each way."""
    columns = list(dict.fromkeys(one["way"] for one in results))
    lines = ["| model | set | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for model, name in dict.fromkeys((one["model"], one["set"]) for one in results):
        cells = {one["way"]: one for one in results if (one["model"], one["set"]) == (model, name)}
        said = [f"{cells[way]['right']}/{cells[way]['of']}" if way in cells else "" for way in columns]
        lines.append(f"| {model} | {name} | " + " | ".join(said) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line; run the cells that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the model")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--ways", default="base,defaults,old,grid")
    parser.add_argument("--out", type=Path, default=Path("first_results.jsonl"))
    parser.add_argument("--table", type=Path, help="print the table of this file, and run nothing")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # one cell as JSON, in a process of its own
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    if options.cell:
        name, settings = json.loads(options.cell)
        print("RESULT " + json.dumps(run_cell(options.model, name, settings)))
        return
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    known = {(one["model"], one["set"], one["way"]) for one in done}
    model = Path(options.model).name
    for way, settings in ways(options.ways.split(",")):
        for name in options.sets.split(","):
            if (model, name, way) in known:
                continue
            asked = [sys.executable, __file__, "--model", options.model, "--cell", json.dumps([name, settings])]
            said = subprocess.run(asked, capture_output=True, text=True)
            line = next((one for one in said.stdout.splitlines() if one.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"Error: {way} on {name} ended with code {said.returncode}\n{said.stderr[-2000:]}")
            result = {"model": model, "set": name, "way": way, "settings": settings} | json.loads(line[7:])
            with options.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{model} {name} {way}: {result['right']}/{result['of']}", flush=True)


if __name__ == "__main__":
    main()
