"""Kernels chosen by measurement: the rule, what is kept of it, what runs then, and what the planner makes of it; all together against the plain path."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml
from architectures.build import tiny_architecture
from comparing import by_dtype
from conftest import TINY, quantized, tiny_model
from mlx.utils import tree_flatten
from mlx_lm.models import cohere, gemma2, gemma3_text, granite
from run_cli import run, succeeds
from tiers import by_default, named
from tiny_recurrent import recurrent_model
from tiny_steps import adapted, batch, with_adapter

from mlx_lora.data.batch import Batch
from mlx_lora.kernels import choose as kernel_choice
from mlx_lora.kernels.attention import Tiles, attend, tiled_attention
from mlx_lora.kernels.choose import (
    KernelChoice,
    activation_class,
    attention_class,
    choose_model_kernels,
    kernel_rows,
    measured_figures,
    training_kernels,
)
from mlx_lora.kernels.measure import (
    MLX,
    SWITCH,
    TOLERANCE,
    Figures,
    TimingInputs,
    choose,
    figures_key,
    keep_figures,
    measure,
    read_figures,
)
from mlx_lora.kernels.quantized_matmul import use_measured_matmul
from mlx_lora.losses import fused as loss_choice
from mlx_lora.losses.agree import Probe, check_kernels, choose_loss, disagreement
from mlx_lora.losses.cross_entropy import TILES, plain_loss, token_arrays
from mlx_lora.losses.fused import fused_token_losses, head_loss
from mlx_lora.models.head import find_head
from mlx_lora.planner.memory import Block, KernelTerms, Layer, Machine, ModelShape, RunShape, plan_memory
from mlx_lora.planner.speed import Ceilings
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.utils import device
from mlx_lora.utils import progress as long_task
from mlx_lora.utils.text import GIB

ROWS = {row.name: row for row in kernel_rows()}
SHORT = ("--verbose", "--iters", 3, "--batch-size", 2, "--num-layers", 2, "--rank", 4, "--sample-tokens", 0)
SHORT += ("--steps-per-report", 1)


def figures(seconds: float, kept: int = 100, peak: int = 200, error: float = 0.0) -> Figures:
    return Figures(seconds, kept, peak, 100, error, 1e-4)


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ({"a": figures(1.0), "b": figures(0.9)}, "b"),  # alike: the faster
        ({"a": figures(1.0), "b": figures(0.9, error=1e-3)}, "a"),  # the faster one is wrong
        ({"a": figures(1.0), "b": figures(0.9, error=math.nan)}, "a"),
        (
            {"a": figures(1.0), "b": figures(0.6, kept=300, peak=400)},
            "a",
        ),  # twice the memory for less than twice the speed
        ({"a": figures(1.0), "b": figures(0.4, kept=300, peak=400)}, "b"),  # for more than that
        ({"a": figures(1.0), "b": figures(0.9, kept=150, peak=400)}, "b"),  # a quarter more: within the bound
        ({"a": figures(1.0, error=1.0), "b": figures(0.9, error=1.0)}, None),
    ],
)
def test_the_rule(candidates, best):
    assert choose(candidates) == best


def trial_of(rows: int = 6, width: int = 5) -> TimingInputs:
    x, d = (mx.random.normal((rows, width), key=mx.random.key(n)) for n in range(2))
    return TimingInputs([x], [d], lambda function: lambda x: [function(x)])


def test_errors_that_cancel_in_a_sum_are_found():
    """One summed scalar, forward only, would pass both of these."""
    right = mx.exp

    def canceling(x):
        y = right(x)
        return mx.concatenate([y[:1] * 1.01, y[1:2] - 0.01 * y[:1], y[2:]])

    @mx.custom_function
    def without_gradient(x):
        return right(x)

    without_gradient.vjp(lambda x, d, y: 1.01 * d * y)
    assert canceling(trial_of().arrays[0]).sum().item() == pytest.approx(right(trial_of().arrays[0]).sum().item())
    candidates = {"right": right, "canceling": canceling, "without gradient": without_gradient}
    found = measure(candidates, trial_of(), lambda x: [right(x)], compiled=False)
    assert found["right"].correct
    assert not found["canceling"].correct
    assert found["canceling"].error == pytest.approx(0.01, rel=0.5)
    assert not found["without gradient"].correct
    assert found["without gradient"].error == pytest.approx(0.01, rel=0.01)


def test_what_is_kept_and_what_is_worked_with_are_told_apart():
    x = mx.random.normal((64, 1024))
    trial = TimingInputs([x], [mx.ones_like(x)], lambda function: lambda x: [function(x)])
    found = measure({"keeps": lambda x: mx.exp(x) * mx.tanh(x), "again": mx.checkpoint(lambda x: mx.exp(x) * mx.tanh(x))}, trial,
                    lambda x: [mx.exp(x) * mx.tanh(x)], compiled=False)  # fmt: skip
    assert all(one.correct and one.seconds > 0 for one in found.values())
    assert found["again"].kept_bytes == pytest.approx(x.nbytes, rel=0.1)  # its output
    assert found["keeps"].kept_bytes == pytest.approx(3 * x.nbytes, rel=0.1)  # exp and tanh as well
    assert found["again"].peak_bytes > found["again"].kept_bytes


SHAPES = [
    ("attention", attention_class(4, 2, 16, 16, 64)),
    ("attention", attention_class(4, 1, 16, 8, 70, "array")),
    ("attention", attention_class(2, 2, 16, 16, 64, "none")),
    ("attention", attention_class(4, 2, 16, 16, 64, "causal", sinks=True)),
    ("gated activation", activation_class(96)),
    ("gated delta", (64, 2, 4, 32, 16, "a gate per head")),
    ("gated delta", (64, 2, 2, 32, 32, "a gate per channel")),
    ("state space", (64, 4, 16, 2, 8)),
    ("state space", (64, 6, 8, 1, 16)),
]


@pytest.mark.parametrize("dtype", by_default([mx.float32, mx.bfloat16], mx.float32))
@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=str)
def test_every_candidate_is_right_and_a_slightly_wrong_one_is_not(name, shape, dtype, monkeypatch):
    monkeypatch.setattr("mlx_lora.kernels.choose.TRIAL_POSITIONS", 64)
    monkeypatch.setattr("mlx_lora.kernels.choose.TRIAL_NUMBERS", 1 << 12)
    row = ROWS[name]
    trial, reference = row.trial(shape, dtype)

    def wrong(*args, **kwargs):
        made = row.theirs(*args, **kwargs)
        return (1.2 * made[0], made[1]) if isinstance(made, tuple) else 1.2 * made

    found = measure({**row.candidates, "wrong": wrong}, trial, reference, compiled=False)
    assert {one for one, figures in found.items() if not figures.correct} == {"wrong"}
    assert found["wrong"].tolerance == TOLERANCE[dtype]


@pytest.fixture
def own_cache(own_cache, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr("mlx_lora.kernels.choose.TRIAL_POSITIONS", 64)
    monkeypatch.setattr("mlx_lora.kernels.choose.TRIAL_NUMBERS", 1 << 12)
    return own_cache


def test_measured_once_and_again_for_another_mlx(own_cache, monkeypatch, logged):
    model = tiny_model()
    first = choose_model_kernels(model, [40, 130], "auto", mx.float32)
    assert {(kernel, shape[0]) for kernel, shape in first.classes} == {
        ("attention", 64), ("attention", 128), ("gated activation", 256)}  # fmt: skip
    assert len(logged) == 3
    assert any("attention for 64 keys, 4/2 heads of 16" in line for line in logged)
    again = choose_model_kernels(model, [40, 130], "auto", mx.float32)
    assert again == first
    assert len(logged) == 3
    monkeypatch.setattr(device, "package_version", lambda package: "99.0")
    choose_model_kernels(model, [40], "auto", mx.float32)
    assert len(logged) == 5
    (own_cache / "measured/kernels.json").write_text("{damaged")
    assert choose_model_kernels(model, [40], "auto", mx.float32).figures
    assert len(logged) == 7


def test_nothing_is_measured_where_that_is_switched_off(own_cache, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    monkeypatch.setattr(kernel_choice, "measure", None)
    found = choose_model_kernels(tiny_model(), [40], "auto", mx.float32)
    assert set(found.classes.values()) == {"tiled", ROWS["gated activation"].assumed}
    assert not found.figures
    assert all("(not measured)" in words for words in found.describe())
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(TypeError):
        choose_model_kernels(tiny_model(), [40], "auto", mx.float32)


def test_a_call_goes_to_the_choice_of_its_kind_and_nearest_size():
    small, large, sunk = (attention_class(4, 2, 16, 16, keys, sinks=s) for keys, s in ((64, 0), (512, 0), (64, 1)))
    choice = KernelChoice("auto", classes={("attention", small): "tiled", ("attention", large): MLX})
    row = ROWS["attention"]
    assert [choice(row, attention_class(4, 2, 16, 16, keys)) for keys in (64, 128, 256, 512, 1024)] == [
        "tiled", "tiled", "tiled", MLX, MLX]  # fmt: skip
    assert choice(row, sunk) == "tiled"  # another kind, which nobody chose for
    assert replace(choice, asked=MLX)(row, small) == MLX
    # A check on few tokens meets each of the two.
    assert [variant(row, small) for variant in choice.variants()] == ["tiled", MLX]
    assert "mlx for 512 keys" in choice.describe()[0]


def prefer(
    name: str, keys: tuple[int, ...] = (64, 128), loss: str | None = None, dtype: mx.Dtype | None = None
) -> None:
    """Fill the cache as a device would on which a candidate wins; None: in the dtype that commands compute in."""

    def table(candidates, best: str) -> dict[str, Figures]:
        return {one: Figures(1e-3 if one == best else 1.0, 10**8, 2 * 10**8, 10**6, 0.0, 1e-4) for one in candidates}

    dtype = dtype or device.compute_dtype()
    for size in keys:
        of = attention_class(4, 2, 16, 16, size)
        keep_figures(figures_key("attention", of, dtype), table(ROWS["attention"].candidates, name))
    of = activation_class(TINY["intermediate_size"])
    best = name if name in ROWS["gated activation"].candidates else "leanest"
    keep_figures(figures_key("gated activation", of, dtype), table(ROWS["gated activation"].candidates, best))
    if loss:
        key = figures_key(loss_choice.NAME, (TINY["vocab_size"], TINY["hidden_size"], "float"), dtype)
        keep_figures(key, table([*loss_choice.loss_kernels(), "plain"], loss))


def losses(folder) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row.get("loss") is not None]


def test_the_kernels_of_a_device_that_prefers_the_others_run_and_the_numbers_agree(
    own_cache, tiny_folder, chats, tmp_path, monkeypatch
):
    monkeypatch.setenv(SWITCH, "0")  # what is in the cache is all there is
    used: list[str] = []

    def noted(q, k, v, tiles, sinks=None):
        used.append(tiles.kernel)
        return attend(q, k, v, tiles, sinks)

    monkeypatch.setattr("mlx_lora.trainer.build.attend", noted)
    common = ("--model", tiny_folder, "--data", chats, *SHORT, "--grad-checkpoint", "none")
    ran, curves = {}, {}
    for name, loss in (("tiled", "tiles"), (MLX, "rows")):
        prefer(name, loss=loss)
        out = tmp_path / name
        used.clear()
        ran[name] = run("train", *common, "--adapter-path", out, "--verbose")
        assert ran[name].code == 0, ran[name].err
        curves[name] = losses(out)
        assert set(used) == {name}
    assert "tiled attention (measured)" in ran["tiled"].err
    assert "fused cross-entropy" in ran["tiled"].err
    assert "mlx attention (measured)" in ran[MLX].err
    assert "mlx gated activation (measured)" in ran[MLX].err
    assert "mx.fast.cross_entropy by rows" in ran[MLX].err
    assert np.allclose(curves["tiled"], curves[MLX], rtol=by_dtype(1e-5, 2e-2))
    assert curves["tiled"][0] != curves["tiled"][-1]


def test_kernels_can_be_asked_for_and_a_run_goes_on_with_others(tiny_folder, chats, tmp_path):
    """As with --grad-checkpoint: nothing but rounding changes, and a kernel that fails must be left behind somehow."""
    common = ("train", "--model", tiny_folder, "--data", chats, *SHORT, "--save-every", 1, "--lr-schedule", "constant")
    common += ("--warmup", 0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, flags in (
        (whole, ("--kernels", "ours")),
        (parts, ("--iters", 2)),
        (parts, ("--resume", "--kernels", MLX)),
    ):
        ran = succeeds(*common, "--adapter-path", out, *flags)
        asked = flags[-1]
        assert (f"(--kernels {asked})" in ran.err) is ("--kernels" in flags)
    assert "Resuming from step 2" in ran.err
    assert yaml.safe_load((parts / "run.yaml").read_text())["kernels"] == MLX
    assert losses(parts)[-1] == pytest.approx(losses(whole)[-1], rel=by_dtype(1e-4, 2e-2))
    assert run(*common, "--kernels", "best", "--adapter-path", tmp_path / "x").code == 2


@pytest.mark.parametrize("mode", ["none", "selective", "block", "2"])
def test_mlxs_attention_under_every_checkpointing(mode):
    expected_model, model = adapted(), adapted()
    arrays = token_arrays(batch(2, 70, seed=1))
    _, expected = nn.value_and_grad(expected_model, plain_loss)(expected_model, arrays)
    tape = apply_checkpointing(model, mode)
    calls: list[str] = []

    def every(row, shape):
        calls.append(row.name)
        return MLX

    with training_kernels(model, *([tape.attend] if tape else []), choose=every):
        _, got = nn.value_and_grad(model, plain_loss)(model, arrays)
    assert {"attention", "gated activation"} == set(calls)
    for (name, one), (_, other) in zip(tree_flatten(expected), tree_flatten(got), strict=True):
        assert np.allclose(one, other, atol=1e-5 * max(mx.abs(one).max().item(), 1e-4)), name


def test_a_chosen_kernel_that_is_wrong_on_this_model_is_not_used(own_cache, tiny_folder, chats, tmp_path, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    prefer("tiled")

    def wrong(q, k, v, tiles, sinks=None):
        # In 16 bits, the tiny model's rounding would hide 5%.
        return tiled_attention(q, k, v, Tiles(by_dtype(1.05, 4.0) * tiles.scale, tiles.mask), sinks)

    monkeypatch.setattr("mlx_lora.kernels.choose.attend", wrong)
    monkeypatch.setattr(
        "mlx_lora.losses.agree.training_kernels", lambda model, choose: training_kernels(model, wrong, choose)
    )
    ran = succeeds(
        "train", "--model", tiny_folder, "--data", chats, *SHORT, "--adapter-path", tmp_path / "out", "--verbose"
    )
    assert "the model's own kernels (leanest gated activation and tiled attention differ" in ran.err


def test_a_form_of_the_loss_that_is_wrong_on_this_model_gives_way_to_the_other(own_cache, monkeypatch):
    prefer("tiled", loss="rows", dtype=mx.float32)
    monkeypatch.setattr(
        "mlx_lora.losses.agree.has_passed", lambda name: False
    )  # the kernels below change while the program runs
    model = adapted()
    assert choose_loss(model, TINY).kernel == "rows"
    right = loss_choice.LOSS_KERNELS["rows"]

    def wrong(*args, **kwargs):
        return right(*args, **kwargs) * (mx.arange(len(args[2])) % 2 * 0.02 + 0.99)  # cancels in the sum

    monkeypatch.setitem(loss_choice.LOSS_KERNELS, "rows", wrong)
    assert choose_loss(model, TINY).kernel == "tiles"
    monkeypatch.setitem(loss_choice.LOSS_KERNELS, "tiles", wrong)
    if "polynomial" in loss_choice.loss_kernels():  # on a CPU
        assert choose_loss(model, TINY).kernel == "polynomial"
        monkeypatch.setitem(loss_choice.LOSS_KERNELS, "polynomial", wrong)
    found = choose_loss(model, TINY)
    assert found.kernel == "plain"
    assert "rows differs by" in found.description
    assert choose_loss(model, TINY, MLX).description == "plain cross-entropy (--kernels mlx)"


def test_a_wrong_gradient_is_a_disagreement():
    model = tiny_model()
    one = Probe(mx.array([1.0, 2.0]), {"a": mx.array([1.0, 1.0]), "b": mx.array([0.0])})
    assert disagreement(model, one, one) is None
    swapped = replace(one, losses=mx.array([2.0, 1.0]))  # the same sum
    assert "losses" in disagreement(model, one, swapped)
    assert "gradient" in disagreement(model, one, replace(one, gradients={**one.gradients, "a": mx.array([1.0, 1.01])}))
    assert disagreement(model, one, replace(one, losses=mx.array([1.0, math.nan]))) is not None
    assert "gradient" in disagreement(model, one, replace(one, gradients={**one.gradients, "b": mx.array([math.nan])}))


def test_the_heads_loss_is_measured_on_the_models_own_head(own_cache, monkeypatch, logged):
    monkeypatch.setattr(device, "trial_flops", lambda: 1e5)
    model = adapted()
    loss = choose_loss(model, TINY, measure=True)
    assert logged == ["Measuring cross-entropy for a vocabulary of 288 and width 64 (float), once on this machine"]
    found = read_figures(figures_key(loss_choice.NAME, loss_choice.head_class(find_head(model, TINY)), mx.float32))
    assert found.keys() - {"plain"} == {*loss_choice.loss_kernels()}
    assert all(one.correct for one in found.values())
    assert loss.kernel == loss_choice.choose_kernel(found)
    choose_loss(model, TINY, measure=True)
    assert len(logged) == 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("mode", "bits", "group"), [("affine", 4, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
def test_the_loss_is_measured_on_a_head_of_every_format(mode, bits, group, tied, own_cache, monkeypatch):
    monkeypatch.setattr(device, "trial_flops", lambda: 1e5)
    model = quantized(tiny_model(tie_word_embeddings=tied), bits, group, mode)
    found = loss_choice.measure_loss(find_head(model, TINY), mx.float32)
    assert all(one.correct for one in found.values())


def test_the_models_own_loss_is_measured_if_no_kernel_is_right(own_cache, monkeypatch):
    monkeypatch.setattr(device, "trial_flops", lambda: 1e5)
    wrong = {
        name: lambda *args, **options: 2 * fused_token_losses(*args, **options) for name in loss_choice.LOSS_KERNELS
    }
    monkeypatch.setattr(loss_choice, "LOSS_KERNELS", wrong)
    found = loss_choice.measure_loss(find_head(adapted(), TINY), mx.float32)
    assert [name for name, one in found.items() if one.correct] == ["plain"]
    assert loss_choice.choose_kernel(found) == "plain"


def test_long_comparisons_with_the_models_own_are_told(own_cache, monkeypatch, logged):
    monkeypatch.setattr(long_task, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(long_task, "QUIET_S", -1.0)
    model = adapted()
    choice = choose_model_kernels(model, [40], "ours", mx.float32)
    assert check_kernels(model, TINY, choose_loss(model, TINY, "ours", measure=True), choice)[0]
    for what in ("loss", "kernels"):
        assert any(what in line and "1 of 2 computations, about " in line for line in logged)


CPU = Machine("a CPU", "cpu", 24 * GIB, 22 * GIB, 4)


def shape_of_llama() -> ModelShape:
    layers = [Layer("self_attn", f"{n}_proj", 64, 64, rank=4) for n in "qkv"] + [
        Layer("self_attn", "o_proj", 64, 64, rank=4)
    ]
    layers += [Layer("mlp", name, 64, 192, rank=4) for name in ("gate_proj", "up_proj")] + [
        Layer("mlp", "down_proj", 192, 64)
    ]
    block = Block(tuple(layers), (64, 64), heads=4, key_heads=2, head_width=16)
    return ModelShape("llama", 64, 288, (block,) * 8, 10**6, 10**5)


def test_the_plan_follows_the_choice():
    def peak(width: int = 512, mode: str = "none", **terms) -> int:
        machine = replace(CPU, kernels=KernelTerms(**terms))
        return plan_memory(shape_of_llama(), RunShape(4, width, checkpointing=mode), machine).peak_bytes

    scores = 4 * 4 * 512 * 512 * 4  # rows, heads, queries, keys, bytes
    ours = peak()
    mlx = peak(attention=((512, 1.1, 2.3),), tiled=(64,))
    assert mlx - peak(attention=((512, 0.1, 2.3),)) == pytest.approx(
        8 * scores, rel=0.01
    )  # one more array in each block
    assert mlx > ours
    # Rows of another size than what mlx was chosen for are ours still.
    assert peak(width=64, attention=((512, 1.1, 2.3),), tiled=(64,)) == peak(width=64)
    # Checkpointed blocks keep no scores, but one block makes them again.
    assert peak(mode="block", attention=((512, 1.1, 2.3),)) < 0.4 * mlx
    assert peak(gate_arrays=2.0) - peak(gate_arrays=0.0) == 2 * 8 * 4 * 512 * 192 * 4


def test_terms_are_what_was_measured(own_cache, monkeypatch):
    prefer("tiled", dtype=mx.float32)
    choice = choose_model_kernels(tiny_model(), [64], "auto", mx.float32)
    assert choice.terms() == KernelTerms(tiled=(64,), gate_arrays=199.0)  # 1e8 bytes kept beside two inputs of 5e6
    # mlx's on this very CPU: about all scores are kept.
    measured_figures(ROWS["attention"], attention_class(4, 2, 16, 16, 256), mx.float32)
    found = choose_model_kernels(tiny_model(), [250], MLX, mx.float32).terms()
    [(keys, kept, ahead)] = found.attention
    assert keys == 256
    assert 0.9 < kept < 1.7
    assert 1.0 < ahead < 4.0


@pytest.mark.long
def test_plan_reads_what_was_measured_here(own_cache, tiny_folder, monkeypatch):
    monkeypatch.setattr(kernel_choice, "measure", None)  # a plan measures nothing
    for name in ("largest_sequence", "largest_batch_size"):  # many graphs of long rows
        monkeypatch.setattr(f"mlx_lora.api.plan.{name}", lambda *_: 0)
    monkeypatch.setattr(
        "mlx_lora.api.plan.ceilings_here", lambda dtype, **_: Ceilings(1e11, 1e10, 1e8, 0.0, "measured here")
    )

    def planned(*flags) -> dict:
        ran = succeeds("plan", "--model", tiny_folder, "--max-seq-length", 513, "--batch-size", 4, "--json", *flags)
        return json.loads(ran.out)

    unknown = planned()
    prefer("tiled", keys=(64, 512))
    ours = planned()
    prefer(MLX, keys=(64, 512))
    theirs = planned()
    assert ours["machine"]["kernels"]["tiled"]
    assert theirs["machine"]["kernels"]["attention"]
    assert unknown["machine"]["kernels"]["tiled"]  # ours where nothing is known
    assert theirs["peak_bytes"] > ours["peak_bytes"]
    # For a Mac that is not here nothing of this counts.
    assert planned("--chip", "M2")["machine"]["kernels"]["attention"] == []
    assert planned("--kernels", MLX)["peak_bytes"] > ours["peak_bytes"]


@pytest.mark.long
def test_the_doctor_shows_the_table(own_cache, monkeypatch):
    prefer(MLX, loss="tiles")
    for name in ("ATTENTION", "ACTIVATION"):
        monkeypatch.setattr(f"mlx_lora.bench.doctor.check.{name}", ())
    monkeypatch.setattr("mlx_lora.bench.doctor.check.RECURRENT", {})
    monkeypatch.setattr("mlx_lora.bench.doctor.check.HEAD", (300, 32))
    monkeypatch.setattr(device, "trial_flops", lambda: 1e5)
    for slow, found in (("arithmetic", []), ("speed", ({}, []))):  # test_doctor.py has them
        monkeypatch.setattr(f"mlx_lora.bench.doctor.command.check_{slow}", lambda *here, found=found: found)
    ran = succeeds("doctor", "--no-hub", "--kernels", "--json")
    table = json.loads(ran.out)["kernels"]
    assert {(row["kernel"], row["chosen"]) for row in table} >= {("attention", MLX), ("cross-entropy", "tiles")}
    assert any(row["shape"] == "a vocabulary of 300 and width 32 (float)" for row in table)
    assert set(table[0]["candidates"]["mlx"]) >= {"seconds", "kept_bytes", "peak_bytes", "error", "correct"}
    shown = run("doctor", "--no-hub", "--kernels").out
    dtype = str(device.compute_dtype()).rpartition(".")[2]
    assert "attention mlx in 2" in shown
    marked = [
        line for line in shown.splitlines() if line.startswith(f"* attention, 128 keys, 4/2 heads of 16, {dtype}")
    ]
    assert len(marked) == 1
    assert " mlx " in marked[0]


@pytest.mark.parametrize("kind", ["qwen3_5", "mamba2"])
def test_a_recurrence_runs_in_the_form_that_was_chosen(kind, own_cache, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    model = recurrent_model(kind)[0] if kind == "mamba2" else tiny_architecture(kind)
    ids = mx.arange(1, 41)[None]
    expected, name = model(ids), {"qwen3_5": "gated delta", "mamba2": "state space"}[kind]
    choice = choose_model_kernels(model, [40], "auto", mx.float32)
    [(_, shape)] = [key for key in choice.classes if key[0] == name]
    ours = choice.classes[name, shape]
    assert f"{ours} {name} (not measured)" in choice.describe()
    fast = {one: Figures(1.0 if one == ours else 1e-3, 10, 20, 10, 0.0, 1e-4) for one in ROWS[name].candidates}
    keep_figures(figures_key(name, shape, mx.float32), fast)
    other = choose_model_kernels(model, [40], "auto", mx.float32)
    assert other.classes[name, shape] == MLX
    for one in (choice, other):
        with training_kernels(model, choose=one):
            assert np.allclose(model(ids), expected, atol=1e-4)


FAST_PATH_TOLERANCE = 1e-5
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
    return Batch.of(whole.inputs, whole.targets, mask, whole.mask.size)


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
    assert difference(fast(name, which()), expected) < FAST_PATH_TOLERANCE
    assert difference(fast(name, which(), scale=1.001), expected) > 10 * FAST_PATH_TOLERANCE  # of a slightly wrong head


@pytest.mark.parametrize("mode", by_default(["selective", "block", "2"], "selective", "block"))
@pytest.mark.parametrize("name", ["tied", "4-bit, tied", "soft cap"])
def test_so_do_checkpointed_ones(name, mode):
    which = BATCHES["half trained"]()
    assert difference(fast(name, which, mode), plain(name, which)) < FAST_PATH_TOLERANCE
