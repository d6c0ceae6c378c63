"""The step is tried before a run: what fails is done without and said, what cannot be trained is refused."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config
from conftest import TINY, tiny_model
from mlx.utils import tree_flatten

from mlx_lora.adapters.inject import inject, select_targets
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.kernels.attention import tiled_attention
from mlx_lora.kernels.choose import exchanging
from mlx_lora.losses.agree import choose_loss, choose_step_variant
from mlx_lora.losses.cross_entropy import PLAIN, plain_loss, token_arrays
from mlx_lora.models.folder import is_foreign
from mlx_lora.planner.memory import tile_shape
from mlx_lora.trainer.step import Step, StepOptions
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError


def adapted(model: nn.Module) -> nn.Module:
    """Give every factor something to do, so that every gradient has a value."""
    inject(model, select_targets(model).paths, rank=4, scale=2.0, seed=1)
    drawn = [(name, 0.05 * mx.random.normal(p.shape)) for name, p in tree_flatten(model.trainable_parameters())]
    model.load_weights(drawn, strict=False)
    return model


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def some_batch(seed: int = 0):
    rng = np.random.default_rng(seed)
    rows = [(rng.integers(0, 250, 12), np.arange(12) > 2) for _ in range(3)]
    return BatchPlan(EncodedSet.from_rows(rows), batch_tokens=256, batch_size=3, seed=0).batch(0, 0)


def refuse(*_, **__):
    raise ValueError("[refuse] not here")


def test_a_llama_needs_no_fallback_and_stays_as_it_was():
    model = adapted(tiny_model())
    loss = choose_loss(model, TINY)
    before, key = parameters(model), mx.random.state[0].tolist()
    variant = choose_step_variant(model, TINY, loss, tiled_attention, "tiny")
    assert (variant.loss, variant.attend, variant.compiled, variant.notes) == (loss, tiled_attention, True, ())
    assert not model.training
    assert mx.random.state[0].tolist() == key
    after = parameters(model)
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["dbrx", "gemma3n", "falcon_h1"])
def test_what_a_model_computes_on_its_way_does_not_stop_or_mislead_the_step(kind):
    """DBRX reads values while it is traced; Gemma 3n overwrites frozen weights. Their steps are those of plain mlx."""
    model, config = adapted(tiny_architecture(kind)), tiny_config(kind)
    variant = choose_step_variant(model, config, choose_loss(model, config), tiled_attention, kind)
    stops = kind == "dbrx" and device.compiles()  # a rehearsal compiles nothing, and so reads values whenever it likes
    assert variant.compiled is not stops
    assert any("not compiled" in note for note in variant.notes) is stops
    batch = some_batch()
    frozen = {name: value for name, value in parameters(model).items() if ".lora_" not in name}
    model.train()
    (expected, count), grads = nn.value_and_grad(model, plain_loss)(model, token_arrays(batch))
    expected, count = expected.item(), count.item()
    norm = mx.sqrt(sum(mx.square(g).sum() for _, g in tree_flatten(grads))).item() / count
    step = Step(
        model,
        optim.SGD(0.1),
        variant.loss.train,
        0.0,
        StepOptions(exchanging(variant.attend), compiled=variant.compiled),
    )
    found = step([batch])
    assert found.loss_sum.item() == pytest.approx(expected, rel=1e-4)
    assert found.grad_norm.item() == pytest.approx(norm, rel=1e-3)
    after = parameters(model)  # every array can be read: none is left over from a trace
    # Gemma 3n clips a few of its own at each call; clipped once, they stay.
    moved = [name for name in frozen if not np.allclose(after[name], frozen[name], atol=1e-6)]
    assert all("_coefs.weight" in name for name in moved)
    assert step([batch]).loss_sum.item() < expected


def test_our_kernels_are_left_out_where_they_fail():
    model = adapted(tiny_model())
    loss = choose_loss(model, TINY)
    variant = choose_step_variant(model, TINY, loss, refuse, "tiny")
    assert (variant.loss, variant.attend, variant.compiled) == (loss, None, True)
    assert "the model's own kernels instead of ours" in variant.notes[0]
    assert "[refuse] not here" in variant.notes[0]


def test_the_fused_loss_is_left_out_where_it_fails():
    model = adapted(tiny_model())
    broken = replace(choose_loss(model, TINY), train=refuse)
    variant = choose_step_variant(model, TINY, broken, tiled_attention, "tiny")
    assert (variant.loss, variant.attend, variant.compiled) == (PLAIN, None, True)
    assert "plain instead of fused loss" in variant.notes[0]


class Deaf(nn.Module):
    """A Llama with something in it that has no gradient, as mlx-lm's Metal kernels have none."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_model()

        @mx.custom_function
        def kernel(x: mx.array) -> mx.array:
            return x * 2

        @kernel.vjp
        def _(*_):
            raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")

        self._kernel = kernel

    def __call__(self, ids: mx.array) -> mx.array:
        return self._kernel(self.inner(ids))

    @property
    def layers(self) -> list[nn.Module]:
        return self.inner.layers


def test_a_model_without_a_gradient_is_refused_in_one_line():
    model = Deaf()
    inject(model, select_targets(model).paths, rank=4, scale=2.0)
    before = parameters(model)
    config = {**TINY, "model_type": "rwkv7"}
    words = r"--model some/model: mlx-lm's rwkv7 cannot be trained here \(\[Primitive::vjp\] Not implemented"
    with pytest.raises(InputError, match=words) as refused:
        choose_step_variant(model, config, choose_loss(model, config), tiled_attention, "some/model")
    assert "\n" not in str(refused.value)
    after = parameters(model)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_forward_pass_that_fails_is_told_in_one_line(monkeypatch):
    model = adapted(tiny_model())
    monkeypatch.setattr(type(model), "__call__", refuse)
    with pytest.raises(InputError, match=r"mlx-lm's llama: its forward pass fails here \(\[refuse\] not here\)"):
        choose_loss(model, TINY)


def test_our_own_slips_are_not_taken_for_a_models():
    with pytest.raises(TypeError) as ours:
        tile_shape(None, 8, 8)
    assert not is_foreign(ours.value)
    with pytest.raises(AttributeError) as theirs:
        nn.Linear(2, 2).nothing  # noqa: B018
    assert is_foreign(theirs.value)
    model = adapted(tiny_model())
    broken = replace(choose_loss(model, TINY), train=lambda *_: (tile_shape(None, 8, 8), None))
    with pytest.raises(TypeError):
        choose_step_variant(model, TINY, broken, tiled_attention, "tiny")
