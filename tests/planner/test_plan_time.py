"""How long a run takes, by the plan: the same by --epochs and by --iters, and by the batches that the data really has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_cli import run

BATCH = ("--batch-size", 4, "--valid-fraction", 0, "--max-seq-length", 512)


@pytest.fixture(scope="module")
def unlike(tmp_path_factory) -> Path:
    """Forty short rows and a long one."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": f"Say {n}.", "output": "abc" * (400 if n == 7 else 2)} for n in range(41)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def planned(model: Path, data: Path, *more: object) -> dict:
    ran = run("plan", "--model", model, "--data", data, *BATCH, *more, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


@pytest.mark.parametrize("more", [(), ("--grad-accumulation-steps", 2), ("--num-layers", 1)])
def test_epochs_and_as_many_iters_have_the_same_plan(tiny_folder, unlike, more):
    by_epochs = planned(tiny_folder, unlike, "--epochs", 6, *more)
    by_iters = planned(tiny_folder, unlike, "--iters", by_epochs["steps"], *more)
    assert by_iters["predicted"]["hours"] == pytest.approx(by_epochs["predicted"]["hours"], rel=0.05)
    assert (by_iters["trunk"] is None) == (more != ("--num-layers", 1))
    if by_iters["trunk"]:
        assert by_iters["trunk"]["kept"] == by_epochs["trunk"]["kept"]
        assert by_iters["trunk"]["saved_s"] == pytest.approx(by_epochs["trunk"]["saved_s"], rel=0.05)
    twice = planned(tiny_folder, unlike, "--iters", 2 * by_epochs["steps"], *more)["predicted"]["hours"]
    assert twice > 1.5 * by_iters["predicted"]["hours"]
    # Not as long as if each batch had the longest row.
    full = by_epochs["steps"] * by_epochs["predicted"]["step_s"] / 3600
    assert by_iters["predicted"]["hours"] < 0.7 * full


def test_the_flag_that_decides_the_batch_is_named(tiny_folder, unlike):
    said = run("plan", "--model", tiny_folder, "--data", unlike, *BATCH, "--iters", 4).out
    assert "--batch-size 4 (" in said
    assert "--batch-tokens" not in next(line for line in said.splitlines() if line.startswith("Chosen"))
    said = run("plan", "--model", tiny_folder, "--data", unlike, "--batch-tokens", 64, "--iters", 4).out
    assert "--batch-tokens 64 (" in said
