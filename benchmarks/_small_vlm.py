"""A small model in SmolVLM's format, and pictures with questions that it can learn: for vision_peers.py.

No weights of a model that sees are needed: the language part is the first blocks of SmolLM2; tower and connector are random.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from _harness import say
from PIL import Image, ImageDraw, ImageFont

DRAWN = 48  # pixels of a picture
SCALE = 2  # patches along each side that become one token
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
INKS = ((150, 20, 20), (10, 100, 30), (20, 40, 150), (0, 0, 0))
WORDS = ("cat", "dog", "sun", "map", "cup", "hat", "box", "key", "bus", "pen", "egg", "fan")
SHAPES, BARS = ("circle", "square", "triangle"), ("left", "middle", "right")
KINDS = (("number", 0.6), ("shape", 0.2), ("word", 0.1), ("chart", 0.1))


def draw(kind: str, rng: random.Random) -> tuple[Image.Image, str, str]:
    """Return a picture with a question about it and the answer."""
    image = Image.new("RGB", (DRAWN, DRAWN), tuple(rng.randint(225, 255) for _ in range(3)))
    pen, color = ImageDraw.Draw(image), rng.choice(list(COLORS))
    if kind == "shape":
        shape, side = rng.choice(SHAPES), rng.randint(18, 34)
        x, y = rng.randint(2, DRAWN - side - 2), rng.randint(2, DRAWN - side - 2)
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
    write_digits(pen, digits, rng, rng.choice(INKS))
    return image, "Which number?", digits


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], color: tuple[int, ...]) -> None:
    x, y, right, bottom = box
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        pen.polygon(((x, bottom), (right, bottom), ((x + right) // 2, y)), fill=color)


def write_digits(pen: ImageDraw.ImageDraw, digits: str, rng: random.Random, color: tuple[int, ...]) -> None:
    """Write three digits in the middle, each within one of the model's three columns of tokens, up to a pixel off."""
    font = ImageFont.load_default(20)
    for number, digit in enumerate(digits):
        pen.text((1 + 16 * number + rng.randint(0, 1), 11 + rng.randint(0, 1)), digit, color, font)


def write_base(source: Path, folder: Path, blocks: int, tower_config: Mapping[str, int], side: int, patch: int) -> Path:
    """Write a model in SmolVLM's format: the first blocks of SmolLM2, and a tower and a connector with random weights.

    Args:
        source: folder of SmolLM2, in float32.
        folder: is written, unless it is there.
        blocks: that are kept.
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
    mx.random.seed(0)
    tower = build_tower(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    weights |= {name: w for name, w in tree_flatten(tower.parameters()) if not name.startswith(LANGUAGE)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def run(*words: object) -> None:
    """Run a command of mlx-lora."""
    command = [sys.executable, "-m", "mlx_lora", *map(str, words)]
    say(" ".join(command[3:]))
    subprocess.run(command, check=True, stdout=sys.stderr)
