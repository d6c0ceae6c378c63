"""Embedding and head in slices of the vocabulary, and who keeps which part of a unit."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma2, llama, qwen2
from safetensors.numpy import load_file

from mlx_lora.config.settings import ModelSettings
from mlx_lora.losses.fused import fused_token_losses, row_token_losses
from mlx_lora.models.folder import read_rows
from mlx_lora.models.head import Head, find_head
from mlx_lora.models.load import load_base
from mlx_lora.parallel.ranks import ALONE
from mlx_lora.parallel.sharded_base import (
    Messages,
    SharedTable,
    Unit,
    share_base,
    slice_bytes,
    slices_of,
    tables_of,
    units_of,
)

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "vocab_size": 2003,
}  # fmt: skip
FAMILIES = {
    "tied": (llama, {"model_type": "llama", "tie_word_embeddings": True}),
    "untied": (qwen2, {"model_type": "qwen2", "tie_word_embeddings": False}),
    "capped": (gemma2, {"model_type": "gemma2", "head_dim": 32, "final_logit_softcapping": 5.0}),
}
LAYOUTS = {"float": {}, "4-bit": {"group_size": 32, "bits": 4}, "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}


def pair(family: str, layout: str) -> tuple[nn.Module, nn.Module, dict]:
    """Return a model, the same with a base in slices, and their config."""
    module, own = FAMILIES[family]
    config, models = {**SMALL, **own}, []
    for _ in range(2):
        mx.random.seed(0)
        model = module.Model(module.ModelArgs.from_dict(config))
        if LAYOUTS[layout]:
            nn.quantize(model, **LAYOUTS[layout])
        model.freeze()
        models.append(model)
    share_base(models[1], ALONE)
    return *models, config


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_slices_is_the_model(family, layout):
    whole, sliced, config = pair(family, layout)
    tables = [module for module in sliced.modules() if isinstance(module, SharedTable)]
    assert len(tables) == (2 if family == "untied" else 1)
    assert all(len(table.parts()) > 1 for table in tables)
    assert not any(mx.isfinite(table.weight).any() for table in tables if layout == "float")
    ids = mx.random.randint(0, 2003, (2, 17), key=mx.random.key(1))
    ids[0, :2] = mx.array([0, 2002])
    assert mx.allclose(whole(ids), sliced(ids), rtol=1e-5, atol=1e-5)
    heads = [find_head(model, config) for model in (whole, sliced)]
    targets, weights = ids.reshape(-1)[::-1], mx.ones((34,))

    def losses(head: Head):
        hidden = mx.random.normal((34, 64), key=mx.random.key(2))
        return lambda h=hidden: fused_token_losses(head, h, targets, weights, tile_bytes=1 << 14), hidden

    for function, other in zip(*((losses(head)) for head in heads), strict=True):
        if callable(function):
            assert mx.allclose(function(), other(), rtol=1e-5)
            continue
        slopes = [mx.grad(lambda h, head=head: losses(head)[0](h).sum())(function) for head in heads]
        assert mx.allclose(*slopes, rtol=1e-4, atol=1e-6)
        plain = [mx.grad(lambda h, head=head: mx.logsumexp(head.logits(h), axis=-1).sum())(function) for head in heads]
        assert mx.allclose(*plain, rtol=1e-4, atol=1e-6)
    measured = [fused_token_losses(head, losses(head)[1], targets, weights, 1 << 14, gradient=False) for head in heads]
    assert mx.allclose(*measured, rtol=1e-5)


def test_code_that_reads_past_the_slices_is_noticed():
    _, sliced, config = pair("tied", "float")
    head = find_head(sliced, config)
    assert not isinstance(head, str)
    read = row_token_losses(head, mx.ones((4, 64)), mx.arange(4), mx.ones((4,)), tile_bytes=1 << 20)
    assert mx.isnan(read).all()


def test_slices_are_no_larger_than_a_block():
    model = llama.Model(llama.ModelArgs.from_dict({**SMALL, **FAMILIES["tied"][1]}))
    model.freeze()
    units, [table] = units_of(model), tables_of(model)
    assert max(units.tables) <= max(units.blocks) == slice_bytes(model)
    assert sum(units.tables) == table.weight.nbytes
    slices = slices_of(table, slice_bytes(model))
    assert (slices[0].start, slices[-1].stop, len(slices)) == (0, 2003, len(units.tables))
    assert units.head_rows == max(one.stop - one.start for one in slices)
    shared = share_base(model, ALONE)
    assert sum(unit.bytes for unit in shared) == pytest.approx(units.bytes, abs=16 * 20 * len(shared))


class Several:
    """One of several ranks without processes: it knows all ranks' units."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.units = rank, size, []

    beside = ALONE.beside

    def gathered(self, own):
        return mx.stack([unit.even for unit in self.units])

    def put_together(self, own, begin, size):
        return mx.concatenate([unit.rest.view(mx.uint32) for unit in self.units if unit.rest.size])


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.75, 0.25), (0.6, 0.4), (0.5, 0.2, 0.2, 0.1), (1.0, 0.0)])
def test_every_rank_keeps_its_share_and_no_more(shares):
    ranks = [Several(rank, len(shares)) for rank in range(len(shares))]
    messages = [Messages(rank, shares) for rank in ranks]
    whole, held = 0, [0] * len(shares)
    for number in range(20):
        lengths = (400 + number, 100, 7, 36)
        arrays = [(f"a{n}", mx.random.normal((n, 9)).astype(mx.float16 if n % 2 else mx.float32)) for n in lengths]
        mx.eval([array for _, array in arrays])
        units = [Unit(arrays, of) for of in messages]
        for rank in ranks:
            rank.units = units
        for of, unit in zip(ranks, units, strict=True):
            assert unit.even.nbytes + unit.rest.nbytes == unit.parts[of.rank]
            for name, array in unit.gathered([]):
                assert mx.array_equal(array, dict(arrays)[name]), name
            held[of.rank] += unit.parts[of.rank]
        whole += sum(array.nbytes for _, array in arrays)
    largest = whole / 20
    assert all(abs(have - share * whole) < largest for have, share in zip(held, shares, strict=True))


def test_only_the_rows_that_a_rank_keeps_are_read(tiny_folder):
    base = load_base(ModelSettings(str(tiny_folder)), read=False)
    path = "model.embed_tokens.weight"
    stored = {name: array for file in tiny_folder.glob("model*.safetensors") for name, array in load_file(file).items()}
    assert base.stored[path].shape == stored[path].shape
    lazy = base.model.model.embed_tokens.weight
    rows = read_rows(path, lazy, slice(3, 9), base.stored)
    assert mx.array_equal(rows, mx.array(stored[path][3:9]).astype(lazy.dtype))
    assert mx.array_equal(rows, read_rows(path, lazy, slice(3, 9), {}))  # of a tensor that is not as it is stored
    assert type(base.model).__name__ == "Model"
    assert not load_base(ModelSettings(str(tiny_folder))).stored
