"""Compare training on pictures with mlx-vlm's own trainer: tokens per second, peak memory, losses, and what each would train.

    python benchmarks/vision_peers.py --model DENSE_SMOLLM2 --out FOLDER
    python benchmarks/vision_peers.py --model DENSE_SMOLLM2 --out FOLDER --only masks

Both sides train the same small model (the first blocks of SmolLM2, in SmolVLM's format, with a random tower) on the same rows, with
the same initial factors, AdamW and batches, each in its own process; the sides take turns. A row is one question about one picture,
so that both train the same tokens but for those that a template writes after the end of a turn. In our first step, the tower
sees the pictures; later steps, as in a second epoch, read what it saw. A third side is ours without that; its losses must be equal.
mlx-vlm asks the tower in each step.

For rows of other kinds, what mlx-vlm's dataset makes of them is compared with ours, whose masks are tested against transformers'.

Ends with one line of JSON.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _harness import cell, environment, options, paired_ratio, record, run_side, say, spread, table, take_turns
from _small_vlm import KINDS, draw, run, write_base
from PIL import Image

TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
SIDE, PATCH = 224, 16
OPTIONS = (
    ("--model", ..., "SmolLM2 as a folder in float32."),
    ("--out", ..., "Folder for the model, rows and runs; what is there is used again."),
    ("--blocks", 4, "Blocks of SmolLM2 that are kept, the first ones."),
    # With more, mlx-vlm 0.7.10 stops: it gives SmolVLM's attention a mask of the shape (rows, tokens).
    ("--rows", 1, "Rows, all of which are one batch, so that both sides take the same steps."),
    ("--steps", 5, "Steps of a run."),
    ("--rounds", 3, "Runs of each side."),
    ("--learning-rate", 1e-3, "Of both."),
    ("--only", "all", "What to compare.", ("all", "masks")),
    ("--record", "", "JSON file for the result."),
)


def picture(folder: Path, name: str, rng: random.Random) -> tuple[str, str]:
    """Draw a picture into a folder, and return a question about it and the answer."""
    kind = rng.choices([kind for kind, _ in KINDS], [share for _, share in KINDS])[0]
    image, question, answer = draw(kind, rng)
    image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / name)
    return question, answer


def write_rows(folder: Path, count: int) -> Path:
    """Write rows of one question about one picture."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(0), []
    for number in range(count):
        question, answer = picture(folder, f"{number}.png", rng)
        rows.append({"messages": [user(question, 1), assistant(answer)], "images": [f"{number}.png"]})
    return written(folder, rows)


def write_kinds(folder: Path) -> Path:
    """Write a row of each kind that people have."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    for number in range(4):
        picture(folder, f"{number}.png", rng)
    kinds = {
        "one question": ([user("What is it?", 1), assistant("A cat.")], 1),
        "text beside the picture's column": ([{"role": "user", "content": "What is it?"}, assistant("A cat.")], 1),
        "two pictures in one question": ([user("The same?", 2), assistant("No.")], 2),
        "two questions about one picture": ([user("What is it?", 1), assistant("A cat."), user("And its color?", 0), assistant("Red.")], 1),
        "a picture in each of two questions": ([user("What is it?", 1), assistant("A cat."), user("And this?", 1), assistant("A dog.")], 2),
        "a picture in the second question": ([user("Hello", 0), assistant("Hi."), user("What is it?", 1), assistant("A cat.")], 1),
        "no picture": ([user("Hello", 0), assistant("Hi.")], 0),
    }  # fmt: skip
    rows = []
    for kind, (messages, pictures) in kinds.items():
        images = {"images": [f"{number}.png" for number in range(pictures)]} if pictures else {}
        rows.append({"kind": kind, "messages": messages, **images})
    return written(folder, rows)


def user(text: str, pictures: int) -> dict[str, Any]:
    return {"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def written(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file = folder / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def as_published(folder: Path) -> Path:
    """Give a model's tensors the names and layouts of published ones, with a head of its own, as both sides read; return its folder."""
    import mlx.core as mx

    file, config = folder / "model.safetensors", folder / "config.json"
    stored = mx.load(str(file))
    assert isinstance(stored, dict)
    if "lm_head.weight" not in stored:
        named = {name.replace("language_model.model.", "text_model."): w for name, w in stored.items()}
        weights = {
            f"model.{name}": mx.contiguous(mx.moveaxis(w, -1, 1)) if w.ndim == 4 else w for name, w in named.items()
        }
        weights["lm_head.weight"] = weights["model.text_model.embed_tokens.weight"]
        mx.eval(weights)
        mx.save_safetensors(str(file), weights, metadata={"format": "pt"})
        values = json.loads(config.read_text(encoding="utf-8"))
        text = values["text_config"]
        text["tie_word_embeddings"] = values["tie_word_embeddings"] = False
        text["rope_theta"] = text["rope_parameters"][
            "rope_theta"
        ]  # as in published files; mlx-vlm reads no rope_parameters
        config.write_text(json.dumps(values), encoding="utf-8")
    return folder


def factors(model: Path, data: Path, rows: int, out: Path) -> dict[str, str]:
    """Return the folders of the initial factors, as ours and as mlx-vlm's; one step with no rate to speak of makes them."""
    ours, theirs = out / "initial", out / "initial-mlx-vlm"
    if not theirs.is_dir():
        run("train", "--model", model, "--data", data, "--adapter-path", ours, "--iters", 1, "--rank", 8,
            "--alpha", 16, "--batch-size", rows, "--learning-rate", 1e-12, "--kernels", "ours", "--valid-fraction", 0, "--force")  # fmt: skip
        run("export", "--model", model, "--adapter-path", ours, "--to", "mlx-vlm", "--out", theirs)
    return {"adapter": str(ours), "exported": str(theirs)}


def figures(steps: Sequence[Mapping[str, float]], tokens: int, result: Mapping[str, Any]) -> dict[str, float]:
    """Return a run's figures: of the first step, and medians of the later ones."""
    later = {name: statistics.median(step[name] for step in steps[1:]) for name in ("wall_s", "cpu_s")}
    return {
        "tokens_per_cpu_s": tokens / later["cpu_s"],
        "tokens_per_s": tokens / later["wall_s"],
        "first_cpu_s": steps[0]["cpu_s"],
        "later_cpu_s": later["cpu_s"],
        "peak_mb": result["peak_bytes"] / 1e6,
        "last_loss": steps[-1]["loss"],
    }


def shown(row: Mapping[str, Any], way: str) -> str:
    """Return in words how mlx-vlm's mask of a row differs from ours."""
    found = row[way]
    if "error" in found:
        return f"refused: {found['error']}"
    if not found["same_tokens"]:
        return f"other tokens; {found['trained']} trained, {found['of_pictures']} of them of pictures"
    words = f"{found['missing']} of {row['trained']} missing, {found['more']} more"
    return words + (f", {found['of_pictures']} of pictures" if found["of_pictures"] else "")


def main() -> None:
    """Measure, print tables, and end with one line of JSON."""
    asked = options(__doc__, *OPTIONS).parse_args()
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    model = as_published(write_base(Path(asked.model), out / "base", asked.blocks, TOWER, SIDE, PATCH))
    kinds = write_kinds(out / "kinds")
    masks, _ = run_side(
        "vision_side.py", {"who": "masks", "model": str(model), "data": str(kinds)}, out, "masks", timeout_s=1800
    )
    rows = masks["rows"]
    print(table(("row", "trained tokens", "mlx-vlm, train_on_completions", "mlx-vlm, default"),
                [(row["kind"], row["trained"], shown(row, "completions"), shown(row, "default")) for row in rows]))  # fmt: skip
    result: dict[str, Any] = {"environment": environment(), "options": vars(asked), "masks": rows}
    if asked.only == "all":
        result |= compared(asked, model, out)
    record(result, asked.record)


def compared(asked: Any, model: Path, out: Path) -> dict[str, Any]:
    """Return the figures of both trainers."""
    data = write_rows(out / "rows", asked.rows)
    job = {"model": str(model), "data": str(data), "steps": asked.steps, "batch_size": asked.rows, "learning_rate": asked.learning_rate,
           **factors(model, data, asked.rows, out)}  # fmt: skip
    say("rows: " + data.read_text(encoding="utf-8")[:200])
    sides: dict[str, Any] = {}
    for who in ("ours", "ours, seen anew", "mlx-vlm"):

        def turn(number: int, who: str = who) -> dict[str, Any]:
            found, _ = run_side(
                "vision_side.py", {**job, "who": who, "anew": "anew" in who}, out, f"{who}-{number}", timeout_s=3600
            )
            say(f"{who}, round {number}: losses {[round(step['loss'], 4) for step in found['steps']]}")
            return found

        sides[who] = turn
    found = take_turns(sides, asked.rounds)
    tokens = row_tokens(model, data)
    each = {who: [figures(run["steps"], tokens, run) for run in runs] for who, runs in found.items()}
    names = {"tokens_per_cpu_s": 1, "tokens_per_s": 1, "first_cpu_s": 2, "later_cpu_s": 2, "peak_mb": 0, "last_loss": 4}
    ratios = {
        name: paired_ratio([one[name] for one in each["ours"]], [one[name] for one in each["mlx-vlm"]])
        for name in names
    }
    print(table(("figure", *each, "ours / mlx-vlm"),
                [(name, *(cell(spread(one[name] for one in each[who]), 1, digits) for who in each), cell(ratios[name], 1, 3))
                 for name, digits in names.items()]))  # fmt: skip
    return {"tokens": tokens, "runs": found, "ratios": ratios}


def row_tokens(model: Path, data: Path) -> int:
    """Return the tokens of all rows, those of pictures included, as the reports of our runs count them."""
    side = SIDE // PATCH // 2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    texts = [tokenizer.apply_chat_template(one["messages"], tokenize=False) for one in records]
    return sum(len(tokenizer(text)["input_ids"]) for text in texts) + len(texts) * (side * side + 2)  # with its edges


if __name__ == "__main__":
    main()
