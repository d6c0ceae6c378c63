"""One architecture's way through the project: what each stage needs, does, and must find.

A stage is a function of a `Trial`. It returns a note, or nothing; what it finds wrong it raises. Commands run through
the code of `python -m mlx_lora.X`, in this process.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import run_cli
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from architectures.build import write_architecture
from mlx_lora import device
from mlx_lora.adapters.inject import adapter_layers, adapter_parameters
from mlx_lora.adapters.setup import adapt_model
from mlx_lora.artifacts.adapter import load_adapter
from mlx_lora.config import AdapterSettings, ModelSettings, TrainSettings, train_settings
from mlx_lora.data.batches import Batch
from mlx_lora.memory import plan_memory
from mlx_lora.models.attention import tiled_attention
from mlx_lora.models.kernels import training_kernels
from mlx_lora.models.load import Base, load_base
from mlx_lora.models.outline import outline_of
from mlx_lora.training.checkpointing import apply_checkpointing
from mlx_lora.training.losses import Arrays, choose_kernels, choose_loss
from mlx_lora.training.planning import check_base_fits, outlined_shape, run_of

ROWS, WIDTH = 2, 21  # longer than the tiny models' windows and their indexers' choices, and odd
RANK = 4
STEPS = 3
FACTOR_BAR = 1e-4
LOGIT_BAR = 1e-4
# bfloat16 has 8 bits of mantissa; the losses are about 6.
HALF_BAR = 0.05
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
        Refused: it ended with one `Error:` line and exit code 2.
        Wrong: any other end but 0.
    """
    ran = run_cli.run(name, *arguments)
    errors = [line for line in ran.lines if line.startswith("Error:")]
    if ran.code == 2 and len(errors) == 1:
        raise Refused(errors[0].removeprefix("Error: "))
    if ran.code:
        raise Wrong(f"{name} ended with {ran.code}: {(errors or ran.lines or ['nothing said'])[-1]}")
    return ran


def batch(vocabulary: int, seed: int = 0) -> Arrays:
    """Return random tokens, about half of them trained, in a fixed number of places."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, min(vocabulary, 256), (ROWS, WIDTH + 1)).astype(np.int32)
    return Arrays.of(Batch.of(ids[:, :-1], ids[:, 1:], random.random((ROWS, WIDTH)) < 0.5, ROWS * WIDTH))


def naive_loss(model: nn.Module, arrays: Arrays) -> mx.array:
    """Return the mean cross-entropy of the trained tokens, as a textbook has it, from all logits."""
    logits = model(arrays.inputs).astype(mx.float32)  # (B, T, V)
    losses = nn.losses.cross_entropy(logits, arrays.targets)  # (B, T)
    return mx.where(arrays.mask, losses, 0.0).sum() / arrays.mask.sum()


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
        yield


def settings_of(trial: Trial) -> TrainSettings:
    """Return a run's settings as the stages outside of commands use them."""
    places = {"model": str(trial.model), "data": str(trial.work / "data"), "adapter_path": str(trial.adapter)}
    return train_settings({**places, "dtype": "float32", "rank": RANK})


# --- the stages -----------------------------------------------------------------------------------------------------


def load(trial: Trial) -> None:
    """Write the folder and load it, as every command does."""
    write_architecture(trial.model, trial.name, trial.tied)
    write_data(trial.work / "data")
    trial.base = load_base(ModelSettings(model=str(trial.model), dtype="float32"))
    logits = trial.base.model(mx.array([[1, 2, 3]]))
    if not mx.isfinite(logits[..., :256]).all().item():
        raise Wrong("the model's own logits are not finite")


def plan(trial: Trial) -> None:
    """Outline the model and plan its memory, as `train` does before it loads anything."""
    settings = settings_of(trial)
    shape = outlined_shape(outline_of(str(trial.model), dtype=mx.float32), settings)
    machine = device.current_machine("float32")
    planned = plan_memory(shape, run_of(settings, ROWS, WIDTH, "none"), machine, machine.working_set_bytes)
    if not planned.peak_bytes > 0:
        raise Wrong(f"planned peak {planned.peak_bytes}")
    check_base_fits(settings)


def adapt(trial: Trial) -> None:
    """Put factors on every linear layer; B is made random, since a zero B hides every gradient of A."""
    if trial.base is None:
        raise NotRun("no loaded model")
    adapt_model(trial.base.model, AdapterSettings(rank=RANK), seed=0)
    mx.random.seed(1)
    moved = [
        (name, 0.05 * mx.random.normal(value.shape))
        for name, value in adapter_parameters(trial.base.model).items()
        if name.endswith("lora_b")
    ]
    trial.base.model.load_weights(moved, strict=False)
    trial.facts["layers"] = len(moved)


def gradients(trial: Trial) -> str | None:
    """Compare loss and every factor's gradient with `value_and_grad` of the naive loss and mlx-lm's own kernels."""
    base = trial.adapted_base()
    base.model.train()
    arrays = batch(_vocabulary(base))
    expected, expected_grads = nn.value_and_grad(base.model, naive_loss)(base.model, arrays)
    mx.eval(expected, expected_grads)
    loss = choose_loss(base.model, base.config)
    found, grads = _trained_gradients(base, arrays, "none")
    check_equal(found, expected, FACTOR_BAR, "losses")
    wanted, got = dict(tree_flatten(expected_grads)), dict(tree_flatten(grads))
    largest = max(mx.abs(value).max().item() for value in wanted.values())
    # Below this the reference itself is rounding error of sums that cancel.
    floor = 1e-6 * largest
    idle = sorted(name for name, value in wanted.items() if mx.abs(value).max().item() <= floor)
    worst = ("", 0.0)
    for name in wanted.keys() - set(idle):
        worst = max(worst, (name, relative(got[name], wanted[name])), key=lambda pair: pair[1])
    trial.facts.update(loss=found.item(), worst_factor_error=worst[1], loss_form=loss.description)
    if not worst[1] <= FACTOR_BAR:
        raise Wrong(f"gradient of {worst[0]}: differs by {worst[1]:.1e}, allowed {FACTOR_BAR:.0e}")
    if still := [name for name in idle if mx.abs(got[name]).max().item() > 10 * max(floor, 1e-12)]:
        raise Wrong(f"gradient of {still[0]}: not zero where mlx-lm's is")
    notes = [] if loss.description.startswith("fused") else [loss.description]
    if idle:
        layers = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in idle})
        notes.append(
            f"mlx-lm's forward pass gives {len(idle)} of {len(wanted)} factors no gradient ({', '.join(layers)})"
        )
    return "; ".join(notes) or None


def checkpointing(trial: Trial) -> None:
    """Take the same gradients with every checkpointing mode."""
    base = trial.adapted_base()
    base.model.train()
    arrays = batch(_vocabulary(base))
    expected, grads = _trained_gradients(base, arrays, "none")
    wanted = dict(tree_flatten(grads))
    largest = max(mx.abs(value).max().item() for value in wanted.values())
    for mode in ("selective", "block"):
        found, again = _trained_gradients(base, arrays, mode)
        check_equal(found, expected, FACTOR_BAR, f"losses with {mode}")
        for name, value in tree_flatten(again):
            if mx.abs(wanted[name]).max().item() > 1e-6 * largest:
                check_equal(value, wanted[name], FACTOR_BAR, f"{name} with {mode}")


def train(trial: Trial) -> str | None:
    """Run three steps of the command; the losses must be finite, and the adapter must change the loss."""
    if not trial.model.is_dir():
        raise NotRun("no model folder")
    ran = command("train", "--model", trial.model, "--data", trial.work / "data", "--adapter-path", trial.adapter,
                  "--iters", STEPS, "--batch-size", 2, "--rank", RANK, "--learning-rate", 0.01, "--warmup", 0,
                  "--steps-per-report", 1, "--steps-per-eval", STEPS, "--val-batches", -1, "--dtype", "float32")  # fmt: skip
    metrics = [json.loads(line) for line in (trial.adapter / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if row.get("loss") is not None]
    if len(losses) != STEPS or not all(map(math.isfinite, losses)):
        raise Wrong(f"losses {losses}")
    trial.facts.update(losses=losses, validation=next(r["val_loss"] for r in reversed(metrics) if r.get("val_loss")))
    words = " ".join(ran.err.split())
    own = [words[words.index(start) :].split(";")[0].split(",")[0] for start in ("the model's own",) if start in words]
    return own[0] if own and "tiled differs" in own[0] else None


def reload(trial: Trial) -> None:
    """Measure the stored adapter with `evaluate`: the run's last validation loss, and another one without it."""
    folder = trial.trained_adapter()
    data = ("--model", trial.model, "--data", trial.work / "data" / "valid.jsonl", "--dtype", "float32", "--json")
    found = json.loads(command("evaluate", *data, "--adapter-path", folder).out)["loss"]
    without = json.loads(command("evaluate", *data).out)["loss"]
    expected = trial.facts["validation"]
    if not abs(found - expected) <= FACTOR_BAR * expected:
        raise Wrong(f"loss {found:.6f} after reloading, {expected:.6f} in the run")
    if abs(without - expected) <= FACTOR_BAR * expected:
        raise Wrong(f"the adapter changes nothing: loss {without:.6f} without it")


def stock(trial: Trial) -> None:
    """Let stock mlx-lm load model and adapter: its logits are ours."""
    folder = trial.trained_adapter()
    ours, _ = _loaded(trial, folder)
    model, _ = load_model(trial.model)
    theirs = load_adapters(model, str(folder))
    theirs.eval()
    ids = batch(256).inputs
    check_equal(ours(ids), theirs(ids), LOGIT_BAR, "logits in stock mlx-lm")


def fuse(trial: Trial) -> None:
    """Fuse with the command; the fused folder's logits are those of base and adapter, and not the base's."""
    folder, out = trial.trained_adapter(), trial.work / "fused"
    command("fuse", "--model", trial.model, "--adapter-path", folder, "--out", out, "--dtype", "float32")
    fused = load_base(ModelSettings(model=str(out), dtype="float32")).model
    adapted, plain = _loaded(trial, folder)
    ids = batch(256).inputs
    expected, before = adapted(ids), plain(ids)
    check_equal(fused(ids), expected, LOGIT_BAR, "logits of the fused model")
    if relative(before, expected) <= LOGIT_BAR:
        raise Wrong("the adapter does not change the logits")


def quantized(trial: Trial) -> None:
    """Convert to 4 bits with the command, and take QLoRA steps on the result."""
    if not trial.model.is_dir():
        raise NotRun("no model folder")
    out = trial.work / "model-4bit"
    command("convert", "--model", trial.model, "--out", out, "--bits", 4, "--group-size", 32)
    config = json.loads((out / "config.json").read_text())
    if not config.get("quantization"):
        raise Wrong("the converted model's config names no quantization")
    base = load_base(ModelSettings(model=str(out), dtype="float32"))
    adapt_model(base.model, AdapterSettings(rank=RANK), seed=0)
    base.model.train()
    arrays = batch(_vocabulary(base))
    expected = naive_loss(base.model, arrays)
    found, grads = _trained_gradients(base, arrays, "none")
    check_equal(found, expected, FACTOR_BAR, "losses of the 4-bit model")
    if not any(mx.abs(value).max().item() > 0 for _, value in tree_flatten(grads)):
        raise Wrong("no factor has a gradient")
    command("train", "--model", out, "--data", trial.work / "data", "--adapter-path", trial.work / "adapter-4bit",
            "--iters", 1, "--batch-size", 2, "--rank", RANK, "--val-batches", 0, "--dtype", "float32")  # fmt: skip


def bfloat16(trial: Trial) -> None:
    """Load in bfloat16: the loss is finite and near the float32 one."""
    if not trial.model.is_dir():
        raise NotRun("no model folder")
    base = load_base(ModelSettings(model=str(trial.model), dtype="bfloat16"))
    adapt_model(base.model, AdapterSettings(rank=RANK), seed=0)
    arrays = batch(_vocabulary(base))
    whole = load_base(ModelSettings(model=str(trial.model), dtype="float32")).model
    expected = naive_loss(whole, arrays)
    with experts_in_float32():
        found, grads = _trained_gradients(base, arrays, "none")
    check_equal(found, expected, HALF_BAR, "losses in bfloat16")
    if not all(mx.isfinite(value).all().item() for _, value in tree_flatten(grads)):
        raise Wrong("a gradient in bfloat16 is not finite")


def generate(trial: Trial) -> str | None:
    """Compare greedy text of the command with a loop over mlx-lm's model."""
    if not trial.model.is_dir():
        raise NotRun("no model folder")
    ran = command("generate", "--model", trial.model, "--prompt", PROMPT, "--max-tokens", NEW_TOKENS, "--json",
                  "--ignore-chat-template", "--dtype", "float32")  # fmt: skip
    text = json.loads(ran.out)["text"]
    base = load_base(ModelSettings(model=str(trial.model), dtype="float32"))
    prompt = base.hf_tokenizer.encode(PROMPT)
    if text == _greedy(base, prompt, cached=False):
        return None
    if text != (expected := _greedy(base, prompt, cached=True)):
        raise Wrong(f"greedy text {text!r}, expected {expected!r}")
    return "mlx-lm's cache and its whole forward pass continue the prompt differently"


STAGES = {
    stage.__name__: stage
    for stage in (
        load, plan, adapt, gradients, checkpointing, train, reload, stock, fuse, quantized, bfloat16, generate,
    )
}  # fmt: skip


def _vocabulary(base: Base) -> int:
    return min(256, base.model(mx.array([[1, 2]])).shape[-1])


def _trained_gradients(base: Base, arrays: Arrays, mode: str) -> tuple[mx.array, dict[str, Any]]:
    """Return mean loss and its gradient as the step takes them: chosen loss, chosen kernels, a checkpointing mode."""
    loss = choose_loss(base.model, base.config)
    use_kernels, _ = choose_kernels(base.model, base.config, loss)
    tape = apply_checkpointing(base.model, mode)
    attend = tape.attend if tape else tiled_attention

    def mean(model: nn.Module, *arrays: mx.array) -> mx.array:
        total, count = loss.train(model, *arrays)
        return total / count

    with training_kernels(base.model, attend) if use_kernels else nullcontext():
        value, grads = nn.value_and_grad(base.model, mean)(base.model, *arrays)
        mx.eval(value, grads)
    return value, grads


def _loaded(trial: Trial, adapter: Path) -> tuple[nn.Module, nn.Module]:
    """Return the model with the stored adapter, and without it."""
    base, plain = (load_base(ModelSettings(model=str(trial.model), dtype="float32")) for _ in range(2))
    load_adapter(base, adapter)
    return base.model, plain.model


def _greedy(base: Base, prompt: list[int], cached: bool) -> str:
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
    return detokenizer.text
