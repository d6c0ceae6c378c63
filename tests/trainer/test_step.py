"""The step: loss, accumulation, clip, guard and schedule against plain computations."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from comparing import weights_checksum
from conftest import tiny_model
from mlx.utils import tree_flatten
from tiny_steps import adapted, batch, factors, make_step

from mlx_lora.adapters.inject import adapter_layers, adapter_parameters
from mlx_lora.config.settings import OptimizerSettings
from mlx_lora.data.batch import Batch
from mlx_lora.kernels.quantized_matmul import MeasuredQuantizedLinear
from mlx_lora.losses.cross_entropy import plain_loss, token_arrays
from mlx_lora.models.generator import cast_factors
from mlx_lora.trainer.optimizer import build_optimizer, clip_scale, learning_rate_schedule
from mlx_lora.trainer.step import Step
from mlx_lora.utils.errors import InputError

FACTORS = frozenset({"lora_a", "lora_b"})


def part(whole: Batch, rows: slice) -> Batch:
    return Batch.of(whole.inputs[rows], whole.targets[rows], whole.mask[rows])


def test_loss_is_the_masked_sum_by_definition():
    model, b = tiny_model(), batch(3, 7, seed=0)
    total, count = plain_loss(model, token_arrays(b))
    logits = np.array(model(mx.array(b.inputs)), dtype=np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, b.targets[..., None], -1)[..., 0][b.mask].sum()
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count.item() == b.mask.sum()


def test_padding_and_masked_targets_do_not_reach_the_loss():
    model, b = tiny_model(), batch(2, 8, seed=1)
    wide = Batch.of(*(np.pad(a, ((0, 0), (0, 5))) for a in (b.inputs, b.targets, b.mask)))
    assert wide.mask.sum() == b.mask.sum()
    args = [token_arrays(t) for t in (b, wide)]
    assert plain_loss(model, args[0])[0].item() == pytest.approx(plain_loss(model, args[1])[0].item(), rel=1e-6)
    changed = args[0] | {"targets": mx.where(args[0]["mask"], args[0]["targets"], 0)}
    assert plain_loss(model, args[0])[0].item() == plain_loss(model, changed)[0].item()


def test_empty_mask_gives_zero_and_no_update():
    model = adapted()
    before, step = factors(model), make_step(model, weight_decay=0.1)
    moments = {name: np.array(value) for name, value in tree_flatten(step.optimizer.state)}
    result = step([batch(2, 8, seed=0, share=-1)])
    assert (result.loss_sum.item(), result.count.item(), result.applied.item()) == (0, 0, False)
    assert result.idle
    assert (factors(model) == before).all()
    # It is a step of the run all the same: a resumed run counts as this one does.
    assert step.optimizer.state["step"].item() == step.taken == 1
    after = dict(tree_flatten(step.optimizer.state))
    assert all((np.array(after[name]) == value).all() for name, value in moments.items() if name != "step")


@pytest.mark.parametrize("bits", [None, 4])
def test_accumulation_weighs_tokens_not_batches(bits):
    whole = batch(5, 9, seed=2)
    whole.mask[0] = False
    whole.mask[0, 0] = True  # one token in the first micro-batch, many in the second
    one, many = adapted(bits), adapted(bits)
    step_one, step_many = make_step(one), make_step(many)
    for _ in range(3):
        a = step_one([whole])
        b = step_many([part(whole, slice(0, 1)), part(whole, slice(1, 5))])
    assert a.loss_sum.item() == pytest.approx(b.loss_sum.item(), rel=1e-5)
    assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=1e-4)
    assert np.allclose(factors(one), factors(many), atol=2e-5)
    assert np.abs(factors(one) - factors(adapted(bits))).max() > 1e-3


def test_clip_is_the_global_norm_in_float32():
    grads = {"a": mx.full((3,), 2e4, mx.float16), "b": mx.full((4,), 1.0)}
    norm, factor = clip_scale(grads, 1.0)
    assert norm.dtype == mx.float32
    assert norm.item() == pytest.approx(math.sqrt(3 * 4e8 + 4), rel=1e-3)
    assert factor.item() == pytest.approx(1 / norm.item(), rel=1e-5)
    assert clip_scale(grads, 0)[1].item() == 1.0


def test_gradients_equal_finite_differences():
    model, b = adapted(), batch(2, 6, seed=3)
    arrays = token_arrays(b)
    _, grads = nn.value_and_grad(model, lambda m, a: plain_loss(m, a)[0])(model, arrays)
    flat = dict(tree_flatten(grads))
    for name, value in adapter_parameters(model).items():
        direction = mx.random.normal(value.shape, key=mx.random.key(5))
        ends = []
        for sign in (1, -1):
            model.load_weights([(name, value + sign * 2e-3 * direction)], strict=False)
            ends.append(plain_loss(model, arrays)[0].item())
        model.load_weights([(name, value)], strict=False)
        measured = (ends[0] - ends[1]) / 4e-3
        assert (flat[name] * direction).sum().item() == pytest.approx(measured, rel=0.05, abs=0.05), name


def test_adamw_is_torchs_formula():
    model, b = adapted(), batch(3, 8, seed=4)
    value = factors(model).astype(np.float64)
    m = v = np.zeros_like(value)
    step = make_step(model, clip=0.0, weight_decay=0.1)
    gradient = nn.value_and_grad(model, lambda mo, a: plain_loss(mo, a)[0] / plain_loss(mo, a)[1])
    for t in range(1, 6):
        _, grads = gradient(model, token_arrays(b))
        g = np.concatenate([np.array(x).ravel() for _, x in sorted(tree_flatten(grads))]).astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        value = value * (1 - 1e-2 * 0.1) - 1e-2 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        step([b])
        assert np.allclose(factors(model), value, atol=3e-5), t


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_step_is_skipped_whole(poison):
    clean, dirty = adapted(), adapted()
    loss_at = mx.array(0.0)

    def poisoned(model, arrays):
        total, count = plain_loss(model, arrays)
        bad = arrays["inputs"][0, 0] == 287
        return total * mx.where(bad, poison, 1.0), count + loss_at

    settings = OptimizerSettings(learning_rate=1e-2, warmup=0.0)
    step_clean = Step(clean, build_optimizer(settings, 9), plain_loss, 1.0)
    step_dirty = Step(dirty, build_optimizer(settings, 9), poisoned, 1.0)
    good = [batch(2, 8, seed=s) for s in (1, 2)]
    for b in good:
        b.inputs[0, 0] = 5
    bad = batch(2, 8, seed=9)
    bad.inputs[0, 0] = 287
    step_clean([good[0]]), step_dirty([good[0]])
    skipped = step_dirty([bad])
    assert not skipped.applied.item()
    assert not skipped.idle
    step_clean([good[1]])
    assert step_dirty([good[1]]).applied.item()
    assert np.array_equal(factors(clean), factors(dirty))
    assert step_dirty.optimizer.step.item() == 2  # the schedule did not move on either


@pytest.mark.parametrize("bits", [None, 4])
def test_base_is_untouched_by_training(bits):
    model = adapted(bits)
    before = weights_checksum(model, FACTORS)
    step = make_step(model)
    losses = [(r := step([batch(4, 12, seed=0)])).loss_sum.item() / r.count.item() for _ in range(12)]
    assert losses[-1] < losses[0] * 0.95
    assert weights_checksum(model, FACTORS) == before
    assert weights_checksum(model) != weights_checksum(adapted(bits))


@pytest.mark.parametrize("name", ["adamw", "adam", "muon", "sgd", "adafactor"])
def test_every_optimizer_lowers_the_loss(name):
    step = make_step(adapted(move_b=True), optimizer=name, learning_rate=0.5 if name == "sgd" else 1e-2)
    losses = [(r := step([batch(4, 12, seed=0)])).loss_sum.item() / r.count.item() for _ in range(15)]
    assert losses[-1] < losses[0]


def test_one_flat_array_gets_the_update_of_many(monkeypatch):
    runs = {}
    for flat in (True, False):
        monkeypatch.setattr("mlx_lora.trainer.step.ELEMENTWISE", (optim.Adam, optim.SGD) if flat else ())
        model = adapted(seed=3)
        step = make_step(model, clip=0.5, weight_decay=0.1)
        for s in range(4):
            step([batch(2, 9, seed=s)])
        runs[flat] = factors(model)
        assert (set(step.optimizer.state) >= {"flat"}) is flat
    monkeypatch.setattr("mlx_lora.trainer.step.ELEMENTWISE", (optim.Adam,))
    model = adapted(seed=3)
    sizes = [p.size for _, p in tree_flatten(model.trainable_parameters())]
    for most in (min(sizes), sum(sizes) // 3):  # larger ones stay by themselves; a few flat arrays
        monkeypatch.setattr("mlx_lora.trainer.optimizer.FLAT_UP_TO", most)
        step = make_step(model, clip=0.5, weight_decay=0.1)
        arrays = step.masters.arrays
        flat = [array.size for name, array in arrays.items() if name.startswith("flat")]
        assert max(flat) <= most
        assert len(arrays) - len(flat) == sum(size > most for size in sizes)
    assert 3 <= len(flat) <= 5
    assert set(step.masters.by_name()) == {name for name, _ in tree_flatten(model.trainable_parameters())}
    for s in range(4):
        step([batch(2, 9, seed=s)])
    assert np.allclose(runs[True], factors(model), atol=1e-6)
    assert np.allclose(runs[True], runs[False], atol=1e-6)
    assert not np.allclose(runs[True], factors(adapted(seed=3)), atol=1e-3)
    muon = make_step(adapted(), optimizer="muon")  # works on matrices: never flat
    assert "flat" not in muon.optimizer.state


@pytest.mark.parametrize("extra", [False, True])
def test_factors_of_a_16_bit_model_are_cast_once(extra):
    """With a scale whose root is exact, the bits are those of a cast in each layer; with a further trained array, layers cast."""
    model, seen = adapted(seed=4), set()
    model.set_dtype(mx.bfloat16, lambda kind: kind == mx.float32)
    model.load_weights([(name, a.astype(mx.float32)) for name, a in adapter_parameters(model).items()], strict=False)
    layers = list(adapter_layers(model).values())
    for layer in layers:
        layer.scale = 4.0
    if extra:
        model.model.norm.unfreeze()

    def loss(model, arrays):
        seen.add((layers[0].lora_a.dtype, layers[0].scale))
        return plain_loss(model, arrays)

    step, arrays = Step(model, optim.SGD(1.0), loss, 0.0), token_arrays(batch(2, 9, seed=1))
    _, expected = nn.value_and_grad(model, lambda model: plain_loss(model, arrays)[0])(model)
    found = step.masters.by_name(step._micro(arrays)[3])
    assert all(mx.array_equal(found[name], value.astype(mx.float32)) for name, value in tree_flatten(expected))
    assert seen == {(mx.float32, 4.0) if extra else (mx.bfloat16, 1.0)}
    assert {(layer.lora_a.dtype, layer.scale) for layer in layers} == {(mx.float32, 4.0)}
    plain = model(arrays["inputs"])
    with cast_factors(model):
        assert layers[0].lora_b.dtype == mx.bfloat16
        assert mx.array_equal(model(arrays["inputs"]), plain)
    assert {(layer.lora_a.dtype, layer.scale) for layer in layers} == {(mx.float32, 4.0)}


def test_schedules_warm_up_peak_and_end():
    def rates(steps, **settings):
        schedule = learning_rate_schedule(OptimizerSettings(learning_rate=1.0, **settings), steps)
        return [float(schedule(mx.array(s))) if callable(schedule) else schedule for s in range(steps)]

    cosine = rates(100, warmup=0.1)
    assert cosine[0] == pytest.approx(0.1)
    assert cosine[9] == pytest.approx(1.0)
    assert max(cosine) == pytest.approx(1.0)
    assert cosine[55] == pytest.approx(0.5, abs=0.01)
    assert cosine[99] < 0.001
    linear = rates(100, warmup=20, lr_schedule="linear")
    assert linear[10] == pytest.approx(0.55)
    assert linear[60] == pytest.approx(0.5, abs=0.01)
    assert rates(10, warmup=0, lr_schedule="constant") == [1.0] * 10
    assert rates(10, warmup=0.3, lr_schedule="constant")[-1] == pytest.approx(1.0)
    with pytest.raises(InputError, match="--warmup 20: the run has 10 steps"):
        rates(10, warmup=20)


def test_schedules_of_other_trainers():
    """Those of transformers, which begin with a rate of zero, and mlx-lm's decay over a number of steps to a rate above zero."""

    def rate(step, **settings):
        schedule = learning_rate_schedule(
            OptimizerSettings(learning_rate=2.0, warmup=10, warmup_init=0, **settings), 110
        )
        return float(schedule(mx.array(step - 1)))

    for name, decayed in (
        ("cosine", lambda share: 1 + math.cos(math.pi * share)),
        ("linear", lambda share: 2 - 2 * share),
    ):
        for step in (
            1,
            5,
            10,
            11,
            40,
            100,
            110,
        ):  # get_cosine_schedule_with_warmup, with the steps that it has counted before
            wanted = 2 * (step - 1) / 10 if step <= 10 else decayed((step - 11) / 100)
            assert rate(step, lr_schedule=name) == pytest.approx(wanted, abs=1e-6), (name, step)
    assert [rate(step, decay_steps=20, min_lr_ratio=0.25) for step in (11, 21, 31, 100)] == pytest.approx(
        [2, 1.25, 0.5, 0.5]
    )


def test_adam_has_the_numbers_that_are_asked_for():
    """Against AdamW's own equations (arXiv 1711.05101, algorithm 2), and Adam's without the division that corrects the bias."""
    asked = {"learning_rate": 0.1, "warmup": 0, "lr_schedule": "constant", "weight_decay": 0.01}
    settings = OptimizerSettings(**asked, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=0.01)
    ours, optimizer = {"w": mx.array([1.0, -2.0])}, build_optimizer(settings, 5)
    weight, mean, square = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for step, gradient in enumerate(([0.3, -1.0], [0.1, 2.0], [-0.5, 0.0]), 1):
        ours = optimizer.apply_gradients({"w": mx.array(gradient)}, ours)
        mean, square = 0.8 * mean + 0.2 * np.array(gradient), 0.9 * square + 0.1 * np.array(gradient) ** 2
        weight = weight * (1 - 0.1 * 0.01) - 0.1 * (mean / (1 - 0.8**step)) / (np.sqrt(square / (1 - 0.9**step)) + 0.01)
    assert ours["w"].tolist() == pytest.approx(weight.tolist(), abs=1e-5)
    plain = build_optimizer(replace(settings, bias_correction=False), 5).apply_gradients(
        {"w": mx.array([1.0])}, {"w": mx.array([0.0])}
    )
    assert plain["w"].item() == pytest.approx(
        -0.1 * 0.2 / (0.1**0.5 + 0.01), abs=1e-6
    )  # the means are not divided by 1 - beta


def test_quantized_paths_agree_in_value_and_gradient():
    for bits, mode, group in (
        (2, "affine", 32),
        (3, "affine", 64),
        (4, "affine", 32),
        (6, "affine", 32),
        (8, "affine", 32),
        (4, "mxfp4", 32),
        (8, "mxfp8", 32),
    ):
        layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 40), group, bits, mode=mode)
        x = mx.random.normal((3, 7, 128))
        grad = mx.grad(lambda x, layer=layer: mx.sin(layer(x)).sum())
        expected, expected_grad = layer(x), grad(x)
        layer.dense_from_rows = 1
        layer.__class__ = MeasuredQuantizedLinear
        assert np.allclose(layer(x), expected, atol=2e-4), (bits, mode)
        assert np.allclose(grad(x), expected_grad, atol=2e-4), (bits, mode)
        assert np.allclose(mx.compile(grad)(x), expected_grad, atol=2e-4), (bits, mode)


def test_mlx_adam_without_correction_is_another_optimizer():
    # The fault we avoid: were mlx's default ours, the formula test above could not tell.
    model, b = adapted(), batch(3, 8, seed=4)
    other = adapted()
    make_step(model, weight_decay=0.01)([b])
    Step(other, optim.AdamW(1e-2, weight_decay=0.01), plain_loss, 1.0)([b])
    assert np.abs(factors(model) - factors(other)).max() > 1e-3
