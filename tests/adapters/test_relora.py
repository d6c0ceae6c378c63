"""ReLoRA: restarts change nothing, equal really merging into the weights, and leave one plain adapter."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import quantized, tiny_model
from make_adapters import TOKENS
from mlx.utils import tree_flatten, tree_map
from tiers import by_default
from tiny_steps import batch, losses_of, method_step

from mlx_lora.adapters.inject import adapt_model, adapter_layers, fresh_factors, inject, select_targets
from mlx_lora.config.settings import AdapterSettings, OptimizerSettings
from mlx_lora.exporters.adapter_folder import AdapterInfo, stored_parameters
from mlx_lora.losses.cross_entropy import plain_loss, token_arrays
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.schedules import restart_every, restart_warmup
from mlx_lora.trainer.step import Step

STEPS, EVERY, RATE = 20, 6, 5e-3


def settings(**changes) -> AdapterSettings:
    own = {"method": "relora", "rank": 3, "alpha": 6.0, "relora_every": EVERY, "relora_warmup": 2, **changes}
    return AdapterSettings(**own)


def make_step(model: nn.Module, of: AdapterSettings, optimizer: str = "adamw") -> Step:
    return method_step(model, of, STEPS, RATE, optimizer)


def trained(step: Step) -> list[float]:
    return losses_of(step, [batch(3, 17, seed=number % 4) for number in range(STEPS)])


def by_merging(model: nn.Module, paths: tuple[str, ...]) -> list[float]:
    """Train the plain way: at each restart the product goes into the dense weight, and moments to zero."""
    inject(model, paths, 3, 2.0, seed=1)
    optimizer = optim.AdamW(RATE, weight_decay=0.01, bias_correction=True)
    gradient = nn.value_and_grad(model, plain_loss)
    losses, cycle = [], 0
    for number in range(STEPS):
        if number and number % EVERY == 0:
            cycle += 1
            for path, layer in adapter_layers(model).items():
                layer.linear.weight = layer.linear.weight + layer.delta()
                layer.lora_a, layer.lora_b = fresh_factors(f"{path}#{cycle}", layer, 1)
            for part in [key for key in optimizer.state if key not in ("step", "learning_rate")]:
                optimizer.state[part] = tree_map(mx.zeros_like, optimizer.state[part])
        since = number % EVERY
        optimizer.learning_rate = RATE if number < EVERY else RATE * min(1, (since + 1) / 2)
        (loss, count), grads = gradient(model, token_arrays(batch(3, 17, seed=number % 4)))
        losses.append(loss.item() / count.item())
        grads = tree_map(lambda g, count=count: g / count, grads)
        norm = mx.sqrt(sum(mx.square(g).sum() for _, g in tree_flatten(grads)))
        optimizer.update(model, tree_map(lambda g, norm=norm: g * mx.minimum(1, 1 / norm), grads))
    return losses


def test_it_equals_merging_into_the_weights():
    model = tiny_model()
    adapt_model(model, settings(relora_prune_ratio=1.0), seed=1)
    ours = trained(make_step(model, settings(relora_prune_ratio=1.0)))
    expected = by_merging(tiny_model(), select_targets(tiny_model()).paths)
    assert np.abs(np.array(ours) / np.array(expected) - 1).max() < 1e-4
    # Without restarts it is LoRA, another run.
    model = tiny_model()
    adapt_model(model, settings(relora_every=STEPS), seed=1)
    assert not np.allclose(trained(make_step(model, settings(relora_every=STEPS))), ours, rtol=1e-3)


@pytest.mark.parametrize("base", by_default(["float", "4-bit"], "4-bit"))
@pytest.mark.parametrize("optimizer", by_default(["adamw", "muon", "sgd", "adafactor"], "adamw", "muon"))
def test_a_restart_changes_no_output_and_the_sum_is_stored(base, optimizer):
    model = tiny_model() if base == "float" else quantized(tiny_model())
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    setup = adapt_model(model, settings(target_modules="all-linear,embed_tokens"), seed=1)
    step = make_step(model, settings(), optimizer)
    outputs = []
    after = step.events.after

    def watched(number, masters, optimizer):
        masters.hand_out()
        outputs.append([np.array(model(TOKENS))])
        after(number, masters, optimizer)
        masters.hand_out()
        outputs[-1].append(np.array(model(TOKENS)))

    step.events.after = watched
    losses = trained(step)
    assert losses[-1] < losses[0]
    assert step.events.cycles == 1 + STEPS // EVERY
    assert all(np.allclose(one, other, atol=1e-4) for one, other in outputs)
    assert not np.allclose(outputs[0][0], outputs[-1][0], atol=1e-3)
    kept = {
        name.replace(".linear.", ".").replace(".embedding.", "."): v for name, v in tree_flatten(model.parameters())
    }
    assert all(np.array_equal(value, kept[name]) for name, value in before.items())
    info = AdapterInfo("relora", 3, 6.0, setup.scale, 0.0, 2, setup.targets.keys, "x", None, "y")
    stored = stored_parameters(model, info)
    assert stored["model.layers.0.self_attn.q_proj.lora_a"].shape == (64, 3 * step.events.cycles)
    for path, layer in adapter_layers(model).items():
        product = setup.scale * (stored[f"{path}.lora_a"] @ stored[f"{path}.lora_b"])
        assert np.allclose(product if "embed" in path else product.T, layer.delta(), atol=1e-5)


def test_moments_are_pruned_at_the_same_places():
    model = tiny_model()
    of = settings(relora_prune_ratio=0.9)
    adapt_model(model, of, seed=1)
    step = make_step(model, of)
    for number in range(EVERY - 1):
        step([batch(3, 17, seed=number)])
    size = step.optimizer.state["flat"]["v"].size
    assert (step.optimizer.state["flat"]["v"] != 0).sum().item() > 0.6 * size
    step([batch(3, 17, seed=9)])
    m, v = (np.array(step.optimizer.state["flat"][name]) for name in "mv")
    assert 0.05 * size < (v != 0).sum() < 0.11 * size
    assert not m[v == 0].any()


def test_the_rate_warms_up_again():
    of = settings()
    built = build_optimizer(
        OptimizerSettings(learning_rate=1.0, lr_schedule="constant", warmup=0.0),
        STEPS, restart_every(of, STEPS), restart_warmup(of, STEPS),
    )  # fmt: skip
    rates = []
    for _ in range(2 * EVERY + 1):
        built.apply_gradients({"x": mx.ones(1)}, {"x": mx.ones(1)})
        rates.append(built.learning_rate.item())
    assert rates == [1.0] * EVERY + [0.5] + [1.0] * (EVERY - 1) + [0.5]
    assert restart_every(AdapterSettings(method="relora"), 100) == 25
    assert restart_warmup(AdapterSettings(method="relora"), 100) == 2


def test_many_cycles_do_not_grow_past_the_layer():
    model = tiny_model()
    of = settings(rank=8, relora_every=1)
    setup = adapt_model(model, of, seed=1)
    step = make_step(model, of)
    trained(step)
    widths = {path: layer.fixed_a.shape[1] for path, layer in adapter_layers(model).items()}
    assert widths["model.layers.0.self_attn.k_proj"] <= 32
    info = AdapterInfo("relora", 8, 6.0, setup.scale, 0.0, 2, setup.targets.keys, "x", None, "y")
    stored = stored_parameters(model, info)
    layer = adapter_layers(model)["model.layers.0.self_attn.k_proj"]
    product = setup.scale * (
        stored["model.layers.0.self_attn.k_proj.lora_a"] @ stored["model.layers.0.self_attn.k_proj.lora_b"]
    )
    assert np.allclose(product.T, layer.delta(), atol=1e-5)
