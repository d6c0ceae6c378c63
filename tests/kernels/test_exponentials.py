"""Exponentials from polynomials: accuracy over the whole range, gradients, and where mlx really compiles them."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import chain

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import close
from conftest import TINY, tiny_model
from tiers import by_default
from tiny_steps import adapted, batch, factors

from mlx_lora.config.settings import OptimizerSettings
from mlx_lora.kernels import activations as exponentials
from mlx_lora.kernels.activations import polynomial_swiglu
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.choose import KernelChoice, choose_model_kernels, exchanging, kernel_rows
from mlx_lora.kernels.measure import POLYNOMIAL
from mlx_lora.losses.agree import check_kernels
from mlx_lora.losses.cross_entropy import PLAIN, TILES
from mlx_lora.losses.fused import fused_token_losses, head_loss
from mlx_lora.models.head import Head, find_head
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions
from mlx_lora.utils import device

pytestmark = pytest.mark.skipif(not exponentials.usable(mx.zeros(1)), reason="mlx does not compile on a CPU here")


def exp_minus(z) -> np.ndarray:
    return np.array(exponentials.exp_minus(mx.array(np.asarray(z, np.float32)) * exponentials.SCALE))


def test_the_exponential_is_right_within_1e_5():
    z = np.concatenate([np.linspace(0, 32, 400_001), np.logspace(-30, 1.5, 200_001)]).astype(np.float32)
    exact = np.exp(-z.astype(np.float64))
    error = (exp_minus(z) - exact) / exact
    assert np.abs(error).max() < 1e-5
    assert np.abs(error.mean()) < 1e-6  # errors of many cancel
    # Beyond, where a softmax has nothing to lose, the relative error grows and the absolute one does not.
    far = np.linspace(32, 120, 100_001).astype(np.float32)
    assert np.abs(exp_minus(far) - np.exp(-far.astype(np.float64))).max() < 1e-18
    assert (np.diff(exp_minus(np.linspace(40, 120, 500))) <= 0).all()


def test_the_exponential_at_the_ends():
    assert exp_minus([0.0, -0.0]).tolist() == [1.0, 1.0]
    assert exp_minus([np.inf, 1e20, 3e38, 200.0]).tolist() == [0.0] * 4
    assert np.isnan(exp_minus([np.nan])).all()


def test_softmax_hides_what_is_masked_and_passes_on_what_is_not_a_number():
    scores = 3 * mx.random.normal((5, 7, 33))
    hidden = mx.where(mx.arange(33) < 20, scores, mx.finfo(mx.float32).min)
    got = exponentials.softmax(hidden * exponentials.SCALE)
    assert close(got, mx.softmax(hidden, axis=-1, precise=True), 1e-5)
    assert mx.abs(got[..., 20:]).max().item() == 0
    assert mx.abs(got.sum(-1) - 1).max().item() < 1e-6
    # A row of which everything is hidden has equal shares, as in mlx.
    assert close(exponentials.softmax(mx.full((2, 4), mx.finfo(mx.float32).min)), mx.full((2, 4), 0.25), 1e-6)
    assert mx.isnan(exponentials.softmax(mx.array([[1.0, float("nan"), 2.0]]))).all().item()


def silu_up_in_float64(gate, up, d):
    s = 1 / (1 + np.exp(-np.maximum(gate, -700)))
    return gate * s * up, d * up * s * (1 + gate * (1 - s)), d * gate * s


def test_the_gated_activation_over_the_whole_range():
    sides = np.concatenate([np.linspace(-100, 100, 20_001), [0.0, -0.0, 1e-30, -1e-30, 1e-6, -1e-6, 1e4, -1e4]])
    gate = mx.array(sides.astype(np.float32))
    up, d = (mx.random.normal(gate.shape) for _ in range(2))
    (got,), gradients = mx.vjp(lambda g, u: [polynomial_swiglu(g, u)], [gate, up], [d])
    exact = silu_up_in_float64(*(np.array(x, np.float64) for x in (gate, up, d)))
    for found, right in zip((got, *gradients), exact, strict=True):
        assert np.abs(np.array(found) - right).max() < 5e-6 * np.maximum(1, np.abs(right)).max()
        near = np.abs(sides) < 15
        assert np.allclose(np.array(found)[near], right[near], rtol=1e-5, atol=2e-6)


def test_values_of_the_gated_activation_that_are_not_finite_are_seen():
    gate, up = mx.array([float("nan"), float("inf"), 1.0]), mx.ones((3,))
    got = polynomial_swiglu(gate, up)
    assert not mx.isfinite(got[:2]).any().item()
    assert got[2].item() == pytest.approx(1 / (1 + np.exp(-1)), rel=1e-5)


@pytest.mark.parametrize("extras", by_default([{}, {"scale": 0.25}, {"soft_cap": 3.0}], {}, {"soft_cap": 3.0}))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("budget", [1 << 30, 4 * 10 * 77])
def test_the_loss_and_its_gradient_equal_the_other_kernel(budget, bias, extras):
    head = Head(nn.Module(), nn.Linear(64, 301, bias=bias), **extras)
    h, targets, weights = (
        3 * mx.random.normal((37, 64)),
        mx.random.randint(0, 301, (37,)),
        mx.random.uniform(shape=(37,)),
    )

    def loss(h, polynomial):
        return fused_token_losses(head, h, targets, weights, budget, polynomial=polynomial)

    def both(polynomial):
        return mx.vjp(lambda h: [loss(h, polynomial)], [h], [mx.ones((37,))])

    for one, other in zip(*([*chain(*both(polynomial))] for polynomial in (True, False)), strict=True):
        assert close(one, other, 1e-5)
        assert not mx.array_equal(one, other).item()
    assert close(loss(h, True), both(False)[0][0], 1e-5)  # not differentiated


def test_the_loss_of_a_sure_token_keeps_its_relative_error():
    """m is the largest of the other logits, so nothing underflows however sure the model is."""
    layer = nn.Linear(8, 300, bias=False)
    layer.weight = mx.random.normal((300, 8)) * 0.1
    layer.weight[7] = mx.ones((8,)) * mx.array([1.0] + [0.0] * 7)
    head = Head(nn.Module(), layer)
    h, targets = mx.array([[n] + [0.0] * 7 for n in (0.0, 20.0, 60.0)]), mx.array([7, 7, 7])
    logits = np.array(h, np.float64) @ np.array(layer.weight, np.float64).T
    others = np.log(np.exp(np.delete(logits, 7, axis=1)).sum(1))
    exact = np.log1p(np.exp(others - logits[:, 7]))
    got = np.array(fused_token_losses(head, h, targets, mx.ones((3,)), 4 * 3 * 64, polynomial=True))
    assert np.allclose(got, exact, rtol=1e-4)
    assert exact[2] < 1e-15


def test_a_tile_of_only_the_target_is_no_trouble():
    head = Head(nn.Module(), nn.Linear(8, 5, bias=False))
    h, targets = mx.random.normal((5, 8)), mx.arange(5)
    one_column = [
        fused_token_losses(head, h, targets, mx.ones((5,)), 4 * 5, polynomial=polynomial)
        for polynomial in (True, False)
    ]
    assert close(*one_column, 1e-5)


def test_a_loss_that_is_not_finite_is_seen():
    head = Head(nn.Module(), nn.Linear(8, 50, bias=False))
    h = mx.zeros((2, 8)) + mx.array([[float("nan")], [1.0]])
    got = fused_token_losses(head, h, mx.array([1, 2]), mx.ones((2,)), 1 << 20, polynomial=True)
    assert mx.isfinite(got).tolist() == [False, True]


def polynomial_everywhere(model) -> KernelChoice:
    choice = choose_model_kernels(model, [128], "ours", mx.float32)
    rows = {row.name: row for row in kernel_rows()}
    return KernelChoice(
        "ours", classes={key: POLYNOMIAL for key in choice.classes if POLYNOMIAL in rows[key[0]].candidates}
    )


def test_the_model_agrees_with_its_own_kernels():
    model = adapted()
    choice = polynomial_everywhere(model)
    assert {kernel for kernel, _ in choice.classes} == {"attention", "gated activation"}
    assert check_kernels(model, TINY, PLAIN, choice)[0] is choice


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
def test_a_step_is_the_same_compiled_and_not_and_near_the_other_kernels(mode, monkeypatch):
    """The small kernels are compiled in both; a block that is repeated in the backward pass uses mlx's exponentials."""

    def stepped(compiled: bool, choose) -> mx.array:
        monkeypatch.setattr(device, "_compiling", compiled)
        (mx.enable_compile if compiled else mx.disable_compile)()
        try:
            model = adapted()
            tape = apply_checkpointing(model, mode)
            loss = head_loss(find_head(model, TINY), POLYNOMIAL if choose is polynomial else TILES, 1 << 20)
            optimizer = build_optimizer(OptimizerSettings(learning_rate=1e-3), 20)
            step = Step(
                model, optimizer, loss.train, 1.0, StepOptions(exchanging(tape.attend if tape else attend, choose))
            )
            for seed in range(2):
                mx.eval(step([batch(2, 70, seed)]), step.state)
            return mx.array(factors(model))
        finally:
            mx.enable_compile()

    polynomial = polynomial_everywhere(tiny_model())
    plain, other = stepped(False, polynomial), stepped(False, lambda row, _: row.assumed)
    assert close(plain, other, 1e-4)
    assert not mx.array_equal(plain, other).item()
    if mode == "none":  # compiling a step takes seconds
        assert close(stepped(True, polynomial), plain, 1e-6)


@pytest.mark.long
def test_the_polynomials_are_two_kernels_however_many_shapes(tmp_path):
    """mlx calls g++ once for each; a constant too many would make several of one, and slow ones."""
    code = """
import mlx_lora.utils.device as device
import mlx.core as mx
from mlx_lora.kernels.activations import polynomial_swiglu
from mlx_lora.kernels import activations as exponentials
device.compile_for(1)
for shape in ((3, 5), (2, 3, 4), (8,), (2, 3, 4, 5)):
    x = mx.random.normal(shape)
    mx.eval(exponentials.softmax(x), mx.grad(lambda x: polynomial_swiglu(x, x).sum())(x))
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=True)
    names = [file.name for file in tmp_path.rglob("*.cpp")]
    assert len(names) == 2
    assert all("strided" not in file.read_text().split("void ")[-1] for file in tmp_path.rglob("*.cpp"))


def test_where_mlx_does_not_compile_the_others_are_used(monkeypatch):
    x, d = (mx.random.normal((4, 8)) for _ in range(2))

    def in_a_backward_pass(found: list[bool]) -> None:
        function = mx.custom_function(lambda x: x * 1)
        function.vjp(lambda x, d, y: (found.append(exponentials.usable(d)), d)[1])
        mx.eval(mx.grad(lambda x: function(x).sum())(x))

    found: list[bool] = []
    in_a_backward_pass(found)
    assert found == [False]
    assert exponentials.usable(x)
    assert not exponentials.usable(x, d.astype(mx.bfloat16))
    with device.uncompiled():
        assert not exponentials.usable(x)
        plain = polynomial_swiglu(x, d)
    assert close(plain, polynomial_swiglu(x, d), 1e-5)
    monkeypatch.setattr(device, "vectorizes_compiled_sums", lambda: False)
    assert all(POLYNOMIAL not in row.candidates for row in kernel_rows())


def test_a_compiler_that_does_not_work_is_as_none(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    compiler.chmod(0o755)
    code = """
import mlx_lora.utils.device as device
import mlx.core as mx
from mlx_lora.kernels.activations import polynomial_swiglu
from mlx_lora.kernels import activations as exponentials
x = mx.ones((4,))
assert not exponentials.usable(x)
assert abs(polynomial_swiglu(x, x)[0].item() - 0.7310586) < 1e-6
"""
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path), "PATH": path}, check=True)
