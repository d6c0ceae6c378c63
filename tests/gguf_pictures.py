"""llama.cpp's own words about a picture, with a tiny model's two GGUF files, beside ours."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import tiny_vision
from byte_tokenizer import byte_tokenizer
from gguf_judge import N_PRINTABLE
from make_adapters import loaded
from mlx.utils import tree_flatten

from mlx_lora.adapters.inject import adapter_parameters, inject, select_targets
from mlx_lora.config.settings import AdapterSettings, DataSettings
from mlx_lora.data.image_tokens import ImageReader, ImageTable
from mlx_lora.exporters.adapter_folder import AdapterInfo, save_adapter
from mlx_lora.models.image_inputs import ModelWithImages
from mlx_lora.models.load import Base
from mlx_lora.models.vision import open_tower
from mlx_lora.objectives.pictures import tower_targets
from mlx_lora.objectives.vision_encoder import VisionEncoder

# llama.cpp looks for the token of two line ends, which SmolVLM's tokenizer has.
MERGES = (("a", "b"), ("Ċ", "Ċ"))
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
# llama.cpp's tower of Qwen2.5-VL has windows of 112 pixels, and it turns each third pair of features by time, which models
# of Qwen's sizes have and those of tiny_vision.py do not.
CHANGES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"vision_config": {"window_size": 112}},
    "qwen3_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}}},
    "qwen3_5": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2], "partial_rotary_factor": 0.25}}
    },
}
BEFORE, AFTER = "ab what", " is it?"
NEW_TOKENS = 4


def write_model(family: str, folder: Path) -> Path:
    """Write a tiny vision-language model whose tokenizer has a merge: without any it is none that GGUF knows."""
    with patch.object(tiny_vision, "byte_tokenizer", partial(byte_tokenizer, merges=MERGES)):
        tiny_vision.write_model_here(family, folder, changes=CHANGES.get(family))
    if family == "qwen2_5_vl":  # a picture of several windows
        file = folder / "preprocessor_config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content["size"]["longest_edge"] = 280**2
        file.write_text(json.dumps(content), encoding="utf-8")
    return folder


load = partial(loaded, dtype="float32")


def adapt(model: Path, folder: Path, tower: bool, strength: float = 0.05) -> Path:
    """Write an adapter of random factors on the language model, and if asked, on the tower, with a whole connector."""
    base = load(model)
    chosen = select_targets(base.model, "all-linear", -1)
    layers: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    if tower:
        asked = AdapterSettings(train_vision="lora", train_connector="full")
        layers, modules = tower_targets(open_tower(base).model, asked)
    inject(base.model, [*chosen.paths, *layers], 4, 1.5, seed=3)
    full = tuple(name for name, _ in tree_flatten(base.model.parameters()) if name.rpartition(".")[0] in modules)
    mx.random.seed(5)
    changed = {name for name in adapter_parameters(base.model) if name.endswith("lora_b")} | set(full)
    moved = [
        (name, value + strength * mx.random.normal(value.shape))
        for name, value in tree_flatten(base.model.parameters())
        if name in changed
    ]
    base.model.load_weights(moved, strict=False)
    info = AdapterInfo(
        "lora", 4, 6.0, 1.5, 0.0, chosen.num_layers, (*chosen.keys, *layers), base.model_id, None, base.fingerprint,
        full=full,
    )  # fmt: skip
    save_adapter(folder, base.model, info)
    return folder


def picture(folder: Path, width: int, height: int, seed: int = 0, smooth: bool = False) -> Path:
    """Write a picture of random pixels, or one of slopes, which all ways of making it smaller leave as they are."""
    from PIL import Image

    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 3), np.uint8)
    if smooth:
        rows, columns = np.linspace(0, 120, height)[:, None, None], np.linspace(0, 120, width)[:, None]
        slopes = rows * random.uniform(-1, 1, 3) + columns * random.uniform(-1, 1, 3)
        pixels = np.round(slopes - slopes.min((0, 1))).astype(np.uint8)
    file = folder / f"{width}x{height}-{seed}.png"
    Image.fromarray(pixels).save(file)
    return file


def ours(base: Base, file: Path, new: list[int]) -> tuple[int, np.ndarray]:
    """Return the number of the prompt's tokens, and log-probabilities (new, vocabulary) of each token that follows it.

    Args:
        base: adapted or not.
        file: the picture.
        new: the tokens that follow.
    """
    table = ImageTable.empty()
    vision = VisionEncoder.of(base, DataSettings(), table, open_tower(base))
    reader = ImageReader(vision.processor, [file.parent], table, vision.tower.token)
    digests = tuple(reader.open_all([str(file)], {str(file): str(file)}))
    shown = table.shown[digests[0]].text.strip("\n")  # llama.cpp has no such line ends around a picture of Gemma 3
    around = ("<|vision_start|>", "<|vision_end|>") if "<|image_pad|>" in shown else ("", "")
    prompt = base.hf_tokenizer(BEFORE + shown.join(around) + AFTER)["input_ids"]
    arrays = vision.arrays(np.array([prompt + new[:-1]], np.int32), [digests])
    model = ModelWithImages(base.model, vision.spec, arrays, prompt + new[:-1])
    logits = model(mx.array([prompt + new[:-1]]), cache=model.caches())[0, len(prompt) - 1 :].astype(mx.float32)
    return len(prompt), np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def theirs(server: Any, file: Path) -> tuple[int, list[int], list[dict[int, float]]]:
    """Return the number of the prompt's tokens, greedy tokens, and llama.cpp's log-probabilities of likely ones at each."""
    prompt = {
        "prompt_string": BEFORE + _get(server, "/props")["media_marker"] + AFTER,
        "multimodal_data": [base64.b64encode(file.read_bytes()).decode()],
    }
    # It tells no probabilities of half a character.
    others = [[i, False] for i in range(N_PRINTABLE, tiny_vision.VOCABULARY)]
    body = {"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0, "n_probs": 60, "cache_prompt": False}
    reply = _get(server, "/completion", {**body, "logit_bias": others, "return_tokens": True})
    steps = [{top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in reply["completion_probabilities"]]
    return reply["tokens_evaluated"], reply["tokens"], steps


def _get(server: Any, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error
