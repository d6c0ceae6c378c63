"""A folder is replaced whole, or stays as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import check_new_folder, replacing_folder


def test_it_replaces_the_earlier_folder_and_leaves_nothing_else(tmp_path):
    folder = tmp_path / "a"
    for text in ("first", "second"):
        with replacing_folder(folder) as temporary:
            (temporary / "file").write_text(text)
        assert (folder / "file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_earlier_folder_stays_when_the_new_one_cannot_be_written_or_renamed(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    with replacing_folder(folder) as temporary:
        (temporary / "file").write_text("first")
    with pytest.raises(ValueError, match="broken"), replacing_folder(folder):
        raise ValueError("broken")
    assert (folder / "file").read_text() == "first"
    real = Path.replace

    def refuse_new(self, target):
        if (self / "file").is_file() and (self / "file").read_text() == "second":
            raise OSError("no space left")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", refuse_new)
    with pytest.raises(OSError, match="no space"), replacing_folder(folder) as temporary:
        (temporary / "file").write_text("second")
    assert (folder / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def mounted(tmp_path, monkeypatch) -> Path:
    """An empty folder that cannot be renamed, as a mount point cannot."""
    folder, real = tmp_path / "disk", Path.replace
    folder.mkdir()

    def replace(self, target):
        if folder in (self, Path(target)):
            raise OSError("device or resource busy")
        return real(self, target)

    monkeypatch.setattr(Path, "is_mount", lambda self: self == folder)
    monkeypatch.setattr(Path, "replace", replace)
    return folder


def test_a_mount_point_is_filled_from_inside(mounted, tmp_path):
    for text in ("first", "second"):
        with replacing_folder(mounted) as temporary:
            assert temporary.parent == mounted
            (temporary / "file").write_text(text)
            (temporary / text).mkdir()
        assert sorted(path.name for path in mounted.iterdir()) == ["file", text]
        assert (mounted / "file").read_text() == text
    with pytest.raises(ValueError, match="broken"), replacing_folder(mounted):
        raise ValueError("broken")
    assert (mounted / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_a_mount_point_keeps_its_files_when_the_new_ones_cannot_move(mounted, tmp_path, monkeypatch):
    (mounted / "file").write_text("first")
    made, real = tmp_path / "made", Path.replace
    made.mkdir()
    for name in ("file", "z"):
        (made / name).write_text("second")

    def refuse_last(self, target):
        if self.name == "z" and Path(target).parent == mounted:
            raise OSError("no space left")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", refuse_last)
    with pytest.raises(OSError, match="no space"), replacing_folder(mounted) as temporary:
        shutil.copytree(made, temporary, dirs_exist_ok=True)
    assert {path.name: path.read_text() for path in mounted.iterdir()} == {"file": "first"}


def test_a_mount_point_with_files_is_refused_before_the_work(mounted):
    check_new_folder(mounted, force=False)
    (mounted / "config.json").write_text("{}")
    for force in (False, True):
        with pytest.raises(InputError, match="mount point"):
            check_new_folder(mounted, force=force)
