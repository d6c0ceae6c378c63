"""A short run of the train command, with checkpoints to go on from."""

from __future__ import annotations

import shutil

from mlx_lora.utils.supervise import last_given

STEPS = 12


def command(model, data, folder, *extra) -> tuple:
    words = (
        "train", "--model", model, "--data", data, "--adapter-path", folder, "--iters", STEPS, "--batch-tokens", 384,
        "--learning-rate", 5e-3, "--rank", 4, "--steps-per-report", 3, "--steps-per-eval", 4, "--val-batches", 2, *extra,
    )  # fmt: skip
    return tuple(last_given([str(word) for word in words]))  # `extra` beats the rest


def weights(folder) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def stopped_after(folder, copy, step: int):
    """Return a copy of a run folder as it was after a checkpoint."""
    shutil.copytree(folder, copy)
    for other in (copy / "checkpoints").iterdir():
        if int(other.name.removeprefix("step-")) > step:
            shutil.rmtree(other)
    return copy
