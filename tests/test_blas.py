"""The fast BLAS on Linux: loaded, reported, switched off, and right."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import mlx_lora

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
    code = "from mlx_lora.system import blas; blas.SYSTEM_OPENBLAS = 'none.so'; print(blas.load_fast_blas())"
    code = f"import sys; import importlib.util; {code}"
    out = in_a_process(code, MLX_LORA_CACHE=str(tmp_path))
    assert "scipy-openblas32" in out
    assert list((tmp_path / "blas").glob("shim-*.so"))
