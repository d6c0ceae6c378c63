"""One of several ranks that compute the loss and the gradient of tiny models in parts; rank 0 prints how far they are from one's.

python tests/cut_rank.py CASES.json         a list of {"model", "quantize", "mode", "config", "targets", "dropout", "without"}
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from architectures.build import tiny_architecture, tiny_config
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_lora.adapters.base import Wire
from mlx_lora.adapters.inject import adapt_layers, adapter_layers, inject
from mlx_lora.adapters.targets import select_targets
from mlx_lora.config.settings import ModelSettings
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.table import exchanging
from mlx_lora.models.load import load_base
from mlx_lora.parallel.divided_base import TensorParallel
from mlx_lora.parallel.launch import together
from mlx_lora.parallel.ranks import SeveralRanks
from mlx_lora.parallel.tensor import cut_model
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.step import differentiation

IDS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0, 4, 5]])


def loss_of(model: nn.Module, inputs: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    losses = nn.losses.cross_entropy(model(inputs).astype(mx.float32), targets)
    return losses.sum(), mx.array(float(losses.size))


def adapted(case: dict[str, Any]) -> tuple[nn.Module, dict]:
    """Return a tiny model with LoRA on every layer, whose factors are random, and its config."""
    config = {**tiny_config(case["model"]), **case.get("config", {})}
    model = tiny_architecture(case["model"], config=config)
    if case.get("quantize") == "mxfp4":
        nn.quantize(model, 32, 4, mode="mxfp4", class_predicate=lambda path, module: isinstance(module, SwitchLinear))
    elif case.get("quantize"):
        nn.quantize(model, 32, case["quantize"])
    paths = select_targets(model, case.get("targets", "all-linear")).paths
    adapt_layers(model, dict.fromkeys(paths, (4, 2.0)), dropout=case.get("dropout", 0.0))
    mx.random.seed(1)
    for layer in adapter_layers(model).values():
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
    return model, config


def gradients(model: nn.Module, case: dict[str, Any]) -> tuple[float, dict]:
    """Return the loss and the gradients by name."""
    tape = apply_checkpointing(model, case.get("mode", "none"))
    model.train()
    mx.random.seed(2)
    step = differentiation(model, loss_of, exchanging(tape.attend if tape else attend))
    loss, _, _, grads = step(IDS[:, :-1], IDS[:, 1:])
    return loss.item(), grads


def compare(case: dict[str, Any], ranks: SeveralRanks) -> dict[str, Any]:
    """Return the relative difference of loss and gradients, and the bytes of this rank's part of the model."""
    model, config = adapted(case)
    whole = copy.deepcopy(model)
    loss, grads = gradients(whole, case)
    expected = dict(tree_flatten(grads))
    if case.get("without") == "entry":
        Wire.entered = lambda self, x: x
    cut_model(model, config, ranks)
    found_loss, grads = gradients(model, case)
    strategy = TensorParallel(ranks)
    own = grads if case.get("without") == "counting" else strategy.own_gradients(model)(grads)
    total, _ = strategy.reduce([mx.array(found_loss), mx.array(1.0), {}, dict(tree_flatten(own))], False)
    found_loss, found = total[0].item(), total[3]
    sizes = {name: mx.abs(g).max().item() for name, g in expected.items()}
    apart = {name: mx.abs(found[name] - g).max().item() / max(sizes[name], 1e-6) for name, g in expected.items()}
    worst = max(apart, key=apart.get)
    bytes_of = [sum(p.nbytes for _, p in tree_flatten(m.parameters())) for m in (whole, model)]
    alive = sum(size > 0 for size in sizes.values())
    return {"loss": abs(found_loss - loss) / loss, "gradient": apart[worst], "worst": worst, "alive": alive / len(sizes),
            "part": bytes_of[1] / bytes_of[0]}  # fmt: skip


def load(folder: str, ranks: SeveralRanks) -> dict[str, Any]:
    """Return the bytes of the parts that a rank keeps, and the most that it had in memory while it read them."""
    base = load_base(ModelSettings(model=folder), read=False)
    inject(base.model, select_targets(base.model, "all-linear").paths, rank=4, scale=2.0)
    largest = max(p.nbytes for _, p in tree_flatten(base.model.parameters()))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    cut_model(base.model, base.config, ranks)
    own = sum(p.nbytes for _, p in tree_flatten(base.model.parameters()))
    return {"whole": base.size_bytes, "part": own, "peak": mx.get_peak_memory() - before, "largest": largest}


def main(file: str) -> None:
    with together(lambda error: None) as ranks:
        assert isinstance(ranks, SeveralRanks)
        for case in json.loads(Path(file).read_text()):
            found = load(case["load"], ranks) if "load" in case else compare(case, ranks)
            if ranks.leads:
                print(json.dumps({**case, **found}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
