"""A stand-in for the hub that the real client talks to: as much of its API as snapshots and commits need."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

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
    "org/embedder": [
        "config.json",
        "model.safetensors",
        "modules.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "1_Pooling/x/config.json",
        "onnx/config.json",
        "1/config.json",
    ],
    "org/ggufs": ["m.Q4_K_M.gguf", "m.Q8_0.gguf", "mmproj.gguf", "README.md"],
    "org/pickles": ["config.json", "pytorch_model.bin"],
    "org/gated": ["config.json", "model.safetensors"],
    "org/adapter": [
        "adapter_config.json",
        "adapters.safetensors",
        "README.md",
        "chat_template.jinja",
        "model.safetensors",
        "optimizer.pt",
        "training_args.bin",
        "checkpoints/step-000001/adapters.safetensors",
    ],
    "org/pickled-adapter": ["adapter_config.json", "adapter_model.bin"],
    "org/bare-adapter": ["adapter_config.json"],
    "datasets/org/data": ["data/train.jsonl", "README.md", "dataset_infos.json"],
    "datasets/org/empty": ["README.md"],
    # Names that no honest hub has: a file must never land outside the client's cache.
    "org/climbing": [
        "config.json",
        "model.safetensors",
        "../../../../../escaped.json",
        "/escaped.json",
        "a/../../x.json",
    ],
    "org/climbing-gguf": ["../../../../../escaped.gguf"],
    "datasets/org/climbing": ["../../../../../../escaped.jsonl", "train.jsonl"],
}
TOKENS = {"hf_write": 200, "hf_read": 403}  # what a commit with this token is answered; any other: 401


class Hub(BaseHTTPRequestHandler):
    """One request; the server holds what was uploaded (`repos`) and the folders it serves for real (`folders`)."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        api = path.startswith("api/")
        listed = {
            **FILES,
            **{name: sorted(p.name for p in folder.iterdir()) for name, folder in self.server.folders.items()},
        }
        if path == "api/models":
            asked = dict(parse_qsl(self.path.partition("?")[2]))
            names = [name for name in listed if asked.get("search", "") in name and not name.startswith("datasets/")]
            return self.answer([{"id": name, "downloads": 7, "likes": 1, "tags": []} for name in names])
        if (name := path.removeprefix("api/models/")) in self.server.repos:
            return self.answer(
                {"id": name, "sha": COMMIT, "private": self.server.repos[name]["private"], "siblings": []}
            )
        repo = max((name for name in listed if name in path), key=len, default=None)
        if repo is None:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        if "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", "v1", COMMIT):
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": n, "size": len(self.content(repo, n)), "oid": f"{i:040x}"}
                for i, n in enumerate(listed[repo])
            ]
            return self.reply(200, json.dumps(entries).encode(), {})
        if api:
            siblings = [{"rfilename": name} for name in listed[repo]]
            name = repo.removeprefix("datasets/")
            return self.reply(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), {})
        if repo == "org/gated":
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        name = unquote(path.split(f"resolve/{COMMIT}/")[1])
        headers = {"ETag": f'"{len(name):040x}"', "X-Repo-Commit": COMMIT}
        return self.reply(200, self.content(repo, name), headers)

    def content(self, repo: str, name: str) -> bytes:
        """A served folder's file, else the name itself."""
        folder = self.server.folders.get(repo)
        return (folder / name).read_bytes() if folder else name.encode()

    def do_POST(self) -> None:
        path, body = self.path.split("?")[0].strip("/"), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        status = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "), 401)
        if status != 200:
            return self.reply(status, json.dumps({"error": "no"}).encode(), {"X-Error-Message": "no right to do that"})
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            private = asked.get("visibility") == "private" or bool(asked.get("private"))  # newer clients, older ones
            known = name in self.server.repos
            self.server.repos.setdefault(name, {"private": private, "files": {}})
            return self.answer({"url": self.url(name), "name": name}, 409 if known else 200)
        repo = "/".join(path.split("/")[2:4])
        if "/preupload/" in path:
            modes = [
                {"path": f["path"], "uploadMode": self.mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if path.endswith("info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": self.url(f"lfs/{o['oid']}")}}} for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            files = self.server.repos[repo]["files"]
            for entry in map(json.loads, body.decode().splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.server.blobs[value["oid"]]
            return self.answer({"commitUrl": self.url(f"{repo}/commit/{COMMIT}"), "commitOid": COMMIT})
        return self.reply(404, b"", {})

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(200, b"", {})

    @staticmethod
    def mode(name: str) -> str:
        return "lfs" if name.endswith((".safetensors", ".gguf")) else "regular"

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{path}"

    def answer(self, value: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """The hub's memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.folders: dict[str, Path] = {}
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub_server() -> Iterator[Server]:
    """Run a hub for the time of the block."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_with_hub(
    home: Path, endpoint: str, arguments: list[Any], **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, since the client reads its environment at import."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**kept, **settings, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
