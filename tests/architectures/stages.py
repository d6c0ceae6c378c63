"""The stages of the sweep: each is a function of a `Trial`, returns a note or nothing, and raises what it finds wrong.

Commands run through the code of `python -m mlx_lora.X`, in this process.
"""

from __future__ import annotations

import json
import math

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from mlx_vlm.utils import load_model as vlm_load_model

from architectures.build import write_architecture
from architectures.images import images
from architectures.saved import saved
from architectures.trial import (
    FACTOR_BAR,
    HALF_BAR,
    LOGIT_BAR,
    NEW_TOKENS,
    PROMPT,
    RANK,
    ROWS,
    STEPS,
    WIDTH,
    NotRun,
    Trial,
    Wrong,
    batch,
    check_equal,
    command,
    experts_in_float32,
    greedy,
    loaded,
    naive_loss,
    relative,
    settings_of,
    trained_gradients,
    variant_of,
    vocabulary_of,
    write_data,
)
from architectures.vlm import CHANGES
from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.models.load import load_base
from mlx_lora.models.meta import outline_of
from mlx_lora.planner.fit import run_of
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.memory import plan_memory
from mlx_lora.trainer.fit import check_base_fits, outlined_shape


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
    machine = this_machine("float32")
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
    arrays = batch(vocabulary_of(base))
    variant = variant_of(base, "none")  # refuses what cannot be trained, before the reference fails at it
    with left_unchanged(base.model):
        expected, expected_grads = nn.value_and_grad(base.model, naive_loss)(base.model, arrays)
        mx.eval(expected, expected_grads)
    found, grads = trained_gradients(base, arrays, "none")
    check_equal(found, expected, FACTOR_BAR, "losses")
    wanted, got = dict(tree_flatten(expected_grads)), dict(tree_flatten(grads))
    largest = max(mx.abs(value).max().item() for value in wanted.values())
    # Below this the reference itself is rounding error of sums that cancel.
    floor = 1e-6 * largest
    idle = sorted(name for name, value in wanted.items() if mx.abs(value).max().item() <= floor)
    worst = ("", 0.0)
    for name in wanted.keys() - set(idle):
        worst = max(worst, (name, relative(got[name], wanted[name])), key=lambda pair: pair[1])
    trial.facts.update(loss=found.item(), worst_factor_error=worst[1], loss_form=variant.loss.description)
    if not worst[1] <= FACTOR_BAR:
        raise Wrong(f"gradient of {worst[0]}: differs by {worst[1]:.1e}, allowed {FACTOR_BAR:.0e}")
    if still := [name for name in idle if mx.abs(got[name]).max().item() > 10 * max(floor, 1e-12)]:
        raise Wrong(f"gradient of {still[0]}: not zero where mlx-lm's is")
    notes = [*([] if variant.loss.description.startswith("fused") else [variant.loss.description]), *variant.notes]
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
    arrays = batch(vocabulary_of(base))
    expected, grads = trained_gradients(base, arrays, "none")
    wanted = dict(tree_flatten(grads))
    largest = max(mx.abs(value).max().item() for value in wanted.values())
    for mode in ("selective", "block"):
        found, again = trained_gradients(base, arrays, mode)
        check_equal(found, expected, FACTOR_BAR, f"losses with {mode}")
        for name, value in tree_flatten(again):
            if mx.abs(wanted[name]).max().item() > 1e-6 * largest:
                check_equal(value, wanted[name], FACTOR_BAR, f"{name} with {mode}")


def train(trial: Trial) -> None:
    """Run three steps of the command; the losses must be finite, and the adapter must change the loss."""
    if not trial.model.is_dir():
        raise NotRun("no model folder")
    command("train", "--model", trial.model, "--data", trial.work / "data", "--adapter-path", trial.adapter,
            "--iters", STEPS, "--batch-size", 2, "--rank", RANK, "--learning-rate", 0.01, "--warmup", 0,
            "--steps-per-report", 1, "--steps-per-eval", STEPS, "--val-batches", -1, "--dtype", "float32", "--kernels", "ours")  # fmt: skip
    metrics = [json.loads(line) for line in (trial.adapter / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if row.get("loss") is not None]
    if len(losses) != STEPS or not all(map(math.isfinite, losses)):
        raise Wrong(f"losses {losses}")
    trial.facts.update(losses=losses, validation=next(r["val_loss"] for r in reversed(metrics) if r.get("val_loss")))


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
    """Let stock mlx-lm load model and adapter, or mlx-vlm the model: its logits are ours."""
    folder = trial.trained_adapter()
    ours, plain = loaded(trial, folder)
    if trial.name in CHANGES:
        try:
            ids = batch(256)["inputs"]
            theirs = vlm_load_model(trial.model, lazy=True, strict=False).language_model(ids, cache=None).logits
        except (KeyError, TypeError) as error:
            raise NotRun("mlx-vlm does not load a folder without a tower") from error
        check_equal(plain(ids), theirs, LOGIT_BAR, "logits in mlx-vlm")
        return
    model, _ = load_model(trial.model)
    theirs = load_adapters(model, str(folder))
    theirs.eval()
    ids = batch(256)["inputs"]
    check_equal(ours(ids), theirs(ids), LOGIT_BAR, "logits in stock mlx-lm")


def fuse(trial: Trial) -> None:
    """Fuse with the command; the fused folder's logits are those of base and adapter, and not the base's."""
    folder, out = trial.trained_adapter(), trial.work / "fused"
    command("fuse", "--model", trial.model, "--adapter-path", folder, "--out", out, "--dtype", "float32")
    fused = load_base(ModelSettings(model=str(out), dtype="float32")).model
    adapted, plain = loaded(trial, folder)
    ids = batch(256)["inputs"]
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
    arrays = batch(vocabulary_of(base))
    expected = naive_loss(base.model, arrays)
    found, grads = trained_gradients(base, arrays, "none")
    check_equal(found, expected, FACTOR_BAR, "losses of the 4-bit model")
    if not any(mx.abs(value).max().item() > 0 for _, value in tree_flatten(grads)):
        raise Wrong("no factor has a gradient")
    command("train", "--model", out, "--data", trial.work / "data", "--adapter-path", trial.work / "adapter-4bit",
            "--iters", 1, "--batch-size", 2, "--rank", RANK, "--val-batches", 0, "--dtype", "float32", "--kernels", "ours")  # fmt: skip


def bfloat16(trial: Trial) -> None:
    """Load in bfloat16: the loss is finite and near the float32 one."""
    if not trial.model.is_dir():
        raise NotRun("no model folder")
    whole = load_base(ModelSettings(model=str(trial.model), dtype="float32"))
    arrays = batch(vocabulary_of(whole))
    expected = naive_loss(whole.model, arrays)
    with experts_in_float32():
        base = load_base(ModelSettings(model=str(trial.model), dtype="bfloat16"))
        adapt_model(base.model, AdapterSettings(rank=RANK), seed=0)
        found, grads = trained_gradients(base, arrays, "none")
    check_equal(found, expected, HALF_BAR, "losses in bfloat16")
    if not all(mx.isfinite(value).all().item() for _, value in tree_flatten(grads)):
        raise Wrong("a gradient in bfloat16 is not finite")


def generate(trial: Trial) -> str | None:
    """Compare greedy text of the command with a loop over mlx-lm's model."""
    if not trial.model.is_dir():
        raise NotRun("no model folder")
    ran = command("generate", "--model", trial.model, "--prompt", PROMPT, "--max-tokens", NEW_TOKENS, "--json",
                  "--ignore-chat-template", "--dtype", "float32")  # fmt: skip
    text = json.loads(ran.out)["text"].lstrip(" ")
    base = load_base(ModelSettings(model=str(trial.model), dtype="float32"))
    prompt = base.hf_tokenizer.encode(PROMPT)
    if text == greedy(base, prompt, cached=False):
        return None
    if text != (expected := greedy(base, prompt, cached=True)):
        raise Wrong(f"greedy text {text!r}, expected {expected!r}")
    return "mlx-lm's cache and its whole forward pass continue the prompt differently"


STAGES = {
    stage.__name__: stage
    for stage in (
        load, plan, adapt, gradients, checkpointing, train, reload, stock, fuse, quantized, bfloat16, generate, images, saved,
    )
}  # fmt: skip
