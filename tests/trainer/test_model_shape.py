"""What a block keeps, read from its graph: the rules one by one, then against what MLX really allocates."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures.build import tiny_config

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import AdapterSettings
from mlx_lora.kernels.activations import polynomial_swiglu
from mlx_lora.models.graph import count_memory, gradient_graph
from mlx_lora.models.meta import outline_of_config
from mlx_lora.planner.fit import planned_words
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.memory import NotKnown, RunShape, kept_by, plan_memory
from mlx_lora.trainer.fit import TracedBlock, adapted_shape, outlined_shape, passes_over_blocks, trace_blocks
from mlx_lora.utils import device

pytestmark = pytest.mark.usefixtures("traced_anew", "all_chunks_traced")
X = mx.zeros((8, 16))
W = mx.zeros((16, 32))


def kept(function, varied=(X,), fixed=(W,)) -> int:
    """Return the numbers that a function keeps for its backward pass."""
    return count_memory(gradient_graph(function, list(varied), list(fixed)), lag=0).kept_bytes // 4


def test_a_product_keeps_nothing_of_its_own():
    assert kept(lambda v, f: [v[0] @ f[0]]) == 0


def test_an_activation_keeps_its_result():
    assert kept(lambda v, f: [mx.tanh(v[0] @ f[0]) @ f[0].T]) == 8 * 32


def test_a_chain_of_elementwise_operations_keeps_what_its_gradient_reads():
    one = kept(lambda v, f: [mx.sigmoid(v[0] @ f[0]) @ f[0].T])
    assert one == kept(lambda v, f: [mx.sigmoid((v[0] @ f[0]) * 2 + 1 - 3) @ f[0].T]) == 8 * 32


def test_views_share_a_buffer_and_copies_do_not():
    def through(change):
        return kept(lambda v, f: [mx.exp(change(mx.exp(v[0] @ f[0]))).sum()])

    assert through(lambda y: y) == 2 * 8 * 32
    assert through(lambda y: y.reshape(2, 4, 32)) == 2 * 8 * 32
    assert through(lambda y: y[:, :16]) == 8 * 32 + 8 * 16
    # Turned and then flattened, it must be copied; the copy itself is read by nobody.
    assert through(lambda y: y.T.reshape(-1)) == 2 * 8 * 32


def test_what_is_computed_twice_is_kept_once():
    assert kept(lambda v, f: [mx.exp(v[0] @ f[0]) * mx.exp(v[0] @ f[0])]) == 8 * 32
    assert kept(lambda v, f: [mx.exp(v[0] @ f[0]) * mx.exp(2 * (v[0] @ f[0]))]) == 2 * 8 * 32


def test_a_compiled_kernel_keeps_its_results_only(monkeypatch):
    """silu(gate) * up by polynomials keeps two slopes; without a compiler also what lies between gate, up and the product."""

    def gated(v, f):
        return [polynomial_swiglu(v[0] @ f[0], v[0] @ f[1]) @ f[0].T]

    numbers = {}
    for compiles in (True, False):
        monkeypatch.setattr(device, "compiles_kernels", lambda compiles=compiles: compiles)
        numbers[compiles] = kept(gated, fixed=(W, W + 1))
    assert numbers[True] == 2 * 8 * 32 < numbers[False]


def test_a_backward_pass_of_ones_own_keeps_what_it_reads():
    def cube(reads_output: bool):
        @mx.custom_function
        def forward(x):
            return x * x * x

        @forward.vjp
        def backward(x, d, y):
            return d * 3 * (y / x if reads_output else x * x)

        return forward

    lean = kept(lambda v, f: [cube(False)(v[0] @ f[0]) @ f[0].T])
    assert lean == 8 * 32
    assert kept(lambda v, f: [cube(True)(v[0] @ f[0]) @ f[0].T]) == 2 * lean
    assert mx.custom_function.__name__ == "custom_function"  # put back


def test_a_longer_lag_holds_more():
    graph = gradient_graph(lambda v, f: [mx.tanh(mx.tanh(v[0] @ f[0]) @ f[0].T) @ f[0]], [X], [W])
    windows = [count_memory(graph, lag).window_bytes for lag in (0, 4, 100)]
    assert windows[0] < windows[1] < windows[2]


class Doubling(nn.Module):
    """A block that looks at a number, which no graph has."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(16, 16, bias=False)

    def __call__(self, x, mask=None, cache=None):
        return x + self.q_proj(x) * (2.0 if x.sum().item() > 0 else 1.0)


def shape_of(name: str, **flags: object):
    outline = outline_of_config(tiny_config(name), mx.float32)
    return outlined_shape(outline, train_settings({"model": "x", "rank": 4, **flags}))


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_mixtures_in_chunks_of_positions_are_known(name):
    block = shape_of(name).blocks[-1]
    whole, chunks = block.memory.at(1, 128, True), block.chunked.trace(4)
    assert chunks.at(1, 128, True).kept < whole.kept
    # An expert's factors have gradients in float32, which all chunks share.
    assert 0 < chunks.at(1, 128, True).window < 4 * whole.window
    assert block.chunked.at(1, 128, True) == whole  # a small batch is not divided


def test_a_block_whose_chunks_cannot_be_read_counts_as_a_whole(monkeypatch):
    monkeypatch.setattr("mlx_lora.trainer.fit.WIDTHS", (32, 64))  # quick to read
    block = shape_of("llama").blocks[0]

    def refuse(*_: object):
        raise NotKnown("no")

    block.chunked.trace = lambda chunks: TracedBlock(refuse)
    assert block.chunked.at(1, 1 << 24, True) == block.memory.at(1, 1 << 24, True)


@pytest.mark.parametrize("name", ["llama", "gemma4_text", "qwen3_moe", "mamba2", "deepseek_v3"])
def test_blocks_of_every_kind_are_known(name):
    shape = shape_of(name)
    assert not shape.not_known
    for block in shape.blocks:
        one, two, longer = (block.memory.at(*batch, on_gpu=False) for batch in ((1, 64), (2, 64), (1, 128)))
        assert 0 < one.ends < one.kept < two.kept <= 2.01 * one.kept
        assert one.kept < longer.kept
        assert 0 < one.window < longer.window


def test_a_looped_model_keeps_its_blocks_of_each_pass():
    config = tiny_config("nanbeige")
    once, twice, often = (
        outlined_shape(
            outline_of_config({**config, "num_loops": loops}, mx.float32), train_settings({"model": "x", "rank": 4})
        )
        for loops in (1, 2, 4)
    )
    assert len(often.blocks) == 2 * len(twice.blocks) == 4 * len(once.blocks)
    assert once.base_bytes == twice.base_bytes == often.base_bytes
    kept = [
        sum(kept_by(block, RunShape(1, 64), this_machine()) for block in shape.blocks) for shape in (once, twice, often)
    ]
    assert kept[0] < kept[1] == pytest.approx(2 * kept[0], rel=0.3)
    assert kept[2] == pytest.approx(2 * kept[1], rel=0.3)
    assert [block.at_one is None for block in twice.blocks[:-1]] == [True] * (len(twice.blocks) - 1)


def test_passes_are_counted_without_computing_a_block():
    called = []

    class Noting(Doubling):
        def __call__(self, x, mask=None, cache=None):
            called.append(self)
            return super().__call__(x, mask, cache)

    outline = outline_of_config({**tiny_config("nanbeige"), "num_loops": 3}, mx.float32)
    outline.model.model.layers[0] = Noting()
    assert passes_over_blocks(outline.model, outline.config) == 3
    assert not called


def test_a_head_that_leaves_tokens_out_is_planned_with_whole_logits():
    settings = train_settings({"model": "x", "rank": 4})
    assert outlined_shape(outline_of_config(tiny_config("phi3small"), mx.float32), settings).plain_loss
    assert not shape_of("llama").plain_loss


def test_between_two_widths_it_is_interpolated():
    block = shape_of("llama").blocks[0].memory
    low, middle, high = (block.at(1, width, on_gpu=False).kept for width in (64, 96, 128))
    exact = block.call(1, 96, False).kept
    assert low < middle < high
    assert middle == pytest.approx(exact, rel=0.02)
    assert block.at(1, 8192, on_gpu=False).kept > 1.9 * block.at(1, 4096, on_gpu=False).kept


@pytest.mark.cpu("a plan for a GPU is made on both; no plan for a CPU is made on a GPU")
def test_a_gpu_keeps_no_exponentials():
    block = shape_of("llama").blocks[0].memory
    assert block.at(1, 128, on_gpu=True).kept < 0.9 * block.at(1, 128, on_gpu=False).kept
    assert device.keep_exponentials()  # put back


def test_less_is_prepared_ahead_on_a_cpu_if_ranks_share_the_base():
    windows = {}
    for shard_base in ("off", "even"):
        outline = outline_of_config(tiny_config("llama"), mx.float32)
        settings = train_settings({"model": "x", "rank": 4, "shard_base": shard_base})
        adapt_model(outline.model, settings.adapter, 0)
        memory = adapted_shape(outline.model, outline.config, settings).blocks[0].memory
        windows[shard_base] = [memory.at(1, 128, on_gpu).window for on_gpu in (False, True)]
    assert windows["even"][0] < windows["off"][0]
    assert windows["even"][1] == windows["off"][1]


def test_a_block_that_looks_at_numbers_is_not_known_and_the_plan_says_so():
    outline = outline_of_config(tiny_config("llama"), mx.float32)
    settings = train_settings({"model": "x", "rank": 4})
    outline.model.model.layers[0] = Doubling()
    outline.model.model.layers[1] = Doubling()
    adapt_model(outline.model, AdapterSettings(rank=4), 0)
    with pytest.raises(NotKnown, match="Doubling"):
        trace_blocks(outline.model, outline.config)[0].at(1, 32, on_gpu=False)
    shape = adapted_shape(outline.model, outline.config, settings)
    assert len(shape.not_known) == 1
    assert "not known" in planned_words(plan_memory(shape, RunShape(1, 64), this_machine()))
    assert "not known" not in planned_words(plan_memory(shape_of("llama"), RunShape(1, 64), this_machine()))


def test_reading_changes_nothing_of_the_model():
    outline = outline_of_config(tiny_config("llama"), mx.float32)
    adapt_model(outline.model, AdapterSettings(rank=4), 0)
    outline.model.eval()
    before = {id(m): (type(m), m.training) for m in outline.model.modules()}
    arrays = {id(m): [id(a) for a in m.values() if isinstance(a, mx.array)] for m in outline.model.modules()}
    trace_blocks(outline.model, outline.config)[0].at(1, 64, on_gpu=False)
    assert before == {id(m): (type(m), m.training) for m in outline.model.modules()}
    assert arrays == {id(m): [id(a) for a in m.values() if isinstance(a, mx.array)] for m in outline.model.modules()}


PEAK = """
import sys
sys.path[:0] = ["tests"]
import mlx.core as mx
from architectures.build import tiny_architecture
from architectures.scaling import scaled
from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.settings import AdapterSettings
from mlx_lora.models.head import find_head, with_last_block
from mlx_lora.kernels.choose import training_kernels
import mlx.nn as nn

name, width, slots = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = tiny_architecture(name, config=scaled(name, 4, 2))
model.freeze()
adapt_model(model, AdapterSettings(rank=4), 0)
model.train()
mx.eval(model.parameters())
ids = mx.zeros((1, width), mx.int32)
head, positions = with_last_block(find_head(model, {}), model)[0], mx.arange(width - slots, width)
gradient = nn.value_and_grad(model, lambda model: head.hidden_at(positions, ids).sum())

def step():
    parameters = model.trainable_parameters()
    with training_kernels(model):
        found = gradient(model)
    model.update(parameters)  # differentiation leaves its own stand-ins in the model
    return found

step = mx.compile(step, inputs=[model.state])
mx.eval(step())
mx.reset_peak_memory()
before = mx.get_active_memory()
mx.eval(step())
print(mx.get_peak_memory() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("slots", [256, 32])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_the_count_is_what_mlx_allocates(name, slots):
    """The peak of all blocks' forward and backward pass, without loss and optimizer, in a process of its own."""
    from architectures.scaling import scaled

    command = [sys.executable, "-c", PEAK, name, "256", str(slots)]
    measured = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    outline = outline_of_config(scaled(name, 4, 2), mx.float32)
    shape = outlined_shape(outline, train_settings({"model": "x", "rank": 4}))
    run, machine = RunShape(1, 256, slots), this_machine("float32")
    held = [kept_by(block, run, machine) for block in shape.blocks]
    assert (held[-1] < 0.7 * held[0]) == (slots < 256)
    counted = sum(held) + max(block.memory.at(1, 256, on_gpu=False).window for block in shape.blocks)
    assert 0.9 * measured < counted < 1.3 * measured
