"""Compare training tiny random models of current families here and in transformers on torch, with the same inputs.

    PYTHONPATH=tests python -m parity.transformers_steps [--families qwen3_5,gpt_oss] [--steps 30]

Transformers creates each model and writes its folder, which we load like a user's download. Every linear layer that both
have gets the same low-rank factors, with B not zero; gradients pass through experts, routers, convolutions and norms, which
are not adapted. The first batch's logits, every factor's gradient, and the losses of 30 AdamW steps are compared, with
rows of 83 tokens: more than one chunk of the gated delta rule, more than one window. Bars: losses within 1e-4 relative
at every step, logits and gradients within 1e-4 of their largest entry. The paired inequality: torch with 20% more scale
differs by more than ten bars. Prints one line per family and ends with one JSON line; misses end with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora.utils import device  # isort: skip  (loads the BLAS, so it comes before mlx)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from _harness import environment, run_child
from mlx.utils import tree_flatten

from mlx_lora.adapters.inject import adapter_parameters, inject, select_targets
from mlx_lora.config.settings import ModelSettings, OptimizerSettings
from mlx_lora.data.batch import Batch
from mlx_lora.kernels.attention import AttentionCall, tiled_attention
from mlx_lora.kernels.choose import exchanging, training_kernels
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.cross_entropy import Arrays, LossFunction, token_arrays
from mlx_lora.models.load import load_base
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions, differentiation
from parity.families import FAMILIES

SIDE = Path(__file__).parent / "transformers_child.py"
BAR = 1e-4
RANK, SCALE, LEARNING_RATE, CLIP = 4, 2.0, 2e-3, 1.0
ROWS, WIDTH, TRAINED = 2, 83, 0.6
SETTINGS = OptimizerSettings(learning_rate=LEARNING_RATE, lr_schedule="constant", warmup=0.0)


@dataclass(frozen=True)
class Ours:
    """The results of our side.

    Attributes:
        losses: of each step.
        logits: (B, T, V) of the first batch.
        gradients: of each factor at the first step, of the mean loss.
        by_mlx_lm: the same with mlx-lm's own kernels instead of ours.
        tensors: the number of trained factors.
        left_out: our linear layers without a counterpart of the same name and shape.
    """

    losses: np.ndarray
    logits: np.ndarray
    gradients: dict[str, np.ndarray]
    by_mlx_lm: dict[str, np.ndarray]
    tensors: int
    left_out: list[str]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--families", default=",".join(FAMILIES), help=f"Separated by commas: {', '.join(FAMILIES)}.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--timeout", type=float, default=900, help="Seconds for one child.")
    args = parser.parse_args(argv)
    args.families = [name.strip() for name in args.families.split(",")]
    if unknown := [name for name in args.families if name not in FAMILIES]:
        parser.error(f"--families {','.join(unknown)}: not one of {', '.join(FAMILIES)}")
    return args


def batches(steps: int) -> list[Batch]:
    """Return the batches of both sides: random ids, some of them trained."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(steps):
        ids = draw.integers(0, 256, (ROWS, WIDTH + 1)).astype(np.int32)
        made.append(Batch.of(ids[:, :-1], ids[:, 1:], draw.random((ROWS, WIDTH)) < TRAINED))
    return made


def child(word: str, job: dict[str, Any], folder: Path, timeout_s: float) -> dict[str, Any]:
    """Run transformers' side and return its results."""
    result, file = folder / f"{word}-result.json", folder / f"{word}.json"
    file.write_text(json.dumps({**job, "result": str(result)}), encoding="utf-8")
    run_child([sys.executable, str(SIDE), word, str(file)], folder / f"{word}.log", timeout_s=timeout_s)
    return json.loads(result.read_text(encoding="utf-8"))


def adapted_model(name: str, folder: Path, linear: dict[str, list[int]]) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """Load the folder and put factors on the layers that transformers also has.

    Args:
        name: of the family.
        folder: written by transformers.
        linear: its linear layers' paths and (out, in).

    Returns:
        The model, its config, and our linear layers that were left out.

    Raises:
        ValueError: no layer is the same on both sides.
    """
    base = load_base(ModelSettings(model=str(folder), dtype="float32"))
    modules = dict(base.model.named_modules())
    ours = [path for path in select_targets(base.model).paths if isinstance(modules[path], nn.Linear)]
    shared = [p for p in ours if linear.get(FAMILIES[name].name_there(p)) == list(modules[p].weight.shape)]
    if not shared:
        raise ValueError(f"{name}: none of {ours[:3]} is among {list(linear)[:3]}")
    inject(base.model, tuple(shared), rank=RANK, scale=SCALE, seed=1)
    for factor, value in adapter_parameters(base.model).items():
        if factor.endswith("lora_b"):
            draw = mx.random.normal(value.shape, key=mx.random.key(len(factor)))
            base.model.load_weights([(factor, 0.1 * draw)], strict=False)
    return base.model.train(), base.config, sorted(set(ours) - set(shared))


def first_gradients(
    model: nn.Module, loss: LossFunction, first: Arrays, attend: AttentionCall | None
) -> dict[str, np.ndarray]:
    """Return each factor's gradient of the mean loss of a batch."""
    _, tokens, *_, gradients = differentiation(model, loss, exchanging(attend))(first)
    return {name: np.array(value / tokens) for name, value in tree_flatten(gradients)}


def train_here(model: nn.Module, config: dict[str, Any], left_out: list[str], given: list[Batch]) -> Ours:
    """Train with our step."""
    loss, first = choose_loss(model, config).train, token_arrays(given[0])
    gradients, by_mlx_lm = (first_gradients(model, loss, first, attend) for attend in (tiled_attention, None))
    with training_kernels(model):
        logits = np.array(model(first["inputs"]))
    step = Step(
        model,
        build_optimizer(SETTINGS, len(given)),
        loss,
        CLIP,
        StepOptions(exchanging(tiled_attention), compiled=False),
    )
    losses = []
    for one in given:
        result = step([one])
        losses.append(result.loss_sum.item() / result.count.item())
    return Ours(np.array(losses), logits, gradients, by_mlx_lm, len(gradients), left_out)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference relative to the largest entry."""
    return float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-12))


def run_family(name: str, steps: int, timeout_s: float, folder: Path) -> dict[str, Any]:
    """Run both sides of one family and return their differences."""
    linear = child("make", {"family": name, "folder": str(folder / "model")}, folder, timeout_s)["linear"]
    model, config, left_out = adapted_model(name, folder / "model", linear)
    given = batches(steps)
    np.savez(folder / "factors.npz", **{n: np.array(v) for n, v in adapter_parameters(model).items()})
    arrays = {f"{part}{i}": getattr(b, part) for i, b in enumerate(given) for part in ("inputs", "targets", "mask")}
    np.savez(folder / "batches.npz", **arrays)
    ours = train_here(model, config, left_out, given)
    job = {"family": name, "factors": str(folder / "factors.npz"), "batches": str(folder / "batches.npz")}
    job |= {"kept": str(folder / "kept.npz"), "scale": SCALE, "clip": CLIP, "steps": steps}
    job |= {"learning_rate": LEARNING_RATE, "weight_decay": SETTINGS.weight_decay}
    theirs = np.array(child("train", job, folder, timeout_s)["losses"])
    with np.load(folder / "kept.npz") as kept:
        logits = apart(ours.logits, kept["logits"])
        each, own = (
            {factor: apart(value, kept[f"gradient:{factor}"]) for factor, value in side.items()}
            for side in (ours.gradients, ours.by_mlx_lm)
        )
        silent = [factor for factor in each if not np.abs(kept[f"gradient:{factor}"]).max() > 0]
    few = {**job, "scale": 1.2 * SCALE, "steps": min(3, steps), "kept": str(folder / "other.npz")}
    other = np.array(child("train", few, folder, timeout_s)["losses"])
    worst = max(each, key=each.__getitem__)
    loss = np.abs(ours.losses / theirs - 1)
    changed = float(np.abs(other / theirs[: len(other)] - 1).max())
    good = bool(loss.max() < BAR and logits < BAR and each[worst] < BAR and changed > 10 * BAR)
    return {
        "family": name,
        "good": good and not silent,
        "loss": float(loss.max()),
        "step": int(loss.argmax()) + 1,
        "logits": logits,
        "gradient": each[worst],
        "gradient_by_mlx_lm": max(own.values()),
        "tensor": worst,
        "without_gradient": silent,
        "more_scale": changed,
        "tensors": ours.tensors,
        "left_out": ours.left_out,
        "losses": [round(float(value), 6) for value in ours.losses],
    }


def line(r: dict[str, Any]) -> str:
    """Return a family's line of the table."""
    return (
        f"{r['family']:<12} {'good' if r['good'] else 'MISS':<5} loss {r['loss']:.1e} at {r['step']:<3d} "
        f"logits {r['logits']:.1e}  gradient {r['gradient']:.1e} (mlx-lm's own {r['gradient_by_mlx_lm']:.1e})  20% more scale {r['more_scale']:.1e}  "
        f"{r['tensors']} tensors, {r['losses'][0]:.3f} -> {r['losses'][-1]:.3f}"
    )


def main(argv: Sequence[str]) -> int:
    """Run the families and return the exit code."""
    args = arguments(argv)
    results = []
    for name in args.families:
        with tempfile.TemporaryDirectory() as folder:
            results.append(run_family(name, args.steps, args.timeout, Path(folder)))
        print(line(results[-1]), flush=True)
    good = all(result["good"] for result in results)
    facts = {"device": device.current_device().header(), **environment()}
    print(json.dumps({"good": good, "results": results, "settings": vars(args), **facts}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
