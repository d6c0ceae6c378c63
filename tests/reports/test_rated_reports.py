"""A margin that there is nothing to take of is shown as nothing; and top_p 0 takes the likeliest token."""

from __future__ import annotations

import json
import math

import mlx.core as mx
from resumed_runs import metrics
from run_cli import run, succeeds

from mlx_lora.engine.engine import read_completion
from mlx_lora.models.generator import Sampler, Sampling


def test_ratings_of_one_kind_have_no_margin(tiny_folder, tmp_path):
    rows = [{"prompt": f"Q{n}", "completion": f" a{n}", "label": True} for n in range(8)]
    train, valid = ([{**row, "label": n % 2 == 0} for n, row in enumerate(rows)], rows[:2])
    folder = tmp_path / "data"
    folder.mkdir()
    for name, part in (("train", train), ("valid", valid)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    out = tmp_path / "a"
    model = ("--model", tiny_folder, "--objective", "kto")
    ran = succeeds("train", *model, "--data", folder, "--adapter-path", out, "--iters", 2, "--batch-size", 4,
              "--sample-tokens", 0, "--steps-per-report", 1)  # fmt: skip
    assert "nan" not in (ran.err + ran.out).lower()
    lines = metrics(out)
    assert lines[0]["margin"] is None
    assert any(line["margin"] is not None for line in lines)
    measure = ("evaluate", *model, "--data", folder / "valid.jsonl", "--adapter-path", out)
    shown, found = run(*measure), run(*measure, "--json")
    assert "nan" not in shown.out.lower()
    values = json.loads(found.out, parse_constant=lambda name: math.inf)
    assert values["margin"] is None
    assert math.isfinite(values["chosen_rewards"])


def test_top_p_0_is_greedy():
    logprobs = mx.log(mx.array([[0.3, 0.4, 0.2, 0.1]]))
    drawn = [Sampler(Sampling(top_p=0.0, seed=seed), 4)(logprobs).item() for seed in range(12)]
    assert set(drawn) == {1}
    assert len({Sampler(Sampling(seed=seed), 4)(logprobs).item() for seed in range(12)}) > 1


def test_a_request_keeps_its_top_p():
    assert read_completion({"prompt": "x", "top_p": 0}).sampling.top_p == 0
    assert read_completion({"prompt": "x"}).sampling.top_p == 1
