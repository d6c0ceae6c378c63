"""The planner's arithmetic: parts sum up, more work takes no less, every Mac of the table has a sane answer, and what is advised fits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config
from conftest import quantized, tiny_model

from mlx_lora.adapters.inject import adapt_layers
from mlx_lora.adapters.qat import begin_qat
from mlx_lora.config.load import train_settings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.models.meta import model_shape, outline_for
from mlx_lora.parallel.strategy import Strategy
from mlx_lora.planner.fit import DataLimits, advice, fit, run_of
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.memory import Block, KernelTerms, Layer, Machine, ModelShape, RunShape, plan_memory
from mlx_lora.planner.speed import (
    CHIPS,
    LAUNCHES_PER_BLOCK,
    Ceilings,
    Reading,
    count_step,
    find_chip,
    known_chip,
    listed_ceilings,
    step_seconds,
)
from mlx_lora.trainer.fit import batches_by_tokens, fit_settings, outlined_shape, training_plan, with_block_memory
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import GIB

CPU = Machine("a CPU", "cpu", 24 * GIB, 22 * GIB, 4)
M2 = find_chip("M2").machine(16)


def llama(blocks: int = 32, width: int = 4096, feed: int = 14336, packed: bool = True, rank: int = 16) -> ModelShape:
    """The shape of Llama 3 8B, or of another model of its family, in 4 bits or 16."""
    kv = width // 4
    attention = [("q_proj", width, width), ("k_proj", width, kv), ("v_proj", width, kv), ("o_proj", width, width)]
    mlp = [("gate_proj", width, feed), ("up_proj", width, feed), ("down_proj", feed, width)]
    layers = [
        Layer(parent, name, i, o, packed=packed, rank=rank)
        for parent, group in (("self_attn", attention), ("mlp", mlp))
        for name, i, o in group
    ]
    block = Block(tuple(layers), (width, width), width // 128, width // 512, 128)
    numbers = sum(layer.numbers for layer in layers) * blocks + 2 * 128256 * width
    trained = rank * sum(layer.inputs + layer.outputs for layer in layers) * blocks
    stored = numbers * 9 // 16 if packed else 2 * numbers  # 4 bits, and a scale and a bias of 16 for each 64
    return ModelShape("llama", width, 128256, (block,) * blocks, stored, trained, 14 * blocks)


SHAPE = llama()
RUN = RunShape(1, 2048)


@pytest.mark.parametrize("mode", ["none", "selective", "block", "3"])
@pytest.mark.parametrize("machine", [CPU, M2])
def test_parts_sum_to_the_peak_which_is_the_largest_phase(machine, mode):
    plan = plan_memory(SHAPE, replace(RUN, checkpointing=mode), machine)
    assert plan.peak_bytes == sum(plan.parts.values()) == pytest.approx(max(plan.phases.values()), abs=len(plan.parts))
    assert plan.parts["base"] == SHAPE.base_bytes
    assert plan.needed_bytes == plan.peak_bytes + plan.cache_bytes
    assert plan.fits == (plan.needed_bytes <= machine.working_set_bytes)


def peak(model: ModelShape = SHAPE, machine: Machine = M2, **changes: object) -> int:
    return plan_memory(model, replace(RUN, **changes), machine).peak_bytes


@pytest.mark.parametrize("machine", [CPU, M2])
@pytest.mark.parametrize("mode", ["none", "selective", "block"])
def test_longer_rows_and_more_of_them_take_more(machine, mode):
    widths = [peak(machine=machine, width=width, checkpointing=mode) for width in (512, 2048, 8192, 32768)]
    assert all(a < b for a, b in pairwise(widths))
    rows = [peak(machine=machine, rows=rows, checkpointing=mode) for rows in (1, 2, 4, 16)]
    assert all(a < b for a, b in pairwise(rows))


def test_each_thing_that_takes_memory_does():
    assert peak(checkpointing="block") < peak(checkpointing="selective") < peak()
    assert peak(checkpointing="block") < peak(checkpointing="4") < peak(checkpointing="16") < peak()
    assert peak(llama(packed=True)) < peak(llama(packed=False))
    assert peak(llama(rank=8)) < peak(llama(rank=128))
    assert peak(llama(2, 512, 1024), trained_positions=64) < peak(llama(2, 512, 1024), trained_positions=2048)
    assert peak(optimizer="sgd") < peak(optimizer="adamw")
    assert peak() < peak(dropout=True)
    assert peak(accumulates=True) - peak() == 4 * SHAPE.trained
    keeping = [replace(layer, keeps_product=True) for layer in SHAPE.blocks[0].layers]  # as DoRA's do
    assert peak() < peak(replace(SHAPE, blocks=(replace(SHAPE.blocks[0], layers=tuple(keeping)),) * 32))
    assert peak() < peak(replace(SHAPE, plain_loss=True))
    assert peak(replace(SHAPE, first_trained=24)) < peak()  # --num-layers 8: what lies below keeps nothing
    assert peak(machine=replace(M2, number_bytes=4)) > 1.3 * peak()
    silu = SHAPE.blocks[0]
    assert peak(replace(SHAPE, blocks=(replace(silu, gated="other"),) * 32)) > peak()
    assert peak(replace(SHAPE, blocks=(replace(silu, norms=(4096,) * 4),) * 32)) > peak()


def test_experts_count_by_how_many_a_position_goes_through():
    dense = SHAPE.blocks[0]

    def mixture(active: int) -> ModelShape:
        layers = tuple(
            replace(layer, experts=16, active=active) if layer.parent == "mlp" else layer for layer in dense.layers
        )
        return replace(SHAPE, blocks=(replace(dense, layers=layers),) * 32)

    assert peak(mixture(1)) < peak(mixture(2)) < peak(mixture(8))


def test_all_that_is_trained_may_be_what_decides():
    much = llama(2, 1024, 4096, rank=512)
    plan = plan_memory(much, RunShape(1, 64, checkpointing="block"), M2)
    assert plan.phase == "update"
    assert plan.parts["optimizer"] == 2 * plan.parts["adapter"] == 8 * much.trained
    # One flat array is updated at once, many arrays a few at a time.
    by_itself = plan_memory(replace(much, trained_arrays=448), RunShape(1, 64, optimizer="muon"), M2)
    assert by_itself.phases["update"] < plan.phases["update"]


def faked() -> list[Machine]:
    """Every Mac of the table, M1 with 8 GB to M3 Ultra with 512, by memory."""
    machines = [chip.machine(size) for chip in CHIPS for size in chip.memory_gib]
    return sorted(machines, key=lambda machine: machine.memory_bytes)


def test_more_memory_holds_no_less_on_every_mac():
    machines = faked()
    assert machines[0].name == "M1, 8 GB"
    assert machines[-1].name == "M3 Ultra, 512 GB"
    for model in (SHAPE, llama(packed=False), llama(16, 2048, 8192), llama(80, 8192, 28672)):
        for run in (RUN, RunShape(4, 2048, checkpointing="block"), RunShape(1, 16384)):
            plans = [plan_memory(model, run, machine) for machine in machines]
            assert all(a.fits <= b.fits for a, b in pairwise(plans))
            # The same run takes the same memory on each of them, but for the loss's tiles.
            assert max(p.peak_bytes for p in plans) < 1.02 * min(p.peak_bytes for p in plans)


def test_known_models_fit_where_they_are_known_to():
    block = RunShape(1, 2048, checkpointing="block")

    def fits(model: ModelShape, chip: str, memory_gb: int, run: RunShape = block) -> bool:
        return plan_memory(model, run, find_chip(chip).machine(memory_gb)).fits

    small, seventy = llama(16, 2048, 8192), llama(80, 8192, 28672)
    assert fits(small, "M1", 8)  # 1B in 4 bits
    assert fits(SHAPE, "M1", 16)  # 8B in 4 bits
    assert not fits(SHAPE, "M1", 8, RunShape(1, 2048))
    assert not fits(llama(packed=False), "M1", 16, block)  # 8B in 16 bits: the weights alone are larger
    assert fits(seventy, "M2 Ultra", 128)
    assert not fits(seventy, "M1 Pro", 32)
    assert fits(llama(80, 8192, 28672, packed=False), "M3 Ultra", 512)


def test_the_working_set_grows_with_memory_and_stays_below_it():
    sizes = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
    sets = [find_chip("M2").machine(size).working_set_bytes for size in sizes]
    assert all(a < b for a, b in pairwise(sets))
    assert all(0.6 < most / (size * GIB) < 0.8 for size, most in zip(sizes, sets, strict=True))


@pytest.mark.parametrize("name", ["M2 Pro", "m2 pro", "Apple M2 Pro", "M2Pro", "m2-pro"])
def test_chips_are_found_however_they_are_spelled(name):
    assert find_chip(name).name == "M2 Pro"
    assert known_chip(name) is find_chip(name)


def test_an_unknown_chip_names_those_that_are_known():
    with pytest.raises(InputError, match=r"did you mean M2 Pro.*M3 Ultra"):
        find_chip("M2 Por")
    assert known_chip("AMD EPYC") is None


def seconds(chip: str, run: RunShape = RUN, model: ModelShape = SHAPE) -> float:
    found = find_chip(chip)
    return step_seconds(model, run, found.machine(), listed_ceilings(found))[0]


def test_a_faster_chip_is_predicted_to_be_faster():
    for generation in ("M1", "M2", "M3"):
        times = [seconds(f"{generation}{kind}") for kind in ("", " Pro", " Max", " Ultra")]
        assert all(a > b for a, b in pairwise(times))
    assert seconds("M4") > seconds("M5")


def test_predicted_time_is_the_products_and_more():
    counts = count_step(SHAPE, RUN, M2)
    weights = sum(layer.numbers for block in SHAPE.blocks for layer in block.layers)
    assert counts["products"].flops == 4 * weights * 2048  # output and input gradient
    again = count_step(SHAPE, replace(RUN, checkpointing="block"), M2)
    assert again["products"].flops == 6 * weights * 2048
    part = count_step(replace(SHAPE, first_trained=24), RUN, M2)
    assert part["products"].flops == (2 + 2 * 8 / 32) * weights * 2048
    total, parts = step_seconds(SHAPE, RUN, M2, Ceilings(1e13, 1e11))
    assert total == pytest.approx(sum(parts.values()))
    assert total > counts["products"].flops / 1e13
    # A step too small to keep the device busy takes what the host needs to launch it.
    tiny, waits = step_seconds(SHAPE, RunShape(1, 2), M2, Ceilings(1e18, 1e18, launch_s=5e-6))
    assert tiny == pytest.approx(5e-6 * LAUNCHES_PER_BLOCK * 32)
    assert "waiting for launches" in waits


@pytest.mark.parametrize("machine", [CPU, M2])
def test_rounding_in_each_step_takes_time_and_one_more_product_of_the_batch(machine):
    def rounding_to(mode: str) -> ModelShape:
        layers = tuple(replace(layer, rounds_to=mode) for layer in SHAPE.blocks[0].layers)
        return replace(SHAPE, blocks=(replace(SHAPE.blocks[0], layers=layers),) * len(SHAPE.blocks))

    ceilings = Ceilings(1e13, 1e11)
    plain, parts = step_seconds(SHAPE, RUN, machine, ceilings)
    affine, fp4 = (count_step(rounding_to(mode), RUN, machine)["fake quantization"] for mode in ("affine", "mxfp4"))
    assert "fake quantization" not in parts
    assert step_seconds(rounding_to("affine"), RUN, machine, ceilings)[0] > plain
    weights = sum(layer.numbers for block in SHAPE.blocks for layer in block.layers)
    assert affine.flops - fp4.flops == pytest.approx(2 * weights * (2048 + 2 * 16))  # the gradient by the weight
    third = count_step(replace(rounding_to("affine"), rounded_share=0.3), RUN, machine)["fake quantization"]
    assert third.moved_bytes == pytest.approx(0.3 * affine.moved_bytes)
    again = count_step(rounding_to("affine"), replace(RUN, checkpointing="block"), machine)["fake quantization"]
    assert 1.3 < again.moved_bytes / affine.moved_bytes < 1.5  # the fused weights a third time


def test_a_blocks_graph_that_is_large_for_any_row_is_not_read_as_one_position_after_the_other():
    model, config = quantized(tiny_model()), {"vocab_size": 288}
    adapt_layers(model, {path: (4, 1.0) for path, _ in model.named_modules() if path.endswith("_proj")})
    begin_qat(model)
    shape = with_block_memory(model_shape(model, config), model, config)
    assert all(layer.rounds_to == "affine" for layer in shape.blocks[0].layers)
    short, long = (shape.blocks[0].memory.at(1, width, False) for width in (32, 256))
    assert long.nodes < 2 * short.nodes


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_the_memory_of_experts_that_are_rounded_in_each_step_is_known(name):
    model, config = quantized(tiny_architecture(name)), tiny_config(name)
    experts = [path for path, layer in model.named_modules() if type(layer).__name__ == "QuantizedSwitchLinear"]
    adapt_layers(model, dict.fromkeys(experts, (4, 1.0)))
    windows = []
    for begin in (lambda _: None, begin_qat):
        begin(model)
        shape = with_block_memory(model_shape(model, config), model, config)
        assert not shape.not_known
        windows.append(max(block.memory.at(1, 64, False).window for block in shape.blocks))
    assert windows[1] > windows[0]


def test_a_block_that_runs_a_position_at_a_time_is_still_found_if_it_is_rounded_in_each_step():
    model, config = quantized(tiny_architecture("rwkv7")), tiny_config("rwkv7")
    linear = [path for path, layer in model.named_modules() if isinstance(layer, nn.QuantizedLinear)]
    adapt_layers(model, {path: (4, 1.0) for path in linear if ".layers.0." in path})
    begin_qat(model)
    shape = with_block_memory(model_shape(model, config), model, config)
    nodes = [shape.blocks[0].memory.at(1, width, False).nodes for width in (32, 4096)]
    assert nodes[1] == pytest.approx(nodes[0] * 4096 / 32)  # extrapolated, not read


def test_the_check_takes_one_block_of_each_kind_and_slices_of_the_head():
    def check(shape: ModelShape) -> int:
        held = shape.base_bytes + 4 * shape.trained
        return plan_memory(shape, replace(RUN, checkpointing="block"), CPU).phases["check"] - held

    assert check(llama(64)) == pytest.approx(check(llama(8)), rel=1e-3)
    narrower = tuple(replace(layer, rank=8) for layer in SHAPE.blocks[0].layers)
    two_kinds = replace(SHAPE, blocks=(replace(SHAPE.blocks[0], layers=narrower), *SHAPE.blocks[1:]))
    assert check(two_kinds) > 1.05 * check(SHAPE)
    large = replace(llama(18, 640, 2048), vocabulary=262144, head_packed=True)  # as Gemma 3's smallest
    head, logits = 4 * 262144 * 640, 4 * 64 * 262144
    assert 2 * logits < check(large) < 2 * logits + head


def test_the_share_of_trained_positions_decides_how_wide_the_tiles_of_logits_are():
    def loss(share: float, packed: bool) -> int:
        shape = replace(llama(18, 640, 2048), vocabulary=262144, head_packed=packed, trained_share=share)
        return plan_memory(shape, replace(RUN, rows=4, width=64), CPU).phases["loss"]

    # A tile of fewer positions has more of the vocabulary, of which a quantized head becomes floats.
    assert loss(0.25, packed=True) > loss(1.0, packed=True)
    assert loss(0.25, packed=False) < loss(1.0, packed=False)
    assert peak(replace(SHAPE, trained_share=0.5)) == peak(trained_positions=1024)


def test_a_run_that_measures_losses_without_a_gradient_has_more_tiles_ahead_than_its_loss():
    """Where blocks keep little, the reference of dpo peaks higher than its step: measured 136.5 MB, and planned 127."""
    tiny = replace(llama(2, 64, 192), vocabulary=49152)
    run = replace(RUN, rows=10, width=98, trained_positions=616, steps=3)
    cpu = replace(CPU, compiles_from=200)
    alone, measured = (plan_memory(tiny, replace(run, measures=measures), cpu) for measures in (False, True))
    assert (alone.phase, measured.phase) == ("loss", "measure")
    assert measured.peak_bytes > alone.peak_bytes
    assert (
        measured.phases["measure"] - tiny.base_bytes > 8 * 616 * 6144 * 4
    )  # eight arrays of a tile's size were measured
    asked = [{"objective": "dpo", "val_batches": 0}, {"objective": "orpo", "val_batches": 0}, {"objective": "orpo"}]
    assert [run_of(train_settings(one), 4, 64, "none").measures for one in asked] == [True, False, True]


def test_the_trained_slots_of_a_plan_are_those_of_the_batches():
    settings = train_settings({"grad_checkpoint": "none", "objective": "kto"})
    # Five of these rows are trained, with as many slots as fit.
    limits = DataLimits(batches=lambda tokens: (1, [(10, 98, 616)]))
    few = replace(SHAPE, trained_share=0.1)
    found = fit(settings, few, CPU, 98, limits).memory.phases["loss"]
    assert found == plan_memory(few, run_of(settings, 5, 98, "none", 490), CPU).phases["loss"]
    parts = replace(settings, loop=replace(settings.loop, batch_parts=2))  # whose slots are not those of the batch
    assert fit(parts, few, CPU, 98, limits).memory.phases["loss"] < found


def test_the_check_counts_the_runs_own_loss_if_its_few_tiles_take_more_than_whole_logits():
    tiny = replace(llama(2, 64, 192), vocabulary=49152)
    of = [
        plan_memory(tiny, RUN, replace(CPU, kernels=KernelTerms(loss=name))).phases["check"]
        for name in ("tiles", "polynomial")
    ]
    assert of[1] > of[0]
    assert of[1] - tiny.base_bytes > 6 * 48 * 24576 * 4  # two tiles of 48 tokens, three arrays each


def test_a_run_of_few_steps_on_a_cpu_is_planned_as_not_compiled():
    cpu, loss = replace(CPU, compiles_from=200), replace(SHAPE, head_packed=True)
    short, long, unknown = (plan_memory(loss, replace(RUN, steps=steps), cpu).phases for steps in (3, 200, None))
    assert short["loss"] < long["loss"]  # more operations make a tile, so fewer tiles are prepared ahead
    assert short["update"] > long["update"]
    assert unknown == {name: pytest.approx((short[name] + long[name]) / 2) for name in short}
    # Updated one by one, many arrays still have all their divided gradients beside the summed ones.
    many = llama(2, 1024, 4096, rank=512)
    many = replace(many, trained_arrays=2000, trained_alone=many.trained)
    one_by_one = [plan_memory(many, replace(RUN, steps=steps), cpu).phases["update"] for steps in (3, 200)]
    assert one_by_one[0] - one_by_one[1] > 0.95 * 4 * many.trained
    on_gpu = [plan_memory(loss, replace(RUN, steps=steps), M2).phases for steps in (3, 200, None)]
    assert on_gpu[0] == on_gpu[1] == on_gpu[2]


def test_a_full_batch_of_short_rows_may_take_more_than_the_longest_row():
    settings = train_settings({"grad_checkpoint": "none", "batch_tokens": 835})
    longest = fit(settings, SHAPE, M2, 466)
    shapes = {835: [(1, 466, 466), (5, 152, 760), (7, 100, 700)]}
    found = fit(settings, SHAPE, M2, 466, DataLimits(batches=lambda tokens: (0, shapes[tokens])))
    assert (longest.rows, longest.width) == (1, 466)
    assert (found.rows, found.width) == (5, 152)
    assert found.memory.peak_bytes > longest.memory.peak_bytes
    # With pairs, a shape has the rows of both answers.
    pairs = train_settings({"grad_checkpoint": "none", "batch_tokens": 835, "objective": "dpo"})
    assert fit(pairs, SHAPE, M2, 466, DataLimits(batches=lambda tokens: (1, [(4, 200, 800)]))).rows == 4


def test_the_shapes_are_those_of_the_run():
    rows = EncodedSet.from_rows([(np.arange(n), np.arange(n) > n // 2) for n in (467, 153, 150, 140, 120, 101)])
    settings = train_settings({"batch_tokens": 835, "epochs": 2.0})
    _, found = batches_by_tokens(settings, rows, None)(835)
    plan = training_plan(settings.loop, rows, 2.0)
    batches = [plan.batch(0, n) for n in range(len(plan))]
    assert sorted(found) == sorted({(*batch.inputs.shape, len(batch.positions)) for batch in batches})


@pytest.mark.parametrize("bits", [None, 4], ids=["float", "4-bit"])
def test_a_quantized_head_that_is_adapted_counts_as_quantized(bits):
    """Its logits are computed by the model itself, from a copy of the head as floats."""
    model = tiny_model() if bits is None else quantized(tiny_model(), bits)
    model.freeze()
    adapt_layers(model, {"model.embed_tokens": (4, 1.0)})
    shape = model_shape(model, {"vocab_size": 288})
    assert shape.plain_loss
    assert shape.head_packed == (bits is not None)
    logits = [plan_memory(replace(shape, head_packed=packed), RUN, CPU).phases["loss"] for packed in (False, True)]
    assert logits[1] > logits[0]


# What a run chooses by its memory


class BesideAnother(Strategy):
    """A rank beside one that has chosen `other` tokens."""

    def __init__(self, other: int):
        super().__init__()
        self.other = other

    def everyone(self, measured: Any) -> list[Any]:
        return [measured, self.other]


def test_the_rank_with_the_least_memory_decides_an_open_batch(tiny_folder: Path):
    rows = EncodedSet.from_rows([(np.ones(40, np.int32), np.arange(40) > 0)] * 64)
    splits: Any = SimpleNamespace(train=rows, valid=None, chat_day=None)
    chosen: Any = SimpleNamespace(terms=KernelTerms())

    def batch_tokens(strategy: Strategy, **flags: object) -> int | None:
        settings = train_settings({"model": str(tiny_folder), **flags})
        shape = outlined_shape(outline_for(settings.model, device.compute_dtype()), settings)
        return fit_settings(settings, shape, splits, chosen, strategy)[0].loop.batch_tokens

    alone = batch_tokens(Strategy())
    assert alone is not None
    assert alone > 100
    assert batch_tokens(BesideAnother(100)) == 100
    assert batch_tokens(BesideAnother(2 * alone)) == alone
    assert batch_tokens(BesideAnother(100), batch_tokens=200) == 200


def test_the_advice_for_a_batch_of_examples_is_fewer_of_them(tiny_folder: Path):
    settings = train_settings({"model": str(tiny_folder), "batch_size": 32})
    shape, machine = outlined_shape(outline_for(settings.model, device.compute_dtype()), settings), this_machine("auto")

    def fits(examples: int, budget: int) -> bool:
        few = replace(settings, loop=replace(settings.loop, batch_size=examples))
        return fit(few, shape, replace(machine, working_set_bytes=budget), 200).memory.fits

    def advised(budget: int) -> str:
        return advice(settings, shape, replace(machine, working_set_bytes=budget), 200)

    least = next(budget for budget in range(10**6, 10**8, 10**5) if fits(1, budget))
    enough = next(budget for budget in range(least, 10**8, 10**5) if fits(5, budget))
    most = max(examples for examples in range(1, 32) if fits(examples, enough))
    assert advised(enough) == f"try --batch-size {most}"
    shorter = advised(least - 10**5)
    assert "--max-seq-length" in shorter
    assert "--batch-tokens" not in shorter


# A base that is read from its files

READING = Reading(
    (10**8,) * 10, first_trained=4, bytes_per_s=1e9, copied_per_s=1e10, source="assumed", block_planned_s=1e-3
)
FORWARD_S, STEP_S = 0.2, 0.5


def test_a_pass_reads_copies_plans_and_waits_for_what_takes_longer():
    assert READING.forward_bytes == 9 * 10**8  # the first is kept from the batch before
    assert READING.backward_bytes == 5 * 10**8  # the last, from the forward pass
    assert READING.copying_s == pytest.approx(1.4e9 / 1e10)
    assert READING.planning_s == pytest.approx((10 + 6) * 1e-3)
    assert READING.waiting_s(FORWARD_S, STEP_S) == pytest.approx((0.9 - 0.01 - 0.2) + (0.5 - 0.006 - 0.3))
    assert READING.waiting_s(10.0, 20.0) == 0
    slow = replace(READING, block_planned_s=1.0)  # planning alone hides the disk
    assert (slow.hidden_from(100, FORWARD_S, STEP_S), slow.waiting_s(0.0, 0.0)) == (1, 0)


@pytest.mark.parametrize("bytes_per_s", [0.5e9, 1e9, 3e9])
def test_from_as_many_tokens_as_it_names_nothing_waits(bytes_per_s):
    reading = replace(READING, bytes_per_s=bytes_per_s)
    tokens = reading.hidden_from(100, FORWARD_S, STEP_S)
    assert reading.waiting_s(FORWARD_S * tokens / 100, STEP_S * tokens / 100) == pytest.approx(0)
    assert reading.waiting_s(FORWARD_S * (tokens - 2) / 100, STEP_S * (tokens - 2) / 100) > 0
