"""Golden runs: the working tree computes what the commit in golden/BASE does, bit for bit, and another rate is seen.

The long form is `make golden`. A change that is meant to change results names its own commit in golden/BASE.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from golden.__main__ import main
from golden.cases import CASES
from golden.differences import ROOT, NoTreeError, base_commit, described, differences, incomparable, unpacked
from golden.recording import read_case, record


@pytest.fixture(scope="module")
def now():
    """The recording of the working tree."""
    return record(ROOT)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The recording of the commit in golden/BASE, or of the tree that MLX_LORA_GOLDEN_TREE names."""
    if given := os.environ.get("MLX_LORA_GOLDEN_TREE"):
        return record(Path(given))
    try:
        tree = unpacked(base_commit(), tmp_path_factory.mktemp("base"))
    except NoTreeError as error:
        pytest.skip(str(error))
    return record(tree)


@pytest.mark.slow
def test_the_working_tree_computes_what_the_base_does(before, now):
    assert not incomparable(before, now)
    found = differences(before, now)
    assert not found, described(found, len(CASES))


@pytest.mark.slow
def test_another_learning_rate_changes_the_adapter_of_each_case(now):
    """A case that does not see this would see nothing."""
    other = record(ROOT, perturb="learning_rate")
    found = [one for one in differences(now, other) if one.place.startswith("run/adapters.safetensors ")]
    assert {one.case for one in found} == {*CASES}
    assert not [name for name, case in other["cases"].items() if case["problems"]]


def made(folder: Path) -> Path:
    """Write what a run leaves."""
    (folder / "run" / "checkpoints" / "step-000004").mkdir(parents=True)
    arrays = {"layer.lora_a": mx.arange(6, dtype=mx.float32).reshape(2, 3), "random": mx.array([1, 2], mx.uint32)}
    for file in ("adapters.safetensors", "checkpoints/step-000004/state.safetensors"):
        mx.save_safetensors(str(folder / "run" / file), arrays, {"made": str(folder)})
    lines = [{"step": n, "loss": 1.0 / n, "tokens_per_s": id(folder), "elapsed_s": 0.5} for n in (1, 2)]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, memory_bytes in (("plan-here", id(folder)), ("plan-chip", 16)):
        plan = {
            "fits": True,
            "parts": {"base": 5},
            "machine": {"memory_bytes": memory_bytes},
            "warnings": [str(folder)],
        }
        (folder / f"{name}.json").write_text(json.dumps(plan))
    return folder


def recorded(folder: Path) -> dict:
    """Return a recording with one case."""
    case = read_case(folder, CASES["sft-float"], [])
    return {"machine": {"processor": "x"}, "inputs": {"a": "1"}, "cases": {"sft-float": case}}


def test_one_changed_digit_is_named_by_case_file_and_key(tmp_path):
    old, folder = recorded(made(tmp_path / "old")), made(tmp_path / "new")
    assert not differences(old, recorded(folder))  # neither a file's metadata, speed, this machine's memory nor texts
    weights = folder / "run" / "checkpoints" / "step-000004" / "state.safetensors"
    arrays = mx.load(str(weights))
    arrays["random"] = mx.array([1, 3], mx.uint32)
    mx.save_safetensors(str(weights), arrays)
    metrics, plan = folder / "run" / "metrics.jsonl", folder / "plan-here.json"
    metrics.write_text(metrics.read_text().replace('"loss": 0.5', '"loss": 0.5000000000000001'))
    plan.write_text(plan.read_text().replace('"base": 5', '"base": 6'))
    assert [(one.case, one.place) for one in differences(old, recorded(folder))] == [
        ("sft-float", "run/checkpoints/step-000004/state.safetensors random"),
        ("sft-float", "run/metrics.jsonl line 2 loss"),
        ("sft-float", "plan-here parts.base"),
    ]


def test_what_is_missing_or_failed_is_a_difference(tmp_path):
    old = recorded(made(tmp_path / "a"))
    for change in (
        lambda case: case["arrays"].pop("run/adapters.safetensors"),
        lambda case: case["metrics"]["run/metrics.jsonl"].pop(),
        lambda case: case["plans"].clear(),
        lambda case: case["problems"].append("ended with 1"),
    ):
        new = copy.deepcopy(old)
        change(new["cases"]["sft-float"])
        assert differences(old, new)
        assert differences(new, old)
    assert differences(old, {**old, "cases": {}})
    assert not incomparable(old, old)
    assert incomparable(old, {**old, "machine": {"processor": "y"}})
    assert incomparable(old, {**old, "inputs": {}})


def test_a_resumed_run_that_differs_is_a_problem(tmp_path):
    folder, case = made(tmp_path / "a"), CASES["accumulation"]
    assert case.resumed
    assert read_case(folder, case, [])["problems"] == []
    made(tmp_path / "b")
    (tmp_path / "b" / "run").rename(folder / "resumed")
    (folder / "resumed" / "metrics.jsonl").write_text("")
    assert len(read_case(folder, case, [])["problems"]) == 1


def test_two_recordings_are_compared_by_the_command(tmp_path):
    old = recorded(made(tmp_path / "a"))
    new = copy.deepcopy(old)
    new["cases"]["sft-float"]["plans"]["plan-here"]["parts.base"] = 7
    other = {**old, "machine": {"processor": "y"}}
    for name, content in (("old", old), ("new", new), ("other", other)):
        (tmp_path / name).write_text(json.dumps(content))
    ran = {
        name: CliRunner().invoke(main, ["compare", str(tmp_path / "old"), str(tmp_path / name)])
        for name in ("old", "new", "other")
    }
    assert {name: one.exit_code for name, one in ran.items()} == {"old": 0, "new": 1, "other": 2}
    assert "sft-float: plan-here parts.base: 5 -> 7" in ran["new"].output
