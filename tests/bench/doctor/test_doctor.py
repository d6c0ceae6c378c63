"""The doctor: one screen, one JSON object, and faults that are really found."""

from __future__ import annotations

import json
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from comparing import by_dtype
from huggingface_hub import constants
from run_cli import run, succeeds

from mlx_lora.bench.doctor import command as doctor
from mlx_lora.bench.doctor.check import compare_rows, self_test
from mlx_lora.bench.doctor.command import check_hub, check_repeats, check_versions

A_CPUS_SIZES = pytest.mark.cpu(
    "doctor's products for a GPU take minutes here, and mlx's CPU adds 16-bit products in 16 bits"
)


@pytest.fixture(autouse=True, scope="module")
def speeds():
    """Measure this machine's speeds once; that takes most of doctor's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "check_speed", cache(doctor.check_speed))
        yield


@pytest.fixture(scope="module")
def asked(speeds):
    return run("doctor", "--json", "--no-hub")


@pytest.mark.long
@A_CPUS_SIZES
def test_json_is_one_object_with_all_that_was_promised(asked):
    assert asked.code == 0, asked.err
    found = json.loads(asked.out)
    assert {"device", "memory_bytes", "blas", "versions", "checks", "ceilings", "working_set_bytes"} <= set(found)
    assert found["memory_bytes"] >= found["working_set_bytes"] > 0
    assert {check["name"] for check in found["checks"]} == {
        "versions",
        "memory",
        "BLAS",
        "arithmetic",
        "repeats",
        "speed",
        "kernels",
        "disk",
    }
    assert all(check["status"] != "failed" for check in found["checks"])
    for rates in found["ceilings"].values():
        assert all(rate > 0 for rate in rates.values())


@pytest.mark.long
@A_CPUS_SIZES
def test_the_screen_fits_one(asked):
    ran = succeeds("doctor", "--no-hub")
    assert len(ran.out.splitlines()) < 30
    assert "0 failed" in ran.out.splitlines()[-1]


@pytest.mark.long
@A_CPUS_SIZES
def test_wrong_arithmetic_fails(monkeypatch):
    assert all(one.status == "ok" for one in self_test())
    right = mx.quantized_matmul

    def wrong(x, *packed, transpose=True, **form):
        made = right(x, *packed, transpose=transpose, **form)
        return made if transpose else made * 1.01

    monkeypatch.setattr(mx, "quantized_matmul", wrong)
    bad = [one.name for one in self_test() if one.status == "failed"]
    assert bad
    assert all("backward" in what for what in bad)
    ran = run("doctor", "--no-hub")
    assert ran.code == 1
    assert "FAILED   arithmetic" in ran.out


def test_eleven_bits_are_not_float32():
    exact = np.random.default_rng(0).normal(size=(8, 64))
    right = mx.array(exact.astype(np.float32))
    bits = right.view(mx.uint32) & 0xFFFFE000
    found = [compare_rows("x", made, lambda rows: exact[rows], 2e-5) for made in (right, bits.view(mx.float32))]
    assert [one.status for one in found] == ["ok", "failed"]
    assert compare_rows("x", right * float("nan"), lambda rows: exact[rows], 2e-5).status == "failed"


def test_known_bad_versions_are_named():
    versions = {"mlx": "0.32.2", "mlx-lm": "0.32.2"}
    assert [check.status for check in check_versions(versions)] == ["ok"]
    bad = check_versions({"mlx": "0.31.2", "mlx-lm": "0.32.2.dev1"})
    assert [check.status for check in bad] == ["failed", "failed"]
    assert "pip install -U mlx" in bad[0].advice


def test_a_hub_that_is_away_is_a_warning(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    check = check_hub()
    assert (check.status, "127.0.0.1:9" in check.words) == ("warning", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in check_hub().words


def test_gradients_that_change_from_time_to_time_are_a_warning(monkeypatch):
    assert check_repeats().status == "ok"
    noise, right = iter(range(1, 100)), mx.grad
    monkeypatch.setattr(
        mx, "grad", lambda loss: lambda weight: right(loss)(weight) * (1 + by_dtype(1e-6, 1e-2) * next(noise))
    )
    check = check_repeats()
    assert (check.status, "embeddings and experts change" in check.words) == ("warning", True)
