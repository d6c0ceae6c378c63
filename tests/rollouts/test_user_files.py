"""Files of a user's own code: what they may import, and that two files of one name stay apart."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_lora.rollouts import user_code as user_files
from mlx_lora.rollouts.user_code import from_file
from mlx_lora.utils.errors import InputError

REWARD = """
from __future__ import annotations
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from user_helpers import number

@dataclass
class Score:
    value: float

def mine(completions, **columns):
    return [Score(float(number))] * len(completions)

def late(completions, **columns):
    import user_later
    return [user_later.number] * len(completions)

def check(text):
    return Score(len(text) + number), __file__

def pooled(completions, **columns):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return list(pool.map(check, completions))
"""


@pytest.fixture
def paths(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("user_helpers", "user_later", "user_here"):
        sys.modules.pop(name, None)


@pytest.fixture
def folders(tmp_path, paths):
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "rewards.py").write_text(REWARD)
        (folder / "user_helpers.py").write_text(f"number = {number}\n")
        (folder / "user_later.py").write_text("number = 3\n")
    return tmp_path


def test_a_file_may_have_dataclasses_and_import_what_is_beside_it(folders):
    mine = from_file("--reward", f"{folders / '1' / 'rewards.py'}:mine", "function")
    [score] = mine(["a"])
    assert score.value == 1
    assert pickle.loads(pickle.dumps(score)) == score
    assert from_file("--reward", f"{folders / '1' / 'rewards.py'}:late", "function")(["a"]) == [3]


def test_files_of_one_name_in_two_folders_are_two(folders):
    functions = [from_file("--reward", f"{folders / name / 'rewards.py'}:mine", "function") for name in ("1", "2")]
    assert [function(["a"])[0].value for function in functions] == [1, 2]
    assert len({type(function(["a"])[0]) for function in functions}) == 2


def test_a_reward_may_spawn_processes(folders):
    """As multiprocessing does on macOS; each file's processes see what is beside that file."""
    for number in (1, 2):
        file = folders / str(number) / "rewards.py"
        mine, pooled = (from_file("--reward", f"{file}:{name}", "function") for name in ("mine", "pooled"))
        [(score, path)] = pooled(["abc"])
        assert (score.value, path) == (3 + number, str(file))
        assert type(score) is type(mine(["a"])[0])


def test_what_spawned_processes_import_is_private_and_removed(tmp_path):
    (tmp_path / "r.py").write_text("def f(): return 1\n")
    script = """if True:
        import os, sys
        from mlx_lora.rollouts.user_code import from_file
        from_file("--reward", sys.argv[1], "function")
        [folder] = {one for one in sys.path if os.path.basename(one).startswith("mlx_lora_users_")}
        if os.fork() == 0:
            sys.exit()
        os.wait()
        print(folder, oct(os.stat(folder).st_mode)[-3:], len(os.listdir(folder)))
    """
    command = [sys.executable, "-c", script, f"{tmp_path / 'r.py'}:f"]
    folder, mode, files = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert (mode, files) == ("700", "1")
    assert not Path(folder).exists()


def test_a_spawned_process_does_not_load_training_again():
    """It runs the main module again, `python -m mlx_lora.train`, under another name."""
    script = """if True:
        import runpy, sys
        runpy.run_module("mlx_lora.train", run_name="__mp_main__", alter_sys=True)
        assert not {"mlx.core", "mlx_lora.api.train", "mlx_lora.cli.train"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_file_needs_no_temporary_folder(tmp_path, paths, monkeypatch):
    (tmp_path / "alone.py").write_text("def f(): return 5\n")

    def full() -> None:
        raise OSError("full")

    monkeypatch.setattr(user_files, "_loaders", full)
    assert from_file("--reward", f"{tmp_path / 'alone.py'}:f", "function")() == 5


def test_a_file_may_import_from_the_current_folder(tmp_path, paths, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "user_here.py").write_text("number = 4\n")
    (tmp_path / "code" / "r.py").write_text("from user_here import number\ndef f(): return number\n")
    monkeypatch.chdir(tmp_path)
    assert from_file("--reward", "code/r.py:f", "function")() == 4


@pytest.mark.parametrize(("last", "named"), [("1 / 0", "ZeroDivisionError"), ("sys.exit()", "SystemExit")])
def test_a_file_that_fails_leaves_nothing(last, named, tmp_path, paths):
    (tmp_path / "broken.py").write_text(f"import sys\nassert __name__ in sys.modules\n{last}\n")
    before = set(sys.modules)
    with pytest.raises(InputError, match=named):
        from_file("--reward", f"{tmp_path / 'broken.py'}:f", "function")
    assert set(sys.modules) == before


def test_a_neighbor_that_a_function_imported_is_not_another_folders(folders):
    """The first folder's is at hand when a file beside another of this name is run."""
    first = from_file("--reward", f"{folders / '1' / 'rewards.py'}:late", "function")
    assert first(["a"]) == [3]
    (folders / "2" / "user_later.py").write_text("number = 5\n")
    (folders / "2" / "at_once.py").write_text("from user_later import number\ndef f(): return number\n")
    assert from_file("--reward", f"{folders / '2' / 'at_once.py'}:f", "function")() == 5
