"""benchmarks/: figures from records, agreement before speed, whole comparisons on the tiny model, and the performance gate."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, tiny_model
from refusing import refuses

from mlx_lora.adapters.inject import inject, select_targets

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a module of benchmarks/, which is no package. --quick sets the number of threads for its children."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # undone even if it was not set
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
    assert module("_figures").run_figures(steps[:3], 13.0)["steady_tokens_per_s"] is None  # of one steady step
    refuses("two steps", module("_figures").run_figures, steps[:1], 13.0, kind=ValueError)


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
    assert (figures["supervised_tokens_per_s"], figures["shapes"]) == (pytest.approx(2 * 757 / 3), 2)


def test_ratios_pair_rounds(module):
    ratio = module("_figures").paired_ratio([20.0, 30.0, 44.0], [10.0, 10.0, 11.0])
    assert (ratio["median"], ratio["min"], ratio["max"]) == (3.0, 2.0, 4.0)
    assert module("_figures").paired_ratio([None], [10.0]) is None


def test_sides_take_turns_and_the_first_turn_is_not_counted(module):
    order = []

    def turn(side: str):
        def run(number: int) -> dict:
            order.append(side)
            return {"round": number}

        return run

    turns = {"a": turn("a"), "b": turn("b")}
    found = module("_harness").take_turns(turns, 3, warm=True)
    assert "".join(order) == "baabbaab"
    assert found == {side: [{"round": 1}, {"round": 2}, {"round": 3}] for side in turns}
    order.clear()
    module("_harness").take_turns(turns, 2, swap=False)
    assert "".join(order) == "abab"


# --- agreement


def found(loss_sum: float, count: int = 100, same_ids: bool = True) -> dict:
    return {"loss_sum": loss_sum, "count": count, "same_ids": same_ids, "notes": ["other ids"]}


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
    refuses(words, versus.check_agreement, {"a": found(300.0), "b": other}, "a", kind=versus.Disagreement)


@pytest.mark.parametrize("coarse", ["bfloat16", "float16", "float32"])
def test_sixteen_bits_may_differ_more(module, coarse):
    figures, versus = module("_figures"), module("versus")
    exact = {**found(300.0), "facts": {"dtypes": ["float32"]}}
    other = {**found(300.0 * (1 + 2e-3)), "facts": {"dtypes": [coarse]}}
    if coarse == "float32":
        refuses("loss sum", versus.check_agreement, {"a": exact, "b": other}, "a", kind=versus.Disagreement)
        return
    assert versus.check_agreement({"a": exact, "b": other}, "a") == figures.TOLERANCE * figures.COARSER
    # But not as much as a factor that is lost, and not between two sides that compute in float32.
    lost, exact_too = {**other, "loss_sum": 300.0 * 1.02}, {**other, "facts": exact["facts"]}
    for sides, words in (
        ({"a": exact, "b": lost}, "loss sum"),
        ({"a": exact, "b": other, "c": exact_too}, "c: loss sum"),
    ):
        refuses(words, versus.check_agreement, sides, "a", kind=versus.Disagreement)


# --- where torch computes


class Torch:
    """What torch_place asks of torch, on a machine with some GPU or none."""

    __version__ = "9"
    float32, bfloat16 = "torch.float32", "torch.bfloat16"

    def __init__(self, *gpus: str):
        mps = SimpleNamespace(is_available=lambda: "mps" in gpus)
        self.backends = SimpleNamespace(mps=mps, mkl=SimpleNamespace(is_available=lambda: True))
        self.cuda = SimpleNamespace(is_available=lambda: "cuda" in gpus)
        self.get_num_threads = lambda: 4
        self.autocast = lambda device_type, dtype: (device_type, dtype)


@pytest.fixture
def torch_place(module, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "sides"))
    return module("torch_place").torch_place


@pytest.mark.parametrize(
    ("gpus", "asked", "device", "dtype"),
    [
        ((), ("auto", "auto"), "cpu", "float32"),
        (("mps",), ("auto", "auto"), "mps", "bfloat16"),
        (("cuda",), ("auto", "auto"), "cuda", "bfloat16"),
        (("mps",), ("cpu", "auto"), "cpu", "float32"),
        (("mps",), ("mps", "float32"), "mps", "float32"),
        ((), ("cpu", "bfloat16"), "cpu", "bfloat16"),
    ],
)
def test_torch_computes_where_and_in_what_ours_does(torch_place, gpus, asked, device, dtype):
    place = torch_place(Torch(*gpus), *asked)
    assert (place.device, place.dtype, place.facts()["device"]) == (device, dtype, device)
    assert place.facts()["dtypes"] == [dtype]
    if dtype == "bfloat16":
        assert place.computing() == (device, "torch.bfloat16")
    else:
        with place.computing():
            pass


def test_a_device_that_torch_does_not_find_is_refused(torch_place):
    refuses(r"--torch-device mps.*cuda, cpu", torch_place, Torch("cuda"), "mps", kind=ValueError)


# --- preferences


def pair_step(end_s: float, pairs: int, shape: tuple[int, int]) -> dict:
    return {**step(end_s, 10 * pairs, shape), "pairs": pairs}


def test_pairs_are_counted_with_and_without_the_reference(module):
    steps = [pair_step(9.0, 2, (4, 50)), pair_step(11.0, 2, (4, 50)), pair_step(16.0, 1, (2, 90))]
    steps += [pair_step(17.0, 2, (4, 50))]
    figures = module("_figures").pair_figures(steps, first_step_s=12.0, pairs=40, reference_s=16.0)
    assert figures["pairs_per_s"] == pytest.approx(5 / 8)
    assert figures["steady_pairs_per_s"] == pytest.approx(4 / 3)
    assert figures["pairs_per_s_with_reference"] == pytest.approx(40 / (64 + 16))
    assert (figures["whole_pairs_per_s"], figures["counted_pairs"]) == (pytest.approx(7 / 20), 5)
    in_steps = module("_figures").pair_figures(steps, first_step_s=12.0, pairs=40, reference_s=0.0)
    assert in_steps["pairs_per_s_with_reference"] == pytest.approx(in_steps["pairs_per_s"])


def curve(*losses: float, chosen: float = -90.0, accuracy: float = 1.0) -> dict:
    values = {"chosen_logps": [chosen, chosen + 5], "rejected_logps": [-120.0, -130.0], "accuracy": [0.0, accuracy]}
    return {"losses": list(losses), **values, "notes": [], "facts": {}}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (curve(0.6945, 0.45), "first loss 0.694500"),
        (curve(0.69315, 0.69315), "its loss goes from 0.6932 to 0.6932"),
        (curve(0.69315, 0.46), "losses .*: 1.0e-02 apart, 0.002 allowed"),
        (curve(0.69315, float("nan")), "its loss goes from 0.6932 to nan"),
        (curve(0.69315), "its loss goes"),
        (curve(0.69315, 0.45, chosen=-90.5), "chosen_logps"),
    ],
)
def test_other_steps_are_refused(module, other, words):
    figures = module("_figures")
    refuses(
        f"b: {words}", figures.check_curves, {"a": curve(0.69315, 0.45), "b": other}, "a", kind=figures.Disagreement
    )


def test_our_reference_is_timed_from_what_the_run_says(module):
    sides = module("_sides")
    log = "Reference: 120 of 1,200 answers\nReference: 1,200 answers computed in 20.50 s\n"
    assert sides.reference_seconds(log + "Reference: 8 answers computed in 0.25 s\n") == 20.75
    again = "Reference: 1,200 answers from an earlier run\n"
    refuses("computed the reference", sides.reference_seconds, again, kind=module("_harness").ChildFailed)


def test_a_round_has_our_cache_without_the_reference(module, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "real"))
    for name in ("blas", "reference"):
        (tmp_path / "real" / name).mkdir(parents=True)
        (tmp_path / "real" / name / "kept").write_text("")
    for _ in range(2):  # the second finds what the first left in the same folder
        with module("_sides").cache_without_reference(tmp_path / "own") as variables:
            assert variables == {"MLX_LORA_CACHE": str(tmp_path / "own")}
            assert (tmp_path / "own/blas/kept").exists()
            assert not list(tmp_path.glob("own/reference/*"))
            (tmp_path / "own/reference").mkdir(exist_ok=True)
            (tmp_path / "own/reference/new").write_text("")
    assert [path.name for path in tmp_path.glob("real/reference/*")] == ["kept"]


def test_a_side_that_fails_is_left_out_unless_all_are_compared_with_it(module):
    versus, failed = module("versus"), module("_harness").ChildFailed
    args = versus.arguments(["--model", "m", "--data", "d", "--objective", "dpo"])
    ours, trl = (args.table[name] for name in ("mlx_lora", "trl"))
    sides, skipped = [ours, trl], {}
    with versus.failing(args, trl, sides, skipped):
        raise failed("ended with code 1:\n  no memory")
    assert (sides, skipped) == ([ours], {"trl": "failed: no memory"})
    with pytest.raises(failed), versus.failing(args, ours, sides, skipped):
        raise failed("ended")


def test_what_needs_pairs_is_told_apart(module):
    versus = module("versus")
    common = ["--model", "m", "--data", "d"]
    args = versus.arguments([*common, "--objective", "dpo", "--variant", "wide=--batch-tokens 4096"])
    assert args.sides == [
        "mlx_lora", "mlx-lm-lora", "unsloth-zoo", "unsloth-zoo-precomputed", "trl", "trl-precomputed", "mlx_lora-wide",
    ]  # fmt: skip
    assert args.table["mlx_lora-wide"].flags == ("--batch-tokens", "4096")
    assert (args.reference, args.batch_size, args.seconds) == ("mlx_lora", 2, 60)
    args = versus.arguments(common)
    assert (args.sides, args.reference, args.batch_size) == (["mlx_lora", "mlx-lm"], "mlx-lm", 4)


# --- the command line


DPO = ["--objective", "dpo"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--check"], "--check: only with --quick"),
        ([], "--model and --data are required"),
        (["--quick", "--steps", "5"], "--steps: --quick fixes it"),
        (["--quick", "--rounds", "1"], "a spread needs 2"),
        (["--quick", "--record", "--ours=--rank 2"], "--ours with --record"),
        (["--sides", "mlx_lora,nothing"], "nothing"),
        (["--sides", "mlx_lora"], "--reference"),
        (["--steps", "1"], "--steps 1"),
        (["--passes", "1"], "--passes 1"),
        (["--objective", "dpo", "--passes", "0"], "--passes 0"),
        (["--objective", "dpo", "--sides", "mlx-lm"], "mlx-lm"),
        (["--objective", "dpo", "--variant", "wide"], "NAME=FLAGS"),
        (["--objective", "dpo", "--variant", "pairs=--rank 2"], "already"),
        (["--objective", "dpo", "--python", "peft-padded=/x"], "--python peft-padded=/x"),
        (["--objective", "dpo", "--as-text"], "--as-text"),
        (["--variant", "wide=--rank 2"], "--objective dpo"),
        (["--torch-device", "gpu"], "--torch-device"),
    ],
)
def test_bad_arguments_are_refused(module, arguments, words, capsys):
    data = [] if not arguments or {"--quick", "--check"} & set(arguments) else ["--model", "m", "--data", "d"]
    with pytest.raises(SystemExit, match="2"):
        module("versus").arguments([*data, *arguments])
    assert words in capsys.readouterr().err


def test_sides_that_cannot_run_say_why(module):
    sides = module("_sides")
    assert sides.why_skipped(sides.SIDES["peft-packed"], quantized=True, pythons={})
    assert sides.why_skipped(sides.SIDES["unsloth-zoo"], quantized=False, pythons={})
    assert sides.why_skipped(sides.SIDES["mlx-lm"], quantized=True, pythons={}) is None
    of_pairs = module("_sides").PAIR_SIDES
    assert sides.why_skipped(of_pairs["trl"], quantized=True, pythons={})
    assert "peers.py mlx-lm-lora" in sides.why_skipped(of_pairs["mlx-lm-lora"], quantized=True, pythons={})
    assert sides.why_skipped(of_pairs["mlx-lm-lora"], quantized=True, pythons={"mlx-lm-lora": "/x"}) is None


# --- whole comparisons, in fresh processes


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def last_line(name: str, *arguments: object) -> dict:
    """Run a script that must succeed, and return the JSON that it prints last."""
    ran = run_script(name, *arguments)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.strip().splitlines()[-1])


def compared(*arguments: object, out: Path) -> dict:
    """Compare sides in fresh processes, and return what is written."""
    last = last_line("versus.py", "--rounds", 1, *arguments, "--out", out)
    result = json.loads(out.read_text())
    assert last["summary"] == result["summary"]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "4bit", "text"])
def test_compares_us_with_mlx_lm(kind, tiny_folder, tiny_4bit_folder, chats, tmp_path):
    model = tiny_4bit_folder if kind == "4bit" else tiny_folder
    few = ["--steps", 3, "--batch-tokens", 256, "--rank", 4, *(["--as-text"] if kind == "text" else [])]
    result = compared("--model", model, "--data", chats, *few, out=tmp_path / "out.json")
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
    sides.prepare(bench, "rows", data=args.data, rows=args.rows, as_text=args.as_text, seed=args.seed)
    right, wrong = "perturbed", "initial"
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
    names = "mlx-lm,peft-padded,peft-packed,peft-grouped"
    asked = ["--model", tiny_folder, "--data", chats, "--sides", names, "--steps", 2]
    checks = compared(*asked, out=tmp_path / "out.json")["checks"]
    assert set(checks) == set(names.split(","))
    for check in checks.values():
        assert check["loss_sum"] == pytest.approx(checks["mlx-lm"]["loss_sum"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parity
def test_peft_in_bfloat16_computes_the_same_loss_within_its_rounding(tiny_folder, chats, tmp_path):
    pytest.importorskip("peft")
    asked = ["--model", tiny_folder, "--data", chats, "--steps", 2, "--torch-device", "cpu"]
    asked += ["--sides", "mlx-lm,peft-padded", "--torch-dtype", "bfloat16"]
    result = compared(*asked, out=tmp_path / "out.json")
    facts = result["checks"]["peft-padded"]["facts"]
    assert (facts["device"], facts["dtypes"]) == ("cpu", ["bfloat16"])
    sums = [check["loss_sum"] for check in result["checks"].values()]
    assert sums[0] != sums[1]
    assert sums[0] == pytest.approx(sums[1], rel=result["tolerance"])


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> Path:
    """Twelve pairs, and three records that are none."""
    path = tmp_path_factory.mktemp("preferences") / "pairs.jsonl"
    rows = [{"prompt": f"What is {n}?", "chosen": "It is " * (n + 1), "rejected": "No idea" * 3} for n in range(12)]
    rows += [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b"}]
    rows += [{"prompt": "long", "chosen": "b" * 900, "rejected": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_compares_runs_of_ours_on_pairs(tiny_folder, preferences, tmp_path):
    common = [*DPO, "--model", tiny_folder, "--data", preferences, "--rank", 4]
    common += ["--sides", "mlx_lora,mlx_lora-pairs", "--max-seq-length", 400]
    variant = ["--rows", 8, "--passes", 2, "--variant", "block=--grad-checkpoint block"]
    result = compared(*common, *variant, out=tmp_path / "out.json")
    assert result["prepared"]["pairs"] == 8
    assert sum(result["prepared"]["left_out"].values()) == 3
    assert set(result["rounds"]) == {"mlx_lora", "mlx_lora-pairs", "mlx_lora-block"}
    for (only,) in result["rounds"].values():
        assert sum(s["pairs"] for s in only["steps"]) >= 16
        assert only["pairs_per_s"] > only["pairs_per_s_with_reference"] > 0
        assert only["reference_s"] > 0
    assert {s["pairs"] for s in result["rounds"]["mlx_lora-pairs"][0]["steps"]} == {2}
    wrong = run_script("versus.py", *common, "--rounds", 1, "--steps", 2, "--variant", "wrong=--beta 0.5")
    assert wrong.returncode == 1
    assert "mlx_lora-wrong: losses" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parity
def test_trl_takes_the_same_steps(tiny_folder, preferences, tmp_path):
    pytest.importorskip("trl")
    asked = [*DPO, "--model", tiny_folder, "--data", preferences, "--rank", 4, "--steps", 2]
    result = compared(*asked, "--sides", "mlx_lora,trl,trl-precomputed", out=tmp_path / "out.json")
    ours = result["checks"]["mlx_lora"]["losses"]
    for name in ("trl", "trl-precomputed"):
        assert result["checks"][name]["losses"] == pytest.approx(ours, abs=1e-4)
        assert (result["summary"][name]["reference_s"]["median"] > 0) == (name == "trl-precomputed")


@pytest.mark.slow
def test_scaling_measures_its_curves(tmp_path):
    out = tmp_path / "scaling.json"
    ran = run_script("scaling.py", "--vary", "rank", "--hidden", 128, "--layers", 1, "--steps", 2, "--out", out)
    assert ran.returncode == 0, ran.stderr
    curve = json.loads(out.read_text())["curves"]["rank"]
    assert [row["rank"] for row in curve] == [4, 8, 32, 128]
    assert all(row["step_s"] > 0 and row["peak_allocator_bytes"] > row["weights_bytes"] for row in curve)
    # More rank, more memory: the points are not one point measured four times.
    assert curve[-1]["peak_allocator_bytes"] > curve[0]["peak_allocator_bytes"]


def test_a_steps_operations_are_counted_by_hand(module):
    model = tiny_model()
    inject(model, select_targets(model).paths, 4, 2.0)
    parts = module("profile_step").count_step(model, TINY, rows=3, width=10, supervised=20)
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_profile_times_a_step_and_counts_its_parts(mode, tiny_folder):
    asked = ["--model", tiny_folder, "--width", 70, "--rounds", 2, "--checkpointing", mode]
    result = last_line("profile_step.py", *asked)
    assert result["step_s"] > 0 < result["peak_bytes"]
    assert result["counts"].keys() - result["parts_s"].keys() == {"residuals"}


# --- parity with PEFT


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_curves_beside_pefts(module, tiny_folder, chats, capsys):
    pytest.importorskip("peft")
    flags = {"--steps": 12, "--batch-tokens": 256, "--learning-rate": 5e-3, "--methods": "lora,dora"}
    words = [str(word) for pair in flags.items() for word in pair]
    script = module("parity.peft_curves")
    code = script.main(["--model", str(tiny_folder), "--data", str(chats), "--float64", *words])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (code, result["good"]) == (0, True), result
    for run in result["results"]:
        assert run["comparisons"].keys() == {"ours, PEFT", "ours, float64", "PEFT, float64"}
        assert run["losses"][-1] < 0.9 * run["losses"][0]


def test_a_curve_or_an_adapter_apart_is_no_parity(module):
    pytest.importorskip("peft")
    script = module("parity.peft_curves")
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


@pytest.mark.slow
def test_published_figures_lie_beside_predictions(module, capsys, tmp_path):
    assert module("plan_published").main(["--picture", str(tmp_path / "published.png")]) == 0
    assert capsys.readouterr().out.count("\n| ") == len(module("plan_published").FIGURES)


def made(ratio: float, spread: float = 0.01, rounds: int = 5, seed: int = 0, **changes) -> dict:
    """An entry whose rounds' logarithms have exactly this mean and standard deviation."""
    draws = random.Random(seed)
    logs = [draws.gauss(0, 1) for _ in range(rounds)]
    mean = sum(logs) / rounds
    scale = spread / math.sqrt(sum((x - mean) ** 2 for x in logs) / (rounds - 1))
    ratios = [ratio * math.exp((x - mean) * scale) for x in logs]
    entry = {
        "date": "2026-11-26T15:00:00+0000", "commit": f"c{seed}", "cpu": "A CPU", "cores": 2, "backend": "cpu",
        "threads": "1", "versions": {"mlx": "1", "mlx-lm": "2"}, "workload": {"rows": 24}, "ratios": ratios,
        "tokens_per_s": {"mlx_lora": 40.0, "mlx-lm": 20.0}, "unsound": [],
    }  # fmt: skip
    return entry | changes


def test_a_fall_of_five_percent_is_seen_where_the_spread_is_one(module):
    history = module("history")
    earlier = [made(2.0, seed=n) for n in range(3)]
    verdict = history.compare(made(1.9, seed=9), earlier)
    assert verdict.fell
    assert not verdict.blind
    assert (verdict.change, verdict.compared) == (pytest.approx(-0.05), 3)
    assert history.words(verdict).startswith("FELL: -5.0% (")
    for same_or_better in (2.0, 2.1, 1.995):
        assert not history.compare(made(same_or_better, seed=9), earlier).fell


def test_what_a_wide_spread_hides_is_admitted(module):
    history = module("history")
    earlier = [made(2.0, 0.08, seed=n) for n in range(3)]
    verdict = history.compare(made(1.9, 0.08, seed=9), earlier)
    assert not verdict.fell
    assert verdict.blind
    assert verdict.sees > 0.1
    assert f"{verdict.rounds} rounds per entry would find one of 5%" in history.words(verdict)
    assert verdict.rounds == history.rounds_needed(0.08) > 30
    assert history.compare(made(1.2, 0.08, seed=9), earlier).fell, "a fall of 40% is seen all the same"
    assert history.compare(made(1.9, rounds=5), [made(2.0, rounds=2, spread=0.0001)]).fell
    assert math.isinf(history.Spread.of([2.0]).interval()[1])
    assert history.compare({**made(1.0), "ratios": [1.0]}, earlier).blind


def test_the_promise_of_nine_in_ten_holds(module):
    """Drawn by chance: falls of the size that a verdict says it sees are found about so often, and no falls rarely."""
    history, draws = module("history"), random.Random(3)

    def drawn(ratio: float, rounds: int) -> dict:
        return {**made(ratio), "ratios": [ratio * math.exp(draws.gauss(0, 0.03)) for _ in range(rounds)]}

    needed = history.rounds_needed(0.03)
    for fall, low, high in ((0.05, 0.82, 0.97), (0.0, 0.0, 0.09)):
        found = [
            history.compare(drawn(2 * (1 - fall), needed), [drawn(2.0, needed)]).fell for _ in range(400)
        ]  # fmt: skip
        assert low <= sum(found) / 400 <= high


def test_only_the_same_machine_versions_and_work_are_compared(module):
    history = module("history")
    entry = made(1.0)
    others = [
        made(2.0, cpu="Another"), made(2.0, versions={"mlx": "2", "mlx-lm": "2"}), made(2.0, workload={"rows": 12}),
        made(2.0, threads="2"), made(2.0, unsound=["busy"]),
    ]  # fmt: skip
    verdict = history.compare(entry, others)
    assert (verdict.change, verdict.compared, verdict.fell) == (None, 0, False)
    assert "no earlier entry" in history.words(verdict)
    assert history.compare(entry, [*others, made(2.0)]).fell
    assert history.compare(entry, [made(9.0), *(made(1.0, seed=n) for n in range(3))]).compared == 3


def written(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_the_table_flags_falls_and_check_exits_with_one(module, tmp_path, capsys):
    history = module("history")
    fine, fell = [made(2.0, seed=1), made(2.0, seed=2)], made(1.9, seed=3)
    path = written(tmp_path / "h.jsonl", [*fine, fell, made(2.0, 0.1, seed=4, unsound=["load average 9.0"])])
    assert history.main(["--history", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["FELL" in line for line in lines[2:6]] == [False, False, True, False]
    assert "unsound: load average 9.0" in lines[5]
    assert "at best" in lines[5]
    assert history.main(["--history", str(written(path, fine)), "--check"]) == 0
    assert history.main(["--history", str(written(path, [*fine, fell])), "--check"]) == 1
    assert history.main(["--history", str(written(path, [*fine, made(2.0, 0.1)])), "--check"]) == 1, "blind"
    assert history.main(["--history", str(tmp_path / "none"), "--check"]) == 0
    capsys.readouterr()
    path.write_text('{"ratios": [1.0]}\n')
    assert history.main(["--history", str(path)]) == 2
    assert "line 1: without " in capsys.readouterr().err


def test_the_committed_history_can_be_read(module):
    history = module("history")
    entries = history.read_history(history.HISTORY)
    assert history.table(entries).count("\n") == 1 + len(entries)


def made_result(speeds: dict[str, list[float]], share: float = 0.98, backend: str = "cpu", **arguments) -> dict:
    """A result of versus.py; `share` is the part of a core that each side got."""
    return {
        "date": "2026-11-26T15:00:00+0000", "commit": "abc", "cores": 2, "tolerance": 1e-3, "arguments": arguments,
        "versions": dict.fromkeys(("mlx", "mlx-lm", "python", "scipy-openblas32"), "1"),
        "prepared": {"device": {"backend": backend, "name": "Apple M4"}, "model_fingerprint": "m" * 64, "rows_fingerprint": "r" * 64},
        "checks": {name: {"loss_sum": 100.0} for name in speeds},
        "rounds": {
            name: [{"supervised_tokens_per_s": s, "tokens_per_cpu_s": s / share if backend == "cpu" else None} for s in values]
            for name, values in speeds.items()
        },
    }  # fmt: skip


SPEEDS = {"mlx_lora": [40.0, 41.0, 40.5, 40.2, 40.8], "mlx-lm": [20.0, 20.0, 20.0, 20.0, 20.0]}


@pytest.mark.parametrize(
    ("load", "share", "changed", "words"),
    [(0.1, 0.98, False, None), (3.0, 0.98, False, "load average 3.0"), (0.1, 0.5, False, "got 50% of a core"),
     (0.1, 0.98, True, "not committed")],
)  # fmt: skip
def test_a_busy_machine_and_a_changed_tree_are_not_recorded(module, tmp_path, monkeypatch, load, share, changed, words):
    quick, versus = module("_quick"), module("versus")
    monkeypatch.setattr(quick, "changed_tree", lambda: changed)
    path = tmp_path / "h.jsonl"
    args = versus.arguments(["--quick", "--record", "--history", str(path)])
    told, code = quick.finish(args, made_result(SPEEDS, share), load)
    assert path.exists() == (words is None)
    assert code == (words is not None)
    assert (words or "Recorded in") in told
    args.force = True
    told, code = quick.finish(args, made_result(SPEEDS, share), load)
    assert code == 0
    entry = module("history").read_history(path)[-1]
    assert bool(entry["unsound"]) == (words is not None)
    assert (entry["ratio"], entry["by"]) == (pytest.approx(2.025, abs=1e-3), "tokens_per_cpu_s")


def test_the_gate_is_shut_after_a_fall(module, tmp_path, monkeypatch):
    quick, versus = module("_quick"), module("versus")
    monkeypatch.setattr(quick, "changed_tree", lambda: False)
    path = tmp_path / "h.jsonl"
    record = versus.arguments(["--quick", "--record", "--check", "--history", str(path)])
    slower = {**SPEEDS, "mlx_lora": [0.94 * speed for speed in SPEEDS["mlx_lora"]]}
    told, code = quick.finish(
        versus.arguments(["--quick", "--check", "--history", str(path)]), made_result(SPEEDS), 0.0
    )
    assert (code, "Nothing to compare with" in told) == (1, True)
    assert quick.finish(record, made_result(SPEEDS), 0.0)[1] == 0
    assert quick.finish(record, made_result(SPEEDS), 0.0)[1] == 0
    check = versus.arguments(["--quick", "--check", "--history", str(path)])
    told, code = quick.finish(check, made_result(slower), 0.0)
    assert code == 1
    assert "FELL: -6.0%" in told
    assert len(path.read_text().splitlines()) == 2
    assert quick.finish(versus.arguments(["--quick", "--history", str(path)]), made_result(slower), 0.0)[1] == 0
    moved = quick.entry_of(made_result(SPEEDS, begun_at="abd"), 0.0)
    assert moved["unsound"] == ["the checkout was at abd when it began"]
    assert not quick.entry_of(made_result(SPEEDS, begun_at="abc"), 0.0)["unsound"]
    gpu = quick.entry_of(made_result(SPEEDS, backend="metal"), 0.0)
    assert (gpu["by"], gpu["cpu"], gpu["unsound"]) == ("supervised_tokens_per_s", "Apple M4", [])


def test_processor_time_is_that_of_the_child(module):
    processes = module("_harness")
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    found = processes.cpu_seconds(child.pid)
    child.communicate(b"\n")
    if sys.platform == "linux":
        assert 0.28 <= found < 3
    assert processes.cpu_seconds(2**30) is None


# --- what a GPU is asked for


def test_launches_bytes_and_operations_are_those_that_one_counts_by_hand(module):
    counts, graph = module("gpu_counts"), importlib.import_module("mlx_lora.models.graph")
    x, w = mx.zeros((512, 64), mx.bfloat16), mx.zeros((64, 256), mx.bfloat16)

    def function(x: mx.array, w: mx.array) -> list[mx.array]:
        y = x @ w
        return [mx.exp(y * 2).reshape(256, 512).T, mx.concatenate([y, y])]

    listed = graph.plain_graph(function, [x, w])
    of_y, of_both = 512 * 256 * 2, x.nbytes + w.nbytes
    compiled = {one.kind: one for one in counts.launches_of(listed)}
    assert compiled["product"] == ("product", of_both + of_y, 2 * 512 * 64 * 256, 2)
    assert compiled["copy"].nbytes == 2 * of_y  # and a view of the other result is none
    assert compiled["fused"].nbytes == pytest.approx(2 * of_y, abs=4)  # and the constant
    assert len(counts.launches_of(listed)) == 4
    # A product with a long sum and few results is divided, and added up by another launch.
    thin = graph.plain_graph(lambda a, b: [a.T @ b], [mx.zeros((4096, 16)), mx.zeros((4096, 64))])
    product, added = counts.launches_of(thin)
    assert (product.kind, added) == ("product", ("split-K sum", 2 * 32 * 4 * 16 * 64, 0.0, 4))

    both = graph.plain_graph(lambda x: [y := x * x + x, mx.exp(y)], [x])
    assert [len(counts.launches_of(both, compiled)) for compiled in (True, False)] == [1, 3]
    # Another trainer's kernel copies what is transposed, and writes two arrays at once.
    attend, q, v = module("_gpu_sides").own_kernel("mtp_flash_fwd"), mx.zeros((1, 4, 8, 64)), mx.zeros((1, 8, 4, 64))
    own = graph.plain_graph(lambda q, v: attend([q, v.swapaxes(1, 2)], [q.shape, q.shape[:-1]], [q.dtype] * 2), [q, v])
    assert [(one.kind, one.flops) for one in counts.launches_of(own)] == [("copy", 0), ("kernel", 4 * 64 * 4 * 36)]


def test_a_checkpointed_block_is_computed_again_from_its_input(module):
    counts, twice = module("gpu_counts"), module("_gpu_checkpoints")
    graph = importlib.import_module("mlx_lora.models.graph")
    block = lambda given, x: mx.exp(x @ given) @ given.T  # noqa: E731

    def function(varied: list[mx.array], fixed: list[mx.array]) -> list[mx.array]:
        x = twice.marked(block, varied[0], twice.marked(block, varied[0], fixed[0]))
        return [(x @ fixed[1]).sum()]

    w, x, head = (mx.zeros(shape, mx.bfloat16) for shape in ((64, 256), (512, 64), (64, 128)))
    once = graph.gradient_graph(function, [w], [x, head])
    products = [sum(one.kind == "product" for one in counts.launches_of(g)) for g in (once, twice.computed_twice(once))]
    # Of each block, the first product is needed again, to compute the exponential; the second and the head's are not.
    assert products[1] - products[0] == 2


@pytest.mark.long
def test_a_step_of_each_side_is_counted(module, capsys):
    counts = module("gpu_counts")
    assert counts.main(["--models", "smollm2-135m", "smollm2-135m-4bit", "--widths", "64", "--trained", "0.5"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| smollm2")]
    assert len(lines) == 4
    case = counts.Case("smollm2-135m", False, 256, 128)
    ours, theirs = (counts.counted(case, side) for side in ("mlx_lora", "mlx_lm.lora"))
    assert ours["trained_numbers"] == theirs["trained_numbers"] > 0
    assert (ours["host_syncs"], theirs["host_syncs"]) == (0, 1)
    # Forward and backward pass of all weights but the first block's inputs, and a head that only reads what is trained.
    weights = counts.MODELS["smollm2-135m"].parameters
    assert 0.8 * 4 * weights * 256 < ours["flops"] < theirs["flops"] < 1.3 * 4 * weights * 256
    assert ours["bytes"] < theirs["bytes"]
    fewer = counts.counted(counts.Case("smollm2-135m", False, 256, 32), "mlx_lora")
    assert fewer["flops"] < ours["flops"]
    assert all(0 < found["predicted_s"]["M4 Max"] < found["predicted_s"]["M1"] for found in (ours, theirs))
