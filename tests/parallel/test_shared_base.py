"""A base that ranks share: the losses of a single process, from a part of its memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_runs import assert_same_run, command, train, weights
from ranks import Started, in_one_session
from run_cli import run

from mlx_lora.parallel.sharded_base import ALIGNMENT, cut

STEPS_OF_ONE = pytest.mark.float32("ranks add a batch's sums in another order, and eight steps multiply the difference")


@pytest.fixture(scope="module")
def alone(tiny_folder, chats, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "a"
    assert run("train", *command(tiny_folder, chats, folder)).code == 0
    return folder


def shared(model, data, folder: Path, ranks: int, *extra) -> tuple[Path, str]:
    words = train(*command(model, data, folder / "a", *extra))
    ended = Started([words] * ranks, folder / "ranks").wait()
    assert ended.codes == [0] * ranks, ended.errs
    return folder / "a", ended.errs[0]


ONE_ROW = ("--batch-size", 1, "--grad-accumulation-steps", 2)


@pytest.fixture(scope="module")
def two(tiny_folder, chats, tmp_path_factory):
    """Runs of the same two processes: with unequal parts of the base, and with a row for one of them; and what they printed."""
    root = tmp_path_factory.mktemp("two")
    runs = [
        command(tiny_folder, chats, root / "3:1", "--shard-base", "3:1"),
        command(tiny_folder, chats, root / "a row", "--shard-base", "even", *ONE_ROW),
    ]
    return root, in_one_session(runs, 2, root / "session")


@STEPS_OF_ONE
def test_ranks_that_share_the_base_take_the_steps_of_one(alone, two):
    folder, printed = two
    assert_same_run(alone, folder / "3:1")
    assert printed.count("base shared by 2 processes") == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@STEPS_OF_ONE
def test_so_do_more_of_them_with_equal_parts(ranks, alone, tiny_folder, chats, tmp_path):
    folder, printed = shared(tiny_folder, chats, tmp_path, ranks, "--shard-base", "even")
    assert_same_run(alone, folder)
    assert f"base shared by {ranks} processes" in printed


@STEPS_OF_ONE
def test_a_rank_without_rows_keeps_up(two, tiny_folder, chats, tmp_path):
    assert run("train", *command(tiny_folder, chats, tmp_path / "alone", *ONE_ROW)).code == 0
    assert_same_run(tmp_path / "alone", two[0] / "a row")


@pytest.mark.slow
@STEPS_OF_ONE
def test_products_are_kept_and_dropout_is_drawn_once(tiny_folder, chats, tmp_path):
    extra = ("--shard-base", "even", "--dropout", 0.1)
    block = shared(tiny_folder, chats, tmp_path / "block", 2, *extra)[0]
    assert_same_run(
        block, shared(tiny_folder, chats, tmp_path / "kept", 2, *extra, "--grad-checkpoint", "selective")[0]
    )


def test_what_cannot_share_a_base_is_refused(tiny_folder, chats, tmp_path):
    asked = command(tiny_folder, chats, tmp_path / "a", "--shard-base", "even")
    assert "this run is a single process" in run("train", *asked).err


@pytest.mark.slow
def test_as_many_parts_as_processes_are_asked_for(tiny_folder, chats, tmp_path):
    asked = command(tiny_folder, chats, tmp_path / "a", "--shard-base", "1:2:3")
    ended = Started([train(*asked)] * 2, tmp_path / "ranks").wait()
    assert "3 parts for 2 processes" in ended.message(0)


@pytest.mark.slow
def test_ranks_choose_by_themselves_whether_they_share_the_base(alone, tiny_folder, chats, tmp_path):
    asked = ("--parallel", "auto")
    runs = [
        command(tiny_folder, chats, tmp_path / "auto", *asked),
        command(tiny_folder, chats, tmp_path / "pissa", *asked, "--method", "pissa"),
    ]
    printed = in_one_session(runs, 2, tmp_path / "session")
    assert printed.count("Parallel: data with a whole base") == 2
    assert "data with a shared base not possible (--method pissa" in printed
    assert run("train", *command(tiny_folder, chats, tmp_path / "alone", *asked)).code == 0
    assert weights(tmp_path / "alone") == weights(alone)
    refused = run("train", *command(tiny_folder, chats, tmp_path / "a", *asked, "--shard-base", "even"))
    assert refused.code == 2
    assert "it decides what each process has" in refused.err


def test_parts_are_cut_as_asked():
    assert cut(1600, [1, 1]) == [800, 800]
    assert cut(1600, [3, 1]) == [1200, 400]
    for size in (16, 160, 16 * 1001):
        parts = cut(size, [0.2, 0.5, 0.3])
        assert sum(parts) == size
        assert all(part % ALIGNMENT == 0 for part in parts)
