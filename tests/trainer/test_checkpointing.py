"""Checkpointing: the same numbers, dropout included, with less kept; and the choice of it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import assert_equal, peak_bytes
from conftest import TINY, quantized, tiny_model
from tiers import by_default
from tiny_steps import CHECKPOINT_MODES, adapted, batch, factors, gradients, make_step

from mlx_lora.adapters.inject import adapter_parameters, inject, select_targets
from mlx_lora.adapters.lora import LoRAEmbedding
from mlx_lora.config.settings import OptimizerSettings
from mlx_lora.kernels.choose import exchanging, training_kernels
from mlx_lora.kernels.quantized_matmul import use_measured_matmul
from mlx_lora.losses.cross_entropy import plain_loss, token_arrays
from mlx_lora.trainer.gradient_checkpointing import Checkpointed, apply_checkpointing, checkpoint_blocks
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions
from mlx_lora.utils import device


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("mode", CHECKPOINT_MODES)
@pytest.mark.parametrize("bits", [None, 4])
def test_gradients_are_the_same(bits, mode, kernels):
    expected = gradients(adapted(bits), "none", kernels=False)
    assert_equal(gradients(adapted(bits), mode, kernels), expected)
    assert mx.abs(next(iter(expected.values()))).max().item() > 0


def with_dropout() -> nn.Module:
    model = adapted()
    layers = [m for _, m in model.named_modules() if hasattr(m, "lora_a")]
    for layer in layers:
        layer.dropout.probability = 0.3
    model.train()
    return model


@pytest.mark.parametrize("mode", CHECKPOINT_MODES)
def test_dropout_drops_the_same_features_in_both_passes(mode):
    def drawn(mode: str, seed: int) -> dict[str, mx.array]:
        model = with_dropout()
        mx.random.seed(seed)
        return gradients(model, mode)

    expected = drawn("none", 7)
    assert_equal(drawn(mode, 7), expected)
    other = drawn(mode, 8)
    assert any(not np.allclose(other[name], value, rtol=0.05) for name, value in expected.items())


class Lookup(nn.Module):
    """A block with an embedding of its own."""

    def __init__(self):
        super().__init__()
        mx.random.seed(1)
        factors = mx.random.normal((20, 4)), mx.random.normal((4, 8))
        self.embed = LoRAEmbedding.from_base(nn.Embedding(20, 8), factors, 1.0, dropout=0.5)

    def __call__(self, x: mx.array, tokens: mx.array) -> mx.array:
        return mx.square(x + self.embed(tokens))


@pytest.mark.parametrize("products", [False, True])
def test_so_does_that_of_an_embedding_in_a_block(products):
    def gradient(checkpointed: bool, seed: int) -> mx.array:
        block = Lookup()
        if checkpointed:
            checkpoint_blocks([block], products)
        mx.random.seed(seed)
        loss = nn.value_and_grad(block, lambda x, tokens: block(x, tokens).sum())
        return loss(mx.ones((1, 6, 8)), mx.array([[3, 1, 4, 1, 5, 9]]))[1]["embed"]["lora_b"]

    assert mx.allclose(gradient(True, 7), gradient(False, 7))
    assert not mx.allclose(gradient(True, 7), gradient(False, 8))


@pytest.mark.parametrize("mode", by_default(CHECKPOINT_MODES, "selective"))
def test_compiled_steps_give_the_same_factors(mode):
    plain, kept = adapted(4), adapted(4)
    tape = apply_checkpointing(kept, mode)
    step = make_step(plain)
    other = Step(
        kept,
        build_optimizer(OptimizerSettings(learning_rate=1e-2, lr_schedule="constant", warmup=0.0), 20),
        plain_loss,
        1.0,
        StepOptions(exchanging(tape.attend)),
    )
    for s in range(3):
        a, b = step([batch(2, 11, seed=s)]), other([batch(2, 11, seed=s)])
        assert a.loss_sum.item() == pytest.approx(b.loss_sum.item(), rel=1e-5)
    assert np.allclose(factors(plain), factors(kept), atol=2e-5)
    assert set(adapter_parameters(kept)) == set(adapter_parameters(plain))


def test_only_these_instances_change_and_only_once():
    model, other = adapted(), tiny_model()
    checkpoint_blocks(model.layers, products=True)
    once = [type(module) for module in model.modules()]
    checkpoint_blocks(model.layers, products=True)
    assert [type(module) for module in model.modules()] == once
    assert isinstance(model.layers[0], Checkpointed)
    assert not any(isinstance(module, Checkpointed) for module in other.modules())


def peak_of(mode: str, blocks: int = 8) -> int:
    model = tiny_model(num_hidden_layers=blocks)
    inject(model, select_targets(model).paths, rank=4, scale=2.0)
    tape = apply_checkpointing(model, mode)
    gradient = nn.value_and_grad(model, lambda m, ids: m.model(ids).square().sum())
    mx.eval(model.parameters())
    with training_kernels(model, *([tape.attend] if tape else [])):
        return peak_bytes(lambda ids: gradient(model, ids)[1], token_arrays(batch(8, 128, seed=0))["inputs"])


@pytest.mark.long
def test_each_mode_holds_less_than_the_one_before():
    none, second, selective, block = (peak_of(mode) for mode in ("none", "2", "selective", "block"))
    assert block < 0.45 * none
    assert selective < (0.7 if device.keep_exponentials() else 0.75) * none  # a GPU keeps less without checkpoints, too
    assert block < selective
    assert block < second < none


def test_mixture_of_experts_blocks_are_checkpointed_too():
    from mlx_lm.models import qwen3_moe

    config = {
        **TINY, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True,
    }  # fmt: skip

    def model() -> nn.Module:
        mx.random.seed(3)
        made = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(config))
        quantized(made)
        inject(made, select_targets(made).paths, rank=4, scale=2.0, seed=1)
        mx.random.seed(4)
        for name, value in adapter_parameters(made).items():
            made.load_weights([(name, 0.02 * mx.random.normal(value.shape))], strict=False)
        return made

    expected = gradients(model(), "none", kernels=False)
    for mode in CHECKPOINT_MODES:
        assert_equal(gradients(model(), mode), expected)


def compiled_peak_bytes(blocks: int, mode: str) -> int:
    """Return the peak of a compiled gradient over a quantized model whose weights outweigh its activations."""
    model = quantized(tiny_model(num_hidden_layers=blocks, hidden_size=256, intermediate_size=512))
    use_measured_matmul(model, "dense")
    inject(model, select_targets(model).paths, rank=4, scale=2.0)
    tape = apply_checkpointing(model, mode)
    gradient = nn.value_and_grad(model, lambda m, ids: m.model(ids).square().sum())
    step = mx.compile(lambda ids: gradient(model, ids), inputs=[model.state])
    ids = token_arrays(batch(1, 16, seed=0))["inputs"]
    mx.eval(model.parameters())
    with training_kernels(model, *([tape.attend] if tape else [])):
        return peak_bytes(step, ids, waits=False)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["block", "selective"])
def test_a_checkpointed_quantized_block_keeps_no_dense_weight(mode):
    # Compiling merged the second pass's dequantization with the first's, and every block's weights were kept.
    dense_bytes = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    growth = (compiled_peak_bytes(12, mode) - compiled_peak_bytes(4, mode)) / 8
    assert growth < 0.2 * dense_bytes
