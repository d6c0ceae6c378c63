"""Models and datasets found locally, and on a stand-in for the hub that the real client talks to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import COMMIT, hub_server, run_with_hub

from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_adapter, resolve_model


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


def test_hub_downloads_are_pinned_and_hold_no_more_than_needed(endpoint, tmp_path) -> None:
    plain, at_tag, picked, named, data = calls(
        tmp_path,
        endpoint,
        model("org/model"),
        model("org/model", "v1"),
        model("org/ggufs:q4_k_m"),
        model("org/ggufs:m.Q8_0.gguf"),
        ("download_dataset_files", ("org/data",)),
    )
    assert plain["made"] == ["folder", "org/model", COMMIT, COMMIT]
    assert plain["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert at_tag["made"] == plain["made"]
    assert picked["made"] == ["gguf", "org/ggufs:m.Q4_K_M.gguf", COMMIT, "m.Q4_K_M.gguf"]
    assert picked["files"] == ["README.md", "m.Q4_K_M.gguf"]
    assert named["made"][3] == "m.Q8_0.gguf"
    assert data["files"] == ["data/train.jsonl"]


def test_an_embedding_model_comes_with_its_pooling(endpoint, tmp_path) -> None:
    """`files` of resolve_tokenizer has paths, that of resolve_model names at the top."""
    parts, whole = calls(tmp_path, endpoint, ("resolve_tokenizer", ("org/embedder",)), model("org/embedder"))
    few = ["1_Pooling/config.json", "config.json", "config_sentence_transformers.json", "modules.json"]
    assert parts["files"] == few
    assert whole["files"] == ["1_Pooling", *few[1:3], "model.safetensors", "modules.json"]


def test_hub_refusals_are_one_line_each(endpoint, tmp_path) -> None:
    results = calls(
        tmp_path,
        endpoint,
        model("org/missing"),
        model("org/model", "v9"),
        model("org/gated"),
        model("org/pickles"),
        model("org/ggufs"),
        model("org/ggufs:Q2"),
        ("download_dataset_files", ("org/empty",)),
        ("download_dataset_files", ("org/missing",)),
    )
    errors = [result["error"] for result in results]
    assert {result["type"] for result in results} == {"InputError"}
    assert not any("\n" in error for error in errors)
    missing, revision, gated, pickles, several, unmatched, empty, no_data = errors
    assert "not on the hub, or private" in missing
    assert "no revision 'v9'" in revision
    assert "https://huggingface.co/org/gated" in gated
    assert "hf auth login" in gated
    assert ".safetensors" in pickles
    assert "m.Q4_K_M.gguf, m.Q8_0.gguf" in several
    assert "org/ggufs:m.Q4_K_M.gguf" in several
    assert "no GGUF file matches 'Q2'" in unmatched
    assert "no json, jsonl, csv, parquet or txt" in empty
    assert "dataset 'org/missing'" in no_data


def adapter(*args: object) -> tuple:
    return ("resolve_adapter", args)


def test_an_adapter_is_fetched_without_pickles_models_and_checkpoints(endpoint, tmp_path) -> None:
    wanted = ["README.md", "adapter_config.json", "adapters.safetensors", "chat_template.jinja"]
    for found in calls(tmp_path, endpoint, adapter("org/adapter"), adapter("org/adapter", "v1")):
        assert found["files"] == wanted
    (cached,) = calls(tmp_path, endpoint, adapter("org/adapter"), HF_HUB_OFFLINE="1")
    assert cached["files"] == wanted


def test_refused_adapters_are_one_line_each(endpoint, tmp_path) -> None:
    results = calls(
        tmp_path,
        endpoint,
        adapter("org/missing"),
        adapter("org/adapter", "v9"),
        adapter("org/model"),
        adapter("org/pickled-adapter"),
        adapter("org/bare-adapter"),
        adapter("./here", "v1"),
        adapter(None, "v1"),
    )
    errors = [result["error"] for result in results]
    assert {result["type"] for result in results} == {"InputError"}
    assert not any("\n" in error for error in errors)
    missing, revision, no_adapter, pickles, bare, local, none = errors
    assert "adapter 'org/missing' (no such folder here): not on the hub, or private" in missing
    assert "has no revision 'v9'; check --adapter-revision" in revision
    assert "no adapter_config.json" in no_adapter
    assert "only adapter_model.bin, which can run code" in pickles
    assert "no adapters.safetensors in it" in bare
    assert "--adapter-revision v1: only an adapter on the hub" in local
    assert local == none
    offline, unreachable = (
        calls(tmp_path, endpoint, adapter("org/absent"), HF_HUB_OFFLINE="1"),
        calls(tmp_path, "http://127.0.0.1:9", adapter("org/absent")),
    )
    assert "HF_HUB_OFFLINE" in offline[0]["error"]
    assert "Hugging Face is unreachable" in unreachable[0]["error"]
    assert "mlx-lora demo" in unreachable[0]["error"]  # it works all the same


def test_an_adapter_folder_here_comes_first(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = touch(tmp_path / "org" / "adapter", "adapter_config.json")
    assert resolve_adapter("org/adapter").samefile(here)
    assert resolve_adapter(None) is None
    assert resolve_adapter("./no/such") == Path("no/such")  # its reader says so


def test_offline_uses_the_cache_and_says_what_is_not_there(endpoint, tmp_path) -> None:
    calls(tmp_path, endpoint, model("org/model"), model("org/ggufs:Q8_0"))
    wanted = (model("org/model"), model("org/ggufs:Q8_0"), model("org/pickles"))
    cached, gguf, absent = calls(tmp_path, endpoint, *wanted, HF_HUB_OFFLINE="1")
    assert cached["made"] == ["folder", "org/model", COMMIT, COMMIT]
    assert gguf["made"] == ["gguf", "org/ggufs:m.Q8_0.gguf", COMMIT, "m.Q8_0.gguf"]
    assert "HF_HUB_OFFLINE" in absent["error"]

    cached, _, absent = calls(tmp_path, "http://127.0.0.1:9", *wanted)
    assert cached["made"] == ["folder", "org/model", COMMIT, COMMIT]
    assert "Hugging Face is unreachable" in absent["error"]
    assert "refused" in absent["error"]


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
