"""The cut between body and head in families with names, factors and caps of their own: against the model's own logits.

Loss token by token and the gradients of all factors, in float32, at odd shapes; a wrong head is caught.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures.build import tiny_architecture, tiny_config
from mlx.utils import tree_flatten

from mlx_lora.adapters.inject import inject, select_targets
from mlx_lora.kernels.quantized_matmul import use_measured_matmul
from mlx_lora.losses.agree import check_arrays, choose_loss, disagreement, probe
from mlx_lora.losses.cross_entropy import PLAIN, TILES, Arrays
from mlx_lora.losses.fused import head_loss
from mlx_lora.models.folder import complete_module
from mlx_lora.models.head import QUANTIZED_HEADS, Head, find_head
from mlx_lora.utils import device

TOLERANCE = 1e-4
TOKENS = 37
TILE_BYTES = 4 * 5 * 77  # several tiles, none of them even
OWN, TIED = False, True
FAMILIES = [
    ("afm7", TIED), ("bailing_moe", TIED), ("dbrx", OWN), ("exaone", OWN), ("exaone", TIED), ("falcon_h1", OWN),
    ("falcon_h1", TIED), ("gemma3n", TIED), ("gpt2", TIED), ("gpt_bigcode", OWN), ("gpt_bigcode", TIED),
    ("gpt_neox", OWN), ("internlm2", OWN), ("internlm2", TIED), ("lille-130m", TIED), ("llama4_text", OWN),
    ("llama4_text", TIED), ("mamba", OWN), ("mamba", TIED), ("mamba2", TIED), ("minicpm", OWN), ("minicpm", TIED),
    ("minicpm3", OWN), ("muse_glimmer", OWN), ("muse_glimmer", TIED), ("nanochat", OWN), ("nemotron_h", OWN),
    ("openelm", TIED), ("qwen", OWN), ("recurrent_gemma", OWN), ("recurrent_gemma", TIED), ("rwkv7", TIED),
    ("spark2_5", TIED),
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("uncompiled")
# The settings without which a family's logits would be others: each must be read, and missing it must be seen.
SETTINGS = [
    ("falcon_h1", TIED, "lm_head_multiplier"), ("gemma3n", TIED, "final_logit_softcapping"),
    ("minicpm", OWN, "dim_model_base"), ("minicpm3", OWN, "dim_model_base"), ("muse_glimmer", TIED, "output_multiplier"),
    ("nanochat", OWN, "model_type"), ("recurrent_gemma", TIED, "logits_soft_cap"),
]  # fmt: skip


def adapted(name: str, tied: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Return a tiny model with factors on all its layers, none of them zero, and its config."""
    model = tiny_architecture(name, tied)
    complete_module(model)
    model.freeze()
    inject(model, select_targets(model).paths, 4, 2.0)
    mx.random.seed(5)
    factors = tree_flatten(model.trainable_parameters())
    model.load_weights([(key, 0.05 * mx.random.normal(value.shape)) for key, value in factors], strict=False)
    return model, tiny_config(name, tied)


def odd_batch(vocabulary: int) -> Arrays:
    """A row of which every third position is not trained."""
    whole = check_arrays(vocabulary, TOKENS)
    positions = mx.array([place for place in range(TOKENS) if place % 3])
    return whole | {"positions": positions, "weights": mx.ones(positions.shape)}


def losses(model: nn.Module, tokens, batch: Arrays):
    return probe(model, lambda model: tokens(model, batch))


def apart(found: dict[str, mx.array], expected: dict[str, mx.array]) -> float:
    """Return the norm of the difference of two sets of gradients over the norm of the expected one."""
    assert found.keys() == expected.keys()
    squares = [(mx.square(found[key] - value).sum(), mx.square(value).sum()) for key, value in expected.items()]
    return mx.sqrt(sum(one for one, _ in squares) / sum(other for _, other in squares)).item()


@pytest.mark.parametrize(("name", "tied"), FAMILIES)
def test_a_familys_head_gives_its_own_losses_and_gradients(name, tied):
    model, config = adapted(name, tied)
    head = find_head(model, config)
    assert isinstance(head, Head), head
    kind = type(head.layer)
    batch = odd_batch(head.vocabulary)
    own = losses(model, PLAIN.tokens, batch)
    if name == "rwkv7" and device.on_gpu():
        pytest.skip("mlx-lm's own kernel has no gradient on a GPU that ours could be compared with")
    assert own.gradients
    assert len(own.losses) == TOKENS - TOKENS // 3 - 1
    cut = losses(model, head_loss(head, TILES, TILE_BYTES).tokens, batch)
    assert mx.abs(cut.losses - own.losses).max().item() < TOLERANCE
    assert apart(cut.gradients, own.gradients) < TOLERANCE
    assert type(head.layer) is kind
    # A head that is 5% off would be seen, by this test and by the check at a run's start.
    wrong = losses(model, head_loss(replace(head, scale=1.05 * head.scale), TILES, TILE_BYTES).tokens, batch)
    assert mx.abs(wrong.losses - own.losses).max().item() > 10 * TOLERANCE
    assert apart(wrong.gradients, own.gradients) > 10 * TOLERANCE
    assert disagreement(model, own, cut) is None
    assert "differs" in disagreement(model, own, wrong)


@pytest.mark.parametrize(("name", "tied", "setting"), SETTINGS)
def test_a_family_whose_setting_is_not_known_takes_the_plain_loss(name, tied, setting):
    model, config = adapted(name, tied)
    assert choose_loss(model, config).description.startswith("fused")
    part = config if setting in config and "text_config" not in config else config["text_config"]
    del part[setting]
    assert choose_loss(model, config).description.startswith("plain cross-entropy (fused differs by")


@pytest.mark.parametrize(
    ("name", "tied"), [("gpt_neox", OWN), ("lille-130m", TIED), ("mamba", TIED), ("minicpm3", OWN)]
)
def test_so_does_a_packed_head(name, tied):
    model, config = adapted(name, tied)
    head = find_head(model, config).layer
    nn.quantize(model, 32, 4, class_predicate=lambda _, module: module is head)
    use_measured_matmul(model, "dense")
    found = find_head(model, config)
    assert isinstance(found.layer, QUANTIZED_HEADS)
    assert choose_loss(model, config).description.startswith("fused")
    batch = odd_batch(found.vocabulary)
    own = losses(model, PLAIN.tokens, batch)
    assert (
        mx.abs(losses(model, head_loss(found, TILES, TILE_BYTES).tokens, batch).losses - own.losses).max().item()
        < TOLERANCE
    )


def test_a_head_that_is_adapted_inside_its_body_takes_the_plain_loss():
    model = tiny_architecture("gpt_neox")
    model.freeze()
    inject(model, select_targets(model, "all-linear,embed_out").paths, 4, 2.0)
    assert choose_loss(model, tiny_config("gpt_neox")).description == "plain cross-entropy (the head is LoRALinear)"


def test_a_wrapper_with_a_head_of_its_own_is_cut_at_its_text_part():
    """Muse Spark's forward pass needs a GPU; its parts do not."""
    model = tiny_architecture("muse_spark")
    model.freeze()
    config = tiny_config("muse_spark")
    head = find_head(model, config)
    assert (head.body, head.layer) == (model.model.language_model, model.lm_head)
    text = config["text_config"]
    assert (head.scale, head.soft_cap) == (text["output_multiplier"], text["final_logit_softcapping"])
