"""The same vision-language models in transformers, on torch, with PEFT's factors: the judge of tokens, logits, losses and gradients."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mlx_lora.adapters.inject import adapter_parameters
from mlx_lora.exporters.peft import peft_path

# Processors that need no torchvision: they are asked as a whole.
WHOLE = ("Gemma3Processor", "LlavaProcessor", "Idefics3Processor", "PaliGemmaProcessor")
# What the others set in `__init__`, which asks for torchvision.
PARTS: dict[str, dict[str, Any]] = {
    "SmolVLMProcessor": {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"},
    **{f"Qwen{kind}Processor": {"image_token": "<|image_pad|>"} for kind in ("2VL", "2_5_VL", "3VL")},
    "Gemma4Processor": {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"},
    "PixtralProcessor": {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "spatial_merge_size": 1},
}  # fmt: skip
PIXTRAL = "transformers.models.pixtral."
RANK, ALPHA = 4, 8


def judge_processor(folder: Path) -> Any:
    """Return transformers' processor of a folder, with the image processor that needs no torch.

    Its parts are put together here, because its own `__init__` asks for a video processor, which needs torchvision.
    """
    import transformers

    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    # By its name: mlx-vlm puts processors of its own into AutoProcessor.
    kind = getattr(transformers, settings["processor_class"])
    if kind.__name__ == "PixtralProcessor":
        kind = _pixtral_processor()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    if kind.__name__ in WHOLE:
        return kind.from_pretrained(folder, image_processor=images)
    processor = kind.__new__(kind)
    processor.image_processor, processor.tokenizer = images, tokenizer
    given = {**PARTS["SmolVLMProcessor" if "SmolVLM" in kind.__name__ else kind.__name__], **settings}
    for name, value in given.items():
        setattr(processor, name, value)
    return processor


def _pixtral_processor() -> Any:
    """Return Pixtral's processor, whose module asks for torchvision only to import one function, which its Pillow form has."""
    missing = PIXTRAL + "image_processing_pixtral"
    if missing not in sys.modules and importlib.util.find_spec("torchvision") is None:
        sys.modules[missing] = importlib.import_module(PIXTRAL + "image_processing_pil_pixtral")
    return importlib.import_module(PIXTRAL + "processing_pixtral").PixtralProcessor


def judge_inputs(processor: Any, messages: Sequence[dict[str, Any]], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Return what transformers' processor makes of a conversation with its answers, as torch's tensors."""
    kind = type(processor).__name__
    if kind == "PaliGemmaProcessor":  # has no chat template
        return _question_and_answer(processor, messages, pictures)
    text = processor.tokenizer.apply_chat_template(list(messages), tokenize=False)
    if kind in WHOLE:
        images = {"images": [list(pictures)]} if pictures else {}
        return dict(processor(text=[text], return_tensors="pt", add_special_tokens=False, **images))
    asked: dict[str, Any] = {"return_row_col_info": True} if kind == "SmolVLMProcessor" else {}
    if kind == "PixtralProcessor":  # as in its own `_process_images`
        asked = {"patch_size": processor.patch_size * processor.spatial_merge_size}
    found = dict(processor.image_processor(images=[list(pictures)], return_tensors="pt", **asked)) if pictures else {}
    place, end = processor.image_token, 0
    for number in range(len(pictures)):
        at = text.find(place, end)
        shown = processor.replace_image_token(found, number)
        text, end = text[:at] + shown + text[at + len(place) :], at + len(shown)
    ids = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    beside = ("rows", "cols", "num_soft_tokens_per_image")
    given = {name: value for name, value in found.items() if name not in beside}
    if "image_grid_thw" in given or "image_position_ids" in given:  # for positions and masks
        given["mm_token_type_ids"] = (ids == processor.tokenizer.convert_tokens_to_ids(place)).int()
    return {"input_ids": ids, **given}


def _question_and_answer(processor: Any, messages: Sequence[dict[str, Any]], pictures: Sequence[Any]) -> dict[str, Any]:
    import torch

    question, answer = ("".join(part["text"] for part in one["content"] if part["type"] == "text") for one in messages)
    if pictures:
        text = "<image>" * len(pictures) + question
        found = processor(images=[list(pictures)], text=[text], suffix=[answer], return_tensors="np")
        return {name: torch.tensor(found[name]) for name in ("input_ids", "pixel_values", "token_type_ids")}
    # Its processor refuses texts alone.
    tokenizer = processor.tokenizer
    parts = [f"{tokenizer.bos_token}{question}\n", answer + tokenizer.eos_token]
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    kinds = [number for number, part in enumerate(ids) for _ in part]
    return {
        "input_ids": torch.tensor([[token for part in ids for token in part]]),
        "token_type_ids": torch.tensor([kinds]),
    }


def put_second_factors(model: nn.Module) -> None:
    """Give each B random values, which are zeros before the first step."""
    for name, value in adapter_parameters(model).items():
        if name.endswith("lora_b"):
            draw = 0.05 * mx.random.normal(value.shape, key=mx.random.key(len(name)))
            model.load_weights([(name, draw)], strict=False)


class Judge:
    """A model on torch, with PEFT's factors on its layers."""

    def __init__(self, folder: Path, trained: dict[str, np.ndarray]):
        """Load it.

        Args:
            folder: of the model.
            trained: our trained parameters by name: factors, of which A is stored (in, r) and B (r, out), and parameters that are
                trained in full.
        """
        import peft
        import torch
        import transformers

        self._torch = torch
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        base = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        names = [peft_path(name.removesuffix(".lora_a"), kind) for name in trained if name.endswith(".lora_a")]
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, lora_dropout=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT asks
            self.model = peft.get_peft_model(base, config)
        theirs = dict(self.model.named_parameters())
        self.trained: dict[str, Any] = {}
        for name, value in trained.items():
            path, _, leaf = name.rpartition(".")
            side = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}.get(leaf, leaf)
            parameter = theirs.pop(f"base_model.model.{peft_path(path, kind)}.{side}")
            parameter.data = torch.tensor(_theirs(name, value).copy())
            self.trained[name] = parameter.requires_grad_(True)
        assert not any("lora_" in name for name in theirs)

    def run(self, rows: Sequence[dict[str, Any]], trained: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float, dict[str, np.ndarray]]:  # fmt: skip
        """Return each row's logits (T, V), the summed loss, and its gradients as ours are stored.

        Args:
            rows: of `judge_inputs`.
            trained: for each row, (T,) bool, where a token is a target.
        """
        torch = self._torch
        total, logits = torch.zeros(()), []
        for row, mask in zip(rows, trained, strict=True):
            found = self.model(**row).logits[0].float()
            logits.append(found.detach().numpy())
            targets = row["input_ids"][0, 1:]
            losses = torch.nn.functional.cross_entropy(found[:-1], targets, reduction="none")
            total = total + losses[torch.tensor(mask[1:])].sum()
        total.backward()
        zero = {name: torch.zeros_like(p) for name, p in self.trained.items() if p.grad is None}
        gradients = {name: zero.get(name, p.grad) for name, p in self.trained.items()}
        return logits, float(total.detach()), {name: _ours(name, g.numpy()) for name, g in gradients.items()}


def _theirs(name: str, value: np.ndarray) -> np.ndarray:
    """Return a parameter as torch has it: factors transposed, the channels of convolutions before their sides."""
    return value.T if ".lora_" in name else np.moveaxis(value, -1, 1) if value.ndim > 3 else value


def _ours(name: str, value: np.ndarray) -> np.ndarray:
    return value.T if ".lora_" in name else np.moveaxis(value, 1, -1) if value.ndim > 3 else value
