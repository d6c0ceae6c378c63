"""The same models that see in transformers, on torch, with PEFT's factors: the judge of tokens, logits, losses and gradients."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Processors that need no torchvision: they are asked as a whole.
WHOLE = ("Gemma3Processor", "LlavaProcessor", "Idefics3Processor")
RANK, ALPHA = 4, 8
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER = re.compile(
    rf".*(?<!vision_model\.encoder\.)(?<!encoder\.)layers\.(\d+)\.(?:self_attn|mlp)\.({'|'.join(LINEAR)})$"
)


def judge_processor(folder: Path) -> Any:
    """Return transformers' processor of a folder, with the image processor that needs no torch.

    Its parts are put together here, because its own `__init__` asks for a video processor, which needs torchvision.
    """
    import transformers

    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    # By its name: mlx-vlm puts processors of its own into AutoProcessor.
    kind = getattr(transformers, settings["processor_class"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    if kind.__name__ in WHOLE:
        return kind.from_pretrained(folder, image_processor=images)
    processor = kind.__new__(kind)
    processor.image_processor, processor.tokenizer = images, tokenizer
    processor.image_token = "<image>" if "SmolVLM" in kind.__name__ else "<|image_pad|>"
    processor.fake_image_token, processor.global_image_token = "<fake_token_around_image>", "<global-img>"
    processor.image_seq_len = settings.get("image_seq_len")
    return processor


def judge_inputs(processor: Any, messages: Sequence[dict[str, Any]], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Return what transformers' processor makes of a conversation with its answers, as torch's tensors."""
    text = processor.tokenizer.apply_chat_template(list(messages), tokenize=False)
    kind = type(processor).__name__
    if kind in WHOLE:
        images = {"images": [list(pictures)]} if pictures else {}
        return dict(processor(text=[text], return_tensors="pt", add_special_tokens=False, **images))
    asked = {"return_row_col_info": True} if kind == "SmolVLMProcessor" else {}
    found = dict(processor.image_processor(images=[list(pictures)], return_tensors="pt", **asked)) if pictures else {}
    place, end = processor.image_token, 0
    for number in range(len(pictures)):
        at = text.find(place, end)
        shown = processor.replace_image_token(found, number)
        text, end = text[:at] + shown + text[at + len(place) :], at + len(shown)
    ids = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    given = {name: value for name, value in found.items() if name not in ("rows", "cols")}
    if "image_grid_thw" in given:  # for its positions
        given["mm_token_type_ids"] = (ids == processor.tokenizer.convert_tokens_to_ids(place)).int()
    return {"input_ids": ids, **given}


class Judge:
    """A model on torch, with PEFT's factors on its language model."""

    def __init__(self, folder: Path, factors: dict[str, np.ndarray]):
        """Load it.

        Args:
            folder: of the model.
            factors: ours, by name; A is stored (in, r), B (r, out).
        """
        import peft
        import torch
        import transformers

        self._torch = torch
        base = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        names = [name for name, _ in base.named_modules() if LAYER.fullmatch(name) and "vision" not in name and "visual" not in name]  # fmt: skip
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, lora_dropout=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT asks
            self.model = peft.get_peft_model(base, config)
        self.factors: dict[str, Any] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            kind = "lora_a" if ".lora_A." in name else "lora_b"
            ours = f"language_model.model.layers.{name.split('layers.', 1)[1].split('.lora_')[0]}.{kind}"
            parameter.data = torch.tensor(factors[ours].T.copy())
            self.factors[ours] = parameter

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
        return logits, float(total.detach()), {name: p.grad.numpy().T for name, p in self.factors.items()}
