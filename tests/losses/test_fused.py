"""The fused loss: same number and same gradients as the plain one, for every kind of head, and bounded memory."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import peak_bytes
from conftest import TINY, quantized, tiny_model
from mlx.utils import tree_flatten
from mlx_lm.models import cohere, gemma2, granite
from tiers import by_default, named
from tiny_steps import adapted, batch, factors, make_step

from mlx_lora.adapters.inject import inject, select_targets
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.cross_entropy import TILES, plain_loss, token_arrays
from mlx_lora.losses.fused import fused_token_losses, head_loss, row_token_losses
from mlx_lora.models.head import Head, find_head
from mlx_lora.planner.memory import tile_shape
from mlx_lora.trainer.step import Step
from mlx_lora.utils import device

V, D, P = 301, 64, 37
HEADS = {
    "tied": lambda: nn.Embedding(V, D),
    "linear with bias": lambda: nn.Linear(D, V),
    "linear": lambda: nn.Linear(D, V, bias=False),
    "4-bit": lambda: nn.QuantizedLinear.from_linear(nn.Linear(D, V), 32, 4),
    "8-bit tied": lambda: nn.QuantizedEmbedding.from_embedding(nn.Embedding(V, D), 32, 8),
    "mxfp4": lambda: nn.QuantizedLinear.from_linear(nn.Linear(D, V, bias=False), 32, 4, mode="mxfp4"),
}
TILE_SIZES = {  # bytes of a tile, rows of a tile at the most
    "one tile": (1 << 30, 2048),
    "slices": (4 * P * 50, 2048),
    "rows and slices": (4 * 10 * 77, 10),
}


def by_definition(head: Head, h: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    logits = h @ head.dense(head.arrays, mx.float32).T
    logits = (logits + head.bias if head.bias is not None else logits) * head.scale
    if head.soft_cap:
        logits = head.soft_cap * mx.tanh(logits / head.soft_cap)
    losses = mx.logsumexp(logits, -1) - mx.take_along_axis(logits, targets[:, None], -1)[:, 0]
    return (losses * weights).sum()


@pytest.mark.parametrize("tile", named(TILE_SIZES, "one tile", "rows and slices"))
@pytest.mark.parametrize(
    ("scale", "cap"), by_default([(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)], (1.0, None), (2.0, 5.0))
)
@pytest.mark.parametrize("layer", HEADS.values(), ids=HEADS)
def test_value_and_gradient_equal_the_definition(layer, scale, cap, tile, monkeypatch):
    budget, most_rows = tile
    monkeypatch.setattr("mlx_lora.planner.memory.MAX_ROWS", most_rows)
    head = Head(nn.Module(), layer(), scale, cap)
    h, targets = 2 * mx.random.normal((P, D)), mx.random.randint(0, V, (P,))
    weights = (mx.random.uniform(shape=(P,)) < 0.7).astype(mx.float32)
    value, grad = mx.value_and_grad(lambda x: by_definition(head, x, targets, weights))(h)
    fused = mx.compile(mx.value_and_grad(lambda x: fused_token_losses(head, x, targets, weights, budget).sum()))
    got, got_grad = fused(h)
    assert got.item() == pytest.approx(value.item(), rel=1e-5)
    assert np.allclose(got_grad, grad, rtol=1e-4, atol=1e-5 * mx.abs(grad).max().item())
    assert mx.abs(got_grad * (1 - weights[:, None])).max().item() == 0
    no_gradient = fused_token_losses(head, h, targets, weights, budget, gradient=False).sum()
    assert no_gradient.item() == pytest.approx(value.item(), rel=1e-5)


def in_float64(head: Head, h: mx.array, targets: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Each token's loss (P,) and its gradient (P, D), from the same 16-bit numbers."""
    w = np.array(head.dense(head.arrays, h.dtype).astype(mx.float32), np.float64)
    logits = np.array(h.astype(mx.float32), np.float64) @ w.T
    logits = (logits if head.bias is None else logits + np.array(head.bias.astype(mx.float32))) * head.scale
    slopes = np.ones_like(logits)
    if head.soft_cap:
        tanh = np.tanh(logits / head.soft_cap)
        logits, slopes = head.soft_cap * tanh, 1 - tanh**2
    own, powers = (np.arange(len(logits)), np.array(targets)), np.exp(logits - logits.max(-1, keepdims=True))
    shares = powers / powers.sum(-1, keepdims=True)
    losses = -np.log(shares[own])
    shares[own] -= 1
    return losses, (shares * slopes) @ w * head.scale


@pytest.mark.parametrize("sure", [False, True])
@pytest.mark.parametrize(("scale", "cap"), by_default([(1.0, None), (0.25, 30.0)], (0.25, 30.0)))
@pytest.mark.parametrize("layer", HEADS.values(), ids=HEADS)
def test_in_bfloat16_no_tokens_loss_is_negative_and_all_are_near_float64(layer, scale, cap, sure):
    mx.random.seed(7)
    head = Head(nn.Module(), layer(), scale, cap)
    head.layer.set_dtype(mx.bfloat16)
    targets = mx.random.randint(0, V, (P,))
    rows = head.dense(head.arrays, mx.float32)[targets]
    own = 18 * mx.random.uniform(0.3, 1.2, (P, 1)) * rows / mx.square(rows).sum(-1, keepdims=True)
    noise = 2 * mx.random.normal((P, D)) / mx.linalg.norm(rows, axis=-1, keepdims=True)
    h = ((own + noise if sure else noise) / scale).astype(mx.bfloat16)
    expected, slopes = in_float64(head, h, targets)
    assert (expected.min() < 1e-3) == sure

    found = np.array(mx.stack([fused_token_losses(head, h, targets, w, 4 * P * 50, False).sum() for w in mx.eye(P)]))
    assert found.min() >= 0
    # A logit of 8 is rounded by up to 0.03; of the others a token's loss has a mean.
    assert np.sqrt(np.mean((found - expected) ** 2)) < 6e-3
    assert np.abs(found - expected)[expected < 1e-2].max(initial=0) < 1e-3
    weights = mx.ones((P,))
    got = mx.grad(lambda x: fused_token_losses(head, x, targets, weights, 4 * P * 50).sum())(h)
    errors = np.linalg.norm(np.array(got.astype(mx.float32)) - slopes, axis=-1)
    assert (errors < 3e-2 * np.linalg.norm(slopes, axis=-1)).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_tokens_beyond_all_doubt_give_zero_not_nan(dtype):
    head = Head(nn.Module(), nn.Embedding(V, D))
    head.layer.set_dtype(dtype)
    targets = mx.arange(P)
    h = 3e3 * head.layer.weight[targets] / mx.square(head.layer.weight[targets]).sum(-1, keepdims=True)
    value, grad = mx.value_and_grad(lambda x: fused_token_losses(head, x, targets, mx.ones((P,)), 4 * P * 50).sum())(h)
    assert (value.item(), mx.abs(grad).max().item()) == (0, 0)
    wrong = mx.arange(1, P + 1)
    assert fused_token_losses(head, h, wrong, mx.ones((P,)), 4 * P * 50).sum().item() > 1000


@pytest.mark.parametrize("rows", by_default([5, 2048], 5))
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (2.0, 5.0)])
@pytest.mark.parametrize("layer", HEADS.values(), ids=HEADS)
def test_losses_by_whole_rows_equal_the_definition(layer, scale, cap, rows, monkeypatch):
    monkeypatch.setattr("mlx_lora.losses.fused.MAX_SLICE", 77)
    head = Head(nn.Module(), layer(), scale, cap)
    h, targets = 2 * mx.random.normal((P, D)), mx.random.randint(0, V, (P,))
    weights, d = (mx.random.uniform(shape=(P,)) < 0.7).astype(mx.float32), mx.random.normal((P,))

    def own(x: mx.array) -> list[mx.array]:
        return [row_token_losses(head, x, targets, weights, 4 * V * rows)]

    [got], [got_grad] = mx.vjp(own, [h], [d])
    expected = [by_definition(head, h[p : p + 1], targets[p : p + 1], weights[p : p + 1]).item() for p in range(P)]
    grad = mx.grad(lambda x: by_definition(head, x, targets, weights * d))(h)
    assert np.allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert np.allclose(got_grad, grad, rtol=1e-4, atol=1e-5 * mx.abs(grad).max().item())
    tiled = fused_token_losses(head, h, targets, weights, 4 * V * 5)
    assert np.allclose(tiled, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(tiled, expected[::-1], rtol=1e-2)


def test_vocabulary_beyond_the_widest_slice():
    head = Head(nn.Module(), nn.Embedding(70000, 32))
    h, targets, weights = mx.random.normal((5, 32)), mx.random.randint(0, 70000, (5,)), mx.ones((5,))
    grad = mx.grad(lambda x: by_definition(head, x, targets, weights))(h)
    got = mx.grad(lambda x: fused_token_losses(head, x, targets, weights, 1 << 30).sum())(h)
    assert np.allclose(got, grad, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("share", [0.5, 1.0, -1.0])
def test_every_adapter_gradient_equals_the_plain_path(bits, share):
    model = adapted(bits)
    arrays = token_arrays(batch(3, 11, seed=1, share=share))
    fused = head_loss(find_head(model, TINY), TILES, 4 * 288 * 5)
    (value, count), grads = nn.value_and_grad(model, plain_loss)(model, arrays)
    (got, got_count), got_grads = nn.value_and_grad(model, fused.train)(model, arrays)
    assert got.item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6)
    assert got_count.item() == count.item()
    for (name, a), (_, b) in zip(tree_flatten(grads), tree_flatten(got_grads), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5 * max(mx.abs(a).max().item(), 1e-3)), name


@pytest.mark.parametrize("bits", [None, 4])
def test_training_with_it_gives_the_plain_paths_factors(bits):
    plain, other = adapted(bits), adapted(bits)
    step = make_step(plain)
    fused_step = make_step(other)
    fused_step = Step(other, fused_step.optimizer, choose_loss(other, TINY).train, 1.0)
    for seed in range(4):
        a, b = step([batch(2, 9, seed)]), fused_step([batch(2, 9, seed)])
        assert a.loss_sum.item() == pytest.approx(b.loss_sum.item(), rel=1e-4)
    # Adam divides by the gradient's own size: where that is rounding noise, so is the direction of the step.
    moved = factors(plain) - factors(adapted(bits))
    assert np.linalg.norm(factors(plain) - factors(other)) < 1e-3 * np.linalg.norm(moved)


FAMILIES = {
    "gemma2": (gemma2, {"head_dim": 16, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "cohere": (cohere, {"logit_scale": 0.3, "layer_norm_eps": 1e-5}),
    "granite": (
        granite,
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_familys_head_passes_the_start_up_check(family):
    module, changes = FAMILIES[family]
    config = {**TINY, "model_type": family, **changes}
    model = module.Model(module.ModelArgs.from_dict(config))
    model.eval()
    model.freeze()
    assert choose_loss(model, config).description.startswith("fused")
    # The same model with its family's peculiarity overlooked must be caught.
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        config.pop(key, None)
    assert "fused differs" in choose_loss(model, config).description


def frozen(model: nn.Module) -> nn.Module:
    model.freeze()
    return model


def test_untied_quantized_and_multimodal_heads_are_found():
    assert isinstance(find_head(frozen(tiny_model(tie_word_embeddings=False)), TINY).layer, nn.Linear)
    assert isinstance(find_head(frozen(quantized(tiny_model())), TINY).layer, nn.QuantizedEmbedding)
    wrapper = nn.Module()
    wrapper.language_model = frozen(tiny_model())
    assert find_head(wrapper, TINY).layer is wrapper.language_model.model.embed_tokens


def test_an_adapted_or_unknown_head_takes_the_plain_loss_and_says_so():
    model = tiny_model()
    inject(model, select_targets(model, "all-linear,embed_tokens").paths, 4, 1.0)
    assert choose_loss(model, TINY).description == "plain cross-entropy (the head is LoRAEmbedding)"
    assert "no part named" in choose_loss_description(nn.Linear(2, 2))


def choose_loss_description(model: nn.Module) -> str:
    return choose_loss(model, {}).description


def test_tiles_are_even_and_within_the_budget():
    assert tile_shape(776, 49152, 128 << 20) == (776, 24576)
    assert tile_shape(4000, 49152, 128 << 20) == (2000, 16384)
    assert tile_shape(128, 262144, 1 << 40) == (128, 32768)
    assert tile_shape(7, 10, 1 << 30) == (7, 10)
    assert tile_shape(5, 50000, 1) == (5, 1)
    assert tile_shape(0, 10, 1 << 30) == (1, 10)


def test_peak_memory_is_a_tile_not_the_logits():
    vocabulary, positions = 32000, 512
    head = Head(nn.Module(), nn.Embedding(vocabulary, 32))
    h, targets, weights = mx.random.normal((positions, 32)), mx.zeros((positions,), mx.int32), mx.ones((positions,))
    mx.eval(targets, weights, head.arrays)

    def peak(budget_bytes: int) -> int:
        return peak_bytes(mx.grad(lambda x: fused_token_losses(head, x, targets, weights, budget_bytes).sum()), h)

    logits_bytes = 4 * positions * vocabulary
    assert peak(logits_bytes // 16) < logits_bytes / 4
    assert peak(logits_bytes) > logits_bytes


def test_empty_batch_is_zero_without_nan():
    model = adapted()
    arrays = token_arrays(batch(2, 6, seed=0, share=-1))
    fused = head_loss(find_head(model, TINY), TILES, 1 << 30)
    (value, count), grads = nn.value_and_grad(model, fused.train)(model, arrays)
    assert (value.item(), count.item()) == (0, 0)
    assert all(not g.any() for _, g in tree_flatten(grads))


@pytest.mark.cpu("a GPU's own sum is used, which adds in parts; here it would be that of mlx's CPU")
@pytest.mark.parametrize("size", [5, 64, 1000, 32_769])
def test_row_sums_are_near_those_of_float64(size):
    x = mx.exp(3 * mx.random.normal((7, size)))
    exact = np.array(x).astype(np.float64).sum(axis=1, keepdims=True)
    found = np.array(device.row_sums(x)).astype(np.float64)
    assert found.shape == (7, 1)
    assert np.abs(found / exact - 1).max() < 1e-6
    assert np.array_equal(np.array(device.row_sums(x[:, ::-1])), np.array(device.row_sums(mx.contiguous(x[:, ::-1]))))


@pytest.mark.cpu("a GPU's own sum is used, which adds in parts; here it would be that of mlx's CPU")
def test_a_large_vocabulary_loses_nothing():
    """mlx's own sum over 49,152 exponentials is 1e-5 too small on a CPU."""
    vocabulary = 49_152
    head = Head(nn.Module(), nn.Linear(16, vocabulary, bias=False))
    hidden, targets = 10 * mx.random.normal((6, 16)), mx.random.randint(0, vocabulary, (6,))
    logits = np.array(hidden).astype(np.float64) @ np.array(head.layer.weight).astype(np.float64).T
    largest = logits.max(axis=1)
    exact = np.log(np.exp(logits - largest[:, None]).sum(axis=1)) + largest - logits[np.arange(6), np.array(targets)]
    for tile in (1 << 24, 1 << 18):
        found = np.array(fused_token_losses(head, hidden, targets, mx.ones((6,)), tile)).astype(np.float64)
        assert np.abs(found / exact - 1).max() < 1e-6
