"""benchmarks/: figures from records, agreement before speed, and whole comparisons on the tiny model."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, tiny_model

from mlx_lora.adapters.inject import inject
from mlx_lora.adapters.targets import select_targets

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def step(end_s: float, supervised: int, shape: tuple[int, int], real: int = 90) -> dict:
    return {"end_s": end_s, "supervised": supervised, "real": real, "positions": shape[0] * shape[1], "shape": shape}


# --- figures


def test_first_step_and_retraces_are_kept_apart(module):
    steps = [
        step(10.0, 50, (2, 50)),
        step(12.0, 60, (2, 50)),
        step(16.0, 80, (1, 100)),  # a new shape: slow
        step(18.0, 70, (1, 100)),
    ]
    figures = module("_figures").run_figures(steps, first_step_s=13.0)
    assert figures["supervised_tokens_per_s"] == pytest.approx((60 + 80 + 70) / 8)
    assert figures["steady_tokens_per_s"] == pytest.approx((60 + 70) / 4)
    assert figures["whole_tokens_per_s"] == pytest.approx((50 + 60 + 80 + 70) / (13 + 8))
    assert figures["padding_fraction"] == pytest.approx(1 - 270 / 300)
    assert (figures["counted_steps"], figures["steady_steps"], figures["shapes"]) == (3, 2, 2)


def test_one_steady_step_is_no_figure(module):
    figures = module("_figures").run_figures([step(1, 5, (1, 9)), step(2, 5, (1, 9)), step(3, 5, (1, 8))], 1)
    assert figures["steady_tokens_per_s"] is None


def test_one_step_is_refused(module):
    with pytest.raises(ValueError, match="two steps"):
        module("_figures").run_figures([step(1.0, 5, (1, 9))], 1.0)


def test_our_metrics_become_steps_with_their_own_counts(module):
    counts = {"supervised_tokens": 757, "real_tokens": 951, "positions": 1024, "shapes": ["4x256"]}
    nothing = {"supervised_tokens": 0, "real_tokens": 0, "positions": 0, "shapes": []}
    records = [
        {"elapsed_s": 1.0, "loss": None, **nothing},  # a validation
        {"elapsed_s": 2.0, "loss": 3.5, **counts},
        {"elapsed_s": 4.0, "loss": None, **counts},  # a skipped step: it took its time all the same
        {"elapsed_s": 5.0, "loss": 3.0, **counts, "shapes": ["2x512", "4x256"]},
    ]
    steps = module("_figures").steps_from_metrics(records)
    assert [step["end_s"] for step in steps] == [2.0, 4.0, 5.0]
    assert steps[0] == {
        "end_s": 2.0, "loss": 3.5, "supervised": 757, "real": 951, "positions": 1024, "shape": ["4x256"]
    }  # fmt: skip
    assert math.isnan(steps[1]["loss"])
    figures = module("_figures").run_figures(steps, first_step_s=1.0)
    assert figures["supervised_tokens_per_s"] == pytest.approx(2 * 757 / 3)
    assert figures["shapes"] == 2


def test_ratios_pair_rounds(module):
    ratio = module("_figures").paired_ratio([20.0, 30.0, 44.0], [10.0, 10.0, 11.0])
    assert (ratio["median"], ratio["min"], ratio["max"]) == (3.0, 2.0, 4.0)
    assert module("_figures").paired_ratio([None], [10.0]) is None


# --- agreement


def found(loss_sum: float, count: int = 100, same_ids: bool = True) -> dict:
    return {"loss_sum": loss_sum, "count": count, "same_ids": same_ids, "notes": ["other ids"]}


def test_equal_losses_agree(module):
    module("versus").check_agreement({"a": found(300.0), "b": found(300.2)}, "a")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (found(301.0), "loss sum"),
        (found(float("nan")), "loss sum"),
        (found(300.0, count=101), "101 tokens"),
        (found(300.0, same_ids=False), "other ids"),
    ],
)
def test_other_work_is_refused(module, other, words):
    versus = module("versus")
    with pytest.raises(versus.Disagreement, match=words):
        versus.check_agreement({"a": found(300.0), "b": other}, "a")


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sides", "mlx_lora,nothing"], "nothing"),
        (["--sides", "mlx_lora"], "--reference"),
        (["--steps", "1"], "--steps 1"),
    ],
)
def test_bad_arguments_are_refused(module, arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        module("versus").arguments(["--model", "m", "--data", "d", *arguments])
    assert words in capsys.readouterr().err


def test_sides_that_cannot_run_say_why(module):
    sides = module("_sides")
    assert sides.why_skipped(sides.SIDES["peft-packed"], quantized=True, pythons={})
    assert sides.why_skipped(sides.SIDES["unsloth-zoo"], quantized=False, pythons={})
    assert sides.why_skipped(sides.SIDES["mlx-lm"], quantized=True, pythons={}) is None


# --- whole comparisons, in fresh processes


def run_versus(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "versus.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "4bit", "text"])
def test_compares_us_with_mlx_lm(kind, tiny_folder, tiny_4bit_folder, chats, tmp_path):
    model = tiny_4bit_folder if kind == "4bit" else tiny_folder
    out = tmp_path / "out.json"
    extra = ["--as-text"] if kind == "text" else []
    common = ["--rounds", 1, "--steps", 3, "--batch-tokens", 256, "--rank", 4, "--out", out]
    ran = run_versus("--model", model, "--data", chats, *common, *extra)
    assert ran.returncode == 0, ran.stderr
    last = json.loads(ran.stdout.strip().splitlines()[-1])
    result = json.loads(out.read_text())
    assert last["summary"] == result["summary"]
    assert {"versions", "commit", "date", "cores", "removed_variables", "arguments", "command_line"} <= set(result)
    assert {"prepared", "checks", "skipped", "regimes", "rounds", "tolerance"} <= set(result)
    ours, theirs = (result["checks"][name] for name in ("mlx_lora", "mlx-lm"))
    assert ours["count"] == theirs["count"] == result["prepared"]["check_supervised_tokens"]
    assert ours["loss_sum"] == pytest.approx(theirs["loss_sum"], rel=1e-4)
    assert theirs["own_count"] >= theirs["count"] + 8  # a padding token per row, which we do not count
    for name in ("mlx_lora", "mlx-lm"):
        (only,) = result["rounds"][name]
        assert len(only["steps"]) == 3
        assert all(s["shape"] for s in only["steps"])
        assert all(0 < s["supervised"] <= s["real"] <= s["positions"] for s in only["steps"])
        assert only["peak_allocator_bytes"] > 0
        assert only["peak_process_bytes"] > only["peak_allocator_bytes"]
        assert 0 < only["first_step_s"] < only["process_s"]
    assert result["summary"]["mlx-lm"]["ratio"]["supervised_tokens_per_s"]["median"] == 1.0
    assert result["checks"]["mlx-lm"]["facts"]["blas"] == result["prepared"]["blas"]["name"]


@pytest.mark.slow
def test_another_adapter_is_noticed(module, tiny_folder, chats, tmp_path):
    sides, versus = module("_sides"), module("versus")
    args = versus.arguments(["--model", str(tiny_folder), "--data", str(chats), "--steps", "2", "--rank", "4"])
    bench = versus.make_bench(args, tmp_path)
    sides.prepare(bench, args.data, args.rows, args.as_text, args.seed)
    right, wrong = tmp_path / "perturbed.safetensors", tmp_path / "initial.safetensors"
    theirs = sides.check_loss(bench, sides.SIDES["mlx-lm"], right)
    versus.check_agreement(
        {"mlx-lm": theirs, "mlx_lora": sides.check_loss(bench, sides.SIDES["mlx_lora"], right)}, "mlx-lm"
    )
    with pytest.raises(versus.Disagreement, match="mlx_lora: loss sum"):
        versus.check_agreement(
            {"mlx-lm": theirs, "mlx_lora": sides.check_loss(bench, sides.SIDES["mlx_lora"], wrong)}, "mlx-lm"
        )


@pytest.mark.slow
@pytest.mark.parity
def test_peft_sides_compute_the_same_loss(tiny_folder, chats, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "out.json"
    names = "mlx-lm,peft-padded,peft-packed,peft-grouped"
    ran = run_versus(
        "--model", tiny_folder, "--data", chats, "--sides", names, "--rounds", 1, "--steps", 2, "--out", out
    )
    assert ran.returncode == 0, ran.stderr
    checks = json.loads(out.read_text())["checks"]
    assert set(checks) == set(names.split(","))
    for check in checks.values():
        assert check["loss_sum"] == pytest.approx(checks["mlx-lm"]["loss_sum"], rel=1e-4)


@pytest.mark.slow
def test_scaling_measures_its_curves(tmp_path):
    out = tmp_path / "scaling.json"
    command = [sys.executable, BENCHMARKS / "scaling.py", "--vary", "rank", "--hidden", "128", "--layers", "1"]
    ran = subprocess.run([*map(str, command), "--steps", "2", "--out", str(out)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    curve = json.loads(out.read_text())["curves"]["rank"]
    assert [row["rank"] for row in curve] == [4, 8, 32, 128]
    assert all(row["step_s"] > 0 and row["peak_allocator_bytes"] > row["weights_bytes"] for row in curve)
    # More rank, more memory: the points are not one point measured four times.
    assert curve[-1]["peak_allocator_bytes"] > curve[0]["peak_allocator_bytes"]


def test_a_steps_operations_are_counted_by_hand(module):
    model = tiny_model()
    inject(model, select_targets(model).paths, 4, 2.0)
    parts = module("_counts").count_step(model, TINY, rows=3, width=10, supervised=20)
    # Per block: q and o 64 x 64, k and v 64 x 32, gate, up and down 64 x 96; two blocks, 30 tokens.
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    sides = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert parts["products with base weights"].flops == 4 * weights * 30
    assert parts["products with base weights"].moved_bytes == 2 * 2 * (30 * sides + weights)
    assert parts["adapter branch"].flops == 6 * sides * 4 * 30
    assert (
        parts["attention"].flops == 7 * 2 * (3 * 4 * 10 * 10 / 2) * 16 * 2
    )  # products, rows x heads x half, d, blocks
    assert parts["loss"].flops == 4 * 20 * 288 * 64


def test_a_part_takes_the_longer_of_computing_and_moving(module):
    count = module("_counts").Count(flops=2e12, moved_bytes=1e9)
    assert count.seconds(tflops=1, gb_per_s=1) == 2
    assert count.seconds(tflops=4, gb_per_s=1) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_profile_times_and_counts_a_step(mode, tiny_folder):
    command = [sys.executable, BENCHMARKS / "profile_step.py", "--model", tiny_folder, "--width", "70"]
    ran = subprocess.run(
        [*map(str, command), "--rounds", "2", "--checkpointing", mode], capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.strip().splitlines()[-1])
    assert result["step_s"] > 0 < result["peak_bytes"]
    assert result["counts"].keys() - result["parts_s"].keys() == {"residuals"}
    assert result["operations"]["Matmul"] > 2 * 7 * 4  # blocks, layers, products with weights and factors


# --- parity with PEFT


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_curves_beside_pefts(module, tiny_folder, chats, capsys):
    pytest.importorskip("peft")
    flags = {"--steps": 12, "--batch-tokens": 256, "--learning-rate": 5e-3, "--methods": "lora,dora"}
    words = [str(word) for pair in flags.items() for word in pair]
    script = module("parity_peft")
    code = script.main(["--model", str(tiny_folder), "--data", str(chats), "--float64", *words])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (code, result["good"]) == (0, True), result
    for run in result["results"]:
        assert run["comparisons"].keys() == {"ours, PEFT", "ours, float64", "PEFT, float64"}
        assert run["losses"][-1] < 0.9 * run["losses"][0]


def test_a_curve_or_an_adapter_apart_is_no_parity(module):
    pytest.importorskip("peft")
    script = module("parity_peft")
    initial = {name: np.ones(3) for name in ("a", "b")}
    wanted = script.Run(np.array([2.0, 1.0]), {"a": np.array([2.0, 1, 1]), "b": np.array([1.0, 3, 1])}, 0.0)
    assert script.compare(wanted, wanted, initial).good
    later = script.compare(script.Run(np.array([2.0, 1.001]), wanted.adapter, 0.0), wanted, initial)
    assert (later.good, later.step, later.loss) == (False, 2, pytest.approx(1e-3))
    turned = script.compare(script.Run(wanted.losses, {**wanted.adapter, "b": np.ones(3)}, 0.0), wanted, initial)
    assert (turned.good, turned.tensor) == (False, "b")
    assert not script.compare(script.Run(np.array([2.0, np.nan]), wanted.adapter, 0.0), wanted, initial).good


@pytest.mark.slow
def test_planned_peaks_lie_beside_measured_ones(module, tiny_folder, tmp_path, capsys):
    script = module("plan_memory")
    out = tmp_path / "measured.jsonl"
    few = ["--lengths", "64", "--ranks", "4", "--checkpointing", "block", "--batch-tokens", "128", "--iters", "1"]
    measure = ["measure", "--model", f"tiny={tiny_folder}", "--out", str(out), *few]
    assert script.main(measure) == script.main(measure) == 0
    (case,) = script.read_measured(out)  # the second call found it there
    assert case["peak_memory_bytes"] > 0
    assert script.main(["table", "--out", str(out)]) == 0
    assert f"| {case['peak_memory_bytes'] / 1e6:.0f} |" in capsys.readouterr().out


def test_published_figures_lie_beside_predictions(module, capsys):
    assert module("plan_published").main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| m")]
    assert len(rows) == len(module("plan_published").FIGURES)
