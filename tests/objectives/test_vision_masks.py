"""Token ids, places of pictures, positions, and what is trained of 40 random conversations, against transformers' own processors.

The templates are those that models are published with, as TRL has them. What is right to train is what TRL's marked copies of them
say ({% generation %}), which transformers turns into a mask, less what a template writes after the end of a turn.
"""

from __future__ import annotations

import json
import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from PIL import Image
from tiny_vision import vision_files
from transformers import ProcessorMixin
from vision_judge import judge_processor

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.image_tokens import ImageProcessor, ImageReader, ImageTable
from mlx_lora.data.load import Seen, load_eval_set
from mlx_lora.models.image_inputs import positions_of

pytestmark = pytest.mark.parity
CONVERSATIONS = 40
WORDS = ("cat", "Größe", "is", "the", "left", "two\nlines", "猫", "7.5", "?", "{}", "a  b")
# Tiny model -> published template, and the end of its turns.
TEMPLATES = {
    "qwen2_5_vl": ("qwen2_5_vl", "<|im_end|>"),
    "smolvlm": ("smolvlm", "<end_of_utterance>"),
    "gemma3": ("gemma3", "<end_of_turn>"),
    "llava": ("llava_next", "</s>"),
}


def template(name: str) -> str:
    """Return one of TRL's templates."""
    found = find_spec("trl")
    if (
        found is None
        or found.origin is None
        or not (file := Path(found.origin).parent / f"chat_templates/{name}.jinja").is_file()
    ):
        pytest.skip("TRL has no such template")
    return file.read_text(encoding="utf-8")


def write_files(family: str, folder: Path) -> dict[str, Any]:
    """Write a tiny model's files with a published template, and return its config."""
    config = vision_files(family, folder)
    if family == "llava":  # the template of another LLaVA, with other special tokens
        tokenizer = byte_tokenizer(None, eos="</s>", special_tokens=["</s>", "<s>", "<image>"])
        tokenizer.save_pretrained(folder)
        config |= dict.fromkeys(("image_token_index", "image_token_id"), tokenizer.convert_tokens_to_ids("<image>"))
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template(TEMPLATES[family][0]), encoding="utf-8")
    return config


@cache
def drawn(number: int) -> Image.Image:
    """Return a picture of a size of its own."""
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in rng.integers(15, 125, 2))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def conversations() -> list[list[dict[str, Any]]]:
    """Return seeded conversations of 1 to 4 turns, with up to 3 pictures somewhere in their questions."""
    rng, found, number = random.Random(3), [], 0

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    for at in range(CONVERSATIONS):
        turns = rng.randint(1, 4)
        pictures = [rng.randrange(turns) for _ in range(at % 4)]
        messages: list[dict[str, Any]] = []
        for turn in range(turns):
            parts: list[dict[str, Any]] = [{"type": "text", "text": words()}]
            for _ in range(pictures.count(turn)):
                parts.insert(rng.randint(0, len(parts)), {"type": "image", "path": f"{number}.png"})
                number += 1
            if rng.random() < 0.3 and parts[-1]["type"] == "image":
                parts.append({"type": "text", "text": words()})
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": words()}]})
        found.append(messages)
    return found


def pictures_of(messages: list[dict[str, Any]]) -> list[Image.Image]:
    paths = [part["path"] for one in messages for part in one["content"] if part["type"] == "image"]
    return [drawn(int(path.removesuffix(".png"))) for path in paths]


def expected(
    processor: Any, messages: list[dict[str, Any]], marked: str, end: int
) -> tuple[list[int], list[bool], dict]:
    """Return the token ids and what is trained of them, as transformers has it, and what else it returns."""
    shown = [
        {**one, "content": [{**part, "image": drawn(int(part["path"].removesuffix(".png")))} if part["type"] == "image" else part
                            for part in one["content"]]} for one in messages
    ]  # fmt: skip
    for one in shown:
        for part in one["content"]:
            part.pop("path", None)
    out = ProcessorMixin.apply_chat_template(
        processor, shown, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        processor_kwargs={"return_tensors": None, "return_mm_token_type_ids": True, "add_special_tokens": False},
    )  # fmt: skip
    ids, mask = (list(out[name][0]) for name in ("input_ids", "assistant_masks"))
    after = False  # the end of the turn
    for at, trained in enumerate(mask):
        mask[at] = bool(trained) and not after
        after = bool(trained) and (after or ids[at] == end)
    return [int(token) for token in ids], mask, dict(out)


@pytest.mark.parametrize("family", TEMPLATES)
def test_rows_are_those_of_transformers(family, tmp_path):
    config, (name, end) = write_files(family, tmp_path / "model"), TEMPLATES[family]
    processor, marked = judge_processor(tmp_path / "model"), template(f"{name}_training")
    tokenizer, chats = processor.tokenizer, conversations()
    image = tokenizer.convert_tokens_to_ids(
        {"qwen2_5_vl": "<|image_pad|>", "gemma3": "<image_soft_token>"}.get(family, "<image>")
    )
    if not hasattr(processor, "video_processor"):  # its own `__init__` sets these, which asks for torchvision
        vars(processor).update(chat_template=None, video_processor=None, image_token_id=image)
    for number in range(sum(len(pictures_of(messages)) for messages in chats)):
        drawn(number).save(tmp_path / f"{number}.png")
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in chats), encoding="utf-8")
    table = ImageTable.empty()
    reader = ImageReader(ImageProcessor(tmp_path / "model", config), [tmp_path], table, image)
    settings = DataSettings(max_seq_length=100_000)
    rows = load_eval_set(str(file), settings, tokenizer, seen=Seen(pictures=reader))
    assert len(rows) == len(chats)
    positions = reference_positions(config) if family == "qwen2_5_vl" else None
    for number, messages in enumerate(chats):
        ids, mask, out = expected(processor, messages, marked, tokenizer.convert_tokens_to_ids(end))
        found, trained = rows.row(number)
        assert found.tolist() == ids
        assert trained.tolist() == mask
        assert any(mask)
        kinds = np.array((out.get("mm_token_type_ids") or out["token_type_ids"])[0])
        assert (found == image).tolist() == (kinds == 1).tolist()
        digests = table.of_numbers(rows.labels, len(rows))[number]
        sizes = [table.pictures[digest].size for digest in digests]
        assert sizes == [one.size for one in pictures_of(messages)]
        assert sum(table.shown[digest].tokens for digest in digests) == int((found == image).sum())
        if positions:
            own = positions_of(found == image, [table.shown[digest].grid for digest in digests])
            assert np.array_equal(own, positions(ids, kinds, out.get("image_grid_thw")))


def reference_positions(config: dict[str, Any]) -> Any:
    """Return what computes Qwen2.5-VL's three positions as transformers does."""
    import torch
    import transformers

    model = transformers.Qwen2_5_VLModel(transformers.Qwen2_5_VLConfig(**config))

    def positions(ids: list[int], kinds: np.ndarray, grids: Any) -> np.ndarray:
        given = None if grids is None else torch.tensor(np.array(grids))
        found, _ = model.get_rope_index(
            torch.tensor([ids]), mm_token_type_ids=torch.tensor(kinds[None]), image_grid_thw=given
        )
        return found[:, 0].numpy()

    return positions
