"""Preference training in two processes takes the steps of one."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from ranks import Started


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto", "reward"])
def test_two_ranks_take_the_steps_of_one(objective, tiny_folder, tmp_path):
    rows = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No" + "!" * (n % 5)} for n in range(24)]
    if objective == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in rows
            for name in ("chosen", "rejected")
        ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    found = {}
    for count in (1, 2):
        command = ["-m", "mlx_lora.train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / str(count),
                   "--objective", objective, "--iters", 4, "--learning-rate", "5e-3", "--batch-size", 6, "--sample-tokens", 0,
                   "--steps-per-report", 1, "--val-batches", 2, "--kernels", "ours"]  # fmt: skip
        ended = Started([command] * count, tmp_path / f"hosts{count}").wait()
        assert ended.codes == [0] * count, ended.errs
        lines = [json.loads(line) for line in (tmp_path / str(count) / "metrics.jsonl").read_text().splitlines()]
        found[count] = lines, mx.load(str(tmp_path / str(count) / "adapters.safetensors"))
    (one, alone), (two, together) = found[1], found[2]
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        for name in ("loss", "val_loss", "margin"):
            if first[name] is not None:
                assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-5), name
    for name, value in alone.items():
        assert np.allclose(np.array(value), np.array(together[name]), rtol=1e-3, atol=1e-5), name
    assert one[-1]["val_loss"] != pytest.approx(one[0]["val_loss"], rel=1e-3)
