"""Build a small model that sees, train its tower on rendered pictures, then a LoRA by all defaults, and measure what is read.

    python benchmarks/small_vlm.py --model DENSE_SMOLLM2 --out FOLDER
    python benchmarks/small_vlm.py --model DENSE_SMOLLM2 --out FOLDER --pictures 64 --task-rows 16 --held-out 8     a trial

No weights of a model that sees are needed: the language part is the first blocks of SmolLM2, in SmolVLM's format; tower and
connector begin at random. `train --method full --train-vision full --train-connector full` teaches it numbers, shapes, words
and charts on seeded pictures, and `fuse` writes the model. Then `train`, with its own defaults, adapts it to one task: the
total of a receipt-like picture, as JSON. The share of exact answers to held-out pictures is measured before and after, and
again with each picture swapped for another one's, and with blank pictures: an answer that is still right was not read.

Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _harness import environment, options, record, say, table
from PIL import Image, ImageDraw, ImageFont

SIDE, PATCH, SCALE = 48, 8, 2  # pixels of a picture and of a patch; 6 x 6 patches become 3 x 3 tokens
TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
# SmolLM2 has tokens that no chat uses; SmolVLM's get their ids, so that no row is added to the embedding.
RENAMED = {
    "<jupyter_start>": "<image>",
    "<jupyter_text>": "<fake_token_around_image>",
    "<jupyter_code>": "<global-img>",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLORS = {"red": (210, 30, 30), "green": (20, 150, 40), "blue": (30, 60, 210), "black": (0, 0, 0)}
WORDS = ("cat", "dog", "sun", "map", "cup", "hat", "box", "key", "bus", "pen", "egg", "fan")
SHAPES, BARS = ("circle", "square", "triangle"), ("left", "middle", "right")
KINDS = (("number", 0.6), ("shape", 0.2), ("word", 0.1), ("chart", 0.1))
TASK = "Give the total as JSON."
OPTIONS = (
    ("--model", ..., "SmolLM2 as a folder in float32."),
    ("--out", ..., "Folder for pictures, runs and models; finished parts are used again."),
    ("--blocks", 4, "Blocks of SmolLM2 that are kept, the first ones."),
    ("--pictures", 12000, "Pictures that tower and connector are trained on, each once."),
    ("--learning-rate", 5e-4, "Of that training."),
    ("--task-rows", 400, "Pictures that the LoRA is trained on."),
    ("--held-out", 100, "Pictures that are measured."),
    ("--seed", 0, "Of the pictures and of both runs."),
    ("--record", "", "JSON file for the result."),
)


# --- pictures


def draw(kind: str, rng: random.Random) -> tuple[Image.Image, str, str]:
    """Return a picture with a question about it and the answer."""
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(225, 255) for _ in range(3)))
    pen, color = ImageDraw.Draw(image), rng.choice(list(COLORS))
    if kind == "shape":
        shape, side = rng.choice(SHAPES), rng.randint(18, 34)
        x, y = rng.randint(2, SIDE - side - 2), rng.randint(2, SIDE - side - 2)
        _draw_shape(pen, shape, (x, y, x + side, y + side), COLORS[color])
        return image, "Which shape?", f"{color} {shape}"
    if kind == "chart":
        heights = rng.sample(range(6, 40, 4), 3)
        for number, height in enumerate(heights):
            pen.rectangle((6 + 14 * number, 44 - height, 14 + 14 * number, 44), fill=COLORS[color])
        return image, "Which bar is highest?", BARS[heights.index(max(heights))]
    if kind == "word":
        word = rng.choice(WORDS)
        pen.text((rng.randint(3, 8), rng.randint(8, 20)), word, COLORS[color], ImageFont.load_default(20))
        return image, "Which word?", word
    digits = "".join(rng.choices("0123456789", k=3))
    _write_digits(pen, digits, rng, COLORS[color], rng.randint(6, 22))
    return image, "Which number?", digits


def receipt(rng: random.Random) -> tuple[Image.Image, str, str]:
    """Return a picture with lines of gray, like text too small to read, and a total below them."""
    image = Image.new("RGB", (SIDE, SIDE), (250, 248, 240))
    pen, digits = ImageDraw.Draw(image), "".join(rng.choices("0123456789", k=3))
    for line in range(2):
        pen.rectangle((4, 4 + 5 * line, rng.randint(20, 44), 6 + 5 * line), fill=(170, 170, 170))
    _write_digits(pen, digits, rng, (40, 40, 40), rng.randint(17, 22))
    pen.rectangle((16, 43, 17, 44), fill=(40, 40, 40))  # the point
    return image, TASK, json.dumps({"total": f"{digits[0]}.{digits[1:]}"})


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], color: tuple[int, ...]) -> None:
    x, y, right, bottom = box
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        pen.polygon(((x, bottom), (right, bottom), ((x + right) // 2, y)), fill=color)


def _write_digits(pen: ImageDraw.ImageDraw, digits: str, rng: random.Random, color: tuple[int, ...], top: int) -> None:
    font = ImageFont.load_default(rng.randint(19, 22))
    for number, digit in enumerate(digits):
        pen.text((2 + 15 * number + rng.randint(0, 2), top - 4 + rng.randint(-1, 1)), digit, color, font)


def write_rows(folder: Path, name: str, count: int, seed: int, task: bool) -> list[dict[str, Any]]:
    """Draw pictures into a folder, and write a data file about them; return its rows."""
    rng, rows = random.Random(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        kind = rng.choices([kind for kind, _ in KINDS], [share for _, share in KINDS])[0]
        image, question, answer = receipt(rng) if task else draw(kind, rng)
        file = f"{name}-{number:05d}.png"
        image.save(folder / file)
        rows.append({"images": [file], "prompt": question, "completion": answer})
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return rows


# --- the model


def write_base(
    source: Path,
    folder: Path,
    blocks: int,
    seed: int,
    tower_config: Mapping[str, int] = TOWER,
    side: int = SIDE,
    patch: int = PATCH,
) -> Path:
    """Write a model in SmolVLM's format: the first blocks of SmolLM2, and a tower and a connector with random weights.

    Args:
        source: folder of SmolLM2, in float32.
        folder: is written, unless it is there.
        blocks: that are kept.
        seed: of the random weights.
        tower_config: widths and number of its blocks.
        side: of a picture, in pixels.
        patch: side of a patch, in pixels.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from transformers import AutoTokenizer, SmolVLMConfig

    from mlx_lora.models.vision import LANGUAGE, build_tower

    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    text = json.loads((source / "config.json").read_text(encoding="utf-8"))
    words = (source / "tokenizer.json").read_text(encoding="utf-8")
    for old, new in RENAMED.items():
        words = words.replace(json.dumps(old), json.dumps(new))
    (folder / "tokenizer.json").write_text(words, encoding="utf-8")
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
            "vocab_size", "max_position_embeddings", "rope_theta", "tie_word_embeddings", "bos_token_id", "eos_token_id")  # fmt: skip
    config = SmolVLMConfig(
        text_config={**{name: text[name] for name in kept}, "model_type": "llama", "num_hidden_layers": blocks},
        vision_config={**tower_config, "image_size": side, "patch_size": patch},
        scale_factor=SCALE,
        image_token_id=AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<image>"),
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    config.save_pretrained(folder)
    image_processor = {
        "image_processor_type": "SmolVLMImageProcessor", "do_image_splitting": False, "do_convert_rgb": True, "do_pad": True,
        "size": {"longest_edge": side}, "max_image_size": {"longest_edge": side}, "processor_class": "SmolVLMProcessor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor), encoding="utf-8")
    own = {"processor_class": "SmolVLMProcessor", "image_seq_len": (side // patch // SCALE) ** 2}
    (folder / "processor_config.json").write_text(json.dumps(own), encoding="utf-8")

    stored = mx.load(str(source / "model.safetensors"))
    assert isinstance(stored, dict)
    beyond = [f"model.layers.{number}." for number in range(blocks, text["num_hidden_layers"])]
    weights = {f"language_model.{n}": w for n, w in stored.items() if not n.startswith(tuple(beyond))}
    mx.random.seed(seed)
    tower = build_tower(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    weights |= {name: w for name, w in tree_flatten(tower.parameters()) if not name.startswith(LANGUAGE)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def run(*words: object) -> float:
    """Run a command of mlx-lora, and return its seconds."""
    command = [sys.executable, "-m", "mlx_lora", *map(str, words)]
    say(" ".join(command[3:]))
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    return time.perf_counter() - begin


def taught(base: Path, data: Path, folder: Path, asked: argparse.Namespace) -> tuple[Path, float]:
    """Train the whole model on pictures, and return the folder of the fused one, and the seconds of the run."""
    fused, adapter = folder / "model", folder / "run"
    if fused.is_dir():
        return fused, float("nan")
    seconds = run(
        "train", "--model", base, "--data", data, "--adapter-path", adapter, "--objective", "vision_sft", "--method", "full",
        "--train-vision", "full", "--train-connector", "full", "--epochs", 1, "--batch-size", 16, "--learning-rate",
        asked.learning_rate, "--warmup", 0.05, "--valid-fraction", 0.01, "--seed", asked.seed, "--resume", "auto",
        "--save-every", 100, "--steps-per-report", 25,
    )  # fmt: skip
    run("fuse", "--model", base, "--adapter-path", adapter, "--out", fused)
    return fused, seconds


def exact(model: Path, adapter: Path | None, pictures: Sequence[Path], rows: Sequence[dict[str, Any]]) -> float:
    """Return the share of rows that are answered exactly, greedily, about these pictures."""
    from mlx_lora.api.base import TextSettings
    from mlx_lora.api.image_answers import image_answer_pieces
    from mlx_lora.config.settings import ModelSettings
    from mlx_lora.exporters.adapter_folder import load_adapter
    from mlx_lora.models.load import load_base

    base = load_base(ModelSettings(model=str(model)))
    if adapter:
        load_adapter(base, adapter)
    how, right = TextSettings(max_tokens=24, temperature=0.0), 0
    for picture, row in zip(pictures, rows, strict=True):
        pieces = image_answer_pieces(base, row["prompt"], [picture], None, None, how)
        right += "".join(piece.text for piece in pieces).strip() == row["completion"]
    return right / len(rows)


def scores(model: Path, adapter: Path | None, folder: Path, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of exact answers about the rows' own pictures, about the next row's, and about blank ones."""
    own = [folder / row["images"][0] for row in rows]
    blank = folder / "blank.png"
    Image.new("RGB", (SIDE, SIDE), (250, 248, 240)).save(blank)
    sets = {"own": own, "swapped": [*own[1:], own[0]], "blank": [blank] * len(rows)}
    return {name: exact(model, adapter, pictures, rows) for name, pictures in sets.items()}


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    asked = options(__doc__, *OPTIONS).parse_args()
    out = Path(asked.out)
    base = write_base(Path(asked.model), out / "base", asked.blocks, asked.seed)
    general, task = out / "general", out / "task"
    write_rows(general, "train", asked.pictures, asked.seed, task=False)
    known = write_rows(out / "general-held-out", "test", asked.held_out, asked.seed + 1, task=False)
    write_rows(task, "train", asked.task_rows, asked.seed + 2, task=True)
    held_out = write_rows(out / "task-held-out", "test", asked.held_out, asked.seed + 3, task=True)
    model, seconds = taught(base, general, out / "taught", asked)
    adapter = out / "lora"
    shutil.rmtree(adapter, ignore_errors=True)
    lora_s = run("train", "--model", model, "--data", task, "--adapter-path", adapter, "--objective", "vision_sft")
    found = {
        "what it was taught, held out": scores(model, None, out / "general-held-out", known),
        "the task, before": scores(model, None, out / "task-held-out", held_out),
        "the task, after": scores(model, adapter, out / "task-held-out", held_out),
    }
    kinds = {question: [row for row in known if row["prompt"] == question] for question in {r["prompt"] for r in known}}
    by_kind = {q: exact(model, None, [out / "general-held-out" / r["images"][0] for r in rows], rows) for q, rows in kinds.items()}  # fmt: skip
    print(table(("exact answers", "own picture", "another's", "blank"), [(name, *(f"{v:.0%}" for v in row.values())) for name, row in found.items()]))  # fmt: skip
    print(table(("kind", "exact"), [(name, f"{value:.0%}") for name, value in by_kind.items()]))
    result = {"environment": environment(), "options": vars(asked), "exact": found, "by_kind": by_kind, "taught_s": seconds, "lora_s": lora_s}  # fmt: skip
    record(result, asked.record, ("exact", "by_kind", "taught_s", "lora_s"))


if __name__ == "__main__":
    main()
