"""How much of a small data set a model knows after training: defaults against other ways, on questions in new words.

    python benchmarks/first_results.py --model smollm2 --sets shop,persona --ways defaults,old,grid --out results.jsonl
    python benchmarks/first_results.py --table results.jsonl

Seven sets of 40 to 200 rows lie in benchmarks/first_result/ (NAME.jsonl or NAME.csv, and the questions in NAME.tests.jsonl), and an eighth of
400, `catalog`, which only remembering solves. Five more (`--sets one-wording`) have each question in one wording, as people
bring them: 12 of their 20 questions are ordinary rewordings, and 8 describe a situation. Each cell trains in a process of its own and then asks the
held-out questions, greedily; a cell that is in the file already is not run again. Ways: `base` trains nothing, `defaults`
gives --model, --data and --adapter-path only, `rephrase` adds --rephrase 3, and `rephrase:MODEL` also --rephrase-model; `old` has the defaults until November 2026 (one epoch of 2,048 tokens a step,
rate 2e-4), `mlx-lm` has those of mlx_lm.lora (see MLX_LM), `1e-3x8` is one point of a grid: that rate for 8 epochs with four
rows a step, and `grid` is all of GRID.

On a CPU a float copy of a quantized model (`mlx-lora convert --no-quantize`) gives the same numbers in a third of the time,
since dequantizing is what takes long there.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from _harness import options
from _harness import table as markdown

ROOM = Path(__file__).parent / "first_result"
SETS = ("shop", "second_shop", "glossary", "persona", "style", "orders", "messages")
ONE_WORDING = ("roastery", "heatpump", "rowing", "clinic", "garden")  # nothing is tuned on the last two
OLD = {"learning_rate": 2e-4, "epochs": 1, "batch_tokens": 2048}
# What mlx_lm.lora does if nothing is given, in this trainer: rank 8, scale 20, 16 blocks, a constant rate, no clip.
MLX_LM = {
    "learning_rate": 1e-5, "iters": 1000, "batch_size": 4, "rank": 8, "alpha": 160, "num_layers": 16,
    "lr_schedule": "constant", "warmup": 0, "max_grad_norm": 0, "optimizer": "adam",
}  # fmt: skip
GRID = ("5e-4x8", "1e-3x8", "2e-3x8", "4e-3x8", "1e-3x4", "1e-3x16")
MOST_TOKENS = 48  # of an answer
OPTIONS = (
    ("--model", str, "Folder of the model."),
    ("--sets", ",".join(SETS), "Sets, separated by commas; one-wording: those with one wording of each question."),
    ("--seeds", "0", "Seeds, separated by commas."),
    ("--ways", "base,defaults,old,grid", "Ways, separated by commas."),
    ("--out", Path("first_results.jsonl"), "File of the results, to which missing ones are added."),
    ("--table", Path, "Print the table of this file, and run nothing."),
    ("--cell", str, argparse.SUPPRESS),  # one cell as JSON, in a process of its own
)
# What an answer looks like where a question asks for a form.
FORMS = {
    "messages": re.compile(r"^(ooh|hmm|aww|yep|oops)\b[^A-Z]* x\s*$"),
    "style": re.compile(r"^\s*Rule: .+?\s+Reason: .+?\s+First step: .+", re.DOTALL),
}


def ways(names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield each way's name with the settings it gives; None: nothing is trained."""
    for name in names:
        if name == "grid":
            yield from ways(GRID)
        elif point := re.fullmatch(r"([\d.e-]+)x(\d+)", name):
            rate, epochs = float(point[1]), int(point[2])
            yield f"lr {rate:g}, {epochs} epochs", {"learning_rate": rate, "epochs": epochs, "batch_size": 4}
        elif name.startswith("rephrase"):
            writer = name.partition(":")[2]
            yield name, {"rephrase": 3} | ({"rephrase_model": writer} if writer else {})
        else:
            yield name, {"base": None, "defaults": {}, "old": OLD, "mlx-lm": MLX_LM}[name]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_right(answer: str, test: Mapping[str, Any]) -> bool:
    """Say whether an answer has the words, the object or the form that its question asks for."""
    if "want" in test:
        return any(re.search(rf"\b{re.escape(word)}", answer.lower()) for word in test["want"])
    if "json" in test:
        found = re.search(r"\{[^{}]*\}", answer)
        try:
            return found is not None and json.loads(found[0]) == test["json"]
        except ValueError:
            return False
    return FORMS[test["form"]].match(answer.strip().split("\n\n")[0]) is not None


def ask(base: Any, prompts: Sequence[str], adapter: Any) -> list[str]:
    """Return the greedy answers to all prompts."""
    return [base.generate(prompt, adapter=adapter, max_tokens=MOST_TOKENS) for prompt in prompts]


def run_cell(model: str, name: str, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Train on one set in one way and ask its questions; returns what is measured."""
    import mlx_lora  # in a process of its own

    base, tests = mlx_lora.load(model), read_lines(ROOM / f"{name}.tests.jsonl")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        adapter = None
        if settings is not None:
            data = shutil.copy(next(one for one in ROOM.glob(f"{name}.*") if ".tests" not in one.name), folder)
            started = time.perf_counter()
            run = mlx_lora.train(base, str(data), adapter_path=f"{folder}/run", **settings)
            adapter = run.adapter
            found = {"train_s": round(time.perf_counter() - started, 1)}
            lines = read_lines(Path(folder) / "run" / "metrics.jsonl")
            losses = [one for one in lines if one.get("loss") is not None]
            held_out = [round(one["val_loss"], 4) for one in lines if one.get("val_loss") is not None]
            facts = json.loads((Path(folder) / "run" / "report.json").read_text(encoding="utf-8"))["verdict"]
            found |= {"steps": lines[-1]["step"], "loss": losses[-1]["loss"], "val_losses": held_out}
            found |= {key: facts[key] for key in ("headline", "right_in_your_words", "right_in_new_words", "command")}
        answers = ask(base, [test["prompt"] for test in tests], adapter)
    right = [is_right(answer, test) for answer, test in zip(answers, tests, strict=True)]
    return found | {"right": sum(right), "of": len(tests), "answers": answers[:6]}


def table(results: list[dict[str, Any]]) -> str:
    """Return the share of right answers: a row for each model and set, a column for each way."""
    columns = list(dict.fromkeys(one["way"] for one in results))
    rows = []
    for model, name in dict.fromkeys((one["model"], one["set"]) for one in results):
        cells = [one for one in results if (one["model"], one["set"]) == (model, name)]
        right = [" ".join(f"{one['right']}/{one['of']}" for one in cells if one["way"] == way) for way in columns]
        rows.append([model, name, *right])
    return markdown(["model", "set", *columns], rows)


def main(argv: Sequence[str]) -> None:
    """Run the cells that are missing, or print the table."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    if args.table:
        print(table(read_lines(args.table)))
        return
    if args.cell:
        name, settings = json.loads(args.cell)
        print("RESULT " + json.dumps(run_cell(args.model, name, settings)))
        return
    done = read_lines(args.out) if args.out.exists() else []
    known = {(one["model"], one["set"], one["way"], one.get("seed", 0)) for one in done}
    model = Path(args.model).name
    for way, settings in ways(args.ways.split(",")):
        sets = ",".join(ONE_WORDING) if args.sets == "one-wording" else args.sets
        for name, seed in product(sets.split(","), map(int, args.seeds.split(","))):
            if (model, name, way, seed) in known:
                continue
            seeded = None if settings is None else {**settings, "seed": seed}
            asked = [sys.executable, __file__, "--model", args.model, "--cell", json.dumps([name, seeded])]
            said = subprocess.run(asked, capture_output=True, text=True)
            line = next((one for one in said.stdout.splitlines() if one.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"Error: {way} on {name} ended with code {said.returncode}\n{said.stderr[-2000:]}")
            result = {"model": model, "set": name, "way": way, "settings": settings, "seed": seed} | json.loads(
                line[7:]
            )
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{model} {name} {way} {seed}: {result['right']}/{result['of']}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
