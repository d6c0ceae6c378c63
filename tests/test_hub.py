"""Models and datasets found locally, and on a stand-in for the hub that the real client talks to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlx_lora.errors import InputError
from mlx_lora.sources.hub import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "org/model": [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "consolidated.safetensors",
        "model.bin",
        "x.py",
    ],
    "org/ggufs": ["m.Q4_K_M.gguf", "m.Q8_0.gguf", "mmproj.gguf", "README.md"],
    "org/pickles": ["config.json", "pytorch_model.bin"],
    "org/gated": ["config.json", "model.safetensors"],
    "datasets/org/data": ["data/train.jsonl", "README.md", "dataset_infos.json"],
    "datasets/org/empty": ["README.md"],
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as the client uses for a snapshot."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        api = path.startswith("api/")
        repo = next((name for name in FILES if name in path), None)
        if repo is None:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        if "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", "v1", COMMIT):
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": n, "size": len(n), "oid": f"{i:040x}"} for i, n in enumerate(FILES[repo])
            ]
            return self.reply(200, json.dumps(entries).encode(), {})
        if api:
            siblings = [{"rfilename": name} for name in FILES[repo]]
            name = repo.removeprefix("datasets/")
            return self.reply(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), {})
        if repo == "org/gated":
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        name = path.split(f"resolve/{COMMIT}/")[1]
        return self.reply(200, name.encode(), {"ETag": f'"{FILES[repo].index(name):040x}"', "X-Repo-Commit": COMMIT})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


# The client reads its environment at import, so each setting needs a process of its own; one takes several calls.
CALLS = """
import json, sys
from mlx_lora.errors import InputError, RunError
from mlx_lora.sources import hub
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
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(wanted)],
        env={**kept, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
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
    assert picked["files"] == ["m.Q4_K_M.gguf"]
    assert named["made"][3] == "m.Q8_0.gguf"
    assert data["files"] == ["data/train.jsonl"]


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


def test_offline_uses_the_cache_and_says_what_is_not_there(endpoint, tmp_path) -> None:
    calls(tmp_path, endpoint, model("org/model"), model("org/ggufs:Q8_0"))
    wanted = (model("org/model"), model("org/ggufs:Q8_0"), model("org/pickles"))
    cached, gguf, absent = calls(tmp_path, endpoint, *wanted, HF_HUB_OFFLINE="1")
    assert cached["made"] == ["folder", "org/model", COMMIT, COMMIT]
    assert gguf["made"] == ["gguf", "org/ggufs:m.Q8_0.gguf", COMMIT, "m.Q8_0.gguf"]
    assert "HF_HUB_OFFLINE" in absent["error"]

    cached, _, absent = calls(tmp_path, "http://127.0.0.1:9", *wanted)
    assert cached["made"] == ["folder", "org/model", COMMIT, COMMIT]
    assert "cannot be reached" in absent["error"]
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
