"""Thirty steps on pictures through the command, against transformers and PEFT on torch: same factors, rows, and AdamW."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_cli import succeeds
from tiny_vision import write_model
from vision_judge import ALPHA, RANK, Judge, judge_inputs, judge_processor
from vision_rows import conversation, picture, write_rows

from mlx_lora.adapters.inject import adapter_parameters
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan, ShapePrice
from mlx_lora.models.load import load_base
from mlx_lora.objectives.base import RunContext
from mlx_lora.objectives.table import objective_of
from mlx_lora.trainer.adapter import adapt
from mlx_lora.trainer.trainer import micro_batches

pytestmark = [pytest.mark.parity, pytest.mark.slow]
STEPS, BATCH, RATE, BAR = 30, 3, "2e-3", 1e-3
ANSWERS = ("A red one.", "No.", "Two of them, left and right.", "It is 7.", "Yes, a cat.", "None")
# A question's number, and the pictures that it shows.
CHATS = [
    (conversation(f"What is it, {number}?", numbers, ANSWERS[number % 5 : number % 5 + 1 + number % 2]), numbers)
    for number, numbers in enumerate([(0,), (), (1, 3), (2,), (3,), (5, 0), (1,), (), (6,), (2, 4), (7,), (0,)])
]


def trained_here(model: Path, data: Path, folder: Path) -> tuple[list[float], TrainSettings]:
    """Return the losses of a run of the command, and its settings."""
    succeeds("train", "--model", model, "--data", data, "--adapter-path", folder, "--iters", STEPS,
              "--batch-size", BATCH, "--rank", RANK, "--alpha", ALPHA, "--learning-rate", RATE, "--lr-schedule", "constant",
              "--warmup", 0, "--dtype", "float32", "--kernels", "ours", "--steps-per-report", 1, "--valid-fraction", 0,
              "--save-every", 0)  # fmt: skip
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    assert len(losses) == STEPS
    return losses, train_settings({}, read_settings(str(folder / "run.yaml"), {}))


def beginnings(settings: TrainSettings) -> tuple[EncodedSet, list[Batch], dict[str, np.ndarray]]:
    """Return a run's rows, its batches in order, and its initial factors, which follow from its settings."""
    base, objective = load_base(settings.model), objective_of(settings.objective)
    ctx = RunContext(settings, objective, base)
    objective.open(ctx)
    rows = objective.read_data(ctx, settings.data).train
    loop = settings.loop
    plan = BatchPlan(
        rows, batch_tokens=loop.batch_tokens, batch_size=loop.batch_size, seed=loop.seed, price=ShapePrice(epochs=1.0)
    )
    adapt(settings, base, objective, base.hf_tokenizer.chat_template)
    factors = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    return rows, list(islice(micro_batches(plan, loop), STEPS)), factors


def trained_there(
    judge: Judge, batches: list[list[tuple[dict[str, Any], np.ndarray]]], settings: TrainSettings
) -> list[float]:
    """Return the losses of the same steps on torch."""
    import torch

    trained, asked = list(judge.trained.values()), settings.optimizer
    assert isinstance(asked.learning_rate, float)
    optimizer = torch.optim.AdamW(trained, lr=asked.learning_rate, weight_decay=asked.weight_decay)
    losses = []
    for rows in batches:
        optimizer.zero_grad()
        count = sum(int(mask[1:].sum()) for _, mask in rows)
        total = 0.0
        for given, mask in rows:
            logits = judge.model(**given).logits[0, :-1].float()
            each = torch.nn.functional.cross_entropy(logits, given["input_ids"][0, 1:], reduction="none")
            loss = each[torch.tensor(mask[1:])].sum() / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, asked.max_grad_norm)
        optimizer.step()
        losses.append(total)
    return losses


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl", "gemma3"])
def test_thirty_steps_are_those_of_transformers(family, tmp_path):
    model, data = write_model(family, tmp_path / "model"), write_rows(tmp_path / "data", CHATS)
    ours, settings = trained_here(model, data, tmp_path / "run")
    rows, planned, factors = beginnings(settings)
    processor = judge_processor(model)
    given = [judge_inputs(processor, turns, [picture(n) for n in numbers]) for turns, numbers in CHATS]
    by_tokens = {tuple(one["input_ids"][0].tolist()): one for one in given}
    assert len(by_tokens) == len(CHATS)

    def there(batch: Batch) -> list[tuple[dict[str, Any], np.ndarray]]:
        found = [rows.row(int(number)) for number in batch.numbers if number >= 0]
        return [(by_tokens[tuple(tokens.tolist())], mask) for tokens, mask in found]

    theirs = trained_there(Judge(model, factors), [there(batch) for batch in planned], settings)
    apart = np.abs(np.subtract(ours, theirs)) / np.abs(theirs)
    print(
        f"{family}: loss {ours[0]:.4f} to {ours[-1]:.4f}, at most {apart.max():.1e} apart (step {apart.argmax() + 1})"
    )
    assert apart.max() < BAR
    assert min(ours[-4:]) < 0.8 * ours[0]
    # The same rows in another order have other losses: the bar tells them apart.
    others = trained_there(Judge(model, factors), [there(batch) for batch in planned[1:4]], settings)
    assert np.abs(np.divide(others, ours[:3]) - 1).max() > 10 * BAR
