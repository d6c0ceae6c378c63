"""The same architectures with their tower, on pictures: the commands train, measure, answer, fuse and quantize a tiny model.

That the numbers are right is shown elsewhere: tests/objectives/test_vision_parity.py compares the same tiny models with
transformers and PEFT on torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from tiny_vision import MAKERS, write_model_here
from vision_rows import chats_of, write_rows

from architectures.build import tiny_config
from architectures.trial import FACTOR_BAR, NotRun, Trial, Wrong, command
from mlx_lora.data.image_tokens import FAMILIES

TEXT_ONLY, NOT_COMPARED = "text only", "not compared"
# mlx-lm's module -> tiny models with a tower; families without an own module there have no row in the table.
OF_MODULE = {
    "gemma3": ("gemma3",),
    "gemma4": ("gemma4", "gemma4_31b"),
    "mistral3": ("mistral3",),
    "pixtral": ("pixtral",),
    "qwen2_vl": ("qwen2_vl", "qwen2_5_vl"),
    "qwen3_5": ("qwen3_5",),
    "qwen3_vl": ("qwen3_vl",),
}
STEPS = 3


def images(trial: Trial) -> str | None:
    """Take the architecture's models that see pictures through the commands."""
    if trial.name not in OF_MODULE:
        raise NotRun(without_images(trial.name))
    for family in OF_MODULE[trial.name]:
        try_family(family, trial.work / f"images-{family}")
    return None


def without_images(name: str) -> str:
    """Return what the table says of an architecture that no tiny model with a tower is of."""
    if name in FAMILIES:
        return NOT_COMPARED
    return TEXT_ONLY if tiny_config(name).get("vision_config") else ""


def try_family(family: str, work: Path) -> None:
    """Train a tiny model on pictures with the commands, and use the adapter.

    Args:
        family: of MAKERS.
        work: a folder to make.

    Raises:
        Wrong, Refused: a command did not do what it should.
    """
    assert family in MAKERS
    model, chats = write_model_here(family, work / "model"), chats_of(family)
    data = write_rows(work / "data", chats * 2)
    adapter, measured = work / "adapter", ("--data", data, "--dtype", "float32", "--json")

    def train(base: Path, out: Path, steps: int) -> list[float]:
        command("train", "--model", base, "--data", data, "--adapter-path", out, "--iters", steps,
                "--batch-size", 3, "--rank", 4, "--learning-rate", 0.01, "--warmup", 0, "--steps-per-report", 1,
                "--valid-fraction", 0, "--dtype", "float32", "--kernels", "ours")  # fmt: skip
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in metrics if row.get("loss") is not None]

    def loss(base: Path, *more: object) -> float:
        return json.loads(command("evaluate", "--model", base, *measured, *more).out)["loss"]

    losses = train(model, adapter, STEPS)
    if len(losses) != STEPS or not all(map(math.isfinite, losses)):
        raise Wrong(f"losses {losses}")
    before, after = loss(model), loss(model, "--adapter-path", adapter)
    if not after < before:
        raise Wrong(f"loss {before:.6f} before training and {after:.6f} after it")
    picture = work / "data" / f"p{chats[0][1][0]}.png"
    answer = command("generate", "--model", model, "--adapter-path", adapter, "--image", picture, "--prompt", "What is it?",
                     "--max-tokens", 4, "--json")  # fmt: skip
    if not json.loads(answer.out)["tokens"]:
        raise Wrong("no answer about a picture")
    command("fuse", "--model", model, "--adapter-path", adapter, "--out", work / "fused", "--dtype", "float32")
    if not abs((fused := loss(work / "fused")) - after) <= FACTOR_BAR * after:
        raise Wrong(f"loss {fused:.6f} of the fused model, {after:.6f} of base and adapter")
    command("convert", "--model", model, "--out", work / "4bit", "--bits", 4, "--group-size", 32)
    if not all(map(math.isfinite, train(work / "4bit", work / "adapter-4bit", 1))):
        raise Wrong("the loss of the 4-bit model is not finite")
