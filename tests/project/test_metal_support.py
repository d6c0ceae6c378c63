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
