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
    adapter(None, "v1"): "--adapter-revision v1: only an adapter on the hub",
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
    assert resolve_adapter(None) is None
    assert resolve_adapter("./no/such") == Path("no/such")  # its reader says so


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
