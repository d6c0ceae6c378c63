"""A folder is replaced whole, or stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_lora.utils.files import replacing_folder


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
