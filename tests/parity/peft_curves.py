"""Compare training here and in PEFT on torch: the same model, factors, batches and optimizer must give the same results.

    PYTHONPATH=tests python -m parity.peft_curves --model DIR --data FILE [--methods lora,dora] [--steps 50] [--float64]

Our side is `python -m mlx_lora.train` as a user runs it, in its own process; losses and rates come from its
metrics.jsonl, the adapter from its folder. PEFT gets the same initial factors, the same arrays in the same order
(right padding under a causal mask, so no attention mask), the same rate at each step, torch's AdamW, and
transformers' model in float32. Bars: losses within 1e-4 relative at every step, every adapter tensor's cosine
above 0.9999; and as the paired inequality, no two methods' curves are equal. Misses end with exit code 1.

--float64 also runs PEFT in double precision: the distance of each float32 side from it is the effect of rounding.
Prints one line per comparison and ends with one JSON line. Needs `pip install .[parity]`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from _harness import environment, run_child
from peft.optimizers import create_loraplus_optimizer
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from mlx_lora.adapters.inject import adapter_parameters
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.presets import PRESETS
from mlx_lora.config.settings import OptimizerSettings, TrainSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.load import load_data
from mlx_lora.data.sampler import BatchPlan, ShapePrice
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE
from mlx_lora.models.load import load_base
from mlx_lora.objectives.table import objective_of
from mlx_lora.trainer.adapter import adapt
from mlx_lora.utils import device
from parity.double import in_double

LOSS_BAR = 1e-4
COSINE_BAR = 0.9999
# Curves of two methods must differ by at least this at some step: ten times the bar for equality.
APART = 10 * LOSS_BAR


def adamw(model: peft.PeftModel, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return torch's AdamW over the trained parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def loraplus(model: peft.PeftModel, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return PEFT's LoRA+ optimizer with our preset's ratio."""
    decay = settings.weight_decay
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=settings.learning_rate,
        loraplus_lr_ratio=PRESETS["lora-plus"].rate_of_b,
        loraplus_weight_decay=decay,
        weight_decay=decay,
    )


@dataclass(frozen=True)
class Method:
    """PEFT's equivalent of one of our methods; the key in METHODS is our --method.

    Attributes:
        settings: of the config, in addition to those of all methods.
        config: PEFT's config class.
        optimizer: creates the optimizer, with its groups at their peak rates.
        flags: of our train command, in addition to --method.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    config: type[peft.PeftConfig] = peft.LoraConfig
    optimizer: Callable[[peft.PeftModel, OptimizerSettings], torch.optim.Optimizer] = adamw
    flags: tuple[str, ...] = ()


METHODS = {
    "lora": Method(),
    "rslora": Method({"use_rslora": True}),
    "dora": Method({"use_dora": True}),
    "lora-plus": Method(optimizer=loraplus),
}
# PEFT's tensors -> ours; matrices are transposed.
KINDS = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}


@dataclass(frozen=True)
class Run:
    """One side's results: the loss at each step, and the final adapter with our names and orientation."""

    losses: np.ndarray
    adapter: dict[str, np.ndarray]
    seconds: float


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="Float folder that both mlx-lm and transformers read.")
    parser.add_argument("--data", required=True, help="Data file or folder.")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"Separated by commas: {', '.join(METHODS)}.")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float64", action="store_true", help="Run PEFT in double precision too, as the reference.")
    args = parser.parse_args(argv)
    args.methods = [name.strip() for name in args.methods.split(",")]
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        parser.error(f"--methods {','.join(unknown)}: not one of {', '.join(METHODS)}")
    return args


def train_here(args: argparse.Namespace, method: str, folder: Path) -> tuple[Run, list[float], TrainSettings]:
    """Run the train command.

    Returns:
        Its results, the learning rate of each step, and the settings in its run.yaml.
    """
    flags = {
        "--model": args.model,
        "--data": args.data,
        "--adapter-path": folder,
        "--method": method,
        "--iters": args.steps,
        "--batch-tokens": args.batch_tokens,
        "--rank": args.rank,
        "--alpha": args.alpha,
        "--learning-rate": args.learning_rate,
        "--seed": args.seed,
        "--dtype": "float32",
        "--steps-per-report": 1,
        "--val-batches": 0,
        "--save-every": 0,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, "-m", "mlx_lora.train", *words, *METHODS[method].flags]
    ended = run_child(command, folder.with_suffix(".log"), timeout_s=3600)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    run = Run(np.array([r["loss"] for r in records]), load_file(folder / WEIGHTS_FILE), ended.wall_s)
    settings = read_settings(str(folder / "run.yaml"), {})
    return run, [r["learning_rate"] for r in records], train_settings({}, settings)


def beginnings(settings: TrainSettings) -> tuple[list[Batch], dict[str, np.ndarray]]:
    """Return the run's batches in order, and its initial factors, which both follow from its settings."""
    base, loop = load_base(settings.model), settings.loop
    splits = load_data(settings.data, base.hf_tokenizer, loop.seed)
    price = ShapePrice(epochs=loop.epochs or 1.0)
    plan = BatchPlan(
        splits.train, batch_tokens=loop.batch_tokens, batch_size=loop.batch_size, seed=loop.seed, price=price
    )
    adapt(settings, base, objective_of(settings.objective), base.hf_tokenizer.chat_template)
    factors = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    return [plan.batch(*divmod(step, len(plan))) for step in range(loop.iters)], factors


def name_here(name: str) -> str:
    """Return our name of a PEFT parameter."""
    path, kind = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight").rsplit(".", 1)
    return f"{path}.{KINDS[kind]}"


def peft_model(settings: TrainSettings, method: Method, initial: dict[str, np.ndarray]) -> peft.PeftModel:
    """Load the base in float32, adapted by PEFT, with our initial factors.

    Raises:
        ValueError: PEFT trains other tensors than we do, or starts with other magnitudes.
    """
    base = AutoModelForCausalLM.from_pretrained(settings.model.model, dtype=torch.float32)
    shared = {"r": settings.adapter.rank, "lora_alpha": settings.adapter.alpha, "target_modules": "all-linear"}
    model = peft.get_peft_model(base, method.config(**shared, **method.settings)).train()
    trained = trained_here(model)
    if trained.keys() != initial.keys():
        raise ValueError(f"PEFT trains other tensors than we do: {sorted(trained.keys() ^ initial.keys())[:4]}")
    for name, value in trained.items():
        start = torch.tensor(initial[name].T.copy())
        if name.endswith(".m") and not torch.allclose(value.data, start, rtol=1e-5):
            raise ValueError(f"{name}: PEFT's rows have other lengths than ours")
        value.data = start
    return model


def trained_here(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return PEFT's trained parameters with our names and its orientation."""
    return {name_here(name): value for name, value in model.named_parameters() if value.requires_grad}


def train_in_peft(
    model: peft.PeftModel, method: Method, settings: OptimizerSettings, batches: list[Batch], rates: list[float]
) -> Run:
    """Train as our step does: mean loss of the trained tokens, clip, AdamW at the step's rate."""
    begun_s = time.perf_counter()
    trained = trained_here(model)
    optimizer = method.optimizer(model, settings)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for batch, rate in zip(batches, rates, strict=True):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate / settings.learning_rate
        logits = model(torch.tensor(batch.inputs).long(), use_cache=False).logits  # (B, T, V)
        mask, targets = torch.tensor(batch.mask), torch.tensor(batch.targets).long()
        loss = torch.nn.functional.cross_entropy(logits[mask], targets[mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    final = {name: value.detach().numpy().T for name, value in trained.items()}
    return Run(np.array(losses), final, time.perf_counter() - begun_s)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Return the cosine of the angle between two arrays, in double precision."""
    one, other = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@dataclass(frozen=True)
class Comparison:
    """The differences between two runs of one method.

    Attributes:
        loss: largest relative difference of losses; step: its step, from 1; loss_mean: over all steps.
        cosine: least over the adapter's tensors; tensor: its name; cosine_whole: of all numbers together.
        cosine_update: of the change of the initial factors, all numbers together.
    """

    loss: float
    step: int
    loss_mean: float
    cosine: float
    tensor: str
    cosine_whole: float
    cosine_update: float

    @property
    def good(self) -> bool:
        """Tell whether the bars are met; NaN does not meet them."""
        return self.loss < LOSS_BAR and self.cosine > COSINE_BAR


def compare(run: Run, wanted: Run, initial: dict[str, np.ndarray]) -> Comparison:
    """Compare a run with the reference."""
    relative = np.abs(run.losses / wanted.losses - 1)
    each = {name: cosine(value, wanted.adapter[name]) for name, value in run.adapter.items()}
    least = min(each, key=each.__getitem__)
    one, other, start = (
        np.concatenate([part[name].ravel() for name in initial]) for part in (run.adapter, wanted.adapter, initial)
    )
    return Comparison(
        loss=float(relative.max()),
        step=int(relative.argmax()) + 1,
        loss_mean=float(relative.mean()),
        cosine=each[least],
        tensor=least,
        cosine_whole=cosine(one, other),
        cosine_update=cosine(one - start, other - start),
    )


def line(what: str, c: Comparison) -> str:
    """Return a comparison's line of the table."""
    return (
        f"{what:<28} {c.loss:8.1e} at {c.step:<3d} {c.loss_mean:8.1e}  {1 - c.cosine:8.1e} {1 - c.cosine_whole:8.1e} "
        f"{1 - c.cosine_update:8.1e}  {c.tensor}"
    )


def run_method(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Run both sides of one method, print their differences, and return the figures."""
    method = METHODS[name]
    ours, rates, settings = train_here(args, name, folder)
    batches, initial = beginnings(settings)
    theirs = train_in_peft(peft_model(settings, method, initial), method, settings.optimizer, batches, rates)
    pairs = {"ours, PEFT": compare(ours, theirs, initial)}
    seconds = {"ours": ours.seconds, "PEFT": theirs.seconds}
    gc.collect()
    if args.float64:
        model = in_double(peft_model(settings, method, initial))
        exact = train_in_peft(model, method, settings.optimizer, batches, rates)
        pairs |= {"ours, float64": compare(ours, exact, initial), "PEFT, float64": compare(theirs, exact, initial)}
        seconds["float64"] = exact.seconds
    for what, comparison in pairs.items():
        print(line(f"{name}: {what}", comparison), flush=True)
    tokens = int(sum(batch.mask.sum() for batch in batches))
    print(
        f"{'':<28} loss {ours.losses[0]:.4f} -> {ours.losses[-1]:.4f}, {tokens} trained tokens, {len(initial)} tensors"
    )
    return {
        "method": name,
        "good": pairs["ours, PEFT"].good,
        "comparisons": {what: asdict(comparison) for what, comparison in pairs.items()},
        "losses": [round(float(loss), 7) for loss in ours.losses],
        "trained_tokens": tokens,
        "tensors": len(initial),
        "seconds": {side: round(value, 1) for side, value in seconds.items()},
    }


def apart(results: list[dict[str, Any]]) -> dict[str, float]:
    """Print and return the largest relative difference of losses for each pair of methods."""
    pairs = {}
    for one, other in combinations(results, 2):
        ratio = np.array(one["losses"]) / np.array(other["losses"])
        pairs[f"{one['method']}, {other['method']}"] = float(np.abs(ratio - 1).max())
    for pair, difference in pairs.items():
        print(f"{pair:<28} {difference:8.1e} apart")
    return pairs


def main(argv: Sequence[str]) -> int:
    """Run the methods and return the exit code."""
    args = arguments(argv)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT calls what transformers has deprecated
    print(f"{'':<28} loss: worst, step, mean  1 - cosine: least tensor, whole, update; that tensor")
    with tempfile.TemporaryDirectory() as root:
        results = [run_method(args, name, Path(root) / name) for name in args.methods]
    differences = apart(results)
    good = all(result["good"] for result in results) and all(value > APART for value in differences.values())
    facts = {"device": device.current_device().header(), "threads": torch.get_num_threads(), **environment()}
    print(json.dumps({"good": good, "results": results, "apart": differences, "settings": vars(args), **facts}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
