"""Build a small model that sees, train its tower on rendered pictures, then a LoRA by all defaults, and measure what is read.

    python benchmarks/small_vlm.py --model DENSE_SMOLLM2 --out FOLDER
    python benchmarks/small_vlm.py --model DENSE_SMOLLM2 --out FOLDER --pictures 64 --task-rows 16 --held-out 8     a trial

No weights of a model that sees are needed: the language part is the first blocks of SmolLM2, in SmolVLM's format; tower and
connector begin at random. `train --method full --train-vision full --train-connector full` teaches it numbers, shapes, words
and charts on seeded pictures, and `fuse` writes the model. Then `train`, with its own defaults, adapts it to one task: the
total of a receipt-like picture, as JSON. The share of exact answers to held-out pictures is measured before and after, and
again with each picture swapped for another one's, and with blank pictures: an answer that is still right was not read.
Numbers of the held-out receipts are not among those of the training receipts.

Writes FOLDER/answers.png, and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _harness import environment, options, record, table
from _small_vlm import DRAWN, KINDS, draw, run, write_base, write_digits
from PIL import Image, ImageDraw, ImageFont

PATCH = 8  # pixels of a side; 6 x 6 patches become 3 x 3 tokens
TOWER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
TASK = "Give the total as JSON."
OPTIONS = (
    ("--model", ..., "SmolLM2 as a folder in float32."),
    ("--out", ..., "Folder for pictures, runs and models; finished parts are used again."),
    ("--blocks", 2, "Blocks of SmolLM2 that are kept, the first ones."),
    ("--pictures", 16000, "Pictures that the model is trained on, each once."),
    ("--batch-size", 8, "Of that training."),
    ("--learning-rate", 1e-3, "Of that training."),
    ("--task-rows", 300, "Pictures that the LoRA is trained on."),
    ("--held-out", 100, "Pictures that are measured."),
    ("--seed", 0, "Of the pictures and of both runs."),
    ("--record", "", "JSON file for the result."),
)


def receipt(rng: random.Random) -> tuple[Image.Image, str, str]:
    """Return a picture with lines of gray, like text too small to read, and a total between them."""
    image = Image.new("RGB", (DRAWN, DRAWN), (250, 248, 240))
    pen, digits = ImageDraw.Draw(image), str(rng.randint(100, 999))
    for top in (2, 7, 39, 44):
        pen.rectangle((4, top, rng.randint(20, 44), top + 2), fill=(170, 170, 170))
    write_digits(pen, digits, rng, (40, 40, 40))
    return image, TASK, json.dumps({"total": int(digits)})


def write_rows(
    folder: Path, name: str, count: int, seed: int, task: bool, known: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Draw pictures into a folder, and write a data file about them; return its rows, none of which has a known answer."""
    rng, rows = random.Random(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    while len(rows) < count:
        kind = rng.choices([kind for kind, _ in KINDS], [share for _, share in KINDS])[0]
        image, question, answer = receipt(rng) if task else draw(kind, rng)
        if answer in known:
            continue
        file = f"{name}-{len(rows):05d}.png"
        image.save(folder / file)
        rows.append({"images": [file], "prompt": question, "completion": answer})
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return rows


def taught(base: Path, data: Path, folder: Path, asked: argparse.Namespace) -> tuple[Path, float]:
    """Train the whole model on pictures, and return the folder of the fused one, and the seconds of the run."""
    fused, adapter = folder / "model", folder / "run"
    if fused.is_dir():
        return fused, float("nan")
    begin = time.perf_counter()
    run(
        "train", "--model", base, "--data", data, "--adapter-path", adapter, "--objective", "vision_sft", "--method", "full",
        "--train-vision", "full", "--train-connector", "full", "--epochs", 1, "--batch-size", asked.batch_size,
        "--learning-rate", asked.learning_rate, "--warmup", 0.05, "--valid-fraction", 0.01, "--seed", asked.seed, "--resume", "auto",
        "--save-every", 500, "--steps-per-report", 50, "--sample-tokens", 0,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    run("fuse", "--model", base, "--adapter-path", adapter, "--out", fused)
    return fused, seconds


def answers(model: Path, adapter: Path | None, pictures: Sequence[Path], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the greedy answers to the rows' questions about these pictures."""
    from mlx_lora.api.base import TextSettings
    from mlx_lora.api.image_answers import image_answer_pieces
    from mlx_lora.config.settings import ModelSettings
    from mlx_lora.exporters.adapter_folder import load_adapter
    from mlx_lora.models.load import load_base

    base = load_base(ModelSettings(model=str(model)))
    if adapter:
        load_adapter(base, adapter)
    how = TextSettings(max_tokens=24, temperature=0.0)
    return [
        "".join(piece.text for piece in image_answer_pieces(base, row["prompt"], [picture], None, None, how)).strip()
        for picture, row in zip(pictures, rows, strict=True)
    ]


def exact(found: Sequence[str], rows: Sequence[dict[str, Any]]) -> float:
    """Return the share of answers that are exactly those of the rows."""
    return sum(text == row["completion"] for text, row in zip(found, rows, strict=True)) / len(rows)


def scores(model: Path, adapter: Path | None, folder: Path, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of exact answers about the rows' own pictures, about the next row's, and about blank ones."""
    own = [folder / row["images"][0] for row in rows]
    blank = folder / "blank.png"
    Image.new("RGB", (DRAWN, DRAWN), (250, 248, 240)).save(blank)
    sets = {"own": own, "swapped": [*own[1:], own[0]], "blank": [blank] * len(rows)}
    return {name: exact(answers(model, adapter, pictures, rows), rows) for name, pictures in sets.items()}


def show(
    file: Path, pictures: Sequence[Path], rows: Sequence[dict[str, Any]], columns: dict[str, Sequence[str]]
) -> None:
    """Draw pictures with what was expected and answered."""
    tall, font = 3 * DRAWN + 16, ImageFont.load_default(18)
    sheet = Image.new("RGB", (tall + 3 * 300, tall * len(rows) + 40), "white")
    pen = ImageDraw.Draw(sheet)
    columns = {"expected": [row["completion"] for row in rows], **columns}
    for column, (name, texts) in enumerate(columns.items()):
        pen.text((tall + 300 * column, 10), name, "black", font)
        for line, text in enumerate(texts):
            right = text == rows[line]["completion"]
            shown = text if len(text) <= 28 else text[:27] + "…"
            pen.text(
                (tall + 300 * column, 40 + tall * line + tall // 2 - 10),
                shown,
                "black" if right else (170, 30, 30),
                font,
            )
    for line, picture in enumerate(pictures):
        sheet.paste(Image.open(picture).resize((3 * DRAWN, 3 * DRAWN), Image.Resampling.NEAREST), (8, 40 + tall * line))
    sheet.save(file)


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    asked = options(__doc__, *OPTIONS).parse_args()
    out = Path(asked.out)
    base = write_base(Path(asked.model), out / "base", asked.blocks, TOWER, DRAWN, PATCH)
    general, task = out / "general", out / "task"
    write_rows(general, "train", asked.pictures, asked.seed, task=False)
    known = write_rows(out / "general-held-out", "test", asked.held_out, asked.seed + 1, task=False)
    seen = [row["completion"] for row in write_rows(task, "train", asked.task_rows, asked.seed + 2, task=True)]
    held_out = write_rows(out / "task-held-out", "test", asked.held_out, asked.seed + 3, task=True, known=seen)
    model, seconds = taught(base, general, out / "taught", asked)
    adapter = out / "lora"
    shutil.rmtree(adapter, ignore_errors=True)
    begin = time.perf_counter()
    run("train", "--model", model, "--data", task, "--adapter-path", adapter, "--objective", "vision_sft")
    lora_s = time.perf_counter() - begin
    found = {
        "what it was taught, held out": scores(model, None, out / "general-held-out", known),
        "the task, before": scores(model, None, out / "task-held-out", held_out),
        "the task, after": scores(model, adapter, out / "task-held-out", held_out),
    }
    kinds = {question: [row for row in known if row["prompt"] == question] for question in {r["prompt"] for r in known}}
    by_kind = {q: exact(answers(model, None, [out / "general-held-out" / r["images"][0] for r in rows], rows), rows) for q, rows in kinds.items()}  # fmt: skip
    shown = [out / "task-held-out" / row["images"][0] for row in held_out[:6]]
    both = {
        name: answers(model, which, shown, held_out[:6])
        for name, which in (("before", None), ("with the adapter", adapter))
    }
    show(out / "answers.png", shown, held_out[:6], both)
    print(table(("exact answers", "own picture", "another's", "blank"), [(name, *(f"{v:.0%}" for v in row.values())) for name, row in found.items()]))  # fmt: skip
    print(table(("kind", "exact"), [(name, f"{value:.0%}") for name, value in by_kind.items()]))
    result = {"environment": environment(), "options": vars(asked), "exact": found, "by_kind": by_kind, "taught_s": seconds, "lora_s": lora_s}  # fmt: skip
    record(result, asked.record, ("exact", "by_kind", "taught_s", "lora_s"))


if __name__ == "__main__":
    main()
