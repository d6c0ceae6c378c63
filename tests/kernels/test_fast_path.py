"""The whole fast path against the plain one: fused loss, tiled attention, lean activation and checkpointing together.

Loss and every adapter gradient within 1e-5 in float32, at odd shapes, for every kind of head.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY, quantized, tiny_model
from mlx.utils import tree_flatten
from mlx_lm.models import cohere, gemma2, gemma3_text, granite
from tiers import by_default, named
from tiny_steps import batch, with_adapter

from mlx_lora.data.batch import Batch
from mlx_lora.kernels.attention import tiled_attention
from mlx_lora.kernels.quantized_matmul import use_measured_matmul
from mlx_lora.kernels.table import training_kernels
from mlx_lora.losses.cross_entropy import TILES, plain_loss, token_arrays
from mlx_lora.losses.fused import head_loss
from mlx_lora.models.head import find_head
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing

TOLERANCE = 1e-5
ODD_ROWS, ODD_WIDTH = 3, 131  # two tiles of attention, of unlike sizes
TILE_BYTES = 4 * 50 * 77  # several tiles of the loss, none of them even


def family(module, name: str, **changes) -> tuple[nn.Module, dict]:
    config = {**TINY, "model_type": name, **changes}
    mx.random.seed(0)
    return module.Model(module.ModelArgs.from_dict(config)), config


def measured(model: nn.Module) -> nn.Module:
    use_measured_matmul(model, "dense")
    return model


GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
MODELS = {
    "tied": lambda: (tiny_model(), TINY),
    "untied": lambda: (tiny_model(tie_word_embeddings=False), TINY),
    "4-bit, tied": lambda: (measured(quantized(tiny_model())), TINY),
    "8-bit, untied": lambda: (measured(quantized(tiny_model(tie_word_embeddings=False), 8)), TINY),
    "soft cap": lambda: family(gemma2, "gemma2", final_logit_softcapping=2.0, **GEMMA),
    "sliding window": lambda: family(gemma3_text, "gemma3_text", sliding_window=9, sliding_window_pattern=2, **GEMMA),
    "logit scale": lambda: family(cohere, "cohere", logit_scale=0.3, layer_norm_eps=1e-5),
    "several scales": lambda: family(
        granite,
        "granite",
        logits_scaling=4.0,
        attention_multiplier=0.2,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_bias=True,
        mlp_bias=True,
    ),
}


def half_padding() -> Batch:
    """The last row all padding, the second half empty: what an odd epoch's last batch looks like."""
    whole = batch(ODD_ROWS, ODD_WIDTH, seed=3)
    mask = whole.mask.copy()
    mask[-1], mask[:, 70:] = False, False
    return Batch.of(whole.inputs, whole.targets, mask, int(mask.sum()), slots=whole.mask.size)


BATCHES = {
    "half trained": lambda: batch(ODD_ROWS, ODD_WIDTH, seed=1),
    "all trained": lambda: batch(ODD_ROWS, ODD_WIDTH, seed=2, share=2.0),
    "padding": half_padding,
}


def made(name: str) -> tuple[nn.Module, dict]:
    model, config = MODELS[name]()
    mx.random.seed(5)
    return with_adapter(model), config


def plain(name: str, which: Batch) -> tuple[float, dict[str, mx.array]]:
    model, _ = made(name)
    (total, _), grads = nn.value_and_grad(model, plain_loss)(model, token_arrays(which))
    return total.item(), dict(tree_flatten(grads))


def fast(name: str, which: Batch, mode: str = "none", scale: float = 1.0) -> tuple[float, dict[str, mx.array]]:
    model, config = made(name)
    tape = apply_checkpointing(model, mode)
    head = find_head(model, config)
    head = head if scale == 1.0 else type(head)(head.body, head.layer, head.scale * scale, head.soft_cap)
    loss = head_loss(head, TILES, TILE_BYTES).train
    with training_kernels(model, tape.attend if tape else tiled_attention):
        (total, _), grads = nn.value_and_grad(model, loss)(model, token_arrays(which))
    return total.item(), dict(tree_flatten(grads))


def difference(got: tuple[float, dict], expected: tuple[float, dict]) -> float:
    """Return the largest relative difference: of the loss, and of each gradient array by its norm."""
    assert got[1].keys() == expected[1].keys()
    apart = [abs(got[0] - expected[0]) / abs(expected[0])]
    for name, value in expected[1].items():
        one, other = np.array(got[1][name], np.float64), np.array(value, np.float64)
        assert np.linalg.norm(other) > 0, name
        apart.append(np.linalg.norm(one - other) / np.linalg.norm(other))
    return max(apart)


@pytest.mark.parametrize("which", named(BATCHES, "half trained"))
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_equal_the_plain_paths(name, which):
    expected = plain(name, which())
    assert difference(fast(name, which()), expected) < TOLERANCE
    assert difference(fast(name, which(), scale=1.001), expected) > 10 * TOLERANCE  # of a slightly wrong head


@pytest.mark.parametrize("mode", by_default(["selective", "block", "2"], "selective", "block"))
@pytest.mark.parametrize("name", ["tied", "4-bit, tied", "soft cap"])
def test_so_do_checkpointed_ones(name, mode):
    which = BATCHES["half trained"]()
    assert difference(fast(name, which, mode), plain(name, which)) < TOLERANCE
