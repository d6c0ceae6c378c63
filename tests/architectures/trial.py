"""One architecture's way through the project: what each stage needs, does, and must find.

A stage is a function of a `Trial`. It returns a note, or nothing; what it finds wrong it raises. Commands run through
the code of `python -m mlx_lora.X`, in this process.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import run_cli
from mlx_lm.models.cache import make_prompt_cache

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import ModelSettings, TrainSettings
from mlx_lora.data.batch import Batch
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.choose import assumed, choose_model_kernels, training_kernels
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.losses.agree import StepVariant, check_kernels, choose_loss, choose_step_variant
from mlx_lora.losses.cross_entropy import Arrays, token_arrays
from mlx_lora.models.load import Base, load_base
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.utils import device

ROWS, WIDTH = 2, 21  # longer than the tiny models' windows and their indexers' choices, and odd
RANK = 4
STEPS = 3
FACTOR_BAR = 1e-4
LOGIT_BAR = 1e-4
# Exit codes of a refusal in one line: fusing and converting read back what they wrote, and write nothing if that fails.
REFUSALS = {"fuse": (1, 2), "convert": (1, 2)}
# bfloat16 has 8 bits of mantissa; the losses are about 6.
HALF_BAR = 0.05
# What the run's header says where ours could not be used, with the reason after it.
OWN_KERNELS = "the model's own kernels ("
PROMPT = "The sea was calm and"
NEW_TOKENS = 8


class Wrong(AssertionError):
    """A stage ran and found other numbers than it must."""


class Refused(Exception):
    """A command refused, in one line and with exit code 2."""


class NotRun(Exception):
    """What the stage needs was not made by an earlier one."""


@dataclass
class Trial:
    """An architecture in one of its ways, and what the stages have made so far.

    Attributes:
        name, tied: as `tiny_config` takes them.
        work: an empty folder for models, adapters and data.
        base: loaded, then adapted by the stage of that name.
        facts: figures for the table.
    """

    name: str
    tied: bool
    work: Path
    base: Base | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.work / "model"

    @property
    def adapter(self) -> Path:
        """The run folder of `train`."""
        return self.work / "adapter"

    def adapted_base(self) -> Base:
        """Return the base with factors that are no zeros.

        Raises:
            NotRun: it could not be adapted.
        """
        if self.base is None or not adapter_layers(self.base.model):
            raise NotRun("no adapted model")
        return self.base

    def trained_adapter(self) -> Path:
        """Return the folder of the adapter that the command trained.

        Raises:
            NotRun: there is none.
        """
        if not (self.adapter / "adapters.safetensors").is_file():
            raise NotRun("no trained adapter")
        return self.adapter


def write_data(folder: Path) -> Path:
    """Write chats of one length, so that a run has one batch shape: train.jsonl and valid.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(10, 18)), ("valid", range(20, 22))):
        rows = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} {n}"}]}
                for n in numbers]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def command(name: str, *arguments: object) -> run_cli.Ran:
    """Run a command.

    Raises:
        Refused: it ended with one `Error:` line and an exit code that says so.
        Wrong: any other end but 0.
    """
    ran = run_cli.run(name, *arguments)
    errors = [line for line in ran.lines if line.startswith("Error:")]
    if ran.code in REFUSALS.get(name, (2,)) and len(errors) == 1:
        raise Refused(errors[0].removeprefix("Error: "))
    if ran.code:
        raise Wrong(f"{name} ended with {ran.code}: {(errors or ran.lines or ['nothing said'])[-1]}")
    return ran


def batch(vocabulary: int, seed: int = 0) -> Arrays:
    """Return random tokens, about half of them trained, in a fixed number of places."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, min(vocabulary, 256), (ROWS, WIDTH + 1)).astype(np.int32)
    return token_arrays(Batch.of(ids[:, :-1], ids[:, 1:], random.random((ROWS, WIDTH)) < 0.5))


def naive_loss(model: nn.Module, arrays: Arrays) -> mx.array:
    """Return the mean cross-entropy of the trained tokens, as a textbook has it, from all logits."""
    logits = model(arrays["inputs"]).astype(mx.float32)  # (B, T, V)
    losses = nn.losses.cross_entropy(logits, arrays["targets"])  # (B, T)
    return mx.where(arrays["mask"], losses, 0.0).sum() / arrays["mask"].sum()


def relative(found: mx.array, expected: mx.array) -> float:
    """Return the largest difference as a share of the largest expected value."""
    finite = mx.where(mx.isfinite(expected), expected, 0.0).astype(mx.float32)
    others = mx.where(mx.isfinite(expected), found, 0.0).astype(mx.float32)
    return mx.abs(others - finite).max().item() / max(mx.abs(finite).max().item(), 1e-30)


def check_equal(found: mx.array, expected: mx.array, bar: float, what: str) -> float:
    """Return the relative difference.

    Raises:
        Wrong: it is above the bar, or not a number.
    """
    difference = relative(found, expected)
    if not difference <= bar:
        raise Wrong(f"{what}: differ by {difference:.1e}, allowed {bar:.0e}")
    return difference


@contextmanager
def experts_in_float32() -> Iterator[None]:
    """Let products of experts take bfloat16 on a CPU, where MLX has them in float32 alone: what comes out is rounded."""
    gather_mm = mx.gather_mm

    def rounded(a: mx.array, b: mx.array, *indices: Any, **named: Any) -> mx.array:
        return gather_mm(a.astype(mx.float32), b.astype(mx.float32), *indices, **named).astype(a.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "gather_mm", rounded)
        patch.setattr(device, "multiplies_16_bit_experts", lambda: True)  # else the loader refuses
        yield


def settings_of(trial: Trial) -> TrainSettings:
    """Return a run's settings as the stages outside of commands use them."""
    places = {"model": str(trial.model), "data": str(trial.work / "data"), "adapter_path": str(trial.adapter)}
    return train_settings({**places, "dtype": "float32", "rank": RANK})


def vocabulary_of(base: Base) -> int:
    return min(256, base.model(mx.array([[1, 2]])).shape[-1])


def variant_of(base: Base, mode: str) -> StepVariant:
    """Choose what the step computes with, as `train` does, for a checkpointing mode.

    Raises:
        InputError: the model cannot be trained.
    """
    # Ours throughout: what `auto` would measure on one machine says nothing of another.
    loss = choose_loss(base.model, base.config, "ours")
    choice = choose_model_kernels(base.model, [16], "ours", mx.float32)
    kernels, words = check_kernels(base.model, base.config, loss, choice)
    tape = apply_checkpointing(base.model, mode)
    attention = (tape.attend if tape else attend) if kernels else None
    variant = choose_step_variant(base.model, base.config, loss, attention, base.model_id, kernels or assumed)
    return replace(variant, notes=(*variant.notes, words)) if words.startswith(OWN_KERNELS) else variant


def trained_gradients(base: Base, arrays: Arrays, mode: str) -> tuple[mx.array, dict[str, Any]]:
    """Return mean loss and its gradient as the step takes them: chosen loss, chosen kernels, a checkpointing mode."""
    variant = variant_of(base, mode)

    def mean(model: nn.Module, arrays: Arrays) -> mx.array:
        total, count = variant.loss.train(model, arrays)
        return total / count

    kernels = training_kernels(base.model, variant.attend, variant.choose) if variant.attend else nullcontext()
    with left_unchanged(base.model), kernels:
        value, grads = nn.value_and_grad(base.model, mean)(base.model, arrays)
        mx.eval(value, grads)
    return value, grads


def loaded(trial: Trial, adapter: Path) -> tuple[nn.Module, nn.Module]:
    """Return the model with the stored adapter, and without it."""
    base, plain = (load_base(ModelSettings(model=str(trial.model), dtype="float32")) for _ in range(2))
    load_adapter(base, adapter)
    return base.model, plain.model


def greedy(base: Base, prompt: list[int], cached: bool) -> str:
    """Return the likeliest continuation: from whole forward passes, or a token at a time through mlx-lm's cache."""
    tokens, detokenizer = list(prompt), base.tokenizer.detokenizer
    detokenizer.reset()
    cache = make_prompt_cache(base.model) if cached else None
    if cached:
        base.model(mx.array([prompt[:-1]]), cache=cache)
    for _ in range(NEW_TOKENS):
        logits = base.model(mx.array([tokens[-1:]]), cache=cache) if cached else base.model(mx.array([tokens]))
        tokens.append(logits[0, -1].argmax().item())
        if tokens[-1] in base.tokenizer.eos_token_ids:
            break
        detokenizer.add_token(tokens[-1])
    detokenizer.finalize()
    return detokenizer.text.lstrip(" ")  # mlx-lm's leaves it out of some texts
