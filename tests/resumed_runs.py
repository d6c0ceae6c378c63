"""A short run of the train command, with checkpoints to go on from."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

from conftest import quantized, tiny_model, write_folder
from mlx_lm.models import gemma2
from prepared import start_python
from run_cli import succeeds
from tiny_moe import tiny_moe

from mlx_lora.trainer.checkpoint import numbered
from mlx_lora.utils.supervise import last_given

STEPS = 12


def command(model, data, folder, *extra) -> tuple:
    """Return the words of a run that writes no texts, which take such a run half of its time."""
    words = (
        "train", "--model", model, "--data", data, "--adapter-path", folder, "--iters", STEPS, "--batch-tokens", 384,
        "--learning-rate", 5e-3, "--rank", 4, "--steps-per-report", 3, "--steps-per-eval", 4, "--val-batches", 2,
        "--sample-tokens", 0, *extra,
    )  # fmt: skip
    return tuple(last_given([str(word) for word in words]))  # `extra` beats the rest


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
GEMMA2 = {
    "model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": 288,
}  # fmt: skip


def base_of_blocks(kind: str, out: Path) -> Path:
    """Write a model whose blocks are most of it: a mixture, Gemma 2 (whose class changes nothing while it loads), or a quantized llama."""
    if kind == "mixture":
        return write_folder(out, *tiny_moe("qwen3_moe"))
    if kind == "gemma2":
        return write_folder(out, gemma2.Model(gemma2.ModelArgs.from_dict(GEMMA2)), GEMMA2)
    model, config = tiny_model(**WIDE), dict(WIDE)
    if kind != "float":
        quantized(model, mode=kind)
        config["quantization"] = {"group_size": 32, "bits": 4, "mode": kind}
    return write_folder(out, model, config)


def weights(folder) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def resumes_to_the_same_bytes(words, whole, work, dies, step: int) -> None:
    """Assert that a run which is killed in the middle of a step, and resumed, ends as the whole one.

    Args:
        words: the command of a run in a folder, with more flags after it.
        whole: folder of the run that was not killed.
        work: folder for the others.
        dies: the environment in which the run kills itself.
        step: its last checkpoint before that.
    """
    killed, other, err = work / "killed", work / "other", work / "err"
    given = [str(word) for word in words(killed, "--max-restarts", 0)[1:]]
    died = start_python(["-m", "mlx_lora.train", *given], dies, work / "out", err)
    assert died.wait(240) in (-signal.SIGKILL, 128 + signal.SIGKILL), err.read_text()
    assert numbered(killed / "checkpoints")[0][0] == step
    succeeds(*words(killed, "--resume"))
    succeeds(*words(other, "--seed", 1))
    assert weights(whole) == weights(killed) != weights(other)


def stopped_after(folder, copy, step: int):
    """Return a copy of a run folder as it was after a checkpoint."""
    shutil.copytree(folder, copy)
    for other in (copy / "checkpoints").iterdir():
        if int(other.name.removeprefix("step-")) > step:
            shutil.rmtree(other)
    return copy
