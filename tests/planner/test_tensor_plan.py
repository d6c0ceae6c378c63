"""Which way to divide a run is predicted to be the fastest that fits."""

from __future__ import annotations

import json
from dataclasses import replace

from run_cli import run

from mlx_lora.planner.several_macs import (
    Link,
    Mac,
    Split,
    best,
    cut_config,
    split_by_rows,
    split_by_tensor,
    sums_of_step,
)
from mlx_lora.planner.shapes import Block, KernelTerms, Layer, ModelShape, RunShape
from mlx_lora.planner.speed import find_chip, listed_ceilings


def shape_of(parts: int) -> ModelShape:
    """Return an 8B model's shape, or that of one of its parts."""
    attention = [
        Layer("self_attn", "q_proj", 4096, 4096 // parts, rank=16),
        Layer("self_attn", "o_proj", 4096 // parts, 4096, rank=16),
    ]
    mlp = [
        Layer("mlp", "up_proj", 4096, 14336 // parts, rank=16),
        Layer("mlp", "down_proj", 14336 // parts, 4096, rank=16),
    ]
    block = Block((*attention, *mlp), (4096, 4096), 32 // parts, 8 // parts, 128)
    return ModelShape("llama", 4096, 128256, (block,) * 32, base_bytes=16 * 10**9 // parts, trained=4 * 10**7)


def macs(memory_gb: int) -> list[Mac]:
    chip = find_chip("M4 Pro")
    return [Mac(replace(chip.machine(memory_gb), kernels=KernelTerms()), listed_ceilings(chip))] * 2


def test_messages_of_a_step():
    shape = shape_of(2)
    assert sums_of_step(shape, "selective") == 4 * 32 + 1
    assert sums_of_step(replace(shape, plain_loss=True), "selective") == 4 * 32
    assert sums_of_step(shape, "block") == 5 * 32 + 1
    assert sums_of_step(replace(shape, first_trained=30), "none") == 2 * 32 + 2 * 2 + 1


def test_the_loss_is_divided():
    batch, link = RunShape(8, 256, checkpointing="block"), Link(1e10, 5e-6)
    shape = replace(shape_of(2), vocabulary=10**6)
    whole, half = (split_by_tensor(replace(shape, loss_ranks=n), batch, macs(48), link, 2) for n in (1, 2))
    assert half.computing_s < 0.8 * whole.computing_s
    assert half.most_needed_bytes <= whole.most_needed_bytes


def test_the_link_and_the_memory_decide():
    batch, fast, slow = RunShape(8, 256, checkpointing="block"), Link(1e10, 5e-6), Link(1e8, 1e-3)
    for link in (fast, slow):
        splits = [
            split_by_rows(shape_of(1), batch, macs(48), link),
            split_by_tensor(shape_of(2), batch, macs(48), link, 2),
        ]
        assert best(splits).name == "data"
    rows, layers = (
        split_by_rows(shape_of(1), batch, macs(16), fast),
        split_by_tensor(shape_of(2), batch, macs(16), fast, 2),
    )
    assert "does not fit (needs " in rows.verdict
    assert best([rows, layers]).name == "tensor"
    assert split_by_tensor(shape_of(2), batch, macs(16), slow, 2).tokens_per_s < layers.tokens_per_s / 2
    assert best([Split("tensor", problem="no"), rows]) is rows


def test_the_heads_of_a_part():
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert cut_config(config, 2) == {**config, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def test_the_command_compares_the_ways(tiny_folder):
    asked = ("plan", "--model", tiny_folder, "--macs", "M4 Pro:48, M2 Max:32")
    found = json.loads(run(*asked, "--json").out)["splits"]
    assert [one["name"] for one in found] == ["data with a shared base", "data with a whole base", "tensor"]
    assert all(one["fits"] for one in found)
    assert sum(one["best"] for one in found) == 1
    three = json.loads(run(*asked[:-1], "M4:16,M4:16,M4:16", "--json").out)["splits"]
    assert "which cannot be divided by 3" in three[-1]["verdict"]
    assert "name the Macs that divide the layers" in run(*asked[:3], "--parallel", "tensor").err
