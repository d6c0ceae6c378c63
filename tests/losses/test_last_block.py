"""The last block at trained positions only: the same loss and gradients as the whole block, or the whole block."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import run_cli
from architectures.build import tiny_architecture, tiny_config
from architectures.configs import ways
from bound import bind
from comparing import by_dtype
from conftest import TINY, tiny_model
from mlx.utils import tree_flatten
from tiny_steps import CHECKPOINT_MODES, adapted, batch

from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.choose import assumed, training_kernels
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.cross_entropy import Arrays, token_arrays
from mlx_lora.models import head as heads
from mlx_lora.models import head as last_block
from mlx_lora.models.head import put_score_head
from mlx_lora.objectives.ratings import score_loss
from mlx_lora.objectives.table import objective_of
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.step import compiled_over, differentiation

SEVERAL = ("llama", "phi3", "gemma2", "gemma3_text", "olmo2", "cohere2", "gpt_neox", "qwen3_moe", "gpt_oss")
OTHERS = sorted({*last_block.DENSE, *last_block.EXPERTS, *last_block.HYBRID} - {*SEVERAL})
NOT_PART = "nothing is left out, to compare"


def moved(model: nn.Module) -> nn.Module:
    """Give a model an adapter on all linear layers, whose B is not zero."""
    adapt_model(model, AdapterSettings(rank=4), seed=0)
    mx.random.seed(1)
    factors = {name: value for name, value in adapter_parameters(model).items() if name.endswith("lora_b")}
    model.load_weights([(name, 0.05 * mx.random.normal(value.shape)) for name, value in factors.items()], strict=False)
    return model


def some_trained(rows: int = 3, width: int = 13, slots: int = 16) -> Arrays:
    """Return a batch of which 12 positions are trained, in slots that are partly padding."""
    return token_arrays(batch(rows, width, seed=3, share=0.3).take(np.arange(rows), slots))


def assert_equal(found, expected, bar: float = 2e-6) -> None:
    """Compare (loss, gradients): the loss, and the gradient of every parameter by its norm."""
    (loss, grads), (own_loss, own_grads) = ((one[0], dict(tree_flatten(one[1]))) for one in (found, expected))
    assert loss == pytest.approx(own_loss, rel=bar)
    assert grads.keys() == own_grads.keys() != set()
    norms = {name: mx.linalg.norm(value.reshape(-1)).item() for name, value in own_grads.items()}
    for name, value in own_grads.items():
        apart = mx.linalg.norm((grads[name] - value).reshape(-1)).item()
        # A gradient that is nearly zero is made of rounding errors: it is compared with the largest.
        assert apart <= bar * max(norms[name], 1e-3 * max(norms.values())), name


def loss_and_gradient(model: nn.Module, loss, arrays, mode: str = "none", compiled: bool = False):
    tape = apply_checkpointing(model, mode)
    own = tape.attend if tape else attend
    function = differentiation(model, loss.train, lambda model: training_kernels(model, own, assumed))
    loss_sum, _, _, grads = (compiled_over(model, function) if compiled else function)(arrays)
    mx.eval(loss_sum, grads)
    return loss_sum.item(), grads


@pytest.mark.parametrize("name", [*SEVERAL, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_loss_and_gradients_are_those_of_the_whole_block(name, uncompiled):
    tied = next(iter(ways(name)))
    model, config = moved(tiny_architecture(name, tied)), tiny_config(name, tied)
    model.train()
    part, whole = (choose_loss(model, config, "ours", False, why) for why in ("", NOT_PART))
    assert part.part_of_last
    assert "last block where trained" in part.description
    assert whole.description.endswith(f"whole last block ({NOT_PART})")
    arrays = some_trained()
    expected = loss_and_gradient(model, whole, arrays)
    assert_equal(loss_and_gradient(model, part, arrays), expected)
    elsewhere = arrays | {"positions": mx.where(arrays["weights"] > 0, (arrays["positions"] + 1) % 39, 0)}
    assert loss_and_gradient(model, part, elsewhere)[0] != pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["none", *CHECKPOINT_MODES])
def test_checkpointed_and_compiled(mode, compiled):
    model = adapted()
    model.train()
    part, whole = (choose_loss(model, TINY, "ours", False, why) for why in ("", NOT_PART))
    arrays = some_trained(2, 70, 48)
    found = loss_and_gradient(model, part, arrays, mode, compiled)
    assert_equal(found, loss_and_gradient(model, whole, arrays))


@pytest.mark.parametrize("mode", CHECKPOINT_MODES)
def test_a_replay_draws_the_same_dropout(mode):
    found = []
    for one in ("none", mode):
        model = tiny_model()
        adapt_model(model, AdapterSettings(rank=4, dropout=0.5), seed=0)
        moved_b = {n: v for n, v in adapter_parameters(model).items() if n.endswith("lora_b")}
        model.load_weights([(n, mx.full(v.shape, 0.01)) for n, v in moved_b.items()], strict=False)
        model.train()
        part = choose_loss(model, TINY, "ours")
        mx.random.seed(7)
        found.append(loss_and_gradient(model, part, some_trained(), one))
    assert_equal(found[1], found[0])


def positions_of(model: nn.Module, loss, arrays) -> tuple[int, int]:
    """Return how many positions the first and the last block's MLP computes."""
    seen = []
    for block in (model.layers[0], model.layers[-1]):
        kind = type(block.mlp)

        def call(self, x, kind=kind):
            seen.append(x.size // x.shape[-1])
            return kind.__call__(self, x)

        block.mlp.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    loss.tokens(model, arrays)
    return tuple(seen)


def test_other_positions_are_not_computed():
    model = adapted()
    part = choose_loss(model, TINY, "ours")
    assert positions_of(model, part, some_trained(3, 13, 16)) == (39, 16)


def test_nearly_all_positions_are_computed_as_one_block():
    model = adapted()
    part = choose_loss(model, TINY, "ours")
    assert positions_of(model, part, some_trained(3, 13, 36)) == (39, 39)


def test_scores_of_last_tokens(monkeypatch):
    model = adapted()
    put_score_head(model, TINY)
    model.train()
    arrays = some_trained()
    part, whole = (score_loss(model, one) for one in (True, False))
    assert part.description == "scores of last tokens; last block where scored"
    assert_equal(loss_and_gradient(model, part, arrays), loss_and_gradient(model, whole, arrays))
    objective = objective_of(ObjectiveSettings("reward"))
    for why, taken in (("", True), (NOT_PART, False)):
        assert bind(objective, choose_loss(model, TINY, "ours", False, why), model).loss.part_of_last in (
            taken,
            False,
        )


def test_a_block_that_is_not_known_is_computed_whole(uncompiled):
    model = moved(tiny_architecture("gemma4_text", True))
    loss = choose_loss(model, tiny_config("gemma4_text", True), "ours")
    assert not loss.part_of_last
    assert loss.description.endswith("; whole last block (not known to allow less)")


@pytest.mark.parametrize("name", ["rwkv7", "nanbeige"])
def test_a_block_that_is_wrong_is_seen(name, uncompiled, monkeypatch):
    """RWKV shifts positions outside of its attention, and Nanbeige runs its blocks twice."""
    monkeypatch.setattr(last_block, "ARCHITECTURES", frozenset({f"mlx_lm.models.{name}"}))
    tied = next(iter(ways(name)))
    model, config = moved(tiny_architecture(name, tied)), tiny_config(name, tied)
    head, why = heads.with_last_block(heads.find_head(model, config), model)
    assert (head.last is None, why) == (False, "")
    loss = choose_loss(model, config, "ours")
    assert loss.description.startswith("fused")
    assert "; whole last block (less differs by " in loss.description


def test_the_model_is_left_as_it_was():
    model = adapted()
    part = choose_loss(model, TINY, "ours")
    before = [(type(module), name) for name, module in model.named_modules()]
    with left_unchanged(model):
        loss_and_gradient(model, part, some_trained())
    assert [(type(module), name) for name, module in model.named_modules()] == before


def command(model, data, folder, *more) -> tuple:
    return (
        "train", "--model", model, "--data", data, "--adapter-path", folder, "--iters", 4, "--batch-tokens", 384, "--rank", 4,
        "--learning-rate", 5e-3, "--steps-per-report", 1, "--steps-per-eval", 4, "--val-batches", 1, "--kernels", "ours",
        "--verbose", *more,
    )  # fmt: skip


def losses(folder) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record.get("loss") is not None]


def test_a_run_equals_one_that_computes_the_whole_block(tiny_folder, chats, tmp_path, monkeypatch):
    part = run_cli.run(*command(tiny_folder, chats, tmp_path / "part", "--save-every", 0))
    assert "; last block where trained" in part.err
    monkeypatch.setattr("mlx_lora.losses.agree.with_last_block", lambda head, model: (head, NOT_PART))
    whole = run_cli.run(*command(tiny_folder, chats, tmp_path / "whole", "--save-every", 0))
    assert (part.code, whole.code) == (0, 0), part.err + whole.err
    assert f"whole last block ({NOT_PART})" in whole.err
    assert losses(tmp_path / "part") == pytest.approx(losses(tmp_path / "whole"), rel=by_dtype(1e-5, 5e-3))


@pytest.mark.parametrize(
    "flags", [pytest.param(("--kernels", "mlx"), marks=pytest.mark.slow), ("--objective", "reward")]
)
def test_the_header_says_what_the_last_block_computes(flags, tiny_folder, chats, tmp_path):
    pairs = [
        {"prompt": f"Say {n:02}, please.", "chosen": f"It is {n:02}.", "rejected": f"No {n:02}!"} for n in range(12)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = tmp_path / "pairs.jsonl" if "reward" in flags else chats
    ran = run_cli.run(*command(tiny_folder, data, tmp_path / "a", "--iters", 1, "--save-every", 0, *flags))
    assert ran.code == 0, ran.err
    assert ("last block" in ran.err) == ("reward" in flags)
    assert ("scores of last tokens; last block where scored" in ran.err) == ("reward" in flags)
