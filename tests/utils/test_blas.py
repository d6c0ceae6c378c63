"""The fast BLAS on Linux: loaded, reported, switched off, and right."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import mlx_lora
from mlx_lora.utils.blas import THREAD_VARIABLES, local_ranks, usable_cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")
PRINT = "import mlx_lora; print(mlx_lora.BLAS.fast, mlx_lora.BLAS.advice)"


def in_a_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return done.stdout.strip()


@pytest.mark.skipif("MLX_LORA_BLAS" in os.environ, reason="chosen by hand")
def test_these_tests_run_on_it():
    assert mlx_lora.BLAS.fast, mlx_lora.BLAS.advice


def test_products_are_right():
    a, b = np.random.default_rng(0).normal(size=(2, 257, 129)).astype(np.float32)
    assert np.allclose(mx.array(a) @ mx.array(b).T, a.astype(np.float64) @ b.T.astype(np.float64), atol=1e-4)
    _, values, _ = mx.linalg.svd(mx.array(a), stream=mx.cpu)
    assert np.allclose(values, np.linalg.svd(a, compute_uv=False), rtol=1e-4)


def test_it_can_be_turned_off_and_says_why_it_is_slow():
    assert in_a_process(PRINT, MLX_LORA_BLAS="off") == "False turned off by MLX_LORA_BLAS=off"
    assert "did not load" in in_a_process(PRINT, MLX_LORA_BLAS="/no/such.so")
    assert "before mlx.core" in in_a_process("import mlx.core; " + PRINT)


def test_the_shim_serves_where_no_system_library_is(tmp_path):
    code = "from mlx_lora.utils import blas; blas.SYSTEM_OPENBLAS = 'none.so'; print(blas.load_fast_blas())"
    code = f"import sys; import importlib.util; {code}"
    out = in_a_process(code, MLX_LORA_CACHE=str(tmp_path))
    assert "scipy-openblas32" in out
    assert list((tmp_path / "blas").glob("shim-*.so"))


def test_other_libraries_do_not_find_functions_that_mlx_does_not_need(tmp_path):
    """With all of OpenBLAS in front of its own functions, torch ends with a segmentation fault."""
    code = "import ctypes, mlx_lora; names = ctypes.CDLL(None); print([hasattr(names, n) for n in {names}])"
    names = ["cblas_sgemm", "cblas_sgemm_batch", "cblas_saxpy"]
    out = in_a_process(code.replace("{names}", repr(names)), MLX_LORA_BLAS="auto", MLX_LORA_CACHE=str(tmp_path))
    assert out == "[True, False, False]"


@pytest.mark.parametrize(("m", "n", "k"), [(1, 300, 129), (300, 1, 129), (1, 1, 64), (1, 7, 1), (2, 5, 3)])
def test_products_with_one_row_or_column_are_right_in_every_layout(m, n, k):
    """The shim passes these to another function of OpenBLAS."""
    random = np.random.default_rng(0)
    c = random.normal(size=(m, n)).astype(np.float32)
    for turned_a in (False, True):
        for turned_b in (False, True):
            a = random.normal(size=(k, m) if turned_a else (m, k)).astype(np.float32)
            b = random.normal(size=(n, k) if turned_b else (k, n)).astype(np.float32)
            exact = (a.T if turned_a else a).astype(np.float64) @ (b.T if turned_b else b)
            left = mx.array(a).T if turned_a else mx.array(a)
            right = mx.array(b).T if turned_b else mx.array(b)
            assert np.allclose(left @ right, exact, atol=1e-4)
            assert np.allclose(mx.addmm(mx.array(c), left, right, alpha=0.5, beta=2.0), 0.5 * exact + 2 * c, atol=1e-4)


def test_what_was_in_memory_does_not_reach_a_product():
    x, w = mx.random.normal((1, 64)), mx.random.normal((300, 64))
    for _ in range(20):
        freed = mx.full((300,), float("nan"))
        mx.eval(freed)
        del freed
        assert not mx.isnan(x @ w.T).any()


THREADS = """
import ctypes, os, mlx_lora
here = ctypes.CDLL(None)
names = ("openblas_get_num_threads", "scipy_openblas_get_num_threads")
print(next(getattr(here, name)() for name in names if hasattr(here, name)))
"""


@pytest.mark.skipif("MLX_LORA_BLAS" in os.environ, reason="chosen by hand")
def test_ranks_on_one_machine_share_its_cores(tmp_path, monkeypatch):
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    cores = usable_cores()
    assert int(in_a_process(THREADS)) == cores
    hosts = tmp_path / "hosts.json"
    rank = {"MLX_HOSTFILE": str(hosts), "MLX_RANK": "0"}
    for here, others in ((2, 2), (2 * cores, 0), (1, 3), (2, 0)):
        rows = [[f"127.0.0.1:{5000 + n}"] for n in range(here)] + [[f"10.0.0.{n}:5000"] for n in range(others)]
        hosts.write_text(json.dumps(rows))
        assert local_ranks(rank) == here
    assert int(in_a_process(THREADS, **rank)) == max(1, cores // 2)
    assert int(in_a_process(THREADS, **rank, OPENBLAS_NUM_THREADS="1")) == 1  # what a user says counts
    assert local_ranks({"OMPI_COMM_WORLD_LOCAL_SIZE": str(cores)}) == cores


def test_ranks_whose_places_are_not_known_are_taken_for_one(tmp_path):
    hosts = tmp_path / "hosts.json"
    assert local_ranks({}) == 1
    assert local_ranks({"MLX_HOSTFILE": str(hosts), "MLX_RANK": "0"}) == 1
    for content in ("", "[]", "{}", "[1, 2]", "[[]]", "no JSON"):
        hosts.write_text(content)
        assert local_ranks({"MLX_HOSTFILE": str(hosts), "MLX_RANK": "0"}) == 1
    hosts.write_text('[["a:1", "a:2"], ["a:3", "a:4"], ["b:1", "b:2"]]')
    counts = [local_ranks({"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}) for rank in range(4)]
    assert counts == [2, 2, 1, 1]
