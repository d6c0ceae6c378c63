"""The package stays as large as scripts/house.py says, or a commit raises its bar on purpose."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def house(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("house")


def test_no_total_is_above_its_bar(house, capsys):
    assert house.main([]) == 0, capsys.readouterr().out


def test_a_total_above_its_bar_is_told(house, monkeypatch, capsys):
    goal, _ = house.BARS["modules"]
    monkeypatch.setitem(house.BARS, "modules", (goal, len(house.files(house.PACKAGE)) - 1))
    assert house.main([]) == 1
    assert "above the bar" in capsys.readouterr().out


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
