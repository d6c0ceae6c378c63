"""`make check` finds the tests that a change touches: by what they import, also through helpers, and by what they patch."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("check")


@pytest.fixture
def tree(check, tmp_path, monkeypatch):
    """A checkout with three tests: one, in a room, imports a module, one a helper that does, one patches it by name."""
    (tmp_path / "tests" / "data").mkdir(parents=True)
    for name, text in {
        "data/test_direct": "from mlx_lora.data.read import Rows\n",
        "test_helped": "import helper\n",
        "helper": "from mlx_lora.data import read\n",
        "test_patched": "PLACE = 'mlx_lora.data.read.SplitRows'\n",
        "test_other": "from mlx_lora.data.reader import Rows\nPAGE = 'docs/data.md'\n",
    }.items():
        (tmp_path / "tests" / f"{name}.py").write_text(text)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    forget(check)
    yield check
    forget(check)


def forget(check) -> None:
    check.imported.cache_clear()
    check.reached.cache_clear()


def test_a_module_finds_its_tests(tree):
    own, near = tree.touched_tests(["mlx_lora/data/read.py"])
    assert own == []
    assert sorted(near) == ["tests/data/test_direct.py", "tests/test_helped.py", "tests/test_patched.py"]


def test_a_helper_a_test_and_a_page_find_theirs(tree):
    assert tree.touched_tests(["tests/helper.py"]) == ([], ["tests/test_helped.py"])
    assert tree.touched_tests(["tests/test_other.py"]) == (["tests/test_other.py"], [])
    assert tree.touched_tests(["docs/data.md"]) == ([], ["tests/test_other.py"])
    assert tree.touched_tests(["docs/none.md"]) == ([], [])


def test_every_room_has_tests_that_are_found(check):
    for room in ("data/read", "objectives/table", "studio/web", "trainer/step", "kernels/table", "engine/engine"):
        assert check.touched_tests([f"mlx_lora/{room}.py"])[1], room
