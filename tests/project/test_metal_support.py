"""What mlx's GPU backends lack, as listed from its sources, is not asked of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("metal_support", ROOT / "scripts" / "metal_support.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def listed(script):
    return json.loads(script.LIST.read_text(encoding="utf-8"))


def test_nothing_of_ours_asks_a_gpu_for_what_it_lacks(script, listed):
    used = script.uses(ROOT / "mlx_lora", listed)
    assert {"linalg.qr", "linalg.eigh", "distributed.all_sum"} <= {use.name for use in used}
    assert [use for use in used if use.guard is None] == []


def test_unguarded_uses_are_found(script, listed):
    text = """
import mlx.core as mx
a = mx.linalg.svd(x)
b = mx.linalg.inv(x, stream=mx.gpu)
c = mx.zeros(2, dtype=mx.float64)
with mx.stream(mx.cpu):
    d = mx.linalg.qr(mx.zeros(2, dtype=mx.float64))
e = mx.linalg.eigh(x, stream=mx.cpu)
f = mx.linalg.norm(x)
"""
    found = {use.line: use.guard for use in script.uses_in(text, "a.py", script.refused(listed))}
    assert [line for line, guard in found.items() if guard is None] == [3, 4, 5]
    assert set(found) == {3, 4, 5, 7, 8}


def test_the_list_knows_the_installed_functions(script, listed):
    """A name that mlx no longer has would hide the function that took its place."""
    for name in script.refused(listed) - {"linalg.det", "linalg.slogdet"}:
        owner = mx
        for part in name.split("."):
            owner = getattr(owner, part, None)
        assert owner is not None, name
    assert all(primitive in script.FUNCTIONS for primitive in [*listed["metal"], *listed["cuda"]])


def test_sources_are_read(script):
    """The few lines that the list depends on, as mlx writes them."""
    texts = {
        "mlx/version.h": "#define MLX_VERSION_MAJOR 1\n#define MLX_VERSION_MINOR 2\n#define MLX_VERSION_PATCH 3\n",
        "mlx/linalg.cpp": 'check_cpu_stream(s, "[linalg::qr]");',
        "mlx/array.cpp": "float64 is not supported on the GPU",
        "mlx/ops.cpp": "",
        "mlx/primitives.cpp": 'throw std::runtime_error("[QuantizedMatmul::vmap] NYI");',
        "mlx/backend/metal/primitives.cpp": 'throw std::runtime_error(\n "[SVD::eval_gpu] Metal SVD NYI.");',
        "mlx/backend/metal/allocator.cpp": "",
        "mlx/backend/metal/kernels/quantized.metal": "instantiate_quantized_types(64, bits)\ninstantiate_quantized_groups(4)",
        "mlx/backend/metal/kernels/fp_quantized.metal": "instantiate_quantized_modes(type, nvfp4, 16, 4)",
        "mlx/backend/metal/scaled_dot_product_attention.cpp": "supported_head_dim = (query_head_dim == 64);"
        " supported_head_dim = (query_head_dim == 128);",
        "mlx/backend/cuda/primitives.cpp": "NO_GPU_MULTI(QRF)\n",
    }
    found = script.support(texts)
    assert found["metal"] == {"SVD": "[SVD::eval_gpu] Metal SVD NYI."}
    assert (found["cuda"], found["transforms"], found["source_version"]) == (
        ["QRF"],
        ["QuantizedMatmul::vmap"],
        "1.2.3",
    )
    assert (found["groups"], found["bits"], found["modes"]) == ([64], [4], ["nvfp4 group 16, 4 bits"])
    assert found["heads"] == {"vector": [64], "full": [128]}
    assert found["limits"] == ["float64: refused in every operation"]
