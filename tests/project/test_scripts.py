"""Scripts of the checkout: make check finds the tests that a change touches, and house.py holds the package to its size."""

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


@pytest.fixture
def house(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("house")


def test_a_total_above_its_bar_is_told(house, monkeypatch, capsys):
    """`make lint` runs it."""
    _, bar = house.BARS["modules"]
    for value in (bar, bar + 1):
        monkeypatch.setattr(house, "measure", lambda value=value: {"modules": value})
        assert house.main([]) == (value > bar)
        assert ("above the bar" in capsys.readouterr().out) == (value > bar)


def test_a_plain_run_loads_few_modules(house, tiny_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a?", "completion": "b"}\n' * 4 + '{"prompt": "c?", "completion": "d"}\n' * 4)
    assert house.loaded(str(tiny_folder), str(data)) <= house.BARS["modules of a plain run"][1]


def test_what_is_counted(house, tmp_path, monkeypatch):
    file = tmp_path / "losses" / "a.py"
    file.parent.mkdir()
    file.write_text(
        '''"""What it is."""\nimport mlx.nn as nn\nfrom mlx_lm.models import _private\n\n
def f(arrays, layer, other):
    """Do it."""
    layer.__class__ = other
    nn.Linear = other
    raise InputError("--one with --two: no")
    return arrays[0], other._hidden
'''
    )
    monkeypatch.setattr(house, "PACKAGE", tmp_path)
    monkeypatch.setattr(house, "ROOT", tmp_path)
    assert house.count([file]) == 7
    assert len(list(house.by_number())) == len(list(house.refusals())) == 1
    assert [place.split(" ", 1)[1] for place in house.foreign_privates()] == [
        "_private", "__class__ =", "Linear =", "_hidden",
    ]  # fmt: skip
