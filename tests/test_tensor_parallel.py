"""Layers that ranks have parts of: the losses and the adapter of a single process."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_runs import assert_same_run, command, train
from ranks import Started
from run_cli import run


@pytest.fixture(scope="module")
def alone(tiny_folder, chats, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "a"
    assert run("train", *command(tiny_folder, chats, folder)).code == 0
    return folder


def cut(model, data, folder: Path, ranks: int, *extra) -> tuple[Path, str]:
    words = train(*command(model, data, folder / "a", "--parallel", "tensor", *extra))
    ended = Started([words] * ranks, folder / "ranks").wait()
    assert ended.codes == [0] * ranks, ended.errs
    return folder / "a", ended.errs[0]


def test_ranks_with_parts_of_layers_take_the_steps_of_one(alone, tiny_folder, chats, tmp_path):
    folder, printed = cut(tiny_folder, chats, tmp_path, 2)
    assert_same_run(alone, folder)
    assert "layers cut among 2 processes" in printed
