"""Today's families here and in transformers: parity/transformers_steps.py on few steps."""

from __future__ import annotations

import importlib

import pytest

FAMILIES = ("qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid", "kimi_linear", "gemma4", "gpt_oss")

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@pytest.fixture
def program():
    return importlib.import_module("parity.transformers_steps")


@pytest.mark.parametrize("family", FAMILIES)
def test_first_steps_are_transformers(family, program, tmp_path):
    pytest.importorskip("torch")
    found = program.run_family(family, 4, 600, tmp_path)
    assert found["good"], {name: value for name, value in found.items() if name != "losses"}
    assert found["loss"] < program.BAR
    assert found["more_scale"] > 10 * program.BAR
    assert not found["without_gradient"]


def test_every_family_is_tried(program):
    assert tuple(program.FAMILIES) == FAMILIES
